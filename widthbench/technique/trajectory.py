"""What a technique notes while it decides: points on its way, as plain numbers for figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from widthbench.technique.task import Task


class Trajectory:
    """Points of one run, by what was noted.

    Args:
        task: The task, for the costs of widths.

    Attributes:
        series: A list for each quantity, such as "trajectory.macs"; for ``Outcome.series``.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.series: dict[str, list[Any]] = {}

    def point(self, step: int, widths: Mapping[str, int], **values: float | None) -> None:
        """Note where the run is.

        Args:
            step: As the technique counts.
            widths: Channels per group, whose shares of MACs and parameters are noted, too.
            **values: Anything else, by name; None for what there is not at this point.
        """
        cost, reference = self._task.cost(widths), self._task.reference
        shares = {
            "open": sum(widths.values()),
            "macs": cost.macs / reference.macs,
            "params": cost.params / reference.params,
        }
        for name, value in ({"step": step} | shares | values).items():
            self.note(f"trajectory.{name}", value)

    def note(self, name: str, value: Any) -> None:
        """Add to a quantity's list; floats are rounded to six digits."""
        rounded = float(f"{value:.6g}") if isinstance(value, float) else value
        self.series.setdefault(name, []).append(rounded)
