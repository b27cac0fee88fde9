"""A suite's folder of results: records, timings, leaderboard and figures, from what a run measured;
and what is published.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from widthbench.errors import UsageError
from widthbench.experiment import keys, published
from widthbench.experiment.records import Line, Record, read_lines, read_records, write_records
from widthbench.experiment.store import Store
from widthbench.experiment.suites import Suite
from widthbench.paths import Lock, published_dir, write_atomic
from widthbench.report import (
    curves,
    exports,
    figures,
    reproduction,
    tables,
    trajectories,
    widths,
)
from widthbench.report.lines import lines, shape_of
from widthbench.report.timing import read_timings, timings_of

SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
ASIDE = "records.aside.jsonl"  # lines that a report could not take over


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        records: The suite's records.
        folder: Where the files are.
        files: The files.
        text: The short table for a terminal.
        reproduction: How they compare with what was published, in a line; "" if nothing was.
    """

    records: list[Record]
    folder: Path
    files: list[Path]
    text: str
    reproduction: str = ""

    @property
    def failed(self) -> list[Record]:
        """The records of failed cells."""
        return [r for r in self.records if r.status == "failed"]


@dataclass
class _Before:
    """What an earlier report left in a folder.

    Attributes:
        lines: Its sound records.
        aside: Lines that are none.
    """

    lines: list[Line] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)


def collect(
    suite: Suite,
    store: Store,
    before: Iterable[Record] = (),
    fresh: Iterable[Record] = (),
    *,
    replace: bool = False,
) -> list[Record]:
    """What was measured of a suite's cells, here and last: finished records, and the failures of
    those that are not finished.

    Of a cell counts what the run gave that has just ended; else what the store has finished under
    the cell's key; else the later one of the store's failure and the record of an earlier report.
    A record of an earlier report that another kind of device has finished stays, with a warning.

    Args:
        suite: The suite.
        store: Where finished cells are.
        before: Records of an earlier report of the same folder, so that running a part of a suite
            loses nothing: of the cells that the store knows nothing of, since the code has changed,
            or another machine ran them. Each says where it comes from.
        fresh: Records of a run that has just ended; the store is not asked for these.
        replace: Whether another kind of device's record may be replaced.

    Raises:
        UsageError: If there is nothing to show, and what the cells need (data, weights, a
            technique) is not at hand.
    """
    old, new = ({r.cell.identity: r for r in some} for some in (before, fresh))
    collected: list[Record] = []
    candidates = store.cells(at_most=len(suite.cells())) if len(new) < len(suite.cells()) else set()
    absent: set[tuple[str | None, ...]] = set()
    other_device: list[str] = []
    for cell in suite.cells():
        earlier, record = old.get(cell.identity), new.get(cell.identity)
        needs = (cell.dataset, cell.model, cell.checkpoint, cell.of or cell.technique)
        if (
            record is None
            and (candidates is None or cell.identity in candidates)
            and needs not in absent
        ):
            try:
                key = keys.cell_key(cell)
                record = store.get(key) or _later(store.failure(key), earlier)
            except UsageError:  # a key hashes the data: without them the store cannot be asked
                absent.add(needs)
        finished = record and earlier and earlier.status == "done"
        if record and earlier and finished and kind_of(earlier) != kind_of(record) and not replace:
            other_device.append(cell.id)
            record = earlier
        if (record := record or earlier) is not None:
            collected.append(record)
    if other_device:
        warnings.warn(
            f"{len(other_device)} records of an earlier report come from another kind of device,"
            f" and stay ({other_device[0]}, ...): write to another folder (--results)",
            stacklevel=2,
        )
    if not collected:
        for cell in suite.cells()[:1]:
            keys.cell_key(cell)  # says what is not at hand
    return collected


def _later(one: Record | None, other: Record | None) -> Record | None:
    """The one that was made last, by its own word."""
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda r: str(r.provenance.get("when")))


