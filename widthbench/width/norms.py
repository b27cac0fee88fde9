"""What a BatchNorm does to the channels of a group in eval mode: an affine map per channel, which folds into the layer before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widthbench.errors import UsageError
from widthbench.width.groups import Groups, channel_rows


@dataclass(frozen=True)
class Norm:
    """``y = gamma · (x - mean) / sqrt(var + eps) + beta``, each ``[N]`` in float64.

    Attributes:
        gamma: Weight; ones where there is none.
        beta: Bias; zeros where there is none.
        mean: Running mean.
        var: Running variance.
        eps: What is added to it.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def sigma(self) -> Tensor:
        """``sqrt(var + eps)``, ``[N]``."""
        return (self.var + self.eps).sqrt()


def norm_of(model: nn.Module, groups: Groups, name: str, layer: str) -> Norm:
    """A BatchNorm's map on the channels of a group.

    Args:
        model: The network that the groups were found in.
        groups: Its groups.
        name: The group.
        layer: A BatchNorm among its riders. The bias of the layer right before it is taken off the mean, so that the map
            is one of that layer's output without its bias.

    Raises:
        UsageError: If the layer keeps no running statistics: it normalises by its inputs, which no weights tell.
    """
    module: Any = model.get_submodule(layer)
    if module.running_var is None:
        kind = type(module).__name__
        raise UsageError(f"layer {layer} ({kind}) keeps no running statistics: what it does is not in its weights")
    mean = _entries(groups, name, layer, module.running_mean)
    gamma = torch.ones_like(mean) if module.weight is None else _entries(groups, name, layer, module.weight)
    beta = torch.zeros_like(mean) if module.bias is None else _entries(groups, name, layer, module.bias)
    before = next(iter(groups.behind.get(layer, ())), None)
    if before is not None and norm_behind(groups, before) == layer:
        mean = mean - bias_of(model, groups, name, before)
    return Norm(gamma, beta, mean, _entries(groups, name, layer, module.running_var), module.eps)


def norm_behind(groups: Groups, layer: str) -> str | None:
    """The BatchNorm that reads a layer's output right behind it and is alone to read it; None if there is none."""
    readers = groups.readers.get(layer, ())
    return readers[0] if len(readers) == 1 and readers[0] in groups.adjacent else None


def filter_rows(model: nn.Module, groups: Groups, name: str, layer: str, *, fold: bool = False, bias: bool = True) -> Tensor:
    """A layer's weights by channel, with its bias as one more weight where no BatchNorm comes right behind it.

    Args:
        model: The network that the groups were found in.
        groups: Its groups.
        name: The group.
        layer: A producer, or a depthwise convolution among the riders.
        fold: Fold the BatchNorm right behind the layer into it: weights ``γ/σ · w``, bias ``β + γ/σ · (b - μ)``.
        bias: False leaves an unfolded bias out.

    Returns:
        ``[N, D]`` in float64, the bias last.
    """
    module: Any = model.get_submodule(layer)
    rows = channel_rows(groups, name, layer, module.weight).double()
    behind = norm_behind(groups, layer)
    if behind is None:
        if module.bias is None or not bias:
            return rows
        return torch.cat([rows, channel_rows(groups, name, layer, module.bias).double()], dim=1)
    if not fold:
        return rows
    norm = norm_of(model, groups, name, behind)
    factor = norm.gamma / norm.sigma
    return torch.cat([factor[:, None] * rows, (norm.beta - factor * norm.mean)[:, None]], dim=1)


def bias_of(model: nn.Module, groups: Groups, name: str, layer: str) -> Tensor:
    """A layer's bias by channel, ``[N]`` in float64; zeros where it has none."""
    module: Any = model.get_submodule(layer)
    if module.bias is None:
        return module.weight.new_zeros(groups[name].channels, dtype=torch.float64)
    return _entries(groups, name, layer, module.bias)


def _entries(groups: Groups, name: str, layer: str, tensor: Tensor) -> Tensor:
    """A layer's vector by channel, ``[N]`` in float64; the mean where a flatten gives a channel several entries."""
    rows = channel_rows(groups, name, layer, tensor).double()
    return rows[:, 0] if rows.shape[1] == 1 else rows.mean(dim=1)
