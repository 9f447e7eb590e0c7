"""What a run needs around its loop: flags, device, processes, checkpoints, messages."""

import argparse
import ast
import csv
import ctypes
import os
import platform
import shlex
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None


class UserError(SystemExit):
    """An error that the user can fix. Uncaught: its message on stderr, no traceback, status 1."""


# ---- constants as flags -------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _usage_error(f"{message}; --help lists the flags")


def _usage_error(message: str) -> NoReturn:
    """Ends the script with one line, from its first process, and exit status 2."""
    if this_process().rank == 0:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def refuse_flag(name: str, value: object, expected: str) -> NoReturn:
    """Ends the script with one line about a flag's value and exit status 2."""
    _usage_error(f"--{name.replace('_', '-')} {value!r}: expected {expected}")


def read_constants(script: str) -> dict[str, tuple[object, str]]:
    """The value and the comment of every ALL_CAPS literal of a script. Raises UserError."""
    constants, source = {}, Path(script).read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name, rest = node.targets[0].id, lines[node.end_lineno - 1]
        if name.isupper():
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                where = f"{Path(script).name}, line {node.lineno}"
                raise UserError(f"{where}: {name} must be a plain number, text or bool") from None
            constants[name] = value, rest.encode()[node.end_col_offset :].decode().lstrip(" #")
    return constants


