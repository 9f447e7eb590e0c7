"""train.py as its user runs it: what it says and leaves; that a resumed run is the same run."""

import csv
import functools
import io
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import AUGMENTATION, TINY, Script, assert_same, link_run, load, run_script, settings
from torch import nn
from tqdm import tqdm

import data
import evaluate
import model as resnet
import train
import utils


def train_tiny(folder: Path, *flags: str, **options) -> Script:
    flags = [*TINY, "--checkpoint-dir", "demo", *flags]
    script = run_script("train.py", *flags, cwd=folder, **options)
    assert script.status == 0, script.stderr
    return script


def test_demo_says_what_it_does_in_lines_that_a_pipe_can_read(finished_run):
    out = next(finished_run.glob("*.out")).read_text()
    labels = [line.split()[0] for line in out.splitlines()]
    assert " ".join(labels) == "device data model settings epoch epoch finished best next"
    assert "digits: 40 training and 20 validation images, 10 classes" in out
    assert "11,444,298 parameters" in out
    figures = r"loss \d+\.\d{4}, accuracy \d+\.\d\d %"
    line = rf"epoch    1/2  lr 0.02  train {figures}  validation {figures}  [\d.]+ s  \d+ images/s"
    assert re.search(f"^{line}  best$", out, re.MULTILINE)
    line = r"best     epoch \d: validation accuracy [\d.]+ % .*demo/best.pt"
    assert re.search(f"^{line}$", out, re.MULTILINE)
    assert out.endswith("python evaluate.py --checkpoint demo/best.pt\n")
    assert "\r" not in out and next(finished_run.glob("*.err")).read_text() == ""

    line = re.search("^settings (.*)$", out, re.MULTILINE)[1]
    shown = dict(setting.split("=", 1) for setting in line.split())
    assert shown.keys() == vars(settings()).keys()
    assert (shown["batch_size"], shown["weights"], shown["flip"]) == ("20", "", "0.0")


