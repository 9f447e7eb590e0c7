"""evaluate.py --check-data: made copies, near misses, planted faults, files; train.py's line."""

import csv
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import link_run, run_script, settings
from torchvision.models import get_model
from torchvision.transforms.v2 import InterpolationMode, functional

import data
import evaluate
import model as resnet
import train
import utils

CPU = torch.device("cpu")


def shift(images: torch.Tensor, x: int, y: int) -> torch.Tensor:
    padded = functional.pad(images, [6] * 4, padding_mode="edge")
    return padded[..., 6 + y : 38 + y, 6 + x : 38 + x]


def crop(images: torch.Tensor, side: int, x: int = 1, y: int = 2) -> torch.Tensor:
    return functional.resized_crop(images, y, x, side, side, [32, 32], antialias=True)


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    copies = []
    for image in images:
        buffer = BytesIO()
        functional.to_pil_image(image).save(buffer, "JPEG", quality=quality)
        copies.append(functional.pil_to_tensor(Image.open(buffer)))
    return torch.stack(copies)


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    options = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    small = functional.resize(images, [size, size], **options)
    return functional.resize(small, [32, 32], **options)


def add_noise(images: torch.Tensor) -> torch.Tensor:
    noise = 8 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).clamp(0, 255).byte()


# How a copy is made, and the least share of copies whose pixels must agree: what was measured on
# 300 of each kind, minus 6 points.
KINDS = {
    "identical": (lambda x: x.clone(), 1.0),
    "mirrored": (lambda x: x.flip(3), 1.0),
    "shifted by 3": (lambda x: shift(x, 3, -2), 0.94),
    "shifted by 6": (lambda x: shift(x, -6, 4), 0.94),
    "cropped to 29": (lambda x: crop(x, 29), 0.93),
    "cropped to 26": (lambda x: crop(x, 26, 3), 0.94),
    "darker": (lambda x: functional.adjust_brightness(x, 0.7), 0.93),
    "more contrast": (lambda x: functional.adjust_contrast(x, 1.3), 0.94),
    "less saturated": (lambda x: functional.adjust_saturation(x, 0.5), 0.94),
    "other hue": (lambda x: functional.adjust_hue(x, 0.04), 0.94),
    "gray": (lambda x: functional.rgb_to_grayscale(x, 3), 0.94),
    "JPEG 50": (lambda x: jpeg(x, 50), 0.94),
    "JPEG 20": (lambda x: jpeg(x, 20), 0.88),
    "through 16 px": (lambda x: resize(x, 16), 0.90),
    "noise": (add_noise, 0.90),
    "mirrored, cropped, brighter, JPEG 60": (
        lambda x: jpeg(functional.adjust_brightness(crop(x.flip(3), 27), 1.2), 60),
        0.91,
    ),
}


@pytest.fixture(scope="module")
def photos(cifar100_dir) -> data.Split:
    """2,000 training images of CIFAR-100."""
    return data.read_cifar100(cifar100_dir, "train")[0].select(slice(2000))


def compute_features(images: torch.Tensor) -> torch.Tensor:
    """Of a random ResNet-18, so that nothing depends on what a network has learnt."""
    torch.manual_seed(0)
    model = resnet.build_model("resnet18", 10)
    return resnet.extract_features(model, data.EvalLoader(images, 100, 32), torch.float32)


# ---- copies -------------------------------------------------------------------------------------


def test_equal_images_are_grouped_over_all_parts():
    digits = data.read_digits("test")[0].images[:6]
    others = torch.stack([digits[4], digits[0].flip(2), digits[4]])
    darker = digits[1:2] - (digits[1:2] > 200).byte()  # by one in 255
    assert data.find_identical(digits, others, digits[2:3], darker) == [[2, 9], [4, 6, 8]]
    assert data.find_identical(digits) == []


