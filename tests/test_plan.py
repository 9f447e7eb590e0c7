"""--minutes: what is chosen, that it ends in time, and that its command repeats the run."""

import os
import shlex
import signal
import time
from argparse import Namespace

import pytest
import torch
import torchvision
from fake_gpu import in_its_own_process, run_on_fake_gpu
from scripts import TORCHRUN, Script, load, run_script, settings, start_process

import train
import utils

LADDER = {
    "all": (160, 10, (2, 4), 0, 0.005, 1),
    "most": (128, 8, (1, 1), 2, 0.01, 0.5),
    "head": (96, 5, (0, 0), 4, 0.01, 0.1),
}


def cost(settings: dict, roughly: bool = False) -> float:
    """A pixel's side is a second per image and epoch; the network's epochs cost ten of the head's.

    Roughly they cost five.
    """
    images = settings["TRAIN_PER_CLASS"] or 100
    epochs = settings["HEAD_EPOCHS"] + settings["EPOCHS"] * (5 if roughly else 10)
    return images * settings["IMAGE_SIZE"] * epochs


@pytest.mark.parametrize(
    ("left", "chosen"),
    [
        (160 * 100 * 50, (160, 4, 0)),  # the most epochs: 10 + 4 * 10
        (160 * 100 * 49, (160, 3, 0)),
        (160 * 100 * 30, (160, 2, 0)),
        (160 * 100 * 30 - 1, (128, 1, 0)),  # all images: 128 * 100 * 18 is less
        (128 * 77 * 18, (128, 1, 77)),  # the most images
        (128 * 50 * 18, (128, 1, 50)),  # the least share of them
        (128 * 50 * 18 - 1, (96, 0, 0)),
        (96 * 10 * 5, (96, 0, 10)),
    ],
)
def test_first_rung_that_fits_is_chosen_with_the_most_epochs_or_images(left, chosen, monkeypatch):
    monkeypatch.setattr(train, "LADDER", LADDER)
    found, seconds = train.choose_rung(cost, lambda: left, 100)
    assert (found["IMAGE_SIZE"], found["EPOCHS"], found["TRAIN_PER_CLASS"]) == chosen
    assert found["SCHEDULE"] == "cosine" and seconds == cost(found) <= left
    assert found["FREEZE_BATCH_NORM"] == (found["FREEZE_STAGES"] > 0)


def test_no_rung_fits_and_the_least_cost_is_known(monkeypatch):
    monkeypatch.setattr(train, "LADDER", LADDER)
    assert train.choose_rung(cost, lambda: 96 * 10 * 5 - 1, 100) == ({}, 96 * 10 * 5)


@pytest.mark.parametrize(
    ("images", "size", "weights", "told"),
    [
        (840, 224, "IMAGENET1K_V2", True),  # 60 epochs of them are 50,400 images
        (830, 224, "IMAGENET1K_V2", False),
        (3400, 112, "IMAGENET1K_V2", True),  # a quarter of the pixels
        (3300, 112, "IMAGENET1K_V2", False),
        (840, 224, "", False),
    ],
)
def test_long_run_without_a_gpu_is_told_of_minutes(images, size, weights, told, capsys):
    train.advise_minutes(settings(image_size=size, weights=weights), images)
    assert ("--minutes 60" in capsys.readouterr().out) == told


def test_steps_that_cannot_fit_are_not_measured(monkeypatch):
    """At half their cost, 2 epochs of 160 px need 160 * 100 * 20 seconds."""
    monkeypatch.setattr(train, "LADDER", LADDER)
    measured = []

    def watched_cost(settings: dict, roughly: bool = False) -> float:
        measured.extend([] if roughly else [settings["IMAGE_SIZE"]])
        return cost(settings, roughly)

    train.choose_rung(watched_cost, lambda: 160 * 100 * 20 - 1, 100)
    assert set(measured) == {128}


