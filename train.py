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

import time

start_of_script = time.perf_counter()  # MINUTES counts the import of torch, which takes seconds

import copy
import math
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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

MINUTES = 0.0  # train the best network that this time allows; 0: no limit [0.0, 1e5]

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
VAL_IMAGES = 0  # images to validate on, evenly spread over those there are; 0: all [0, 100_000_000]
VAL_BATCH_SIZE = 128  # images per step of validation, per process [1, 50_000]

# Augmentation; 0 leaves an operation out
# BRIGHTNESS to GRAYSCALE are a quarter of 0.2, 0.2, 0.2, 0.05, 10 and 0.05. That gained 3.1 points
# (1.9 to 4.2) and 2.0 (1.0 to 3.1) with seeds 0 and 1, a half 2.2 (1.2 to 3.3) and 1.7 (0.6 to
# 2.7): 100 images per class, 64 px, 20 epochs.
FLIP = 0.5  # probability of a horizontal flip [0.0, 1]
CROP_PADDING = 4  # black pixels per side around the stored image before a random crop [0, 32]
RANDOM_SCALE = 0.0  # least share of the area, enlarged as by RandomResizedCrop; 0: off [0.0, 1]
BRIGHTNESS = 0.05  # brightness is multiplied by a factor from 1 - this to 1 + this [0.0, 100]
CONTRAST = 0.05  # contrast is multiplied by a factor from 1 - this to 1 + this [0.0, 100]
SATURATION = 0.05  # saturation is multiplied by a factor from 1 - this to 1 + this [0.0, 100]
HUE = 0.0125  # hues shift by up to this fraction of the colour wheel [0.0, 0.5]
ROTATION = 2.5  # degrees of rotation, at most, in either direction [0.0, 180]
GRAYSCALE = 0.0125  # probability of becoming gray [0.0, 1]
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

# With MINUTES these settings replace the constants above. Beside a setting: the points it gains on
# held-out images of CIFAR-100, with the paired 95 % interval, in runs of one to three epochs on 200
# images per class.
MINUTES_SETTINGS = {
    "HEAD_EPOCHS": 10,
    "EPOCHS": 100_000,  # the time decides
    "EARLY_STOPPING_PATIENCE": 100_000,
    "SCHEDULE": "cosine",  # +2.4 (1.3 to 3.5), three epochs
    "LEARNING_RATE": 0.005,
    "BATCH_SIZE": 64,
    "INTERPOLATION": "bicubic",  # +1.4 (0.4 to 2.5), one epoch on 60 per class; head alone +1.7
    # No operation but FLIP and CROP_PADDING, +1.3 (0.2 to 2.4), pays in so few epochs.
    "BRIGHTNESS": 0.0,
    "CONTRAST": 0.0,
    "SATURATION": 0.0,
    "HUE": 0.0,
    "ROTATION": 0.0,
    "GRAYSCALE": 0.0,
}
# Which image size and how many frozen stages the time is best spent on, by how often a forward pass
# at 128 px could see all training images in it: the first line whose number is reached. Beside it,
# accuracy on 5,000 held-out images of CIFAR-100, one core of a Xeon with AMX.
MINUTES_TABLE = {
    # passes: (IMAGE_SIZE, FREEZE_STAGES); batch norm is frozen where stages are
    60: (224, 0),  # for a GPU; not measured
    15: (128, 1),  # not measured
    0.1: (128, 2),  # 7 passes: 78.4 %, 1.3: 72.4 %, 0.37: 67.2 %; head on 2,880 images: 59.4 %
    0.02: (96, 2),  # head on 5,200: 59.6 %, on 2,600: 55.0 %; in that time at 128 px 50.5 %
}


