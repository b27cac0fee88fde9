"""What a plan costs, without building it: multiply-accumulates (MACs) and parameters, exact to the
last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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

_Term = tuple[
    int, tuple[int, ...], int
]  # a factor, places of axes, what their product is divided by

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

    def _scaled(self, whole: int, axes: tuple[Axis, ...], widths: Mapping[str, int]) -> int:
        sizes = (
            math.prod(axis_width(a, w, self._groups.everything) for a in axes) for w in (widths, {})
        )
        new, old = sizes
        return whole * new // old

    @cached_property
    def _terms(self) -> tuple[list[Axis], list[_Term], list[_Term]]:
        """Axes, and the MACs and parameters that some group touches as products of their widths."""
        everything, places = self._groups.everything, dict[Axis, int]()

        def term(whole: int, axes: Iterable[Axis], part: int) -> _Term:
            return whole, tuple(places.setdefault(a, len(places)) for a in axes), part

        macs = [
            term(whole, axes, math.prod(axis_width(a, {}, everything) for a in axes))
            for whole, axes, _ in self._found.products
        ]
        params = []
        sides: dict[str, dict[Side, Axis]] = {}
        for (layer, side), axis in self._groups.axes.items():
            sides.setdefault(layer, {})[side] = axis
        for layer, found in sides.items():
            module: Any = self._model.get_submodule(layer)
            out = [found["out"]] if "out" in found else []
            outs = 1 if out else axis_length(module, "out")
            if (kind := kind_of(module)) in ("depthwise", *MAKING):
                each, axes, part = outs * module.weight[0, 0].numel(), list(out), 1
                if kind != "depthwise":
                    part = getattr(module, "groups", 1)
                    if "in" in found:
                        axes.append(found["in"])
                    else:
                        each *= axis_length(module, "in")
                params.append(term(each, axes, part))
                if module.bias is not None:
                    params.append(term(outs, out, 1))
            else:
                own = (getattr(module, t) for t, _ in tensors_on(module, "out"))
                params.append(term(outs * sum(isinstance(t, nn.Parameter) for t in own), out, 1))
        bare: dict[str, dict[int, Axis]] = {}
        for (name, dim), axis in self._groups.tensors.items():
            bare.setdefault(name, {})[dim] = axis
        parameters = dict(self._model.named_parameters())
        for name, dims in bare.items():
            if name in parameters:
                rest = [n for d, n in enumerate(parameters[name].shape) if d not in dims]
                params.append(term(math.prod(rest), dims.values(), 1))
        return list(places), macs, params

    def _touched(self, widths: Mapping[str, int]) -> Cost:
        """The part of the cost that lies in layers, bare parameters and products that some group
        touches.
        """
        axes, macs, params = self._terms
        sizes = [axis_width(axis, widths, self._groups.everything) for axis in axes]

        def total(terms: list[_Term]) -> int:
            return sum(whole * math.prod(sizes[i] for i in at) // part for whole, at, part in terms)

        return Cost(total(macs), total(params))
