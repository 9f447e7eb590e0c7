"""Flags, early stopping, precision: what needs no training."""

import platform
import re
import shlex
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from scripts import ROOT

import data
import evaluate
import train
import utils

SCRIPT = """
EPOCHS = 60  # at most 100 % of them [1, 100]
RATE = 0.1  # the step [0.0, 1]
NAME = "a"  # which ["a", "b"]
PATH = "x"  # a file
OTHER = "x"  # a file; "" for none
FAST = False  # quickly
PATHS = []  # some files
DEMO = False  # try it
DEMO_SETTINGS = {"EPOCHS": 2, "RATE": 0.5}
"""


def parse(tmp_path, *argv):
    (tmp_path / "script.py").write_text(SCRIPT)
    return utils.parse_flags(str(tmp_path / "script.py"), list(argv))


def test_every_constant_is_a_flag_of_its_type(tmp_path):
    args = parse(tmp_path, "--epochs", "3", "--rate", "1e-2", "--fast", "--paths", "x", "y")
    expected = {"epochs": 3, "rate": 0.01, "name": "a", "path": "x", "other": "x", "fast": True}
    assert vars(args) == expected | {"paths": ["x", "y"], "demo": False}
    assert parse(tmp_path, "--no-fast").fast is False


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train.py", "--learning-rate 1e-9 --freeze-batch-norm --epochs 7 --weights ''"),
        ("train.py", "--dataset 'my photos' --stored-size 64 --weight-decay 0.1234567890123"),
        ("evaluate.py", "--compare 'a b' c --no-show --tta"),
    ],
)
def test_command_of_some_settings_gives_these_settings(script, flags):
    path = str(ROOT / script)
    args = utils.parse_flags(path, shlex.split(flags))
    python, name, *words = shlex.split(utils.command_of(path, args, without=["seed"]))
    assert (python, name) == ("python", script)
    assert utils.parse_flags(path, words) == args
    assert len(words) == len(shlex.split(flags))  # and nothing that is a default


def test_edited_constant_keeps_its_type(tmp_path, capsys):
    (tmp_path / "script.py").write_text(SCRIPT.replace("RATE = 0.1 ", "RATE = 0 "))
    args = utils.parse_flags(str(tmp_path / "script.py"), ["--rate", "0.05"])
    assert args.rate == 0.05
    for wrong in ('"60"', "60.0"):
        (tmp_path / "script.py").write_text(SCRIPT.replace("EPOCHS = 60 ", f"EPOCHS = {wrong} "))
        with pytest.raises(SystemExit):
            utils.parse_flags(str(tmp_path / "script.py"), [])
        assert re.search(r"--epochs '?60(.0)?'?: expected 1 to 100", capsys.readouterr().err)


def test_constants_survive_a_byte_order_mark_and_annotations(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("EPOCHS = 60", "EPOCHS: int = 60"), encoding="utf-8-sig")
    assert utils.parse_flags(str(path), []).epochs == 60
    assert utils.parse_flags(str(path), ["--epochs", "7"]).epochs == 7


def test_empty_string_is_allowed_only_where_the_comment_mentions_it(tmp_path, capsys):
    assert parse(tmp_path, "--other", "").other == ""
    with pytest.raises(SystemExit):
        parse(tmp_path, "--path", "")
    assert "--path '': expected a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--batch_size", "--batch-size"),
        ("--lr", "--learning-rate"),
        ("--wd", "--weight-decay"),
        ("--epoch", "--epochs"),
        ("--LR", "--learning-rate"),
    ],
)
def test_unknown_flag_is_answered_with_the_one_that_was_meant(wrong, meant, capsys):
    with pytest.raises(SystemExit):
        train.main([wrong, "3"])
    assert f"arguments: {wrong} 3; did you mean {meant}? --help" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--frobnicate"])
    assert "arguments: --frobnicate; --help lists the flags" in capsys.readouterr().err


def test_constant_that_is_no_literal_is_named(tmp_path):
    (tmp_path / "script.py").write_text("import os\n\nHOME = os.environ['HOME']  # where\n")
    with pytest.raises(utils.UserError, match="script.py, line 3: HOME must be a plain number"):
        utils.parse_flags(str(tmp_path / "script.py"), [])


def test_help_shows_each_comment_type_and_default(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, "--help")
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "--epochs INT at most 100 % of them [1, 100] (default: 60)" in out
    assert "--name STR which ['a', 'b'] (default: 'a')" in out
    assert "--fast, --no-fast quickly (default: False)" in out


