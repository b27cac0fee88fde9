"""Claims: what the source documents report against what was measured, each with a verdict by a rule
that stands in its file.
"""

from __future__ import annotations

import importlib
import inspect
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from widthbench import toml
from widthbench.errors import UsageError, did_you_mean, first_problem
from widthbench.experiment import suites
from widthbench.experiment.cell import CONTROLS, Cell
from widthbench.experiment.records import Record, Stage, read_records
from widthbench.statistics import LEAST, LEVEL, Summary, interval, mcnemar, summarise
from widthbench.technique import registry
from widthbench.technique.budget import written

Kind = Literal["value", "gain", "order", "ratio", "property"]
Verdict = Literal[
    "reproduced",
    "not reproduced",
    "proxy: direction shown",
    "proxy: direction not shown",
    "inconclusive",
    "not run",
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Direction = Literal["<", "<=", ">", ">="]
METRICS = ("top1", "top5", "loss", "val_top1", "val_loss")
SIZES = ("params", "macs")
COMPRESSION = "compression"
ERROR = "top1_error"
LEAST_RUNS = 3  # a median of fewer is none


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Pick(_Strict):
    """Which records of a suite a number is read from, and what is read. What is not given matches
    anything.

    Attributes:
        suite: Whose results are read, published ones or a folder of yours.
        dataset: Of the cell.
        model: Of the cell.
        args: Arguments of the network's constructor that the cell must have; all of them, if
            ``exactly``.
        exactly: Whether the cell may have no other arguments.
        variant: Of the cell's network.
        technique: Of the cell.
        of: For scratch controls, whose shape they train.
        params: Values that the technique's parameters must have in the cell, set there or by
            default.
        budget: Of the cell; a list means the mean over those budgets.
        stage: Which row of the record; the last one if absent.
        metric: A score of that row (top1, its complement top1_error, top5, loss, val_top1,
            val_loss), "params" or "macs" of the record (in millions), "compression" (the base's
            parameters over what is left), or "series:NAME", an entry of a series that the record
            holds.
        entry: Which entry of the series; the last one if absent. Series along a path begin with the
            network as it was, so that entry k is what k removals left. "least" is the least of
            those that are there.
    """

    suite: str
    dataset: str | None = None
    model: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    exactly: bool = False
    variant: str = ""
    technique: str | None = None
    of: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    budget: str | Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    stage: Stage | None = None
    metric: str = Field(
        default="top1", pattern=f"^({'|'.join((*METRICS, *SIZES, COMPRESSION, ERROR))}|series:.+)$"
    )
    entry: int | Literal["least"] = -1

    def matches(self, cell: Cell) -> bool:
        """Whether a cell is one of those meant."""
        named = ("dataset", "model", "technique", "of")
        return (
            all(getattr(self, n) in (None, getattr(cell, n)) for n in named)
            and (self.budget is None or cell.budget in self.budgets)
            and all(cell.model_args.get(k) == v for k, v in self.args.items())
            and (not self.exactly or len(cell.model_args) == len(self.args))
            and cell.variant == self.variant
            and all(_parameter(cell, k) == v for k, v in self.params.items())
        )

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets that are named."""
        return tuple(
            map(written, (self.budget,) if isinstance(self.budget, str) else self.budget or ())
        )

    def value(self, record: Record) -> float | None:
        """The number of one record; None if it has none."""
        if self.metric in SIZES:
            size = getattr(record, self.metric)
            return None if size is None else size / 1e6
        if self.metric == COMPRESSION:
            return (
                record.base_params / record.params if record.base_params and record.params else None
            )
        if self.metric in (*METRICS, ERROR):
            row = record.row(self.stage)
            return (
                None
                if row is None
                else 100 - row.top1
                if self.metric == ERROR
                else getattr(row, self.metric)
            )
        series = record.series.get(self.metric.removeprefix("series:")) or []
        if self.entry == "least":
            return min((float(v) for v in series if v is not None), default=None)
        return float(series[self.entry]) if -len(series) <= self.entry < len(series) else None


def _parameter(cell: Cell, name: str) -> Any:
    """A parameter of a cell's technique: what the cell sets, else the technique's default."""
    if name in cell.params or cell.technique in CONTROLS:
        return cell.params.get(name)
    parameter = inspect.signature(registry.load(cell.technique)).parameters.get(name)
    return None if parameter is None else parameter.default


class Row(_Strict):
    """One number that a document reports, or one thing that it says must hold, with the rule that
    judges it.

    Attributes:
        what: What is measured.
        kind: "value": within ``tolerance`` of ``reported``. "gain": ``at - minus``, likewise.
            "order": the paired difference ``at - minus`` over at least five bases has a 95 %
            t-interval beyond ``bound`` (0); on one public checkpoint, McNemar's exact test over its
            test images has p < 0.05. "ratio": the median of at least three paired runs
            against ``bound``. "property": every value (or every ``at - minus``) against ``bound``.
        reported: What the document says; absent where it gives no number.
        tolerance: Largest difference that counts as reproduced.
        bound: What order, ratio and property are held against.
        direction: On which side of the bound the claim lies.
        unit: Of the numbers.
        at: Where the number is read.
        minus: What is subtracted, base by base.
        check: ``module:function`` that measures it instead, as a list of numbers, one per base or
            pair of runs. A function that takes ``evidence`` is given it and returns a ``Picked``,
            for what no single pick can say; what it picks stands in its attribute ``picks``.
        given: Arguments of the check.
        proxy: Smaller work than the document's, or in another set-up: it can show the direction or
            not, and says nothing else ("proxy: ..."; never "reproduced" or "not reproduced").
        sanity: What must hold whatever was trained (algebra, counts of parameters): listed apart,
            and no part of a claim's verdict unless it fails.
        reading: Which of several readings of an ambiguous sentence the row belongs to; rows without
            one belong to all.
    """

    what: str
    kind: Kind
    reported: float | None = None
    tolerance: float | None = Field(default=None, gt=0)
    bound: float | None = None
    direction: Direction | None = None
    unit: str = ""
    at: Pick | None = None
    minus: Pick | None = None
    check: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    given: dict[str, Any] = Field(default_factory=dict)
    proxy: bool = False
    sanity: bool = False
    reading: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Row:
        if self.kind in ("value", "gain"):
            if self.reported is None or self.tolerance is None:
                raise ValueError(
                    f"'{self.what}': kind = '{self.kind}' needs reported and tolerance"
                )
        elif self.direction is None or (self.bound is None and self.kind != "order"):
            raise ValueError(
                f"'{self.what}': kind = '{self.kind}' needs"
                f" direction{'' if self.kind == 'order' else ' and bound'}"
            )
        if self.kind == "order" and self.direction in ("<=", ">="):
            raise ValueError(f"'{self.what}': an order is strict: '<' or '>'")
        if self.at and self.check:
            raise ValueError(f"'{self.what}': at and check exclude each other")
        if self.given and not self.check:
            raise ValueError(f"'{self.what}': given needs check")
        if self.minus and not self.at:
            raise ValueError(f"'{self.what}': minus needs at")
        if self.at and self.kind in ("gain", "order") and not self.minus:
            raise ValueError(f"'{self.what}': kind = '{self.kind}' needs minus")
        if self.at and self.kind == "value" and self.minus:
            raise ValueError(f"'{self.what}': kind = 'value' takes no minus")
        if self.at and self.kind == "ratio":
            raise ValueError(f"'{self.what}': kind = 'ratio' is measured by a check")
        return self


class Claim(_Strict):
    """One claim of a document.

    Attributes:
        id: As in "M1".
        text: What is claimed, in one or two sentences.
        needs: What it takes to measure it, shown while it is not run.
        note: What the reader of the verdict must know.
        rows: Its numbers.
    """

    id: str = Field(pattern=r"^[A-Z]\d+$")
    text: str
    needs: str
    note: str = ""
    rows: tuple[Row, ...] = Field(min_length=1)


class Document(_Strict):
    """The claims of one source document.

    Attributes:
        document: Its number or short name.
        title: What it is.
        technique: The technique that it is about; "" if none.
        calibrates: Whether these are no findings but what the suite itself must reproduce; then a
            failure is an error.
        claims: Its claims.
    """

    document: str
    title: str
    technique: str = ""
    calibrates: bool = False
    claims: tuple[Claim, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Judged:
    """A row with what was measured.

    Attributes:
        row: The row.
        verdict: By the row's rule.
        measured: Mean and spread over distinct bases, or median of runs; None if not run.
        detail: The interval, or what is missing.
        records: Keys of the records that it rests on.
    """

    row: Row
    verdict: Verdict
    measured: Summary | None = None
    detail: str = ""
    records: tuple[str, ...] = ()


@dataclass
class Evidence:
    """The records that claims are judged by: the results of each suite in one folder, read once.

    Attributes:
        results: The results folder.
    """

    results: Path
    _read: dict[str, list[Record]] = field(default_factory=dict)
    _cells: dict[str, list[Cell]] = field(default_factory=dict)

    def of(self, suite: str) -> list[Record]:
        """A suite's records; none if it was not run.

        Raises:
            UsageError: If its file is damaged.
        """
        if suite not in self._read:
            path = self.results / suite / "records.jsonl"
            self._read[suite] = read_records(path) if path.is_file() else []
        return self._read[suite]

    def cells(self, suite: str) -> list[Cell]:
        """A suite's cells as its file has them now."""
        if suite not in self._cells:
            self._cells[suite] = suites.load(suite).cells()
        return self._cells[suite]

    def pick(self, pick: Pick) -> Picked:
        """What a pick finds: the records of those cells of the suite that it means, and how many of
        these have none.

        Raises:
            UsageError: If it means no cell of its suite (a mistyped name must not read "not run"),
                or cells that differ in more than the base network.
        """
        meant = {c.identity: c for c in self.cells(pick.suite) if pick.matches(c)}
        if not meant:
            raise UsageError(
                f"{pick.model_dump(exclude_defaults=True)} matches no cell of suite '{pick.suite}'"
            )
        spread = {"seed": 0} | ({"budget": None} if len(pick.budgets) > 1 else {})
        kinds = {c.model_copy(update=spread).identity for c in meant.values()}
        if len(kinds) > 1:
            raise UsageError(
                f"{pick.model_dump(exclude_defaults=True)} matches {len(kinds)} kinds of cells that"
                " differ in more than their seed"
                f" ({', '.join(sorted({c.id for c in meant.values()})[:3])}, ...): say more"
            )
        picked = Picked(missing=len(meant))
        values: dict[object, dict[str | None, list[float]]] = {}
        for record in self.of(pick.suite):
            value = pick.value(record) if record.status == "done" else None
            if record.cell.identity not in meant:
                continue
            picked.failed += record.status == "failed"
            if value is None:
                continue
            base = record.provenance.get("checkpoint") or record.cell.seed
            values.setdefault(base, {}).setdefault(record.cell.budget, []).append(value)
            picked.records.append(record)
            picked.missing -= 1
        for (
            base,
            by_budget,
        ) in values.items():  # seeds on one base, then budgets: each base counts once
            if len(by_budget) >= len(pick.budgets):
                picked.values[base] = statistics.fmean(
                    statistics.fmean(v) for v in by_budget.values()
                )
        return picked


@dataclass
class Picked:
    """What a pick finds: one value per distinct base network.

    Attributes:
        values: By base; the mean over seeds where several share one (the ten random starts of NMF
            on one checkpoint).
        records: The records that they come from.
        missing: How many of the cells that are meant have no such value: failed, skipped or not
            run.
        failed: How many of these failed.
    """

    values: dict[object, float] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    missing: int = 0
    failed: int = 0


def load() -> list[Document]:
    """All built-in documents, by number.

    Raises:
        UsageError: If a file is malformed, or an id is used twice.
    """
    folder = files("widthbench._claims")
    documents = [
        parse((folder / p.name).read_text(encoding="utf-8"), p.name)
        for p in folder.iterdir()
        if p.name.endswith(".toml")
    ]
    seen: set[str] = set()
    for claim in (c for d in documents for c in d.claims):
        if claim.id in seen:
            raise UsageError(f"claim '{claim.id}' is there twice")
        seen.add(claim.id)
    return sorted(documents, key=lambda d: d.document)


def parse(text: str, where: str) -> Document:
    """A document from TOML text.

    Raises:
        UsageError: If it is malformed (file, key, what was expected).
    """
    try:
        return Document(**toml.parse(text, where))
    except ValidationError as error:
        key, problem = first_problem(error)
        raise UsageError(f"{where}: {key}: {problem}") from error


def choose(documents: Iterable[Document], ids: Sequence[str] = ()) -> list[tuple[Document, Claim]]:
    """The claims with the given ids, or all.

    Raises:
        UsageError: If there is no such claim.
    """
    by_id = {c.id: (d, c) for d in documents for c in d.claims}
    for name in ids:
        if name not in by_id:
            raise UsageError(f"unknown claim '{name}'{did_you_mean(name, by_id)}")
    return [by_id[n] for n in (dict.fromkeys(ids) if ids else by_id)]


def cells(claims: Iterable[Claim]) -> dict[str, list[Cell]]:
    """The cells that claims rest on, by suite."""
    rows = [r for c in claims for r in c.rows]
    picks = [p for r in rows for p in (r.at, r.minus) if p is not None]
    picks += [p for r in rows if r.check for p in getattr(_function(r.check), "picks", ())]
    wanted: dict[str, list[Cell]] = {}
    for name in dict.fromkeys(p.suite for p in picks):
        wanted[name] = [
            c
            for c in suites.load(name).cells()
            if any(p.suite == name and p.matches(c) for p in picks)
        ]
    return wanted


def judge(claim: Claim, evidence: Evidence) -> list[Judged]:
    """All rows of a claim with their verdicts."""
    return [judge_row(row, claim, evidence) for row in claim.rows]


def judge_all(results: Path, ids: Sequence[str] = ()) -> list[tuple[Document, Claim, list[Judged]]]:
    """The claims with the given ids, or all, judged by the records in a results folder.

    Raises:
        UsageError: If there is no such claim, or the records are damaged or ambiguous.
    """
    evidence = Evidence(results)
    return [(document, claim, judge(claim, evidence)) for document, claim in choose(load(), ids)]


def judge_row(row: Row, claim: Claim, evidence: Evidence) -> Judged:
    """One row with its verdict: measured where there are records or a check, else "not run"."""
    records: list[Record] = []
    remarks: list[str] = []
    missing = failed = 0
    if row.check:
        check = _function(row.check)
        asks = "evidence" in inspect.signature(check).parameters
        picked = (
            check(evidence, **row.given) if asks else Picked(dict(enumerate(check(**row.given))))
        )
        values: Mapping[object, float] = picked.values
        records, missing, failed = picked.records, picked.missing, picked.failed
        remarks = _remarks(records, missing, failed)
    elif row.at:
        picked = evidence.pick(row.at)
        values, records, missing, failed = (
            picked.values,
            picked.records,
            picked.missing,
            picked.failed,
        )
        if row.minus:
            other = evidence.pick(row.minus)
            pairs = {k: v - other.values[k] for k, v in values.items() if k in other.values}
            missing, failed = missing + other.missing, failed + other.failed
            values, records = pairs, records + other.records
        remarks = _remarks(records, missing, failed)
    else:
        values = {}
    if not values:
        return Judged(
            row,
            "inconclusive" if failed else "not run",
            detail="; ".join(remarks) if failed else claim.needs,
        )
    verdict, measured, detail = _verdict(row, values)
    if row.kind == "order" and row.at and row.minus and len(values) == 1:
        verdict, detail = _over_images(row, picked.records, other.records) or (verdict, detail)
    if verdict in ("reproduced", "not reproduced") and (
        missing or any(r.provenance.get("dirty") for r in records)
    ):
        # what is missing might say otherwise, and nobody can look up uncommitted code
        verdict = "inconclusive"
    if row.proxy and verdict in ("reproduced", "not reproduced"):
        shown = verdict == "reproduced"
        verdict = "proxy: direction shown" if shown else "proxy: direction not shown"
    return Judged(
        row,
        verdict,
        measured,
        "; ".join([detail, *remarks]),
        tuple(sorted({r.key for r in records})),
    )


def _remarks(records: Sequence[Record], missing: int, failed: int) -> list[str]:
    """What the reader of a verdict must know of its records."""
    remarks = [f"incomplete: {missing} cell(s) without a result"] if missing else []
    if failed:
        remarks.append(f"{failed} of {len(records) + missing} failed")
    for flag, text in (("floor", "at the feasible floor"), ("coupled", "with coupled groups")):
        if count := sum(getattr(r, flag) for r in records):
            remarks.append(f"{count} record(s) {text}")
    if count := sum(not r.met for r in records):
        remarks.append(f"{count} record(s) below their budget")
    if count := sum(bool(r.provenance.get("dirty")) for r in records):
        remarks.append(f"{count} record(s) from uncommitted code")
    return remarks


def _verdict(row: Row, values: Mapping[object, float]) -> tuple[Verdict, Summary, str]:
    summary = summarise(values)
    numbers = list(values.values())
    if not all(map(math.isfinite, numbers)):
        return "not reproduced", summary, "a measured value is not finite"
    if row.kind in ("value", "gain"):
        assert row.reported is not None  # the schema asks for both
        assert row.tolerance is not None
        # compared at the precision of the reported hundredth: 91.73 is 9173 of 10,000 images
        near = round(abs(summary.mean - row.reported), 9) <= row.tolerance
        return (
            ("reproduced" if near else "not reproduced"),
            summary,
            f"within ±{row.tolerance:g}" if near else f"beyond ±{row.tolerance:g}",
        )
    if row.kind == "order":
        return _order(row, numbers, summary)
    if row.kind == "ratio":
        middle = Summary(statistics.median(numbers), None, len(numbers))
        detail = f"median of {len(numbers)}, {_rule(row)}"
        if len(numbers) < LEAST_RUNS:
            return "inconclusive", middle, f"{detail}; at least {LEAST_RUNS} are needed"
        return ("reproduced" if _holds(row, middle.mean) else "not reproduced"), middle, detail
    held = all(_holds(row, v) for v in numbers)
    return (
        ("reproduced" if held else "not reproduced"),
        summary,
        f"{_rule(row)} in {sum(_holds(row, v) for v in numbers)} of {len(numbers)}",
    )


def _order(row: Row, numbers: Sequence[float], summary: Summary) -> tuple[Verdict, Summary, str]:
    """A paired difference: its 95 % t-interval must lie beyond the bound, over at least five
    bases.
    """
    if len(numbers) < LEAST:
        return "inconclusive", summary, f"{len(numbers)} of at least {LEAST} bases"
    bound = row.bound or 0.0
    low, high = interval(numbers)
    style = (
        "+.2f" if max(abs(low), abs(high)) >= 0.05 else "+.2g"
    )  # losses of a thousandth of a nat
    detail = f"95 % interval {low:{style}} to {high:{style}}"
    if row.direction == "<":
        low, high, bound = -high, -low, -bound
    verdict: Verdict = (
        "reproduced" if low > bound else "not reproduced" if high < bound else "inconclusive"
    )
    return verdict, summary, detail


def _over_images(
    row: Row, records: Sequence[Record], others: Sequence[Record]
) -> tuple[Verdict, str] | None:
    """An order on one checkpoint, by McNemar's exact test over its test images; None where records
    do not say which were right.
    """
    assert row.at is not None
    assert row.minus is not None
    if row.bound or row.at.metric != "top1":
        return None
    hits = []
    for some, stage in ((records, row.at.stage), (others, row.minus.stage)):
        rows = [r for record in some if (r := record.row(stage)) is not None]
        # seeds that draw nothing give the same network; where they do, there is not one order
        if len({r.right for r in rows}) != 1 or rows[0].hits is None:
            return None
        hits.append(rows[0].hits)
    only = [sum(a and not b for a, b in zip(*h, strict=True)) for h in (hits, hits[::-1])]
    p = mcnemar(*only)
    detail = (
        f"one checkpoint, {len(hits[0])} images: {only[0]} right here alone, {only[1]} there alone;"
        f" McNemar p {f'= {p:.2g}' if p > 1e-99 else '< 1e-99'}"
    )
    if p >= LEVEL:
        return "inconclusive", detail
    shown = (only[0] > only[1]) == (row.direction == ">")
    return ("reproduced" if shown else "not reproduced"), detail


def _rule(row: Row) -> str:
    return f"{row.direction} {row.bound:g}"


def _holds(row: Row, value: float) -> bool:
    assert row.bound is not None  # the schema asks for it
    return {
        "<": value < row.bound,
        "<=": value <= row.bound,
        ">": value > row.bound,
        ">=": value >= row.bound,
    }[row.direction or "<="]


def _function(name: str) -> Callable[..., Any]:
    """A check by ``module:function``; plain module names lie beside the claims."""
    module, _, function = name.partition(":")
    if "." not in module:
        module = f"widthbench._claims.{module}"
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"claims: no check '{name}': {error}") from error


