"""Scales the convolutions of a ResNet's weights to the norms that torchvision's initialization has.

    python tests/rescale_weights.py IN.pth OUT.pth

The statistics of the batch norm behind each are scaled with it, so that the network computes the
same. SGD does not: batch norm's output ignores the scale of the weights before it, and a step turns
them by an angle that falls with the square of their norm (van Laarhoven 2017, arXiv 1706.05350).
Weights that were decoded from a compressed form can be many times too large to be trained further.
"""

import sys

import torch
from torch import Tensor

EPSILON = 1e-5  # of torch's batch norm


def rescale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict like this one; each convolution has the norm of He et al. 2015 (fan_out)."""
    weights = dict(weights)
    for name, kernel in list(weights.items()):
        if kernel.ndim != 4:
            continue
        block, _, layer = name.removesuffix(".weight").rpartition(".")
        norm = f"{block}.1" if layer == "0" else f"{block}.bn{layer[-1]}".lstrip(".")
        fan_out = kernel.shape[0] * kernel[0, 0].numel()
        scale = (2 / fan_out * kernel.numel()) ** 0.5 / kernel.norm()
        variance = weights[f"{norm}.running_var"]
        changed = (scale**2 * variance + EPSILON) / (scale**2 * (variance + EPSILON))
        weights[name] = scale * kernel
        weights[f"{norm}.running_mean"] = scale * weights[f"{norm}.running_mean"]
        weights[f"{norm}.running_var"] = scale**2 * variance
        weights[f"{norm}.weight"] = changed.sqrt() * weights[f"{norm}.weight"]
    return weights


if __name__ == "__main__":
    torch.save(rescale(torch.load(sys.argv[1], weights_only=True)), sys.argv[2])
