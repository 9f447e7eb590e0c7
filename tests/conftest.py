"""Two processes at a time; fixtures: the real data where it is there, and small finished runs."""

import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scripts import ROOT, TINY, run_script, save_blank, share_folder

# For the processes that tests start:
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny batches gain nothing from more


def tests_a_gpu(config: pytest.Config) -> bool:
    """Whether -m gpu was given."""
    return bool(re.search(r"(?<!not )\bgpu\b", config.option.markexpr))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs two processes where pytest-xdist is installed; but one for -n, --pdb or a GPU's tests."""
    options = config.option
    if "PYTEST_XDIST_WORKER" in os.environ or options.usepdb or tests_a_gpu(config):
        return
    if getattr(options, "numprocesses", 0) is None:
        options.numprocesses = min(2, os.cpu_count())
        options.dist = "worksteal" if options.dist == "no" else options.dist


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs, before torch is imported: every test but those marked gpu expects a CPU."""
    if not tests_a_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Leaves torch's many objects out of every garbage collection from now on."""
    gc.freeze()


@pytest.fixture(scope="session")
def cifar100_dir() -> str:
    """The folder with the official files; skips the test where they are not there."""
    folder = Path(os.environ.get("CIFAR100_DIR", ROOT / "data"))
    if not (folder / "cifar-100-python" / "test").exists():
        pytest.skip(f"the official CIFAR-100 files are not in {folder}")
    return str(folder)


@pytest.fixture
def imagenet_weights() -> str:
    """ResNet-50 weights in torchvision's layout; skips the test where they are not there."""
    path = ROOT / "data" / "resnet50-imagenet.pth"
    if not path.exists():
        pytest.skip(f"no ImageNet weights at {path}")
    return str(path)


@pytest.fixture(autouse=True, scope="session")
def savefig() -> Iterator[Callable]:
    """Pictures become one blank pixel, but in tests that ask for `rendered`; yields the real one."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        real = Figure.savefig
        patch.setattr(Figure, "savefig", save_blank)
        yield real


@pytest.fixture
def rendered(savefig, monkeypatch) -> None:
    """Pictures are drawn as a user sees them, which takes several seconds for an evaluation."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A folder in which TINY ran for two epochs: last.pt, best.pt and history.csv in demo/."""
    return share_folder(tmp_path_factory, "two-epochs", lambda folder: run_tiny(folder, "2"))


@pytest.fixture(scope="session")
def four_epochs(tmp_path_factory) -> Path:
    """The same for four epochs."""
    return share_folder(tmp_path_factory, "four-epochs", lambda folder: run_tiny(folder, "4"))


def run_tiny(folder: Path, epochs: str) -> None:
    flags = [*TINY, "--epochs", epochs, "--checkpoint-dir", "demo"]
    script = run_script("train.py", *flags, cwd=folder)
    assert script.status == 0, script.stderr
