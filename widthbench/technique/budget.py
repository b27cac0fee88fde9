"""Budgets: what is kept of a network, and the widths that meet it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from widthbench.errors import BudgetError, InfeasibleBudgetError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor  # records read budgets, and are read where torch is not wanted

Kind = Literal["channels", "macs", "params"]
Allocation = Literal["uniform", "global"]
KINDS: tuple[Kind, ...] = ("channels", "macs", "params")

# a plan may exceed its budget by this share of it (techniques that train to a budget stop near it)
OVER = 0.005
# a plan that leaves more than this share of its budget unused is flagged as having missed it
UNDER = 0.05


class Sized(Protocol):
    """What allocation needs to know of a channel group."""

    @property
    def channels(self) -> int:
        """N."""
        ...

    @property
    def blocks(self) -> int:
        """Contiguous blocks that keep equal counts."""
        ...


class Costed(Protocol):
    """A cost in MACs and parameters."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        ...

    @property
    def params(self) -> int:
        """Number of parameters."""
        ...


@dataclass(frozen=True)
class Budget:
    """The fraction of a reference network that is kept.

    Attributes:
        kind: "channels" (of each group), "macs" or "params" (of the whole network).
        fraction: Kept share, above 0; above 1 only for techniques that grow.
        rounding: For channels: "nearest" keeps ``round(fraction·N)`` of a group, "floor"
            ``floor(fraction·N)``.
    """

    kind: Kind
    fraction: float
    rounding: Literal["nearest", "floor"] = "nearest"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BudgetError(
                f"budget kind '{self.kind}' is unknown{did_you_mean(self.kind, KINDS)}"
            )
        if not (math.isfinite(self.fraction) and self.fraction > 0):
            raise BudgetError(
                f"budget '{self.kind}:{self.fraction}' must keep a fraction above 0, as in"
                " 'macs:0.5'"
            )
        if self.rounding not in ("nearest", "floor"):
            raise BudgetError(f"rounding must be 'nearest' or 'floor', not '{self.rounding}'")

    @classmethod
    def parse(cls, text: str | Budget, *, grows: bool = False) -> Budget:
        """Read ``"macs:0.5"``.

        Args:
            text: ``kind:fraction``, the fraction being what is kept; ``channels:0.5:floor`` rounds
                down.
            grows: Whether fractions above 1 make sense.

        Raises:
            BudgetError: If it cannot be read or is out of range.
        """
        if isinstance(text, Budget):
            budget = text
        else:
            kind, _, value = str(text).partition(":")
            value, _, rounding = value.partition(":")
            try:
                fraction = float(value)
            except (ValueError, OverflowError):
                raise BudgetError(
                    f"budget '{text}' is not of the form kind:fraction, as in 'macs:0.5'"
                ) from None
            budget = cls(kind, fraction, rounding or "nearest")  # type: ignore[arg-type]
        if budget.fraction > 1 and not grows:
            raise BudgetError(
                f"budget '{budget}' keeps more than there is; fractions lie in (0, 1]"
            )
        return budget

    def __str__(self) -> str:
        """The one way in which a budget is written: ``"macs:0.5"`` for "macs:.50" and
        "macs:5e-1:nearest", too.
        """
        return f"{self.kind}:{self.fraction!r}".removesuffix(".0") + (
            ":floor" if self.rounding == "floor" else ""
        )

    def of(self, cost: Costed) -> float:
        """The budget in absolute terms: MACs or parameters of ``cost`` times the fraction."""
        return self.fraction * (cost.macs if self.kind == "macs" else cost.params)

    def width(self, group: Sized, fraction: float | None = None) -> int:
        """Channels of a group at a fraction: rounded to whole blocks, never fewer than one per
        block.
        """
        size = group.channels / group.blocks * (self.fraction if fraction is None else fraction)
        # 300 · 0.7 is 209.99999999999997 in binary: floor what was meant
        kept = math.floor(size + 1e-9) if self.rounding == "floor" else round(size)
        return group.blocks * max(1, kept)


