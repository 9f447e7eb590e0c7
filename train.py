"""Fine-tunes an ImageNet-pretrained ResNet-50 on CIFAR-100.

    python train.py               trains; leaves the best epoch in checkpoints/best.pt
    python train.py --minutes 10  the best network that this machine can train in ten minutes
    python train.py --resume      continues an interrupted run from checkpoints/last.pt
    python train.py --demo        two minutes on a CPU, no download: scikit-learn's digits
    python train.py --dataset photos --stored-size 224      on photos/train/ and photos/val/
    torchrun --nproc-per-node 8 train.py      the same run on 8 GPUs

On an H200 it reached 82.6 % in six minutes, from compressed weights; README.md tells the rest.
Every constant at the top of train.py is also a flag: EPOCHS = 60 is --epochs 60.
"""

import copy
import inspect
import math
import os
import tempfile
import time
from argparse import Namespace
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import data
import model as resnet
import utils

# A constant's comment ends in its [lowest, highest] value or in its ["choices"]. Checkpoints store
# the constants; one that is missing from an older checkpoint takes its default below, so the
# default of a new constant must leave its feature off.

MINUTES = 0.0  # plan a run that gets the most out of this time; 0: the constants as set [0.0, 1e5]

# Files
DATASET = "cifar100"  # "cifar100", "digits", or a folder with train/CLASS/ and val/CLASS/ pictures
DATA_DIR = "data"  # folder that holds cifar-100-python/, downloaded into it when missing
CHECKPOINT_DIR = "checkpoints"  # folder for best.pt, last.pt and history.csv

# Network
ARCHITECTURE = "resnet50"  # another ResNet of torchvision's, for example "resnet18"
WEIGHTS = "IMAGENET1K_V2"  # torchvision name, path of a state_dict file or best.pt, or "" for none
FREEZE_STAGES = 0  # the stem and this many of the four stages keep their initial weights [0, 4]
FREEZE_BATCH_NORM = False  # train with the pretrained batch-norm statistics, without updating them

# Training
HEAD_EPOCHS = 0  # epochs that train only the head first, on features computed once [0, 100_000]
HEAD_LEARNING_RATE = 0.05  # initial learning rate of those; cosine decay to zero [1e-9, 1000]
EPOCHS = 60  # at most, with early stopping before that; 0 trains only the head [0, 100_000]
BATCH_SIZE = 128  # images per step, over all processes together [1, 50_000]
LEARNING_RATE = 0.01  # initial; with SCHEDULE = "cosine" the peak [1e-9, 1000]
MOMENTUM = 0.9  # SGD momentum [0.0, 1]
WEIGHT_DECAY = 5e-4  # SGD weight decay [0.0, 1000]
SCHEDULE = "plateau"  # of the rate: drops on a plateau, or cosine to zero ["plateau", "cosine"]
SCHEDULER_FACTOR = 0.1  # plateau: a drop multiplies the learning rate by this [0.0, 0.999]
SCHEDULER_PATIENCE = 2  # plateau: epochs without improvement before a drop [0, 100_000]
WARMUP_EPOCHS = 0.0  # cosine: epochs in which the rate rises from zero [0.0, 100_000]
EARLY_STOPPING_PATIENCE = 7  # epochs without improvement before the run stops [1, 100_000]
WATCH = "loss"  # validation figure for best.pt, early stopping, plateau ["loss", "accuracy"]
LABEL_SMOOTHING = 0.0  # share of each training label that is spread over all classes [0.0, 1]
CLASS_WEIGHTS = ""  # "balanced": images of rare classes count for more ["", "balanced"]
EMA_DECAY = 0.0  # validate and save a moving average of the weights; 0 for none [0.0, 0.9999]
SEED = 0  # random seed: head, image order, augmentation, dropout [0, 4_294_967_295]

# Images
STORED_SIZE = 0  # pixels per side at which a folder's pictures are stored; else 0 [0, 1024]
WHOLE_PICTURES = False  # pad a folder's pictures to squares, instead of cropping their centres
IMAGE_SIZE = 224  # pixels per side that stored images are resized to for the network [32, 1024]
INTERPOLATION = "bilinear"  # of that resizing ["bilinear", "bicubic"]
HOLDOUT_PER_CLASS = 0  # training images per class to validate on; 0: the test images [0, 100_000]
TRAIN_PER_CLASS = 0  # training images per class, for quick tries; 0 uses all [0, 100_000]
VAL_BATCH_SIZE = 128  # images per step of validation, per process [1, 50_000]

# Augmentation; 0 leaves an operation out
FLIP = 0.5  # probability of a horizontal flip [0.0, 1]
CROP_PADDING = 4  # black pixels per side around the stored image before a random crop [0, 32]
RANDOM_SCALE = 0.0  # least share of the area, enlarged as by RandomResizedCrop; 0: off [0.0, 1]
BRIGHTNESS = 0.2  # brightness is multiplied by a factor from 1 - this to 1 + this [0.0, 100]
CONTRAST = 0.2  # contrast is multiplied by a factor from 1 - this to 1 + this [0.0, 100]
SATURATION = 0.2  # saturation is multiplied by a factor from 1 - this to 1 + this [0.0, 100]
HUE = 0.05  # hues shift by up to this fraction of the colour wheel [0.0, 0.5]
ROTATION = 10.0  # degrees of rotation, at most, in either direction [0.0, 180]
GRAYSCALE = 0.05  # probability of becoming gray [0.0, 1]
MIXUP = 0.0  # alpha of mixup: images are blended with a neighbour in the batch [0.0, 100]
CUTMIX = 0.0  # alpha of CutMix: a box of each image comes from its neighbour [0.0, 100]

