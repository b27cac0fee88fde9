"""Gates: a plan's virtual twin, one factor per channel, without touching the network's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widthbench.errors import PlanError, did_you_mean
from widthbench.width.groups import Axis, Groups, kind_of


@contextmanager
def gated(
    model: nn.Module,
    groups: Groups,
    values: Mapping[str, Tensor],
    on: Literal["input", "weight"] = "input",
    products: dict[str, list[Tensor]] | None = None,
) -> Iterator[nn.Module]:
    """Multiply channels by gates while the context is open.

    Gates are differentiable with respect to ``values`` and leave parameters, buffers and the state dict alone.

    Args:
        model: The network that ``groups`` was found in.
        groups: Its groups.
        values: ``[N]`` factors per group; groups that are not named are open.
        on: "input" multiplies the channels where the consumers read them, so that gate 0 equals physical removal.
            "weight" multiplies the consumers' incoming weights of the channel: the same output, but a closed channel's
            weights ``w`` still give ``∂L/∂(w·gate)``, which AutoPrune (Xiao et al., NeurIPS 2019) needs.
        products: With "weight": each pass adds the gated weights ``w·gate`` that it used, by layer, as tensors to differentiate by.

    Yields:
        The same network, gated.

    Raises:
        PlanError: If a group is unknown or a vector of gates has the wrong shape.
    """
    if on not in ("input", "weight"):
        raise PlanError(f"gates sit on 'input' or 'weight', not {on!r}")
    for name, value in values.items():
        if name not in groups:
            raise PlanError(f"gates name no channel group of this network: '{name}'{did_you_mean(name, groups)}")
        if tuple(value.shape[-1:]) != (groups[name].channels,) or value.dim() != 1:
            raise PlanError(f"channel group '{name}' takes {groups[name].channels} gates, not {list(value.shape)}")
    with ExitStack() as stack:
        for (layer, side), axis in groups.axes.items():
            if side == "in" and any(s.group in values for s in axis):
                module = model.get_submodule(layer)
                found = None if products is None else products.setdefault(layer, [])
                for handle in _on_input(module, axis, values) if on == "input" else _on_weight(module, axis, values, found):
                    stack.callback(handle.remove)
        yield model


def along_axis(axis: Axis, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The gates along a whole axis, ``[I]``: each segment's values repeated, ones where nothing is gated."""
    parts = []
    for s in axis:
        if s.group is not None and s.group in values:
            value = values[s.group].to(device=like.device, dtype=like.dtype)
            parts.append(value if s.repeat == 1 else value.repeat_interleave(s.repeat))
        else:
            parts.append(like.new_ones(s.size))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _on_input(module: nn.Module, axis: Axis, values: Mapping[str, Tensor]) -> list[Any]:
    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        gate = along_axis(axis, values, x)
        if kind_of(module) != "linear":  # channels come second: [B, C, ...]
            gate = gate.reshape(-1, *[1] * (x.dim() - 2))
        return (x * gate, *args[1:])

    return [module.register_forward_pre_hook(multiply)]


def _on_weight(module: nn.Module, axis: Axis, values: Mapping[str, Tensor], products: list[Tensor] | None) -> list[Any]:
    def swap_in(module: Any, args: Any) -> None:
        weight = module._parameters["weight"]
        gate = along_axis(axis, values, weight)
        count = getattr(module, "groups", 1)
        if count > 1:  # [I] -> [O, I/G]: each block of outputs reads its own block of inputs
            gate = gate.view(count, 1, -1).expand(-1, weight.shape[0] // count, -1).flatten(0, 1)
        else:
            gate = gate[None]
        gated = weight * gate.reshape(*gate.shape, *[1] * (weight.dim() - 2))
        if products is not None:
            products.append(gated)
        # an instance attribute hides the registered parameter from attribute look-up, and from nothing else
        module.__dict__["weight"] = gated

    def swap_out(module: Any, args: Any, output: Any) -> None:
        module.__dict__.pop("weight", None)

    return [
        module.register_forward_pre_hook(swap_in),
        module.register_forward_hook(swap_out, always_call=True),
    ]


def sums_by_channel(module: nn.Module, axis: Axis, values: Tensor) -> dict[str, Tensor]:
    """Sum what belongs to a consumer's weights over each channel's part of them: the adjoint of gating weights.

    Args:
        module: The consumer.
        axis: Its "in" axis.
        values: Of the shape of its weight, ``[O, I/G, ...]``.

    Returns:
        ``[N]`` per group on the axis.
    """
    count = getattr(module, "groups", 1)
    along = values.reshape(count, values.shape[0] // count, values.shape[1], -1).sum(dim=(1, 3)).flatten()  # [I]
    found: dict[str, Tensor] = {}
    for segment, part in zip(axis, along.split([s.size for s in axis]), strict=True):
        if segment.group is not None:
            total = part.view(segment.channels, segment.repeat).sum(dim=1)
            found[segment.group] = found[segment.group] + total if segment.group in found else total
    return found
