"""Fine-tunes an ImageNet-pretrained ResNet-50 on CIFAR-100.

    python train.py               trains; leaves the best epoch in checkpoints/best.pt
    python train.py --resume      continues an interrupted run from checkpoints/last.pt
    python train.py --demo        about a minute on a CPU, no download: scikit-learn's digits
    python train.py --dataset photos --stored-size 224      on photos/train/ and photos/val/
    torchrun --nproc-per-node 8 train.py      the same run on 8 GPUs

Every constant below is also a flag: EPOCHS = 60 is --epochs 60. Then: python evaluate.py
"""

import copy
import math
import shlex
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
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import model as resnet
import utils

# Checkpoints store these constants. One that is missing from an older checkpoint takes its default
# below, so the default of a new constant must leave its feature off.

# Files
DATASET = "cifar100"  # "cifar100", "digits", or a folder with train/CLASS/ and val/CLASS/ pictures
DATA_DIR = "data"  # folder that holds cifar-100-python/, downloaded into it when missing
CHECKPOINT_DIR = "checkpoints"  # folder for best.pt, last.pt and history.csv
WEIGHTS = "IMAGENET1K_V2"  # torchvision name, path of a state_dict file or best.pt, or "" for none

# Training
HEAD_EPOCHS = 0  # epochs that train only the head first, on features computed once; 0 for none
HEAD_LEARNING_RATE = 0.05  # initial learning rate of the head-only epochs; cosine decay to zero
EPOCHS = 60  # at most; early stopping usually ends a run sooner; 0 trains only the head
BATCH_SIZE = 128  # images per step, over all processes together
LEARNING_RATE = 0.01  # initial learning rate; with SCHEDULE = "cosine" the highest one
MOMENTUM = 0.9  # SGD momentum
WEIGHT_DECAY = 5e-4  # SGD weight decay
SCHEDULE = "plateau"  # "plateau": drops without improvement; "cosine": falls to zero by EPOCHS
SCHEDULER_FACTOR = 0.1  # plateau: the learning rate is multiplied by this when it drops
SCHEDULER_PATIENCE = 2  # plateau: after more epochs without improvement the learning rate drops
WARMUP_EPOCHS = 0.0  # cosine: epochs, or a fraction of one, in which the rate rises from zero
EARLY_STOPPING_PATIENCE = 7  # after this many epochs without improvement the run stops
WATCH = "loss"  # what must improve, and what selects best.pt: validation "loss" or "accuracy"
LABEL_SMOOTHING = 0.0  # share of each training label that is spread evenly over all classes
EMA_DECAY = 0.0  # validate and save a moving average of the weights with this decay; 0 for none
FREEZE_STAGES = 0  # the stem and this many of the four stages keep their initial weights
FREEZE_BATCH_NORM = False  # train with the pretrained batch-norm statistics, without updating them
SEED = 0  # random seed: head initialization, image order, augmentation, dropout

# Images
STORED_SIZE = 0  # for a folder: pixels per side at which its pictures are stored; otherwise 0
IMAGE_SIZE = 224  # pixels per side that the stored images are resized to for the network
HOLDOUT_PER_CLASS = 0  # training images per class to validate on; 0 validates on the test images
TRAIN_PER_CLASS = 0  # training images per class, for quick tries; 0 uses all

# Augmentation; 0 leaves an operation out
FLIP = 0.5  # probability of a horizontal flip
CROP_PADDING = 4  # black pixels per side around the stored image before a random crop
BRIGHTNESS = 0.2  # brightness is multiplied by a factor from 1 - this to 1 + this
CONTRAST = 0.2  # contrast is multiplied by a factor from 1 - this to 1 + this
SATURATION = 0.2  # saturation is multiplied by a factor from 1 - this to 1 + this
HUE = 0.05  # hues shift by up to this, in turns of the colour wheel; at most 0.5
ROTATION = 10.0  # degrees of rotation, at most, in either direction
GRAYSCALE = 0.05  # probability of becoming gray
MIXUP = 0.0  # alpha of mixup: each image is blended with its neighbour in the batch
CUTMIX = 0.0  # alpha of CutMix: a box of each image comes from its neighbour in the batch

# Machine
DEVICE = "auto"  # auto, cuda, mps or cpu
PRECISION = "auto"  # auto, bf16, fp16 or fp32
COMPILE = False  # compile the network: a slower start, then faster steps
LOG_EVERY = 20  # steps between readings of the loss, for the progress bar and to stop on NaN