# Machine
DEVICE = "auto"  # where to train ["auto", "cuda", "mps", "cpu"]
PRECISION = "auto"  # of the network; its head computes in fp32 ["auto", "bf16", "fp16", "fp32"]
COMPILE = False  # compile the network: a slower start, then faster steps
CURVES = True  # redraw CHECKPOINT_DIR/training_curves.png as the run goes on
LOG_EVERY = 20  # steps between readings of the loss, to show it and stop on NaN [1, 100_000]

# Actions
RESUME = False  # continue from CHECKPOINT_DIR/last.pt
RESUME_IF_SAVED = False  # the same if it exists, else start: for clusters that requeue jobs
DEMO = False  # train on scikit-learn's digits with DEMO_SETTINGS; other flags take precedence
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

# --minutes takes the first rung of the ladder that fits: with all images and the most epochs between
# its two, else with the fewest epochs and the most images, no less than its share of all. Beside a
# setting: the points it gains on held-out images of CIFAR-100, with the paired 95 % interval, in
# runs of one to three epochs on 200 images per class.
PLAN_SETTINGS = {
    "SCHEDULE": "cosine",  # +2.4 (1.3 to 3.5), three epochs
    "WARMUP_EPOCHS": 0.1,
    "EARLY_STOPPING_PATIENCE": 100_000,
    "INTERPOLATION": "bicubic",  # +1.4 (0.4 to 2.5), one epoch on 60 per class; head alone +1.7
    "BATCH_SIZE": 64,
    # No operation but FLIP and CROP_PADDING, +1.3 (0.2 to 2.4), pays in so few epochs.
    "BRIGHTNESS": 0.0,
    "CONTRAST": 0.0,
    "SATURATION": 0.0,
    "HUE": 0.0,
    "ROTATION": 0.0,
    "GRAYSCALE": 0.0,
}
LADDER = {
    # IMAGE_SIZE, HEAD_EPOCHS, EPOCHS, FREEZE_STAGES, LEARNING_RATE, share of the images. Beside it,
    # accuracy on 5,000 held-out images of CIFAR-100; two cores of a Xeon with AMX. Batch norm is
    # frozen where stages are: that gains 4.8 points (3.5 to 6.0) in one epoch, but costs 1.5 (0.5 to
    # 2.4) and 0.5 (-0.5 to 1.4) in 20 epochs of all images at 64 px, two seeds.
    "head, then all": (160, 10, (12, 60), 0, 0.005, 1),  # for a GPU; not measured
    "head, then three stages": (128, 10, (3, 12), 1, 0.005, 1),  # EPYC, an hour, 0.015: 76.8 %
    "head, then two stages": (128, 10, (2, 6), 2, 0.005, 0.6),  # two epochs, 40 minutes: 77.9 %
    "head, then two stages, once": (128, 8, (1, 1), 2, 0.005, 0.3),  # 10 minutes: 71.7 %
    "head": (128, 10, (0, 0), 4, 0.005, 0.3),  # 2:04 minutes: 68.6 %
    "head, smaller images": (96, 20, (0, 0), 4, 0.005, 0.02),  # 2:09 minutes: 65.0 %
    "head, smallest images": (64, 20, (0, 0), 4, 0.005, 0.02),  # 46 seconds: 44.4 %
}


def main(argv: list[str] | None = None) -> None:
    begin = time.perf_counter() - time.process_time()  # what it took to import counts
    args = utils.parse_flags(__file__, argv)
    this = utils.this_process()
    check_combinations(args, this.world_size)
    last = Path(args.checkpoint_dir, "last.pt")

    # Connect: device, processes, the checkpoint to continue from
    device = utils.connect(args.device)
    _lock = utils.lock_folder(last.parent)  # until main() returns
    checkpoint = utils.from_rank_0("checkpoint", lambda: utils.find_checkpoint(last, args))
    if checkpoint:
        args = follow_plan(argv, args, checkpoint["constants"])
        utils.require_same_settings(checkpoint, last, args)
    elif this.rank == 0:
        require_weights(args)  # before pictures are decoded
    precision = utils.choose_precision((checkpoint or vars(args))["precision"], device)
    utils.say("device", f"{utils.device_name(device)}, {precision}")

    # Data and model
    train_split, val_split, facts = read_data(args, this)
    model = make_model(args, facts["classes"], device, pretrained=not checkpoint)
    utils.require_same_run(args, facts | {"precision": precision})  # waits for downloads
    utils.broadcast(model.state_dict().values())  # rank 0's weights

    # Plan
    budget = None
    if args.minutes and not checkpoint:
        val_images = len(val_split.labels)
        args, budget = make_plan(argv, args, begin, train_split, val_images, precision, device)
        if args.train_per_class:
            train_split = data.select_for_plan(train_split, args, facts["classes"])
            facts["dataset"] = data.identify(args, train_split)
    elif device.type == "cpu" and not checkpoint:
        advise_minutes(args, len(train_split.labels))
    train_loader, val_loader, val_labels = make_loaders(args, this, device, train_split, val_split)
    utils.say("settings", " ".join(f"{name}={value}" for name, value in vars(args).items()))
    resnet.freeze_stages(model, args.freeze_stages)
    class_weights = weigh_classes(args, train_loader.labels, len(facts["classes"]))
    run = make_run(args, model, precision, class_weights)
    run.budget = budget

    # Restore, or start
    metadata = {"constants": vars(args), "precision": precision, "launcher": this.launcher} | facts
    history = checkpoint["history"] if checkpoint else []
    if checkpoint:
        utils.restore(checkpoint, last, run.parts(), facts)
        del checkpoint  # and its memory
    else:
        utils.move_aside(last.parent)
        utils.save_run(last.parent, metadata, run.parts(), history)
    first = len(history) + (0 if args.head_epochs else 1)  # epoch 0 trains the head alone

    # Wrap, train
    run.network = wrap_network(model, args.compile)
    for epoch in range(first, args.epochs + 1):
        if should_stop(history, args) or epoch > args.epochs:
            break
        start = time.perf_counter()
        figures = train_one_epoch(run, train_loader, epoch, args)
        trained = time.perf_counter()
        figures |= validate(run, val_loader, val_labels)
        history.append({"epoch": epoch, **figures, "seconds": time.perf_counter() - start})
        is_best = finish_epoch(run, history, args)
        utils.save_run(last.parent, metadata, run.parts(), history, is_best)
        utils.say("epoch", epoch_line(history[-1], args.epochs) + ("  best" if is_best else ""))
        saved = time.perf_counter()
        if args.curves:
            utils.draw_progress(last.parent, history, args.watch)
        end_in_time(run, args, epoch, save_seconds=saved - trained)
    if args.curves:
        utils.draw_progress(last.parent, history, args.watch, at_once=True)
    report(run, args, history)
    utils.disconnect()


