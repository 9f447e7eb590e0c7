"""Several processes are one run: torchrun on gloo, beside one process alone."""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import (
    NO_NAMES,
    ROOT,
    TINY,
    Script,
    be_one_of_two,
    find_free_port,
    link_run,
    run_script,
    settings,
    torchrun_environment,
)
from test_train import load

import model as resnet
import utils

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1"]
TORCHRUN = [*LAUNCHER, "--standalone"]


def start(command: list[str], cwd: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=os.environ | NO_NAMES, **pipes)


@pytest.mark.slow
def test_torchrun_trains_saves_once_and_one_process_goes_on(tmp_path):
    flags = ["--nproc-per-node", "2", str(ROOT / "train.py"), *TINY, "--epochs", "2"]
    process = start([*TORCHRUN, *flags], cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Warning" not in err, err
    assert out.count("device ") == 1 and "torchrun processes: 2, gloo" in out
    assert len(re.findall(r"^epoch +\d/2", out, re.MULTILINE)) == 2
    last = load(tmp_path / "checkpoints" / "demo" / "last.pt")
    assert not [name for name in last["model"] if name.startswith(("module.", "_orig_mod."))]
    # Resuming with one process is the same run: the batch is global.
    more = run_script("train.py", *TINY, "--epochs", "3", "--resume", cwd=tmp_path)
    assert more.status == 0 and "epoch    3/3" in more.stdout, more.stderr


@pytest.mark.slow
def test_two_machines_with_one_checkpoint_folder_are_one_run(tmp_path):
    """The README's command, by two torchruns; each machine has a data folder of its own."""
    lines = (ROOT / "README.md").read_text().splitlines()
    command = next(line for line in lines if line.startswith("torchrun --nnodes 2"))
    # Resuming with both machines, then with one process, is the same run.
    outputs = [train_on_two_machines(command, tmp_path, "--epochs", "2")]
    outputs += [train_on_two_machines(command, tmp_path, "--epochs", "3", "--resume")]
    assert all(re.findall(r"processes: \d+", out) == ["processes: 2"] for out in outputs)
    alone = run_script("train.py", *TINY, "--epochs", "4", "--resume", cwd=tmp_path)
    assert alone.status == 0, alone.stderr
    epochs = [re.findall(r"\nepoch +(\d/\d)", out) for out in (*outputs, alone.stdout)]
    assert epochs == [["1/2", "2/2"], ["3/3"], ["4/4"]]
    history = load(tmp_path / "checkpoints" / "demo" / "last.pt")["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]


def train_on_two_machines(command: str, folder: Path, *flags: str) -> str:
    """What both wrote to stdout, in one piece: the first process is on either of them."""
    endpoint = f"127.0.0.1:{find_free_port()}"
    for name, value in [("HOST:29500", endpoint), ("--nproc-per-node 8", "--nproc-per-node 1")]:
        assert name in command
        command = command.replace(name, value)
    _, *options, script = command.split()
    command = [*LAUNCHER, *options, str(ROOT / script), *TINY, *flags]
    machines = [start([*command, "--data-dir", name], cwd=folder) for name in ("data-a", "data-b")]
    outputs = [machine.communicate(timeout=300) for machine in machines]
    for machine, (_, err) in zip(machines, outputs):
        assert machine.returncode == 0 and "Warning" not in err, err
    return "".join(out for out, _ in outputs)


def test_batch_size_that_the_processes_cannot_share_is_refused_before_anything_starts(tmp_path):
    flags = ["--demo", "--batch-size", "61"]
    script = run_script("train.py", *flags, cwd=tmp_path, prepare=be_one_of_two)
    assert script.status == 2
    assert script.stderr == "train.py: --batch-size 61: expected a multiple of 2 processes\n"
    assert not (tmp_path / "checkpoints").exists()


# ---- two processes that were not started alike --------------------------------------------------

RUN = [*TINY, "--epochs", "2", "--checkpoint-dir", "demo"]


def keep_weights(rank: int, port: int) -> None:
    """In a process of two: writes the weights that it ends with."""
    be_one_of_two(rank, port)
    build_model = resnet.build_model

    def build_and_remember(*args):
        network = build_model(*args)
        utils.disconnect = lambda: torch.save(network.state_dict(), f"weights-{rank}.pt")
        return network

    resnet.build_model = build_and_remember


def wait_a_while(rank: int, port: int) -> None:
    """In a process of two: rank 1 is late with all that comes after the model."""
    be_one_of_two(rank, port)
    broadcast = utils.broadcast

    def broadcast_and_wait(tensors) -> None:
        broadcast(tensors)
        time.sleep(3 * rank)

    utils.broadcast = broadcast_and_wait


def test_only_rank_0_moves_an_earlier_run_aside(finished_run, tmp_path):
    link_run(finished_run, tmp_path)
    port = find_free_port()
    roles = [functools.partial(wait_a_while, rank, port) for rank in (0, 1)]
    scripts = [Script("train.py", *RUN, cwd=tmp_path, prepare=role) for role in roles]
    assert [script.wait() for script in scripts] == [0, 0], scripts[0].stderr
    (aside,) = (tmp_path / "demo").glob("earlier-*")
    assert (aside / "last.pt").samefile(finished_run / "demo" / "last.pt")
    assert {path.name for path in (tmp_path / "demo").glob("*.*")} >= {"last.pt", "best.pt"}


def run_two(tmp_path: Path, *flags: list[str]) -> list[Script]:
    """Two processes that are one run, each in a folder of its own, with flags of its own."""
    port, scripts = find_free_port(), []
    for rank, own in enumerate(flags):
        (folder := tmp_path / str(rank)).mkdir(exist_ok=True)
        prepare = functools.partial(be_one_of_two, rank, port)
        scripts.append(Script("train.py", *own, cwd=folder, prepare=prepare))
    for script in scripts:
        script.status = script.wait()
    return scripts


def assert_refused(scripts: list[Script], message: str) -> None:
    """Both end with status 1 before they train, one of them with the message."""
    assert [script.status for script in scripts] == [1, 1], [s.stderr for s in scripts]
    said = "".join(script.stderr for script in scripts)
    assert re.search(message, said) and "Traceback" not in said, said
    assert "Start them with the same flags, files and data" in said
    assert "epoch    1/" not in scripts[0].stdout


def test_another_learning_rate_in_one_process_is_refused_by_name(tmp_path):
    message = "LEARNING_RATE is 0.02 on rank 0, but 0.03 on rank 1"
    assert_refused(run_two(tmp_path, RUN, [*RUN, "--learning-rate", "0.03"]), message)


def have_a_gpu(rank: int, port: int) -> None:
    """In a process of two: it would use a GPU, which is never touched."""
    be_one_of_two(rank, port)
    utils.choose_device = lambda *args: torch.device("cuda")


def test_gpu_in_one_process_alone_is_refused(tmp_path):
    port = find_free_port()
    roles = [functools.partial(role, r, port) for r, role in enumerate((be_one_of_two, have_a_gpu))]
    scripts = [Script("train.py", *RUN, cwd=tmp_path, prepare=role) for role in roles]
    assert [script.wait() for script in scripts] == [1, 1]
    said = "".join(script.stderr for script in scripts)
    assert (
        "The processes need a GPU each, or all of them --device cpu" in said
        and "Traceback" not in said
    )


@pytest.mark.parametrize("counts", [(14, 14), (24, 14)])
def test_other_pictures_in_one_process_are_refused(counts, tmp_path):
    rng = np.random.default_rng(0)
    for rank, count in enumerate(counts):
        for part, name, number in itertools.product(("train", "val"), "ab", range(count // 2)):
            path = tmp_path / str(rank) / "photos" / part / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    flags = [*RUN, "--dataset", "photos", "--stored-size", "32", "--holdout-per-class", "0"]
    flags += ["--train-per-class", "0"]
    message = f"dataset is '{counts[0]} pictures, crc32 .*' on rank 0, but '{counts[1]} pictures"
    assert_refused(run_two(tmp_path, flags, flags), message)


def test_both_processes_resume_from_the_checkpoint_of_rank_0(finished_run, four_epochs, tmp_path):
    """In rank 1's folder is one of an earlier epoch."""
    for rank, run in enumerate((four_epochs, finished_run)):
        (tmp_path / str(rank) / "demo").mkdir(parents=True)
        shutil.copy(run / "demo" / "last.pt", tmp_path / str(rank) / "demo")
    port, scripts = find_free_port(), []
    for rank in (0, 1):
        flags = [*RUN, "--epochs", "5", "--resume"]
        prepare = functools.partial(keep_weights, rank, port)
        scripts.append(Script("train.py", *flags, cwd=tmp_path / str(rank), prepare=prepare))
    assert [script.wait() for script in scripts] == [0, 0], scripts[0].stderr
    assert re.findall(r"\nepoch +(\d)/", scripts[0].stdout) == ["5"]
    weights = [load(tmp_path / str(rank) / f"weights-{rank}.pt") for rank in (0, 1)]
    for name, tensor in weights[0].items():
        assert "running" in name or torch.equal(tensor, weights[1][name]), name
    untouched = load(tmp_path / "1" / "demo" / "last.pt")
    assert untouched["epoch"] == 2 and len(list((tmp_path / "1" / "demo").iterdir())) == 1


@pytest.mark.parametrize("of_this_torchrun", [True, False])
def test_restarted_run_goes_on_from_its_own_checkpoint_alone(
    of_this_torchrun, finished_run, tmp_path, monkeypatch
):
    for name, value in torchrun_environment(TORCHELASTIC_RESTART_COUNT=1).items():
        monkeypatch.setenv(name, value)
    launcher = utils.this_process().launcher if of_this_torchrun else "an earlier one"
    state = load(finished_run / "demo" / "last.pt") | {"launcher": launcher}
    utils.save_checkpoint(tmp_path / "last.pt", state)
    found = utils.find_checkpoint(tmp_path / "last.pt", settings())
    assert (found is not None) == of_this_torchrun


def test_restarts_over_several_machines_are_refused(tmp_path):
    two = {"GROUP_WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 3}
    prepare = functools.partial(be_one_of_two, **two)
    script = run_script("train.py", *RUN, cwd=tmp_path, prepare=prepare)
    assert script.status == 1 and script.stderr.count("\n") == 2
    assert "--max-restarts 3 on 2 machines: expected 0" in script.stderr
    assert "--resume-if-saved" in script.stderr


def test_message_is_left_where_torchrun_looks_for_it(tmp_path):
    prepare = functools.partial(be_one_of_two, TORCHELASTIC_ERROR_FILE=tmp_path / "error.json")
    script = run_script("train.py", "--demo", "--batch-size", "61", cwd=tmp_path, prepare=prepare)
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message + "\n" == script.stderr


@pytest.mark.slow
def test_torchrun_ends_with_the_message_which_stands_above_it_once(tmp_path):
    flags = ["--nproc-per-node", "2", str(ROOT / "train.py"), *TINY, "--weights", "nowhere.pth"]
    process = start([*TORCHRUN, *flags], cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    lines = err.splitlines()
    said = [number for number, line in enumerate(lines) if "Weights nowhere.pth not found" in line]
    assert len(said) == 2 and len(lines) - said[1] <= 3  # printed, and in torchrun's last lines


@pytest.mark.slow
def test_killed_worker_is_restarted_and_the_run_continues_to_its_end(tmp_path):
    (tmp_path / "checkpoints" / "demo").mkdir(parents=True)
    flags = ["--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "train.py")]
    process = start([*TORCHRUN, *flags, *TINY, "--epochs", "4"], cwd=tmp_path)
    lines = []
    while not (lines and lines[-1].startswith("epoch    2/4")):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    time.sleep(0.3)  # into the third epoch
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)  # rank 0, which saves
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    epochs = re.findall(r"^epoch +(\d)/4", "".join(lines) + out, re.MULTILINE)
    assert "resume   checkpoints/demo/last.pt, after epoch" in out
    assert epochs == ["1", "2", "3", "4"]
    assert len(load(tmp_path / "checkpoints" / "demo" / "last.pt")["history"]) == 4
    best = "checkpoints/demo/best.pt"
    script = run_script("evaluate.py", "--checkpoint", best, "--no-show", cwd=tmp_path)
    assert script.status == 0, script.stderr