def overall(judged: Sequence[Judged]) -> Verdict:
    """The verdict on a claim from those on its rows.

    Reproduced only if every row is; not reproduced if any row is not; else the weakest of what is
    left. Rows that were not run leave the claim "not run" if nothing was, else "inconclusive"; but
    where a claim has proxies, these stand in for the rows at the document's scale that were not
    run. Where the document's sentence has several readings, the best of their verdicts (see
    ``readings``). Sanity checks count where they fail, or where a claim has nothing else.
    """
    return min(readings(judged).values(), key=_ORDER.index)


_ORDER: tuple[Verdict, ...] = (
    "reproduced",
    "proxy: direction shown",
    "inconclusive",
    "proxy: direction not shown",
    "not reproduced",
    "not run",
)


def is_sanity(document: Document, rows: Sequence[Judged]) -> bool:
    """Whether a claim is no finding of its document, but what must hold here before any is
    believed.
    """
    return document.calibrates or all(j.row.sanity for j in rows)


def readings(judged: Sequence[Judged]) -> dict[str, Verdict]:
    """The verdict on each reading of a claim; one without a name where there is but one."""
    names = dict.fromkeys(j.row.reading for j in judged if j.row.reading) or {"": None}
    return {name: _together([j for j in judged if j.row.reading in ("", name)]) for name in names}


def _together(judged: Sequence[Judged]) -> Verdict:
    deciding = [j for j in judged if not j.row.sanity or j.verdict == "not reproduced"]
    judged = deciding or judged
    proxies = any(j.row.proxy for j in judged)
    verdicts = {j.verdict for j in judged if j.row.proxy or j.verdict != "not run" or not proxies}
    for worst in ("not reproduced", "proxy: direction not shown"):
        if worst in verdicts:
            return worst
    if verdicts == {"not run"}:
        return "not run"
    if "inconclusive" in verdicts or "not run" in verdicts:
        return "inconclusive"
    shown: Verdict = "proxy: direction shown"
    return shown if shown in verdicts else "reproduced"
