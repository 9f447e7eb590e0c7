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
writes metrics.json (accuracies are fractions), tables, and report.html, a page to look at the
images in a browser, into RESULTS_DIR. In predictions.csv, index counts the images from 0 in the
order of the official test file, or those of a folder by class and name; confidence is the softmax
of the predicted class. Rows of a confusion matrix are true classes. Macro F1 is the mean over the
classes with test images.
"""

import base64
import copy
import csv
import json
import math
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy import stats
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize, to_pil_image
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
EXPORT = ""  # file for the model with its preprocessing, which ends in .pt2; "": none
IMAGES = []  # pictures, or folders of them, to classify instead of the test images

Lines = list[tuple[str, str]]  # texts with their labels, as utils.say() prints them
Row = tuple[list, list[Tensor]]  # of a table, and the pictures that it is about


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
    if args.export and Path(args.export).suffix != ".pt2":
        utils.refuse_flag("export", args.export, "a name that ends in .pt2")
    if args.export and not Path(args.export).parent.is_dir():
        utils.refuse_flag("export", args.export, "a folder that exists")
    if args.export and (args.images or args.results):
        utils.refuse_flag("export", args.export, "neither --images nor --results beside it")
    if args.results:
        compare_results(args, folder)
        return
    classifier = Classifier(args)
    with writing_into(folder):
        pass  # rather fail now than after the network ran
    if args.images:
        classify_pictures(classifier, args, folder)
    else:
        evaluate(classifier, args, folder)


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
        self.model = model.to(self.device, memory_format=utils.memory_format(self.device))
        utils.say("device", f"{utils.device_name(self.device)}, {self.checkpoint['precision']}")
        utils.say("model", f"{self.path}, epoch {self.checkpoint['epoch']}")
        if self.tta and not self.constants["flip"]:
            utils.say("note", "trained with FLIP = 0: mirror images may lower the accuracy")

    def load(self, images: Tensor, rows: Tensor | None = None) -> data.EvalLoader:
        """Batches on the device, of the same size and resized as in the validation of training."""
        mode = self.constants["interpolation"]
        return data.EvalLoader(images, *self.sizes, self.device, rows, mode)

    def predict(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (views, N, num_classes) of images uint8 (N, 3, S, S); with --tta, 2 views.

        rows: which of the images, and in what order; None: all.
        """
        loader = self.load(images, rows)
        views = [resnet.predict(self.model, loader, self.dtype, progress=True)]
        if self.tta:
            loader.mirrored = True
            views.append(resnet.predict(self.model, loader, self.dtype, progress=True))
        logits = torch.stack(views)
        if not logits.isfinite().all():
            raise utils.UserError(f"{self.path}: its predictions are not finite. Train it again")
        return logits.cpu()


@dataclass(eq=False)
class Result:
    """What a network predicts for N test images, and the figures that follow."""

    classes: list[str]
    labels: np.ndarray  # class numbers (N,)
    predicted: np.ndarray  # class numbers (N,)
    confidence: np.ndarray  # softmax of the predicted class (N,)
    folder: str
    summary: dict  # what metrics.json holds

    def __post_init__(self) -> None:
        count = len(self.classes)
        self.correct = self.predicted == self.labels
        self.cells = count_cells(self.labels, self.predicted)
        self.hits = np.bincount(self.labels[self.correct], minlength=count)  # of each class
        self.support = np.bincount(self.labels, minlength=count)  # test images of each class
        predictions = np.bincount(self.predicted, minlength=count)
        self.scores = score_classes(self.hits, self.support, predictions)
        self.f1, tested = self.scores[2], np.flatnonzero(self.support)
        self.worst_first = tested[np.argsort(self.f1[tested], kind="stable")]
        self.pairs = find_confused_pairs(self.cells, self.classes)


def read_test_images(classifier: Classifier, args: Namespace) -> tuple[data.Split, dict]:
    """The images, of a folder those of test/, else val/, else held out, and facts for metrics.json.

    Raises UserError if they cannot be told from those trained on.
    """
    name = args.dataset or classifier.constants["dataset"]
    held_out = classifier.constants["holdout_per_class"] > 0
    part = data.find_test_part(name)
    if part == "holdout" and not held_out:
        part = "val"  # which is missed by its name
    split, dataset = read_part(classifier, args, part)
    if part == "holdout":
        kind = "hold-out images, because there is no test/ or val/"
    elif name in data.BUILT_IN:
        kind = "test images"
    else:
        kind = f"images of {Path(name, part)}"
    utils.say("data", f"{name}: {len(split.labels):,} {kind}")
    if "validation" in classifier.checkpoint:
        validated = dataset == classifier.checkpoint["validation"]
    else:
        validated = part != "test"  # earlier versions validated on the others
    selected = part == "holdout" or (validated and not held_out)
    if selected:
        note = "the checkpoint was selected on these images: the numbers are optimistic"
    elif part == "val" and not held_out:
        note = "these are not the images that selected the checkpoint"
    else:
        note = "these images were used neither to train nor to select the checkpoint"
    utils.say("note", note)
    facts = {"images": len(split.labels), "dataset": dataset}
    facts["test_images_chose_checkpoint"] = selected
    return split, facts


def read_part(classifier: Classifier, args: Namespace, part: str) -> tuple[data.Split, str]:
    """The images of "train", "holdout", "val" or "test", and which they are: data.identify().

    Downloads what is missing. Raises UserError if they are not those of the checkpoint.
    """
    settings, checkpoint = Namespace(**classifier.constants), classifier.checkpoint
    settings.dataset, settings.data_dir = args.dataset or settings.dataset, args.data_dir
    data.fetch(settings)
    source = "train" if part == "holdout" else part
    split, classes = data.read_images(settings, source, classifier.classes)
    if source == "train" and classes == classifier.classes:  # other classes are refused below
        split = split.named()  # after their places in the official files
        train, holdout = data.split_images(split, classes, settings)
        split = train if part == "train" else holdout
    split = data.leave_out_undecoded(split, settings)
    dataset = data.identify(settings, split)
    if part == "train":
        expected = checkpoint["dataset"]
    elif part == "holdout":
        expected = checkpoint.get("validation", dataset)  # which older ones lack
    else:
        expected = dataset  # val/ and test/ may hold any images of these classes
    if classes != classifier.classes or dataset != expected:
        raise utils.UserError(
            f"{settings.dataset} is not what {classifier.path} was trained on: "
            f"{checkpoint['dataset']}, {len(classifier.classes)} classes"
        )
    return split, dataset


def evaluate(classifier: Classifier, args: Namespace, folder: Path) -> None:
    """Evaluates on the test images, writes everything, then prints."""
    test, summary = read_test_images(classifier, args)
    classes, labels = classifier.classes, test.labels.numpy()
    like = Namespace(classes=classes, labels=labels, summary=summary)
    others = [read_result(path, like) for path in args.compare]
    if args.check_data:
        train, _ = read_part(classifier, args, "train")
    views = classifier.predict(test.stored, test.rows)
    best = views.mean(0).double().softmax(1).max(1)
    predicted, confidence = best.indices.numpy(), best.values.numpy()
    result = Result(classes, labels, predicted, confidence, args.results_dir, summary)
    summary.update(summarize(result, views, classifier))
    lines, check = {"numbers": describe_numbers(result)}, None
    if others:
        summary["comparison"] = compare([result], others)
        lines["comparison"] = describe_comparison([result], others, summary["comparison"])
    if args.check_data:
        check = check_data(classifier, train, test, views.mean(0).softmax(1))
        check.facts.update(score_without_copies(check, result, others))
        summary["data_check"] = check.facts
        lines["check"] = describe_check(check)
    numbers = range(len(classes))
    report = metrics.classification_report(
        labels, predicted, labels=numbers, target_names=classes, digits=4, zero_division=0
    )
    with writing_into(folder, earlier_files) as new:
        write_tables(result, report, test.files, check, new)
        draw_matrices(result, new)
        write_report(result, test, others, check, lines, new)
    print_classes(result, report)
    print_lines(lines["numbers"])
    if others:
        print_changes(summary["comparison"])
        print_lines(lines["comparison"])
    if check:
        print_lines(lines["check"])
    utils.say("results", f"{folder}; open {folder / 'report.html'} in a browser")
    if args.export:
        export(classifier, test, views[0].softmax(1), Path(args.export))