def written(text: str) -> str:
    """A budget as ``str(Budget)`` writes it, so that equal ones have one name; what cannot be read
    stays, for others to refuse.
    """
    try:
        return str(Budget.parse(text, grows=True))
    except BudgetError:
        return text


def used(
    budget: Budget,
    widths: Mapping[str, int],
    groups: Mapping[str, Sized],
    cost: Costed,
    reference: Costed,
) -> float:
    """The fraction of the reference that a plan keeps, in the budget's own terms.

    Args:
        budget: Says what is counted.
        widths: Channels per group.
        groups: The groups that the budget is spread over.
        cost: The resized network's cost.
        reference: The reference network's cost.
    """
    if budget.kind == "channels":
        total = sum(g.channels for g in groups.values())
        return sum(widths.get(n, g.channels) for n, g in groups.items()) / total
    return cost.macs / reference.macs if budget.kind == "macs" else cost.params / reference.params


def asked(budget: Budget, groups: Mapping[str, Sized]) -> float:
    """The fraction of the reference that a budget allows, in the terms of ``used``.

    For channels, rounding and one channel per block are part of what was asked for.
    """
    if budget.kind != "channels":
        return budget.fraction
    return sum(budget.width(g) for g in groups.values()) / sum(g.channels for g in groups.values())


def check(budget: Budget, kept: float, groups: Mapping[str, Sized]) -> bool:
    """Whether a plan that keeps ``kept`` meets its budget; False if it leaves a good part of it
    unused.

    Args:
        budget: What was asked for.
        kept: What ``used`` says.
        groups: The groups that the budget is spread over.

    Raises:
        BudgetError: If the plan exceeds its budget.
    """
    allowed = asked(budget, groups)
    if kept > allowed * (1 + OVER):
        raise BudgetError(
            f"the plan keeps {kept:.4f} of the {budget.kind}, more than the budget '{budget}'"
        )
    return kept >= allowed * (1 - UNDER)


