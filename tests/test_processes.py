"""Several processes are one run: torchrun on gloo, beside one process alone."""

import functools
import itertools
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import (
    LAUNCHER,
    ROOT,
    TINY,
    TORCHRUN,
    Script,
    be_one_of_two,
    find_free_port,
    link_run,
    load,
    read_json,
    run_script,
    settings,
    start_process,
    torchrun_environment,
)

import data
import model as resnet
import utils

RUN = [*TINY, "--checkpoint-dir", "demo"]


# ---- torchrun -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_machines_with_one_checkpoint_folder_are_one_run(finished_run, tmp_path):
    """The README's command, by two torchruns; each machine has a data folder of its own."""
    lines = (ROOT / "README.md").read_text().splitlines()
    command = next(line for line in lines if line.startswith("torchrun --nnodes 2"))
    endpoint = f"127.0.0.1:{find_free_port()}"
    for name, value in [("HOST:29500", endpoint), ("--nproc-per-node 8", "--nproc-per-node 1")]:
        assert name in command
        command = command.replace(name, value)
    _, *options, script = command.split()
    command = [*LAUNCHER, *options, str(ROOT / script), *RUN, "--epochs", "2", "--data-dir"]
    link_run(finished_run, tmp_path)
    machines = [start_process([*command, name], cwd=tmp_path) for name in ("data-a", "data-b")]
    outputs = [machine.communicate(timeout=300) for machine in machines]
    for machine, (_, err) in zip(machines, outputs):
        assert machine.returncode == 0 and "Warning" not in err, err
    out = "".join(out for out, _ in outputs)  # the first process is on either of them
    assert re.findall(r"processes: \d+, \w+", out) == ["processes: 2, gloo"]
    assert out.count("device ") == 1
    (earlier,) = (tmp_path / "demo").glob("earlier-*")
    assert (earlier / "last.pt").samefile(finished_run / "demo" / "last.pt")
    # Resuming with one process is the same run: the batch is global.
    alone = run_script("train.py", *RUN, "--epochs", "3", "--resume", cwd=tmp_path)
    assert alone.status == 0, alone.stderr
    epochs = [re.findall(r"\nepoch +(\d/\d)", output) for output in (out, alone.stdout)]
    assert epochs == [["1/2", "2/2"], ["3/3"]]
    last = load(tmp_path / "demo" / "last.pt")
    assert [row["epoch"] for row in last["history"]] == [1, 2, 3]
    assert last["model"].keys() == load(finished_run / "demo" / "last.pt")["model"].keys()


@pytest.mark.slow
def test_killed_worker_is_restarted_and_the_run_continues_to_its_end(tmp_path):
    flags = ["--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "train.py")]
    process = start_process([*TORCHRUN, *flags, *RUN, "--epochs", "3"], cwd=tmp_path)
    lines = []
    while not (lines and lines[-1].startswith("epoch    1/3")):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)  # rank 0, which saves
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resume   demo/last.pt, after epoch" in out
    epochs = re.findall(r"^epoch +(\d)/3", "".join(lines) + out, re.MULTILINE)
    history = load(tmp_path / "demo" / "last.pt")["history"]
    assert epochs == [str(row["epoch"]) for row in history] == ["1", "2", "3"]


