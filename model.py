"""ResNet-50 with a small head: its weights, its predictions, and a file of it to use elsewhere."""

import inspect
import json
import tempfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel
from torchvision import models
from torchvision.models import get_model, get_model_weights, list_models
from tqdm import tqdm

import utils

# What ARCHITECTURE of train.py can be: ResNet, ResNeXt and Wide ResNet
ARCHITECTURES = list_models(models, include=["resnet*", "resnext*", "wide_resnet*"])

WRAPPINGS = ("state_dict", "model_state_dict", "model")  # under which checkpoints hold the weights
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning


class Head(nn.Sequential):
    """Linear 512, ReLU, Dropout 0.5, Linear num_classes; in full precision even under autocast.

    Logits in bfloat16 tie, and with ties the accuracy depends on the order of sums.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(
            nn.Linear(num_features, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, num_classes)
        )

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self[0].weight.dtype))


def make_model(
    args: Namespace, classes: list[str], device: torch.device, pretrained: bool
) -> nn.Module:
    """The network on its device, with the weights that WEIGHTS names if pretrained, on rank 0."""
    torch.manual_seed(utils.mix_seed(args.seed))  # for the new layers
    model = build_model(args.architecture, len(classes))
    if pretrained and utils.this_process().rank == 0:
        load_weights(model, args, classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    source = "the checkpoint"
    if pretrained:
        source = args.weights or "random weights"
    utils.say("model", f"{args.architecture} from {source}, {parameters:,} parameters")
    return model.to(device, memory_format=utils.memory_format(device))


def build_model(architecture: str, num_classes: int) -> nn.Module:
    """One of ARCHITECTURES with random weights and Head in place of its fc."""
    # Each residual block starts as the identity: from random weights, training is steadier in its
    # first epoch (Goyal et al. 2017, arXiv 1706.02677). Pretrained weights overwrite it.
    model = get_model(architecture, zero_init_residual=True)
    model.fc = Head(model.fc.in_features, num_classes)
    return model


def weight_names(architecture: str) -> list[str]:
    """The names of torchvision's pretrained weights, the oldest first."""
    return list(get_model_weights(architecture).__members__)


def download_weights(architecture: str, name: str) -> Path:
    """The file of torchvision's weights of that name; if it is missing, downloaded and checked.

    Raises UserError.
    """
    weights, path = get_model_weights(architecture)[name], weights_path(architecture, name)
    if path.is_file():
        return path
    try:
        if path.parts[0] == "~":
            raise OSError("there is no home folder to store them in. Set HOME, or TORCH_HOME")
        weights.get_state_dict(check_hash=True, weights_only=True)
    except Exception as error:
        raise utils.UserError(
            f"Weights {name} could not be downloaded: {error}\n"
            f"Download {weights.url} elsewhere and pass its path, "
            'or train from scratch with --weights ""'
        ) from error
    return path


def weights_path(architecture: str, name: str) -> Path:
    """Where the file of WEIGHTS is: torchvision's once it is downloaded, or the path itself."""
    if name not in weight_names(architecture):
        return Path(name)
    url = get_model_weights(architecture)[name].url
    return Path(torch.hub.get_dir(), "checkpoints", Path(url).name)


def require_weights(args: Namespace) -> None:
    """Raises UserError if WEIGHTS is neither a name of torchvision's nor a file nor empty."""
    names = weight_names(args.architecture)
    if args.weights and args.weights not in names and not Path(args.weights).is_file():
        expected = f'{", ".join(names)}, the path of a state_dict file, or ""'
        raise utils.UserError(f"Weights {args.weights} not found. Expected {expected}")


def load_weights(model: nn.Module, args: Namespace, classes: list[str]) -> None:
    """Loads WEIGHTS into a new model, a checkpoint's head too if its classes are the same.

    Raises UserError if they cannot be had or do not fit.
    """
    require_weights(args)
    if not args.weights:
        return
    if args.weights in weight_names(args.architecture):
        path = download_weights(args.architecture, args.weights)
        advice = ". Delete it: it will be downloaded again"
    else:
        path, advice = Path(args.weights), ""
    try:
        loaded = utils.load_safely(path, zip_only=False)
        weights = unwrap_weights(loaded)
        utils.require_sound(weights)
    except Exception as error:
        reason = explain_unreadable(path, error) or utils.reason_of(error)
        raise utils.UserError(
            f"{path} is not a state_dict file that can be used: {reason}{advice}"
        ) from error
    with utils.explained_misfit(path, args.architecture):
        load_pretrained(model, weights, with_head=loaded.get("classes") == classes)


