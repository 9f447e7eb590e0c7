"""The input pipeline, held to torchvision.transforms.v2 and to the official files."""

import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import AUGMENTATION, settings
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

import data
import train
import utils

CPU = torch.device("cpu")


def some_images() -> torch.Tensor:
    """Float (40, 3, 32, 32) in [0, 1]: black, white, gray, one-colour, two-level and random."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 32, 32, generator=generator)
    images[0], images[1], images[2] = 0, 1, 0.5
    images[3:9] = torch.eye(3).repeat(2, 1)[:, :, None, None] * torch.ones(6, 3, 32, 32)
    images[6:9] = 1 - images[6:9]
    images[9] = images[9, :1]
    images[10:20] = images[10:20].round()
    return images


def spread(low: float, high: float) -> torch.Tensor:
    """(40,) values from low to high, the ends and the middle among them, shuffled."""
    values = torch.cat([torch.linspace(low, high, 39), torch.tensor([(low + high) / 2])])
    return values[torch.randperm(40, generator=torch.Generator().manual_seed(1))]


def assert_matches(ours, theirs, images, values, tolerance: float = 1e-4) -> None:
    """ours on the whole batch, and on batches of one, against theirs image by image."""
    expected = torch.stack([theirs(image, value) for image, value in zip(images, values.tolist())])
    torch.testing.assert_close(ours(images, values), expected, rtol=0, atol=tolerance)
    one = ours(images[:1], values[:1])
    torch.testing.assert_close(one, expected[:1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_factors_match_torchvision(name):
    ours, theirs = getattr(data, f"adjust_{name}"), getattr(functional, f"adjust_{name}")
    for seed_values in (spread(0, 2), torch.zeros(40), torch.full((40,), 2.0), torch.ones(40)):
        assert_matches(ours, theirs, some_images(), seed_values)


def test_hue_matches_torchvision():
    for values in (spread(-0.5, 0.5), torch.full((40,), -0.5), torch.full((40,), 0.5)):
        assert_matches(data.adjust_hue, functional.adjust_hue, some_images(), values)


def test_rotation_matches_torchvision():
    def theirs(image, angle):
        return functional.rotate(image, angle, InterpolationMode.BILINEAR)

    angles = spread(-180, 180)
    angles[:3] = torch.tensor([-180.0, 90.0, 180.0])
    assert_matches(data.rotate, theirs, some_images(), angles)


def test_flip_matches_torchvision_exactly():
    images = (some_images() * 255).byte()
    mask = torch.arange(40) % 3 == 0
    expected = torch.stack(
        [functional.horizontal_flip(image) if flip else image for image, flip in zip(images, mask)]
    )
    assert torch.equal(data.flip(images, mask), expected)


@pytest.mark.parametrize("count", [1, 40])
def test_crop_with_padding_matches_torchvision_exactly(count):
    images = (some_images() * 255).byte()[:count]
    top, left = torch.arange(count) % 9, (torch.arange(count) * 2 + 8) % 9
    expected = torch.stack(
        [
            functional.crop(functional.pad(image, [4]), i, j, 32, 32)
            for image, i, j in zip(images, top.tolist(), left.tolist())
        ]
    )
    assert torch.equal(data.crop(images, top, left, 4), expected)


def test_enlarged_boxes_match_torchvision():
    boxes = data.draw_boxes(0.01, 39, 32, torch.Generator().manual_seed(0)).long()
    boxes = torch.cat([boxes, torch.tensor([[0, 0, 32, 32], [31, 0, 1, 1], [3, 5, 1, 32]])])
    images = some_images()[torch.arange(len(boxes)) % 40]
    expected = [
        functional.resized_crop(image, *box, [32, 32], antialias=True)
        for image, box in zip(images, boxes.tolist())
    ]
    ours = data.enlarge(images, boxes.float())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=0, atol=1e-5)


def test_grayscale_matches_torchvision():
    images, mask = (some_images() * 255).byte(), torch.arange(40) % 2 == 0
    expected = images.float() / 255
    expected[mask] = functional.rgb_to_grayscale(expected[mask], 3)
    ours = data.augment(images, {"grayscale": mask}, 0, [0, 1, 2, 3])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_resize_and_normalise_match_torchvision(size, mode):
    images = some_images()
    ours = data.NormalizeAndResize(size, CPU, mode)(images)
    antialias = mode == "bilinear"  # torchvision enlarges with another cubic if it is on
    expected = functional.resize(images, [size, size], InterpolationMode(mode), antialias=antialias)
    expected = functional.normalize(expected, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_whole_augmentation_matches_torchvision_in_its_order():
    """Flip, crops, jitter in the given order, rotation, grayscale: torchvision, image by image."""
    images = (some_images() * 255).byte()
    parameters = data.draw_parameters(
        settings(**AUGMENTATION), 40, 32, torch.Generator().manual_seed(2)
    )
    jitter_order = [2, 0, 3, 1]
    ours = data.augment(images, parameters, 4, jitter_order)
    for i, image in enumerate(images):
        p = {name: values[i].tolist() for name, values in parameters.items()}
        image = functional.horizontal_flip(image) if p["flip"] else image
        image = functional.crop(functional.pad(image, [4]), p["top"], p["left"], 32, 32)
        image = functional.to_dtype(image, torch.float32, scale=True)
        image = functional.resized_crop(image, *map(int, p["box"]), [32, 32])
        for name in ("saturation", "brightness", "hue", "contrast"):
            image = getattr(functional, f"adjust_{name}")(image, p[name])
        image = functional.rotate(image, p["angle"], InterpolationMode.BILINEAR)
        image = functional.rgb_to_grayscale(image, 3) if p["grayscale"] else image
        torch.testing.assert_close(ours[i], image, rtol=0, atol=1e-4)


# ---- the distributions of the parameters --------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "low", "high"), [(0.4, 0.6, 1.4), (1.5, 0.0, 2.5)], ids=["inside", "clipped at 0"]
)
def test_jitter_factors_are_distributed_as_torchvisions(strength, low, high):
    ours = data.draw_parameters(
        settings(brightness=strength), 20_000, 32, torch.Generator().manual_seed(3)
    )
    torch.manual_seed(4)
    jitter = v2.ColorJitter(brightness=strength)
    theirs = [jitter.make_params([])["brightness_factor"] for _ in range(4000)]
    assert low <= ours["brightness"].min() and ours["brightness"].max() <= high
    assert_same_distribution(ours["brightness"], theirs)


def test_hue_and_angle_are_distributed_as_torchvisions():
    ours = data.draw_parameters(
        settings(hue=0.3, rotation=30.0), 20_000, 32, torch.Generator().manual_seed(5)
    )
    torch.manual_seed(6)
    jitter, rotation = v2.ColorJitter(hue=0.3), v2.RandomRotation(30)
    assert_same_distribution(
        ours["hue"], [jitter.make_params([])["hue_factor"] for _ in range(4000)]
    )
    assert_same_distribution(
        ours["angle"], [rotation.make_params([])["angle"] for _ in range(4000)]
    )


@pytest.mark.parametrize("least", [0.08, 0.9])
def test_boxes_are_distributed_as_torchvisions(least):
    ours = data.draw_boxes(least, 20_000, 32, torch.Generator().manual_seed(10))
    torch.manual_seed(11)
    crop, image = v2.RandomResizedCrop(32, (least, 1.0)), [torch.zeros(3, 32, 32)]
    theirs = [crop.make_params(image) for _ in range(4000)]
    for column, name in enumerate(("top", "left", "height", "width")):
        assert_same_distribution(ours[:, column], [drawn[name] for drawn in theirs])
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 32).all()
    taller = (ours[:, 2] - ours[:, 3]).sign()
    assert taller.mean().abs() < 0.03  # as many are taller than wide as wider than tall


def assert_same_distribution(ours, theirs) -> None:
    """Two-sample Kolmogorov-Smirnov by scipy, which scikit-learn brings."""
    from scipy.stats import ks_2samp

    assert ks_2samp(ours.numpy(), np.array(theirs)).pvalue > 0.001


def test_crop_positions_are_uniform_and_reach_every_offset():
    drawn = data.draw_parameters(
        settings(crop_padding=4), 9000, 32, torch.Generator().manual_seed(7)
    )
    for side in ("top", "left"):
        counts = Counter(drawn[side].tolist())
        assert sorted(counts) == list(range(9))
        assert all(abs(count - 1000) < 5 * math.sqrt(1000) for count in counts.values())


def test_flip_and_grayscale_happen_as_often_as_asked():
    drawn = data.draw_parameters(
        settings(flip=0.5, grayscale=0.1), 20_000, 32, torch.Generator().manual_seed(8)
    )
    assert abs(drawn["flip"].float().mean() - 0.5) < 0.02
    assert abs(drawn["grayscale"].float().mean() - 0.1) < 0.01


def test_each_image_gets_parameters_of_its_own():
    drawn = data.draw_parameters(settings(**AUGMENTATION), 64, 32, torch.Generator().manual_seed(9))
    for name in ("brightness", "contrast", "saturation", "hue", "angle"):
        assert len(drawn[name].unique()) == 64


def test_strength_zero_leaves_an_operation_out():
    assert data.draw_parameters(settings(), 5, 32, torch.Generator()) == {}
    images = (some_images() * 255).byte()
    assert torch.equal(data.augment(images, {}, 0, [0, 1, 2, 3]), images.float() / 255)


# ---- loaders ------------------------------------------------------------------------------------


def numbered(count: int) -> data.Split:
    """Images whose label says which one they are."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return data.Split(images, torch.arange(count))


