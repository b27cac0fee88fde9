"""An order of removal: which channel goes when, over all groups together.

An order is ``[N]`` per group: the number of the removal in which a channel goes, infinity for one
that stays.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from widthbench.errors import UsageError
from widthbench.sensitivity.ablation import Ablation
from widthbench.width.groups import Groups
from widthbench.width.resize import Plan, keep

Scores = dict[str, Tensor]  # [N] per group
GATES = tuple(i / 8 for i in range(9))  # where error curves are sampled


def untouched(groups: Groups) -> Scores:
    """The order before the first removal."""
    return {n: torch.full((g.channels,), math.inf, dtype=torch.float64) for n, g in groups.items()}


def open_gates(order: Scores, like: Tensor) -> Scores:
    """1 for channels that are there, 0 for those that were removed: ``[N]`` per group, of the type
    and device of a tensor.
    """
    return {n: o.isinf().to(like) for n, o in order.items()}


def left(order: Tensor, blocks: int) -> int:
    """How many more removals a group allows. A removal takes one channel from every block; every
    block keeps at least one.
    """
    return int(order.isinf().sum()) // blocks - 1


def unfinished(order: Scores, groups: Groups) -> bool:
    """Whether some group allows more removals."""
    return any(left(order[n], g.blocks) for n, g in groups.items())


def candidates(order: Scores, groups: Groups) -> dict[str, Tensor]:
    """The channels that may go next: long ``[C]`` per group, none where the group allows no more
    removals.
    """
    return {
        n: o.isinf().nonzero().flatten() if left(o, groups[n].blocks) else torch.zeros(0).long()
        for n, o in order.items()
    }


def removed(order: Scores) -> int:
    """The number of removals so far."""
    return 1 + int(
        max(
            (float(o[o.isfinite()].max()) for o in order.values() if o.isfinite().any()), default=-1
        )
    )


def after(order: Scores, count: int) -> Scores:
    """The order as it was after so many removals."""
    return {n: o.where(o < count, math.inf) for n, o in order.items()}


def kept_after(order: Scores, count: int) -> Plan:
    """The network after so many removals, as a plan."""
    return {n: keep((o >= count).nonzero().flatten()) for n, o in order.items()}


def remove(order: Scores, changes: Scores, groups: Groups, count: int | None = None) -> None:
    """Record the next removals in the order, in place: over all groups, those that raise the loss
    least.

    Args:
        order: ``[N]`` per group.
        changes: ``[N]`` per group, what removing each channel does to the loss.
        groups: The groups.
        count: How many; None: all, until each group is left with one channel per block.

    Raises:
        UsageError: If a change is NaN.
    """
    units: list[tuple[float, str, list[int]]] = []
    for name, position in order.items():
        blocks = groups[name].blocks
        if bool(changes[name].isnan().any()):
            raise UsageError(
                f"channel group '{name}': the loss or its derivatives are not finite, so its"
                " channels cannot be ranked"
            )
        table = (
            changes[name]
            .where(position.isinf(), math.inf)
            .view(blocks, -1)
            .sort(dim=1, stable=True)
        )
        channels = table.indices + torch.arange(blocks)[:, None] * table.indices.shape[1]
        least = left(position, blocks)
        costs = table.values[:, :least].sum(dim=0).tolist()
        units += [(cost, name, channels[:, i].tolist()) for i, cost in enumerate(costs)]
    done = removed(order)
    for at, (_, name, gone) in enumerate(sorted(units, key=lambda u: u[0])[:count], done):
        order[name][gone] = at


def curves(
    brute: Ablation,
    order: Scores,
    first: Scores | None = None,
    second: Scores | None = None,
    *,
    errors: bool = False,
) -> dict[str, Tensor]:
    """Losses after each removal; also, for the whole network, true and predicted changes, and
    error curves over the gate. Not billed; nothing depends on it.

    Args:
        brute: Gives the loss at any gates.
        order: What went when.
        first: ``∂E/∂g`` of the whole network, for a ranking by it.
        second: ``∂²E/∂g²`` likewise.
        errors: With ``second``: error curves, too.

    Returns:
        "loss" ``[U+1]``; for each group "change NAME" ``[N]`` by brute force and, with
        derivatives, "score NAME" ``[N]`` as predicted; with error curves also "gate" ``[9]``,
        "error NAME" ``[N, 9]``, the loss at those values of a channel's gate, "first NAME" and
        "second NAME" ``[N]``.
    """
    like, steps = brute.sample.x, range(removed(order) + 1)
    losses = [brute.loss(open_gates(after(order, k), like)) for k in steps]
    gates = open_gates(after(order, 0), like)
    everything = {n: torch.arange(len(o)) for n, o in order.items()}
    closed = brute.losses(gates, everything)
    made = {"loss": torch.tensor(losses, dtype=torch.float64)}
    made |= {f"change {n}": e - losses[0] for n, e in closed.items()}
    if first is None:
        return made
    made |= {f"score {n}": -d for n, d in first.items()}
    if second is None:
        return made
    made |= {f"score {n}": -first[n] + 0.5 * d for n, d in second.items()}
    if errors:
        between = [brute.losses(gates, everything, value) for value in GATES[1:-1]]
        for n, e in closed.items():
            at = [e, *(b[n] for b in between), torch.full_like(e, losses[0])]
            made[f"error {n}"] = torch.stack(at, dim=1)
            made |= {f"first {n}": first[n], f"second {n}": second[n]}
        made["gate"] = torch.tensor(GATES, dtype=torch.float64)
    return made


def told(order: Scores, made: Scores) -> dict[str, list[Any]]:
    """Curves as plain numbers, for ``Outcome.series``, and statistics derived from them.

    Beside the curves: "joint", the increase of the loss after k removals; "summed", that of the
    same channels removed each alone; "correlation", Spearman's, of the predicted with the true
    changes.
    """
    series: dict[str, list[Any]] = {k: _rounded(v) for k, v in made.items()}
    loss = made["loss"]
    alone = torch.zeros(len(loss), dtype=torch.float64)
    for name, position in order.items():
        gone = position.isfinite()
        alone.index_add_(0, position[gone].long() + 1, made[f"change {name}"][gone])
    series |= {"joint": _rounded(loss - loss[0]), "summed": _rounded(alone.cumsum(0))}
    if all(f"score {n}" in made for n in order):
        predicted, true = (
            torch.cat([made[f"{what} {n}"] for n in order]) for what in ("score", "change")
        )
        rho = float(spearmanr(predicted, true).statistic)
        # there is none where all predictions are equal
        series["correlation"] = [rho] if math.isfinite(rho) else []
    return series


def _rounded(values: Tensor) -> list[Any]:
    """Plain numbers of six digits."""
    return [_rounded(v) if v.dim() else float(f"{float(v):.6g}") for v in values]