def parse_flags(script: str, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """Makes a flag of every constant of a script, with its comment as the help, and checks it.

    EPOCHS = 60 becomes --epochs INT; a bool becomes --flag and --no-flag; a list takes several
    values. Two dicts of the script are used instead: ALLOWED gives the range (low, high) of a
    constant, whole numbers unless low is a float, its choices [...], or the meaning of a string
    that must not be empty. With --demo, DEMO_SETTINGS replaces the script's values; flags win over
    both. Returns the settings, with names in lower case, and those that differ from the script's.
    A bad flag ends the script with one line and exit status 2.
    """
    constants = read_constants(script)
    allowed, demo_settings = (
        {name.lower(): setting for name, setting in constants.pop(table, ({}, ""))[0].items()}
        for table in ("ALLOWED", "DEMO_SETTINGS")
    )
    parser = _Parser(
        prog=Path(script).name,
        description=ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8"))),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, (value, comment) in constants.items():
        options = {"help": f"{comment} (default: {value!r})".replace("%", "%%")}
        if isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(value, list):
            options |= {"nargs": "+", "metavar": "PATH"}
        else:
            rule = allowed.get(name.lower())
            kind = type(rule[0] if isinstance(rule, tuple) else value)  # GRAYSCALE = 0 is a float
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(f"--{name.lower().replace('_', '-')}", **options)

    given = vars(parser.parse_args(argv))
    defaults = {name.lower(): value for name, (value, _) in constants.items()}
    settings = defaults | given
    if settings.get("demo"):
        settings = defaults | demo_settings | given
    for name, rule in allowed.items():
        _check_setting(name, settings[name], rule)
    changed = {name: value for name, value in settings.items() if value != defaults[name]}
    return argparse.Namespace(**settings), changed


def _check_setting(name: str, value: object, rule: tuple | list | str) -> None:
    """Refuses a value that is outside its range, not among its choices, or an empty string."""
    if isinstance(rule, tuple):
        low, high = rule
        kinds, expected = (int, type(low)), f"{low:,} to {high:,}"
        fits = isinstance(value, kinds) and low <= value <= high  # False for NaN too
    elif isinstance(rule, list):
        fits, expected = value in rule, f"one of {', '.join(rule)}"
    else:
        fits, expected = isinstance(value, str) and value != "", rule
    if not fits:
        refuse_flag(name, value, expected)


# ---- device and precision -----------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device that is named; "auto" is CUDA, else the CPU. Raises UserError if it is unusable.

    MPS is untested, so "auto" never chooses it.
    """
    if name in ("auto", "cuda"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
        if available:
            return _set_up_gpu(local_rank)
        if caught:  # a driver is there, but torch cannot use it: usually an old one
            reason = str(caught[0].message).splitlines()[0]
            raise UserError(
                f"There is a GPU, but torch {torch.__version__} cannot use it: {reason}\n"
                "Update the driver, install a torch built for it, or run with --device cpu"
            )
    if name == "cuda" or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(
            f"--device {name}: torch {torch.__version__} finds none here. Try --device auto"
        )
    device = torch.device("cpu" if name == "auto" else name)
    if device.type == "cpu":
        _keep_freed_memory()
    return device


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
    """Resolves "auto": bf16 where the hardware has it, else fp16 on CUDA and fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
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


def device_name(device: torch.device) -> str:
    """The GPU's model, or "CPU" with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else "MPS"


# ---- processes, as torchrun starts them ---------------------------------------------------------


class Processes(NamedTuple):
    """This process's place among those of the run; by default it is the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1  # processes on this machine
    restarts: int = 0  # how often torchrun has restarted the workers
    launcher: str = ""  # identifies one torchrun; unchanged when it restarts its workers


def this_process() -> Processes:
    """Reads the place of this process from torchrun's environment variables."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    numbers = [int(os.environ[name]) for name in names]
    return Processes(*numbers, launcher=f"{os.environ['TORCHELASTIC_RUN_ID']}/{os.getppid()}")


def connect(processes: Processes, device: torch.device) -> None:
    """Joins the process group, NCCL on GPUs and gloo elsewhere, if torchrun started this run."""
    if not processes.launcher:
        return
    backend, options = "gloo", {"timeout": timedelta(minutes=10)}
    if device.type == "cuda":
        backend, options["device_id"] = "nccl", device
    with _default_signals():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # A restarted group must not read the addresses that the dead one left in the store.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False)
            options["store"] = dist.PrefixStore(f"attempt_{processes.restarts}", store)
            options |= {"rank": processes.rank, "world_size": processes.world_size}
        dist.init_process_group(backend, **options)
    say("torchrun", f"processes: {processes.world_size}, {backend}")


@contextmanager
def barrier_after_download() -> Iterator[None]:
    """A barrier at the end of the block, with a timeout of an hour instead of the usual 10 minutes.

    Its process group is created before the block: a barrier fails when another process has died,
    whereas new_group() would go on waiting for it.
    """
    if not dist.is_initialized():
        yield
        return
    with _default_signals():
        group = dist.new_group(timeout=timedelta(hours=1))
    yield
    with _default_signals():
        dist.barrier(group)


@contextmanager
def _default_signals() -> Iterator[None]:
    """Lets signals end the process while it waits in C++, where Python's handlers do not run."""
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(signum, signal.SIG_DFL) for signum in signals]
    try:
        yield
    finally:
        for signum, handler in zip(signals, handlers):
            signal.signal(signum, handler)


def sum_over_processes(values: Tensor) -> Tensor:
    """Adds a tensor up over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean_over_processes(*sums: Tensor, count: int) -> list[float]:
    """Each sum over this process's images, as a mean over those of all processes."""
    values = torch.stack([*sums, torch.full_like(sums[0], count)])
    *totals, total_count = sum_over_processes(values).tolist()
    return [total / total_count for total in totals]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every process the values of rank 0, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def disconnect() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
}  # last.pt also holds launcher and the state of all else that training changes
RUN_FILES = ("best.pt", "last.pt", "history.csv")
# Constants that say where and how a run is done, not what it computes
WHERE_AND_HOW = {"dataset", "data_dir", "checkpoint_dir", "device", "log_every", "resume"}


@contextmanager
def atomic_write(path: Path, mode: str) -> Iterator:
    """Opens a temporary file that replaces path once it is complete and on disk.

    Raises UserError, with the earlier file intact, when the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error  # torch.save wraps the system's error in a RuntimeError
        while cause and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise UserError(
            f"{path} could not be written: {cause.strerror}. What was saved before is intact.\n"
            "Fix that, then continue with --resume"
        ) from error


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes tensors and plain types, completely or not at all."""
    with atomic_write(path, "wb") as file:
        torch.save({"format": FORMAT} | state, file)


