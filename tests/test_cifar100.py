"""evaluate.py on CIFAR-100 itself: a small one in the official format, made on the spot.

Every number is recomputed from the labels and the network's logits by other means.
"""

import json
import pickle
import re
import subprocess
import sys
from contextlib import redirect_stdout
from hashlib import md5
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import softmax
from scripts import ROOT, read_json, read_rows
from sklearn import metrics
from torch import nn
from torchvision.datasets import CIFAR100
from torchvision.transforms.v2.functional import to_pil_image

import data
import evaluate
import model as resnet
import train
import utils

# The coarse label of each fine label, as the official files have them
COARSE = [next(i for i, x in enumerate(data.SUPERCLASSES.values()) if n in x) for n in data.CLASSES]
TRAIN = "--architecture resnet18 --image-size 32 --batch-size 50 --epochs 1 --precision fp32"
TRAIN += " --data-dir small --checkpoint-dir run --device cpu --weights="
EVALUATE = ["--data-dir", "small", "--checkpoint", "run/best.pt"]


@pytest.fixture(scope="module")
def small_cifar100(tmp_path_factory):
    """100 training images of noise and 199 to test on, from one to three of each class, as official
    files in small/; a run of one epoch in run/. It is where tests work; returns what `test` holds.
    """
    root, rng = tmp_path_factory.mktemp("cifar100"), np.random.default_rng(0)
    folder = root / "small" / "cifar-100-python"
    folder.mkdir(parents=True)
    names = {"fine_label_names": data.CLASSES, "coarse_label_names": list(data.SUPERCLASSES)}
    contents = {"meta": names}
    for part, images in ("train", np.ones(100, int)), ("test", 1 + np.arange(100) % 3):
        labels = rng.permutation(np.repeat(np.arange(100), images)).tolist()
        pixels = rng.integers(0, 256, (len(labels), 3072), np.uint8)
        coarse = [COARSE[label] for label in labels]
        contents[part] = {"data": pixels, "fine_labels": labels, "coarse_labels": coarse}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    checksums = {name: md5((folder / name).read_bytes()).hexdigest() for name in contents}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(CIFAR100, "train_list", [["train", checksums["train"]]])
        patch.setattr(CIFAR100, "test_list", [["test", checksums["test"]]])
        patch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": checksums["meta"]})
        with redirect_stdout(StringIO()) as output:
            train.main(TRAIN.split())
        assert (
            "note     best.pt is selected on the test images; --holdout-per-" in output.getvalue()
        )
        yield contents["test"]


@pytest.fixture
def classifier(small_cifar100):
    return evaluate.Classifier(utils.parse_flags(evaluate.__file__, EVALUATE))


@pytest.fixture
def simple(classifier):
    """The same with another network, because torch.export takes seconds for a ResNet."""
    torch.manual_seed(0)
    classifier.model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 100)).eval()
    return classifier


