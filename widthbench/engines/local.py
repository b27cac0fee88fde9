"""Run cells on this machine, in one worker process or several. Imports nothing heavy, so that
workers can be pinned first.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from widthbench import parallel
from widthbench.engines.worker import Worker
from widthbench.experiment.limits import Limits

if TYPE_CHECKING:
    from widthbench.experiment.cell import Cell
    from widthbench.experiment.records import Record


def run(
    cells: Sequence[Cell],
    *,
    jobs: int,
    done: Callable[[Record], None],
    limits: Mapping[str, Limits] | None = None,
    within: float | None = None,
) -> bool:
    """Run cells, those of one base network one after another in one process.

    Args:
        cells: What to run.
        jobs: Number of worker processes; 1 shows progress bars.
        done: Called in this thread with each record as it is finished.
        limits: What a cell may take, by its identity; no limit for those that are not there.
        within: Seconds after which cells that are not finished are stopped, and no other is begun.

    Returns:
        Whether there was time for all.

    Raises:
        UsageError: If a cell makes no sense, or its record cannot be written; what is finished is
            kept.
    """
    over = math.inf if within is None else time.monotonic() + within
    if (
        parallel.launched()
    ):  # several processes compute each cell together: they are this one and its sisters
        for cell in cells:
            if not parallel.broadcast(lambda: time.monotonic() < over):
                return False
            done(_here(cell))
        return True
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    waiting: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
    for group in groups.values():
        waiting.put(group)
    finished: queue.SimpleQueue[Record | BaseException | None] = queue.SimpleQueue()
    threads = max((c.threads for c in cells), default=1)
    workers = [Worker(_pinned(i, threads)) for i in range(min(jobs, len(groups)))]
    stop = threading.Event()

    def work(worker: Worker) -> None:
        try:
            while not stop.is_set():
                for cell in waiting.get_nowait():
                    if not stop.is_set():
                        finished.put(
                            worker.run(cell, (limits or {}).get(cell.identity), bar=jobs == 1)
                        )
        except queue.Empty:
            pass
        except BaseException as error:  # re-raised below
            finished.put(error)
        finally:
            finished.put(None)

    hands = [threading.Thread(target=work, args=(w,), daemon=True) for w in workers]
    for hand in hands:
        hand.start()
    try:
        left = len(hands)
        while left:
            try:
                answer = finished.get(
                    timeout=None if within is None else max(0, over - time.monotonic())
                )
            except queue.Empty:
                return False
            if isinstance(answer, BaseException):
                raise answer
            if answer is None:
                left -= 1
            else:
                done(answer)
        return True
    finally:
        stop.set()
        for worker in workers:
            worker.close()


def _pinned(index: int, threads: int) -> dict[str, str]:
    """What gives a worker its own GPU, out of the caller's, and its threads, before torch is
    imported.
    """
    env = {"OMP_NUM_THREADS": str(threads)}
    visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    return env | ({"CUDA_VISIBLE_DEVICES": visible[index % len(visible)]} if visible else {})


def _here(cell: Cell) -> Record:
    from widthbench.experiment.protocol import run_cell
    from widthbench.experiment.store import Store
    from widthbench.progress import bar

    return run_cell(cell, Store(), progress=bar)
