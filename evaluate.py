"""Evaluates a checkpoint on the test images: how good it is, and where it goes wrong.

    python evaluate.py                              checkpoints/best.pt
    python evaluate.py --checkpoint checkpoints/demo/best.pt
    python evaluate.py --tta                        averages over each image and its mirror image
    python evaluate.py --compare results/before     what changed since another evaluation
    python evaluate.py --check-data                 finds test images trained on, and wrong labels
    python evaluate.py --images cat.jpg photos/     the five likeliest classes of your own pictures

It computes as train.py validated: image size, batch size, precision and data set are those stored
in the checkpoint. It prints a report and writes metrics.json (accuracies are fractions), tables and
pictures into RESULTS_DIR; with --images only predictions.png and pictures.csv. In predictions.csv,
index counts the images from 0 in the order of the official test file, or those of a folder, which
file names, by class and name; label and predicted are class numbers, and confidence is the softmax
of the predicted class. Rows of a confusion matrix are true classes, columns are predicted classes.
"""

import csv
import json
import logging
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib import font_manager, rc_context
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import binomtest
from sklearn import metrics
from torch import Tensor, nn
from torchvision.transforms.v2 import Lambda
from torchvision.transforms.v2.functional import horizontal_flip
from torchvision.utils import make_grid

import data
import model as resnet
import utils

CHECKPOINT = "checkpoints/best.pt"  # file written by train.py
DATA_DIR = "data"  # folder that holds cifar-100-python/, downloaded into it when missing
DATASET = ""  # where the folder of pictures that was trained on is now; "" if it has not moved
RESULTS_DIR = "results"  # folder for everything this script writes
DEVICE = "auto"  # where to compute ["auto", "cuda", "mps", "cpu"]
TTA = False  # average the logits over each image and its mirror image: twice the time
COMPARE = ""  # results folder of another evaluation to compare with, image by image; "" for none
CHECK_DATA = False  # look for copies and wrong labels: runs over the training images too
IMAGES = []  # pictures, or folders of them, to classify instead of the test images
SHOW = True  # open the confusion matrix in a window where there is a display


def main(argv: list[str] | None = None) -> None:
    if utils.this_process().rank:
        return  # under torchrun the first process evaluates
    args = utils.parse_flags(__file__, argv)
    folder = Path(args.results_dir)
    classifier = Classifier(args)
    with writing_into(folder):
        tempfile.TemporaryFile(dir=folder).close()  # better to fail now than after the network ran
    if args.images:
        picture = classify_pictures(classifier, args, folder)
    else:
        test = read_test_images(classifier, args)
        other = read_results(args, test) if args.compare else None
        train = read_training_images(classifier, args) if args.check_data else None
        result = Result(test.split, classifier.predict(test.split.images), classifier.classes)
        summary = summarize(result, test, classifier)
        if other:
            summary["comparison"] = compare(result, summary, other)
        check = check_data(classifier, train, result) if train else None
        if check:
            summary["data_check"] = summarize_check(check, result, other)
        write_tables(result, summary, folder)
        write_pictures(result, summary, folder)
        write_check(check, result.classes, folder)
        picture = folder / "confusion_matrix.png"
        print_numbers(result, summary)  # last: a terminal that cannot show a name loses no file
        if other:
            print_comparison(summary)
        if check:
            print_check(check, summary)
        utils.say("results", str(folder))
    if args.show:
        open_window(picture)


# ---- the network and what it predicts -----------------------------------------------------------


class Classifier:
    """The network of a checkpoint, which predicts as it did when train.py validated it."""

    def __init__(self, args: Namespace) -> None:
        """Raises UserError if the checkpoint cannot be used."""
        self.path, self.tta = Path(args.checkpoint), args.tta
        self.device = utils.choose_device(args.device)
        self.checkpoint = utils.load_checkpoint(self.path)
        self.constants, self.classes = self.checkpoint["constants"], self.checkpoint["classes"]
        with utils.explained_misfit(self.path):
            self.dtype = utils.DTYPES[self.checkpoint["precision"]]
            self.sizes = [self.constants[name] for name in ("val_batch_size", "image_size")]
            if not all(isinstance(size, int) and size > 0 for size in self.sizes):
                raise ValueError("its batch or image size is not a positive number")
            model = resnet.build_model(self.constants["architecture"], len(self.classes))
            model.load_state_dict(self.checkpoint["model"])
        self.model = model.to(self.device, memory_format=data.memory_format(self.device))
        name, precision = utils.device_name(self.device), self.checkpoint["precision"]
        utils.say("device", f"{name}, {precision}")
        utils.say("model", f"{self.path}, epoch {self.checkpoint['epoch']}")
        if self.tta and not self.constants["flip"]:
            utils.say("note", "trained with FLIP = 0: mirror images may lower the accuracy")

    def predict(self, images: Tensor) -> Tensor:
        """Logits (views, N, num_classes) of images uint8 (N, 3, S, S); with --tta, 2 views."""
        loader = data.EvalLoader(images.to(self.device), *self.sizes)
        networks = [self.model]
        if self.tta:  # mirrored batch by batch: the device holds the images once
            networks.append(nn.Sequential(Lambda(horizontal_flip), self.model))
        progress = utils.on_terminal()
        logits = [resnet.predict(network, loader, self.dtype, progress) for network in networks]
        if not torch.cat(logits).isfinite().all():
            raise utils.UserError(f"{self.path}: its predictions are not finite. Train it again")
        return torch.stack(logits).cpu()


