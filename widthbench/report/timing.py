"""Latency and peak memory of each distinct shape: measured one after the other, in a process that
no plug-in has touched.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from widthbench import cache
from widthbench.children import Child, ChildDied, ChildRefused, Say
from widthbench.errors import UsageError
from widthbench.experiment import bases, keys, protocol
from widthbench.experiment.controls import fresh_at
from widthbench.experiment.records import Record, digest_of
from widthbench.paths import cache_dir
from widthbench.provenance import code_digest, hardware, versions
from widthbench.report.lines import shape_of
from widthbench.training.measuring import latency_ms, peak_memory_mib

BATCH = 64
BATCH_GPU = 1024  # of small images: what fills a card
ROUNDS = 5


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
        raise UsageError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"
        ) from error
    timings = []
    for number, line in enumerate(text, 1):
        try:
            timings.append(json.loads(line))
            _Timing.model_validate(timings[-1])
        except (ValueError, RecursionError) as error:  # pydantic's are ValueErrors
            raise UsageError(
                f"{path}:{number} is no timing: {str(error).splitlines()[0]}"
            ) from error
    return timings


def read_timings(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``timings.jsonl``; none if it is absent or damaged, since what it holds can be
    measured again.
    """
    try:
        return parse_timings(folder / "timings.jsonl")
    except UsageError:
        return []


def timings_of(
    records: Sequence[Record], *, measure: bool, before: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Latency and peak memory per distinct shape: from the cache, from an earlier report, or
    measured now.

    A resized network's speed-up is the median over rounds that time base and resized network in
    turn.

    Args:
        records: Finished ones count.
        measure: Whether to measure what is missing.
        before: An earlier report's; they stand in for what the cache has nothing of: those of this
            hardware, or all where nothing is measured.
    """
    kept = [t for t in before if t.get("hardware") == hardware() or not measure]
    old = {(t["dataset"], t["model"], t["shape"]): t for t in kept}
    timings: dict[tuple[str, str, str], dict[str, Any]] = {}
    waiting: dict[tuple[str, str, str], Record] = {}
    seen: dict[tuple[str, str, str], None] = {}
    for record in records:
        key = (record.cell.dataset, record.cell.network, shape_of(record))
        if record.status != "done" or key in seen:
            continue
        seen[key] = None
        path = cache_dir() / "timings" / f"{_timing_key(record)}.json"
        damaged = path.exists()
        if cached := _cached_timing(path):
            timings[key] = cached
        elif measure and (damaged or key not in old):
            waiting[key] = record
        elif key in old:
            timings[key] = old[key]
    for key, timing in zip(waiting, measured(list(waiting.values())), strict=False):
        timings[key] = timing
        cache.write_json(cache_dir() / "timings" / f"{_timing_key(waiting[key])}.json", timing)
    return [timings[key] for key in seen if key in timings]


def measured(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """The timing of each record's shape, by a process of its own: plug-ins that this one has
    imported may have changed torch.

    Args:
        records: Finished ones, one for each shape.

    Yields:
        As many as could be measured; a process that ends before the last is named in a warning.
    """
    with Child(f"{__name__}:measure") as child:
        for count, record in enumerate(records):
            plain = record.model_copy(update={"series": {}, "trace": ""}).model_dump(mode="json")
            try:
                timing = child.ask(plain)
            except (ChildDied, ChildRefused) as died:
                warnings.warn(
                    f"latencies of {len(records) - count} shapes were not measured: {died}",
                    stacklevel=2,
                )
                return
            yield timing


def _cached_timing(path: Path) -> dict[str, Any] | None:
    """A timing from the cache; None if there is none, or (named in a warning) it is damaged."""
    timing = cache.read_json(path, "timing")
    try:
        if timing is not None:
            _Timing.model_validate(timing)
    except ValueError as error:
        cache.damaged(path, "timing", str(error).splitlines()[0])
        return None
    return timing


def _timing_key(record: Record) -> str:
    cell = record.cell
    return digest_of(
        {
            "shape": [
                cell.dataset,
                cell.model,
                cell.model_args,
                cell.size,
                record.widths,
                cell.threads,
            ],
            "device": str(keys.device_of(cell)),
            "hardware": hardware(),
            "versions": versions(),
            "code": code_digest("training/measuring.py", "networks", "width", "report/timing.py"),
        }
    )[:40]


def measure(plain: Mapping[str, Any], _: Say) -> dict[str, Any]:
    """The timing of a record's shape, in the process that measures."""
    record = Record.model_validate(plain)
    cell = record.cell
    with protocol.pinned(cell):
        full = bases.fresh_model(cell, 0).eval()
        resized = fresh_at(cell, record.widths, 0)[0]
        resized.eval()
        one = bases.example_input(cell)
        heavy = (
            one.device.type == "cpu" and cell.size > 64
        )  # a batch of 64 would take a CPU most of an hour
        size, rounds, warm_up = (1, 2, 1) if heavy else (BATCH, ROUNDS, 5)
        if one.device.type == "cuda" and cell.size <= 64:
            size = BATCH_GPU
        batch = one.expand(size, -1, -1, -1).contiguous()
        pairs = [
            tuple(
                latency_ms(m, batch, rounds=15, limit_s=0.4, warm_up=warm_up)
                for m in (full, resized)
            )
            for _ in range(rounds)
        ]
        return {
            "dataset": cell.dataset,
            "model": cell.network,
            "shape": shape_of(record),
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
            "device": str(keys.device_of(cell)),
            "hardware": hardware(),
        }
