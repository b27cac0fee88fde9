"""A process of its own for cells, so that a plug-in that ends it, hangs in it or fills it ends one
cell and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from widthbench.children import Child, ChildDied, ChildRefused, memory_mib
from widthbench.experiment.limits import Limits

if TYPE_CHECKING:
    from widthbench.experiment.cell import Cell
    from widthbench.experiment.records import Record

ANSWER = "widthbench.engines.inside:answer"  # by which its process is known among others
GRACE_S = 120.0  # what starting a child may take: imports, the first look at a GPU


class WorkerError(RuntimeError):
    """A worker that was asked for a cell after it had been closed."""


class Worker:
    """A child process that runs cells, one after another.

    A cell of another distribution's technique is the last of its process, so that nothing it
    changed or left behind there reaches another cell.

    Args:
        env: Variables for the child, besides those of this process.

    Attributes:
        code: Digest of the code that the last record comes from (``code_of``); None of a failure
            that this process wrote.
        child: The process.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self.code: str | None = None
        self.child = Child(ANSWER, env=env)
        self._over = False

    def run(self, cell: Cell, limits: Limits | None = None, *, bar: bool = False) -> Record:
        """The cell's record, as ``protocol.run_cell`` gives it; a failed one, with its cause, if
        the process ends or is ended.

        A process that was killed from outside (by the system for want of memory, by a person) gets
        a second chance.

        Args:
            cell: What to run.
            limits: What it may take.
            bar: Show progress bars.

        Raises:
            UsageError: As ``protocol.run_cell``: the cell itself makes no sense, or its record
                cannot be written.
            WorkerError: If the worker is closed meanwhile.
        """
        from widthbench.errors import UsageError
        from widthbench.experiment.records import Record
        from widthbench.experiment.store import Store
        from widthbench.technique import registry

        foreign = not registry.built_in(cell.of or cell.technique)
        if foreign:
            from widthbench.experiment import keys  # and torch: in every task of Ray that is much

            if known := Store().get(keys.cell_key(cell)):  # for which no process is worth starting
                self.code = code_of(cell)
                return known
        self.code, why = None, ""
        request = {"cell": cell.model_dump(mode="json"), "bar": bar}
        for last in (False, True):
            if self._over:
                raise WorkerError(f"the worker of {cell.id} was closed")
            clock = _Clock(limits or Limits(), self.child)
            try:
                answer = self.child.ask(request, clock)
            except ChildRefused as error:
                self.child.close()
                if not foreign:
                    raise UsageError(str(error)) from None
                # it may have spoilt the process, so that not even its record could be written
                why = str(error)
                break
            except ChildDied as error:
                twice = "its process was killed twice by"
                why = str(error).replace("its process was killed by", twice)
                if last or not (error.from_outside or clock.starting):
                    break
                continue
            finally:
                if foreign:
                    self.child.close()
            record = Record.model_validate(answer["record"])
            if record.cell.identity == cell.identity:
                self.code = answer["code"]
                return record
            why = f"its process answered with a record of {record.cell.id}"
            break
        if self._over:
            raise WorkerError(f"the worker of {cell.id} was closed")
        self.child.close()
        return failure(cell, why)

    def close(self) -> None:
        """End the child, and all that it started; no cell is run any more."""
        self._over = True
        self.child.close()


def code_of(cell: Cell) -> str:
    """Digest of the code that decides a cell's record: ours, and the technique's."""
    from widthbench.cache import digest_of
    from widthbench.experiment import keys
    from widthbench.provenance import code_digest

    return digest_of([code_digest(*keys.CELL_CODE), keys.technique_digest(cell)])


class _Clock:
    """A watch over a cell: time that counts against a limit (all but waiting for others), and
    memory.
    """

    def __init__(self, limits: Limits, child: Child) -> None:
        self._limits, self._child = limits, child
        self._since, self._left = time.monotonic(), GRACE_S
        self._stage = "start"

    def __call__(self, stage: str) -> str:
        """Why the cell is ended; "" if it is not.

        Args:
            stage: Where the child says that it is: "ready" (for a cell), "wait" (at a lock),
                "work"; "" if it says nothing.
        """
        if stage:
            self._enter(stage)
        return self._late() or self._large()

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        if stage == "ready":
            limit = self._limits.time_s
            self._left = float("inf") if limit is None else limit
        elif self._stage != "wait":
            self._left -= now - self._since
        self._since, self._stage = now, stage

    @property
    def starting(self) -> bool:
        """Whether the child has not yet said that it is there."""
        return self._stage == "start"

    def _late(self) -> str:
        if self._stage == "wait" or time.monotonic() - self._since <= self._left:
            return ""
        if self._stage == "start":
            return f"its process did not start within {GRACE_S:g} s"
        return f"ran longer than the {self._limits.time_s:g} s that its suite allows (time_limit)"

    def _large(self) -> str:
        limit, pid = self._limits.memory_mib, self._child.pid
        if limit is None or pid is None or (used := memory_mib(pid)) <= limit:
            return ""
        allowed = f"more than the {limit:g} MiB that its suite allows (memory_limit)"
        return f"took {used:.0f} MiB of memory, {allowed}"


def failure(cell: Cell, reason: str) -> Record:
    """The record of a cell whose process has ended, kept in the store as failures are: reported,
    and tried again by a next run.
    """
    from widthbench.experiment import keys
    from widthbench.experiment.records import Record
    from widthbench.experiment.store import Store

    record = Record(
        key=keys.cell_key(cell),
        cell=cell,
        status="failed",
        reason=reason,
        provenance=keys.machine_of(cell),
    )
    Store().put(record)
    return record
