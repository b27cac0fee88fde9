"""What stands beside each number: code, versions, hardware; and the digests that cache keys are
made of.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import platform
import subprocess
import warnings
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from widthbench import plugins
from widthbench.errors import UsageError

PACKAGES = (
    "widthbench",
    "torch",
    "torchvision",
    "timm",
    "torch-pruning",
    "scikit-learn",
    "scipy",
    "numpy",
    "pillow",
    "safetensors",
)
ROOT = Path(__file__).resolve().parent


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    packages = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return packages


@functools.cache
def commit() -> dict[str, Any]:
    """The checkout's git commit and whether it has uncommitted changes.

    Outside a checkout what ``WIDTHBENCH_COMMIT`` says, for a copy that was packed from a clean one;
    else both None.
    """
    if said := os.environ.get("WIDTHBENCH_COMMIT"):
        return {"commit": said, "dirty": False}

    def git(*args: str) -> str | None:
        # a checkout that somebody else owns is read all the same: it is the one whose code runs
        # here
        command = [
            "git",
            "-c",
            f"safe.directory={ROOT.parent}",
            "-c",
            "core.fsmonitor=false",
            *args,
        ]
        try:
            done = subprocess.run(
                command, cwd=ROOT.parent, capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
        else:
            if done.returncode == 0:
                return done.stdout.strip()
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        if (ROOT.parent / ".git").exists():
            warnings.warn(
                f"records will not say which commit they are of: git refuses {ROOT.parent} ({why})",
                stacklevel=3,
            )
        return None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT.parent:
        return {"commit": None, "dirty": None}
    # results are what a run writes, not what it depends on
    status = git("status", "--porcelain", "--", ".", ":!results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


@functools.cache
def hardware() -> dict[str, Any]:
    """Processor, cores, and GPU where there is one."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    facts: dict[str, Any] = {"cpu": name, "cores": os.cpu_count(), "machine": platform.machine()}
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


@functools.cache
def code_digest(*modules: str) -> str:
    """SHA-256 over what the package's modules do, given as paths relative to it (folders with all
    they hold).
    """
    digest = hashlib.sha256()
    for module in modules:
        path = ROOT / module
        for file in sorted(path.glob("**/*.py")) if path.is_dir() else [path]:
            digest.update(meaning(file.read_bytes()))
    return digest.hexdigest()


def meaning(source: bytes) -> bytes:
    """What a Python file does: its syntax tree, without comments, layout and docstrings, so that a
    mended sentence changes no key.

    Args:
        source: The file; one that is not valid Python counts as it stands.
    """
    try:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if not isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                continue
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        return ast.dump(tree).encode()
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source


def source_digest(cls: Any) -> str:
    """SHA-256 over what the sources do that a technique, or a network's factory, consists of
    (``meaning``).

    For one of ours that is its own file (the rest of the package is digested apart); for others
    every Python file of the top-level package, or the single module, that it is defined in; for a
    module, also what it imports from beside it.

    Raises:
        UsageError: If they cannot be found.
    """
    cls = getattr(cls, "func", cls)  # of a functools.partial
    try:
        own = Path(inspect.getfile(cls)).absolute()
    except (TypeError, OSError) as error:
        raise UsageError(
            f"{cls.__module__}.{getattr(cls, '__qualname__', cls)}: its source cannot be found"
            f" ({error}): define it in a file"
        ) from error
    top = cls.__module__.partition(".")[0]
    files = [own]
    if top != "widthbench" and ("." in cls.__module__ or own.name == "__init__.py"):
        package = next((folder for folder in own.parents if folder.name == top), own.parent)
        files = sorted(package.glob("**/*.py"))
    elif top != "widthbench":
        files = plugins.sources(own)
    return files_digest(files)


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 over what some files do (``meaning``)."""
    return _files_digest(tuple((file, *_state(file)) for file in files))


def _state(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


@functools.lru_cache(maxsize=256)
def _files_digest(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, *_ in files:
        digest.update(meaning(file.read_bytes()))
    return digest.hexdigest()


def stamp() -> dict[str, Any]:
    """Versions, commit, hardware, host and time, for a record."""
    return {
        "versions": versions(),
        **commit(),
        "hardware": hardware(),
        "host": platform.node(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
