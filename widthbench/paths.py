"""Where things live on disk, and how files are written so that no half of one is ever seen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import platformdirs

from widthbench.errors import UsageError


def expanded(given: str) -> Path:
    """A path with "~" and "~user" in front replaced by the home folder that they stand for.

    Raises:
        UsageError: If there is no such user.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise UsageError(f"path {given}: there is no home folder of '{Path(given).parts[0]}': write the path in full") from error


def cache_dir() -> Path:
    """The cache: ``WIDTHBENCH_CACHE``, else the user's cache folder. Holds grades, base networks and finished cells."""
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


def require_writable(folder: Path) -> None:
    """Find out now, not after hours of work, that a folder cannot be written.

    Raises:
        UsageError: If it cannot be made or written.
    """
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"cannot write {folder}: {above} is not a folder that you may write; set WIDTHBENCH_CACHE or --results")


def write_atomic(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Args:
        path: Where to; parent folders are made.
        content: Text (UTF-8), bytes, or text in pieces.

    Raises:
        UsageError: If it cannot be written (no such right, no space left); what was there before stays.
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
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"cannot write {path}: {error.strerror}; what was there before is kept") from error
        raise
