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
from itertools import islice
from pathlib import Path
from statistics import median

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
LEAST_TURNS = 3


def main(argv: list[str] | None = None) -> None:
    begin = time.perf_counter()
    args = utils.parse_flags(__file__, argv)
    deadline = begin + 60 * args.budget_minutes
    device = complete(args)
    images, source = read_images(args.data_dir)
    about = describe(device, source)
    for label, value in about.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {part}" for name, part in value.items())
        utils.say(label, value)
    # First, while the device's memory is free
    starts = [measure_start(args) for _ in range(min(args.repeats, LEAST_TURNS))]
    if not args.steps:
        args.steps = fit_steps(args, device, images, deadline)
    about["sizes"] = {name: getattr(args, name) for name in SIZES}
    utils.say("sizes", ", ".join(f"{name} {size}" for name, size in about["sizes"].items()))

    # An empty cache: what is measured is a first compilation.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        measured = take_turns(args, device, make_variants(args, device, images), deadline)
    measured["start_seconds"] = {
        part: median(start[part] for start in starts) for part in starts[0]
    }
    result = summarise(args, measured, len(images.labels)) | about
    print_table(result)
    turns, minutes = len(measured["repeats"]["ours"]), (time.perf_counter() - begin) / 60
    utils.say("turns", f"{turns} of each variant, {minutes:.1f} minutes in all")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_variants(
    args: Namespace, device: torch.device, images: data.Split
) -> dict[str, Iterator[float]]:
    """What is measured, by name."""
    variants = {
        "ours": train_ours(args, device, images),
        "ceiling": train_ours(args, device, images, OneBatch),
        "classic": train_classic(args, device, images),
        "careful": train_careful(args, device, images),
        "evaluation": evaluate(args, device, images),
        "augmentation": augment(args, device, images),
        "augmentation_torchvision": augment_with_torchvision(args, images),
    }
    if args.compile:
        variants["compiled"] = train_ours(args, device, images, compile_it=True)
    return variants


# ---- the variants: generators that take a turn for each value asked of them, images/s -----------


class ShortLoader(data.TrainLoader):
    """The project's loader over all images, its epoch as short as asked for."""

    def __init__(self, images: data.Split, args: Namespace, steps: int) -> None:
        super().__init__(images, args)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps


class OneBatch(ShortLoader):
    """Yields one batch that is on the device already."""

    def __init__(self, images: data.Split, args: Namespace, steps: int) -> None:
        super().__init__(images, args, steps)
        self.batch = next(super().epoch(0))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from [self.batch] * self.steps


def train_ours(
    args: Namespace,
    device: torch.device,
    images: data.Split,
    kind: type[ShortLoader] = ShortLoader,
    compile_it: bool = False,
) -> Iterator[float]:
    """This project's training, or with OneBatch its ceiling: the timed epoch counts as a whole."""
    run, images = start_run(args, device, compile_it), images.to(device)
    loaders = [kind(images, args, steps) for steps in (args.warmup_steps, args.steps)]
    yield from time_loaders(
        loaders, device, lambda loader: train.train_one_epoch(run, loader, 1, args)
    )


def train_classic(args: Namespace, device: torch.device, images: data.Split) -> Iterator[float]:
    """As tutorials write it."""
    model = resnet.build_model("resnet50", 100).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = SGD(
        model.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay
    )
    loader = make_dataloader(args, images)
    while True:
        model.train()
        seconds, running_loss = [], 0.0
        for inputs, labels in time_steps(loader, args, device, seconds):
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        yield args.steps * args.batch_size / sum(seconds)


def train_careful(args: Namespace, device: torch.device, images: data.Split) -> Iterator[float]:
    """As a careful user writes it, who also lets the GPU run ahead of the host."""
    run, on_gpu = start_run(args, device), device.type == "cuda"
    model, optimizer, scaler = run.model, run.optimizer, run.scaler
    loader = make_dataloader(args, images, persistent_workers=True, pin_memory=on_gpu)
    while True:
        model.train()
        seconds, loss_sum = [], 0.0
        for inputs, labels in time_steps(loader, args, device, seconds):
            inputs = inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with resnet.autocast(device, run.dtype):
                loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            loss_sum += loss.detach()
        yield args.steps * args.batch_size / sum(seconds)