# Actions
RESUME = False  # continue from CHECKPOINT_DIR/last.pt
DEMO = False  # train on scikit-learn's digits with DEMO_SETTINGS; flags still win

# Valid values: (low, high), whole numbers unless low is a float; a list of choices; or, for a
# string that must not be empty, its meaning
ALLOWED = {
    "DATASET": "cifar100, digits, or the path of a folder",
    "DATA_DIR": "the path of a folder",
    "CHECKPOINT_DIR": "the path of a folder",
    "HEAD_EPOCHS": (0, 100_000),
    "HEAD_LEARNING_RATE": (1e-9, 1000),
    "EPOCHS": (0, 100_000),
    "BATCH_SIZE": (1, 50_000),
    "LEARNING_RATE": (1e-9, 1000),
    "MOMENTUM": (0.0, 1),
    "WEIGHT_DECAY": (0.0, 1000),
    "SCHEDULE": ["plateau", "cosine"],
    "SCHEDULER_FACTOR": (0.0, 0.999),
    "SCHEDULER_PATIENCE": (0, 100_000),
    "WARMUP_EPOCHS": (0.0, 100_000),
    "EARLY_STOPPING_PATIENCE": (1, 100_000),
    "WATCH": ["loss", "accuracy"],
    "LABEL_SMOOTHING": (0.0, 1),
    "EMA_DECAY": (0.0, 0.999999),
    "FREEZE_STAGES": (0, 4),
    "SEED": (0, 4_294_967_295),
    "STORED_SIZE": (0, 1024),
    "IMAGE_SIZE": (32, 1024),
    "HOLDOUT_PER_CLASS": (0, 100_000),
    "TRAIN_PER_CLASS": (0, 100_000),
    "FLIP": (0.0, 1),
    "CROP_PADDING": (0, 32),
    "BRIGHTNESS": (0.0, 100),
    "CONTRAST": (0.0, 100),
    "SATURATION": (0.0, 100),
    "HUE": (0.0, 0.5),
    "ROTATION": (0.0, 180),
    "GRAYSCALE": (0.0, 1),
    "MIXUP": (0.0, 100),
    "CUTMIX": (0.0, 100),
    "DEVICE": ["auto", "cuda", "mps", "cpu"],
    "PRECISION": ["auto", "bf16", "fp16", "fp32"],
    "LOG_EVERY": (1, 100_000),
}

DEMO_SETTINGS = {
    "DATASET": "digits",
    "CHECKPOINT_DIR": "checkpoints/demo",
    "WEIGHTS": "",
    "EPOCHS": 6,
    "BATCH_SIZE": 32,
    "LEARNING_RATE": 0.1,
    "MOMENTUM": 0.5,
    "EMA_DECAY": 0.95,
    "IMAGE_SIZE": 32,
    # A mirrored digit is no digit, and six epochs learn more without the other operations too.
    "FLIP": 0.0,
    "CROP_PADDING": 0,
    "BRIGHTNESS": 0.0,
    "CONTRAST": 0.0,
    "ROTATION": 0.0,
}


