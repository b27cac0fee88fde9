"""Cells, the records that they leave, and the store that keeps them: validated, digested, written
atomically.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from widthbench import cache
from widthbench.cache import canonical, digest_of
from widthbench.errors import UsageError, first_problem, visible
from widthbench.paths import Lock, cache_dir, write_atomic
from widthbench.recipe import Recipe, Spent
from widthbench.technique.budget import written

SCHEMA = 1
SOURCED = ("scratch", "scratch-budget", "l1-budget")  # controls of a technique
CONTROLS = ("base", "uniform-width", *SOURCED)

Nats = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # a network that gives NaN has failed
Count = Annotated[int, Field(gt=0, lt=2**63)]
Percent = Annotated[float, Field(ge=0, le=100)]
Stage = Literal["base", "resized", "recalibrated", "fine-tuned", "trained"]
FINAL: tuple[Stage, ...] = ("base", "fine-tuned", "trained")
HEAD = '{"digest":"'  # of a line of records


_seen: dict[Any, Any] = {}


def _shared(value: Any, key: Any = None) -> Any:
    """The first of equal values: 100,000 records have few recipes and machines, and memory is what
    reading them takes time for.
    """
    try:
        if len(_seen) > 10_000:
            _seen.clear()
        return _seen.setdefault(key or (type(value), value), value)
    except TypeError:  # holds what has no hash
        return value


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_post_init(self, _: Any, /) -> None:
        """Forget which fields were given, which nobody asks and half of a record's memory holds."""
        object.__setattr__(self, "__pydantic_fields_set__", _NOT_KEPT)


_NOT_KEPT: set[str] = set()


WrittenBudget = Annotated[
    str, Field(pattern=r"^[a-z]+:[0-9.eE+-]*[0-9](:[a-z]+)?$"), AfterValidator(written)
]
SharedRecipe = Annotated[Recipe, AfterValidator(_shared)]


class Cell(_Frozen):
    """One decision of the comparison: everything that its result depends on, and nothing else.

    Attributes:
        dataset: Name of the data set.
        model: Name of the network.
        model_args: Further arguments of its constructor.
        size: Input height and width in pixels.
        technique: A registered technique, or a control: base, uniform-width, scratch,
            scratch-budget, l1-budget.
        params: The technique's parameters; for scratch controls those of the technique whose shape
            they train.
        of: For scratch controls, the technique whose shape they train.
        variant: Tells networks apart that are trained by different recipes.
        budget: What is kept, ``kind:fraction``, however it is given, in one way
            (``budget.written``); None for base.
        seed: Of the split, the base network, the decision and the adaptation.
        scope: Which groups may be resized.
        include: Patterns on group names.
        base: Recipe of the base network.
        checkpoint: Weights file of the base network, which is then not trained.
        sha256: What that file's digest must begin with.
        pretrained: Take the weights that timm publishes.
        mean: Per-channel mean to normalise with; that of the training images (or of the pretrained
            network) if empty.
        std: Per-channel standard deviation likewise.
        finetune: Recipe after the resize.
        calibration: Training samples for batch-norm recalibration.
        val: Fraction of the training part that is held out for choices.
        longest: The most epochs that a ``scratch-budget`` or ``l1-budget`` control of X trains for,
            as a multiple of X's.
        floor: Run a budget below the feasible floor at the floor, and say so, instead of skipping
            it.
        threads: CPU threads.
        device: "auto" takes a GPU where there is one.
        deterministic: Ask torch for deterministic algorithms.
        curves: Replay the technique's path of plans, and have it record what makes pictures.
    """

    dataset: str
    model: str
    model_args: dict[str, Any] = Field(default_factory=dict)
    variant: str = ""
    size: int
    technique: str
    params: dict[str, Any] = Field(default_factory=dict)
    of: str | None = None
    budget: WrittenBudget | None = None
    seed: int = 0
    scope: Literal["inner", "all"] = "inner"
    include: tuple[str, ...] = ()
    base: SharedRecipe
    checkpoint: str | None = None
    sha256: str | None = None
    pretrained: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    finetune: SharedRecipe
    calibration: int = 1024
    val: float = 0.2
    longest: float | None = None
    floor: bool = False
    threads: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    curves: bool = False

    @property
    def trains_base(self) -> bool:
        """Whether the base network is trained here, not loaded."""
        return not (self.checkpoint or self.pretrained)

    @property
    def label(self) -> str:
        """The row's name on a leaderboard: technique, its parameters where they were set, and a
        control's source.
        """
        inside = ",".join(f"{k}={v}" for k, v in sorted(self.params.items()))
        name = (self.of or self.technique) + (f"({inside})" if inside else "")
        return visible(f"{self.technique}:{name}" if self.of else name)

    @property
    def network(self) -> str:
        """The network's name, with the arguments and the variant that the suite gives it:
        ``vgg16_cifar(act_layer=tanh)``.
        """
        inside = ",".join(f"{k}={v}" for k, v in sorted(self.model_args.items()))
        return visible(
            self.model
            + (f"({inside})" if inside else "")
            + (f", {self.variant}" if self.variant else "")
        )

    @property
    def id(self) -> str:
        """A readable name, unique within a suite."""
        parts = [self.dataset, self.network, self.label, self.budget or "", f"s{self.seed}"]
        return "-".join(p for p in parts if p)

    @property
    def identity(self) -> str:
        """All of it as text, the same however its parameters are ordered; less the device, which a
        key leaves out, too.
        """
        given = (self.params, self.model_args)
        if all(
            len(d) < 2 and not any(isinstance(v, dict | list | tuple) for v in d.values())
            for d in given
        ):
            return self.model_dump_json(exclude={"device"})  # nothing whose order could differ
        ordered = {
            k: json.loads(json.dumps(getattr(self, k), sort_keys=True))
            for k in ("params", "model_args")
        }
        return self.model_copy(update=ordered).model_dump_json(exclude={"device"})

    @property
    def group(self) -> str:
        """Cells of one group share a base network, so one worker runs them."""
        return f"{self.dataset}-{self.network}-s{self.seed}"


