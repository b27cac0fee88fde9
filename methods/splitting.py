"""Splitting steepest descent: start narrow, train, split the neurons whose splitting lowers the
loss most, and go on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthbench.networks.models import reinitialise
from widthbench.sensitivity.ablation import replica
from widthbench.sensitivity.splitting_matrices import (
    SplittingMatrices,
    neuron_parameters,
    splittable,
)
from widthbench.technique.base import Outcome, Technique
from widthbench.technique.budget import uniform_widths
from widthbench.technique.growth import Split, at_widths, carried, copies
from widthbench.technique.parameters import Count, Positive, Share
from widthbench.technique.task import State, Task
from widthbench.technique.trajectory import Trajectory
from widthbench.training.measuring import accuracy
from widthbench.training.state import OptimizerState
from widthbench.width.groups import Groups
from widthbench.width.resize import Resize, resize

Select = Literal["eigen", "random", "width"]
# rounds may be at most this multiple of those asked for, where doubling, or neurons that no split
# improves, slow growth down
MOST_ROUNDS = 2


class Splitting(Technique):
    """Splitting neurons where it lowers the loss most (Liu, Wu and Wang, "Splitting Steepest
    Descent", NeurIPS 2019).

    The network starts narrow. Each round trains it, then splits neurons: θ becomes θ + ε v and θ -
    ε v, each copy with half of the outgoing weights, which changes the loss by

        ``ε² λ_min / 2 + O(ε³)``

    where λ_min and v are the least eigenvalue and its unit eigenvector of the neuron's splitting
    matrix (equation 4 of the paper; ``widthbench.sensitivity.splitting_matrices``). The most
    negative are taken until the round's growth is reached; where none is negative, the network is
    splitting stable and growth ends. Neurons that are split are those of groups with one producer
    and an elementwise activation behind it or its BatchNorm; other groups have from the start the
    width that the budget gives them when it is spread uniformly. The record says which (series
    ``left_out``). A group may outgrow the network that budgets refer to.

    The second derivative of ReLU and its kin is 0 wherever it is defined, and the law has nothing
    to say there: softplus's stands in for it (``splitting_matrices``), so that λ_min ranks neurons
    but no longer says what a split gains.

    Args:
        select: "eigen" as above; controls: "random", neurons at random, each along a random
            direction; "width", all groups widened alike, along random directions.
        per: What λ_min is divided by: "cost" what the split adds to what the budget counts (as in
            the paper's sequel, Wang et al., "Energy-Aware Neural Architecture Optimization with
            Fast Splitting Steepest Descent", 2019), "neuron" nothing. Without it a budget of MACs
            starves layers: the least eigenvalues lie where inputs are many, and so does the cost.
        narrow: Share of the channels of the uniform network at the budget that the network starts
            with.
        begin: The most that it starts with, as a share of the channels of the network that budgets
            refer to: one small start for all budgets.
        rounds: Of growth, each by the same factor, and by one neuron at least. A round can at most
            double a layer: where it falls short, rounds are added, up to as many again, and one for
            each doubling from the start to the uniform network.
        growth: Channels that a round adds at most; rounds then go on until the budget is reached.
        epochs: Of training in each round; other settings are those of the task's recipe, its
            warm-up in the first round only.
        final_epochs: Of training after the last split, in place of ``epochs``.
        lr: In place of the recipe's.
        epsilon: ε.
        samples: Training samples that splitting matrices are averaged over.
        tolerance: Of λ_min, relative to the matrix's norm.
        exact: Form the matrices and decompose them in float64; for small layers. The bill has the
            passes that form them, not the decomposition.
    """

    id = "splitting"
    access = "training"
    start = "fresh"
    grows = True
    bibtex = """@inproceedings{liu2019splitting,
  title = {Splitting Steepest Descent for Growing Neural Architectures},
  author = {Liu, Qiang and Wu, Lemeng and Wang, Dilin},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}"""

    select: Select = "eigen"
    per: Literal["neuron", "cost"] = "cost"
    narrow: Share = 0.5
    begin: Share | None = None
    rounds: Count = 10
    growth: Count | None = None
    epochs: Positive = 2
    final_epochs: Positive | None = None
    lr: Positive | None = None
    epsilon: Positive = 0.1
    samples: Count = 1024
    tolerance: Positive = 1e-3
    exact: bool = False

    def skip(self, task: Task) -> str | None:
        """Where no group can be split."""
        growable, left_out = splittable(task.model, task.groups, task.example_input[:1])
        why = "; ".join(f"{n}: {reason}" for n, reason in list(left_out.items())[:3])
        if growable:
            return None
        return f"no channel group has neurons to split ({why or 'there are no groups'})"

    def decide(self, task: Task, state: State) -> Outcome:
        """Grow from narrow to the budget."""
        growing = Growing(self, task)
        for number in itertools.count():
            if growing.take(task.checkpoint(f"round {number}", partial(growing.round, number))):
                break
        return Outcome({}, model=growing.model, series=growing.way.series)


class Growing:
    """A network that grows round by round.

    Attributes:
        model: The network as it is.
        widths: Its channels per group of the task.
        way: The trajectory.
    """

    def __init__(self, method: Splitting, task: Task) -> None:
        self.method, self.task = method, task
        self.growable, left_out = splittable(task.model, task.groups, task.example_input[:1])
        full = uniform_widths(task.groups, task.budget, task.cost, task.reference)
        self.widths = {n: self._start(n, w) for n, w in full.items()}
        # doublings that the start asks for
        self.doublings = math.ceil(math.log2(max(w / self.widths[n] for n, w in full.items())))
        self.model = at_widths(task, self.widths)
        reinitialise(self.model, task.seed)
        self.groups = task.regroup(self.model)
        self.optimizer: OptimizerState = {}
        self.start = task.kept(self.widths)
        self.way = Trajectory(task)
        self.way.series["left_out"] = [f"{n}: {why}" for n, why in left_out.items()]
        self.splits, self.stable = 0, False

    def _start(self, name: str, width: int) -> int:
        """Channels that a group starts with, where the uniform network at the budget has
        ``width``.
        """
        if name not in self.growable:
            return width
        most = (self.method.begin or 1) * self.task.groups[name].channels
        return max(1, round(min(self.method.narrow * width, most)))

    def _seed(self, number: int) -> int:
        """Of a round: each sees the data in an order of its own."""
        return self.task.seed + 7919 * number

    def round(self, number: int) -> State:
        """Train, note where the run is, and split: the network after that, and how far it is."""
        task, method = self.task, self.method
        last = self.stable or not self._can_grow()
        epochs = method.final_epochs or method.epochs if last else method.epochs
        warmup = min(task.recipe.warmup_epochs, epochs / 2) if number == 0 else 0.0
        changed = {"epochs": epochs, "lr": method.lr or task.recipe.lr, "warmup_epochs": warmup}
        task.fit(
            self.model,
            task.train,
            task.recipe.model_copy(update=changed),
            optimizer_state=self.optimizer,
            seed=self._seed(number),
            desc=f"{method.id} {task.budget} round {number}",
        )
        self._point(number)
        if not last:
            split = self._chosen(number, self._target(number))
            most = MOST_ROUNDS * method.rounds + self.doublings
            self.stable = not split or (method.growth is None and number + 1 >= most)
            if not self.stable:
                self._split(split)
            elif method.final_epochs is None:
                last = True  # what a last round would train has been trained
        return {
            "widths": self.widths,
            "series": self.way.series,
            "splits": self.splits,
            "stable": self.stable,
            "done": last,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer,
        }

    def _target(self, number: int) -> float:
        """What a round may grow to, in the budget's terms."""
        if self.method.growth is not None:
            return self.task.asked
        share = min(1.0, (number + 1) / self.method.rounds)
        return self.start * (self.task.asked / self.start) ** share

    def take(self, state: State) -> bool:
        """Take up the network after a round; whether it is the last one."""
        self.widths, self.splits, self.stable = state["widths"], state["splits"], state["stable"]
        self.way.series, self.optimizer = state["series"], state["optimizer"]
        self.model = at_widths(self.task, self.widths)
        self.model.load_state_dict(state["model"])
        self.groups = self.task.regroup(self.model)
        return bool(state["done"])

    def _point(self, number: int) -> None:
        scores: dict[str, float] = {}
        if self.task.curves:  # a look, which nothing depends on, is not on the bill
            score = accuracy(replica(self.model), self.task.val)
            scores = {"val_top1": score.top1, "val_loss": score.loss}
        self.way.point(number, self.widths, splits=self.splits, **scores)
        for name, width in self.widths.items():
            self.way.note(f"width.{name}", width)

    def _room(self, name: str) -> bool:
        """Whether one more channel of a group fits."""
        return self.task.fits(self.widths | {name: self.widths[name] + 1})

    def _can_grow(self) -> bool:
        return any(map(self._room, self.growable))

    def _chosen(self, number: int, allowed: float) -> Split:
        """Which neurons to split, and along which vectors."""
        if not self._can_grow():
            return {}
        draw = torch.Generator().manual_seed(self._seed(number))
        if self.method.select == "eigen":
            scores, vectors = self._eigenpairs(number)
        else:
            shapes = {
                n: neuron_parameters(self.model.get_submodule(self.growable[n].layer))
                for n in self.growable
            }
            scores = {
                n: -torch.rand(len(p), generator=draw, dtype=torch.float64)
                for n, p in shapes.items()
            }
            vectors = {
                n: F.normalize(torch.randn(p.shape, generator=draw), dim=1).to(p)
                for n, p in shapes.items()
            }
        chosen: dict[str, list[int]] = {n: [] for n in self.growable}
        widths, growth = dict(self.widths), self.method.growth
        for name, row in self._ranked(scores, widths):
            if growth is not None and sum(map(len, chosen.values())) >= growth:
                break
            # one at least, else growth would end
            if any(chosen.values()) and self.task.kept(widths) >= allowed:
                break
            # what is left of the budget goes to those that still fit, in the same order
            if self.task.fits(widths | {name: widths[name] + 1}):
                widths[name] += 1
                chosen[name].append(row)
        rows = {n: torch.tensor(sorted(r)) for n, r in chosen.items() if r}
        return {n: (r, vectors[n][r.to(vectors[n].device)]) for n, r in rows.items()}

    def _ranked(
        self, scores: Mapping[str, Tensor], widths: Mapping[str, int]
    ) -> Iterator[tuple[str, int]]:
        """Neurons as (group, row) in the order in which they are split: by score, or so that the
        groups' shares stay alike.
        """
        order = {n: iter(s.sort().indices.tolist()) for n, s in scores.items()}
        if self.method.select == "width":
            left = {n: len(s) for n, s in scores.items()}
            while left:
                name = min(left, key=lambda n: (widths[n] / self.task.groups[n].channels, n))
                yield name, next(order[name])
                # without counting one that does not fit, `min` would pick its group for ever
                left[name] -= 1
                if not left[name]:
                    del left[name]
            return
        price = dict.fromkeys(scores, 1.0)
        if self.method.per == "cost" and self.method.select == "eigen":
            price = {n: self.task.price(self.widths, n) for n in scores}
        ranked = [
            (float(v) / price[n], n, row)
            for n, s in scores.items()
            for row, v in enumerate(s)
            if v < 0
        ]
        for _, name, row in sorted(ranked):
            yield name, row

    def _eigenpairs(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``λ_min [N]`` and its unit eigenvectors ``[N, d]``, per group."""
        task, method = self.task, self.method
        # other samples than those that the round's training began with
        sample = task.sample(method.samples, seed=self._seed(number) + 1)
        made = SplittingMatrices(self.model, self.groups, sample, only=self.growable)
        with task.billed(made, new=True) as work:
            self.way.note("loss", float(work.loss))
            if method.exact:
                pairs = {n: work.smallest_exactly(n) for n in work.neurons}
                values = {n: p[0] for n, p in pairs.items()}
                vectors = {n: p[1].to(task.example_input) for n, p in pairs.items()}
            else:
                seed = self._seed(number)
                values, vectors = work.smallest(tolerance=method.tolerance, seed=seed)
        return {n: v.cpu() for n, v in values.items()}, vectors

    def _split(self, split: Split) -> None:
        """Split neurons, and take the optimizer's state along."""
        old, groups = self.model, self.groups
        self.model = split_neurons(old, groups, split, self.method.epsilon)
        self.groups = self.task.regroup(self.model)
        self.optimizer = carried(self.optimizer, old, groups, split, self.groups)
        for name, (rows, _) in split.items():
            self.widths[name] += len(rows)
        self.splits += sum(len(rows) for rows, _ in split.values())


def split_neurons(model: nn.Module, groups: Groups, split: Split, epsilon: float) -> nn.Module:
    """The network with some neurons split into θ + ε v and θ - ε v, each with half of the outgoing
    weights.

    Args:
        model: The network.
        groups: Its groups.
        split: By group: rows ``[K]`` of its one producer, and unit vectors ``[K, d]``.
        epsilon: ε; 0 leaves the network's function as it is.
    """
    plan: dict[str, Resize] = {}
    for name, (rows, vectors) in split.items():
        (layer,) = groups[name].producers
        module: Any = model.get_submodule(layer)
        sources, double = copies(groups[name].channels, rows)
        theta = neuron_parameters(module)
        new = torch.cat([theta, theta[rows] - epsilon * vectors])
        new[rows] += epsilon * vectors
        size = module.weight[0].numel()
        tensors = {f"{layer}.weight": new[:, :size].reshape(-1, *module.weight.shape[1:])}
        if module.bias is not None:
            tensors[f"{layer}.bias"] = new[:, size]
        mix = F.one_hot(sources, groups[name].channels).T.to(theta) * torch.where(
            double, 0.5, 1.0
        ).to(theta)
        plan[name] = Resize(sources, mix, tensors)
    return resize(model, groups, plan)
