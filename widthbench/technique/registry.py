"""Finds techniques: those that distributions declare as entry points in the group
``widthbench.techniques``, and those in plug-in files (``widthbench.plugins``).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import EntryPoint, distributions
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from widthbench import plugins
from widthbench.children import Child, ChildDied, Say
from widthbench.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from widthbench.technique.base import (
        Technique,
    )  # which imports torch: asking for names should not

GROUP = "widthbench.techniques"


def names() -> list[str]:
    """All registered ids, whether or not they load."""
    return sorted(_declared())


def load(name: str) -> type[Technique]:
    """The technique class registered under an id.

    Raises:
        UsageError: If the id is unknown, claimed by two distributions, fails to import, or is not a
            technique.
    """
    from widthbench.technique.base import Technique
    from widthbench.technique.task import ACCESS

    declared = _declared()
    if name not in declared:
        raise UsageError(
            f"unknown technique '{name}'{did_you_mean(name, declared)} (see `widthbench list`)"
        )
    points = declared[name]
    if len(points) > 1:
        owners = " and ".join(sorted(f"{_owner(p)} ({p.value})" for p in points))
        raise UsageError(
            f"technique '{name}' is registered by {owners}: uninstall one, or give one another name"
        )
    (point,) = points
    try:
        cls = point.load()
    except (Exception, SystemExit) as error:  # a plug-in may raise anything while it is imported
        raise UsageError(
            f"technique '{name}' of {_owner(point)} fails to import: {type(error).__name__}:"
            f" {error}; mend or uninstall it"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Technique)):
        raise UsageError(
            f"technique '{name}' of {_owner(point)}: {point.value} is not a subclass of"
            " widthbench.Technique"
        )
    if getattr(cls, "id", None) != name:
        raise UsageError(
            f"technique '{name}' of {_owner(point)}: its class says id ="
            f" {getattr(cls, 'id', None)!r}; make them equal"
        )
    if getattr(cls, "access", None) not in ACCESS:
        raise UsageError(
            f"technique '{name}' of {_owner(point)}: set access to one of {', '.join(ACCESS)}"
        )
    return cls


def built_in(name: str) -> bool:
    """Whether a technique comes with widthbench itself."""
    return all(
        p.dist is not None and p.dist.name == "widthbench" for p in _declared().get(name, [])
    )


def try_out(entries: Iterable[tuple[str, Mapping[str, Any]]], *, limit_s: float = 120) -> None:
    """Import techniques of other distributions, and make them, in a process of their own before
    this one does.

    Args:
        entries: Their ids and parameters.
        limit_s: What that may take.

    Raises:
        UsageError: If that process ends or hangs; what is only raised there, ``load`` says.
    """
    foreign = [(name, params) for name, params in entries if not built_in(name)]
    if not foreign or (why := _try(foreign, limit_s)) is None:
        return
    for one in foreign:
        if why := why if len(foreign) == 1 else _try([one], limit_s):
            raise UsageError(
                f"technique '{one[0]}' of {owner(one[0])}: importing or making it {why}; mend or"
                " uninstall it"
            )


def _is_new(name: str) -> bool:
    """Whether loading a technique would import what this process has not imported yet, and can."""
    for point in _declared()[name]:
        with suppress(Exception):  # anything may stand there
            if point.module not in sys.modules:
                return find_spec(point.module.partition(".")[0]) is not None
    return False


def _try(entries: Sequence[tuple[str, Mapping[str, Any]]], limit_s: float) -> str | None:
    """What importing and making techniques does to a process; None if nothing."""
    mine = f"{__name__}:make_all"
    with Child(mine, path=sys.path, silent=True) as child:  # which ends what they left behind, too
        try:
            child.ask([[name, dict(params)] for name, params in entries], limit_s=limit_s)
        except ChildDied as died:
            return f"ends the process ({died.how})" if died.how else str(died)
    return None


def make_all(entries: Sequence[tuple[str, Mapping[str, Any]]], _: Say) -> None:
    """Make techniques by names and parameters; what they raise is not told."""
    for name, params in entries:
        with suppress(BaseException):
            create(name, params)


def load_all() -> tuple[dict[str, type[Technique]], dict[str, str]]:
    """Every technique that loads, and for the others the reason: one broken plug-in does not stop
    the rest.
    """
    good: dict[str, type[Technique]] = {}
    bad: dict[str, str] = {}
    new: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in names() if _is_new(name)]
    together: UsageError | None = None
    try:
        try_out(new)
    except UsageError as error:
        together = error
    for name in names():
        try:
            if together is not None and (name, {}) in new:
                try_out([(name, {})])
            good[name] = load(name)
        except UsageError as error:
            bad[name] = str(error)
    return good, bad


def create(name: str, params: Mapping[str, Any] | None = None) -> Technique:
    """An instance of a registered technique.

    Args:
        name: Its id.
        params: Its keyword parameters.

    Raises:
        UsageError: As ``load``, or if a parameter is unknown.
    """
    from widthbench.technique.base import build

    return build(load(name), params or {})


def owner(name: str) -> str:
    """``distribution version`` that provides a technique."""
    return " and ".join(sorted(_owner(p) for p in _declared().get(name, [])))


def entry_points(*, group: str) -> list[EntryPoint]:
    """The entry points of all distributions; one whose metadata cannot be read is named in a
    warning, and stops nothing.
    """
    points: list[EntryPoint] = []
    seen: set[str] = set()
    for distribution in distributions():
        where = getattr(distribution, "_path", "a distribution")
        try:
            name = str(distribution.name).lower().replace("-", "_").replace(".", "_")
            if name in seen:  # further back on the path
                continue
            seen.add(name)
            points += distribution.entry_points.select(group=group)
        except Exception as error:  # anything may lie in site-packages
            why = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"the metadata of {where} cannot be read ({why}): mend or uninstall it",
                stacklevel=2,
            )
    return points


def _declared() -> dict[str, list[EntryPoint]]:
    declared = _scanned(entry_points, tuple((path, _changed(path)) for path in sys.path))
    if not plugins.files():
        return declared
    plugins.reach()
    declared = {name: list(points) for name, points in declared.items()}
    for name, classes in plugins.techniques().items():
        points = [EntryPoint(name, value, GROUP) for value, _ in classes]
        declared[name] = [*declared.get(name, []), *points]
    return declared


def _changed(path: str) -> int:
    """When a folder last gained or lost something, such as a distribution."""
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=1)
def _scanned(
    scan: Callable[..., Iterable[EntryPoint]], installed: tuple[tuple[str, int], ...]
) -> dict[str, list[EntryPoint]]:
    """What all distributions declare, read again (10 ms) once something has been installed."""
    by_name: dict[str, dict[str, EntryPoint]] = {}
    for point in scan(group=GROUP):
        # a checkout's own metadata on sys.path repeats what the installed distribution says
        by_name.setdefault(point.name, {})[point.value] = point
    return {name: list(points.values()) for name, points in by_name.items()}


def _owner(point: EntryPoint) -> str:
    if point.dist:
        return f"{point.dist.name} {point.dist.version}"
    own = [str(f) for f in plugins.files() if f.stem == point.module]
    return own[0] if own else "an unnamed distribution"
