"""Whether a suite's results are what they say: files and records by their digests, and a sample of
cells run again.
"""

from __future__ import annotations

import math
import os
import random
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from widthbench.cache import STORE
from widthbench.claims import ledger
from widthbench.engines import local
from widthbench.errors import UsageError
from widthbench.experiment import adaptation, controls, protocol, suites
from widthbench.experiment.cell import Cell
from widthbench.experiment.records import Line, Record, Row, read_lines
from widthbench.experiment.suites import Suite
from widthbench.provenance import hardware
from widthbench.recipe import Spent
from widthbench.report import claims as report_claims
from widthbench.report import tables
from widthbench.report.build import (
    ASIDE,
    SUMS,
    file_digest,
    in_order,
    published_records,
    read_sums,
    texts,
)
from widthbench.report.reproduction import NAME, differences, result
from widthbench.report.timing import parse_timings
from widthbench.technique import registry
from widthbench.technique.budget import Budget, check, used

# of test top-1: what a network trained anew on another machine may differ by (the tolerance of
# claims on own bases)
POINTS = 1.0
# or standard errors of the difference of two accuracies on as many images, where that is more
DEVIATIONS = 3.0
MACS = 0.05  # as budgets are met
LOSS = 0.5  # of cross-entropies, which depend on few images
# of what a decision and what followed cost: loops that stop by what they see stop elsewhere a
# little earlier or later
SPENT = 0.25
CITING = f"\n{tables.CITING}\n".encode()
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
        return {
            "what": self.what,
            "by": self.by,
            "verdict": "holds" if self.ok else "DIFFERS",
            "note": self.note,
        }


def check_files(suite: Suite, folder: Path) -> list[Check]:
    """Hold the files of a suite's folder to its ``SHA256SUMS``, each record to its own digest, and
    the tables to the records.

    Digests find accidents and careless edits. Who rewrites a number and all digests with it is
    found by running cells again.

    Args:
        suite: The suite.
        folder: ``results/SUITE``.

    Raises:
        UsageError: If it has no records.
    """
    lines = read_lines(folder / "records.jsonl")
    return [
        *_sums(folder),
        *_records(suite, lines),
        *_tables(suite, folder, [ln.record for ln in lines if ln.record]),
    ]


def _sums(folder: Path) -> list[Check]:
    try:
        lines = read_sums(folder / SUMS)
    except OSError:
        return [Check(SUMS, "digest", False, "there is none: `widthbench report` writes it")]
    checks = []
    pictures = (folder / "figures").is_dir()  # an installed package comes without
    for digest, name in lines:
        if name.startswith("figures/") and not pictures:
            continue
        try:
            inside = bool(name) and (folder / name).resolve().is_relative_to(folder.resolve())
            same = (file_digest(folder / name) == digest) if inside else None
        except FileNotFoundError:
            checks.append(Check(name, "digest", False, "the file is gone"))
            continue
        except (OSError, ValueError):  # a folder, a name that no file can have
            same = None
        if same is None:
            checks.append(
                Check(
                    SUMS,
                    "digest",
                    False,
                    f"not a line of digest and file: {f'{digest}  {name}'[:80]!r}",
                )
            )
        else:
            checks.append(
                Check(name, "digest", same, "" if same else f"was changed after {SUMS} was written")
            )
    named = {name for _, name in lines} | {SUMS, ASIDE}
    there = _names(folder)
    return checks + [
        Check(n, "digest", False, f"is not in {SUMS}") for n in there if n not in named
    ]


def _names(folder: Path) -> list[str]:
    """The files of a folder, but for half-written ones that a killed run has left."""
    files = (
        p
        for p in folder.rglob("*")
        if p.is_file() and not (p.name.startswith(".") and p.suffix == ".part")
    )
    return sorted(p.relative_to(folder).as_posix() for p in files)


