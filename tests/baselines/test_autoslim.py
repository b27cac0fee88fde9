import copy
import math

import pytest
import torch
import zoo
from killed import assert_as_if_never_killed, killed_at
from torch import nn
from torch.nn import functional as F
from widthbench.baselines import autoslim
from widthbench.baselines.autoslim import AutoSlim, Slimmable, at_budget, slimmer

from widthbench.data.samples import First
from widthbench.errors import UsageError
from widthbench.experiment import adaptation
from widthbench.experiment.adaptation import task_of
from widthbench.experiment.bases import load_data, obtain_base
from widthbench.experiment.cell import Cell
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store
from widthbench.networks import models
from widthbench.recipe import Recipe
from widthbench.technique.budget import Budget
from widthbench.technique.task import Task
from widthbench.training.loop import fit
from widthbench.training.measuring import accuracy
from widthbench.training.recalibration import recalibrate
from widthbench.width import CostModel, find_groups, keep, resize

BASE = Recipe(epochs=3, batch_size=32, lr=0.02)
BRIEF = {"epochs": 1, "steps": 4, "least": 0.2}


def cell(params=None, **fields):
    given = {
        "dataset": "digits",
        "technique": "autoslim",
        "params": BRIEF | (params or {}),
        "budget": "macs:0.5",
        "base": BASE,
        "finetune": BASE,
        "model": "lenet_300_100",
        "size": 16,
        "seed": 0,
    }
    return Cell(**given | fields)


def task_on(cls=zoo.Plain, budget="macs:0.5"):
    model, x, groups = zoo.certified(cls)
    cost = CostModel(model, groups, x)
    sample = zoo.sample_for(x, count=12)
    recipe = Recipe(epochs=1, batch_size=6, lr=0.01)
    return Task(
        model=model,
        groups=groups,
        example_input=x,
        budget=Budget.parse(budget),
        cost=cost,
        reference=cost,
        train=sample,
        val=sample,
        recipe=recipe,
        fit=lambda m, t, r, **more: fit(m, t, r, macs=1, **more),
    )


def by_index(task):
    return {n: -torch.arange(g.channels, dtype=torch.float32) for n, g in task.groups.items()}


def test_a_step_follows_the_sandwich_rule():
    task = task_on(zoo.Mlp)
    slimmable, seen = Slimmable(task, by_index(task), 0.25), []
    model = task.model

    class Spy(nn.Module):
        def forward(self, x):
            seen.append({n: int(g.sum()) for n, g in slimmable.gates.items()})
            return model(x)

    x, y = task.train.x, task.train.y
    losses = list(slimmable.losses(Spy(), x, y))
    whole = {n: g.channels for n, g in task.groups.items()}
    assert seen[0] == whole
    assert seen[1] == {n: max(1, round(0.25 * c)) for n, c in whole.items()}
    assert len(seen) == len(losses) == 4
    assert all(
        round(0.25 * whole[n]) <= w <= whole[n] for widths in seen[2:] for n, w in widths.items()
    )
    assert seen[2] != seen[3]
    with torch.no_grad():
        logits = model(x)
    assert torch.allclose(losses[0], F.cross_entropy(logits, y))
    soft = logits.softmax(1)
    assert torch.allclose(
        losses[1], -(soft * logits.log_softmax(1)).sum(1).mean()
    )  # the spy's network is not gated
    assert not soft.requires_grad


def test_gates_open_the_first_channels_as_a_cut_network_would_have_them():
    task = task_on(zoo.Grouped)
    slimmable = Slimmable(task, by_index(task), 0.5)
    slimmable.set(slimmable.widths(0.5))
    rows = {n: g.nonzero().flatten() for n, g in slimmable.gates.items()}
    for name, group in task.groups.items():
        size = group.channels // group.blocks
        expected = [
            b * size + i for b in range(group.blocks) for i in range(max(1, round(size / 2)))
        ]
        assert rows[name].tolist() == expected
    x = task.train.x
    cut = resize(task.model, task.groups, {n: keep(r) for n, r in rows.items()})
    with autoslim.gated(task.model, task.groups, slimmable.gates):
        assert zoo.error(task.model(x), cut(x)) < 1e-12


