"""Evaluates a checkpoint on the test images: how good it is, and where it goes wrong.

    python evaluate.py                              checkpoints/best.pt
    python evaluate.py --checkpoint checkpoints/demo/best.pt
    python evaluate.py --tta                        averages over each image and its mirror image
    python evaluate.py --compare results/before     what changed since another evaluation
    python evaluate.py --results results/a0 results/a1 --compare results/b0 results/b1
                                                    two recipes, each trained with several seeds
    python evaluate.py --check-data                 finds test images trained on, and wrong labels
    python evaluate.py --images cat.jpg photos/     the five likeliest classes of your own pictures
    python evaluate.py --export model.pt2           one file to use elsewhere, with torch alone

Image size, batch size, precision and data set are those of the checkpoint. It prints a report and
writes metrics.json (accuracies are fractions), tables and pictures into RESULTS_DIR. In
predictions.csv, index counts the images from 0 in the order of the official test file, or those of
a folder by class and name; confidence is the softmax of the predicted class. Rows of a confusion
matrix are true classes. Macro F1 is the mean over the classes with test images.
"""

import copy
import csv
import json
import logging
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats
from sklearn import metrics
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

import data
import model as resnet
import utils

CHECKPOINT = "checkpoints/best.pt"  # file written by train.py
DATA_DIR = "data"  # folder that holds cifar-100-python/, downloaded into it when missing
DATASET = ""  # where the folder of pictures that was trained on is now; "" if it has not moved
RESULTS_DIR = "results"  # folder for everything this script writes
DEVICE = "auto"  # where to compute ["auto", "cuda", "mps", "cpu"]
TTA = False  # average the logits over each image and its mirror image: twice the time
COMPARE = []  # results folder to compare with, image by image; of another recipe, one per seed
RESULTS = []  # results folders, one per seed, to compare with COMPARE; no checkpoint is evaluated
CHECK_DATA = False  # look for copies and wrong labels: runs over the training images too
EXPORT = ""  # file for the model with its preprocessing: .pt2 for torch alone, or .onnx; "": none
IMAGES = []  # pictures, or folders of them, to classify instead of the test images
SHOW = True  # open the confusion matrix in a window where there is a display


def main(argv: list[str] | None = None) -> None:
    if utils.this_process().rank:
        return  # under torchrun the first process evaluates
    args = utils.parse_flags(__file__, argv)
    folder = Path(args.results_dir)
    if args.results or args.compare:
        runs, others = len(args.results) or 1, len(args.compare)
        overwritten = folder.resolve() in [Path(path).resolve() for path in args.compare]
        if overwritten or not (runs == others == 1 or min(runs, others) > 1):
            expected = "one folder, not --results-dir, or at least two each in --results and "
            utils.refuse_flag("compare", args.compare, f"{expected}--compare")
    if args.export and (args.images or args.results):
        utils.refuse_flag("export", args.export, "neither --images nor --results beside it")
    if args.results:
        picture = compare_results(args, folder)
    else:
        classifier = Classifier(args)
        with writing_into(folder):
            pass  # rather fail now than after the network ran
        do = classify_pictures if args.images else evaluate
        picture = do(classifier, args, folder)
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
        utils.say("device", f"{utils.device_name(self.device)}, {self.checkpoint['precision']}")
        utils.say("model", f"{self.path}, epoch {self.checkpoint['epoch']}")
        if self.tta and not self.constants["flip"]:
            utils.say("note", "trained with FLIP = 0: mirror images may lower the accuracy")

    def load(self, images: Tensor) -> data.EvalLoader:
        """Batches on the device, of the size and with the resizing of the validation in training."""
        mode = self.constants["interpolation"]
        return data.EvalLoader(images, *self.sizes, self.device, mode=mode)

    def predict(self, images: Tensor) -> Tensor:
        """Logits (views, N, num_classes) of images uint8 (N, 3, S, S); with --tta, 2 views."""
        images, networks = data.place(images, self.device), [self.model]
        loader = self.load(images)
        if self.tta:  # mirrored batch by batch: the device holds the images once
            networks.append(nn.Sequential(v2.Lambda(v2.functional.horizontal_flip), self.model))
        progress = utils.is_first()
        logits = [resnet.predict(network, loader, self.dtype, progress) for network in networks]
        if not torch.cat(logits).isfinite().all():
            raise utils.UserError(f"{self.path}: its predictions are not finite. Train it again")
        return torch.stack(logits).cpu()


@dataclass(eq=False)
class Result:
    """What a network predicts for N test images, and the figures that follow."""

    classes: list[str]
    labels: np.ndarray  # class numbers (N,), as predicted
    predicted: np.ndarray
    confidence: np.ndarray  # softmax of the predicted class (N,)
    folder: str
    summary: dict  # what metrics.json holds

    def __post_init__(self) -> None:
        self.correct, numbers = self.predicted == self.labels, range(len(self.classes))
        self.matrix = metrics.confusion_matrix(self.labels, self.predicted, labels=numbers)
        self.support = self.matrix.sum(1)  # test images of each class
        self.scores = score_classes(self.matrix.diagonal(), self.support, self.matrix.sum(0))
        self.f1, tested = self.scores[2], np.flatnonzero(self.support)
        self.worst_first = tested[np.argsort(self.f1[tested], kind="stable")]
        self.pairs = find_confused_pairs(self.matrix, self.classes)
        self.most_confident = np.argsort(-self.confidence, kind="stable")  # indices of the images


