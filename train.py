"""Fine-tunes an ImageNet-pretrained ResNet-50 on CIFAR-100.

    python train.py               trains; leaves the best epoch in checkpoints/best.pt
    python train.py --resume      continues an interrupted run from checkpoints/last.pt
    python train.py --demo        two minutes on a CPU, no download: scikit-learn's digits
    torchrun --nproc-per-node 8 train.py      the same run on 8 GPUs

Every constant below is also a flag: EPOCHS = 60 is --epochs 60. Then: python evaluate.py
"""

import inspect
import math
import shlex
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

import data
import model as resnet
import utils

# Where things are
DATA_DIR = "data"  # folder that holds cifar-100-python/, downloaded into it when missing
CHECKPOINT_DIR = "checkpoints"  # folder for best.pt, last.pt and history.csv
WEIGHTS = "IMAGENET1K_V2"  # torchvision's name, path of a state_dict file, or "" for none

# Training
EPOCHS = 60  # at most; early stopping usually ends a run before
BATCH_SIZE = 128  # images a step, over all processes together
LEARNING_RATE = 0.01  # of SGD, at the start
MOMENTUM = 0.9  # of SGD
WEIGHT_DECAY = 5e-4  # of SGD
SCHEDULER_FACTOR = 0.1  # the learning rate is multiplied by this on a plateau
SCHEDULER_PATIENCE = 2  # epochs without a better WATCH that the learning rate outlasts
EARLY_STOPPING_PATIENCE = 7  # epochs without a better WATCH before the run stops
WATCH = "loss"  # validation figure for scheduler, early stopping and best.pt: "loss" or "accuracy"
SEED = 0  # of everything random: head, order, augmentation, dropout

# Images
IMAGE_SIZE = 224  # pixels a side that the network sees; the data has 32
HOLDOUT_PER_CLASS = 0  # training images a class to validate on; 0 validates on the test images
TRAIN_PER_CLASS = 0  # train on that many images of each class only, 0 for all: quick tries

# Augmentation; 0 leaves an operation out
FLIP = 0.5  # probability of a horizontal flip
CROP_PADDING = 4  # pixels of black around the image before a random crop, of 32
BRIGHTNESS = 0.2  # brightness is multiplied by 1 - this to 1 + this
CONTRAST = 0.2  # contrast is multiplied by 1 - this to 1 + this
SATURATION = 0.2  # saturation is multiplied by 1 - this to 1 + this
HUE = 0.05  # hues shift by up to this, in turns of the colour wheel; at most 0.5
ROTATION = 10.0  # degrees, rotation by up to this either way
GRAYSCALE = 0.05  # probability of losing all colour

# Machine
DEVICE = "auto"  # auto, cuda, mps or cpu
PRECISION = "auto"  # auto, bf16, fp16 or fp32
COMPILE = False  # compile the training step: a slower start, faster steps
LOG_EVERY = 20  # steps between looks at the loss, for the bar and to stop when it is not finite

# What to do
RESUME = False  # continue from CHECKPOINT_DIR/last.pt
DEMO = False  # the settings below instead of those above; flags still beat them

DEMO_SETTINGS = {
    "CHECKPOINT_DIR": "checkpoints/demo",
    "WEIGHTS": "",
    "EPOCHS": 12,
    "BATCH_SIZE": 64,
    "LEARNING_RATE": 0.02,
    "IMAGE_SIZE": 32,
    "FLIP": 0.0,  # digits do not survive a mirror
    "CROP_PADDING": 2,
}