class Result:
    """N test images, what the network predicts for them, and the figures that follow."""

    def __init__(self, split: data.Split, views: Tensor, classes: list[str]) -> None:
        """views: logits (views, N, num_classes)."""
        self.images, self.labels, self.files = split.images, split.labels.numpy(), split.files
        self.views, self.classes = views, classes
        self.superclasses = list(data.SUPERCLASSES) if classes == data.CLASSES else []
        confidence, predicted = (x.numpy() for x in views.mean(0).double().softmax(1).max(1))
        self.predicted, self.confidence = predicted, confidence  # class number, its softmax: (N,)
        numbers = range(len(classes))
        self.matrix = metrics.confusion_matrix(self.labels, predicted, labels=numbers)
        self.pairs = find_confused_pairs(self.matrix, classes)
        self.bins = calibration_bins(confidence, predicted == self.labels)
        self.support = self.matrix.sum(1)  # test images of each class
        self.scores = score_classes(self.matrix.diagonal(), self.support, self.matrix.sum(0))
        self.f1 = self.scores[2]
        tested = np.flatnonzero(self.support)
        self.worst_first = tested[np.argsort(self.f1[tested], kind="stable")]
        options = {"labels": numbers, "target_names": classes, "digits": 4, "zero_division": 0}
        self.report_text = metrics.classification_report(self.labels, predicted, **options)

    def most_confident(self, mask: np.ndarray, count: int) -> np.ndarray:
        """Indices of the most confident predictions among those where mask (N,) is true."""
        indices = np.flatnonzero(mask)
        return indices[np.argsort(-self.confidence[indices], kind="stable")][:count]


class TestImages(NamedTuple):
    """The images that a checkpoint is evaluated on."""

    split: data.Split
    dataset: str  # which images they are, as data.identify() tells
    selected: bool  # whether they selected the checkpoint


def read_test_images(classifier: Classifier, args: Namespace) -> TestImages:
    """The official test images, downloaded if missing, or the pictures in a folder's val/.

    Of a folder without val/, those that were held out from its train/. Raises UserError if they
    cannot be told from those trained on.
    """
    name = args.dataset or classifier.constants["dataset"]
    holdout_per_class, kind = classifier.constants["holdout_per_class"], "test images"
    held_out = holdout_per_class > 0 and not data.has_test_images(name)
    split, dataset = read_part(classifier, args, "train" if held_out else "test")
    if held_out:
        _, holdout = data.split_per_class(split.labels, holdout_per_class)
        split, kind = split.select(holdout), "hold-out images, because there is no val/"
    utils.say("data", f"{name}: {len(split.labels):,} {kind}")
    selected = held_out or not holdout_per_class
    if selected:
        utils.say("note", "the checkpoint was selected on these images: the numbers are optimistic")
    else:
        utils.say("note", "these images were used neither to train nor to select the checkpoint")
    return TestImages(split, dataset, selected)


def read_part(classifier: Classifier, args: Namespace, part: str) -> tuple[data.Split, str]:
    """The images of a part, "train" or "test", and which they are, as data.identify() tells.

    Downloads what is missing. Raises UserError if they are not those of the checkpoint.
    """
    settings = Namespace(**classifier.constants | {"data_dir": args.data_dir})
    settings.dataset = args.dataset or settings.dataset
    data.fetch(settings)
    data.require_memory(settings, [part], classifier.device)
    split, classes = data.read_split(settings, part, classifier.classes)
    dataset, expected = data.identify(settings, split), classifier.checkpoint["dataset"]
    if classes != classifier.classes or (part == "train" and dataset != expected):
        raise utils.UserError(
            f"{settings.dataset} is not what {classifier.path} was trained on: "
            f"{expected}, {len(classifier.classes)} classes"
        )
    return split, dataset


# ---- numbers ------------------------------------------------------------------------------------


def summarize(result: Result, test: TestImages, classifier: Classifier) -> dict:
    """What metrics.json holds."""
    checkpoint, classes, count = classifier.checkpoint, result.classes, len(result.labels)
    summary = score(result.views.mean(0), result.labels) | {
        "macro_f1": np.average(result.f1, weights=result.support > 0),
        "classes_without_images": [classes[i] for i in np.flatnonzero(result.support == 0)],
        "expected_calibration_error": expected_calibration_error(result.bins),
        "intervals_95": bootstrap_intervals(result.matrix),
        "most_confused": result.pairs[:10],
        "images": count,
        "dataset": test.dataset,
        "test_images_chose_checkpoint": test.selected,
        "tta": classifier.tta,
        "checkpoint": str(classifier.path),
        **{name: checkpoint[name] for name in ("epoch", "precision", "constants")},
        "history": read_history(classifier.path, checkpoint["history"]),
    }
    if result.superclasses:
        summary["superclass_accuracy"] = count_superclasses(result).trace() / count
    if classifier.tta:
        summary["without_tta"] = score(result.views[0], result.labels)
    return summary


