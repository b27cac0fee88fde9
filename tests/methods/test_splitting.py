import copy
import dataclasses
import itertools

import pytest
import torch
import zoo
from killed import assert_as_if_never_killed, killed_at
from torch import nn
from torch.nn import functional as F
from widthbench.methods import splitting
from widthbench.methods.splitting import Splitting, split_neurons

import widthbench
from widthbench.errors import UsageError
from widthbench.experiment.cell import Cell
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store
from widthbench.recipe import Recipe
from widthbench.sensitivity.ablation import Sample
from widthbench.sensitivity.splitting_matrices import (
    SplittingMatrices,
    neuron_parameters,
    splittable,
)
from widthbench.technique.budget import Budget
from widthbench.technique.growth import carried, copies
from widthbench.technique.task import Task
from widthbench.training.loop import fit
from widthbench.width import CostModel, find_groups

BASE = Recipe(epochs=3, batch_size=32, lr=0.02)
BRIEF = {"epochs": 0.5, "rounds": 2, "samples": 64}


def cell(params=None, **fields):
    given = {
        "dataset": "digits",
        "technique": "splitting",
        "params": BRIEF | (params or {}),
        "budget": "macs:0.5",
        "base": BASE,
        "finetune": BASE,
        "model": "lenet_300_100",
        "size": 16,
        "seed": 0,
    }
    return Cell(**given | fields)


def test_copies_by_hand():
    sources, double = copies(4, torch.tensor([1, 3]))
    assert sources.tolist() == [0, 1, 2, 3, 1, 3]
    assert double.tolist() == [False, True, False, True, True, True]


def test_a_split_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    model[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    model[0].bias.data = torch.tensor([0.5, -0.5], dtype=torch.float64)
    model[2].weight.data = torch.tensor([[6.0, 8.0]], dtype=torch.float64)
    groups = find_groups(model, torch.randn(1, 2, dtype=torch.float64), cache=False)
    v = torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64)
    new = split_neurons(model, groups, {"0": (torch.tensor([1]), v)}, 0.1)
    assert torch.allclose(
        new[0].weight, torch.tensor([[1.0, 2.0], [3.06, 4.0], [2.94, 4.0]], dtype=torch.float64)
    )
    assert torch.allclose(new[0].bias, torch.tensor([0.5, -0.42, -0.58], dtype=torch.float64))
    assert torch.allclose(new[2].weight, torch.tensor([[6.0, 4.0, 4.0]], dtype=torch.float64))


def gradients(model, sample):
    model.zero_grad()
    F.cross_entropy(model(sample.x), sample.y).backward()
    return {
        n: {"momentum_buffer": p.grad.clone(), "step": 3}
        for n, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("cls", [zoo.Mlp, zoo.Plain, zoo.Dense, zoo.Residual])
def test_the_optimizers_state_follows_as_gradients_do(cls):
    model, x, groups = zoo.certified(cls)
    sample = zoo.sample_for(x)
    found, _ = splittable(model, groups, x[:1])
    split = {}
    for name, neurons in found.items():
        d = neuron_parameters(model.get_submodule(neurons.layer)).shape[1]
        split[name] = (
            torch.tensor([0, 2]),
            F.normalize(torch.ones(2, d, dtype=torch.float64), dim=1),
        )
    new = split_neurons(model, groups, split, 0.0)
    after = find_groups(new, x, cache=False)
    state = carried(gradients(model, sample), model, groups, split, after)
    expected = gradients(new, sample)
    assert split
    assert state.keys() == expected.keys()
    for name, kept in state.items():
        assert kept["step"] == 3
        assert torch.allclose(
            kept["momentum_buffer"], expected[name]["momentum_buffer"], atol=1e-12
        ), name


def test_squares_of_gradients_scale_by_a_quarter():
    model, x, groups = zoo.certified(zoo.Mlp)
    split = {"fc1": (torch.tensor([1]), torch.zeros(1, 17, dtype=torch.float64))}
    state = {
        n: {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
        for n, p in model.named_parameters()
    }
    new = carried(
        state,
        model,
        groups,
        split,
        find_groups(split_neurons(model, groups, split, 0.0), x, cache=False),
    )
    assert new["fc1.weight"]["exp_avg"][:, 0].tolist() == [1.0, 0.5, *[1.0] * 10, 0.5]
    assert new["fc1.weight"]["exp_avg_sq"][:, 0].tolist() == [1.0, 0.25, *[1.0] * 10, 0.25]
    assert new["fc2.weight"]["exp_avg_sq"].unique().tolist() == [1.0]
    assert new["fc2.weight"]["exp_avg_sq"].shape == (8, 13)


def test_training_goes_on_with_the_state_that_it_is_given():
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 4, 4), torch.randint(0, 5, (64,))

    class Data:
        def __len__(self):
            return 64

        def batches(self, size, *, generator=None, augment=None):
            return zip(x.split(size), y.split(size), strict=True)

    start = zoo.Mlp()
    constant = {"batch_size": 16, "lr": 0.01, "min_lr": 0.01}
    whole = copy.deepcopy(start)
    fit(whole, Data(), Recipe(epochs=4, **constant), macs=1)
    halves, state = copy.deepcopy(start), {}
    for _ in range(2):
        fit(halves, Data(), Recipe(epochs=2, **constant), macs=1, optimizer_state=state)
    without = copy.deepcopy(start)
    for _ in range(2):
        fit(without, Data(), Recipe(epochs=2, **constant), macs=1)
    assert set(state) == {n for n, _ in start.named_parameters()}
    for a, b, c in zip(whole.parameters(), halves.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def stuck_on_a_sine():
    """(network, groups, sample): one neuron on a sine, at a minimum of its loss, in float64."""
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 80, dtype=torch.float64)[:, None]
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)).double().eval()
    sample = Sample(x, torch.sin(x), lambda out, y: (out - y).square().mean(dim=1))
    descend(model, sample)
    return model, find_groups(model, x[:1], cache=False), sample