@pytest.mark.parametrize("block", [1, 7, 60, 4096])
def test_blocks_find_what_one_matrix_finds(block):
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(count, 20, generator=generator) for count in (23, 60))
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=2)
    nearest = data.find_nearest(queries, gallery, 11, block)
    assert torch.equal(nearest, cosines.topk(11).indices)
    assert data.find_nearest(queries, gallery[:4], 11, block).shape == (23, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_made_copies_agree(photos, kind):
    make, least = KINDS[kind]
    images = photos.images[:100]
    similarity = torch.cat([data.compare_pixels(make(part), part) for part in images.split(50)])
    assert (similarity > data.COPY_SIMILARITY).float().mean() >= least


def test_pixels_of_other_images_do_not_agree(photos):
    """Random pairs of a class, and the most similar thumbnails of different classes."""
    order = photos.labels.argsort(stable=True)
    first, second = order[:-1], order[1:]
    same_class = photos.labels[first] == photos.labels[second]
    pairs = torch.stack([first[same_class], second[same_class]], 1)[::7]
    assert len(pairs) > 250
    thumbnails = data.make_thumbnails(photos.images)
    nearest = data.find_nearest(thumbnails[:300], thumbnails, 20)
    others = [
        next(j for j in row if photos.labels[j] != photos.labels[i])
        for i, row in enumerate(nearest.tolist())
        if (photos.labels[row] != photos.labels[i]).any()
    ]
    assert len(others) > 280
    near_misses = torch.stack([torch.arange(len(others)), torch.tensor(others)], 1)
    for found, most in (pairs, 0.0), (near_misses, 0.01):
        similarity = torch.cat([data.compare_pixels(*photos.images[x.T]) for x in found.split(50)])
        assert (similarity > data.COPY_SIMILARITY).float().mean() <= most


def test_copies_are_found_among_many_images(photos):
    """10 of each kind among 2,000, by the features of a random network: 82 % were measured."""
    sources = torch.arange(len(KINDS) * 10)
    copies = [
        make(photos.images[chosen]) for (make, _), chosen in zip(KINDS.values(), sources.split(10))
    ]
    images = torch.cat(copies)
    features = compute_features(images), compute_features(photos.images)
    partner, similarity, threshold = data.find_copies(images, photos.images, *features)
    assert threshold == data.COPY_SIMILARITY
    found = (partner == sources) & (similarity > threshold)
    assert found.float().mean() > 0.76
    assert found[:20].all()  # identical and mirrored
    assert ((similarity > threshold) & (partner != sources)).sum() <= 2
    alone = data.find_copies(images[5:6], photos.images, features[0][5:6], features[1])
    assert alone[0].item() == 5 and alone[1].item() == pytest.approx(similarity[5].item(), abs=1e-4)
    noise = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    mirrored = data.find_copies(photos.images[:20].flip(3), photos.images, noise[:20], noise)
    assert mirrored[0].tolist() == list(range(20))  # by their thumbnails


def test_threshold_rises_where_all_images_are_alike():
    test, gallery = (data.read_digits(part)[0].images for part in ("test", "train"))
    test = test[:150]
    thumbnails = data.make_thumbnails(test), data.make_thumbnails(gallery)
    _, similarity, threshold = data.find_copies(test, gallery, *thumbnails)
    assert threshold > 0.9
    assert (similarity > data.COPY_SIMILARITY).float().mean() > 0.5
    assert (similarity > threshold).float().mean() < 0.15


# ---- labels -------------------------------------------------------------------------------------


def test_no_head_predicts_an_image_that_it_trained_on():
    """Each image has a feature of its own, from which alone its random label can be learnt."""
    labels = torch.arange(200) % 4
    probabilities = resnet.predict_out_of_fold(torch.eye(200), labels, 4)
    assert probabilities.sum(1) == pytest.approx(torch.ones(200).numpy(), abs=1e-5)
    assert probabilities[range(200), labels].max() < 0.37


def test_wrong_labels_of_digits_come_first_whatever_the_seed():
    digits = data.read_digits("train")[0].select(slice(1000))
    features, labels = data.make_thumbnails(digits.images), digits.labels.clone()
    labels[::50] = (labels[::50] + torch.arange(20) % 9 + 1) % 10  # 20 of 1,000 are wrong
    torch.manual_seed(1)
    probabilities = resnet.predict_out_of_fold(features, labels, 10)
    own = probabilities[range(1000), labels]
    assert (own.argsort()[:20] % 50 == 0).sum() >= 13
    torch.manual_seed(2)
    assert torch.equal(resnet.predict_out_of_fold(features, labels, 10), probabilities)
    suspects = evaluate.find_suspects(
        "training", digits._replace(labels=labels, files=list("x" * 1000)), probabilities,
        list("0123456789"),
    )  # fmt: skip
    assert [x.probability for x in suspects] == own[own < 0.01].sort().values.tolist()
    best = probabilities[own.argmin()]
    assert suspects[0].likelier_label == str(best.argmax().item())
    assert suspects[0].likelier_probability == best.max().item()


# ---- a folder with planted faults ---------------------------------------------------------------


class Planted(NamedTuple):
    folder: Path  # holds photos/, checkpoints/ and results/
    copies: dict[str, str]  # training picture of each validation picture that is a copy
    wrong: set[str]  # pictures with a wrong label
    trained: str  # what train.py printed
    evaluated: str  # what evaluate.py printed


def plant(folder: Path, read: Callable, make: list[Callable]) -> tuple[dict[str, str], set[str]]:
    """Writes photos/: 800 pictures of ten classes to train on, 180 others and 20 copies in val/.

    Of the 1,000, 20 are in the folder of another class.
    """
    split, classes = read("train")
    chosen = torch.cat([(split.labels == label).nonzero()[:98, 0] for label in range(10)])
    chosen = chosen.view(10, 98)
    pictures = [("train", i, split.images[i]) for i in chosen[:, :80].flatten().tolist()]
    pictures += [("val", i, split.images[i]) for i in chosen[:, 80:].flatten().tolist()]
    for number, i in enumerate(chosen[:, :2].flatten().tolist()):
        pictures.append(("copy", i, make[number % len(make)](split.images[i : i + 1])[0]))
    sources, copies, wrong = {}, {}, set()
    for number, (part, i, image) in enumerate(pictures):
        label, is_wrong = split.labels[i].item(), number % 50 == 25
        label = (label + 1 + number // 50 % 8) % 10 if is_wrong else label
        name = f"{'train' if part == 'train' else 'val'}/{classes[label]}/{number:05}.png"
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        functional.to_pil_image(image).save(folder / "photos" / name)
        if part == "copy":
            copies[name] = sources[i]
        sources[i] = name
        wrong |= {name} if is_wrong else set()
    return copies, wrong


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    """Digits; a copy is identical, mirrored, darker, or has more contrast."""
    folder = tmp_path_factory.mktemp("planted")
    kinds = ("identical", "mirrored", "darker", "more contrast")
    copies, wrong = plant(folder, data.read_digits, [KINDS[kind][0] for kind in kinds])
    (folder / "photos/train/0/00000a.png").write_bytes(b"no picture")  # shifts no name
    (folder / "photos/val/0/00000a.png").write_bytes(b"no picture")
    torch.manual_seed(0)
    torch.save(get_model("resnet18", num_classes=5).state_dict(), folder / "weights.pt")
    flags = ["--dataset", "photos", "--stored-size", "32", "--checkpoint-dir", "checkpoints"]
    flags += ["--architecture", "resnet18", "--weights", "weights.pt", "--precision", "fp32"]
    flags += ["--demo", "--epochs", "0", "--head-epochs", "40"]
    trained = run_script("train.py", *flags, cwd=folder)
    assert trained.status == 0, trained.stderr
    evaluated = run_script("evaluate.py", "--check-data", "--no-show", cwd=folder)
    assert evaluated.status == 0, evaluated.stderr
    return Planted(folder, copies, wrong, trained.stdout, evaluated.stdout)


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_check(folder: Path) -> dict:
    return json.loads((folder / "results/metrics.json").read_text())["data_check"]


def test_planted_copies_are_found_by_name(planted):
    rows = read_csv(planted.folder / "results/duplicates.csv")
    partners = {row["test_image"]: row["training_image"] for row in rows}
    assert sum(partners.get(copy) == source for copy, source in planted.copies.items()) >= 19
    # Many digits are as alike as some copies, but not as most of them.
    assert sum(row["test_image"] in planted.copies for row in rows[:20]) >= 17
    assert len(rows) <= 60
    similarities = [float(row["similarity"]) for row in rows]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[-1] > read_check(planted.folder)["threshold"] > 0.9
    for row in rows:
        labels = [row["test_image"].split("/")[1], row["training_image"].split("/")[1]]
        assert labels == [row["test_label"], row["training_label"]]
        assert row["same_label"] == str(labels[0] == labels[1])


def test_planted_wrong_labels_come_first(planted):
    rows = read_csv(planted.folder / "results/suspect_labels.csv")
    assert [row["part"] for row in rows] == sorted(row["part"] for row in rows)
    found = [row for row in rows if row["image"] in planted.wrong]
    assert len(found) >= 14 and len(rows) <= 30
    training = [row for row in rows if row["part"] == "training"]
    assert all(row["image"] in planted.wrong for row in training[:8])
    for row in rows:
        folder, label, _ = row["image"].split("/")
        assert folder == {"test": "val", "training": "train"}[row["part"]]
        assert row["label"] == label != row["likelier_label"]
        assert float(row["probability"]) < 0.01 < float(row["likelier_probability"])


def test_every_name_is_that_of_its_picture(planted):
    """A picture that cannot be read comes before all others."""
    listing, _ = data.list_pictures(planted.folder / "photos/val")
    place = settings(stored_size=32, data_dir=str(planted.folder / "data"))
    split = data.load(listing, "val", place)
    rows = read_csv(planted.folder / "results/predictions.csv")
    assert [row["file"] for row in rows] == list(split.files) and len(rows) == 200
    for name, image, row in zip(split.files, split.images, rows):
        assert torch.equal(data.read_picture(planted.folder / "photos" / name, 32), image)
        assert name.split("/")[1] == row["label"]
    chosen = split.select(split.labels == 3)
    assert set(chosen.files) == {name for name in split.files if name.startswith("val/3/")}


def test_accuracy_without_copies_is_that_of_the_other_rows(planted):
    check, rows = read_check(planted.folder), read_csv(planted.folder / "results/predictions.csv")
    copies = {x["test_image"] for x in read_csv(planted.folder / "results/duplicates.csv")}
    hits = {row["file"]: row["label"] == row["predicted"] for row in rows}
    rest = [hit for name, hit in hits.items() if name not in copies]
    assert check["without_copies"]["top1_accuracy"] == pytest.approx(np.mean(rest))
    low, high = check["without_copies"]["interval_95"]
    assert low < np.mean(rest) < high
    assert check["accuracy_on_copies"] == pytest.approx(np.mean([hits[x] for x in copies]))
    assert (check["copies"], check["images_trained_on"]) == (len(copies), 800)
    for line in [
        f"copies   {len(copies)} of 200 test images have a near-duplicate among the 800 images ",
        f"without  top-1 {100 * np.mean(rest):.2f} % on the other {len(rest)}, 95 % interval ",
        "suspect  {test} test and {training} training labels".format(**check["suspect_labels"]),
        f"note     copies are those with a similarity above {check['threshold']:.3f}",
    ]:
        assert line in planted.evaluated


def test_equal_pictures_are_named_by_both_scripts(planted):
    identical = {copy: x for copy, x in planted.copies.items() if int(copy[-9:-4]) % 4 == 0}
    groups = read_check(planted.folder)["identical"]
    assert len(identical) == 5
    assert {test[1]: training[1] for test, training in groups} == identical
    assert {image[0] for group in groups for image in group} == {"test", "training"}
    assert "exact    5 groups of equal images, 5 in both parts" in planted.evaluated
    (line,) = re.findall("note     5 of 200 validation pictures are .*", planted.trained)
    copy, source = re.search("pixel for pixel: (.*) is (.*), for example", line).groups()
    assert identical[copy] == source


def test_pictures_show_the_pairs_and_the_suspects(planted):
    for name in ("duplicates", "suspect_labels"):
        with Image.open(planted.folder / f"results/{name}.png") as picture:
            picture.load()
            assert min(picture.size) > 250


# ---- a checkpoint of part of the training images ------------------------------------------------


@pytest.fixture(scope="module")
def classifier(finished_run) -> evaluate.Classifier:
    """Of the demo, trained on four digits per class and validated on two others."""
    flags = ["--checkpoint", str(finished_run / "demo/best.pt")]
    return evaluate.Classifier(utils.parse_flags(evaluate.__file__, flags))


def test_images_checked_are_those_trained_on_by_their_official_index(classifier):
    args = utils.parse_flags(evaluate.__file__, [])
    split, _ = evaluate.read_part(classifier, args, "train")
    trained, held_out, _ = data.read_splits(
        settings(dataset="digits", train_per_class=4, holdout_per_class=2)
    )
    assert torch.equal(split.images, trained.images) and torch.equal(split.labels, trained.labels)
    official, _ = data.read_digits("train")
    assert torch.equal(official.images[[int(name) for name in split.files]], split.images)
    held_out = {image.numpy().tobytes() for image in held_out.images}
    assert not held_out & {image.numpy().tobytes() for image in split.images}


def test_demo_is_checked_and_compared_from_end_to_end(finished_run, tmp_path):
    link_run(finished_run, tmp_path)
    flags = ["--checkpoint", "demo/best.pt", "--no-show"]
    assert run_script("evaluate.py", *flags, "--results-dir", "other", cwd=tmp_path).status == 0
    rows = (tmp_path / "other/predictions.csv").read_text().splitlines()
    assert rows[0] == "index,label,predicted,confidence"  # no file names
    spoil_predictions(tmp_path / "other", range(0, 360, 3))
    flags += ["--check-data", "--compare", "other"]
    script = run_script("evaluate.py", *flags, cwd=tmp_path)
    assert script.status == 0 and not script.stderr, script.stderr

    check = read_check(tmp_path)
    copies = read_csv(tmp_path / "results/duplicates.csv")
    assert check["images_trained_on"] == 40 and check["copies"] == len(copies)
    copied = {int(row["test_image"]) for row in copies}
    this, other = (
        [
            row["label"] == row["predicted"]
            for row in read_csv(tmp_path / name / "predictions.csv")
            if int(row["index"]) not in copied
        ]
        for name in ("results", "other")
    )
    paired = check["without_copies"]["comparison"]
    assert paired["only_this_correct"] == sum(a > b for a, b in zip(this, other)) > 0
    assert paired["difference"] == pytest.approx(np.mean(this) - np.mean(other))
    change = f"change   {100 * paired['difference']:+.2f} points without copies, paired"
    assert change in script.stdout
    assert "note     no file of weights '': the network's own features" in script.stdout


def spoil_predictions(folder: Path, indices: range) -> None:
    """Makes some predictions wrong, in both files."""
    rows, metrics = read_csv(folder / "predictions.csv"), folder / "metrics.json"
    for index in indices:
        rows[index]["predicted"] = str((int(rows[index]["label"]) + 1) % 10)
    lines = [",".join(row.values()) for row in [dict(zip(rows[0], rows[0])), *rows]]
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    accuracy = np.mean([row["label"] == row["predicted"] for row in rows])
    summary = json.loads(metrics.read_text()) | {"top1_accuracy": accuracy}
    metrics.write_text(json.dumps(summary))


def test_features_are_those_of_the_weights_that_training_began_with(classifier, tmp_path, capsys):
    own = classifier.model.state_dict()
    weights = get_model("resnet50").state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    torch.save({"model": own, "classes": list("0123456789")}, tmp_path / "best.pt")
    for name, expected in (("weights.pth", weights), ("best.pt", own)):
        constants = classifier.constants | {"weights": str(tmp_path / name)}
        stand_in = Namespace(**vars(classifier) | {"constants": constants})
        network = evaluate.load_initial_network(stand_in)
        assert network is not classifier.model and not capsys.readouterr().out
        loaded = network.state_dict()
        assert all(
            torch.equal(loaded[key], x) for key, x in expected.items() if not key.startswith("fc")
        )
    assert evaluate.load_initial_network(classifier) is classifier.model
    assert "no file of weights ''" in capsys.readouterr().out


def test_torchvision_weights_are_found_where_torchvision_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    requested = []
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda url, path, *rest, **options: requested.append(path),
    )
    with pytest.raises(resnet.WeightsError):  # because nothing is written
        resnet.download_weights("resnet18", "IMAGENET1K_V1")
    assert requested == [str(resnet.find_weights("resnet18", "IMAGENET1K_V1"))]
    assert resnet.find_weights("resnet18", "data/mine.pth") == Path("data/mine.pth")


# ---- folders that have changed; nothing to report -----------------------------------------------


def test_other_training_pictures_are_one_message(planted, tmp_path):
    shutil.copytree(planted.folder, tmp_path, dirs_exist_ok=True)
    next((tmp_path / "photos/train/3").iterdir()).unlink()
    script = run_script("evaluate.py", "--check-data", "--no-show", cwd=tmp_path)
    assert script.status == 1 and "photos is not what checkpoints/best.pt was tr" in script.stderr
    assert "top-1" not in script.stdout  # before the network runs


def test_training_on_a_folder_without_copies_says_nothing_of_them(capsys):
    digits = data.read_digits("train")[0]
    named = digits._replace(files=[f"{index}.png" for index in range(len(digits.labels))])
    twice = named.select(torch.tensor([*range(100), 7]))  # within the training pictures only
    train.warn_of_copies(twice, named.select(slice(100, 150)))
    assert not capsys.readouterr().out
    train.warn_of_copies(named.select(slice(100)), named.select(slice(98, 150)))
    line = "note     2 of 52 validation pictures are training pictures too, pixel for pixel: "
    assert capsys.readouterr().out == f"{line}98.png is 98.png, for example\n"


def test_any_file_names_can_be_compared_and_an_earlier_check_is_removed(planted, tmp_path):
    shutil.copytree(planted.folder, tmp_path, dirs_exist_ok=True)
    one, two, three = sorted((tmp_path / "photos/val/4").iterdir())[:3]
    one.rename(one.with_name("0, a #1 'b'.png"))
    two.rename(two.with_name('0 "c".png'))
    os.rename(os.fsencode(three), os.fsencode(three.parent) + b"/00 caf\xe9.png")
    shutil.copytree(tmp_path / "results", tmp_path / "before")
    for flags in (["--results-dir", "before"], ["--compare", "before"]):
        script = run_script("evaluate.py", "--no-show", *flags, cwd=tmp_path)
        assert script.status == 0, script.stderr
    with open(tmp_path / "results/predictions.csv", errors="surrogateescape", newline="") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    for name in ("0, a #1 'b'.png", '0 "c".png', os.fsdecode(b"00 caf\xe9.png")):
        assert f"val/4/{name}" in names
    for results in ("before", "results"):  # what the first check left is gone
        files = {path.stem for path in (tmp_path / results).iterdir()}
        assert "predictions" in files and not files & {"duplicates", "suspect_labels"}
        assert "data_check" not in json.loads((tmp_path / results / "metrics.json").read_text())
