"""Measures this project's training side by side with its ceiling and with the usual scripts.

    python tests/benchmark.py                    one table, within about BUDGET_MINUTES
    python tests/benchmark.py --compile --json speed.json

ours        train.train_one_epoch on data.TrainLoader: indexing, augmentation and step
ceiling     the same, always on the same batch: without any cost of the input pipeline
classic     the script that people write first: PIL images, a worker per core, fp32, contiguous
careful     the same with autocast, channels_last, persistent workers and pinned memory
compiled    ours with --compile
evaluation, augmentation alone (ours on the device; torchvision's on PIL images in one process)

The variants take turns, in reverse order every other time. A turn starts with warm-up steps outside
the timing; workers start in them, and have images left to prepare until the timing has ended, so
that as many batches are prepared within it as are used. On a slow machine there are fewer turns,
three at least, with fewer steps, to stay within the budget. cuDNN's search for fast algorithms is
on for all, and on a CPU all keep freed memory (utils.choose_device). Without CIFAR-100 in
--data-dir the pixels are random: the speed does not depend on them.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from PIL import __version__ as pillow_version
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from tqdm import tqdm

import data
import model as resnet
import train
import utils

DATA_DIR = "data"  # folder that holds cifar-100-python/; random pixels if it does not
BATCH_SIZE = 0  # images per step; 0: 16 on a CPU, 128 on a GPU [0, 50_000]
IMAGE_SIZE = 224  # pixels per side that the network sees [32, 1024]
STEPS = 0  # timed per turn; 0: 8 on a CPU, 50 on a GPU, or as the budget allows [0, 50_000]
WARMUP_STEPS = 0  # steps before; 0: 2 on a CPU, on a GPU what the workers prefetch [0, 50_000]
REPEATS = 5  # turns of every variant, at most [1, 1000]
BUDGET_MINUTES = 8.0  # after three turns, others only if they end within this time [0.0, 1e6]
DEVICE = "auto"  # where to compute ["auto", "cuda", "mps", "cpu"]
PRECISION = "auto"  # of all but classic ["auto", "bf16", "fp16", "fp32"]
COMPILE = False  # measure the compiled network too
JSON = ""  # file that gets the same figures; "" for none

SIZES = ("precision", "batch_size", "image_size", "steps", "warmup_steps", "budget_minutes")
RIVALS = ("ceiling", "classic", "careful")
LEAST_TURNS = 3


class Setup(NamedTuple):
    """What every variant is made from."""

    args: Namespace
    device: torch.device
    images: data.Split  # in the host's memory


def main(argv: list[str] | None = None) -> None:
    begin = time.perf_counter()
    args = utils.parse_flags(__file__, argv)
    deadline = begin + 60 * args.budget_minutes
    device = complete(args)
    images, source = read_images(args.data_dir)
    setup = Setup(args, device, images)
    about = describe(device, source)
    utils.say("device", about["device"])
    utils.say("versions", ", ".join(f"{name} {x}" for name, x in about["versions"].items()))
    utils.say("data", source)
    # First, while the device's memory is free
    starts = [measure_start(args) for _ in range(min(args.repeats, LEAST_TURNS))]
    args.steps = args.steps or fit_steps(setup, deadline)
    about["sizes"] = {name: getattr(args, name) for name in SIZES}
    utils.say("sizes", ", ".join(f"{name} {size}" for name, size in about["sizes"].items()))

    # An empty cache: what is measured is a first compilation.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        measured = take_turns(setup, make_variants(setup), deadline)
    measured["start_seconds"] = {name: median(x[name] for x in starts) for name in starts[0]}
    result = summarise(args, measured, len(images.labels)) | about
    print_table(result)
    turns, minutes = len(measured["repeats"]["ours"]), (time.perf_counter() - begin) / 60
    utils.say("turns", f"{turns} of each variant, {minutes:.1f} minutes in all")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# ---- the variants: generators that take a turn for each value asked of them, images/s -----------


def make_variants(setup: Setup) -> dict[str, Iterator[float]]:
    """What is measured, by name."""
    variants = {
        "ours": train_ours(setup),
        "ceiling": train_ours(setup, one_batch=True),
        "classic": train_classic(setup),
        "careful": train_careful(setup),
        "evaluation": evaluate(setup),
        "augmentation": augment(setup),
        "augmentation_torchvision": augment_with_torchvision(setup),
    }
    if setup.args.compile:
        variants["compiled"] = train_ours(setup, compile_it=True)
    return variants


def train_ours(setup: Setup, one_batch: bool = False, compile_it: bool = False) -> Iterator[float]:
    """This project's training: the timed epoch counts as a whole."""
    args, run = setup.args, start_run(setup, compile_it)
    loaders = make_loaders(setup, one_batch)
    yield from time_loaders(setup, loaders, lambda x: train.train_one_epoch(run, x, 1, args))