def descend(model, sample, steps=60):
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=100,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = sample.criterion(model(sample.x), sample.y).mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return float(closure().detach())


def test_where_gradient_descent_is_stuck_a_split_lowers_the_loss_by_the_law():
    model, groups, sample = stuck_on_a_sine()
    before = descend(model, sample, 1)
    slope = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert slope < 1e-8
    matrices = SplittingMatrices(model, groups, sample)
    values, vectors = matrices.smallest_exactly("0")
    assert float(values[0]) < -1e-3
    one = {"0": (torch.tensor([0]), vectors)}
    for epsilon in (0.05, 0.02, 0.01):
        with torch.no_grad():
            after = float(
                sample.criterion(
                    split_neurons(model, groups, one, epsilon)(sample.x), sample.y
                ).mean()
            )
        assert after - before == pytest.approx(epsilon**2 * float(values[0]) / 2, rel=0.1)
    grown = split_neurons(model, groups, one, 0.05)
    assert descend(grown, sample) < 0.97 * before
    same = split_neurons(model, groups, one, 0.0)
    assert descend(same, sample) == pytest.approx(
        before, rel=1e-6
    )  # without a split to leave by, it stays


@pytest.mark.parametrize(
    ("params", "budget"),
    [
        ({}, "macs:0.5"),
        ({}, "channels:0.4"),
        ({"select": "random"}, "params:0.3"),
        ({"select": "width"}, "macs:0.5"),
        ({"per": "neuron"}, "params:0.3"),
        ({"exact": True, "samples": 16}, "channels:0.4"),
    ],
)
def test_it_grows_to_the_budget(params, budget):
    record = run_cell(cell(params, budget=budget, size=8), Store())
    assert record.status == "done", record.trace or record.reason
    assert record.met
    series = record.series
    kind = budget.split(":")[0]
    along = series["trajectory.open" if kind == "channels" else f"trajectory.{kind}"]
    assert along == sorted(along)
    assert len(along) >= 3
    assert series["trajectory.splits"][0] == 0
    assert (
        series["trajectory.splits"][-1]
        == sum(record.widths.values()) - series["trajectory.open"][0]
    )
    assert {n: series[f"width.{n}"][-1] for n in record.widths} == record.widths
    assert record.spent["base"].forward_macs == 0


def test_a_round_splits_a_neuron_even_if_that_is_more_than_its_growth():
    record = run_cell(cell({"rounds": 12, "epochs": 0.25}, budget="channels:0.02"), Store())
    assert record.status == "done", record.reason
    splits = record.series["trajectory.splits"]
    assert len(splits) < 12
    assert all(after > before for before, after in itertools.pairwise(splits))
    assert record.met


def test_one_small_start_for_all_budgets():
    starts = []
    for budget in ("channels:0.2", "channels:0.5"):
        record = run_cell(cell({"begin": 0.05, "epochs": 0.25}, budget=budget, size=8), Store())
        assert record.status == "done", record.reason
        assert record.met
        starts.append({n: record.series[f"width.{n}"][0] for n in record.widths})
    assert starts[0] == starts[1] == {"ip1": 15, "ip2": 5}  # of 300 and 100
    wide = run_cell(cell({"begin": 0.9, "epochs": 0.25}, budget="channels:0.2", size=8), Store())
    assert wide.series["trajectory.open"][0] == 40  # half of the uniform network is less


