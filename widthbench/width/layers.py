"""Layers that can be resized: their kinds, and the tensors that run along each of their axes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from widthbench.errors import UsageError

RESPONSE = ("GlobalResponseNorm", "GRN")  # global response normalisation (ConvNeXt V2)
MAKING = ("conv", "transposed", "linear")  # that make channels out of others
Side = Literal["out", "in"]
Step = tuple[str, tuple[int, ...]]  # the name of an operation and the shape of what it gives


def kind_of(module: nn.Module) -> str | None:
    """The layer's kind: conv, transposed, depthwise, linear, batchnorm, channelnorm, prelu; None if
    it cannot be resized.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        # one filter for each channel, or several
        return "depthwise" if module.groups == module.in_channels > 1 else "conv"
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        own = module.groups == module.in_channels == module.out_channels > 1
        return "depthwise" if own else "transposed" if module.groups == 1 else None
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return "batchnorm"
    shape: Any = getattr(module, "normalized_shape", None)  # of LayerNorm, RMSNorm and their like
    if isinstance(module, nn.GroupNorm) or (isinstance(shape, list | tuple) and len(shape) == 1):
        return "channelnorm"
    if type(module).__name__ in RESPONSE and getattr(module, "weight", torch.empty(())).dim() == 1:
        return "channelnorm"
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return "prelu"
    return None


def norms_apart(module: nn.Module, size: int) -> bool:
    """Whether a norm treats blocks of so many of its channels each by itself."""
    return isinstance(module, nn.GroupNorm) and size * module.num_groups % module.num_channels == 0


def axis_length(module: nn.Module, side: Side) -> int:
    """Number of positions along a layer's axis."""
    m: Any = module
    match kind_of(module):
        case "conv" | "depthwise" | "transposed":
            return int(m.in_channels if side == "in" else m.out_channels)
        case "linear":
            return int(m.in_features if side == "in" else m.out_features)
        case "batchnorm":
            return int(m.num_features)
        case "channelnorm":
            if isinstance(m, nn.GroupNorm):
                return int(m.num_channels)
            return len(m.weight) if type(m).__name__ in RESPONSE else int(m.normalized_shape[0])
        case "prelu":
            return int(m.num_parameters)
    raise UsageError(f"layers of type {type(module).__name__} cannot be resized")


def tensors_on(module: nn.Module, side: Side) -> list[tuple[str, int]]:
    """The (tensor name, dimension) pairs of a layer that run along an axis."""
    turned = kind_of(module) == "transposed"
    if side == "in":
        return [("weight", 0 if turned else 1)]
    names = ("weight", "bias", "running_mean", "running_var")
    dims = {"weight": 1} if turned else {}
    return [(n, dims.get(n, 0)) for n in names if isinstance(getattr(module, n, None), Tensor)]


def outputs_first(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weights as ``[O, I/groups, ...]``: a transposed convolution keeps its inputs first.
    Twice is what it was.
    """
    return weight.transpose(0, 1) if kind_of(module) == "transposed" else weight
