"""The input pipeline, held to torchvision.transforms.v2 and to the official files."""

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp  # scikit-learn brings scipy
from scripts import AUGMENTATION, settings
from torchvision.datasets import CIFAR100
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

import data
import utils

CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def some_images() -> torch.Tensor:
    """Float (40, 3, 32, 32) in [0, 1]: black, white, gray, one-colour, two-level and random."""
    images = torch.rand(40, 3, 32, 32, generator=seeded(0))
    images[0], images[1], images[2] = 0, 1, 0.5
    images[3:9] = torch.eye(3).repeat(2, 1)[:, :, None, None]
    images[6:9] = 1 - images[6:9]
    images[9] = images[9, :1]
    images[10:20] = images[10:20].round()
    return images


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- augmentation, image by image ---------------------------------------------------------------


def rotate(image: torch.Tensor, angle: float) -> torch.Tensor:
    return functional.rotate(image, angle, InterpolationMode.BILINEAR)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (data.adjust_brightness, functional.adjust_brightness, 0, 2),
        (data.adjust_contrast, functional.adjust_contrast, 0, 2),
        (data.adjust_saturation, functional.adjust_saturation, 0, 2),
        (data.adjust_hue, functional.adjust_hue, -0.5, 0.5),
        (data.rotate, rotate, -180, 180),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_operation_matches_torchvision_at_every_strength(ours, theirs, low, high):
    """At both ends and in the middle for every image, and each image at one of its own."""
    spread = torch.linspace(low, high, 41)[torch.randperm(40, generator=seeded(1))]
    quarter = low + (high - low) * 3 / 4
    for values in spread, *(torch.full((40,), x) for x in (low, (low + high) / 2, quarter, high)):
        expected = [theirs(*pair) for pair in zip(some_images(), values.tolist())]
        result = ours(some_images(), values)
        torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-4)


def test_enlarged_boxes_match_torchvision():
    boxes = data.draw_boxes(0.01, 37, 32, seeded(0)).long()
    boxes = torch.cat([boxes, torch.tensor([[0, 0, 32, 32], [31, 0, 1, 1], [3, 5, 1, 32]])])
    expected = [
        functional.resized_crop(image, *box, [32, 32], antialias=True)
        for image, box in zip(some_images(), boxes.tolist())
    ]
    ours = data.enlarge(some_images(), boxes.float())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 40])
def test_whole_augmentation_matches_torchvision_in_its_order(count):
    """Flip, crops, jitter in the given order, rotation, grayscale: torchvision, image by image."""
    images = (some_images() * 255).byte().flip(0)[:count]
    parameters = data.draw_parameters(settings(**AUGMENTATION), count, 32, seeded(2))
    ours = data.augment(images, parameters, 4, [2, 0, 3, 1])
    for i, image in enumerate(images):
        p = {name: values[i].tolist() for name, values in parameters.items()}
        image = functional.horizontal_flip(image) if p["flip"] else image
        image = functional.crop(functional.pad(image, [4]), p["top"], p["left"], 32, 32)
        image = functional.to_dtype(image, torch.float32, scale=True)
        image = functional.resized_crop(image, *map(int, p["box"]), [32, 32])
        for name in ("saturation", "brightness", "hue", "contrast"):
            image = getattr(functional, f"adjust_{name}")(image, p[name])
        image = rotate(image, p["angle"])
        image = functional.rgb_to_grayscale(image, 3) if p["grayscale"] else image
        torch.testing.assert_close(ours[i], image, rtol=0, atol=1e-4)


def test_strength_zero_leaves_an_operation_out():
    assert data.draw_parameters(settings(), 5, 32, torch.Generator()) == {}
    images = (some_images() * 255).byte()
    assert torch.equal(data.augment(images, {}, 0, [0, 1, 2, 3]), images.float() / 255)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_resize_and_normalise_match_torchvision(size, mode):
    images = some_images()[::4]
    ours = data.NormalizeAndResize(size, CPU, mode)(images)
    antialias = mode == "bilinear"  # torchvision enlarges with another cubic if it is on
    expected = functional.resize(images, [size, size], InterpolationMode(mode), antialias=antialias)
    expected = functional.normalize(expected, MEAN, STD)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


