"""Whether training ended at chance: a network that learned nothing is a failure, not a result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from widthbench.errors import DivergedError

CHANCE = 0.999  # of the best constant answer's loss: one that does not end below it learned nothing
LEAST_STEPS = 10  # that say something about how training ends


class Ending:
    """The mean loss over the last epoch, or over the last half of a shorter run, and what chance
    is.

    Chance is the entropy of the labels: the cross-entropy of the best answer that does not look at
    the inputs.

    Args:
        per_epoch: Steps of an epoch.
        total: Steps in all.
    """

    def __init__(self, per_epoch: int, total: int) -> None:
        self._first = total - min(per_epoch, -(-total // 2))
        self._enough = total - self._first >= LEAST_STEPS
        self._sum = 0.0
        self._counts = torch.zeros(0, dtype=torch.long)

    def add(self, step: int, loss: float, y: Tensor) -> None:
        """Note a step, counted from 0: its mean loss and its labels ``[B]``."""
        if self._enough and step >= self._first and not y.is_floating_point() and y.dim() == 1:
            counts = torch.bincount(y.cpu(), minlength=len(self._counts))
            counts[: len(self._counts)] += self._counts
            self._counts, self._sum = counts, self._sum + loss * len(y)

    def state_dict(self) -> dict[str, Any]:
        """What was noted."""
        return {"sum": self._sum, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._sum, self._counts = state["sum"], state["counts"]

    def require_learned(self) -> None:
        """Raise if the loss ends at chance.

        Raises:
            DivergedError: It names the loss and chance, in nats.
        """
        samples = int(self._counts.sum())
        if not samples:
            return
        shares = self._counts[self._counts > 0].double() / samples
        chance, loss = float(-(shares * shares.log()).sum()), self._sum / samples
        if chance > 0 and loss >= CHANCE * chance:
            raise DivergedError(
                f"training diverged: its loss ends at chance ({loss:.4f} nats over the last epoch; "
                f"the best constant answer has {chance:.4f}): lower lr, or warm up"
            )