def build(
    suite: Suite,
    results: Path,
    store: Store,
    *,
    time_shapes: bool = True,
    fresh: Iterable[Record] = (),
    timings: Iterable[dict[str, Any]] = (),
    replace: bool = False,
) -> Report:
    """Write what was measured to ``results/SUITE``: records, timings, figures, leaderboard, a
    comparison with what was published.

    Args:
        suite: The suite.
        results: The folder of all results; the suite gets one of its own in it.
        store: Where finished cells are.
        time_shapes: Measure latency and memory of shapes that have none yet; do this only when no
            worker is busy.
        fresh: Records of a run that has just ended, whose keys may be those of other machines.
        timings: Lines of ``timings.jsonl`` that came with them.
        replace: Whether another kind of device's record may be replaced.

    Raises:
        UsageError: If no cell of the suite has a record.
    """
    folder, fresh = results / suite.name, list(fresh)
    nothing = (
        f"suite '{suite.name}' has no finished cell yet: run it first (`widthbench run"
        f" {suite.name}`)"
    )
    if not folder.is_dir() and not fresh and not collect(suite, store):
        raise UsageError(nothing)
    with Lock(
        results / f".{suite.name}.lock"
    ):  # two runs into one folder report one after the other
        before = _before(folder / "records.jsonl")
        known = [line.record for line in before.lines if line.record]
        records = collect(suite, store, known, fresh, replace=replace)
        if not records:
            raise UsageError(nothing)
        _put_aside(suite, folder, before, records)
        timings = timings_of(records, measure=time_shapes, before=[*read_timings(folder), *timings])
        published = (
            published_records(suite)
            if folder.resolve() != published_dir().resolve() / suite.name
            else []
        )
        files = write(suite, folder, records, timings, published)
    text = tables.terminal(suite, records, len(suite.cells()))
    return Report(
        records,
        folder,
        files,
        text,
        reproduction.summary(suite, published, records) if published else "",
    )


def adding(
    suite: Suite, results: Path, store: Store, files: Sequence[Path], *, replace: bool = False
) -> list[Record]:
    """A suite's records in files of other runs, as ``build`` takes them over; a finished record
    beats a failed one.

    Args:
        suite: The suite; records of cells that it does not have are left out.
        results: The folder of all results.
        store: Where finished cells are.
        files: Such as ``records.jsonl``, of another machine, say.
        replace: Whether a record may take the place of a finished one that comes from another kind
            of device.

    Raises:
        UsageError: If a file cannot be read, holds no record of the suite, or one would be
            replaced.
    """
    path = results / suite.name / "records.jsonl"
    cells = {c.identity for c in suite.cells()}
    before = read_records(path) if path.is_file() else []
    with suppress(UsageError):  # nothing here, and no data to look for it with
        before = collect(suite, store, before)
    here = {r.cell.identity: r for r in before}
    latest: dict[str, Record] = {}
    for file in files:
        some = [r for r in read_records(file) if r.cell.identity in cells]
        if not some:
            raise UsageError(f"{file} has no record of suite '{suite.name}'")
        for record in some:
            old = latest.get(record.cell.identity) or here.get(record.cell.identity)
            if old is not None and old.status != "failed" and record.status == "failed":
                continue
            _require_same_device(old, record, file, replace)
            latest[record.cell.identity] = record
    return list(latest.values())


def _require_same_device(old: Record | None, new: Record, file: Path, replace: bool) -> None:
    if old is not None and old.status != "failed" and kind_of(old) != kind_of(new) and not replace:
        raise UsageError(
            f"{file}: {new.cell.id} was measured on {kind_of(new)}, and there is a record from"
            f" {kind_of(old)}, which it would replace: let it (--replace), or leave it out"
        )


def kind_of(record: Record) -> str:
    """The kind of device that a record comes from: "cpu" or "cuda"."""
    return str(record.provenance.get("device", "cpu")).partition(":")[0]


