"""Random channels: what any criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from widthbench.technique.base import ScoredTechnique
from widthbench.technique.task import Task


class RandomChannels(ScoredTechnique):
    """Keep channels at random, with the task's seed."""

    id = "random-channels"
    access = "none"
    comparable = True

    def score(self, task: Task) -> dict[str, Tensor]:
        """Uniform in [0, 1)."""
        generator = torch.Generator().manual_seed(task.seed)
        return {n: torch.rand(g.channels, generator=generator) for n, g in task.groups.items()}