def unwrap_weights(loaded: object) -> dict[str, Tensor]:
    """The state_dict in what torch.load() returned, without the prefixes that wrappers add.

    Raises ValueError if there is none.
    """
    for key in WRAPPINGS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"it holds {type(loaded).__name__}, not tensors by their names")
    weights = {}
    for name, tensor in loaded.items():
        if not (isinstance(name, str) and torch.is_tensor(tensor)):
            raise ValueError(f"its entry {name!r} is {type(tensor).__name__}, not a tensor")
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        weights[name] = tensor
    return weights


def explain_unreadable(path: Path, error: Exception) -> str | None:
    """What a file is that raised an error; None if the error says it better."""
    if isinstance(error, OSError):
        return None
    with open(path, "rb") as file:
        start = file.read(100).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself. Run git lfs pull"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page. Download the file itself"
    if path.suffix == ".safetensors":
        return (
            "it is a safetensors file. Convert it: "
            "torch.save(safetensors.torch.load_file(path), new_path)"
        )
    if not isinstance(error, ValueError):  # torch.load() raises errors of many types
        return (
            "it is damaged, or holds more than tensors, such as a whole model. "
            "Expected what torch.save(model.state_dict(), path) writes"
        )
    return None


def load_pretrained(model: nn.Module, weights: dict[str, Tensor], with_head: bool) -> None:
    """Loads weights in torchvision's layout, their own fc only with_head.

    Raises RuntimeError if they do not fit.
    """
    if not with_head:
        weights = {name: x for name, x in weights.items() if not name.startswith("fc.")}
        weights |= {f"fc.{name}": x for name, x in model.fc.state_dict().items()}
    model.load_state_dict(weights)


def checksum(model: nn.Module) -> str:
    """A checksum of all weights and statistics but the head's, wherever they are."""
    crc32 = 0
    for name, values in model.state_dict().items():
        if not name.startswith("fc."):
            crc32 = zlib.crc32(values.cpu().contiguous().numpy(), crc32)
    return f"{crc32:08x}"


def wrap_network(model: nn.Module, compile_it: bool) -> nn.Module:
    """The model over all processes, compiled if asked for.

    Batch norm normalizes per process; the running statistics that count are those of rank 0.
    """
    network = model
    if dist.is_initialized():
        names = inspect.signature(DistributedDataParallel).parameters
        renamed = "forward_sync_buffers" in names  # which took the place of broadcast_buffers
        sync_buffers = "forward_sync_buffers" if renamed else "broadcast_buffers"
        options = {"gradient_as_bucket_view": True, sync_buffers: False}
        network = DistributedDataParallel(network, **options)
    if compile_it and utils.can_compile(next(model.parameters()).device):
        network = torch.compile(network)
    return network


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Computes in bfloat16 or float16 where that is safe; does nothing for float32 and float64."""
    return torch.autocast(device.type, dtype, enabled=dtype.itemsize < 4)


@torch.inference_mode()
def predict(
    model: nn.Module, loader: Iterable[Tensor], dtype: torch.dtype, progress: bool = False
) -> Tensor:
    """Logits float (N, num_classes) of all N images of a data.EvalLoader, in its order."""
    model.eval()
    batches = tqdm(loader, desc="predict", unit="batch", leave=False, disable=not progress)
    with autocast(next(model.parameters()).device, dtype):
        return torch.cat([model(images) for images in batches])[: len(loader.rows)]


def extract_features(
    model: nn.Module, loader: Iterable[Tensor], dtype: torch.dtype, progress: bool = False
) -> Tensor:
    """The head's inputs (N, num_features), in eval mode, for the images of an EvalLoader."""
    backbone = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    return predict(backbone, loader, dtype, progress).to(model.fc[0].weight.dtype)


def freeze_stages(model: nn.Module, count: int) -> None:
    """Makes the stem and the first count of the four stages constant; 0 freezes nothing."""
    if count:
        stem_and_stages = list(model.children())[: 4 + count]  # conv1, bn1, relu, maxpool, layer1
        nn.ModuleList(stem_and_stages).requires_grad_(False)


