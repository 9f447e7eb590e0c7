"""evaluate.py --check-data: made copies, near misses, planted faults; and train.py's line."""

import os
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd  # seaborn brings it
import pytest
import torch
from PIL import Image
from scripts import Script, read_json, run_script, settings
from torchvision.models import get_model
from torchvision.transforms.v2 import InterpolationMode, functional

import data
import evaluate
import model as resnet
import utils


def shift(images: torch.Tensor) -> torch.Tensor:
    return functional.pad(images, [6] * 4, padding_mode="edge")[..., 10:42, :32]


def crop(images: torch.Tensor, side: int, x: int = 1) -> torch.Tensor:
    return functional.resized_crop(images, 2, x, side, side, [32, 32])


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    copies = []
    for image in images:
        buffer = BytesIO()
        functional.to_pil_image(image).save(buffer, "JPEG", quality=quality)
        copies.append(functional.pil_to_tensor(Image.open(buffer)))
    return torch.stack(copies)


def shrink(images: torch.Tensor) -> torch.Tensor:
    small = functional.resize(images, [16, 16], InterpolationMode.BICUBIC)
    return functional.resize(small, [32, 32], InterpolationMode.BICUBIC)


def add_noise(images: torch.Tensor) -> torch.Tensor:
    noise = 8 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).clamp(0, 255).byte()