def test_budgets_above_1_grow_beyond_the_network():
    record = run_cell(cell({"rounds": 3}, budget="macs:1.5", size=8), Store())
    assert record.status == "done", record.trace or record.reason
    assert 1.4 < record.kept <= 1.5 * 1.005


@pytest.mark.parametrize(
    ("model", "size", "args"),
    [("lenet5", 20, {}), ("test_resnet", 32, {}), ("test_vit", 32, {"depth": 2})],
)
def test_it_grows_real_networks(model, size, args):
    brief = {"narrow": 0.8, "rounds": 1, "epochs": 0.1, "samples": 16}
    where = {"model": model, "size": size, "model_args": args, "budget": "macs:0.6"}
    tune = BASE.model_copy(update={"epochs": 0.1})
    record = run_cell(cell(brief, **where, finetune=tune), Store())
    assert record.status == "done", record.trace or record.reason
    assert record.met
    left = [note.split(":")[0] for note in record.series["left_out"]]
    assert all(len(set(record.series[f"width.{n}"])) == 1 for n in left)
    assert set(record.widths) - set(left)


@pytest.mark.parametrize("per", ["neuron", "cost"])
def test_eigen_splits_what_lowers_the_loss_most(per, monkeypatch):
    found, chosen, tasks = [], [], []
    smallest, split_, init = (
        SplittingMatrices.smallest,
        splitting.split_neurons,
        splitting.Growing.__init__,
    )

    def watched(self, **options):
        found.append(smallest(self, **options))
        return found[-1]

    def splitting_up(model, groups, split, epsilon):
        chosen.append((split, {n: groups[n].channels for n in tasks[0].groups}))
        return split_(model, groups, split, epsilon)

    monkeypatch.setattr(SplittingMatrices, "smallest", watched)
    monkeypatch.setattr(splitting, "split_neurons", splitting_up)
    monkeypatch.setattr(
        splitting.Growing,
        "__init__",
        lambda self, method, task: tasks.append(task) or init(self, method, task),
    )
    record = run_cell(cell({"per": per, "growth": 5, "narrow": 0.9}, seed=3), Store())
    assert record.status == "done", record.trace or record.reason
    assert len(chosen) >= 3
    cost = tasks[0].cost
    for (values, vectors), (split, widths) in zip(
        found[:2], chosen[:2], strict=True
    ):  # before the budget is near
        price = {
            n: cost(widths | {n: w + 1}).macs - cost(widths).macs if per == "cost" else 1
            for n, w in widths.items()
        }
        every = sorted(
            (float(v) / price[n], n, i) for n, vs in values.items() for i, v in enumerate(vs)
        )
        expected = {(n, i) for v, n, i in every[:5]}
        assert every[4][0] < 0
        assert {(n, i) for n, (rows, _) in split.items() for i in rows.tolist()} == expected
        for name, (rows, along) in split.items():
            assert torch.equal(along, vectors[name][rows])


def test_a_killed_run_resumes_to_the_same_network_and_bill(fresh_cache, monkeypatch):
    given = cell({"rounds": 3}, curves=True)
    whole = run_cell(given, Store())
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(fresh_cache) + "-2")
    calls = killed_at(monkeypatch, given, splitting.Growing, "_chosen", 3)
    assert_as_if_never_killed(run_cell(given, Store()), whole)
    assert (
        len(calls) == 3 + len(whole.series["trajectory.step"]) - 3
    )  # the last round chooses nothing


def test_a_splitting_stable_network_stops_growing(monkeypatch):
    monkeypatch.setattr(
        splitting.Growing,
        "_eigenpairs",
        lambda self, number: (
            {n: torch.ones(self.widths[n]) for n in self.growable},
            {n: torch.ones(self.widths[n], 1) for n in self.growable},
        ),
    )
    record = run_cell(cell(seed=7), Store())
    assert record.status == "done", record.reason
    assert len(record.series["trajectory.step"]) == 1
    assert not record.met


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"narrow": 1.0}, "'narrow': Input should be less than 1"),
        ({"rounds": 0}, "'rounds': Input should be greater than or equal to 1"),
        ({"growth": 0}, "'growth': Input should be greater than or equal to 1"),
        ({"epsilon": 0}, "'epsilon': Input should be greater than 0"),
    ],
)
def test_parameters_that_make_no_sense(params, message):
    with pytest.raises(ValueError, match=message):
        Splitting(**params)


