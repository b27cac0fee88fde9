"""Random channels: what any criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from widthbench.technique.base import Outcome, Technique
from widthbench.technique.budget import Allocation
from widthbench.technique.task import Task


class RandomChannels(Technique):
    """Keep channels at random, with the task's seed.

    Args:
        allocation: "uniform" keeps the same fraction of every group; "global" draws from all
            channels together.
    """

    id = "random-channels"
    access = "none"

    def __init__(self, *, allocation: Allocation = "uniform") -> None:
        self.allocation: Allocation = allocation

    def prepare(self, task: Task) -> dict[str, Tensor]:
        """Scores ``[N]`` per group, uniform in [0, 1)."""
        generator = torch.Generator().manual_seed(task.seed)
        return {
            name: torch.rand(group.channels, generator=generator)
            for name, group in task.groups.items()
        }

    def decide(self, task: Task, state: dict[str, Tensor]) -> Outcome:
        """Keep those that drew the highest numbers."""
        return Outcome(task.keep_best(state, self.allocation))