def advise_minutes(args: Namespace, images: int) -> None:
    """Tells someone without a GPU of --minutes, if the run would take most of an hour or more."""
    images_at_224 = images * args.epochs * (args.image_size / 224) ** 2
    if args.weights and images_at_224 > 50_000:  # most of an hour for two cores with bf16
        advice = "--minutes 60 trains the best network that this machine can in an hour"
        utils.say("note", f"without a GPU this takes hours or days; {advice}")


def train_one_epoch(run: "Run", loader: data.TrainLoader, epoch: int, args: Namespace) -> dict:
    """One pass over the data; returns learning_rate, train_loss, train_accuracy, images_per_second.

    Epoch 0 trains the head alone. Loss and accuracy are means over the images as they were trained
    on, of all processes; the rate is that of the middle of the epoch. Raises FloatingPointError if
    the loss is no longer finite.
    """
    if epoch == 0:
        return train_head(run, loader, args)
    resnet.set_train_mode(run.network, args.freeze_batch_norm)
    torch.manual_seed(data.mix_seed(args.seed, epoch, loader.rank))  # for dropout
    steps, start = len(loader), time.perf_counter()
    loss_sum, correct_sum = next(run.model.parameters()).new_zeros(2)  # on the device
    options = {"unit": "image", "leave": False, "disable": not utils.on_terminal()}
    bar = tqdm(total=steps * loader.batch_size, desc=f"epoch {epoch}", **options)
    for step, (images, labels) in enumerate(loader.epoch(epoch), start=1):
        rate = learning_rate_at(run, args, epoch - 1 + (step - 0.5) / steps)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        loss, correct = train_step(run, images, labels, args)
        update_average(run, args.ema_decay, (epoch - 1) * steps + step)
        loss_sum += loss
        correct_sum += correct
        bar.update(loader.batch_size)
        if step % args.log_every == 0 or step == steps:
            mean_loss = loss_sum.item() / step  # of batch means; here alone the host waits
            require_finite(mean_loss, "training", f"epoch {epoch}, by step {step}", rate)
            bar.set_postfix(loss=f"{mean_loss:.3f}")
            seconds = (time.perf_counter() - start) * steps / step
            end_in_time(run, args, epoch - 1 + step / steps, epoch_seconds=seconds)
        if epoch - 1 + (step + 1) / steps > run.end + 1e-9:  # the next step would be too late
            break
    bar.close()
    speed, share = step * loader.batch_size / (time.perf_counter() - start), len(labels)
    loss, accuracy = utils.mean_over_processes(loss_sum * share, correct_sum, count=step * share)
    figures = {"learning_rate": learning_rate_at(run, args, epoch - 0.5), "train_loss": loss}
    return figures | {"train_accuracy": accuracy, "images_per_second": speed}


def train_step(run: "Run", images: Tensor, labels: Tensor, args: Namespace) -> tuple:
    """One step of SGD; returns the loss and the number of correct predictions of its batch.

    Nothing here makes the host wait for the GPU.
    """
    with resnet.autocast(images.device, run.dtype):
        logits = run.network(images)
    loss = compute_loss(logits, labels, args, run.class_weights)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if labels.is_floating_point():  # probabilities, from mixup or CutMix
        labels = labels.argmax(1)
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def compute_loss(
    logits: Tensor, labels: Tensor, args: Namespace, class_weights: Tensor | None
) -> Tensor:
    """Cross-entropy, the mean over the images of a batch, each with the weight of its class.

    Class weights are 1 on average over all images. Torch would divide by those of the batch, and
    several processes would not train as one does.
    """
    smoothing = args.label_smoothing
    if class_weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    options = {"reduction": "sum", "label_smoothing": smoothing}
    return F.cross_entropy(logits, labels, class_weights, **options) / len(labels)


def learning_rate_at(run: "Run", args: Namespace, epochs_done: float) -> float:
    """The learning rate after so many epochs, a fraction included.

    With the cosine schedule, a linear warm-up from zero and then one cosine to zero: Loshchilov &
    Hutter 2017, arXiv 1608.03983. No state is kept for it, so that a resumed run is exact.
    """
    if args.schedule == "plateau":
        return run.optimizer.param_groups[0]["lr"]
    if epochs_done < args.warmup_epochs:
        return args.learning_rate * (epochs_done / args.warmup_epochs)
    progress = (epochs_done - args.warmup_epochs) / max(run.end - args.warmup_epochs, 1e-9)
    return args.learning_rate * cosine(min(1, progress))


def cosine(progress: float) -> float:
    """From 1 to 0 as progress goes from 0 to 1, along half a period of the cosine."""
    return (1 + math.cos(math.pi * progress)) / 2


def update_average(run: "Run", decay: float, steps: int) -> None:
    """average = decay * average + (1 - decay) * model after so many steps, if there is an average.

    Its decay grows from 2/11 to the given one, or the untrained network would count for long:
    min(decay, (1 + steps) / (10 + steps)), as TensorFlow's ExponentialMovingAverage does it.
    """
    if run.average is not None:
        decay = min(decay, (1 + steps) / (10 + steps))
        get_ema_multi_avg_fn(decay)(*run.averaged, None)