def read_test_images(classifier: Classifier, args: Namespace) -> tuple[data.Split, Result]:
    """The images, of a folder those of test/, else val/, else held out, and their true classes.

    Raises UserError if they cannot be told from those trained on.
    """
    name, classes = args.dataset or classifier.constants["dataset"], classifier.classes
    held_out = classifier.constants["holdout_per_class"] > 0
    part = data.find_test_part(name)
    if part == "holdout" and not held_out:
        part = "val"  # which is missed by its name
    split, dataset = read_part(classifier, args, part)
    kind = "test images"
    if part == "holdout":
        kind = "hold-out images, because there is no test/ or val/"
    elif name not in data.BUILT_IN:
        kind = f"images of {Path(name, part)}"
    utils.say("data", f"{name}: {len(split.labels):,} {kind}")
    validated = dataset == classifier.checkpoint.get("validation", dataset)
    if part == "holdout" or (validated and not held_out):
        selected = True
        note = "the checkpoint was selected on these images: the numbers are optimistic"
    elif part == "val" and not held_out:
        selected = False
        note = "these are not the images that selected the checkpoint"
    else:
        selected = False
        note = "these images were used neither to train nor to select the checkpoint"
    utils.say("note", note)
    labels, facts = split.labels.numpy(), {"images": len(split.labels), "dataset": dataset}
    facts["test_images_chose_checkpoint"] = selected
    return split, Result(classes, labels, labels, np.ones(len(labels)), "", facts)


def read_part(classifier: Classifier, args: Namespace, part: str) -> tuple[data.Split, str]:
    """The images of "train", "holdout", "val" or "test", and which they are: data.identify().

    Downloads what is missing. Raises UserError if they are not those of the checkpoint.
    """
    settings, checkpoint = Namespace(**classifier.constants), classifier.checkpoint
    settings.dataset, settings.data_dir = args.dataset or settings.dataset, args.data_dir
    data.fetch(settings)
    source = "train" if part == "holdout" else part
    split, classes = data.read_images(settings, source, classifier.classes)
    if source == "train" and classes == classifier.classes:
        split = split.named()  # after their places in the official files
        train, holdout = data.split_images(split, classes, settings)
        split = train if part == "train" else holdout
    split = data.leave_out_undecoded(split, settings)
    dataset = data.identify(settings, split)
    expected = dataset
    if source == "train":
        expected = checkpoint.get("dataset" if part == "train" else "validation", dataset)
    if classes != classifier.classes or dataset != expected:
        raise utils.UserError(
            f"{settings.dataset} is not what {classifier.path} was trained on: "
            f"{checkpoint['dataset']}, {len(classifier.classes)} classes"
        )
    return split, dataset


def evaluate(classifier: Classifier, args: Namespace, folder: Path) -> Path:
    """Evaluates on the test images, writes everything, then prints; returns the picture to show."""
    test, truth = read_test_images(classifier, args)
    others = [read_result(path, truth) for path in args.compare]
    train = read_part(classifier, args, "train")[0] if args.check_data else None
    views = classifier.predict(test.images)
    confidence, predicted = (x.numpy() for x in views.mean(0).double().softmax(1).max(1))
    result = replace(truth, predicted=predicted, confidence=confidence, folder=args.results_dir)
    result.summary |= summarize(result, views, classifier)
    if others:
        result.summary["comparison"] = compare([result], others)
    options = {"target_names": result.classes, "labels": range(len(result.classes)), "digits": 4}
    report = metrics.classification_report(result.labels, predicted, zero_division=0, **options)
    check = check_data(classifier, train, test, views.mean(0).softmax(1)) if train else None
    if check:
        result.summary["data_check"] = summarize_check(check, result, others)
    pictures = ("superclass_confusion_matrix", "comparison", "most_confused", "mistakes")
    pictures += ("training_curves", "duplicates", "suspect_labels")  # which not every run has
    outdated = [*(f"{name}.png" for name in pictures), "duplicates.csv", "suspect_labels.csv"]
    with writing_into(folder, outdated) as new:
        write_tables(result, report, test.files, new)
        write_pictures(result, test.images, others, new)
        if check:
            write_check(check, new)
    print_numbers(result, report)
    if others:
        print_comparison([result], others, result.summary["comparison"])
    if check:
        print_check(check, result.summary)
    utils.say("results", str(folder))
    if args.export:
        export(classifier, test.images, views[0].softmax(1), Path(args.export))
    return folder / "confusion_matrix.png"


# ---- numbers ------------------------------------------------------------------------------------


def summarize(result: Result, views: Tensor, classifier: Classifier) -> dict:
    """What metrics.json holds, apart from the facts about the test images and a comparison."""
    checkpoint, labels = classifier.checkpoint, torch.from_numpy(result.labels)
    summary = score(views.mean(0), labels) | {
        "macro_f1": np.average(result.f1, weights=result.support > 0),
        "classes_without_images": [result.classes[i] for i in np.flatnonzero(result.support == 0)],
        "expected_calibration_error": calibrate(result)[2],
        "intervals_95": bootstrap_intervals(result.matrix),
        "most_confused": result.pairs[:10],
        "tta": classifier.tta,
        "checkpoint": str(classifier.path),
        **{name: checkpoint[name] for name in ("epoch", "precision", "constants")},
        "history": utils.read_history(classifier.path, checkpoint["history"]),
    }
    if result.classes == data.CLASSES:
        superclasses = data.count_superclasses(data.by_superclass(result.matrix))
        summary["superclass_accuracy"] = superclasses.trace() / len(labels)
    if classifier.tta:
        summary["without_tta"] = score(views[0], labels)
    return summary


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy and top-1 accuracy of logits (N, num_classes); top-5 of 6 or more."""
    loss = F.cross_entropy(logits, labels, reduction="sum").item() / len(labels)
    scores = {"loss": loss, "top1_accuracy": metrics.accuracy_score(labels, logits.argmax(1))}
    if (count := logits.shape[1]) > 5:
        top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(count))
        scores["top5_accuracy"] = top5
    return scores


def score_classes(correct: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Precision, recall, F1 (3, ..., num_classes) from counts of images; nothing / nothing = 0."""
    f1 = 2 * correct / (true + predicted).clip(1)
    return np.stack([correct / predicted.clip(1), correct / true.clip(1), f1])


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


