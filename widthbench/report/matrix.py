"""The answer of a network's block at a glance: techniques by budgets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from tabulate import tabulate

from widthbench.report.lines import Line, short_names
from widthbench.report.markdown import count, escaped

LEGEND = """\
Test top-1 in %, mean ± standard deviation over base networks, after fine-tuning (after the resize
where a suite trains nothing). **Bold**: the best technique of a budget. ≈: a paired test does not
tell it from the best. *Italics*: a control, which is no technique; ↑: its mean is above the best
technique's (means alone, not tested)."""


@dataclass(frozen=True)
class Entry:
    """What one technique reached at one budget.

    Attributes:
        text: Mean and spread, or why there is none.
        best: Whether no technique of this budget has a higher mean.
        tied: Whether the statistics do not tell it from the best.
        ahead: Whether it is a control with a higher mean than the best technique.
    """

    text: str
    best: bool = False
    tied: bool = False
    ahead: bool = False

    @property
    def plain(self) -> str:
        """As a terminal shows it: ``*`` for the best."""
        mark = "*" if self.best else "≈" if self.tied else "↑" if self.ahead else ""
        return self.text + (f" {mark}" if mark else "")

    @property
    def markdown(self) -> str:
        """As a page shows it."""
        text = f"**{escaped(self.text)}**" if self.best else escaped(self.text)
        return text + (" ≈" if self.tied else " ↑" if self.ahead else "")


@dataclass(frozen=True)
class Matrix:
    """A network's techniques and controls, by budgets.

    Attributes:
        budgets: From large to small.
        names: Of the rows, short, techniques from the best to the worst, then controls.
        controls: Whether each is a control.
        access: What each looks at; "" for controls.
        entries: By row and budget; None where the suite has no such cell.
        costs: Of each, everything that was spent, over the base's training; "" where unknown.
        sizes: By budget, parameters and MACs of what is left.
        base: The base network in a sentence.
    """

    budgets: list[str]
    names: list[str]
    controls: list[bool]
    access: list[str]
    entries: list[list[Entry | None]]
    costs: list[str]
    sizes: list[str]
    base: str

    def markdown(self) -> str:
        """As a table of markdown."""
        costs = any(self.costs)
        rows = []
        for i, name in enumerate(self.names):
            shown = f"*{escaped(name)}*" if self.controls[i] else escaped(name)
            cells = [e.markdown if e else "" for e in self.entries[i]]
            rows.append([shown, self.access[i], *cells, *([self.costs[i]] if costs else [])])
        rows.append(["parameters, MACs left", "", *self.sizes, *([""] if costs else [])])
        return self._tabulated(rows, "pipe")

    def plain(self) -> str:
        """As a terminal shows it."""
        costs = any(self.costs)
        rows = []
        for i, name in enumerate(self.names):
            cells = [e.plain if e else "" for e in self.entries[i]]
            access = "control" if self.controls[i] else self.access[i]
            rows.append([name, access, *cells, *([self.costs[i]] if costs else [])])
        return self._tabulated(rows, "simple")

    def _tabulated(self, rows: Sequence[Sequence[str]], form: str) -> str:
        headers = ["technique", "looks at", *self.budgets]
        headers += ["train cost"] if any(self.costs) else []
        align = ["left", "left", *["right"] * (len(headers) - 2)]
        return tabulate(rows, headers=headers, tablefmt=form, colalign=align, disable_numparse=True)


def matrix(block: Sequence[Line]) -> Matrix | None:
    """The matrix of one network's rows; None where nothing but the base was run."""
    rows = [line for line in block if line.budget and line.records]
    if not rows:
        return None
    budgets = list(dict.fromkeys(str(line.budget) for line in rows))
    best: dict[str, float] = {}
    whole = {ln.budget for ln in rows if ln.rank}  # where rows are ranked, the best is one of them
    for line in rows:
        fits = not line.control and (line.rank or line.budget not in whole)
        if fits and (top := line.summary(None)):
            best[str(line.budget)] = max(best.get(str(line.budget), 0.0), top.mean)
    labels: dict[str, dict[str, Line]] = {}
    for line in rows:
        labels.setdefault(line.label, {})[str(line.budget)] = line
    names = short_names(rows)

    def behind(label: str) -> tuple[bool, float]:
        """Controls last; techniques by how far they are from the best, on average."""
        mine = labels[label].values()
        tops = [
            (s.mean, best.get(str(ln.budget), s.mean)) for ln in mine if (s := ln.summary(None))
        ]
        return next(iter(mine)).control, -fmean(a - b for a, b in tops) if tops else 1e9

    ordered = sorted(labels, key=behind)
    sizes = []
    for budget in budgets:
        there = [ln for ln in rows if ln.budget == budget and ln.done and not ln.control]
        middle = {
            what: median(v for ln in there if (v := ln.mean(what)) is not None)
            for what in ("params", "macs")
            if there
        }
        sizes.append(", ".join(map(count, middle.values())))
    return Matrix(
        budgets,
        [names[label] for label in ordered],
        [next(iter(labels[label].values())).control for label in ordered],
        [_access(labels[label].values()) for label in ordered],
        [[_entry(labels[label].get(b), best.get(b)) for b in budgets] for label in ordered],
        [_costs(labels[label].values()) for label in ordered],
        sizes,
        base_of(block),
    )


def _access(lines: Iterable[Line]) -> str:
    return next((ln.access for ln in lines if not ln.control), "")


def _entry(line: Line | None, best: float | None) -> Entry | None:
    if line is None:
        return None
    if (top := line.summary(None)) is None:
        return Entry(line.no_result)
    text = top.text()
    if line.failed:
        text += f" ({line.failed} of {line.cells} failed)"
    elif len(line.done) < line.cells:
        text += f" ({len(line.done)} of {line.cells} run)"
    if line.control:
        return Entry(text, ahead=best is not None and top.mean > best)
    first = top.mean == best
    return Entry(text, best=first, tied=not first and line.rank == 1)


def _costs(lines: Iterable[Line]) -> str:
    """``"1.3 to 2.7x"``."""
    found = [c.mean for ln in lines if (c := ln.cost())]
    if not found:
        return ""
    low, high = f"{min(found):.2g}", f"{max(found):.2g}"
    return f"{low}x" if low == high else f"{low} to {high}x"


def base_of(block: Sequence[Line]) -> str:
    """``"Base: 98.55 ± 0.11 % (5 networks), 267 k parameters, 266 k MACs."``."""
    for line in block:
        if line.budget is None and (top := line.summary(None)):
            networks = "1 network" if top.n == 1 else f"{top.n} networks"
            sizes = [count(v) for what in ("params", "macs") if (v := line.mean(what)) is not None]
            return f"Base: {top.text()} % ({networks}), {sizes[0]} parameters, {sizes[1]} MACs."
    return ""