def export(classifier: Classifier, test: data.Split, probabilities: Tensor, path: Path) -> None:
    """Writes the network with its preprocessing into one file: see model.export()."""
    constants, cpu = classifier.constants, torch.device("cpu")
    mode = constants["interpolation"]
    preprocessing = data.NormalizeAndResize(constants["image_size"], cpu, mode)
    size = constants["stored_size"] or test.stored.shape[-1]
    network = copy.deepcopy(classifier.model).to(cpu, memory_format=torch.contiguous_format)
    portable = resnet.Portable(network, size, constants["whole_pictures"], preprocessing)
    parts = test.rows.split(constants["val_batch_size"])
    batches = (test.stored[rows] for rows in tqdm(parts, "check", unit="batch", leave=False))
    exact = classifier.dtype == torch.float32 and classifier.device.type == "cpu"
    tolerance = 1e-4 if exact else 0.1  # a GPU computes float32 in TF32
    resnet.export(portable, classifier.classes, batches, probabilities, path, tolerance)


# ---- numbers ------------------------------------------------------------------------------------


def summarize(result: Result, views: Tensor, classifier: Classifier) -> dict:
    """What metrics.json holds, apart from the facts about the test images and a comparison."""
    checkpoint, labels = classifier.checkpoint, torch.from_numpy(result.labels)
    summary = score(views.mean(0), labels)
    summary |= {
        "macro_f1": np.average(result.f1, weights=result.support > 0),
        "classes_without_images": [result.classes[i] for i in np.flatnonzero(result.support == 0)],
        "expected_calibration_error": calibrate(result)[2],
        "intervals_95": bootstrap_intervals(result.cells, len(result.classes)),
        "most_confused": result.pairs[:10],
        "tta": classifier.tta,
        "checkpoint": str(classifier.path),
        "epoch": checkpoint["epoch"],
        "precision": checkpoint["precision"],
        "constants": checkpoint["constants"],
        "history": checkpoint["history"],
    }
    if result.classes == data.CLASSES:
        superclasses = data.count_superclasses(data.by_superclass(count_matrix(result)))
        summary["superclass_accuracy"] = superclasses.trace() / len(labels)
    if classifier.tta:
        summary["without_tta"] = score(views[0], labels)
    return summary


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy and top-1 accuracy of logits (N, num_classes); top-5 of 6 or more."""
    loss = F.cross_entropy(logits, labels, reduction="sum").item() / len(labels)
    scores = {"loss": loss, "top1_accuracy": metrics.accuracy_score(labels, logits.argmax(1))}
    count = logits.shape[1]
    if count > 5:
        top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(count))
        scores["top5_accuracy"] = top5
    return scores


def score_classes(correct: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Precision, recall, F1 (3, ..., num_classes) from counts of images; nothing / nothing = 0."""
    f1 = 2 * correct / (true + predicted).clip(1)
    return np.stack([correct / predicted.clip(1), correct / true.clip(1), f1])


