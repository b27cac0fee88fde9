"""Claims: what the source documents report against what was measured, each with a verdict by a rule that stands in its file."""

from __future__ import annotations

import importlib
import math
import statistics
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from widthbench import suites
from widthbench.errors import UsageError, did_you_mean
from widthbench.records import Cell, Record, Stage, read_records
from widthbench.report.statistics import LEAST, Summary, interval, summarise

Kind = Literal["value", "gain", "order", "ratio", "property"]
Verdict = Literal["reproduced", "not reproduced", "inconclusive", "proxy scale", "not run"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "not reproduced", "inconclusive", "proxy scale", "not run")
Direction = Literal["<", "<=", ">", ">="]
METRICS = ("top1", "top5", "loss", "val_top1", "val_loss")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Pick(_Strict):
    """Which records of a suite a number is read from, and what is read. What is not given matches anything.

    Attributes:
        suite: Its committed results are read.
        dataset: Of the cell.
        model: Of the cell.
        args: Arguments of the network's constructor that the cell must have.
        technique: Of the cell.
        of: For scratch controls, whose shape they train.
        params: The technique's parameters that the cell must have.
        budget: Of the cell.
        stage: Which row of the record; the last one if absent.
        metric: A score of that row (top1, top5, loss, val_top1, val_loss), "params" or "macs" of the record (in millions), or the
            name of a series that the technique recorded, whose last entry is taken.
    """

    suite: str
    dataset: str | None = None
    model: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    technique: str | None = None
    of: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    budget: str | None = None
    stage: Stage | None = None
    metric: str = "top1"

    def matches(self, cell: Cell) -> bool:
        """Whether a cell is one of those meant."""
        named = ("dataset", "model", "technique", "of", "budget")
        return (
            all(getattr(self, n) in (None, getattr(cell, n)) for n in named)
            and all(cell.model_args.get(k) == v for k, v in self.args.items())
            and all(cell.params.get(k) == v for k, v in self.params.items())
        )

    def value(self, record: Record) -> float | None:
        """The number of one record; None if it has none."""
        if self.metric in ("params", "macs"):
            size = getattr(record, self.metric)
            return None if size is None else size / 1e6
        if self.metric in METRICS:
            row = record.row(self.stage)
            return None if row is None else getattr(row, self.metric)
        series = record.series.get(self.metric)
        return float(series[-1]) if series else None


class Row(_Strict):
    """One number that a document reports, or one thing that it says must hold, with the rule that judges it.

    Attributes:
        what: What is measured.
        kind: "value": within ``tolerance`` of ``reported``. "gain": ``at - minus``, likewise. "order": the paired difference
            ``at - minus`` over at least five bases has a 95 % t-interval beyond ``bound`` (0). "ratio": the median of paired
            runs against ``bound``. "property": every value against ``bound``.
        reported: What the document says; absent where it gives no number.
        tolerance: Largest difference that counts as reproduced.
        bound: What order, ratio and property are held against.
        direction: On which side of the bound the claim lies.
        unit: Of the numbers.
        at: Where the number is read.
        minus: What is subtracted, base by base.
        check: ``module:function`` that measures it instead, as a list of numbers, one per base or pair of runs.
        proxy: Smaller work than the document's: the direction is shown, and it is never "reproduced".
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
    proxy: bool = False

    @model_validator(mode="after")
    def _complete(self) -> Row:
        if self.kind in ("value", "gain"):
            if self.reported is None or self.tolerance is None:
                raise ValueError(f"'{self.what}': kind = '{self.kind}' needs reported and tolerance")
        elif self.direction is None or (self.bound is None and self.kind != "order"):
            raise ValueError(f"'{self.what}': kind = '{self.kind}' needs direction{'' if self.kind == 'order' else ' and bound'}")
        if self.kind == "order" and self.direction in ("<=", ">="):
            raise ValueError(f"'{self.what}': an order is strict: '<' or '>'")
        if self.at and self.check:
            raise ValueError(f"'{self.what}': at and check exclude each other")
        if self.minus and not self.at:
            raise ValueError(f"'{self.what}': minus needs at")
        if self.at and (self.kind in ("gain", "order")) != bool(self.minus):
            needed = "needs" if self.kind in ("gain", "order") else "takes no"
            raise ValueError(f"'{self.what}': kind = '{self.kind}' {needed} minus")
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
        claims: Its claims.
    """

    document: str
    title: str
    technique: str = ""
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
    """The records that claims are judged by: the committed results of each suite, read once.

    Attributes:
        results: The results folder.
    """

    results: Path
    _read: dict[str, list[Record]] = field(default_factory=dict)

    def of(self, suite: str) -> list[Record]:
        """A suite's records; none if it was not run.

        Raises:
            UsageError: If its file is damaged.
        """
        if suite not in self._read:
            path = self.results / suite / "records.jsonl"
            self._read[suite] = read_records(path) if path.is_file() else []
        return self._read[suite]

    def pick(self, pick: Pick) -> tuple[dict[object, float], list[str]]:
        """``{base: value}`` and the keys of the records, one per distinct base network."""
        values: dict[object, float] = {}
        keys: list[str] = []
        for record in self.of(pick.suite):
            if record.status == "done" and pick.matches(record.cell) and (value := pick.value(record)) is not None:
                base = record.provenance.get("checkpoint") or record.cell.seed
                if base in values and not math.isclose(values[base], value):
                    raise UsageError(f"two records with different values match {pick.model_dump(exclude_defaults=True)}: say more")
                values[base] = value
                keys.append(record.key)
        return values, keys