def calibrate(result: Result, count: int = 15) -> tuple[np.ndarray, np.ndarray, float]:
    """Images and accuracy in bins of confidence (0, 1/count], ...; Guo et al. 2017's equation 3."""
    numbers = np.ceil(result.confidence * count).astype(int).clip(1, count) - 1
    sums = (np.bincount(numbers, x, count) for x in (None, result.correct, result.confidence))
    images, correct, confidence = sums
    return images, correct / images.clip(1), abs(correct - confidence).sum() / images.sum()


def bootstrap_intervals(matrix: np.ndarray, resamples: int = 1000) -> dict[str, list[float]]:
    """95 % percentile intervals of top-1 and macro F1 over test images drawn with replacement."""
    # Images in one cell of the matrix are alike, so a resample is a multinomial draw of the cells.
    cells = matrix.nonzero()
    probabilities = matrix[cells] / matrix.sum()
    drawn = np.random.default_rng(0).multinomial(matrix.sum(), probabilities, resamples)
    in_row, in_column = (np.eye(len(matrix))[numbers] for numbers in cells)
    correct, true = drawn @ (in_row * in_column), drawn @ in_row  # (resamples, num_classes)
    macro_f1 = np.average(score_classes(correct, true, drawn @ in_column)[2], 1, true > 0)
    samples = {"top1_accuracy": correct.sum(1) / matrix.sum(), "macro_f1": macro_f1}
    return {name: np.percentile(x, [2.5, 97.5]).tolist() for name, x in samples.items()}


def print_numbers(result: Result, report: str) -> None:
    """Prints the report, the worst classes and pairs, and last, above the prompt, the summary."""
    summary = result.summary
    print(f"\n{report}\nworst classes by F1")
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
        if name in summary["intervals_95"]:
            low, high = summary["intervals_95"][name]
            meaning = f", 95 % interval {100 * low:.2f} to {100 * high:.2f} %"
        if name in summary:
            utils.say(label, f"{100 * summary[name]:.2f} %{meaning}")
    if summary["tta"]:
        loss, accuracy = (summary["without_tta"][name] for name in ("loss", "top1_accuracy"))
        utils.say("no tta", f"loss {loss:.4f}, top-1 {100 * accuracy:.2f} %")
    if absent := len(summary["classes_without_images"]):
        classes = f"{absent} of {len(result.classes)} classes have no test image"
        utils.say("note", f"{classes}: macro F1 leaves them out, the report counts them as 0")


# ---- two evaluations, or two recipes, on the same images ----------------------------------------


def read_result(folder: str, like: Result | None = None) -> Result:
    """Reads a results folder. Raises UserError if it is damaged, or of other images than like."""
    path = Path(folder, "metrics.json")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        names = ("dataset", "images", "checkpoint", "epoch", "tta", "top1_accuracy")
        summary = {name: summary[name] for name in (*names, "constants")}
        summary["constants"] = utils.with_defaults(summary)
        path = Path(folder, "confusion_matrix.csv")
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            _, *classes = next(csv.reader(file), ())
        path = Path(folder, "predictions.csv")
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            _, *rows = list(csv.reader(file)) or [()]
        if len(rows) != summary["images"]:
            raise ValueError(f"it has {len(rows):,} images, not {summary['images']:,}")
        table = [",".join(row[:4]) for row in rows]  # without the names of files
        *numbers, confidence = np.loadtxt(table, delimiter=",", ndmin=2).T
        indices, labels, predicted = (x.astype(int) for x in numbers)
        path = Path(folder)  # what follows compares one of its files with another
        result = Result(classes, labels, predicted, confidence, folder, summary)
        dataset = (like := like or result).summary["dataset"]
        if summary["dataset"] != dataset:
            raise ValueError(f"its data set is {summary['dataset']!r}, not {dataset!r}")
        if not np.array_equal([indices, labels], [range(len(labels)), like.labels]):
            raise ValueError("its labels are not those of the test images")
        if classes != like.classes:
            raise ValueError("its classes have other names")
        if not abs(result.correct.mean() - summary["top1_accuracy"]) < 1e-9:
            raise ValueError("its accuracy is not that of metrics.json")
    except Exception as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise utils.UserError(
            f"{path} cannot be compared: {getattr(error, 'strerror', None) or reason}. Expected "
            "results of this evaluate.py for the same test images: evaluate that checkpoint again"
        ) from error
    return result


def compare_results(args: Namespace, folder: Path) -> Path:
    """Compares results folders, writes everything, then prints; returns the picture to show."""
    first = read_result(args.results[0])
    sides = [[read_result(x, first) for x in paths] for paths in (args.results, args.compare)]
    comparison, picture = compare(*sides), folder / "comparison.png"
    with writing_into(folder) as new:
        text = json.dumps(comparison, indent=2) + "\n"
        (new / "comparison.json").write_text(text, encoding="utf-8")
        figure = draw_comparison(*sides, comparison)
        figure.savefig(new / picture.name, dpi=150, bbox_inches="tight")
    print_comparison(*sides, comparison)
    utils.say("results", f"{picture}, {folder / 'comparison.json'}")
    return picture


