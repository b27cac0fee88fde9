"""widthbench: a benchmark of techniques that decide how wide each layer of a neural network should
be.

The public names are loaded on first use, so that importing the package costs nothing and workers
can be pinned to their threads and GPU before torch is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from widthbench.api import apply
    from widthbench.data.own import add_data
    from widthbench.running import Results, load, run
    from widthbench.saving import load_network, reshape_like, save
    from widthbench.technique.base import Outcome, ScoredTechnique, Technique
    from widthbench.technique.budget import Budget
    from widthbench.technique.task import Task
    from widthbench.width import (
        Group,
        Groups,
        Inputs,
        Plan,
        Resize,
        find_groups,
        gated,
        keep,
        separated,
    )
    from widthbench.width.resize import resize

try:
    __version__ = version("widthbench")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "add_data": "widthbench.data.own",
    "apply": "widthbench.api",
    "Results": "widthbench.running",
    "load": "widthbench.running",
    "run": "widthbench.running",
    "load_network": "widthbench.saving",
    "reshape_like": "widthbench.saving",
    "save": "widthbench.saving",
    "Budget": "widthbench.technique.budget",
    "Task": "widthbench.technique.task",
    "Outcome": "widthbench.technique.base",
    "ScoredTechnique": "widthbench.technique.base",
    "Technique": "widthbench.technique.base",
    "Group": "widthbench.width",
    "Groups": "widthbench.width",
    "Inputs": "widthbench.width",
    "Plan": "widthbench.width",
    "Resize": "widthbench.width",
    "find_groups": "widthbench.width",
    "gated": "widthbench.width",
    "keep": "widthbench.width",
    "resize": "widthbench.width",
    "separated": "widthbench.width",
}

__all__ = [
    "Budget",
    "Group",
    "Groups",
    "Inputs",
    "Outcome",
    "Plan",
    "Resize",
    "Results",
    "ScoredTechnique",
    "Task",
    "Technique",
    "add_data",
    "apply",
    "find_groups",
    "gated",
    "keep",
    "load",
    "load_network",
    "reshape_like",
    "resize",
    "run",
    "save",
    "separated",
]


_MOVED = {
    **dict.fromkeys(
        ("records", "protocol", "controls", "suites", "limits", "recipes"), "experiment"
    ),
    **dict.fromkeys(("task", "budget", "registry"), "technique"),
    **dict.fromkeys(("models", "weights"), "networks"),
    **dict.fromkeys(("verify", "regress"), "report"),
    "sources": "data",
    "measure": "training.measuring",
    "augment": "data.augmentation",
}


class _Moved(MetaPathFinder):
    """Says where a module of an earlier version is now."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        package, _, name = fullname.rpartition(".")
        if package == "widthbench" and (home := _MOVED.get(name)):
            new = f"widthbench.{home}" if "." in home else f"widthbench.{home}.{name}"
            raise ModuleNotFoundError(f"{fullname} is now {new}", name=fullname)


sys.meta_path.append(_Moved())  # asked last: for what nobody has found


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'widthbench' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
