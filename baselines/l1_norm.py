"""L1 norm: keep the channels whose producer weights have the largest sum of absolute values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from widthbench.technique.base import Outcome, Technique
from widthbench.technique.budget import Allocation
from widthbench.technique.task import Task
from widthbench.width.groups import producer_rows


class L1Norm(Technique):
    """Magnitude pruning of channels (Li et al., "Pruning Filters for Efficient ConvNets", ICLR
    2017).

    The score of channel n is ``s_n = Σ |w|`` over its producer weights, biases left out, as in
    section 3.1 of the paper.

    Args:
        allocation: "uniform" keeps the same fraction of every group; "global" ranks the channels of
            all groups together, each group's scores divided by their mean.
    """

    id = "l1-norm"
    access = "none"
    bibtex = """@inproceedings{li2017pruning,
  title = {Pruning Filters for Efficient ConvNets},
  author = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
  booktitle = {International Conference on Learning Representations},
  year = {2017}
}"""

    def __init__(self, *, allocation: Allocation = "uniform") -> None:
        self.allocation: Allocation = allocation

    def prepare(self, task: Task) -> dict[str, Tensor]:
        """Scores ``[N]`` per group."""
        scores = {}
        for name in task.groups:
            norms = [
                vector_norm(part, ord=1, dim=1)
                for part in producer_rows(task.model, task.groups, name)
            ]
            scores[name] = torch.stack(norms).sum(dim=0)
        return scores

    def decide(self, task: Task, state: dict[str, Tensor]) -> Outcome:
        """Keep the best within the budget."""
        if self.allocation == "global":
            state = {name: score / score.mean().clamp_min(1e-30) for name, score in state.items()}
        return Outcome(task.keep_best(state, self.allocation))