def count_cells(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The cells of the confusion matrix that are not empty (3, K): true, predicted, images."""
    cells, images = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    return np.vstack([cells, images])


def count_matrix(result: Result, per_cell: int = 1) -> np.ndarray:
    """The confusion matrix; a row and a column stand for so many classes that are neighbours."""
    groups = range(-(-len(result.classes) // per_cell))
    labels, predicted = result.labels // per_cell, result.predicted // per_cell
    return metrics.confusion_matrix(labels, predicted, labels=groups)


def find_confused_pairs(cells: np.ndarray, classes: list[str]) -> list[dict]:
    """Pairs of confused classes, most mistakes first; "true" is the class mistaken more often."""
    counts = {(true, predicted): images for true, predicted, images in cells.T.tolist()}
    pairs = []
    # Pairs with as many mistakes stay in this order: by the higher class number, then the lower.
    for high, low in sorted({(max(cell), min(cell)) for cell in counts}):
        if high == low:
            continue  # predicted right
        true, predicted = high, low
        if counts.get((low, high), 0) >= counts.get((high, low), 0):
            true, predicted = low, high
        pair = {"true": classes[true], "taken_for": classes[predicted]}
        pair["images"] = counts[true, predicted]
        pair["other_way"] = counts.get((predicted, true), 0)
        pairs.append(pair)
    return sorted(pairs, key=lambda pair: -pair["images"] - pair["other_way"])


def calibrate(result: Result, count: int = 15) -> tuple[np.ndarray, np.ndarray, float]:
    """Images and accuracy in bins of confidence (0, 1/count], ...; Guo et al. 2017's equation 3."""
    bins = np.ceil(result.confidence * count).astype(int).clip(1, count) - 1
    images = np.bincount(bins, minlength=count)
    correct = np.bincount(bins, result.correct, count)
    confidence = np.bincount(bins, result.confidence, count)
    return images, correct / images.clip(1), abs(correct - confidence).sum() / images.sum()


def bootstrap_intervals(
    cells: np.ndarray, num_classes: int, resamples: int = 1000
) -> dict[str, list[float]]:
    """95 % percentile intervals of top-1 and macro F1 over test images drawn with replacement."""
    true, predicted, images = cells
    generator, accuracies, macro_f1 = np.random.default_rng(0), [], []
    for _ in range(resamples):
        # Images in one cell are alike, so a resample is a multinomial draw of the cells.
        drawn = generator.multinomial(images.sum(), images / images.sum())
        hits = np.bincount(true, drawn * (true == predicted), num_classes)
        support = np.bincount(true, drawn, num_classes)
        predictions = np.bincount(predicted, drawn, num_classes)
        f1 = score_classes(hits, support, predictions)[2]
        accuracies.append(hits.sum() / images.sum())
        macro_f1.append(np.average(f1, weights=support > 0))
    return {
        "top1_accuracy": np.percentile(accuracies, [2.5, 97.5]).tolist(),
        "macro_f1": np.percentile(macro_f1, [2.5, 97.5]).tolist(),
    }


def print_classes(result: Result, report: str) -> None:
    """Prints scikit-learn's report, the worst classes and the most confused pairs."""
    print(f"\n{report}\nworst classes by F1")
    for number in result.worst_first[:10]:
        print(f"{result.f1[number]:8.4f}  {result.classes[number]}")
    print("\nmost confused pairs: images one way + the other way")
    for pair in result.summary["most_confused"]:
        print("{images:4} + {other_way:<3} {true} taken for {taken_for}".format(**pair))


def describe_numbers(result: Result) -> Lines:
    """The lines, each with its label, that stand last above the prompt, and first on the page."""
    summary = result.summary
    lines = [("loss", f"{summary['loss']:.4f}")]
    for label, name, meaning in [
        ("top-1", "top1_accuracy", ""),
        ("top-5", "top5_accuracy", ""),
        ("macro F1", "macro_f1", ""),
        ("coarse", "superclass_accuracy", ", the right superclass"),
        ("ECE", "expected_calibration_error", ", expected calibration error"),
    ]:
        if name in summary["intervals_95"]:
            meaning = f", 95 % interval {describe_interval(summary['intervals_95'][name])} %"
        if name in summary:
            lines.append((label, f"{100 * summary[name]:.2f} %{meaning}"))
    if summary["tta"]:
        plain = summary["without_tta"]
        accuracy = f"top-1 {100 * plain['top1_accuracy']:.2f} %"
        lines.append(("no tta", f"loss {plain['loss']:.4f}, {accuracy}"))
    absent = len(summary["classes_without_images"])
    if absent:
        classes = f"{absent} of {len(result.classes)} classes have no test image"
        lines.append(("note", f"{classes}: macro F1 leaves them out, the report counts them as 0"))
    return lines


def describe_interval(interval: list[float], sign: str = "") -> str:
    """The bounds, times 100; sign: "+" for a plus before those that are positive."""
    low, high = interval
    return f"{100 * low:{sign}.2f} to {100 * high:{sign}.2f}"


def print_lines(lines: Lines) -> None:
    """Prints labelled lines under an empty one."""
    print()
    for label, text in lines:
        utils.say(label, text)


# ---- two evaluations, or two recipes, on the same images ----------------------------------------


def read_result(folder: str, like: Result | Namespace | None = None) -> Result:
    """Reads a results folder. Raises UserError if it is damaged, or of other images than like.

    like: has the classes, labels and summary of the images, if they must be certain ones.
    """
    path = Path(folder, "metrics.json")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        names = ("dataset", "images", "checkpoint", "epoch", "tta", "top1_accuracy", "constants")
        summary = {name: summary[name] for name in names}
        summary["constants"] = utils.with_defaults(summary)
        path = Path(folder, "confusion_matrix.csv")
        _, *classes = next(read_csv(path), ())
        path = Path(folder, "predictions.csv")
        rows = list(read_csv(path))[1:]
        if len(rows) != summary["images"]:
            raise ValueError(f"it has {len(rows):,} images, not {summary['images']:,}")
        table = [",".join(row[:4]) for row in rows]  # without names
        columns = np.loadtxt(table, delimiter=",", ndmin=2).T
        indices, labels, predicted = columns[:-1].astype(int)
        confidence = columns[-1]
        path = Path(folder)  # what follows compares one of its files with another
        result = Result(classes, labels, predicted, confidence, folder, summary)
        if like is None:
            like = result  # it need only agree with itself
        dataset = like.summary["dataset"]
        if summary["dataset"] != dataset:
            raise ValueError(f"its data set is {summary['dataset']!r}, not {dataset!r}")
        if not np.array_equal([indices, labels], [range(len(labels)), like.labels]):
            raise ValueError("its labels are not those of the test images")
        if classes != like.classes:
            raise ValueError("its classes have other names")
        if not abs(result.correct.mean() - summary["top1_accuracy"]) < 1e-9:
            raise ValueError("its accuracy is not that of metrics.json")
    except Exception as error:
        raise utils.UserError(
            f"{path} cannot be compared: {utils.reason_of(error)}. Expected "
            "results of this evaluate.py for the same test images: evaluate that checkpoint again"
        ) from error
    if len(labels) < 2:
        raise utils.UserError(f"{folder} has a single test image. Expected two or more to compare")
    return result


def compare_results(args: Namespace, folder: Path) -> None:
    """Compares results folders, writes comparison.json, then prints."""
    first = read_result(args.results[0])
    these = [read_result(path, first) for path in args.results]
    others = [read_result(path, first) for path in args.compare]
    comparison = compare(these, others)
    with writing_into(folder, ["comparison.png"]) as new:  # which earlier versions drew
        text = json.dumps(comparison, indent=2) + "\n"
        (new / "comparison.json").write_text(text, encoding="utf-8")
    print_changes(comparison)
    print_lines(describe_comparison(these, others, comparison))
    utils.say("results", f"{folder / 'comparison.json'}")


def compare(these: list[Result], others: list[Result]) -> dict:
    """What is written of one run compared with one, or of a recipe's runs with another's."""
    require_one_recipe(these)
    require_one_recipe(others)
    settings = differences(these[0], others[0])
    if len(these) > 1:
        settings.pop("seed", None)
    f1_change = np.mean([run.f1 for run in these], 0) - np.mean([run.f1 for run in others], 0)
    hits = np.mean([run.hits for run in these], 0)
    other_hits = np.mean([run.hits for run in others], 0)
    classes = []
    for number in np.argsort(-f1_change, kind="stable"):  # the largest gain first
        row = {"class": these[0].classes[number], "f1_change": f1_change[number].item()}
        row |= {"correct": hits[number].item(), "other_correct": other_hits[number].item()}
        classes.append(row)
    correct = np.stack([run.correct for run in these])
    other_correct = np.stack([run.correct for run in others])
    comparison = compare_accuracies(correct, other_correct)
    return comparison | {"classes": classes, "different_constants": settings}


def differences(run: Result, other: Result) -> dict[str, dict]:
    """The settings that differ, apart from those that tell where and how a run is done."""
    this = {"tta": run.summary["tta"]} | run.summary["constants"]
    that = {"tta": other.summary["tta"]} | other.summary["constants"]
    return {
        name: {"other": that.get(name), "this": value}
        for name, value in this.items()
        if value != that.get(name) and name not in utils.WHERE_AND_HOW
    }


def require_one_recipe(runs: list[Result]) -> None:
    """Raises UserError unless each run has its own SEED and they differ in nothing else."""
    seeds = [run.summary["constants"]["seed"] for run in runs]
    may_differ = {"seed"}
    if all(run.summary["constants"].get("minutes") for run in runs):
        may_differ |= utils.CHOSEN_BY_THE_CLOCK  # by the speed of the machine
    names = sorted({name for run in runs for name in differences(run, runs[0])} - may_differ)
    if names or len({*seeds}) < len(seeds):
        found = f"differ in {', '.join(names).upper()}" if names else f"have SEED {seeds}"
        folders = ", ".join(run.folder for run in runs)
        raise utils.UserError(f"{folders} {found}. Expected one recipe, each run with its own SEED")


def compare_accuracies(correct: np.ndarray, other_correct: np.ndarray) -> dict:
    """Difference of two mean accuracies on the same N images, and its 95 % interval.

    correct, other_correct: bool (runs, N). Two variances add up: that of the accuracies from run to
    run, pooled, and that of the difference from image to image, less the noise within the runs,
    which the first contains. The interval is Student's t; its degrees of freedom are those of the
    runs, divided by the runs' share of the variance. With two runs a side it covers the truth 94 to
    96 % of the time (tests/test_compare.py); divided by the square of the share, as Satterthwaite
    does (1946, doi:10.2307/3002019), 92 to 95 %. A single run a side has the images' part alone,
    and McNemar's exact test (1947, doi:10.1007/BF02295996).
    """
    runs, other_runs, count = len(correct), len(other_correct), correct.shape[1]
    per_image = correct.mean(0) - other_correct.mean(0)
    difference = per_image.mean()
    # How each run deviates from the mean of its recipe, image by image: (runs + other_runs, N)
    deviations = np.concatenate([correct - correct.mean(0), other_correct - other_correct.mean(0)])
    freedom = max(runs + other_runs - 2, 1)  # with a single run a side, all deviations are 0
    run_variance = np.square(deviations.mean(1)).sum() / freedom  # of the runs' accuracies
    noise_variance = deviations.var(1, ddof=1).sum() / freedom / count
    run_variance = run_variance or noise_variance  # accuracies that are equal are so by chance
    of_images = per_image.var(ddof=1) / count - noise_variance * (1 / runs + 1 / other_runs)
    of_images = max(of_images, 0)

    def width(more: int) -> float:
        """Half of the interval with so many more runs of each recipe."""
        of_runs = run_variance * (1 / (runs + more) + 1 / (other_runs + more))
        variance = of_runs + of_images
        share = max(of_runs / max(variance, 1e-30), 1e-9)  # the limits avoid a division by 0
        return stats.t.ppf(0.975, (freedom + 2 * more) / share) * np.sqrt(variance)

    interval = [difference - width(0), difference + width(0)]
    comparison = {"difference": difference, "difference_interval_95": interval}
    if runs + other_runs > 2:  # how many more would settle a difference of this size, if it is real
        settled = (more for more in range(101) if width(more) < abs(difference))
        comparison["more_seeds"] = next(settled, None)
        return comparison
    gained, lost = (per_image == 1).sum().item(), (per_image == -1).sum().item()
    comparison |= {"only_this_correct": gained, "only_other_correct": lost, "mcnemar_p": 1.0}
    if gained + lost:
        comparison["mcnemar_p"] = stats.binomtest(gained, gained + lost).pvalue
    return comparison


def print_changes(comparison: dict) -> None:
    """Prints the classes whose F1 rose and fell most, at most five each, the largest gain first."""
    rose = [row for row in comparison["classes"] if row["f1_change"] > 0]
    fell = [row for row in comparison["classes"] if row["f1_change"] < 0]
    changes = rose[:5] + fell[-5:]
    title = "largest changes in F1, with correct images" if changes else "F1: no class has changed"
    print(f"\n{title}")
    for row in changes:
        line = "{f1_change:+8.4f}  {class}: other {other_correct:.4g}, this {correct:.4g}"
        print(line.format(**row))


def describe_comparison(these: list[Result], others: list[Result], comparison: dict) -> Lines:
    """Labelled lines: what differs between these runs and the others, and how certain that is."""
    this = [100 * run.correct.mean() for run in these]
    other = [100 * run.correct.mean() for run in others]
    accuracies = ("top-1", f"other {np.mean(other):.2f} %, this {np.mean(this):.2f} %")
    settings = []
    notes = {"tta": " (averaging two views changes the accuracy by itself)"}
    notes["holdout_per_class"] = " (with 0, these images selected the checkpoint: optimistic)"
    for name, values in comparison["different_constants"].items():
        text = "other {other!r}, this {this!r}".format(**values)
        settings.append(("differs", f"{name.upper()}: {text}{notes.get(name, '')}"))
    if len(these) == 1:
        checkpoint = "{checkpoint}, epoch {epoch}".format(**others[0].summary)
        counts = "{only_other_correct} correct only in the other, {only_this_correct} only in this"
        p = comparison["mcnemar_p"]
        test = f"McNemar's exact test: p {'<' if p < 1e-4 else '='} {max(p, 1e-4):.2g}"
        return [
            ("compared", f"with {others[0].folder}: {checkpoint}"),
            accuracies,
            ("change", describe_change(comparison, "paired 95 % interval")),
            ("images", f"{counts.format(**comparison)}; {test}"),
            *settings,
            ("caution", "two checkpoints, not two recipes: another SEED changes the accuracy too"),
        ]
    spreads = f"other {np.std(other, ddof=1):.2f}, this {np.std(this, ddof=1):.2f} points"
    return [
        *[("other", describe_run(run)) for run in others],
        *[("this", describe_run(run)) for run in these],
        accuracies,
        ("change", describe_change(comparison, "95 % interval over seeds and images")),
        ("seeds", f"standard deviation: {spreads}"),
        *settings,
        ("verdict", judge_recipes(comparison)),
    ]


def describe_change(comparison: dict, interval: str, of: str = "") -> str:
    """The difference, of what, and its interval, whose kind is named."""
    bounds = describe_interval(comparison["difference_interval_95"], "+")
    return f"{100 * comparison['difference']:+.2f} points{of}, {interval} {bounds} points"


def describe_run(run: Result) -> str:
    """Its accuracy, seed and folder."""
    seed = run.summary["constants"]["seed"]
    return f"top-1 {100 * run.correct.mean():.2f} %, SEED {seed}: {run.folder}"


def judge_recipes(comparison: dict) -> str:
    """Which of two recipes is better, or how many more seeds would tell."""
    low, high = comparison["difference_interval_95"]
    if low > 0:
        return "this recipe is better than the other"
    if high < 0:
        return "this recipe is worse than the other"
    more = comparison["more_seeds"]
    many = f"about {more}" if more else "over 100"
    seeds = f"{many} more seed{'s' * (more != 1)} of each recipe"
    return f"not known yet: {seeds} would settle a difference of this size"


# ---- copies and wrong labels --------------------------------------------------------------------


class DataCheck(NamedTuple):
    """What --check-data finds."""

    facts: dict  # what metrics.json holds as "data_check"
    copied: np.ndarray  # whether a test image has a copy (N,)
    pairs: list[Row]  # of duplicates.csv: test images, each with its likeliest copy
    suspects: list[Row]  # of suspect_labels.csv: those of test images first


def check_data(
    classifier: Classifier, train: data.Split, test: data.Split, probabilities: Tensor
) -> DataCheck:
    """Looks for copies of the test images among those trained on, and for wrong labels in both.

    Test labels are judged by the network's probabilities (N, num_classes), training labels by heads
    on its initial features, each head on images that it was not trained on.
    """
    classes, network = classifier.classes, load_initial_network(classifier)

    def extract_features(split: data.Split) -> Tensor:
        loader = classifier.load(split.stored, split.rows)
        return resnet.extract_features(network, loader, classifier.dtype, progress=True)

    test, train = test.named(), train.named()
    features, train_features = extract_features(test), extract_features(train)
    partner, similarity, alike = data.find_copies(test, train, features, train_features)
    pairs = list_pairs(test, train, partner, similarity, classes)
    train_probabilities = predict_out_of_fold(train_features.cpu(), train.labels, len(classes))
    suspects = list_suspects("test", test, probabilities, classes)
    training_suspects = list_suspects("training", train, train_probabilities, classes)
    rare = (train.labels.bincount(minlength=len(classes)) < 5).nonzero().flatten().tolist()
    copied = similarity.numpy() > data.COPY_SIMILARITY
    copies = [values for values, _ in pairs[: copied.sum()]]
    max_alike = max(data.MAX_ALIKE, 1.5 / len(test.labels))  # a single image may be so by chance
    facts = {
        "images_trained_on": len(train.labels),
        "test_images": len(test.labels),
        "identical": list_identical(test, train, classes),
        "undecided": alike > max_alike,
        "alike": alike,
        "threshold": data.COPY_SIMILARITY,
        "copies": len(copies),
        "copies_with_another_label": sum(values[3] != values[4] for values in copies),
        "suspect_labels": {"test": len(suspects), "training": len(training_suspects)},
        "classes_too_small_to_judge": [classes[number] for number in rare],
    }
    return DataCheck(facts, copied, pairs, suspects + training_suspects)


def load_initial_network(classifier: Classifier) -> nn.Module:
    """The network with the weights that training began with; without their file, as it is now.

    Features that were trained on a wrong label agree with it, so that heads on them miss more. For
    copies, the initial features are as good or better.
    """
    settings = Namespace(**classifier.constants)
    path = resnet.weights_path(settings.architecture, settings.weights)
    effect = "the network's own features, training labels that it has learnt do not look wrong"
    if not path.is_file():
        utils.say("note", f"no file of weights {settings.weights!r}: {effect}")
        return classifier.model
    model = resnet.build_model(settings.architecture, len(classifier.classes))
    resnet.load_weights(model, settings, classifier.classes)
    begun = classifier.checkpoint.get("weights_checksum")  # which older ones lack
    if begun and begun != resnet.checksum(model):
        utils.say("note", f"{path} has changed since training began: {effect}")
        return classifier.model
    return model.to(classifier.device, memory_format=utils.memory_format(classifier.device))


def list_pairs(
    test: data.Split, train: data.Split, partner: Tensor, similarity: Tensor, classes: list[str]
) -> list[Row]:
    """Every test image and its partner among the training images, the most similar first."""
    rows = []
    for index in similarity.argsort(descending=True, stable=True).tolist():
        other = partner[index].item()
        names = [test.files[index], train.files[other]]
        labels = [classes[test.labels[index]], classes[train.labels[other]]]
        values = [*names, similarity[index].item(), *labels, labels[0] == labels[1]]
        rows.append((values, [test.image(index), train.image(other)]))
    return rows


def list_identical(test: data.Split, train: data.Split, classes: list[str]) -> list[list[list]]:
    """Groups of equal images: part, image and label of each."""
    images = []
    for part, split in (("test", test), ("training", train)):
        for name, label in zip(split.files, split.labels.tolist()):
            images.append([part, name, classes[label]])
    groups = data.find_identical(test, train)
    return [[images[number] for number in group] for group in groups]


def predict_out_of_fold(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Probabilities (N, num_classes) of images by linear heads that did not train on them.

    Softmax regression on standardized features (N, D), cross-validated in five folds, each with its
    share of every class. Images of a class with fewer than five are in no fold: NaN. All are NaN if
    only one class has five.
    """
    rows = (labels.bincount()[labels] >= 5).nonzero().flatten()
    inputs, classes = features[rows].numpy(), labels[rows].numpy()
    probabilities = torch.full((len(labels), num_classes), torch.nan)
    if len(np.unique(classes)) < 2:
        return probabilities
    probabilities[rows] = 0
    # C is the weight of the sum of all losses, so 100 / N is a weight of 100 for their mean. With one
    # label in 20 of CIFAR-100 made wrong, 58 % of the wrong labels are then suspect, and 90 % of the
    # suspects are wrong labels; with a weight of 30 it is 52 and 95 %, with 300 62 and 78 %.
    regression = LogisticRegression(C=100 / len(classes), tol=1e-3, max_iter=1000)
    head = make_pipeline(StandardScaler(), regression)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    splits = tqdm(folds.split(inputs, classes), "judge labels", 5, unit="fold", leave=False)
    for training, held_out in splits:
        head.fit(inputs[training], classes[training])
        predicted = torch.from_numpy(head.predict_proba(inputs[held_out])).float()
        columns = torch.from_numpy(head.classes_)  # the classes that are in a fold
        probabilities[rows[held_out][:, None], columns] = predicted
    return probabilities


def list_suspects(
    part: str, split: data.Split, probabilities: Tensor, classes: list[str], limit: float = 0.01
) -> list[Row]:
    """A row for every image whose label is worth checking, by probabilities (N, num_classes).

    A class's threshold is the mean probability of it for the images with that label: Northcutt et
    al. 2021, "Confident learning", arXiv 1911.00068. A label is suspect if its probability is below
    limit times its own threshold while another class reaches that class's. NaN: not judged.
    """
    # Without the limit, as in the paper, 19 % of the labels of CIFAR-100 cut to classes of 1 to 100
    # images were suspect, of classes of 5 to 19 images 38 %; with it 1.4 and 2 %; with a fixed
    # limit of 1 % 3 and 13 %.
    own = probabilities.gather(1, split.labels[:, None])[:, 0]
    count = split.labels.bincount(minlength=len(classes))
    thresholds = own.new_zeros(len(classes)).index_add(0, split.labels, own) / count
    likelier = probabilities.where(probabilities >= thresholds, 0).max(1)
    share = own / thresholds[split.labels]
    rows = []
    for index in share.argsort(stable=True).tolist():
        if share[index] < limit and likelier.values[index] > 0:
            labels = [classes[split.labels[index]], classes[likelier.indices[index]]]
            chances = [own[index].item(), likelier.values[index].item()]
            values = [part, split.files[index], *labels, *chances]
            rows.append((values, [split.image(index)]))
    return rows


def score_without_copies(check: DataCheck, result: Result, others: list[Result]) -> dict:
    """The accuracy on copies and on the other test images; nothing if copies are undecided."""
    copied, kept, scores = check.copied, ~check.copied, {}
    if check.facts["undecided"]:
        return scores
    if copied.any():
        scores["accuracy_on_copies"] = result.correct[copied].mean()
    if kept.any():
        cells = count_cells(result.labels[kept], result.predicted[kept])
        intervals = bootstrap_intervals(cells, len(result.classes))
        scores["without_copies"] = {
            "images": kept.sum().item(),
            "top1_accuracy": result.correct[kept].mean(),
            "interval_95": intervals["top1_accuracy"],
        }
    if others and kept.sum() > 1:
        comparison = compare_accuracies(result.correct[None, kept], others[0].correct[None, kept])
        scores["without_copies"]["comparison"] = comparison
    return scores


def describe_check(check: DataCheck) -> Lines:
    """Labelled lines: the accuracy without test images that have copies, and what looks wrong."""
    facts, groups = check.facts, check.facts["identical"]
    across = sum(len({part for part, _, _ in group}) > 1 for group in groups)
    unlike = sum(len({label for _, _, label in group}) > 1 for group in groups)
    counts = f"{across} in both parts, {unlike} with different labels"
    lines = [("exact", f"{len(groups)} groups of equal images, {counts}")]
    found = f"{facts['copies']:,} of {facts['test_images']:,} test images have a "
    if facts["undecided"]:
        found += f"training image with a similarity above {facts['threshold']}; "
        found += f"for {100 * facts['alike']:.1f} % even the 11th nearest is that similar"
        lines.append(("copies", f"undecided: {found}"))
        advice = "frames of one scene are copies, scans of one form are not: look at the pairs"
        lines.append(("note", advice))
    else:
        found += f"near-duplicate among the {facts['images_trained_on']:,} images trained on"
        if "accuracy_on_copies" in facts:
            found += f"; accuracy on them {100 * facts['accuracy_on_copies']:.2f} %"
        lines.append(("copies", found))
        if facts["copies_with_another_label"]:
            differ = f"{facts['copies_with_another_label']} of them with another label"
            lines.append(("labels", f"{differ}: one of the two may be wrong"))
    if "without_copies" in facts:
        rest = facts["without_copies"]
        accuracy = f"top-1 {100 * rest['top1_accuracy']:.2f} % on the other {rest['images']:,}"
        interval = f"95 % interval {describe_interval(rest['interval_95'])} %"
        lines.append(("without", f"{accuracy}, {interval}"))
        if "comparison" in rest:
            change = describe_change(rest["comparison"], "paired 95 % interval", " without copies")
            lines.append(("change", change))
    counts = "{test:,} test and {training:,} training labels".format(**facts["suspect_labels"])
    lines.append(("suspect", f"{counts} are worth checking: see suspect_labels.csv"))
    rare = len(facts["classes_too_small_to_judge"])
    if rare:
        text = f"training labels of {rare} classes with fewer than 5 images are not judged"
        lines.append(("note", text))
    return lines


# ---- tables and pictures ------------------------------------------------------------------------

# Files of an earlier evaluation that this one may not have, and what earlier versions drew
earlier_files = ["superclass_confusion_matrix.png", "comparison.json"]
earlier_files += ["duplicates.csv", "suspect_labels.csv", "comparison.png", "training_curves.png"]
earlier_files += ["most_confused.png", "mistakes.png", "per_class.png", "reliability.png"]
earlier_files += ["duplicates.png", "suspect_labels.png"]


@contextmanager
def explained_writing(folder: Path) -> Iterator[None]:
    """Turns what goes wrong with files of the results folder into UserError."""
    try:
        yield
    except OSError as error:
        raise utils.UserError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another --results-dir"
        ) from error


@contextmanager
def writing_into(folder: Path, outdated: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder whose files go into the results folder together, at the end of the block.

    outdated: files of earlier results to remove then. Where something cannot be written, the
    earlier results stay as they were, and UserError is raised.
    """
    with explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
            yield Path(new)
            for name in outdated:
                (folder / name).unlink(missing_ok=True)
            for file in Path(new).iterdir():
                file.replace(folder / file.name)


def write_csv(path: Path, rows: Iterable[Iterable], mode: str = "w") -> None:
    """Writes rows as a CSV file; mode "a" adds to it. Names that are not UTF-8 keep their bytes."""
    with open(path, mode, encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def read_csv(path: Path) -> Iterator[list[str]]:
    """The rows of a CSV file, its header first."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield from csv.reader(file)


def write_tables(
    result: Result, report: str, files: Sequence[str], check: DataCheck | None, folder: Path
) -> None:
    """Writes metrics.json, the report, the confusion matrix, predictions and what is checked."""
    text = json.dumps(result.summary, indent=2) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    (folder / "classification_report.txt").write_bytes(report.encode(errors="surrogateescape"))
    header = ["class", "precision", "recall", "f1-score", "support"]
    rows = zip(result.classes, *result.scores, result.support)
    write_csv(folder / "classification_report.csv", [header, *rows])
    header = ["true/predicted", *result.classes]
    write_csv(folder / "confusion_matrix.csv", chain([header], list_matrix_rows(result)))
    columns = {
        "index": range(len(result.labels)),
        "label": result.labels,
        "predicted": result.predicted,
        "confidence": result.confidence,
        "class": [result.classes[number] for number in result.labels],
        "predicted_class": [result.classes[number] for number in result.predicted],
    }
    if files:
        columns["file"] = files
    write_csv(folder / "predictions.csv", [list(columns), *zip(*columns.values())])
    if check:
        header = ["test_image", "training_image", "similarity"]
        header += ["test_label", "training_label", "same_label"]
        copies = check.pairs[: check.facts["copies"]]
        write_csv(folder / "duplicates.csv", [header, *(values for values, _ in copies)])
        header = ["part", "image", "label", "likelier_label", "probability", "likelier_probability"]
        rows = [values for values, _ in check.suspects]
        write_csv(folder / "suspect_labels.csv", [header, *rows])


def list_matrix_rows(result: Result) -> Iterator[list]:
    """Each class's name and row of the confusion matrix, which is never in memory as a whole."""
    for number, name in enumerate(result.classes):
        predicted = result.predicted[result.labels == number]
        yield [name, *np.bincount(predicted, minlength=len(result.classes))]


def draw_matrices(result: Result, folder: Path) -> None:
    """Draws the confusion matrix and, of CIFAR-100, that of its superclasses."""
    per_cell = -(-len(result.classes) // 1000)  # or it would need gigabytes
    matrix, names, groups = count_matrix(result, per_cell), result.classes[::per_cell], []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks are boxes
        if result.classes == data.CLASSES:
            names, groups = list(chain(*data.SUPERCLASSES.values())), list(data.SUPERCLASSES)
            matrix = data.by_superclass(matrix)
            superclasses = draw_matrix(data.count_superclasses(matrix), groups)
            save_picture(superclasses, folder / "superclass_confusion_matrix.png")
        save_picture(draw_matrix(matrix, names, groups), folder / "confusion_matrix.png")


def save_picture(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_matrix(matrix: np.ndarray, names: list[str], groups: Sequence[str] = ()) -> Figure:
    """Confusion matrix, rows true, columns predicted; lines between groups of as many classes."""
    count, numbered = len(names), len(names) <= 20
    fractions = matrix / matrix.sum(1, keepdims=True).clip(1)
    label = "fraction of the true class's images" + ("; numbers: images" if numbered else "")
    ticks = [name.encode(errors="replace").decode() for name in names] if count <= 200 else False
    style = {"xticklabels": ticks, "yticklabels": ticks, "square": True, "cmap": "Blues", "fmt": ""}
    style["norm"] = PowerNorm(0.5, 0, 1)  # so that a few per cent are visible beside 90
    style["annot"] = np.where(matrix, matrix, "") if numbered else None
    style["cbar_kws"] = {"label": label, "shrink": 0.5, "pad": 0.02}
    side = max(7, min(40, count * (0.55 if numbered else 0.2)))
    figure = Figure((side, side), layout="constrained")
    FigureCanvasAgg(figure)  # or seaborn would use pyplot, which opens a window
    rcParams["text.parse_math"] = False  # a "$" in a class's name is no formula
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


# ---- a page to look at --------------------------------------------------------------------------


def write_report(
    result: Result,
    test: data.Split,
    others: list[Result],
    check: DataCheck | None,
    lines: dict[str, Lines],
    folder: Path,
) -> None:
    """Writes report.html: the numbers, and the images behind them."""
    summary, chosen = result.summary, order_by_interest(result)
    names = test.named().files
    columns = {
        "name": [names[index] for index in chosen],
        "label": result.labels[chosen].tolist(),
        "predicted": result.predicted[chosen].tolist(),
        "confidence": result.confidence[chosen].round(4).tolist(),
    }
    if others:
        columns["other"] = others[0].predicted[chosen].tolist()
    order, groups = range(len(result.classes)), []
    if result.classes == data.CLASSES:
        order = data.superclass_order()
        groups = [[name, len(members)] for name, members in data.SUPERCLASSES.items()]
    effect = "the checkpoint was not selected on them"
    if summary["test_images_chose_checkpoint"]:
        effect = "the checkpoint was selected on them, so the numbers are optimistic"
    dataset = summary["constants"]["dataset"]
    noun = "test images" if dataset in data.BUILT_IN else "pictures"
    measured = ("images", f"{summary['images']:,} {noun} of {dataset}: {effect}")
    page = {
        "title": f"{summary['checkpoint']}, epoch {summary['epoch']}",
        "lines": [measured, *lines["numbers"], *lines.get("comparison", [])],
        "classes": result.classes,
        "place": np.argsort(order).tolist(),  # of each class in the matrix
        "groups": groups,
        "cells": result.cells.T.tolist(),
        "support": result.support.tolist(),
        "comparison": summary.get("comparison"),
    }
    curves = Path(summary["checkpoint"]).with_name("training_curves.png")  # which train.py drew
    with suppress(OSError):  # perhaps it has not
        page["curves"] = as_url("image/png", curves.read_bytes())
    sections = list_tables(result)
    if check:
        sections += list_galleries(check, lines["check"])
    write_page(folder / "report.html", page, sections, columns, [test.image(i) for i in chosen])


def order_by_interest(result: Result) -> list[int]:
    """The images for the page, which may lack room for all: mistakes first, the surest first."""
    surest = np.argsort(-result.confidence, kind="stable")
    wrong = surest[~result.correct[surest]]
    right = np.random.default_rng(0).permutation(np.flatnonzero(result.correct))  # of all classes
    order = np.concatenate([wrong[:1000], right[:1000], wrong[1000:], right[1000:]])
    return order[:20_000].tolist()


def list_tables(result: Result) -> list[dict]:
    """The classes, the worst first; the pairs most confused; accuracy by confidence."""
    classes, changes = result.classes, {}
    header, rows = ["class", "precision", "recall", "F1", "images"], []
    if "comparison" in result.summary:
        header.append("F1 change")
        for row in result.summary["comparison"]["classes"]:
            changes[row["class"]] = [f"{row['f1_change']:+.3f}"]
    for number in [*result.worst_first, *np.flatnonzero(result.support == 0)]:
        name, images = [classes[number], f"#class={number}"], str(result.support[number])
        scores = [f"{score:.3f}" for score in result.scores[:, number]]
        rows.append([name, *scores, images, *changes.get(classes[number], [])])
    sections = [{"title": "Classes", "header": header, "rows": rows}]

    header, rows = ["class", "taken for", "images", "the other way", "both"], []
    for pair in result.pairs[:100]:
        a, b = classes.index(pair["true"]), classes.index(pair["taken_for"])
        images = [str(pair["images"]), f"#cell={a},{b}"]
        other_way = [str(pair["other_way"]), f"#cell={b},{a}"]
        both = str(pair["images"] + pair["other_way"])
        rows.append([[pair["true"], f"#pair={a},{b}"], pair["taken_for"], images, other_way, both])
    sections.append({"title": "Most confused pairs", "header": header, "rows": rows})

    header, rows = ["confidence", "accuracy", "images"], []
    images, accuracy, _ = calibrate(result)
    for number in np.flatnonzero(images):
        middle = (number + 0.5) / len(images)
        rows.append([f"{middle:.2f}", f"{accuracy[number]:.2f}", str(images[number])])
    title = "Reliability: accuracy by confidence"
    sections.append({"title": title, "header": header, "rows": rows})
    return sections


def list_galleries(check: DataCheck, lines: Lines) -> list[dict]:
    """Copies, those with another label first, and the first that are none; the suspect labels."""
    count, figures, alike, unlike = check.facts["copies"], [], [], []
    for pair in check.pairs[:count]:
        same_label = pair[0][5]
        if same_label:
            alike.append(pair)
        else:
            unlike.append(pair)
    above, below = [*unlike, *alike][:200], check.pairs[count:][:12]
    shown = f"{len(above)} of {count:,} pairs above {check.facts['threshold']}, those with "
    shown += f"different labels first, then the {len(below)} next most similar"
    lines = [*lines, ("shown", shown)]
    for values, pictures in [*above, *below]:
        name, other, similarity, label, other_label, _ = values
        verdict = f"similarity {similarity:.3f}"
        if not check.facts["undecided"]:
            is_copy = similarity > check.facts["threshold"]
            verdict += ": probably a copy" if is_copy else ": below the limit"
        caption = [verdict, f"test {name}: {label}", f"training {other}: {other_label}"]
        figures.append((pictures, caption))
    sections = [{"title": "Copies, beside the training image", "lines": lines, "figures": figures}]
    for part in ("test", "training"):
        suspects = [row for row in check.suspects if row[0][0] == part]
        figures = []
        for (_, name, label, likelier, own, best), pictures in suspects[:150]:
            caption = [f"label {label}: {100 * own:.2f} %"]
            caption += [f"rather {likelier}: {100 * best:.1f} %", name]
            figures.append((pictures, caption))
        judge = "this model"
        if part == "training":
            judge = "heads that were not trained on the image"
        about = [("shown", f"{len(figures)} of {len(suspects):,}; suspect_labels.csv lists all")]
        about.append(("judged by", f"{judge}: probability of the label, and of a likelier class"))
        title = f"Labels worth checking: {part} images"
        sections.append({"title": title, "lines": about, "figures": figures})
    return sections


def write_page(
    path: Path,
    page: dict,
    sections: list[dict],
    columns: dict[str, list] | None = None,
    images: Sequence[Tensor] = (),
) -> None:
    """Writes page_body and page_script with what it shows into one file, which requests nothing.

    A section has a "title" and any of: "lines", each a label and a text; "header" and "rows" of a
    table, whose cells are texts, or [text, address within the page]; "figures", each images side by
    side and the lines of their caption. columns: what is told of the other images, of which as many
    are shown as there is room for.
    """
    pictures, shown = [], []
    for section in sections:
        figures = []
        for tiles, caption in section.get("figures", []):
            numbers = range(len(pictures), len(pictures) + len(tiles))
            figures.append([list(numbers), caption])
            pictures += tiles
        shown.append(section | {"figures": figures})
    side, sheets = make_sheets([*pictures, *images])
    room = max(side**2 * len(sheets) - len(pictures), 0)
    content = page | {"side": side, "sheets": sheets, "first_image": len(pictures)}
    content["sections"] = shown
    content["images"] = {name: column[:room] for name, column in (columns or {}).items()}
    text = json.dumps(content).replace("<", "\\u003c")  # so that no name ends the element
    style, script = as_source(page_style), as_source(page_script)
    policy = f"default-src 'none'; img-src data:; style-src {style}; script-src {script}"
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        '<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>{page_style}</style></head><body>{page_body}"
        f'<script type="application/json" id="page">{text}</script>'
        f"<script>{page_script}</script></body></html>\n",
        encoding="utf-8",
    )


def make_sheets(images: list[Tensor]) -> tuple[int, list[str]]:
    """Squares of side x side images uint8 (3, S, S) as JPEGs: side, and their URLs.

    There are fewer than all if they would make the page larger than 8 MB or so.
    """
    side, urls, room = max(1, min(8, math.ceil(math.sqrt(len(images))))), [], 7_000_000
    for start in range(0, len(images), side**2):
        tiles = shrink(torch.stack(images[start : start + side**2]))
        square = tiles.new_zeros(side**2, *tiles.shape[1:])
        square[: len(tiles)] = tiles
        file = BytesIO()
        to_pil_image(make_grid(square, side, 0)).save(file, "JPEG", quality=85, subsampling=0)
        url = as_url("image/jpeg", file.getvalue())
        room -= len(url)
        if room < 0:
            break
        urls.append(url)
    return side, urls


def shrink(images: Tensor) -> Tensor:
    """Images (N, 3, S, S) of at most 96 pixels per side."""
    return images if images.shape[-1] <= 96 else resize(images, [96, 96])


def as_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def as_source(text: str) -> str:
    """How a Content-Security-Policy names the only style or script that it allows."""
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


page_style = """
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 0 auto; padding: 0 1rem; max-width: 100rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dt { font-weight: bold; }
dd { margin: 0; overflow-wrap: anywhere; }
nav button { margin: 0 0.2rem 0.4rem 0; }
section { min-width: 0; max-width: 100%; }
/* What stands side by side where there is room: the matrix and its images, the tables. */
#evaluation, #sections { display: flex; flex-wrap: wrap; gap: 0 2rem; }
#evaluation[hidden] { display: none; }
#chosen { flex: 1 20rem; }
.gallery { width: 100%; }
.scroll { overflow: auto; max-height: 54rem; }
#matrix { cursor: crosshair; }
#tip { min-height: 1.4em; }
#curves { max-width: 100%; }
@media (prefers-color-scheme: dark) { #curves { filter: invert(0.9) hue-rotate(180deg); } }
table { border-collapse: collapse; }
th, td { padding: 0 0.6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; padding-left: 0; }
th { position: sticky; top: 0; background: Canvas; }
th button { border: 0; padding: 0; background: none; font: inherit; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
.figures { display: flex; flex-wrap: wrap; gap: 0.75rem; align-items: flex-start; }
figure { margin: 0; width: 7.5rem; font-size: 12px; overflow-wrap: anywhere; }
figure.wide { width: 14rem; }
.tile { display: inline-block; width: 96px; height: 96px; margin-right: 4px; }
.tile { image-rendering: pixelated; }
"""

page_body = """
<h1 id="title"></h1>
<dl id="lines"></dl>
<nav id="contents"></nav>
<noscript>This page needs JavaScript. The numbers are in metrics.json, too.</noscript>
<main>
  <div id="evaluation" hidden>
    <section>
      <h2>Confusion matrix</h2>
      <p id="tip">Rows are true classes, columns predicted ones. Point at a cell to
        name it, click for its images.</p>
      <div class="scroll"><canvas id="matrix" role="img" aria-label="Confusion matrix. The tables of
        classes and pairs lead to the same images."></canvas></div>
    </section>
    <section id="chosen">
      <h2 id="which" aria-live="polite"></h2>
      <p><a href="#mistakes">all mistakes</a><span id="compared" hidden> ·
        <a href="#gained">right only here</a> · <a href="#lost">right only in the other</a></span></p>
      <div class="scroll"><div class="figures" id="images"></div></div>
    </section>
  </div>
  <div id="sections"></div>
  <section id="training" hidden>
    <h2>Training</h2>
    <img id="curves" alt="Loss, accuracy and learning rate by epoch">
  </section>
</main>
"""

page_script = """
"use strict";
const page = JSON.parse(document.getElementById("page").textContent);
const {classes = [], groups = [], cells, place, support, comparison, images, side} = page;
const find = id => document.getElementById(id);

// An element with a text, which is never markup, or with other elements in it.
function make(name, content = [], attributes = {}) {
  const node = document.createElement(name);
  node.append(...[content].flat());
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// ---- pictures: sheets of side x side tiles, which are numbered over all sheets ------------------

page.sheets.forEach((url, sheet) =>
  document.styleSheets[0].insertRule(`.sheet${sheet} { background-image: url(${url}) }`));

function makeTile(number, label) {
  const index = number % side ** 2, percent = 100 / Math.max(side - 1, 1);
  const sheet = `tile sheet${Math.floor(number / side ** 2)}`;
  const tile = make("span", "", {role: "img", "aria-label": label, class: sheet});
  tile.style.backgroundSize = `${100 * side}%`;
  tile.style.backgroundPositionX = `${percent * (index % side)}%`;
  tile.style.backgroundPositionY = `${percent * Math.floor(index / side)}%`;
  return tile;
}

// Each figure is the numbers of its tiles and the lines of its caption; 200 are shown at a time.
function showFigures(box, figures, start = 0) {
  const end = Math.min(start + 200, figures.length);
  for (const [numbers, lines] of figures.slice(start, end)) {
    const tiles = numbers.map(number => makeTile(number, lines[0]));
    const caption = make("figcaption", lines.map(line => make("div", line)));
    box.append(make("figure", [...tiles, caption], {class: tiles.length > 1 ? "wide" : ""}));
  }
  if (end < figures.length) {
    const more = make("button", `${end} of ${figures.length} shown: show more`);
    more.onclick = () => { more.remove(); showFigures(box, figures, end); };
    box.append(more);
  }
}

// ---- sections -----------------------------------------------------------------------------------

function makeLines(lines) {
  return lines.flatMap(([label, text]) => [make("dt", label), make("dd", text)]);
}

// A cell is a text, or a text and the address that it links to.
function makeTable(header, rows) {
  const makeCell = ([text, href]) => make("td", href ? make("a", text, {href}) : text);
  const head = header.map(name => make("th", make("button", name)));
  const body = rows.map(row => make("tr", row.map(cell => makeCell([cell].flat()))));
  const table = make("table", [make("tr", head), ...body]);
  for (const cell of head) cell.firstChild.onclick = () => sortTable(table, cell);
  return table;
}

function sortTable(table, head) {
  const sign = head.getAttribute("aria-sort") == "ascending" ? -1 : 1;
  const text = row => row.cells[head.cellIndex].textContent;
  const compare = (a, b) => text(a) - text(b) || text(a).localeCompare(text(b));
  table.append(...[...table.rows].slice(1).sort((a, b) => sign * compare(a, b)));
  for (const cell of table.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}

function makeSection({title, lines = [], header = [], rows = [], figures}) {
  const table = make("div", makeTable(header, rows), {class: "scroll"});
  const box = make("div", [], {class: "figures"});
  showFigures(box, figures);
  const content = [make("h2", title), make("dl", makeLines(lines)), table, box];
  return make("section", content, {class: header.length ? "" : "gallery"});
}

function makeContents(sections) {
  if (sections.length < 2) return;
  for (const section of sections) {
    const button = make("button", section.firstChild.textContent);
    button.onclick = () => section.scrollIntoView();
    find("contents").append(button);
  }
}

// ---- the images that the address asks for: #cell=3,7, #pair=3,7, #class=3, #gained, #lost -------

// Returns a title, which images belong to it, by true, predicted and the other's predicted class,
// and, where the matrix does not tell, how many there are.
function choose(address) {
  const [kind, numbers = ""] = address.slice(1).split("="), [a, b = a] = numbers.split(",");
  if (kind == "gained" && comparison)
    return ["right only here", (t, p, o) => t == p && t != o, comparison.only_this_correct];
  if (kind == "lost" && comparison)
    return ["right only in the other", (t, p, o) => t != p && t == o, comparison.only_other_correct];
  if (!(a in classes && b in classes)) return ["mistakes, the surest first", (t, p) => t != p];
  if (kind == "cell") return [nameCell(a, b), (t, p) => t == a && p == b];
  if (kind == "class")
    return [`${classes[a]}, and what was taken for it`, (t, p) => t == a || p == a];
  const isOne = number => number == a || number == b;
  return [`${classes[a]} and ${classes[b]}`, (t, p) => isOne(t) && isOne(p)];
}

function nameCell(t, p) {
  return t == p ? `${classes[t]} recognised` : `${classes[t]} taken for ${classes[p]}`;
}

function showImages() {
  const {name, label, predicted, confidence, other = []} = images;
  const [title, belongs, known] = choose(location.hash), isRight = i => label[i] == predicted[i];
  const counted = cells.filter(([t, p]) => belongs(t, p)).reduce((sum, cell) => sum + cell[2], 0);
  const rows = [...name.keys()].filter(i => belongs(label[i], predicted[i], other[i]));
  rows.sort((i, j) => isRight(i) - isRight(j) || confidence[j] - confidence[i]);
  const total = known ?? counted, noun = total == 1 ? "image" : "images";
  const part = rows.length < total ? `, ${rows.length} on this page` : "";
  find("which").textContent = `${total.toLocaleString("en")} ${noun}: ${title}${part}`;
  find("images").replaceChildren();
  find("images").parentElement.scrollTop = 0;
  showFigures(find("images"), rows.map(i => {
    const verdict = isRight(i) ? "recognised" : `taken for ${classes[predicted[i]]}`;
    const lines = [classes[label[i]], `${verdict}, ${(100 * confidence[i]).toFixed(1)} %`, name[i]];
    if (comparison) lines.push(`other: ${classes[other[i]]}`);
    return [[page.first_image + i], lines];
  }));
}

// ---- the matrix ---------------------------------------------------------------------------------

const count = classes.length, labels = count > 30 ? groups : classes.map(name => [name, 1]);
const longest = Math.max(0, ...labels.map(([name]) => name.length));
const margin = longest ? Math.min(150, 7 * longest + 8) : 0;  // pixels for the names
const unit = Math.min(36, (count > 100 ? 800 : 700) / count);  // pixels per side

function drawMatrix() {
  const canvas = find("matrix"), draw = canvas.getContext("2d"), size = margin + count * unit;
  canvas.width = canvas.height = size * devicePixelRatio;
  canvas.style.width = canvas.style.height = `${size}px`;
  draw.scale(devicePixelRatio, devicePixelRatio);
  draw.font = "11px system-ui, sans-serif";
  draw.fillStyle = "#8882";
  draw.fillRect(margin, margin, count * unit, count * unit);
  const text = getComputedStyle(document.body).color, gap = unit > 5 ? 1 : 0;
  let most = 0;  // the largest share of a class that is taken for one other
  for (const [t, p, number] of cells) {
    if (t != p) most = Math.max(most, number / support[t]);
  }
  for (const [t, p, number] of cells) {
    const x = margin + place[p] * unit, y = margin + place[t] * unit;
    const share = number / support[t] / (t == p ? 1 : most);
    draw.fillStyle = `rgb(${t == p ? "40 120 230" : "225 60 30"} / ${0.15 + 0.85 * share})`;
    draw.fillRect(x, y, Math.max(unit - gap, 2), Math.max(unit - gap, 2));
    draw.fillStyle = text;
    if (count <= 20) draw.fillText(number, x + 4, y + 0.6 * unit, unit - 8);
  }
  let start = margin;
  for (const [name, rows] of labels) {
    const end = start + rows * unit, middle = (start + end) / 2 + 4;
    draw.fillText(name, 0, middle, margin - 6);
    draw.save();
    draw.translate(middle, margin - 6);
    draw.rotate(-Math.PI / 2);
    draw.fillText(name, 0, 0, margin - 6);
    draw.restore();
    if (groups.length) {
      draw.fillRect(margin, end - 0.75, count * unit, 0.5);
      draw.fillRect(end - 0.75, margin, 0.5, count * unit);
    }
    start = end;
  }
}

// True class, predicted class and images of the cell under the pointer, or, where cells are small,
// of the nearest that is not empty; undefined where there is none.
function cellAt(event) {
  const x = (event.offsetX - margin) / unit - 0.5, y = (event.offsetY - margin) / unit - 0.5;
  const distance = ([t, p]) => Math.max(Math.abs(place[p] - x), Math.abs(place[t] - y));
  let nearest, least = Math.max(0.5, 5 / unit);
  for (const cell of cells) {
    if (distance(cell) < least) [nearest, least] = [cell, distance(cell)];
  }
  return nearest;
}

function showEvaluation() {
  find("evaluation").hidden = false;
  drawMatrix();
  matchMedia("(prefers-color-scheme: dark)").onchange = drawMatrix;
  const hint = find("tip").textContent;
  find("matrix").onmousemove = event => {
    const cell = cellAt(event), [t, p, number] = cell || [];
    find("tip").textContent =
      cell ? `${nameCell(t, p)}: ${number} of ${support[t]} images` : hint;
  };
  find("matrix").onclick = event => {
    const cell = cellAt(event);
    if (cell) location.hash = `cell=${cell[0]},${cell[1]}`;
  };
  find("compared").hidden = !comparison;
  showImages();
  window.onhashchange = () => {
    showImages();
    find("which").scrollIntoView({block: "nearest"});
  };
}

find("title").textContent = document.title = page.title;
find("lines").append(...makeLines(page.lines));
if (count) showEvaluation();
find("sections").append(...page.sections.map(makeSection));
makeContents([...find("sections").children]);
if (page.curves) {
  find("curves").src = page.curves;
  find("training").hidden = false;
}
"""


# ---- the user's own pictures --------------------------------------------------------------------


def classify_pictures(classifier: Classifier, args: Namespace, folder: Path) -> None:
    """Prints the five likeliest classes of the user's pictures and writes them, batch by batch.

    pictures.html, in the end, shows the first 1,000.
    """
    constants, classes, table = classifier.constants, classifier.classes, folder / "pictures.csv"
    size, whole = constants["stored_size"] or 32, constants["whole_pictures"]
    batches = data.read_pictures(args.images, size, whole, constants["val_batch_size"])
    count, figures, total = min(5, len(classes)), [], 0
    header = [f"{name}_{i + 1}" for i in range(count) for name in ("class", "probability")]
    for files, images in batches:
        if total == 0:
            with explained_writing(folder):
                write_csv(table, [["file", *header]])
        top = classifier.predict(images).mean(0).softmax(1).topk(count)
        rows, captions = [], []
        for file, numbers, shares in zip(files, top.indices.tolist(), top.values.tolist()):
            named = [(classes[number], share) for number, share in zip(numbers, shares)]
            rows.append([file, *chain(*named)])
            lines = [f"{100 * share:6.2f} %  {name}" for name, share in named]
            captions.append([str(file), *lines])
        with explained_writing(folder):
            write_csv(table, rows, "a")
        for tile, caption in zip(shrink(images), captions):
            print(*caption, sep="\n")
            if total < 1000:
                figures.append(([tile], caption))
            total += 1
    title = f"Pictures as {classifier.path} classifies them"
    shown = [("shown", f"{len(figures):,} of {total:,}")]
    section = {"title": "As the network sees them", "lines": shown, "figures": figures}
    with writing_into(folder) as new:
        write_page(new / "pictures.html", {"title": title, "lines": []}, [section])
    utils.say("results", f"{table}; open {folder / 'pictures.html'} in a browser")


if __name__ == "__main__":
    with utils.explained_exit(
        "the results are incomplete, run it again; checkpoints are untouched",
        "free it of other programs, or use --device cpu",
    ):
        main()