def main(argv: list[str] | None = None, begin: float | None = None) -> None:
    """begin: time.perf_counter() when the script was started; None: now."""
    begin = time.perf_counter() if begin is None else begin
    args = read_settings(argv)
    this = utils.this_process()
    check_combinations(args, this.world_size)
    last = Path(args.checkpoint_dir, "last.pt")

    # Connect: device, processes, the checkpoint to continue from
    device = utils.connect(args.device)
    with utils.lock_folder(last.parent) or nullcontext():
        args, checkpoint = find_run(argv, args, last)
        wanted = checkpoint["precision"] if checkpoint else args.precision
        precision = utils.choose_precision(wanted, device)
        utils.say("device", f"{utils.device_name(device)}, {precision}")

        # Data, model, and what the time allows
        *splits, facts = data.read_data(args, this)
        model = resnet.make_model(args, facts["classes"], device, pretrained=not checkpoint)
        utils.require_same_run(args, facts | {"precision": precision})  # waits for downloads
        utils.broadcast(model.state_dict().values())  # rank 0's weights
        clock = utils.Clock(begin, args)
        if args.minutes and not checkpoint:
            args = choose_settings(argv, args, clock, model, precision, *splits)
        elif device.type == "cpu" and not checkpoint:
            advise_minutes(args, len(splits[0].labels))
        train_loader, val_loader, val_labels = data.make_loaders(args, this, device, *splits)
        clock.val_images = this.world_size * len(val_labels)
        utils.say("settings", " ".join(f"{name}={value}" for name, value in vars(args).items()))

        # Restore, or start
        resnet.freeze_stages(model, args.freeze_stages)
        class_weights = weigh_classes(args, train_loader.labels, len(facts["classes"]))
        run = make_run(args, model, precision, class_weights, clock)
        metadata = {"constants": vars(args), "precision": precision, "launcher": this.launcher}
        metadata |= facts
        history = restore_or_start(checkpoint, last, run, metadata)
        last_epoch = args.epochs
        if checkpoint and clock.is_over(history, args.batch_size, len(train_loader)):
            last_epoch = clock.trained
        checkpoint = None  # frees its memory

        # Wrap, train
        run.network = resnet.wrap_network(model, args.compile)
        for epoch in range(clock.trained + 1, last_epoch + 1):
            if should_stop(history, args):
                break
            start = time.perf_counter()
            row = {"epoch": epoch, **train_one_epoch(run, train_loader, epoch, args)}
            clock.trained = epoch
            is_last = epoch + 1 / len(train_loader) > run.end  # there is no time for another step
            if is_last or clock.is_closing_worth_it():
                row |= validate(run, val_loader, val_labels)
                row["seconds"] = time.perf_counter() - start
                history.append(row)
                close_epoch(run, history, metadata, args)
            elif epoch == 0:  # the head took most of the time, perhaps
                utils.save_run(last.parent, metadata, run.parts(), history)
            if is_last:
                break
        report(run, args, history)
        utils.disconnect()


def read_settings(argv: list[str] | None, of_run: dict | None = None) -> Namespace:
    """The constants with the flags put over them; with MINUTES, its settings are put in between.

    of_run: the constants of a run that is continued, which has chosen its settings already.
    """
    args = utils.parse_flags(__file__, argv)
    if not args.minutes:
        return args
    settings = dict(MINUTES_SETTINGS)
    if of_run:
        chosen = [name.upper() for name in utils.CHOSEN_BY_THE_CLOCK]
        for name in [*settings, *chosen, "VAL_IMAGES"]:
            settings[name] = of_run[name.lower()]
    return utils.parse_flags(__file__, argv, settings)


def find_run(argv: list[str] | None, args: Namespace, last: Path) -> tuple[Namespace, dict | None]:
    """The constants to go on with and the checkpoint to continue from; None for a new run."""
    checkpoint = utils.from_rank_0("checkpoint", lambda: utils.find_checkpoint(last, args))
    if checkpoint:
        args = read_settings(argv, checkpoint["constants"])
        utils.require_same_settings(checkpoint, last, args)
    elif utils.is_first():
        resnet.require_weights(args)  # before pictures are decoded
    return args, checkpoint