def evaluate(setup: Setup) -> Iterator[float]:
    """This project's evaluation: resize, normalise, forward pass."""
    args, device, images = setup
    run, size = start_run(setup), args.batch_size
    parts = [images.images[: size * steps].to(device) for steps in (1, args.steps)]
    loaders = [data.EvalLoader(part, size, args.image_size) for part in parts]
    yield from time_loaders(setup, loaders, lambda x: resnet.predict(run.model, x, run.dtype))


def augment(setup: Setup) -> Iterator[float]:
    """This project's augmentation, resize included, a batch at a time."""
    yield from time_loaders(setup, make_loaders(setup), lambda x: deque(x.epoch(0), maxlen=0))


def augment_with_torchvision(setup: Setup) -> Iterator[float]:
    """torchvision's, an image at a time in one process: what each worker of a DataLoader does."""
    dataset, count = PilImages(setup.images, setup.args), 256
    while True:
        start = time.perf_counter()
        for index in range(count):
            dataset[index]
        yield count / (time.perf_counter() - start)


def train_classic(setup: Setup) -> Iterator[float]:
    """As tutorials write it."""
    args, device, _ = setup
    model = resnet.build_model("resnet50", 100).to(device)
    criterion = nn.CrossEntropyLoss()
    options = {"momentum": args.momentum, "weight_decay": args.weight_decay}
    optimizer = SGD(model.parameters(), args.learning_rate, **options)

    def step(inputs: Tensor, labels: Tensor) -> float:
        inputs, labels = inputs.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    yield from time_steps(setup, make_dataloader(setup), step)


def train_careful(setup: Setup) -> Iterator[float]:
    """As a careful user writes it, who also lets the GPU run ahead of the host."""
    device, run = setup.device, start_run(setup)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        inputs = inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with resnet.autocast(device, run.dtype):
            loss = F.cross_entropy(run.model(inputs), labels)
        run.optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return loss.detach()

    options = {"persistent_workers": True, "pin_memory": device.type == "cuda"}
    yield from time_steps(setup, make_dataloader(setup, **options), step)


# ---- what they are made of ----------------------------------------------------------------------


def start_run(setup: Setup, compile_it: bool = False) -> train.Run:
    """ResNet-50 with random weights in channels_last, and what trains it."""
    model = resnet.build_model("resnet50", 100)
    model = model.to(setup.device, memory_format=torch.channels_last)
    run = train.make_run(setup.args, model, setup.args.precision)
    run.network = resnet.wrap_network(model, compile_it)
    return run


class ShortLoader(data.TrainLoader):
    """The project's loader, its epoch as short as asked for, or one batch again and again."""

    def __init__(self, split: data.Split, args: Namespace, steps: int, one_batch=False) -> None:
        super().__init__(split, args)
        self.steps = steps
        self.batch = next(super().epoch(0)) if one_batch else None

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(self.batch, self.steps) if self.batch else super().epoch(epoch)


def make_loaders(setup: Setup, one_batch: bool = False) -> list[ShortLoader]:
    """For the warm-up and for what is timed, of images on the device."""
    args, images = setup.args, setup.images.to(setup.device)
    return [ShortLoader(images, args, x, one_batch) for x in (args.warmup_steps, args.steps)]


class PilImages(Dataset):
    """PIL images as torchvision's CIFAR100 makes them, augmented by torchvision as by train.py."""

    def __init__(self, split: data.Split, args: Namespace) -> None:
        self.data = np.ascontiguousarray(split.images.permute(0, 2, 3, 1).numpy())
        self.targets = split.labels.tolist()
        steps = [
            transforms.RandomHorizontalFlip(args.flip),
            transforms.RandomCrop(32, padding=args.crop_padding),
            transforms.ColorJitter(args.brightness, args.contrast, args.saturation, args.hue),
            transforms.RandomRotation(args.rotation),
            transforms.RandomGrayscale(args.grayscale),
            transforms.Resize(args.image_size),
            transforms.ToTensor(),
            transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD),
        ]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def make_dataloader(setup: Setup, **options: bool) -> DataLoader:
    """A worker per core; as many batches as a turn uses, and those that they prefetch."""
    args, workers, dataset = setup.args, os.cpu_count(), PilImages(setup.images, setup.args)
    batches = args.warmup_steps + args.steps + 2 * workers
    sampler = RandomSampler(dataset, num_samples=batches * args.batch_size)
    return DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=workers, **options)