def compare(these: list[Result], others: list[Result]) -> dict:
    """What is written of one run compared with one, or of a recipe's runs with another's."""
    sides, settings = (these, others), differences(these[0], others[0])
    for runs in sides:
        require_one_recipe(runs)
    if len(these) > 1:
        settings.pop("seed", None)
    f1, other_f1 = (np.mean([run.f1 for run in runs], 0) for runs in sides)
    hits = [np.mean([run.matrix.diagonal() for run in runs], 0).tolist() for runs in sides]
    rows = zip(these[0].classes, (f1 - other_f1).tolist(), *hits)
    names = ("class", "f1_change", "correct", "other_correct")
    return compare_accuracies(*(np.stack([run.correct for run in runs]) for runs in sides)) | {
        "classes": [dict(zip(names, row)) for row in sorted(rows, key=lambda row: -row[1])],
        "different_constants": settings,
    }


def differences(run: Result, other: Result) -> dict[str, dict]:
    """The settings that differ, apart from those that tell where and how a run is done."""
    this, that = ({"tta": x.summary["tta"]} | x.summary["constants"] for x in (run, other))
    return {
        name: {"other": that.get(name), "this": value}
        for name, value in this.items()
        if value != that.get(name) and name not in utils.WHERE_AND_HOW
    }


def require_one_recipe(runs: list[Result]) -> None:
    """Raises UserError unless the runs differ in SEED, each from all others, and in nothing else."""
    seeds = [run.summary["constants"]["seed"] for run in runs]
    names = sorted({name for run in runs for name in differences(run, runs[0])} - {"seed"})
    if names or len({*seeds}) < len(seeds):
        found = f"differ in {', '.join(names).upper()}" if names else f"have SEED {seeds}"
        folders = ", ".join(run.folder for run in runs)
        raise utils.UserError(f"{folders} {found}. Expected one recipe, each run with its own SEED")


def compare_accuracies(correct: np.ndarray, other_correct: np.ndarray) -> dict:
    """Difference of two mean accuracies on the same N images, and its 95 % interval.

    correct, other_correct: bool (runs, N). Two variances add up: that of the accuracies from run to
    run, pooled, and that of the difference from image to image, less the noise within the runs,
    which the first contains. The interval is Student's t. Satterthwaite (1946, doi:10.2307/3002019)
    divides the runs' degrees of freedom by the square of their share of the variance, which covers
    the truth 92 to 95 % of the time with two runs a side; divided by the share itself, 94 to 96 %
    (tests/test_compare.py). A single run a side has the images' part alone, and McNemar's exact
    test (1947, doi:10.1007/BF02295996).
    """
    sides, per_image = (correct, other_correct), correct.mean(0) - other_correct.mean(0)
    noise = np.concatenate([side - side.mean(0) for side in sides])  # (runs of both, N)
    count, freedom = len(per_image), max(len(noise) - 2, 1)
    run_variance = np.square(noise.mean(1)).sum() / freedom
    noise_variance = noise.var(1, ddof=1).sum() / freedom / count
    more = np.arange(101)  # runs of each recipe than there are
    inverse = sum(1 / (len(side) + more) for side in sides)
    images = max(per_image.var(ddof=1) / count - noise_variance * inverse[0], 0)
    runs = (run_variance or noise_variance) * inverse  # accuracies that are equal are so by chance
    share = (runs / (runs + images).clip(1e-30)).clip(1e-9)
    widths = stats.t.ppf(0.975, (freedom + 2 * more) / share) * np.sqrt(runs + images)
    difference = per_image.mean()
    interval = [difference - widths[0], difference + widths[0]]
    comparison = {"difference": difference, "difference_interval_95": interval}
    if len(noise) > 2:  # how many more would settle a difference of this size, if it is real
        settled = widths < abs(difference)
        return comparison | {"more_seeds": settled.argmax().item() if settled.any() else None}
    gained, lost = ((per_image == x).sum().item() for x in (1, -1))
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return comparison | {"only_this_correct": gained, "only_other_correct": lost, "mcnemar_p": p}


def largest_changes(comparison: dict, count: int) -> list[dict]:
    """The classes whose F1 rose and fell most, at most count each, the largest gain first."""
    rose = [row for row in comparison["classes"] if row["f1_change"] > 0]
    fell = [row for row in comparison["classes"] if row["f1_change"] < 0]
    return rose[:count] + fell[-count:]


