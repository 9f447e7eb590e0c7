"""What a run needs around its loop: flags, device, processes, early stopping, checkpoints."""

import argparse
import ast
import csv
import os
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None


class UserError(SystemExit):
    """Something the user can mend. Uncaught: its message on stderr, no traceback, exit status 1."""


# ---- constants as flags -------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def read_constants(script: str) -> dict[str, tuple[object, str]]:
    """The value and the comment of every ALL_CAPS constant of a script. Raises UserError."""
    constants, source = {}, Path(script).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name, rest = node.targets[0].id, source.splitlines()[node.end_lineno - 1]
        if name.isupper():
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                where = f"{Path(script).name}, line {node.lineno}"
                raise UserError(f"{where}: {name} must be a plain number, text or bool") from None
            constants[name] = value, rest.encode()[node.end_col_offset :].decode().lstrip(" #")
    return constants


def parse_flags(
    script: str, argv: list[str] | None, description: str, presets: dict[str, dict] | None = None
) -> tuple[argparse.Namespace, dict]:
    """Makes a flag of every constant of a script, with its comment for help.

    EPOCHS = 60 gives --epochs INT, a bool gives --flag and --no-flag, a list takes several values,
    a dict is left alone. presets maps the name of a bool to settings that stand in for the
    constants while it is on; flags given by hand beat both. Returns the settings, in lower case,
    and those that differ from the script's. A bad flag ends it with one line and exit status 2.
    """
    parser = _Parser(
        prog=Path(script).name,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    constants = {}
    for name, (value, comment) in read_constants(script).items():
        if isinstance(value, dict):
            continue
        constants[name.lower()] = value
        options = {"help": f"{comment} (default: {value!r})".replace("%", "%%")}
        if isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(value, list):
            options |= {"nargs": "+", "metavar": "PATH"}
        else:
            options |= {"type": type(value), "metavar": type(value).__name__.upper()}
        parser.add_argument(f"--{name.lower().replace('_', '-')}", **options)

    given = vars(parser.parse_args(argv))
    settings = constants | given
    for switch, preset in (presets or {}).items():
        if settings[switch]:
            settings = constants | {name.lower(): value for name, value in preset.items()} | given
    changed = {name: value for name, value in settings.items() if value != constants[name]}
    return argparse.Namespace(**settings), changed


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Ends the script with one line and exit status 2 unless a flag's value is as expected."""
    if condition:
        return
    if this_process().rank == 0:
        flag = f"--{name.replace('_', '-')}"
        print(f"{Path(sys.argv[0]).name}: {flag} {value}: expected {expected}", file=sys.stderr)
    raise SystemExit(2)


# ---- device and precision -----------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """CUDA, then MPS, then the CPU; or the one named. Raises UserError for an unusable GPU."""
    if name == "cpu":
        return torch.device("cpu")
    if name in ("auto", "cuda"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
        if available:
            return _checked_gpu(local_rank)
        if caught:  # a driver is there, but torch cannot use it: an old one, mostly
            reason = str(caught[0].message).splitlines()[0]
            raise UserError(
                f"There is a GPU, but torch {torch.__version__} cannot use it: {reason}\n"
                "Update the driver, install a torch built for it, or run with --device cpu"
            )
    if name in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if name != "auto":
        raise UserError(
            f"--device {name}: torch {torch.__version__} finds none here. Try --device auto"
        )
    return torch.device("cpu")


def _checked_gpu(local_rank: int) -> torch.device:
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs, too few for one a process: "
            "lower torchrun's --nproc-per-node"
        )
    device = torch.device("cuda", local_rank)
    try:
        torch.zeros(1, device=device).add_(1).item()
    except torch.OutOfMemoryError as error:
        raise UserError(f"GPU {local_rank} is full: another program is using it") from error
    except RuntimeError as error:  # this build has no kernels for it, or it is broken
        raise UserError(
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
    """Whether torch.compile works; it needs Triton on GPUs, a C++ compiler on CPUs."""
    try:
        torch.compile(lambda x: x.sin() + x.cos())(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001, of many types, by what is missing
        reason = str(error).splitlines()[0]
        say("warning", f"torch.compile does not work here, going on without: {reason}")
        return False
    return True


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else "MPS"


# ---- processes, as torchrun starts them ---------------------------------------------------------


class Processes(NamedTuple):
    """This process's place among those of the run; by default it is the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    restarts: int = 0  # how often torchrun has restarted the workers
    launcher: str = ""  # tells one torchrun from another; stays the same over its restarts


def this_process() -> Processes:
    """Reads the place of this process from torchrun's environment variables."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    numbers = [int(os.environ[name]) for name in names]
    return Processes(*numbers, launcher=f"{os.environ['TORCHELASTIC_RUN_ID']}/{os.getppid()}")


def connect(processes: Processes, device: torch.device) -> None:
    """Joins the process group, NCCL on GPUs and gloo elsewhere, where torchrun started several."""
    if processes.world_size == 1 and not processes.launcher:
        return
    options = {"timeout": timedelta(hours=1)}  # the first process of a machine may be downloading
    if device.type == "cuda":
        options["device_id"] = device
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # A restarted group must not read the addresses that the dead one left in torchrun's store.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False)
        options["store"] = dist.PrefixStore(f"attempt_{processes.restarts}", store)
        options |= {"rank": processes.rank, "world_size": processes.world_size}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)


def sum_over_processes(values: Tensor) -> Tensor:
    """Adds a tensor up over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def wait_for_all() -> None:
    """Returns once every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every process rank 0's batch-norm statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def disconnect(lock: object) -> None:
    """Leaves the process group and lets the checkpoint folder go."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if lock:
        lock.close()


# ---- early stopping -----------------------------------------------------------------------------


class EarlyStopping:
    """Remembers the best epoch and says when `patience` epochs have passed without a better one."""

    def __init__(self, patience: int, mode: str) -> None:
        """mode: "min" or "max", as in ReduceLROnPlateau."""
        self.patience, self.mode = patience, mode
        self.best, self.best_epoch, self.bad_epochs = None, 0, 0

    def step(self, value: float, epoch: int) -> bool:
        """Takes an epoch's figure; True if it is the best so far."""
        sign = 1 if self.mode == "min" else -1
        better = self.best is None or sign * value < sign * self.best
        if better:
            self.best, self.best_epoch, self.bad_epochs = value, epoch, 0
        else:
            self.bad_epochs += 1
        return better

    @property
    def should_stop(self) -> bool:
        return self.bad_epochs >= self.patience

    def state_dict(self) -> dict:
        return {"best": self.best, "best_epoch": self.best_epoch, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


# ---- checkpoints --------------------------------------------------------------------------------

FORMAT = "resnet50-cifar100 checkpoint 1"
CONTENTS = {
    "model": dict,  # state_dict of the bare model
    "epoch": int,  # epochs trained
    "constants": dict,  # of the run, overrides applied
    "precision": str,  # a key of DTYPES
    "dataset": str,  # "cifar100" or "digits"
    "classes": list,  # their names
    "history": list,  # a dict of figures an epoch
}  # last.pt also holds optimizer, scheduler, scaler, stopping and launcher
RUN_FILES = ("best.pt", "last.pt", "history.csv")


@contextmanager
def written_whole(path: Path, mode: str) -> Iterator:
    """Opens a temporary file that takes path's place when the block ends well: never a half file.

    Raises UserError, with the earlier file intact, when the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = error  # torch.save wraps the system's error in a RuntimeError
        while cause and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise UserError(
            f"{path} could not be written: {cause.strerror}. What was saved before is intact.\n"
            "Once that is mended, continue with --resume"
        ) from error


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes tensors and plain types, whole or not at all."""
    with written_whole(path, "wb") as file:
        torch.save({"format": FORMAT} | state, file)


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
    """Reads a checkpoint of train.py onto the CPU; runs no code from it. Raises UserError."""
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
    except FileNotFoundError:
        raise UserError(f"{path} not found. Train one with: python train.py") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"{path} cannot be used: {reason.splitlines()[0]}.\n"
            "Expected a checkpoint written by train.py: use another one, or train again"
        ) from error
    return checkpoint


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Raises UserError where a checkpoint's state does not fit what it is loaded into."""
    try:
        yield
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path} does not fit this program: {lines[-1].strip()}") from error


def write_history(path: Path, history: list[dict]) -> None:
    """One row an epoch, as a CSV file."""
    with written_whole(path, "w") as file:
        rows = csv.DictWriter(file, history[0], lineterminator="\n")
        rows.writeheader()
        rows.writerows(history)


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


def lock_folder(folder: Path) -> object:
    """Creates a folder and keeps other runs out of it while the returned file is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115, its owner is the caller
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}. Choose another --checkpoint-dir"
        ) from error
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another run is using {folder}. Wait for it, or choose another --checkpoint-dir"
            ) from None
        except OSError:
            pass  # a file system without locks
    return file


# ---- what a person sees -------------------------------------------------------------------------


def say(label: str, text: str) -> None:
    """One labelled line on stdout from the run's first process, at once also in a pipe."""
    if this_process().rank == 0:
        print(f"{label:<8} {text}", flush=True)


def on_terminal() -> bool:
    """Whether a progress bar has a terminal to live on: in the run's first process only."""
    return sys.stderr.isatty() and this_process().rank == 0


class _Terminated(BaseException):
    pass


@contextmanager
def explained_exit(
    what_is_safe: Callable[[], str], memory_advice: str = "another program may be using it"
) -> Iterator[None]:
    """Ends the script with a message instead of a traceback on what can befall a run in its middle.

    Ctrl-C and SIGTERM (exit status 130 and 143), a closed pipe, a loss that is not finite,
    exhausted GPU memory.
    """

    def terminate(signum: int, frame: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as error:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)  # an impatient second one
        if this_process().rank == 0:
            print(f"\nstopped  {what_is_safe()}", file=sys.stderr, flush=True)
        raise SystemExit(143 if isinstance(error, _Terminated) else 130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit fails too
        raise UserError(f"stopped  nobody reads the output any more.\n{what_is_safe()}") from None
    except FloatingPointError as error:
        raise UserError(f"stopped  {error}. Try a lower one.\n{what_is_safe()}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"GPU memory is exhausted: {memory_advice}.\n{what_is_safe()}") from error