def publish(suite: Suite, results: Path, *, replace: bool = False) -> list[Path]:
    """Put what was measured in the place of what is published, cell by cell; gives the files
    written.

    Cells that were not measured stay as they are published; with nothing measured, the published
    pages are written anew.

    Args:
        suite: The suite.
        results: The folder of all results.
        replace: Whether a record may take the place of a finished one that comes from another kind
            of device.

    Raises:
        UsageError: If there is nothing to publish, this is no checkout, or a record of another
            device would be replaced.
    """
    folder = published_dir() / suite.name
    if not (published_dir().parent.parent / "pyproject.toml").is_file():
        raise UsageError(
            f"{published_dir()} belongs to an installed package: publish from a checkout of the"
            " repository"
        )
    cells = {c.identity for c in suite.cells()}
    merged: dict[str, Record] = {}
    timings: dict[tuple[str, ...], dict[str, Any]] = {}
    for place in (folder, results / suite.name):
        if (place / "records.jsonl").is_file():
            for record in read_records(place / "records.jsonl"):
                if record.cell.identity in cells:
                    _require_same_device(
                        merged.get(record.cell.identity), record, place / "records.jsonl", replace
                    )
                    merged[record.cell.identity] = record
            timings |= {(t["dataset"], t["model"], t["shape"]): t for t in read_timings(place)}
    if not merged:
        raise UsageError(
            f"suite '{suite.name}' has no results in {results}: run it first (`widthbench run"
            f" {suite.name}`)"
        )
    records = in_order(suite, list(merged.values()))
    bases = _publish_bases(records) if suite.bases == "published" else []
    shapes = {(r.cell.dataset, r.cell.network, shape_of(r)) for r in records if r.status == "done"}
    kept = [t for key, t in timings.items() if key in shapes]
    return [*write(suite, folder, records, kept, ()), *bases]


def _publish_bases(records: Sequence[Record]) -> list[Path]:
    """Put the base networks of records beside them, from the cache; those that are there stay."""
    files: list[Path] = []
    for record in records:
        cell = record.cell
        if cell.technique != "base" or record.status != "done" or keys.published_base(cell):
            continue
        source = published.cached(str(record.provenance["base_digest"]))
        if source is None:
            warnings.warn(
                f"{cell.id}: its network is not in this cache, and is not published", stacklevel=3
            )
            continue
        target = published.place(cell, keys.BASE_FIELDS)
        files += published.publish(source, target, record.provenance)
    return files


def write(
    suite: Suite,
    folder: Path,
    records: Sequence[Record],
    timings: Sequence[dict[str, Any]],
    published: Sequence[Record],
) -> list[Path]:
    """Write all files of a suite's folder; gives their paths, ``SHA256SUMS`` last.

    Args:
        suite: The suite.
        folder: Its folder.
        records: In the order of the suite's cells.
        timings: Of their shapes.
        published: What to compare with; nothing if empty.
    """
    write_records(folder / "records.jsonl", records)
    kept = sorted(json.dumps(t, sort_keys=True) for t in timings)
    write_atomic(folder / "timings.jsonl", "".join(text + "\n" for text in kept))
    timings = read_timings(folder)  # as whoever reads the file has them
    files = [folder / "records.jsonl", folder / "timings.jsonl"]
    for name, text in texts(suite, records, timings, file_digest(files[0]), published).items():
        files.append(folder / name)
        write_atomic(files[-1], text)
    pictures = folder / "figures"
    if curves.has_curves(records):
        files += curves.write(records, pictures)
    if trajectories.has_trajectories(records):
        files += trajectories.write(records, pictures)
    files += figures.write(records, pictures, suite.title or suite.name) + widths.write(
        records, pictures
    )
    sums = folder / SUMS
    _clear(sums, files)
    write_atomic(
        sums,
        "".join(f"{file_digest(f)}  {f.relative_to(folder).as_posix()}\n" for f in sorted(files)),
    )
    return [*files, sums]


def published_records(suite: Suite) -> list[Record]:
    """The published records of a suite's cells; none if it was not published, or (named in a
    warning) they are damaged.
    """
    path = published_dir() / suite.name / "records.jsonl"
    try:
        records = read_records(path) if path.is_file() else []
    except UsageError as error:
        warnings.warn(f"nothing is compared with the published results: {error}", stacklevel=2)
        return []
    cells = {c.identity for c in suite.cells()}
    return in_order(suite, [r for r in records if r.cell.identity in cells])


def _clear(sums: Path, files: Sequence[Path]) -> None:
    """Remove what an earlier report wrote and this one does not, unless somebody has changed it
    since.
    """
    for digest, name in read_sums(sums) if sums.is_file() else []:
        path = sums.parent / name
        inside = path.resolve().is_relative_to(sums.parent.resolve())
        if inside and path not in files and path.is_file() and file_digest(path) == digest:
            path.unlink()