class Run(NamedTuple):
    """What changes while training: everything that last.pt must hold besides the history."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    stopping: utils.EarlyStopping


def main(argv: list[str] | None = None) -> None:
    args, changed = utils.parse_flags(__file__, argv, __doc__, presets={"demo": DEMO_SETTINGS})
    processes = utils.this_process()
    check_constants(args, processes.world_size)
    folder = Path(args.checkpoint_dir)

    # Device and processes; what this run continues from, if it does
    device = utils.choose_device(args.device, processes.local_rank)
    utils.connect(processes, device)
    lock = utils.lock_folder(folder) if processes.rank == 0 else None
    checkpoint = find_checkpoint(folder / "last.pt", args, processes)
    wanted = checkpoint["precision"] if checkpoint else args.precision
    precision = utils.choose_precision(wanted, device)
    name = utils.device_name(device)
    utils.say("device", f"{name}, {precision}, channels_last, processes: {processes.world_size}")
    if changed:
        utils.say("changed", ", ".join(f"{key.upper()} = {changed[key]!r}" for key in changed))

    # Data, model, and what trains it
    dataset = "digits" if args.demo else "cifar100"
    train_loader, val_loader, classes = make_loaders(dataset, args, processes, device)
    torch.manual_seed(data.mix_seed(args.seed))  # for the head
    # One process needs the weights: DistributedDataParallel gives them to the others.
    weights = "" if checkpoint or processes.rank else args.weights
    model = resnet.build_model(len(classes), weights)
    model = model.to(device, memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    source = args.weights or "random weights"
    utils.say("model", f"ResNet-50 from {source}, {parameters:,} parameters")
    run, dtype = make_run(args, model, precision), utils.DTYPES[precision]
    if device.type == "cpu":
        estimate_epoch(model, train_loader, val_loader, dtype)

    # From where last.pt stands, or from the beginning
    about = {"constants": vars(args), "precision": precision, "dataset": dataset}
    about |= {"classes": classes, "launcher": processes.launcher}
    history = []
    if checkpoint:
        history = restore(checkpoint, folder / "last.pt", args, run)
    elif processes.rank == 0:
        utils.move_aside(folder)
        save(folder, about, run, history)
    saved_epochs = len(history)

    def what_is_safe() -> str:
        flags = [flag for flag in argv or sys.argv[1:] if flag != "--resume"]
        launcher = "torchrun ..." if processes.launcher else "python"
        command = f"{launcher} {shlex.join(['train.py', *flags, '--resume'])}"
        return f"epoch {saved_epochs} is safe in {folder / 'last.pt'}; to continue: {command}"

    advice = f"lower --batch-size {args.batch_size} or --image-size {args.image_size}"
    with utils.explained_exit(what_is_safe, advice):
        network = wrap(model, args.compile)
        while len(history) < args.epochs and not run.stopping.should_stop:
            epoch, start = len(history), time.perf_counter()
            torch.manual_seed(data.mix_seed(args.seed, epoch, processes.rank))  # for dropout
            row = {"epoch": epoch + 1, "learning_rate": run.optimizer.param_groups[0]["lr"]}
            row |= train_one_epoch(
                network, train_loader, epoch, run.optimizer, run.scaler, dtype, args.log_every
            )
            row |= validate(model, val_loader, dtype)
            require_finite(row["val_loss"], "validation", epoch, len(train_loader), run.optimizer)
            row["seconds"] = time.perf_counter() - start
            history.append(row)

            watched = row[f"val_{args.watch}"]
            run.scheduler.step(watched)
            is_best = run.stopping.step(watched, epoch + 1)
            if processes.rank == 0:
                save(folder, about, run, history, is_best)
            saved_epochs = len(history)
            utils.say("epoch", epoch_line(row, args.epochs) + ("  best" if is_best else ""))

    report(args, run.stopping, history)
    utils.disconnect(lock)


def train_one_epoch(
    network: nn.Module,
    loader: data.TrainLoader,
    epoch: int,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
    log_every: int,
) -> dict[str, float]:
    """One pass over the data; returns train_loss, train_accuracy and images_per_second.

    Loss and accuracy are means over the images as they were trained on, of all processes.
    Raises FloatingPointError within log_every steps of the loss ceasing to be finite.
    """
    network.train()
    device, total = loader.images.device, len(loader) * loader.batch_size
    loss_sum, correct, start = 0.0, 0, time.perf_counter()
    hidden = not utils.on_terminal()
    with tqdm(
        total=total, desc=f"epoch {epoch + 1}", unit="image", leave=False, disable=hidden
    ) as bar:
        for step, (images, labels) in enumerate(loader.epoch(epoch), start=1):
            with torch.autocast(device.type, dtype, enabled=dtype.itemsize < 4):
                logits = network(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            loss_sum += loss.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
            if step % log_every == 0 or step == len(loader):
                mean_loss = loss_sum.item() / step  # the only place where the host waits
                require_finite(mean_loss, "training", epoch, step, optimizer)
                bar.set_postfix(loss=f"{mean_loss:.3f}")
                bar.update(step * loader.batch_size - bar.n)
    seconds = time.perf_counter() - start
    sums = torch.stack([loss_sum * len(labels), correct.to(loss_sum.dtype)])
    loss_sum, correct = utils.sum_over_processes(sums).tolist()
    return {
        "train_loss": loss_sum / total,
        "train_accuracy": correct / total,
        "images_per_second": total / seconds,
    }


def validate(model: nn.Module, loader: data.EvalLoader, dtype: torch.dtype) -> dict[str, float]:
    """val_loss and val_accuracy, means over the images of all processes."""
    utils.broadcast_buffers(model)
    logits = resnet.predict(model, loader, dtype, progress=utils.on_terminal())
    loss_sum = F.cross_entropy(logits, loader.labels, reduction="sum")
    correct = (logits.argmax(1) == loader.labels).sum()
    sums = torch.stack([loss_sum, correct, torch.full_like(correct, len(logits))])
    loss_sum, correct, total = utils.sum_over_processes(sums).tolist()
    return {"val_loss": loss_sum / total, "val_accuracy": correct / total}


def require_finite(loss: float, kind: str, epoch: int, step: int, optimizer: Optimizer) -> None:
    """Raises FloatingPointError, saying where the run stood, if the loss is not finite."""
    if not math.isfinite(loss):
        rate = optimizer.param_groups[0]["lr"]
        where = f"epoch {epoch + 1}, by step {step}, learning rate {rate:g}"
        raise FloatingPointError(f"the {kind} loss is {loss}: {where}")


def check_constants(args: Namespace, world_size: int) -> None:
    """Ends the script with one line and exit status 2 if a constant is out of its range."""
    for name, low, high in [
        ("epochs", 1, 100_000),
        ("batch_size", 1, 50_000),
        ("learning_rate", 1e-9, 1000),
        ("momentum", 0, 1),
        ("weight_decay", 0, 1000),
        ("scheduler_factor", 0, 0.999),
        ("scheduler_patience", 0, 100_000),
        ("early_stopping_patience", 1, 100_000),
        ("seed", 0, 2**32 - 1),
        ("image_size", 32, 1024),
        ("holdout_per_class", 0, 499),
        ("train_per_class", 0, 500),
        ("flip", 0, 1),
        ("crop_padding", 0, 32),
        ("brightness", 0, 100),
        ("contrast", 0, 100),
        ("saturation", 0, 100),
        ("hue", 0, 0.5),
        ("rotation", 0, 180),
        ("grayscale", 0, 1),
        ("log_every", 1, 100_000),
    ]:
        value = getattr(args, name)
        utils.require(low <= value <= high, name, value, f"{low:,} to {high:,}")  # nan fails too
    for name, choices in [
        ("watch", ("loss", "accuracy")),
        ("device", ("auto", "cuda", "mps", "cpu")),
        ("precision", ("auto", *utils.DTYPES)),
    ]:
        value = getattr(args, name)
        utils.require(value in choices, name, value, f"one of {', '.join(choices)}")
    for name in ("data_dir", "checkpoint_dir"):
        utils.require(getattr(args, name) != "", name, "''", "a folder")
    for holds, expected in [
        (args.batch_size % world_size == 0, f"a multiple of the {world_size} processes"),
        (args.batch_size > world_size or args.image_size > 32, "more: batch norm needs 2 images"),
    ]:
        utils.require(holds, "batch_size", args.batch_size, expected)


def make_loaders(
    dataset: str, args: Namespace, processes: utils.Processes, device: torch.device
) -> tuple[data.TrainLoader, data.EvalLoader, list[str]]:
    """Training and validation loaders on the device, and the class names; says what is in them."""
    if dataset == "cifar100" and processes.local_rank == 0:  # one process a machine downloads
        data.fetch_cifar100(args.data_dir)
    utils.wait_for_all()
    train_images, test_images, classes = data.read_dataset(dataset, args.data_dir)
    train, holdout = data.split_per_class(
        train_images.labels, args.holdout_per_class, args.train_per_class
    )
    val_images = train_images.select(holdout) if args.holdout_per_class else test_images
    train_images = train_images.select(train)
    if min(len(train), len(val_images.labels)) < processes.world_size:
        raise utils.UserError(
            f"{len(train)} training and {len(val_images.labels)} validation images are too few for "
            f"{processes.world_size} processes; see --holdout-per-class, --train-per-class"
        )
    counts = f"{len(train):,} training and {len(val_images.labels):,} validation images"
    utils.say("data", f"{dataset}: {counts}, {len(classes)} classes")
    if not args.holdout_per_class:
        advice = "--holdout-per-class 50 keeps them apart from that"
        utils.say("note", f"the test images choose best.pt; {advice}")

    augmentation = data.Augmentation(
        flip=args.flip,
        crop_padding=args.crop_padding,
        brightness=args.brightness,
        contrast=args.contrast,
        saturation=args.saturation,
        hue=args.hue,
        rotation=args.rotation,
        grayscale=args.grayscale,
    )
    share = {"rank": processes.rank, "world_size": processes.world_size}
    sizes = (args.batch_size, args.image_size)
    train_images, val_images = train_images.to(device), val_images.to(device)
    train_loader = data.TrainLoader(train_images, *sizes, augmentation, args.seed, **share)
    return train_loader, data.EvalLoader(val_images, *sizes, **share), classes


def make_run(args: Namespace, model: nn.Module, precision: str) -> Run:
    """The model and what trains it; the gradient scaler is idle but for fp16."""
    device = next(model.parameters()).device
    optimizer = SGD(
        model.parameters(),
        lr=args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        # A fused step that fp16's scaler skips leaves the momentum uninitialised.
        fused=device.type != "mps" and precision != "fp16",
    )
    mode = {"loss": "min", "accuracy": "max"}[args.watch]
    # threshold 0: an epoch is better for the scheduler exactly when it is for early stopping
    scheduler = ReduceLROnPlateau(
        optimizer, mode, args.scheduler_factor, args.scheduler_patience, threshold=0
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    stopping = utils.EarlyStopping(args.early_stopping_patience, mode)
    return Run(model, optimizer, scheduler, scaler, stopping)


def wrap(model: nn.Module, compile_it: bool) -> nn.Module:
    """The network that trains: the model itself, over all processes, compiled if asked.

    It shares its weights with the model, which validates and is saved. Batch norm keeps its
    statistics per process; validate() broadcasts those of the first.
    """
    network = model
    if dist.is_initialized():
        options = inspect.signature(DistributedDataParallel).parameters
        renamed = "forward_sync_buffers" in options  # since torch 2.15
        no_sync = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        network = DistributedDataParallel(network, gradient_as_bucket_view=True, **no_sync)
    if compile_it and utils.can_compile(next(model.parameters()).device):
        network = torch.compile(network)
    return network


def find_checkpoint(path: Path, args: Namespace, processes: utils.Processes) -> dict | None:
    """last.pt, if this run continues: with --resume, or when torchrun restarted its workers."""
    restarted = processes.restarts > 0 and path.exists()
    if not (args.resume or restarted):
        return None
    checkpoint = utils.load_checkpoint(path)
    if not args.resume and checkpoint.get("launcher") != processes.launcher:
        return None  # an earlier run's: this one was restarted before it had saved anything
    may_change = {"epochs", "scheduler_patience", "early_stopping_patience"}  # how long to go on
    may_change |= {"data_dir", "checkpoint_dir", "device", "log_every", "resume"}  # where, and how
    for name, value in vars(args).items():
        stored = checkpoint["constants"].get(name)
        if value != stored and name not in may_change:
            raise utils.UserError(
                f"{path} was trained with {name.upper()} = {stored!r}, now it is {value!r}.\n"
                f"Set it back to continue that run, or start a new one without --resume"
            )
    return checkpoint


def restore(checkpoint: dict, path: Path, args: Namespace, run: Run) -> list[dict]:
    """Puts everything back as the checkpoint holds it and returns the history."""
    with utils.fitting(path):
        for name, thing in run._asdict().items():
            thing.load_state_dict(checkpoint[name])
        run.scheduler.patience = args.scheduler_patience
        for parameter, state in run.optimizer.state.items():
            if state["momentum_buffer"].shape != parameter.shape:
                raise ValueError("the optimizer's state has other shapes than the model")
    utils.say("resume", f"{path}, after epoch {checkpoint['epoch']}")
    return checkpoint["history"]


def save(folder: Path, about: dict, run: Run, history: list[dict], is_best: bool = False) -> None:
    """Writes best.pt if the last epoch is the best, then last.pt and history.csv."""
    result = about | {"model": run.model.state_dict(), "epoch": len(history), "history": history}
    if is_best:
        utils.save_checkpoint(folder / "best.pt", result)
    utils.save_checkpoint(
        folder / "last.pt", result | {k: v.state_dict() for k, v in run._asdict().items()}
    )
    if history:
        utils.write_history(folder / "history.csv", history)


def estimate_epoch(
    model: nn.Module,
    train_loader: data.TrainLoader,
    val_loader: data.EvalLoader,
    dtype: torch.dtype,
) -> None:
    """Says how long an epoch takes, by a timed forward pass: a training step costs about three."""
    count = min(train_loader.batch_size, 32)
    few = data.Images(train_loader.images[:count], train_loader.labels[:count])
    sample = data.EvalLoader(few, count, train_loader.preprocess.image_size)
    resnet.predict(model, sample, dtype)  # the first pass sets things up
    start = time.perf_counter()
    resnet.predict(model, sample, dtype)
    per_image = (time.perf_counter() - start) / count
    trained = len(train_loader) * train_loader.batch_size / train_loader.world_size
    seconds = per_image * (3 * trained + len(val_loader.labels))
    duration = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:,.0f} minutes"
    utils.say("note", f"no GPU in use: an epoch takes about {duration} here")


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """An epoch's figures on one line."""
    return (
        f"{row['epoch']}/{epochs}  lr {row['learning_rate']:<7.4g}"
        f"  train {row['train_loss']:.4f} {100 * row['train_accuracy']:6.2f} %"
        f"  validation {row['val_loss']:.4f} {100 * row['val_accuracy']:6.2f} %"
        f"  {row['seconds']:.1f} s  {row['images_per_second']:,.0f} images/s"
    )


def report(args: Namespace, stopping: utils.EarlyStopping, history: list[dict]) -> None:
    """Says why the run ended, what its best epoch was, and what to do next."""
    if stopping.should_stop:
        utils.say("stopped", f"no better validation {args.watch} in {stopping.bad_epochs} epochs")
    else:
        utils.say("finished", f"all {len(history)} epochs")
    best, path = history[stopping.best_epoch - 1], Path(args.checkpoint_dir, "best.pt")
    figures = f"{100 * best['val_accuracy']:.2f} % (loss {best['val_loss']:.4f})"
    utils.say("best", f"epoch {best['epoch']}: validation {figures}, {path}")
    elsewhere = "" if path == Path(CHECKPOINT_DIR, "best.pt") else f" --checkpoint {path}"
    utils.say("next", f"python evaluate.py{elsewhere}")


if __name__ == "__main__":
    with utils.explained_exit(lambda: "before the first epoch; what was saved is intact"):
        main()