def restore_or_start(checkpoint: dict | None, last: Path, run: "Run", metadata: dict) -> list[dict]:
    """Loads the checkpoint, or writes last.pt before the first epoch; returns the history so far.

    Adds to the metadata the checksum of the weights that training began with.
    """
    if checkpoint:
        utils.restore(checkpoint, last, run.parts(), metadata)
        metadata["weights_checksum"] = checkpoint.get("weights_checksum")
        if checkpoint["history"] and not run.clock.is_limited:
            run.clock.trained = checkpoint["history"][-1]["epoch"]
        return checkpoint["history"]
    metadata["weights_checksum"] = resnet.checksum(run.model)
    utils.move_aside(last.parent)
    start = time.perf_counter()
    utils.save_run(last.parent, metadata, run.parts(), [])
    run.clock.save_seconds = 2 * (time.perf_counter() - start)  # with best.pt
    return []


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
    torch.manual_seed(utils.mix_seed(args.seed, epoch, loader.rank))  # for dropout
    run.end = min(args.epochs, run.clock.start_epoch(epoch))
    steps, start = len(loader), time.perf_counter()
    loss_sum, correct_sum = next(run.model.parameters()).new_zeros(2)  # on the device
    options = {"unit": "image", "leave": False, "disable": not utils.is_first()}
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
        done = epoch - 1 + step / steps  # epochs, a fraction included
        if step % args.log_every == 0 or step == steps or done >= run.clock.next_reading:
            mean_loss = loss_sum.item() / step  # of batch means; here alone the host waits
            require_finite(mean_loss, "training", f"epoch {epoch}, by step {step}", rate)
            bar.set_postfix(loss=f"{mean_loss:.3f}")
            run.end = min(args.epochs, run.clock.read(done))
        if done + 1 / steps > run.end + 1e-9:  # no time for another step; 1e-9 is for rounding
            break
    bar.close()
    speed = step * loader.batch_size / (time.perf_counter() - start)
    images_per_step = len(labels)  # of this process, the same in every step
    loss, accuracy = utils.mean_over_processes(
        loss_sum * images_per_step, correct_sum, count=step * images_per_step
    )
    if run.scaler.is_enabled():
        tell_skipped_steps(run, step)
    middle = epoch - 1 + step / steps / 2  # of what was trained
    figures = {"learning_rate": learning_rate_at(run, args, middle), "train_loss": loss}
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
    skipped: Tensor  # steps of the epoch that it has skipped, because gradients overflowed
    dtype: torch.dtype  # of autocast
    class_weights: Tensor | None  # (num_classes,)
    end: float  # epochs, a fraction included, with which the run ends at the latest
    clock: utils.Clock  # with MINUTES it moves the end

    @property
    def validated(self) -> nn.Module:
        """What is validated and goes into best.pt."""
        return self.model if self.average is None else self.average

    def parts(self) -> dict[str, object]:
        """What last.pt must hold, by name, "model" being what is validated."""
        parts = {"model": self.validated, "optimizer": self.optimizer}
        parts |= {"scheduler": self.scheduler, "scaler": self.scaler}
        if self.average is not None:
            parts["trained_model"] = self.model
        if self.clock.is_limited:
            parts["clock"] = self.clock
        return parts


