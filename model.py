"""ResNet-50 with a small head for fine-tuning, and the one function that evaluates it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50
from tqdm import tqdm


class WeightsError(SystemExit):
    """Pretrained weights that cannot be had or do not fit. Uncaught: its message, exit status 1."""


class Head(nn.Sequential):
    """Linear 512, ReLU, Dropout 0.5, Linear num_classes; in full precision also under autocast.

    Logits in bfloat16 tie, and ties make accuracies that depend on the order of sums.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(
            nn.Linear(num_features, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, num_classes)
        )

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self[0].weight.dtype))


def build_model(num_classes: int, weights: str = "") -> nn.Module:
    """torchvision's ResNet-50 with its fc replaced by Head.

    weights: a torchvision name ("IMAGENET1K_V2": downloaded, its hash checked), the path of a
    state_dict file in torchvision's layout (its own fc is ignored), or "" for random weights.
    Raises WeightsError.
    """
    model = resnet50()
    model.fc = Head(model.fc.in_features, num_classes)
    if weights:
        pretrained = {
            name: tensor
            for name, tensor in read_weights(weights).items()
            if not name.startswith("fc.")
        }
        head = {f"fc.{name}": tensor for name, tensor in model.fc.state_dict().items()}
        try:
            model.load_state_dict(pretrained | head)
        except RuntimeError as error:
            reasons = str(error).splitlines()
            raise WeightsError(
                f"{weights} does not fit torchvision's resnet50: {reasons[1].strip()}"
            ) from error
    return model


def read_weights(weights: str) -> dict[str, Tensor]:
    """The state_dict behind a torchvision name or a path. Raises WeightsError."""
    if weights in ResNet50_Weights.__members__:
        try:
            return ResNet50_Weights[weights].get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:
            raise WeightsError(
                f"Weights {weights} could not be downloaded: {error}\n"
                f"Download {ResNet50_Weights[weights].url} elsewhere and pass its path, "
                'or train from scratch with --weights ""'
            ) from error
    if not Path(weights).is_file():
        names = ", ".join(ResNet50_Weights.__members__)
        raise WeightsError(
            f'Weights {weights} not found. Expected {names}, the path of a state_dict file, or "".'
        )
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        return {name: tensor.float() for name, tensor in state.items()}
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{weights} is not a state_dict file that torch.load can read safely: {reason}"
        ) from error


@torch.inference_mode()
def predict(model: nn.Module, loader, dtype: torch.dtype, progress: bool = False) -> Tensor:
    """Logits float (N, num_classes) of all N images of a data.EvalLoader, in its order."""
    model.eval()
    batches = tqdm(loader, desc="predict", unit="batch", leave=False, disable=not progress)
    with torch.autocast(loader.images.device.type, dtype, enabled=dtype.itemsize < 4):
        return torch.cat([model(images) for images, _ in batches])
