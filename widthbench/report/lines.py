"""The rows of a leaderboard: all records of one technique on one network at one budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

from widthbench.cache import digest_of
from widthbench.errors import visible
from widthbench.experiment.cell import CONTROLS, Cell
from widthbench.experiment.records import FINAL, Record, Stage
from widthbench.recipe import Spent
from widthbench.statistics import Summary, ranks, summarise

# the base network (its checkpoint's digest, or the seed that trained it), and the cell's seed
Key = tuple[object, int]
Place = tuple[str, str, str, str | None]  # data set, network, technique with parameters, budget


@dataclass
class Line:
    """All records of one technique on one network at one budget. Seeds that share one base count
    once.

    Attributes:
        dataset: Of its cells.
        model: The network's name.
        label: The technique's, with parameters.
        budget: What is kept; None for the base network.
        control: Whether it is a control.
        records: By base and seed.
        expected: How many cells the suite has for it; 0 if nobody said.
        rank: Among the techniques of its network and budget; None where statistics give none.
        timings: Those of its network, by shape.
    """

    dataset: str
    model: str
    label: str
    budget: str | None
    control: bool
    records: dict[Key, Record] = field(default_factory=dict)
    expected: int = 0
    rank: int | None = None
    timings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def done(self) -> dict[Key, Record]:
        """The finished ones by base and seed; cached: read it only after all records are added."""
        return {k: r for k, r in self.records.items() if r.status == "done"}

    @property
    def access(self) -> str:
        """What the technique looks at; "" where nothing was run."""
        return next((r.access for r in self.records.values() if r.access), "")

    @property
    def cells(self) -> int:
        """Cells that the suite has for it."""
        return max(self.expected, len(self.records))

    @property
    def left(self) -> int:
        """Cells of the suite that have no result: not run, skipped or failed."""
        return self.cells - len(self.done)

    @property
    def failed(self) -> int:
        """Cells that failed: that raised, were ended, or diverged."""
        return sum(r.status == "failed" for r in self.records.values())

    @property
    def status(self) -> str:
        """Done if any cell is; else why not: skipped, failed or not run."""
        return "done" if self.done else self.first().status if self.records else "not run"

    @property
    def bases(self) -> int:
        """Distinct base networks of the finished ones."""
        return len({base for base, _ in self.done})

    @property
    def counted(self) -> str:
        """Distinct bases and, where some cells have no result, of how many cells."""
        if not self.left:
            return str(self.bases)
        failed = f", {self.failed} of {self.cells} failed" if self.failed else ""
        if self.bases == len(self.done):
            known = self.failed == self.left
            return f"{self.bases}{failed}" if known else f"{self.bases} of {self.cells}{failed}"
        return f"{self.bases} ({len(self.done)} of {self.cells} cells{failed})"

    @property
    def no_result(self) -> str:
        """Why it has no number: ``"5 of 5 failed"``, "skipped", "not run"."""
        return f"{self.failed} of {self.cells} failed" if self.failed else self.status

    def summary(self, stage: Stage | None) -> Summary | None:
        """Top-1 at a stage (the last one if None); None if no record has it."""
        rows = {k: r.row(stage) for k, r in self.done.items()}
        return over_bases({k: row.top1 for k, row in rows.items() if row is not None})

    def mean(self, name: str) -> float | None:
        """Mean over its records of one field, say "params" or "macs"; None if none is finished."""
        values = over_bases({k: float(getattr(r, name)) for k, r in self.done.items()})
        return values.mean if values else None

    def ratio(self, name: str) -> float | None:
        """The base network's parameters or MACs over the row's; None where either is missing."""
        base, own = getattr(self.first(), f"base_{name}") if self.done else None, self.mean(name)
        return base / own if base and own else None

    def top5(self) -> Summary | None:
        """Top-5 at the last stage; None below 100 classes."""
        rows = {k: row for k, r in self.done.items() if (row := r.row()) is not None}
        return over_bases({k: row.top5 for k, row in rows.items() if row.top5 is not None})

    def final(self) -> Summary | None:
        """Top-1 after training of some kind; None where a suite trains nothing after the resize."""
        return next((s for stage in FINAL if (s := self.summary(stage)) is not None), None)

    def scores(self, stage: Stage | None = None) -> dict[object, float]:
        """Top-1 by base at a stage, the last one if None."""
        rows = {k: r.row(stage) for k, r in self.done.items()}
        return by_base({k: row.top1 for k, row in rows.items() if row is not None})

    def speed_up(self) -> Summary | None:
        """Median latency of the base over that of its shapes; None where it was not measured."""
        if self.label == "base":
            return Summary(1.0, None, self.bases) if self.done else None
        shapes = {k: shape_of(r) for k, r in self.done.items()} if self.timings else {}
        timed = {k: s for k, s in shapes.items() if s in self.timings}
        return over_bases({k: self.timings[s]["speed_up"] for k, s in timed.items()})

    def cost(self) -> Summary | None:
        """All that was spent over the cost of the base network's training, both in forward and
        backward MACs; None where that is unknown.
        """
        shares = {k: _share(r) for k, r in self.done.items()}
        return over_bases({k: share for k, share in shares.items() if share is not None})

    def first(self) -> Record:
        """Any record of a row that has some: a finished one if there is one."""
        return next(iter({**self.done, **self.records}.values()))


def _share(record: Record) -> float | None:
    """What a record cost over what training the base network cost; None where that is unknown."""
    if record.provenance.get("checkpoint"):  # what published weights cost is unknown
        return None
    base = record.spent.get("base", Spent())
    # where base and fine-tuning together would cost too much (`l1-budget`), its base is cut short
    whole = _macs(base) * (record.cell.base.epochs / base.epochs if base.epochs else 1.0)
    own = record.spent.get("adaptation", Spent())
    if not whole and record.base_macs and record.macs and own.epochs:
        # a control has no base: scale its own training to the base's shape
        epochs = record.cell.base.epochs
        whole = round(_macs(own) / own.epochs * epochs * record.base_macs / record.macs)
    return sum(map(_macs, record.spent.values())) / whole if whole else None


def _macs(spent: Spent) -> int:
    return spent.forward_macs + spent.backward_macs


def by_base(values: Mapping[Key, float]) -> dict[object, float]:
    """One value per base: the mean over the seeds that share it."""
    grouped: dict[object, list[float]] = {}
    for (base, _), value in values.items():
        grouped.setdefault(base, []).append(value)
    return {base: fmean(v) for base, v in grouped.items()}


def over_bases(values: Mapping[Key, float]) -> Summary | None:
    """Mean and spread over distinct bases; None where there is nothing."""
    return summarise(by_base(values)) if values else None


def lines(
    records: Iterable[Record],
    cells: Iterable[Cell] = (),
    timings: Iterable[Mapping[str, Any]] = (),
    *,
    ranked: bool = False,
) -> list[Line]:
    """Records grouped to rows, in leaderboard order: by network, then budget from large to small,
    the best mean first, controls last.

    Args:
        records: A suite's.
        cells: The suite's: they give a row to what was not run, and say how many cells each row is
            expected to have.
        timings: One for each distinct shape, from ``timings.jsonl``.
        ranked: Rank the techniques of each network and budget.
    """
    expected = Counter(_place(cell) for cell in cells)
    rows: dict[Place, Line] = {}
    for record in records:
        line = rows.setdefault(_place(record.cell), _line(record.cell))
        # a base is what seeds make distinct; one public checkpoint under many seeds is still one
        base = record.provenance.get("checkpoint") or record.cell.seed
        line.records[base, record.cell.seed] = record
    for cell in cells:
        rows.setdefault(_place(cell), _line(cell)).expected = expected[_place(cell)]
    networks = list(dict.fromkeys((place[:2]) for place in (*expected, *rows)))
    timed: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for timing in timings:
        timed.setdefault((timing["dataset"], timing["model"]), {})[timing["shape"]] = timing
    for line in rows.values():
        line.timings = timed.get((line.dataset, line.model), {})

    def order(line: Line) -> tuple[Any, ...]:
        kept = float(line.budget.partition(":")[2].partition(":")[0]) if line.budget else 10.0
        top = line.summary(None)
        return (
            networks.index((line.dataset, line.model)),
            -kept,
            line.control,
            -(top.mean if top else -1.0),
            line.label,
        )

    ordered = sorted(rows.values(), key=order)
    if ranked:
        _rank(ordered)
    return ordered


def _place(cell: Cell) -> Place:
    return cell.dataset, cell.network, cell.label, cell.budget


def _line(cell: Cell) -> Line:
    return Line(*_place(cell), cell.technique in CONTROLS)


def _rank(rows: Iterable[Line]) -> None:
    """Rank the techniques of each network and budget, where the statistics carry it."""
    blocks: dict[tuple[str, str, str], dict[str, Line]] = {}
    for line in rows:
        if line.budget and line.done and not line.control:
            blocks.setdefault((line.dataset, line.model, line.budget), {})[line.label] = line
    for block in blocks.values():
        for label, rank in (ranks({k: ln.scores() for k, ln in block.items()}) or {}).items():
            block[label].rank = rank


def blocks(rows: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
    """Rows by (data set, network), in their order."""
    grouped: dict[tuple[str, str], list[Line]] = {}
    for line in rows:
        grouped.setdefault((line.dataset, line.model), []).append(line)
    return grouped


def short_names(rows: Iterable[Line]) -> dict[str, str]:
    """Rows' labels, each with the shortest name that tells it from the others: a technique without
    its parameters, but for those in which rows of the same technique differ.
    """
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in rows:
        if line.records:
            cell = line.first().cell
            kind = f"{cell.technique}:{cell.of}" if cell.of else cell.technique
            kinds.setdefault(kind, {})[line.label] = cell.params
        else:
            kinds.setdefault(line.label, {})[line.label] = {}
    names: dict[str, str] = {}
    for kind, labels in kinds.items():
        known = {k for params in labels.values() for k in params}
        apart = [k for k in sorted(known) if len({str(p.get(k)) for p in labels.values()}) > 1]
        for label, params in labels.items():
            inside = ", ".join(f"{k}={params[k]}" for k in apart if k in params)
            names[label] = visible(kind + (f" ({inside})" if inside else ""))
    return names


def shape_of(record: Record) -> str:
    """A short digest of a record's widths: records of one shape share one timing."""
    cell = record.cell
    args = cell.model_args or {}
    return digest_of({"args": args, "size": cell.size, "widths": record.widths})[:12]