@dataclass
class Run:
    """A model and what trains it."""

    model: nn.Module  # the bare module
    network: nn.Module  # the model as it trains: over all processes, compiled; the same weights
    average: nn.Module | None  # with EMA_DECAY, a moving average of the model
    averaged: list[list[Tensor]]  # the tensors of average and, in the same order, of model
    optimizer: Optimizer
    scheduler: ReduceLROnPlateau  # with SCHEDULE = "cosine", every step overrides its rate
    scaler: torch.amp.GradScaler  # idle except for fp16
    dtype: torch.dtype  # of autocast
    class_weights: Tensor | None  # (num_classes,)
    end: float  # the epoch, or a part of it, with which the run ends at the latest
    budget: "Budget | None" = None  # with MINUTES

    @property
    def validated(self) -> nn.Module:
        """What is validated and goes into best.pt."""
        return self.model if self.average is None else self.average

    def parts(self) -> dict[str, object]:
        """What last.pt must hold, by name, "model" being what is validated."""
        names = ("optimizer", "scheduler", "scaler")
        parts = {"model": self.validated} | {name: getattr(self, name) for name in names}
        return parts if self.average is None else parts | {"trained_model": self.model}


def make_run(
    args: Namespace, model: nn.Module, precision: str, class_weights: Tensor | None = None
) -> Run:
    """The optimizer and its schedule for a model that is on its device already."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, args.learning_rate, args)
    mode = {"loss": "min", "accuracy": "max"}[args.watch]
    # threshold 0: it sees an improvement exactly when utils.best_epoch() does
    scheduler = ReduceLROnPlateau(
        optimizer, mode, args.scheduler_factor, args.scheduler_patience, threshold=0
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    average, averaged = make_average(model) if args.ema_decay else (None, [])
    parts = average, averaged, optimizer, scheduler, scaler, utils.DTYPES[precision]
    return Run(model, model, *parts, class_weights, args.epochs)


def weigh_classes(args: Namespace, labels: Tensor, num_classes: int) -> Tensor | None:
    """With CLASS_WEIGHTS, N / (num_classes * images of the class), as scikit-learn weighs them."""
    if not args.class_weights:
        return None
    counts = labels.bincount(minlength=num_classes)
    return len(labels) / (num_classes * counts)


def make_optimizer(module: nn.Module, learning_rate: float, args: Namespace) -> SGD:
    """SGD for all parameters of a module."""
    options = {"momentum": args.momentum, "weight_decay": args.weight_decay}
    options["fused"] = next(module.parameters()).device.type != "mps"
    optimizer = SGD(module.parameters(), learning_rate, **options)
    if args.momentum:
        # A fused first step that fp16's scaler skips would leave new buffers uninitialized.
        for parameter in module.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_average(model: nn.Module) -> tuple[nn.Module, list[list[Tensor]]]:
    """A copy of the model to hold an average, and the floating tensors of both, in one order.

    The copy's tensors need no gradients; batch norm's counters it shares with the model.
    """
    tensors = [*model.parameters(), *model.buffers()]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    own = {id(tensor): tensor for tensor in tensors}  # what deepcopy() shall put in their place
    own |= {id(tensor): tensor.detach().clone() for tensor in floating}
    return copy.deepcopy(model, own), [[own[id(tensor)] for tensor in floating], floating]


def wrap_network(model: nn.Module, compile_it: bool) -> nn.Module:
    """The model over all processes, compiled if asked for.

    Batch norm normalizes per process; the running statistics that count are those of rank 0.
    """
    network = model
    if dist.is_initialized():
        names = inspect.signature(DistributedDataParallel).parameters
        renamed = "forward_sync_buffers" in names  # torch 2.14's name for broadcast_buffers
        sync_buffers = "forward_sync_buffers" if renamed else "broadcast_buffers"
        options = {"gradient_as_bucket_view": True, sync_buffers: False}
        network = DistributedDataParallel(network, **options)
    if compile_it and utils.can_compile(next(model.parameters()).device):
        network = torch.compile(network)
    return network


def train_head(run: Run, loader: data.TrainLoader, args: Namespace) -> dict:
    """Trains the head alone, on features of the frozen backbone; returns what an epoch returns.

    Linear probing before fine-tuning: Kumar et al. 2022, arXiv 2202.10054. Each process trains on
    the features of all images. Loss and accuracy are those of the last of the head's epochs.
    """
    start, head = time.perf_counter(), run.model.fc
    features, labels = compute_features(run, loader, args)
    curve = fit_head(head, features, labels, args, run.class_weights)
    utils.broadcast(head.state_dict().values())  # unlike GPUs may round differently
    if run.average is not None:
        run.average.load_state_dict(run.model.state_dict())
    loss, accuracy = curve[-1]
    require_finite(loss, "training", "epoch 0", args.head_learning_rate)
    speed = len(features) / (time.perf_counter() - start)  # computing the features included
    figures = {"learning_rate": args.head_learning_rate, "train_loss": loss, "head": curve}
    return figures | {"train_accuracy": accuracy, "images_per_second": speed}


def fit_head(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    args: Namespace,
    class_weights: Tensor | None = None,
) -> list[tuple[float, float]]:
    """Trains a head on features (N, num_features); returns loss and accuracy of each epoch."""
    optimizer = make_optimizer(head, args.head_learning_rate, args)
    seed, batch_size = data.mix_seed(args.seed, 0), min(args.batch_size, len(labels))
    steps = len(labels) // batch_size
    torch.manual_seed(seed)  # for dropout
    generator = torch.Generator().manual_seed(seed)
    head.train()
    sums = []
    for epoch in range(args.head_epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        loss_sum, correct_sum = features.new_zeros(2)
        for step, batch in enumerate(order.split(batch_size)[:steps]):
            progress = (epoch + (step + 0.5) / steps) / args.head_epochs
            optimizer.param_groups[0]["lr"] = args.head_learning_rate * cosine(progress)
            logits = head(features[batch])
            loss = compute_loss(logits, labels[batch], args, class_weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            correct_sum += (logits.detach().argmax(1) == labels[batch]).sum()
        sums.append(torch.stack([loss_sum, correct_sum]))
    sums = torch.stack(sums).tolist()  # here alone the host waits
    return [(loss / steps, correct / (steps * batch_size)) for loss, correct in sums]


def compute_features(run: Run, loader: data.TrainLoader, args: Namespace) -> tuple[Tensor, Tensor]:
    """What the head sees of the training images, not augmented (N, num_features), and their labels.

    Each process computes its share. With MINUTES, images for which there is no time are left out.
    (Mirrored images as well took twice the time, without a measurable gain.)
    """
    generator = torch.Generator().manual_seed(data.mix_seed(args.seed, 0))
    order = torch.randperm(len(loader.labels), generator=generator)
    share = order[loader.rank :: loader.world_size].to(loader.images.device)
    sizes = args.val_batch_size, args.image_size
    own_images = data.EvalLoader(loader.images, *sizes, loader.device, share, args.interpolation)
    if run.budget:
        own_images.is_late = partial(features_are_late, run.budget, time.perf_counter())
    own = resnet.extract_features(run.model, own_images, run.dtype, utils.on_terminal())
    computed = [int(length) for length in utils.exchange("features", str(len(own)))]
    features = own.new_zeros(len(order), own.shape[1])
    features[loader.rank :: loader.world_size][: len(own)] = own
    features, count = utils.sum_over_processes(features), len(order)
    if sum(computed) < count:
        count = min(computed) * loader.world_size
        utils.say("note", f"slower than planned: {count:,} images train the head")
    return features[:count], loader.labels[order[:count].to(loader.device)]


def validate(run: Run, loader: data.EvalLoader, labels: Tensor) -> dict[str, float]:
    """val_loss and val_accuracy, means over the images of all processes."""
    utils.broadcast(run.validated.buffers())
    logits = resnet.predict(run.validated, loader, run.dtype, progress=utils.on_terminal())
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
    return epochs_since_best(history, args) == 0


def epochs_since_best(history: list[dict], args: Namespace) -> int:
    """How many epochs have passed without an improvement of what is watched."""
    return history[-1]["epoch"] - utils.best_epoch(history, args.watch)["epoch"]


def should_stop(history: list[dict], args: Namespace) -> bool:
    """Early stopping: whether too many epochs have passed since the best one."""
    return bool(history) and epochs_since_best(history, args) >= args.early_stopping_patience


def require_finite(loss: float, kind: str, place: str, rate: float) -> None:
    """Raises FloatingPointError, with the place in the run, if the loss is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the {kind} loss is {loss}: {place}, learning rate {rate:g}. Start with a lower one"
        )


