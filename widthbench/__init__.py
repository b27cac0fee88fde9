"""widthbench: a benchmark of techniques that decide how wide each layer of a neural network should be.

The public names are loaded on first use, so that importing the package costs nothing and workers can be pinned to their
threads and GPU before torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from widthbench.api import apply
    from widthbench.budget import Budget
    from widthbench.task import Task
    from widthbench.technique import Outcome, Technique
    from widthbench.width import Group, Groups, Plan, Resize, find_groups, gated, keep, resize

try:
    __version__ = version("widthbench")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "apply": "widthbench.api",
    "Budget": "widthbench.budget",
    "Task": "widthbench.task",
    "Outcome": "widthbench.technique",
    "Technique": "widthbench.technique",
    "Group": "widthbench.width",
    "Groups": "widthbench.width",
    "Plan": "widthbench.width",
    "Resize": "widthbench.width",
    "find_groups": "widthbench.width",
    "gated": "widthbench.width",
    "keep": "widthbench.width",
    "resize": "widthbench.width",
}

__all__ = [
    "Budget",
    "Group",
    "Groups",
    "Outcome",
    "Plan",
    "Resize",
    "Task",
    "Technique",
    "apply",
    "find_groups",
    "gated",
    "keep",
    "resize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'widthbench' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
