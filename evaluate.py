"""Evaluates a checkpoint on the official test images: how good it is, and where it goes wrong.

    python evaluate.py                              checkpoints/best.pt
    python evaluate.py --checkpoint checkpoints/demo/best.pt
    python evaluate.py --tta                        averages over each image and its mirror
    python evaluate.py --images cat.jpg photos/     the likeliest classes of your own pictures

It computes as train.py validated: image size, batch size, precision and data set are those stored
in the checkpoint. It prints a report and writes metrics.json (accuracies are fractions), tables and
pictures into RESULTS_DIR; with --images predictions.png alone. In predictions.csv an index counts
from 0 in the official test file, label and predicted are class numbers, and confidence is the
softmax of the predicted class. Rows of a confusion matrix are true, columns predicted classes.
"""

import csv
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, PercentFormatter
from PIL import Image, ImageOps
from sklearn import metrics
from torch import Tensor

import data
import model as resnet
import utils

CHECKPOINT = "checkpoints/best.pt"  # file written by train.py
DATA_DIR = "data"  # folder that holds cifar-100-python/, downloaded into it when missing
RESULTS_DIR = "results"  # folder for everything this script writes
DEVICE = "auto"  # auto, cuda, mps or cpu
TTA = False  # average the logits over each image and its mirror: twice the time
IMAGES = []  # pictures, or folders of them, to classify instead of the test images
SHOW = True  # open the confusion matrix in a window where there is a display


class Result(NamedTuple):
    """N test images and what the network takes them for."""

    images: Tensor  # uint8 (N, 3, 32, 32)
    labels: np.ndarray  # true class numbers (N,)
    predicted: np.ndarray  # class numbers (N,)
    confidence: np.ndarray  # softmax of the predicted class (N,)
    classes: list[str]

    def surest(self, which: np.ndarray, count: int) -> np.ndarray:
        """Indices of the images, of those where which (N,) is true, with the highest confidence."""
        indices = np.flatnonzero(which)
        return indices[np.argsort(-self.confidence[indices], kind="stable")][:count]