def set_train_mode(network: nn.Module, freeze_batch_norm: bool) -> None:
    """Like network.train(), but batch norm keeps its statistics where it or its stage is frozen."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(module.weight.requires_grad and not freeze_batch_norm)


# ---- a model that needs only torch --------------------------------------------------------------


class Portable(nn.Module):
    """A network with its preprocessing: pictures of any size in, class probabilities out."""

    def __init__(
        self, network: nn.Module, stored_size: int, whole: bool, normalize_and_resize: Callable
    ) -> None:
        """network: what predicts from what normalize_and_resize, a data.NormalizeAndResize on the
        CPU, returns. stored_size and whole are as for data.read_picture().
        """
        super().__init__()
        self.network, self.size, self.whole = network, stored_size, whole
        self.normalize_and_resize = normalize_and_resize

    def forward(self, pictures: Tensor) -> Tensor:
        """Probabilities (N, num_classes) of upright RGB pictures uint8 (N, 3, H, W)."""
        images = self.make_square(pictures) / 255
        return self.network(self.normalize_and_resize(images)).softmax(1)

    def make_square(self, pictures: Tensor) -> Tensor:
        """What data.read_picture() does, but for rounding: (N, 3, stored_size, stored_size)."""
        height, width = pictures.shape[2:]
        sides = torch.scalar_tensor(height), torch.scalar_tensor(width)
        side = torch.maximum(*sides) if self.whole else torch.minimum(*sides)
        columns, rows = self.resample(width, side), self.resample(height, side)
        rounded = (pictures.float() @ columns.T).round().clamp(0, 255)  # as Pillow does it
        return (rows @ rounded).round().clamp(0, 255)

    def resample(self, length: int, side: Tensor) -> Tensor:
        """Weights (size, length) of bicubic interpolation with antialiasing, as Pillow's.

        side: how many of the pixels become self.size; fewer than length are those in the middle,
        more are all, with black beside them. Keys 1981, "Cubic convolution interpolation".
        """
        available = torch.scalar_tensor(length)
        used = torch.minimum(side, available)
        made = torch.minimum(available / side * self.size, torch.scalar_tensor(self.size)).round()
        scale, start = used / made, (available - used) / 2
        index = torch.arange(self.size) - ((self.size - made) / 2).round()  # of what is made
        centers = start + (index + 0.5) * scale
        distance = (torch.arange(length) + 0.5 - centers[:, None]).abs() / scale.clamp(min=1)
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
        inside = ((0 <= index) & (index < made))[:, None]
        return torch.where(inside, weights / weights.sum(1, keepdim=True), 0)


def export(
    portable: Portable,
    classes: list[str],
    batches: Iterable[Tensor],
    probabilities: Tensor,
    path: Path,
    tolerance: float,
) -> None:
    """Writes a Portable into one file, once that has predicted what an evaluation did.

    batches: uint8 (B, 3, S, S), with the probabilities (N, num_classes) of the evaluation. The
    class names are in the file as classes.json. Raises UserError if predictions differ by more
    than tolerance.
    """
    sizes, example = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, torch.zeros(2, 3, 57, 43).byte()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
            file = Path(scratch, "model.pt2")
            program = torch.export.export(portable.eval(), (example,), dynamic_shapes=(sizes,))
            torch.export.save(program, file, extra_files={"classes.json": json.dumps(classes)})
            loaded = torch.export.load(file).module()
            with torch.inference_mode():
                exported = torch.cat([loaded(batch) for batch in batches])
            difference = (exported - probabilities).abs().max().item()
            if not difference <= tolerance:
                raise utils.UserError(
                    f"{path} is not written: its probabilities differ by up to {difference:.3g} "
                    "from those of the evaluation, more than rounding explains"
                )
            file.replace(path)
    except OSError as error:
        raise utils.UserError(f"{path} cannot be written: {error.strerror or error}") from error
    equal = (exported.argmax(1) == probabilities.argmax(1)).sum()
    counts = f"{equal:,} of {len(exported):,} images are classified as above"
    utils.say("export", f"{path}: {counts}, probabilities differ by up to {difference:.2g}")