def designed_logits(labels: np.ndarray) -> np.ndarray:
    """Right for some of the images, else second to sixth; ten classes never, five always."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(len(labels), 100))
    rank = np.where(labels < 10, 4, rng.choice([0, 0, 0, 1, 3, 4, 5], len(labels)))
    rank[labels >= 95] = 0
    for row, (label, place) in enumerate(zip(labels, rank)):
        rest = np.sort(np.delete(logits[row], label))[::-1]
        logits[row, label] = rest[0] + 0.5 if place == 0 else (rest[place - 1] + rest[place]) / 2
    return logits


def test_every_number_and_picture_of_a_whole_evaluation(
    small_cifar100, monkeypatch, capsys, rendered
):
    labels, coarse = (np.array(small_cifar100[x]) for x in ("fine_labels", "coarse_labels"))
    logits = designed_logits(labels)
    predict = evaluate.Classifier.predict

    def replace_logits(self, images, rows):
        (real,) = predict(self, images, rows)
        (epoch,) = read_rows("run/history.csv")  # as train.py validated it
        assert metrics.accuracy_score(labels, real.argmax(1)) == float(epoch["val_accuracy"])
        loss = F.cross_entropy(real, torch.from_numpy(labels)).item()
        assert loss == pytest.approx(float(epoch["val_loss"]), rel=1e-5)
        return torch.from_numpy(logits)[None].float()

    monkeypatch.setattr(evaluate.Classifier, "predict", replace_logits)
    evaluate.main(EVALUATE)
    said = capsys.readouterr().out

    predicted, numbers = logits.argmax(1), range(100)
    found = read_json("results/metrics.json")
    better = (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(1)
    assert {0, 1, 4, 5} <= set(better)  # some labels are just within the five likeliest or not
    top1, predicted_coarse = np.mean(better == 0), np.array(COARSE)[predicted]
    expected = {
        "top1_accuracy": top1,
        "top5_accuracy": np.mean(better < 5),
        "superclass_accuracy": np.mean(predicted_coarse == coarse),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "loss": metrics.log_loss(labels, softmax(logits, 1), labels=numbers),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["test_images_chose_checkpoint"] is True
    assert "the checkpoint was selected on these images: the numbers are optimistic" in said
    weighted = metrics.f1_score(labels, predicted, average="weighted")
    assert abs(weighted - expected["macro_f1"]) > 0.001
    matrix = metrics.confusion_matrix(labels, predicted, labels=numbers)
    superclasses = data.count_superclasses(data.by_superclass(matrix))
    assert (superclasses == metrics.confusion_matrix(coarse, predicted_coarse)).all()
    cells = np.array([*matrix.nonzero(), matrix[matrix.nonzero()]])
    assert found["intervals_95"] == evaluate.bootstrap_intervals(cells, 100)  # the same every time
    low, high = found["intervals_95"]["top1_accuracy"]
    width = 1.96 * np.sqrt(top1 * (1 - top1) / 199)
    assert (low, high) == pytest.approx((top1 - width, top1 + width), abs=0.015)
    interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    assert f"\ntop-1    {100 * top1:.2f} %, {interval}\n" in said
    assert f"\ntop-5    {100 * expected['top5_accuracy']:.2f} %\n" in said
    assert f"\ncoarse   {100 * expected['superclass_accuracy']:.2f} %, the right super" in said

    f1 = metrics.f1_score(labels, predicted, average=None, labels=numbers)
    worst = said.split("worst classes by F1\n")[1].splitlines()[:10]
    assert [float(line.split()[0]) for line in worst] == pytest.approx(np.sort(f1)[:10], abs=5e-5)
    assert all(f1[data.CLASSES.index(line.split()[1])] == 0 for line in worst)
    report = [[*row.values()] for row in read_rows("results/classification_report.csv")]
    assert [name for name, *_ in report] == data.CLASSES
    scores = metrics.precision_recall_fscore_support(labels, predicted, zero_division=0)
    np.testing.assert_allclose(np.array(report)[:, 1:].astype(float), np.array(scores).T)
    rows = read_rows("results/predictions.csv")
    assert [(int(x["label"]), int(x["predicted"])) for x in rows] == list(zip(labels, predicted))

    pictures = list(Path("results").glob("*.png"))
    names = "confusion_matrix superclass_confusion_matrix"
    assert {path.stem for path in pictures} == {*names.split()}
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            assert 250 < min(picture.size) and max(picture.size) < 5000, path


def test_predictions_that_are_not_finite_are_refused(classifier):
    classifier.model.requires_grad_(False).fc[3].weight.fill_(3e38)  # finite, their sums are not
    with pytest.raises(utils.UserError, match="its predictions are not finite. Train it again"):
        classifier.predict(torch.zeros(2, 3, 32, 32).byte())


def test_a_damaged_file_of_weights_cannot_run_code(tmp_path, monkeypatch):
    """A pickle that would write a file when it is loaded."""

    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Harmful()}, "weights.pth")
    with pytest.raises(utils.UserError, match="weights.pth is not a state_dict file that can be"):
        train.main(["--demo", "--weights", "weights.pth"])
    assert not (tmp_path / "harm").exists()


# ---- a model that needs only torch --------------------------------------------------------------

(SNIPPET,) = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)
MORE = """
import sys
assert not {"data", "evaluate", "model", "train", "utils"} & set(sys.modules)
predicted = model(torch.load("images.pt")).argmax(1).tolist()
classes = json.loads(names["classes.json"])
print(json.dumps([[classes[i] for i in predicted], model(picture[None])[0].tolist()]))
"""


def test_readme_predicts_with_an_exported_model(simple, small_cifar100, capsys):
    images = torch.from_numpy(small_cifar100["data"]).view(-1, 3, 32, 32)
    test = data.Split(images, torch.zeros(len(images)))
    evaluate.export(simple, test, simple.predict(images)[0].softmax(1), Path("model.pt2"))
    to_pil_image(images[0]).resize((300, 401)).save("photo.jpg")
    exec(SNIPPET, {})  # noqa: S102
    said, name = capsys.readouterr().out.splitlines()[-2:]
    assert "model.pt2: 199 of 199 images are classified as above, probabilities differ" in said
    ((_, photo),) = data.read_pictures(["photo.jpg"], 32, False, 10)
    assert name == data.CLASSES[simple.predict(photo)[0].argmax()]


@pytest.mark.slow
def test_exported_resnet_predicts_the_same_without_this_repo(small_cifar100, capsys):
    evaluate.main([*EVALUATE, "--export", "model.pt2"])
    said = capsys.readouterr().out
    assert "model.pt2: 199 of 199 images are classified as above, probabilities differ" in said
    images = torch.from_numpy(small_cifar100["data"]).view(-1, 3, 32, 32)
    torch.save(images, "images.pt")
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone that was held upright stores it
    photo = to_pil_image(F.interpolate(images[:2].float(), (300, 401), mode="bicubic")[0] / 255)
    photo.save("photo.jpg", exif=exif)
    evaluate.main([*EVALUATE, "--images", "photo.jpg", "--results-dir", "photo"])
    command = [sys.executable, "-I", "-c", SNIPPET + MORE]  # -I: without this repo
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, numbers = done.stdout.splitlines()
    classes, probabilities = json.loads(numbers)
    assert said == data.CLASSES[np.argmax(probabilities)]
    rows = read_rows("results/predictions.csv")
    assert classes == [data.CLASSES[int(row["predicted"])] for row in rows]
    (row,) = read_rows("photo/pictures.csv")
    for place in "12345":  # evaluate.py decodes large JPEGs at a reduced scale
        label = data.CLASSES.index(row[f"class_{place}"])
        assert probabilities[label] == pytest.approx(float(row[f"probability_{place}"]), rel=0.02)


@pytest.mark.slow
def test_readme_turns_an_exported_model_into_onnx(simple, small_cifar100):
    runtime = pytest.importorskip("onnxruntime")
    images = torch.from_numpy(small_cifar100["data"]).view(-1, 3, 32, 32)
    test = data.Split(images, torch.zeros(len(images)))
    evaluate.export(simple, test, simple.predict(images)[0].softmax(1), Path("model.pt2"))
    (command,) = re.findall(r"`(torch\.onnx\..*)`", (ROOT / "README.md").read_text())
    exec(command)  # noqa: S102
    photo = np.random.default_rng(0).integers(0, 256, (1, 3, 301, 400), np.uint8)
    (probabilities,) = runtime.InferenceSession("model.onnx").run(None, {"pictures": photo})
    expected = torch.export.load("model.pt2").module()(torch.from_numpy(photo))
    torch.testing.assert_close(torch.from_numpy(probabilities), expected)


def test_export_with_other_predictions_is_one_message_and_no_file(simple):
    test = data.Split(torch.zeros(2, 3, 32, 32).byte(), torch.zeros(2))
    others = torch.eye(100)[:2]
    with pytest.raises(utils.UserError, match="refused.pt2 is not written: its probabilities dif"):
        evaluate.export(simple, test, others, Path("refused.pt2"))
    assert not [*Path().glob("refused*"), *Path().glob(".export*")]


@pytest.mark.parametrize("whole", [False, True])
def test_exported_preprocessing_is_that_of_training_but_for_rounding(whole, tmp_path):
    portable = resnet.Portable(nn.Identity(), 32, whole, nn.Identity())
    for shape in ((32, 32), (400, 300), (20, 90), (1, 1), (33, 2000), (301, 400), (3, 5)):
        noise = torch.rand(1, 3, *(-(-side // 3) for side in shape)) * 255
        picture = F.interpolate(noise, shape, mode="bilinear").byte()
        to_pil_image(picture[0]).save(tmp_path / "picture.png")
        expected = data.read_picture(tmp_path / "picture.png", 32, whole)
        difference = (portable.make_square(picture)[0] - expected.float()).abs()
        assert difference.max() <= 1 and difference.mean() < 0.01, shape