def test_expected_seconds_are_those_worked_out_by_hand():
    watch = Namespace(step=lambda args: 3, head=lambda args: 0.125)
    watch.forward = lambda args, roughly: 1
    watch.save = lambda args: 2
    args = settings(epochs=2, head_epochs=4, train_per_class=6)
    seconds = train.expect(args, watch, counts=[10, 4], val_images=5)
    parts = {"start": 2, "features": 10, "head": 0.125 * 10 * 4, "epoch": 30, "save": 2 + 5}
    assert seconds == parts
    assert train.sum_up(seconds, args) == 2 + 10 + 5 + 2 * 30 + 3 * 7
    args.head_epochs = args.train_per_class = 0
    seconds = train.expect(args, watch, counts=[10, 4], val_images=5, roughly=True)
    assert seconds == {"start": 2, "features": 0, "head": 0, "epoch": 2 * 14, "save": 7}


@pytest.mark.parametrize(
    ("done", "left", "end"),
    [
        (0.0, 4 * 111, 4),  # four epochs of 100 seconds, and at most 11 to save each
        (0.0, 10_000, 4),  # never more than planned
        (0.0, 4 * 111 - 50, 3.5),  # half an epoch less
        (0.0, 3 * 111 + 10, 3),  # too little to save a fourth
        (2.5, 50 + 11 + 25 + 11, 3.25),
        (2.5, 20 + 11, 2.7),
        (2.5, 11, 2.5),  # at once
        (0.0, 5, 0),
    ],
)
def test_run_ends_earlier_only_as_far_as_the_time_left_is_too_short(done, left, end, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 1000)
    seconds = {"features_seconds": 0, "head_seconds": 0, "epoch_seconds": 70, "save_seconds": 7}
    budget = train.Budget(1000 + left, **seconds, epochs=4)
    run, args = Namespace(end=4, budget=budget), Namespace(epochs=4)
    train.end_in_time(run, args, done, epoch_seconds=100, save_seconds=10)
    assert run.end == pytest.approx(end) and args.epochs == -(-end // 1)


@pytest.mark.parametrize(
    ("end", "done", "save_seconds", "expected"),
    [
        (2, 0.5, 0, 4),
        (2, 1.5, 0, 2),  # the rate is low already
        (2, 1, 10, 4),
        (2, 2, 10, 4),
        (1.5, 2, 10, 1.5),  # its second epoch was cut short
    ],
)
def test_end_moves_back_to_the_plan_while_the_rate_is_high_or_after_a_whole_epoch(
    end, done, save_seconds, expected
):
    seconds = {"features_seconds": 0, "head_seconds": 0, "epoch_seconds": 100, "save_seconds": 10}
    budget = train.Budget(time.perf_counter() + 10_000, **seconds, epochs=4)
    run, args = Namespace(end=end, budget=budget), Namespace(epochs=2)
    train.end_in_time(run, args, done, epoch_seconds=100, save_seconds=save_seconds)
    assert (run.end, args.epochs) == (expected, -(-expected // 1))


def test_cosine_reaches_zero_where_the_run_ends():
    args = settings(schedule="cosine", epochs=4, warmup_epochs=0.5, learning_rate=0.8)
    run = Namespace(end=2.5)
    rates = [train.learning_rate_at(run, args, done) for done in (0.25, 0.5, 1.5, 2.5, 2.6)]
    assert rates == pytest.approx([0.4, 0.8, 0.4, 0, 0])


# ---- whole runs: 40 digits, a small network with random weights for pretrained ones ---------------

DIGITS = "--dataset digits --architecture resnet18 --weights ../weights.pth --image-size 32"
DIGITS += " --precision fp32 --train-per-class 4 --holdout-per-class 2"
RUN = [*DIGITS.split(), "--minutes", "1", "--head-epochs", "2", "--log-every", "1", "--no-curves"]


@pytest.fixture
def folder(tmp_path):
    """A folder beside the weights."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def same_weights(one, other) -> bool:
    return all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def planned(script) -> list[str]:
    """The flags of the command that it says repeats the run."""
    line = next(line for line in script.stdout.splitlines() if line.startswith("repeat "))
    assert line.startswith("repeat   python train.py ")
    return shlex.split(line)[3:]


@pytest.mark.slow
def test_printed_command_repeats_the_run_and_resume_follows_the_plan(folder, tmp_path):
    run = run_script("train.py", *RUN, "--epochs", "2", cwd=folder)
    assert run.status == 0, run.stderr
    assert (
        "plan     32 px, 4 images per class, 2 epochs of the head, 2 of the network" in run.stdout
    )
    expected = load(folder / "checkpoints" / "last.pt")
    constants = expected["constants"]
    assert (constants["schedule"], constants["batch_size"]) == ("cosine", 64)

    (tmp_path / "again").mkdir()
    again = run_script("train.py", *planned(run), "--log-every", "1", cwd=tmp_path / "again")
    assert again.status == 0 and "plan " not in again.stdout, again.stderr
    assert same_weights(load(tmp_path / "again" / "checkpoints" / "last.pt"), expected)

    (tmp_path / "broken").mkdir()
    broken = Script("train.py", *RUN, "--epochs", "2", cwd=tmp_path / "broken")
    broken.wait_for("epoch    1/2")
    broken.send(signal.SIGKILL)
    broken.wait()
    for flags in ([*RUN, "--epochs", "2"], planned(broken)):
        more = run_script("train.py", *flags, "--resume", cwd=tmp_path / "broken")
        assert more.status == 0 and "plan " not in more.stdout, more.stderr
        assert same_weights(load(tmp_path / "broken" / "checkpoints" / "last.pt"), expected)


def test_run_on_a_machine_that_becomes_slower_ends_in_time_with_its_whole_schedule(
    folder, monkeypatch, capsys
):
    """By a clock of which a reading takes 0.05 seconds, and a step after the plan 0.5 more."""
    now, make_plan, train_step = [0.0], train.make_plan, train.train_step

    def tick(seconds: float = 0.05) -> float:
        now[0] += seconds
        return now[0]

    def slow_step(*args):
        tick(0.5)
        return train_step(*args)

    def plan(*args):
        planned = make_plan(*args)
        monkeypatch.setattr(train, "train_step", slow_step)
        return planned

    monkeypatch.chdir(folder)
    monkeypatch.setattr(time, "perf_counter", tick)
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    monkeypatch.setattr(train, "make_plan", plan)
    monkeypatch.setattr(train.Stopwatch, "save", lambda self, args: 0.3)
    train.main([*RUN, "--minutes", "0.25", "--epochs", "4", "--batch-size", "4"])  # 40 steps
    assert 9 < now[0] <= 15
    said = capsys.readouterr().out
    assert "slower than measured" in said
    checkpoint = load(folder / "checkpoints" / "last.pt")
    assert checkpoint["constants"]["epochs"] == checkpoint["epoch"] < 4
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] < 0.05 * 0.005


def test_features_for_which_there_is_no_time_are_left_out(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    original = train.make_plan

    def late(*args, **options):
        args, budget = original(*args, **options)
        budget.deadline = 0
        return args, budget

    monkeypatch.setattr(train, "make_plan", late)
    train.main([*RUN, "--epochs", "0", "--val-batch-size", "15"])
    assert "slower than planned: 15 images train the head" in capsys.readouterr().out


def test_too_few_minutes_say_how_many_are_needed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(utils.UserError, match=r"^--minutes 0.001 is too short: expected \d"):
        train.main([*RUN, "--minutes", "0.001"])
    assert not (folder / "checkpoints" / "last.pt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--demo", "--minutes 1.0: expected 0 with --demo, --compile or without pretrained"),
        ("--weights ''", "--minutes 1.0: expected 0 with --demo, --compile or without pretrained"),
        ("--compile", "--minutes 1.0: expected 0 with --demo, --compile or without pretrained"),
        ("--schedule plateau", "--schedule 'plateau': expected cosine with --minutes"),
    ],
)
def test_what_cannot_be_planned_is_refused(flags, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        train.main([*RUN, *shlex.split(flags)])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_follow_one_plan(folder):
    command = [*TORCHRUN, "--nproc-per-node", "2", train.__file__]
    process = start_process([*command, *RUN, "--epochs", "1"], cwd=folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("\nplan ") == 1 and "finished all 1 epochs" in out


@pytest.mark.slow
def test_plan_runs_on_the_fake_gpu(folder):
    assert in_its_own_process(plan_on_fake_gpu, str(folder)) == []


def plan_on_fake_gpu(folder: str) -> list[str]:
    os.chdir(folder)
    gpu = run_on_fake_gpu(train.main, " ".join([*RUN, "--epochs", "1"]))
    return gpu.problems
