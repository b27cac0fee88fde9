"""Where things live on disk, and how files are written so that no half of one is ever seen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import platformdirs
from filelock import FileLock

from widthbench.errors import UsageError

_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it


def expanded(given: str) -> Path:
    """A path with "~" and "~user" in front replaced by the home folder that they stand for.

    Raises:
        UsageError: If there is no such user.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"path {given}: there is no home folder of '{Path(given).parts[0]}': write the path in"
            " full"
        ) from error


def settle() -> None:
    """Let relative paths in the environment mean the folder at hand for good, wherever a plug-in
    changes to.
    """
    for name in ("WIDTHBENCH_CACHE", "WIDTHBENCH_DATA", "WIDTHBENCH_WEIGHTS", "WIDTHBENCH_STORE"):
        given = os.environ.get(name)
        if given and (name != "WIDTHBENCH_STORE" or ":" not in given):
            os.environ[name] = str(expanded(given).absolute())


class Lock(FileLock):
    """A lock of ours, in the cache or beside results, that other accounts may take too.

    Attributes:
        tell: Called with "wait" and "work" by a process whose time is counted: waiting for others
            is not its work.
    """

    tell: ClassVar[Callable[[str], None] | None] = None

    def acquire(self, *args: Any, **options: Any) -> Any:
        """Wait for the lock.

        Raises:
            UsageError: If its file cannot be made or opened.
        """
        if Lock.tell is not None:
            Lock.tell("wait")
        try:
            Path(self.lock_file).parent.mkdir(parents=True, exist_ok=True)
            taken = super().acquire(*args, **options)
        except OSError as error:
            raise UsageError(
                f"cannot lock {self.lock_file}: {error.strerror}; choose another folder"
            ) from error
        finally:
            if Lock.tell is not None:
                Lock.tell("work")
        with suppress(OSError):  # another account's, which lets us in
            os.chmod(self.lock_file, 0o666)
        return taken


def cache_dir() -> Path:
    """The cache: ``WIDTHBENCH_CACHE``, else the user's cache folder. Holds grades, base networks
    and finished cells.
    """
    given = os.environ.get("WIDTHBENCH_CACHE")
    return expanded(given) if given else Path(platformdirs.user_cache_dir("widthbench"))


def data_dir() -> Path:
    """Where data sets lie: ``WIDTHBENCH_DATA``, else ``datasets`` in the cache."""
    given = os.environ.get("WIDTHBENCH_DATA")
    return expanded(given) if given else cache_dir() / "datasets"


def weights_dir() -> Path:
    """Where weights files lie: ``WIDTHBENCH_WEIGHTS``, else ``weights`` in the cache."""
    given = os.environ.get("WIDTHBENCH_WEIGHTS")
    return expanded(given) if given else cache_dir() / "weights"


def published_dir() -> Path:
    """Where published results lie: ``results/published`` of a checkout, or the package's own copy
    of it.
    """
    return Path(str(files("widthbench._published")))


def require_writable(folder: Path) -> None:
    """Find out now, not after hours of work, that a folder cannot be written.

    Raises:
        UsageError: If it cannot be made or written.
    """
    above = folder
    try:
        while not above.exists() and above != above.parent:
            above = above.parent
    except OSError as error:  # a name that no file can have
        raise UsageError(
            f"cannot write {str(folder)[:80]}: {error.strerror}; choose another folder"
        ) from error
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(
            f"cannot write {folder}: {above} is not a folder that you may write; set"
            " WIDTHBENCH_CACHE or --results"
        )


def write_atomic(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Args:
        path: Where to; parent folders are made.
        content: Text (UTF-8), bytes, or text in pieces.

    Raises:
        UsageError: If it cannot be written (no such right, no space left); what was there before
            stays.
    """
    pieces = [content] if isinstance(content, str | bytes) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece.encode() if isinstance(piece, str) else piece)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_UMASK)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(
                f"cannot write {path}: {error.strerror}; what was there before is kept"
            ) from error
        raise
