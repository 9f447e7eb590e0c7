"""What befalls a run: kills, signals, full disks, bad numbers, bad files, bad networks.

Each happens for real, to a process of its own. The long versions are `python -m pytest -m slow`.
"""

import ctypes
import functools
import gzip
import hashlib
import http.server
import os
import pickle
import resource
import shutil
import signal
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import TINY, Script, link_run, run_script
from test_train import assert_same, load
from torchvision.datasets import CIFAR100
from torchvision.models import resnet18

import data
import utils

RUN = [*TINY, "--checkpoint-dir", "demo"]


def assert_explained(script: Script, *words: str, status: int = 1) -> None:
    """One to three lines on stderr with these words, the exit status, and no traceback."""
    lines = script.stderr.strip().splitlines()
    assert script.status == status, script.stderr
    assert 1 <= len(lines) <= 3 and "Traceback" not in script.stderr, script.stderr
    for word in words:
        assert word in script.stderr, f"{word!r} is not in: {script.stderr}"


def assert_whole(folder: Path) -> None:
    """last.pt, and best.pt if it is there, pass their checksums and load."""
    for path in [folder / "last.pt", *folder.glob("best.pt")]:
        assert zipfile.ZipFile(path).testzip() is None
        assert torch.load(path, weights_only=True)["model"]


# ---- kills and signals --------------------------------------------------------------------------


def slow_saves() -> None:
    """Stretches every save, so that a kill at a random moment often hits one."""
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        time.sleep(0.3)
        fsync(descriptor)

    os.fsync = slow_fsync


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[dict, float]:
    """last.pt of three epochs that nothing disturbed, and the seconds from its first save on."""
    for _ in range(2):  # the first is slower: files are not cached yet
        folder = tmp_path_factory.mktemp("unbroken")
        script = Script("train.py", *RUN, "--epochs", "3", cwd=folder, prepare=slow_saves)
        wait_for_file(folder / "demo" / "last.pt")
        start = time.monotonic()
        assert script.wait() == 0
    return load(folder / "demo" / "last.pt"), time.monotonic() - start


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_and_resume(unbroken, fraction: float, folder: Path) -> str:
    """Kills a run at a fraction of its time after the first save; says what that hit."""
    whole, seconds = unbroken
    script = Script("train.py", *RUN, "--epochs", "3", cwd=folder, prepare=slow_saves)
    wait_for_file(folder / "demo" / "last.pt")
    time.sleep(fraction * seconds)
    script.process.kill()
    status = script.wait()
    hit = "a save" if list((folder / "demo").glob("*.tmp")) else "training"
    assert_whole(folder / "demo")
    resumed = run_script("train.py", *RUN, "--epochs", "3", "--resume", cwd=folder)
    assert resumed.status == 0, resumed.stderr
    assert_same(load(folder / "demo" / "last.pt"), whole)
    assert status in (-signal.SIGKILL, 0)
    return hit if status else "nothing, the run had ended"


@pytest.mark.slow
def test_run_killed_at_20_moments_resumes_to_the_unbroken_weights(unbroken, tmp_path):
    hits = []
    for i in range(20):
        folder = tmp_path / str(i)
        folder.mkdir()
        hits.append(kill_and_resume(unbroken, i / 20, folder))
    print(f"{hits.count('a save')} of 20 kills hit a save, {hits.count('training')} training")
    assert hits.count("a save") >= 3 and hits.count("training") >= 3


@pytest.mark.parametrize(
    ("signum", "status"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGUSR1, 138),
        (signal.SIGUSR2, 140),
    ],
)
def test_signal_says_which_epoch_is_safe_and_how_to_continue(signum, status, tmp_path):
    script = Script("train.py", *RUN, "--epochs", "500", cwd=tmp_path)
    script.wait_for("epoch    1/500")
    script.send(signum)
    script.status = script.wait()
    assert_explained(script, "is safe in demo/last.pt", status=status)
    command = script.stderr.split("python train.py ")[1].split()
    assert command == [*RUN, "--epochs", "500", "--resume"]
    assert f"epoch {load(tmp_path / 'demo' / 'last.pt')['epoch']} is safe" in script.stderr