def brute_force(widths, task, level, name):
    """The widest that brings the MACs to the level while one group alone gives up half of its
    channels at most; or None."""
    blocks = task.groups[name].blocks
    for width in range(widths[name], max(1, widths[name] // blocks // 2) * blocks - 1, -blocks):
        if task.cost({**widths, name: width}).macs <= level * task.reference.macs:
            return {**widths, name: width}
    return None


@pytest.mark.parametrize("cls", zoo.EXACT)
@pytest.mark.parametrize("level", [0.95, 0.9, 0.6])
def test_shapes_at_a_level_are_those_of_brute_force(cls, level):
    task = task_on(cls)
    whole = {n: g.channels for n, g in task.groups.items()}
    shapes = slimmer(whole, task, level)
    for shape in shapes:
        assert task.cost(shape).macs <= level * task.reference.macs
    for name in whole:
        alone = brute_force(whole, task, level, name)
        assert alone is None or alone in shapes
        if alone is None:  # half of it, and the others are narrowed alike as far as that takes
            half = max(1, whole[name] // task.groups[name].blocks // 2) * task.groups[name].blocks
            assert joint(task, whole, name, half, level) in shapes


def joint(task, whole, name, half, level):
    """One group at half of its channels, the others at the largest common share that brings the
    MACs to the level, filled up."""
    groups, found = task.groups, None
    others = [n for n in groups if n != name]
    for share in torch.linspace(0, 1, 4001).tolist():
        shape = {
            n: groups[n].blocks * max(1, math.floor(share * whole[n] / groups[n].blocks + 0.5))
            for n in others
        } | {name: half}
        if task.cost(shape).macs <= level * task.reference.macs:
            found = shape
    if found is None:
        return {n: g.blocks for n, g in groups.items()}
    for other in sorted(
        others, key=lambda n: (found[n] / groups[n].blocks + 0.5) * groups[n].blocks / whole[n]
    ):
        more = {**found, other: found[other] + groups[other].blocks}
        if found[other] < whole[other] and task.cost(more).macs <= level * task.reference.macs:
            found = more
    return found


@pytest.mark.parametrize(
    ("model", "steps", "taken"),
    [
        ("mobilenetv2_100_cifar", 30, 2),
        ("vgg16_cifar", 30, 3),
        ("test_resnet", 8, 8),
        pytest.param("mobilenetv2_100_cifar", 30, 8, marks=pytest.mark.slow),
        pytest.param("vgg16_cifar", 30, 8, marks=pytest.mark.slow),
    ],
)
def test_every_group_is_a_candidate_and_none_is_closed_unseen(model, steps, taken):
    net, x = (
        models.create(model, classes=10, channels=3, size=32, seed=0).eval(),
        torch.zeros(1, 3, 32, 32),
    )
    groups = find_groups(net, x).select("inner")
    cost = CostModel(net, groups, x)
    task = Task(
        model=net,
        groups=groups,
        example_input=x,
        budget=Budget("macs", 0.5),
        cost=cost,
        reference=cost,
        train=None,
        val=None,
    )
    draw, last = torch.Generator().manual_seed(0), {n: g.channels for n, g in groups.items()}
    for step in range(1, taken + 1):
        level = 0.1 ** (step / steps)
        shapes = slimmer(last, task, level)
        assert (
            len(shapes) >= min(len(groups), sum(last[n] > groups[n].blocks for n in groups)) - 1
        )  # two may be the same shape
        for shape in shapes:
            assert all(
                shape[n]
                >= last[n] // 2 // groups[n].blocks * groups[n].blocks * 0.75 - groups[n].blocks
                for n in groups
            )
            assert cost(shape).macs <= level * cost.macs
            assert cost(shape).macs > 0.85 * level * cost.macs
        last = shapes[int(torch.randint(len(shapes), (), generator=draw))]


def test_where_nothing_can_shrink_further_the_shape_stays():
    task = task_on(zoo.Plain)
    whole, floor = (
        {n: w(g) for n, g in task.groups.items()}
        for w in (lambda g: g.channels, lambda g: g.blocks)
    )
    assert slimmer(whole, task, 0.0) == [floor]
    assert slimmer(floor, task, 0.0) == [floor]


@pytest.mark.parametrize("budget", ["macs:0.7", "macs:0.5", "params:0.4", "channels:0.5", "macs:1"])
def test_the_shape_at_a_budget_is_on_the_path_and_full(budget):
    task = task_on(zoo.Plain, budget)
    path = [{n: g.channels for n, g in task.groups.items()}]
    for level in (0.8, 0.6, 0.45):
        path.append(slimmer(path[-1], task, level)[0])
    found = at_budget(path, task)
    assert task.kept(found) <= task.asked
    for name, group in task.groups.items():  # nothing that the path took more of can be given back
        if found[name] < group.channels:
            more = {**found, name: found[name] + group.blocks}
            assert task.kept(more) > task.asked
    if budget == "macs:1":
        assert found == path[0]


class Scripted(AutoSlim):
    """Scores shapes by a rule instead of by data."""

    def _score(self, task, model, slimmable, widths):
        return (100.0 - 10 * (task.groups["conv1"].channels - widths["conv1"]), 0.0)


def test_the_group_that_accuracy_misses_least_is_slimmed():
    task = task_on(zoo.Plain)
    slimmable = Slimmable(task, by_index(task), 0.5)
    whole = {n: g.channels for n, g in task.groups.items()}
    method = Scripted(least=0.25, steps=4)
    state = method._further(task, task.model, slimmable, whole, 1)
    widths = state["widths"]
    assert widths["conv1"] == task.groups["conv1"].channels
    assert widths != whole
    assert task.cost(widths).macs <= 0.25**0.25 * task.reference.macs


LENET, RESNET = ("lenet_300_100", 16), ("test_resnet", 32)
FRESH = {"final": "fresh", "final_epochs": 0.5}
AS_FOUND = {"final_epochs": 0, "order": "index"}


@pytest.mark.parametrize(
    ("model", "size", "params"),
    [
        (*LENET, {}),
        (*LENET, FRESH),
        (*LENET, AS_FOUND),
        (*RESNET, {}),
        pytest.param(*RESNET, FRESH, marks=pytest.mark.slow),
        pytest.param(*RESNET, AS_FOUND, marks=pytest.mark.slow),
    ],
)
def test_it_slims_real_networks(model, size, params):
    brief = {"calibration": 64, "samples": 32, "epochs": 0.25, "final_epochs": 0.25, **params}
    budgets = ("macs:0.6", "macs:0.25", "macs:0.1")[:: 1 if "lenet" in model else 2]
    where = {"model": model, "size": size}
    if "resnet" in model:
        where |= dict.fromkeys(("base", "finetune"), BASE.model_copy(update={"epochs": 0.25}))
    records = [run_cell(cell(brief, **where, budget=b), Store()) for b in budgets]
    for record in records:
        assert record.status == "done", record.reason
        assert record.met
        assert record.series["trajectory.macs"] == sorted(
            record.series["trajectory.macs"], reverse=True
        )
        assert len(record.series["trajectory.macs"]) == 5
    assert all(r.series == records[0].series for r in records)  # one path for all budgets
    bills = [r.spent["decision"].forward_macs for r in records]
    if params.get("final_epochs") == 0:
        assert bills[0] == bills[1]
    else:  # narrower shapes are cheaper to train
        assert bills == sorted(set(bills), reverse=True)


def test_the_bill_counts_every_pass(fresh_cache, monkeypatch):
    calls, real = [], AutoSlim._score
    monkeypatch.setattr(AutoSlim, "_score", lambda *args: calls.append(1) or real(*args))
    given = cell({"final_epochs": 1})
    record = run_cell(given, Store())
    split, base, spent = load_data(given), record.base_macs, record.spent["decision"]
    steps = len(split.train) // 32 * 32 + (len(split.train) % 32 > 1) * (len(split.train) % 32)
    slimmable, final = 4 * steps * base, steps * record.macs
    assert spent.backward_macs == 2 * (slimmable + final)
    more = spent.forward_macs - (slimmable + final + len(calls) * len(split.val) * base)
    assert 0 <= more <= base  # a sample to measure the resized network with
    assert len(calls) > 4


@pytest.mark.parametrize("where", ["training", "path"])
def test_a_killed_run_resumes_to_the_same_network_and_bill(where, fresh_cache, monkeypatch):
    monkeypatch.setattr("widthbench.training.resume.STATE_EVERY_S", 0.0)
    given = cell({"epochs": 3})
    whole = run_cell(given, Store())
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(fresh_cache) + "-2")
    owner, name, at = (Slimmable, "losses", 80) if where == "training" else (AutoSlim, "_score", 4)
    calls = killed_at(monkeypatch, given, owner, name, at)
    steps, losses = [], Slimmable.losses
    monkeypatch.setattr(Slimmable, "losses", lambda *args: steps.append(1) or losses(*args))
    assert_as_if_never_killed(run_cell(given, Store()), whole)
    if where == "path":
        assert not steps  # what was trained is not trained again
        assert len(calls) - at < 8
    else:
        assert 0 < len(steps) < 3 * 34  # not from the start


def test_shapes_are_scored_with_statistics_of_their_own_on_the_first_samples_of_val():
    given = cell(model="test_resnet", size=32)
    base = obtain_base(given)
    task = task_of(given, base, AutoSlim())
    first = {n: -torch.arange(g.channels, dtype=torch.float32) for n, g in task.groups.items()}
    slimmable = Slimmable(task, first, 0.1)
    widths = slimmable.widths(0.5)
    plan = {n: keep(torch.arange(w)) for n, w in widths.items()}
    cut = resize(task.model, task.groups, plan)
    recalibrate(cut, task.train, samples=64, macs=0, seed=task.seed)
    expected = accuracy(cut, First(task.val, 50))
    assert expected.samples == 50
    method = AutoSlim(samples=50, calibration=64)
    model = copy.deepcopy(task.model)
    with autoslim.gated(model, task.groups, slimmable.gates):
        top1, loss = method._score(task, model, slimmable, widths)
    assert top1 == pytest.approx(expected.top1)
    assert -loss == pytest.approx(expected.loss, rel=1e-4)
    stale = accuracy(resize(task.model, task.groups, plan), First(task.val, 50))
    assert stale.loss != pytest.approx(expected.loss, rel=0.05)


@pytest.mark.parametrize("final", ["slimmable", "fresh"])
def test_what_the_found_shape_starts_from(final, monkeypatch):
    started, real = [], adaptation.fit

    def watched(model, *args, desc="", **options):
        started.append((desc, copy.deepcopy(model)))
        return real(model, *args, desc=desc, **options)

    monkeypatch.setattr(adaptation, "fit", watched)
    record = run_cell(cell({"final": final}, seed=11), Store())
    assert record.status == "done", record.trace
    (small,) = [m for desc, m in started if desc == "autoslim macs:0.5"]
    (last,) = [m for desc, m in started if desc == "autoslim"]
    again = copy.deepcopy(small)
    models.reinitialise(again, 11)
    same = [torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True)]
    assert all(same) == (final == "fresh")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in last.parameters())


