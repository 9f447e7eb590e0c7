"""evaluate.py: its numbers by hand or by other sources, its pictures, and the script end to end."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import data
import evaluate
import train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A network trained on 50 digits for one epoch: poor, but real."""
    folder = tmp_path_factory.mktemp("digits")
    train.main(
        ["--demo", "--epochs", "1", "--train-per-class", "5", "--checkpoint-dir", str(folder)]
    )
    return folder / "best.pt"


@pytest.fixture(scope="session")
def results(checkpoint, tmp_path_factory):
    """The results folder of that network's evaluation."""
    folder = tmp_path_factory.mktemp("results")
    evaluate.main(["--checkpoint", str(checkpoint), "--results-dir", str(folder)])
    return folder


def run_script(*arguments):
    """python evaluate.py as a user runs it, in a process of its own."""
    command = [sys.executable, "evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_numbers_are_those_of_the_training_log(checkpoint, results):
    metrics = json.loads((results / "metrics.json").read_text())
    epoch = list(csv.DictReader(open(checkpoint.parent / "history.csv")))[0]
    assert metrics["loss"] == float(epoch["val_loss"])
    assert metrics["top1_accuracy"] == float(epoch["val_accuracy"])
    assert metrics["images"] == 360
    assert metrics["test_images_chose_checkpoint"] is True


def test_predictions_recompute_top1_with_the_official_labels(results):
    rows = read_csv(results / "predictions.csv")[1:]
    official = data.read_digits()[1].labels.tolist()
    assert [int(index) for index, *_ in rows] == list(range(360))
    assert [int(label) for _, label, *_ in rows] == official
    hits = sum(int(predicted) == label for (_, _, predicted, _), label in zip(rows, official))
    assert hits / 360 == json.loads((results / "metrics.json").read_text())["top1_accuracy"]


def test_missing_checkpoint_is_one_message(tmp_path):
    run = run_script("--checkpoint", tmp_path / "none.pt", "--results-dir", tmp_path / "results")
    assert run.returncode == 1
    assert run.stderr == f"{tmp_path / 'none.pt'} not found. Train one with: python train.py\n"
    assert not (tmp_path / "results").exists()