def test_signal_before_the_first_epoch_says_so(tmp_path):
    script = Script("train.py", "--demo", "--epochs", "500", cwd=tmp_path)
    script.wait_for("device")
    script.send(signal.SIGTERM)
    script.status = script.wait()
    assert_explained(script, "stopped  nothing is saved yet", status=143)


def close_the_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115, until the end


def test_output_pipe_that_is_closed_is_one_message(tmp_path):
    script = run_script("train.py", *RUN, cwd=tmp_path, prepare=close_the_pipe)
    assert_explained(script, "stopped  the output pipe was closed.", "nothing is saved yet")


def test_signal_during_an_evaluation_says_what_it_leaves(finished_run, tmp_path):
    link_run(finished_run, tmp_path)
    script = Script("evaluate.py", "--checkpoint", "demo/best.pt", "--no-show", cwd=tmp_path)
    script.wait_for("device")
    script.send(signal.SIGTERM)
    assert script.wait() == 143
    message = "stopped  the results are incomplete, run it again; checkpoints are untouched"
    assert script.stderr.splitlines() == ["", message]


# ---- full disks, other runs ---------------------------------------------------------------------


def test_full_disk_keeps_the_previous_checkpoints(tmp_path, finished_run, four_epochs):
    """A limit that best.pt, 99 MB, is within, and last.pt with its momentum, 197 MB, is not."""
    link_run(finished_run, tmp_path)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (150_000_000, 150_000_000))
    flags = [*RUN, "--epochs", "4", "--resume"]
    script = run_script("train.py", *flags, cwd=tmp_path, prepare=limit)
    assert_explained(script, "demo/last.pt could not be written: File too large", "--resume")
    assert "epoch 2 is safe in demo/last.pt; to continue: python train.py" in script.stderr
    assert load(tmp_path / "demo" / "last.pt")["epoch"] == 2
    assert_whole(tmp_path / "demo")
    assert not list((tmp_path / "demo").glob("*.tmp"))
    assert run_script("train.py", *flags, cwd=tmp_path).status == 0
    assert_same(*(load(folder / "demo" / "last.pt") for folder in (tmp_path, four_epochs)))


def test_full_disk_at_the_first_save_advises_no_resume(tmp_path):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
    script = run_script("train.py", *RUN, cwd=tmp_path, prepare=limit)
    assert_explained(script, "demo/last.pt could not be written", "nothing is saved yet")
    assert "--resume" not in script.stderr and not list((tmp_path / "demo").glob("*pt*"))


def test_rerun_that_ended_in_its_first_epoch_says_where_the_earlier_best_is(finished_run, tmp_path):
    link_run(finished_run, tmp_path)
    script = Script("train.py", *RUN, "--train-per-class", "0", cwd=tmp_path)
    script.wait_for("earlier ")
    script.send(signal.SIGTERM)
    assert script.wait() == 143
    script = run_script("evaluate.py", "--checkpoint", "demo/best.pt", cwd=tmp_path)
    (best,) = (tmp_path / "demo").glob("earlier-*/best.pt")
    assert_explained(script, f"an earlier run's is {best.relative_to(tmp_path)}")


def write_ascii() -> None:
    """As under PYTHONIOENCODING=ascii."""
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="ascii", closefd=False)  # noqa: SIM115


def test_output_that_cannot_encode_a_letter_ends_no_run(tmp_path):
    flags = [*TINY, "--epochs", "1", "--checkpoint-dir", "Läufe"]
    script = run_script("train.py", *flags, cwd=tmp_path, prepare=write_ascii)
    assert script.status == 0, script.stderr
    assert script.stdout.endswith("next     python evaluate.py --checkpoint 'L\\xe4ufe/best.pt'\n")
    flags = ["--checkpoint", "Läufe/best.pt", "--no-show"]
    script = run_script("evaluate.py", *flags, cwd=tmp_path, prepare=write_ascii)
    assert script.status == 0, script.stderr


