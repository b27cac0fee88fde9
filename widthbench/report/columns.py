"""The columns of a leaderboard: all formats and the legend are made from this one table.

A new column makes published leaderboards differ from what is written anew: `widthbench report SUITE
--publish` for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from widthbench.report.flags import FLAGS
from widthbench.report.lines import Line
from widthbench.report.markdown import count
from widthbench.statistics import Summary

Value = Summary | float | str | bool | None


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its name in CSV, where numbers have all digits; where ``text`` is ``Summary.text``, it
            is two there, ``_mean`` and ``_std``.
        of: What a row with a result has there; None where it has nothing.
        title: Its heading in markdown and on the page; "" if it is in CSV alone.
        text: Its value as people read it.
        empty: What stands in place of None.
        paper: Its heading in LaTeX, "" if it is not there.
        optional: Left out, but for CSV, where no row has a value.
        number: Whether it is set to the right.
        always: Whether rows without a result have it, too: those of cells that did not run.
        note: What the legend says of it.
    """

    name: str
    of: Callable[[Line], Value]
    title: str = ""
    text: Callable[[Any], str] = str
    empty: str = ""
    paper: str = ""
    optional: bool = False
    number: bool = True
    always: bool = False
    note: str = ""

    def value(self, line: Line) -> Value:
        """What a row has there."""
        return self.of(line) if line.done or self.always else None

    def shown(self, line: Line) -> str:
        """The value as people read it."""
        value = self.value(line)
        return self.empty if value is None else self.text(value)

    def plain(self, line: Line) -> dict[str, float | str | bool | None]:
        """The value for other programs, by the names that CSV has."""
        value = self.value(line)
        if self.text is Summary.text:
            mean, std = (value.mean, value.std) if isinstance(value, Summary) else (None, None)
            return {f"{self.name}_mean": mean, f"{self.name}_std": std}
        return {self.name: value.mean if isinstance(value, Summary) else value}


def _times(value: Summary | float) -> str:
    return f"{value.mean if isinstance(value, Summary) else value:.2f}x"


COLUMNS = (
    Column("dataset", lambda line: line.dataset, number=False, always=True),
    Column("network", lambda line: line.model, number=False, always=True),
    Column(
        "technique",
        lambda line: line.label,
        "technique",
        paper="technique",
        number=False,
        always=True,
    ),
    Column("control", lambda line: line.control, always=True),
    Column(
        "data",
        lambda line: "control" if line.control else line.access,
        "data",
        number=False,
        always=True,
        note="*Data* is the most that the decision looked at.",
    ),
    Column(
        "budget",
        lambda line: line.budget,
        "budget",
        empty="–",
        paper="budget",
        number=False,
        always=True,
    ),
    Column("cells", lambda line: line.cells, always=True),
    Column("cells_done", lambda line: len(line.done), always=True),
    Column("cells_failed", lambda line: line.failed, always=True),
    Column("status", lambda line: line.status, number=False, always=True),
    Column(
        "top1_resized",
        lambda line: line.summary("resized"),
        "top-1 % resized",
        Summary.text,
        paper="resized",
        note="*Top-1* is on the test set, which decides nothing in a run (how its recipes were"
        " chosen, `widthbench list recipes` and their files say): right after the *resize*,",
    ),
    Column(
        "top1_recalibrated",
        lambda line: line.summary("recalibrated"),
        "recalibrated",
        Summary.text,
        paper="recalibrated",
        note="after batch-norm *recalibration* (equal to the former in networks without batch"
        " norm),",
    ),
    Column(
        "top1_final",
        Line.final,
        "fine-tuned / trained",
        Summary.text,
        paper="fine-tuned",
        note="and after the suite's *fine-tuning*, the same for every technique.",
    ),
    Column(
        "rank",
        lambda line: line.rank,
        "rank",
        optional=True,
        note="*Rank* is among the techniques of one network and budget, from paired differences"
        " over shared base networks; rows that these do not tell apart share one.",
    ),
    Column(
        "trials",
        lambda line: most if (most := line.first().trials) > 1 else None,
        "trials",
        optional=True,
        note="*Trials*: settings of the technique that were tried on other seeds before one was"
        " chosen by val.",
    ),
    Column("top5", Line.top5, "top-5 %, last", Summary.text, optional=True),
    Column(
        "params",
        lambda line: line.mean("params"),
        "params",
        count,
        paper="params",
    ),
    Column("base_params", lambda line: line.first().base_params),
    Column(
        "macs",
        lambda line: line.mean("macs"),
        "FLOPs (as MACs)",
        count,
        paper="MACs",
        note="*FLOPs (as MACs)* are multiply-accumulates of one forward pass of one image.",
    ),
    Column("base_macs", lambda line: line.first().base_macs),
    Column("compression", lambda line: line.ratio("params"), "compression", _times, "–"),
    Column("speed_up_theory", lambda line: line.ratio("macs"), "speed-up, theory", _times, "–"),
    Column("speed_up_measured", Line.speed_up, "measured", _times, "–", paper="speed-up"),
    Column(
        "train_cost",
        Line.cost,
        "train cost",
        _times,
        "–",
        note="*Train cost* is everything that was spent to get there (base, decision, adaptation;"
        " forward MACs plus backward MACs counted as twice the forward) over the cost of training"
        " the base network.",
    ),
    Column("n", lambda line: line.bases, always=True),
    Column("bases", lambda line: line.counted, "n", paper="$n$"),
    *(Column(flag.name, flag.holds, always=True) for flag in FLAGS),
)


def for_people(rows: Sequence[Line]) -> list[Column]:
    """The columns that markdown and the page have for these rows."""
    titled = [c for c in COLUMNS if c.title]
    return [c for c in titled if not c.optional or any(c.value(ln) is not None for ln in rows)]


def plain(line: Line) -> dict[str, Any]:
    """A row for other programs: means, sample standard deviations and flags; None where there is
    no number.
    """
    values: dict[str, Any] = {}
    for column in COLUMNS:
        values |= column.plain(line)
    return values


def cells_of(line: Line, columns: Sequence[Column]) -> list[tuple[Column, str]]:
    """The text of each column of a row. A row without a result says why in its first column of a
    number.
    """
    if line.done:
        return [(c, c.shown(line)) for c in columns]
    words = [(c, "" if c.number else c.shown(line)) for c in columns]
    first = next(i for i, c in enumerate(columns) if c.number)
    words[first] = (columns[first], line.no_result)
    return words


def legend() -> str:
    """What the columns say, a sentence each."""
    return " ".join(c.note for c in COLUMNS if c.note)