# ---- the plan for --minutes ---------------------------------------------------------------------


@dataclass
class Budget:
    """The time that MINUTES gives, and the seconds that a run takes of it, as measured so far."""

    margin = 1.1  # for a machine that gets slower, where nothing can be left out any more
    deadline: float  # time.perf_counter() by which the run has ended
    features_seconds: float
    head_seconds: float  # of the head's epochs
    epoch_seconds: float  # of an epoch's steps
    save_seconds: float  # of the validation and the save after it
    epochs: int  # as planned


def make_plan(
    argv: list[str] | None,
    args: Namespace,
    begin: float,
    train_split: data.Split,
    val_images: int,
    precision: str,
    device: torch.device,
) -> tuple[Namespace, Budget]:
    """The settings of the best rung of LADDER that fits into args.minutes from begin on.

    Flags win over the ladder. Rank 0 decides, by what it measures while the others measure too.
    Raises UserError if no rung fits.
    """
    if utils.parse_flags(__file__, argv, PLAN_SETTINGS).schedule == "plateau":
        utils.refuse_flag("schedule", "plateau", "cosine with --minutes: its end can be planned")
    counts = train_split.labels.bincount().tolist()
    deadline = begin + 60 * args.minutes - args.curves  # a second to draw them at the end
    watch = Stopwatch(args, train_split, len(counts), precision, device)

    def cost(settings: dict, roughly: bool = False) -> float:
        candidate = utils.parse_flags(__file__, argv, settings)
        return sum_up(expect(candidate, watch, counts, val_images, roughly), candidate)

    def time_left() -> float:
        return (deadline - time.perf_counter()) / Budget.margin

    found = choose_rung(cost, time_left, max(counts))
    settings, least = utils.from_rank_0("plan", lambda: found)
    elapsed = time.perf_counter() - begin
    if not settings:
        least = math.ceil((elapsed + Budget.margin * least) / 6) / 10
        raise utils.UserError(
            f"--minutes {args.minutes:g} is too short: expected {least:g} or more on this machine"
        )
    args = utils.parse_flags(__file__, argv, settings)
    check_combinations(args, utils.this_process().world_size)
    seconds = expect(args, watch, counts, val_images)
    minutes = (elapsed + sum_up(seconds, args)) / 60
    per_class = f"{args.train_per_class} images per class" if args.train_per_class else "all images"
    parts = f"{args.image_size} px, {per_class}, {args.head_epochs} epochs of the head"
    parts += f", {args.epochs} of the network with {args.freeze_stages} stages frozen"
    utils.say("plan", f"{parts}: about {minutes:.1f} of {args.minutes:g} minutes")
    own = ("minutes", "resume", "resume_if_saved")
    utils.say("repeat", utils.command_of(__file__, args, without=own))
    parts = [max(seconds[part], 1e-3) for part in ("features", "head", "epoch", "save")]
    return args, Budget(deadline, *parts, args.epochs)


