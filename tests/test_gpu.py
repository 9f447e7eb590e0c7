"""The scripts on a GPU that is not there (fake_gpu.py): what would fail or be slow on a real one.

test_real_gpu.py is for a machine that has one.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from fake_gpu import in_its_own_process, own_processes, run_on_fake_gpu, smaller
from scripts import RECIPES, TINY
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision.models.resnet import ResNet

import data
import evaluate
import model
import train
import utils

# 120 images and every augmentation; the loss is read at the end of an epoch only.
FLAGS = " ".join(TINY) + " --train-per-class 12 --holdout-per-class 12 --flip 0.5 --log-every 1000"
RUN = "--epochs 2 --batch-size {size} --val-batch-size {size} --checkpoint-dir {size}"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def train_one_epoch(argv: list[str]) -> None:
    """A run that ends after epoch 1, as if it were interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "should_stop", lambda history, _: any(x["epoch"] for x in history))
        train.main(argv)


def rehearse(
    folder: Path, precision: str, flags: str = "", free: float = 80e9, fault: str = ""
) -> list[str]:
    """What is wrong with training, resuming and evaluating on a GPU with so many free bytes.

    Not in pytest's process: fake_gpu() leaves something behind.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(ResNet, "__init__", smaller(ResNet.__init__))
        for name in ("draw_matrices", "write_report"):  # fake tensors have no pixels
            patch.setattr(evaluate, name, lambda *args: None)
        patch.setattr(model, "checksum", lambda network: "of fake tensors")
        if fault:
            owner, name, replacement, _ = FAULTS[fault]
            f = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, **more: replacement(f, *args, **more))
        return run_all_stages(f"{FLAGS} --precision {precision} {flags} ", DTYPES[precision], free)


def run_all_stages(flags: str, dtype: str, free: float) -> list[str]:
    kinds = {f"convolution in {dtype}", "addmm in float32", "_log_softmax in float32"}
    kinds.add("_fused_sgd_ in float32")
    findings, seen = [], set()

    def attempt(stage: str, main: Callable, command: str) -> Counter:
        gpu = run_on_fake_gpu(main, command, free)
        seen.update(gpu.arithmetic)
        wrong = gpu.arithmetic.keys() - kinds
        gpu.problems += [f"{kind} at {gpu.arithmetic[kind]}" for kind in wrong]
        findings.extend(f"{stage}: {problem}" for problem in dict.fromkeys(gpu.problems))
        return gpu.transfers

    for stage, main, command in (
        ("train", train_one_epoch, flags + RUN),
        ("resume", train.main, flags + RUN + " --resume"),
        ("evaluate", evaluate.main, "--checkpoint {size}/best.pt --tta"),
    ):
        one, two = (attempt(stage, main, command.format(size=size)) for size in (120, 60))
        findings += [
            f"{stage}: {line}, {one[line]} times in one step, {two[line]} in two"
            for line in one | two
            if one[line] != two[line]
        ]
        if findings:
            return findings
    flags += RUN.format(size=60)
    with redirect_stdout(StringIO()):
        train_one_epoch(f"{flags} --checkpoint-dir cpu --device cpu".split())
    attempt("resume from CPU", train.main, f"{flags} --checkpoint-dir cpu --resume")
    attempt("check data", evaluate.main, "--checkpoint cpu/best.pt --check-data")
    return findings + [f"no {kind}" for kind in kinds - seen]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that last, and torch's caches in them."""
    with own_processes() as pool:
        yield pool


def start(pool: ProcessPoolExecutor, tmp_path_factory, *case) -> Future:
    return pool.submit(rehearse, tmp_path_factory.mktemp("rehearsal"), *case)


def test_scripts_run_on_a_gpu_and_no_step_makes_the_host_wait(tmp_path):
    assert in_its_own_process(rehearse, tmp_path, "bf16") == []


@pytest.mark.slow
def test_no_step_makes_the_host_wait_with_other_precisions_recipes_or_images_that_do_not_fit(
    pool, tmp_path_factory
):
    cases = [("fp16",), ("fp32",), ("fp16", RECIPES), ("fp32", RECIPES), ("bf16", RECIPES, 1e6)]
    runs = {case: start(pool, tmp_path_factory, *case) for case in cases}
    assert {case: run.result() for case, run in runs.items()} == {case: [] for case in cases}


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


def make_constant() -> Tensor:
    return torch.tensor(0.5, device="cuda")


def flip_by_index(f: Callable, images: Tensor, mask: Tensor) -> Tensor:
    images = images.clone()
    images[mask] = images[mask].flip(3)
    return images


def contiguous_momentum(f: Callable, checkpoint: dict, path: Path, parts: dict, facts: dict):
    f(checkpoint, path, parts, facts)
    for buffers in parts["optimizer"].state.values():
        buffers["momentum_buffer"] = buffers["momentum_buffer"].contiguous()


FAULTS = {  # the function f that is replaced, by what, words of what must be found
    "CPU tensor in augment()": (data, "augment", lambda f, *a: f(*a) + torch.zeros(1), "mixes"),
    "parameters left on the CPU": (data, "draw_parameters", lambda f, *a: stay(f(*a)), "mixes"),
    "order left on the CPU": (torch, "randperm", lambda f, *a, **k: stay(f(*a, **k)), "mixes"),
    "model left on the CPU": (nn.Module, "to", lambda f, self, *a, **k: self, "mixes"),
    "boolean mask as index": (data, "flip", flip_by_index, "DynamicOutputShape"),
    "item() in the step": (train, "train_step", lambda f, *a: read(f(*a)), "reads"),
    "item() in validation": (data.EvalLoader, "__iter__", lambda f, x: map(read, f(x)), "reads"),
    "constant per batch": (data, "augment", lambda f, *a: f(*a) - make_constant(), "to the GPU"),
    "through the host": (data, "augment", lambda f, *a: f(*a).cpu().to("cuda"), "to the host"),
    "float64 images": (data, "augment", lambda f, *a: f(*a).double(), "makes float64"),
    "fp16 head": (
        model.Head,
        "forward",
        lambda f, *a: nn.Sequential.forward(*a),
        "addmm in float16",
    ),
    "no autocast": (model, "autocast", lambda f, *a: nullcontext(), "convolution in float32"),
    "NCHW images": (ResNet, "forward", lambda f, net, x: f(net, x.contiguous()), "channels_last"),
    "NCHW weights": (
        utils,
        "memory_format",
        lambda f, *a: torch.contiguous_format,
        "channels_last",
    ),
    "NCHW momentum": (utils, "restore", contiguous_momentum, "resume: aten._fused"),
    "images not pinned": (data, "take", lambda f, x, rows, to: x[rows].to(to), "to the GPU"),
    "SGD not fused": (SGD, "__init__", lambda f, *a, **k: f(*a, **k | {"fused": False}), "reads"),
}


@pytest.mark.slow
def test_inserted_faults_are_found(pool, tmp_path_factory):
    free = {"images not pinned": 1e6}
    runs = {
        fault: start(pool, tmp_path_factory, "fp16", "", free.get(fault, 80e9), fault)
        for fault in FAULTS
    }
    for fault, (*_, words) in FAULTS.items():
        findings = runs[fault].result()
        assert any(words in finding for finding in findings), f"{fault}: no {words!r} in {findings}"
