"""Operations that a step of a technique launches: a GPU is kept waiting by many small ones, so that
their number must not grow with groups, channels or candidates."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from widthbench.baselines.autoslim import Slimmable
from widthbench.methods.autoprune import AutoPrune, Gates

from widthbench.networks import models
from widthbench.recipe import Recipe
from widthbench.sensitivity.ablation import Ablation, Sample
from widthbench.sensitivity.splitting_matrices import SplittingMatrices
from widthbench.technique.budget import Budget
from widthbench.technique.task import Task
from widthbench.width import CostModel, find_groups, gated

VIEWS = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "t", "transpose", "permute"),
    *("slice", "select", "squeeze", "unsqueeze", "split", "split_with_sizes", "unbind", "detach"),
    *("alias", "as_strided", "lift_fresh", "diagonal"),
}


class Launches(TorchDispatchMode):
    """Operations by name, views left out."""

    def __init__(self):
        super().__init__()
        self.by_name = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.by_name[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


def launches(work):
    """How many operations a call needs, once what is made once is made."""
    work()
    with Launches() as counted:
        work()
    return sum(counted.by_name.values())


class Samples:
    def __init__(self, count=40):
        draw = torch.Generator().manual_seed(0)
        self.x = torch.rand(count, 1, 8, 8, generator=draw)
        self.y = torch.arange(count) % 10

    def __len__(self):
        return len(self.y)

    def batches(self, size, *, generator=None, augment=None):
        for at in range(0, len(self), size):
            yield self.x[at : at + size], self.y[at : at + size]


def task_of(widths):
    samples = Samples()
    model = models.create(
        "lenet_300_100", classes=10, channels=1, size=8, seed=0, widths=widths
    ).eval()
    groups = find_groups(model, samples.x[:1])
    cost = CostModel(model, groups, samples.x[:1])
    return Task(
        model=model,
        groups=groups,
        example_input=samples.x[:1],
        budget=Budget("macs", 0.5),
        cost=cost,
        reference=cost,
        train=samples,
        val=samples,
        recipe=Recipe(epochs=50, batch_size=40, lr=0.01),
    )


def pass_of(task):
    """A forward and a backward pass."""
    loss = torch.nn.functional.cross_entropy(task.model(task.train.x), task.train.y)
    torch.autograd.grad(loss, list(task.model.parameters()))


def gate_step(task):
    """A step of AutoPrune's auxiliary parameters, its two passes' worth of gating included."""
    gates, model = Gates(AutoPrune(mu=0.1), task, task.recipe), copy.deepcopy(task.model)

    def step():
        with gated(model, task.groups, gates.open, on="weight", products=gates.products):
            gates.step = 1
            gates._learn(model)
        gates._forget()

    return step


def slimmable_step(task):
    """A step of AutoSlim: four widths."""
    first = {n: torch.rand(g.channels) for n, g in task.groups.items()}
    slimmable, model = Slimmable(task, first, 0.1), copy.deepcopy(task.model)

    def step():
        with gated(model, task.groups, slimmable.gates):
            for loss in slimmable.losses(model, task.train.x, task.train.y):
                torch.autograd.grad(loss, list(model.parameters()))

    return step


@pytest.mark.parametrize(("step", "passes", "more"), [(gate_step, 1, 1), (slimmable_step, 4, 8)])
def test_a_group_adds_little_beside_the_passes(step, passes, more):
    few, many = task_of((12, 12)), task_of((12,) * 8)
    added = launches(step(many)) - launches(step(few))
    usual = launches(lambda: pass_of(many)) - launches(lambda: pass_of(few))
    assert (added - passes * usual) / 6 <= more, (added, usual)


@pytest.mark.parametrize("way", ["update", "gates"])
def test_brute_force_needs_no_more_of_them_for_more_candidates(way):
    counts = []
    for channels in (8, 64):
        task = task_of((channels, 6))
        sample = Sample(task.train.x, task.train.y)
        name = next(iter(task.groups))
        with Ablation(task.model, task.groups, sample, way=way, memory_mib=64) as brute:
            index = torch.arange(channels)
            counts.append(launches(lambda w=brute, i=index, n=name: w.losses({}, {n: i})))
    assert counts[1] <= counts[0] + 2, counts


def test_products_with_splitting_matrices_need_no_more_of_them_for_more_neurons():
    counts = []
    for neurons in (4, 32):
        task = task_of((neurons, 6))
        work = SplittingMatrices(task.model, task.groups, Sample(task.train.x, task.train.y))
        vectors = {n: torch.randn_like(work.parameters(n)) for n in work.neurons}
        rows = {n: torch.arange(len(v)) for n, v in vectors.items()}
        counts.append(launches(lambda w=work, v=vectors, r=rows: w.product(v, r)))
    assert counts[0] == counts[1], counts