def test_files_of_a_run_hold_its_constants_its_history_and_its_best_epoch(four_epochs):
    best, last = (load(four_epochs / "demo" / name) for name in ("best.pt", "last.pt"))
    assert best["constants"]["train_per_class"] == 4 and best["constants"]["image_size"] == 32
    assert best["dataset"] == "digits" and best["classes"] == list("0123456789")
    assert "conv1.weight" in best["model"] and "fc.3.bias" in best["model"]
    losses = [row["val_loss"] for row in last["history"]]
    assert best["epoch"] == losses.index(min(losses)) + 1
    assert best["history"] == last["history"][: best["epoch"]]
    with open(four_epochs / "demo" / "history.csv") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == last["history"] and [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_same_command_starts_a_run_and_continues_it_when_requeued(tmp_path):
    """In bfloat16 and with epochs of the head alone."""
    flags = ["--precision", "bf16", "--head-epochs", "2", "--resume-if-saved"]
    first = train_tiny(tmp_path, *flags, "--epochs", "1", "--curves")
    assert "epoch    1/1" in first.stdout and "resume " not in first.stdout
    assert ", bf16\n" in first.stdout
    assert load(tmp_path / "demo" / "best.pt")["precision"] == "bf16"
    assert (tmp_path / "demo" / "training_curves.png").exists()
    assert "head" not in (tmp_path / "demo" / "history.csv").read_text()
    again = train_tiny(tmp_path, *flags, "--epochs", "2")
    assert "resume   demo/last.pt, after epoch 1" in again.stdout and "epoch    2/2" in again.stdout
    assert not list((tmp_path / "demo").glob("earlier-*"))


def test_curves_are_redrawn_after_ten_seconds_and_never_fail_a_run(
    finished_run, tmp_path, monkeypatch, capsys
):
    path, history = tmp_path / "training_curves.png", load(finished_run / "demo/last.pt")["history"]
    path.write_text("earlier")
    for age, drawn in ((0, False), (11, True)):
        os.utime(path, (time.time() - age,) * 2)
        utils.draw_progress(tmp_path, history, "loss")
        assert (path.read_bytes() != b"earlier") == drawn
    monkeypatch.setattr(utils, "draw_curves", None)
    utils.draw_progress(tmp_path, history, "loss", at_once=True)
    assert capsys.readouterr().out.startswith(f"note     {path} could not be written: ")


def test_new_run_moves_the_earlier_one_aside_and_differs_with_another_seed(finished_run, tmp_path):
    link_run(finished_run, tmp_path)
    script = train_tiny(tmp_path, "--epochs", "1", "--seed", "5")
    (aside,) = (tmp_path / "demo").glob("earlier-*")
    assert f"the run that was in demo is now in {aside.relative_to(tmp_path)}" in script.stdout
    for name in ("last.pt", "best.pt", "history.csv"):
        assert (aside / name).samefile(finished_run / "demo" / name)
    one, other = (load(folder / "demo" / "best.pt") for folder in (finished_run, tmp_path))
    assert one["epoch"] == other["epoch"] == 1 and other["constants"]["seed"] == 5
    for name in ("conv1.weight", "fc.3.weight"):
        assert not torch.equal(one["model"][name], other["model"][name])


def test_run_resumed_after_early_stopping_equals_the_unbroken_one(
    four_epochs, finished_run, tmp_path
):
    """Each epoch is worse than the first: the third makes two in a row that are."""
    link_run(finished_run, tmp_path)
    # The scheduler's counter is under way where the run is cut, so that forgetting it would show.
    assert load(tmp_path / "demo" / "last.pt")["scheduler"]["num_bad_epochs"] == 1
    flags = ["--epochs", "9", "--early-stopping-patience", "2", "--resume"]
    script = train_tiny(tmp_path, *flags)
    assert "resume   demo/last.pt, after epoch 2" in script.stdout
    assert script.stdout.count("\nepoch ") == 1 and "\nepoch    3/9  lr 0.02 " in script.stdout
    assert "stopped  no better validation loss in 2 epochs" in script.stdout
    again = train_tiny(tmp_path, *flags)
    assert "stopped  no better" in again.stdout and "\nepoch " not in again.stdout
    more = train_tiny(tmp_path, "--epochs", "4", "--resume")  # with the usual patience
    assert "\nepoch    4/4  lr 0.02 " in more.stdout
    resumed, unbroken = (load(folder / "demo" / "last.pt") for folder in (tmp_path, four_epochs))
    assert resumed["epoch"] == 4
    assert_same(resumed, unbroken)


@pytest.fixture
def older_state(finished_run) -> dict:
    """The last.pt of a finished run from before train.py had some constants."""
    state = load(finished_run / "demo" / "last.pt")
    younger = "mixup label_smoothing ema_decay head_epochs schedule dataset stored_size"
    for name in [*younger.split(), "val_batch_size"]:
        del state["constants"][name]
    return state


def test_older_checkpoint_of_a_finished_run_is_not_trained_on_but_evaluated(
    older_state, tmp_path, capsys
):
    (tmp_path / "demo").mkdir()
    last, picture = tmp_path / "demo" / "last.pt", tmp_path / "black.png"
    utils.save_checkpoint(last, older_state)
    saved = last.stat()
    script = train_tiny(tmp_path, "--epochs", "2", "--resume")
    assert "resume   demo/last.pt, after epoch 2" in script.stdout
    assert "finished all 2 epochs" in script.stdout and "epoch    3/" not in script.stdout
    assert last.stat().st_ino == saved.st_ino and last.stat().st_mtime_ns == saved.st_mtime_ns

    Image.new("RGB", (32, 32)).save(picture)
    flags = ["--results-dir", str(tmp_path), "--images", str(picture)]
    evaluate.main(["--checkpoint", str(last), *flags])
    assert f"{last}, epoch 2" in capsys.readouterr().out


REFUSED = [
    ("--learning-rate", "0.5", "LEARNING_RATE = 0.02", "0.5"),
    ("--seed", "3", "SEED = 0", "3"),
    ("--weights", "x.pth", "WEIGHTS = ''", "'x.pth'"),
    ("--architecture", "resnet50", "ARCHITECTURE = 'resnet18'", "'resnet50'"),
    ("--watch", "accuracy", "WATCH = 'loss'", "'accuracy'"),
    ("--mixup", "0.2", "MIXUP = 0.0", "0.2"),  # younger than the checkpoint, as is SCHEDULE
    ("--schedule", "cosine", "SCHEDULE = 'plateau'", "'cosine'"),
]


def test_resume_refuses_other_constants_by_name(older_state, tmp_path):
    utils.save_checkpoint(tmp_path / "last.pt", older_state | {"model": {}, "optimizer": {}})
    flags = [*TINY, "--epochs", "2", "--resume", "--checkpoint-dir", str(tmp_path)]
    for flag, value, stored, now in REFUSED:
        with pytest.raises(utils.UserError, match=f"trained with {stored}, now it is {now}.\n"):
            train.main([*flags, flag, value])


def test_scheduler_counts_an_epoch_as_better_exactly_when_early_stopping_does():
    args, history = settings(scheduler_patience=99), []
    run = train.make_run(args, nn.Linear(2, 2), "fp32")
    run.scheduler.patience = 0  # as of a run that is continued with more
    for epoch, loss in enumerate([2.0, 1.9999999, 1.9999999, 2.5, 1.9, 3, 3, 3, 3], start=1):
        history.append({"epoch": epoch, "val_loss": loss, "learning_rate": 0.01})
        train.finish_epoch(run, history, args)
        best = utils.best_epoch(history, "loss")
        assert run.scheduler.num_bad_epochs == epoch - best["epoch"]
        assert run.scheduler.best == best["val_loss"]


def test_step_that_fp16_skips_leaves_the_momentum_alone():
    """An overflow at first, then a gradient of 1: one plain SGD step of lr 0.01 from 1."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    run = train.make_run(settings(weight_decay=0), layer, "fp16")
    for factor in (float("inf"), 1.0):
        run.optimizer.zero_grad()
        run.scaler.scale(layer.weight.sum() * factor).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
    assert layer.weight.item() == pytest.approx(1 - 0.01) and run.skipped.item() == 1


@pytest.mark.parametrize("skipped", [8, 9])
def test_steps_that_fp16_skips_are_told_beyond_the_first_few(skipped, capsys):
    layer = nn.Linear(1, 1, bias=False)
    run = train.make_run(settings(), layer, "fp16")
    for step in range(12):
        run.optimizer.zero_grad()
        run.scaler.scale(layer.weight.sum() * (float("inf") if step < skipped else 1)).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
    train.tell_skipped_steps(run, 12)
    told = "note     fp16 skipped 9 of 12 steps because gradients overflowed; if the loss stays high, try"
    assert (told in capsys.readouterr().out) == (skipped == 9)
    assert run.skipped.item() == 0  # the next epoch counts from zero


def test_progress_bar_advances_with_each_step_without_reading_from_the_device(monkeypatch):
    """20 steps, of which each fifth reads the loss; the last figures are read by tolist()."""
    events, update, item, terminal = [], tqdm.update, torch.Tensor.item, io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(tqdm, "update", lambda bar, n: events.append(n) or update(bar, n))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: events.append("read") or item(tensor))
    args = settings(batch_size=4, log_every=5, compile=False)
    loader = data.TrainLoader(data.read_digits("train")[0].select(slice(80)), args)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    run = train.make_run(args, network, "fp32")
    run.optimizer.param_groups[0]["lr"] = 0.005  # as it dropped from 0.01
    figures = train.train_one_epoch(run, loader, 1, args)
    assert events == [4, 4, 4, 4, 4, "read"] * 4
    assert "epoch 1: 100%" in terminal.getvalue() and "loss=" in terminal.getvalue()
    assert figures["learning_rate"] == run.optimizer.param_groups[0]["lr"] == 0.005


@pytest.mark.slow
def test_compiled_step_is_compiled_once_and_computes_the_same():
    """Three epochs of one step, each validated; the first loss precedes any update."""
    from torch._dynamo.utils import counters

    losses = []
    digits, test = (data.read_digits(part)[0] for part in ("train", "test"))
    for compile_it in (False, True):
        args = settings(batch_size=16, log_every=1, compile=compile_it, **AUGMENTATION)
        loader = data.TrainLoader(digits.select(slice(16)), args)
        val_loader = data.EvalLoader(test.images[:20], 16, 32)
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
        network = nn.Sequential(*layers, nn.Linear(8 * 30 * 30, 10))
        run, graphs = train.make_run(args, network, "fp32"), []
        run.network = resnet.wrap_network(network, compile_it)
        counters.clear()
        for epoch in (1, 2, 3):
            losses.append(train.train_one_epoch(run, loader, epoch, args)["train_loss"])
            train.validate(run, val_loader, test.labels[:20])
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3
    assert losses[3] == pytest.approx(losses[0], rel=0.001)


@pytest.mark.slow
def test_fp16_trains_too(tmp_path):
    train_tiny(tmp_path, *["--precision", "fp16", "--epochs", "1", "--train-per-class", "2"])
    assert load(tmp_path / "demo" / "best.pt")["precision"] == "fp16"


def no_compiler(cache: Path) -> None:
    os.environ |= {"PATH": "", "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(cache)}


@pytest.mark.slow
def test_run_without_a_compiler_warns_in_one_line_and_goes_on(tmp_path):
    prepare = functools.partial(no_compiler, tmp_path / "cache")
    script = train_tiny(tmp_path, "--epochs", "1", "--compile", prepare=prepare)
    warnings = [line for line in script.stdout.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "torch.compile does not work here" in warnings[0]
    assert "epoch    1/1" in script.stdout
