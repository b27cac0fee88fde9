"""What a plan costs, without building it: multiply-accumulates (MACs) and parameters, exact to the
last one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from widthbench.errors import CostError
from widthbench.width.assembly import discover
from widthbench.width.counting import count_macs, macs_by_module
from widthbench.width.groups import Axis, Groups
from widthbench.width.inputs import Example, Inputs
from widthbench.width.layers import MAKING, Side, axis_length, kind_of, tensors_on
from widthbench.width.resize import axis_width

__all__ = ["Cost", "CostModel", "count_macs"]


@dataclass(frozen=True)
class Cost:
    """The size of a network.

    Attributes:
        macs: Multiply-accumulates of one forward pass of one sample (of the whole example input
            where the network takes no single sample). What the literature prints as "FLOPs".
        params: Number of parameters.
    """

    macs: int
    params: int


class CostModel:
    """Cost as a function of the groups' widths, from one forward pass, which is made when first
    needed.

    Args:
        model: The network at its original widths.
        groups: Its groups.
        example_input: ``[B, ...]``, or whatever the network takes, of the size that costs are
            counted for; one sample of it is run, or all where the groups were found on all.
    """

    def __init__(self, model: nn.Module, groups: Groups, example_input: Example) -> None:
        self._model, self._groups = model, groups
        self._inputs = Inputs.of(example_input).first(groups.samples)
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
        return Cost(
            original.macs - before.macs + after.macs, original.params - before.params + after.params
        )

    def counted(self, model: nn.Module, widths: Mapping[str, int]) -> Cost:
        """The cost of a resized network as torch counts it, which must be what was predicted from
        its widths.

        Args:
            model: The resized network.
            widths: Its number of channels by group name.

        Raises:
            CostError: If they differ; it names the modules in which they do.
        """
        cost = Cost(
            macs_by_module(model, self._inputs)[""], sum(p.numel() for p in model.parameters())
        )
        said = self(widths)
        if cost != said:
            raise CostError(
                f"{type(model).__name__} was predicted to have {said.macs:,} MACs and"
                f" {said.params:,} parameters, but has {cost.macs:,} and {cost.params:,}:"
                f" {self._differences(model, widths)}"
            )
        return cost

    def _differences(self, model: nn.Module, widths: Mapping[str, int]) -> str:
        """The modules, innermost ones only, whose MACs or parameters are not those that were
        predicted.
        """
        predicted, counted = (
            macs_by_module(self._model, self._inputs),
            macs_by_module(model, self._inputs),
        )
        for whole, axes, where in self._found.products:
            change = self._scaled(whole, axes, widths) - whole
            parts = where.split(".") if where else []
            for name in ("", *(".".join(parts[: i + 1]) for i in range(len(parts)))):
                predicted[name] = predicted.get(name, 0) + change
        names = [n for n in {**predicted, **counted} if predicted.get(n, 0) != counted.get(n, 0)]
        inner = [n for n in names if n and not any(m.startswith(f"{n}.") for m in names)]
        shown = [
            f"{n} ({predicted.get(n, 0):,} predicted, {counted.get(n, 0):,} counted)"
            for n in inner or names
        ]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        return f"MACs of {', '.join(shown[:3])}{more}" if shown else "parameters that no group has"

    @cached_property
    def _profile(self) -> tuple[Cost, Cost, Groups]:
        """The original cost, the part of it that lies where groups are, and the groups as found at
        this input's size.
        """
        cost = Cost(
            macs_by_module(self._model, self._inputs)[""],
            sum(p.numel() for p in self._model.parameters()),
        )
        return cost, self._touched({}), self._found

    @cached_property
    def _found(self) -> Groups:
        """What products of weights and activations take depends on the input's size."""
        if self._groups.input_shapes == self._inputs.shapes:
            return self._groups
        return discover(self._model, self._inputs)

    def _size(self, axis: Axis, widths: Mapping[str, int]) -> int:
        return axis_width(axis, widths, self._groups.everything)

    def _scaled(self, whole: int, axes: tuple[Axis, ...], widths: Mapping[str, int]) -> int:
        new, old = (math.prod(self._size(axis, w) for axis in axes) for w in (widths, {}))
        return whole * new // old

    def _touched(self, widths: Mapping[str, int]) -> Cost:
        """The part of the cost that lies in layers, bare parameters and products that some group
        touches.
        """
        params = 0
        for layer, sides in self._axes.items():
            module = self._modules[layer]
            kind = kind_of(module)
            out = self._size(sides["out"], widths) if "out" in sides else axis_length(module, "out")
            if kind in ("depthwise", *MAKING):
                inputs = 1
                if kind != "depthwise":
                    inputs = (
                        self._size(sides["in"], widths)
                        if "in" in sides
                        else axis_length(module, "in")
                    )
                    inputs //= getattr(module, "groups", 1)
                params += out * inputs * module.weight[0, 0].numel() + (
                    out if module.bias is not None else 0
                )
            else:
                params += out * sum(
                    isinstance(getattr(module, t), nn.Parameter)
                    for t, _ in tensors_on(module, "out")
                )
        for name, axes in self._bare.items():
            params += math.prod(
                self._size(axes[d], widths) if d in axes else n
                for d, n in enumerate(self._shapes[name])
            )
        return Cost(
            sum(self._scaled(whole, axes, widths) for whole, axes, _ in self._found.products),
            params,
        )
