"""Helpers for techniques that grow: networks at given widths, and an optimizer's state through a
split.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from widthbench.technique.budget import top_channels
from widthbench.technique.task import Task
from widthbench.training.state import OptimizerState
from widthbench.width.groups import Groups
from widthbench.width.layers import tensors_on
from widthbench.width.resize import keep, resize

Split = dict[str, tuple[Tensor, Tensor]]
"""By group: which of its neurons are split, ``[K]``, and along which unit vectors, ``[K, d]``."""


def at_widths(task: Task, widths: Mapping[str, int]) -> nn.Module:
    """The task's network at channels per group, also wider than it is; weights are placeholders."""
    groups = task.groups
    rows = {
        n: torch.arange(w) % groups[n].channels
        if w > groups[n].channels
        else top_channels(-torch.arange(groups[n].channels).float(), w, groups[n].blocks)
        for n, w in widths.items()
    }
    return resize(task.model, groups, {n: keep(r) for n, r in rows.items()})


def copies(channels: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(source of each new channel ``[P]``, mask of the copies that a split makes ``[P]``) when some
    of N channels are split.

    Copies θ + ε v stay where their originals were, copies θ - ε v follow behind all.
    """
    sources = torch.cat([torch.arange(channels), rows.cpu()])
    return sources, torch.isin(sources, rows.cpu())


def carried(
    state: OptimizerState, model: nn.Module, groups: Groups, split: Split, after: Groups
) -> OptimizerState:
    """An optimizer's state for the network after a split, such that at ε = 0 it matches the split
    network's gradients.

    Both copies of a neuron have half of its gradient by incoming weights (a quarter where squares
    are kept), and each all of its gradient by outgoing weights.

    Args:
        state: By parameter of the network before.
        model: The network before.
        groups: Its groups.
        split: What was split.
        after: Groups of the network after.
    """
    plan = {n: keep(copies(groups[n].channels, rows)[0]) for n, (rows, _) in split.items()}
    carried_state: OptimizerState = {
        name: {k: v for k, v in kept.items() if not _shaped(v)} for name, kept in state.items()
    }
    for what in sorted({k for kept in state.values() for k, v in kept.items() if _shaped(v)}):
        twin = copy.deepcopy(model)
        for name, p in twin.named_parameters():
            p.data = (
                state[name][what].clone() if what in state.get(name, {}) else torch.zeros_like(p)
            )
        twin = resize(twin, groups, plan)
        for name, (rows, _) in split.items():
            double = copies(groups[name].channels, rows)[1]
            factor = torch.where(double, 0.25 if what.endswith("sq") else 0.5, 1.0)
            for layer, positions in after.places(name, "out"):
                module = twin.get_submodule(layer)
                for tensor, _ in tensors_on(module, "out"):
                    if isinstance(getattr(module, tensor), nn.Parameter):
                        value = getattr(module, tensor).data
                        each = factor.to(value).repeat_interleave(len(positions) // len(factor))
                        value[positions] *= each.view(-1, *[1] * (value.dim() - 1))
        for name, p in twin.named_parameters():
            if what in state.get(name, {}):
                carried_state[name][what] = p.data
    return carried_state


def _shaped(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