def _records(suite: Suite, lines: Sequence[Line]) -> list[Check]:
    checks = [
        Check(f"records.jsonl:{line.number}", "record", False, line.problem)
        for line in lines
        if line.problem
    ]
    cells = {c.identity for c in suite.cells()}
    counted = Counter(line.record.cell.identity for line in lines if line.record)
    if twice := sum(n > 1 for n in counted.values()):
        checks.append(
            Check("records.jsonl", "record", False, f"{twice} cells have more than one record")
        )
    foreign = [line for line in lines if line.record and line.record.cell.identity not in cells]
    if foreign and foreign[0].record:
        where = f"records.jsonl:{foreign[0].number}"
        note = (
            f"{len(foreign)} records are of cells that the suite does not have, the first of"
            f" {foreign[0].record.cell.id}"
        )
        checks.append(Check(where, "record", False, note))
    good = sum(not line.problem for line in lines)
    if good:
        left = len(cells - counted.keys())
        note = f"{good} records as they were written" + (
            f"; {left} cells of the suite have none" if left else ""
        )
        checks.append(Check("records.jsonl", "record", True, note))
    return checks


def _tables(suite: Suite, folder: Path, records: Sequence[Record]) -> list[Check]:
    """Whether all pages say what records and timings say."""
    try:
        timings = parse_timings(folder / "timings.jsonl")
    except UsageError as error:
        return [Check("timings.jsonl", "table", False, str(error))]
    published = published_records(suite) if (folder / NAME).is_file() else []
    pages = texts(
        suite, in_order(suite, records), timings, file_digest(folder / "records.jsonl"), published
    )
    ours = {*pages, SUMS, "records.jsonl", ASIDE, "timings.jsonl"}
    names = _names(folder)
    checks = [
        Check(n, "table", False, "is nothing that a report of these records writes")
        for n in names
        if n not in ours and not re.fullmatch(r"figures/[^/]+\.png", n)
    ]
    for name, text in pages.items():
        path = folder / name
        there = path.read_bytes() if path.is_file() else b""
        same = there == text.encode() or (
            name == "leaderboard.md" and _same_but_bibtex(there, text.encode())
        )
        note = (
            ""
            if same
            else (
                "is not what this version writes from the records: `widthbench report` writes it"
                " anew"
            )
        )
        checks.append(Check(name, "table", same, note))
    return checks


def _same_but_bibtex(one: bytes, other: bytes) -> bool:
    """Whether two leaderboards agree but for the BibTeX of techniques, which is their authors' and
    follows from no record.
    """
    parts = [_cited(page) for page in (one, other)]
    return None not in parts and parts[0] == parts[1]


def _cited(page: bytes) -> tuple[bytes, list[bytes]] | None:
    """What a leaderboard says before it cites, and its own entry; None if there is anything but one
    block of BibTeX behind that.
    """
    told, _, rest = page.partition(CITING)
    lines = rest.splitlines()
    fence = lines[1].removesuffix(b"bibtex") if len(lines) > 3 and not lines[0] else b""
    if (
        not fence.startswith(b"```")
        or lines[-1] != fence
        or any(line.lstrip().startswith(fence) for line in lines[2:-1])
    ):
        return None
    return told, lines[2 : lines.index(b"}")] if b"}" in lines else []


def check_claims(results: Path) -> list[Check]:
    """Judge all claims anew by the records in a results folder, and hold ``claims.json`` and
    ``claims.md`` to that.

    Args:
        results: The folder; where no claims were judged there is nothing to check.

    Raises:
        UsageError: If records are damaged.
    """
    if not report_claims.there(results):
        return []
    other = report_claims.unlike(ledger.judge_all(results), results)
    return [
        Check(n, "table", n not in other, report_claims.STALE if n in other else "")
        for n in report_claims.NAMES
    ]


