"""The scripts on a GPU that is not there (fake_gpu.py): what would fail or be slow on a real one.

test_real_gpu.py is for a machine that has one.
"""

import multiprocessing
import os
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from unittest.mock import patch

import pytest
import torch
from fake_gpu import FakeGPU, fake_gpu
from scripts import CLASSIC
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision.models.resnet import BasicBlock, ResNet

import data
import evaluate
import model
import train
import utils


def train_one_epoch(argv: list[str]) -> None:
    """A run that ends after epoch 1, as if it were interrupted."""
    with patch("train.should_stop", lambda history, args: any(row["epoch"] for row in history)):
        train.main(argv)


# 240 images and every augmentation; the loss is read at the end of an epoch only.
FLAGS = f"--demo {CLASSIC} --epochs 2 --train-per-class 24 --holdout-per-class 12 --flip 0.5"
FLAGS += " --log-every 1000 --no-compile"
STEPS = {"120": 2, "60": 4}  # per epoch, with these batch sizes
RUN = "{flags} --batch-size {size} --val-batch-size {size} --checkpoint-dir {size}"
STAGES = {
    "train": (train_one_epoch, RUN),
    "resume": (train.main, RUN + " --resume"),
    "evaluate": (evaluate.main, "--checkpoint {size}/best.pt --tta --no-show"),
}
RECIPES = "--head-epochs 2 --schedule cosine --warmup-epochs 0.5 --label-smoothing 0.1"
RECIPES += " --mixup 0.2 --cutmix 1 --ema-decay 0.99 --freeze-stages 1 --freeze-batch-norm"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def run_on_fake_gpu(main, command: str, free: float = 80e9) -> FakeGPU:
    """Runs a script's main(); how it failed is among the problems."""
    with fake_gpu(free) as gpu, redirect_stdout(StringIO()) as said:
        try:
            main(command.split())
        except (Exception, SystemExit) as error:  # noqa: BLE001, reported
            gpu.problems.append(f"{type(error).__name__}: {error}")
    if "device   fake GPU" not in said.getvalue():
        gpu.problems.append("it did not run on the GPU")
    return gpu


def rehearse(precision: str, flags: str = "", fault: str = "", free: float = 80e9) -> list[str]:
    """What is wrong with training, resuming and evaluating on a GPU with so many free bytes.

    Needs a process of its own.
    """
    make = ResNet.__init__  # a smaller one, with the same kinds of operations
    ResNet.__init__ = lambda self, *args, **more: make(self, BasicBlock, [1] * 4, **more)
    evaluate.write_pictures = lambda *args: None
    if fault:
        owner, name, insert, _ = FAULTS[fault]
        setattr(owner, name, insert(getattr(owner, name)))
    flags = f"{FLAGS} --precision {precision} {flags}"
    kinds = {"addmm in float32", "_log_softmax in float32", "_fused_sgd_ in float32"}
    kinds.add(f"convolution in {DTYPES[precision]}")
    findings, seen = [], set()

    def attempt(stage: str, main, command: str) -> Counter:
        gpu = run_on_fake_gpu(main, command, free)
        seen.update(gpu.arithmetic)
        gpu.problems += [
            f"{kind} at {gpu.arithmetic[kind]}" for kind in gpu.arithmetic.keys() - kinds
        ]
        findings.extend(f"{stage}: {problem}" for problem in dict.fromkeys(gpu.problems))
        return gpu.transfers

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for stage, (main, command) in STAGES.items():
            few, many = (
                attempt(stage, main, command.format(flags=flags, size=size)) for size in STEPS
            )
            findings += [
                f"{stage}: {line}, {few[line]} times in 2 steps, {many[line]} in 4"
                for line in few | many
                if few[line] != many[line]
            ]
            if findings:
                return findings
        with redirect_stdout(StringIO()):
            train_one_epoch(f"{flags} --checkpoint-dir cpu --device cpu".split())
        attempt("resume from CPU", train.main, f"{flags} --checkpoint-dir cpu --resume")
    return findings + [f"no {kind}" for kind in kinds - seen]


def own_processes() -> ProcessPoolExecutor:
    """Runs every function in a process of its own, on each core one."""
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(os.cpu_count(), context, max_tasks_per_child=1)


def in_its_own_process(function, *args) -> list[str]:
    with own_processes() as pool:
        return pool.submit(function, *args).result()


def test_scripts_run_on_a_gpu_and_no_step_makes_the_host_wait():
    assert in_its_own_process(rehearse, "bf16") == []


