"""What follows from a network's structure alone: parameters of resized networks, which need no data
and no weights.
"""

from __future__ import annotations

import functools

import torch

from widthbench.experiment import suites
from widthbench.networks import models
from widthbench.technique.budget import Budget, written
from widthbench.width.assembly import discover
from widthbench.width.cost import CostModel
from widthbench.width.groups import Groups


def parameters(suite: str, model: str, budget: str = "") -> list[float]:
    """Parameters, in millions, of one of a suite's networks, whole or with a share of its channels
    kept.

    The same groups, scope and patterns as the suite's cells; untrained, since how many channels a
    budget of channels keeps does not depend on weights.

    Args:
        suite: Where the network's cells are.
        model: Its name.
        budget: Of one of the cells, in channels; "" for the whole network.
    """
    (cell, *_) = [
        c
        for c in suites.load(suite).cells()
        if c.model == model and c.budget == (written(budget) if budget else None)
    ]
    groups, cost = _costed(cell.model, cell.size)
    if not budget:
        return [cost.original.params / 1e6]
    resized = groups.select(cell.scope, cell.include or None)
    kept = Budget.parse(budget)
    return [cost({name: kept.width(group) for name, group in resized.items()}).params / 1e6]


@functools.lru_cache(maxsize=2)
def _costed(name: str, size: int) -> tuple[Groups, CostModel]:
    channels, _, _, classes = models.native(name)
    model = models.create(name, classes=classes, channels=channels, size=size).eval()
    x = torch.randn(1, channels, size, size)
    found = discover(
        model, x
    )  # not certified: nothing is cut here, and in float64 that would take half a minute at 224 px
    groups = found.with_grades(
        {name: (g.grade if g.grade == "frozen" else "exact", g.reason) for name, g in found.items()}
    )
    return groups, CostModel(model, groups, x)