def sample(records: Sequence[Record], count: int | None, seed: int = 0) -> list[Record]:
    """Some of the records, drawn at random, failed and skipped ones too; all of them if ``count``
    is None.

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
    suite: Suite,
    records: Sequence[Record],
    *,
    beside: Sequence[Record] = (),
    jobs: int = 1,
    tell: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Run recorded cells again from nothing, in a cache of their own (one for each plug-in, too),
    and hold them to the records.

    Args:
        suite: The suite.
        records: Of its cells.
        beside: The suite's other records, from whose spread over seeds the tolerance of earlier
            stages follows.
        jobs: Worker processes.
        tell: Called with each check as it is done.

    Raises:
        UsageError: If data or weights that a cell needs are missing.
    """
    suites.check(suite, [r.cell for r in records])
    old = {r.cell.identity: r for r in records}
    spread = spreads([*beside, *records])
    checks: list[Check] = []
    elsewhere: list[tuple[Record, Record]] = []

    def done(new: Record) -> None:
        before = old[new.cell.identity]
        checks.append(compare(before, new, spread.get(_row(before.cell), {})))
        if before.status == new.status == "done" and checks[-1].by == "tolerance":
            elsewhere.append((before, new))
        tell(checks[-1])

    apart: dict[
        str, list[Cell]
    ] = {}  # what a plug-in may write into a cache answers for no other technique
    for cell in (r.cell for r in records):
        technique = cell.of or cell.technique
        apart.setdefault("" if registry.built_in(technique) else technique, []).append(cell)
    for cells in apart.values():
        with (
            tempfile.TemporaryDirectory(prefix="widthbench-verify-") as folder,
            _cache(Path(folder)),
        ):
            local.run(cells, jobs=jobs, done=done, limits=suites.limits([suite]))
    return checks + means(elsewhere, spread)


def _row(cell: Cell) -> tuple[str, ...]:
    return cell.dataset, cell.network, cell.label, cell.budget or ""


def spreads(records: Sequence[Record]) -> dict[tuple[str, ...], dict[str, float]]:
    """What seeds differ by in test top-1, by row of the leaderboard and stage: as the *other* rows
    of its network say.

    The root of the mean variance over seeds of these rows, so that numbers do not widen the
    tolerance that they are judged by.
    """
    values: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    for record in records:
        for row in record.rows:
            values.setdefault(_row(record.cell), {}).setdefault(row.stage, {})[record.cell.seed] = (
                row.top1
            )
    spread: dict[tuple[str, ...], dict[str, float]] = {}
    for key, stages in values.items():
        for stage in stages:
            others = [
                v[stage] for k, v in values.items() if k[:2] == key[:2] and k != key and stage in v
            ]
            variances = [statistics.variance(of.values()) for of in others if len(of) > 1]
            if variances:
                spread.setdefault(key, {})[stage] = math.sqrt(fmean(variances))
    return spread


def means(
    pairs: Sequence[tuple[Record, Record]], spread: Mapping[tuple[str, ...], Mapping[str, float]]
) -> list[Check]:
    """Judge the mean difference of top-1 over reruns elsewhere: of each row, of each technique, of
    all; stage by stage.

    What moves every cell the same way, each within its tolerance, shows here: allowed is ``sqrt(sum
    tolerance_i ** 2) / n``, since what training leaves to chance is independent from network to
    network.

    Args:
        pairs: Records and their reruns, finished both.
        spread: As ``spreads`` gives it.
    """
    grouped: dict[str, list[tuple[Record, Record]]] = {}
    for pair in pairs:
        cell = pair[0].cell
        for name in (" ".join(_row(cell)).rstrip(), cell.label, "all cells"):
            grouped.setdefault(name, []).append(pair)
    checks = []
    seen: list[list[tuple[Record, Record]]] = []
    for name, some in grouped.items():
        if len(some) < 2 or some in seen:
            continue
        seen.append(some)
        gaps: dict[str, list[tuple[float, float]]] = {}
        for old, new in some:
            for a, b in zip(old.rows, new.rows, strict=False):
                allowed = _allowed(old, b, spread.get(_row(old.cell), {}))
                if allowed is not None:
                    gaps.setdefault("last" if b is new.rows[-1] else b.stage, []).append(
                        (b.top1 - a.top1, allowed)
                    )
        judged = {
            stage: (fmean(g for g, _ in both), math.sqrt(sum(t**2 for _, t in both)) / len(both))
            for stage, both in gaps.items()
        }
        bad = [
            f"{stage} {apart:+.2f} (allowed ±{most:.2f})"
            for stage, (apart, most) in judged.items()
            if abs(apart) > most
        ]
        apart, most = judged["last"]
        note = f"mean difference of top-1 {apart:+.2f} (allowed ±{most:.2f})" + (
            f"; beyond it: {', '.join(bad)}" if bad else ""
        )
        checks.append(Check(f"{name}: mean of {len(some)}", "tolerance", not bad, note))
    return checks