def time_loaders(setup: Setup, loaders: list, use: Callable) -> Iterator[float]:
    """Uses a loader to warm up, then another, in images/s: an epoch with all that belongs to it."""
    while True:
        for loader in loaders:
            start = synchronized_clock(setup.device)
            use(loader)
            seconds = synchronized_clock(setup.device) - start
        yield len(loader) * loader.batch_size / seconds


def time_steps(setup: Setup, loader: DataLoader, step: Callable) -> Iterator[float]:
    """Steps on a loader's batches, in images/s of those after the warm-up, the loop included.

    Then takes what the workers have prefetched, so that none is at work in the next turn.
    """
    args, device, _ = setup
    while True:
        batches, loss_sum = iter(loader), 0.0
        for batch in islice(batches, args.warmup_steps):
            loss_sum += step(*batch)
        start = synchronized_clock(device)
        for batch in islice(batches, args.steps):
            loss_sum += step(*batch)
        seconds = synchronized_clock(device) - start
        deque(batches, maxlen=0)
        yield args.steps * args.batch_size / seconds


def synchronized_clock(device: torch.device) -> float:
    """The time when the device has done all that it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


# ---- settings and images ------------------------------------------------------------------------


def complete(args: Namespace) -> torch.device:
    """Fills in what is left to the device and the constants of train.py; returns the device."""
    device = utils.choose_device(args.device)
    size, warmup_steps = (16, 2) if device.type == "cpu" else (128, 2 * os.cpu_count())
    args.precision = utils.choose_precision(args.precision, device)
    args.batch_size = args.batch_size or size
    most = 50_000 // args.batch_size  # an epoch
    args.warmup_steps = min(args.warmup_steps or warmup_steps, most)
    args.steps = min(args.steps, most)
    vars(args).update(vars(utils.parse_flags(train.__file__, [])) | vars(args))
    return device


def read_images(data_dir: str) -> tuple[data.Split, str]:
    """CIFAR-100's training images if they are there, else as many random ones; and which."""
    try:
        return data.read_cifar100(data_dir, "train")[0], "CIFAR-100"
    except utils.UserError as error:
        pixels = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
        images = data.Split(pixels, torch.arange(len(pixels)) % 100)
        return images, f"random pixels in CIFAR-100's shape ({str(error).split('. ')[0]})"


def describe(device: torch.device, source: str) -> dict:
    """Hardware, versions and data of the measurement."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        cpu = cpuinfo.split("model name", 1)[1].split("\n", 1)[0].strip("\t :")
    except (OSError, IndexError):  # not Linux, or an ARM one
        cpu = platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"torchvision": torchvision.__version__, "pillow": pillow_version}
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    machine = f"{utils.device_name(device)}; host {cpu}, {os.cpu_count()} cores"
    return {"device": machine, "versions": versions, "data": source}


# ---- measuring ----------------------------------------------------------------------------------


def fit_steps(setup: Setup, deadline: float) -> int:
    """Times one step of each variant; returns how many allow LEAST_TURNS before the deadline."""
    args = setup.args
    trial = Namespace(**vars(args) | {"steps": 1, "warmup_steps": 1, "compile": False})
    seconds_per_step = 0
    for variant in make_variants(setup._replace(args=trial)).values():
        seconds_per_step += args.batch_size / next(variant)
        variant.close()
    seconds_per_turn = (deadline - time.perf_counter()) / LEAST_TURNS
    most = min(8 if setup.device.type == "cpu" else 50, 50_000 // args.batch_size)
    return max(1, min(most, int(seconds_per_turn / seconds_per_step) - args.warmup_steps))


def take_turns(setup: Setup, variants: dict[str, Iterator], deadline: float) -> dict:
    """Every repeat's images/s, bytes of device memory at the peak, seconds of the first turns."""
    names, on_gpu = list(variants), setup.device.type == "cuda"
    rates = {name: [] for name in names}
    first_seconds, peak_memory, held, longest = {}, {}, dict.fromkeys(names, 0), 0
    options = {"unit": "variant", "leave": False, "disable": not utils.is_first()}
    for turn in range(setup.args.repeats):
        begin = time.perf_counter()
        if turn >= LEAST_TURNS and begin + longest > deadline:
            break
        order = names[::-1] if turn % 2 else names
        for name in tqdm(order, f"turn {turn + 1}", **options):
            start = time.perf_counter()
            if on_gpu:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            rates[name].append(next(variants[name]))
            if on_gpu:  # of this variant alone: what it held already, and what it took now
                peak_memory[name] = held[name] + torch.cuda.max_memory_allocated() - before
                held[name] += torch.cuda.memory_allocated() - before
            first_seconds.setdefault(name, time.perf_counter() - start)
        longest = max(longest, time.perf_counter() - begin)
    measured = {"repeats": rates, "first_turn_seconds": first_seconds}
    return measured | {"peak_memory_bytes": peak_memory}


