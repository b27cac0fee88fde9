"""Files of a user's own: techniques and networks that no package declares.

``WIDTHBENCH_PLUGINS`` names the files, so that every process that is started knows them.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
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
        UsageError: If one is not there, or could not be imported under its name.
    """
    for given in paths:
        path = Path(given).expanduser().absolute()
        if path.suffix != ".py" or not path.is_file():
            raise UsageError(f"plug-in {given} is no Python file: name one that is there")
        if not path.stem.isidentifier():
            raise UsageError(
                f"plug-in {given}: '{path.stem}' is no name of a module: use letters, digits and _"
            )
        if path not in files():
            os.environ[PLUGINS] = os.pathsep.join(map(str, [*files(), path]))
    reach()


def reach() -> None:
    """Make the files importable.

    Raises:
        UsageError: If another module has the name of one.
    """
    for path in files():
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        there = find_spec(path.stem) if path.stem not in sys.modules else None
        origin = getattr(there or sys.modules.get(path.stem), "origin", None) or getattr(
            sys.modules.get(path.stem), "__file__", None
        )
        if origin is not None and Path(origin).absolute() != path:
            raise UsageError(
                f"plug-in {path}: another module is called '{path.stem}' ({origin}): rename the"
                " file"
            )


def techniques() -> dict[str, list[tuple[str, Path]]]:
    """``module:class`` and the file of every class with an ``id`` of its own, by that id; nothing
    is imported.

    Raises:
        UsageError: If a file is no Python.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in files():
        for node in _parsed(path).body:
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
    """A file and those beside it that it imports, and so on: what its results depend on."""
    found, waiting = dict[Path, None](), [path]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = None
        for name in _imported(_parsed(file)):
            spec = PathFinder.find_spec(name, [str(path.parent)])
            if spec is not None and spec.origin and spec.origin.endswith(".py"):
                beside = Path(spec.origin)
                package = beside.name == "__init__.py"
                waiting += beside.parent.rglob("*.py") if package else [beside]
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


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError, OSError) as error:
        raise UsageError(f"plug-in {path} cannot be read: {error}") from error
