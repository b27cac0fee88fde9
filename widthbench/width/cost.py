"""What a plan costs, without building it: multiply-accumulates (MACs) and parameters, exact to the last one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from widthbench.width.groups import Axis, Groups, discover
from widthbench.width.layers import Side, axis_length, kind_of, tensors_on
from widthbench.width.resize import axis_width


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


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def counter_of_operations() -> FlopCounterMode:
    """The counter of torch (2 per multiply-add), which does not know the fused attention that CPUs run."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention})


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """MACs of one forward pass per sample, by ``torch.utils.flop_counter`` (which counts 2 per multiply-add), halved.

    Convolutions, matrix products and fused attention count; elementwise work, norms and pooling do not, as is usual.

    Args:
        model: The network, in any mode; it is run in eval mode and left as it was.
        example_input: ``[B, ...]``.
    """
    with _evaluating(model), counter_of_operations() as counter:
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
        self._model, self._example_input, self._groups = model, example_input, groups
        self._axes: dict[str, dict[Side, Axis]] = {}
        for (layer, side), axis in groups.axes.items():
            self._axes.setdefault(layer, {})[side] = axis
        self._modules: dict[str, Any] = {layer: model.get_submodule(layer) for layer in self._axes}
        self._bare: dict[str, dict[int, Axis]] = {}
        parameters = dict(model.named_parameters())
        for (name, dim), axis in groups.tensors.items():
            if name in parameters:
                self._bare.setdefault(name, {})[dim] = axis
        self._shapes = {name: tuple(parameters[name].shape) for name in self._bare}

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
        original, before, _ = self._profile
        after = self._touched(widths)
        return Cost(original.macs - before.macs + after.macs, original.params - before.params + after.params)

    @cached_property
    def _profile(self) -> tuple[Cost, Cost, Groups]:
        """The original cost, the part of it that lies where groups are, and the groups as found at this input's size."""
        cost = Cost(count_macs(self._model, self._example_input), sum(p.numel() for p in self._model.parameters()))
        return cost, self._touched({}), self._found

    @cached_property
    def _found(self) -> Groups:
        """How often weights are applied, and products of activations: they depend on the input's size."""
        if self._groups.input_shape == tuple(self._example_input.shape[1:]):
            return self._groups
        return discover(self._model, self._example_input)

    def _size(self, axis: Axis, widths: Mapping[str, int]) -> int:
        return axis_width(axis, widths, self._groups.everything)

    def _touched(self, widths: Mapping[str, int]) -> Cost:
        """The part of the cost that lies in layers, bare parameters and products that some group touches."""
        macs = params = 0
        for layer, sides in self._axes.items():
            module = self._modules[layer]
            kind = kind_of(module)
            out = self._size(sides["out"], widths) if "out" in sides else axis_length(module, "out")
            if kind in ("conv", "depthwise", "linear"):
                inputs = 1
                if kind != "depthwise":
                    inputs = self._size(sides["in"], widths) if "in" in sides else axis_length(module, "in")
                    inputs //= getattr(module, "groups", 1)
                weights = out * inputs * module.weight[0, 0].numel()
                macs += self._found.applied.get(layer, 0) * weights
                params += weights + (out if module.bias is not None else 0)
            else:
                params += out * sum(isinstance(getattr(module, t), nn.Parameter) for t, _ in tensors_on(module, "out"))
        for name, axes in self._bare.items():
            params += math.prod(self._size(axes[d], widths) if d in axes else n for d, n in enumerate(self._shapes[name]))
        for whole, grids in self._found.products:
            new, old = (math.prod(self._size(axis, w) for axis in grids) for w in (widths, {}))
            macs += whole * new // old
        return Cost(macs, params)