# ---- the distributions of the parameters --------------------------------------------------------


def draw(count: int = 20_000, **strengths: float) -> dict[str, torch.Tensor]:
    return data.draw_parameters(settings(**strengths), count, 32, seeded(3))


def assert_same_distribution(ours, theirs: list[float]) -> None:
    assert ks_2samp(ours.numpy(), np.array(theirs)).pvalue > 0.001


@pytest.mark.parametrize(
    ("name", "strength", "drawn"),
    [
        ("brightness", 0.4, "brightness_factor"),
        ("brightness", 1.5, "brightness_factor"),  # factors from 0 on
        ("contrast", 0.4, "contrast_factor"),
        ("saturation", 0.4, "saturation_factor"),
        ("hue", 0.3, "hue_factor"),
        ("rotation", 30.0, "angle"),
    ],
)
def test_strengths_are_distributed_as_torchvisions(name, strength, drawn):
    torch.manual_seed(4)
    theirs = v2.RandomRotation(30) if drawn == "angle" else v2.ColorJitter(**{name: strength})
    ours = draw(**{name: strength})["angle" if drawn == "angle" else name]
    assert_same_distribution(ours, [theirs.make_params([])[drawn] for _ in range(3000)])


@pytest.mark.parametrize("least", [0.08, 0.9])
def test_boxes_are_distributed_as_torchvisions(least):
    ours = draw(random_scale=least)["box"]
    torch.manual_seed(11)
    crop, image = v2.RandomResizedCrop(32, (least, 1.0)), [torch.zeros(3, 32, 32)]
    theirs = [crop.make_params(image) for _ in range(3000)]
    for column, name in enumerate(("top", "left", "height", "width")):
        assert_same_distribution(ours[:, column], [drawn[name] for drawn in theirs])
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 32).all()
    taller = (ours[:, 2] - ours[:, 3]).sign()
    assert taller.mean().abs() < 0.03  # as many are taller than wide as wider than tall


def test_flips_crops_and_grayscale_happen_as_often_as_asked():
    drawn = draw(flip=0.5, grayscale=0.1, crop_padding=4)
    assert abs(drawn["flip"].float().mean() - 0.5) < 0.02
    assert abs(drawn["grayscale"].float().mean() - 0.1) < 0.01
    for side in ("top", "left"):
        counts = drawn[side].bincount()
        assert len(counts) == 9 and chisquare(counts.numpy()).pvalue > 0.001


# ---- loaders ------------------------------------------------------------------------------------


def numbered(count: int) -> data.Split:
    """Images whose label says which one they are."""
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=seeded(0))
    return data.Split(images, torch.arange(count))


def epoch_of(epoch: int, count: int = 50, place: tuple = (), **changes) -> list[tuple]:
    """The batches of one epoch, of 8 images by default."""
    args = settings(**{"batch_size": 8} | AUGMENTATION | changes)
    return list(data.TrainLoader(numbered(count), args, *place).epoch(epoch))