def test_a_network_without_neurons_to_split_is_skipped():
    class Gated(nn.Module):
        size = (1, 4, 4)

        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Linear(16, 6), nn.PReLU(6), nn.Linear(6, 5)

        def forward(self, x):
            return self.b(self.act(self.a(x.flatten(1))))

    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(2, 1, 4, 4)
    groups, sample = find_groups(model, x, cache=False), zoo.sample_for(x)
    cost = CostModel(model, groups, x)
    task = Task(
        model=model,
        groups=groups,
        example_input=x,
        budget=Budget("macs", 0.5),
        cost=cost,
        reference=cost,
        train=sample,
        val=sample,
    )
    with pytest.raises(
        UsageError, match="no channel group has neurons to split \\(a: no elementwise activation"
    ):
        Splitting().apply(task)


@pytest.fixture
def rounds(monkeypatch):
    """What each round of training was given: [(network's weights, optimizer's state, recipe,
    seed)]."""
    seen = []
    real = splitting.Growing.round

    def watched(self, number):
        given = self.task

        def training(model, train, recipe, *, seed=None, optimizer_state=None, **options):
            state = {
                n: {k: torch.as_tensor(v).clone() for k, v in kept.items() if v is not None}
                for n, kept in optimizer_state.items()
            }
            seen.append(
                ({n: p.detach().clone() for n, p in model.named_parameters()}, state, recipe, seed)
            )
            return given.fit(
                model, train, recipe, seed=seed, optimizer_state=optimizer_state, **options
            )

        self.task = dataclasses.replace(given, fit=training)
        try:
            return real(self, number)
        finally:
            self.task = given

    monkeypatch.setattr(splitting.Growing, "round", watched)
    return seen


def test_each_round_trains_as_it_was_asked_to(rounds):
    base = BASE.model_copy(update={"warmup_epochs": 0.25, "momentum": 0.9})
    record = run_cell(
        cell({"rounds": 3, "lr": 0.03, "final_epochs": 1.5}, base=base, seed=5), Store()
    )
    assert record.status == "done", record.trace or record.reason
    assert len(rounds) == len(record.series["trajectory.step"]) >= 3
    recipes = [recipe for _, _, recipe, _ in rounds]
    assert [r.warmup_epochs for r in recipes] == [0.25, *[0.0] * (len(rounds) - 1)]
    assert {r.lr for r in recipes} == {0.03}
    assert [r.epochs for r in recipes] == [*[0.5] * (len(rounds) - 1), 1.5]
    assert len({seed for *_, seed in rounds}) == len(rounds)  # each in an order of its own
    states = [state for _, state, _, _ in rounds]
    assert states[0] == {}
    for (weights, state, _, _), (before, *_) in zip(rounds[1:], rounds[:-1], strict=True):
        assert set(state) == set(weights)
        for name, p in weights.items():
            assert state[name]["momentum_buffer"].shape == p.shape
            assert state[name]["momentum_buffer"].abs().max() > 0
        assert any(p.shape != before[n].shape for n, p in weights.items())


def test_training_costs_what_was_trained(rounds):
    """Epochs are passes over the data, however narrow the network is; MACs are those of the narrow
    network."""
    record = run_cell(cell({"rounds": 3, "select": "random", "final_epochs": 2}, seed=11), Store())
    assert record.status == "done", record.trace or record.reason
    assert record.spent["decision"].epochs == pytest.approx(
        sum(r.epochs for _, _, r, _ in rounds), rel=0.01
    )
    shares = record.series["trajectory.macs"]
    by_hand = sum(r.epochs * s for (_, _, r, _), s in zip(rounds, shares, strict=True)) / sum(
        r.epochs for _, _, r, _ in rounds
    )
    samples = 1077  # of digits, to train on
    forward = record.spent["decision"].forward_macs
    assert forward == pytest.approx(
        record.spent["decision"].epochs * samples * record.base_macs * by_hand, rel=0.02
    )
    assert record.spent["decision"].backward_macs == pytest.approx(2 * forward, rel=0.01)


def test_products_are_on_the_bill_and_looks_are_not():
    plain, eigen = (run_cell(cell({"select": s}, seed=12), Store()) for s in ("random", "eigen"))
    looked = run_cell(cell({"select": "random"}, seed=12, curves=True), Store())
    assert eigen.spent["decision"].forward_macs > plain.spent["decision"].forward_macs
    assert looked.series["trajectory.val_top1"]
    assert looked.spent["decision"].forward_macs == plain.spent["decision"].forward_macs


