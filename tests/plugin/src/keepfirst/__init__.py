"""A complete third-party technique: keep the first channels."""

from widthbench import Outcome, Technique


class KeepFirst(Technique):
    """Keep the first channels of every group."""

    id = "keep-first"
    access = "none"

    def decide(self, task, state):
        scores = {name: -self.order(group.channels) for name, group in task.groups.items()}
        return Outcome(task.keep_best(scores))

    @staticmethod
    def order(n):
        import torch

        return torch.arange(n).float()
