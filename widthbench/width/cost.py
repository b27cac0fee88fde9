"""What a plan costs, without building it: multiply-accumulates (MACs) and parameters, exact to the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from widthbench.width.groups import Axis, Groups, Side, axis_length, kind_of, tensors_on


@dataclass(frozen=True)
class Cost:
    """The size of a network.

    Attributes:
        macs: Multiply-accumulates of one forward pass of one sample. What the literature prints as "FLOPs".
        params: Number of parameters.
    """

    macs: int
    params: int


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """MACs of one forward pass per sample, by ``torch.utils.flop_counter`` (which counts 2 per multiply-add), halved.

    Convolutions, matrix products and fused attention count; elementwise work, norms and pooling do not, as is usual.

    Args:
        model: The network, in any mode; it is run in eval mode and left as it was.
        example_input: ``[B, ...]``.
    """
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example_input)
    finally:
        for m, mode in training.items():
            m.training = mode
    return int(counter.get_total_flops()) // 2 // example_input.shape[0]


class CostModel:
    """Cost as a function of the groups' widths, from one profiled forward pass.

    Args:
        model: The network at its original widths.
        groups: Its groups.
        example_input: ``[B, ...]``, of the size that costs are counted for.
    """

    def __init__(self, model: nn.Module, groups: Groups, example_input: Tensor) -> None:
        modules = dict(model.named_modules())
        self._axes: dict[str, dict[Side, Axis]] = {}
        for (layer, side), axis in groups.axes.items():
            self._axes.setdefault(layer, {})[side] = axis
        self._positions = _output_positions(model, self._axes, example_input)
        self._modules: dict[str, Any] = {layer: modules[layer] for layer in self._axes}
        self.original = Cost(count_macs(model, example_input), sum(p.numel() for p in model.parameters()))
        touched = self._touched({})
        self._fixed = Cost(self.original.macs - touched.macs, self.original.params - touched.params)

    def __call__(self, widths: Mapping[str, int]) -> Cost:
        """The cost with the given number of channels per group.

        Args:
            widths: New number of channels by group name; groups that are not named keep theirs.
        """
        touched = self._touched(widths)
        return Cost(self._fixed.macs + touched.macs, self._fixed.params + touched.params)

    def _touched(self, widths: Mapping[str, int]) -> Cost:
        """The part of the cost that lies in layers that some group touches."""
        macs = params = 0
        for layer, sides in self._axes.items():
            module = self._modules[layer]
            kind = kind_of(module)
            out = _size(sides["out"], widths) if "out" in sides else axis_length(module, "out")
            if kind in ("conv", "depthwise", "linear"):
                inputs = 1
                if kind != "depthwise":
                    inputs = _size(sides["in"], widths) if "in" in sides else axis_length(module, "in")
                    inputs //= getattr(module, "groups", 1)
                weights = out * inputs * module.weight[0, 0].numel()
                macs += self._positions.get(layer, 0) * weights
                params += weights + (out if module.bias is not None else 0)
            else:
                params += out * sum(isinstance(getattr(module, t), nn.Parameter) for t, _ in tensors_on(module, "out"))
        return Cost(macs, params)


def _size(axis: Axis, widths: Mapping[str, int]) -> int:
    return sum(widths.get(s.group, s.channels) * s.repeat if s.group is not None else s.size for s in axis)


def _output_positions(model: nn.Module, layers: Mapping[str, Any], example_input: Tensor) -> dict[str, int]:
    """How many times per sample each layer's weight matrix is applied: H·W for a convolution, tokens for a linear layer."""
    positions: dict[str, int] = {}
    handles = []

    def hook(name: str) -> Any:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            applied = output.numel() // axis_length(module, "out") // example_input.shape[0]
            positions[name] = positions.get(name, 0) + applied

        return count

    for name in layers:
        module = model.get_submodule(name)
        if kind_of(module) in ("conv", "depthwise", "linear"):
            handles.append(module.register_forward_hook(hook(name)))
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in training.items():
            m.training = mode
    return positions
