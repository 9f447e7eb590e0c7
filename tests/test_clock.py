"""--minutes: all of the time is used and no second more, whatever the machine does meanwhile.

Most tests run train.py on a machine whose time is made here: a step and a forward pass take as many
seconds as the test says, and nothing else takes any.
"""

import builtins
import inspect
import os
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from fake_gpu import in_its_own_process, run_on_fake_gpu
from scripts import TORCHRUN, Script, load, run_script, settings, start_process

import data
import evaluate
import model as resnet
import train
import utils

# 40 digits to train on, 20 to validate on; random weights of a small network for pretrained ones
DIGITS = "--dataset digits --architecture resnet18 --weights ../weights.pth --image-size 32"
DIGITS += " --precision fp32 --train-per-class 4 --holdout-per-class 2 --no-curves"
RUN = [*DIGITS.split(), "--minutes", "1", "--head-epochs", "2", "--batch-size", "4"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, beside the weights."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


class Machine:
    """Its time in seconds, and how many of them its work takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.image_seconds = 0.02  # of a forward pass without a step
        self.loss_seconds = 0.1  # all that a step of the head takes
        self.step_seconds = 0.9  # what a step of the network takes besides
        self.steps = 0  # of the network
        self.losses = 0  # one in each step
        self.change_at, self.factor = float("inf"), 1.0  # from when all takes this times as long
        self.die_at = float("inf")

    def work(self, seconds: float) -> None:
        self.now += seconds * (self.factor if self.now >= self.change_at else 1)
        if self.now >= self.die_at:
            raise KeyboardInterrupt


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    train_step, batches = train.train_step, data.EvalLoader.__iter__
    compute_loss = train.compute_loss

    def timed_step(*args) -> tuple:
        machine.steps += 1
        machine.work(machine.step_seconds)
        return train_step(*args)

    def timed_batches(loader: data.EvalLoader) -> Iterator:
        for batch in batches(loader):
            machine.work(machine.image_seconds * len(batch))
            yield batch

    def timed_loss(*args) -> torch.Tensor:
        machine.losses += 1
        machine.work(machine.loss_seconds)
        return compute_loss(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: machine.now)
    monkeypatch.setattr(train, "train_step", timed_step)
    monkeypatch.setattr(train, "compute_loss", timed_loss)
    monkeypatch.setattr(data.EvalLoader, "__iter__", timed_batches)
    return machine


def last_rate(folder: Path) -> float:
    return load(folder / "checkpoints" / "last.pt")["optimizer"]["param_groups"][0]["lr"]


@pytest.mark.parametrize("factor", [1, 2, 0.5])
def test_run_uses_all_of_its_time_on_a_machine_that_changes_half_way(factor, folder, machine):
    """Ten steps an epoch; about 50 in all, the last of which has next to no rate."""
    machine.change_at, machine.factor = 30, factor
    train.main(RUN)
    assert 0.96 * 60 < machine.now <= 59  # a second is kept for Python to end
    assert machine.steps > {1: 45, 2: 33, 0.5: 67}[factor]
    assert last_rate(folder) < 1e-2 * 0.005


def test_epoch_of_fewer_steps_than_log_every_looks_at_the_clock(folder, machine):
    machine.step_seconds, machine.image_seconds = 2, 0.005
    train.main([*RUN, "--minutes", "0.25", "--log-every", "1000"])
    assert 12 < machine.now <= 14
    checkpoint = load(folder / "checkpoints" / "last.pt")
    assert checkpoint["epoch"] == 1 and last_rate(folder) < 0.2 * 0.005


def test_readings_become_frequent_only_as_the_end_comes_near(folder, machine, monkeypatch):
    readings, read = [], utils.Clock.read
    monkeypatch.setattr(
        utils.Clock, "read", lambda clock, done: readings.append(done) or read(clock, done)
    )
    machine.loss_seconds = 0.001
    train.main([*RUN, "--batch-size", "2", "--train-per-class", "100", "--log-every", "1000"])
    steps = machine.steps
    assert steps > 30 and readings[-1] == steps / 500
    assert len(readings) < 10  # the first step, then half-way to the end at a time


def test_end_and_next_reading_are_those_worked_out_by_hand(machine):
    clock = utils.Clock(0, settings(minutes=2, curves=False))
    clock.val_images, clock.image_seconds, clock.save_seconds = 100, 0.04, 4.6
    assert clock.seconds_left() == pytest.approx(120 - 1 - 1.1 * 4 - 4.6)
    assert clock.start_epoch(1) == float("inf")
    machine.now = 10  # a quarter of an epoch: 40 seconds each
    assert clock.read(0.25) == pytest.approx(0.25 + 100 / 40)
    assert clock.next_reading == pytest.approx(0.25 + 50 / 40)
    machine.now = 30  # another at twice the pace: the mean of 40 and 80
    assert clock.read(0.5) == pytest.approx(0.5 + 80 / 60)
    machine.now = 40
    assert clock.start_epoch(2) == pytest.approx(1 + 70 / 60)


def test_validation_comes_before_the_end_only_where_it_is_cheap(folder, machine):
    """It takes 0.4 seconds, an epoch 10; then 4 seconds, with the same epochs."""
    epochs = []
    for per_class in ("2", "20"):
        machine.now = 0.0
        train.main([*RUN, "--holdout-per-class", per_class, "--checkpoint-dir", per_class])
        history = load(folder / per_class / "last.pt")["history"]
        epochs.append([row["epoch"] for row in history])
    assert len(epochs[0]) > 4 and len(epochs[1]) == 1 and epochs[1][0] > 3


def test_features_are_of_as_many_images_as_there_is_time_for(folder, machine, capsys):
    """Half a second per image: 32 seconds to measure it, 11 for the validation, 1 for the end.

    Nine tenths of the other 16 are enough for seven batches of 4.
    """
    machine.image_seconds = 0.5
    flags = ["--image-size", "128", "--val-batch-size", "4", "--val-images", "20"]
    train.main([*RUN, *flags])
    said = capsys.readouterr().out
    assert "on the features of 28 of 40 images\n" in said
    # 150 steps of 4 images would take 2.5 * 600 * 0.5 seconds: 12.5 minutes more
    assert "from about --minutes 14 on, the network is trained, too" in said
    assert "0.00 epochs of the network" in said and 57 < machine.now <= 60


def test_head_is_trained_even_if_the_machine_stalls_before_it(folder, machine):
    """The first of all batches is begun with 45 seconds left, and takes 100."""
    machine.image_seconds, machine.change_at, machine.factor = 0.2, 12, 50
    train.main([*RUN, "--image-size", "128", "--val-batch-size", "10"])
    model = resnet.make_model(
        settings(architecture="resnet18", weights=""), list("0123456789"), torch.device("cpu"), True
    )
    trained = load(folder / "checkpoints" / "best.pt")["model"]["fc.3.weight"]
    assert not torch.equal(trained, model.fc[3].weight)


def test_head_is_trained_even_if_the_time_is_over_before_it(folder, machine):
    """The validation alone would take longer than there is."""
    machine.image_seconds, machine.loss_seconds = 0.5, 0.1
    train.main([*RUN, "--image-size", "128", "--val-images", "20", "--minutes", "0.7"])
    assert len(load(folder / "checkpoints" / "last.pt")["history"]) == 1
    assert machine.losses >= 10  # a second of training, rather late than untrained


def test_rate_that_is_told_is_that_of_the_middle_of_what_was_trained(folder, machine):
    """A third of an epoch: at its middle, half of 0.005; 30 steps would be an epoch."""
    machine.step_seconds, machine.loss_seconds = 4, 0.01
    train.main([*RUN, "--train-per-class", "12", "--minutes", "1"])
    row = load(folder / "checkpoints" / "last.pt")["history"][-1]
    assert row["epoch"] == 1 and row["learning_rate"] == pytest.approx(0.0025, rel=0.15)


def test_run_that_has_ended_trains_no_more_when_it_is_resumed(folder, machine, capsys):
    train.main(RUN)
    last, steps = load(folder / "checkpoints" / "last.pt"), machine.steps
    machine.now = 1000.0
    train.main([*RUN, "--resume"])
    assert machine.steps == steps
    assert load(folder / "checkpoints" / "last.pt")["history"] == last["history"]
    ends = [x.split(": ")[1] for x in capsys.readouterr().out.splitlines() if "finished" in x]
    assert ends[0] == ends[1] and "0.00" not in ends[0]


def test_mirrored_images_train_the_head_where_there_is_no_time_for_the_network(
    folder, machine, capsys
):
    """150 steps would take 2.5 * 600 * 0.05 seconds."""
    machine.image_seconds = 0.05
    train.main(RUN)
    said = capsys.readouterr().out
    assert "on the features of 40 of 40 images and 40 mirrored ones\n" in said
    assert "0.00 epochs of the network" in said and 58 < machine.now <= 60
    assert "there is only time for the head; from about --minutes 2 on, the network is" in said
    machine.now = 0
    train.main([*RUN, "--minutes", "2"])
    assert machine.steps > 0 and "only time for the head" not in capsys.readouterr().out


def test_interrupted_run_continues_with_the_time_that_is_left(folder, machine):
    machine.die_at = 20
    with pytest.raises(KeyboardInterrupt):
        train.main(RUN)
    stored = load(folder / "checkpoints" / "last.pt")
    used = stored["clock"]["seconds_used"]
    assert stored["clock"]["trained"] >= 0 and 0 < used < 20
    machine.die_at, machine.now, begin = float("inf"), 1000.0, 1000.0
    train.main([*RUN, "--resume"])
    assert 0.96 * 60 < used + machine.now - begin <= 59
    assert last_rate(folder) < 1e-2 * 0.005


def test_head_that_is_trained_is_saved_without_a_validation(folder, machine):
    machine.die_at, flags = 10, [*RUN, "--holdout-per-class", "20"]
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    stored = load(folder / "checkpoints" / "last.pt")
    assert stored["history"] == [] and stored["clock"]["trained"] == 0
    steps, machine.die_at = machine.steps, float("inf")
    train.main([*flags, "--resume"])
    assert load(folder / "checkpoints" / "last.pt")["epoch"] > 0 and machine.steps > steps


def test_epochs_are_a_limit_too_and_the_run_accepts_its_own_resume(folder, machine):
    flags = [*RUN, "--epochs", "2"]
    train.main(flags)
    assert load(folder / "checkpoints" / "last.pt")["epoch"] == 2 and machine.now < 30
    train.main([*flags, "--resume"])


@pytest.mark.parametrize(("first", "then"), [("0", "1"), ("1", "0")])
def test_run_with_and_without_a_clock_do_not_continue_each_other(first, then, folder, machine):
    train.main([*RUN, "--minutes", first, "--epochs", "1", "--schedule", "cosine"])
    message = f"trained with MINUTES = {float(first)}, now it is {float(then)}"
    with pytest.raises(utils.UserError, match=message):
        train.main([*RUN, "--minutes", then, "--epochs", "1", "--schedule", "cosine", "--resume"])


def test_time_before_main_counts(folder, machine):
    train.main(RUN, begin=-20.0)
    assert 0.95 * 40 < machine.now <= 39


def import_for_twenty_seconds() -> None:
    """In a process of its own: every import of torch takes so long, and the clock tells its begin."""
    now, import_module = [100.0], builtins.__import__

    def import_slowly(name: str, *args: object, **more: object) -> object:
        if name == "torch":
            now[0] += 20
        return import_module(name, *args, **more)

    def tell_begin(clock: utils.Clock, begin: float, args: Namespace) -> None:
        sys.exit(f"begun at {begin}")

    builtins.__import__, time.perf_counter = import_slowly, lambda: now[0]
    utils.Clock.__init__ = tell_begin


def test_time_of_the_imports_counts(folder):
    script = run_script("train.py", *RUN, cwd=folder, prepare=import_for_twenty_seconds)
    assert script.stderr.endswith("begun at 100.0\n")


def test_runs_that_differ_in_seed_alone_have_the_same_settings(folder, machine):
    runs = []
    for seed in ("0", "1"):
        machine.now = 0.0
        machine.step_seconds *= 1.3  # they train for a different number of steps
        train.main([*RUN, "--seed", seed, "--checkpoint-dir", seed])
        constants = load(folder / seed / "best.pt")["constants"]
        runs.append(Namespace(summary={"tta": False, "constants": constants}))
    assert evaluate.differences(*runs).keys() == {"seed"}


def test_runs_whose_settings_the_clock_chose_are_of_one_recipe():
    def make_runs(minutes: float) -> list[Namespace]:
        runs = []
        for seed in (0, 1):
            constants = {"seed": seed, "minutes": minutes, "freeze_stages": 1 + seed}
            runs.append(Namespace(summary={"tta": False, "constants": constants}, folder=f"{seed}"))
        return runs

    evaluate.require_one_recipe(make_runs(10.0))
    with pytest.raises(utils.UserError, match="0, 1 differ in FREEZE_STAGES. Expected one recipe"):
        evaluate.require_one_recipe(make_runs(0.0))


def test_mixing_and_warm_up_go_with_minutes(folder, machine):
    train.main([*RUN, "--mixup", "0.2", "--cutmix", "1", "--warmup-epochs", "0.5"])
    assert 0.95 * 60 < machine.now <= 59


@pytest.mark.parametrize(
    ("passes", "chosen"),
    [(1000, (224, 0)), (60, (224, 0)), (59, (128, 1)), (14, (128, 2)), (0.05, (96, 2))],
)
def test_settings_are_those_of_the_first_line_of_the_table_that_is_reached(
    passes, chosen, machine, monkeypatch
):
    args = settings(minutes=1, curves=False, weights="x.pth", schedule="cosine")
    clock = utils.Clock(-1, args)  # 58 seconds are left
    monkeypatch.setattr(train, "measure_forward", lambda *_: passes / 58 * 100)
    splits = make_split(100), make_split(40)
    found = train.choose_settings(["--minutes", "1"], args, clock, None, "fp32", *splits)
    assert (found.image_size, found.freeze_stages) == chosen
    assert found.freeze_batch_norm == (chosen[1] > 0) and found.batch_size == 64


def make_split(images: int) -> data.Split:
    return data.Split(torch.zeros(images, 3, 8, 8).byte(), torch.arange(images))


def test_validation_takes_no_more_than_a_fifth_of_the_time(machine, monkeypatch):
    """At 100 images a second of 128 px, 400 for the network, of which 20 seconds are left."""
    args = settings(minutes=0.35, curves=False, weights="x.pth", schedule="cosine")
    flags = ["--minutes", "0.35", "--image-size", "128"]
    monkeypatch.setattr(train, "measure_forward", lambda *_: 100.0)
    for val_images, most in ((400, 0), (401, 400)):
        clock = utils.Clock(0, args)
        splits = make_split(1000), make_split(val_images)
        found = train.choose_settings(flags, args, clock, None, "fp32", *splits)
        assert found.val_images == most
    split = make_split(90)
    for count, labels in ((0, 90), (91, 90), (90, 90), (89, 89), (30, 30)):
        args.val_images = count
        cpu, this = torch.device("cpu"), utils.Processes()
        _, loader, found = data.make_loaders(args, this, cpu, split, split)
        assert len(found) == labels == len(loader.rows)
    assert found.tolist() == list(range(0, 90, 3))


def test_too_few_minutes_say_how_many_are_needed(folder, machine):
    """60 images of 32 px; at 128 px a forward pass over them takes 60 seconds."""
    machine.image_seconds = 1.0
    message = r"^--minutes 0.02 is too short: expected \d\.\d or more on this machine$"
    with pytest.raises(utils.UserError, match=message):
        train.main([*RUN, "--minutes", "0.02"])
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
def test_what_does_not_go_with_minutes_is_refused(flags, message, folder, capsys):
    with pytest.raises(SystemExit) as end:
        train.main([*RUN, *shlex.split(flags)])
    assert end.value.code == 2 and message in capsys.readouterr().err


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


def test_cosine_reaches_zero_where_the_run_ends():
    args = settings(schedule="cosine", epochs=4, warmup_epochs=0.5, learning_rate=0.8)
    run = Namespace(end=2.5)
    rates = [train.learning_rate_at(run, args, done) for done in (0.25, 0.5, 1.5, 2.5, 2.6)]
    assert rates == pytest.approx([0.4, 0.8, 0.4, 0, 0])


# ---- by the real clock --------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_run_continues_by_the_real_clock(folder):
    flags = [*RUN, "--minutes", "0.5"]
    broken = Script("train.py", *flags, cwd=folder)
    broken.wait_for("\nepoch ")
    broken.send(signal.SIGKILL)
    broken.wait()
    used = load(folder / "checkpoints" / "last.pt")["clock"]["seconds_used"]
    start = time.monotonic()
    more = run_script("train.py", *flags, "--resume", cwd=folder)
    assert more.status == 0 and "of 0.5 minutes" in more.stdout, more.stderr
    assert 20 < used + time.monotonic() - start < 35


@pytest.mark.slow
def test_two_processes_go_by_one_clock(folder):
    command = [*TORCHRUN, "--nproc-per-node", "2", train.__file__]
    process = start_process([*command, *RUN, "--minutes", "0.4"], cwd=folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("\nchosen ") == 1 and "of 0.4 minutes" in out


@pytest.mark.slow
def test_clock_makes_no_step_wait_on_the_fake_gpu(folder):
    assert in_its_own_process(run_by_the_clock_on_fake_gpu, str(folder)) == ([], 2)


def run_by_the_clock_on_fake_gpu(folder: str) -> tuple[list[str], int]:
    """Its problems, and how often the host waited in an epoch of 20 steps that is far from its end."""
    os.chdir(folder)
    gpu = run_on_fake_gpu(
        train.main, " ".join([*RUN, "--minutes", "60", "--batch-size", "2", "--epochs", "1"])
    )
    lines, first = inspect.getsourcelines(train.train_one_epoch)
    waits = 0
    for place, count in gpu.transfers.items():
        for number in range(first, first + len(lines)):
            if place == f"reads a number at train.py:{number}":
                waits += count
    return gpu.problems, waits
