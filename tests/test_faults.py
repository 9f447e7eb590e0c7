"""What befalls a run: kills, signals, full disks, bad numbers, bad files, bad networks.

In a process of its own where that is the point, else by main(), which raises the message.
"""

import functools
import hashlib
import http.server
import io
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from scripts import TINY, Script, assert_same, link_run, load, run_script, settings
from torchvision.datasets import CIFAR100

import data
import evaluate
import train
import utils

RUN = [*TINY, "--checkpoint-dir", "demo"]


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_explained(message: str, *words: str) -> None:
    """One to three lines with these words, and no traceback."""
    assert 1 <= len(message.strip().splitlines()) <= 3 and "Traceback" not in message, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def fail(*command: str, **options) -> str:
    """Runs a script that ends with status 1; what it writes to stderr."""
    script = run_script(*command, cwd=Path.cwd(), **options)
    assert script.status == 1, script.stderr
    return script.stderr


def refuse(function: Callable, argument: object) -> str:
    """The message with which a script's main(), or another function, refuses to go on."""
    with pytest.raises(utils.UserError) as refused:
        function(argument)
    return str(refused.value)


# ---- kills and signals --------------------------------------------------------------------------


@pytest.mark.slow
def test_run_killed_ten_times_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    """Before, while and after an epoch is trained; for each moment of a save see test_saving.py."""
    command = ["train.py", *RUN, "--epochs", "16"]
    (whole := tmp_path / "unbroken").mkdir()
    assert run_script(*command, cwd=whole).status == 0
    for kill in range(10):
        script = Script(*command, "--resume-if-saved", cwd=tmp_path)
        script.wait_for(["settings", "\nepoch "][kill % 2])
        time.sleep(0.04 * kill)
        script.process.kill()
        assert script.wait() == -signal.SIGKILL
        for path in Path("demo").glob("*.pt"):
            utils.load_checkpoint(path)
    last = run_script(*command, "--resume-if-saved", cwd=tmp_path)
    assert last.status == 0 and "last.pt, after epoch" in last.stdout, last.stderr
    for name in ("demo/last.pt", "demo/best.pt"):
        assert_same(load(Path(name)), load(whole / name))


LEFT = {  # by a script that a signal ends
    "train.py --demo": "nothing is saved yet",
    "evaluate.py --checkpoint demo/best.pt": (
        "the results are incomplete, run it again; checkpoints are untouched"
    ),
}


@pytest.mark.parametrize("command", LEFT)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_signal_ends_a_script_with_what_it_leaves(command, name, finished_run, tmp_path):
    link_run(finished_run, tmp_path)
    script = Script(*command.split(), cwd=tmp_path)
    script.wait_for("device")
    script.send(signal.Signals[name])
    assert script.wait() == 128 + signal.Signals[name]
    assert script.stderr == f"\nstopped  {LEFT[command]}\n"


def test_run_keeps_others_out_of_its_folder_and_says_at_ctrl_c_how_to_continue(tmp_path):
    flags = [*RUN, "--epochs", "100"]
    script = Script("train.py", *flags, cwd=tmp_path)
    script.wait_for("epoch    1/100")
    assert_explained(refuse(train.main, RUN), "Another run is using demo", "--checkpoint-dir")
    assert not list(Path("demo").glob("earlier-*"))
    script.send(signal.SIGINT)
    assert script.wait() == 130
    state, command = script.stderr.split("; to continue: python train.py ")
    epoch = load(Path("demo/last.pt"))["epoch"]
    assert state == f"\nstopped  epoch {epoch} is safe in demo/last.pt"
    assert command.split() == [*flags, "--resume"]


# ---- full disks, output that cannot be written --------------------------------------------------


def limit_files(megabytes: int) -> Callable[[], None]:
    limits = (megabytes * 1_000_000,) * 2
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)


def test_full_disk_keeps_the_previous_checkpoints(tmp_path, finished_run, four_epochs):
    """A limit that best.pt, 46 MB, is within, and last.pt with its momentum, 92 MB, is not."""
    link_run(finished_run, tmp_path)
    flags = ["train.py", *RUN, "--epochs", "4", "--resume"]
    message = fail(*flags, prepare=limit_files(70))
    assert_explained(message, "demo/last.pt could not be written: File too large", "--resume")
    assert "epoch 2 is safe in demo/last.pt; to continue: python train.py" in message
    assert utils.load_checkpoint(Path("demo/last.pt"))["epoch"] == 2
    assert utils.load_checkpoint(Path("demo/best.pt"))
    assert not list(Path("demo").glob("*.tmp"))
    Path("demo/last.pt.tmp").write_bytes(b"PK half a file")  # as a kill during a save leaves it
    assert run_script(*flags, cwd=tmp_path).status == 0
    assert_same(*(load(folder / "demo" / "last.pt") for folder in (tmp_path, four_epochs)))