def test_it_starts_from_fresh_weights_of_its_own_seed(rounds):
    for seed in (0, 1):
        assert run_cell(cell(seed=seed), Store()).status == "done"
    first = [weights for weights, state, _, _ in rounds if not state]
    assert len(first) == 2
    mine, other = (next(iter(weights.values())) for weights in first)
    assert not torch.equal(mine, other)
    for weights in first:  # drawn for the narrow shape: torch draws from ±1/sqrt(fan in)
        inner = weights["ip2.weight"]
        assert inner.shape[1] < 300
        assert float(inner.abs().max()) == pytest.approx(inner.shape[1] ** -0.5, rel=0.02)


@pytest.mark.parametrize("select", ["random", "width"])
def test_controls_draw_anew_in_each_round_and_by_seed(select, monkeypatch):
    chosen = []
    real = splitting.split_neurons
    monkeypatch.setattr(
        splitting,
        "split_neurons",
        lambda m, g, split, e: chosen.append((split, e)) or real(m, g, split, e),
    )
    for seed in (0, 1):
        assert (
            run_cell(
                cell({"select": select, "growth": 6, "narrow": 0.9, "epsilon": 0.03}, seed=seed),
                Store(),
            ).status
            == "done"
        )
    assert len(chosen) > 4  # rounds, of two seeds
    assert {e for _, e in chosen} == {0.03}
    along = [torch.cat([v.flatten() for _, v in split.values()]) for split, _ in chosen]
    assert len({tuple(a[:4].tolist()) for a in along}) == len(along)
    for split, _ in chosen:
        for _, vectors in split.values():
            assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-5)


def test_width_keeps_the_groups_shares_alike():
    record = run_cell(cell({"select": "width", "rounds": 3}, budget="macs:0.5"), Store())
    shares = [w / record.base_widths[n] for n, w in record.widths.items()]
    assert max(shares) - min(shares) < 0.05
    eigen = run_cell(cell({"rounds": 3}, budget="macs:0.5"), Store())
    shares = [w / eigen.base_widths[n] for n, w in eigen.widths.items()]
    assert max(shares) - min(shares) > 0.05


@pytest.mark.parametrize(
    ("params", "called"), [({"exact": True, "samples": 16}, True), ({"tolerance": 0.02}, False)]
)
def test_eigenpairs_are_found_as_asked(params, called, monkeypatch):
    exact, asked = [], []
    smallest, exactly = SplittingMatrices.smallest, SplittingMatrices.smallest_exactly
    monkeypatch.setattr(
        SplittingMatrices, "smallest_exactly", lambda self, n: exact.append(n) or exactly(self, n)
    )
    monkeypatch.setattr(
        SplittingMatrices,
        "smallest",
        lambda self, **o: asked.append(o["tolerance"]) or smallest(self, **o),
    )
    assert run_cell(cell(params, size=8, seed=21), Store()).status == "done"
    assert bool(exact) == called
    assert set(asked) == (set() if called else {0.02})


def test_where_nothing_is_left_to_split_the_last_round_still_runs(monkeypatch, rounds):
    monkeypatch.setattr(splitting.Growing, "_chosen", lambda self, *args: {})
    record = run_cell(cell({"final_epochs": 1.5}, seed=8), Store())
    assert record.status == "done", record.reason
    assert [r.epochs for _, _, r, _ in rounds] == [0.5, 1.5]


def test_rounds_are_added_where_doubling_is_not_enough():
    record = run_cell(
        cell({"rounds": 1, "narrow": 0.2, "select": "random", "epochs": 0.25}), Store()
    )
    assert record.status == "done", record.reason
    assert len(record.series["trajectory.step"]) > 2
    assert record.met


def test_apply_says_when_a_network_stops_growing_short_of_the_budget(monkeypatch):
    monkeypatch.setattr(splitting.Growing, "_chosen", lambda self, *args: {})
    model, x = zoo.Mlp(), torch.randn(8, 1, 4, 4)
    with pytest.warns(
        UserWarning,
        match=r"'splitting' leaves part of the budget macs:0.9 unused: it keeps 0\.[0-9]+",
    ):
        widthbench.apply(
            "splitting",
            model,
            budget="macs:0.9",
            example_input=x[:1],
            data=(x, torch.randint(0, 5, (8,))),
            epochs=0.5,
        )
