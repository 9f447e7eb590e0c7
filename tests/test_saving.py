"""A process that dies at any moment of a save leaves files from which the run continues."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from scripts import assert_same
from torch import nn

import data
import train
import utils

ARGS = utils.parse_flags(train.__file__, [])
METADATA = {"constants": vars(ARGS), "precision": "fp32", "classes": ["0"]}
METADATA |= {"dataset": "digits", "validation": "digits"}
FILES = ["best.pt", "last.pt", "history.csv"]


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


def read(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def write(folder: Path, contents: list[bytes]) -> None:
    for name, content in zip(FILES, contents):
        (folder / name).write_bytes(content)


@contextmanager
def watched(look: Callable[[str], None]) -> Iterator[None]:
    """Calls look(name) before each file operation of utils.py, and in the middle of each write."""

    def look_before(name: str, operation: Callable) -> Callable:
        def watched_operation(*args):
            look(name)
            return operation(*args)

        return watched_operation

    def open_watched(path: Path, mode: str):
        file = look_before("open", open)(path, mode)
        write = file.write

        def write_in_halves(content) -> None:
            write(content[: len(content) // 2])
            file.flush()
            look("write")
            write(content[len(content) // 2 :])

        file.write, file.close = write_in_halves, look_before("close", file.close)
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "open", open_watched, raising=False)
        for name in ("fsync", "replace"):
            patch.setattr(os, name, look_before(name, getattr(os, name)))
        yield


class Saves:
    """A run after two epochs, saved after each; what the files held at each moment of the second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.history = folder, make_run(), []
        train_epoch(self.run, self.history)
        self.save()
        train_epoch(self.run, self.history)
        self.operations, self.left = [], []
        with watched(self.note):
            self.save()
        self.left.append(read(folder))

    def note(self, operation: str) -> None:
        self.operations.append(operation)
        self.left.append(read(self.folder))

    def save(self) -> None:
        utils.save_run(self.folder, METADATA, self.run.parts(), self.history, is_best=True)


@pytest.fixture
def saves(tmp_path) -> Saves:
    return Saves(tmp_path)


def test_process_that_is_killed_at_any_file_operation_of_a_save_loses_nothing(saves):
    """It leaves what the files hold at that moment."""
    assert len(saves.operations) > 100
    replaced = [name for name in saves.operations if name in ("fsync", "replace")]
    assert replaced == ["fsync", "replace"] * 3  # by what is on disk
    for state in {tuple(contents) for contents in saves.left}:
        for content, *whole in zip(state, saves.left[0], saves.left[-1]):
            assert content in whole, "it is cut short"
        write(saves.folder, state)
        best, last = (utils.load_checkpoint(saves.folder / name) for name in FILES[:2])
        assert best["epoch"] >= last["epoch"], "best.pt is older than last.pt"
        run, history = make_run(), last["history"]
        utils.restore(last, saves.folder / "last.pt", run.parts(), METADATA)
        if len(history) == 1:
            train_epoch(run, history)
        assert_same(history, saves.history)
        for name, part in run.parts().items():
            assert_same(part.state_dict(), saves.run.parts()[name].state_dict())


