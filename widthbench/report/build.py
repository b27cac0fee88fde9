"""A suite's folder of results: records, timings, leaderboard and figures, from the store."""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from widthbench import cache, protocol
from widthbench.controls import fresh_at
from widthbench.errors import UsageError
from widthbench.measure import latency_ms, peak_memory_mib
from widthbench.paths import cache_dir, write_atomic
from widthbench.provenance import code_digest, hardware, versions
from widthbench.records import Line, Record, Store, digest_of, read_lines, write_records
from widthbench.report import curves, exports, figures, tables, trajectories, widths
from widthbench.suites import Suite

BATCH = 64
ROUNDS = 5
SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        records: The suite's records.
        folder: Where the files are.
        files: The files.
        text: The short table for a terminal.
    """

    records: list[Record]
    folder: Path
    files: list[Path]
    text: str


def collect(suite: Suite, store: Store, before: Sequence[Record] = (), fresh: Sequence[Record] = ()) -> list[Record]:
    """The finished records of a suite's cells, and the failures of those that are not finished.

    A key takes ten times as long as all else, so it is worked out only where the store holds something that may be of the cell.

    Args:
        suite: The suite.
        store: Where finished cells are.
        before: Records of an earlier report, which stand in for cells that the store has nothing of, so that running a part of a
            suite loses nothing. Each says which commit it comes from.
        fresh: Records of a run that has just ended; the store is not asked for these.

    Raises:
        UsageError: If there is nothing to show, and what the cells need (data, weights, a technique) is not at hand.
    """
    old, new = ({r.cell.identity: r for r in some} for some in (before, fresh))
    found: list[Record] = []
    finished = {r.key for r in before if r.status != "failed"}  # of one key there is one finished record
    candidates = store.cells(but=finished, at_most=len(suite.cells()))
    absent: dict[tuple[str | None, ...], UsageError] = {}
    for cell in suite.cells():
        identity = cell.identity
        earlier, record = old.get(identity), new.get(identity)
        needs = (cell.dataset, cell.model, cell.checkpoint, cell.of or cell.technique)
        asked = record is None and (candidates is None or identity in candidates)
        if asked and needs not in absent:
            try:
                key = protocol.cell_key(cell)
                same = earlier is not None and earlier.key == key and earlier.status != "failed"
                record = earlier if same else store.get(key) or store.failure(key)
            except UsageError as error:  # a key hashes the data: without them the store cannot be asked
                absent[needs] = error
        if record is None or (earlier is not None and record.status == "failed" and record.key == earlier.key):
            record = earlier or record  # a failure elsewhere takes no finished record away
        if record is not None:
            found.append(record)
    if not found:
        for cell in suite.cells()[:1]:
            protocol.cell_key(cell)  # says what is not at hand
    return found


def build(suite: Suite, results: Path, store: Store, *, time_shapes: bool = True, fresh: Sequence[Record] = ()) -> Report:
    """Write records, timings, figures, ``leaderboard`` (.md, .csv, .tex), ``SHA256SUMS``; other pages where they apply.

    Args:
        suite: The suite.
        results: The folder of all results; the suite gets one of its own in it.
        store: Where finished cells are.
        time_shapes: Measure latency and memory of shapes that have none yet; do this only when no worker is busy.
        fresh: Records of a run that has just ended, whose keys may be those of other machines.

    Raises:
        UsageError: If no cell of the suite has a record.
    """
    with _no_collection():
        return _build(suite, results / suite.name, store, time_shapes, fresh)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the collector of cycles, which goes through all of 100,000 records again and again and finds nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _build(suite: Suite, folder: Path, store: Store, time_shapes: bool, fresh: Sequence[Record]) -> Report:
    known = _before(folder / "records.jsonl")
    records = collect(suite, store, [line.record for line in known if line.record], fresh)
    if not records:
        raise UsageError(f"suite '{suite.name}' has no finished cell yet: run it first (`widthbench run {suite.name}`)")
    timings = timings_of(records, measure=time_shapes, before=read_timings(folder))
    write_records(folder / "records.jsonl", records, {id(line.record): line.text for line in known})
    lines = sorted(json.dumps(t, sort_keys=True) for t in timings)
    write_atomic(folder / "timings.jsonl", "".join(line + "\n" for line in lines))
    timings = read_timings(folder)  # as whoever reads the file has them
    pages = []
    for name, text in texts(suite, records, timings, file_digest(folder / "records.jsonl")).items():
        pages.append(folder / name)
        write_atomic(pages[-1], text)
    more = []
    if curves.has_curves(records):
        more = curves.write(records, folder / "figures")
    if trajectories.has_trajectories(records):
        more += trajectories.write(records, folder / "figures")
    drawn = figures.write(records, folder / "figures", suite.title or suite.name) + widths.write(records, folder / "figures")
    files = [*pages, folder / "records.jsonl", folder / "timings.jsonl", *drawn, *more]
    sums = folder / SUMS
    _clear(sums, files)
    write_atomic(sums, "".join(f"{file_digest(f)}  {f.relative_to(folder).as_posix()}\n" for f in sorted(files)))
    files.append(sums)
    return Report(records, folder, files, tables.terminal(suite, records, len(suite.cells())))


def _clear(sums: Path, files: Sequence[Path]) -> None:
    """Remove what an earlier report wrote and this one does not, unless somebody has changed it since."""
    for digest, name in read_sums(sums) if sums.is_file() else []:
        path = sums.parent / name
        inside = path.resolve().is_relative_to(sums.parent.resolve())
        if inside and path not in files and path.is_file() and file_digest(path) == digest:
            path.unlink()


def read_sums(path: Path) -> list[tuple[str, str]]:
    """Digests and names in a ``SHA256SUMS``, as they stand there; what is no such line has no name."""
    lines = path.read_text(errors="replace").splitlines()
    return [(digest, name) for digest, _, name in (line.partition("  ") for line in lines)]


def texts(suite: Suite, records: Sequence[Record], timings: Sequence[dict[str, Any]], digest: str) -> dict[str, str]:
    """All pages of a suite that follow from its records, by file name.

    Args:
        suite: The suite.
        records: As ``records.jsonl`` holds them, in the order of the suite's cells (``in_order``).
        timings: As ``timings.jsonl`` holds them.
        digest: SHA-256 of ``records.jsonl``.
    """
    found = leaderboards(suite, records, timings, digest)
    if tables.comparable(suite):
        found["paired.md"] = tables.paired(suite, records)
    if curves.has_curves(records):
        found["curves.md"] = curves.page(records, suite.name)
    if trajectories.has_trajectories(records):
        found["trajectories.md"] = trajectories.page(records, suite.name)
    return found


def leaderboards(suite: Suite, records: Sequence[Record], timings: Sequence[dict[str, Any]], digest: str) -> dict[str, str]:
    """The leaderboard as markdown, CSV and LaTeX, by file name.

    Args:
        suite: The suite.
        records: As ``records.jsonl`` holds them, in the order of the suite's cells.
        timings: As ``timings.jsonl`` holds them.
        digest: SHA-256 of ``records.jsonl``.
    """
    cite = exports.citation(suite, records, digest)
    return {
        "leaderboard.md": tables.leaderboard(suite, records, timings, len(suite.cells()), digest=digest, cite=cite),
        "leaderboard.csv": exports.csv_text(records, timings, suite.cells()),
        "leaderboard.tex": exports.latex_text(suite, records, timings),
    }


def of_suite(suite: Suite, path: Path, records: Sequence[Record]) -> Sequence[Record]:
    """The records, if all are of cells that the suite has.

    Raises:
        UsageError: If one is not; it names the cell, and ``path`` as the file.
    """
    known = {cell.identity for cell in suite.cells()}
    for record in records:
        if record.cell.identity not in known:
            raise UsageError(
                f"{path}: suite '{suite.name}' has no such cell as {record.cell.id}: `widthbench report` writes the file anew"
            )
    return records


def in_order(suite: Suite, records: Sequence[Record]) -> list[Record]:
    """Records in the order of their suite's cells, those of no cell last."""
    place = {cell.identity: i for i, cell in enumerate(suite.cells())}
    return sorted(records, key=lambda r: place.get(r.cell.identity, len(place)))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Timing(BaseModel):
    """What tables take from a line of ``timings.jsonl``."""

    dataset: str
    model: str
    shape: str
    speed_up: float = Field(gt=0, allow_inf_nan=False)
    batch: int = Field(default=BATCH, gt=0)