def test_flags_win_over_demo_settings_and_those_over_the_constants(tmp_path):
    assert parse(tmp_path).epochs == 60
    args = parse(tmp_path, "--demo", "--rate", "0.7")
    assert (args.epochs, args.rate, args.name) == (2, 0.7, "a")


@pytest.mark.parametrize(
    "argv",
    [
        ["--epoch", "3"],
        ["--epochs", "3.5"],
        ["--epochs"],
        ["--rate", "fast"],
        ["stray"],
        ["-e", "3"],
    ],
)
def test_unknown_flag_or_wrong_type_is_one_line_and_exit_status_2(
    tmp_path, argv, capsys, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, *argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("script.py: ")


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_every_constant_of_a_script_is_commented_and_read(script):
    """A comment is the flag's help; a constant that nothing reads would be a lie."""
    source = (ROOT / script).read_text()
    readers = source + "".join((ROOT / name).read_text() for name in ("data.py", "utils.py"))
    args = utils.parse_flags(str(ROOT / script), [])
    for name in vars(args):
        line = re.search(rf"^{name.upper()} = .*$", source, re.MULTILINE).group()
        assert re.search(r"  # \S", line), f"{name.upper()} has no comment"
        assert re.search(rf'\b(args|settings)\.{name}\b|"{name}"', readers), (
            f"{name.upper()} is never read"
        )


# What every edge of every flag gives: 2 for what cannot be right whatever the data and the machine.
EDGES = [
    *[(flag, value) for flag in ("epochs", "batch-size", "image-size", "log-every") for value in
      ("0", "-1", "10000000000", "nan", "x", "", "1.5")],
    *[("early-stopping-patience", value) for value in ("0", "-1", "inf", "")],
    *[("scheduler-patience", value) for value in ("-1", "nan", "")],
    *[("seed", value) for value in ("-1", "1e3", "", "99999999999999999999")],
    *[("learning-rate", value) for value in ("0", "-0.1", "nan", "inf", "x", "", "1e30")],
    *[(flag, value) for flag in ("momentum", "weight-decay", "scheduler-factor") for value in
      ("-0.1", "nan", "inf", "x", "", "1e30")],
    ("scheduler-factor", "1"),
    *[("holdout-per-class", value) for value in ("-1", "500", "nan", "")],
    *[("train-per-class", value) for value in ("-1", "501", "x")],
    *[(flag, value) for flag in ("flip", "grayscale") for value in ("-0.1", "1.1", "nan", "x")],
    *[("crop-padding", value) for value in ("-1", "33", "nan", "1.5")],
    *[(flag, value) for flag in ("brightness", "contrast", "saturation") for value in
      ("-0.1", "nan", "inf", "x")],
    *[("hue", value) for value in ("-0.1", "0.51", "nan")],
    *[("rotation", value) for value in ("-1", "181", "nan")],
    *[(flag, value) for flag in ("watch", "device", "precision") for value in ("", "x", "AUTO")],
    *[(flag, "") for flag in ("data-dir", "checkpoint-dir")],
    ("no-such-flag", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), EDGES)
def test_flag_at_its_edge_is_one_line_and_exit_status_2(flag, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        train.main([f"--{flag}", value])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and f"--{flag}" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        *(["--device", value] for value in ("", "x", "CPU", "0")),
        *([flag, ""] for flag in ("--checkpoint", "--data-dir", "--results-dir")),
        ["--checkpoint"],
        ["--images"],
        ["--export", "model.pt2", "--images", "photo.jpg"],
        ["--tta", "yes"],
        ["--check", "x"],
        ["photo.jpg"],
    ],
)
def test_flag_of_evaluate_at_its_edge_is_one_line_and_exit_status_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert argv[0] in err or argv[-1] in err


def test_batch_of_one_is_refused_where_batch_norm_cannot_take_it(capsys):
    with pytest.raises(SystemExit):
        train.main(["--demo", "--batch-size", "1"])
    assert (
        "--batch-size 1: expected at least 2 images per process at 32 px" in capsys.readouterr().err
    )


@pytest.mark.parametrize("flag", ["watch", "rotation", "seed", "crop-padding", "flip"])
def test_range_message_says_found_and_expected(flag, capsys):
    with pytest.raises(SystemExit):
        train.main([f"--{flag}=-7"])
    assert re.search(rf"--{flag}[ :].*-7.*", capsys.readouterr().err)


def test_early_stopping_counts_epochs_without_a_better_one():
    losses = [3.0, 2.0, 2.0, 2.5, 1.9, 1.9, 2.0, 5.0]
    assert best_epochs("loss", losses) == [1, 2, 2, 2, 5, 5, 5, 5]
    assert stops("loss", losses, patience=3) == [False] * 7 + [True]
    assert not train.should_stop([], Namespace(watch="loss", early_stopping_patience=1))