def score(logits: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy and top-1 accuracy of logits (N, num_classes); top-5 of 6 or more."""
    loss_sum = F.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    scores = {
        "loss": loss_sum.item() / len(labels),
        "top1_accuracy": metrics.accuracy_score(labels, logits.argmax(1)),
    }
    numbers = range(logits.shape[1])
    if len(numbers) > 5:
        top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=numbers)
        scores["top5_accuracy"] = top5
    return scores


def score_classes(correct: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Precision, recall and F1 (3, ..., num_classes); 0 where there is nothing to divide by.

    From the images (..., num_classes) of each class that are predicted correctly, that belong to
    it, and that are predicted as it.
    """
    f1 = 2 * correct / (true + predicted).clip(1)
    return np.stack([correct / predicted.clip(1), correct / true.clip(1), f1])


def superclass_numbers(classes: list[str]) -> np.ndarray:
    """The superclass of each class (num_classes,), numbered as the official coarse labels are."""
    members = list(data.SUPERCLASSES.values())
    return np.array([[name in names for names in members].index(True) for name in classes])


def count_superclasses(result: Result) -> np.ndarray:
    """Confusion matrix (20, 20) of the superclasses."""
    belongs = np.eye(len(data.SUPERCLASSES), dtype=int)[superclass_numbers(result.classes)]
    return belongs.T @ result.matrix @ belongs


def find_confused_pairs(matrix: np.ndarray, classes: list[str]) -> list[dict]:
    """Pairs of confused classes, most mistakes first; "true" is the class mistaken more often."""
    a, b = np.tril_indices(len(classes), -1)
    true, other = np.where(matrix[a, b] > matrix[b, a], (a, b), (b, a))
    order = np.argsort(-matrix[true, other] - matrix[other, true], kind="stable")
    return [
        {"true": classes[i], "taken_for": classes[j]}
        | {"images": matrix[i, j].item(), "other_way": matrix[j, i].item()}
        for i, j in zip(true[order], other[order])
        if matrix[i, j]
    ]


def calibration_bins(confidence: np.ndarray, correct: np.ndarray, count: int = 15) -> np.ndarray:
    """Images, accuracy, mean confidence (3, count) in bins (0, 1/count], (1/count, 2/count]..."""
    numbers = np.ceil(confidence * count).astype(int).clip(1, count) - 1
    images = np.bincount(numbers, minlength=count)
    means = [np.bincount(numbers, x, count) / images.clip(1) for x in (correct, confidence)]
    return np.stack([images, *means])


def expected_calibration_error(bins: np.ndarray) -> float:
    """Mean over images of their bin's |accuracy - confidence|: Guo et al. 2017, equation 3."""
    images, accuracy, confidence = bins
    return float(np.average(np.abs(accuracy - confidence), weights=images))


def bootstrap_intervals(matrix: np.ndarray, resamples: int = 1000) -> dict[str, list[float]]:
    """95 % percentile intervals of top-1 and macro F1 over test images drawn with replacement.

    For these figures, images in the same cell of the confusion matrix are alike, so a resample is
    a multinomial draw of the cells. Its macro F1 is over the classes that it drew.
    """
    cells = matrix.nonzero()
    probabilities = matrix[cells] / matrix.sum()
    drawn = np.random.default_rng(0).multinomial(matrix.sum(), probabilities, resamples)
    in_row, in_column = (np.eye(len(matrix))[numbers] for numbers in cells)
    correct, true = drawn @ (in_row * in_column), drawn @ in_row  # (resamples, num_classes)
    *_, f1 = score_classes(correct, true, drawn @ in_column)
    macro_f1 = np.average(f1, 1, weights=true > 0)
    samples = {"top1_accuracy": correct.sum(1) / matrix.sum(), "macro_f1": macro_f1}
    return {name: np.percentile(x, [2.5, 97.5]).tolist() for name, x in samples.items()}


def print_numbers(result: Result, summary: dict) -> None:
    """Prints the report, the worst classes and pairs, and last, above the prompt, the summary."""
    print(f"\n{result.report_text}\nworst classes by F1")
    for number in result.worst_first[:10]:
        print(f"{result.f1[number]:8.4f}  {result.classes[number]}")
    print("\nmost confused pairs: images one way + the other way")
    for pair in summary["most_confused"]:
        print("{images:4} + {other_way:<3} {true} taken for {taken_for}".format(**pair))
    print()
    utils.say("loss", f"{summary['loss']:.4f}")
    for label, name, meaning in [
        ("top-1", "top1_accuracy", ""),
        ("top-5", "top5_accuracy", ""),
        ("macro F1", "macro_f1", ""),
        ("coarse", "superclass_accuracy", ", the right superclass"),
        ("ECE", "expected_calibration_error", ", expected calibration error"),
    ]:
        if name in summary:
            interval = ""
            if name in summary["intervals_95"]:
                low, high = summary["intervals_95"][name]
                interval = f", 95 % interval {100 * low:.2f} to {100 * high:.2f} %"
            utils.say(label, f"{100 * summary[name]:.2f} %{interval}{meaning}")
    if summary["tta"]:
        single = summary["without_tta"]
        accuracy = f"top-1 {100 * single['top1_accuracy']:.2f} %"
        utils.say("no tta", f"loss {single['loss']:.4f}, {accuracy}")
    if absent := len(summary["classes_without_images"]):
        classes = f"{absent} of {len(result.classes)} classes"
        effect = "macro F1 and the worst classes leave them out, the report counts them as 0"
        utils.say("note", f"{classes} have no test image: {effect}")


# ---- two evaluations of the same images ---------------------------------------------------------


def read_results(args: Namespace, test: TestImages) -> dict:
    """What a comparison needs of the evaluation in COMPARE, its predicted classes (N,) included.

    Raises UserError if the files are damaged or of other images.
    """
    folder, labels = Path(args.compare), test.split.labels.numpy()
    if folder.resolve() == Path(args.results_dir).resolve():
        utils.refuse_flag("compare", args.compare, "another folder than --results-dir")
    path = folder / "metrics.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        names = ("dataset", "checkpoint", "epoch", "tta", "top1_accuracy", "constants", "history")
        other = {"results_dir": str(folder)} | {name: summary[name] for name in names}
        other["constants"] = utils.with_defaults(other)
        names = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
        other["history"] = [{name: float(row[name]) for name in names} for row in other["history"]]
        if other["dataset"] != test.dataset:
            raise ValueError(f"its data set is {other['dataset']!r}, not {test.dataset!r}")
        path = folder / "predictions.csv"
        rows = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()[1:]
        if len(rows) != len(labels):
            raise ValueError(f"it has {len(rows):,} images, not {len(labels):,}")
        columns = np.loadtxt(rows, int, delimiter=",", usecols=range(3))
        if not np.array_equal(columns[:, :2], np.stack([range(len(labels)), labels], 1)):
            raise ValueError("its labels are not those of the test images")
        if not abs(np.mean(columns[:, 2] == labels) - other["top1_accuracy"]) < 1e-9:
            raise ValueError("its accuracy is not that of metrics.json")
    except Exception as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise utils.UserError(
            f"{path} cannot be compared: {getattr(error, 'strerror', None) or reason}. Expected "
            "results of this evaluate.py for the same test images: evaluate that checkpoint again"
        ) from error
    return other | {"predicted": columns[:, 2]}


def compare(result: Result, summary: dict, other: dict) -> dict:
    """What metrics.json holds as "comparison"; differences are this evaluation minus the other."""
    labels, numbers, other_predicted = result.labels, range(len(result.classes)), other["predicted"]
    matrices = result.matrix, metrics.confusion_matrix(labels, other_predicted, labels=numbers)
    f1, other_f1 = (score_classes(m.diagonal(), m.sum(1), m.sum(0))[2] for m in matrices)
    hits, other_hits = (m.diagonal().tolist() for m in matrices)
    names = ("class", "f1_change", "correct", "other_correct")
    rows = zip(result.classes, (f1 - other_f1).tolist(), hits, other_hits)
    run, other_run = ({"tta": x["tta"]} | x["constants"] for x in (summary, other))
    return compare_paired(result.predicted == labels, other_predicted == labels) | {
        "classes": [dict(zip(names, row)) for row in sorted(rows, key=lambda row: -row[1])],
        "different_constants": {
            name: {"other": other_run.get(name), "this": value}
            for name, value in run.items()
            if value != other_run.get(name) and name not in utils.WHERE_AND_HOW
        },
        "other": {name: value for name, value in other.items() if name != "predicted"},
    }


def compare_paired(correct: np.ndarray, other_correct: np.ndarray) -> dict:
    """Difference of two accuracies over the same N images, its 95 % interval and McNemar's test.

    correct, other_correct: bool (N,). The interval is the percentile bootstrap over images: each
    adds 1, -1 or 0 to the difference, so a resample is a multinomial draw of three counts.
    McNemar's exact test: if both were equally good, an image that only one of them gets right would
    be either's with probability 1/2 (McNemar 1947, doi:10.1007/BF02295996).
    """
    only_this, only_other = correct & ~other_correct, other_correct & ~correct
    gained, lost, count = int(only_this.sum()), int(only_other.sum()), len(correct)
    probabilities = np.array([gained, lost, count - gained - lost]) / count
    drawn = np.random.default_rng(0).multinomial(count, probabilities, 10_000)
    interval = np.percentile((drawn[:, 0] - drawn[:, 1]) / count, [2.5, 97.5])
    return {
        "difference": (gained - lost) / count,
        "difference_interval_95": interval.tolist(),
        "only_this_correct": gained,
        "only_other_correct": lost,
        "mcnemar_p": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }


def largest_changes(comparison: dict, count: int) -> list[dict]:
    """The classes whose F1 rose and fell most, at most count each, the largest gain first."""
    rose = [row for row in comparison["classes"] if row["f1_change"] > 0]
    fell = [row for row in comparison["classes"] if row["f1_change"] < 0]
    return rose[:count] + fell[-count:]


def print_comparison(summary: dict) -> None:
    """Prints what changed from the other evaluation to this one, and how certain that is."""
    comparison, other = summary["comparison"], summary["comparison"]["other"]
    changes = largest_changes(comparison, 5)
    print(
        "\nlargest changes in F1, with correct images" if changes else "\nF1: no class has changed"
    )
    for row in changes:
        print("{f1_change:+8.4f}  {class}: other {other_correct}, this {correct}".format(**row))
    print()
    utils.say("compared", "with {results_dir}: {checkpoint}, epoch {epoch}".format(**other))
    before, after = (100 * x["top1_accuracy"] for x in (other, summary))
    utils.say("top-1", f"other {before:.2f} %, this {after:.2f} %")
    low, high = (100 * x for x in comparison["difference_interval_95"])
    interval = f"paired 95 % interval {low:+.2f} to {high:+.2f} points"
    utils.say("change", f"{after - before:+.2f} points, {interval}")
    p = comparison["mcnemar_p"]
    test = f"McNemar's exact test: p {'<' if p < 1e-4 else '='} {max(p, 1e-4):.2g}"
    counts = "{only_other_correct} correct only in the other, {only_this_correct} only in this"
    utils.say("images", f"{counts.format(**comparison)}; {test}")
    notes = {
        "tta": " (averaging two views changes the accuracy by itself)",
        "holdout_per_class": " (with 0, these images selected the checkpoint: optimistic)",
    }
    for name, values in comparison["different_constants"].items():
        text = "other {other!r}, this {this!r}".format(**values)
        utils.say("differs", f"{name.upper()}: {text}{notes.get(name, '')}")
    utils.say("caution", "two checkpoints, not two recipes: another SEED changes the accuracy too")


# ---- copies and wrong labels --------------------------------------------------------------------


class Pair(NamedTuple):
    """A test image and its likeliest copy: a row of duplicates.csv, and the pixels."""

    test_image: str
    training_image: str
    similarity: float
    test_label: str
    training_label: str
    same_label: bool
    pixels: tuple[Tensor, Tensor]


class Suspect(NamedTuple):
    """An image whose label is probably wrong: a row of suspect_labels.csv, and the pixels."""

    part: str
    image: str
    label: str
    likelier_label: str
    probability: float
    likelier_probability: float
    pixels: Tensor


class DataCheck(NamedTuple):
    """What --check-data finds."""

    trained: int  # images trained on
    identical: list[list[tuple]]  # groups of equal images: part, image and label of each
    copies: list[Pair]  # more similar than the threshold, the most similar first
    others: list[Pair]  # the next 12, which are no copies
    threshold: float
    copied: np.ndarray  # whether a test image has a copy (N,)
    suspects: list[Suspect]  # test images, then training images; the most suspect first


def check_data(classifier: Classifier, train: data.Split, result: Result) -> DataCheck:
    """Looks for copies of the test images among those trained on, and for wrong labels in both.

    Test labels are judged by the network, training labels by heads on its initial features, each
    head on images that it was not trained on.
    """
    classes, progress = result.classes, utils.on_terminal()
    test = data.Split(result.images, torch.from_numpy(result.labels), result.files).named()
    network, images, features = load_initial_network(classifier), [], []
    for split in (test, train):
        images.append(split.images.to(classifier.device))
        loader = data.EvalLoader(images[-1], *classifier.sizes)
        features.append(resnet.extract_features(network, loader, classifier.dtype, progress))
    partner, similarity, threshold = data.find_copies(*images, *features, progress)
    labels = train.labels.to(classifier.device)
    heads = resnet.predict_out_of_fold(features[1], labels, len(classes), progress)
    suspects = find_suspects("test", test, result.views.mean(0).double().softmax(1), classes)
    suspects += find_suspects("training", train, heads.cpu(), classes)

    partner, similarity = partner.tolist(), similarity.cpu().numpy()
    pairs = []
    for index in np.argsort(-similarity, kind="stable"):
        other = partner[index]
        names, alike = (test.files[index], train.files[other]), similarity[index].item()
        labels = classes[test.labels[index]], classes[train.labels[other]]
        pixels = test.images[index], train.images[other]
        pairs.append(Pair(*names, alike, *labels, labels[0] == labels[1], pixels))
    copied = similarity > threshold
    copies, others = pairs[: copied.sum()], pairs[copied.sum() :][:12]
    named = [
        (part, name, classes[label])
        for part, split in (("test", test), ("training", train))
        for name, label in zip(split.files, split.labels.tolist())
    ]
    groups = data.find_identical(test.images, train.images)
    identical = [[named[number] for number in group] for group in groups]
    return DataCheck(len(train.labels), identical, copies, others, threshold, copied, suspects)


def find_suspects(
    part: str, split: data.Split, probabilities: Tensor, classes: list[str]
) -> list[Suspect]:
    """Images whose label has a probability below 1 %, of probabilities (N, num_classes).

    The lowest first: "self-confidence" of Northcutt et al. 2021, "Confident learning", arXiv
    1911.00068. In folders of 1,000 pictures, 20 of them with a wrong label, 27 were below 1 %, 15
    of the wrong ones among them.
    """
    own, best = probabilities.gather(1, split.labels[:, None])[:, 0], probabilities.max(1)
    suspects = []
    for index in own.argsort(stable=True)[: (own < 0.01).sum()].tolist():
        names = split.files[index], classes[split.labels[index]], classes[best.indices[index]]
        chances = own[index].item(), best.values[index].item()
        suspects.append(Suspect(part, *names, *chances, split.images[index]))
    return suspects


def read_training_images(classifier: Classifier, args: Namespace) -> data.Split:
    """The images that the checkpoint was trained on, named by file or by official index."""
    split, _ = read_part(classifier, args, "train")
    limits = [classifier.constants[name] for name in ("holdout_per_class", "train_per_class")]
    trained, _ = data.split_per_class(split.labels, *limits)
    return split.named().select(trained)


def load_initial_network(classifier: Classifier) -> nn.Module:
    """The network with the weights that training began with; without their file, as it is now.

    Features that were trained on a wrong label agree with it, so that heads on them miss more. For
    copies, the initial features are as good or better.
    """
    architecture, name = (classifier.constants[x] for x in ("architecture", "weights"))
    path = resnet.find_weights(architecture, name)
    if not path.is_file():
        effect = "training labels that it has learnt by heart do not look wrong"
        utils.say("note", f"no file of weights {name!r}: the network's own features, {effect}")
        return classifier.model
    with utils.explained_misfit(path, architecture):
        weights = utils.load_safely(path, zip_only=False)
        model = resnet.build_model(architecture, len(classifier.classes))
        resnet.load_pretrained(model, weights.get("model", weights), with_head=False)
    return model.to(classifier.device, memory_format=data.memory_format(classifier.device))


def summarize_check(check: DataCheck, result: Result, other: dict | None) -> dict:
    """What metrics.json holds as "data_check"."""
    correct, kept = result.predicted == result.labels, ~check.copied
    parts = [suspect.part for suspect in check.suspects]
    summary = {
        "images_trained_on": check.trained,
        "identical": check.identical,
        "copies": len(check.copies),
        "copies_with_another_label": sum(not pair.same_label for pair in check.copies),
        "threshold": check.threshold,
        "suspect_labels": {part: parts.count(part) for part in ("test", "training")},
    }
    if check.copies:
        summary["accuracy_on_copies"] = correct[check.copied].mean()
    if kept.any():
        labels, predicted = result.labels[kept], result.predicted[kept]
        matrix = metrics.confusion_matrix(labels, predicted, labels=range(len(result.classes)))
        summary["without_copies"] = {
            "images": len(labels),
            "top1_accuracy": correct[kept].mean(),
            "interval_95": bootstrap_intervals(matrix)["top1_accuracy"],
        }
        if other:
            paired = compare_paired(correct[kept], other["predicted"][kept] == labels)
            summary["without_copies"]["comparison"] = paired
    return summary


def print_check(check: DataCheck, summary: dict) -> None:
    """Prints the accuracy without the test images that have copies, and what looks wrong."""
    figures, differ = summary["data_check"], [x for x in check.copies if not x.same_label]
    if differ:
        print("\ncopies with another label: similarity, test image | training image")
        for name, other, similarity, label, other_label, *_ in differ[:10]:
            print(f"{similarity:8.3f}  {name} {label} | {other} {other_label}")
    print()
    across, unlike = (
        sum(len({image[column] for image in group}) > 1 for group in check.identical)
        for column in (0, 2)  # part, label
    )
    counts = f"{across} in both parts, {unlike} with different labels"
    utils.say("exact", f"{len(check.identical)} groups of equal images, {counts}")
    found = f"{len(check.copies):,} of {summary['images']:,} test images have a near-duplicate"
    found += f" among the {check.trained:,} images trained on"
    if check.copies:
        found += f"; accuracy on them {100 * figures['accuracy_on_copies']:.2f} %"
    utils.say("copies", found)
    if rest := figures.get("without_copies"):
        low, high = (100 * x for x in rest["interval_95"])
        accuracy = f"top-1 {100 * rest['top1_accuracy']:.2f} %"
        interval = f"95 % interval {low:.2f} to {high:.2f} %"
        utils.say("without", f"{accuracy} on the other {rest['images']:,}, {interval}")
        if paired := rest.get("comparison"):
            low, high = (100 * x for x in paired["difference_interval_95"])
            change = f"{100 * paired['difference']:+.2f} points without copies"
            utils.say("change", f"{change}, paired 95 % interval {low:+.2f} to {high:+.2f} points")
    if differ:
        utils.say("labels", f"{len(differ)} copies have another label: one of the two is wrong")
    counts = "{test:,} test and {training:,} training labels".format(**figures["suspect_labels"])
    utils.say("suspect", f"{counts} have a probability below 1 %: see suspect_labels.csv")
    if check.threshold > data.COPY_SIMILARITY:
        usual = f"instead of {data.COPY_SIMILARITY}: other images are very similar too"
        utils.say("note", f"copies are those with a similarity above {check.threshold:.3f} {usual}")


def write_check(check: DataCheck | None, classes: list[str], folder: Path) -> None:
    """Writes the tables and pictures of --check-data; without it, removes earlier ones."""
    names = "duplicates", "suspect_labels"
    with writing_into(folder), legible(classes) as shown:
        for path in [folder / f"{name}.{suffix}" for name in names for suffix in ("csv", "png")]:
            path.unlink(missing_ok=True)
        if check:
            figures = draw_copies(check, shown), draw_suspects(check, shown)
            tables = (Pair, check.copies), (Suspect, check.suspects)
            for name, (row, rows), figure in zip(names, tables, figures):
                write_csv(folder / f"{name}.csv", row._fields[:-1], [x[:-1] for x in rows])
                if figure:
                    figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")


def draw_copies(check: DataCheck, shown: dict[str, str]) -> Figure:
    """The 24 most similar pairs, the 12 just above the threshold, and the 12 just below it."""
    tiles, captions = [], []
    for pair in [*check.copies[:24], *check.copies[24:][-12:], *check.others]:
        padding = pair.pixels[0].shape[-1] // 16
        tiles.append(make_grid(torch.stack(pair.pixels), padding=padding, pad_value=255))
        verdict = "copy" if pair.similarity > check.threshold else "no copy"
        labels = f"test: {shown[pair.test_label]}\ntraining: {shown[pair.training_label]}"
        captions.append(f"{verdict}, {pair.similarity:.3f}\n{labels}")
    return draw_tiles(tiles, captions, columns=6, width=2)


def draw_suspects(check: DataCheck, shown: dict[str, str]) -> Figure | None:
    """The 24 most suspect test images and the 24 most suspect training images, if there are any."""
    chosen = [x for x in check.suspects if x.part == "test"][:24]
    chosen += [x for x in check.suspects if x.part == "training"][:24]
    captions = [
        f"{x.part}: {shown[x.label]}\nlikelier: {shown[x.likelier_label]}\n"
        f"{100 * x.probability:.2f} and {100 * x.likelier_probability:.1f} %"
        for x in chosen
    ]
    tiles = [x.pixels for x in chosen]
    return draw_tiles(tiles, captions, columns=6, width=2) if tiles else None


# ---- files --------------------------------------------------------------------------------------


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Creates the results folder; raises UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise utils.UserError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another --results-dir"
        ) from error


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable]) -> None:
    """Writes a header and rows as a CSV file. Names that are not UTF-8 keep their bytes."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def write_tables(result: Result, summary: dict, folder: Path) -> None:
    """Writes metrics.json, the report, the confusion matrix and the predictions."""
    with writing_into(folder):
        text = json.dumps(summary, indent=2) + "\n"
        (folder / "metrics.json").write_text(text, encoding="utf-8")
        text = result.report_text.encode("utf-8", "surrogateescape")  # names keep their bytes
        (folder / "classification_report.txt").write_bytes(text)
        header = ["class", "precision", "recall", "f1-score", "support"]
        rows = zip(result.classes, *result.scores, result.support)
        write_csv(folder / "classification_report.csv", header, rows)
        rows = [[name, *counts] for name, counts in zip(result.classes, result.matrix)]
        write_csv(folder / "confusion_matrix.csv", ["true/predicted", *result.classes], rows)
        columns = [result.labels, result.predicted, result.confidence]
        header = ["index", "label", "predicted", "confidence"]
        if result.files:
            columns, header = [*columns, result.files], [*header, "file"]
        rows = zip(range(len(result.labels)), *columns)
        write_csv(folder / "predictions.csv", header, rows)


def write_pictures(result: Result, summary: dict, folder: Path) -> None:
    """Draws and writes every picture for which there is something to draw."""
    optional = ["most_confused", "mistakes", "training_curves"]
    figures = dict.fromkeys([*optional, "superclass_confusion_matrix", "comparison"])
    with writing_into(folder), legible(result.classes) as shown:
        names = list(shown.values())
        figures["confusion_matrix"] = draw_matrix(result.matrix, names, result.superclasses)
        figures["per_class"] = draw_f1(result, names)
        figures["reliability"] = draw_reliability(result.bins)
        if result.superclasses:
            coarse_matrix = count_superclasses(result)
            figures["superclass_confusion_matrix"] = draw_matrix(coarse_matrix, result.superclasses)
        if result.pairs:
            figures["most_confused"] = draw_pairs(result, names)
            figures["mistakes"] = draw_mistakes(result, names)
        if summary["history"]:
            figures["training_curves"] = draw_curves(summary["history"], summary["constants"])
        if "comparison" in summary:
            figures["comparison"] = draw_comparison(summary, shown)
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            if figure:
                figure.savefig(path, dpi=150, bbox_inches="tight")
            else:
                path.unlink(missing_ok=True)  # an earlier evaluation may have left it
    if nothing := [f"{name}.png" for name in optional if not figures[name]]:
        utils.say("note", f"nothing to draw in {', '.join(nothing)}")


# ---- pictures -----------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """A figure, in inches; made without pyplot, which would open a window."""
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)  # or seaborn would use pyplot
    return figure


@contextmanager
def legible(texts: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields each text as the pictures made in this block can show it, character by character.

    A dollar starts no mathematics. Characters that the usual font lacks come from installed fonts
    that have them; one that no font has is escaped as in Python, "\\u4e2d", instead of a box.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # weights are no matter
    usual = FontProperties()
    families, missing = usual.get_family(), set("".join(texts)) - {"\n"}
    for name in [usual.get_name(), *sorted(font_manager.get_font_names())]:
        if missing and not name.startswith("Last Resort"):  # which has boxes for all characters
            font = font_manager.get_font(font_manager.findfont(FontProperties(family=name)))
            found = {x for x in missing if x.isprintable() and font.get_char_index(ord(x))}
            families, missing = families + [name] * bool(found), missing - found
    escapes = {ord(x): x.encode("unicode_escape").decode() for x in missing}
    with rc_context({"font.family": families, "text.parse_math": False}):
        yield {text: text.translate(escapes) for text in texts}


def draw_matrix(matrix: np.ndarray, names: list[str], groups: Sequence[str] = ()) -> Figure:
    """Confusion matrix, rows true, columns predicted; by superclass if groups names them."""
    count, numbered = len(names), len(names) <= 20
    if groups:
        order = np.argsort(superclass_numbers(names), kind="stable")
        matrix, names = matrix[order][:, order], [names[i] for i in order]
    fractions = matrix / matrix.sum(1, keepdims=True).clip(1)
    label = "fraction of the true class's images" + ("; numbers: images" if numbered else "")
    ticks = names if count <= 200 else False
    style = {"xticklabels": ticks, "yticklabels": ticks, "square": True, "cmap": "Blues", "fmt": ""}
    style["norm"] = PowerNorm(0.5, 0, 1)  # so that a few per cent are visible beside 90
    style["annot"] = np.where(matrix, matrix, "") if numbered else None
    style["cbar_kws"] = {"label": label, "shrink": 0.5, "pad": 0.02}
    side = max(7, min(40, count * (0.55 if numbered else 0.2)))
    figure = new_figure(side, side)
    axes = sns.heatmap(fractions, ax=figure.subplots(), **style)
    axes.tick_params("y", rotation=0)
    axes.set(xlabel="predicted class", ylabel="true class")
    if groups:
        edges = np.linspace(0, count, len(groups) + 1)
        axes.hlines(edges, 0, count, color="gray", linewidth=0.5)
        axes.vlines(edges, 0, count, color="gray", linewidth=0.5)
        middles = (edges[1:] + edges[:-1]) / 2
        axes.secondary_yaxis("right").set_yticks(middles, groups)
        axes.secondary_xaxis("top").set_xticks(middles, groups, rotation=60, ha="left")
    return figure


def draw_tiles(images: Sequence, captions: list[str], columns: int, width: float) -> Figure:
    """Images uint8 (3, H, W) of one size, each width inches wide under its caption."""
    rows, lines = -(-len(images) // columns), captions[0].count("\n") + 1
    height = width * images[0].shape[1] / images[0].shape[2] + 0.19 * lines
    figure = new_figure(width * columns, height * rows)
    for position, (image, caption) in enumerate(zip(images, captions), start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(caption, fontsize=9, loc="left")
        axes.axis("off")
    return figure


def draw_mistakes(result: Result, names: list[str]) -> Figure:
    """The 24 mistakes with the highest confidence."""
    indices = result.most_confident(result.predicted != result.labels, 24)
    percent = 100 * result.confidence
    captions = [
        f"true: {names[result.labels[i]]}\npredicted: {names[result.predicted[i]]}\n"
        f"confidence: {percent[i]:.2f} %"
        for i in indices
    ]
    return draw_tiles(result.images[indices], captions, columns=6, width=2)


def draw_pairs(result: Result, names: list[str]) -> Figure:
    """A row per pair: three images of each class and, between them, three taken for the other."""
    strips, captions, size = [], [], result.images.shape[-1]
    for pair in result.pairs[:8]:
        a, b = (result.classes.index(pair[key]) for key in ("true", "taken_for"))
        for label, predicted in (a, a), (a, b), (b, a), (b, b):
            mask = (result.labels == label) & (result.predicted == predicted)
            chosen = result.most_confident(mask, 3)
            images = torch.full((3, 3, size, size), 255, dtype=torch.uint8)  # white
            images[: len(chosen)] = result.images[chosen]
            strips.append(make_grid(images, padding=size // 16, pad_value=255))
            mistake = f"taken for {names[predicted]}" if label != predicted else "recognised"
            captions.append(f"{names[label]} {mistake}: {mask.sum()}")
    return draw_tiles(strips, captions, columns=4, width=3)


def draw_f1(result: Result, names: list[str]) -> Figure:
    """F1 of every class that has test images, the worst first, 25 per column."""
    numbers = result.worst_first
    columns = [numbers[start : start + 25] for start in range(0, len(numbers), 25)]
    figure = new_figure(max(6, 3.5 * len(columns)), 1 + 0.24 * len(columns[0]))
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        draw_bars(axes, [names[i] for i in column], result.f1[column], "%.2f", color="steelblue")
        axes.set(xlabel="F1", xlim=(0, 1.15), ylim=(len(columns[0]) - 0.5, -0.5))
    return figure


def draw_bars(axes: Axes, names: list[str], values: np.ndarray, number: str, **style) -> None:
    """Horizontal bars, each with its name and its number; bars of the same name stay apart."""
    bars = axes.barh(range(len(names)), values, **style)
    axes.bar_label(bars, fmt=number, padding=2)
    axes.set_yticks(range(len(names)), names)
    sns.despine(ax=axes)


def draw_reliability(bins: np.ndarray) -> Figure:
    """Accuracy by confidence, against the diagonal, and the fraction of images in each bin."""
    images, accuracy, _ = bins
    width = 1 / len(images)
    middles = width * (np.arange(len(images)) + 0.5)
    style = {"width": width, "color": "steelblue", "edgecolor": "white"}
    figure = new_figure(6, 7)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.bar(middles, accuracy, label="measured", **style)
    upper.plot([0, 1], [0, 1], "k--", label="calibrated: accuracy = confidence")
    error = 100 * expected_calibration_error(bins)
    upper.set(title=f"expected calibration error {error:.2f} %", ylabel="accuracy", ylim=(0, 1))
    lower.bar(middles, images / images.sum(), **style)
    lower.set(xlabel="confidence: softmax of the predicted class", ylabel="fraction of images")
    lower.set_xlim(0, 1)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def read_history(checkpoint: Path, own: list[dict]) -> list[dict]:
    """The history in a checkpoint, or history.csv beside it where that continues it."""
    try:
        with open(checkpoint.with_name("history.csv"), encoding="utf-8", newline="") as file:
            rows = [{key: float(x) for key, x in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):  # it is missing or damaged
        return own
    return rows if own and rows[: len(own)] == own else own


def draw_curves(history: list[dict], constants: dict) -> Figure:
    """Loss and accuracy by epoch; marks the best epoch and where the learning rate dropped."""
    column = {name: [row[name] for row in history] for name in history[0]}
    watch, smooth = constants["watch"], constants["schedule"] != "plateau"
    epochs, rates, best = column["epoch"], column["learning_rate"], utils.best_epoch(history, watch)
    label = f"best epoch by validation {watch}: {best['epoch']:.0f}"
    figure = new_figure(11, 4.5)
    panels = figure.subplot_mosaic([["loss", "accuracy"]])
    plot_history(panels, history)
    for name, axes in panels.items():
        axes.plot(best["epoch"], best[f"val_{name}"], "*", ms=15, color="crimson", label=label)
        draw_learning_rate(axes, epochs, rates, smooth)
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    handles = panels["loss"].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    return figure


def plot_history(panels: dict[str, Axes], history: list[dict], run: str = "", **style) -> None:
    """Plots the loss and the accuracy by epoch, in training and in validation."""
    epochs = [row["epoch"] for row in history]
    style |= {"markersize": 4 if len(epochs) <= 50 else 0}
    since = "" if epochs[0] else " from epoch 1"  # epoch 0 trains the head on plain images
    parts = {"train": (f"training, augmented{since}", "o--"), "val": ("validation", "s-")}
    for name in ("loss", "accuracy"):
        for part, (label, line) in parts.items():
            values = [row[f"{part}_{name}"] for row in history]
            panels[name].plot(epochs, values, line, label=run + label, **style)
        panels[name].set_xlabel("epoch")
        panels[name].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels["loss"].set(ylabel="loss (cross-entropy, nats)", ylim=(0, None))
    panels["accuracy"].set_ylabel("accuracy")
    panels["accuracy"].yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def draw_comparison(summary: dict, shown: dict[str, str]) -> Figure:
    """The largest changes in F1 per class, 15 each way, and both runs' loss and accuracy."""
    changes = largest_changes(summary["comparison"], 15)
    names, values = [shown[row["class"]] for row in changes], [row["f1_change"] for row in changes]
    this, other = "steelblue", "darkorange"
    figure = new_figure(12, 8)
    panels = figure.subplot_mosaic([["f1", "loss"], ["f1", "accuracy"]])
    colors = [this if x > 0 else other for x in values]
    draw_bars(panels["f1"], names, values, "%+.3f", color=colors)
    panels["f1"].margins(x=0.2)
    panels["f1"].set(ylim=(max(15, len(names)) - 0.5, -0.5))
    panels["f1"].set_title("" if names else "no class has changed")
    panels["f1"].set_xlabel("change in F1: this evaluation - other")
    old = summary["comparison"]["other"]["history"]
    plot_history(panels, old, "other: ", color=other, linewidth=3, alpha=0.6)
    plot_history(panels, summary["history"], "this: ", color=this)
    handles = panels["loss"].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    return figure