def parse_timings(path: Path) -> list[dict[str, Any]]:
    """The lines of ``timings.jsonl``.

    Raises:
        UsageError: If it cannot be read, or a line is no timing; it names the line.
    """
    try:
        text = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    found = []
    for number, line in enumerate(text, 1):
        try:
            found.append(json.loads(line))
            _Timing.model_validate(found[-1])
        except (ValueError, RecursionError) as error:  # pydantic's are ValueErrors
            raise UsageError(f"{path}:{number} is no timing: {str(error).splitlines()[0]}") from error
    return found


def read_timings(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``timings.jsonl``; none if it is absent or damaged, since what it holds can be measured again."""
    try:
        return parse_timings(folder / "timings.jsonl")
    except UsageError:
        return []


def _before(path: Path) -> list[Line]:
    """The sound records of an earlier report; a file with others is kept under another name, and said."""
    if not path.is_file():
        return []
    sums = path.with_name(SUMS)
    lines = read_lines(path, trusted=sums.is_file() and (file_digest(path), path.name) in read_sums(sums))
    bad = [line for line in lines if line.problem]
    if bad:
        kept = path.with_suffix(".damaged.jsonl")
        write_atomic(kept, path.read_bytes())
        warnings.warn(
            f"{len(bad)} of {len(lines)} earlier records are not taken over, the first at {path}:{bad[0].number} "
            f"({bad[0].problem}); "
            f"the file as it was is now {kept}",
            stacklevel=2,
        )
    return [line for line in lines if not line.problem]


def timings_of(records: Sequence[Record], *, measure: bool, before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Latency and peak memory per distinct shape: from the cache, from an earlier report, or measured now, one after the other.

    A resized network's speed-up is the median over rounds that time base and resized network in turn.

    Args:
        records: Finished ones count.
        measure: Whether to measure what is missing.
        before: An earlier report's; they stand in for what the cache has nothing of: those of this hardware, or all where
            nothing is measured.
    """
    kept = [t for t in before if t.get("hardware") == hardware() or not measure]
    old = {(t["dataset"], t["model"], t["shape"]): t for t in kept}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    seen: set[tuple[str, str, str]] = set()
    for record in records:
        key = (record.cell.dataset, record.cell.network, tables.shape_of(record))
        if record.status != "done" or key in seen:
            continue
        seen.add(key)
        path = cache_dir() / "timings" / f"{_timing_key(record)}.json"
        damaged = path.exists()
        if cached := _cached_timing(path):
            found[key] = cached
        elif measure and (damaged or key not in old):
            found[key] = _measure(record)
            cache.write_json(path, found[key])
        elif key in old:
            found[key] = old[key]
    return list(found.values())


def _cached_timing(path: Path) -> dict[str, Any] | None:
    """A timing from the cache; None if there is none, or (named in a warning) it is damaged."""
    found = cache.read_json(path, "timing")
    try:
        if found is not None:
            _Timing.model_validate(found)
    except ValueError as error:
        cache.damaged(path, "timing", str(error).splitlines()[0])
        return None
    return found


def _timing_key(record: Record) -> str:
    cell = record.cell
    return digest_of(
        {
            "shape": [cell.dataset, cell.model, cell.model_args, cell.size, record.widths, cell.threads],
            "device": str(protocol.device_of(cell)),
            "hardware": hardware(),
            "versions": versions(),
            "code": code_digest("measure.py", "models.py", "width", "report/build.py"),
        }
    )[:40]


def _measure(record: Record) -> dict[str, Any]:
    cell = record.cell
    with protocol.pinned(cell):
        full = protocol.fresh_model(cell, 0).eval()
        resized, _, _ = fresh_at(cell, record.widths, 0)
        resized.eval()
        one = protocol.example_input(cell)
        heavy = one.device.type == "cpu" and cell.size > 64  # a batch of 64 would take a CPU most of an hour
        size, rounds, warm_up = (1, 2, 1) if heavy else (BATCH, ROUNDS, 5)
        batch = one.expand(size, -1, -1, -1).contiguous()
        pairs = [
            tuple(latency_ms(m, batch, rounds=15, limit_s=0.4, warm_up=warm_up) for m in (full, resized)) for _ in range(rounds)
        ]
        return {
            "dataset": cell.dataset,
            "model": cell.network,
            "shape": tables.shape_of(record),
            "widths": record.widths,
            "macs": record.macs,
            "params": record.params,
            "batch": size,
            "latency_ms": statistics.median(b for _, b in pairs),
            "base_latency_ms": statistics.median(a for a, _ in pairs),
            "speed_up": statistics.median(a / b for a, b in pairs),
            "latency_ms_batch_1": latency_ms(resized, one, rounds=30, limit_s=0.4, warm_up=warm_up),
            "peak_memory_mib": peak_memory_mib(resized, batch),
            "threads": cell.threads,
            "device": str(protocol.device_of(cell)),
            "hardware": hardware(),
        }
