"""Whether a suite's results are what they say: files and records by their digests, and a sample of cells run again."""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from widthbench import suites
from widthbench.engines import local
from widthbench.errors import UsageError
from widthbench.provenance import hardware
from widthbench.records import Line, Record, read_lines
from widthbench.report.build import SUMS, file_digest, leaderboards
from widthbench.suites import Suite

POINTS = 1.0  # of test top-1: what a network trained anew on another machine may differ by (the tolerance of claims on own bases)
DEVIATIONS = 3.0  # or standard errors of the difference of two accuracies on as many images, where that is more
MACS = 0.05  # as budgets are met
KEPT = ("base_digest", "checkpoint", "dataset_digest", "dtype", "threads", "val_seen", "processes", "device")  # of the provenance
SAME = ("commit", "dirty", "versions", "dataset_digest")  # where these agree, so do keys


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        what: A file, or a cell's name.
        by: How: "digest", "record", "table", "bit-equal", "tolerance", "status".
        ok: Whether it held.
        note: What differs, or how far apart the two are.
    """

    what: str
    by: str
    ok: bool
    note: str = ""

    def plain(self) -> dict[str, Any]:
        """A row for a table."""
        return {"what": self.what, "by": self.by, "verdict": "holds" if self.ok else "DIFFERS", "note": self.note}


def check_files(suite: Suite, folder: Path) -> list[Check]:
    """Hold the files of a suite's folder to its ``SHA256SUMS``, each record to its own digest, and the tables to the records.

    Digests find accidents and careless edits. Who rewrites a number and all digests with it is found by running cells again.

    Args:
        suite: The suite.
        folder: ``results/SUITE``.

    Raises:
        UsageError: If it has no records.
    """
    lines = read_lines(folder / "records.jsonl")
    return [*_sums(folder), *_records(suite, lines), *_tables(suite, folder, [ln.record for ln in lines if ln.record])]


def _sums(folder: Path) -> list[Check]:
    try:
        lines = (folder / SUMS).read_text(errors="replace").splitlines()
    except OSError:
        return [Check(SUMS, "digest", False, "there is none: `widthbench report` writes it")]
    found = []
    for line in lines:
        digest, _, name = line.partition("  ")
        try:
            inside = bool(name) and (folder / name).resolve().is_relative_to(folder.resolve())
            same = (file_digest(folder / name) == digest) if inside else None
        except FileNotFoundError:
            found.append(Check(name, "digest", False, "the file is gone"))
            continue
        except (OSError, ValueError):  # a folder, a name that no file can have
            same = None
        if same is None:
            found.append(Check(SUMS, "digest", False, f"not a line of digest and file: {line[:80]!r}"))
        else:
            found.append(Check(name, "digest", same, "" if same else f"was changed after {SUMS} was written"))
    named = {line.partition("  ")[2] for line in lines} | {SUMS, "records.damaged.jsonl"}
    there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return found + [Check(n, "digest", False, f"is not in {SUMS}") for n in there if n not in named]


def _records(suite: Suite, lines: Sequence[Line]) -> list[Check]:
    found = [Check(f"records.jsonl:{line.number}", "record", False, line.problem) for line in lines if line.problem]
    cells = {c.identity for c in suite.cells()}
    counted = Counter(line.record.cell.identity for line in lines if line.record)
    if twice := sum(n > 1 for n in counted.values()):
        found.append(Check("records.jsonl", "record", False, f"{twice} cells have more than one record"))
    foreign = [line for line in lines if line.record and line.record.cell.identity not in cells]
    if foreign and foreign[0].record:
        where = f"records.jsonl:{foreign[0].number}"
        note = f"{len(foreign)} records are of cells that the suite does not have, the first of {foreign[0].record.cell.id}"
        found.append(Check(where, "record", False, note))
    good = sum(not line.problem for line in lines)
    if good:
        left = len(cells - counted.keys())
        note = f"{good} records as they were written" + (f"; {left} cells of the suite have none" if left else "")
        found.append(Check("records.jsonl", "record", True, note))
    return found


def _tables(suite: Suite, folder: Path, records: Sequence[Record]) -> list[Check]:
    """Whether the leaderboards say what records and timings say."""
    try:
        timings = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
        pages = leaderboards(suite, records, timings, file_digest(folder / "records.jsonl"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Check("timings.jsonl", "table", False, f"cannot be read: {type(error).__name__} {error}")]
    found = []
    for name, text in pages.items():
        path = folder / name
        same = path.is_file() and path.read_text(errors="replace") == text
        note = "" if same else "is not what this version writes from the records: `widthbench report` writes it anew"
        found.append(Check(name, "table", same, note))
    return found


def sample(records: Sequence[Record], count: int | None, seed: int = 0) -> list[Record]:
    """Some of the records, drawn at random, failed and skipped ones too; all of them if ``count`` is None.

    Args:
        records: A suite's.
        count: How many.
        seed: Of the draw: the same one gives the same cells.

    Raises:
        UsageError: If there is none.
    """
    ordered = sorted(records, key=lambda r: r.cell.id)
    if not ordered:
        raise UsageError("there is no record: nothing can be run again")
    if count is None or count >= len(ordered):
        return ordered
    return sorted(random.Random(seed).sample(ordered, count), key=lambda r: r.cell.id)


def rerun(
    suite: Suite, records: Sequence[Record], *, jobs: int = 1, tell: Callable[[Check], None] = lambda check: None
) -> list[Check]:
    """Run recorded cells again from nothing, in a cache of their own, and hold what comes out to the records.

    Args:
        suite: The suite.
        records: Of its cells.
        jobs: Worker processes.
        tell: Called with each check as it is done.

    Raises:
        UsageError: If data or weights that a cell needs are missing.
    """
    suites.check(suite, [r.cell for r in records])
    old = {r.cell.identity: r for r in records}
    found: list[Check] = []

    def done(new: Record) -> None:
        found.append(compare(old[new.cell.identity], new))
        tell(found[-1])

    with tempfile.TemporaryDirectory(prefix="widthbench-verify-") as folder, _cache(Path(folder)):
        local.run([r.cell for r in records], jobs=jobs, done=done)
    return found


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """An empty cache for this process and its workers; data and weights stay where they are."""
    from widthbench.paths import data_dir, weights_dir

    before = {n: os.environ.get(n) for n in ("WIDTHBENCH_CACHE", "WIDTHBENCH_DATA", "WIDTHBENCH_WEIGHTS")}
    os.environ |= {"WIDTHBENCH_DATA": str(data_dir()), "WIDTHBENCH_WEIGHTS": str(weights_dir()), "WIDTHBENCH_CACHE": str(folder)}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def compare(old: Record, new: Record) -> Check:
    """Hold a rerun to a record: bit by bit where code, versions, data and hardware are the record's, else within tolerance."""
    if old.status != new.status:
        return Check(new.cell.id, "status", False, f"recorded {old.status}, now {new.status} {new.reason[:120]}".rstrip())
    if old.status != "done":
        return Check(new.cell.id, "status", True, f"{new.status} again")
    if why := _elsewhere(old, new):
        return _within(old, new, why)
    differences = sorted(_differences(_result(old), _result(new)))
    return Check(new.cell.id, "bit-equal", not differences, _shortened(differences))