def draw_learning_rate(axes: Axes, epochs: list, rates: list, smooth: bool) -> None:
    """Draws a smooth schedule as a line; otherwise marks where the learning rate changed."""
    first = epochs.index(1) if 1 in epochs else 0  # epoch 0 trains the head, at a rate of its own
    if smooth:
        right = axes.twinx()
        right.plot(epochs[first:], rates[first:], color="gray", linestyle=":")
        right.set(ylabel="learning rate (dotted)", ylim=(0, None))
        return
    for epoch, rate, before in zip(epochs, rates, [None, *rates]):
        if rate != before:
            axes.axvline(epoch - 0.5, color="gray", linestyle=":")
            style = {"xycoords": axes.get_xaxis_transform(), "rotation": 90, "ha": "center"}
            axes.annotate(f"lr {rate:.2g}", (epoch - 0.5, 1.02), **style)


def open_window(path: Path) -> None:
    """Shows a picture until its window is closed; does nothing if there is no display."""
    try:
        figure = plt.figure(path.name, layout="constrained")
    except Exception as error:  # noqa: BLE001, a backend or display that does not exist
        return utils.say("note", f"no window: {error}")
    if plt.get_backend().lower() != "agg":  # which matplotlib chooses where there is no display
        axes = figure.add_subplot()
        axes.imshow(plt.imread(path))
        axes.axis("off")
        plt.show()
    plt.close(figure)


