"""What was measured here against what was published: cell by cell, row by row, machine against
machine.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tabulate import tabulate

from widthbench.experiment.records import Record
from widthbench.experiment.suites import Suite
from widthbench.report import tables
from widthbench.report.lines import Line, lines
from widthbench.report.markdown import escaped
from widthbench.statistics import Summary, interval

NAME = "reproduction.md"
KEPT = (
    "base_digest",
    "checkpoint",
    "dataset_digest",
    "dtype",
    "threads",
    "val_seen",
    "processes",
    "device",
)  # of the provenance
OF_CODE = (
    "key",
    "source",
    "schema_version",
    "trace",
)  # that change with the code, whatever comes out

NOTES = """\
*Published* and *here* are test top-1 at the last stage in %, mean ± sample standard
deviation over base networks. *Difference* is here minus published; *over spread* divides it by the
standard deviation over base networks (root of the mean of both variances), so that 1 is what
another seed does. *Largest* is the largest difference of a single cell. *Equal* counts cells whose
record is the same bit by bit, but for times, host, commit and code. Another processor rounds
otherwise, and training carries that on: there only few cells are equal, and rows differ by a part
of their spread."""


def result(record: Record) -> dict[str, Any]:
    """Everything in a record that is not when, where or by which commit."""
    data = record.stable()
    data["provenance"] = {k: data["provenance"].get(k) for k in KEPT}
    return data


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Where two pieces of plain data differ, and by what; NaN equals NaN."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{at}[{index}]")
    elif old != new and not (_nan(old) and _nan(new)):
        yield f"{at}: recorded {str(old)[:60]}, now {str(new)[:60]}"


def _nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def equal(old: Record, new: Record) -> bool:
    """Whether two records of a cell say the same bit by bit, whichever code they come from."""
    one, other = ({k: v for k, v in result(r).items() if k not in OF_CODE} for r in (old, new))
    return next(differences(one, other), None) is None


@dataclass(frozen=True)
class Pair:
    """A row of the leaderboard, as published and as measured here.

    Attributes:
        old: The published row.
        new: The one measured here.
        same: Cells that are equal bit by bit.
        scored: Cells with the same test top-1.
        both: Cells that both have, finished in either.
        largest: The largest difference of test top-1 of a cell, in points; 0 where none is finished
            in both.
        gaps: The differences of all cells that are finished in both.
        slower: Seconds of decision and adaptation here over those there, likewise.
    """

    old: Line
    new: Line
    same: int
    scored: int
    both: int
    largest: float
    gaps: tuple[float, ...] = ()
    slower: tuple[float, ...] = ()

    @property
    def difference(self) -> float | None:
        """Here minus published, in points; None where either has no result."""
        before, after = self.old.summary(None), self.new.summary(None)
        return None if before is None or after is None else after.mean - before.mean

    @property
    def spread(self) -> float | None:
        """Standard deviation over base networks, of both together; None where there is one base."""
        deviations = [
            s.std
            for s in (self.old.summary(None), self.new.summary(None))
            if s is not None and s.std is not None
        ]
        return math.sqrt(statistics.fmean(d**2 for d in deviations)) if deviations else None


def pairs(
    published: Sequence[Record], records: Sequence[Record], *, by_seed: bool = False
) -> list[Pair]:
    """The rows that both have, in leaderboard order.

    Args:
        published: The one side.
        records: The other.
        by_seed: Pair cells of a row by their seeds, whatever their settings.
    """

    def known_by(record: Record) -> object:
        return record.cell.seed if by_seed else record.cell.identity

    places = [
        {(ln.dataset, ln.model, ln.label, ln.budget): ln for ln in lines(some)}
        for some in (published, records)
    ]
    paired = []
    for place, new in places[1].items():
        if (old := places[0].get(place)) is None:
            continue
        before = {known_by(r): r for r in old.records.values()}
        both = [(before[known_by(r)], r) for r in new.records.values() if known_by(r) in before]
        both = [
            (a, b) for a, b in both if "done" in (a.status, b.status)
        ]  # of skipped ones there is nothing to compare
        finished = [(a, b) for a, b in both if a.status == b.status == "done"]
        gaps = tuple(b.rows[-1].top1 - a.rows[-1].top1 for a, b in finished)
        times = [(_seconds(a), _seconds(b)) for a, b in finished]
        paired.append(
            Pair(
                old,
                new,
                same=sum(equal(a, b) for a, b in both),
                scored=gaps.count(0.0),
                both=len(both),
                largest=max(gaps, key=abs, default=0.0),
                gaps=gaps,
                slower=tuple(b / a for a, b in times if a > 0),
            )
        )
    return paired


def _seconds(record: Record) -> float:
    return sum(record.spent[p].seconds for p in ("decision", "adaptation") if p in record.spent)


BETWEEN = """\
Test top-1 at the last stage in %, mean ± sample standard deviation over base networks.
*Difference*: the second minus the first, in points, with its 95 % t-interval over the seeds that
both have (none below three). *Equal*: cells whose record is the same bit by bit, but for times,
host, commit and code. *Time*: seconds of decision and adaptation, the second over the first, median
over seeds; of two machines it says little."""


class Setting(NamedTuple):
    """What two cells of a row differ in.

    Attributes:
        name: Of the field, as in "finetune.epochs"; "data" by the digest of the data set.
        first: Its value on the one side.
        second: On the other.
        rows: In how many rows.
    """

    name: str
    first: Any
    second: Any
    rows: int


def settings(paired: Sequence[Pair]) -> list[Setting]:
    """What cells of one seed differ in, those of most rows first; a device is none of it."""
    found: Counter[str] = Counter()
    for pair in paired:
        before = {r.cell.seed: r for r in pair.old.records.values()}
        after = [r for r in pair.new.records.values() if r.cell.seed in before]
        # as text, since a value may be a list
        found.update({json.dumps(d) for r in after for d in _differing(before[r.cell.seed], r)})
    by_rows = [(*json.loads(text), n) for text, n in found.most_common()]
    return [Setting(name, first, second, rows) for name, first, second, rows in by_rows]


def _differing(one: Record, other: Record) -> Iterator[tuple[str, Any, Any]]:
    sides = [_flat(r.cell.model_dump(mode="json", exclude={"device"})) for r in (one, other)]
    for side, record in zip(sides, (one, other), strict=True):
        side["data"] = str(record.provenance.get("dataset_digest", ""))[:8]
    for name in sorted({*sides[0], *sides[1]}):
        first, second = (side.get(name) for side in sides)
        if first != second:
            yield name, first, second


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        inside = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return flat


def between(
    names: tuple[str, str], first: Sequence[Record], second: Sequence[Record]
) -> tuple[str, list[Pair]]:
    """A page of markdown that compares any two sets of records, and the rows that both have.

    Args:
        names: What they are called.
        first: The one side.
        second: The other; differences are this side's less the other's.
    """
    paired = pairs(first, second, by_seed=True)
    same, both = (sum(getattr(p, n) for p in paired) for n in ("same", "both"))
    parts = [
        f"# {escaped(names[1])} against {escaped(names[0])}",
        f"{same} of {both} cells are equal bit by bit.",
        _origins(first, second, names),
        *_warned(settings(paired), len(paired)),
        BETWEEN,
    ]
    headers = ["technique", "budget", *names, "difference", "equal", "time"]
    align = ("left", "left", *("right",) * 5)
    for (dataset, model), some in _by_network(paired).items():
        rows = [
            [
                escaped(p.new.label),
                p.new.budget or "–",
                _text(p.old),
                _text(p.new),
                _interval(p),
                f"{p.same} of {p.both}",
                f"{statistics.median(p.slower):.2f}x" if p.slower else "–",
            ]
            for p in some
        ]
        table = tabulate(
            rows, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True
        )
        parts += [f"## {escaped(model)} on {escaped(dataset)}", table]
    one, other = ({r.cell.id for r in some} for some in (first, second))
    for name, alone in ((names[0], sorted(one - other)), (names[1], sorted(other - one))):
        if alone:
            more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
            listed = ", ".join(map(escaped, alone[:5]))
            parts.append(f"In {escaped(name)} only: {len(alone)} cells ({listed}{more}).")
    return "\n\n".join(parts) + "\n", paired


def _warned(differ: Sequence[Setting], rows: int) -> Iterator[str]:
    """That rows were not measured alike, if they were not."""
    if differ:
        shown = [
            f"{s.name} {escaped(f'{s.first} against {s.second}')} ({s.rows} of {rows})"
            for s in differ[:6]
        ]
        more = f"; and {len(differ) - 6} more" if len(differ) > 6 else ""
        yield f"**Rows differ in their settings**: {'; '.join(shown)}{more}."


def _by_network(paired: Sequence[Pair]) -> dict[tuple[str, str], list[Pair]]:
    """Rows by data set and network."""
    networks: dict[tuple[str, str], list[Pair]] = {}
    for pair in paired:
        networks.setdefault((pair.new.dataset, pair.new.model), []).append(pair)
    return networks


def _interval(pair: Pair) -> str:
    if not pair.gaps:
        return "–"
    mean = statistics.fmean(pair.gaps)
    if len(pair.gaps) < 3:
        return f"{mean:+.2f}"
    low, high = interval(pair.gaps)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def summary(suite: Suite, published: Sequence[Record], records: Sequence[Record]) -> str:
    """Two or three lines for a terminal."""
    paired = pairs(published, records)
    same, scored, both = (sum(getattr(p, n) for p in paired) for n in ("same", "scored", "both"))
    lines = [
        f"against the published results of {suite.name} ({_machine(published)}): {same} of {both}"
        f" cells are equal bit by bit, {scored} have the same test top-1"
    ]
    gaps = [p for p in paired if p.difference is not None]
    if gaps:
        worst = max(gaps, key=lambda p: abs(p.difference or 0.0))
        middle = statistics.median(abs(p.difference or 0.0) for p in gaps)
        where = " ".join(n for n in (worst.new.label, worst.new.budget, worst.new.model) if n)
        most = f"by {worst.difference:+.2f} at most ({where})"
        lines.append(
            f"means of {len(gaps)} rows differ by {middle:.2f} points in the median, {most}"
        )
    return "; ".join(lines)


def page(suite: Suite, published: Sequence[Record], records: Sequence[Record]) -> str:
    """The markdown page.

    Args:
        suite: The suite.
        published: Its published records.
        records: Those measured here.
    """
    paired = pairs(published, records)
    judged = [p for p in paired if p.difference is not None and p.spread]
    within = sum(abs(p.difference or 0.0) <= (p.spread or 0.0) for p in judged)
    parts = [
        f"# {suite.name}: reproduction",
        "",
        f"{summary(suite, published, records)}.".replace("against", "Against", 1),
        (
            f"{within} of {len(judged)} rows lie within one standard deviation over base networks."
            if judged
            else ""
        ),
        "",
        _origins(published, records),
        "",
        NOTES,
        "",
    ]
    for (dataset, model), some in _by_network(paired).items():
        rows = [
            [
                escaped(p.new.label),
                p.new.budget or "–",
                _text(p.old),
                _text(p.new),
                _signed(p.difference),
                "–" if p.difference is None or not p.spread else f"{p.difference / p.spread:+.1f}",
                _signed(p.largest) if p.difference is not None else "",
                f"{p.same} of {p.both}",
            ]
            for p in some
        ]
        headers = [
            "technique",
            "budget",
            "published",
            "here",
            "difference",
            "over spread",
            "largest",
            "equal",
        ]
        align = ("left", "left", *("right",) * 6)
        table = tabulate(
            rows, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True
        )
        parts += [f"## {escaped(model)} on {escaped(dataset)}", "", table, ""]
    cells = [{r.cell.identity: r.cell.id for r in some} for some in (published, records)]
    for what, own, other in (
        ("Published only", cells[0], cells[1]),
        ("Here only", cells[1], cells[0]),
    ):
        if names := [name for identity, name in own.items() if identity not in other]:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts += [
                f"{what}: {len(names)} cells ({', '.join(map(escaped, names[:5]))}{more}).",
                "",
            ]
    return "\n".join(parts).rstrip() + "\n"


def _text(line: Line) -> str:
    summary: Summary | None = line.summary(None)
    failed = f" ({line.no_result})" if line.failed else ""
    return line.no_result if summary is None else f"{summary.text()}{failed}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _machine(records: Sequence[Record]) -> str:
    return "; ".join(tables.origins(records).get("hardware", ["unknown machine"]))


def _origins(
    published: Sequence[Record],
    records: Sequence[Record],
    names: tuple[str, str] = ("published", "here"),
) -> str:
    before, after = tables.origins(published), tables.origins(records)
    rows = [
        [name, *(escaped("; ".join(o.get(name, ["–"]))) for o in (before, after))]
        for name in {**before, **after}
    ]
    return tabulate(rows, headers=["", *names], tablefmt="pipe", disable_numparse=True)
