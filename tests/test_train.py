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
from matplotlib.image import imread
from PIL import Image
from scripts import AUGMENTATION, TINY, Script, link_run, run_script, settings
from tqdm import tqdm

import data
import evaluate
import model
import train
import utils

TIMES = ("seconds", "images_per_second")


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def train_tiny(folder: Path, *flags: str):
    return run_script("train.py", *TINY, "--checkpoint-dir", "demo", *flags, cwd=folder)


def assert_same(ours, theirs) -> None:
    """Bit for bit the same, all the way down, but for times and for what was asked of each run."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {*TIMES, "constants"}:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_same(one, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def test_demo_says_what_it_does_in_lines_that_a_pipe_can_read(finished_run):
    out = next(finished_run.glob("*.out")).read_text()
    labels = [line.split()[0] for line in out.splitlines()]
    assert labels == [
        *(
            "device",
            "data",
            "model",
            "settings",
            "epoch",
            "epoch",
            "finished",
            "best",
            "next",
        )
    ]
    assert "digits: 40 training and 20 validation images, 10 classes" in out
    assert "24,562,250 parameters" in out  # with 10 classes: 90 rows of 513 numbers fewer
    figures = r"loss \d+\.\d{4}, accuracy \d+\.\d\d %"
    line = rf"epoch    1/2  lr 0.02  train {figures}  validation {figures}  [\d.]+ s  \d+ images/s"
    assert re.search(f"^{line}  best$", out, re.MULTILINE)
    assert re.search(
        r"^best +epoch \d: validation accuracy [\d.]+ % .*demo/best.pt$", out, re.MULTILINE
    )
    assert out.endswith("python evaluate.py --checkpoint demo/best.pt\n")
    assert "\r" not in out and next(finished_run.glob("*.err")).read_text() == ""


def break_curves() -> None:
    utils.draw_curves = None


def test_curves_are_drawn_as_the_run_goes_on_and_never_fail_it(tmp_path):
    flags = [*TINY, "--curves", "--epochs", "1", "--head-epochs", "2", "--checkpoint-dir"]
    assert run_script("train.py", *flags, "drawn", cwd=tmp_path).status == 0
    assert imread(tmp_path / "drawn/training_curves.png").shape[2] == 4
    assert "head" not in (tmp_path / "drawn/history.csv").read_text()
    script = run_script("train.py", *flags, "not", cwd=tmp_path, prepare=break_curves)
    assert script.status == 0 and "note     not/training_curves.png is not drawn: " in script.stdout


def test_curves_are_redrawn_after_ten_seconds(finished_run, tmp_path):
    path, history = tmp_path / "training_curves.png", load(finished_run / "demo/last.pt")["history"]
    path.write_text("earlier")
    for age, drawn in ((0, False), (11, True)):
        os.utime(path, (time.time() - age,) * 2)
        utils.draw_progress(tmp_path, history, "loss")
        assert (path.read_bytes() != b"earlier") == drawn


def test_history_csv_holds_what_the_checkpoint_holds(finished_run):
    with open(finished_run / "demo" / "history.csv") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == load(finished_run / "demo" / "last.pt")["history"]
    assert [row["epoch"] for row in rows] == [1, 2]


def test_best_checkpoint_is_the_epoch_with_the_best_watched_figure(four_epochs):
    best, last = (load(four_epochs / "demo" / name) for name in ("best.pt", "last.pt"))
    losses = [row["val_loss"] for row in last["history"]]
    assert best["epoch"] == losses.index(min(losses)) + 1
    assert best["history"] == last["history"][: best["epoch"]]
    assert last["epoch"] == 4


def test_checkpoint_holds_the_constants_with_overrides_and_bare_keys(finished_run):
    best = load(finished_run / "demo" / "best.pt")
    assert best["constants"]["train_per_class"] == 4 and best["constants"]["image_size"] == 32
    assert best["dataset"] == "digits" and best["classes"] == list("0123456789")
    assert "conv1.weight" in best["model"] and "fc.3.bias" in best["model"]


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(four_epochs, finished_run, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "last.pt").hardlink_to(finished_run / "demo" / "last.pt")
    broken_off = load(tmp_path / "demo" / "last.pt")
    # The scheduler's counter is under way where the run is cut, so that forgetting it would show.
    first, second = (row["val_loss"] for row in broken_off["history"])
    assert first < second and broken_off["scheduler"]["num_bad_epochs"] == 1
    script = train_tiny(tmp_path, "--epochs", "4", "--resume")
    assert script.status == 0, script.stderr
    assert "resume   demo/last.pt, after epoch 2" in script.stdout
    unbroken, resumed = (load(f / "demo" / "last.pt") for f in (four_epochs, tmp_path))
    assert resumed["epoch"] == 4
    assert_same(resumed, unbroken)


@pytest.fixture(scope="module")
def new_run(finished_run, tmp_path_factory):
    """One epoch with another seed, in the folder of an earlier run."""
    folder = tmp_path_factory.mktemp("new")
    link_run(finished_run, folder)
    script = train_tiny(folder, "--epochs", "1", "--seed", "5")
    assert script.status == 0, script.stderr
    return script, folder


def test_same_command_starts_a_run_and_continues_it_when_requeued(tmp_path):
    flags = ["--epochs", "1", "--resume-if-saved"]
    first = train_tiny(tmp_path, *flags)
    assert "epoch    1/1" in first.stdout and "resume " not in first.stdout
    again = train_tiny(tmp_path, *flags, "--epochs", "2")
    assert "resume   demo/last.pt, after epoch 1" in again.stdout and "epoch    2/2" in again.stdout
    assert not list((tmp_path / "demo").glob("earlier-*"))


def test_settings_are_all_on_one_line(finished_run):
    out = next(finished_run.glob("*.out")).read_text()
    line = next(line for line in out.splitlines() if line.startswith("settings"))
    found = dict(setting.split("=", 1) for setting in line.split()[1:])
    assert found["batch_size"] == "20" and found["weights"] == "" and found["flip"] == "0.0"
    assert found.keys() == vars(settings()).keys()


def test_two_runs_with_one_seed_are_identical_and_with_another_are_not(
    four_epochs, finished_run, new_run
):
    histories = [load(f / "demo" / "last.pt")["history"] for f in (finished_run, four_epochs)]
    assert_same(histories[0], histories[1][:2])
    one, other = (load(f / "demo" / "best.pt") for f in (finished_run, new_run[1]))
    assert one["epoch"] == other["epoch"] == 1
    for name in ("conv1.weight", "fc.3.weight"):
        assert not torch.equal(one["model"][name], other["model"][name])


def test_new_run_moves_the_earlier_one_aside(finished_run, new_run):
    script, folder = new_run
    (aside,) = (folder / "demo").glob("earlier-*")
    assert f"the run that was in demo is now in {aside.relative_to(folder)}" in script.stdout
    for name in ("last.pt", "best.pt", "history.csv"):
        assert (aside / name).samefile(finished_run / "demo" / name)
    assert load(folder / "demo" / "last.pt")["constants"]["seed"] == 5


def test_finished_run_says_so_and_does_not_train_on(finished_run, tmp_path):
    link_run(finished_run, tmp_path)
    script = train_tiny(tmp_path, "--epochs", "2", "--resume")
    assert script.status == 0 and "finished all 2 epochs" in script.stdout
    assert "epoch    3/" not in script.stdout
    assert (tmp_path / "demo" / "last.pt").samefile(finished_run / "demo" / "last.pt")


def test_run_that_stopped_early_says_so_and_goes_on_only_with_more_patience(finished_run, tmp_path):
    """Each epoch is worse than the first: the third makes two in a row that are."""
    link_run(finished_run, tmp_path)
    flags = ["--resume", "--scheduler-patience", "0", "--early-stopping-patience", "2"]
    script = train_tiny(tmp_path, *flags, "--epochs", "9")
    assert script.stdout.count("\nepoch ") == 1 and "\nepoch    3/9  lr 0.02 " in script.stdout
    assert "stopped  no better validation loss in 2 epochs" in script.stdout
    again = train_tiny(tmp_path, *flags, "--epochs", "9")
    assert "stopped  no better" in again.stdout and "\nepoch " not in again.stdout
    more = train_tiny(tmp_path, *flags, "--epochs", "4", "--early-stopping-patience", "9")
    assert "\nepoch    4/4  lr 0.002 " in more.stdout  # 0.02 * 0.1: it dropped after the third
    rates = [row["learning_rate"] for row in load(tmp_path / "demo" / "last.pt")["history"]]
    assert rates == pytest.approx([0.02, 0.02, 0.02, 0.002])


@pytest.mark.parametrize(
    ("flag", "value", "stored", "now"),
    [
        ("--learning-rate", "0.5", "LEARNING_RATE = 0.02", "0.5"),
        ("--seed", "3", "SEED = 0", "3"),
        ("--weights", "x.pth", "WEIGHTS = ''", "'x.pth'"),
        ("--architecture", "resnet18", "ARCHITECTURE = 'resnet50'", "'resnet18'"),
        ("--watch", "accuracy", "WATCH = 'loss'", "'accuracy'"),
    ],
)
def test_resume_refuses_other_constants_by_name(finished_run, flag, value, stored, now):
    with pytest.raises(utils.UserError, match=f"{stored}, now it is {now}"):
        train.main([*TINY, "--resume", "--checkpoint-dir", str(finished_run / "demo"), flag, value])


@pytest.fixture
def older_run(finished_run, tmp_path):
    """A finished run of two epochs from before train.py had these constants."""
    state = load(finished_run / "demo" / "last.pt")
    for name in (
        "mixup",
        "label_smoothing",
        "ema_decay",
        "head_epochs",
        "schedule",
        "dataset",
        "stored_size",
        "architecture",
        "val_batch_size",
    ):
        del state["constants"][name]
    (tmp_path / "demo").mkdir()
    utils.save_checkpoint(tmp_path / "demo" / "last.pt", state)
    return tmp_path / "demo"


def test_older_checkpoint_is_resumed_with_the_default_of_a_younger_constant(older_run):
    script = train_tiny(older_run.parent, "--epochs", "2", "--resume")
    assert script.status == 0, script.stderr
    assert "resume   demo/last.pt, after epoch 2" in script.stdout
    for flag, value, stored in ("--mixup", "0.2", "0.0"), ("--schedule", "cosine", "'plateau'"):
        flags = ["--epochs", "2", "--resume", "--checkpoint-dir", str(older_run), flag, value]
        with pytest.raises(utils.UserError, match=f"{flag[2:].upper()} = {stored}, now it is"):
            train.main([*TINY, *flags])


def test_older_checkpoint_is_evaluated(older_run, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    flags = [
        "--checkpoint",
        str(older_run / "last.pt"),
        "--results-dir",
        str(tmp_path),
        "--no-show",
    ]
    evaluate.main([*flags, "--images", str(tmp_path / "black.png")])
    assert f"{older_run / 'last.pt'}, epoch 2" in capsys.readouterr().out


def test_scheduler_counts_an_epoch_as_better_exactly_when_early_stopping_does():
    args, history = settings(), []
    run = train.make_run(args, torch.nn.Linear(2, 2), "fp32")
    for epoch, loss in enumerate([2.0, 1.9999999, 1.9999999, 2.5, 1.9, 3, 3], start=1):
        history.append({"epoch": epoch, "val_loss": loss})
        run.scheduler.patience = 99
        run.scheduler.step(loss)
        best = utils.best_epoch(history, "loss")
        assert run.scheduler.num_bad_epochs == epoch - best["epoch"]
        assert run.scheduler.best == best["val_loss"]


def test_step_that_fp16_skips_leaves_the_momentum_alone():
    """An overflow at first, then a gradient of 1: one plain SGD step of lr 0.01 from 1."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    run = train.make_run(settings(weight_decay=0), layer, "fp16")
    for factor in (float("inf"), 1.0):
        run.optimizer.zero_grad()
        run.scaler.scale(layer.weight.sum() * factor).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
    assert layer.weight.item() == pytest.approx(1 - 0.01)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_advances_with_each_step_without_reading_from_the_device(monkeypatch):
    """20 steps, of which each fifth reads the loss; the last figures are read by tolist()."""
    events, update, item = [], tqdm.update, torch.Tensor.item
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(tqdm, "update", lambda bar, n: events.append(n) or update(bar, n))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: events.append("read") or item(tensor))
    args = settings(batch_size=4, log_every=5, compile=False)
    loader = data.TrainLoader(data.read_digits("train")[0].select(slice(80)), args)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    train.train_one_epoch(train.make_run(args, network, "fp32"), loader, 1, args)
    assert events == [4, 4, 4, 4, 4, "read"] * 4
    assert "epoch 1: 100%" in sys.stderr.getvalue() and "loss=" in sys.stderr.getvalue()


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_lower_precision_trains_too(precision, tmp_path):
    script = train_tiny(tmp_path, "--epochs", "1", "--precision", precision)
    assert script.status == 0, script.stderr
    assert f", {precision}\n" in script.stdout
    assert load(tmp_path / "demo" / "best.pt")["precision"] == precision