def close_the_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115, until the end


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (limit_files(10), "demo/last.pt could not be written"),
        (close_the_pipe, "stopped  the output pipe was closed."),
    ],
)
def test_run_that_ends_before_its_first_save_advises_no_resume(prepare, reason):
    message = fail("train.py", *RUN, prepare=prepare)
    assert_explained(message, reason, "nothing is saved yet")
    assert "--resume" not in message and not list(Path("demo").glob("*pt*"))


def write_ascii() -> None:
    """As under PYTHONIOENCODING=ascii."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")


def test_output_that_cannot_encode_a_letter_ends_no_run(finished_run, tmp_path):
    link_run(finished_run, tmp_path).rename("Läufe")
    flags = [*TINY, "--epochs", "2", "--resume", "--checkpoint-dir", "Läufe"]
    script = run_script("train.py", *flags, cwd=tmp_path, prepare=write_ascii)
    assert script.status == 0, script.stderr
    assert script.stdout.endswith("next     python evaluate.py --checkpoint 'L\\xe4ufe/best.pt'\n")
    message = fail("evaluate.py", "--checkpoint", "Läufe/none.pt", prepare=write_ascii)
    assert_explained(message, "L\\xe4ufe/none.pt not found")


def fill_the_disk() -> None:
    """What is written to both streams fails: No space left on device."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def have_no_streams() -> None:
    """As under pythonw, and where a shell has closed them: >&- 2>&-."""
    sys.stdout = sys.stderr = None


class NotebookStream:
    """No more than a notebook's stream must have."""

    def write(self, text: str) -> int:
        return os.write(1, text.encode())

    def flush(self) -> None:
        pass


def be_in_a_notebook() -> None:
    sys.stdout = sys.stderr = NotebookStream()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("prepare", [fill_the_disk, have_no_streams, be_in_a_notebook])
@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_log_that_cannot_be_written_and_other_streams_end_no_script(
    name, prepare, finished_run, tmp_path
):
    link_run(finished_run, tmp_path)
    train_flags = [*RUN, "--epochs", "3", "--resume"]
    flags = {"train.py": train_flags, "evaluate.py": ["--checkpoint", "demo/best.pt"]}
    script = run_script(name, *flags[name], cwd=tmp_path, prepare=prepare)
    assert (script.status, script.stderr) == (0, "")
    assert Path({"train.py": "demo/last.pt", "evaluate.py": "results/metrics.json"}[name]).exists()
    assert ("device   CPU" in script.stdout) == (prepare is be_in_a_notebook)


def fill_the_disk_of_stdout() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def test_run_whose_log_cannot_be_written_tells_what_is_safe():
    flags = ["--learning-rate", "1000", "--weight-decay", "1000"]
    message = fail("train.py", *RUN, *flags, prepare=fill_the_disk_of_stdout)
    assert_explained(message, "loss is", "the start is safe in demo/last.pt")


def write_every_state() -> None:
    utils.SECONDS_PER_LINE = 0


def test_log_tells_progress_in_lines(finished_run, tmp_path):
    """Every minute; here at once."""
    link_run(finished_run, tmp_path)
    flags = [*RUN, "--epochs", "3", "--resume"]
    script = run_script("train.py", *flags, cwd=tmp_path, prepare=write_every_state)
    assert "\r" not in script.stderr
    for expected in (r"^epoch 3: 100%.* 40/40 .*loss=\d", r"^predict: .*/1 "):
        assert re.search(expected, script.stderr, re.MULTILINE), script.stderr


def test_log_tells_the_progress_of_decoding(tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (9, 9)).save(tmp_path / "photos" / name / f"{number}.png")
    flags = "--dataset photos --stored-size 32 --weights= --epochs 1 --batch-size 2 --no-curves"
    flags += " --image-size 32 --architecture resnet18 --precision fp32"
    script = run_script("train.py", *flags.split(), cwd=tmp_path, prepare=write_every_state)
    assert re.search(r"^decode: .*/6 ", script.stderr, re.MULTILINE), script.stderr