def test_seed_and_epoch_decide_the_batches():
    batches, again = epoch_of(3, image_size=40), epoch_of(3, image_size=40)
    for (images, labels), (same_images, same_labels) in zip(batches, again, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
        assert images.shape == (8, 3, 40, 40) and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
    order = torch.cat([labels for _, labels in batches]).tolist()
    for seed, epoch in (0, 4), (1, 3), (1, 2):
        other = torch.cat([labels for _, labels in epoch_of(epoch, seed=seed)]).tolist()
        assert len(other) == len(set(other)) == 48  # of 50 images, none twice
        assert other != order


@pytest.mark.parametrize(("count", "sizes"), [(50, [8] * 6), (6, [6]), (5, [4])])
def test_batches_are_whole_never_larger_than_the_data_and_even(count, sizes):
    assert [len(labels) for _, labels in epoch_of(0, count)] == sizes


def test_processes_share_one_global_batch():
    shares = epoch_of(1, place=(0, 2)), epoch_of(1, place=(1, 2))
    for (images, labels), *halves in zip(epoch_of(1), *shares, strict=True):
        half_images, half_labels = map(torch.cat, zip(*halves))
        assert torch.equal(labels, half_labels)
        torch.testing.assert_close(images, half_images, rtol=0, atol=1e-6)


def test_val_loader_never_shuffles_and_shows_every_image_once():
    images, loader = numbered(10).images, data.EvalLoader(numbered(10).images, 4, 32)
    assert len(loader) == 3 and [len(batch) for batch in loader] == [4, 4, 4]
    expected = functional.normalize(images / 255, MEAN, STD)
    batches = torch.cat(list(loader))
    torch.testing.assert_close(batches[:10], expected, rtol=0, atol=1e-5)
    assert torch.equal(batches[10:], batches[[9, 9]])  # every batch has the same shape


def test_loaders_show_the_images_of_a_selection_without_copying_it():
    whole, chosen = numbered(50), torch.arange(49, 6, -3)
    split = whole.select(whole.labels > 3).select(chosen - 4)
    assert split.stored is whole.stored and torch.equal(split.labels, chosen)
    expected = functional.normalize(whole.stored / 255, MEAN, STD)
    for images, labels in data.TrainLoader(split, settings(batch_size=8)).epoch(1):
        torch.testing.assert_close(images, expected[labels], rtol=0, atol=1e-5)
        assert len({*labels.tolist()} & {*chosen.tolist()}) == 8
    batches = torch.cat(list(data.EvalLoader(split.stored, 4, 32, rows=split.rows)))
    torch.testing.assert_close(batches[: len(chosen)], expected[chosen], rtol=0, atol=1e-5)
    assert torch.equal(split.images, whole.images[chosen])
    assert torch.equal(split.image(2), whole.image(43))
    assert split.select(slice(5, 6)).images.equal(whole.images[[34]])


def test_on_a_device_there_are_only_the_images_of_a_selection():
    device = torch.device("meta")
    for split, count in ((numbered(50), 50), (numbered(5000).select(slice(7, 3000)), 2993)):
        placed = split.to(device)
        assert placed.stored.shape == (count, 3, 32, 32) and placed.rows.shape == (count,)
        assert {placed.stored.device, placed.labels.device, placed.rows.device} == {device}


def test_processes_validate_on_every_image_once_with_its_label():
    args, shares = settings(dataset="digits", batch_size=60), []
    for rank in range(3):
        place = utils.Processes(rank=rank, world_size=3)
        train_split, val_split, _ = data.read_data(args, place)
        _, loader, labels = data.make_loaders(args, place, CPU, train_split, val_split)
        assert loader.batch_size == len(labels) == len(loader.rows) == 120
        images = loader.images[loader.rows]
        shares += [(x.numpy().tobytes(), label) for x, label in zip(images, labels.tolist())]
    test, _ = data.read_digits("test")
    everything = [
        (x.numpy().tobytes(), label) for x, label in zip(test.images, test.labels.tolist())
    ]
    assert sorted(shares) == sorted(everything)


# ---- splits -------------------------------------------------------------------------------------


def test_splits_are_stratified_disjoint_and_always_the_same():
    labels = torch.arange(100).repeat(500)[torch.randperm(50_000)]
    rest, holdout = data.split_per_class(labels, 50)
    assert torch.equal(labels[holdout].bincount(), torch.full((100,), 50))
    assert torch.equal(torch.cat([rest, holdout]).sort().values, torch.arange(50_000))
    torch.manual_seed(1)
    np.random.seed(1)
    few, same_holdout = data.split_per_class(labels, 50, 7)
    assert torch.equal(same_holdout, holdout)
    assert torch.equal(labels[few].bincount(), torch.full((100,), 7))
    # Those few can be drawn in a second step, too, so none is held out.
    assert torch.equal(rest[data.split_per_class(labels[rest], 0, 7)[0]], few)


# ---- the data sets ------------------------------------------------------------------------------


def test_official_files_are_read_whole(cifar100_dir):
    test_file, meta_file = (
        pickle.loads(Path(cifar100_dir, "cifar-100-python", name).read_bytes(), encoding="latin1")
        for name in ("test", "meta")
    )
    train_split, classes = data.read_cifar100(cifar100_dir, "train")
    assert train_split.images.shape == (50_000, 3, 32, 32)
    assert train_split.images.dtype == torch.uint8 and train_split.labels.dtype == torch.int64
    assert torch.equal(train_split.labels.bincount(), torch.full((100,), 500))
    test_split, _ = data.read_cifar100(cifar100_dir, "test")
    assert np.array_equal(test_split.images.numpy().reshape(10_000, -1), test_file["data"])
    assert test_split.labels.tolist() == test_file["fine_labels"]
    assert classes == meta_file["fine_label_names"]
    coarse = meta_file["coarse_label_names"]
    assert list(data.SUPERCLASSES) == coarse
    for fine_label, coarse_label in zip(test_file["fine_labels"], test_file["coarse_labels"]):
        assert classes[fine_label] in data.SUPERCLASSES[coarse[coarse_label]]


def test_data_dir_may_be_the_folder_of_the_official_files_itself(cifar100_dir, monkeypatch):
    monkeypatch.setattr(data, "URLS", [])
    folder = str(Path(cifar100_dir, "cifar-100-python"))
    data.fetch_cifar100(folder)
    (ours, _), (expected, _) = (data.read_cifar100(x, "test") for x in (folder, cifar100_dir))
    assert torch.equal(ours.images, expected.images) and torch.equal(ours.labels, expected.labels)


def test_official_archive_in_data_dir_is_unpacked_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "URLS", ["http://127.0.0.1:9/nothing-listens-here"])
    sums = {}
    for name in ("train", "test", "meta"):
        (tmp_path / name).write_text(f"the file {name}")
        sums[name] = hashlib.md5((tmp_path / name).read_bytes()).hexdigest()
    archive = tmp_path / "data/cifar-100-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as packed:
        for name in sums:
            packed.add(tmp_path / name, f"cifar-100-python/{name}")
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    with pytest.raises(utils.UserError, match=f"{archive} is damaged: its md5 is not the official"):
        data.fetch_cifar100(str(archive.parent))
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    data.fetch_cifar100(str(archive.parent))
    for name in sums:
        unpacked = archive.parent / "cifar-100-python" / name
        assert unpacked.read_bytes() == (tmp_path / name).read_bytes()
    assert {x.name for x in archive.parent.glob("[!.]*")} == {"cifar-100-python", archive.name}


def test_superclass_table_names_100_classes_once():
    assert [len(members) for members in data.SUPERCLASSES.values()] == [5] * 20
    assert len(set(data.CLASSES)) == 100 and data.CLASSES == sorted(data.CLASSES)


def test_digits_need_no_files_and_split_stratified():
    (train_split, classes), (test_split, _) = map(data.read_digits, ("train", "test"))
    assert train_split.images.shape == (1437, 3, 32, 32)
    assert test_split.images.shape == (360, 3, 32, 32)
    assert train_split.images.dtype == torch.uint8 and train_split.images.max() == 255
    assert classes == list("0123456789")
    assert all(35 <= count <= 37 for count in test_split.labels.bincount())


def test_mirrored_images_are_those_of_the_evaluation_left_to_right():
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    loader, mirrored = data.EvalLoader(images, 2, 8), data.EvalLoader(images.flip(3), 2, 8)
    loader.mirrored = True
    for ours, expected in zip(loader, mirrored, strict=True):
        assert torch.equal(ours, expected)