def choose_rung(
    cost: Callable[..., float], time_left: Callable[[], float], most_per_class: int
) -> tuple[dict, float]:
    """The settings of the first rung of LADDER that fits into the seconds left, and their cost.

    cost(settings) measures what it has not measured yet, which takes a while; with roughly=True it
    is at least as low. If no rung fits, the settings are empty and the cost is that of the last.
    """
    for size, head_epochs, (fewest, most), frozen, rate, share in LADDER.values():
        fixed = {"IMAGE_SIZE": size, "FREEZE_STAGES": frozen, "FREEZE_BATCH_NORM": frozen > 0}
        fixed |= {"LEARNING_RATE": rate, "HEAD_EPOCHS": head_epochs, "EPOCHS": fewest}
        fixed |= PLAN_SETTINGS
        fewest_images = math.ceil(share * most_per_class)
        settings = fixed | {"TRAIN_PER_CLASS": fewest_images}
        least = cost(settings, roughly=True)
        if least > time_left():
            continue
        least = cost(settings)
        for name, values in (
            ("EPOCHS", range(fewest, most + 1)),
            ("TRAIN_PER_CLASS", range(fewest_images, most_per_class)),
        ):
            base, left = fixed | {"TRAIN_PER_CLASS": 0}, time_left()
            if fit := bisect_right(values, left, key=lambda value: cost(base | {name: value})):
                settings = base | {name: values[fit - 1]}
                return settings, cost(settings)
    return {}, least


def expect(
    args: Namespace, watch: "Stopwatch", counts: list[int], val_images: int, roughly: bool = False
) -> dict[str, float]:
    """Seconds for the first save, features, the head's epochs, an epoch, a validation with its save.

    counts: training images per class. roughly: less than that, from a forward pass of small images.
    """
    processes, forward = utils.this_process().world_size, watch.forward(args, roughly)
    images = sum(min(count, args.train_per_class or count) for count in counts)
    seconds = {"start": watch.save(args), "features": 0.0, "head": 0.0, "epoch": 0.0}
    seconds["save"] = seconds["start"] + forward * val_images / processes
    if args.head_epochs:
        seconds["features"] = forward * images / processes
        seconds["head"] = watch.head(args) * images * args.head_epochs
    if args.epochs:
        seconds["epoch"] = (2 * forward if roughly else watch.step(args)) * images / processes
    return seconds


def sum_up(seconds: dict[str, float], args: Namespace) -> float:
    """Seconds of a whole run."""
    saves = args.epochs + bool(args.head_epochs)
    once = seconds["start"] + seconds["features"] + seconds["head"]
    return once + args.epochs * seconds["epoch"] + saves * seconds["save"]


class Stopwatch:
    """Measures what a run consists of on its device, each part once: seconds per image."""

    def __init__(
        self,
        args: Namespace,
        train_split: data.Split,
        num_classes: int,
        precision: str,
        device: torch.device,
    ) -> None:
        self.precision, self.measured = precision, {}
        self.batches = 1 if device.type == "cpu" else 8  # there one takes long enough
        most = self.batches * max(args.val_batch_size, PLAN_SETTINGS["BATCH_SIZE"])
        self.split = train_split.select(slice(most)).to(device)
        # A network of its own, because measured steps change it
        self.model = resnet.build_model(args.architecture, num_classes)
        self.model.to(device, memory_format=data.memory_format(device))

    def forward(self, args: Namespace, roughly: bool = False) -> float:
        """A forward pass for validation or features; roughly: a lower bound, from smaller images."""
        if roughly and args.image_size > 64:
            small = Namespace(**vars(args) | {"image_size": 64})
            return 0.6 * self.forward(small) * (args.image_size / 64) ** 2
        batch_size = args.val_batch_size
        images = self.split.images[: batch_size * self.batches]
        device = self.split.labels.device
        mode = args.interpolation
        loader = data.EvalLoader(images, batch_size, args.image_size, device, mode=mode)

        def use() -> Tensor:
            return resnet.predict(self.model, loader, utils.DTYPES[self.precision]).sum()

        return self.once(use, len(images), "forward", args.image_size)

    def step(self, args: Namespace) -> float:
        """A step of training with its augmentation."""
        batch_size = args.batch_size // utils.this_process().world_size
        args = Namespace(**vars(args) | {"batch_size": batch_size})
        self.model.requires_grad_(True)
        resnet.freeze_stages(self.model, args.freeze_stages)
        run = make_run(args, self.model, self.precision)
        loader = data.TrainLoader(self.split.select(slice(batch_size * self.batches)), args)

        def use() -> Tensor:
            resnet.set_train_mode(self.model, args.freeze_batch_norm)
            return sum(train_step(run, *batch, args)[0] for batch in loader.epoch(1))

        images = len(loader) * loader.batch_size
        return self.once(use, images, "step", args.image_size, args.freeze_stages, batch_size)

    def head(self, args: Namespace) -> float:
        """A step of the head alone."""
        args, head = Namespace(**vars(args) | {"head_epochs": 1}), self.model.fc
        labels = self.split.labels
        features = torch.rand(len(labels), head[0].in_features, device=labels.device)

        def use() -> float:
            return fit_head(head.requires_grad_(True), features, labels, args)[-1][0]

        return self.once(use, len(labels), "head", args.batch_size)

    def save(self, args: Namespace) -> float:
        """Seconds for best.pt and last.pt, which together hold three times the network."""

        def use() -> float:
            with tempfile.TemporaryFile(dir=args.checkpoint_dir) as file:
                torch.save(self.model.state_dict(), file)
                file.flush()
                os.fsync(file.fileno())
            return 0.0

        return 3 * self.once(use, 1, "save")

    def once(self, use: Callable[[], Tensor | float], images: int, *key: object) -> float:
        """Seconds per image of use(), whose number is read to wait for the device."""
        if key not in self.measured:
            float(use())  # allocates memory and chooses kernels
            count, start = 0, time.perf_counter()
            while not count or time.perf_counter() - start < 1:
                float(use())
                count += 1
            self.measured[key] = (time.perf_counter() - start) / count / images
        return self.measured[key]