class Row(_Frozen):
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
    """

    stage: Stage
    top1: Percent
    top5: Percent | None = None
    loss: Nats
    samples: int = Field(gt=0)
    val_top1: Percent | None = None
    val_loss: Nats | None = None


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


def _machine(facts: dict[str, Any]) -> dict[str, Any]:
    for name in ("versions", "hardware"):
        if name in facts:
            facts[name] = _shared(facts[name], (name, repr(facts[name])))
    return facts


Provenance = Annotated[dict[str, Any], BeforeValidator(_facts), AfterValidator(_machine)]


class Record(_Frozen):
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


class Store:
    """Finished cells, one file each, shared by all suites and workers.

    Args:
        root: Its folder; ``cells`` in the cache if None.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir() / "cells"

    def path(self, key: str) -> Path:
        """Where a record lies."""
        return self.root / key[:2] / f"{key}.json"

    def lock(self, key: str) -> Lock:
        """Held while a cell is computed, so that two runs on one cache do its work once."""
        return Lock(self.root / "locks" / f"{key}.lock")

    def get(self, key: str) -> Record | None:
        """The finished record, or None; a damaged file is named in a warning and counts as
        missing.
        """
        return self._read(self.path(key), key)

    def _read(self, path: Path, key: str) -> Record | None:
        content = cache.read_json(path, "record")
        if content is None:
            return None
        try:
            record = Record.model_validate(content["record"])
            if record.key == key:
                return record
            why = "it is of another cell"
        except (ValueError, KeyError) as error:
            why = str(error).splitlines()[0]
        cache.damaged(path, "record", why)
        return None

    def put(self, record: Record) -> None:
        """Keep a record. Failed ones are kept apart: they are reported, and tried again by the next
        run.
        """
        content = {"record": record.model_dump(mode="json")}
        if record.status == "failed":
            cache.write_json(self._failed(record.key), content)
        else:
            cache.write_json(self.path(record.key), content)
            cache.drop(self._failed(record.key))

    def failure(self, key: str) -> Record | None:
        """The record of the last failed attempt, if the cell has not been finished since."""
        return self._read(self._failed(key), key)

    def cells(self, *, at_most: int | None = None) -> set[str] | None:
        """Identities of the cells that the store has records of, failures too.

        Args:
            at_most: Look at no more files than that.

        Returns:
            None if there are more, or a damaged one (named in a warning), or others may add to it,
            at a URL.
        """
        if cache.shared():
            return None
        paths = [p for pattern in ("??", "failed") for p in self.root.glob(f"{pattern}/*.json")]
        if at_most is not None and len(paths) > at_most:
            return None
        found = set()
        for path in paths:
            content = cache.read_json(path, "record")
            if content is None:
                return None
            with suppress(ValueError, KeyError, TypeError):  # of a time when cells had other fields
                found.add(Cell.model_validate(content["record"]["cell"]).identity)
        return found

    def _failed(self, key: str) -> Path:
        return self.root / "failed" / f"{key}.json"


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


def read_lines(path: Path) -> list[Line]:
    """Read JSON lines, good and bad.

    Args:
        path: The file.

    Raises:
        UsageError: If the file cannot be read.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"no records at {path}: run the suite first (`widthbench run`)") from error
    return [_line(number, text) for number, text in enumerate(lines, 1)]


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