# ---- numbers that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "flags", "place"),
    [
        # The loss is read at every fourth of ten steps.
        ("training", "--batch-size 4 --log-every 4", "epoch 1, by step 4, learning rate 1000"),
        # One step an epoch: the training loss is that before the step which ruins the weights.
        ("validation", "--batch-size 40", "epoch 1, learning rate 1000"),
    ],
)
def test_loss_that_is_not_finite_stops_the_run(kind, flags, place):
    flags = [*flags.split(), "--learning-rate", "1000", "--weight-decay", "1000"]
    message = fail("train.py", *RUN, *flags)
    assert_explained(message, f"the {kind} loss is", place, "the start is safe in demo/last.pt")
    assert "--resume" not in message  # which would repeat it
    assert utils.load_checkpoint(Path("demo/last.pt"))["history"] == []


# ---- checkpoints and other files that are not ---------------------------------------------------


EVALUATE_REFUSES = {  # flags and the message
    "": "checkpoints/best.pt not found. Train one with: python train.py",
    "--checkpoint demo/best.pt": "another run's is demo/earlier-1/best.pt",
    "--checkpoint demo": "demo cannot be used: Is a directory",
}
TRAIN_REFUSES = {
    "--demo --resume": "last.pt not found. Train one with: python train.py",
    "--demo --checkpoint-dir file/new": "file/new cannot be written: Not a directory. Choose",
    "--data-dir file/new --weights ''": "CIFAR-100 cannot be stored in file/new: ",
    "--demo --weights no/such.pth": "Weights no/such.pth not found. Expected IMAGENET1K_V1, ",
    "--demo --weights other.pth": "other.pth does not fit resnet50: ",
}


@pytest.mark.parametrize("flags", [*EVALUATE_REFUSES, *TRAIN_REFUSES])
def test_file_that_cannot_be_used_is_one_short_message(flags):
    Path("demo/earlier-1").mkdir(parents=True)
    Path("demo/earlier-1/best.pt").touch()
    Path("file").touch()
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "other.pth")
    main = evaluate.main if flags in EVALUATE_REFUSES else train.main
    said = refuse(main, shlex.split(flags))
    assert_explained(said, (EVALUATE_REFUSES | TRAIN_REFUSES)[flags])
    assert len(said) < 300
    assert not Path("results").exists() and not list(Path().rglob("last.pt"))