def print_comparison(these: list[Result], others: list[Result], comparison: dict) -> None:
    """Prints what differs between these runs and the others, and how certain that is."""
    changes, paired = largest_changes(comparison, 5), len(these) == 1
    line = "{f1_change:+8.4f}  {class}: other {other_correct:.4g}, this {correct:.4g}"
    title = "largest changes in F1, with correct images" if changes else "F1: no class has changed"
    print(f"\n{title}", *(line.format(**row) for row in changes), sep="\n")
    print()
    if paired:
        checkpoint = "{checkpoint}, epoch {epoch}".format(**others[0].summary)
        utils.say("compared", f"with {others[0].folder}: {checkpoint}")
    other, this = ([100 * run.correct.mean() for run in runs] for runs in (others, these))
    for run, accuracy in zip(() if paired else (*others, *these), other + this):
        name, seed = "this" if run in these else "other", run.summary["constants"]["seed"]
        utils.say(name, f"top-1 {accuracy:.2f} %, SEED {seed}: {run.folder}")
    utils.say("top-1", f"other {np.mean(other):.2f} %, this {np.mean(this):.2f} %")
    low, high = (100 * x for x in comparison["difference_interval_95"])
    kind = "paired 95 % interval" if paired else "95 % interval over seeds and images"
    change = f"{100 * comparison['difference']:+.2f} points"
    utils.say("change", f"{change}, {kind} {low:+.2f} to {high:+.2f} points")
    if paired:
        p = comparison["mcnemar_p"]
        test = f"McNemar's exact test: p {'<' if p < 1e-4 else '='} {max(p, 1e-4):.2g}"
        counts = "{only_other_correct} correct only in the other, {only_this_correct} only in this"
        utils.say("images", f"{counts.format(**comparison)}; {test}")
    else:
        spreads = f"other {np.std(other, ddof=1):.2f}, this {np.std(this, ddof=1):.2f} points"
        utils.say("seeds", f"standard deviation: {spreads}")
    notes = {"tta": " (averaging two views changes the accuracy by itself)"}
    notes["holdout_per_class"] = " (with 0, these images selected the checkpoint: optimistic)"
    for name, values in comparison["different_constants"].items():
        text = "other {other!r}, this {this!r}".format(**values)
        utils.say("differs", f"{name.upper()}: {text}{notes.get(name, '')}")
    if paired:
        utils.say(
            "caution", "two checkpoints, not two recipes: another SEED changes the accuracy too"
        )
    elif low <= 0 <= high:
        more = comparison["more_seeds"]
        many = f"about {more}" if more else "over 100"
        seeds = f"{many} more seed{'s' * (more != 1)} of each recipe"
        utils.say("verdict", f"not known yet: {seeds} would settle a difference of this size")
    else:
        utils.say("verdict", f"this recipe is {'better' if low > 0 else 'worse'} than the other")


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


def check_data(
    classifier: Classifier, train: data.Split, test: data.Split, probabilities: Tensor
) -> DataCheck:
    """Looks for copies of the test images among those trained on, and for wrong labels in both.

    Test labels are judged by the network's probabilities (N, num_classes), training labels by heads
    on its initial features, each head on images that it was not trained on.
    """
    classes, progress, test = classifier.classes, utils.is_first(), test.named()
    network, images, features = load_initial_network(classifier), [], []
    for split in (test, train):
        images.append(data.place(split.images, classifier.device))
        loader = classifier.load(images[-1])
        features.append(resnet.extract_features(network, loader, classifier.dtype, progress))
    partner, similarity, threshold = data.find_copies(*images, *features, progress)
    labels = train.labels.to(classifier.device)
    heads = resnet.predict_out_of_fold(features[1], labels, len(classes), progress)
    suspects = find_suspects("test", test, probabilities, classes)
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
    groups = data.find_identical(test, train)
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
        resnet.load_pretrained(model, resnet.unwrap_weights(weights), with_head=False)
    return model.to(classifier.device, memory_format=data.memory_format(classifier.device))


def summarize_check(check: DataCheck, result: Result, others: list[Result]) -> dict:
    """What metrics.json holds as "data_check"."""
    correct, kept = result.correct, ~check.copied
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
        if others:
            pair = (run.correct[None, kept] for run in (result, others[0]))
            summary["without_copies"]["comparison"] = compare_accuracies(*pair)
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


def write_check(check: DataCheck, folder: Path) -> None:
    """Writes the tables and pictures of --check-data."""
    names, figures = ("duplicates", "suspect_labels"), (draw_copies(check), draw_suspects(check))
    tables = (Pair, check.copies), (Suspect, check.suspects)
    for name, (row, rows), figure in zip(names, tables, figures):
        write_csv(folder / f"{name}.csv", row._fields[:-1], [x[:-1] for x in rows])
        if figure:
            figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")


def draw_copies(check: DataCheck) -> Figure:
    """The 24 most similar pairs, the 12 just above the threshold, and the 12 just below it."""
    tiles, captions = [], []
    for pair in [*check.copies[:24], *check.copies[24:][-12:], *check.others]:
        padding = pair.pixels[0].shape[-1] // 16
        tiles.append(make_grid(torch.stack(pair.pixels), padding=padding, pad_value=255))
        verdict = "copy" if pair.similarity > check.threshold else "no copy"
        labels = f"test: {pair.test_label}\ntraining: {pair.training_label}"
        captions.append(f"{verdict}, {pair.similarity:.3f}\n{labels}")
    return draw_tiles(tiles, captions, columns=6, width=2)


def draw_suspects(check: DataCheck) -> Figure | None:
    """The 24 most suspect test images and the 24 most suspect training images, if there are any."""
    chosen = [x for x in check.suspects if x.part == "test"][:24]
    chosen += [x for x in check.suspects if x.part == "training"][:24]
    captions = [
        f"{x.part}: {x.label}\nlikelier: {x.likelier_label}\n"
        f"{100 * x.probability:.2f} and {100 * x.likelier_probability:.1f} %"
        for x in chosen
    ]
    tiles = [x.pixels for x in chosen]
    return draw_tiles(tiles, captions, columns=6, width=2) if tiles else None


# ---- tables and pictures ------------------------------------------------------------------------


