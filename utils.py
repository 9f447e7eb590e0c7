"""What a run needs around its loop: flags, device, processes, checkpoints, messages."""

import argparse
import ast
import csv
import ctypes
import difflib
import functools
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None


class UserError(SystemExit):
    """An error that the user can fix. Uncaught: its message on stderr, no traceback, status 1."""


# ---- constants as flags -------------------------------------------------------------------------


class Constant(NamedTuple):
    """An ALL_CAPS literal of a script."""

    value: object
    meaning: str  # its comment
    allowed: list  # the range [low, high] or the choices that end the comment; [] for none
    group: str  # the comment line above its paragraph, "" if there is none


class Script(NamedTuple):
    docstring: str
    constants: dict[str, Constant]  # those that are flags, by their names in lower case
    demo_settings: dict[str, object]  # what --demo sets


def read_script(script: str) -> Script:
    """What the source of a script has for its flags. Raises UserError if a constant is no literal.

    A comment may end in the range of a number, whole unless low is a float, [low, high], or in the
    choices of a string, ["a", "b"]. A dict is no flag.
    """
    source = Path(script).read_text(encoding="utf-8-sig")  # some editors write a byte-order mark
    return _parse(Path(script).name, source)


@functools.cache
def _parse(script_name: str, source: str) -> Script:
    tree, lines = ast.parse(source), source.splitlines()
    constants, demo_settings = {}, {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if not (isinstance(target, ast.Name) and target.id.isupper()):
            continue
        line = lines[node.end_lineno - 1].encode()  # offsets count bytes
        comment = line[node.end_col_offset :].decode().strip()
        meaning, allowed = re.fullmatch(r"[\s#]*(.*?)\s*(\[.*\])?", comment).groups()
        try:
            value, allowed = ast.literal_eval(node.value), ast.literal_eval(allowed or "[]")
        except (ValueError, SyntaxError):
            raise UserError(
                f"{script_name}, line {node.lineno}: {target.id} must be a plain number, text or "
                'bool, and its comment may end in its range, [0, 10], or choices, ["a", "b"]'
            ) from None
        if target.id == "DEMO_SETTINGS":
            demo_settings = {name.lower(): setting for name, setting in value.items()}
        elif not isinstance(value, dict):
            group = _heading(lines[: node.lineno - 1])
            constants[target.id.lower()] = Constant(value, meaning, allowed, group)
    return Script(ast.get_docstring(tree) or "", constants, demo_settings)


def _heading(lines: list[str]) -> str:
    """The comment that begins the paragraph which these lines end in, or ""."""
    first = ""
    for line in reversed(lines):
        if not line.strip():
            break
        first = line
    return first.strip("# ") if first.startswith("#") else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _usage_error(f"{message}; {self.suggest_flag(message)}--help lists the flags")

    def suggest_flag(self, message: str) -> str:
        """The flag that --batch_size, --epoch or --lr was meant to be, as a question."""
        wrong = re.match(r"unrecognized arguments: --([\w-]+)", message)
        if not wrong:
            return ""
        name = wrong[1].lower().replace("_", "-")
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        initials = {"".join(word[0] for word in flag.split("-")): flag for flag in flags}
        if name in initials:
            return f"did you mean --{initials[name]}? "
        similar = difflib.get_close_matches(name, flags, 1)
        return f"did you mean --{similar[0]}? " if similar else ""


def _usage_error(message: str) -> NoReturn:
    """Ends the script with one line, from the first process of a machine, and exit status 2."""
    _end(f"{Path(sys.argv[0]).name}: {message}", status=2)


def refuse_flag(name: str, value: object, expected: str) -> NoReturn:
    """Ends the script with one line about a flag's value and exit status 2."""
    _usage_error(f"--{name.replace('_', '-')} {value!r}: expected {expected}")


def parse_flags(
    script: str, argv: list[str] | None = None, planned: dict[str, object] | None = None
) -> argparse.Namespace:
    """Makes a flag of every constant of a script, with its comment as the help, and checks it.

    EPOCHS = 60 becomes --epochs INT; a bool becomes --flag and --no-flag; a list takes several
    values. With --demo, the script's DEMO_SETTINGS replace its values, and so do those that are
    planned, by name; flags win over all. Returns the settings, with names in lower case. A bad
    flag, a value out of its range, or an empty string where the comment does not mention "" ends
    the script with one line and exit status 2.
    """
    docstring, constants, demo_settings = read_script(script)
    given = vars(_make_parser(script, docstring, constants).parse_args(argv))
    settings = {name: constant.value for name, constant in constants.items()}
    if given.get("demo", settings.get("demo")):
        settings |= demo_settings
    for name, value in (planned or {}).items():
        settings[name.lower()] = value
    settings |= given
    for name, value in settings.items():
        _check_setting(name, value, constants[name])
        settings[name] = _expand_home(value)
    return argparse.Namespace(**settings)


def _make_parser(script: str, docstring: str, constants: dict[str, Constant]) -> _Parser:
    """What parses the flags of a script. Those that are not given are not in its result."""
    parser = _Parser(
        prog=Path(script).name,
        usage="python %(prog)s [--FLAG VALUE ...]",
        description=docstring,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = {"": parser}
    for name, (value, meaning, allowed, heading) in constants.items():
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        limits = f" {allowed}" if allowed else ""
        options = {"help": f"{meaning}{limits} (default: {value!r})".replace("%", "%%")}
        if isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(value, list):
            options |= {"nargs": "+", "metavar": "PATH"}
        else:
            kind = type(allowed[0] if allowed else value)  # GRAYSCALE = 0 is a float
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        groups[heading].add_argument(f"--{name.replace('_', '-')}", **options)
    return parser


def _expand_home(value: object) -> object:
    """A path, or a list of them, with ~ replaced by the home folder, which --flag=~/x leaves."""
    if isinstance(value, list):
        return [os.path.expanduser(path) for path in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def command_of(script: str, args: argparse.Namespace, without: Iterable[str] = ()) -> str:
    """The command that gives a script the settings in args: a flag for each that is no default."""
    command = ["python", Path(script).name]
    for name, constant in read_script(script).constants.items():
        value, flag = vars(args).get(name, constant.value), name.replace("_", "-")
        if value == constant.value or name in without:
            continue
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        command.append(f"--{flag}")
        for word in value if isinstance(value, list) else [value]:
            command.append(f"{word:.15g}" if isinstance(word, float) else str(word))
    return quote_command(command)


def quote_command(words: list[str], windows: bool = sys.platform == "win32") -> str:
    """The words of a command as one line for the shell."""
    return subprocess.list2cmdline(words) if windows else shlex.join(words)


def _check_setting(name: str, value: object, constant: Constant) -> None:
    """Refuses a value that is out of its range, not among its choices, or an empty string."""
    allowed = constant.allowed
    if not allowed:
        if value == "" and '""' not in constant.meaning:
            refuse_flag(name, value, constant.meaning)
    elif isinstance(allowed[0], str):
        if value not in allowed:
            refuse_flag(name, value, f"one of {', '.join(allowed)}")
    else:
        low, high = allowed
        kinds = (int, type(low))  # a whole number will do for a fraction
        if not (isinstance(value, kinds) and low <= value <= high):  # refuses NaN too
            refuse_flag(name, value, f"{low:,} to {high:,}")


# ---- device and precision -----------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device that is named; "auto" is CUDA, else the CPU. Raises UserError if it is unusable.

    MPS is untested, so "auto" never chooses it.
    """
    if name in ("auto", "cuda") and _can_use_cuda():
        return _set_up_gpu(local_rank)
    if name == "cuda" or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(
            f"--device {name}: torch {torch.__version__} finds none here. Try --device auto"
        )
    if name == "mps":
        return torch.device("mps")
    if name == "auto":
        _mention_idle_gpu()
    _keep_freed_memory()
    return torch.device("cpu")


def _can_use_cuda() -> bool:
    """Whether there is a GPU for torch. Raises UserError if its driver is too old."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if caught and not available:
        reason = str(caught[0].message).splitlines()[0]
        raise UserError(
            f"There is a GPU, but torch {torch.__version__} cannot use it: {reason}\n"
            "Update the driver, install a torch built for it, or run with --device cpu"
        )
    return available


def _mention_idle_gpu() -> None:
    """Says why "auto" is the CPU on a machine that has a GPU."""
    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if torch.backends.mps.is_available():
        say("note", "the GPU of this Mac is used with --device mps, which is untested")
    elif nvidia and torch.version.cuda is None:
        say(
            "note",
            f"torch {torch.__version__} is built without CUDA and cannot use the NVIDIA GPU here; "
            "https://pytorch.org/get-started has the command that installs one that can",
        )


def _keep_freed_memory() -> None:
    """Lets glibc use freed memory again, as torch does on a GPU: mallopt(3). Others do nothing.

    By default it returns large blocks to the system, which clears every page before it hands it out
    again: up to a seventh of a training step's time and two fifths of a forward pass's.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap too
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def _set_up_gpu(local_rank: int) -> torch.device:
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs, but one per process is needed: "
            "lower torchrun's --nproc-per-node"
        )
    device = torch.device("cuda", local_rank)
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise UserError(f"GPU {local_rank} is full: another program is using it") from error
        raise UserError(  # this build has no kernels for it, or it is broken
            f"torch {torch.__version__} cannot compute on {torch.cuda.get_device_name(device)}: "
            f"{str(error).splitlines()[0]}\nInstall a torch built for it, or run with --device cpu"
        ) from error
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # shapes are fixed: let cuDNN try its algorithms once
    torch.set_float32_matmul_precision("high")  # TF32 for the float32 head
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Resolves "auto": fp16 on a GPU and bf16 on a CPU, where they are fast at it; else fp32.

    On a GPU, torch gives fp16 cuDNN's batch norm and bf16 its own, slower one: 5,393 and 4,245
    images/s on an H200. GPUs before compute capability 7.0 lack fast fp16.
    """
    if name != "auto":
        return name
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return "fp16"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return "bf16"
    return "fp32"


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works; it needs Triton on GPUs and a C++ compiler on CPUs."""
    try:
        torch.compile(lambda x: x.sin() + x.cos())(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001, its type depends on what is missing
        reason = str(error).splitlines()[0]
        say("warning", f"torch.compile does not work here, continuing without it: {reason}")
        return False
    return True


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of images and weights: channels_last, the faster one for convolutions.

    Contiguous on MPS, where batch norm has wrong gradients for channels_last: pytorch issue 175189.
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def device_name(device: torch.device) -> str:
    """The GPU's model, or "CPU" with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else "MPS"


def mix_seed(*numbers: int) -> int:
    """One seed from several numbers below 2**32, mixed by numpy, because sums would collide."""
    padded = [len(numbers), *numbers]  # to numpy, (1,) and (1, 0) are the same
    return int(np.random.SeedSequence(padded).generate_state(1, np.uint64)[0])


# ---- processes, as torchrun starts them ---------------------------------------------------------


class Processes(NamedTuple):
    """This process's place among those of the run; by default it is the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    machine: int = 0  # its number among those of the run
    machines: int = 1
    restarts: int = 0  # how often torchrun has restarted the workers
    max_restarts: int = 0
    launcher: str = ""  # identifies one torchrun; unchanged when it restarts its workers


def this_process() -> Processes:
    """Reads the place of this process from torchrun's environment variables."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes()
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"]
    names += ["TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"]
    numbers = [int(os.environ[name]) for name in names]
    # torchrun's log folder, whose name is random, has files ATTEMPT/LOCAL_RANK/error.json.
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    log_folder = error_file.parent.parent.parent.name
    return Processes(*numbers, launcher=f"{os.environ['TORCHELASTIC_RUN_ID']}/{log_folder}")


_store: dist.Store | None = None  # what the processes that connect() has brought together share
_leaves = threading.Event()  # set once this process needs the others no longer
_first_failure: list | None = None  # of all processes: its rank, and why it ended
PATIENCE = timedelta(hours=12)  # how long they wait for one that downloads or decodes pictures
START = 600  # seconds that they wait for one that has not begun
SILENCE = 20  # seconds without a sign of life after which a process counts as lost


def connect(device_name: str) -> torch.device:
    """Chooses this process's device and, under torchrun, joins the others: NCCL on GPUs, else gloo.

    Raises UserError for restarts over several machines, of which each would count its own.
    """
    global _store
    this = this_process()
    if not this.launcher:
        return choose_device(device_name)
    if this.machines > 1 and this.max_restarts:
        raise UserError(
            f"--max-restarts {this.max_restarts} on {this.machines} machines: expected 0, because "
            "torchrun counts restarts per machine.\nStart it again, yourself or from your "
            "scheduler, with --resume-if-saved"
        )
    _store = _open_store(START)
    _store.add(f"beats of rank {this.rank}", 1)  # before any of them goes on
    threading.Thread(target=_watch_others, daemon=True).start()
    device = choose_device(device_name, this.local_rank)
    options = {"backend": "gloo"}
    if device.type == "cuda":
        options = {"backend": "nccl", "device_id": device}
    if len(set(exchange("device", device.type))) > 1 or device.type == "mps":
        raise UserError("The processes need a GPU each, or all of them --device cpu")
    dist.init_process_group(
        **options,
        store=dist.PrefixStore("group", _store),
        rank=this.rank,
        world_size=this.world_size,
        timeout=timedelta(minutes=10),
    )
    say("torchrun", f"processes: {this.world_size}, {options['backend']}")
    return device


def _open_store(seconds: float) -> dist.Store:
    """The store that the processes of the run share: torchrun's, or else rank 0 keeps it.

    Raises UserError if nothing answers at its address for so many seconds.
    """
    this = this_process()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps_it = this.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + seconds
    while not keeps_it:  # in Python, because TCPStore would not let a signal end its waiting
        try:
            socket.create_connection(address, timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"No process of the run answers at {address[0]}, port {address[1]}: "
                    f"{reason_of(error)}.\nStart torchrun on every machine, with one endpoint"
                ) from error
            time.sleep(0.2)
    options = {"is_master": keeps_it, "wait_for_workers": False, "multi_tenant": True}
    store = dist.TCPStore(*address, **options)
    # Restarted workers must not read what the ones before them left in torchrun's store.
    return dist.PrefixStore(f"{os.environ['TORCHELASTIC_RUN_ID']}, attempt {this.restarts}", store)


def _watch_others() -> None:
    """Ends this process soon after another one has failed or fallen silent, wherever it waits.

    It runs in a thread of its own, with a connection of its own, because a collective neither
    returns nor handles signals until every process has come. Each process watches the next one.
    """
    global _first_failure
    store = None
    try:
        store = _open_store(START)
        if not _wait_for_failure(store):
            return
    except (dist.DistError, UserError):  # the store cannot be reached
        if _leaves.wait(5):  # nor need it be: this process has finished
            return
        if _first_failure is None:  # and nobody is left to ask why
            nobody = -1
            reason = "another process cannot be reached: the one that keeps the run's store is gone"
            _first_failure = [nobody, reason]
    if _leaves.is_set():  # it is ending already
        return
    signal.raise_signal(signal.SIGTERM)  # the main thread ends the script, unless it waits
    if not _leaves.wait(5):  # in a collective
        os._exit(_report("stopped  another process cannot be reached", store=store))


def _wait_for_failure(store: dist.Store) -> bool:
    """Gives signs of life and looks for those of the next process; whether any process has failed.

    Returns False once this process needs the others no longer.
    """
    global _first_failure
    this = this_process()
    neighbour = (this.rank + 1) % this.world_size
    last_beats, last_change = 0, time.monotonic()
    while not _leaves.wait(0.5):
        store.add(f"beats of rank {this.rank}", 1)
        beats = store.add(f"beats of rank {neighbour}", 0)
        if beats != last_beats or store.check([f"gone, rank {neighbour}"]):
            last_beats, last_change = beats, time.monotonic()
        patience = SILENCE if beats else START
        if time.monotonic() - last_change > patience:
            _announce(store, neighbour, f"rank {neighbour} gives no sign of life")
        if store.check(["failed"]):  # read now: the process that keeps the store may end first
            _first_failure = json.loads(store.get("failed"))
            return True
    return False


def _announce(store: dist.Store, rank: int, reason: str) -> list:
    """Tells all processes that one has failed, and why; returns the first such, [rank, why]."""
    return json.loads(store.compare_set("failed", "", json.dumps([rank, reason])))


def _arrive(store: dist.Store, what: str, value: str = "") -> list[str]:
    """Says that this process has come so far; returns the keys with which all of them say so."""
    this = this_process()
    keys = [f"{what}, rank {rank}" for rank in range(this.world_size)]
    store.set(keys[this.rank], value)
    return keys


def _wait_for(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Waits until the store has all keys, but no longer than so many seconds; whether it has."""
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def exchange(what: str, value: str = "") -> list[str]:
    """Waits until every process has called this; returns the values that they gave, by rank.

    It waits in Python, where signals are handled, and longer than a process group would. Raises
    UserError if one does not come. Each name can be used once.
    """
    if _store is None:
        return [value]
    keys = _arrive(_store, what, value)
    if not _wait_for(_store, keys, PATIENCE.total_seconds()):
        late = next(key for key in keys if not _store.check([key]))
        raise UserError(f"Waited {PATIENCE} for another process: {late}")
    return [_store.get(key).decode() for key in keys]


def require_same_run(args: argparse.Namespace, facts: dict[str, object]) -> None:
    """Raises UserError, on every process, unless the constants and facts of all are the same."""
    may_differ = WHERE_AND_HOW - {"log_every"}  # at readings of the loss the clocks are compared
    constants = {name.upper(): x for name, x in vars(args).items() if name not in may_differ}
    own = constants | facts | {"torch": torch.__version__}
    first, *others = [json.loads(answer) for answer in exchange("facts", json.dumps(own))]
    for rank, other in enumerate(others, start=1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise UserError(
                    f"The processes were started differently: {name} is "
                    f"{shorten(repr(first.get(name)))} on rank 0, but "
                    f"{shorten(repr(other.get(name)))} on rank {rank}.\n"
                    "Start them with the same flags, files and data"
                )


def from_rank_0(what: str, read: Callable[[], dict | None]) -> dict | None:
    """What read() returns on rank 0, on every process. Each name can be used once."""
    value = read() if is_first() else None
    exchange(what)  # which waits longer than a collective
    return of_rank_0(value)


def of_rank_0(value: object) -> object:
    """Rank 0's value, on every process."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather(values: Tensor) -> Tensor:
    """The values, of the same shape on every process, of all processes: (world_size, ...)."""
    if not dist.is_initialized():
        return values[None]
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


def mean_over_processes(*sums: Tensor, count: int) -> list[float]:
    """Each sum over this process's images, as a mean over those of all processes."""
    values = torch.stack([*sums, torch.full_like(sums[0], count)])
    if dist.is_initialized():
        dist.all_reduce(values)
    *totals, total_count = values.tolist()
    return [total / total_count for total in totals]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every process the values of rank 0, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def disconnect() -> None:
    """Leaves the other processes, if there are some; rank 0, which may keep the store, is last."""
    if _store is None:
        return
    _leaves.set()
    gone = _arrive(_store, "gone")
    if is_first():
        _wait_for(_store, gone, seconds=10)
    dist.destroy_process_group()


# ---- the clock of --minutes ---------------------------------------------------------------------


class Clock:
    """How much of MINUTES is left, and how many epochs it is enough for; without limit if 0.

    Every process measures for itself, and all decide by rank 0's result: they call these methods at
    the same places.
    """

    head_share = 0.1  # of the time, for the head, where there is none for the network
    # Fewer steps make the network worse than its head alone: 32 steps of 64 images cost 4.6 points
    # (2.9 to 6.3) of 69.2 % on 2,000 held-out images, 94 cost 1.4 (-0.4 to 3.1), 250 gained 2.6.
    least_steps = 150

    def __init__(self, begin: float, args: argparse.Namespace) -> None:
        """begin: time.perf_counter() when the script was started."""
        self.is_limited = args.minutes > 0
        self.begin = self.closed_at = begin
        self.seconds = 60 * args.minutes
        self.val_images = 0
        self.ending_seconds = 4 if args.curves else 1  # to draw them, and for Python to end
        self.save_seconds = 0.0  # of last.pt and best.pt
        self.image_seconds = 0.0  # of a forward pass, per image, as measured last
        self.epoch_seconds = 0.0  # at the pace of the last readings; 0 before the first
        self.trained = -1 if args.head_epochs else 0  # the last epoch that was trained
        self.done = 0.0  # epochs at the last reading, a fraction included
        self.read_at = begin  # time.perf_counter() of the last reading
        self.next_reading = math.inf  # epochs at which the next is due

    @property
    def closing_seconds(self) -> float:
        """The seconds of a validation, a tenth more than measured, and of the save after it."""
        return 1.1 * self.val_images * self.image_seconds + self.save_seconds

    def seconds_left(self) -> float:
        """The time for training: without a last validation, its save and the end of the script."""
        if not self.is_limited:
            return math.inf
        end = self.begin + self.seconds - self.closing_seconds - self.ending_seconds
        return of_rank_0(end - time.perf_counter())

    def start_epoch(self, epoch: int) -> float:
        """The end of the training at the pace of the epochs before; infinite before the first."""
        if not self.is_limited:
            return math.inf
        self.done = self.next_reading = epoch - 1.0
        self.read_at = time.perf_counter()
        if not self.epoch_seconds:
            return math.inf
        return of_rank_0(self.done + self.seconds_left() / self.epoch_seconds)

    def read(self, done: float) -> float:
        """The end of the training, in epochs, at the pace since the last reading and before it.

        done: epochs so far, a fraction included. The next reading is due half-way to the end, so
        that readings become frequent where there is little time to correct an error.
        """
        if not self.is_limited:
            return math.inf
        now = time.perf_counter()
        pace = (now - self.read_at) / (done - self.done)
        self.epoch_seconds = (pace + (self.epoch_seconds or pace)) / 2
        self.read_at, self.done = now, done
        end = of_rank_0(done + max(0, self.seconds_left()) / self.epoch_seconds)
        self.next_reading = (done + end) / 2
        return end

    def network_seconds(self, batch_size: int) -> float:
        """The least time in which to train the network; a step takes about 2.5 forward passes."""
        return self.least_steps * 2.5 * batch_size * self.image_seconds

    def is_network_worth_it(self, batch_size: int) -> bool:
        """Whether more time than network_seconds() is left."""
        return of_rank_0(self.seconds_left() > self.network_seconds(batch_size))

    def is_closing_worth_it(self) -> bool:
        """Whether a validation and a save are cheap beside the training since the last ones."""
        if not self.is_limited:
            return True
        is_cheap = 20 * self.closing_seconds < time.perf_counter() - self.closed_at
        fits = self.seconds_left() > 2 * self.closing_seconds
        return of_rank_0(is_cheap and fits)

    def is_over(self, history: list[dict], batch_size: int, steps: int) -> bool:
        """Whether a run that is resumed had ended: it is validated, with no time for another step.

        steps: per epoch.
        """
        if not (self.is_limited and history and history[-1]["epoch"] == self.trained):
            return False
        if self.trained == 0:
            return not self.is_network_worth_it(batch_size)
        return of_rank_0(self.seconds_left() < self.epoch_seconds / steps)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs to go on with the time that is left."""
        return {
            "seconds_used": time.perf_counter() - self.begin,
            "save_seconds": self.save_seconds,
            "image_seconds": self.image_seconds,
            "epoch_seconds": self.epoch_seconds,
            "trained": self.trained,
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.begin -= state["seconds_used"]
        self.save_seconds = state["save_seconds"]
        self.image_seconds = state["image_seconds"]
        self.epoch_seconds = state["epoch_seconds"]
        self.trained = state["trained"]
        self.done = state.get("done", 0.0)  # which the first version lacks


# ---- checkpoints: format, writing, reading, finding, restoring ----------------------------------

FORMAT = "resnet50-cifar100 checkpoint 1"
CONTENTS = {
    "model": dict,  # state_dict of the bare model
    "epoch": int,  # epochs trained
    "constants": dict,  # of the run, overrides applied
    "precision": str,  # a key of DTYPES
    "dataset": str,  # "cifar100", "digits", or the number and checksum of a folder's pictures
    "classes": list,  # their names
    "history": list,  # a dict of figures per epoch
}  # last.pt also holds launcher, validation and the state of all else that training changes
EXTRAS = ("history.csv", "training_curves.png")  # whose loss ends no run
RUN_FILES = ("last.pt", "best.pt", *EXTRAS)
CHECKPOINT_PATIENCE = 5  # seconds for which another program may keep last.pt or best.pt
# Constants that say where and how a run is done, not what it computes
WHERE_AND_HOW = {"dataset", "data_dir", "checkpoint_dir", "device", "log_every"}
WHERE_AND_HOW |= {"val_images", "val_batch_size", "resume", "resume_if_saved", "curves"}
# Constants that the speed of the machine decides with MINUTES, unless flags do
CHOSEN_BY_THE_CLOCK = {"image_size", "freeze_stages", "freeze_batch_norm"}


@contextmanager
def atomic_write(path: Path, mode: str) -> Iterator:
    """Opens a temporary file that replaces path once it is complete and on disk.

    An error, on a full disk for instance, leaves the earlier file intact.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _move(temporary, path)
    finally:  # it is there only after an error
        with suppress(OSError):
            temporary.unlink()


def _move(file: Path, target: Path) -> None:
    """Replaces target by file; tries again for a while, but for extras, where Windows refuses to.

    It does while a virus scanner or a reader has one of the two open.
    """
    patience = 0 if target.name in EXTRAS else CHECKPOINT_PATIENCE
    deadline = time.monotonic() + patience
    while True:
        try:
            os.replace(file, target)
            return
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


@contextmanager
def _extra(path: Path) -> Iterator[None]:
    """Prints what went wrong with a file that is not worth a run, and goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001, its type depends on what is wrong
        say("note", f"{path} could not be written: {reason_of(error)}")


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes tensors and plain types, all or nothing. Raises UserError for a full disk."""
    try:
        with atomic_write(path, "wb") as file:
            torch.save({"format": FORMAT} | state, file)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):  # which torch.save wraps in a RuntimeError
            raise
        raise UserError(f"{path} could not be written: {reason_of(cause)}.\n{_state()}") from error


def save_run(
    folder: Path,
    metadata: dict,
    parts: dict[str, object],
    history: list[dict],
    is_best: bool = False,
) -> None:
    """Writes best.pt if the last epoch is the best, then last.pt and history.csv: rank 0 does.

    parts: what training changes, by name, each with a state_dict(); best.pt holds "model" alone.
    best.pt comes first, so that no last.pt on disk is ahead of the best.pt beside it. A signal
    waits for the end.
    """
    with _signals_wait():
        if is_first():
            epoch = history[-1]["epoch"] if history else 0
            result = metadata | {"epoch": epoch, "history": history}
            if is_best:
                save_checkpoint(folder / "best.pt", result | {"model": parts["model"].state_dict()})
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(folder / "last.pt", result | states)
            if history:
                write_history(folder / "history.csv", history)
        _note_what_is_safe(folder / "last.pt", history)


def write_history(path: Path, history: list[dict]) -> None:
    """Writes the figures of each epoch as a row. Never fails: what went wrong is printed."""
    names = [name for name in history[0] if name != "head"]
    with _extra(path), atomic_write(path, "w") as file:
        rows = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        rows.writerows(history)


def draw_progress(folder: Path, history: list[dict], watch: str, at_once: bool = False) -> None:
    """Redraws training_curves.png in the folder, at most every ten seconds: rank 0 does.

    Never fails: what went wrong is printed.
    """
    if not is_first():
        return
    path = folder / "training_curves.png"
    with _extra(path):
        if path.exists() and not at_once and time.time() - path.stat().st_mtime < 10:
            return
        figure = draw_curves(history, watch)
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png", dpi=100)


def draw_curves(history: list[dict], watch: str) -> "Figure":  # noqa: F821, see below
    """Loss, accuracy and learning rate by epoch, the head's own before epoch 0; the best epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, so not for start
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    best = best_epoch(history, watch)
    column = {name: [row[name] for row in history] for name in history[-1]}
    epochs, rates = column["epoch"], column["learning_rate"]
    training, first = "training, augmented", 0
    if epochs[0] == 0:  # it trains the head on plain images, at a rate of its own
        training, first = "training, augmented from epoch 1", 1
    head = history[0].get("head", [])
    head_places = [i / len(head) - 1 for i in range(1, len(head) + 1)]
    dots = {"ms": 4 if len(epochs) <= 50 else 0}
    star = f"best epoch by validation {watch}: {best['epoch']:.0f}"
    figure = Figure((11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would open a window
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for name, axes, index in (("loss", loss_axes, 0), ("accuracy", accuracy_axes, 1)):
        axes.plot(epochs, column[f"train_{name}"], "o--", label=training, **dots)
        axes.plot(epochs, column[f"val_{name}"], "s-", label="validation", **dots)
        axes.plot(best["epoch"], best[f"val_{name}"], "*", ms=15, color="crimson", label=star)
        if head:
            values = [pair[index] for pair in head]  # of loss and accuracy
            axes.plot(head_places, values, label="the head's epochs, together -1 to 0")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if epochs[first:]:
            right = axes.twinx()
            right.plot(epochs[first:], rates[first:], ":", color="gray", drawstyle="steps-mid")
            right.set(ylabel="learning rate (dotted)", ylim=(0, None))
    loss_axes.set(ylabel="loss (cross-entropy, nats)", ylim=(0, None))
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(*accuracy_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def load_safely(path: str | Path, zip_only: bool = True) -> object:
    """torch.load onto the CPU, after the checks it lacks; runs no code from the file.

    It verifies no checksum and unpacks deflated bombs. zip_only refuses its format of before 2020,
    which has no checksums. Raises any error unchanged.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            _check_archive(file)
        elif zip_only:
            raise ValueError("it is not a checkpoint, or cut short")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, so torch.save did not write it")
        if sum(member.file_size for member in members) > file.seek(0, os.SEEK_END):
            raise ValueError("it claims more bytes than it has")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} in it fails its checksum")


def require_sound(state_dict: dict[str, Tensor]) -> None:
    """Raises ValueError for weights that are not finite, or that claim more than they have."""
    for tensor in state_dict.values():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError("it claims more bytes than it has")
        if not tensor.isfinite().all():
            raise ValueError("its weights are not finite")


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint of train.py onto the CPU; runs no code from it. Raises UserError.

    Constants that were added since it was written have their defaults in train.py.
    """
    try:
        checkpoint = load_safely(path)
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
            raise ValueError("it was not written by this train.py")
        for name, kind in CONTENTS.items():
            if not isinstance(checkpoint.get(name), kind):
                raise TypeError(f"its entry {name!r} is missing or not a {kind.__name__}")
        require_sound(checkpoint["model"])
        for name in ("batch_size", "image_size", "holdout_per_class", "watch"):  # in every version
            if name not in checkpoint["constants"]:
                raise ValueError(f"its constant {name.upper()} is missing")
    except FileNotFoundError:
        others = sorted(path.parent.glob(f"*/{path.name}"), key=os.path.getmtime)
        advice = f"; another run's is {others[-1]}" if others else ""
        raise UserError(f"{path} not found. Train one with: python train.py{advice}") from None
    except Exception as error:
        raise UserError(
            f"{path} cannot be used: {reason_of(error)}.\n"
            "Expected a checkpoint written by train.py: use another one, or train again"
        ) from error
    checkpoint["constants"] = with_defaults(checkpoint)
    return checkpoint


def reason_of(error: Exception) -> str:
    """What an error says, on one line, without a full stop."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    lines = text.splitlines()
    line = lines[-1] if lines[0].endswith(":") else lines[0]  # the first is a mere heading
    return shorten(line).rstrip(".")


def shorten(text: str) -> str:
    """At most 200 characters of a text, on one line."""
    return textwrap.shorten(text, 200, placeholder=" ...")


def with_defaults(run: dict) -> dict:
    """The constants of a run; one that was added since has its default in train.py."""
    flags = read_script(str(Path(__file__).with_name("train.py"))).constants
    constants = {name: constant.value for name, constant in flags.items()}
    constants["dataset"] = run["dataset"]
    constants |= run["constants"]
    return constants


def find_checkpoint(path: Path, args: argparse.Namespace) -> dict | None:
    """The checkpoint that this run continues: with --resume, or after torchrun restarted it."""
    if args.resume or (args.resume_if_saved and path.exists()):
        return load_checkpoint(path)
    this = this_process()
    if this.restarts and path.exists():
        checkpoint = load_checkpoint(path)
        if checkpoint.get("launcher") == this.launcher:
            return checkpoint  # else an earlier run's: this one was restarted before its first save
    return None


def require_same_settings(checkpoint: dict, path: Path, args: argparse.Namespace) -> None:
    """Raises UserError if a constant differs that determines what the checkpoint's run computes."""
    may_change = {"minutes", "epochs", "scheduler_patience", "early_stopping_patience"}
    may_change |= WHERE_AND_HOW
    schedule = checkpoint["constants"]["schedule"]
    if schedule != "plateau":
        may_change.remove("epochs")  # the curve ends there: another number would move it
    if not (args.minutes and checkpoint["constants"]["minutes"]):
        may_change.remove("minutes")  # a run has a clock from its start, or never
    for name, value in vars(args).items():
        stored = checkpoint["constants"].get(name)
        if value != stored and name not in may_change:
            reason = f", where its {schedule} schedule ends" if name == "epochs" else ""
            raise UserError(
                f"{path} was trained with {name.upper()} = {stored!r}{reason}, "
                f"now it is {value!r}.\n"
                "Set it back to continue that run, or start a new one without --resume"
            )


def restore(checkpoint: dict, path: Path, parts: dict[str, object], data_facts: dict) -> None:
    """Loads each part's state from the checkpoint. Raises UserError if it does not fit.

    data_facts: "classes", "dataset" and "validation", which must be those of the checkpoint.
    """
    with explained_misfit(path):
        if checkpoint["classes"] != data_facts["classes"]:
            raise ValueError("its classes are not those of the data set")
        for name, use in (("dataset", "trained"), ("validation", "validated")):
            was, now = checkpoint.get(name, data_facts[name]), data_facts[name]
            if was != now:
                raise ValueError(f"it was {use} on other images: {was}; the data set has {now}")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        for parameter, state in parts["optimizer"].state.items():  # torch checks no shapes
            for name, value in state.items():
                if torch.is_tensor(value) and value.dim():
                    if value.shape != parameter.shape:
                        raise ValueError("the optimizer's state has other shapes than the model")
                    # Fused SGD wants the parameter's strides, which differ on MPS.
                    state[name] = torch.empty_like(parameter).copy_(value)
    _note_what_is_safe(path, checkpoint["history"])
    place = f"after epoch {checkpoint['epoch']}" if checkpoint["history"] else "at its start"
    say("resume", f"{path}, {place}")
    if is_first() and checkpoint["history"] and not path.with_name("best.pt").exists():
        say("note", "there is no best.pt beside it; one is written at the next best epoch")


@contextmanager
def explained_misfit(path: str | Path, target: str = "this program") -> Iterator[None]:
    """Raises UserError where a file's contents do not fit what they are loaded into."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path} does not fit {target}: {reason_of(error)}") from error


def best_epoch(history: list[dict], watch: str) -> dict:
    """The figures of the best epoch by validation "loss" or "accuracy", the first of several."""
    sign = 1 if watch == "accuracy" else -1
    return max(history, key=lambda row: sign * row[f"val_{watch}"])


def move_aside(folder: Path) -> None:
    """Moves an earlier run's files, if there are any, into a new folder, and says so: rank 0 does.

    best.pt goes after last.pt, so that no last.pt is left without it. Raises UserError if one of
    the two cannot be moved.
    """
    files = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if not is_first() or not files:
        return
    aside = folder / f"earlier-{datetime.now():%Y%m%d-%H%M%S-%f}"
    try:
        aside.mkdir()
        for file in files:
            if file.name in EXTRAS:
                with _extra(aside / file.name):
                    _move(file, aside / file.name)
            else:
                _move(file, aside / file.name)
    except OSError as error:
        raise UserError(
            f"The earlier run in {folder} cannot be moved to {aside}: {reason_of(error)}. "
            "Move it yourself, or choose another --checkpoint-dir"
        ) from error
    say("earlier", f"the run that was in {folder} is now in {aside}")


def lock_folder(folder: Path) -> TextIO | None:
    """Creates a folder and keeps other runs out while the returned file is open: rank 0 does.

    Removes what a run that was killed while it saved has left there. Raises UserError if the folder
    cannot be written, or another run holds it.
    """
    if not is_first():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {reason_of(error)}. Choose another --checkpoint-dir"
        ) from error
    try:
        locked = lock(folder / ".lock")
    except BlockingIOError:
        raise UserError(
            f"Another run is using {folder}. Wait for it, or choose another --checkpoint-dir"
        ) from None
    except OSError as error:
        reason = reason_of(error)
        say("note", f"{folder} is not locked, so keep other runs out yourself: {reason}")
        return None
    for name in RUN_FILES:
        with suppress(OSError):
            (folder / f"{name}.tmp").unlink()
    return locked


def lock(path: Path, wait: bool = False) -> TextIO:
    """The file, made if it is missing, locked until it is closed or this process ends.

    Raises BlockingIOError if another process has locked it, unless this one waits for that, and
    another OSError where there are no locks, as on Windows and some network disks.
    """
    if fcntl is None:
        raise OSError("there are no locks on Windows")
    try:
        file = open(path, "a")  # noqa: SIM115, who unlocks it closes it
    except PermissionError:  # another user has made it: to read it is enough
        file = open(path)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


# ---- messages -----------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is the run's first process, which alone prints and shows progress bars."""
    return this_process().rank == 0


def say(label: str, text: str) -> None:
    """Prints one labelled line from the run's first process, at once also into a pipe."""
    if is_first():
        print(f"{label:<8} {text}", flush=True)


SECONDS_PER_LINE = 60  # between two lines about progress in a log


class _Log:
    """sys.stdout or sys.stderr, where what cannot be written, on a full disk for instance, is lost.

    Unless it is a terminal, progress bars become a line about every minute.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last_line = time.monotonic()

    def write(self, text: str) -> int:
        if not text.startswith("\r") or self.isatty():
            self._attempt(self.stream.write, text)
        elif text.strip() and time.monotonic() - self.last_line >= SECONDS_PER_LINE:
            self._attempt(self.stream.write, f"{text.strip()}\n")  # a bar, as tqdm draws it
            self.last_line = time.monotonic()
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, operation: Callable, *args: str) -> None:
        try:
            operation(*args)
        except BrokenPipeError:
            self.stream = open(os.devnull, "w")  # noqa: SIM115, or Python's last flush would fail
            raise
        except (OSError, ValueError):  # ValueError: it is closed
            pass

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def _prepare_stream(stream: TextIO | None) -> TextIO:
    """What sys.stdout or sys.stderr is replaced with, so that no run ends because of its log."""
    if stream is None or getattr(stream, "closed", False):  # pythonw has none
        return open(os.devnull, "w")
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's
        return stream
    stream.reconfigure(errors="backslashreplace")  # for letters that it cannot encode
    return _Log(stream)


# ---- how a script ends --------------------------------------------------------------------------

# Ctrl-C, and what terminals and schedulers send; Windows has the first two
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [signal.Signals[name] for name in SIGNAL_NAMES if hasattr(signal, name)]

_safe = "nothing is saved yet"  # what of the run is on disk
_command = ""  # which continues it


def _note_what_is_safe(path: Path, history: list[dict]) -> None:
    global _safe, _command
    flags = [flag for flag in sys.argv[1:] if flag != "--resume"]
    if "--resume-if-saved" not in flags:
        flags.append("--resume")
    launcher = "torchrun ..." if this_process().launcher else "python"
    saved = f"epoch {history[-1]['epoch']}" if history else "the start"
    _safe = f"{saved} is safe in {path}"
    _command = f"{launcher} {quote_command(['train.py', *flags])}"


def _state() -> str:
    """What is safe, and how to continue from it."""
    return f"{_safe}; to continue: {_command}" if _command else _safe


class _Stopped(BaseException):
    """A signal that asks the script to end."""


def _stop(signum: int, frame: object) -> None:
    raise _Stopped(signum)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that explained_exit() handles wait for the end of the block.

    torch.save would turn an exception in the middle of a write into one of its own.
    """
    handled = [signum for signum in SIGNALS if signal.getsignal(signum) == _stop]
    waiting = []
    for signum in handled:
        signal.signal(signum, lambda signum, frame: waiting.append(signum))
    try:
        yield
    finally:
        for signum in handled:
            signal.signal(signum, _stop)
    if waiting:
        raise _Stopped(waiting[0])


@contextmanager
def explained_exit(safe: str, memory_advice: str) -> Iterator[None]:
    """Ends the script with a message in place of a traceback when it is cut short.

    That is an error the user can fix; Ctrl-C, SIGTERM and what else schedulers send (exit status
    128 + the signal's number); a closed output pipe; a GPU or another process that fails; and,
    where continuing would only repeat it, a loss that is not finite or exhausted GPU memory.
    """
    global _safe
    _safe = safe
    sys.stdout, sys.stderr = _prepare_stream(sys.stdout), _prepare_stream(sys.stderr)
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(signum, _stop)
    try:
        yield
    except BaseException as error:
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # a second one must not spoil the message
        _explain(error, memory_advice)
        raise


def _explain(error: BaseException, memory_advice: str) -> None:
    """Ends the script if this error has a message; returns if its traceback is to be seen."""
    if isinstance(error, _Stopped):
        _end(f"\nstopped  {_state()}", 128 + error.args[0])
    if isinstance(error, BrokenPipeError):
        _end(f"stopped  the output pipe was closed.\n{_state()}")
    if isinstance(error, FloatingPointError):
        _end(f"stopped  {error}.\n{_safe}")
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        if "out of memory" in str(error):
            _end(f"stopped  GPU memory is exhausted: {memory_advice}.\n{_safe}")
        _end(f"stopped  the GPU failed: {reason_of(error)}\n{_state()}")
    if _is_of_another_process(error):
        _end(f"stopped  another process cannot be reached: {reason_of(error)}\n{_state()}")
    if not isinstance(error, SystemExit):
        _report(f"{type(error).__name__}: {error}", quiet=True)
    elif isinstance(error.code, str):
        _end(error.code)


def _is_of_another_process(error: BaseException) -> bool:
    """Whether a collective or the store failed because a process does not take part any more."""
    if isinstance(error, dist.DistError):
        return True
    if _store is None or not isinstance(error, RuntimeError):
        return False
    return bool(re.match(r"\[\S*\bgloo/\S+:\d+\]", str(error)))  # the place in its source


def _end(message: str, status: int = 1) -> NoReturn:
    """Ends the script with a message, or with that of another process that has failed before."""
    raise SystemExit(_report(message, status)) from None


def _find_first_failure(store: dist.Store, message: str) -> list:
    """The rank of the process that failed first, and why: this one, unless another did."""
    global _first_failure
    if _first_failure is None:
        rank, reason = this_process().rank, message.strip().removeprefix("stopped  ")
        reason = f"rank {rank} on {socket.gethostname()} ended: {reason}"
        _first_failure = _announce(store, rank, reason)
    return _first_failure


def _report(
    message: str, status: int = 1, store: dist.Store | None = None, quiet: bool = False
) -> int:
    """Tells the user, torchrun and the other processes why this one ends; returns its exit status.

    If another one has failed before, that is the reason. One process of each machine prints it, and
    torchrun repeats what is in the error file below its own traceback.
    """
    this = this_process()
    speaks = this.local_rank == 0  # unless the store tells which of its machine reports first
    _leaves.set()
    if this.launcher:
        try:
            store = store or _store or _open_store(seconds=3)
            failed_rank, first_reason = _find_first_failure(store, message)
            if failed_rank != this.rank:
                status, message = 1, f"stopped  {first_reason}"
                if _safe not in message:
                    message = f"{message}\n{_state()}"
            speaks = store.add(f"said on machine {this.machine}", 1) == 1
        except (dist.DistError, UserError):  # the process that keeps the store has ended
            store = None
    if speaks and not quiet:
        with suppress(BrokenPipeError):
            print(message, file=sys.stderr, flush=True)
    if speaks and status < 128 and "TORCHELASTIC_ERROR_FILE" in os.environ:
        content = {"message": message, "timestamp": int(time.time())}
        with suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))
    if store:
        with suppress(dist.DistError):
            _wait_for(store, _arrive(store, "gone"), seconds=3)  # this process may keep the store
        if not speaks:
            time.sleep(1)  # torchrun then ends it, and repeats the message of the one that speaks
    return status
