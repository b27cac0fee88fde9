"""L1 norm: keep the channels whose producer weights have the largest sum of absolute values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from widthbench.technique.base import ScoredTechnique
from widthbench.technique.task import Task
from widthbench.width.groups import producer_rows


class L1Norm(ScoredTechnique):
    """Magnitude pruning of channels (Li et al., "Pruning Filters for Efficient ConvNets", ICLR
    2017).

    The score of channel n is ``s_n = Σ |w|`` over its producer weights, biases left out, as in
    section 3.1 of the paper.
    """

    id = "l1-norm"
    access = "none"
    bibtex = """@inproceedings{li2017pruning,
  title = {Pruning Filters for Efficient ConvNets},
  author = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
  booktitle = {International Conference on Learning Representations},
  year = {2017}
}"""

    def score(self, task: Task) -> dict[str, Tensor]:
        """``s_n``."""
        scores = {}
        for name in task.groups:
            norms = [
                vector_norm(part, ord=1, dim=1)
                for part in producer_rows(task.model, task.groups, name)
            ]
            scores[name] = torch.stack(norms).sum(dim=0)
        return scores
