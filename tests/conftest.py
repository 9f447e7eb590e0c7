"""Fixtures: the real data where it is there, and a small finished run."""

import os
from pathlib import Path

import pytest
from scripts import ROOT, TINY, run_script

os.environ["PYTHONPATH"] = (
    f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # for the processes that tests start
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny batches gain nothing from more


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


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A folder in which TINY ran for two epochs: last.pt, best.pt and history.csv in demo/."""
    return run_tiny(tmp_path_factory.mktemp("finished"), epochs=2)


@pytest.fixture(scope="session")
def four_epochs(tmp_path_factory) -> Path:
    """The same for four epochs."""
    return run_tiny(tmp_path_factory.mktemp("four"), epochs=4)


def run_tiny(folder: Path, epochs: int) -> Path:
    flags = [*TINY, "--epochs", str(epochs), "--checkpoint-dir", "demo"]
    script = run_script("train.py", *flags, cwd=folder)
    assert script.status == 0, script.stderr
    return folder
