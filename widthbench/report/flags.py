"""What a row of a leaderboard is marked with: one table, from which all formats follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from widthbench.experiment.records import Record
from widthbench.report.lines import Line


@dataclass(frozen=True)
class Flag:
    """One mark.

    Attributes:
        name: In CSV and JSON, where it is true or false.
        mark: Behind a technique's name in markdown.
        word: On the page of results.
        note: What it says of the row, as the legend has it.
        holds: Whether a row has it.
    """

    name: str
    mark: str
    word: str
    note: str
    holds: Callable[[Line], bool]


def _any(of: Callable[[Record], object]) -> Callable[[Line], bool]:
    return lambda line: any(bool(of(r)) for r in line.done.values())


FLAGS = (
    Flag(
        "budget_unused",
        "†",
        "unused",
        "leaves more than 5 % of its budget unused",
        _any(lambda r: not r.met),
    ),
    Flag(
        "coupled",
        "‡",
        "coupled",
        "resizes channels under a norm across channels (grade coupled)",
        _any(lambda r: r.coupled),
    ),
    Flag(
        "below_floor",
        "§",
        "at the floor",
        "the budget lies below the feasible floor (one channel per block of each group) and was run"
        " at the floor",
        _any(lambda r: r.floor),
    ),
    Flag(
        "batches_in_halves",
        "¶",
        "halved",
        "some of its batches were computed in halves, for want of memory",
        _any(lambda r: any(spent.halved for spent in r.spent.values())),
    ),
    Flag(
        "val_seen",
        "◊",
        "val seen",
        "its base comes from published weights and may have seen this suite's val split in training"
        " (val_seen)",
        _any(lambda r: r.provenance.get("val_seen")),
    ),
    Flag(
        "bfloat16",
        "ᵇ",
        "bfloat16",
        "its base network or its fine-tuning was computed in bfloat16 (autocast); scores are of"
        " float32 passes",
        _any(lambda r: "bfloat16" in (r.provenance.get("dtype"), r.provenance.get("base_dtype"))),
    ),
    Flag(
        "incomplete",
        "✕",
        "incomplete",
        "some of its cells have no result: n counts the others; failed ones stand beside it, never"
        " averaged in",
        lambda line: bool(line.done and line.left),
    ),
)