def save_run(
    folder: Path,
    metadata: dict,
    parts: dict[str, object],
    history: list[dict],
    is_best: bool = False,
) -> None:
    """Writes best.pt if the last epoch is the best, then last.pt and history.csv: rank 0 does.

    parts: what training changes, by name, each with a state_dict(); best.pt holds "model" alone.
    best.pt comes first, so that no last.pt on disk is ahead of the best.pt beside it.
    """
    if this_process().rank:
        return
    epoch = history[-1]["epoch"] if history else 0
    result = metadata | {"epoch": epoch, "history": history, "model": parts["model"].state_dict()}
    if is_best:
        save_checkpoint(folder / "best.pt", result)
    states = {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint(folder / "last.pt", result | states)
    if history:
        with atomic_write(folder / "history.csv", "w") as file:
            rows = csv.DictWriter(file, history[0], lineterminator="\n")
            rows.writeheader()
            rows.writerows(history)


def _load_safely(file: BinaryIO) -> object:
    """torch.load, after the checks it lacks: it verifies no checksum and unpacks deflated bombs."""
    size = file.seek(0, os.SEEK_END)
    if not zipfile.is_zipfile(file):
        raise ValueError("it is not a checkpoint, or cut short")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, so torch.save did not write it")
        if sum(member.file_size for member in members) > size:
            raise ValueError("it claims more bytes than it has")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it fails its checksum")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint of train.py onto the CPU; runs no code from it. Raises UserError.

    Constants that are missing from an older checkpoint take their defaults in train.py.
    """
    try:
        with open(path, "rb") as file:
            checkpoint = _load_safely(file)
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
            raise ValueError("it was not written by this train.py")
        for name, kind in CONTENTS.items():
            if not isinstance(checkpoint.get(name), kind):
                raise TypeError(f"its entry {name!r} is missing or not a {kind.__name__}")
        for tensor in checkpoint["model"].values():
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError("it claims more bytes than it has")
            if not tensor.isfinite().all():
                raise ValueError("its weights are not finite")
        for name in ("batch_size", "image_size", "holdout_per_class", "watch"):  # in every version
            if name not in checkpoint["constants"]:
                raise ValueError(f"its constant {name.upper()} is missing")
    except FileNotFoundError:
        raise UserError(f"{path} not found. Train one with: python train.py") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"{path} cannot be used: {reason.splitlines()[0]}.\n"
            "Expected a checkpoint written by train.py: use another one, or train again"
        ) from error
    return checkpoint | {"constants": with_defaults(checkpoint)}


def with_defaults(run: dict) -> dict:
    """The constants of a run; one that is younger than the run has train.py's default."""
    own = read_constants(str(Path(__file__).with_name("train.py")))
    tables = ("ALLOWED", "DEMO_SETTINGS")
    defaults = {name.lower(): value for name, (value, _) in own.items() if name not in tables}
    return defaults | {"dataset": run["dataset"]} | run["constants"]


def find_checkpoint(path: Path, args: argparse.Namespace, processes: Processes) -> dict | None:
    """The checkpoint that this run continues: with --resume, or after torchrun restarted it.

    Raises UserError if a constant differs that determines what a run computes.
    """
    restarted = processes.restarts > 0 and path.exists()
    if not (args.resume or restarted):
        return None
    checkpoint = load_checkpoint(path)
    if not args.resume and checkpoint.get("launcher") != processes.launcher:
        return None  # of an earlier run: torchrun restarted this one before its first save
    may_change = WHERE_AND_HOW | {"epochs", "scheduler_patience", "early_stopping_patience"}
    if args.schedule != "plateau":
        may_change.remove("epochs")  # the curve ends there: another number would move it
    for name, value in vars(args).items():
        stored = checkpoint["constants"].get(name)
        if value != stored and name not in may_change:
            reason = f", where its {args.schedule} schedule ends" if name == "epochs" else ""
            raise UserError(
                f"{path} was trained with {name.upper()} = {stored!r}{reason}, "
                f"now it is {value!r}.\n"
                "Set it back to continue that run, or start a new one without --resume"
            )
    return checkpoint


def restore(checkpoint: dict, path: Path, parts: dict[str, object], data_facts: dict) -> None:
    """Loads each part's state from the checkpoint. Raises UserError if it does not fit.

    data_facts: "classes" and "dataset", which must be those of the checkpoint.
    """
    with explained_misfit(path):
        if checkpoint["classes"] != data_facts["classes"]:
            raise ValueError("it was trained on other classes than the data set has now")
        if checkpoint["dataset"] != data_facts["dataset"]:
            was, now = checkpoint["dataset"], data_facts["dataset"]
            raise ValueError(f"it was trained on other images: {was}; the data set has {now}")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        for parameter, state in parts["optimizer"].state.items():
            for value in state.values():  # whose shapes torch does not check
                if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                    raise ValueError("the optimizer's state has other shapes than the model")
    place = f"after epoch {checkpoint['epoch']}" if checkpoint["history"] else "at its start"
    say("resume", f"{path}, {place}")


@contextmanager
def explained_misfit(path: Path) -> Iterator[None]:
    """Raises UserError where a checkpoint's contents do not fit what they are loaded into."""
    try:
        yield
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path} does not fit this program: {lines[-1].strip()}") from error


