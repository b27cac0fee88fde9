"""Files of the cache: each with a digest of what it holds, and a twin at a URL where several
machines share one store.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from widthbench.errors import UsageError
from widthbench.paths import cache_dir, expanded, write_atomic

STORE = "WIDTHBENCH_STORE"
DIGEST = 32  # bytes of SHA-256 in front of what is not JSON


def write(path: Path, content: bytes, *, shared: bool = True) -> None:
    """Write bytes behind their SHA-256, atomically.

    Args:
        path: Where to.
        content: What.
        shared: Also put it into the store that ``WIDTHBENCH_STORE`` names.

    Raises:
        UsageError: If it cannot be written.
    """
    write_atomic(path, hashlib.sha256(content).digest() + content)
    if shared:
        push(path)


def read(path: Path, what: str) -> bytes | None:
    """Bytes that ``write`` wrote; None if there are none, or (named in a warning) they are damaged.

    Args:
        path: The file; where it is not there, the store is asked.
        what: For the warning: "state", "base network".
    """

    def content(blob: bytes) -> bytes | None:
        return blob[DIGEST:] if hashlib.sha256(blob[DIGEST:]).digest() == blob[:DIGEST] else None

    return _read(path, what, content)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain data as JSON, with the field "digest" over all others, atomically; and put it
    into the store.

    Raises:
        UsageError: If it cannot be written.
    """
    write_atomic(path, json.dumps({"digest": digest_of(data), **data}, indent=1))
    push(path)


def read_json(path: Path, what: str) -> dict[str, Any] | None:
    """Data that ``write_json`` wrote; None if there are none, or (named in a warning) they are
    damaged. Arguments as ``read``.
    """

    def content(blob: bytes) -> dict[str, Any] | None:
        try:
            data: dict[str, Any] = json.loads(blob)
            return data if data.pop("digest") == digest_of(data) else None
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return None

    return _read(path, what, content)


def digest_of(value: Any) -> str:
    """SHA-256 over a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    """A value as JSON in the one form that is digested: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def damaged(path: Path, what: str, why: str = "its digest does not match") -> None:
    """Say that a file is of no use; what is made again replaces it."""
    warnings.warn(f"damaged {what} {path} ({why}): it is made again", stacklevel=3)


def _read(path: Path, what: str, content: Any) -> Any:
    for last in (False, True):
        try:
            if (kept := content(path.read_bytes())) is not None:
                return kept
            damaged(path, what)
        except FileNotFoundError:
            pass
        except OSError as error:
            damaged(path, what, str(error.strerror))
        if last or not pull(path):  # the store may have a sound one
            return None
    return None


def url() -> str | None:
    """Where the store besides the cache is, if there is one; a folder by its absolute path, for
    processes that run elsewhere.
    """
    given = os.environ.get(STORE)
    return str(expanded(given).resolve()) if given and ":" not in given else given or None


def shared() -> bool:
    """Whether there is a store besides the cache."""
    return url() is not None


def push(path: Path) -> None:
    """Put a file of the cache into the store, if there is one; what cannot be put there is said,
    and stays in the cache.
    """
    if not (where := url()):
        return
    try:
        fs, at = _place(where, path)
        if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
            write_atomic(Path(at), path.read_bytes())
        else:
            fs.pipe_file(at, path.read_bytes())
    except Exception as error:  # every file system has errors of its own
        warnings.warn(
            f"{path.name} could not be put into {where} ({type(error).__name__}: {error}): it is in"
            " the cache only",
            stacklevel=3,
        )


def pull(path: Path) -> bool:
    """Fetch a file of the cache from the store; False if there is no store, or none there."""
    if not (where := url()):
        return False
    try:
        fs, at = _place(where, path)
        write_atomic(path, fs.cat_file(at))
    except FileNotFoundError:
        return False
    except Exception as error:
        warnings.warn(
            f"{path.name} could not be fetched from {where} ({type(error).__name__}: {error})",
            stacklevel=3,
        )
        return False
    return True


def drop(path: Path) -> None:
    """Remove a file from the cache and from the store."""
    path.unlink(missing_ok=True)
    if not (where := url()):
        return
    try:
        fs, at = _place(where, path)
        fs.rm_file(at)
    except Exception:  # not there, or read-only: a file too many does no harm
        pass


def check_store() -> None:
    """Find out now whether the store that ``WIDTHBENCH_STORE`` names can be read and written.

    Raises:
        UsageError: If it cannot; it names the URL.
    """
    if not (where := url()):
        return
    try:
        fs, at = _place(where, cache_dir() / f"probe-{os.getpid()}")
        fs.makedirs(at.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(at, b"widthbench")
        if fs.cat_file(at) != b"widthbench":
            raise OSError("what was written is not what is read")
        fs.rm_file(at)
    except Exception as error:
        raise UsageError(
            f"the store {where} cannot be used ({type(error).__name__}: {error}): set {STORE} to a"
            " folder or a URL that fsspec knows, and install what it needs for that (s3fs,"
            " gcsfs, …)"
        ) from error


def _place(where: str, path: Path) -> tuple[Any, str]:
    import fsspec

    fs, root = fsspec.core.url_to_fs(where)
    return fs, f"{root.rstrip('/')}/{path.relative_to(cache_dir()).as_posix()}"
