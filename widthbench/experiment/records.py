"""Cells, the records that they leave, and the store that keeps them: validated, digested, written
atomically.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from widthbench.cache import canonical, digest_of
from widthbench.errors import UsageError, first_problem, visible
from widthbench.experiment.cell import Cell, Frozen
from widthbench.paths import write_atomic
from widthbench.recipe import Spent

SCHEMA = 1

Nats = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # a network that gives NaN has failed
Count = Annotated[int, Field(gt=0, lt=2**63)]
Percent = Annotated[float, Field(ge=0, le=100)]
Stage = Literal["base", "resized", "recalibrated", "fine-tuned", "trained"]
FINAL: tuple[Stage, ...] = ("base", "fine-tuned", "trained")
HEAD = '{"digest":"'  # of a line of records


class Row(Frozen):
    """Scores of the network at one stage. Test decides nothing.

    Attributes:
        stage: "base"; "resized", "recalibrated" and "fine-tuned" for techniques; "trained" for
            trained controls.
        top1: Test top-1 accuracy, %.
        top5: Test top-5 accuracy, %, where there are 100 classes or more.
        loss: Test cross-entropy, nats.
        samples: Test samples; each counts once.
        val_top1: Top-1 accuracy on val, %; None where nothing is held out.
        val_loss: Cross-entropy on val, nats; None likewise.
        right: Which test samples were right, where the base network is a public checkpoint, of
            which there is one (``hits``); left out of the file where it is "".
    """

    stage: Stage
    top1: Percent
    top5: Percent | None = None
    loss: Nats
    samples: int = Field(gt=0)
    val_top1: Percent | None = None
    val_loss: Nats | None = None
    right: str = ""

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return data if self.right else {k: v for k, v in data.items() if k != "right"}

    @model_validator(mode="after")
    def _whole(self) -> Row:
        if self.right and round(self.samples * self.top1 / 100) != sum(self.hits or ()):
            raise ValueError("right does not say which samples top1 counts")
        return self

    @property
    def hits(self) -> list[bool] | None:
        """Which test samples were right, in their order; None where that is not known."""
        if not self.right:
            return None
        bits = np.frombuffer(zlib.decompress(base64.b64decode(self.right)), np.uint8)
        return [bool(b) for b in np.unpackbits(bits, count=self.samples)]


def packed(hits: Sequence[bool]) -> str:
    """Bits as text, for ``Row.right``."""
    return base64.b64encode(zlib.compress(np.packbits(hits).tobytes(), 9)).decode()


def _facts(value: Any) -> Any:
    """Refuse a provenance whose parts are of another kind than reports read."""
    kinds = {
        "versions": dict,
        "hardware": dict,
        "processes": int,
        "checkpoint": str,
        "commit": str | None,
        "val_seen": bool,
    }
    if isinstance(value, dict):
        for name, kind in kinds.items():
            if name in value and not isinstance(value[name], kind):
                raise ValueError(f"{name} is {value[name]!r:.60}")
    return value


Provenance = Annotated[dict[str, Any], BeforeValidator(_facts)]


class Record(Frozen):
    """What one cell left behind.

    Attributes:
        schema_version: Version of this layout.
        key: Digest of the cell, the code, the versions and the data that it depends on.
        cell: The cell.
        status: "done"; "skipped" (the technique or the budget does not apply here); "failed".
        reason: Why it was skipped, or the error.
        trace: Of a failure.
        rows: Scores by stage.
        access: What the technique looks at.
        macs: MACs of one forward pass per sample ("FLOPs").
        params: Number of parameters.
        base_macs: MACs of the base network.
        base_params: Parameters of the base network.
        kept: Kept fraction in the budget's own terms.
        met: False if a good part of the budget is left unused.
        floor: Whether the budget lay below the feasible floor and was run at it.
        coupled: Whether groups of grade "coupled" were resized.
        widths: Channels per group.
        base_widths: Channels per group of the base network.
        spent: Cost of "base", "decision" and "adaptation".
        trials: Hyperparameter settings tried for this row.
        source: Key of the record whose shape a scratch control trains.
        series: Anything that the technique wants plotted.
        provenance: Versions, commit, hardware, seeds, digests, host and time.
    """

    schema_version: int = Field(default=SCHEMA, ge=1, le=SCHEMA)  # a newer one would be misread
    key: str = Field(pattern=r"^[^/\\]+$")
    cell: Cell
    status: Literal["done", "skipped", "failed"]
    reason: str = ""
    trace: str = ""
    rows: tuple[Row, ...] = ()
    access: Literal["", "none", "unlabelled", "labelled", "training"] = ""
    macs: Count | None = None
    params: Count | None = None
    base_macs: Count | None = None
    base_params: Count | None = None
    kept: float | None = Field(default=None, allow_inf_nan=False)
    met: bool = True
    floor: bool = False
    coupled: bool = False
    widths: dict[str, int] = Field(default_factory=dict)
    base_widths: dict[str, int] = Field(default_factory=dict)
    spent: dict[str, Spent] = Field(default_factory=dict)
    trials: int = 1
    source: str | None = None
    series: dict[str, list[Any]] = Field(default_factory=dict)
    provenance: Provenance = Field(default_factory=dict)

    @field_validator("reason", "trace")
    @classmethod
    def _shown(cls, text: str) -> str:
        return visible(text, keep="\n\t")

    @model_validator(mode="after")
    def _complete(self) -> Record:
        if self.status == "done" and not (
            self.rows and self.macs and self.params and self.base_macs and self.base_params
        ):
            raise ValueError(
                "a cell that is done has rows, MACs and parameters, of the base network too"
            )
        return self

    def row(self, stage: Stage | None = None) -> Row | None:
        """The scores at a stage; at the last one if none is named."""
        if stage is None:
            return self.rows[-1] if self.rows else None
        for row in self.rows:
            if row.stage == stage:
                return row
        return None

    def stable(self) -> dict[str, Any]:
        """The record less times and hosts: what a rerun on the same machine and versions gives
        again, bit for bit.
        """
        data = self.model_dump(mode="json")
        for spent in data["spent"].values():
            spent.pop("seconds")
        for name in ("host", "when"):
            data["provenance"].pop(name, None)
        return data


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, sorted by cell, each with the digest of what it says,
    atomically.
    """
    write_atomic(path, (f"{record_line(r)}\n" for r in sorted(records, key=lambda r: r.cell.id)))