def _shortened(differences: Sequence[str]) -> str:
    return "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")


def _elsewhere(old: Record, new: Record) -> str:
    """What of code and machine differs between two records; "" if nothing does."""
    if old.provenance.get("hardware") != hardware():
        return "other hardware"
    for name in ("device", "processes"):
        if old.provenance.get(name) != new.provenance.get(name):
            return f"other {name}"
    same = all(old.provenance.get(n) == new.provenance.get(n) for n in SAME)
    if new.key == old.key or (same and not new.provenance.get("dirty")):
        return ""  # where code, versions and data are the same, so must the key be
    then, now = (r.provenance.get("versions", {}) for r in (old, new))
    other = sorted(k for k in now if k != "widthbench" and then.get(k) != now[k])  # our own code is in the key
    return f"other {', '.join(other)}" if other else "other code or data"


def _result(record: Record) -> dict[str, Any]:
    """Everything in a record that is not when, where or by which commit."""
    data = record.stable()
    data["provenance"] = {k: data["provenance"].get(k) for k in KEPT}
    return data


def _differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{at}[{index}]")
    elif old != new and not (_nan(old) and _nan(new)):
        yield f"{at}: recorded {str(old)[:60]}, now {str(new)[:60]}"


def _nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def tolerance(top1: float, samples: int) -> float:
    """How many points of top-1 a rerun elsewhere may differ by: one, or three standard errors of the difference if that is more.

    The standard error of the difference of two accuracies p on N images each is ``sqrt(2 p (1 - p) / N)``.

    Args:
        top1: Of the rerun, in %.
        samples: Test images N.
    """
    share = min(max(top1 / 100, 0.0), 1.0)
    return max(POINTS, DEVIATIONS * 100 * math.sqrt(2 * share * (1 - share) / max(1, samples)))


def _within(old: Record, new: Record, why: str) -> Check:
    then, now = old.row(), new.row()
    if then is None or now is None or not old.macs or not new.macs:
        return Check(new.cell.id, "tolerance", False, f"{why}: a record without scores")
    facts = [(_facts(r), {n: getattr(r, n) for n in ("macs", "params")} if old.widths == new.widths else {}) for r in (old, new)]
    differences = sorted([*_differences(facts[0][0], facts[1][0]), *_differences(facts[0][1], facts[1][1])])
    apart, allowed = now.top1 - then.top1, tolerance(now.top1, now.samples)
    macs = new.macs / old.macs - 1
    note = f"{why}: top-1 {then.top1:.2f} and {now.top1:.2f} ({apart:+.2f}, allowed ±{allowed:.2f}), MACs {100 * macs:+.2f} %"
    others = [f"{a.stage} {a.top1:.2f} and {b.top1:.2f}" for a, b in zip(old.rows[:-1], new.rows[:-1], strict=False)]
    note += f" (not judged: {', '.join(others)})" if others else ""
    note += f"; {_shortened(differences)}" if differences else ""
    return Check(new.cell.id, "tolerance", not differences and abs(apart) <= allowed and abs(macs) <= MACS, note)


def _facts(record: Record) -> dict[str, Any]:
    """What does not hang on how training went: equal on every machine."""
    found = {n: getattr(record, n) for n in ("access", "base_macs", "base_params", "base_widths", "coupled", "floor", "trials")}
    seen = {n: record.provenance.get(n) for n in ("dataset_digest", "val_seen", "checkpoint")}
    return found | seen | {"stages": [r.stage for r in record.rows], "samples": [r.samples for r in record.rows]}
