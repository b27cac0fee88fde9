"""Points that a technique records while it runs, as plain numbers for figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from widthbench.technique.task import Task


class Trajectory:
    """Points of one run: one list per quantity.

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
            **values: Anything else, by name; None where there is no value at this point.
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

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {"series": self.series}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.series = state["series"]


class Since:
    """Means and minima over the steps since the last point, kept on the device, so that steps need
    not wait for it.

    Args:
        like: A tensor of that device.
        means: Names of means.
        least: Names of minima (of values that are at most 1, where they start).
    """

    def __init__(self, like: Tensor, means: Sequence[str], least: Sequence[str]) -> None:
        self._zero = like.double() * 0
        self._means, self._least = tuple(means), tuple(least)
        self._begin()

    def _begin(self) -> None:
        names = (*self._means, *self._least)
        self._values = {n: self._zero + (n in self._least) for n in names}
        self._steps = dict.fromkeys(names, 0)

    def add(self, name: str, value: Tensor) -> None:
        """Take a step's value into a mean or minimum."""
        old, new = self._values[name], value.detach()
        self._values[name] = old + new if name in self._means else torch.minimum(old, new)
        self._steps[name] += 1

    def taken(self) -> dict[str, float | None]:
        """The means and minima, None for those of no step; and begin anew."""
        numbers = {
            n: float(v / (self._steps[n] if n in self._means else 1)) if self._steps[n] else None
            for n, v in self._values.items()
        }
        self._begin()
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {"values": self._values, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._values = {n: v.to(self._zero.device) for n, v in state["values"].items()}
        self._steps = dict(state["steps"])


class Returns:
    """Channels that open again after they have been closed for long.

    Args:
        like: ``[N]``, one of each channel.
        long: Steps that a channel must have been closed for its reopening to count.
    """

    def __init__(self, like: Tensor, long: int) -> None:
        self._long = long
        zero = like.new_zeros((), dtype=torch.float64)
        self._state = {
            "closed": torch.zeros_like(like),  # steps since
            "once": torch.zeros_like(like, dtype=torch.bool),
            "recoveries": zero,
            "shut": zero,
        }

    def note(self, gate: Tensor) -> None:
        """The gates ``[N]`` after a step."""
        now, open_ = self._state, gate > 0
        long = now["closed"] >= self._long
        now["once"] |= long
        now["shut"] = now["shut"] + long.sum()
        now["recoveries"] = now["recoveries"] + (long & open_).sum()
        now["closed"] = torch.where(open_, 0.0, now["closed"] + 1)

    def counts(self, gate: Tensor) -> dict[str, int]:
        """The "recoveries" so far; "shut", the channel-steps in which one could have happened;
        "returned", channels open now that were once closed for at least ``long`` steps.
        """
        counts = {n: int(self._state[n]) for n in ("recoveries", "shut")}
        return counts | {"returned": int((self._state["once"] & (gate > 0)).sum())}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._state = {n: v.to(self._state[n].device) for n, v in state.items()}
