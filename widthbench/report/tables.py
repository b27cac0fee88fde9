"""Leaderboards: markdown tables from records."""

from __future__ import annotations

import functools
import json
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from tabulate import tabulate

from widthbench.cache import digest_of
from widthbench.errors import visible
from widthbench.experiment.cell import CONTROLS, Cell
from widthbench.experiment.records import FINAL, Record, Stage
from widthbench.experiment.suites import Suite
from widthbench.recipe import Spent
from widthbench.report.flags import FLAGS
from widthbench.statistics import LEAST, Summary, differences, ranks, summarise

ACCESS_ORDER = ("none", "unlabelled", "labelled", "training", "")
CONTROL_ACCESS = "control"

NOTES = """\
How to read this: one row is one technique at one budget, mean ± sample standard
deviation over n distinct base networks (seeds: each has its own train/val split, base and decision;
seeds on one published checkpoint are averaged and count as one). *Top-1* is on the test set, which
decides nothing in a run (how its recipes were chosen, `widthbench list recipes` and their files
say): right after the *resize*, after batch-norm *recalibration* (equal to the former in networks
without batch norm), and after the suite's *fine-tuning*, the same for every technique. *FLOPs (as
MACs)* are multiply-accumulates of one forward pass of one image. *Data* is the most that the
decision looked at. *Train cost* is everything that was spent to get there (base, decision,
adaptation; forward MACs plus backward MACs counted as twice the forward) over the cost of training
the base network. *Controls* are not techniques: `uniform-width` is the base scaled down uniformly
and trained by the base's recipe; `scratch:X` trains the shape that X found from fresh weights for
as many epochs as base, decision and fine-tuning took; `scratch-budget:X` for as many MACs{longest};
`l1-budget:X` prunes the base by L1 norm to X's budget and fine-tunes it until it has cost as much
as X in all{longest}; where base and fine-tuning together cost more than that, both are shortened
alike. Where a technique spreads its budget uniformly, `scratch` and `uniform-width` train the same
widths (with other draws, for other numbers of epochs); channels outside the suite's scope keep
their width in every row."""


PAIRED = """\
Each row compares two rows of the [leaderboard](leaderboard.md) on the same base
networks (seeds): the mean of the paired differences of test top-1 at the last stage, in points; its
95 % t-interval; the p-value of the paired t-test after Holm's correction over all pairs of this
table; n; and which row is higher, "tied" where the corrected p-value is 0.05 or more."""


CITING = "## Citing"

Key = tuple[
    object, int
]  # the base network (a checkpoint's digest, else the seed that it was trained with), and the seed


