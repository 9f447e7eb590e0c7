"""Flags, early stopping, seeds, precision and how a script ends: what needs no training."""

import functools
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import warnings
from argparse import Namespace

import pytest
import torch
from scripts import ROOT

import evaluate
import train
import utils

SCRIPT = """
EPOCHS: int = 60  # at most 100 % of them [1, 100]
RATE = 0.1  # the step [0.0, 1]

# Names; "" for none
NAME = "a"  # which ["a", "b"]
PATH = "x"  # a file
OTHER = "x"  # a file; "" for none
FAST = False  # quickly
PATHS = []  # some files
DEMO = False  # try it
DEMO_SETTINGS = {"EPOCHS": 2, "RATE": 0.5}
"""


@pytest.fixture
def refusal(capsys, monkeypatch):
    """Calls what must end with exit status 2 and one line; returns that line."""
    monkeypatch.setattr("sys.argv", ["script.py"])

    def refused(function, *args) -> str:
        with pytest.raises(SystemExit) as end:
            function(*args)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("script.py: ")
        return err

    return refused


@pytest.fixture
def parse(tmp_path):
    """Parses flags of SCRIPT, which begins with the byte-order mark that some editors write."""

    def parse(*argv, edit=("", "")):
        (tmp_path / "script.py").write_text(SCRIPT.replace(*edit), encoding="utf-8-sig")
        return utils.parse_flags(str(tmp_path / "script.py"), list(argv))

    return parse


def test_every_constant_is_a_flag_of_its_type_and_wins_over_the_demo(parse):
    expected = {"epochs": 60, "rate": 0.1, "name": "a", "path": "x", "other": "x", "fast": False}
    expected |= {"paths": [], "demo": False}
    assert vars(parse()) == expected
    args = parse("--epochs", "3", "--rate", "1e-2", "--fast", "--paths", "x", "y")
    given = {"epochs": 3, "rate": 0.01, "fast": True, "paths": ["x", "y"]}
    assert vars(args) == expected | given
    assert parse("--no-fast").fast is False
    demo = {"epochs": 2, "rate": 0.7, "demo": True}
    assert vars(parse("--demo", "--rate", "0.7")) == expected | demo


def test_edited_constant_keeps_its_type(parse, refusal):
    assert parse("--rate", "0.05", edit=("RATE = 0.1", "RATE = 0")).rate == 0.05
    for wrong in ("'60'", "60.0"):
        refused = functools.partial(parse, edit=("int = 60", f"int = {wrong}"))
        assert f"--epochs {wrong}: expected 1 to 100" in refusal(refused)


def test_constant_that_is_no_literal_is_named(parse):
    with pytest.raises(utils.UserError, match="script.py, line 6: NAME must be a plain number"):
        parse(edit=('"a" ', "os.environ['HOME'] "))


def test_empty_string_is_allowed_only_where_the_comment_mentions_it(parse, refusal):
    assert parse("--other", "").other == ""
    assert "--path '': expected a file" in refusal(parse, "--path", "")