@contextmanager
def writing_into(folder: Path, outdated: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder whose files go into the results folder together, at the end of the block.

    outdated: files of earlier results to remove then. Where something cannot be written, the
    earlier results stay as they were, and UserError is raised.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
            yield Path(new)
            for name in outdated:
                (folder / name).unlink(missing_ok=True)
            for file in Path(new).iterdir():
                file.replace(folder / file.name)
    except OSError as error:
        raise utils.UserError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another --results-dir"
        ) from error


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable]) -> None:
    """Writes a header and rows as a CSV file. Names that are not UTF-8 keep their bytes."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def write_tables(result: Result, report: str, files: Sequence[str], folder: Path) -> None:
    """Writes metrics.json, the report, the confusion matrix and the predictions."""
    text = json.dumps(result.summary, indent=2) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    (folder / "classification_report.txt").write_bytes(report.encode(errors="surrogateescape"))
    header = ["class", "precision", "recall", "f1-score", "support"]
    rows = zip(result.classes, *result.scores, result.support)
    write_csv(folder / "classification_report.csv", header, rows)
    rows = [[name, *counts] for name, counts in zip(result.classes, result.matrix)]
    write_csv(folder / "confusion_matrix.csv", ["true/predicted", *result.classes], rows)
    columns = [range(len(result.labels)), result.labels, result.predicted, result.confidence]
    header = ["index", "label", "predicted", "confidence"]
    if files:
        columns, header = [*columns, files], [*header, "file"]
    write_csv(folder / "predictions.csv", header, zip(*columns))


def write_pictures(result: Result, images: Tensor, others: list[Result], folder: Path) -> None:
    """Draws and writes every picture for which there is something to draw."""
    summary = result.summary
    names, matrix, groups = result.classes, result.matrix, []
    if names == data.CLASSES:
        names, groups = [*chain(*data.SUPERCLASSES.values())], list(data.SUPERCLASSES)
        matrix = data.by_superclass(matrix)
    figures = {
        "confusion_matrix": draw_matrix(matrix, names, groups),
        "per_class": draw_f1(result),
        "reliability": draw_reliability(result),
        "superclass_confusion_matrix": groups
        and draw_matrix(data.count_superclasses(matrix), groups),
        "comparison": others and draw_comparison([result], others, summary["comparison"]),
        "most_confused": result.pairs and draw_pairs(result, images),
        "mistakes": result.pairs and draw_mistakes(result, images),
        "training_curves": summary["history"]
        and utils.draw_curves(summary["history"], summary["constants"]["watch"]),
    }
    for name, figure in figures.items():
        if figure:
            figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
        elif name in ("most_confused", "mistakes", "training_curves"):
            utils.say("note", f"nothing to draw in {name}.png")


def new_figure(width: float, height: float) -> Figure:
    """A figure, in inches; made without pyplot, which would open a window."""
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)  # or seaborn would use pyplot
    return figure


def legible(texts: Iterable[str]) -> list[str]:
    """The texts for pictures, from now on without mathematics in "$": call it before drawing them.

    Letters that matplotlib's font lacks come from an installed one, or are escaped: "\\u4e2d".
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # any weight will do
    texts, families, find = list(texts), plt.rcParams["font.family"], font_manager.FontProperties
    missing = set("".join(texts)) - {"\n"}
    for name in [find().get_name(), *sorted(font_manager.get_font_names())]:
        if missing and not name.startswith("Last Resort"):  # which has boxes for all letters
            font = font_manager.get_font(font_manager.findfont(find(family=name)))
            found = {x for x in missing if x.isprintable() and font.get_char_index(ord(x))}
            families, missing = families + [name] * bool(found), missing - found
    plt.rcParams.update({"font.family": [*dict.fromkeys(families)], "text.parse_math": False})
    escapes = {ord(x): x.encode("unicode_escape").decode() for x in missing}
    return [text.translate(escapes) for text in texts]


