"""Files of a user's own: techniques and networks that no package declares.

``WIDTHBENCH_PLUGINS`` names the files, so that every process that is started knows them.
"""

from __future__ import annotations

import ast
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import invalidate_caches
from importlib.machinery import PathFinder
from pathlib import Path

from widthbench.errors import UsageError

PLUGINS = "WIDTHBENCH_PLUGINS"


def files() -> list[Path]:
    """The files that are in use, in the order in which they were named."""
    return [Path(p) for p in os.environ.get(PLUGINS, "").split(os.pathsep) if p]


def use(paths: Iterable[str | Path]) -> None:
    """Let this process, and those that it starts, know some files.

    Args:
        paths: Python files. Each becomes a module of its stem's name; what lies beside it can be
            imported from it.

    Raises:
        UsageError: If one is not there, is no Python, or could not be imported under its name; then
            none of them is known.
    """
    before = os.environ.get(PLUGINS)
    try:
        for given in paths:
            path = Path(given).expanduser().absolute()
            if path.suffix != ".py" or not path.is_file():
                raise UsageError(f"plug-in {given} is no Python file: name one that is there")
            if not path.stem.isidentifier() or os.pathsep in str(path):
                raise UsageError(
                    f"plug-in {given}: '{path.stem}' is no name of a module, or its path holds"
                    f" '{os.pathsep}': rename it"
                )
            parsed(path)
            if path not in files():
                os.environ[PLUGINS] = os.pathsep.join(map(str, [*files(), path]))
        reach()
    except UsageError:
        os.environ[PLUGINS] = before or ""
        raise


def reach() -> None:
    """Make the files importable, and forget what was imported of those that have changed since.

    Raises:
        UsageError: If another module has the name of one, or of what it imports from beside it.
    """
    for path in files():
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
    for path in files():
        if not path.is_file():
            continue
        try:
            mine = sources(path)
        except UsageError:
            continue  # said where it is wanted
        state = tuple((file, *_version(file)) for file in mine)
        if _seen.setdefault(path, state) != state:
            _seen[path] = state
            for name, module in list(sys.modules.items()):
                at = getattr(module, "__file__", None)
                if at and path.parent in Path(at).parents:
                    del sys.modules[name]
            invalidate_caches()
        for file in mine:
            name, beside = _top(file)
            spec = None if name in sys.builtin_module_names else PathFinder.find_spec(name)
            there = Path(spec.origin) if spec is not None and spec.origin else None
            if there is not None and there.absolute() != beside:
                raise UsageError(
                    f"plug-in {path}: another module is called '{name}' ({there}), which hides"
                    f" {beside}: rename the file"
                )


_seen: dict[Path, tuple[tuple[object, ...], ...]] = {}


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _top(file: Path) -> tuple[str, Path]:
    """The top-level name that a file is imported by, and the file that has it."""
    top = file
    while (top.parent / "__init__.py").is_file():
        top = top.parent
    return (top.stem, file) if top == file else (top.name, top / "__init__.py")


def techniques() -> dict[str, list[tuple[str, Path]]]:
    """``module:class`` and the file of every class with an ``id`` of its own, by that id; nothing
    is imported. A file that is no Python any more is named in a warning.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in files():
        try:
            body = parsed(path).body
        except UsageError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        for node in body:
            if not isinstance(node, ast.ClassDef):
                continue
            for name in _ids(node):
                found.setdefault(name, []).append((f"{path.stem}:{node.name}", path))
    return found


def _ids(node: ast.ClassDef) -> Iterator[str]:
    """What a class assigns to ``id``: alone or in a tuple."""
    for line in node.body:
        pairs: list[tuple[ast.expr, ast.expr | None]] = []
        if isinstance(line, ast.AnnAssign):
            pairs = [(line.target, line.value)]
        elif isinstance(line, ast.Assign):
            for target in line.targets:
                both = (target, line.value)
                if all(isinstance(side, ast.Tuple) for side in both):
                    names, values = (getattr(side, "elts", []) for side in both)
                    pairs += zip(names, values, strict=False)
                else:
                    pairs.append(both)
        for target, value in pairs:
            named = isinstance(target, ast.Name) and target.id == "id"
            if named and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


def sources(path: Path) -> list[Path]:
    """A file and those beside it, or beside a plug-in, that it imports, and so on: what its results
    depend on.
    """
    found, waiting = dict[Path, None](), [path.absolute()]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = None
        folders = [str(file.parent), *(str(f.parent) for f in files())]
        for name in _imported(parsed(file)):
            spec = PathFinder.find_spec(name, folders)
            for folder in getattr(spec, "submodule_search_locations", None) or []:
                waiting += Path(folder).rglob("*.py")
            if spec is not None and spec.origin and spec.origin.endswith(".py"):
                waiting.append(Path(spec.origin))
    return sorted(found)


def _imported(tree: ast.Module) -> set[str]:
    """Names of the top-level modules that a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def parsed(path: Path) -> ast.Module:
    """A file's syntax tree.

    Raises:
        UsageError: If it is no Python.
    """
    try:
        return _tree(path, *_version(path))
    except (SyntaxError, ValueError, OSError) as error:
        raise UsageError(f"plug-in {path} cannot be read: {error}") from error


@lru_cache(maxsize=256)
def _tree(path: Path, *_: int) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))