def test_help_shows_each_comment_type_and_default(parse, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "--epochs INT at most 100 % of them [1, 100] (default: 60)" in out
    assert "--name STR which ['a', 'b'] (default: 'a')" in out
    assert "--fast, --no-fast quickly (default: False)" in out


def test_help_groups_the_flags_under_the_comments_above_the_constants(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    before, names = capsys.readouterr().out.split('\n\nNames; "" for none:\n')
    assert "--rate" in before and "--name" not in before
    assert "--name" in names and "--paths" in names


def test_home_folder_is_meant_by_a_tilde_in_flags_and_constants(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")  # its name on Windows
    edit = 'OTHER = "x"', 'OTHER = "~/y"'
    args = parse("--path=~/runs", "--paths", "~/a.jpg", "b~.jpg", edit=edit)
    assert (args.path, args.other) == ("/home/me/runs", "/home/me/y")
    assert args.paths == ["/home/me/a.jpg", "b~.jpg"]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train.py", "--learning-rate 1e-9 --freeze-batch-norm --epochs 7 --weights ''"),
        ("train.py", "--dataset 'my photos' --stored-size 64 --weight-decay 0.1234567890123"),
        ("evaluate.py", "--compare 'a b' c --tta"),
    ],
)
def test_command_of_some_settings_gives_these_settings(script, flags):
    path = str(ROOT / script)
    args = utils.parse_flags(path, shlex.split(flags))
    python, name, *words = shlex.split(utils.command_of(path, args, without=["seed"]))
    assert (python, name) == ("python", script)
    assert utils.parse_flags(path, words) == args
    assert len(words) == len(shlex.split(flags))  # and nothing that is a default


def test_command_is_quoted_for_the_shell_of_the_system():
    words = ["python", "train.py", "--dataset", "my photos", "--weights", ""]
    assert utils.quote_command(words, windows=True) == (
        'python train.py --dataset "my photos" --weights ""'
    )
    assert utils.quote_command(words, windows=False) == (
        "python train.py --dataset 'my photos' --weights ''"
    )


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_every_constant_of_a_script_is_commented_and_read(script):
    """A comment is the flag's help; a constant that nothing reads would be a lie."""
    source = (ROOT / script).read_text()
    readers = source + (ROOT / "data.py").read_text() + (ROOT / "utils.py").read_text()
    for name in vars(utils.parse_flags(str(ROOT / script), [])):
        assert re.search(rf"^{name.upper()} = .*  # \S", source, re.MULTILINE), name
        assert re.search(rf'\b(args|settings)\.{name}\b|"{name}"', readers), f"{name} is not read"


# What cannot be right whatever the data and the machine: the flags, then the values.
EDGES = """
epochs batch-size image-size log-every: 0 -1 10000000000 nan x '' 1.5
early-stopping-patience: 0 -1 inf ''
scheduler-patience: -1 nan ''
seed: -1 1e3 '' 99999999999999999999
learning-rate: 0 -0.1 nan inf x '' 1e+30
momentum weight-decay scheduler-factor: -0.1 nan inf x '' 1e+30
scheduler-factor: 1
holdout-per-class: -1 500 nan ''
train-per-class: -1 501 x
flip grayscale: -0.1 1.1 nan x
crop-padding: -1 33 nan 1.5
brightness contrast saturation: -0.1 nan inf x
hue: -0.1 0.51 nan
rotation: -1 181 nan
watch device precision: '' x AUTO
data-dir checkpoint-dir: ''
no-such-flag: 1
"""


@pytest.mark.parametrize("line", EDGES.strip().splitlines())
def test_flag_at_its_edge_is_refused_before_a_file_is_written(line, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, values = line.split(":")
    for flag in flags.split():
        for value in shlex.split(values):
            err = refusal(train.main, [f"--{flag}", value])
            assert re.search(rf"--{flag}[ :].*{re.escape(value)}", err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train.py --batch_size 3", "--batch_size 3; did you mean --batch-size? --help"),
        ("train.py --lr 3", "--lr 3; did you mean --learning-rate? --help"),
        ("train.py --wd 3", "--wd 3; did you mean --weight-decay? --help"),
        ("train.py --epoch 3", "--epoch 3; did you mean --epochs? --help"),
        ("train.py --LR 3", "--LR 3; did you mean --learning-rate? --help"),
        ("train.py --frobnicate", "arguments: --frobnicate; --help lists the flags"),
        ("train.py -e 3", "arguments: -e 3; --help lists the flags"),
        ("train.py --demo --batch-size 1", "1: expected at least 2 images per process at 32 px"),
        *[(f"evaluate.py --device {x}", "--device") for x in ("''", "x", "CPU", "0")],
        *[
            (f"evaluate.py --{x} ''", f"--{x} '': ")
            for x in ("checkpoint", "data-dir", "results-dir")
        ],
        ("evaluate.py --checkpoint", "--checkpoint"),
        ("evaluate.py --images", "--images"),
        ("evaluate.py --export model.pt2 --images photo.jpg", "--export"),
        ("evaluate.py --tta yes", "yes"),
        ("evaluate.py --check x", "--check x"),
        ("evaluate.py photo.jpg", "photo.jpg"),
    ],
)
def test_command_that_cannot_be_right_is_answered_with_what_can(command, message, refusal):
    script, *argv = shlex.split(command)
    assert message in refusal({"train.py": train, "evaluate.py": evaluate}[script].main, argv)


@pytest.mark.parametrize(
    ("watch", "values", "patience", "best", "stops_after"),
    [
        ("loss", [3.0, 2.0, 2.0, 2.5, 1.9, 1.9, 2.0, 5.0], 3, [1, 2, 2, 2, 5, 5, 5, 5], 8),
        ("accuracy", [0.5, 0.6, 0.6], 1, [1, 2, 2], 3),  # it should rise
    ],
)
def test_early_stopping_counts_epochs_without_a_better_one(
    watch, values, patience, best, stops_after
):
    args = Namespace(watch=watch, early_stopping_patience=patience)
    assert not train.should_stop([], args)
    history = []
    for epoch, value in enumerate(values, start=1):
        history.append({"epoch": epoch, f"val_{watch}": value})
        assert utils.best_epoch(history, watch)["epoch"] == best[epoch - 1]
        assert train.should_stop(history, args) == (epoch == stops_after)


def test_seeds_of_the_same_sum_or_of_different_lengths_differ():
    parts = [(seed, 10 - seed) for seed in range(11)] + [(0,), (0, 0), (0, 0, 0), (0, 1)]
    assert len({utils.mix_seed(*numbers) for numbers in parts}) == len(parts)
    assert utils.mix_seed(1, 2) == utils.mix_seed(1, 2)


@pytest.mark.parametrize(
    ("device", "capability", "precision"),
    [
        ("cpu", {"avx512_bf16": True}, "bf16"),
        ("cpu", {"amx_bf16": True}, "bf16"),
        ("cpu", {"avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ("cuda", (9, 0), "fp16"),  # H100
        ("cuda", (7, 5), "fp16"),  # T4
        ("cuda", (7, 0), "fp16"),  # V100
        ("cuda", (6, 1), "fp32"),  # GTX 1080: its fp16 is a sixty-fourth as fast
        ("mps", None, "fp32"),
    ],
)
def test_precision_follows_the_hardware(device, capability, precision, monkeypatch):
    """The hardware is pretended: no machine has all of it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.choose_precision("auto", torch.device(device)) == precision
    assert utils.choose_precision("fp32", torch.device(device)) == "fp32"


USE_MEMORY = """
import resource, sys, torch, utils
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
exec(sys.argv[1])
before = resident()
tensors = [torch.ones(2**22) for _ in range(16)]  # 256 MB, freed from the last to the first
while tensors:
    tensors.pop()
print((resident() - before) / 2**28)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("first", "kept"), [("", 0), ("utils.choose_device('cpu')", 1)])
def test_on_a_cpu_freed_memory_is_kept(first, kept):
    """In each of five processes: in one of four or so, glibc never returns memory of its heap."""
    command = [sys.executable, "-c", USE_MEMORY, first]
    for _ in range(5):
        held = float(subprocess.check_output(command, cwd=ROOT, text=True))
        if kept:
            assert held > 0.9
        else:
            assert held < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_asked_for_and_missing_is_an_error():
    assert utils.choose_device("auto").type == "cpu"
    with pytest.raises(utils.UserError, match="--device cuda: torch .* finds none here"):
        utils.choose_device("cuda")


def test_a_driver_that_torch_cannot_use_is_not_called_no_gpu(monkeypatch):
    def old_driver() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)  # no such GPU to try it on
    with pytest.raises(utils.UserError, match="There is a GPU, but .* driver .* is too old"):
        utils.choose_device("auto")


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_torch_without_cuda_beside_an_nvidia_gpu_is_said_once(name, tmp_path, monkeypatch, capsys):
    """The driver's command is a file of its name, the build is pretended."""
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert utils.choose_device(name).type == "cpu"
    out = capsys.readouterr().out
    assert out.count("is built without CUDA and cannot use the NVIDIA GPU") == (name == "auto")


def test_gpu_of_a_mac_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert utils.choose_device("auto").type == "cpu"
    assert "the GPU of this Mac is used with --device mps" in capsys.readouterr().out


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538]"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "GPU memory is exhausted: less.\nall safe"),
        (torch.AcceleratorError("CUDA error: out of memory"), "exhausted: less.\nall safe"),
        (torch.AcceleratorError("CUDA error: bad"), "failed: CUDA error: bad\nall safe; .*: go"),
        (FloatingPointError("the loss is nan"), "the loss is nan.\nall safe"),
        (torch.distributed.DistNetworkError("closed"), "cannot be reached: .*\nall safe; .*: go"),
        (RuntimeError(f"{GLOO} Connection closed"), "cannot be reached: .*\nall safe; .*: go"),
        (RuntimeError("/home/gloo/weights.pth is damaged"), ""),
        (ValueError(f"{GLOO} Connection closed"), ""),
        (RuntimeError("our own bug"), ""),
        (KeyError("our own bug"), ""),
    ],
)
def test_failing_gpu_is_explained_and_continued_only_where_that_can_help(
    error, message, monkeypatch, capsys
):
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # pytest has handlers of its own
    monkeypatch.setattr(utils, "_command", "go")
    monkeypatch.setattr(utils, "_store", object())  # as if there were other processes
    expected = SystemExit if message else type(error)  # an error of ours keeps its traceback
    with pytest.raises(expected) as end, utils.explained_exit("all safe", "less"):
        raise error
    if message:
        assert end.value.code == 1
        assert re.fullmatch(rf"stopped  .*{message}\n", capsys.readouterr().err)


def test_lone_process_does_not_blame_another_one(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(RuntimeError), utils.explained_exit("all safe", "less"):
        raise RuntimeError(f"{GLOO} Connection closed")


def test_signal_that_nohup_ignores_stays_ignored(monkeypatch):
    installed = set()
    monkeypatch.setattr(signal, "signal", lambda signum, handler: installed.add(signum))
    ignored = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", lambda signum: ignored.get(signum, signal.SIG_DFL))
    with utils.explained_exit("all safe", "less"):
        pass
    assert installed == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def test_a_line_is_in_the_log_as_soon_as_it_is_said(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr("sys.stdout", log)
        utils.say("note", "said")
        assert (tmp_path / "log").read_text() == "note     said\n"