def signal_at(moment: int, signum: int) -> Callable[[str], None]:
    """What to do before each operation to get the signal before one of them."""
    countdown = itertools.count(moment, -1)
    return lambda _: os.kill(os.getpid(), signum) if next(countdown) == 0 else None


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals are handled afterwards as they were before."""
    earlier = {signum: signal.getsignal(signum) for signum in utils.SIGNALS}
    yield
    for signum, handler in earlier.items():
        signal.signal(signum, handler)


def test_signal_at_any_file_operation_of_a_save_waits_for_its_end(
    saves, handlers, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["train.py", "--demo"])
    where = saves.folder / "last.pt"
    message = f"epoch 2 is safe in {where}; to continue: python train.py --demo --resume"
    for moment in range(len(saves.operations)):
        signum = (signal.SIGTERM, signal.SIGINT)[moment % 2]
        write(saves.folder, saves.left[0])
        for each in utils.SIGNALS:  # which the last one has left ignored
            signal.signal(each, signal.default_int_handler)
        with (
            pytest.raises(SystemExit) as end,
            utils.explained_exit("nothing is saved yet", ""),
            watched(signal_at(moment, signum)),
        ):
            saves.save()
        assert end.value.code == 128 + signum
        assert capsys.readouterr().err == f"\nstopped  {message}\n"
        ignored = [signal.getsignal(each) == signal.SIG_IGN for each in utils.SIGNALS]
        assert all(ignored)  # a second one does not spoil the message
        assert read(saves.folder) == saves.left[-1]


@pytest.mark.parametrize("name", FILES)
def test_file_that_another_program_holds_is_tried_again_if_a_run_needs_it(
    name, saves, monkeypatch, capsys
):
    """As a virus scanner does on Windows; how that refuses to replace a file is pretended."""
    replace, refusals = os.replace, itertools.count(1)

    def refuse_three_times(source: Path, target: Path) -> None:
        if Path(target).name == name and next(refusals) <= 3:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    write(saves.folder, saves.left[0])
    monkeypatch.setattr(os, "replace", refuse_three_times)
    saves.save()
    held = name == "history.csv"  # an extra, which the next epoch writes again
    lost = f"note     {saves.folder / name} could not be written: Permission denied\n"
    assert capsys.readouterr().out == (lost if held else "")
    for kept, content, new in zip(FILES, read(saves.folder), saves.left[-1]):
        assert (content == new) == (kept != name or not held)
    assert not list(saves.folder.glob("*.tmp"))


def test_file_that_stays_held_is_an_error_that_says_what_is_safe(saves, monkeypatch):
    monkeypatch.setattr(utils, "CHECKPOINT_PATIENCE", 0.2, raising=False)
    (saves.folder / "last.pt").unlink()
    (saves.folder / "last.pt").mkdir()  # nor can a file replace a folder
    with pytest.raises(utils.UserError) as error:
        saves.save()
    path = saves.folder / "last.pt"
    expected = f"{path} could not be written: Is a directory.\nepoch 2 is safe in {path}"
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("name", ["history.csv", "training_curves.png"])
def test_extra_that_cannot_be_written_or_moved_ends_no_run(name, saves, monkeypatch, capsys):
    names = ("learning_rate", "train_loss", "val_loss", "train_accuracy", "val_accuracy")
    row = {"epoch": 1} | dict.fromkeys(names, 0.5)
    path = saves.folder / name
    path.unlink(missing_ok=True)
    (path / "in it").mkdir(parents=True)
    saves.save()
    utils.draw_progress(saves.folder, [row], "loss", at_once=True)
    assert capsys.readouterr().out == f"note     {path} could not be written: Is a directory\n"
    replace = os.replace

    def refuse_extras(source: Path, target: Path) -> None:
        if Path(source).suffix != ".pt":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_extras)
    utils.move_aside(saves.folder)
    (aside,) = saves.folder.glob("earlier-*")
    assert sorted(os.listdir(aside)) == ["best.pt", "last.pt"]
    said = f"note     {aside / name} could not be written: Permission denied"
    assert said in capsys.readouterr().out


def test_earlier_run_that_cannot_be_moved_aside_is_an_error(saves, monkeypatch):
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(utils, "CHECKPOINT_PATIENCE", 0.2, raising=False)
    with pytest.raises(utils.UserError, match="cannot be moved to .*earlier-.*: Permission denied"):
        utils.move_aside(saves.folder)


def test_lock_that_cannot_be_had_ends_no_run(tmp_path, capsys):
    (tmp_path / ".lock").mkdir()  # as little a file to write as another user's
    assert utils.lock_folder(tmp_path) is None
    assert f"note     {tmp_path} is not locked" in capsys.readouterr().out


@pytest.mark.skipif(utils.fcntl is None, reason="needs flock")
def test_what_a_kill_left_is_removed_by_the_next_run_alone(tmp_path):
    left, other = tmp_path / "best.pt.tmp", tmp_path / "my.tmp"
    for path in (left, other):
        path.write_bytes(b"PK half a file")
    with utils.lock_folder(tmp_path):
        assert not left.exists() and other.exists()
        left.write_bytes(b"PK")  # as it stands while this run saves
        with pytest.raises(utils.UserError, match="Another run is using"):
            utils.lock_folder(tmp_path)
        with data.scratch_folder(tmp_path, "download"):  # which may be DATA_DIR, too
            pass
        assert left.exists()


def test_resume_refuses_classes_of_other_names(saves):
    last = utils.load_checkpoint(saves.folder / "last.pt")
    with pytest.raises(utils.UserError, match="its classes are not those of the data set"):
        utils.restore(last, saves.folder, make_run().parts(), METADATA | {"classes": ["1"]})
