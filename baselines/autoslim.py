"""AutoSlim: one slimmable network is trained at many widths, then the group that accuracy misses
least is slimmed, step by step.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthbench.data.samples import First
from widthbench.errors import BudgetError, UsageError
from widthbench.networks.models import reinitialise
from widthbench.recipe import Recipe
from widthbench.technique.base import Outcome, Technique
from widthbench.technique.budget import Budget, top_channels, uniform_widths
from widthbench.technique.parameters import Count, NotNegative, Positive, Share
from widthbench.technique.task import State, Task
from widthbench.training.measuring import accuracy
from widthbench.training.recalibration import recalibrate
from widthbench.width.gates import Joined, gated
from widthbench.width.groups import producer_rows
from widthbench.width.resize import keep, resize

RANDOM = 2  # widths drawn for each step, beside the largest and the smallest (the sandwich rule)


class AutoSlim(Technique):
    """Greedy slimming of a slimmable network (after Yu and Huang, "AutoSlim", arXiv:1903.11728).

    1. The network is trained at many widths: each step adds the gradients of the largest network
       (cross-entropy), the smallest, and two with a random width for each group, which learn the
       largest one's outputs (sandwich rule and in-place distillation, Yu and Huang, ICCV 2019).
       Gates open the first channels of each group.
    2. Step by step, the network's MACs shrink by the same factor, each time in the one group whose
       slimming leaves the best val accuracy, BatchNorm recalibrated. A group gives up at most half
       of its channels in a step; where that does not take the MACs down far enough (many groups,
       few steps), all others give up the rest alike. One path serves all budgets.
    3. The shape found is trained.

    Args:
        epochs: Of slimmable training; other settings are those of the task's recipe.
        narrowest: Share of each group's channels in the smallest network.
        steps: Greedy steps from the whole network to ``least``; about seven for each group let half
            of the candidates be one group's doing.
        least: Share of the MACs at the path's end; a budget below it is met from the floor upwards.
        samples: Val samples at most that a greedy choice looks at, in the order in which val gives
            them.
        calibration: Training samples for each BatchNorm recalibration.
        order: Which channels come first: "l1" those with the largest L1 norm when training begins,
            "index" as they are.
        final: What the shape found starts from: "slimmable" weights, or "fresh" ones, as in the
            paper.
        final_epochs: Of its training; 0 for none.
    """

    id = "autoslim"
    access = "training"
    bibtex = """@article{yu2019autoslim,
  title = {{AutoSlim}: Towards One-Shot Architecture Search for Channel Numbers},
  author = {Yu, Jiahui and Huang, Thomas},
  journal = {arXiv preprint arXiv:1903.11728},
  year = {2019}
}"""

    epochs: Positive = 2
    narrowest: Share = 0.1
    steps: Count = 30
    least: Share = 0.03
    samples: Count = 10_000
    calibration: Count = 1024
    order: Literal["l1", "index"] = "l1"
    final: Literal["slimmable", "fresh"] = "slimmable"
    final_epochs: NotNegative = 1

    def prepare(self, task: Task) -> State:
        """The slimmable network's tensors, which channels come "first" (``[N]`` per group, higher
        does), and the path with its val accuracy.
        """
        model = copy.deepcopy(task.model)
        first = {n: self._first(task, n) for n in task.groups}
        slimmable = Slimmable(task, first, self.narrowest)
        with gated(model, task.groups, slimmable.gates):
            trained = task.checkpoint("slimmable", partial(self._trained, task, model, slimmable))
            model.load_state_dict(trained)
            path, accuracies = [{n: g.channels for n, g in task.groups.items()}], []
            for step in task.progress(range(self.steps + 1), desc=f"{self.id}: greedy steps"):
                point = task.checkpoint(
                    f"step {step}", partial(self._further, task, model, slimmable, path[-1], step)
                )
                path.append(point["widths"])
                accuracies.append(point["top1"])
        return {"model": trained, "first": first, "path": path[1:], "top1": accuracies}

    def decide(self, task: Task, state: State) -> Outcome:
        """Go along the path to the budget, and train what is found."""
        task.widths()  # a budget below the floor is refused
        model = copy.deepcopy(task.model)
        model.load_state_dict(state["model"])
        plan = {
            n: keep(top_channels(state["first"][n], w, task.groups[n].blocks))
            for n, w in at_budget(state["path"], task).items()
        }
        series: dict[str, list[Any]] = {
            "trajectory.step": list(range(len(state["path"]))),
            "trajectory.macs": [
                round(task.cost(w).macs / task.reference.macs, 6) for w in state["path"]
            ],
            "trajectory.val_top1": [round(top1, 4) for top1 in state["top1"]],
        }
        if not self.final_epochs:
            return Outcome(plan, model=model, series=series)
        small = resize(model, task.groups, plan)
        if self.final == "fresh":
            reinitialise(small, task.seed)
        recipe = self._recipe(task, self.final_epochs)
        task.fit(small, task.train, recipe, desc=f"{self.id} {task.budget}")
        return Outcome({}, model=small, series=series)

    def _trained(self, task: Task, model: nn.Module, slimmable: Slimmable) -> dict[str, Tensor]:
        """The slimmable network's tensors, as they are before any recalibration of the greedy
        steps.
        """
        recipe = self._recipe(task, self.epochs)
        task.fit(model, task.train, recipe, losses=slimmable.losses, state=slimmable, desc=self.id)
        # in the last step, whose loss was fine
        if not all(torch.isfinite(v).all() for v in model.state_dict().values()):
            raise UsageError(
                "autoslim diverged: slimmable training left weights that are not finite; lower lr"
                f" = {recipe.lr:g}"
            )
        return {k: v.clone() for k, v in model.state_dict().items()}

    def _recipe(self, task: Task, epochs: float) -> Recipe:
        return task.recipe.model_copy(update={"epochs": epochs})

    def _first(self, task: Task, name: str) -> Tensor:
        """Scores ``[N]`` that say in which order a group's channels open."""
        if self.order == "index":
            return -torch.arange(task.groups[name].channels, dtype=torch.float32)
        rows = producer_rows(task.model, task.groups, name)
        return torch.stack([part.abs().sum(dim=1) for part in rows]).sum(0).detach().cpu()

    def _further(
        self, task: Task, model: nn.Module, slimmable: Slimmable, last: dict[str, int], step: int
    ) -> State:
        """The next point: the best of the shapes at the next level of MACs, one for each group that
        is slimmed.
        """
        shapes = [last] if step == 0 else slimmer(last, task, self.least ** (step / self.steps))
        scores = [self._score(task, model, slimmable, shape) for shape in shapes]
        best = max(range(len(shapes)), key=lambda i: scores[i])
        return {"widths": shapes[best], "top1": scores[best][0]}

    def _score(
        self, task: Task, model: nn.Module, slimmable: Slimmable, widths: Mapping[str, int]
    ) -> tuple[float, float]:
        """(val accuracy, minus val loss) at some widths, BatchNorm recalibrated."""
        slimmable.set(widths)
        recalibrate(model, task.train, samples=self.calibration, macs=0, seed=task.seed)
        score = accuracy(model, First(task.val, self.samples))
        return score.top1, -score.loss