@pytest.mark.slow
def test_torchrun_ends_with_the_message_which_stands_above_it_once(tmp_path):
    flags = ["--nproc-per-node", "2", str(ROOT / "train.py"), *TINY, "--weights", "nowhere.pth"]
    process = start_process([*TORCHRUN, *flags], cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    lines = err.splitlines()
    said = [number for number, line in enumerate(lines) if "Weights nowhere.pth not found" in line]
    assert len(said) == 2 and len(lines) - said[1] <= 3  # printed, and in torchrun's last lines


# ---- one process of two, with torchrun's environment --------------------------------------------


def test_batch_size_that_the_processes_cannot_share_is_said_here_and_to_torchrun(tmp_path):
    prepare = functools.partial(be_one_of_two, TORCHELASTIC_ERROR_FILE=tmp_path / "error.json")
    script = run_script("train.py", *RUN, "--batch-size", "61", cwd=tmp_path, prepare=prepare)
    message = "train.py: --batch-size 61: expected a multiple of 2 processes"
    assert (script.status, script.stderr) == (2, f"{message}\n")
    assert read_json(tmp_path / "error.json")["message"] == message
    assert not (tmp_path / "demo").exists()  # nothing has started


def test_restarts_over_several_machines_are_refused(tmp_path):
    prepare = functools.partial(be_one_of_two, GROUP_WORLD_SIZE=2, TORCHELASTIC_MAX_RESTARTS=3)
    script = run_script("train.py", *RUN, cwd=tmp_path, prepare=prepare)
    assert script.status == 1 and script.stderr.count("\n") == 2
    assert "--max-restarts 3 on 2 machines: expected 0" in script.stderr
    assert "--resume-if-saved" in script.stderr


def test_restarted_run_goes_on_from_its_own_checkpoint_alone(finished_run, tmp_path, monkeypatch):
    for name, value in torchrun_environment(TORCHELASTIC_RESTART_COUNT=1).items():
        monkeypatch.setenv(name, value)
    state, own = load(finished_run / "demo" / "best.pt"), utils.this_process().launcher
    for launcher in (own, "an earlier one"):
        utils.save_checkpoint(tmp_path / "last.pt", state | {"launcher": launcher, "model": {}})
        found = utils.find_checkpoint(tmp_path / "last.pt", settings())
        assert (found is not None) == (launcher == own)


def test_only_rank_0_moves_an_earlier_run_aside(finished_run, tmp_path, monkeypatch):
    folder = link_run(finished_run, tmp_path)
    names = {path.name for path in folder.iterdir()}
    for rank, left in [(1, names), (0, set())]:
        for name, value in torchrun_environment(rank).items():
            monkeypatch.setenv(name, value)
        utils.move_aside(folder)
        assert {path.name for path in folder.glob("*.*")} == left


# ---- two processes, not always started alike ----------------------------------------------------


def run_two(tmp_path: Path, *flags: list[str], prepare=be_one_of_two) -> list[Script]:
    """Two processes that are one run, each in a folder of its own, with flags of its own."""
    port, scripts = find_free_port(), []
    for rank, own in enumerate(flags):
        folder = tmp_path / str(rank)
        folder.mkdir(exist_ok=True)
        role = functools.partial(prepare, rank, port)
        scripts.append(Script("train.py", *own, cwd=folder, prepare=role))
    for script in scripts:
        script.status = script.wait()
    return scripts


def assert_refused(scripts: list[Script], message: str) -> None:
    """Both end with status 1 before they train, one of them with the message."""
    assert [script.status for script in scripts] == [1, 1], [s.stderr for s in scripts]
    said = "".join(script.stderr for script in scripts)
    assert len(re.findall(message, said)) == 1 and "Traceback" not in said, said
    assert "epoch    1/" not in scripts[0].stdout


def test_another_learning_rate_in_one_process_is_refused_by_name(tmp_path):
    message = "LEARNING_RATE is 0.02 on rank 0, but 0.03 on rank 1"
    message += ".\nStart them with the same flags, files and data"
    assert_refused(run_two(tmp_path, RUN, [*RUN, "--learning-rate", "0.03"]), message)


def have_a_gpu(rank: int, port: int) -> None:
    """In a process of two: the second would use a GPU, which is never touched."""
    be_one_of_two(rank, port)
    if rank:
        utils.choose_device = lambda *args: torch.device("cuda")


def test_gpu_in_one_process_alone_is_refused(tmp_path):
    scripts = run_two(tmp_path, RUN, RUN, prepare=have_a_gpu)
    assert_refused(scripts, "The processes need a GPU each, or all of them --device cpu")


def test_other_pictures_in_one_process_are_refused(tmp_path):
    for rank, part, name in itertools.product((0, 1), ("train", "val"), "ab"):
        path = tmp_path / str(rank) / "photos" / part / name / "1.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), ("red", "blue")[rank]).save(path)
    folder = "--dataset photos --stored-size 32 --holdout-per-class 0 --train-per-class 0"
    flags = [*RUN, *folder.split()]
    message = "dataset is '2 pictures, crc32 .*' on rank 0, but '2 pictures, crc32 .*' on rank 1"
    assert_refused(run_two(tmp_path, flags, flags), message)


# ---- one of two machines fails ------------------------------------------------------------------


def be_one_of_two_machines(rank: int, port: int) -> None:
    be_one_of_two(rank, port, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, GROUP_RANK=rank, GROUP_WORLD_SIZE=2)


def fail_at(place: str, how: Callable, failing: int, rank: int, port: int) -> None:
    """On one machine of two: calls how() in place of MODULE.FUNCTION."""
    be_one_of_two_machines(rank, port)
    if rank == failing:
        module, function = place.split(".")
        setattr({"data": data, "utils": utils}[module], function, how)


def break_the_disk(*_, **__) -> None:
    raise utils.UserError("the disk is broken")


def have_a_bug(*_, **__) -> None:
    raise KeyError("our own bug")


def get_sigterm(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


FAILURES = {  # where, how, what the other machine says of it, both exit statuses
    "while the other waits": ("data.fetch", break_the_disk, "the disk is broken", 1),
    "before it begins": ("data.read_splits", get_sigterm, "nothing is saved yet", 143),
    "in an epoch": (
        "utils.mean_over_processes",
        have_a_bug,
        "KeyError: 'our own bug'\nthe start is safe in",
        1,
    ),
}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("kind", FAILURES)
def test_machine_that_fails_ends_the_other_one_with_its_reason(kind, failing, tmp_path):
    place, how, reason, status = FAILURES[kind]
    prepare = functools.partial(fail_at, place, how, failing)
    scripts = run_two(tmp_path, RUN, RUN, prepare=prepare)
    assert scripts[failing].status == status
    assert scripts[1 - failing].status == 1
    said = scripts[1 - failing].stderr
    assert f"stopped  rank {failing} on {socket.gethostname()} ended: {reason}" in said, said
    assert "Traceback" not in said
    assert ("Traceback" in scripts[failing].stderr) == (how is have_a_bug)


def test_machine_with_a_wrong_flag_ends_the_one_that_waits_for_it(tmp_path):
    scripts = run_two(tmp_path, RUN, [*RUN, "--lr", "3"], prepare=be_one_of_two_machines)
    assert [script.status for script in scripts] == [1, 2]
    for script in scripts:
        assert "unrecognized arguments: --lr 3; did you mean --learning-rate?" in script.stderr


def fail_with_little_patience(*args: object) -> None:
    utils.SILENCE = 5
    fail_at(*args)


def be_killed(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_suspended(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("data.fetch", be_killed),
        ("utils.mean_over_processes", be_killed),
        ("utils.mean_over_processes", be_suspended),
    ],
)
def test_machine_that_falls_silent_ends_the_other_one(place, how, tmp_path):
    """The first one, which keeps the store; it waits in exchange() or in a collective."""
    port, scripts = find_free_port(), []
    for rank in (0, 1):
        (folder := tmp_path / str(rank)).mkdir()
        role = functools.partial(fail_with_little_patience, place, how, 1, rank, port)
        scripts.append(Script("train.py", *RUN, cwd=folder, prepare=role))
    try:
        assert scripts[0].wait() == 1
    finally:
        scripts[1].process.kill()
    silent, closed = "rank 1 gives no sign of life", "another process cannot be reached"
    collective = place == "utils.mean_over_processes"
    expected = silent if how is be_suspended or not collective else closed
    assert expected in scripts[0].stderr
    assert ("the start is safe in" in scripts[0].stderr) == collective


def read_for_long(rank: int, port: int) -> None:
    """On one machine of two; the first, which keeps the store, is killed while the other reads."""
    fail_at("data.read_splits", be_killed, 0, rank, port)
    fail_at("data.read_splits", lambda *_, **__: time.sleep(60), 1, rank, port)


def test_machine_that_keeps_the_store_and_is_killed_ends_one_that_is_busy(tmp_path):
    killed, busy = run_two(tmp_path, RUN, RUN, prepare=read_for_long)
    assert (killed.status, busy.status) == (-signal.SIGKILL, 1)
    assert "stopped  another process cannot be reached: the one that keeps the run" in busy.stderr


def test_process_that_finds_no_other_says_where_it_looked(tmp_path, monkeypatch):
    port = find_free_port()
    for name, value in torchrun_environment(1, port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(utils.UserError, match=f"No process of the run answers at .*port {port}: "):
        utils._open_store(seconds=0)


# ---- both resume --------------------------------------------------------------------------------


def keep_weights(rank: int, port: int) -> None:
    """In a process of two: writes the weights that it ends with."""
    be_one_of_two(rank, port)
    build_model = resnet.build_model

    def build_and_remember(*args):
        network = build_model(*args)
        utils.disconnect = lambda: torch.save(network.state_dict(), "weights.pt")
        return network

    resnet.build_model = build_and_remember


def test_both_processes_resume_from_the_checkpoint_of_rank_0(finished_run, tmp_path):
    link_run(finished_run, tmp_path / "0")
    (unread := tmp_path / "1" / "demo" / "last.pt").parent.mkdir(parents=True)
    unread.write_bytes(b"no checkpoint")
    flags = [*RUN, "--epochs", "3", "--resume"]
    scripts = run_two(tmp_path, flags, flags, prepare=keep_weights)
    assert [script.status for script in scripts] == [0, 0], [s.stderr for s in scripts]
    assert re.findall(r"\nepoch +(\d)/", scripts[0].stdout) == ["3"]
    weights = [load(tmp_path / str(rank) / "weights.pt") for rank in (0, 1)]
    for name, tensor in weights[0].items():
        assert "running" in name or torch.equal(tensor, weights[1][name]), name
    assert unread.read_bytes() == b"no checkpoint" and os.listdir(unread.parent) == ["last.pt"]
