"""evaluate.py on CIFAR-100 itself: a small one in the official format, made on the spot.

Every number is recomputed from the labels and the network's logits by other means.
"""

import csv
import json
import pickle
import re
import subprocess
import sys
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import ROOT
from sklearn import metrics
from torchvision.datasets import CIFAR100
from torchvision.transforms.v2.functional import to_pil_image

import data
import evaluate
import train
import utils

# The coarse label of each fine label, as the official files have them
COARSE = [next(i for i, x in enumerate(data.SUPERCLASSES.values()) if n in x) for n in data.CLASSES]
FLAGS = "--architecture resnet18 --image-size 32 --batch-size 50 --epochs 1 --precision fp32"
FLAGS += " --data-dir small --checkpoint-dir run --device cpu --weights="


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch):
    """100 training images of noise and 199 to test on, from one to three of each class, as official
    files; a run of one epoch.
    """
    monkeypatch.chdir(tmp_path)
    folder, rng = tmp_path / "small" / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir(parents=True)
    names = {"fine_label_names": data.CLASSES, "coarse_label_names": list(data.SUPERCLASSES)}
    contents = {"meta": names}
    for part in ("train", "test"):
        images = np.ones(100, int) if part == "train" else 1 + np.arange(100) % 3
        labels = rng.permutation(np.repeat(np.arange(100), images)).tolist()
        pixels = rng.integers(0, 256, (len(labels), 3072), np.uint8)
        coarse = [COARSE[label] for label in labels]
        contents[part] = {"data": pixels, "fine_labels": labels, "coarse_labels": coarse}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    checksums = {name: md5((folder / name).read_bytes()).hexdigest() for name in contents}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", checksums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", checksums["test"]]])
    meta = CIFAR100.meta | {"md5": checksums["meta"]}
    monkeypatch.setattr(CIFAR100, "meta", meta)
    train.main(FLAGS.split())
    return contents["test"]


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