def _allowed(old: Record, row: Row, spread: Mapping[str, float]) -> float | None:
    """The tolerance of a stage of a rerun; None where nothing says what seeds differ by."""
    if row.stage == old.rows[-1].stage:
        return tolerance(row.top1, row.samples)
    if row.stage not in spread:
        return None
    return max(tolerance(row.top1, row.samples), DEVIATIONS * math.sqrt(2) * spread[row.stage])


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """An empty cache for this process and its workers; data and weights stay where they are."""
    from widthbench.paths import data_dir, weights_dir

    before = {
        n: os.environ.get(n)
        for n in ("WIDTHBENCH_CACHE", "WIDTHBENCH_DATA", "WIDTHBENCH_WEIGHTS", STORE)
    }
    os.environ |= {
        "WIDTHBENCH_DATA": str(data_dir()),
        "WIDTHBENCH_WEIGHTS": str(weights_dir()),
        "WIDTHBENCH_CACHE": str(folder),
    }
    os.environ.pop(STORE, None)  # it has the very records that are to be made again
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def compare(old: Record, new: Record, spread: Mapping[str, float] | None = None) -> Check:
    """Hold a rerun to a record: bit by bit where code, versions, data and hardware are the
    record's, else within tolerance.

    Args:
        old: The record.
        new: The rerun.
        spread: What seeds differ by, by stage (``spreads``).
    """
    if old.status != new.status:
        return Check(
            new.cell.id,
            "status",
            False,
            f"recorded {old.status}, now {new.status} {new.reason[:120]}".rstrip(),
        )
    why = _elsewhere(old, new)
    if old.status != "done":
        same = old.reason == new.reason
        note = f"{new.status} again" + (
            "" if same else f", recorded {old.reason[:100]!r}, now {new.reason[:100]!r}"
        )
        return Check(new.cell.id, "status", same or bool(why) or old.status == "failed", note)
    if why:
        return _within(old, new, why, spread or {})
    differing = sorted(differences(result(old), result(new)))
    if old.key == new.key:  # which hashes them
        then, now = (
            {k: v for k, v in r.provenance.get("versions", {}).items() if k != "widthbench"}
            for r in (old, new)
        )
        differing += differences(then, now, "versions")
    return Check(new.cell.id, "bit-equal", not differing, _shortened(differing))


def _shortened(differences: Sequence[str]) -> str:
    return "; ".join(differences[:3]) + (
        f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    )


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
    other = sorted(
        k for k in now if k != "widthbench" and then.get(k) != now[k]
    )  # our own code is in the key
    return f"other {', '.join(other)}" if other else "other code or data"


def tolerance(top1: float, samples: int) -> float:
    """How many points of top-1 a rerun elsewhere may differ by: one, or three standard errors of
    the difference if that is more.

    The standard error of the difference of two accuracies p on N images each is ``sqrt(2 p (1 - p)
    / N)``.

    Args:
        top1: Of the rerun, in %.
        samples: Test images N.
    """
    share = min(max(top1 / 100, 0.0), 1.0)
    return max(POINTS, DEVIATIONS * 100 * math.sqrt(2 * share * (1 - share) / max(1, samples)))


def _within(old: Record, new: Record, why: str, spread: Mapping[str, float]) -> Check:
    then, now = old.rows[-1], new.rows[-1]
    assert old.macs  # of records that are done
    assert new.macs
    differing = sorted(
        [
            *differences(_facts(old), _facts(new)),
            *_size_differences(old),
            *_cost_differences(old, new),
        ]
    )
    apart, allowed = now.top1 - then.top1, tolerance(now.top1, now.samples)
    macs = new.macs / old.macs - 1
    note = (
        f"{why}: top-1 {then.top1:.2f} and {now.top1:.2f} ({apart:+.2f}, allowed ±{allowed:.2f}),"
        f" MACs {100 * macs:+.2f} %"
    )
    for a, b in zip(old.rows[:-1], new.rows[:-1], strict=False):
        more = _allowed(old, b, spread)
        if more is None:
            note += (
                f", {a.stage} {a.top1:.2f} and {b.top1:.2f} (no other row of the network has two"
                " seeds: not judged)"
            )
            continue
        note += f", {a.stage} {b.top1 - a.top1:+.2f}"
        if abs(b.top1 - a.top1) > more:
            differing.append(f"{a.stage}: top-1 {a.top1:.2f} and {b.top1:.2f}, allowed ±{more:.2f}")
    differing += _score_differences(then, now)
    note += f"; {_shortened(differing)}" if differing else ""
    return Check(
        new.cell.id,
        "tolerance",
        not differing and abs(apart) <= allowed and abs(macs) <= MACS,
        note,
    )