def test_the_first_samples():
    x = torch.arange(10.0)[:, None]

    class Data:
        def batches(self, size):
            return zip(x.split(size), x.split(size), strict=True)

    parts = [len(y) for _, y in First(Data(), 7).batches(3)]
    assert parts == [3, 3, 1]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"narrowest": 0}, "'narrowest': Input should be greater than 0"),
        ({"least": 1}, "'least': Input should be less than 1"),
        ({"steps": 0}, "'steps': Input should be greater than or equal to 1"),
        ({"epochs": 0}, "'epochs': Input should be greater than 0"),
    ],
)
def test_parameters_that_make_no_sense(params, message):
    with pytest.raises(ValueError, match=message):
        AutoSlim(**params)


def test_divergence_is_named():
    record = run_cell(cell(finetune=Recipe(epochs=1, batch_size=32, lr=1e6)), Store())
    assert record.status == "failed"
    assert "diverged" in record.reason


def test_weights_that_the_last_step_spoils_are_named():
    task = task_on(zoo.Mlp)

    def spoiling(model, train, recipe, **more):
        next(model.parameters()).data[0, 0] = float("nan")

    with pytest.raises(UsageError, match="left weights that are not finite; lower lr"):
        AutoSlim(**BRIEF).prepare(Task(**{**vars(task), "fit": spoiling}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_amp_and_layouts_reach_every_width(layout, monkeypatch):
    task, seen = task_on(zoo.Plain), []
    monkeypatch.setattr("widthbench.training.state.fastest_layout", lambda model: layout)
    model, x = task.model.float(), task.example_input.float()
    data, cost = zoo.Shuffled(x, count=12), CostModel(model, task.groups, x)

    shared = {"train": data, "val": data, "example_input": x, "cost": cost, "reference": cost}
    recipe = task.recipe.model_copy(update={"amp": True})
    watched = {"recipe": recipe, "fit": zoo.watched_fit(seen, layout)}
    AutoSlim(**BRIEF | {"steps": 1}).prepare(Task(**{**vars(task), **shared, **watched}))
    assert set(seen) == {(torch.bfloat16, True)}
    assert len(seen) == 2 * 2 * 4  # two convolutions, two steps at four widths
