"""Gates: a plan's virtual twin, one factor per channel, without touching the network's tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widthbench.errors import PlanError, did_you_mean
from widthbench.width.groups import Axis, Group, Groups
from widthbench.width.layers import kind_of


class Joined(dict[str, Tensor]):
    """A number for each channel of all groups; ``[name]`` is a group's ``[N]``.

    They lie one after another in one vector, so that what is done to each of them is one operation,
    however many groups there are.

    Args:
        groups: The groups.
        like: Their device and type.
        value: What they begin with.

    Attributes:
        all: ``[ΣN]``; change it in place.
    """

    def __init__(self, groups: Mapping[str, Group], like: Tensor, value: float = 0.0) -> None:
        self.all = like.new_full((sum(g.channels for g in groups.values()),), value)
        sizes = [g.channels for g in groups.values()]
        super().__init__(zip(groups, self.all.split(sizes), strict=True))

    def parts(self, vector: Tensor) -> dict[str, Tensor]:
        """Another vector ``[ΣN]``, by group."""
        return dict(zip(self, vector.split([len(v) for v in self.values()]), strict=True))


@contextmanager
def gated(
    model: nn.Module,
    groups: Groups,
    values: Mapping[str, Tensor],
    on: Literal["input", "weight"] = "input",
    products: dict[str, list[Tensor]] | None = None,
) -> Iterator[nn.Module]:
    """Multiply channels by gates while the context is open.

    Gates are differentiable with respect to ``values`` and leave parameters, buffers and the state
    dict alone.

    Args:
        model: The network that ``groups`` was found in.
        groups: Its groups.
        values: ``[N]`` factors per group; groups that are not named are open.
        on: "input" multiplies the channels where the consumers read them, so that gate 0 equals
            physical removal. "weight" multiplies the consumers' incoming weights of the channel:
            the same output, but a closed channel's weights ``w`` still give ``∂L/∂(w·gate)``, which
            AutoPrune (Xiao et al., NeurIPS 2019) needs. Keys, which read the channels of queries in
            a product, are gated at their output or in their rows.
        products: With "weight": each pass adds the gated weights ``w·gate`` of consumers that it
            used, by layer, as tensors to differentiate by.

    Yields:
        The same network, gated.

    Raises:
        PlanError: If a group is unknown or a vector of gates has the wrong shape.
    """
    if on not in ("input", "weight"):
        raise PlanError(f"gates sit on 'input' or 'weight', not {on!r}")
    for name, value in values.items():
        if name not in groups:
            raise PlanError(
                f"gates name no channel group of this network: '{name}'{did_you_mean(name, groups)}"
            )
        if tuple(value.shape[-1:]) != (groups[name].channels,) or value.dim() != 1:
            raise PlanError(
                f"channel group '{name}' takes {groups[name].channels} gates, not"
                f" {list(value.shape)}"
            )
    with ExitStack() as stack:
        for (layer, side), axis in groups.axes.items():
            if side == "in" and any(s.group in values or s.outer in values for s in axis):
                module = model.get_submodule(layer)
                used = None if products is None else products.setdefault(layer, [])
                # a layer that is not called has no input to multiply: its weights give the same
                called = module if layer not in groups.apart else model
                for handle in (
                    _on_input(module, axis, values)
                    if on == "input" and called is module
                    else _on_weight(module, axis, values, used, called)
                ):
                    stack.callback(handle.remove)
            elif side == "out" and any(
                s.reads and s.group in values for s in axis
            ):  # keys, which read what queries are
                module = model.get_submodule(layer)
                called = module if layer not in groups.apart else model
                for handle in (
                    _on_output(module, axis, values)
                    if on == "input" and called is module
                    else _on_rows(module, axis, values, called)
                ):
                    stack.callback(handle.remove)
        for (name, dim), axis in groups.tensors.items():
            if any(s.reads and s.group in values for s in axis):
                for handle in _on_bare(model, name, dim, axis, values):
                    stack.callback(handle.remove)
        yield model


def along_axis(axis: Axis, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The gates along a whole axis, ``[I]``: each segment's values repeated, ones where nothing is
    gated.
    """
    parts = []
    for s in axis:
        gates = [
            values[n].to(device=like.device, dtype=like.dtype)
            for n in (s.group, s.outer)
            if n is not None and n in values
        ]
        spread = [g if len(g) == s.size else g.repeat_interleave(s.size // len(g)) for g in gates]
        parts.append(math.prod(spread[1:], start=spread[0]) if spread else like.new_ones(s.size))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _on_input(module: nn.Module, axis: Axis, values: Mapping[str, Tensor]) -> list[Any]:
    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        gate = along_axis(axis, values, x)
        if kind_of(module) != "linear":  # channels come second: [B, C, ...]
            gate = gate.reshape(-1, *[1] * (x.dim() - 2))
        return (x * gate, *args[1:])

    return [module.register_forward_pre_hook(multiply)]


def _on_weight(
    module: Any,
    axis: Axis,
    values: Mapping[str, Tensor],
    products: list[Tensor] | None,
    called: nn.Module,
) -> list[Any]:
    def swap_in(called: Any, args: Any) -> None:
        weight = module.__dict__.get(
            "weight", module._parameters["weight"]
        )  # its rows may be gated already
        gate = along_axis(axis, values, weight)
        count = getattr(module, "groups", 1)
        if count > 1:  # [I] -> [O, I/G]: each block of outputs reads its own block of inputs
            gate = gate.view(count, 1, -1).expand(-1, weight.shape[0] // count, -1).flatten(0, 1)
        else:
            gate = gate[:, None] if kind_of(module) == "transposed" else gate[None]
        gated = weight * gate.reshape(*gate.shape, *[1] * (weight.dim() - 2))
        if products is not None:
            products.append(gated)
        # an instance attribute hides the registered parameter from attribute look-up, and from
        # nothing else
        module.__dict__["weight"] = gated

    def swap_out(called: Any, args: Any, output: Any) -> None:
        module.__dict__.pop("weight", None)

    return [
        called.register_forward_pre_hook(swap_in),
        called.register_forward_hook(swap_out, always_call=True),
    ]


def _keys(axis: Axis, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Gates along an output axis, ones but for keys."""
    return along_axis(
        tuple(s if s.reads else replace(s, group=None) for s in _without_heads(axis)), values, like
    )


def _without_heads(axis: Axis) -> Axis:
    return tuple(replace(s, outer=None) for s in axis)


def _on_output(module: nn.Module, axis: Axis, values: Mapping[str, Tensor]) -> list[Any]:
    def multiply(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        gate = _keys(axis, values, output)
        return output * (
            gate if kind_of(module) == "linear" else gate.reshape(-1, *[1] * (output.dim() - 2))
        )

    return [module.register_forward_hook(multiply)]


def _on_rows(module: Any, axis: Axis, values: Mapping[str, Tensor], called: nn.Module) -> list[Any]:
    names = [n for n in ("weight", "bias") if getattr(module, n, None) is not None]

    def swap_in(called: Any, args: Any) -> None:
        for name in names:
            tensor = module.__dict__.get(name, module._parameters[name])
            gate = _keys(axis, values, tensor)
            module.__dict__[name] = tensor * gate.reshape(-1, *[1] * (tensor.dim() - 1))

    def swap_out(called: Any, args: Any, output: Any) -> None:
        for name in names:
            module.__dict__.pop(name, None)

    return [
        called.register_forward_pre_hook(swap_in),
        called.register_forward_hook(swap_out, always_call=True),
    ]


def _on_bare(
    model: nn.Module, name: str, dim: int, axis: Axis, values: Mapping[str, Tensor]
) -> list[Any]:
    holder, _, own = name.rpartition(".")
    shared = getattr(model.get_submodule(holder), own)
    owners: list[tuple[Any, str]] = [
        (module, leaf)
        for module in model.modules()
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is shared
    ]

    def swap_in(called: Any, args: Any) -> None:
        for module, leaf in owners:
            tensor = module.__dict__.get(leaf, shared)
            gate = _keys(axis, values, tensor)
            module.__dict__[leaf] = tensor * gate.view(-1, *[1] * (tensor.dim() - dim - 1))

    def swap_out(called: Any, args: Any, output: Any) -> None:
        for module, leaf in owners:
            module.__dict__.pop(leaf, None)

    return [  # whoever reads them does so while the network runs
        model.register_forward_pre_hook(swap_in),
        model.register_forward_hook(swap_out, always_call=True),
    ]


def sums_over_consumers(
    model: nn.Module, groups: Groups, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Sum what belongs to the weights of all consumers over each channel's part of them: the
    adjoint of gating weights.

    Args:
        model: The network.
        groups: Its groups.
        values: By consumer, of the shape of its weight, ``[..., O, I/G, ...]``; any number of such
            tensors beside each other.

    Returns:
        ``[..., N]`` for each of the groups that the consumers read.
    """
    heads = {n: g.channels for n, g in groups.everything.items() if g.heads}
    sums: dict[str, Tensor] = {}
    for layer, value in values.items():
        module: Any = model.get_submodule(layer)
        axis, count = groups.axes[layer, "in"], getattr(module, "groups", 1)
        several = value.shape[: value.dim() - module._parameters["weight"].dim()]
        if kind_of(module) == "transposed":
            value = value.transpose(len(several), len(several) + 1)
        rows, columns = value.shape[len(several) : len(several) + 2]
        along = value.reshape(*several, count, rows // count, columns, -1).sum(dim=(-3, -1))
        parts = along.flatten(len(several)).split([s.size for s in axis], dim=-1)
        for segment, part in zip(axis, parts, strict=True):
            for name, channels in (
                (segment.group, segment.channels),
                (segment.outer, heads.get(str(segment.outer), 1)),
            ):
                if name is None or name not in groups:
                    continue
                if channels != segment.size:
                    part_of = part.reshape(*several, channels, -1).sum(dim=-1)
                else:
                    part_of = part
                sums[name] = sums[name] + part_of if name in sums else part_of
    return sums