def train_loader(count=50, batch_size=8, seed=0, **place) -> data.TrainLoader:
    args = settings(batch_size=batch_size, seed=seed, **AUGMENTATION)
    return data.TrainLoader(numbered(count), args, **place)


def test_same_seed_and_epoch_give_the_same_batches():
    first, second = list(train_loader().epoch(3)), list(train_loader().epoch(3))
    assert len(first) == len(train_loader()) == 6
    for (images, labels), (same_images, same_labels) in zip(first, second):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


@pytest.mark.parametrize("other", [{"epoch": 4}, {"seed": 1}, {"seed": 4, "epoch": -1}])
def test_another_epoch_or_seed_gives_another_order(other):
    seed, epoch = other.get("seed", 0), other.get("epoch", 3) % 100
    ours = torch.cat([labels for _, labels in train_loader().epoch(3)])
    others = torch.cat([labels for _, labels in train_loader(seed=seed).epoch(epoch)])
    assert not torch.equal(ours, others)


def test_each_training_image_comes_at_most_once_an_epoch():
    labels = torch.cat([labels for _, labels in train_loader(50, 8).epoch(0)])
    assert len(labels) == 48 and len(labels.unique()) == 48


def test_training_drops_the_ragged_batch_and_never_outgrows_the_data():
    assert {len(labels) for _, labels in train_loader(50, 8).epoch(0)} == {8}
    assert [len(labels) for _, labels in train_loader(6, 8).epoch(0)] == [6]
    assert [len(labels) for _, labels in train_loader(5, 8).epoch(0)] == [4]  # whole pairs


