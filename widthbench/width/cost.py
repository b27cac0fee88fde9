"""What a plan costs, without building it: multiply-accumulates (MACs) and parameters, exact to the last one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every layer's mode as it was afterwards."""
    training = {m: m.training for m in model.modules()}
    # torch's FLOP counter stumbles over bare parameters that ask for a gradient and get none
    learning = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        for p in learning:
            p.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for m, mode in training.items():
            m.training = mode


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """MACs of one forward pass per sample, by ``torch.utils.flop_counter`` (which counts 2 per multiply-add), halved.

    Convolutions, matrix products and fused attention count; elementwise work, norms and pooling do not, as is usual.

    Args:
        model: The network, in any mode; it is run in eval mode and left as it was.
        example_input: ``[B, ...]``.
    """
    with _evaluating(model), FlopCounterMode(display=False) as counter:
        model(example_input)
    return int(counter.get_total_flops()) // 2 // example_input.shape[0]


class CostModel:
    """Cost as a function of the groups' widths, from one forward pass, which is made when first needed.

    Args:
        model: The network at its original widths.
        groups: Its groups.
        example_input: ``[B, ...]``, of the size that costs are counted for.
    """

    def __init__(self, model: nn.Module, groups: Groups, example_input: Tensor) -> None:
        self._model, self._example_input = model, example_input
        self._axes: dict[str, dict[Side, Axis]] = {}
        for (layer, side), axis in groups.axes.items():
            self._axes.setdefault(layer, {})[side] = axis
        self._modules: dict[str, Any] = {layer: model.get_submodule(layer) for layer in self._axes}

    @property
    def original(self) -> Cost:
        """The cost at the original widths."""
        return self._profile[0]

    @property
    def macs(self) -> int:
        """MACs at the original widths."""
        return self.original.macs

    @property
    def params(self) -> int:
        """Parameters at the original widths."""
        return self.original.params

    def __call__(self, widths: Mapping[str, int]) -> Cost:
        """The cost with the given number of channels per group.

        Args:
            widths: New number of channels by group name; groups that are not named keep theirs.
        """
        original, positions = self._profile
        before, after = self._touched({}, positions), self._touched(widths, positions)
        return Cost(original.macs - before.macs + after.macs, original.params - before.params + after.params)

    @cached_property
    def _profile(self) -> tuple[Cost, dict[str, int]]:
        """The original cost, and how many times per sample each layer's weight is applied: H·W for a convolution."""
        x, positions = self._example_input, dict.fromkeys(self._axes, 0)
        handles = []
        for name, module in self._modules.items():
            if kind_of(module) in ("conv", "depthwise", "linear"):

                def count(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                    positions[name] += output.numel() // axis_length(module, "out") // x.shape[0]

                handles.append(module.register_forward_hook(count))
        try:
            macs = count_macs(self._model, x)
        finally:
            for handle in handles:
                handle.remove()
        return Cost(macs, sum(p.numel() for p in self._model.parameters())), positions

    def _touched(self, widths: Mapping[str, int], positions: Mapping[str, int]) -> Cost:
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
                macs += positions[layer] * weights
                params += weights + (out if module.bias is not None else 0)
            else:
                params += out * sum(isinstance(getattr(module, t), nn.Parameter) for t, _ in tensors_on(module, "out"))
        return Cost(macs, params)


def _size(axis: Axis, widths: Mapping[str, int]) -> int:
    return sum(widths.get(s.group, s.channels) * s.repeat if s.group is not None else s.size for s in axis)