class Slimmable:
    """The gates of a slimmable network, and the losses that it is trained by.

    Attributes:
        gates: Ones and zeros; changed in place.
    """

    def __init__(self, task: Task, first: Mapping[str, Tensor], narrowest: float) -> None:
        self.groups, self.narrowest = task.groups, narrowest
        self.gates = Joined(task.groups, task.example_input)
        ranks = [ranks_of(first[n], g.blocks) for n, g in task.groups.items()]
        sizes = torch.tensor([g.channels for g in task.groups.values()])
        self._rank = torch.cat(ranks).to(task.device)
        self._group = torch.arange(len(sizes)).repeat_interleave(sizes).to(task.device)
        self._draw = torch.Generator().manual_seed(task.seed)
        self.smoothing = task.recipe.label_smoothing
        self.set(self.widths(1.0))

    def state_dict(self) -> dict[str, Any]:
        """The random numbers to come."""
        return {"draw": self._draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._draw.set_state(state["draw"])

    def widths(self, *shares: float) -> dict[str, int]:
        """Channels per group at a share of each, one for all or one each; at least one per
        block.
        """
        each = shares * len(self.groups) if len(shares) == 1 else shares
        shared = zip(self.groups.items(), each, strict=True)
        return {
            n: g.blocks * max(1, round(share * g.channels / g.blocks)) for (n, g), share in shared
        }

    def set(self, widths: Mapping[str, int]) -> None:
        """Open the first channels of each group."""
        self._open(self._limits(widths)[0])

    def _limits(self, *shapes: Mapping[str, int]) -> Tensor:
        """Channels that each block keeps, long ``[shapes, groups]`` on the device."""
        each = [[w[n] // g.blocks for n, g in self.groups.items()] for w in shapes]
        return torch.tensor(each).to(self._rank.device)

    def _open(self, limits: Tensor) -> None:
        self.gates.all.copy_(self._rank < limits[self._group])

    def losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Largest first, then the smallest and random ones, which learn its outputs."""
        narrow = self.narrowest
        drawn = [
            narrow + (1 - narrow) * torch.rand(len(self.groups), generator=self._draw)
            for _ in range(RANDOM)
        ]
        whole, smallest = self.widths(1.0), self.widths(narrow)
        shapes = [whole, smallest, *(self.widths(*d.tolist()) for d in drawn)]
        limits = self._limits(*shapes)  # the one copy to the device of a step
        self._open(limits[0])
        logits = model(x)
        yield F.cross_entropy(logits, y, label_smoothing=self.smoothing)
        soft = logits.detach().float().softmax(dim=1)
        for each in limits[1:]:
            self._open(each)
            yield F.cross_entropy(model(x), soft)  # of probabilities: distillation
        self._open(limits[0])


def ranks_of(score: Tensor, blocks: int) -> Tensor:
    """At which place of its block each channel opens, long ``[N]``, as ``top_channels`` has it."""
    order = score.view(blocks, -1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).flatten()


class Most(NamedTuple):
    """What a group may keep: so many channels at most, in so many blocks."""

    channels: int
    blocks: int


def slimmer(widths: Mapping[str, int], task: Task, level: float) -> list[dict[str, int]]:
    """Shapes of at most ``level`` of the reference's MACs, one for each group that can still
    shrink.

    That group gives up what the level asks for, but at most half of its channels; where this is not
    enough, all others give up the rest alike. Where nothing can shrink any further, the shape
    itself.
    """
    if _fits(widths, task, level):
        return [dict(widths)]
    shapes = []
    for name, group in task.groups.items():
        if widths[name] == group.blocks:
            continue
        half = {
            **widths,
            name: max(group.blocks, widths[name] // (2 * group.blocks) * group.blocks),
        }
        if _fits(half, task, level):
            alone = range(half[name], widths[name], group.blocks)
            least = bisect.bisect_left(
                alone, True, key=lambda w: not _fits({**widths, name: w}, task, level)
            )
            shapes.append({**widths, name: alone[least - 1]})
        else:
            shapes.append(_alike(half, name, task, level))
    return [dict(shape) for shape in dict.fromkeys(tuple(s.items()) for s in shapes)] or [
        dict(widths)
    ]


def _alike(widths: Mapping[str, int], name: str, task: Task, level: float) -> dict[str, int]:
    """Widths at which all groups but one shrink alike until the network is down to a level; the
    floor where that is not enough.
    """
    others = {n: Most(widths[n], g.blocks) for n, g in task.groups.items() if n != name}
    floor = {n: g.blocks for n, g in task.groups.items()}
    if not others:
        return floor
    try:
        alike = uniform_widths(
            others,
            Budget("macs", level),
            lambda some: task.cost({**widths, **some}),
            task.reference,
        )
    except BudgetError:
        return floor
    return {**widths, **alike}


def _fits(widths: Mapping[str, int], task: Task, level: float) -> bool:
    return bool(task.cost(widths).macs <= level * task.reference.macs)


def at_budget(path: list[dict[str, int]], task: Task) -> dict[str, int]:
    """The first shape within the budget on a path of shapes, filled up; the floor, filled up, where
    the path ends before.
    """
    floor = {n: g.blocks for n, g in task.groups.items()}
    end = next((i for i, widths in enumerate(path) if task.fits(widths)), len(path))
    shape = dict(path[end] if end < len(path) else floor)
    # what the last steps took more of than the budget asks is given back, last first
    for earlier in reversed(path[:end]):
        for name, group in task.groups.items():
            low, high = shape[name] // group.blocks, earlier[name] // group.blocks
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (
                    (middle, high)
                    if task.fits({**shape, name: middle * group.blocks})
                    else (low, middle - 1)
                )
            shape[name] = max(shape[name], low * group.blocks)
    return shape
