"""A CUDA device for machines without one: torch's fake tensors stand in for what is on it.

A fake tensor has a device, a dtype, a shape and strides, but no values: the scripts run on it by
torch's own rules, but every number that the host reads is NUMBER. It cannot show numerics, cuDNN,
NCCL, compiled code, time or memory.
"""

import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision.models.resnet import BasicBlock

FOLDERS = [str(folder) for folder in Path(__file__).resolve().parents[:2]]  # of the project
NUMBER = 9  # also the largest label of the digits
aten = torch.ops.aten


def project_line() -> str:
    """The innermost line of the project that is running, as "train.py:7"."""
    frame = sys._getframe(1)
    while (path := frame.f_code.co_filename) == __file__ or os.path.dirname(path) not in FOLDERS:
        frame = frame.f_back
    return f"{os.path.basename(path)}:{frame.f_lineno}"


class FakeGPU(TorchDispatchMode):
    """Sees every operation; those on "cuda" run on fake tensors, those on the CPU as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_fallback_kernels=False)
        self.arithmetic = {}  # "addmm in float32": the first line that did it
        self.transfers = Counter()  # what copies or makes the host wait, as "... at train.py:7"
        self.problems = []  # what a GPU would refuse, or should not be asked to do, likewise

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, FakeTensor)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") else None
        if not there and target != "cuda":
            return func(*args, **kwargs)
        if func.namespace == "aten":  # in inference mode, composite operations come here whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is aten._local_scalar_dense.default:
            self.transfers[f"reads a number at {project_line()}"] += 1
            return float(NUMBER) if there[0].is_floating_point() else NUMBER
        loads = func is aten.copy_.default and args[0] is there[0]
        saves = func is aten._to_copy.default and target == "cpu"
        if saves:
            self.transfers[f"copies to the host at {project_line()}"] += 1
        elif len(there) < len(tensors):
            if func is not aten._to_copy.default and not loads:
                raise self.problem(f"{func} mixes tensors of the CPU and the GPU")
            if not (kwargs.get("non_blocking") and getattr(tensors[0], "pinned", False)):
                self.transfers[f"copies to the GPU at {project_line()}"] += 1
            args = tree_map_only(Tensor, self.as_fake, args)
        try:
            self.check_arithmetic(func, args)
            with self.fake:  # which cannot run the fused optimizer; that works in place
                result = None if func is aten._fused_sgd_.default else func(*args, **kwargs)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise self.problem(f"{func} fails, {reason}") from error
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
            self.problem(f"{func} makes float64")
        return read(result) if saves else result

    def problem(self, text: str) -> RuntimeError:
        """Notes a problem with its line; returns it as an error, in case it ends the run."""
        self.problems.append(f"{text} at {project_line()}")
        return RuntimeError(self.problems[-1])

    def as_fake(self, tensor: Tensor) -> FakeTensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.fake:  # a tenth of the time that FakeTensorMode.from_tensor() needs
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    def check_arithmetic(self, func, args: tuple) -> None:
        """Notes the dtypes and layouts of what costs time. Raises where the fused optimizer would.

        Its rules are those of check_fast_path_restrictions() in ATen's ForeachUtils.h.
        """
        kind = func.overloadpacket
        if kind in (aten.convolution, aten.addmm, aten._log_softmax, aten._fused_sgd_):
            dtype = str(tree_leaves(args)[0].dtype).removeprefix("torch.")
            self.arithmetic.setdefault(f"{kind.__name__} in {dtype}", project_line())
        if kind is aten.convolution:
            # Between the layers cuDNN chooses the layout, and fake tensors cannot know.
            for tensor in args[:2] if args[0].shape[1] == 3 else args[1:2]:
                if not tensor.is_contiguous(memory_format=torch.channels_last):
                    self.problem(f"{func} is not in channels_last")
        if kind is aten._fused_sgd_:
            for tensors in zip(*filter(None, args[:3]), strict=True):
                layouts = {f"{t.device} {t.dtype} {t.shape} {strides(t)}" for t in tensors}
                if len(layouts) > 1:
                    raise ValueError(f"unlike tensors: {', '.join(sorted(layouts))}")


def read(tensor: Tensor) -> Tensor:
    """What the host reads from a tensor of the GPU."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).fill_(NUMBER)