@pytest.mark.slow
def test_images_that_do_not_fit_on_it_are_copied_without_making_the_host_wait():
    assert in_its_own_process(rehearse, "bf16", RECIPES, "", 1e6) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_no_step_makes_the_host_wait_in_the_other_precisions(precision):
    assert in_its_own_process(rehearse, precision) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", DTYPES)
def test_no_step_makes_the_host_wait_with_all_recipes_on(precision):
    assert in_its_own_process(rehearse, precision, RECIPES) == []


# ---- faults that must be found ------------------------------------------------------------------


class Stays(Tensor):
    """A tensor that was forgotten when the others moved."""

    def to(self, *args, **more) -> Tensor:
        return self


def stay(tensors: object) -> object:
    return tree_map_only(Tensor, lambda tensor: tensor.as_subclass(Stays), tensors)


def read(tensors: object) -> object:
    tree_leaves(tensors)[0].max().item()
    return tensors


def then(change):
    """A fault that changes what a function returns."""
    return lambda original: lambda *args, **more: change(original(*args, **more))


def instead(replacement):
    """A fault that replaces a function."""
    return lambda original: replacement


def flip_by_index(images: Tensor, mask: Tensor) -> Tensor:
    images = images.clone()
    images[mask] = images[mask].flip(3)
    return images


def contiguous_momentum(original):
    def restore(checkpoint: dict, path: object, parts: dict, data_facts: dict) -> None:
        original(checkpoint, path, parts, data_facts)
        for buffers in parts["optimizer"].state.values():
            buffers["momentum_buffer"] = buffers["momentum_buffer"].contiguous()

    return restore


def contiguous_input(original):
    return lambda self, images: original(self, images.contiguous())


def unfused(original):
    return lambda self, *args, **more: original(self, *args, **(more | {"fused": False}))


def minus_half(images: Tensor) -> Tensor:
    return images - torch.tensor(0.5, device=images.device)


def take_slowly(images: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    return images[rows].to(device)


FAULTS = {  # where it is inserted, the fault, words of what must be found
    "CPU tensor in augment()": (data, "augment", then(lambda x: x + torch.zeros(x.shape)), "mixes"),
    "parameters left on the CPU": (data, "draw_parameters", then(stay), "mixes"),
    "order left on the CPU": (torch, "randperm", then(stay), "mixes"),
    "model left on the CPU": (nn.Module, "to", instead(lambda self, *a, **k: self), "mixes"),
    "boolean mask as index": (data, "flip", instead(flip_by_index), "DynamicOutputShape"),
    "item() in the step": (train, "train_step", then(read), "reads"),
    "item() in validation": (data.EvalLoader, "__iter__", then(lambda b: map(read, b)), "reads"),
    "constant made per batch": (data, "augment", then(minus_half), "to the GPU"),
    "images through the host": (
        data,
        "augment",
        then(lambda x: x.cpu().to(x.device)),
        "to the host",
    ),
    "float64 images": (data, "augment", then(Tensor.double), "makes float64"),
    "half-precision head": (
        model.Head,
        "forward",
        instead(nn.Sequential.forward),
        "addmm in float16",
    ),
    "no autocast": (model, "autocast", instead(lambda *a: nullcontext()), "convolution in float32"),
    "contiguous input": (ResNet, "forward", contiguous_input, "channels_last"),
    "contiguous weights": (
        data,
        "memory_format",
        instead(lambda *a: torch.contiguous_format),
        "channels_last",
    ),
    "contiguous momentum": (utils, "restore", contiguous_momentum, "resume: aten._fused"),
    "images that do not fit, not pinned": (data, "take", instead(take_slowly), "to the GPU"),
    "optimizer not fused": (SGD, "__init__", unfused, "reads"),
}


@pytest.mark.slow
def test_inserted_faults_are_found(capsys):
    rows, free = [], {fault: 1e6 if "do not fit" in fault else 80e9 for fault in FAULTS}
    with own_processes() as pool:
        runs = {fault: pool.submit(rehearse, "fp16", "", fault, free[fault]) for fault in FAULTS}
    for fault, (*_, words) in FAULTS.items():
        findings = runs[fault].result()
        found = [finding for finding in findings if words in finding]
        assert found, f"{fault}: no {words!r} in {findings}"
        rows.append(f"{fault:<28} {found[0]}")
    with capsys.disabled():
        print("", *rows, sep="\n")
