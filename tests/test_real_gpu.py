"""The scripts on a real GPU, for what fake_gpu.py cannot show: python -m pytest -m gpu

On the CPU the same tests are among the slow ones, with a smaller network.
"""

import gc
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_gpu import smaller
from scripts import CLASSIC, RECIPES, ROOT, TORCHRUN, load, read_json, start_process
from torchvision.models.resnet import ResNet

import data
import evaluate
import train
import utils

SMALL = f"{CLASSIC} --train-per-class 24 --learning-rate 0.005"
FULL_SIZE = f"{CLASSIC} --image-size 224 --batch-size 128"

slow, gpu = pytest.mark.slow, pytest.mark.gpu
DEVICES = [pytest.param("cpu", marks=slow), pytest.param("cuda", marks=gpu)]
PRECISIONS = [pytest.param("cpu", "bf16", marks=slow)]
PRECISIONS += [pytest.param("cuda", name, marks=gpu) for name in utils.DTYPES]
in_each_precision = pytest.mark.parametrize(
    ("device", "precision"), PRECISIONS, indirect=["device"]
)


@pytest.fixture
def device(request, monkeypatch, tmp_path) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU here")
    if request.param == "cpu":
        monkeypatch.setattr(ResNet, "__init__", smaller(ResNet.__init__))
    monkeypatch.chdir(tmp_path)
    yield request.param
    torch.compiler.reset()
    gc.collect()


def train_on(device: str, folder: str, flags: str) -> dict:
    """Runs train.main(); returns the last.pt in its folder."""
    train.main(f"{flags} --device {device} --checkpoint-dir {folder}".split())
    return load(f"{folder}/last.pt")


def forbid_waiting(monkeypatch, device: str) -> list[str]:
    """Raises where the host waits for the GPU in a step, or while a batch is made.

    The run's first step may wait, since it compiles, and so may an epoch's first batch, for which
    random numbers are copied. Returns a list that grows with what is watched.
    """
    watched, steps = [], itertools.count()

    def watch(name: str, function: Callable, *args):
        watched.append(name)
        if device == "cpu":
            return function(*args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def train_step(*args, original=train.train_step):
        return original(*args) if next(steps) == 0 else watch("step", original, *args)

    def epoch(self, number: int, original=data.TrainLoader.epoch) -> Iterator:
        batches = original(self, number)
        yield next(batches)
        for _ in range(1, len(self)):
            yield watch("batch", next, batches)

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(data.TrainLoader, "epoch", epoch)
    return watched


@pytest.mark.parametrize("compiled", ["--no-compile", "--compile"])
@in_each_precision
def test_no_step_waits_and_evaluate_agrees_with_the_last_validation(
    device, precision, compiled, monkeypatch, capsys
):
    size, steps = (FULL_SIZE, 11) if device == "cuda" else (SMALL + " --batch-size 60", 4)
    watched = forbid_waiting(monkeypatch, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    flags = f"{size} {compiled} --precision {precision} --epochs 3"
    history = train_on(device, "run", flags)["history"]
    said = capsys.readouterr().out
    assert f", {precision}\n" in said and "warning" not in said
    assert watched.count("step") == 3 * steps - 1 and watched.count("batch") == 3 * (steps - 1)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
        with capsys.disabled():
            speed = f"{history[-1]['images_per_second']:,.0f} images/s"
            print(f"\n{precision} {compiled}: {speed}, at most {memory:.2f} GiB of GPU memory")

    evaluate.main(["--checkpoint", "run/last.pt", "--device", device])
    metrics = read_json("results/metrics.json")
    assert metrics["loss"] == pytest.approx(history[-1]["val_loss"], rel=0.001)
    assert metrics["top1_accuracy"] == pytest.approx(history[-1]["val_accuracy"], abs=2.5 / 360)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_no_step_waits_with_all_recipes_on(device, monkeypatch):
    watched = forbid_waiting(monkeypatch, device)
    train_on(device, "run", f"{SMALL} --batch-size 60 --precision bf16 --epochs 2 {RECIPES}")
    assert watched.count("step") == 2 * 4 - 1 and watched.count("batch") == 2 * 3


@in_each_precision
def test_resumed_run_is_close_to_the_unbroken_one(device, precision, monkeypatch):
    """Two steps from the same checkpoint; 0.9 if momentum is lost, 0.6 if images differ."""
    save_run = utils.save_run

    def save_and_copy(folder, metadata, parts, history, *args) -> None:
        save_run(folder, metadata, parts, history, *args)
        if len(history) == 1:
            shutil.copytree(folder, "broken")

    monkeypatch.setattr(utils, "save_run", save_and_copy)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    flags = f"{SMALL} --batch-size 120 --precision {precision} --epochs 2"
    unbroken = train_on(device, "unbroken", flags)
    broken = load("broken/last.pt")
    resumed = train_on(device, "broken", flags + " --resume")
    before, ours, theirs = (
        torch.cat([run["model"][name].flatten() for name in unbroken["model"] if "weight" in name])
        for run in (broken, resumed, unbroken)
    )
    assert (broken["epoch"], resumed["epoch"]) == (1, 2)
    assert (ours - theirs).norm() < 0.2 * (theirs - before).norm()


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_batches_are_the_same_as_on_the_cpu(device):
    args = utils.parse_flags(train.__file__, ["--image-size", "64", "--batch-size", "100"])
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8)
    split = data.Split(images, torch.arange(200))
    (images, labels), (expected, expected_labels) = (
        next(data.TrainLoader(split.to(torch.device(name)), args).epoch(1))
        for name in (device, "cpu")
    )
    assert torch.equal(labels.cpu(), expected_labels)
    torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=0.001)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_torchrun_trains(device):
    flags = f"{SMALL} --architecture resnet18 --device {device} --epochs 1".split()
    command = [*TORCHRUN, "--nproc-per-node", "1", str(ROOT / "train.py"), *flags]
    process = start_process(command, cwd=Path.cwd())
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "finished all 1 epochs" in out, err