def read_sums(path: Path) -> list[tuple[str, str]]:
    """Digests and names in a ``SHA256SUMS``, as they stand there; what is no such line has no
    name.
    """
    parts = (line.partition("  ") for line in path.read_text(errors="replace").splitlines())
    return [(digest, name) for digest, _, name in parts]


def texts(
    suite: Suite,
    records: Sequence[Record],
    timings: Sequence[dict[str, Any]],
    digest: str,
    published: Sequence[Record] = (),
) -> dict[str, str]:
    """All pages of a suite that follow from its records, by file name.

    Args:
        suite: The suite.
        records: As ``records.jsonl`` holds them, in the order of the suite's cells (``in_order``).
        timings: As ``timings.jsonl`` holds them.
        digest: SHA-256 of ``records.jsonl``.
        published: Those to compare with; no page does if there are none.
    """
    pages = leaderboards(suite, records, timings, digest)
    if tables.comparable(suite):
        pages["paired.md"] = tables.paired(suite, records)
    if curves.has_curves(records):
        pages["curves.md"] = curves.page(records, suite.name)
    if trajectories.has_trajectories(records):
        pages["trajectories.md"] = trajectories.page(records, suite.name)
    if published:
        pages[reproduction.NAME] = reproduction.page(suite, published, records)
    return pages


def leaderboards(
    suite: Suite, records: Sequence[Record], timings: Sequence[dict[str, Any]], digest: str
) -> dict[str, str]:
    """The leaderboard as markdown, CSV and LaTeX, by file name.

    Args:
        suite: The suite.
        records: As ``records.jsonl`` holds them, in the order of the suite's cells.
        timings: As ``timings.jsonl`` holds them.
        digest: SHA-256 of ``records.jsonl``.
    """
    cite = exports.citation(suite, records, digest)
    rows = lines(records, suite.cells(), timings, ranked=suite.citable)
    return {
        "leaderboard.md": tables.leaderboard(
            suite, records, timings, len(suite.cells()), digest=digest, cite=cite
        ),
        "leaderboard.csv": exports.csv_text(rows),
        "leaderboard.tex": exports.latex_text(suite, rows),
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
                f"{path}: suite '{suite.name}' has no such cell as {record.cell.id}: `widthbench"
                " report` writes the file anew"
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


def _before(path: Path) -> _Before:
    """What an earlier report left."""
    before = _Before()
    if not path.is_file():
        return before
    lines = read_lines(path)
    before.lines = [line for line in lines if not line.problem]
    bad = [line for line in lines if line.problem]
    if bad:
        before.aside = [line.text for line in bad]
        first = f"the first at {path}:{bad[0].number} ({bad[0].problem})"
        warnings.warn(
            f"{len(bad)} of {len(lines)} earlier records are not taken over, {first}", stacklevel=2
        )
    return before


def _put_aside(suite: Suite, folder: Path, before: _Before, records: Sequence[Record]) -> None:
    """Keep what the new records would lose: damaged lines, cells that the suite does not have,
    results of cells that fail now.
    """
    shown = {r.cell.identity: r for r in records}
    foreign, failing = [], []
    for line in before.lines:
        assert line.record is not None  # of lines without a problem
        now = shown.get(line.record.cell.identity)
        if now is None:
            foreign.append(line)
        elif now.status == "failed" and line.record.status != "failed":
            failing.append(line)
    if foreign:
        assert foreign[0].record is not None
        warnings.warn(
            f"{len(foreign)} earlier records in {folder} are of cells that suite '{suite.name}'"
            f" does not have, the first of {foreign[0].record.cell.id}: give another suite another"
            " name",
            stacklevel=3,
        )
    if failing:
        warnings.warn(f"{len(failing)} cells failed that had results in {folder}", stacklevel=3)
    lost = [*before.aside, *(line.text for line in (*foreign, *failing))]
    if not lost:
        return
    path = folder / ASIDE
    kept = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    write_atomic(path, "".join(f"{line}\n" for line in dict.fromkeys([*kept, *lost])))
    warnings.warn(f"{len(lost)} earlier records are kept in {path}", stacklevel=3)