def main(argv: list[str] | None = None) -> None:
    args, changed = utils.parse_flags(__file__, argv)
    processes = utils.this_process()
    check_combinations(args, processes.world_size)
    folder = Path(args.checkpoint_dir)

    # Device and processes; the checkpoint to continue from, if any
    device = utils.choose_device(args.device, processes.local_rank)
    utils.connect(processes, device)
    _lock = utils.lock_folder(folder, processes.rank)  # until main() returns
    checkpoint = utils.find_checkpoint(folder / "last.pt", args, processes)
    precision = utils.choose_precision((checkpoint or vars(args))["precision"], device)
    utils.say("device", f"{utils.device_name(device)}, {precision}")
    if changed:
        utils.say("changed", ", ".join(f"{key.upper()} = {changed[key]!r}" for key in changed))

    # Data, network and optimizer
    train_loader, val_loader, val_labels, data_facts = make_loaders(args, processes, device)
    classes = data_facts["classes"]
    torch.manual_seed(data.mix_seed(args.seed))  # for the new layers
    weights = "" if checkpoint or processes.rank else args.weights  # DDP sends rank 0's to all
    with utils.barrier_after_download():
        model = resnet.build_model(len(classes), weights, classes)
    resnet.freeze_stages(model, args.freeze_stages)
    run = make_run(args, model.to(device, memory_format=data.memory_format(device)), precision)
    describe(run, args, train_loader, val_loader)

    # The checkpoint's state, or a new run
    metadata = {"constants": vars(args), "precision": precision, "launcher": processes.launcher}
    metadata |= data_facts
    history = checkpoint["history"] if checkpoint else []
    if checkpoint:
        utils.restore(checkpoint, folder / "last.pt", run.parts(), data_facts)
    elif processes.rank == 0:
        utils.move_aside(folder)
        utils.save_run(folder, metadata, run.parts(), history)

    def what_is_safe() -> str:
        saved = f"epoch {history[-1]['epoch']}" if history else "the start"
        return f"{saved} is safe in {folder / 'last.pt'}"

    command = utils.resume_command(sys.argv[1:] if argv is None else argv)
    advice = f"start again with a --batch-size below {args.batch_size}, or a lower --image-size"
    with utils.explained_exit(what_is_safe, command, advice):
        first = 0 if args.head_epochs else 1  # epoch 0 trains the head alone
        while first + len(history) <= args.epochs and not should_stop(history, args):
            epoch = first + len(history)
            row, start = {"epoch": epoch}, time.perf_counter()
            if epoch == 0:
                row |= train_head(run, train_loader, args)
            else:
                row |= train_one_epoch(run, train_loader, epoch, args)
            row |= validate(run, val_loader, val_labels)
            row["seconds"] = time.perf_counter() - start
            is_best = finish_epoch(run, [*history, row], args)
            utils.save_run(folder, metadata, run.parts(), [*history, row], is_best)
            history.append(row)
            utils.say("epoch", epoch_line(row, args.epochs) + ("  best" if is_best else ""))

    report(args, history)
    utils.disconnect()


@dataclass
class Run:
    """A model and what trains it."""

    model: nn.Module  # the bare module
    network: nn.Module  # the model as it trains: over all processes, compiled; the same weights
    average: nn.Module | None  # with EMA_DECAY, a moving average of the model
    optimizer: Optimizer
    scheduler: ReduceLROnPlateau  # with SCHEDULE = "cosine", every step overrides its rate
    scaler: torch.amp.GradScaler  # idle except for fp16
    dtype: torch.dtype  # of autocast

    def parts(self) -> dict[str, object]:
        """What last.pt must hold, by name; "model" is what is validated and goes into best.pt."""
        names = ("model", "optimizer", "scheduler", "scaler")
        parts = {name: getattr(self, name) for name in names}
        if self.average is not None:
            parts |= {"model": self.average, "trained_model": self.model}
        return parts


def make_run(args: Namespace, model: nn.Module, precision: str) -> Run:
    """The optimizer and its schedule for a model that is on its device already."""
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
    # threshold 0: it sees an improvement exactly when best_epoch() does
    scheduler = ReduceLROnPlateau(
        optimizer, mode, args.scheduler_factor, args.scheduler_patience, threshold=0
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    network = wrap_network(model, args.compile)
    average = None
    if args.ema_decay:  # the same modules, with tensors of their own that need no gradients
        tensors = [*model.parameters(), *model.buffers()]
        average = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in tensors})
    dtype = utils.DTYPES[precision]
    return Run(model, network, average, optimizer, scheduler, scaler, dtype)


def wrap_network(model: nn.Module, compile_it: bool) -> nn.Module:
    """The model over all processes, compiled if asked for.

    Batch norm normalizes per process; its running statistics are those of the first process.
    """
    network = model
    if dist.is_initialized():
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    if compile_it and utils.can_compile(next(model.parameters()).device):
        network = torch.compile(network)
    return network


