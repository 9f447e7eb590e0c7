"""Evaluates a checkpoint on the official test images: how good it is, and where it goes wrong.

    python evaluate.py                                      checkpoints/best.pt
    python evaluate.py --checkpoint checkpoints/demo/best.pt

It computes as train.py validated: image size, batch size, precision and data set are those stored
in the checkpoint. Prints loss, top-1, top-5 and a report for every class; writes to RESULTS_DIR:

    metrics.json                    loss and accuracies as fractions, and where they come from
    classification_report.txt/.csv  precision, recall and F1 of every class
    confusion_matrix.csv/.png       rows true, columns predicted; counts, shares of a row
    predictions.csv                 index into the official test file, label and predicted as class
                                    numbers, confidence (the softmax of the predicted class)
"""

import csv
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    top_k_accuracy_score,
)

import data
import model as resnet
import utils

CHECKPOINT = "checkpoints/best.pt"  # file written by train.py
DATA_DIR = "data"  # folder that holds cifar-100-python/, downloaded into it when missing
RESULTS_DIR = "results"  # folder for everything this script writes
DEVICE = "auto"  # auto, cuda, mps or cpu
SHOW = True  # open the confusion matrix in a window where there is a display


def main(argv: list[str] | None = None) -> None:
    args, _ = utils.parse_flags(__file__, argv, __doc__)
    devices = ("auto", "cuda", "mps", "cpu")
    utils.require(args.device in devices, "device", args.device, f"one of {', '.join(devices)}")
    path, folder = Path(args.checkpoint), Path(args.results_dir)

    # The network as it was trained
    device = utils.choose_device(args.device)
    checkpoint = utils.load_checkpoint(path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # better to fail now than after the network
    with utils.fitting(path):
        constants, classes = checkpoint["constants"], checkpoint["classes"]
        batch_size, image_size = constants["batch_size"], constants["image_size"]
        holdout_per_class = constants["holdout_per_class"]
        dtype = utils.DTYPES[checkpoint["precision"]]
        model = resnet.build_model(len(classes))
        model.load_state_dict(checkpoint["model"])
    model = model.to(device, memory_format=torch.channels_last)
    utils.say("device", f"{utils.device_name(device)}, {checkpoint['precision']}, channels_last")
    utils.say("model", f"{path}, epoch {checkpoint['epoch']}")

    # Its predictions
    if checkpoint["dataset"] == "cifar100":
        data.fetch_cifar100(args.data_dir)
    _, test, _ = data.read_dataset(checkpoint["dataset"], args.data_dir)
    loader = data.EvalLoader(test.to(device), batch_size, image_size)
    logits = resnet.predict(model, loader, dtype, progress=utils.on_terminal())
    utils.say("data", f"{checkpoint['dataset']}: {len(logits):,} test images")
    if holdout_per_class:
        utils.say("note", "these images had no part in training or in choosing the checkpoint")
    else:
        utils.say("note", "these images also chose the checkpoint, so the numbers are optimistic")

    # Numbers
    loss = F.cross_entropy(logits, loader.labels, reduction="sum").item() / len(logits)
    logits, labels = logits.cpu().double(), test.labels.numpy()
    confidence, predicted = (tensor.numpy() for tensor in logits.softmax(1).max(1))
    numbers = range(len(classes))
    metrics = {
        "loss": loss,
        "top1_accuracy": accuracy_score(labels, predicted),
        "top5_accuracy": top_k_accuracy_score(labels, logits.numpy(), k=5, labels=numbers),
        "images": len(labels),
        "checkpoint": str(path),
        "epoch": checkpoint["epoch"],
        "dataset": checkpoint["dataset"],
        "precision": checkpoint["precision"],
        "test_images_chose_checkpoint": holdout_per_class == 0,
    }
    options = {"labels": numbers, "target_names": classes, "zero_division": 0}
    report = classification_report(labels, predicted, **options, digits=4)
    rows = classification_report(labels, predicted, **options, output_dict=True)
    matrix = confusion_matrix(labels, predicted, labels=numbers)
    utils.say("loss", f"{loss:.4f}")
    utils.say("top-1", f"{100 * metrics['top1_accuracy']:.2f} %")
    utils.say("top-5", f"{100 * metrics['top5_accuracy']:.2f} %")
    print(report)

    # Files
    with writing(folder):
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (folder / "classification_report.txt").write_text(report)
        fields = ["precision", "recall", "f1-score", "support"]
        write_csv(
            folder / "classification_report.csv",
            ["class", *fields],
            ([name, *(rows[name][field] for field in fields)] for name in classes),
        )
        write_csv(
            folder / "confusion_matrix.csv",
            ["true \\ predicted", *classes],
            ([name, *counts] for name, counts in zip(classes, matrix.tolist())),
        )
        write_csv(
            folder / "predictions.csv",
            ["index", "label", "predicted", "confidence"],
            zip(range(len(labels)), labels.tolist(), predicted.tolist(), confidence.tolist()),
        )
        draw_matrix(matrix, classes).savefig(folder / "confusion_matrix.png", dpi=150)
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
            f"{folder} cannot be written: {error.strerror}. Choose another --results-dir"
        ) from error


def write_csv(path: Path, header: list[str], rows: Iterable) -> None:
    """A header and rows as a CSV file."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def new_figure(width: float, height: float) -> Figure:
    """A figure, in inches, without a window: pyplot, which would open one, has no part in it."""
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)  # without a canvas seaborn turns to pyplot
    return figure


def draw_matrix(matrix: np.ndarray, names: list[str]) -> Figure:
    """Confusion matrix, rows true, columns predicted, as shares of each row."""
    size = max(7, 0.2 * len(names))
    figure = new_figure(size, size)
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    axes = figure.subplots()
    sns.heatmap(
        shares,
        ax=axes,
        xticklabels=names,
        yticklabels=names,
        square=True,
        cbar=False,
        cmap="rocket_r",
    )
    axes.set(xlabel="predicted", ylabel="true")
    return figure


def open_window(path: Path) -> None:
    """Shows a picture until its window is closed; does nothing where there is no display."""
    try:
        figure = plt.figure(path.name, layout="constrained")
    except ImportError as error:  # MPLBACKEND or matplotlibrc name one that cannot work here
        return utils.say("note", f"no window: {error}")
    if plt.get_backend().lower() != "agg":  # matplotlib's choice where there is no display
        axes = figure.add_subplot()
        axes.imshow(plt.imread(path))
        axes.axis("off")
        plt.show()


if __name__ == "__main__":
    with utils.explained_exit(
        lambda: "run it again for results that belong together; no checkpoint was changed",
        "by the checkpoint's batch size, or by other programs on this GPU",
    ):
        main()
