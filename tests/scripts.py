"""What several files of tests use; above all, the project's scripts as real processes.

So that they need not wait for torch's import each time, a server process imports torch and ours
once and forks a child for every run: own process id, own files and signals, the exit status that a
shell would see.
"""

import csv
import fcntl
import gc
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The digits, in place of the demo's recipe with the usual momentum, no moving average, augmented.
CLASSIC = "--demo --no-curves --learning-rate 0.02 --momentum 0.9 --ema-decay 0 --crop-padding 2"
CLASSIC += " --brightness 0.2 --contrast 0.2 --saturation 0.2 --hue 0.05 --rotation 10"
CLASSIC += " --grayscale 0.05"

# A whole run in seconds: four scans of each digit in two steps per epoch, validated on two others.
# A small network, in fp32 because CPUs without bf16 emulate it slowly.
TINY = f"{CLASSIC} --train-per-class 4 --holdout-per-class 2 --batch-size 20 --log-every 1"
TINY = f"{TINY} --architecture resnet18 --precision fp32".split()

# Every recipe of train.py, as flags.
RECIPES = "--head-epochs 2 --schedule cosine --warmup-epochs 0.5 --label-smoothing 0.1"
RECIPES += " --mixup 0.2 --cutmix 1 --ema-decay 0.99 --freeze-stages 1 --freeze-batch-norm"

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
    import train
    import utils

    args = utils.parse_flags(train.__file__, [])
    vars(args).update(dict.fromkeys(AUGMENTATION, 0) | {"image_size": 32})
    assert changes.keys() <= vars(args).keys()
    vars(args).update(changes)
    return args


def load(path: Path) -> dict:
    import torch  # not for all, because pytest-xdist's first process needs none of it

    return torch.load(path, weights_only=True)


def assert_same(ours, theirs) -> None:
    """Bit for bit the same, all the way down, but for times and for what was asked of each run."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds", "images_per_second", "constants"}:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_same(one, other)
    elif hasattr(ours, "untyped_storage"):  # a tensor
        assert ours.equal(theirs)
    else:
        assert ours == theirs


def without_bars(text: str) -> list[str]:
    """The lines that were printed, without those that tqdm drew over."""
    return [line for line in text.splitlines() if line.strip() and "%|" not in line]


def read_rows(path: str) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: str | Path) -> dict:
    return json.loads(Path(path).read_text())


def read_predictions(folder: Path):
    """The columns of predictions.csv by name, as an array."""
    import numpy as np

    columns = {"delimiter": ",", "names": True, "usecols": range(4)}  # those that are numbers
    columns |= {"comments": None, "encoding": "latin-1"}  # names may hold any byte
    return np.genfromtxt(folder / "predictions.csv", **columns)


def share_folder(tmp_path_factory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that the first process of pytest-xdist to ask for it fills for all of them."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, scratch = base / name, base / f"{name}-unfinished"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            scratch.mkdir(exist_ok=True)
            fill(scratch)
            scratch.rename(folder)
    return folder


def link_run(run: Path, folder: Path) -> Path:
    """Links a run's demo/ into another folder, without copying; a save replaces only the link."""
    unlocked = shutil.ignore_patterns(".lock")
    return shutil.copytree(run / "demo", folder / "demo", copy_function=os.link, ignore=unlocked)


# torchrun and gloo look up the name of the machine, which waits where no name server answers: with
# the local address torchrun connects without it, gloo with the name of the interface (of Linux).
NO_NAMES = {"GLOO_SOCKET_IFNAME": "lo", "RES_OPTIONS": "timeout:1 attempts:1"}
NO_NAMES = NO_NAMES if sys.platform == "linux" else {}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1"]
TORCHRUN = [*LAUNCHER, "--standalone"]


def start_process(command: list[str], cwd: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=os.environ | NO_NAMES, **pipes)


def torchrun_environment(rank: int = 0, port: int = 0, **changed: object) -> dict[str, str]:
    """What torchrun sets in a process of two on one machine."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "GROUP_RANK": 0,
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


def save_blank(figure, path, **_) -> None:
    """In place of matplotlib's Figure.savefig: to render takes most of an evaluation's time."""
    from PIL import Image

    Image.new("RGBA", (1, 1)).save(path, "png")


_numbers = itertools.count()
_server = multiprocessing.get_context("forkserver")
# train first: test_readme.py looks at what its import alone brings in.
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
    from matplotlib.figure import Figure

    gc.freeze()
    os.chdir(cwd)
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # A shell's background job ignores SIGINT, nohup SIGHUP; what tests start gets both.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = [path, *args]
    sys.path.insert(0, str(ROOT))
    Figure.savefig = save_blank
    if prepare:
        prepare()
    runpy.run_path(path, run_name="__main__")