def draw_matrix(matrix: np.ndarray, names: list[str], groups: Sequence[str] = ()) -> Figure:
    """Confusion matrix, rows true, columns predicted; lines between groups of as many classes."""
    count, numbered = len(names), len(names) <= 20
    fractions = matrix / matrix.sum(1, keepdims=True).clip(1)
    label = "fraction of the true class's images" + ("; numbers: images" if numbered else "")
    ticks = legible(names) if count <= 200 else False
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
    figure, captions = new_figure(width * columns, height * rows), legible(captions)
    for position, (image, caption) in enumerate(zip(images, captions), start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(caption, fontsize=9, loc="left")
        axes.axis("off")
    return figure


def draw_mistakes(result: Result, images: Tensor) -> Figure:
    """The 24 mistakes with the highest confidence."""
    indices = result.most_confident[~result.correct[result.most_confident]][:24]
    names, percent = result.classes, 100 * result.confidence
    captions = [
        f"true: {names[result.labels[i]]}\npredicted: {names[result.predicted[i]]}\n"
        f"confidence: {percent[i]:.2f} %"
        for i in indices
    ]
    return draw_tiles(images[indices], captions, columns=6, width=2)


def draw_pairs(result: Result, images: Tensor) -> Figure:
    """A row per pair: three images of each class and, between them, three taken for the other."""
    strips, captions, names, size = [], [], result.classes, images.shape[-1]
    for pair in result.pairs[:8]:
        a, b = names.index(pair["true"]), names.index(pair["taken_for"])
        for label, predicted in (a, a), (a, b), (b, a), (b, b):
            mask = (result.labels == label) & (result.predicted == predicted)
            chosen = result.most_confident[mask[result.most_confident]][:3]
            strip = images.new_full((3, 3, size, size), 255)  # white
            strip[: len(chosen)] = images[chosen]
            strips.append(make_grid(strip, padding=size // 16, pad_value=255))
            mistake = f"taken for {names[predicted]}" if label != predicted else "recognised"
            captions.append(f"{names[label]} {mistake}: {mask.sum()}")
    return draw_tiles(strips, captions, columns=4, width=3)


def draw_f1(result: Result) -> Figure:
    """F1 of every class that has test images, the worst first, 25 per column."""
    worst, names = result.worst_first, np.array(result.classes)
    columns = [worst[start : start + 25] for start in range(0, len(worst), 25)]
    figure = new_figure(max(6, 3.5 * len(columns)), 1 + 0.24 * len(columns[0]))
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        draw_bars(axes, names[column], result.f1[column], "%.2f", color="steelblue")
        axes.set(xlabel="F1", xlim=(0, 1.15), ylim=(len(columns[0]) - 0.5, -0.5))
    return figure


def draw_bars(axes: Axes, names: Sequence, values: Sequence, number: str, **style) -> None:
    """Horizontal bars, each with its name and its number in this format."""
    bars = axes.barh(range(len(names)), values, **style)
    axes.bar_label(bars, fmt=number, padding=2)
    axes.set_yticks(range(len(names)), legible(names))
    sns.despine(ax=axes)


def draw_reliability(result: Result) -> Figure:
    """Accuracy by confidence, against the diagonal, and the fraction of images in each bin."""
    images, accuracy, error = calibrate(result)
    width = 1 / len(images)
    middles = width * (np.arange(len(images)) + 0.5)
    style = {"width": width, "color": "steelblue", "edgecolor": "white"}
    figure = new_figure(6, 7)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.bar(middles, accuracy, label="measured", **style)
    upper.plot([0, 1], [0, 1], "k--", label="calibrated: accuracy = confidence")
    upper.set(title=f"expected calibration error {100 * error:.2f} %", ylabel="accuracy")
    upper.set_ylim(0, 1)
    lower.bar(middles, images / images.sum(), **style)
    lower.set(xlabel="confidence: softmax of the predicted class", xlim=(0, 1))
    lower.set_ylabel("fraction of images")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_comparison(these: list[Result], others: list[Result], comparison: dict) -> Figure:
    """The largest changes in F1, 15 each way; all runs, and the difference with its interval."""
    changes = largest_changes(comparison, 15)
    names, values = ([row[name] for row in changes] for name in ("class", "f1_change"))
    this, other = "steelblue", "darkorange"
    panels = [["f1", "runs"], ["f1", "difference"]]
    left, upper, lower = new_figure(12, 8).subplot_mosaic(panels).values()
    draw_bars(left, names, values, "%+.3f", color=[this if x > 0 else other for x in values])
    left.margins(x=0.2)
    left.set(ylim=(max(15, len(names)) - 0.5, -0.5), xlabel="change in F1: this evaluation - other")
    left.set_title("" if names else "no class has changed")
    for place, (runs, color) in enumerate([(these, this), (others, other)]):
        accuracies = [run.correct.mean() for run in runs]
        upper.plot(accuracies, [place] * len(runs), "o", color=color, alpha=0.6)
        upper.plot(np.mean(accuracies), place, "|", color=color, ms=40, mew=2)
    upper.set(xlabel="top-1 accuracy of each run (points) and their mean (line)", ylim=(-0.5, 1.5))
    upper.set_yticks([0, 1], ["this", "other"])
    upper.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    lower.plot(comparison["difference_interval_95"], [0, 0], color="black")
    lower.plot(comparison["difference"], 0, "o", color="black")
    lower.axvline(0, color="gray", linestyle=":")
    lower.set(xlabel="difference in points, this - other, with its 95 % interval", yticks=[])
    lower.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    return left.figure


def open_window(path: Path) -> None:
    """Shows a picture until its window is closed; does nothing if there is no display."""
    try:
        plt.figure(path.name, layout="constrained")
        plt.imshow(plt.imread(path))
        plt.axis("off")
        if plt.get_backend().lower() != "agg":  # which matplotlib chooses without a display
            plt.show()
        plt.close()
    except Exception as error:  # noqa: BLE001, a backend or display that does not exist
        utils.say("note", f"no window: {error}")


# ---- the user's own pictures --------------------------------------------------------------------


def classify_pictures(classifier: Classifier, args: Namespace, folder: Path) -> Path:
    """Writes and prints the five most likely classes of the user's pictures, draws the first 24."""
    files, images = data.read_pictures(
        args.images,
        classifier.constants["stored_size"] or 32,
        classifier.constants["whole_pictures"],
    )
    probabilities, classes = classifier.predict(images).mean(0).softmax(1), classifier.classes
    top5 = probabilities.topk(min(5, len(classes)))
    rows = zip(top5.indices.tolist(), top5.values.tolist())
    rows = [[(classes[i], p) for i, p in zip(*row)] for row in rows]
    captions = ["\n".join(f"{100 * p:6.2f} %  {name}" for name, p in row) for row in rows]
    titles = [f"{file.name[-24:]}\n{caption}" for file, caption in zip(files[:24], captions)]
    picture, table = folder / "predictions.png", folder / "pictures.csv"
    header = [f"{name}_{i + 1}" for i in range(len(rows[0])) for name in ("class", "probability")]
    with writing_into(folder) as new:
        rows = [[x, *sum(row, ())] for x, row in zip(files, rows)]
        write_csv(new / table.name, ["file", *header], rows)
        figure = draw_tiles(images[:24], titles, columns=4, width=2.5)
        figure.savefig(new / picture.name, dpi=150, bbox_inches="tight")
    for file, caption in zip(files, captions):
        print(f"{file}\n{caption}")
    utils.say("results", f"{table}; {picture}: the first {len(titles)} as the network sees them")
    return picture


# ---- a model that needs only torch --------------------------------------------------------------


class Portable(nn.Module):
    """A network with its preprocessing: pictures of any size in, class probabilities out."""

    def __init__(
        self, network: nn.Module, stored_size: int, whole: bool, image_size: int, mode: str
    ) -> None:
        """network: what predicts from normalized images. stored_size and whole are as for
        data.read_picture(), image_size and mode as for data.NormalizeAndResize().
        """
        super().__init__()
        self.network, self.size, self.whole = network, stored_size, whole
        cpu = torch.device("cpu")
        self.normalize_and_resize = data.NormalizeAndResize(image_size, cpu, mode)

    def forward(self, pictures: Tensor) -> Tensor:
        """Probabilities (N, num_classes) of upright RGB pictures uint8 (N, 3, H, W)."""
        images = self.make_square(pictures) / 255
        return self.network(self.normalize_and_resize(images)).softmax(1)

    def make_square(self, pictures: Tensor) -> Tensor:
        """What data.read_picture() does, but for rounding: (N, 3, stored_size, stored_size)."""
        height, width = (torch.scalar_tensor(length) for length in pictures.shape[2:])
        side = torch.maximum(height, width) if self.whole else torch.minimum(height, width)
        columns = self.resample(pictures.shape[3], side)
        rounded = (pictures.float() @ columns.T).round().clamp(0, 255)  # as Pillow does it
        return (self.resample(pictures.shape[2], side) @ rounded).round().clamp(0, 255)

    def resample(self, length: int, side: Tensor) -> Tensor:
        """Weights (size, length) of bicubic interpolation with antialiasing, as Pillow's.

        side: how many of the pixels become self.size; fewer than length are those in the middle,
        more are all, with black beside them. Keys 1981, "Cubic convolution interpolation".
        """
        size, pixels = self.size, torch.scalar_tensor(length)
        count = torch.minimum(pixels / side * size, torch.scalar_tensor(size)).round()
        extent = torch.minimum(side, pixels)
        scale, start = extent / count, (pixels - extent) / 2
        place = torch.arange(size) - ((size - count) / 2).round()
        centers = start + (place + 0.5) * scale
        distance = (torch.arange(length) + 0.5 - centers[:, None]).abs() / scale.clamp(min=1)
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
        inside = ((0 <= place) & (place < count))[:, None]
        return torch.where(inside, weights / weights.sum(1, keepdim=True), 0)


def export(classifier: Classifier, images: Tensor, probabilities: Tensor, path: Path) -> None:
    """Writes a Portable into one file, once that has predicted what the evaluation did.

    images: uint8 (N, 3, S, S), with the probabilities (N, num_classes) of the evaluation. path: its
    suffix .onnx asks for ONNX. Raises UserError if predictions differ by more than rounding.
    """
    constants, names = classifier.constants, ("whole_pictures", "image_size", "interpolation")
    preprocessing = [constants["stored_size"] or images.shape[-1], *(constants[x] for x in names)]
    network = copy.deepcopy(classifier.model).to("cpu", memory_format=torch.contiguous_format)
    portable = Portable(network, *preprocessing).eval()
    sizes, example = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, torch.zeros(2, 3, 57, 43).byte()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
            file = Path(scratch, f"model{'.onnx' if path.suffix == '.onnx' else '.pt2'}")
            program = torch.export.export(portable, (example,), dynamic_shapes=(sizes,))
            predict = write_program(program, json.dumps(classifier.classes), file)
            batches = images.cpu().split(constants["val_batch_size"])
            bar = tqdm(batches, "check", unit="batch", leave=False, disable=not utils.is_first())
            with torch.inference_mode():
                exported = torch.cat([predict(batch) for batch in bar])
            difference = (exported - probabilities).abs().max().item()
            equal = (exported.argmax(1) == probabilities.argmax(1)).sum()
            exact = classifier.dtype == torch.float32 and classifier.device.type == "cpu"
            if not difference <= (1e-4 if exact else 0.1):  # a GPU computes float32 in TF32
                raise utils.UserError(
                    f"{path} is not written: its probabilities differ by up to {difference:.3g} "
                    "from those of the evaluation, more than rounding explains"
                )
            file.replace(path)
    except OSError as error:
        raise utils.UserError(f"{path} cannot be written: {error.strerror or error}") from error
    counts = f"{equal:,} of {len(images):,} images are classified as above"
    utils.say("export", f"{path}: {counts}, probabilities differ by up to {difference:.2g}")


def write_program(program: ExportedProgram, classes: str, file: Path) -> Callable:
    """Writes program and class names (JSON); returns what predicts with the file's content."""
    if file.suffix == ".pt2":
        torch.export.save(program, file, extra_files={"classes.json": classes})
        return torch.export.load(file).module()
    try:
        import onnxruntime

        exported = torch.onnx.export(program, verbose=False)
    except ImportError as error:
        raise utils.UserError(
            f"ONNX needs the packages onnxscript and onnxruntime ({error}). Install them, or give "
            "--export a name without .onnx: that needs torch alone"
        ) from error
    exported.model.metadata_props["classes.json"] = classes
    exported.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pictures: torch.from_numpy(session.run(None, {"pictures": pictures.numpy()})[0])


if __name__ == "__main__":
    with utils.explained_exit(
        "the results are incomplete, run it again; checkpoints are untouched",
        "free it of other programs, or use --device cpu",
    ):
        main()
