"""Several processes are one run: torchrun on gloo, beside one process alone."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import ROOT, TINY, run_script
from test_train import load

# torchrun and gloo look up the name of the machine, which waits where no name server answers: with
# the local address torchrun connects without it, gloo with the name of the interface (of Linux).
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1"]
TORCHRUN = [*LAUNCHER, "--standalone"]
NO_NAMES = {"GLOO_SOCKET_IFNAME": "lo", "RES_OPTIONS": "timeout:1 attempts:1"}
NO_NAMES = NO_NAMES if sys.platform == "linux" else {}


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
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


def be_one_of_two() -> None:
    """What torchrun sets in the first process of two."""
    names = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    os.environ |= names | {"TORCHELASTIC_RUN_ID": "run1"}


def test_batch_size_that_the_processes_cannot_share_is_refused_before_anything_starts(tmp_path):
    flags = ["--demo", "--batch-size", "61"]
    script = run_script("train.py", *flags, cwd=tmp_path, prepare=be_one_of_two)
    assert script.status == 2
    assert script.stderr == "train.py: --batch-size 61: expected a multiple of 2 processes\n"
    assert not (tmp_path / "checkpoints").exists()


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