def train_step(run: Run, images: Tensor, labels: Tensor, args: Namespace) -> tuple[Tensor, Tensor]:
    """One step of SGD; returns the loss and the number of correct predictions of its batch.

    Nothing here makes the host wait for the GPU.
    """
    with resnet.autocast(images.device, run.dtype):
        logits = run.network(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.average is not None:
        update_average(run.average, run.model, args.ema_decay)
    if labels.is_floating_point():  # probabilities, from mixup or CutMix
        labels = labels.argmax(1)
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, batch-norm statistics included."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)(*map(list, zip(*floating)), None)
    for kept, counter in pairs:
        if not kept.is_floating_point():
            kept.copy_(counter)


def learning_rate_at(run: Run, args: Namespace, epochs_done: float) -> float:
    """The learning rate after so many epochs, a fraction included.

    With the cosine schedule, a linear warm-up from zero and then one cosine to zero: Loshchilov &
    Hutter 2017, arXiv 1608.03983. No state is kept for it, so that a resumed run is exact.
    """
    if args.schedule == "plateau":
        return run.optimizer.param_groups[0]["lr"]
    if epochs_done < args.warmup_epochs:
        return args.learning_rate * (epochs_done / args.warmup_epochs)
    progress = (epochs_done - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.learning_rate * ((1 + math.cos(math.pi * progress)) / 2)


def train_one_epoch(run: Run, loader: data.TrainLoader, epoch: int, args: Namespace) -> dict:
    """One pass over the data; returns learning_rate, train_loss, train_accuracy, images_per_second.

    Loss and accuracy are means over the images as they were trained on, of all processes; the rate
    is that of the middle of the epoch. Raises FloatingPointError if the loss is no longer finite.
    """
    resnet.set_train_mode(run.network, args.freeze_batch_norm)
    torch.manual_seed(data.mix_seed(args.seed, epoch, loader.rank))  # for dropout
    total, start = len(loader) * loader.batch_size, time.perf_counter()
    loss_sum, correct_sum = next(run.model.parameters()).new_zeros(2)  # on the device
    bar = utils.progress_bar(f"{loader.unit} {epoch}", total, unit="image")
    for step, (images, labels) in enumerate(loader.epoch(epoch), start=1):
        rate = learning_rate_at(run, args, epoch - 1 + (step - 0.5) / len(loader))
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        loss, correct = train_step(run, images, labels, args)
        loss_sum += loss
        correct_sum += correct
        bar.update(loader.batch_size)
        if step % args.log_every == 0 or step == len(loader):
            mean_loss = loss_sum.item() / step  # of batch means; the loop's only synchronization
            require_finite(mean_loss, "training", f"{loader.unit} {epoch}, by step {step}", rate)
            bar.set_postfix(loss=f"{mean_loss:.3f}")
    bar.close()
    seconds = time.perf_counter() - start
    sums = loss_sum * len(labels), correct_sum
    loss, accuracy = utils.mean_over_processes(*sums, count=len(loader) * len(labels))
    row = {"learning_rate": learning_rate_at(run, args, epoch - 0.5), "train_loss": loss}
    return row | {"train_accuracy": accuracy, "images_per_second": total / seconds}


def train_head(run: Run, loader: data.TrainLoader, args: Namespace) -> dict:
    """Trains the head alone, on features of the frozen backbone; returns what an epoch returns.

    Linear probing before fine-tuning: Kumar et al. 2022, arXiv 2202.10054. The features of all
    images, not augmented, are computed once and kept on the device. (Those of mirrored images as
    well took twice the time, without a measurable gain.)
    """
    start, mine = time.perf_counter(), slice(loader.rank, None, loader.world_size)
    local_batch_size = loader.batch_size // loader.world_size
    own_images = data.EvalLoader(loader.images[mine], local_batch_size, args.image_size)
    own = resnet.extract_features(run.model, own_images, run.dtype, utils.on_terminal())
    features = own.new_zeros(len(loader.images), own.shape[1])
    features[mine] = own
    utils.sum_over_processes(features)  # every process needs those of all images
    head_settings = {"schedule": "cosine", "warmup_epochs": 0, "epochs": args.head_epochs}
    head_settings |= {"learning_rate": args.head_learning_rate, "ema_decay": 0, "compile": False}
    head_settings |= {"seed": data.mix_seed(args.seed, 0) % 2**32}
    head_args = Namespace(**vars(args) | head_settings)
    head_run = make_run(head_args, run.model.fc, "fp32")
    split = data.Split(features, loader.labels)
    head_loader = data.FeatureLoader(split, head_args, loader.rank, loader.world_size)
    for head_epoch in range(1, args.head_epochs + 1):
        row = train_one_epoch(head_run, head_loader, head_epoch, head_args)
    if run.average is not None:
        run.average.load_state_dict(run.model.state_dict())
    speed = len(features) / (time.perf_counter() - start)  # computing the features included
    return row | {"learning_rate": args.head_learning_rate, "images_per_second": speed}


def validate(run: Run, loader: data.EvalLoader, labels: Tensor) -> dict[str, float]:
    """val_loss and val_accuracy, means over the images of all processes."""
    model = run.parts()["model"]
    utils.broadcast(model.buffers())
    logits = resnet.predict(model, loader, run.dtype, progress=utils.on_terminal())
    loss_sum = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    loss, accuracy = utils.mean_over_processes(loss_sum, correct, count=len(labels))
    return {"val_loss": loss, "val_accuracy": accuracy}


def finish_epoch(run: Run, history: list[dict], args: Namespace) -> bool:
    """Steps the schedule after the last epoch of the history; returns whether that is the best.

    Raises FloatingPointError if its validation loss is not finite.
    """
    row = history[-1]
    require_finite(row["val_loss"], "validation", f"epoch {row['epoch']}", row["learning_rate"])
    run.scheduler.patience = args.scheduler_patience  # may have changed on resume
    run.scheduler.step(row[f"val_{args.watch}"])
    return best_epoch(history, args.watch) is row


def best_epoch(history: list[dict], watch: str) -> dict:
    """The best epoch's row of figures; among equals, the first."""
    sign = 1 if watch == "accuracy" else -1
    return max(history, key=lambda row: sign * row[f"val_{watch}"])


def should_stop(history: list[dict], args: Namespace) -> bool:
    """Early stopping: whether too many epochs have passed since the best one."""
    if not history:
        return False
    bad_epochs = history[-1]["epoch"] - best_epoch(history, args.watch)["epoch"]
    return bad_epochs >= args.early_stopping_patience


def require_finite(loss: float, kind: str, place: str, rate: float) -> None:
    """Raises FloatingPointError, with the place in the run, if the loss is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the {kind} loss is {loss}: {place}, learning rate {rate:g}. Start with a lower one"
        )


def make_loaders(
    args: Namespace, processes: utils.Processes, device: torch.device
) -> tuple[data.TrainLoader, data.EvalLoader, Tensor, dict]:
    """The loaders, on the device; the labels of this process's validation images; data_facts.

    data_facts: what a checkpoint stores about the data, "classes" and "dataset".
    """
    train_split, val_split, data_facts = read_splits(args, processes, device)
    rank, world_size = processes.rank, processes.world_size
    sizes = len(train_split.labels), len(val_split.labels)
    if min(sizes[0] // 2, sizes[1]) < world_size:  # each trains on pairs of images
        raise utils.UserError(
            f"{sizes[0]} training and {sizes[1]} validation images are too few for "
            f"{world_size} processes; see --holdout-per-class, --train-per-class"
        )
    counts = f"{sizes[0]:,} training and {sizes[1]:,} validation images"
    utils.say("data", f"{args.dataset}: {counts}, {len(data_facts['classes'])} classes")
    if not args.holdout_per_class:
        advice = "--holdout-per-class 50 selects on held-out training images instead"
        utils.say("note", f"best.pt is selected on {data.name_test_images(args.dataset)}; {advice}")
    train_loader = data.TrainLoader(train_split.to(device), args, rank, world_size)
    val_split = val_split.select(slice(rank, None, world_size)).to(device)
    val_loader = data.EvalLoader(val_split.images, args.batch_size // world_size, args.image_size)
    return train_loader, val_loader, val_split.labels, data_facts


def read_splits(
    args: Namespace, processes: utils.Processes, device: torch.device
) -> tuple[data.Split, data.Split, dict]:
    """The images to train on and to validate on, on the CPU; data_facts as in make_loaders()."""
    if not (args.holdout_per_class or data.has_test_images(args.dataset)):
        raise utils.UserError(
            f"{Path(args.dataset, 'val')} not found. Expected cifar100, digits, or a folder with "
            "train/ and val/; without val/, --holdout-per-class 50 validates on a part of train/"
        )
    with utils.barrier_after_download():
        if args.dataset == "cifar100" and processes.local_rank == 0:  # one process per machine
            data.fetch_cifar100(args.data_dir)
    parts = ["train"] if args.holdout_per_class else ["train", "test"]
    data.require_memory(args, parts, device, processes.local_world_size)
    quiet = processes.rank > 0
    train_split, classes = data.read_split(args, "train", quiet=quiet)
    data_facts = {"classes": classes, "dataset": data.identify(args, train_split)}
    counts = train_split.labels.bincount(minlength=len(classes))
    if counts.min() <= args.holdout_per_class:
        raise utils.UserError(
            f"Class {classes[counts.argmin()]} has {counts.min()} training images: expected more "
            f"than --holdout-per-class {args.holdout_per_class}"
        )
    train, holdout = data.split_per_class(
        train_split.labels, args.holdout_per_class, args.train_per_class
    )
    if args.holdout_per_class:
        val_split = train_split.select(holdout)
    else:
        val_split, _ = data.read_split(args, "test", classes, quiet)
    return train_split.select(train), val_split, data_facts


def check_combinations(args: Namespace, world_size: int) -> None:
    """Ends the script with one line and exit status 2 if constants do not go together."""
    if args.dataset in data.BUILT_IN:
        if args.stored_size not in (0, 32):
            utils.refuse_flag("stored_size", args.stored_size, f"0 with {args.dataset}")
    elif not args.stored_size:
        expected = "the pixels per side at which to keep your pictures, for example 224"
        utils.refuse_flag("stored_size", args.stored_size, expected)
    if args.dataset == "cifar100":
        for name, most in (("holdout_per_class", 499), ("train_per_class", 500)):
            if vars(args)[name] > most:
                utils.refuse_flag(name, vars(args)[name], f"0 to {most} with cifar100")
    if args.batch_size % world_size:
        utils.refuse_flag("batch_size", args.batch_size, f"a multiple of {world_size} processes")
    if args.batch_size == world_size and args.image_size == 32:  # batch norm of one number
        expected = "at least 2 images per process at 32 px"
        utils.refuse_flag("batch_size", args.batch_size, expected)
    if (args.mixup or args.cutmix) and args.batch_size // world_size % 2:
        expected = "an even number of images per process, for --mixup and --cutmix"
        utils.refuse_flag("batch_size", args.batch_size, expected)
    if not args.epochs and not args.head_epochs:
        utils.refuse_flag("epochs", args.epochs, "1 or more without --head-epochs")
    if args.warmup_epochs and args.schedule == "plateau":
        utils.refuse_flag("warmup_epochs", args.warmup_epochs, "0 with --schedule plateau")
    if args.epochs and args.warmup_epochs >= args.epochs:
        utils.refuse_flag("warmup_epochs", args.warmup_epochs, f"less than {args.epochs} epochs")


def describe(
    run: Run, args: Namespace, train_loader: data.TrainLoader, val_loader: data.EvalLoader
) -> None:
    """Prints the size of the model and, without a GPU, how long an epoch and the head take.

    That is estimated from a timed forward pass: a training step costs about three of them per
    image, training the head one.
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

    def duration(passes: int) -> str:
        seconds = per_image * (passes * trained + len(val_loader.images))
        return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:,.0f} minutes"

    note = f"no GPU in use: an epoch takes about {duration(3)} here"
    if args.weights and args.epochs:
        note += f"; the head alone about {duration(1)}: --head-epochs 20 --epochs 0"
    utils.say("note", note)


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """The figures of an epoch on one line."""
    return (
        f"{row['epoch']}/{epochs}  lr {row['learning_rate']:.4g}"
        f"  train loss {row['train_loss']:.4f}, accuracy {100 * row['train_accuracy']:.2f} %"
        f"  validation loss {row['val_loss']:.4f}, accuracy {100 * row['val_accuracy']:.2f} %"
        f"  {row['seconds']:.1f} s  {row['images_per_second']:,.0f} images/s"
    )


def report(args: Namespace, history: list[dict]) -> None:
    """Prints why the run ended, its best epoch, and the next command."""
    best = best_epoch(history, args.watch)
    if should_stop(history, args):
        bad_epochs = history[-1]["epoch"] - best["epoch"]
        utils.say("stopped", f"no better validation {args.watch} in {bad_epochs} epochs")
    else:
        utils.say("finished", f"all {args.epochs} epochs" if args.epochs else "the head alone")
    figures = f"{100 * best['val_accuracy']:.2f} % (loss {best['val_loss']:.4f})"
    path = Path(args.checkpoint_dir, "best.pt")
    utils.say("best", f"epoch {best['epoch']}: validation accuracy {figures}, {path}")
    defaults = utils.read_constants(str(Path(__file__).with_name("evaluate.py")))
    command = ["python", "evaluate.py"]
    for name, value in (("CHECKPOINT", str(path)), ("DATA_DIR", args.data_dir)):
        if value != defaults[name][0]:
            command += [f"--{name.lower().replace('_', '-')}", value]
    utils.say("next", shlex.join(command))


if __name__ == "__main__":
    with utils.explained_exit(lambda: "before the first epoch; what was saved is intact"):
        main()
