"""A process of its own for cells, so that a plug-in that ends it, hangs in it or fills it ends one
cell and nothing else.

Parent and child exchange lines of JSON over pipes. What the child prints goes to standard error. It
ends when its parent does.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from widthbench.experiment.limits import Limits

if TYPE_CHECKING:
    from widthbench.experiment.cell import Cell
    from widthbench.experiment.records import Record

POLL_S = 0.2  # between two looks at the clock and at memory
MARK = "WIDTHBENCH_WORKER"  # set for a worker and inherited by all that it starts
GRACE_S = 120.0  # what starting a child may take: imports, the first look at a GPU


class WorkerError(RuntimeError):
    """A worker that was asked for a cell after it had been closed."""


class Worker:
    """A child process that runs cells, one after another; a new one is started whenever one has
    ended.

    A cell of another distribution's technique is the last of its process, so that nothing it
    changed or left behind there reaches another cell.

    Args:
        env: Variables for the child, besides those of this process.

    Attributes:
        code: Digest of the code that the last record comes from (``code_of``); None of a failure
            that this process wrote.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self.code: str | None = None
        self._mark = uuid.uuid4().hex
        self._env = {**(env or {}), MARK: self._mark}
        self._child: subprocess.Popen[bytes] | None = None
        self._over = False
        self._asked = 0

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

            if found := Store().get(keys.cell_key(cell)):  # for which no process is worth starting
                self.code = code_of(cell)
                return found
        answer: dict[str, Any] = {}
        for last in (False, True):
            if not self._over:
                answer = self._ask(
                    {"cell": cell.model_dump(mode="json"), "bar": bar}, limits or Limits()
                )
            if foreign or "record" not in answer:
                self._end()
            if "record" in answer:
                record = Record.model_validate(answer["record"])
                if record.cell.identity == cell.identity:
                    self.code = answer.get("code")
                    return record
                answer = {"died": f"its process answered with a record of {record.cell.id}"}
            if "error" in answer:
                if (
                    foreign
                ):  # it may have spoilt the process, so that not even its record could be written
                    self.code = None
                    return failure(cell, answer["error"])
                raise UsageError(answer["error"])
            if self._over:
                raise WorkerError(f"the worker of {cell.id} was closed")
            if last or not answer.get("again"):
                break
        self.code = None
        return failure(cell, answer["died"])

    def close(self) -> None:
        """End the child, and all that it started; no cell is run any more."""
        self._over = True
        self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.poll() is None:  # else its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        _kill_marked(self._mark)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _ask(self, message: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
        """Send a message, and wait for the answer; {"died": why} if there is none, "again" if it is
        worth another try.
        """
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "widthbench.engines.worker"],
                env={**os.environ, **self._env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        child = self._child
        assert child.stdin is not None
        self._asked += 1
        try:
            child.stdin.write(json.dumps({**message, "id": self._asked}).encode() + b"\n")
            child.stdin.flush()
            return self._wait(child, limits)
        except BrokenPipeError:
            return self._ended(child)
        except BaseException:  # Ctrl-C: nobody wants the answer any more
            self._end()
            raise

    def _wait(self, child: subprocess.Popen[bytes], limits: Limits) -> dict[str, Any]:
        assert child.stdout is not None
        clock, text = _Clock(GRACE_S), b""
        with selectors.DefaultSelector() as ready:
            ready.register(child.stdout, selectors.EVENT_READ)
            while True:
                if not ready.select(POLL_S):
                    if child.poll() is not None:  # what it started may still hold the pipe
                        return self._ended(child)
                else:
                    piece = os.read(child.stdout.fileno(), 1 << 20)
                    if not piece:
                        return self._ended(child)
                    text += piece
                    while b"\n" in text:
                        line, _, text = text.partition(b"\n")
                        answer = _answer(line, self._asked)
                        if "at" in answer:
                            clock.enter(answer["at"], limits.time_s)
                        elif answer:
                            return answer
                if why := clock.over() or _too_large(child.pid, limits.memory_mib):
                    self._end()
                    return {"died": why, "again": clock.starting}

    def _ended(self, child: subprocess.Popen[bytes]) -> dict[str, Any]:
        try:
            code = child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._end()
            return {"died": "its process closed the way to its parent"}
        self._end()
        if code >= 0:
            return {"died": f"its process ended with exit code {code} without a word"}
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        if name in ("SIGKILL", "SIGTERM"):
            return {
                "died": f"its process was killed twice by {name}, from outside (out of memory?)",
                "again": True,
            }
        return {"died": f"its process crashed ({name})"}


def _kill_marked(mark: str) -> None:
    """Kill all that a worker has started, in whatever session and below whatever parent, and the
    worker last.
    """
    import psutil

    me = os.getpid()
    for process in sorted(psutil.process_iter(), key=lambda p: p.pid == me):
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                process.kill()


def code_of(cell: Cell) -> str:
    """Digest of the code that decides a cell's record: ours, and the technique's."""
    from widthbench.cache import digest_of
    from widthbench.experiment import keys
    from widthbench.experiment.cell import CONTROLS
    from widthbench.provenance import code_digest, source_digest
    from widthbench.technique import registry

    technique = cell.of or cell.technique
    theirs = None if technique in CONTROLS else source_digest(registry.load(technique))
    return digest_of([code_digest(*keys.CELL_CODE), theirs])


def _answer(line: bytes, asked: int) -> dict[str, Any]:
    """An answer to the request of that number; {} for what is none, which a plug-in may have
    written.
    """
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    known = isinstance(answer, dict) and answer.pop("id", None) == asked
    return answer if known and answer.keys() <= {"at", "record", "code", "error", "died"} else {}


class _Clock:
    """Time that counts against a limit: all but waiting for others."""

    def __init__(self, grace_s: float) -> None:
        self._since, self._left, self._limit = time.monotonic(), grace_s, 0.0
        self._stage = "start"

    def enter(self, stage: str, limit: float | None) -> None:
        """The child says where it is: "ready" (for a cell), "wait" (at a lock), "work"."""
        now = time.monotonic()
        if stage == "ready":
            self._left = self._limit = float("inf") if limit is None else limit
        elif self._stage != "wait":
            self._left -= now - self._since
        self._since, self._stage = now, stage

    @property
    def starting(self) -> bool:
        """Whether the child has not yet said that it is there."""
        return self._stage == "start"

    def over(self) -> str:
        """Why time is over; "" if it is not."""
        if self._stage == "wait" or time.monotonic() - self._since <= self._left:
            return ""
        if self._stage == "start":
            return f"its process did not start within {GRACE_S:g} s"
        return f"ran longer than the {self._limit:g} s that its suite allows (time_limit)"


def _too_large(pid: int, limit_mib: float | None) -> str:
    if limit_mib is None:
        return ""
    import psutil

    total = 0
    with suppress(psutil.Error):  # it has ended
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    if total <= limit_mib * 2**20:
        return ""
    return (
        f"took {total / 2**20:.0f} MiB of memory, more than the {limit_mib:g} MiB that its suite"
        " allows (memory_limit)"
    )


def failure(cell: Cell, reason: str) -> Record:
    """The record of a cell whose process has ended, kept in the store as failures are: reported,
    and tried again by a next run.
    """
    from widthbench.data import sources
    from widthbench.experiment import keys
    from widthbench.experiment.records import Record
    from widthbench.experiment.store import Store
    from widthbench.provenance import stamp

    where = {
        **stamp(),
        "threads": cell.threads,
        "dtype": "float32",
        "device": str(keys.device_of(cell)),
        "seed": cell.seed,
    }
    where |= {"processes": 1, "dataset_digest": sources.load(cell.dataset).digest}
    record = Record(
        key=keys.cell_key(cell), cell=cell, status="failed", reason=reason, provenance=where
    )
    Store().put(record)
    return record


def _serve() -> None:
    """What the child does: cells from its standard input, answers to what was its standard
    output.
    """
    commands = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a plug-in that reads or prints
    os.dup2(2, 1)
    faulthandler.enable()  # where a plug-in crashes is seen
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # what is printed is seen, also if the process is then ended
    inbox: queue.Queue[bytes] = queue.Queue()
    mark = os.environ[MARK]  # before a plug-in may change it

    def listen() -> None:
        for line in commands:
            inbox.put(line)
        _kill_marked(mark)  # the parent has ended
        os._exit(0)

    me, current = os.getpid(), [0]

    def say(**answer: Any) -> None:
        if os.getpid() == me:  # not a copy of this process that a plug-in has made
            # what a plug-in wrote there, without an end of line, is a line of its own
            answers.write("\n" + json.dumps({**answer, "id": current[0]}) + "\n")
            answers.flush()

    threading.Thread(target=listen, daemon=True).start()
    from widthbench.errors import UsageError
    from widthbench.experiment.cell import Cell
    from widthbench.experiment.protocol import run_cell
    from widthbench.experiment.store import Store
    from widthbench.paths import Lock, settle
    from widthbench.progress import bar, quiet

    settle()
    Lock.tell = lambda at: say(
        at=at
    )  # waiting for one that computes the same cell, trains its base, decodes its images

    while True:
        message = json.loads(inbox.get())
        current[0] = message["id"]
        say(at="ready")
        cell = Cell.model_validate(message["cell"])
        try:
            record = run_cell(cell, Store(), progress=bar if message["bar"] else quiet)
            say(record=record.model_dump(mode="json"), code=code_of(cell))
        except UsageError as error:
            say(error=str(error))
        except BaseException as error:  # a plug-in that exits, or is interrupted by itself
            say(died=f"{type(error).__name__}: {error}")
        if os.getpid() != me:
            os._exit(0)


if __name__ == "__main__":
    _serve()