def record_line(record: Record) -> str:
    """A record as one line of JSON: first "digest", the SHA-256 over all that follows
    (``digest_of``), then that, canonical.
    """
    text = canonical(record.model_dump(mode="json"))
    return f'{HEAD}{sha256(text.encode()).hexdigest()}",{text[1:]}'


@dataclass(frozen=True)
class Line:
    """One line of a file of records.

    Attributes:
        number: From 1.
        record: What it says; None if it is no record.
        problem: What is wrong with it; "" if nothing is.
        text: The line.
    """

    number: int
    record: Record | None
    problem: str = ""
    text: str = ""


def read_lines(path: Path, holding: str = "") -> list[Line]:
    """Read JSON lines, good and bad.

    Args:
        path: The file.
        holding: Those alone that hold this text.

    Raises:
        UsageError: If the file cannot be read.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"no records at {path}: run the suite first (`widthbench run`)") from error
    return [_line(number, text) for number, text in enumerate(lines, 1) if holding in text]


def _line(number: int, text: str) -> Line:
    start, rest = text[: len(HEAD) + 66], "{" + text[len(HEAD) + 66 :]
    if text.startswith(HEAD) and start == f'{HEAD}{sha256(rest.encode()).hexdigest()}",':
        with suppress(ValueError):  # said below
            return Line(number, Record.model_validate_json(rest), text=text)
    try:
        data = json.loads(text)
        digest = data.pop("digest", None)
        record = Record.model_validate(data)
    except ValidationError as error:
        where, problem = first_problem(error)
        return Line(number, None, visible(f"not a record: {where or 'line'}: {problem}"), text)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        return Line(number, None, visible(f"not a record: not a line of JSON ({error})"), text)
    if digest is None:
        problem = (
            f"record of {record.cell.id} carries no digest: it was taken out, or another program"
            " wrote the line"
        )
    elif digest != digest_of(data):
        problem = (
            f"record of {record.cell.id} was changed after it was written: its digest does not"
            " match"
        )
    else:
        problem = ""
    return Line(number, record, problem, text)


def read_records(path: Path) -> list[Record]:
    """Read JSON lines.

    Raises:
        UsageError: If the file is missing, or a line is not a record, was changed since it was
            written, or is of a cell that an earlier one is of; it names the line.
    """
    seen: dict[str, int] = {}
    records = []
    for line in read_lines(path):
        if line.problem or line.record is None:
            raise UsageError(f"{path}:{line.number}: {line.problem}")
        if (first := seen.setdefault(line.record.cell.identity, line.number)) != line.number:
            again = (
                f"a second record of {line.record.cell.id}, which line {first} has: `widthbench"
                " report` writes one of each"
            )
            raise UsageError(f"{path}:{line.number}: {again}")
        records.append(line.record)
    return records
