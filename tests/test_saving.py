"""A process that dies at any moment of a save leaves files from which the run continues."""

import copy
import itertools
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_train import assert_same
from torch import nn

import train
import utils

ARGS = utils.parse_flags(train.__file__, [])
METADATA = {"constants": vars(ARGS), "precision": "fp32", "classes": ["0"]}
METADATA |= {"dataset": "digits", "validation": "digits"}


def make_run() -> train.Run:
    """A run as train.py's, with a network small enough to save it hundreds of times."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)
    return train.make_run(ARGS, nn.Sequential(*layers), "fp32")


def train_epoch(run: train.Run, history: list[dict]) -> None:
    """One step on the same images each time; every epoch is better than the one before."""
    images = torch.linspace(-1, 1, 8 * 3 * 16).view(8, 3, 4, 4)
    loss = run.model(images).square().mean()
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    history.append({"epoch": len(history) + 1, "val_loss": 1 / (len(history) + 1)})
    run.scheduler.step(history[-1]["val_loss"])


class Saves:
    """A run after two epochs; a folder to save it in, and what a whole save leaves after each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.first = folder / "now", folder / "first"
        self.run, self.history, self.whole, self.loaded = make_run(), [], {}, {}
        self.folder.mkdir()
        for epoch in (1, 2):
            train_epoch(self.run, self.history)
            self.save()
            self.whole[epoch] = self.load()
            if epoch == 1:
                shutil.copytree(self.folder, self.first)

    def save(self) -> None:
        utils.save_run(self.folder, METADATA, self.run.parts(), self.history, is_best=True)

    def load(self) -> tuple[dict, dict, bytes]:
        """best.pt, last.pt and the bytes of history.csv; the same bytes are loaded only once."""
        paths = [self.folder / name for name in ("best.pt", "last.pt", "history.csv")]
        best, last, rows = contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths[:2], contents):
            if content not in self.loaded:
                self.loaded[content] = utils.load_checkpoint(path)
        return self.loaded[best], self.loaded[last], rows

    def save_and_die(self, moment: int, signum: int = signal.SIGKILL) -> int:
        """Saves epoch 2 over epoch 1 in a child process that gets a signal; its exit status."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.first, self.folder)
        if not (child := os.fork()):
            status = 1
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
            try:
                sys.stderr = open(self.folder / "stderr", "w")  # noqa: SIM115, until the end
                with utils.explained_exit("nothing is saved yet", ""):
                    die_at(moment, signum)
                    self.save()
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:  # noqa: BLE001, whatever it is, pytest must not go on in the child
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def check(self) -> None:
        """Each file is wholly one epoch's, best.pt is not behind, and the run continues."""
        best, last, rows = self.load()
        assert_same(best, self.whole[best["epoch"]][0])
        assert_same(last, self.whole[last["epoch"]][1])
        assert rows in (self.whole[1][2], self.whole[2][2])

        run, history = make_run(), [*last["history"]]
        utils.restore(copy.deepcopy(last), self.folder / "last.pt", run.parts(), best)
        best_epoch = utils.best_epoch(history, "loss")["epoch"]
        assert best["epoch"] >= best_epoch, "best.pt is older than last.pt's best"
        if len(history) == 1:
            train_epoch(run, history)
        assert_same(run.model.state_dict(), self.run.model.state_dict())
        assert_same(run.optimizer.state_dict(), self.run.optimizer.state_dict())


def die_at(moment: int, signum: int) -> None:
    """Sends this process a signal at its moment-th file operation from now on.

    SIGKILL comes in the middle of a write.
    """
    countdown = itertools.count(moment, -1)

    def die_before(operation: Callable) -> Callable:
        def killed_or_done(*args):
            if next(countdown) == 0:
                os.kill(os.getpid(), signum)
            return operation(*args)

        return killed_or_done

    def open_and_die(path: Path, mode: str):
        file = die_before(open)(path, mode)
        write, flush = file.write, file.flush

        def write_half(content) -> None:
            if next(countdown) == 0:
                if signum == signal.SIGKILL:
                    write(content[: len(content) // 2])
                    flush()
                os.kill(os.getpid(), signum)
            write(content)

        file.write, file.flush, file.close = write_half, die_before(flush), die_before(file.close)
        return file

    utils.open = open_and_die
    os.fsync, os.replace = die_before(os.fsync), die_before(os.replace)


def find_losses(saves: Saves, step: int = 1) -> Iterator[str]:
    """For each moment at which a save can die, what that loses: nothing is ""."""
    for moment in itertools.count(step=step):
        status, loss = saves.save_and_die(moment), ""
        assert status in (0, -signal.SIGKILL)
        try:
            saves.check()
        except (AssertionError, utils.UserError) as error:
            loss = f"at operation {moment}: {error}"
        yield loss
        if status == 0:
            return


@pytest.fixture
def saves(tmp_path) -> Saves:
    return Saves(tmp_path)


def test_process_that_dies_at_any_file_operation_of_a_save_loses_nothing(saves):
    *losses, whole = find_losses(saves)
    print(f"died at {len(losses)} operations, {sum(map(bool, losses))} lost something")
    assert len(losses) > 100 and not any(losses) and not whole


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_at_any_file_operation_of_a_save_ends_with_the_message(signum, status, saves):
    ends = []
    for moment in itertools.count():
        end = saves.save_and_die(moment, signum)
        said = (saves.folder / "stderr").read_text()
        if end == 0:
            break
        ends.append((end, said))
        best, last, _ = saves.load()
        assert (best["epoch"], last["epoch"]) == (2, 2)  # it waits for the end of the save
    print(f"{len(ends)} signals {signum}, all ended with the message and status {status}")
    assert len(ends) > 100
    saved = f"epoch 2 is safe in {saves.folder / 'last.pt'}; to continue: python train.py "
    for end, said in ends:
        assert end == status and said.startswith(f"\nstopped  {saved}") and said.count("\n") == 2


def test_file_replaces_the_earlier_one_once_it_is_on_disk(tmp_path, monkeypatch):
    path, linked, done = tmp_path / "file", tmp_path / "linked", []
    path.write_text("earlier")
    linked.hardlink_to(path)
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, call=call: done.append(name) or call(*a)
        )
    with utils.atomic_write(path, "w") as file:
        file.write("new")
    assert done == ["fsync", "replace"]
    assert (path.read_text(), linked.read_text()) == ("new", "earlier")


def test_resume_refuses_classes_of_other_names(saves):
    last, parts = saves.load()[1], make_run().parts()
    with pytest.raises(utils.UserError, match="its classes are not those of the data set"):
        utils.restore(last, saves.folder / "last.pt", parts, METADATA | {"classes": ["1"]})


def test_last_saved_before_best_would_be_found(saves, monkeypatch):
    save_checkpoint, kept = utils.save_checkpoint, []

    def save_last_first(path: Path, state: dict) -> None:
        kept.insert(0, (path, state))
        while kept and path.name == "last.pt":
            save_checkpoint(*kept.pop(0))

    monkeypatch.setattr(utils, "save_checkpoint", save_last_first)
    assert any("best.pt is older" in loss for loss in find_losses(saves, step=10))


def test_file_written_in_place_would_be_found(saves, monkeypatch):
    @contextmanager
    def write_in_place(path: Path, mode: str):
        with utils.open(path, mode) as file:
            yield file

    monkeypatch.setattr(utils, "atomic_write", write_in_place)
    assert any("cut short" in loss for loss in find_losses(saves))