# How a copy is made, and the least share of copies whose pixels must agree: what was measured on
# 300 of each kind, minus 6 points.
KINDS = {
    "identical": (lambda x: x.clone(), 1.0),
    "mirrored": (lambda x: x.flip(3), 1.0),
    "shifted by 6": (shift, 0.94),
    "cropped to 29": (lambda x: crop(x, 29), 0.93),
    "cropped to 26": (lambda x: crop(x, 26, 3), 0.94),
    "darker": (lambda x: functional.adjust_brightness(x, 0.7), 0.93),
    "more contrast": (lambda x: functional.adjust_contrast(x, 1.3), 0.94),
    "other hue": (lambda x: functional.adjust_hue(x, 0.04), 0.94),
    "gray": (lambda x: functional.rgb_to_grayscale(x, 3), 0.94),
    "JPEG 20": (lambda x: jpeg(x, 20), 0.88),
    "through 16 px": (shrink, 0.90),
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


# ---- copies -------------------------------------------------------------------------------------


def test_equal_images_are_grouped_over_all_parts():
    digits = data.read_digits("test")[0].images[:6]
    others = torch.stack([digits[4], digits[0].flip(2), digits[4]])
    darker = digits[1:2] - (digits[1:2] > 200).byte()  # by one in 255
    parts = [data.Split(x, torch.zeros(len(x))) for x in (digits, others, digits[2:3], darker)]
    assert data.find_identical(*parts) == [[2, 9], [4, 6, 8]]
    assert data.find_identical(parts[0]) == []
    collisions = [replace(part, checksums=[7] * len(part.labels)) for part in parts]
    assert data.find_identical(*collisions) == [[2, 9], [4, 6, 8]]


def test_nearest_are_those_with_the_highest_cosine():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(count, 20, generator=generator) for count in (23, 60))
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=2)
    assert torch.equal(data.find_nearest(queries, gallery, 11), cosines.topk(11).indices)
    assert data.find_nearest(queries, gallery[:4], 11).shape == (23, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_made_copies_agree(photos, kind):
    make, least = KINDS[kind]
    images = photos.images[:100]
    similarity = data.compare_pixels(make(images), images)
    assert (similarity > data.COPY_SIMILARITY).float().mean() >= least


def test_pixels_of_other_images_do_not_agree(photos):
    """Neighbours in a class, and images with the most similar thumbnail of another class."""
    labels = photos.labels
    order = labels.argsort(stable=True)
    same_class = torch.stack([order[:-1], order[1:]], 1)[labels[order[:-1]] == labels[order[1:]]]
    thumbnails = data.make_thumbnails(photos, torch.device("cpu"))
    cosines = (
        torch.nn.functional.normalize(thumbnails) @ torch.nn.functional.normalize(thumbnails).T
    )
    cosines[labels[:, None] == labels] = -1
    other_class = torch.stack([torch.arange(2000), cosines.argmax(1)], 1)
    for pairs in same_class[::7], other_class[::7]:
        assert len(pairs) > 250
        first, second = photos.images[pairs].unbind(1)
        assert data.compare_pixels(first, second).max() < data.COPY_SIMILARITY


def test_copies_are_found_among_many_images(photos):
    """10 of each kind among 2,000, by features that nothing has been learnt for."""
    sources = torch.arange(len(KINDS) * 10)
    parts = photos.images[sources].split(10)
    images = torch.cat([make(part) for (make, _), part in zip(KINDS.values(), parts)])
    torch.manual_seed(0)
    network = resnet.build_model("resnet18", 10)
    features, other_features = (
        resnet.extract_features(network, data.EvalLoader(x, 100, 32), torch.float32)
        for x in (images, photos.images)
    )
    partner, similarity, alike = data.find_copies(
        as_split(images), photos, features, other_features
    )
    assert alike <= data.MAX_ALIKE
    copied = similarity > data.COPY_SIMILARITY
    found = (partner == sources) & copied
    assert found.float().mean() > 0.76
    assert found[:20].all()  # identical and mirrored
    assert (copied & (partner != sources)).sum() <= 2
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    shuffled = data.find_copies(
        as_split(images).select(order[:20] % 20),
        photos.select(order),
        features[order[:20] % 20],
        other_features[order],
    )
    assert torch.equal(order[shuffled[0]], order[:20] % 20)
    alone = data.find_copies(as_split(images[5:6]), photos, features[5:6], other_features)
    assert alone[0].item() == 5 and alone[1].item() == pytest.approx(similarity[5].item(), abs=1e-4)
    noise = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    mirrored = data.find_copies(as_split(photos.images[:20].flip(3)), photos, noise[:20], noise)
    assert mirrored[0].tolist() == list(range(20))  # by their thumbnails


def as_split(images: torch.Tensor) -> data.Split:
    return data.Split(images, torch.zeros(len(images)).long())


def make_textures(count: int, seed: int = 0) -> torch.Tensor:
    """Images uint8 (N, 3, 40, 40) of smooth gray noise: no two are alike."""
    noise = torch.rand(count, 1, 20, 20, generator=torch.Generator().manual_seed(seed))
    smooth = functional.resize(noise, [40, 40], InterpolationMode.BICUBIC).clamp(0, 1)
    return (255 * smooth).byte().expand(-1, 3, -1, -1)


@pytest.mark.parametrize(("frames", "undecided"), [(6, False), (10, False), (14, True), (20, True)])
def test_frames_of_a_scene_are_copies_or_said_to_be_undecided(frames, undecided):
    """Jittered frames of 20 scenes, three of four to train on; never "1 of 200 are copies"."""
    generator = torch.Generator().manual_seed(1)
    images = []
    for scene in make_textures(20):
        for x, y in torch.randint(6, (frames, 2), generator=generator).tolist():
            images.append(scene[:, y : y + 32, x : x + 32])
    images = add_noise(torch.stack(images))
    is_test = torch.arange(len(images)) % 4 == 3
    test, train = images[is_test], images[~is_test]
    scenes = torch.eye(20).repeat_interleave(frames, 0)
    features = scenes + 0.1 * torch.randn(scenes.shape, generator=generator)
    features = features[is_test], features[~is_test]
    _, similarity, alike = data.find_copies(as_split(test), as_split(train), *features)
    assert (similarity > data.COPY_SIMILARITY).float().mean() > 0.97
    assert (alike > data.MAX_ALIKE) == undecided


def test_what_is_not_decided_has_no_accuracy_without_copies():
    labels = np.arange(10) % 2
    result = evaluate.Result(["a", "b"], labels, labels * 0, np.ones(10), "", {})
    copied = np.arange(10) < 6  # three of them right, two of the other four
    facts = {"identical": [], "copies": 6, "test_images": 10, "images_trained_on": 30}
    facts |= {"copies_with_another_label": 0, "threshold": 0.75, "alike": 0.5, "undecided": True}
    facts |= {"suspect_labels": {"test": 0, "training": 1}, "classes_too_small_to_judge": ["b"]}
    check = evaluate.DataCheck(facts, copied, [], [])
    assert evaluate.score_without_copies(check, result, [result]) == {}
    lines = [f"{label}: {text}" for label, text in evaluate.describe_check(check)]
    assert lines[1].startswith("copies: undecided: 6 of 10 test images have a training image with ")
    assert "; for 50.0 % even the 11th nearest is that similar" in lines[1]
    assert not [line for line in lines if line.startswith("without")]
    assert "note: training labels of 1 classes with fewer than 5 images are not judged" in lines

    facts["undecided"] = False
    other = evaluate.Result(["a", "b"], labels, labels, np.ones(10), "", {})
    facts |= evaluate.score_without_copies(check, result, [other])
    assert facts["accuracy_on_copies"] == 0.5
    assert facts["without_copies"]["images"] == 4
    assert facts["without_copies"]["comparison"]["difference"] == -0.5
    assert facts["without_copies"]["comparison"]["only_other_correct"] == 2
    copied[:9] = True  # a single image is left: its difference has no variance
    assert "comparison" not in evaluate.score_without_copies(check, result, [result])


# ---- labels -------------------------------------------------------------------------------------


def test_no_head_predicts_an_image_that_it_trained_on():
    """Each image has a feature of its own, from which alone its random label can be learnt."""
    labels = torch.arange(200) % 4
    probabilities = evaluate.predict_out_of_fold(torch.eye(200), labels, 4)
    assert probabilities.sum(1) == pytest.approx(torch.ones(200).numpy(), abs=1e-5)
    assert probabilities[range(200), labels].max() < 0.37


def test_classes_with_fewer_than_five_images_are_not_judged():
    labels = torch.tensor([0] * 4 + [1] * 5 + [2] * 31)[torch.randperm(40)]
    probabilities = evaluate.predict_out_of_fold(torch.eye(40), labels, 4)
    assert probabilities[labels == 0].isnan().all() and not probabilities[labels > 0].isnan().any()
    assert evaluate.predict_out_of_fold(torch.eye(4), labels[labels == 0], 4).isnan().all()


def test_wrong_labels_of_digits_come_first_whatever_the_seed():
    digits = data.read_digits("train")[0].select(slice(1000))
    features, labels = data.make_thumbnails(digits, torch.device("cpu")), digits.labels.clone()
    labels[::50] = (labels[::50] + torch.arange(20) % 9 + 1) % 10  # 20 of 1,000 are wrong
    torch.manual_seed(1)
    probabilities = evaluate.predict_out_of_fold(features, labels, 10)
    torch.manual_seed(2)
    assert torch.equal(evaluate.predict_out_of_fold(features, labels, 10), probabilities)
    named = replace(digits, labels=labels).named()
    rows = evaluate.list_suspects("training", named, probabilities, list("0123456789"), 0.1)
    wrong = [int(values[1]) % 50 == 0 for values, _ in rows]
    assert sum(wrong) >= 12 and wrong.count(False) <= 3
    (_, name, label, likelier, own, best), pictures = rows[0]
    assert label == str(labels[int(name)].item()) != likelier
    assert own == probabilities[int(name), int(label)].item() < 0.1 < best
    assert torch.equal(pictures[0], digits.images[int(name)])


def test_a_label_is_suspect_relative_to_its_class_and_if_another_class_is_confident():
    """Class a has a mean probability of 0.6 where it is the label, b of 0.3, the rare c of 0.02."""
    probabilities = torch.tensor([
        [0.599, 0.400, 0.001],
        [0.601, 0.300, 0.099],
        [0.500, 0.400, 0.100],  # b
        [0.700, 0.200, 0.100],  # b
        [0.600, 0.395, 0.005],  # c: a sixth of its mean
        [0.505, 0.440, 0.055],  # c
        [0.690, 0.3099, 0.0001],  # c: a two-hundredth of its mean
    ])  # fmt: skip
    split = data.Split(torch.zeros(7, 3, 2, 2), torch.tensor([0, 0, 1, 1, 2, 2, 2])).named()
    rows = evaluate.list_suspects("test", split, probabilities, ["a", "b", "c"])
    assert [values[:4] for values, _ in rows] == [["test", "6", "c", "a"]]
    unsure = probabilities.clone()
    unsure[6] = torch.tensor([0.55, 0.2999, 0.0001])  # neither a nor b reaches its mean
    assert not evaluate.list_suspects("test", split, unsure, ["a", "b", "c"])


# ---- a folder with planted faults ---------------------------------------------------------------

CHECK_FILES = {"duplicates.csv", "suspect_labels.csv"}
COLORS = torch.tensor([[i % 2, i // 2 % 2, i // 4] for i in range(8)]) * 0.7 + 0.3  # (class, RGB)
ODD = ["", ", a #1 'b'", ' "c"', os.fsdecode(b" caf\xe9")]  # endings of names


class Planted(NamedTuple):
    folder: Path  # holds photos/, checkpoints/, other/ by --tta, and results/ by --check-data
    check: dict  # of results/metrics.json
    copies: dict[str, str]  # training picture of each validation picture that is a copy
    wrong: set[str]  # pictures with a wrong label
    trained: Script
    checked: Script

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / name, dtype=str, encoding_errors="surrogateescape")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    """800 textures to train on, 180 others and 20 copies in val/; 20 are in another colour's folder."""
    folder = tmp_path_factory.mktemp("planted")
    labels = torch.cat([torch.arange(8).repeat_interleave(100), torch.arange(180) % 8])
    sources = torch.arange(20) * 40
    images = (make_textures(980)[:, :, :32, :32] * COLORS[labels][:, :, None, None]).byte()
    images, labels = torch.cat([images, images[sources]]), torch.cat([labels, labels[sources]])
    kinds = cycle(["identical", "mirrored", "darker", "more contrast"])
    for number, kind in zip(range(980, 1000), kinds):
        images[number : number + 1] = KINDS[kind][0](images[number : number + 1])
    labels[25::50] = (labels[25::50] + 1 + torch.arange(20) % 7) % 8
    names = [f"train/{label}/{number:05}.png" for number, label in enumerate(labels[:800])]
    names += [f"val/{x}/{number:05}{ODD[number % 4]}.png" for number, x in enumerate(labels[800:])]
    for name, image in zip(names, images):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        functional.to_pil_image(image).save(path)
    for part in ("train", "val"):  # shifts no name
        (folder / f"photos/{part}/0/0.png").write_bytes(b"no picture")
    torch.manual_seed(0)
    torch.save(get_model("resnet18", num_classes=5).state_dict(), folder / "weights.pt")
    flags = "--dataset photos --stored-size 32 --checkpoint-dir checkpoints --architecture resnet18"
    flags += " --weights weights.pt --precision fp32 --demo --epochs 0 --head-epochs 40"
    (folder / "other").mkdir()
    for name in CHECK_FILES:  # as an earlier check leaves them
        (folder / "other" / name).touch()
    scripts = [
        run_script(*argv, cwd=folder)
        for argv in (
            ["train.py", *flags.split()],
            ["evaluate.py", "--tta", "--results-dir", "other"],
            ["evaluate.py", "--check-data", "--compare", "other"],
        )
    ]
    assert not [script.stderr for script in scripts if script.status]
    copies = {names[980 + i]: names[40 * i] for i in range(20)}
    check = read_json(folder / "results/metrics.json")["data_check"]
    return Planted(folder, check, copies, set(names[25::50]), scripts[0], scripts[2])


def test_planted_copies_are_found_by_name(planted):
    rows = planted.table("results/duplicates.csv")
    assert (rows.test_image.map(planted.copies) == rows.training_image).sum() >= 19
    assert len(rows) <= 21 and not planted.check["undecided"]
    similarity = rows.similarity.astype(float)
    assert similarity.is_monotonic_decreasing and similarity.min() > 0.75
    assert (rows.test_label == rows.test_image.str.split("/").str[1]).all()
    assert (rows.training_label == rows.training_image.str.split("/").str[1]).all()
    assert (rows.same_label == (rows.test_label == rows.training_label).astype(str)).all()


def test_equal_pictures_are_named_by_both_scripts(planted):
    identical = dict(list(planted.copies.items())[::4])
    groups = planted.check["identical"]
    assert {test[1]: training[1] for test, training in groups} == identical
    assert {image[0] for group in groups for image in group} == {"test", "training"}
    assert "exact    5 groups of equal images, 5 in both parts" in planted.checked.stdout
    line = "note     5 of 200 validation pictures are .* pixel for pixel: (.*) is (.*), for example"
    copy, source = re.search(line, planted.trained.stdout).groups()
    assert identical[copy] == source


def test_planted_wrong_labels_come_first(planted):
    rows = planted.table("results/suspect_labels.csv")
    is_wrong, training = rows.image.isin(planted.wrong), rows.part == "training"
    assert rows.part.is_monotonic_increasing
    assert is_wrong.sum() >= 14 and len(rows) <= 30
    assert is_wrong[training][:8].all()
    folders = rows.image.str.split("/")
    assert (folders.str[0] == rows.part.map({"test": "val", "training": "train"})).all()
    assert (folders.str[1] == rows.label).all() and (rows.label != rows.likelier_label).all()
    assert (rows.probability.astype(float) < 0.01).all()
    assert (rows.likelier_probability.astype(float) > 0.01).all()


def test_every_name_is_that_of_its_picture(planted):
    """Whatever it is; a picture that cannot be read comes before all others."""
    place = settings(stored_size=32, data_dir=str(planted.folder / "data"))
    split, _ = data.read_folder(planted.folder / "photos/val", place)
    split = data.leave_out_undecoded(split, place)
    rows = planted.table("results/predictions.csv")
    assert rows.file.tolist() == list(split.files) and len(rows) == 200
    assert (rows.label == rows.file.str.split("/").str[1]).all()
    for name, image in zip(split.files, split.images):
        assert torch.equal(data.read_picture(planted.folder / "photos" / name, 32), image)
    assert all(any(name.endswith(f"{ending}.png") for name in split.files) for ending in ODD)
    chosen = split.select(split.labels == 3)
    assert set(chosen.files) == {name for name in split.files if name.startswith("val/3/")}


def test_accuracy_and_comparison_without_copies_are_those_of_the_other_rows(planted):
    check = planted.check
    tables = [planted.table(f"{name}/predictions.csv") for name in ("results", "other")]
    copied = tables[0].file.isin(planted.table("results/duplicates.csv").test_image)
    hits, other_hits = (x.label == x.predicted for x in tables)
    rest, other_rest = hits[~copied], other_hits[~copied]
    assert check["without_copies"]["top1_accuracy"] == pytest.approx(rest.mean())
    low, high = check["without_copies"]["interval_95"]
    assert low < rest.mean() < high
    assert check["accuracy_on_copies"] == pytest.approx(hits[copied].mean())
    assert (check["copies"], check["images_trained_on"]) == (copied.sum(), 800)
    paired = check["without_copies"]["comparison"]
    assert paired["only_this_correct"] == (rest & ~other_rest).sum()
    assert paired["difference"] == pytest.approx(rest.mean() - other_rest.mean())
    for line in [
        f"copies   {copied.sum()} of 200 test images have a near-duplicate among the 800 images ",
        f"without  top-1 {100 * rest.mean():.2f} % on the other {len(rest)}, 95 % interval ",
        f"change   {100 * paired['difference']:+.2f} points without copies, paired",
        "suspect  {test} test and {training} training labels".format(**check["suspect_labels"]),
    ]:
        assert line in planted.checked.stdout


def test_an_evaluation_without_check_removes_an_earlier_check(planted):
    files, other_files = (set(os.listdir(planted.folder / x)) for x in ("results", "other"))
    assert files - other_files == CHECK_FILES


def test_other_training_pictures_are_one_message(planted, tmp_path, monkeypatch, capsys):
    shutil.copytree(planted.folder / "photos", tmp_path / "photos")
    next((tmp_path / "photos/train/3").iterdir()).unlink()
    monkeypatch.chdir(tmp_path)
    checkpoint = str(planted.folder / "checkpoints/best.pt")
    with pytest.raises(utils.UserError, match=f"photos is not what {checkpoint} was trained on"):
        evaluate.main(["--check-data", "--checkpoint", checkpoint])
    assert "top-1" not in capsys.readouterr().out  # before the network runs


def test_training_on_a_folder_without_copies_says_nothing_of_them(capsys):
    named = data.read_digits("train")[0].named()
    twice = named.select(torch.tensor([*range(100), 7]))  # within the training pictures only
    data.warn_of_copies(twice, named.select(slice(100, 150)))
    assert not capsys.readouterr().out
    data.warn_of_copies(named.select(slice(100)), named.select(slice(98, 150)))
    line = "note     2 of 52 validation pictures are training pictures too, pixel for pixel: "
    assert capsys.readouterr().out == f"{line}98 is 98, for example\n"


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
    assert not data.find_identical(held_out, split)


def test_pictures_beside_the_rows_are_those_of_the_names(classifier):
    (trained, _), (test, _) = map(data.read_digits, ("train", "test"))
    trained, test = trained.named().select(slice(100, 140)), test.select(slice(6))
    probabilities = torch.eye(10)[test.labels - 1]  # that of the label is 0
    check = evaluate.check_data(classifier, trained, test, probabilities)
    assert check.facts["images_trained_on"] == 40 and len(check.pairs) == 6
    for values, pictures in check.pairs:
        assert torch.equal(pictures[0], test.images[int(values[0])])
        assert torch.equal(pictures[1], trained.images[int(values[1]) - 100])
    pairs, _, suspects = evaluate.list_galleries(check, [])
    assert [len(pictures) for pictures, _ in pairs["figures"]] == [2] * 6
    count = check.facts["copies"]
    copies = [pair for pair in check.pairs[:count] if not pair[0][5]]  # with another label
    copies += [pair for pair in check.pairs[:count] if pair[0][5]]
    for (_, caption), (values, _) in zip(pairs["figures"], copies + check.pairs[count:]):
        verdict = "probably a copy" if values[2] > 0.75 else "below the limit"
        assert caption[0] == f"similarity {values[2]:.3f}: {verdict}"
    check.facts["undecided"] = True
    undecided, *_ = evaluate.list_galleries(check, [])
    assert undecided["figures"][-1][1][0] == f"similarity {check.pairs[-1][0][2]:.3f}"
    assert all(pictures[0].shape == (3, 32, 32) for pictures, _ in suspects["figures"])


def test_features_are_those_of_the_weights_that_training_began_with(classifier, tmp_path, capsys):
    own, weights = classifier.model.state_dict(), get_model("resnet18").state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    torch.save({"model": own, "classes": list("0123456789")}, tmp_path / "best.pt")
    for name, expected in (("weights.pth", weights), ("best.pt", own)):
        constants = classifier.constants | {"weights": str(tmp_path / name)}
        stand_in = Namespace(**vars(classifier) | {"constants": constants, "checkpoint": {}})
        network = evaluate.load_initial_network(stand_in)
        assert network is not classifier.model and not capsys.readouterr().out
        loaded = network.state_dict()
        for key in own.keys() - {key for key in own if key.startswith("fc")}:
            assert torch.equal(loaded[key], expected[key])
    assert evaluate.load_initial_network(classifier) is classifier.model
    assert "no file of weights ''" in capsys.readouterr().out


def test_weights_that_have_changed_since_training_began_are_not_taken_for_them(
    planted, tmp_path, monkeypatch, capsys
):
    """For example, of a run that began with best.pt and put its own in the same place."""
    monkeypatch.chdir(planted.folder)
    flags = ["--checkpoint", "checkpoints/best.pt"]
    classifier = evaluate.Classifier(utils.parse_flags(evaluate.__file__, flags))
    initial = get_model("resnet18", num_classes=5)
    initial.load_state_dict(torch.load("weights.pt", weights_only=True))
    assert classifier.checkpoint["weights_checksum"] == resnet.checksum(initial)
    capsys.readouterr()
    assert evaluate.load_initial_network(classifier) is not classifier.model
    assert not capsys.readouterr().out
    classifier.constants["weights"] = str(tmp_path / "other.pt")
    torch.save(get_model("resnet18", num_classes=5).state_dict(), tmp_path / "other.pt")
    assert evaluate.load_initial_network(classifier) is classifier.model
    assert "other.pt has changed since training began: the network's own" in capsys.readouterr().out
    del classifier.checkpoint["weights_checksum"]  # as in older checkpoints
    assert evaluate.load_initial_network(classifier) is not classifier.model


def test_torchvision_weights_are_found_where_torchvision_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    requested = []
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *request, **_: requested.append(request)
    )
    with pytest.raises(utils.UserError):  # because nothing is written
        resnet.download_weights("resnet50", "IMAGENET1K_V1")
    ((url, path, checksum),) = requested
    assert path == str(resnet.weights_path("resnet50", "IMAGENET1K_V1"))
    assert url.endswith("/resnet50-0676ba61.pth") and checksum == "0676ba61"
    assert resnet.weights_path("resnet18", "data/mine.pth") == Path("data/mine.pth")