def test_processes_share_one_global_batch():
    alone = list(train_loader(50, 8).epoch(1))
    shares = [list(train_loader(50, 8, rank=rank, world_size=2).epoch(1)) for rank in range(2)]
    for (images, labels), (images0, labels0), (images1, labels1) in zip(alone, *shares):
        assert torch.equal(labels, torch.cat([labels0, labels1]))
        torch.testing.assert_close(images, torch.cat([images0, images1]), rtol=0, atol=1e-6)


def test_batches_are_channels_last_at_the_image_size():
    loader = data.TrainLoader(numbered(8), settings(batch_size=4, image_size=64, **AUGMENTATION))
    for images, labels in loader.epoch(0):
        assert images.shape == (4, 3, 64, 64) and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_val_loader_never_shuffles_and_shows_every_image_once():
    images, loader = numbered(10).images, data.EvalLoader(numbered(10).images, 4, 32)
    assert len(loader) == 3 and [len(batch) for batch in loader] == [4, 4, 4]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixels = torch.cat(list(loader)) * std + mean
    torch.testing.assert_close(pixels[:10], images / 255, rtol=0, atol=1e-6)
    assert torch.equal(pixels[10:], pixels[[9, 9]])  # every batch has the same shape


def test_processes_validate_on_every_image_once_with_its_label():
    args, shares = settings(dataset="digits", batch_size=60), []
    for rank in range(3):
        place = utils.Processes(rank=rank, world_size=3)
        train_split, val_split, _ = train.read_data(args, place)
        _, loader, labels = train.make_loaders(args, place, CPU, train_split, val_split)
        assert loader.batch_size == 120
        shares.append(
            {image.numpy().tobytes(): label for image, label in zip(loader.images, labels)}
        )
        assert len(shares[-1]) == len(labels) == len(loader.images) == 120
    test, _ = data.read_digits("test")
    everything = {image.numpy().tobytes(): label for image, label in zip(test.images, test.labels)}
    assert shares[0] | shares[1] | shares[2] == everything and len(everything) == 360