def _score_differences(then: Row, now: Row) -> Iterator[str]:
    """Where the other scores of the last stage are further apart than another machine explains."""
    for name, samples in (
        ("top5", now.samples),
        ("val_top1", now.samples // 2),
    ):  # of val there are fewer images
        a, b = getattr(then, name), getattr(now, name)
        if (a is None) != (b is None) or (a is not None and abs(a - b) > tolerance(b, samples)):
            yield f"{name}: recorded {a}, now {b}"
    for name in ("loss", "val_loss"):
        a, b = getattr(then, name), getattr(now, name)
        if a is not None and b is not None and abs(a - b) > max(0.1, LOSS * max(a, b)):
            yield f"{name}: recorded {a:.4f}, now {b:.4f}"


def _size_differences(record: Record) -> Iterator[str]:
    """Where a record's sizes are not those of a network of its widths."""
    try:
        actual = sizes(record)
    except Exception as error:  # widths that no network can have
        yield f"widths: no network of the kind has them ({type(error).__name__}: {str(error)[:80]})"
        return
    for name, value in actual.items():
        said = getattr(record, name)
        same = math.isclose(said or 0.0, value, rel_tol=1e-9) if name == "kept" else said == value
        if not same:
            yield f"{name}: recorded {said}, its widths give {value}"


def sizes(record: Record) -> dict[str, Any]:
    """What follows from a record's widths alone: MACs, parameters, the share that is kept, and
    whether the budget was met.

    Args:
        record: A finished one.
    """
    cell = record.cell
    with protocol.pinned(cell):
        model, groups, cost = controls.fresh_at(cell, record.widths, 0)
        now = cost.counted(model, record.widths)
    full = cost.original
    values: dict[str, Any] = {
        "macs": now.macs,
        "params": now.params,
        "base_macs": full.macs,
        "base_params": full.params,
    }
    if cell.budget is None:
        return values
    scoped = groups.select(cell.scope, cell.include or None)
    budget = adaptation.budget_of(cell, scoped, cost)
    kept = used(budget, record.widths, scoped, now, full)
    floor = budget != Budget.parse(cell.budget, grows=True)
    return values | {"kept": kept, "met": check(budget, kept, scoped), "floor": floor}


def _cost_differences(old: Record, new: Record) -> Iterator[str]:
    """Where what was spent is not what a rerun spends: exactly for the base network, within
    ``SPENT`` for what came after.
    """
    for phase in sorted({*old.spent, *new.spent}):
        then, now = old.spent.get(phase, Spent()), new.spent.get(phase, Spent())
        for name in ("forward_macs", "backward_macs", "epochs"):
            a, b = getattr(then, name), getattr(now, name)
            if a != b if phase == "base" else abs(a - b) > SPENT * max(a, b):
                yield f"spent.{phase}.{name}: recorded {a:g}, now {b:g}"


def _facts(record: Record) -> dict[str, Any]:
    """What does not depend on how training went: equal on every machine."""
    facts = {
        n: getattr(record, n)
        for n in ("access", "base_macs", "base_params", "base_widths", "coupled", "floor", "trials")
    }
    seen = {n: record.provenance.get(n) for n in ("dataset_digest", "val_seen", "checkpoint")}
    return (
        facts
        | seen
        | {
            "stages": [r.stage for r in record.rows],
            "samples": [r.samples for r in record.rows],
        }
    )