def test_early_stopping_can_watch_what_should_rise():
    assert best_epochs("accuracy", [0.5, 0.6, 0.6]) == [1, 2, 2]
    assert stops("accuracy", [0.5, 0.6, 0.6], patience=1) == [False, False, True]


def histories(watch: str, values: list[float]) -> list[list[dict]]:
    rows = [{"epoch": epoch, f"val_{watch}": x} for epoch, x in enumerate(values, start=1)]
    return [rows[:count] for count in range(1, len(rows) + 1)]


def best_epochs(watch: str, values: list[float]) -> list[int]:
    return [utils.best_epoch(history, watch)["epoch"] for history in histories(watch, values)]


def stops(watch: str, values: list[float], patience: int) -> list[bool]:
    args = Namespace(watch=watch, early_stopping_patience=patience)
    return [train.should_stop(history, args) for history in histories(watch, values)]


def test_seeds_that_add_up_to_the_same_differ():
    assert len({data.mix_seed(seed, 10 - seed) for seed in range(11)}) == 11
    assert data.mix_seed(1, 2) == data.mix_seed(1, 2)


def test_seeds_of_different_lengths_differ():
    seeds = {data.mix_seed(0), data.mix_seed(0, 0), data.mix_seed(0, 0, 0), data.mix_seed(0, 1)}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("device", "native", "precision"),
    [
        ("cpu", True, "bf16"),
        ("cpu", False, "fp32"),
        ("cuda", True, "bf16"),
        ("cuda", False, "fp16"),
    ],
)
def test_precision_follows_the_hardware(device, native, precision, monkeypatch):
    """The hardware is pretended: no machine has all of it."""
    capabilities = {"avx512_bf16": native, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    assert utils.choose_precision("auto", torch.device(device)) == precision
    assert utils.choose_precision("fp32", torch.device(device)) == "fp32"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("kept", [True, False])
def test_on_a_cpu_freed_memory_is_kept(kept):
    script = f"""
import resource, torch, utils
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
if {kept}:
    utils.choose_device("cpu")
before = resident()
torch.ones(2**24)  # 64 MB
print(resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    held = int(done.stdout)
    assert held > 0.9 * 2**26 if kept else held < 0.1 * 2**26


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_asked_for_and_missing_is_an_error():
    assert utils.choose_device("auto").type == "cpu"
    with pytest.raises(utils.UserError, match="--device cuda: torch .* finds none here"):
        utils.choose_device("cuda")


def test_a_driver_that_torch_cannot_use_is_not_called_no_gpu(monkeypatch):
    import warnings

    def old_driver() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)  # no such GPU to try it on
    with pytest.raises(utils.UserError, match="There is a GPU, but .* driver .* is too old"):
        utils.choose_device("auto")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "GPU memory is exhausted: less.\nall safe"),
        (torch.AcceleratorError("CUDA error: out of memory"), "exhausted: less.\nall safe"),
        (
            torch.AcceleratorError("CUDA error: bad"),
            "failed: CUDA error: bad\nall safe; to continue: go",
        ),
        (FloatingPointError("the loss is nan"), "the loss is nan.\nall safe"),
        (
            RuntimeError("[gloo/pair.cc:1] Connection closed by peer"),
            "another process cannot be reached: .*\nall safe; to continue: go",
        ),
    ],
)
def test_failing_gpu_is_explained_and_continued_only_where_that_can_help(
    error, message, monkeypatch, capsys
):
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # pytest has handlers of its own
    monkeypatch.setattr(utils._Ending, "command", "go")
    with pytest.raises(SystemExit) as end, utils.explained_exit("all safe", "less"):
        raise error
    assert end.value.code == 1
    assert re.fullmatch(rf"stopped  .*{message}\n", capsys.readouterr().err)


def test_signal_that_nohup_ignores_stays_ignored(monkeypatch):
    installed = []
    monkeypatch.setattr(signal, "signal", lambda signum, handler: installed.append(signum))
    ignored = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", lambda signum: ignored.get(signum, signal.SIG_DFL))
    with utils.explained_exit("all safe", "less"):
        pass
    expected = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    assert set(installed) == expected


@pytest.mark.parametrize("error", [RuntimeError("our own bug"), KeyError("x")])
def test_an_error_of_ours_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(type(error)), utils.explained_exit("all safe", "less"):
        raise error


def test_a_line_is_in_the_log_as_soon_as_it_is_said(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr("sys.stdout", log)
        utils.say("note", "said")
        assert (tmp_path / "log").read_text() == "note     said\n"