def test_cifar100_trains_from_real_weights_on_the_real_images(
    cifar100_dir, imagenet_weights, tmp_path
):
    script = run_script(
        *["train.py", "--data-dir", cifar100_dir, "--weights", imagenet_weights, "--epochs", "1"],
        *["--image-size", "32", "--train-per-class", "1", "--holdout-per-class", "1"],
        *["--batch-size", "50", "--learning-rate", "0.001", "--precision", "fp32"],
        cwd=tmp_path,
    )
    assert script.status == 0, script.stderr
    assert "cifar100: 100 training and 100 validation images, 100 classes" in script.stdout
    assert "best.pt is selected on the test images" not in script.stdout
    assert script.stdout.endswith(f"next     python evaluate.py --data-dir {cifar100_dir}\n")


def best_accuracy(folder: Path, *flags: str) -> float:
    """Validation accuracy in per cent of the best epoch, as train.py prints it at the end."""
    both_cores = functools.partial(torch.set_num_threads, 2)
    script = Script("train.py", *flags, cwd=folder, prepare=both_cores)
    assert script.wait(900) == 0, script.stderr
    return float(re.search(r"^best .* accuracy ([\d.]+) %", script.stdout, re.MULTILINE)[1])


@pytest.mark.slow
def test_demo_learns_to_read_digits(tmp_path):
    assert best_accuracy(tmp_path, "--demo") >= 90