def features_are_late(budget: Budget, start: float, done: float) -> bool:
    """Whether the rest must begin, at the pace of the features so far, a fraction of all."""
    now = time.perf_counter()
    pace = max(1, (now - start) / (done * budget.features_seconds))
    rest = pace * budget.margin * (budget.head_seconds * done + budget.save_seconds)
    return now + rest > budget.deadline


def follow_plan(argv: list[str] | None, args: Namespace, constants: dict) -> Namespace:
    """With MINUTES, the settings of a run that is continued, as its plan was; flags win over it."""
    if not args.minutes:
        return args
    names = ["IMAGE_SIZE", "FREEZE_STAGES", "FREEZE_BATCH_NORM", "LEARNING_RATE", "HEAD_EPOCHS"]
    names += ["EPOCHS", *PLAN_SETTINGS, "TRAIN_PER_CLASS"]
    return utils.parse_flags(__file__, argv, {name: constants[name.lower()] for name in names})


def end_in_time(
    run: Run, args: Namespace, done: float, epoch_seconds: float = 0, save_seconds: float = 0
) -> None:
    """With MINUTES, brings the end of the run forward if the rest would take longer than is left.

    done: epochs trained, a fraction included. The seconds are those measured last, if any. The
    schedule then reaches its end earlier; EPOCHS counts the epochs that are begun. If it turns out
    that there is time after all, the end moves back: in the first half of the run, when the rate is
    still high, or after a whole epoch, whose measurement can be trusted.
    """
    if run.budget is None:
        return
    budget = run.budget
    budget.epoch_seconds = epoch_seconds or budget.epoch_seconds
    budget.save_seconds = save_seconds or budget.save_seconds
    end = latest_end(budget, run.end, done, budget.epoch_seconds)
    if (save_seconds and done <= run.end) or done < run.end / 2:
        pace = budget.margin * budget.epoch_seconds  # what is given back must be there
        end = max(end, latest_end(budget, budget.epochs, done, pace))
    run.end = utils.of_rank_0(end)
    args.epochs = math.ceil(run.end)


def latest_end(budget: Budget, most: float, done: float, epoch_seconds: float) -> float:
    """The epoch, or a part of it, to which the time left suffices; at most the one given."""
    left, begun = budget.deadline - time.perf_counter(), math.floor(done)
    for epochs in range(math.ceil(most), begun, -1):  # that are begun in the end
        saves = budget.margin * (epochs - begun) * budget.save_seconds
        possible = min(most, epochs, done + (left - saves) / epoch_seconds)
        if possible > max(done, epochs - 1):
            return possible
    return min(done, most)