def measure_start(args: Namespace) -> dict[str, float]:
    """Seconds of each part from a fresh Python to the end of the first step, without downloads."""
    code = """if True:
        import sys, time
        sys.path.insert(0, sys.argv[1])
        times = [time.time()]
        for module in ("torch", "torchvision", "benchmark"):
            __import__(module)
            times.append(time.time())
        sys.modules["benchmark"].take_first_step(sys.argv[2], times)"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent), json.dumps(vars(args))]
    start = time.time()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    times = [start, *json.loads(output)]
    parts = ("python", "torch", "torchvision", "other imports", "device", "data", "model", "step")
    return {part: after - before for part, before, after in zip(parts, times, times[1:])}


def take_first_step(settings: str, times: list[float]) -> None:
    """Goes on where the imports are done, in the process that measure_start began."""
    args = Namespace(**json.loads(settings))
    device = utils.choose_device(args.device)
    times.append(time.time())
    setup = Setup(args, device, read_images(args.data_dir)[0].to(device))
    times.append(time.time())
    run = start_run(setup)
    times.append(time.time())
    train.train_one_epoch(run, ShortLoader(setup.images, args, 1), 1, args)
    times.append(time.time())
    print(json.dumps(times))


def summarise(args: Namespace, measured: dict, epoch_images: int) -> dict:
    """Medians and the ratios between them, before all that was measured."""
    result = {name: median(rates) for name, rates in measured["repeats"].items()}
    for name in RIVALS:
        result[f"ours_over_{name}"] = result["ours"] / result[name]
    if args.compile:
        images = (args.warmup_steps + args.steps) * args.batch_size
        cost = measured["first_turn_seconds"]["compiled"] - images / result["compiled"]
        saved = epoch_images * (1 / result["ours"] - 1 / result["compiled"])  # seconds per epoch
        result["compiled_over_ours"] = result["compiled"] / result["ours"]
        result["compile_seconds"] = cost
        result["compile_pays_after_epochs"] = cost / saved if saved > 0 else None
    return result | measured


def print_table(result: dict) -> None:
    """Medians, spread, how many times faster ours is (medians, then repeat by repeat), memory."""
    print(f"\n{'':<26}{'images/s':>10}{'min .. max':>20}{'ours / it':>26}{'peak GB':>10}")
    ours = result["repeats"]["ours"]
    for name, rates in result["repeats"].items():
        spread, ratio, peak = f"{min(rates):,.1f} .. {max(rates):,.1f}", "", ""
        if name in (*RIVALS, "compiled"):
            ratios = [own / other for own, other in zip(ours, rates)]
            ratio = f"{result['ours'] / result[name]:.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        if memory := result["peak_memory_bytes"].get(name):
            peak = f"{memory / 1e9:.2f}"
        print(f"{name:<26}{result[name]:>10,.1f}{spread:>20}{ratio:>26}{peak:>10}")
    parts = result["start_seconds"]
    listing = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
    print()
    utils.say("start", f"{sum(parts.values()):.1f} s to the end of the first step: {listing}")
    if "compiled" in result:
        epochs = result["compile_pays_after_epochs"]
        speed, cost = result["compiled_over_ours"], result["compile_seconds"]
        paid = "never" if epochs is None else f"after {epochs:.1f} epochs"
        utils.say("compile", f"{speed:.2f} times ours, {cost:.1f} s at the start, paid back {paid}")


if __name__ == "__main__":
    main()
