"""Fine-tunes an ImageNet-pretrained ResNet-50 on CIFAR-100.

    python train.py               trains; leaves the best epoch in checkpoints/best.pt
    python train.py --resume      continues an interrupted run from checkpoints/last.pt
    python train.py --demo        a minute or two on a CPU, no download: scikit-learn's digits
    torchrun --nproc-per-node 8 train.py      the same run on 8 GPUs

Every constant below is also a flag: EPOCHS = 60 is --epochs 60. Then: python evaluate.py
"""

import inspect
import math
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

import data
import model as resnet
import utils

# Files
DATA_DIR = "data"  # folder that holds cifar-100-python/, downloaded into it when missing
CHECKPOINT_DIR = "checkpoints"  # folder for best.pt, last.pt and history.csv
WEIGHTS = "IMAGENET1K_V2"  # torchvision name, path of a state_dict file, or "" for random weights

# Training
EPOCHS = 60  # at most; early stopping usually ends a run sooner
BATCH_SIZE = 128  # images per step, over all processes together
LEARNING_RATE = 0.01  # of SGD, at the start
MOMENTUM = 0.9  # of SGD
WEIGHT_DECAY = 5e-4  # of SGD
SCHEDULER_FACTOR = 0.1  # the learning rate is multiplied by this when it drops
SCHEDULER_PATIENCE = 2  # epochs without improvement before the learning rate drops
EARLY_STOPPING_PATIENCE = 7  # epochs without improvement before the run stops
WATCH = "loss"  # what must improve, and what selects best.pt: validation "loss" or "accuracy"
SEED = 0  # of all random numbers: head, order, augmentation, dropout

# Images
IMAGE_SIZE = 224  # pixels per side that images are resized to, from 32
HOLDOUT_PER_CLASS = 0  # training images per class to validate on; 0 validates on the test images
TRAIN_PER_CLASS = 0  # training images per class, for quick tries; 0 uses all

# Augmentation; 0 leaves an operation out
FLIP = 0.5  # probability of a horizontal flip
CROP_PADDING = 4  # black pixels per side around the 32 x 32 image before a random crop
BRIGHTNESS = 0.2  # brightness is multiplied by 1 - this to 1 + this
CONTRAST = 0.2  # contrast is multiplied by 1 - this to 1 + this
SATURATION = 0.2  # saturation is multiplied by 1 - this to 1 + this
HUE = 0.05  # hues shift by up to this, in turns of the colour wheel; at most 0.5
ROTATION = 10.0  # degrees of rotation, at most, in either direction
GRAYSCALE = 0.05  # probability of becoming gray

# Machine
DEVICE = "auto"  # auto, cuda, mps or cpu
PRECISION = "auto"  # auto, bf16, fp16 or fp32
COMPILE = False  # compile the network: a slower start, then faster steps
LOG_EVERY = 20  # steps between readings of the loss, for the progress bar and to stop on NaN

# Actions
RESUME = False  # continue from CHECKPOINT_DIR/last.pt
DEMO = False  # train on scikit-learn's digits with DEMO_SETTINGS; flags still win

# The range of each constant, its choices, or what is expected of a text that must not be empty
ALLOWED = {
    "DATA_DIR": "the path of a folder",
    "CHECKPOINT_DIR": "the path of a folder",
    "EPOCHS": (1, 100_000),
    "BATCH_SIZE": (1, 50_000),
    "LEARNING_RATE": (1e-9, 1000),
    "MOMENTUM": (0, 1),
    "WEIGHT_DECAY": (0, 1000),
    "SCHEDULER_FACTOR": (0, 0.999),
    "SCHEDULER_PATIENCE": (0, 100_000),
    "EARLY_STOPPING_PATIENCE": (1, 100_000),
    "WATCH": ["loss", "accuracy"],
    "SEED": (0, 4_294_967_295),
    "IMAGE_SIZE": (32, 1024),
    "HOLDOUT_PER_CLASS": (0, 499),
    "TRAIN_PER_CLASS": (0, 500),
    "FLIP": (0, 1),
    "CROP_PADDING": (0, 32),
    "BRIGHTNESS": (0, 100),
    "CONTRAST": (0, 100),
    "SATURATION": (0, 100),
    "HUE": (0, 0.5),
    "ROTATION": (0, 180),
    "GRAYSCALE": (0, 1),
    "DEVICE": ["auto", "cuda", "mps", "cpu"],
    "PRECISION": ["auto", "bf16", "fp16", "fp32"],
    "LOG_EVERY": (1, 100_000),
}