def pin(tensor: Tensor) -> Tensor:
    """A copy from which a copy to the GPU does not make the host wait."""
    tensor = tensor.clone()
    tensor.pinned = True
    return tensor


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Those that matter: in a dimension of size 1 any will do."""
    return tuple(s for s, size in zip(tensor.stride(), tensor.shape) if size > 1)


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """loss.backward(), node by node: autograd's engine needs a driver for CUDA tensors."""
    todo, nodes = [loss.grad_fn], {}
    while todo:
        if (node := todo.pop()) not in nodes:
            nodes[node] = hasattr(node, "variable")  # then it puts its gradient into a parameter
            todo += [following for following, _ in node.next_functions if following]
    received = defaultdict(dict, {loss.grad_fn: {0: torch.ones_like(loss)}})
    for node in sorted(nodes, key=lambda node: (nodes[node], -node._sequence_nr())):
        slots = received.pop(node)
        gradients = node(*(slots.get(slot) for slot in range(max(slots) + 1)))
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for (following, slot), gradient in zip(node.next_functions, gradients):
            if following and gradient is not None:
                expected = following._input_metadata[slot]
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                earlier = received[following].get(slot)
                received[following][slot] = gradient if earlier is None else earlier + gradient


@contextmanager
def fake_gpu(free: float) -> Iterator[FakeGPU]:
    """Inside it torch finds one GPU with so many free bytes.

    In a process of its own: a guard stays set when it ends.
    """
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # shows that torch.tensor(..., device="cuda") copies
    save = torch.save

    def save_from_gpu(state: object, file: object) -> None:
        save(tree_map_only(FakeTensor, read, state), file)

    with (
        patch.multiple(
            torch.cuda,
            _lazy_init=lambda: None,
            is_available=lambda: True,
            device_count=lambda: 1,
            set_device=lambda device: None,
            mem_get_info=lambda device=None: (free, free),
            get_device_name=lambda device=None: "fake GPU",
            get_device_capability=lambda device=None: (9, 0),
            is_bf16_supported=lambda including_emulation=True: True,
        ),
        patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None),
        # deepcopy() of a fake tensor would copy its mode, and tensors of two modes cannot meet.
        patch.object(FakeTensorMode, "__deepcopy__", lambda self, memo: self, create=True),
        patch("torch.save", save_from_gpu),
        patch("torch.Tensor.backward", backward),
        patch("torch.Tensor.pin_memory", pin),
        FakeGPU() as gpu,
    ):
        yield gpu
    torch._C._set_only_lift_cpu_tensors(False)


def run_on_fake_gpu(main, command: str, free: float = 80e9) -> FakeGPU:
    """Runs a script's main(); how it failed is among the problems."""
    with fake_gpu(free) as gpu, redirect_stdout(StringIO()) as said:
        try:
            main(command.split())
        except (Exception, SystemExit) as error:  # noqa: BLE001, reported
            gpu.problems.append(f"{type(error).__name__}: {error}")
    if "device   fake GPU" not in said.getvalue():
        gpu.problems.append("it did not run on the GPU")
    return gpu


def own_processes() -> ProcessPoolExecutor:
    """Runs functions in other processes, on each core one."""
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("forkserver"))


def in_its_own_process(function, *args) -> object:
    with own_processes() as pool:
        return pool.submit(function, *args).result()


def smaller(make: Callable) -> Callable:
    """ResNet.__init__() with one basic block per stage: the same kinds of operations."""
    return lambda self, *args, **more: make(self, BasicBlock, [1] * 4, **more)