@pytest.mark.slow
def test_pretrained_features_are_as_good_as_only_right_preprocessing_makes_them(
    cifar100_dir, imagenet_weights, tmp_path
):
    """39.6 % here; 24.6 if images are not normalized, 34.3 by mean and deviation swapped, 34.3 with
    blue before red, 34.5 if every other pixel is left out, 15.7 padded in place of resized.
    """
    flags = f"--data-dir {cifar100_dir} --weights {imagenet_weights} --epochs 0 --head-epochs 10"
    flags += " --image-size 64 --train-per-class 20 --holdout-per-class 20 --precision fp32"
    assert best_accuracy(tmp_path, *flags.split()) >= 37


@pytest.mark.slow
def test_compiled_step_is_compiled_once_and_computes_the_same():
    """Three epochs of one step, each validated; the first loss precedes any update."""
    from torch._dynamo.utils import counters

    figures = {}
    digits, test = (data.read_digits(part)[0] for part in ("train", "test"))
    for compile_it in (False, True):
        args = settings(batch_size=16, log_every=1, compile=compile_it, **AUGMENTATION)
        loader = data.TrainLoader(digits.select(slice(16)), args)
        val_loader = data.EvalLoader(test.images[:20], 16, 32)
        torch.manual_seed(0)
        network = model.build_model("resnet50", 10).to(memory_format=torch.channels_last)
        network.fc[2].p = 0.0  # compiled, dropout draws other numbers
        run, graphs = train.make_run(args, network, "fp32"), []
        for epoch in range(3):
            figures[compile_it, epoch] = train.train_one_epoch(run, loader, epoch + 1, args)
            train.validate(run, val_loader, test.labels[:20])
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3
    assert figures[True, 0]["train_loss"] == pytest.approx(
        figures[False, 0]["train_loss"], rel=0.001
    )


def no_compiler(cache: Path) -> None:
    os.environ |= {"PATH": "", "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(cache)}


@pytest.mark.slow
def test_run_without_a_compiler_warns_in_one_line_and_goes_on(tmp_path):
    prepare = functools.partial(no_compiler, tmp_path / "cache")
    flags = [*TINY, "--epochs", "1", "--compile"]
    script = run_script("train.py", *flags, cwd=tmp_path, prepare=prepare)
    assert script.status == 0, script.stderr
    warnings = [line for line in script.stdout.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "torch.compile does not work here" in warnings[0]
    assert "epoch    1/1" in script.stdout