def resume_command(argv: list[str]) -> str:
    """The command that continues the run that was started with argv."""
    flags = [flag for flag in argv if flag != "--resume"]
    launcher = "torchrun ..." if this_process().launcher else "python"
    return f"{launcher} {shlex.join(['train.py', *flags, '--resume'])}"


def move_aside(folder: Path) -> None:
    """Moves an earlier run's files, if there are any, into a new folder, and says so."""
    files = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if not files:
        return
    aside = folder / f"earlier-{datetime.now():%Y%m%d-%H%M%S-%f}"
    aside.mkdir()
    for file in files:
        file.rename(aside / file.name)
    say("earlier", f"the run that was in {folder} is now in {aside}")


def lock_folder(folder: Path, rank: int = 0) -> object:
    """Creates a folder; rank 0 keeps other runs out of it while the returned file is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115, the caller closes it
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}. Choose another --checkpoint-dir"
        ) from error
    if fcntl and rank == 0:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another run is using {folder}. Wait for it, or choose another --checkpoint-dir"
            ) from None
        except OSError:
            pass  # a file system without locks
    return file


# ---- messages -----------------------------------------------------------------------------------


def say(label: str, text: str) -> None:
    """Prints one labelled line from the run's first process, at once also into a pipe."""
    if this_process().rank == 0:
        print(f"{label:<8} {text}", flush=True)


def on_terminal() -> bool:
    """Whether this process shows progress bars: the first one, on a terminal."""
    return sys.stderr.isatty() and this_process().rank == 0


def progress_bar(description: str, total: int, unit: str) -> tqdm:
    """A bar that disappears when it is closed; invisible unless on_terminal()."""
    return tqdm(total=total, desc=description, unit=unit, leave=False, disable=not on_terminal())


class _Terminated(BaseException):
    pass


@contextmanager
def explained_exit(
    what_is_safe: Callable[[], str],
    how_to_continue: str = "",
    memory_advice: str = "another program may be using it",
) -> Iterator[None]:
    """Ends the script with a message instead of a traceback when a run is cut short.

    That is Ctrl-C and SIGTERM (exit status 130 and 143), a closed output pipe, a GPU that fails;
    and, where continuing would only repeat it, a loss that is not finite or exhausted GPU memory.
    """

    def terminate(signum: int, frame: object) -> None:
        raise _Terminated

    def state() -> str:
        return what_is_safe() + (f"; to continue: {how_to_continue}" if how_to_continue else "")

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as error:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)  # a second one must not spoil the message
        if this_process().rank == 0:
            print(f"\nstopped  {state()}", file=sys.stderr, flush=True)
        raise SystemExit(143 if isinstance(error, _Terminated) else 130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit fails too
        raise UserError(f"stopped  the output pipe was closed.\n{state()}") from None
    except FloatingPointError as error:
        raise UserError(f"stopped  {error}.\n{what_is_safe()}") from error
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        if "out of memory" in str(error):
            text = f"GPU memory is exhausted: {memory_advice}.\n{what_is_safe()}"
        else:
            text = f"the GPU failed: {str(error).splitlines()[0]}\n{state()}"
        raise UserError(f"stopped  {text}") from error