@dataclass
class Line:
    """All records of one technique on one network at one budget; several seeds may share a base,
    which then counts once.

    Numbers are worked out once: change nothing after the first was asked for.

    Attributes:
        dataset: Of its cells.
        model: The network's name.
        label: The technique's, with parameters.
        budget: What is kept; None for the base network.
        access: What the technique looks at; "" where nothing was run.
        control: Whether it is a control.
        records: By base and seed.
        meant: How many cells the suite has for it; 0 if nobody said.
    """

    dataset: str
    model: str
    label: str
    budget: str | None
    access: str
    control: bool
    records: dict[Key, Record] = field(default_factory=dict)
    meant: int = 0
    _summaries: dict[Stage | None, Summary | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _means: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def left(self) -> int:
        """Cells of the suite that have no result: not run, skipped or failed."""
        return max(self.meant, len(self.records)) - len(self.done)

    @property
    def failed(self) -> int:
        """Cells that failed: that raised, were ended, or diverged."""
        return sum(r.status == "failed" for r in self.records.values())

    @property
    def status(self) -> str:
        """Done if any cell is; else why not: skipped, failed or not run."""
        return "done" if self.done else self.first().status if self.records else "not run"

    @functools.cached_property
    def done(self) -> dict[Key, Record]:
        """The finished ones by base and seed, once all records are there."""
        return {k: r for k, r in self.records.items() if r.status == "done"}

    @property
    def bases(self) -> int:
        """Distinct base networks of the finished ones."""
        return len({base for base, _ in self.done})

    def summary(self, stage: Stage | None) -> Summary | None:
        """Top-1 at a stage (the last one if None); None if no record has it."""
        if stage not in self._summaries:
            found = {k: row.top1 for k, r in self.done.items() if (row := r.row(stage)) is not None}
            self._summaries[stage] = over_bases(found)
        return self._summaries[stage]

    def mean(self, name: Literal["params", "macs"]) -> float:
        """Mean parameters or MACs of the finished ones, of which there is one at least."""
        if name not in self._means:
            found = over_bases({k: float(getattr(r, name)) for k, r in self.done.items()})
            assert found is not None
            self._means[name] = found.mean
        return self._means[name]

    def top5(self) -> Summary | None:
        """Top-5 at the last stage; None below 100 classes."""
        rows = {k: row for k, r in self.done.items() if (row := r.row()) is not None}
        return over_bases({k: row.top5 for k, row in rows.items() if row.top5 is not None})

    def final(self) -> Summary | None:
        """Top-1 after training of some kind; None where a suite trains nothing after the resize."""
        return next((s for stage in FINAL if (s := self.summary(stage)) is not None), None)

    def scores(self) -> dict[object, float]:
        """Top-1 at the last stage by base."""
        return by_base({k: row.top1 for k, r in self.done.items() if (row := r.row()) is not None})

    def first(self) -> Record:
        """Any record of a row that has some: a finished one if there is one."""
        return next(iter({**self.done, **self.records}.values()))


def by_base(values: Mapping[Key, float]) -> dict[object, float]:
    """One value per base: the mean over the seeds that share it."""
    single = {base: value for (base, _), value in values.items()}
    if len(single) == len(values):
        return single
    grouped: dict[object, list[float]] = {}
    for (base, _), value in values.items():
        grouped.setdefault(base, []).append(value)
    return {base: fmean(v) for base, v in grouped.items()}


def over_bases(values: Mapping[Key, float]) -> Summary | None:
    """Mean and spread over distinct bases; None where there is nothing."""
    return summarise(by_base(values)) if values else None


def lines(records: Iterable[Record], cells: Iterable[Cell] = ()) -> list[Line]:
    """Records grouped to rows, in leaderboard order: by network, then budget from large to small,
    controls last.

    Args:
        records: A suite's.
        cells: The suite's: they give a row to what was not run, and say how many cells each row is
            meant to have.
    """
    records, cells = list(records), list(cells)
    rows = dict(_grouped(records))
    order: dict[tuple[str, str], int] = {}
    meant: dict[_Place, int] = {}
    for cell in cells:
        place = _place(cell)
        meant[place] = meant.get(place, 0) + 1
        if place not in rows:
            rows[place] = _line(cell)
    for dataset, network, *_ in (*meant, *rows):
        order.setdefault((dataset, network), len(order))
    found = []
    for place, row in rows.items():
        found.append(copy(row))  # which shares the numbers
        found[-1].meant = meant.get(place, 0)

    def rank(line: Line) -> tuple[Any, ...]:
        kept = float(line.budget.partition(":")[2].partition(":")[0]) if line.budget else 10.0
        top = line.summary(None)
        access = len(ACCESS_ORDER) if line.control else ACCESS_ORDER.index(line.access)
        return (
            order[line.dataset, line.model],
            -kept,
            access,
            -(top.mean if top else -1.0),
            line.label,
        )

    return sorted(found, key=rank)


_Place = tuple[str, str, str, str | None]
_LAST: deque[tuple[tuple[int, ...], list[Record], dict[_Place, Line]]] = deque(maxlen=2)


def _place(cell: Cell) -> _Place:
    return cell.dataset, cell.network, cell.label, cell.budget


def _line(cell: Cell) -> Line:
    return Line(*_place(cell), "", cell.technique in CONTROLS)


def _grouped(records: list[Record]) -> dict[_Place, Line]:
    """Records by row; a report asks for the same ones again and again."""
    same = tuple(map(id, records))
    for ids, _, known in _LAST:
        if ids == same:
            return known
    found: dict[_Place, Line] = {}
    for r in records:
        place = _place(r.cell)
        if place not in found:
            found[place] = _line(r.cell)
        line = found[place]
        # a base is what seeds make distinct; one public checkpoint under many seeds is still one
        # base
        line.records[r.provenance.get("checkpoint") or r.cell.seed, r.cell.seed] = r
        line.access = line.access or r.access
    _LAST.append(
        (same, records, found)
    )  # which keeps them alive, so that nothing else gets their ids
    return found


def blocks(
    records: Iterable[Record], cells: Iterable[Cell] = ()
) -> dict[tuple[str, str], list[Line]]:
    """Rows by (data set, network), in leaderboard order; arguments as for ``lines``."""
    grouped: dict[tuple[str, str], list[Line]] = {}
    for line in lines(records, cells):
        grouped.setdefault((line.dataset, line.model), []).append(line)
    return grouped


def speeds_of(timings: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Timings by (data set, network, shape)."""
    return {(t["dataset"], t["model"], t["shape"]): t for t in timings}


def leaderboard(
    suite: Suite,
    records: Sequence[Record],
    timings: Sequence[dict[str, Any]],
    expected: int,
    *,
    digest: str = "",
    cite: str = "",
) -> str:
    """The markdown page of a suite.

    Args:
        suite: The suite.
        records: Its records.
        timings: One entry per distinct shape, from ``timings.jsonl``.
        expected: How many cells the suite has.
        digest: SHA-256 of ``records.jsonl``.
        cite: BibTeX.
    """
    parts = [f"# {suite.name}: {escaped(suite.title)}" if suite.title else f"# {suite.name}", ""]
    if not suite.citable:
        parts += [
            "**A smoke suite: not for citation.** Few seeds, small data; no ranks are given.",
            "",
        ]
    if comparable(suite):
        parts += ["Paired differences of all rows: [paired.md](paired.md).", ""]
    state = _state(records, expected)
    images = {row.samples for r in records for row in r.rows}
    grain = (
        f" Test sets of {', '.join(map(str, sorted(images)))} images: one is"
        f" {100 / min(images):.2g} points."
        if images
        else ""
    )
    bases = {
        (r.cell.dataset, r.cell.network, r.provenance.get("checkpoint") or r.cell.seed)
        for r in records
    }
    most = max(
        (len([b for b in bases if b[:2] == net]) for net in {b[:2] for b in bases}), default=0
    )
    longest = (
        f", but for at most {suite.longest:g} times X's epochs (*train cost* says how far that"
        " went)"
        if suite.longest
        else ""
    )
    bases_each = (
        f"{most} base networks each at most"
        if most > 1
        else "one base network each: no ± and no ranks"
    )
    parts += [f"{state}; {bases_each}.{grain}", "", NOTES.format(longest=longest), ""]
    speeds = speeds_of(timings)
    for (dataset, model), block in blocks(records, suite.cells()).items():
        parts += [f"## {escaped(model)} on {escaped(dataset)}", ""]
        if some := [line for line in block if line.records]:
            parts += [table(some, speeds, ranked=suite.citable), ""]
        if left := [line for line in block if not line.records]:
            parts += [f"*Not run*: {_names(left)}.", ""]
    parts += _problems(suite, records) + _footer(records, timings)
    if digest:
        parts.append(
            f"- SHA-256 of `records.jsonl`: `{digest}`; `widthbench verify {suite.name}` checks it"
            " and reruns cells"
        )
    if cite:
        parts += ["", CITING, "", *fenced(cite, "bibtex")]
    return "\n".join(parts).rstrip() + "\n"


def _state(records: Sequence[Record], expected: int) -> str:
    """``"300 of 303 cells done, 2 skipped, 1 failed"``."""
    text = f"{sum(r.status == 'done' for r in records)} of {expected} cells done"
    for status in ("skipped", "failed"):
        if number := sum(r.status == status for r in records):
            text += f", {number} {status}"
    return text


def table(
    block: Sequence[Line], speeds: dict[tuple[str, str, str], dict[str, Any]], *, ranked: bool
) -> str:
    """The rows of one network as a markdown table."""
    places = ranked_rows(block) if ranked else {}
    five = any(line.top5() for line in block)
    rows: list[list[Any]] = []
    for line in block:
        if not line.done:
            rows.append(
                [
                    escaped(line.label),
                    _access(line),
                    line.budget or "–",
                    status_of(line),
                    *[""] * (9 + five),
                ]
            )
            continue
        r = line.first()
        macs, params = line.mean("macs"), line.mean("params")
        final = line.final()
        place = (
            f" ({places[line.label, line.budget]})" if (line.label, line.budget) in places else ""
        )
        rows.append(
            [
                escaped(line.label) + _flags(line),
                _access(line),
                line.budget or "–",
                _text(line.summary("resized")),
                _text(line.summary("recalibrated")) + ("" if final else place),
                f"**{_text(final)}**{place}" if final else "",
                *([_text(line.top5())] if five else []),
                count(params),
                count(macs),
                f"{_ratio(r.base_params, params)}x",
                f"{_ratio(r.base_macs, macs)}x",
                _speed_up(line, speeds),
                _cost(line),
                bases_of(line),
            ]
        )
    headers = [
        "technique",
        "data",
        "budget",
        "top-1 % resized",
        "recalibrated",
        "fine-tuned / trained" + (" (rank)" if places else ""),
        *(["top-5 %, last"] if five else []),
        "params",
        "FLOPs (as MACs)",
        "compression",
        "speed-up, theory",
        "measured",
        "train cost",
        "n",
    ]
    text = ("left",) * 3 + ("right",) * (10 + five)
    return tabulate(rows, headers=headers, tablefmt="pipe", colalign=text, disable_numparse=True)


def _names(block: Sequence[Line]) -> str:
    """Rows by their names, those at the same budgets together: ``"base; l1-norm, nmf at macs:0.5,
    macs:0.25"``.
    """
    budgets: dict[str, list[str]] = {}
    for line in block:
        budgets.setdefault(line.label, []).append(line.budget or "")
    together: dict[tuple[str, ...], list[str]] = {}
    for label, some in budgets.items():
        together.setdefault(tuple(some), []).append(escaped(label))
    return "; ".join(
        ", ".join(labels) + (f" at {', '.join(some)}" if any(some) else "")
        for some, labels in together.items()
    )


def comparable(suite: Suite) -> bool:
    """Whether some network of a suite has enough bases for paired statistics, and the suite is
    there for them.
    """
    trained = [n for n in suite.models if not (n.checkpoint or n.pretrained)]
    most = max((len(suite.seeds if n.seeds is None else n.seeds) for n in trained), default=0)
    return suite.citable and most >= LEAST


def paired(suite: Suite, records: Sequence[Record]) -> str:
    """The markdown page of paired differences between all rows of each network and budget, controls
    included.
    """
    parts = [f"# {suite.name}: paired differences", "", PAIRED, ""]
    grouped: dict[tuple[str, str, str | None], list[Line]] = {}
    for line in lines(records):
        if line.done and line.budget:
            grouped.setdefault((line.dataset, line.model, line.budget), []).append(line)
    for (dataset, model, budget), block in grouped.items():
        parts += [f"## {escaped(model)} on {escaped(dataset)}, {budget}", ""]
        compared = differences({line.label: line.scores() for line in block})
        if not compared:
            parts += [f"Fewer than {LEAST} shared bases: nothing is compared.", ""]
            continue
        rows = [
            [
                escaped(f"{d.first} - {d.second}"),
                f"{d.mean:+.2f}",
                f"{d.low:+.2f} to {d.high:+.2f}",
                f"{d.adjusted:.2g}",
                d.n,
                escaped(d.verdict()),
            ]
            for d in compared
        ]
        headers = [
            "difference of test top-1",
            "mean",
            "95 % interval",
            "p, Holm",
            "n",
            "which is higher",
        ]
        align = ("left", "right", "right", "right", "right", "left")
        parts += [
            tabulate(rows, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True),
            "",
        ]
    return "\n".join(parts).rstrip() + "\n"


def terminal(suite: Suite, records: Sequence[Record], expected: int) -> str:
    """The short table that a terminal shows at the end of a run."""
    rows: list[list[Any]] = []
    for line in lines(records, suite.cells()):
        if not line.records:  # of a part of a suite
            continue
        if not line.done:
            rows.append([line.model, line.label, line.budget or "–", status_of(line), "", "", ""])
            continue
        cost = f"{count(line.mean('params'))} / {count(line.mean('macs'))}"
        after, final = _text(line.summary("resized")), _text(line.final())
        rows.append(
            [
                line.model,
                line.label + _flags(line),
                line.budget or "–",
                after,
                final,
                cost,
                bases_of(line),
            ]
        )
    headers = [
        "model",
        "technique",
        "budget",
        "top-1 % resized",
        "fine-tuned / trained",
        "params / MACs",
        "n",
    ]
    state, machines = _state(records, expected), "; ".join(origins(records).get("hardware", []))
    head = (
        f"suite {suite.name}: {state}; test accuracy, mean ± std over n base networks; {machines}"
    )
    align = ("left", "left", "left", "right", "right", "right", "right")
    return f"{head}\n\n" + tabulate(
        rows, headers=headers, tablefmt="simple", colalign=align, disable_numparse=True
    )


def ranked_rows(block: Sequence[Line]) -> dict[tuple[str, str | None], str]:
    """Ranks among the techniques of one network at each budget, where the statistics carry them."""
    found: dict[tuple[str, str | None], str] = {}
    for budget in {line.budget for line in block if line.budget}:
        rows = {ln.label: ln for ln in block if ln.budget == budget and not ln.control}
        scores = {label: ln.scores() for label, ln in rows.items() if ln.done}
        for label, rank in (ranks(scores) or {}).items():
            found[label, budget] = str(rank)
    return found


def _access(line: Line) -> str:
    return CONTROL_ACCESS if line.control else line.access


def _flags(line: Line) -> str:
    return "".join(f" {flag.mark}" for flag in FLAGS if flag.holds(line))


def bases_of(line: Line) -> str:
    """Distinct bases, and of how many cells where some have no result."""
    if not line.left:
        return str(line.bases)
    whole = len(line.done) + line.left
    failed = f", {line.failed} of {whole} failed" if line.failed else ""
    if line.bases == len(line.done):
        return (
            f"{line.bases}{failed}"
            if line.failed == line.left
            else f"{line.bases} of {whole}{failed}"
        )
    return f"{line.bases} ({len(line.done)} of {whole} cells{failed})"


def status_of(line: Line) -> str:
    """Why a row has no result: ``"5 of 5 failed"``, "skipped", "not run"."""
    return (
        f"{line.failed} of {max(line.meant, len(line.records))} failed"
        if line.failed
        else line.status
    )


def escaped(text: str) -> str:
    """Anyone's text as markdown that says it, in a table's cell too, and does nothing else."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in text)


def code(text: str) -> str:
    """Anyone's text as code in a line or a table's cell of markdown."""
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def fenced(text: str, language: str) -> list[str]:
    """The lines of a block of code that its text cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text.strip(), fence]


def _text(summary: Summary | None) -> str:
    return summary.text() if summary else ""


def count(value: float) -> str:
    """``"2.29 M"``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.0f}"


def _ratio(whole: int | None, part: float) -> str:
    return "–" if not whole else f"{whole / part:.2f}"


def _cost(line: Line) -> str:
    found = cost_of(line)
    return f"{found.mean:.2f}x" if found else "–"


def cost_of(line: Line) -> Summary | None:
    """Everything spent over the cost of the base network's training; None where that is unknown."""
    shares = {}
    for k, r in line.done.items():
        if r.provenance.get("checkpoint"):  # what published weights cost is unknown
            continue
        total = sum(s.forward_macs + s.backward_macs for s in r.spent.values())
        epochs = r.cell.base.epochs
        base = r.spent.get("base", Spent())
        whole = base.forward_macs + base.backward_macs
        if (
            not whole and r.base_macs and r.macs
        ):  # a control has no base: scale its own training to the base's shape
            own = r.spent.get("adaptation", Spent())
            whole = (
                round(
                    (own.forward_macs + own.backward_macs)
                    / own.epochs
                    * epochs
                    * r.base_macs
                    / r.macs
                )
                if own.epochs
                else 0
            )
        if whole:
            shares[k] = total / whole
    return over_bases(shares)


def _speed_up(line: Line, speeds: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    summary = speed_up_of(line, speeds)
    return f"{summary.mean:.2f}x" if summary else "–"


def speed_up_of(
    line: Line, speeds: Mapping[tuple[str, str, str], Mapping[str, Any]]
) -> Summary | None:
    """Median latency of the base over that of the row's shapes; None where it was not measured."""
    if line.label == "base":
        return Summary(1.0, None, line.bases)
    if not speeds:
        return None
    found = {}
    for k, r in line.done.items():
        entry = speeds.get((line.dataset, line.model, shape_of(r)))
        if entry:
            found[k] = entry["speed_up"]
    return over_bases(found)


def shape_of(record: Record) -> str:
    """A short digest of a record's widths: records of one shape share one timing."""
    args = json.dumps(record.cell.model_args, sort_keys=True) if record.cell.model_args else "{}"
    return _shape(args, record.cell.size, tuple(record.widths.items()))


@functools.lru_cache(maxsize=100_000)
def _shape(args: str, size: int, widths: tuple[tuple[str, int], ...]) -> str:
    return digest_of({"args": json.loads(args), "size": size, "widths": dict(widths)})[:12]


def _problems(suite: Suite, records: Sequence[Record]) -> list[str]:
    rows = lines(records, suite.cells())
    parts = [f"{f.mark} {f.note}." for f in FLAGS if any(map(f.holds, rows))]
    bad = [r for r in records if r.status != "done"]
    if unrun := sum(max(0, line.meant - len(line.records)) for line in rows):
        parts.append(
            f"*not run*: {unrun} cells of the suite (`widthbench run {suite.name}` runs them)."
        )
    if bad:
        parts += ["", "## Cells without a result", ""]
        reasons = [[escaped(r.cell.id), r.status, escaped(r.reason[:300])] for r in bad]
        parts.append(
            tabulate(
                reasons,
                headers=["cell", "status", "reason"],
                tablefmt="pipe",
                disable_numparse=True,
            )
        )
    return [*parts, ""] if parts else []


def origins(
    records: Sequence[Record], timings: Sequence[dict[str, Any]] = ()
) -> dict[str, list[str]]:
    """Where records come from: versions, hardware, device and threads, commit, date; each with all
    that occur.

    With timings, also which machine latencies were measured on, and how.
    """
    facts: dict[str, set[str]] = {}
    for p in (r.provenance for r in records):
        packages = ("widthbench", "torch", "timm", "torch-pruning")
        used, machine = p.get("versions", {}), p.get("hardware", {})
        facts.setdefault("versions", set()).add(", ".join(f"{k} {used.get(k)}" for k in packages))
        facts.setdefault("hardware", set()).add(str(machine.get("gpu") or machine.get("cpu")))
        facts.setdefault("device and threads", set()).add(
            f"{p.get('device')}, {p.get('threads')} thread(s)"
            + (f", {p['processes']} processes" if p.get("processes", 1) > 1 else "")
        )
        state = " with uncommitted changes" if p.get("dirty") else ""
        facts.setdefault("commit", set()).add(
            f"{p['commit'][:12]}{state}" if p.get("commit") else "not a checkout"
        )
        facts.setdefault("date", set()).add(str(p.get("when"))[:10])
    for t in timings:
        machine = t.get("hardware") or {}
        where = (
            f"{machine.get('gpu') or machine.get('cpu')}, median latency of a batch of"
            f" {t.get('batch', 64)}"
        )
        facts.setdefault("measured speed-up", set()).add(
            f"{where}, taken one shape at a time after all cells had ended"
        )
    return {name: sorted(map(visible, values)) for name, values in facts.items()}


def _footer(records: Sequence[Record], timings: Sequence[dict[str, Any]]) -> list[str]:
    """Where the numbers come from."""
    if not records:
        return []
    rows = [
        f"- {name}: {escaped('; '.join(values))}"
        for name, values in origins(records, timings).items()
    ]
    return ["---", "", *rows]