def evaluate(args: Namespace, device: torch.device, images: data.Split) -> Iterator[float]:
    """This project's evaluation: resize, normalise, forward pass."""
    run, size = start_run(args, device), args.batch_size
    parts = [images.images[: size * steps].to(device) for steps in (1, args.steps)]
    loaders = [data.EvalLoader(part, size, args.image_size) for part in parts]
    yield from time_loaders(
        loaders, device, lambda loader: resnet.predict(run.model, loader, run.dtype)
    )


def augment(args: Namespace, device: torch.device, images: data.Split) -> Iterator[float]:
    """This project's augmentation, resize included, a batch at a time."""
    images = images.to(device)
    loaders = [ShortLoader(images, args, steps) for steps in (args.warmup_steps, args.steps)]
    yield from time_loaders(loaders, device, lambda loader: deque(loader.epoch(0), maxlen=0))


def augment_with_torchvision(args: Namespace, images: data.Split) -> Iterator[float]:
    """torchvision's, an image at a time in one process: what each worker of a DataLoader does."""
    dataset, count = PilImages(images, make_transform(args)), 256
    while True:
        start = time.perf_counter()
        for index in range(count):
            dataset[index]
        yield count / (time.perf_counter() - start)


# ---- what they are made of ----------------------------------------------------------------------


def start_run(args: Namespace, device: torch.device, compile_it: bool = False) -> train.Run:
    """ResNet-50 with random weights in channels_last, and what trains it."""
    model = resnet.build_model("resnet50", 100).to(device, memory_format=torch.channels_last)
    run = train.make_run(args, model, args.precision)
    run.network = train.wrap_network(model, compile_it)
    return run


class PilImages(Dataset):
    """Makes a PIL image of an array's row and transforms it, as torchvision's CIFAR100 does."""

    def __init__(self, images: data.Split, transform: transforms.Compose) -> None:
        self.data = np.ascontiguousarray(images.images.permute(0, 2, 3, 1).numpy())
        self.targets = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def make_transform(args: Namespace) -> transforms.Compose:
    """The augmentation of train.py, as strong, in torchvision's terms."""
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(args.flip),
            transforms.RandomCrop(32, padding=args.crop_padding),
            transforms.ColorJitter(args.brightness, args.contrast, args.saturation, args.hue),
            transforms.RandomRotation(args.rotation),
            transforms.RandomGrayscale(args.grayscale),
            transforms.Resize(args.image_size),
            transforms.ToTensor(),
            transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD),
        ]
    )


def make_dataloader(args: Namespace, images: data.Split, **options: bool) -> DataLoader:
    """A worker per core; as many batches as a turn uses, and those that they prefetch."""
    dataset, workers = PilImages(images, make_transform(args)), os.cpu_count()
    batches = args.warmup_steps + args.steps + 2 * workers
    sampler = RandomSampler(dataset, num_samples=batches * args.batch_size)
    return DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=workers, **options)


def time_loaders(loaders: list, device: torch.device, use: Callable) -> Iterator[float]:
    """Uses a loader to warm up, then another, in images/s: an epoch with all that belongs to it."""
    while True:
        for loader in loaders:
            synchronize(device)
            start = time.perf_counter()
            use(loader)
            synchronize(device)
        yield len(loader) * loader.batch_size / (time.perf_counter() - start)


def time_steps(
    loader: DataLoader, args: Namespace, device: torch.device, seconds: list[float]
) -> Iterator[list[Tensor]]:
    """Yields a turn's batches; appends the seconds that the loop took for those after warm-up.

    Then takes what the workers have prefetched, so that none is at work in the next turn.
    """
    batches = iter(loader)
    yield from islice(batches, args.warmup_steps)
    synchronize(device)
    start = time.perf_counter()
    yield from islice(batches, args.steps)
    synchronize(device)
    seconds.append(time.perf_counter() - start)
    for _ in batches:
        pass


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


# ---- settings and images ------------------------------------------------------------------------


