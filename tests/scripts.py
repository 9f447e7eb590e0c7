"""Runs the project's scripts as real processes, without waiting for torch's import each time.

A server process imports torch and ours once and forks a child for every run: own process id, own
files and signals, the exit status that a shell would see.
"""

import itertools
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A whole run in seconds: four scans of each digit in two steps per epoch, validated on two others.
TINY = ["--demo", "--train-per-class", "4", "--holdout-per-class", "2", "--batch-size", "20"]
TINY += [
    "--log-every",
    "1",
    "--no-curves",
    "--precision",
    "fp32",
]  # bf16 is slow where the CPU must emulate it
# In place of the demo's recipe: the usual momentum, no moving average, and augmentation.
CLASSIC = "--learning-rate 0.02 --momentum 0.9 --ema-decay 0 --crop-padding 2"
CLASSIC += " --brightness 0.2 --contrast 0.2 --rotation 10"
TINY += CLASSIC.split()

# Every operation, at a strength of its own.
AUGMENTATION = {
    "flip": 0.5,
    "crop_padding": 4,
    "random_scale": 0.3,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "rotation": 15.0,
    "grayscale": 0.2,
}


def settings(**changes: object) -> Namespace:
    """The settings of train.py without augmentation at 32 px, changed by name."""
    import train  # not for all, because pytest-xdist's first process needs no torch
    import utils

    args = utils.parse_flags(train.__file__, [])
    vars(args).update(dict.fromkeys(AUGMENTATION, 0) | {"image_size": 32})
    assert changes.keys() <= vars(args).keys()
    vars(args).update(changes)
    return args


def link_run(run: Path, folder: Path) -> Path:
    """Links a run's demo/ into another folder, without copying; a save replaces only the link."""
    unlocked = shutil.ignore_patterns(".lock")
    return shutil.copytree(run / "demo", folder / "demo", copy_function=os.link, ignore=unlocked)


# torchrun and gloo look up the name of the machine, which waits where no name server answers: with
# the local address torchrun connects without it, gloo with the name of the interface (of Linux).
NO_NAMES = {"GLOO_SOCKET_IFNAME": "lo", "RES_OPTIONS": "timeout:1 attempts:1"}
NO_NAMES = NO_NAMES if sys.platform == "linux" else {}


def torchrun_environment(rank: int = 0, port: int = 0, **changed: object) -> dict[str, str]:
    """What torchrun sets in a process of two on one machine."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "GROUP_WORLD_SIZE": 1,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    names |= {"TORCHELASTIC_RUN_ID": "run1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in (names | changed).items()} | NO_NAMES


def be_one_of_two(rank: int = 0, port: int = 0, **changed: object) -> None:
    os.environ |= torchrun_environment(rank, port, **changed)


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


_numbers = itertools.count()
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["train", "evaluate", "torchvision"])


class Script:
    """A script that is running: `python NAME ARGS` in the folder cwd."""

    def __init__(
        self, name: str, *args: str, cwd: Path, prepare: Callable[[], None] | None = None
    ) -> None:
        """prepare runs in the new process before the script does."""
        self.log = Path(cwd, f"log-{next(_numbers)}")
        streams = [f"{self.log}.out", f"{self.log}.err"]
        self.process = _server.Process(
            target=_run, args=(str(ROOT / name), args, str(cwd), streams, prepare)
        )
        self.process.start()

    @property
    def stdout(self) -> str:
        return Path(f"{self.log}.out").read_text()

    @property
    def stderr(self) -> str:
        return Path(f"{self.log}.err").read_text()

    def wait(self, seconds: float = 120) -> int:
        """The exit status; minus the signal's number for a process that a signal ended."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()  # or pytest would wait for it when it ends
            pytest.fail(f"still running\n{self.stdout}{self.stderr}")
        return self.process.exitcode

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Returns once stdout holds the text."""
        deadline = time.monotonic() + seconds
        while not (os.path.exists(f"{self.log}.out") and text in self.stdout):
            assert self.process.is_alive(), f"ended\n{self.stdout}{self.stderr}"
            assert time.monotonic() < deadline, f"no {text!r} in\n{self.stdout}{self.stderr}"
            time.sleep(0.005)

    def send(self, signum: signal.Signals) -> None:
        os.kill(self.process.pid, signum)


def run_script(name: str, *args: str, cwd: Path, **options) -> Script:
    """Runs a script to its end."""
    script = Script(name, *args, cwd=cwd, **options)
    script.status = script.wait()
    return script


def _run(path: str, args: tuple, cwd: str, streams: list[str], prepare) -> None:
    os.chdir(cwd)
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # A shell's background job ignores SIGINT, nohup SIGHUP; what tests start gets both.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = [path, *args]
    sys.path.insert(0, str(ROOT))
    if prepare:
        prepare()
    runpy.run_path(path, run_name="__main__")