def main(argv: list[str] | None = None) -> None:
    args, _ = utils.parse_flags(__file__, argv, __doc__)
    devices = ("auto", "cuda", "mps", "cpu")
    utils.require(args.device in devices, "device", args.device, f"one of {', '.join(devices)}")
    for name in ("checkpoint", "data_dir", "results_dir"):
        utils.require(getattr(args, name) != "", name, "''", "a path")
    path, folder = Path(args.checkpoint), Path(args.results_dir)

    # The network as it was trained
    device = utils.choose_device(args.device)
    checkpoint = utils.load_checkpoint(path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # better to fail now than after the network
    with utils.fitting(path):
        dataset, classes, history = (checkpoint[key] for key in ("dataset", "classes", "history"))
        constants, dtype = checkpoint["constants"], utils.DTYPES[checkpoint["precision"]]
        batch_size, image_size = constants["batch_size"], constants["image_size"]
        if not all(isinstance(size, int) and size > 0 for size in (batch_size, image_size)):
            raise ValueError("its batch or image size is no positive number")
        optimistic, watch = constants["holdout_per_class"] == 0, constants["watch"]
        model = resnet.build_model(len(classes))
        model.load_state_dict(checkpoint["model"])
    model = model.to(device, memory_format=torch.channels_last)
    utils.say("device", f"{utils.device_name(device)}, {checkpoint['precision']}, channels_last")
    utils.say("model", f"{path}, epoch {checkpoint['epoch']}")

    def predict(images: Tensor) -> Tensor:
        """Logits (views, N, num_classes): of the images and, with --tta, of their mirrors."""
        logits = []
        for view in [images, images.flip(3)] if args.tta else [images]:
            unlabelled = data.Images(view, torch.zeros(len(view))).to(device)
            loader = data.EvalLoader(unlabelled, batch_size, image_size)
            logits.append(resnet.predict(model, loader, dtype, progress=utils.on_terminal()))
        if not all(view.isfinite().all() for view in logits):
            raise utils.UserError(f"{path} gives predictions that are not finite: train it again")
        return torch.stack(logits).cpu()

    # The user's own pictures
    if args.images:
        files, images = read_pictures(args.images)
        captions = describe_top5(predict(images).mean(0).softmax(1), classes)
        for file, caption in zip(files, captions):
            print(f"{file}\n{caption}")
        titles = [f"{file.name[-24:]}\n{caption}" for file, caption in zip(files, captions)][:24]
        picture = folder / "predictions.png"
        with writing(folder):
            save_picture(draw_tiles(images[:24], titles, columns=4, width=2.5), picture)
        utils.say("results", f"{picture}: the first {len(titles)} as the network sees them")
        if args.show:
            open_window(picture)
        return

    # The test images
    if dataset == "cifar100":
        data.fetch_cifar100(args.data_dir)
    _, test, _ = data.read_dataset(dataset, args.data_dir)
    utils.say("data", f"{dataset}: {len(test.labels):,} test images")
    chose = "also chose the checkpoint, so the numbers are optimistic"
    unseen = "took no part in training or in choosing the checkpoint"
    utils.say("note", f"these images {chose if optimistic else unseen}")
    views = predict(test.images)
    confidence, predicted = (x.numpy() for x in views.mean(0).double().softmax(1).max(1))
    result = Result(test.images, test.labels.numpy(), predicted, confidence, classes)

    # Numbers
    matrix = metrics.confusion_matrix(result.labels, predicted, labels=range(len(classes)))
    text, report = report_classes(result)
    f1 = {name: report[name]["f1-score"] for name in classes}
    bins = calibration_bins(confidence, predicted == result.labels)
    pairs = find_confused_pairs(matrix, classes)
    superclasses = list(data.SUPERCLASSES) if dataset == "cifar100" else []
    numbers = score(views.mean(0), test.labels) | {
        "macro_f1": report["macro avg"]["f1-score"],
        "expected_calibration_error": expected_calibration_error(bins),
        "intervals_95": bootstrap_intervals(matrix),
        "most_confused": pairs[:10],
        "images": len(predicted),
        "test_images_chose_checkpoint": optimistic,
        "tta": args.tta,
        "checkpoint": str(path),
        **{name: checkpoint[name] for name in ("epoch", "dataset", "precision")},
    }
    if superclasses:
        coarse_matrix = count_superclasses(result)
        numbers["superclass_accuracy"] = coarse_matrix.trace() / len(predicted)
    if args.tta:
        numbers["without_tta"] = score(views[0], test.labels)
    print_numbers(numbers, text, f1)

    # Files
    curve = read_history(path.with_name("history.csv"), history)
    pictures = {
        "confusion_matrix": draw_matrix(matrix, classes, superclasses),
        "superclass_confusion_matrix": superclasses and draw_matrix(coarse_matrix, superclasses),
        "most_confused": pairs and draw_pairs(result, pairs[:8]),
        "mistakes": pairs and draw_mistakes(result),
        "per_class": draw_f1(f1),
        "reliability": draw_reliability(bins),
        "training_curves": curve and draw_curves(curve, watch),
    }
    with writing(folder):
        (folder / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
        (folder / "classification_report.txt").write_text(text)
        rows = [[name, *row.values()] for name, row in report.items() if name != "accuracy"]
        write_csv(folder / "classification_report.csv", ["class", *report["macro avg"]], rows)
        rows = [[name, *counts] for name, counts in zip(classes, matrix)]
        write_csv(folder / "confusion_matrix.csv", ["true/predicted", *classes], rows)
        rows = zip(range(len(predicted)), result.labels, predicted, confidence)
        header = ["index", "label", "predicted", "confidence"]
        write_csv(folder / "predictions.csv", header, rows)
        for name, figure in pictures.items():
            save_picture(figure, folder / f"{name}.png")
    if missing := [f"{name}.png" for name, figure in pictures.items() if not figure]:
        utils.say("note", f"nothing to draw in {', '.join(missing)}")
    utils.say("results", str(folder))
    if args.show:
        open_window(folder / "confusion_matrix.png")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises UserError where the results cannot be written."""
    try:
        yield
    except OSError as error:
        raise utils.UserError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another --results-dir"
        ) from error


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable]) -> None:
    """A header and rows as a CSV file."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


# ---- numbers ------------------------------------------------------------------------------------


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 accuracy of logits (N, num_classes)."""
    numbers = range(logits.shape[1])
    return {
        "loss": F.cross_entropy(logits, labels, reduction="sum").item() / len(labels),
        "top1_accuracy": metrics.accuracy_score(labels, logits.argmax(1)),
        "top5_accuracy": metrics.top_k_accuracy_score(labels, logits, k=5, labels=numbers),
    }


def report_classes(result: Result) -> tuple[str, dict]:
    """scikit-learn's classification report, as text and as numbers, with every class in it."""
    options = {"target_names": result.classes, "digits": 4, "zero_division": 0}
    options["labels"] = range(len(result.classes))  # or names shift when a class is absent
    return tuple(
        metrics.classification_report(result.labels, result.predicted, output_dict=flag, **options)
        for flag in (False, True)
    )


def superclass_numbers(classes: list[str]) -> np.ndarray:
    """The superclass of each class (num_classes,), numbered as the official coarse labels are."""
    groups = data.SUPERCLASSES.values()
    return np.array([[name in group for group in groups].index(True) for name in classes])


def count_superclasses(result: Result) -> np.ndarray:
    """Confusion matrix (20, 20) of the superclasses."""
    coarse = superclass_numbers(result.classes)
    numbers = range(len(data.SUPERCLASSES))
    return metrics.confusion_matrix(coarse[result.labels], coarse[result.predicted], labels=numbers)


def find_confused_pairs(matrix: np.ndarray, classes: list[str]) -> list[dict]:
    """Classes taken for each other, most mistakes of both ways first; the commoner way is named."""
    pairs = [
        {"true": classes[a], "taken_for": classes[b], "images": n, "other_way": matrix[b, a].item()}
        for a, row in enumerate(matrix.tolist())
        for b, n in enumerate(row)
        if n and a != b and (n, b) > (matrix[b, a], a)
    ]
    return sorted(pairs, key=lambda pair: -pair["images"] - pair["other_way"])


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

    Images differ by their cell of the confusion matrix alone, so cells are drawn: a multinomial.
    """
    true, predicted = matrix.nonzero()
    share = matrix[true, predicted] / matrix.sum()
    drawn = np.random.default_rng(0).multinomial(matrix.sum(), share, resamples)
    of_class = np.eye(len(matrix))
    hits = drawn @ (of_class[true] * of_class[predicted])  # (resamples, num_classes)
    sizes = drawn @ (of_class[true] + of_class[predicted])  # images of a class + taken for it
    samples = {
        "top1_accuracy": hits.sum(1) / matrix.sum(),
        "macro_f1": (2 * hits / sizes.clip(1)).mean(1),
    }
    return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in samples.items()}


def print_numbers(numbers: dict, report: str, f1: dict[str, float]) -> None:
    """What a person reads on the terminal; the summary comes last, where the prompt is."""
    print(f"\n{report}\nworst classes by F1")
    for name in sorted(f1, key=f1.get)[:10]:
        print(f"{f1[name]:8.4f}  {name}")
    print("\nmost confused pairs, images one way + the other")
    for pair in numbers["most_confused"]:
        print("{images:4} + {other_way:<3} {true} taken for {taken_for}".format(**pair))
    print()
    utils.say("loss", f"{numbers['loss']:.4f}")
    for label, name, meaning in [
        ("top-1", "top1_accuracy", ""),
        ("top-5", "top5_accuracy", ""),
        ("macro F1", "macro_f1", ""),
        ("coarse", "superclass_accuracy", ", the right superclass"),
        ("ECE", "expected_calibration_error", ", expected calibration error"),
    ]:
        if name in numbers:
            low, high = (100 * x for x in numbers["intervals_95"].get(name, (0, 0)))
            interval = f", 95 % interval {low:.2f} to {high:.2f} %" if high else ""
            utils.say(label, f"{100 * numbers[name]:.2f} %{interval}{meaning}")
    if numbers["tta"]:
        single = numbers["without_tta"]
        utils.say(
            "no tta", f"loss {single['loss']:.4f}, top-1 {100 * single['top1_accuracy']:.2f} %"
        )


# ---- pictures -----------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """A figure, in inches, without a window: pyplot, which would open one, has no part in it."""
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)  # without a canvas seaborn turns to pyplot
    return figure


def save_picture(figure: Figure | None, path: Path) -> None:
    """Writes a figure without its margins; removes an earlier evaluation's if it is None."""
    path.unlink(missing_ok=True)
    if figure:
        figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_matrix(matrix: np.ndarray, names: list[str], groups: Sequence[str] = ()) -> Figure:
    """Confusion matrix, rows true, columns predicted; by superclass if groups names them."""
    count, numbered = len(names), len(names) <= 20
    if groups:
        order = np.argsort(superclass_numbers(names), kind="stable")
        matrix, names = matrix[order][:, order], [names[i] for i in order]
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    label = "share of the true class's images" + "; numbers: images" * numbered
    style = {"xticklabels": names, "yticklabels": names, "square": True, "cmap": "Blues", "fmt": ""}
    style["norm"] = PowerNorm(0.5, 0, 1)  # so that a few per cent show beside a diagonal of 90
    style["annot"] = np.where(matrix, matrix, "") if numbered else None
    style["cbar_kws"] = {"label": label, "shrink": 0.5, "pad": 0.02}
    figure = new_figure(*[max(7, count * (0.55 if numbered else 0.2))] * 2)
    axes = sns.heatmap(shares, ax=figure.subplots(), **style)
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


def draw_tiles(images: Tensor, captions: Sequence[str], columns: int, width: float) -> Figure:
    """Images uint8 (N, 3, H, W), each width inches wide under its caption."""
    rows, lines = -(-len(images) // columns), captions[0].count("\n") + 1
    height = width * images.shape[2] / images.shape[3] + 0.19 * lines
    figure = new_figure(width * columns, height * rows)
    for position, (image, caption) in enumerate(zip(images, captions), start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(caption, fontsize=9, loc="left", parse_math=False)
        axes.axis("off")
    return figure


def draw_mistakes(result: Result) -> Figure:
    """The 24 mistakes of which the network was surest."""
    surest = result.surest(result.predicted != result.labels, 24)
    names, sure = result.classes, 100 * result.confidence
    captions = [
        f"true: {names[result.labels[i]]}\npredicted: {names[result.predicted[i]]}\n"
        f"confidence: {sure[i]:.2f} %"
        for i in surest
    ]
    return draw_tiles(result.images[surest], captions, columns=6, width=2)


def draw_pairs(result: Result, pairs: list[dict]) -> Figure:
    """A row a pair: three images of each class outside, those taken for the other between them."""
    names, strips, captions = result.classes, [], []
    for pair in pairs:
        a, b = names.index(pair["true"]), names.index(pair["taken_for"])
        for label, predicted in (a, a), (a, b), (b, a), (b, b):
            which = (result.labels == label) & (result.predicted == predicted)
            strip = torch.full((3, 32, 3 * 34), 255, dtype=torch.uint8)
            for place, image in enumerate(result.images[result.surest(which, 3)]):
                strip[:, :, 34 * place : 34 * place + 32] = image
            strips.append(strip)
            mistake = f"taken for {names[predicted]}" if label != predicted else "recognised"
            captions.append(f"{names[label]} {mistake}: {which.sum()}")
    return draw_tiles(torch.stack(strips), captions, columns=4, width=3)


def draw_f1(f1: dict[str, float]) -> Figure:
    """F1 of every class, the worst first, 25 in a column."""
    names = sorted(f1, key=f1.get)
    panels = [names[start : start + 25] for start in range(0, len(names), 25)]
    figure = new_figure(max(6, 3.5 * len(panels)), 1 + 0.24 * len(panels[0]))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        bars = axes.barh(panel, [f1[name] for name in panel], color="steelblue")
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set(xlabel="F1", xlim=(0, 1.15), ylim=(len(panels[0]) - 0.5, -0.5))
        sns.despine(ax=axes)
    return figure


def draw_reliability(bins: np.ndarray) -> Figure:
    """Accuracy by confidence, against the diagonal, and the share of images in each bin."""
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
    lower.set(xlabel="confidence: softmax of the predicted class", ylabel="share of images")
    lower.set_xlim(0, 1)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def read_history(path: Path, own: list[dict]) -> list[dict]:
    """The history beside a checkpoint, longer than its own; its own where that is another run's."""
    try:
        with open(path, newline="") as file:
            rows = [{key: float(x) for key, x in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError):  # there is none, or a damaged one
        return own
    return rows if own and rows[: len(own)] == own else own


def draw_curves(history: list[dict], watch: str) -> Figure:
    """Loss and accuracy by epoch; the best epoch and the learning rate's steps are marked."""
    column = {name: [row[name] for row in history] for name in history[0]}
    epochs, rates, watched = (column[x] for x in ("epoch", "learning_rate", f"val_{watch}"))
    best = watched.index(max(watched) if watch == "accuracy" else min(watched))
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    for axes, name in (left, "loss"), (right, "accuracy"):
        axes.plot(epochs, column[f"train_{name}"], ".-", label="training, augmented, with dropout")
        axes.plot(epochs, column[f"val_{name}"], ".-", label="validation")
        place = epochs[best], column[f"val_{name}"][best]
        axes.plot(*place, "*", ms=15, color="crimson", label=f"best epoch: {epochs[best]:.0f}")
        for epoch, rate, before in zip(epochs, rates, [None, *rates]):
            if rate != before:
                axes.axvline(epoch - 0.5, color="gray", linestyle=":")
                style = {"xycoords": axes.get_xaxis_transform(), "rotation": 90, "ha": "center"}
                axes.annotate(f"lr {rate:.2g}", (epoch - 0.5, 1.02), **style)
        axes.set(xlabel="epoch", xlim=(0, epochs[-1] + 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set(ylabel="loss (cross-entropy, nats)", yscale="log")
    left.yaxis.set(major_formatter="{x:g}", minor_formatter=LogFormatter())
    right.set_ylabel("accuracy")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def open_window(path: Path) -> None:
    """Shows a picture until its window is closed; does nothing where there is no display."""
    try:
        figure = plt.figure(path.name, layout="constrained")
    except Exception as error:  # noqa: BLE001, a backend or display that is named but not there
        return utils.say("note", f"no window: {error}")
    if plt.get_backend().lower() != "agg":  # which matplotlib chooses where there is no display
        axes = figure.add_subplot()
        axes.imshow(plt.imread(path))
        axes.axis("off")
        plt.show()
    plt.close(figure)


# ---- the user's own pictures --------------------------------------------------------------------


def read_pictures(paths: list[str]) -> tuple[list[Path], Tensor]:
    """Pictures from files and folders, centre-cropped and reduced: uint8 (N, 3, 32, 32).

    What is not a picture gets a line on stderr. Raises UserError if nothing else is there.
    """
    files, images = [], []
    for path in map(Path, paths):
        try:
            inside = sorted(path.iterdir()) if path.is_dir() else [path]
        except OSError as error:
            print(f"skipped  {path}: {error}", file=sys.stderr)
            continue
        for file in inside:
            try:
                with Image.open(file) as image:
                    upright = ImageOps.exif_transpose(image).convert("RGB")
            except Exception as error:  # noqa: BLE001, of a dozen types, by what is wrong with it
                print(f"skipped  {file}: {error}", file=sys.stderr)
            else:
                images.append(torch.from_numpy(np.array(ImageOps.fit(upright, (32, 32)))))
                files.append(file)
    if not files:
        raise utils.UserError(f"No picture among {', '.join(paths)}. Name image files, or folders")
    return files, torch.stack(images).permute(0, 3, 1, 2)


def describe_top5(probabilities: Tensor, classes: list[str]) -> list[str]:
    """The five likeliest classes of each image, one a line."""
    top = (x.tolist() for x in probabilities.topk(5))
    return [
        "\n".join(f"{100 * p:6.2f} %  {classes[i]}" for p, i in zip(*pair)) for pair in zip(*top)
    ]


if __name__ == "__main__":
    with utils.explained_exit(
        lambda: "run it again for results that belong together; no checkpoint was changed",
        "free it of other programs, or use --device cpu",
    ):
        main()