def complete(args: Namespace) -> torch.device:
    """Fills in what is left to the device and the constants of train.py; returns the device."""
    device = utils.choose_device(args.device)
    on_cpu = device.type == "cpu"
    args.precision = utils.choose_precision(args.precision, device)
    args.batch_size = args.batch_size or (16 if on_cpu else 128)
    args.warmup_steps = args.warmup_steps or (2 if on_cpu else 2 * os.cpu_count())
    args.warmup_steps, args.steps = (
        min(steps, 50_000 // args.batch_size) for steps in (args.warmup_steps, args.steps)
    )  # no more than an epoch
    constants = utils.parse_flags(train.__file__, [])
    vars(args).update(vars(constants) | vars(args))
    return device


def read_images(data_dir: str) -> tuple[data.Split, str]:
    """CIFAR-100's training images if they are there, else as many random ones; and which."""
    try:
        return data.read_cifar100(data_dir, "train")[0], "CIFAR-100"
    except data.DataError as error:
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
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": pillow_version,
    }
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {
        "device": f"{utils.device_name(device)}; host {cpu}, {os.cpu_count()} cores",
        "versions": versions,
        "data": source,
    }


# ---- measuring ----------------------------------------------------------------------------------


def fit_steps(args: Namespace, device: torch.device, images: data.Split, deadline: float) -> int:
    """Times one step of each variant; returns how many allow LEAST_TURNS before the deadline."""
    trial = Namespace(**vars(args) | {"steps": 1, "warmup_steps": 1, "compile": False})
    seconds_per_step = 0
    for variant in make_variants(trial, device, images).values():
        seconds_per_step += args.batch_size / next(variant)
        variant.close()
    seconds_per_turn = (deadline - time.perf_counter()) / LEAST_TURNS
    most = min(8 if device.type == "cpu" else 50, 50_000 // args.batch_size)
    return max(1, min(most, int(seconds_per_turn / seconds_per_step) - args.warmup_steps))


def take_turns(
    args: Namespace, device: torch.device, variants: dict[str, Iterator], deadline: float
) -> dict:
    """Every repeat's images/s, bytes of device memory at the peak, seconds of the first turns."""
    names, on_gpu = list(variants), device.type == "cuda"
    rates = {name: [] for name in names}
    first_seconds, peak_memory, held, longest = {}, {}, dict.fromkeys(names, 0), 0
    for repeat in range(args.repeats):
        begin = time.perf_counter()
        if repeat >= LEAST_TURNS and begin + longest > deadline:
            break
        options = {"unit": "variant", "leave": False, "disable": not utils.on_terminal()}
        bar = tqdm(total=len(names), desc=f"turn {repeat + 1}", **options)
        for name in names if repeat % 2 == 0 else reversed(names):
            start = time.perf_counter()
            if on_gpu:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            rates[name].append(next(variants[name]))
            if on_gpu:  # of this variant alone: what it held already, and what it took now
                peak_memory[name] = held[name] + torch.cuda.max_memory_allocated() - before
                held[name] += torch.cuda.memory_allocated() - before
            first_seconds.setdefault(name, time.perf_counter() - start)
            bar.update()
        bar.close()
        longest = max(longest, time.perf_counter() - begin)
    return {
        "repeats": rates,
        "first_turn_seconds": first_seconds,
        "peak_memory_bytes": peak_memory,
    }


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
    images = read_images(args.data_dir)[0].to(device)
    times.append(time.time())
    run = start_run(args, device)
    times.append(time.time())
    train.train_one_epoch(run, ShortLoader(images, args, 1), 1, args)
    times.append(time.time())
    print(json.dumps(times))


def summarise(args: Namespace, measured: dict, epoch_images: int) -> dict:
    """Medians and the ratios between them, before all that was measured."""
    result = {name: median(rates) for name, rates in measured["repeats"].items()}
    for name in ("ceiling", "classic", "careful"):
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
        if name in ("ceiling", "classic", "careful", "compiled"):
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
        utils.say(
            "compile",
            f"{result['compiled_over_ours']:.2f} times ours, {result['compile_seconds']:.1f} s at "
            f"the start, paid back {'never' if epochs is None else f'after {epochs:.1f} epochs'}",
        )


if __name__ == "__main__":
    main()