# ---- the user's own pictures --------------------------------------------------------------------


def classify_pictures(classifier: Classifier, args: Namespace, folder: Path) -> Path:
    """Prints and writes the five most likely classes of the user's pictures, draws the first 24."""
    files, images = read_pictures(args.images, classifier.constants["stored_size"] or 32)
    probabilities = classifier.predict(images).mean(0).softmax(1)
    captions, rows = [], []
    for file, top5 in zip(files, find_top5(probabilities, classifier.classes)):
        captions.append("\n".join(f"{100 * p:6.2f} %  {name}" for name, p in top5))
        rows.append([file, *chain.from_iterable(top5)])
    titles = [f"{file.name[-24:]}\n{caption}" for file, caption in zip(files[:24], captions)]
    picture, table = folder / "predictions.png", folder / "pictures.csv"
    with writing_into(folder), legible(titles) as shown:
        ranks = range(1, len(rows[0]) // 2 + 1)
        header = [f"{column}_{rank}" for rank in ranks for column in ("class", "probability")]
        write_csv(table, ["file", *header], rows)
        tiles = draw_tiles(images[:24], [shown[title] for title in titles], columns=4, width=2.5)
        tiles.savefig(picture, dpi=150, bbox_inches="tight")
    for file, caption in zip(files, captions):
        print(f"{file}\n{caption}")
    seen = f"the first {len(titles)} as the network sees them"
    utils.say("results", f"{table}; {picture}: {seen}")
    return picture


def read_pictures(paths: list[str], size: int) -> tuple[list[Path], Tensor]:
    """Pictures from files and folders, centre-cropped and resized: uint8 (N, 3, size, size).

    Files that are not pictures are named on stderr. Raises UserError if there is no other.
    """
    files, images, waiting = [], [], [Path(path) for path in reversed(paths)]
    while waiting:
        file = waiting.pop()
        try:
            if file.is_dir():
                waiting += sorted(file.iterdir(), reverse=True)
                continue
            images.append(data.read_picture(file, size))
            files.append(file)
        except Exception as error:  # noqa: BLE001, its type depends on what is wrong with the file
            print(f"skipped  {file}: {error}", file=sys.stderr)
    if not files:
        raise utils.UserError(f"No picture among {', '.join(paths)}. Name image files, or folders")
    return files, torch.stack(images)


def find_top5(probabilities: Tensor, classes: list[str]) -> list[list[tuple[str, float]]]:
    """The five most likely classes of each image with their probabilities, most likely first."""
    values, numbers = probabilities.topk(min(5, len(classes)))
    rows = zip(numbers.tolist(), values.tolist())
    return [[(classes[i], p) for i, p in zip(*row)] for row in rows]


if __name__ == "__main__":
    with utils.explained_exit(
        "the results are incomplete, run it again; checkpoints are untouched",
        "free it of other programs, or use --device cpu",
    ):
        main()