def load() -> list[Document]:
    """All built-in documents, by number.

    Raises:
        UsageError: If a file is malformed, or an id is used twice.
    """
    folder = files("widthbench._claims")
    found = [
        parse((folder / p.name).read_text(encoding="utf-8"), p.name) for p in folder.iterdir() if p.name.endswith(".toml")
    ]  # fmt: skip
    seen: set[str] = set()
    for claim in (c for d in found for c in d.claims):
        if claim.id in seen:
            raise UsageError(f"claim '{claim.id}' is there twice")
        seen.add(claim.id)
    return sorted(found, key=lambda d: d.document)


def parse(text: str, where: str) -> Document:
    """A document from TOML text.

    Raises:
        UsageError: If it is malformed (file, key, what was expected).
    """
    try:
        return Document(**tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}") from error


def choose(documents: Iterable[Document], ids: Sequence[str] = ()) -> list[tuple[Document, Claim]]:
    """The claims with the given ids, or all.

    Raises:
        UsageError: If there is no such claim.
    """
    found = {c.id: (d, c) for d in documents for c in d.claims}
    for name in ids:
        if name not in found:
            raise UsageError(f"unknown claim '{name}'{did_you_mean(name, found)}")
    return [found[n] for n in (dict.fromkeys(ids) if ids else found)]


def cells(claims: Iterable[Claim]) -> dict[str, list[Cell]]:
    """The cells that claims rest on, by suite."""
    picks = [p for c in claims for r in c.rows for p in (r.at, r.minus) if p is not None]
    found: dict[str, list[Cell]] = {}
    for name in dict.fromkeys(p.suite for p in picks):
        found[name] = [c for c in suites.load(name).cells() if any(p.suite == name and p.matches(c) for p in picks)]
    return found


def judge(claim: Claim, evidence: Evidence) -> list[Judged]:
    """All rows of a claim with their verdicts."""
    return [judge_row(row, claim, evidence) for row in claim.rows]


def judge_row(row: Row, claim: Claim, evidence: Evidence) -> Judged:
    """One row with its verdict: measured where there are records or a check, else "not run"."""
    keys: list[str] = []
    if row.check:
        values: Mapping[object, float] = dict(enumerate(_function(row.check)()))
    elif row.at:
        values, keys = evidence.pick(row.at)
        if row.minus:
            others, more = evidence.pick(row.minus)
            values = {k: v - others[k] for k, v in values.items() if k in others}
            keys += more
    else:
        values = {}
    if not values:
        return Judged(row, "not run", detail=claim.needs)
    verdict, measured, detail = _verdict(row, values)
    if row.proxy and verdict != "inconclusive":
        detail = f"direction {'shown' if verdict == 'reproduced' else 'not shown'}; {detail}".removesuffix("; ")
        verdict = "proxy scale"
    return Judged(row, verdict, measured, detail, tuple(sorted(set(keys))))


def _verdict(row: Row, values: Mapping[object, float]) -> tuple[Verdict, Summary, str]:
    found = summarise(values)
    numbers = list(values.values())
    if not all(map(math.isfinite, numbers)):
        return "not reproduced", found, "a measured value is not finite"
    if row.kind in ("value", "gain"):
        assert row.reported is not None  # the schema asks for both
        assert row.tolerance is not None
        # compared at the precision of the reported hundredth: 91.73 is 9173 of 10,000 images
        near = round(abs(found.mean - row.reported), 9) <= row.tolerance
        return (
            ("reproduced" if near else "not reproduced"),
            found,
            f"within ±{row.tolerance:g}" if near else f"beyond ±{row.tolerance:g}",
        )
    if row.kind == "order":
        return _order(row, numbers, found)
    if row.kind == "ratio":
        middle = Summary(statistics.median(numbers), found.std, len(numbers))
        return ("reproduced" if _holds(row, middle.mean) else "not reproduced"), middle, f"median of {len(numbers)}, {_rule(row)}"
    held = all(_holds(row, v) for v in numbers)
    return (
        ("reproduced" if held else "not reproduced"),
        found,
        f"{_rule(row)} in {sum(_holds(row, v) for v in numbers)} of {len(numbers)}",
    )


def _order(row: Row, numbers: Sequence[float], found: Summary) -> tuple[Verdict, Summary, str]:
    """A paired difference: its 95 % t-interval must lie beyond the bound, over at least five bases."""
    if len(numbers) < LEAST:
        return "inconclusive", found, f"{len(numbers)} of at least {LEAST} bases"
    bound = row.bound or 0.0
    low, high = interval(numbers)
    detail = f"95 % interval {low:+.2f} to {high:+.2f}"
    if row.direction == "<":
        low, high, bound = -high, -low, -bound
    verdict: Verdict = "reproduced" if low > bound else "not reproduced" if high < bound else "inconclusive"
    return verdict, found, detail


def _rule(row: Row) -> str:
    return f"{row.direction} {row.bound:g}"


def _holds(row: Row, value: float) -> bool:
    assert row.bound is not None  # the schema asks for it
    return {"<": value < row.bound, "<=": value <= row.bound, ">": value > row.bound, ">=": value >= row.bound}[
        row.direction or "<="
    ]


def _function(name: str) -> Callable[[], Iterable[float]]:
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

    Reproduced only if every row is; not reproduced if any row is not; else the weakest of what is left. Rows that were not run
    leave the claim "not run" if nothing was, else "inconclusive".
    """
    found = {j.verdict for j in judged}
    if "not reproduced" in found:
        return "not reproduced"
    if found == {"not run"}:
        return "not run"
    if "inconclusive" in found or "not run" in found:
        return "inconclusive"
    return "proxy scale" if "proxy scale" in found else "reproduced"
