"""Run cells on this machine, in one process or several. Imports nothing heavy, so that workers can be pinned first."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from widthbench.records import Cell, Record


class WorkerError(RuntimeError):
    """A worker process that ended without a word."""


def run(cells: Sequence[Cell], *, jobs: int, done: Callable[[Record], None]) -> None:
    """Run cells, those of one base network in one process.

    Args:
        cells: What to run.
        jobs: Number of worker processes; 1 runs in this one, with progress bars.
        done: Called in this process with each record as it is finished.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    if jobs <= 1:
        for cell in cells:
            done(_one(cell, bar=True))
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    threads = max((c.threads for c in cells), default=1)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_pin, initargs=(counter, threads))
    try:
        waiting = [pool.submit(_group, group) for group in groups.values()]
        for future in as_completed(waiting):
            for record in future.result():
                done(record)
    except BrokenProcessPool as error:
        pool.shutdown(wait=False, cancel_futures=True)
        raise WorkerError("a worker died (out of memory?); finished cells are kept: run again with fewer --jobs") from error
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _pin(counter: object, threads: int) -> None:
    """Give this worker its own GPU, out of the caller's, and its threads, before torch is imported."""
    with counter.get_lock():  # type: ignore[attr-defined]
        index = counter.value  # type: ignore[attr-defined]
        counter.value += 1  # type: ignore[attr-defined]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index % len(visible)]


def _group(cells: list[Cell]) -> list[Record]:
    return [_one(cell, bar=False) for cell in cells]


def _one(cell: Cell, *, bar: bool) -> Record:
    from widthbench.protocol import run_cell
    from widthbench.records import Store
    from widthbench.task import bar as shown
    from widthbench.task import quiet

    return run_cell(cell, Store(), progress=shown if bar else quiet)