# ---- splits -------------------------------------------------------------------------------------


def test_holdout_is_stratified_disjoint_and_always_the_same():
    labels = torch.arange(100).repeat(500)[torch.randperm(50_000)]
    train, holdout = data.split_per_class(labels, 50)
    assert torch.equal(labels[holdout].bincount(), torch.full((100,), 50))
    assert torch.equal(labels[train].bincount(), torch.full((100,), 450))
    assert len(torch.cat([train, holdout]).unique()) == 50_000
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(data.split_per_class(labels, 50)[1], holdout)


def test_train_per_class_takes_that_many_and_leaves_the_holdout_alone():
    labels = torch.arange(10).repeat(40)
    train, holdout = data.split_per_class(labels, 5, 7)
    assert torch.equal(labels[train].bincount(), torch.full((10,), 7))
    assert torch.equal(holdout, data.split_per_class(labels, 5)[1])
    assert not set(train.tolist()) & set(holdout.tolist())
    rest, _ = data.split_per_class(labels, 5)  # fewer of what is left are the same images
    fewer, _ = data.split_per_class(labels[rest], 0, 7)
    assert torch.equal(rest[fewer], train)


# ---- the data sets ------------------------------------------------------------------------------


def test_official_files_are_read_whole(cifar100_dir):
    (train, classes), (test, _) = (
        data.read_cifar100(cifar100_dir, part) for part in ("train", "test")
    )
    assert train.images.shape == (50_000, 3, 32, 32) and test.images.shape == (10_000, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert torch.equal(train.labels.bincount(), torch.full((100,), 500))
    assert torch.equal(test.labels.bincount(), torch.full((100,), 100))
    with open(Path(cifar100_dir, "cifar-100-python", "test"), "rb") as file:
        official = pickle.load(file, encoding="latin1")
    assert np.array_equal(test.images.numpy().reshape(10_000, -1), official["data"])
    assert test.labels.tolist() == official["fine_labels"]
    with open(Path(cifar100_dir, "cifar-100-python", "meta"), "rb") as file:
        assert classes == pickle.load(file, encoding="latin1")["fine_label_names"]


def test_superclasses_are_those_of_the_official_coarse_labels(cifar100_dir):
    with open(Path(cifar100_dir, "cifar-100-python", "meta"), "rb") as file:
        meta = pickle.load(file, encoding="latin1")
    with open(Path(cifar100_dir, "cifar-100-python", "test"), "rb") as file:
        test = pickle.load(file, encoding="latin1")
    assert list(data.SUPERCLASSES) == meta["coarse_label_names"]
    for fine, coarse in set(zip(test["fine_labels"], test["coarse_labels"])):
        assert (
            meta["fine_label_names"][fine] in data.SUPERCLASSES[meta["coarse_label_names"][coarse]]
        )


def test_superclass_table_names_100_classes_once():
    assert len(data.SUPERCLASSES) == 20
    assert all(len(members) == 5 for members in data.SUPERCLASSES.values())
    assert len(set(data.CLASSES)) == 100 and data.CLASSES == sorted(data.CLASSES)


def test_digits_need_no_files_and_split_stratified():
    (train, classes), (test, _) = data.read_digits("train"), data.read_digits("test")
    assert train.images.shape == (1437, 3, 32, 32) and test.images.shape == (360, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    assert classes == list("0123456789")
    assert all(35 <= count <= 37 for count in test.labels.bincount())