def uniform_widths(
    groups: Mapping[str, Sized],
    budget: Budget,
    cost: Callable[[Mapping[str, int]], Costed],
    reference: Costed,
) -> dict[str, int]:
    """The same fraction of every group.

    Args:
        groups: The groups to spread the budget over.
        budget: What is kept. For MACs and parameters the fraction is the largest whose cost stays
            within the budget.
        cost: Cost of given widths.
        reference: The network that budgets are fractions of.

    Returns:
        Channels per group, never fewer than one per block.

    Raises:
        InfeasibleBudgetError: If even the smallest widths cost more.
    """
    if budget.kind == "channels":
        return {n: budget.width(g) for n, g in groups.items()}
    allowed = budget.of(reference)

    def at(fraction: float) -> dict[str, int]:
        return {n: Budget("channels", 1.0).width(g, fraction) for n, g in groups.items()}

    def total(widths: Mapping[str, int]) -> float:
        return Budget(budget.kind, 1.0).of(cost(widths))

    if total(at(1.0)) <= allowed:
        return at(1.0)
    _floor(budget, total({n: g.blocks for n, g in groups.items()}), allowed, reference)
    low, high = 0.0, 1.0
    widest = max(g.channels // g.blocks for g in groups.values())
    for _ in range(
        math.ceil(math.log2(widest)) + 8
    ):  # until the interval is far below one channel of the widest group
        middle = (low + high) / 2
        low, high = (middle, high) if total(at(middle)) <= allowed else (low, middle)
    return _filled(at(low), groups, low, lambda widths: total(widths) <= allowed)


def _filled(
    widths: dict[str, int],
    groups: Mapping[str, Sized],
    fraction: float,
    fits: Callable[[Mapping[str, int]], bool],
) -> dict[str, int]:
    """Widths with at most one more channel per block in each group, those next in line first, as
    long as they fit.

    Rounding all groups at one fraction wastes much of a small network's budget: they step together.
    """
    room = {n: g for n, g in groups.items() if widths[n] < g.channels}
    # the fraction at which a group would round up to its next width
    following = {n: (widths[n] / g.blocks + 0.5) * g.blocks / g.channels for n, g in room.items()}
    for name in sorted(room, key=lambda n: following[n] - fraction):
        more = widths | {name: widths[name] + groups[name].blocks}
        if fits(more):
            widths = more
    return widths


def feasible(
    budget: Budget,
    groups: Mapping[str, Sized],
    cost: Callable[[Mapping[str, int]], Costed],
    reference: Costed,
) -> Budget:
    """The budget itself, or the smallest one that can be met where it is too small: one channel per
    block of each group.
    """
    if budget.kind == "channels":
        return budget
    whole = Budget(budget.kind, 1.0)
    least = whole.of(cost({n: g.blocks for n, g in groups.items()}))
    if least <= budget.of(reference):
        return budget
    return Budget(budget.kind, least / whole.of(reference) * (1 + 1e-9))


def global_widths(
    scores: Mapping[str, Tensor],
    groups: Mapping[str, Sized],
    budget: Budget,
    cost: Callable[[Mapping[str, int]], Costed],
    reference: Costed,
) -> dict[str, int]:
    """Widths that follow from one ranking of all channels: the best ones are kept, wherever they
    are.

    Args:
        scores: ``[N]`` per group, comparable between groups, higher is kept.
        groups: The groups to spread the budget over.
        budget: What is kept; for channels, of all channels together.
        cost: Cost of given widths.
        reference: The network that budgets are fractions of.

    Returns:
        Channels per group, never fewer than one per block.

    Raises:
        InfeasibleBudgetError: If even the smallest widths cost more.
    """
    import torch

    owner = torch.cat([torch.full((g.channels,), i) for i, g in enumerate(groups.values())])
    order = owner[
        torch.argsort(
            torch.cat([scores[n].flatten().cpu() for n in groups]), descending=True, stable=True
        )
    ]

    def at(count: int) -> dict[str, int]:
        kept = torch.bincount(order[:count], minlength=len(groups)).tolist()
        return {
            n: g.blocks * max(1, k // g.blocks)
            for (n, g), k in zip(groups.items(), kept, strict=True)
        }

    if budget.kind == "channels":
        allowed: float = sum(budget.width(g) for g in groups.values())
        total = lambda widths: float(sum(widths.values()))  # noqa: E731
    else:
        allowed = budget.of(reference)
        total = lambda widths: Budget(budget.kind, 1.0).of(cost(widths))  # noqa: E731
    _floor(budget, total({n: g.blocks for n, g in groups.items()}), allowed, reference)
    low, high = 0, len(order)
    if total(at(high)) <= allowed:
        return at(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(at(middle)) <= allowed else (low, middle)
    return at(low)


def _floor(budget: Budget, least: float, allowed: float, reference: Costed) -> None:
    if least > allowed:
        share = (
            least / Budget(budget.kind, 1.0).of(reference) if budget.kind != "channels" else least
        )
        raise InfeasibleBudgetError(
            f"budget '{budget}' is below the feasible floor: one channel per block of each group"
            f" still keeps {share:.3f} of the {budget.kind}; ask for more, or resize more groups"
            " (scope='all')"
        )


def top_channels(score: Tensor, width: int, blocks: int = 1) -> Tensor:
    """The ``width`` channels with the highest scores, equally many per block, in their old order.

    Args:
        score: ``[N]``; ties go to the earlier channel.
        width: P, a multiple of ``blocks``.
        blocks: Contiguous blocks that keep equal counts.

    Returns:
        long ``[P]``, ascending.
    """
    import torch

    table = score.detach().cpu().view(blocks, -1)
    best = torch.argsort(table, dim=1, descending=True, stable=True)[:, : width // blocks]
    return (best + torch.arange(blocks)[:, None] * table.shape[1]).flatten().sort().values