DEMO_SETTINGS = {
    "CHECKPOINT_DIR": "checkpoints/demo",
    "WEIGHTS": "",
    "EPOCHS": 12,
    "BATCH_SIZE": 64,
    "LEARNING_RATE": 0.02,
    "IMAGE_SIZE": 32,
    "FLIP": 0.0,  # a mirrored digit is no digit
    "CROP_PADDING": 2,
}


def main(argv: list[str] | None = None) -> None:
    args, changed = utils.parse_flags(__file__, argv)
    processes = utils.this_process()
    check_combinations(args, processes.world_size)
    folder = Path(args.checkpoint_dir)

    # Device and processes; the checkpoint to continue from, if any
    device = utils.choose_device(args.device, processes.local_rank)
    utils.connect(processes, device)
    lock = utils.lock_folder(folder, processes.rank)
    checkpoint = utils.find_checkpoint(folder / "last.pt", args, processes)
    wanted = checkpoint["precision"] if checkpoint else args.precision
    precision = utils.choose_precision(wanted, device)
    name, world_size = utils.device_name(device), processes.world_size
    utils.say("device", f"{name}, {precision}, processes: {world_size}")
    if changed:
        utils.say("changed", ", ".join(f"{key.upper()} = {changed[key]!r}" for key in changed))

    # Data, network and optimizer
    dataset = "digits" if args.demo else "cifar100"
    train_loader, val_loader, val_labels, classes = make_loaders(dataset, args, processes, device)
    torch.manual_seed(data.mix_seed(args.seed))  # for the new layers
    weights = "" if checkpoint or processes.rank else args.weights  # DDP sends rank 0's to all
    with utils.downloading():
        model = resnet.build_model(len(classes), weights)
    run = make_run(args, model.to(device, memory_format=data.memory_format(device)), precision)
    describe(run, args, train_loader, val_loader)

    # The checkpoint's state, or a new run
    metadata = {"constants": vars(args), "precision": precision, "dataset": dataset}
    metadata |= {"classes": classes, "launcher": processes.launcher}
    history = checkpoint["history"] if checkpoint else []
    if checkpoint:
        utils.restore(checkpoint, folder / "last.pt", run.parts())
        run.scheduler.patience = args.scheduler_patience
    elif processes.rank == 0:
        utils.move_aside(folder)
        utils.save_run(folder, metadata, run.parts(), history)

    def what_is_safe() -> str:
        command = utils.resume_command(argv or sys.argv[1:])
        return f"epoch {len(history)} is safe in {folder / 'last.pt'}; to continue: {command}"

    advice = f"lower --batch-size {args.batch_size} or --image-size {args.image_size}"
    with utils.explained_exit(what_is_safe, advice):
        while len(history) < args.epochs and not run.stopping.should_stop:
            epoch, start = len(history), time.perf_counter()
            row = {"epoch": epoch + 1} | train_one_epoch(run, train_loader, epoch, args)
            row |= validate(run, val_loader, val_labels)
            row["seconds"] = time.perf_counter() - start
            require_finite(row["val_loss"], "validation", epoch, len(train_loader), run)
            run.scheduler.step(row[f"val_{args.watch}"])
            is_best = run.stopping.step(row[f"val_{args.watch}"], epoch + 1)
            if processes.rank == 0:
                utils.save_run(folder, metadata, run.parts(), [*history, row], is_best)
            history.append(row)
            utils.say("epoch", epoch_line(row, args.epochs) + ("  best" if is_best else ""))

    report(args, run.stopping, history)
    utils.disconnect()
    lock.close()


