"""Child processes: code runs in one so that a crash, a hang or an exit there ends nothing else.

Parent and child exchange lines of JSON over pipes. What the child prints goes to standard error. It
ends when its parent does, with all that it has started. (Not here: ``sensitivity.ablation`` sends
tensors to loky's workers, a ``DataLoader`` has its own, and other programs are run by
``subprocess``.)
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

POLL_S = 0.2  # seconds between two calls of a watch
MARK = "WIDTHBENCH_WORKER"  # set for a child and inherited by all that it starts
ENDINGS = {-s.value: s.name for s in signal.Signals}

Say = Callable[[str], None]
Answer = Callable[[Any, Say], Any]
Watch = Callable[[str], str]


class ChildDied(RuntimeError):
    """A child that ended, or was ended, before it answered.

    Attributes:
        how: The signal or exit code, ``"SIGSEGV"`` or ``"exit code 3"``; "" if we ended it, or it
            gave the reason itself.
        from_outside: Whether something other than itself killed it (the system for want of
            memory, a person).
    """

    def __init__(self, reason: str, how: str = "", *, from_outside: bool = False) -> None:
        super().__init__(reason)
        self.how, self.from_outside = how, from_outside


class ChildRefused(RuntimeError):
    """A request that makes no sense: the child's ``UsageError``."""


class Child:
    """A process that answers requests, one after another; a new one is started whenever one has
    ended.

    Args:
        answer: ``"module:function"`` that answers a request, as ``answer(request, say)``: both
            plain data; ``say(stage)`` reaches the watch.
        env: Variables for the child, besides those of this process.
        path: Where it looks for modules; as Python does if None.
        silent: What it prints goes nowhere.
    """

    def __init__(
        self,
        answer: str,
        *,
        env: Mapping[str, str] | None = None,
        path: list[str] | None = None,
        silent: bool = False,
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._env = {**(env or {}), MARK: self._mark}
        self._command = [sys.executable, "-P", "-m", "widthbench.children", answer]
        self._command += [json.dumps(path)] if path is not None else []
        self._errors = subprocess.DEVNULL if silent else None
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0

    @property
    def pid(self) -> int | None:
        """Its process; None while there is none."""
        return None if self._process is None else self._process.pid

    def ask(self, request: Any, watch: Watch | None = None, limit_s: float | None = None) -> Any:
        """The answer to a request.

        Args:
            request: Plain data, as JSON has it.
            watch: Called with each stage that the child says, "ready" first, and with "" every
                ``POLL_S`` seconds; the child is ended for what it returns, if that is not "".
            limit_s: Seconds after which the child is ended.

        Raises:
            ChildDied: If the process ends, or is ended.
            ChildRefused: If it raises a ``UsageError``.
        """
        over = None if limit_s is None else time.monotonic() + limit_s

        def look(stage: str) -> str:
            if over is not None and time.monotonic() > over:
                return f"took more than {limit_s:g} s"
            return watch(stage) if watch else ""

        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
            )
        process = self._process
        assert process.stdin is not None
        self._asked += 1
        try:
            process.stdin.write(
                json.dumps({"request": request, "id": self._asked}).encode() + b"\n"
            )
            process.stdin.flush()
            reply = self._wait(process, look)
        except BrokenPipeError:
            raise self._ended(process) from None
        except BaseException:  # Ctrl-C, too: nobody wants the answer any more
            self.close()
            raise
        if "died" in reply:
            raise ChildDied(reply["died"])
        if "refused" in reply:
            raise ChildRefused(reply["refused"])
        return reply["answer"]

    def _wait(self, process: subprocess.Popen[bytes], look: Watch) -> dict[str, Any]:
        assert process.stdout is not None
        text = b""
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while True:
                why = look("")
                if not ready.select(POLL_S):
                    if process.poll() is not None:  # what it started may still hold the pipe
                        raise self._ended(process)
                else:
                    piece = os.read(process.stdout.fileno(), 1 << 20)
                    if not piece:
                        raise self._ended(process)
                    text += piece
                    while b"\n" in text:
                        line, _, text = text.partition(b"\n")
                        said = _said(line, self._asked)
                        if "at" in said:
                            why = look(said["at"])
                        elif said:
                            return said
                if why:
                    raise ChildDied(why)

    def _ended(self, process: subprocess.Popen[bytes]) -> ChildDied:
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.close()
            return ChildDied("its process closed its pipe to the parent")
        self.close()
        if code >= 0:
            how = f"exit code {code}"
            return ChildDied(f"its process ended with {how} without a word", how)
        how = ENDINGS.get(code, str(-code))
        if how in ("SIGKILL", "SIGTERM"):
            why = f"its process was killed by {how}, from outside (out of memory?)"
            return ChildDied(why, how, from_outside=True)
        return ChildDied(f"its process crashed ({how})", how)

    def close(self) -> None:
        """End the process, and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:  # else its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        _kill_marked(self._mark)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def memory_mib(pid: int) -> float:
    """Main memory of a process and all below it, MiB; 0 once it has ended."""
    import psutil

    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total / 2**20


def _kill_marked(mark: str) -> None:
    """Kill all that a child has started, in whatever session and below whatever parent, and the
    child last.
    """
    import psutil

    me = os.getpid()
    for process in sorted(psutil.process_iter(), key=lambda p: p.pid == me):
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                process.kill()


def _said(line: bytes, asked: int) -> dict[str, Any]:
    """What a child says to the request of that number; {} for any other line, which foreign code
    may have written.
    """
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    known = isinstance(said, dict) and said.pop("id", None) == asked
    return said if known and said.keys() <= {"at", "answer", "died", "refused"} else {}


def _serve(answer: Callable[[], Answer]) -> None:
    """The child's loop: reads requests from its standard input, writes answers to what was its
    standard output.
    """
    commands = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # foreign code that reads or prints
    os.dup2(2, 1)
    faulthandler.enable()  # where foreign code crashes is seen
    if isinstance(sys.stdout, io.TextIOWrapper):
        # what is printed is seen, also if the process is then ended
        sys.stdout.reconfigure(line_buffering=True)
    inbox: queue.Queue[bytes] = queue.Queue()
    mark = os.environ[MARK]  # before foreign code may change it

    def listen() -> None:
        for line in commands:
            inbox.put(line)
        _kill_marked(mark)  # the parent has ended
        os._exit(0)

    me = os.getpid()

    def say(number: int, **words: Any) -> None:
        if os.getpid() == me:  # not a copy of this process that foreign code has made
            # what foreign code wrote there, without an end of line, is a line of its own
            answers.write("\n" + json.dumps({**words, "id": number}) + "\n")
            answers.flush()

    threading.Thread(target=listen, daemon=True).start()
    from widthbench.errors import UsageError

    call = answer()
    while True:
        message = json.loads(inbox.get())
        tell = functools.partial(say, message["id"])
        tell(at="ready")

        def stage(name: str, tell: Callable[..., None] = tell) -> None:
            tell(at=name)

        try:
            tell(answer=call(message["request"], stage))
        except UsageError as error:
            tell(refused=str(error))
        except BaseException as error:  # foreign code that exits, or is interrupted by itself
            tell(died=f"{type(error).__name__}: {error}")
        if os.getpid() != me:
            os._exit(0)


def _main(answer: str, path: str = "null") -> None:
    if (places := json.loads(path)) is not None:
        sys.path[:] = places
    module, _, name = answer.partition(":")
    _serve(lambda: getattr(importlib.import_module(module), name))


if __name__ == "__main__":
    _main(*sys.argv[1:])