def test_weights_of_another_network_are_one_short_message(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    script = run_script("train.py", *RUN, "--weights", "resnet18.pth", cwd=tmp_path)
    assert_explained(script, "resnet18.pth does not fit resnet50: ")
    assert len(script.stderr) < 300


def test_leftover_of_a_killed_save_is_not_taken_for_a_checkpoint(tmp_path, finished_run):
    link_run(finished_run, tmp_path)
    (tmp_path / "demo" / "last.pt.tmp").write_bytes(b"PK half a file")
    script = run_script("train.py", *RUN, "--epochs", "2", "--resume", cwd=tmp_path)
    assert script.status == 0 and "finished all 2 epochs" in script.stdout


def test_second_run_in_a_folder_refuses(tmp_path):
    first = Script("train.py", *RUN, "--epochs", "500", cwd=tmp_path)
    first.wait_for("epoch    1/500")
    second = run_script("train.py", *RUN, cwd=tmp_path)
    assert_explained(second, "Another run is using demo", "--checkpoint-dir")
    first.send(signal.SIGKILL)
    first.wait()
    assert not list((tmp_path / "demo").glob("earlier-*"))


# ---- numbers that are not finite ----------------------------------------------------------------


def test_training_loss_that_is_not_finite_stops_the_run(tmp_path):
    """The first step ruins the weights; the loss is read at every fourth of ten."""
    flags = ["--batch-size", "4", "--learning-rate", "1000", "--weight-decay", "1000"]
    script = run_script("train.py", *RUN, *flags, "--log-every", "4", cwd=tmp_path)
    assert_explained(script, "the training loss is", "epoch 1", "by step 4,", "rate 1000")
    assert "the start is safe in demo/last.pt" in script.stderr
    assert "--resume" not in script.stderr  # which would repeat it
    assert_whole(tmp_path / "demo")


def test_validation_loss_that_is_not_finite_stops_the_run(tmp_path):
    """One step an epoch: the training loss is that before the step which ruins the weights."""
    flags = ["--batch-size", "40", "--learning-rate", "1000", "--weight-decay", "1000"]
    script = run_script("train.py", *RUN, *flags, cwd=tmp_path)
    assert_explained(script, "the validation loss is", "epoch 1, learning rate 1000")
    assert "the start is safe in demo/last.pt" in script.stderr
    assert "--resume" not in script.stderr  # which would repeat it
    last = load(tmp_path / "demo" / "last.pt")
    assert all(np.isfinite(row["val_loss"]) for row in last["history"])
    assert all(tensor.isfinite().all() for tensor in last["model"].values())


# ---- checkpoints that are not -------------------------------------------------------------------


class RunsCode:
    """Unpickles by running a shell command."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


def flip_a_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def claim_more(name: str, content: bytes) -> bytes:
    """Makes the pickle size the last layer's bias, 10 (BININT1), at 10**12 (LONG1) elements."""
    if not name.endswith("data.pkl"):
        return content
    more = content.replace(b"K\x0a", b"\x8a\x06" + (10**12).to_bytes(6, "little"))
    assert more != content
    return more


def spoil(kind: str, good: Path, path: Path) -> None:
    """Writes to path what the kind says, made from a good checkpoint."""
    state, content = load(good), good.read_bytes()
    if kind == "runs code":
        torch.save(state | {"history": RunsCode()}, path)
    elif kind == "plain pickle that runs code":
        path.write_bytes(pickle.dumps(RunsCode()))
    elif kind == "tensor larger than the file":
        rezip(good, path, zipfile.ZIP_STORED, claim_more)
    elif kind == "tensor larger than its storage":
        state["model"]["fc.3.bias"] = torch.zeros(1).expand(2 * 10**10)
        torch.save(state, path)
    elif kind == "deflated":
        rezip(good, path, zipfile.ZIP_DEFLATED, lambda name, content: content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind.startswith("cut at"):
        path.write_bytes(content[: len(content) * int(kind.split()[-2]) // 100])
    elif kind == "one flipped byte in the weights":
        path.write_bytes(flip_a_byte(content))
    elif kind == "text":
        path.write_text("epoch,loss\n1,2.0\n")
    elif kind == "another program's":
        torch.save({"state_dict": state["model"], "epoch": 3}, path)
    elif kind == "a list":
        torch.save([1, 2, 3], path)
    elif kind == "wrong shapes":
        state["model"]["fc.3.bias"] = state["model"]["fc.3.bias"][:9].clone()
        torch.save(state, path)
    elif kind == "weights not finite":
        state["model"]["conv1.weight"][0, 0, 0, 0] = float("nan")
        torch.save(state, path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "constants missing":
        torch.save(state | {"constants": {}}, path)


def rezip(source: Path, target: Path, compression: int, change) -> None:
    """Copies an archive, its members' bytes changed by change(name, content)."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", compression, compresslevel=1) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))


KINDS = {  # and what the message says of it
    "runs code": "Weights only load failed",
    "plain pickle that runs code": "not a checkpoint",
    "tensor larger than the file": "",  # torch's own words
    "tensor larger than its storage": "claims more bytes than it has",
    "deflated": "it is compressed",
    "empty": "not a checkpoint",
    "cut at 50 %": "cut short",
    "cut at 99 %": "cut short",
    "one flipped byte in the weights": "fails its checksum",
    "text": "not a checkpoint",
    "another program's": "not written by this train.py",
    "a list": "not written by this train.py",
    "wrong shapes": "size mismatch for fc.3.bias",
    "weights not finite": "not finite",
    "a directory": "Is a directory",
    "constants missing": "",  # a constant's name
}


@pytest.fixture(scope="module")
def good(finished_run, tmp_path_factory) -> Path:
    """A checkpoint that is sound, but holds two of the network's tensors alone, to be quick."""
    state, path = load(finished_run / "demo" / "best.pt"), tmp_path_factory.mktemp("good") / "2.pt"
    state["model"] = {name: state["model"][name] for name in ("conv1.weight", "fc.3.bias")}
    utils.save_checkpoint(path, state)
    utils.load_checkpoint(path)
    return path


@pytest.mark.parametrize(("kind", "reason"), KINDS.items())
def test_bad_checkpoint_is_explained_by_evaluate_and_by_resume(kind, reason, good, tmp_path):
    (tmp_path / "demo").mkdir()
    spoil(kind, good, tmp_path / "demo" / "last.pt")
    evaluated = run_script("evaluate.py", "--checkpoint", "demo/last.pt", cwd=tmp_path)
    assert_explained(evaluated, "demo/last.pt", reason)
    resumed = run_script("train.py", *RUN, "--resume", "--epochs", "3", cwd=tmp_path)
    assert_explained(resumed, "demo/last.pt", reason)
    assert not (tmp_path / "PWNED").exists()


def test_the_malicious_pickles_would_run_their_code(tmp_path, monkeypatch):
    """Or else the test above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(RunsCode()))
    assert (tmp_path / "PWNED").exists()


def obey_permissions() -> None:
    """root reads every file: gives up the capabilities for it, as capabilities(7) tells."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 1 | 1 << 2)  # of the effective ones, DAC_OVERRIDE and DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_checkpoint_without_read_permission_is_explained(finished_run, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "last.pt").write_bytes(b"")
    (tmp_path / "demo" / "last.pt").chmod(0)
    flags = ["--checkpoint", "demo/last.pt"]
    evaluated = run_script("evaluate.py", *flags, cwd=tmp_path, prepare=obey_permissions)
    assert_explained(evaluated, "demo/last.pt cannot be used: Permission denied")
    resumed = run_script("train.py", *RUN, "--resume", cwd=tmp_path, prepare=obey_permissions)
    assert_explained(resumed, "demo/last.pt cannot be used: Permission denied")


@pytest.mark.parametrize("script", [["evaluate.py"], ["train.py", *TINY, "--resume"]])
def test_no_checkpoint_says_how_to_get_one(script, tmp_path):
    explained = run_script(*script, cwd=tmp_path)
    assert_explained(explained, "not found. Train one with: python train.py")
    assert not (tmp_path / "results").exists()


def test_checkpoint_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    script = run_script("train.py", *TINY, "--checkpoint-dir", "file/demo", cwd=tmp_path)
    assert_explained(script, "file/demo cannot be written", "--checkpoint-dir")


def test_data_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    script = run_script("train.py", "--data-dir", "file/data", "--weights", "", cwd=tmp_path)
    assert_explained(script, "CIFAR-100 cannot be stored in file/data: ")


def test_weights_that_cannot_be_had_are_explained(tmp_path):
    script = run_script("train.py", *TINY, "--weights", "no/such.pth", cwd=tmp_path)
    assert_explained(script, "no/such.pth not found", "IMAGENET1K_V2")
    assert not (tmp_path / "checkpoints" / "demo" / "last.pt").exists()


# ---- data that is damaged, downloads that fail --------------------------------------------------


@pytest.fixture(scope="module")
def small_cifar100(tmp_path_factory) -> Path:
    """CIFAR-100's files in its format with two images per class, packed as archive.tar.gz too."""
    folder = tmp_path_factory.mktemp("cifar")
    files = folder / "cifar-100-python"
    files.mkdir()
    labels = np.repeat(np.arange(100), 2).tolist()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    split = {"data": pixels, "fine_labels": labels, "coarse_labels": [0] * 200}
    for name in ("train", "test"):
        (files / name).write_bytes(pickle.dumps(split | {"batch_label": name}))
    names = {"fine_label_names": [str(label) for label in range(100)]}
    (files / "meta").write_bytes(pickle.dumps(names))
    with tarfile.open(folder / "archive.tar.gz", "w:gz") as archive:
        archive.add(files, "cifar-100-python")
    return folder


def pretend(source: Path, urls: list[str], replace=setattr) -> None:
    """In this process: the small files are the official ones, and these are the URLs."""
    paths = [*(source / "cifar-100-python").iterdir(), source / "archive.tar.gz"]
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in paths}
    replace(CIFAR100, "train_list", [["train", md5["train"]]])
    replace(CIFAR100, "test_list", [["test", md5["test"]]])
    replace(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    replace(CIFAR100, "tgz_md5", md5["archive.tar.gz"])
    replace(data, "URLS", urls)
    replace(data, "DOWNLOAD_TIMEOUT", 1.0)


def train_on(source: Path, folder: Path, urls: list[str]) -> Script:
    flags = ["--weights", "", "--image-size", "32", "--epochs", "1", "--batch-size", "50"]
    flags += ["--holdout-per-class", "1", "--precision", "fp32"]
    prepare = functools.partial(pretend, source, urls)
    return run_script("train.py", *flags, cwd=folder, prepare=prepare)


def copy_files(source: Path, folder: Path) -> Path:
    return shutil.copytree(source / "cifar-100-python", folder / "data" / "cifar-100-python")


NOWHERE = "http://127.0.0.1:9/cifar-100-python.tar.gz"  # nothing listens there


def test_files_that_are_there_are_used_without_a_network(small_cifar100, tmp_path):
    copy_files(small_cifar100, tmp_path)
    script = train_on(small_cifar100, tmp_path, [NOWHERE])
    assert script.status == 0, script.stderr
    assert "cifar100: 100 training and 100 validation images" in script.stdout


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("damage", ["cut", "one byte", "runs code"])
def test_damaged_data_file_is_named_and_never_unpickled(name, damage, small_cifar100, tmp_path):
    path = copy_files(small_cifar100, tmp_path) / name
    content = path.read_bytes()
    spoiled = {
        "cut": content[: len(content) // 2],
        "one byte": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "runs code": pickle.dumps(RunsCode()),
    }[damage]
    path.write_bytes(spoiled)
    script = train_on(small_cifar100, tmp_path, [NOWHERE])
    assert_explained(script, f"data/cifar-100-python/{name} is damaged", "md5", "Delete that file")
    assert path.read_bytes() == spoiled
    assert not (tmp_path / "PWNED").exists()


def test_swapped_data_files_are_named(small_cifar100, tmp_path):
    files = copy_files(small_cifar100, tmp_path)
    train, test = (files / "train").read_bytes(), (files / "test").read_bytes()
    (files / "train").write_bytes(test)
    (files / "test").write_bytes(train)
    script = train_on(small_cifar100, tmp_path, [NOWHERE])
    assert_explained(script, "cifar-100-python/train is damaged")


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_missing_data_file_without_a_network_says_what_to_do(name, small_cifar100, tmp_path):
    (copy_files(small_cifar100, tmp_path) / name).unlink()
    script = train_on(small_cifar100, tmp_path, [NOWHERE])
    assert_explained(script, "could not be downloaded", NOWHERE, "python train.py --demo")


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves the archive well at /good, and badly in the ways that mirrors have."""

    archive = b""
    left = threading.Event()  # set when the client has given up

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        if kind == "error":
            self.send_error(503)
            return
        if kind == "hang":
            self.left.wait(20)
            return
        body = {
            "page": b"<html>It works!</html>",
            "other": gzip.compress(b"other bytes"),
        }.get(kind, self.archive)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def mirror(small_cifar100):
    Mirror.archive = (small_cifar100 / "archive.tar.gz").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("fault", ["cut", "hang", "error", "page", "other"])
def test_bad_mirror_is_passed_over_for_the_next(
    fault, mirror, small_cifar100, tmp_path, monkeypatch
):
    urls = [f"{mirror}/{kind}/cifar-100-python.tar.gz" for kind in (fault, "good")]
    pretend(small_cifar100, urls, monkeypatch.setattr)
    Mirror.left.clear()
    start = time.monotonic()
    data.fetch_cifar100(str(tmp_path / "data"))
    assert time.monotonic() - start < 15  # it would hang for 20
    Mirror.left.set()
    for path in (small_cifar100 / "cifar-100-python").iterdir():
        copy = tmp_path / "data" / "cifar-100-python" / path.name
        assert copy.read_bytes() == path.read_bytes()


def test_bad_mirrors_alone_leave_nothing_that_is_taken_for_good(mirror, small_cifar100, tmp_path):
    urls = [f"{mirror}/{fault}/cifar-100-python.tar.gz" for fault in ("cut", "page")]
    script = train_on(small_cifar100, tmp_path, urls)
    assert script.status == 1 and "Traceback" not in script.stderr
    lines = script.stderr.splitlines()[-3:]  # above them are the downloads' progress bars
    assert "could not be downloaded" in lines[0]
    assert urls[0] in lines[1] and urls[1] in lines[2]
    assert not (tmp_path / "data" / "cifar-100-python").exists()
    again = train_on(small_cifar100, tmp_path, [f"{mirror}/good/cifar-100-python.tar.gz"])
    assert again.status == 0, again.stderr


def test_one_changed_byte_of_the_official_files_is_found(cifar100_dir, tmp_path):
    files = tmp_path / "data" / "cifar-100-python"
    files.mkdir(parents=True)
    for name in ("train", "meta"):
        (files / name).symlink_to(Path(cifar100_dir, "cifar-100-python", name).resolve())
    content = bytearray(Path(cifar100_dir, "cifar-100-python", "test").read_bytes())
    content[len(content) // 2] ^= 1
    (files / "test").write_bytes(content)
    script = run_script("train.py", "--weights", "", cwd=tmp_path)
    assert_explained(
        script, "data/cifar-100-python/test is damaged", "f0ef6b0ae62326f3e7ffdfab6717"
    )