class EarlyStopping:
    """Tracks the best epoch, and whether `patience` epochs have passed without improvement."""

    def __init__(self, patience: int, mode: str) -> None:
        """mode: "min" or "max", as in ReduceLROnPlateau."""
        self.patience, self.mode = patience, mode
        self.best, self.best_epoch, self.bad_epochs = None, 0, 0

    def step(self, value: float, epoch: int) -> bool:
        """Records the figure of an epoch; returns whether it is the best so far."""
        sign = 1 if self.mode == "min" else -1
        improved = self.best is None or sign * value < sign * self.best
        if improved:
            self.best, self.best_epoch, self.bad_epochs = value, epoch, 0
        else:
            self.bad_epochs += 1
        return improved

    @property
    def should_stop(self) -> bool:
        return self.bad_epochs >= self.patience

    def state_dict(self) -> dict:
        return {"best": self.best, "best_epoch": self.best_epoch, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_epoch, self.bad_epochs = (state[name] for name in self.state_dict())


@dataclass
class Run:
    """A model and what trains it."""

    model: nn.Module  # the bare module, which validates and is saved
    network: nn.Module  # the model as it trains: over all processes, compiled; the same weights
    optimizer: Optimizer
    scheduler: ReduceLROnPlateau
    scaler: torch.amp.GradScaler  # idle except for fp16
    stopping: EarlyStopping
    dtype: torch.dtype  # of autocast

    def parts(self) -> dict[str, object]:
        """What last.pt must hold; each part has state_dict() and load_state_dict()."""
        names = ("model", "optimizer", "scheduler", "scaler", "stopping")
        return {name: getattr(self, name) for name in names}


def make_run(args: Namespace, model: nn.Module, precision: str) -> Run:
    """The optimizer, schedule and early stopping for a model that is on its device already."""
    device = next(model.parameters()).device
    optimizer = SGD(
        model.parameters(),
        lr=args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=device.type != "mps",
    )
    if args.momentum:
        # A fused first step that fp16's scaler skips would leave new buffers uninitialized.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    mode = {"loss": "min", "accuracy": "max"}[args.watch]
    # threshold 0: the scheduler sees an improvement exactly when early stopping does
    scheduler = ReduceLROnPlateau(
        optimizer, mode, args.scheduler_factor, args.scheduler_patience, threshold=0
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    stopping = EarlyStopping(args.early_stopping_patience, mode)
    network, dtype = wrap_network(model, args.compile), utils.DTYPES[precision]
    return Run(model, network, optimizer, scheduler, scaler, stopping, dtype)


def wrap_network(model: nn.Module, compile_it: bool) -> nn.Module:
    """The model over all processes, compiled if asked for.

    Batch norm keeps its statistics per process; validate() broadcasts those of the first.
    """
    network = model
    if dist.is_initialized():
        options = inspect.signature(DistributedDataParallel).parameters
        renamed = "forward_sync_buffers" in options  # in newer torch, such as 2.14
        no_sync = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        network = DistributedDataParallel(network, gradient_as_bucket_view=True, **no_sync)
    if compile_it and utils.can_compile(next(model.parameters()).device):
        network = torch.compile(network)
    return network


def train_step(run: Run, images: Tensor, labels: Tensor, args: Namespace) -> tuple[Tensor, Tensor]:
    """One step of SGD; returns the loss and the number of correct predictions of its batch.

    Nothing here makes the host wait for the GPU.
    """
    with resnet.autocast(images.device, run.dtype):
        logits = run.network(images)
    loss = F.cross_entropy(logits, labels)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def train_one_epoch(run: Run, loader: data.TrainLoader, epoch: int, args: Namespace) -> dict:
    """One pass over the data; returns learning_rate, train_loss, train_accuracy, images_per_second.

    Loss and accuracy are means over the images as they were trained on, of all processes.
    Raises FloatingPointError within LOG_EVERY steps after the loss is no longer finite.
    """
    run.network.train()
    torch.manual_seed(data.mix_seed(args.seed, epoch, loader.rank))  # for dropout
    total, start = len(loader) * loader.batch_size, time.perf_counter()
    loss_sum, correct_sum = next(run.model.parameters()).new_zeros(2)  # added up on the device
    bar = utils.progress_bar(f"epoch {epoch + 1}", total, unit="image")
    for step, (images, labels) in enumerate(loader.epoch(epoch), start=1):
        loss, correct = train_step(run, images, labels, args)
        loss_sum += loss
        correct_sum += correct
        bar.update(loader.batch_size)
        if step % args.log_every == 0 or step == len(loader):
            mean_loss = loss_sum.item() / step  # the only place where the host waits
            require_finite(mean_loss, "training", epoch, step, run)
            bar.set_postfix(loss=f"{mean_loss:.3f}")
    bar.close()
    seconds = time.perf_counter() - start
    sums = torch.stack([loss_sum * len(labels), correct_sum])
    loss_sum, correct_sum = utils.sum_over_processes(sums).tolist()
    return {
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "train_loss": loss_sum / total,
        "train_accuracy": correct_sum / total,
        "images_per_second": total / seconds,
    }


def validate(run: Run, loader: data.EvalLoader, labels: Tensor) -> dict[str, float]:
    """val_loss and val_accuracy, means over the images of all processes."""
    utils.broadcast(run.model.buffers())
    logits = resnet.predict(run.model, loader, run.dtype, progress=utils.on_terminal())
    loss_sum = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    sums = torch.stack([loss_sum, correct, torch.full_like(correct, len(labels))])
    loss_sum, correct, total = utils.sum_over_processes(sums).tolist()
    return {"val_loss": loss_sum / total, "val_accuracy": correct / total}


def require_finite(loss: float, kind: str, epoch: int, step: int, run: Run) -> None:
    """Raises FloatingPointError, with the place in the run, if the loss is not finite."""
    if not math.isfinite(loss):
        rate = run.optimizer.param_groups[0]["lr"]
        where = f"epoch {epoch + 1}, by step {step}, learning rate {rate:g}"
        raise FloatingPointError(f"the {kind} loss is {loss}: {where}")


def make_loaders(
    dataset: str, args: Namespace, processes: utils.Processes, device: torch.device
) -> tuple[data.TrainLoader, data.EvalLoader, Tensor, list[str]]:
    """The loaders, on the device; the labels of this process's validation images; class names."""
    with utils.downloading():
        if dataset == "cifar100" and processes.local_rank == 0:  # one process per machine
            data.fetch_cifar100(args.data_dir)
    train_split, test_split, classes = data.read_dataset(dataset, args.data_dir)
    train, holdout = data.split_per_class(
        train_split.labels, args.holdout_per_class, args.train_per_class
    )
    val_split = train_split.select(holdout) if args.holdout_per_class else test_split
    train_split = train_split.select(train)
    sizes = len(train_split.labels), len(val_split.labels)
    if min(sizes) < processes.world_size:
        raise utils.UserError(
            f"{sizes[0]} training and {sizes[1]} validation images are too few for "
            f"{processes.world_size} processes; see --holdout-per-class, --train-per-class"
        )
    counts = f"{sizes[0]:,} training and {sizes[1]:,} validation images"
    utils.say("data", f"{dataset}: {counts}, {len(classes)} classes")
    if not args.holdout_per_class:
        advice = "--holdout-per-class 50 selects on held-out training images instead"
        utils.say("note", f"best.pt is selected on the test images; {advice}")

    rank, world_size = processes.rank, processes.world_size
    train_loader = data.TrainLoader(train_split.to(device), args, rank, world_size)
    val_split = val_split.select(slice(rank, None, world_size)).to(device)
    val_loader = data.EvalLoader(val_split.images, args.batch_size // world_size, args.image_size)
    return train_loader, val_loader, val_split.labels, classes


def check_combinations(args: Namespace, world_size: int) -> None:
    """Ends the script with one line and exit status 2 if constants do not go together."""
    if args.batch_size % world_size:
        utils.refuse_flag("batch_size", args.batch_size, f"a multiple of {world_size} processes")
    if args.batch_size == world_size and args.image_size == 32:  # batch norm of one number
        expected = "at least 2 images per process at 32 px"
        utils.refuse_flag("batch_size", args.batch_size, expected)


def describe(
    run: Run, args: Namespace, train_loader: data.TrainLoader, val_loader: data.EvalLoader
) -> None:
    """Prints the size of the model and, without a GPU, an estimate of the time per epoch.

    The estimate is a timed forward pass, of which a training step costs about three.
    """
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    source = args.weights or "random weights"
    utils.say("model", f"{resnet.ARCHITECTURE} from {source}, {parameters:,} parameters")
    if train_loader.images.device.type != "cpu":
        return
    count = min(len(val_loader.images), train_loader.batch_size, 32)
    sample = data.EvalLoader(val_loader.images[:count], count, args.image_size)
    resnet.predict(run.model, sample, run.dtype)  # the first pass allocates
    start = time.perf_counter()
    resnet.predict(run.model, sample, run.dtype)
    per_image = (time.perf_counter() - start) / count
    trained = len(train_loader) * train_loader.batch_size / train_loader.world_size
    seconds = per_image * (3 * trained + len(val_loader.images))
    duration = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:,.0f} minutes"
    utils.say("note", f"no GPU in use: an epoch takes about {duration} here")


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """The figures of an epoch on one line."""
    return (
        f"{row['epoch']}/{epochs}  lr {row['learning_rate']:.4g}"
        f"  train loss {row['train_loss']:.4f}, accuracy {100 * row['train_accuracy']:.2f} %"
        f"  validation loss {row['val_loss']:.4f}, accuracy {100 * row['val_accuracy']:.2f} %"
        f"  {row['seconds']:.1f} s  {row['images_per_second']:,.0f} images/s"
    )


def report(args: Namespace, stopping: EarlyStopping, history: list[dict]) -> None:
    """Prints why the run ended, its best epoch, and the next command."""
    if stopping.should_stop:
        utils.say("stopped", f"no better validation {args.watch} in {stopping.bad_epochs} epochs")
    else:
        utils.say("finished", f"all {len(history)} epochs")
    best, path = history[stopping.best_epoch - 1], Path(args.checkpoint_dir, "best.pt")
    figures = f"{100 * best['val_accuracy']:.2f} % (loss {best['val_loss']:.4f})"
    utils.say("best", f"epoch {best['epoch']}: validation accuracy {figures}, {path}")
    elsewhere = "" if path == Path(CHECKPOINT_DIR, "best.pt") else f" --checkpoint {path}"
    utils.say("next", f"python evaluate.py{elsewhere}")


if __name__ == "__main__":
    with utils.explained_exit(lambda: "before the first epoch; what was saved is intact"):
        main()
