"""Neuron removal: take whole neurons out of a trained network, one after another, by what each
removal does to the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from widthbench.errors import UsageError
from widthbench.randomness import seeded
from widthbench.sensitivity.ablation import Ablation, Sample
from widthbench.sensitivity.backprop_diagonal import BackpropDiagonal
from widthbench.sensitivity.derivatives import GateDerivatives, kinked
from widthbench.technique.base import Outcome, Technique
from widthbench.technique.budget import Allocation
from widthbench.technique.parameters import Count, Positive
from widthbench.technique.removal import (
    Scores,
    after,
    candidates,
    curves,
    kept_after,
    open_gates,
    remove,
    removed,
    told,
    unfinished,
    untouched,
)
from widthbench.technique.task import State, Task
from widthbench.width.groups import Groups

Ranking = Literal["oracle", "first_order", "second_order", "random"]
SAVE_EVERY = 30.0  # seconds between the states that a killed run resumes from


class NeuronRemoval(Technique):
    """Remove the neurons that the loss misses least, without retraining (Sharma, Wolfe and Raj,
    2017).

    With a gate g on each channel, where its consumers read it, removal changes the loss by ``ΔE =
    E(g=0) - E(g=1)``. Rankings:

    - oracle: ΔE itself, by brute force;
    - first_order: ``-∂E/∂g`` (Mozer and Smolensky, NeurIPS 1988);
    - second_order: ``-∂E/∂g + ½ ∂²E/∂g²`` (the parabola through g = 1, evaluated at 0);
    - random: any order, the control.

    E is the mean cross-entropy over training samples. Channels of all groups are ranked together,
    and each group keeps at least one (of each block, where blocks must keep equal counts: then one
    of each goes at a time, for the sum of their ΔE).

    Args:
        ranking: As above.
        rerank: "single": one ranking of the whole network. "iterative": a new one after each
            removal.
        diagonal: Of the second order: "backprop" drops off-diagonal terms (the document's; LeCun et
            al. 1989), "exact" does not; with piecewise linear activations exact holds almost
            everywhere, and the series says so.
        softplus_beta: For "backprop": ReLU takes the second derivative of softplus with this β;
            without it, ReLU behind a gate is refused.
        samples: Training samples that E is the mean of, drawn by the task's seed.
        step: Removals between two rankings of "iterative".
        allocation: "global" cuts where the ranking says; "uniform" keeps the same fraction of every
            group.
        memory_mib: Limit on the activations of a batch, in MiB; None: 64 on a CPU and a quarter of
            what is free on a GPU for the oracle, 256 for derivatives.
        processes: Worker processes (or GPUs) that share the oracle's samples.
    """

    id = "neuron-removal"
    access = "labelled"
    bibtex = """@inproceedings{sharma2017incredible,
  title = {The Incredible Shrinking Neural Network: New Perspectives on Learning Representations
    Through the Lens of Pruning},
  author = {Sharma, Aditya and Wolfe, Nikolas and Raj, Bhiksha},
  booktitle = {arXiv preprint arXiv:1701.04465},
  year = {2017}
}"""

    ranking: Ranking = "oracle"
    rerank: Literal["single", "iterative"] = "single"
    diagonal: Literal["backprop", "exact"] = "backprop"
    softplus_beta: Positive | None = None
    samples: Count = 10_000
    step: Count = 1
    allocation: Allocation = "global"
    memory_mib: Positive | None = None
    processes: Count = 1

    def __post_init__(self) -> None:
        """Refuse a β that nothing would use."""
        back_propagated = self.ranking == "second_order" and self.diagonal == "backprop"
        if self.softplus_beta is not None and not back_propagated:
            raise ValueError("softplus_beta needs ranking='second_order' with diagonal='backprop'")

    def skip(self, task: Task) -> str | None:
        """A layer that the back-propagated diagonal cannot pass, where that is asked for."""
        if self.ranking != "second_order" or self.diagonal != "backprop":
            return None
        x = task.example_input
        try:
            BackpropDiagonal(
                task.model,
                task.groups,
                Sample(x, x.new_zeros(len(x))),
                softplus_beta=self.softplus_beta,
            )
        except UsageError as error:
            return str(error)
        return None

    def prepare(self, task: Task) -> State:
        """The order of removal, ``[N]`` per group: 0 for what goes first, infinity for what stays;
        and curves, if wanted.
        """
        order = untouched(task.groups)
        if self.ranking == "random":
            remove(order, drawn_at_random(task), task.groups)
            if not task.curves:
                return {"order": order}
        with ranker(self, task) as work:
            if self.ranking != "random" and self.rerank == "single":
                work.expect(sum(len(o) for o in order.values()))
                remove(order, work.changes(order, save=True), task.groups)
            else:
                work.expect(self.rankings(task.groups))
                while unfinished(order, task.groups):
                    order = task.checkpoint(
                        f"{removed(order)} removals",
                        partial(self.remove_for_a_while, order, work, task.groups),
                    )
            return {"order": order} | ({"curves": self.curves(work, order)} if task.curves else {})

    def rankings(self, groups: Groups) -> int:
        """How many candidates all rankings of "iterative" have together, about: the bar's
        length.
        """
        there = sum(g.channels for g in groups.values())
        gone = sum(g.blocks for g in groups.values()) / len(groups) * self.step
        return int(
            sum(
                there - k * gone
                for k in range(int(sum(g.channels - g.blocks for g in groups.values()) // gone))
            )
        )

    def remove_for_a_while(self, order: Scores, work: Ranker, groups: Groups) -> Scores:
        """The order after as many more removals as half a minute takes."""
        order, begin = {n: o.clone() for n, o in order.items()}, time.monotonic()
        while True:
            remove(order, work.changes(order), groups, self.step)
            if time.monotonic() - begin >= SAVE_EVERY or not unfinished(order, groups):
                return order

    def decide(self, task: Task, state: State) -> Outcome:
        """Keep what would go last."""
        order = state["order"]
        plan = task.keep_best(order, self.allocation)
        if not task.curves:
            return Outcome(plan)
        path = [kept_after(order, k) for k in range(removed(order) + 1)]
        series = told(order, state["curves"])
        if self.ranking == "second_order" and self.diagonal == "exact":
            series["almost_everywhere"] = kinked(task.model)
        return Outcome(plan, path=path, series=series)

    def curves(self, work: Ranker, order: Scores) -> Scores:
        """What makes pictures: by brute force, beside what the ranking predicts."""
        first = second = None
        if self.ranking in ("first_order", "second_order"):
            whole = {n: torch.arange(len(o)) for n, o in order.items()}
            gates = open_gates(after(order, 0), work.sample.x)
            first = work.slopes.first(gates)
            second = work.second(gates, whole) if self.ranking == "second_order" else None
        return curves(work.brute, order, first, second, errors=self.rerank == "single")


class Ranker:
    """Ranks the channels that are still there, by one of the rankings.

    Args:
        method: Says how.
        task: The network, its groups and data.
        sample: What the loss is averaged over.
        brute: Brute force on it; None where neither the ranking nor curves need it.
    """

    def __init__(
        self, method: NeuronRemoval, task: Task, sample: Sample, brute: Ablation | None
    ) -> None:
        self.method, self.task, self.sample = method, task, sample
        if brute is not None:
            self.brute = brute
        limit = {} if method.memory_mib is None else {"memory_mib": method.memory_mib}
        if method.ranking in ("first_order", "second_order"):
            self.slopes = GateDerivatives(task.model, task.groups, sample, **limit)
            self.curvature: GateDerivatives | BackpropDiagonal = self.slopes
        if method.ranking == "second_order" and method.diagonal == "backprop":
            beta = method.softplus_beta
            self.curvature = BackpropDiagonal(
                task.model, task.groups, sample, softplus_beta=beta, **limit
            )
        self._bar: Iterator[int] = iter(())

    def expect(self, count: int) -> None:
        """Start a bar over that many candidates."""
        self._bar = iter(
            self.task.progress(range(count), desc=f"{self.method.id} by {self.method.ranking}")
        )

    def tick(self, count: int) -> None:
        """That many candidates have been ranked."""
        for _ in range(count):
            next(self._bar, None)

    def changes(self, order: Scores, *, save: bool = False) -> Scores:
        """What removing each channel that is still there would do to the loss, up to a constant:
        ``[N]``, infinity for the others.

        Args:
            order: When each channel was removed; infinity for those that are there.
            save: Keep what each group took, so that a killed run resumes at the next one.
        """
        method = self.method
        gates, here = open_gates(order, self.sample.x), candidates(order, self.task.groups)
        if method.ranking == "oracle":
            return self._brute_force(gates, here, save)
        with self.task.billed(self.slopes):
            first = self.slopes.first(gates)
        changes = {n: -d for n, d in first.items()}
        if method.ranking == "second_order":
            with self.task.billed(self.curvature):
                second = self.second(gates, here)
            changes = {n: d + 0.5 * second[n] for n, d in changes.items()}
        self.tick(sum(map(len, here.values())))
        return {
            n: torch.full_like(d, math.inf).index_copy(0, here[n], d[here[n]])
            for n, d in changes.items()
        }

    def second(self, gates: Scores, here: Scores) -> Scores:
        """``∂²E/∂g²`` by the method's diagonal."""
        work = self.curvature
        return (
            work.second(gates) if isinstance(work, BackpropDiagonal) else work.second(gates, here)
        )

    def _brute_force(self, gates: Scores, here: Scores, save: bool) -> Scores:
        changes = {}
        now = 0.0
        # without blocks, subtracting the present loss would not change the order
        if save or any(g.blocks > 1 for g in self.task.groups.values()):
            with self.task.billed(self.brute):
                now = self.brute.loss(gates)
        for name, index in here.items():

            def work(name: str = name, index: Tensor = index) -> dict[str, Tensor]:
                with self.task.billed(self.brute):
                    return self.brute.losses(gates, {name: index})

            losses = (self.task.checkpoint(f"brute force on {name}", work) if save else work())[
                name
            ]
            changes[name] = torch.full(
                (len(gates[name]),), math.inf, dtype=torch.float64
            ).index_copy(0, index, losses - now)
            self.tick(len(index))
        return changes


@contextmanager
def ranker(method: NeuronRemoval, task: Task) -> Iterator[Ranker]:
    """A ranker on a sample of the training data; its worker processes end with the block."""
    split = method.processes if method.ranking == "oracle" else 1
    sample = task.sample(method.samples)
    if method.ranking != "oracle" and not task.curves:
        yield Ranker(method, task, sample, None)
        return
    with Ablation(
        task.model, task.groups, sample, memory_mib=method.memory_mib, processes=split
    ) as brute:
        if method.ranking == "oracle":
            task.spend(forward_macs=brute.forward_macs)
        yield Ranker(method, task, sample, brute)


def drawn_at_random(task: Task) -> Scores:
    """A number for each channel, by the task's seed."""
    with seeded(task.seed):
        return {n: torch.rand(g.channels, dtype=torch.float64) for n, g in task.groups.items()}