def make_run(
    args: Namespace,
    model: nn.Module,
    precision: str,
    class_weights: Tensor | None = None,
    clock: utils.Clock | None = None,
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
    return Run(
        model=model,
        network=model,
        average=average,
        averaged=averaged,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        skipped=count_skipped_steps(optimizer, device),
        dtype=utils.DTYPES[precision],
        class_weights=class_weights,
        end=args.epochs,
        clock=clock or utils.Clock(0, args),
    )


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


def count_skipped_steps(optimizer: Optimizer, device: torch.device) -> Tensor:
    """A number on the device that grows by one with each fused step that fp16's scaler skips."""
    skipped = torch.zeros((), device=device)

    def count(optimizer: Optimizer, args: tuple, options: dict) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # which the scaler sets for fused steps
        if found_inf is not None:
            skipped.add_(found_inf)

    optimizer.register_step_pre_hook(count)
    return skipped


def tell_skipped_steps(run: Run, steps: int) -> None:
    """Prints how many of an epoch's steps fp16 has skipped, beyond the few that find its scale."""
    skipped = int(run.skipped.item())
    run.skipped.zero_()
    if skipped > 8:
        found = f"fp16 skipped {skipped} of {steps} steps because gradients overflowed"
        utils.say("note", f"{found}; if the loss stays high, try --precision bf16")


def make_average(model: nn.Module) -> tuple[nn.Module, list[list[Tensor]]]:
    """A copy of the model to hold an average, and the floating tensors of both, in one order."""
    average = copy.deepcopy(model).requires_grad_(False)
    for copied, module in zip(average.modules(), model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            copied.num_batches_tracked = module.num_batches_tracked  # it counts for both
    averages, values = [], []
    for copied, tensor in zip(average.state_dict().values(), model.state_dict().values()):
        if tensor.is_floating_point():
            averages.append(copied)
            values.append(tensor)
    return average, [averages, values]


def train_head(run: Run, loader: data.TrainLoader, args: Namespace) -> dict:
    """Trains the head alone, on features of the frozen backbone; returns what an epoch returns.

    Linear probing before fine-tuning: Kumar et al. 2022, arXiv 2202.10054. Each process trains on
    the features of all images. Loss and accuracy are those of the last of the head's epochs.
    """
    start, head, clock = time.perf_counter(), run.model.fc, run.clock
    left = clock.seconds_left()  # infinite without MINUTES
    end = start + (1 - clock.head_share) * left
    features, labels = compute_features(run, loader, args, end)
    clock.image_seconds = (time.perf_counter() - start) / len(features)
    images = f"{len(features):,} of {len(loader.labels):,} images"
    has_all = len(features) == len(loader.labels)
    if not clock.is_limited or (has_all and clock.is_network_worth_it(args.batch_size)):
        seconds = None  # the network trains afterwards; the head gets HEAD_EPOCHS
    else:
        run.end = 0  # main() stops after this epoch
        tell_enough_minutes(clock, args, len(loader.labels) - len(features))
        if has_all:
            mirrored, _ = compute_features(run, loader, args, end, mirrored=True)
            features = torch.cat([features, mirrored])
            labels = torch.cat([labels, labels[: len(mirrored)]])
            images += f" and {len(mirrored):,} mirrored ones"
        # Rather late than untrained, if the machine has become slower
        seconds = max(clock.seconds_left(), clock.head_share * left / 2, 1)
    curve = fit_head(head, features, labels, args, run.class_weights, seconds)
    utils.broadcast(head.state_dict().values())  # unlike GPUs may round differently
    if run.average is not None:
        run.average.load_state_dict(run.model.state_dict())
    loss, accuracy = curve[-1]
    require_finite(loss, "training", "epoch 0", args.head_learning_rate)
    utils.say("head", f"trained {len(curve)} epochs on the features of {images}")
    speed = len(features) / (time.perf_counter() - start)  # computing the features included
    figures = {"learning_rate": args.head_learning_rate, "train_loss": loss, "head": curve}
    return figures | {"train_accuracy": accuracy, "images_per_second": speed}


def tell_enough_minutes(clock: utils.Clock, args: Namespace, missing: int) -> None:
    """Prints how many MINUTES would have been enough to train the network, and not the head alone.

    missing: images whose features the time was not enough for.
    """
    needed = clock.network_seconds(args.batch_size) + missing * clock.image_seconds
    minutes = math.ceil(args.minutes + (needed - clock.seconds_left()) / 60)
    advice = f"from about --minutes {minutes} on, the network is trained, too"
    utils.say("note", f"there is only time for the head; {advice}")


def fit_head(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    args: Namespace,
    class_weights: Tensor | None = None,
    seconds: float | None = None,
) -> list[tuple[float, float]]:
    """Trains a head on features (N, num_features); returns loss and accuracy of each epoch.

    It trains for HEAD_EPOCHS or, if they are given, for so many seconds.
    """
    optimizer = make_optimizer(head, args.head_learning_rate, args)
    seed, batch_size = utils.mix_seed(args.seed, 0), min(args.batch_size, len(labels))
    steps = len(labels) // batch_size
    torch.manual_seed(seed)  # for dropout
    generator = torch.Generator().manual_seed(seed)
    head.train()
    start = time.perf_counter()
    sums, counts, is_over = [], [], False
    while not is_over:
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        loss_sum, correct_sum = features.new_zeros(2)
        for step, batch in enumerate(order.split(batch_size)[:steps], start=1):
            if seconds is None:
                progress = (len(sums) + (step - 0.5) / steps) / args.head_epochs
            else:
                progress = min(1, (time.perf_counter() - start) / seconds)
                is_over = progress == 1  # after this step, whose rate is 0
            optimizer.param_groups[0]["lr"] = args.head_learning_rate * cosine(progress)
            logits = head(features[batch])
            loss = compute_loss(logits, labels[batch], args, class_weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            correct_sum += (logits.detach().argmax(1) == labels[batch]).sum()
            if is_over:
                break
        sums.append(torch.stack([loss_sum, correct_sum]))
        counts.append(step)
        if seconds is None:
            is_over = len(sums) == args.head_epochs
    sums = torch.stack(sums).tolist()  # here alone the host waits
    return [(loss / n, correct / (n * batch_size)) for (loss, correct), n in zip(sums, counts)]


def compute_features(
    run: Run, loader: data.TrainLoader, args: Namespace, end: float, mirrored: bool = False
) -> tuple[Tensor, Tensor]:
    """What the head sees of the training images, not augmented (N, num_features), and their labels.

    Each process computes its share, in random order, until all are done or the time is end by
    time.perf_counter(). Images that are left out are the last of the order.
    """
    generator = torch.Generator().manual_seed(utils.mix_seed(args.seed, 0))
    order = torch.randperm(len(loader.labels), generator=generator)
    missing = -len(order) % loader.world_size
    padding = order[:missing]  # so that each process has as many images
    share = torch.cat([order, padding])[loader.rank :: loader.world_size]
    share = loader.rows[share.to(loader.rows.device)]
    sizes = args.val_batch_size, args.image_size
    plain = data.EvalLoader(loader.images, *sizes, loader.device, share, args.interpolation)
    plain.end, plain.mirrored = end, mirrored
    features = resnet.extract_features(run.model, plain, run.dtype, utils.is_first())
    if loader.world_size > 1:  # only as many as each process has had time for
        counts = utils.gather(torch.tensor(len(features), device=loader.device))
        features = features[: counts.min()]
    features = utils.gather(features)  # (processes, images, num_features)
    features = features.transpose(0, 1).flatten(0, 1)[: len(order)]
    return features, loader.labels[order[: len(features)].to(loader.device)]


def validate(run: Run, loader: data.EvalLoader, labels: Tensor) -> dict[str, float]:
    """val_loss and val_accuracy, means over the images of all processes."""
    utils.broadcast(run.validated.buffers())
    logits = resnet.predict(run.validated, loader, run.dtype, progress=utils.is_first())
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


def close_epoch(run: Run, history: list[dict], metadata: dict, args: Namespace) -> None:
    """Steps the schedule, saves, prints and draws the last epoch of the history."""
    folder = Path(args.checkpoint_dir)
    is_best = finish_epoch(run, history, args)
    utils.save_run(folder, metadata, run.parts(), history, is_best)
    utils.say("epoch", epoch_line(history[-1], args) + ("  best" if is_best else ""))
    run.clock.closed_at = time.perf_counter()
    if args.curves:
        utils.draw_progress(folder, history, args.watch)


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


# ---- the clock of --minutes ---------------------------------------------------------------------


def measure_forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> float:
    """Images per second of a forward pass at 128 px, by all processes, over two seconds."""
    device = next(model.parameters()).device
    images = images[: 32 if device.type == "cpu" else 1024]
    loader = data.EvalLoader(images, 128, 128, device, mode="bicubic")

    def run_once() -> None:
        resnet.predict(model, loader, dtype).sum().item()  # waits for the device

    run_once()  # allocates memory and chooses kernels
    passes, start = 0, time.perf_counter()
    while passes == 0 or time.perf_counter() - start < 2:
        run_once()
        passes += 1
    speed = passes * len(images) / (time.perf_counter() - start)
    return utils.of_rank_0(speed) * utils.this_process().world_size


def choose_settings(
    argv: list[str] | None,
    args: Namespace,
    clock: utils.Clock,
    model: nn.Module,
    precision: str,
    train_split: data.Split,
    val_split: data.Split,
) -> Namespace:
    """The settings of the first line of MINUTES_TABLE that is reached; flags win over it.

    Raises UserError if no line is reached.
    """
    speed = measure_forward(model, train_split.stored, utils.DTYPES[precision])
    seconds, train_images = clock.seconds_left(), len(train_split.labels)
    passes = seconds * speed / train_images
    reached = [line for least, line in MINUTES_TABLE.items() if passes >= least]
    if not reached:
        least_seconds = min(MINUTES_TABLE) * train_images / speed
        minutes = args.minutes + (least_seconds - seconds) / 60
        raise utils.UserError(
            f"--minutes {args.minutes:g} is too short: expected {math.ceil(10 * minutes) / 10:g} "
            "or more on this machine"
        )
    image_size, stages = reached[0]
    settings = dict(MINUTES_SETTINGS)
    settings["IMAGE_SIZE"] = image_size
    settings["FREEZE_STAGES"] = stages
    settings["FREEZE_BATCH_NORM"] = stages > 0
    args = utils.parse_flags(__file__, argv, settings)
    check_combinations(args, utils.this_process().world_size)
    clock.image_seconds = (args.image_size / 128) ** 2 / speed
    most = int(0.2 * seconds / clock.image_seconds)  # a fifth of the time for the validation
    if args.val_images == 0 and most < len(val_split.labels):
        args.val_images = most
    count = f"a forward pass at 128 px could see the training images {passes:.2g} times"
    parts = f"{args.image_size} px, {args.freeze_stages} stages frozen"
    utils.say("chosen", f"{parts}: {count} in the time left")
    return args


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
    if args.minutes and args.schedule == "plateau":
        utils.refuse_flag("schedule", args.schedule, "cosine with --minutes")
    if args.minutes and (args.demo or args.compile or not args.weights):
        expected = "0 with --demo, --compile or without pretrained weights"
        utils.refuse_flag("minutes", args.minutes, expected)
    if not args.epochs and not args.head_epochs:
        utils.refuse_flag("epochs", args.epochs, "1 or more without --head-epochs")
    if args.warmup_epochs and args.schedule == "plateau":
        utils.refuse_flag("warmup_epochs", args.warmup_epochs, "0 with --schedule plateau")
    if args.epochs and args.warmup_epochs >= args.epochs:
        utils.refuse_flag("warmup_epochs", args.warmup_epochs, f"less than {args.epochs} epochs")


def epoch_line(row: dict[str, float], args: Namespace) -> str:
    """The figures of an epoch on one line; with MINUTES, the number of epochs is not known yet."""
    place = f"{row['epoch']}" if args.minutes else f"{row['epoch']}/{args.epochs}"
    return (
        f"{place}  lr {row['learning_rate']:.4g}"
        f"  train loss {row['train_loss']:.4f}, accuracy {100 * row['train_accuracy']:.2f} %"
        f"  validation loss {row['val_loss']:.4f}, accuracy {100 * row['val_accuracy']:.2f} %"
        f"  {row['seconds']:.1f} s  {row['images_per_second']:,.0f} images/s"
    )


def report(run: Run, args: Namespace, history: list[dict]) -> None:
    """Draws the run, and prints why it ended, its best epoch, and the next command."""
    if args.curves:
        utils.draw_progress(Path(args.checkpoint_dir), history, args.watch, at_once=True)
    best = utils.best_epoch(history, args.watch)
    if should_stop(history, args):
        count = epochs_since_best(history, args)
        utils.say("stopped", f"no better validation {args.watch} in {count} epochs")
    elif args.minutes:
        used = (time.perf_counter() - run.clock.begin) / 60
        trained = f"{run.clock.done:.2f} epochs of the network"
        utils.say("finished", f"{used:.2f} of {args.minutes:g} minutes: {trained}")
    else:
        epochs = history[-1]["epoch"]
        utils.say("finished", f"all {epochs} epochs" if epochs else "the head alone")
    figures = f"{100 * best['val_accuracy']:.2f} % (loss {best['val_loss']:.4f})"
    path = Path(args.checkpoint_dir, "best.pt")
    utils.say("best", f"epoch {best['epoch']}: validation accuracy {figures}, {path}")
    flags = Namespace(checkpoint=str(path), data_dir=args.data_dir)
    if args.dataset not in data.BUILT_IN and (args.resume or args.resume_if_saved):
        flags.dataset = args.dataset  # the folder may have moved since best.pt was written
    utils.say("next", utils.command_of(str(Path(__file__).with_name("evaluate.py")), flags))


if __name__ == "__main__":
    with utils.explained_exit(
        "nothing is saved yet", "start again with a lower --batch-size or --image-size"
    ):
        main(begin=start_of_script)
