"""ResNet-50 with a small head for fine-tuning, its weights, and its predictions."""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from tqdm import tqdm

ARCHITECTURE = "resnet50"  # or another ResNet or ResNeXt of torchvision's, with WEIGHTS to match


class WeightsError(SystemExit):
    """Pretrained weights are missing or do not fit. Uncaught: its message, exit status 1."""


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


def build_model(num_classes: int, weights: str = "", classes: Sequence[str] = ()) -> nn.Module:
    """torchvision's ResNet-50 with Head in place of its fc.

    weights: a torchvision name ("IMAGENET1K_V2": downloaded, its hash checked), the path of a
    state_dict file in torchvision's layout (its own fc is ignored) or of a checkpoint of train.py
    (its head is used too if it was trained on the same classes), or "" for random weights.
    Raises WeightsError.
    """
    # Each residual block starts as the identity: from random weights, training is steadier in its
    # first epoch (Goyal et al. 2017, arXiv 1706.02677). Pretrained weights overwrite it.
    model = get_model(ARCHITECTURE, zero_init_residual=True)
    model.fc = Head(model.fc.in_features, num_classes)
    if weights:
        pretrained, pretrained_classes = read_weights(weights)
        if not pretrained_classes or pretrained_classes != list(classes):
            pretrained = {name: x for name, x in pretrained.items() if not name.startswith("fc.")}
            pretrained |= {f"fc.{name}": x for name, x in model.fc.state_dict().items()}
        try:
            model.load_state_dict(pretrained)
        except RuntimeError as error:
            reasons = str(error).splitlines()
            raise WeightsError(
                f"{weights} does not fit torchvision's {ARCHITECTURE}: {reasons[1].strip()}"
            ) from error
    return model


def read_weights(weights: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state_dict behind a torchvision name or a path; a checkpoint's classes, else none.

    Raises WeightsError.
    """
    names = get_model_weights(ARCHITECTURE).__members__
    if weights in names:
        try:
            return names[weights].get_state_dict(check_hash=True, weights_only=True), []
        except Exception as error:
            raise WeightsError(
                f"Weights {weights} could not be downloaded: {error}\n"
                f"Download {names[weights].url} elsewhere and pass its path, "
                'or train from scratch with --weights ""'
            ) from error
    if not Path(weights).is_file():
        raise WeightsError(
            f"Weights {weights} not found. "
            f'Expected {", ".join(names)}, the path of a state_dict file, or "".'
        )
    try:
        if zipfile.is_zipfile(weights):  # torch.load verifies no checksum
            with zipfile.ZipFile(weights) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} in it fails its checksum")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        classes = state.get("classes", [])
        state = state["model"] if classes else state
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("its weights are not finite")
        return {name: tensor.float() for name, tensor in state.items()}, classes
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{weights} is not a state_dict file that can be used: {reason}"
        ) from error


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
        return torch.cat([model(images) for images in batches])


def extract_features(
    model: nn.Module, loader: Iterable[Tensor], dtype: torch.dtype, progress: bool = False
) -> Tensor:
    """What the head gets to see (N, num_features), in eval mode, of the images of an EvalLoader."""
    backbone = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    return predict(backbone, loader, dtype, progress).to(model.fc[0].weight.dtype)


def freeze_stages(model: nn.Module, count: int) -> None:
    """Makes the stem and the first count of the four stages constant; 0 freezes nothing."""
    if count:
        stem_and_stages = list(model.children())[: 4 + count]  # conv1, bn1, relu, maxpool, layer1
        nn.ModuleList(stem_and_stages).requires_grad_(False)


def set_train_mode(network: nn.Module, freeze_batch_norm: bool) -> None:
    """Like network.train(), but batch norm keeps its statistics if it, or its stage, is frozen."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(module.weight.requires_grad and not freeze_batch_norm)