def test_every_number_of_a_whole_evaluation(small_cifar100, monkeypatch, capsys):
    labels, coarse = (np.array(small_cifar100[x]) for x in ("fine_labels", "coarse_labels"))
    logits = designed_logits(labels)
    predict = evaluate.Classifier.predict

    def replace_logits(self, images):
        real = predict(self, images)
        assert real.shape == (1, 199, 100)
        return torch.from_numpy(logits)[None].float()

    monkeypatch.setattr(evaluate.Classifier, "predict", replace_logits)
    flags = "--data-dir small --checkpoint run/best.pt --no-show"
    evaluate.main(flags.split())
    said = capsys.readouterr().out

    predicted, numbers = logits.argmax(1), range(100)
    found = json.loads(Path("results/metrics.json").read_text())
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    top1 = np.mean(predicted == labels)
    top5 = np.mean([label in row[-5:] for label, row in zip(labels, logits.argsort(1))])
    top6 = np.mean([label in row[-6:] for label, row in zip(labels, logits.argsort(1))])
    assert 0 < np.mean(labels == logits.argsort(1)[:, -2]) and top1 < top5 < top6
    expected = {
        "top1_accuracy": top1,
        "top5_accuracy": top5,
        "superclass_accuracy": np.mean(np.array(COARSE)[predicted] == coarse),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "loss": metrics.log_loss(labels, probabilities, labels=numbers),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    weighted = metrics.f1_score(labels, predicted, average="weighted")
    assert abs(weighted - expected["macro_f1"]) > 0.001
    assert found["intervals_95"] == evaluate.bootstrap_intervals(
        metrics.confusion_matrix(labels, predicted, labels=numbers)
    )  # the same every time
    low, high = found["intervals_95"]["top1_accuracy"]
    width = 1.96 * np.sqrt(top1 * (1 - top1) / 199)
    assert (low, high) == pytest.approx((top1 - width, top1 + width), abs=0.015)
    interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    assert f"\ntop-1    {100 * top1:.2f} %, {interval}\n" in said
    assert f"\ntop-5    {100 * top5:.2f} %\n" in said
    assert f"\ncoarse   {100 * expected['superclass_accuracy']:.2f} %, the right super" in said

    f1 = metrics.f1_score(labels, predicted, average=None, labels=numbers)
    worst = said.split("worst classes by F1\n")[1].splitlines()[:10]
    assert [float(line.split()[0]) for line in worst] == pytest.approx(np.sort(f1)[:10], abs=5e-5)
    assert all(f1[data.CLASSES.index(line.split()[1])] == 0 for line in worst)
    with open("results/classification_report.csv") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    scores = metrics.precision_recall_fscore_support(labels, predicted, labels=numbers)
    for number, name in enumerate(data.CLASSES):
        written = [float(x) for x in list(rows[name].values())[1:]]
        assert written == pytest.approx([score[number] for score in scores])
    with open("results/predictions.csv") as file:
        written = [(int(x["label"]), int(x["predicted"])) for x in csv.DictReader(file)]
    assert written == list(zip(labels, predicted))


def test_predictions_that_are_not_finite_are_refused(small_cifar100, capsys):
    checkpoint = torch.load("run/best.pt", weights_only=True)
    checkpoint["model"]["fc.3.weight"].fill_(3e38)  # finite, their sums are not
    utils.save_checkpoint(Path("run/best.pt"), checkpoint)
    flags = "--data-dir small --checkpoint run/best.pt --no-show"
    with pytest.raises(utils.UserError, match="its predictions are not finite. Train it again"):
        evaluate.main(flags.split())


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

EXPORT = ["--data-dir", "small", "--checkpoint", "run/best.pt", "--no-show"]
EXPORT += ["--export", "model.pt2"]
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


def test_readme_uses_an_exported_model_that_predicts_the_same_without_this_repo(
    small_cifar100, capsys
):
    evaluate.main(EXPORT)
    said = capsys.readouterr().out
    assert "model.pt2: 199 of 199 images are classified as above, probabilities differ" in said
    images = torch.from_numpy(small_cifar100["data"]).view(-1, 3, 32, 32)
    torch.save(images, "images.pt")
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone that was held upright stores it
    photo = to_pil_image(F.interpolate(images[:2].float(), (300, 401), mode="bicubic")[0] / 255)
    photo.save("photo.jpg", exif=exif)
    flags = "--checkpoint run/best.pt --no-show --images photo.jpg --results-dir photo"
    evaluate.main(flags.split())
    command = [sys.executable, "-I", "-c", SNIPPET + MORE]  # -I: without this repo
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, numbers = done.stdout.splitlines()
    classes, probabilities = json.loads(numbers)
    assert said == data.CLASSES[np.argmax(probabilities)]
    with open("results/predictions.csv") as file:
        assert classes == [data.CLASSES[int(row["predicted"])] for row in csv.DictReader(file)]
    with open("photo/pictures.csv") as file:
        (row,) = csv.DictReader(file)
    for place in "12345":  # evaluate.py decodes large JPEGs at a reduced scale
        label = data.CLASSES.index(row[f"class_{place}"])
        assert probabilities[label] == pytest.approx(float(row[f"probability_{place}"]), rel=0.02)


def test_onnx_model_predicts_the_same_in_another_runtime(small_cifar100, capsys):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    evaluate.main([*EXPORT[:-1], "model.onnx"])
    assert "model.onnx: 199 of 199 images are classified as above" in capsys.readouterr().out
    session = runtime.InferenceSession("model.onnx")
    (names,) = session.get_modelmeta().custom_metadata_map.items()
    assert names == ("classes.json", json.dumps(data.CLASSES))
    photo = np.random.default_rng(0).integers(0, 256, (1, 3, 301, 400), np.uint8)
    torch_model = evaluate.Classifier(utils.parse_flags(evaluate.__file__, EXPORT)).model.cpu()
    portable = evaluate.Portable(torch_model.float(), 32, False, 32, "bilinear").eval()
    (probabilities,) = session.run(None, {"pictures": photo})
    torch.testing.assert_close(torch.from_numpy(probabilities), portable(torch.from_numpy(photo)))


def test_onnx_without_its_packages_is_one_message(small_cifar100, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    classifier = evaluate.Classifier(utils.parse_flags(evaluate.__file__, EXPORT))
    with pytest.raises(SystemExit, match="ONNX needs the packages onnxscript and onnxruntime"):
        evaluate.export(classifier, torch.zeros(2, 3, 32, 32).byte(), None, Path("model.onnx"))
    assert not list(Path().glob("*.onnx")) and not list(Path().glob(".export*"))


def test_export_that_predicts_something_else_is_not_written(small_cifar100, tmp_path):
    flags = ["--checkpoint", "run/best.pt", "--data-dir", "small"]
    classifier = evaluate.Classifier(utils.parse_flags(evaluate.__file__, flags))
    images, others = torch.zeros(2, 3, 32, 32).byte(), torch.eye(100)[:2]
    with pytest.raises(SystemExit, match="model.pt2 is not written: its probabilities differ by "):
        evaluate.export(classifier, images, others, tmp_path / "model.pt2")
    assert not list(Path().glob("*.pt2")) and not list(Path().glob(".export*"))


@pytest.mark.parametrize("whole", [False, True])
def test_exported_preprocessing_is_that_of_training_but_for_rounding(whole, tmp_path):
    portable = evaluate.Portable(torch.nn.Identity(), 32, whole, 48, "bilinear")
    for shape in ((32, 32), (400, 300), (20, 90), (1, 1), (33, 2000), (301, 400), (3, 5)):
        noise = torch.rand(1, 3, *(-(-side // 3) for side in shape)) * 255
        picture = F.interpolate(noise, shape, mode="bilinear").byte()
        to_pil_image(picture[0]).save(tmp_path / "picture.png")
        expected = data.read_picture(tmp_path / "picture.png", 32, whole)
        difference = (portable.make_square(picture)[0] - expected.float()).abs()
        assert difference.max() <= 1 and difference.mean() < 0.01, shape
