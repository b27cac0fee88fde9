"""Whether a suite's results are what they say: files and records by their digests, and a sample of cells run again."""

from __future__ import annotations

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
from widthbench.records import Record, read_lines
from widthbench.report.build import SUMS, file_digest
from widthbench.suites import Suite

POINTS = 1.0  # of test top-1: what a network trained anew on another machine may differ by (the tolerance of claims on own bases)
DEVIATIONS = 3.0  # or standard errors of the difference of two accuracies on as many images, where that is more
MACS = 0.05  # as budgets are met
KEPT = ("base_digest", "checkpoint", "dataset_digest", "dtype", "threads", "val_seen", "processes", "device")  # of the provenance


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        what: A file, or a cell's name.
        by: How: "digest", "record", "bit-equal", "tolerance".
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


def check_files(folder: Path) -> list[Check]:
    """Hold the files of a suite's folder to its ``SHA256SUMS``, and each record to its own digest.

    Digests find accidents and careless edits. Who rewrites a number and all digests with it is found by running cells again.

    Args:
        folder: ``results/SUITE``.

    Raises:
        UsageError: If it has no records.
    """
    return [*_sums(folder), *_records(folder)]


def _sums(folder: Path) -> list[Check]:
    try:
        lines = (folder / SUMS).read_text(errors="replace").splitlines()
    except OSError:
        return [Check(SUMS, "digest", False, "there is none: `widthbench report` writes it")]
    found = []
    for line in lines:
        digest, _, name = line.partition("  ")
        path = folder / name
        if not name or not path.resolve().is_relative_to(folder.resolve()):
            found.append(Check(SUMS, "digest", False, f"not a line of digest and file: {line[:80]!r}"))
        elif not path.is_file():
            found.append(Check(name, "digest", False, "the file is gone"))
        else:
            same = file_digest(path) == digest
            found.append(Check(name, "digest", same, "" if same else f"was changed after {SUMS} was written"))
    named = {line.partition("  ")[2] for line in lines}
    found += [Check(n, "digest", False, f"is not in {SUMS}") for n in ("records.jsonl", "leaderboard.md") if n not in named]
    return found


def _records(folder: Path) -> list[Check]:
    lines = read_lines(folder / "records.jsonl")
    found = [Check(f"records.jsonl:{line.number}", "record", False, line.problem) for line in lines if line.problem]
    bare = [line.number for line in lines if not line.problem and not line.sealed]
    if bare:
        found.append(Check(f"records.jsonl:{bare[0]}", "record", False, f"{len(bare)} records carry no digest of their own"))
    twice = [i for i, n in Counter(line.record.cell.identity for line in lines if line.record).items() if n > 1]
    if twice:
        found.append(Check("records.jsonl", "record", False, f"{len(twice)} cells have more than one record"))
    good = sum(not line.problem and line.sealed for line in lines)
    if good:
        found.append(Check("records.jsonl", "record", True, f"{good} records as they were written"))
    return found


def sample(records: Sequence[Record], count: int | None, seed: int = 0) -> list[Record]:
    """Some of the finished records, drawn at random; all of them if ``count`` is None.

    Args:
        records: A suite's.
        count: How many.
        seed: Of the draw: the same one gives the same cells.

    Raises:
        UsageError: If none is finished.
    """
    done = sorted((r for r in records if r.status == "done"), key=lambda r: r.cell.id)
    if not done:
        raise UsageError("none of its cells is finished: there is nothing to run again")
    if count is None or count >= len(done):
        return done
    return sorted(random.Random(seed).sample(done, count), key=lambda r: r.cell.id)


def rerun(
    suite: Suite, records: Sequence[Record], *, jobs: int = 1, tell: Callable[[Check], None] = lambda check: None
) -> list[Check]:
    """Run recorded cells again from nothing, in a cache of their own, and hold what comes out to the records.

    Args:
        suite: The suite.
        records: Finished ones of it.
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
    if why := _elsewhere(old, new):
        return _within(old, new, why)
    differences = sorted(_differences(_result(old), _result(new)))
    shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
    return Check(new.cell.id, "bit-equal", not differences, shown)


def _elsewhere(old: Record, new: Record) -> str:
    """What of code and machine differs between two records; "" if nothing does."""
    if old.provenance.get("hardware") != hardware():
        return "other hardware"
    for name in ("device", "processes"):
        if old.provenance.get(name) != new.provenance.get(name):
            return f"other {name}"
    if new.key == old.key:
        return ""
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
        top1: Recorded, in %.
        samples: Test images N.
    """
    share = min(max(top1 / 100, 0.0), 1.0)
    return max(POINTS, DEVIATIONS * 100 * math.sqrt(2 * share * (1 - share) / max(1, samples)))


def _within(old: Record, new: Record, why: str) -> Check:
    if new.status != old.status:
        return Check(new.cell.id, "tolerance", False, f"{why}: recorded {old.status}, now {new.status} {new.reason[:80]}".rstrip())
    then, now = old.row(), new.row()
    if then is None or now is None or not old.macs or not new.macs:
        return Check(new.cell.id, "tolerance", False, f"{why}: a record without scores")
    apart, allowed = now.top1 - then.top1, tolerance(then.top1, then.samples)
    macs = new.macs / old.macs - 1
    note = f"{why}: top-1 {then.top1:.2f} and {now.top1:.2f} ({apart:+.2f}, allowed ±{allowed:.2f}), MACs {100 * macs:+.2f} %"
    return Check(new.cell.id, "tolerance", abs(apart) <= allowed and abs(macs) <= MACS, note)