def read_data(args: Namespace, this: utils.Processes) -> tuple[data.Split, data.Split, dict]:
    """The training and the validation images, on the CPU, and the data's facts."""
    if this.local_rank == 0:  # one process per machine downloads and decodes
        data.fetch(args)
        splits = data.read_splits(args, quiet=this.rank > 0)
    utils.exchange("data")
    if this.local_rank:
        splits = data.read_splits(args, quiet=True)
    train_split, val_split, facts = splits
    counts = f"{len(train_split.labels):,} training and {len(val_split.labels):,} validation images"
    utils.say("data", f"{args.dataset}: {counts}, {len(facts['classes'])} classes")
    if not args.holdout_per_class:
        count = max(1, min(50, train_split.labels.bincount().min().item() // 5))
        advice = f"--holdout-per-class {count} selects on held-out training images instead"
        utils.say("note", f"best.pt is selected on {data.name_test_images(args.dataset)}; {advice}")
    if this.rank == 0 and args.dataset not in data.BUILT_IN:
        warn_of_copies(train_split, val_split)
    return train_split, val_split, facts


def make_loaders(
    args: Namespace,
    this: utils.Processes,
    device: torch.device,
    train_split: data.Split,
    val_split: data.Split,
) -> tuple[data.TrainLoader, data.EvalLoader, Tensor]:
    """The loaders, on the device, and the labels of this process's validation images."""
    sizes = len(train_split.labels), len(val_split.labels)
    if min(sizes[0] // 2, sizes[1]) < this.world_size:  # each trains on pairs of images
        raise utils.UserError(
            f"{sizes[0]} training and {sizes[1]} validation images are too few for "
            f"{this.world_size} processes; see --holdout-per-class, --train-per-class"
        )
    train_loader = data.TrainLoader(train_split.to(device), args, this.rank, this.world_size)
    val_split = val_split.select(slice(this.rank, None, this.world_size)).to(device)
    sizes, mode = (args.val_batch_size, args.image_size), args.interpolation
    val_loader = data.EvalLoader(val_split.images, *sizes, device, mode=mode)
    return train_loader, val_loader, val_split.labels


def warn_of_copies(train_split: data.Split, val_split: data.Split) -> None:
    """Names the first validation picture that has the pixels of a training picture, if any has."""
    count, files = len(train_split.labels), [*train_split.files, *val_split.files]
    groups = data.find_identical(train_split.images, val_split.images)
    across = [group for group in groups if group[0] < count <= group[-1]]
    if across:
        copies = sum(index >= count for group in across for index in group)
        example = f"{files[across[0][-1]]} is {files[across[0][0]]}"
        found = f"{copies:,} of {len(val_split.labels):,} validation pictures are training pictures"
        utils.say("note", f"{found} too, pixel for pixel: {example}, for example")


def make_model(
    args: Namespace, classes: list[str], device: torch.device, pretrained: bool
) -> nn.Module:
    """The network on its device, with the weights that WEIGHTS names if pretrained, on rank 0."""
    torch.manual_seed(data.mix_seed(args.seed))  # for the new layers
    model = resnet.build_model(args.architecture, len(classes))
    if pretrained and utils.this_process().rank == 0:
        load_weights(model, args, classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    source = args.weights or "random weights"
    utils.say("model", f"{args.architecture} from {source}, {parameters:,} parameters")
    return model.to(device, memory_format=data.memory_format(device))


def require_weights(args: Namespace) -> None:
    """Raises UserError if WEIGHTS is neither a name of torchvision's nor a file nor empty."""
    names = resnet.weight_names(args.architecture)
    if args.weights and args.weights not in names and not Path(args.weights).is_file():
        expected = f'{", ".join(names)}, the path of a state_dict file, or ""'
        raise utils.UserError(f"Weights {args.weights} not found. Expected {expected}")


def load_weights(model: nn.Module, args: Namespace, classes: list[str]) -> None:
    """Loads WEIGHTS into a new model, a checkpoint's head too if its classes are the same.

    Raises UserError, or model.WeightsError, if they cannot be had or do not fit.
    """
    require_weights(args)
    if not args.weights:
        return
    if args.weights in resnet.weight_names(args.architecture):
        weights, own_classes = resnet.download_weights(args.architecture, args.weights), []
    else:
        try:
            weights = utils.load_safely(args.weights, zip_only=False)
            own_classes = weights.get("classes", [])
            weights = weights["model"] if own_classes else weights
            utils.require_sound(weights)
        except Exception as error:
            reason = utils.reason_of(error)
            raise utils.UserError(
                f"{args.weights} is not a state_dict file that can be used: {reason}"
            ) from error
    with utils.explained_misfit(args.weights, args.architecture):
        resnet.load_pretrained(model, weights, with_head=own_classes == classes)


def check_combinations(args: Namespace, world_size: int) -> None:
    """Ends the script with one line and exit status 2 if constants do not go together."""
    if args.dataset in data.BUILT_IN:
        if args.stored_size not in (0, 32):
            utils.refuse_flag("stored_size", args.stored_size, f"0 with {args.dataset}")
    elif not Path(args.dataset).is_dir():
        expected = "cifar100, digits, or a folder with train/ and val/ in it"
        utils.refuse_flag("dataset", args.dataset, expected)
    elif not args.stored_size:
        expected = "a number of pixels per side at which to keep your pictures, for example 224"
        utils.refuse_flag("stored_size", args.stored_size, expected)
    if args.dataset == "cifar100":
        for name, most in (("holdout_per_class", 499), ("train_per_class", 500)):
            if vars(args)[name] > most:
                utils.refuse_flag(name, vars(args)[name], f"0 to {most} with cifar100")
    if args.architecture not in resnet.ARCHITECTURES:
        expected = f"one of {', '.join(resnet.ARCHITECTURES)}"
        utils.refuse_flag("architecture", args.architecture, expected)
    if args.batch_size % world_size:
        utils.refuse_flag("batch_size", args.batch_size, f"a multiple of {world_size} processes")
    if args.batch_size == world_size and args.image_size == 32:  # batch norm of one number
        expected = "at least 2 images per process at 32 px"
        utils.refuse_flag("batch_size", args.batch_size, expected)
    if (args.mixup or args.cutmix) and args.batch_size // world_size % 2:
        expected = "an even number of images per process, for --mixup and --cutmix"
        utils.refuse_flag("batch_size", args.batch_size, expected)
    if args.minutes and (args.demo or args.compile or not args.weights):
        expected = "0 with --demo, --compile or without pretrained weights"
        utils.refuse_flag("minutes", args.minutes, expected)
    if not args.epochs and not args.head_epochs:
        utils.refuse_flag("epochs", args.epochs, "1 or more without --head-epochs")
    if args.warmup_epochs and args.schedule == "plateau":
        utils.refuse_flag("warmup_epochs", args.warmup_epochs, "0 with --schedule plateau")
    if args.epochs and args.warmup_epochs >= args.epochs:
        utils.refuse_flag("warmup_epochs", args.warmup_epochs, f"less than {args.epochs} epochs")


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """The figures of an epoch on one line."""
    return (
        f"{row['epoch']}/{epochs}  lr {row['learning_rate']:.4g}"
        f"  train loss {row['train_loss']:.4f}, accuracy {100 * row['train_accuracy']:.2f} %"
        f"  validation loss {row['val_loss']:.4f}, accuracy {100 * row['val_accuracy']:.2f} %"
        f"  {row['seconds']:.1f} s  {row['images_per_second']:,.0f} images/s"
    )


def report(run: Run, args: Namespace, history: list[dict]) -> None:
    """Prints why the run ended, its best epoch, and the next command."""
    best = utils.best_epoch(history, args.watch)
    if should_stop(history, args):
        count = epochs_since_best(history, args)
        utils.say("stopped", f"no better validation {args.watch} in {count} epochs")
    else:
        epochs = history[-1]["epoch"]
        utils.say("finished", f"all {epochs} epochs" if epochs else "the head alone")
    figures = f"{100 * best['val_accuracy']:.2f} % (loss {best['val_loss']:.4f})"
    path = Path(args.checkpoint_dir, "best.pt")
    utils.say("best", f"epoch {best['epoch']}: validation accuracy {figures}, {path}")
    if run.budget and run.end < run.budget.epochs:
        planned = f"{run.end:.2f} epochs in place of {run.budget.epochs}, with the whole schedule"
        utils.say("note", f"the machine was slower than measured: {planned}")
    flags = Namespace(checkpoint=str(path), data_dir=args.data_dir)
    if args.dataset not in data.BUILT_IN and (args.resume or args.resume_if_saved):
        flags.dataset = args.dataset  # the folder may have moved since best.pt was written
    utils.say("next", utils.command_of(str(Path(__file__).with_name("evaluate.py")), flags))


if __name__ == "__main__":
    with utils.explained_exit(
        "nothing is saved yet", "start again with a lower --batch-size or --image-size"
    ):
        main()