class RunsCode:
    """Unpickles by running a shell command."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


def test_the_malicious_pickles_would_run_their_code():
    """Or else the tests with them would prove nothing."""
    pickle.loads(pickle.dumps(RunsCode()))
    assert Path("PWNED").exists()


def flip_byte(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def make_zip(compression: int) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", compression) as archive:
        archive.writestr("data.pkl", pickle.dumps({}))
    return file.getvalue()


def with_bias(state: dict, bias: torch.Tensor) -> dict:
    return state | {"model": state["model"] | {"fc.3.bias": bias}}


HUGE = torch.zeros(1).expand(2 * 10**13)
BAD_BYTES = {  # what becomes of a checkpoint's bytes, and what the message says of it
    "empty": (lambda x: b"", "not a checkpoint"),
    "plain pickle that runs code": (lambda x: pickle.dumps(RunsCode()), "not a checkpoint"),
    "cut at 50 %": (lambda x: x[: len(x) // 2], "cut short"),
    "cut at 99 %": (lambda x: x[: len(x) * 99 // 100], "cut short"),
    "flipped byte": (lambda x: flip_byte(x, len(x) // 2), "fails its checksum"),
    "deflated": (lambda x: make_zip(zipfile.ZIP_DEFLATED), "it is compressed"),
    "another archive": (lambda x: make_zip(zipfile.ZIP_STORED), "demo/last.pt cannot be used: "),
}
BAD_STATES = {  # the same for what it holds
    "runs code": (lambda x: x | {"history": RunsCode()}, "Weights only load failed"),
    "a list": (lambda x: [1, 2, 3], "not written by this train.py"),
    "another program's": (lambda x: {"state_dict": x["model"]}, "not written by this train.py"),
    "constants missing": (lambda x: x | {"constants": {}}, "its constant BATCH_SIZE is missing"),
    "wrong shapes": (lambda x: with_bias(x, torch.zeros(9)), "size mismatch for fc.3.bias"),
    "NaN": (lambda x: with_bias(x, torch.full((10,), torch.nan)), "its weights are not finite"),
    "tensor larger than its storage": (lambda x: with_bias(x, HUGE), "claims more bytes"),
}


@pytest.fixture(scope="module")
def good(finished_run) -> dict:
    """A sound checkpoint's state, but with two of the network's tensors alone, to be quick."""
    state = load(finished_run / "demo" / "best.pt")
    return state | {"model": {name: state["model"][name] for name in ("conv1.weight", "fc.3.bias")}}


@pytest.mark.parametrize("kind", [*BAD_BYTES, *BAD_STATES])
def test_bad_checkpoint_is_explained_by_evaluate_and_by_resume(kind, good):
    (path := Path("demo/last.pt")).parent.mkdir()
    utils.save_checkpoint(path, good)
    good = utils.load_checkpoint(path)
    change, reason = (BAD_BYTES | BAD_STATES)[kind]
    if kind in BAD_BYTES:
        path.write_bytes(change(path.read_bytes()))
    else:
        torch.save(change(good), path)
    evaluated = refuse(evaluate.main, ["--checkpoint", "demo/last.pt"])
    resumed = refuse(train.main, [*RUN, "--resume", "--epochs", "3"])
    for message in (evaluated, resumed):
        assert_explained(message, "demo/last.pt", reason)
    assert not Path("PWNED").exists()


# ---- data that is damaged, downloads that fail --------------------------------------------------

CIFAR = settings(holdout_per_class=1)
NOWHERE = "http://127.0.0.1:9/cifar-100-python.tar.gz"  # nothing listens there


@pytest.fixture
def files(monkeypatch) -> Path:
    """Three files in place of CIFAR-100's, which count as official; there is no network."""
    (folder := Path("data/cifar-100-python")).mkdir(parents=True)
    md5 = {}
    for name in ("train", "test", "meta"):
        content = pickle.dumps([name] * 1000)
        (folder / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    monkeypatch.setattr(data, "URLS", [NOWHERE])
    return folder


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("damage", ["cut", "one byte", "other file", "runs code"])
def test_damaged_data_file_is_named_and_neither_unpickled_nor_replaced(name, damage, files):
    content, other = (files / name).read_bytes(), files / ("test" if name == "train" else "train")
    spoiled = {
        "cut": content[: len(content) // 2],
        "one byte": flip_byte(content, len(content) - 9),
        "other file": other.read_bytes(),
        "runs code": pickle.dumps(RunsCode()),
    }[damage]
    (files / name).write_bytes(spoiled)
    read = refuse(data.read_splits, CIFAR)
    other.unlink()
    downloaded = refuse(data.fetch, CIFAR)
    for message in (read, downloaded):
        assert_explained(message, f"{files / name} is damaged", "md5", "Delete that file")
    assert (files / name).read_bytes() == spoiled
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_missing_data_file_without_a_network_says_what_to_do(name, files):
    (files / name).unlink()
    message = refuse(train.main, ["--weights", ""])
    assert_explained(message, "could not be downloaded", NOWHERE, "python train.py --demo")


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves the archive well at /good, and badly in the ways that mirrors have."""

    archive = b""
    left = threading.Event()  # set when the client has given up

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        if kind == "hang":
            self.left.wait(20)
        elif kind == "error":
            self.send_error(503)
        else:
            body = b"<html>It works!</html>" if kind == "page" else self.archive
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def mirrors(files, monkeypatch) -> dict[str, str]:
    """The URL of each kind."""
    with tarfile.open("archive.tar.gz", "w:gz") as archive:
        archive.add(files, "cifar-100-python")
    Mirror.archive = Path("archive.tar.gz").read_bytes()
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(Mirror.archive).hexdigest())
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 1.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kinds, address = ("cut", "hang", "error", "page", "good"), f"127.0.0.1:{server.server_port}"
    yield {kind: f"http://{address}/{kind}/cifar-100-python.tar.gz" for kind in kinds}
    Mirror.left.set()
    server.shutdown()


def test_bad_mirrors_are_passed_over_and_good_files_not_downloaded_again(
    mirrors, files, monkeypatch
):
    def fetch(urls: list[str]) -> None:
        monkeypatch.setattr(data, "URLS", urls)
        data.fetch_cifar100("new")

    bad = [mirrors["cut"], mirrors["page"]]
    assert_explained(refuse(fetch, bad), "CIFAR-100 could not be downloaded", *bad)
    assert os.listdir("new") == [".download.lock"]

    start = time.monotonic()
    fetch(mirrors.values())
    assert time.monotonic() - start < 15  # it would hang for 20
    for path in files.iterdir():
        assert Path("new", "cifar-100-python", path.name).read_bytes() == path.read_bytes()

    fetch([NOWHERE])

    shutil.rmtree("new")
    full = OSError(28, "No space left on device")
    with patch.object(data, "extract_archive", side_effect=full):
        assert_explained(
            refuse(fetch, [mirrors["good"]]), "CIFAR-100 cannot be stored in new", "space"
        )
