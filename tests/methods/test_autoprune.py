import copy

import pytest
import torch
import zoo
from killed import assert_as_if_never_killed, killed_at
from torch import nn
from torch.nn import functional as F
from widthbench.methods import autoprune
from widthbench.methods.autoprune import (
    AutoPrune,
    Gates,
    derivative,
    opened,
    sensitivities,
    updated,
)

from widthbench.errors import InfeasibleBudgetError, UsageError
from widthbench.experiment.cell import Cell
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store
from widthbench.recipe import Recipe
from widthbench.technique.budget import Budget
from widthbench.technique.task import Task
from widthbench.technique.trajectory import Returns
from widthbench.training.loop import fit
from widthbench.width import CostModel, find_groups, gated, keep, resize
from widthbench.width.gates import Joined

BASE = Recipe(epochs=3, batch_size=32, lr=0.02)


def cell(params=None, **fields):
    given = {
        "dataset": "digits",
        "technique": "autoprune",
        "params": {"epochs": 2} | (params or {}),
        "budget": "macs:0.5",
        "base": BASE,
        "finetune": BASE,
        "model": "lenet_300_100",
        "size": 16,
        "seed": 0,
    }
    return Cell(**given | fields)


def test_an_update_by_hand():
    m = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    s = torch.tensor([0.5, -1.0, -3.0], dtype=torch.float64)
    # m - 0.1 (s + 0.25) ĥ'(m), with
    # σ(0) = 0.5, σ(2) = 0.8807970779778823, σ(-1) = 0.2689414213699951
    soft = torch.tensor(
        [-0.0375, 2.0 + 0.1 * 0.75 * 0.8807970779778823, -1.0 + 0.1 * 2.75 * 0.2689414213699951]
    )
    assert torch.allclose(updated(m, s, 0.25, 0.1, "softplus"), soft.double(), atol=1e-7)
    linear = torch.tensor([-0.075, 2.075, -0.725], dtype=torch.float64)
    assert torch.allclose(updated(m, s, 0.25, 0.1, "linear"), linear)
    leaky = torch.tensor([-0.0075, 2.075, -0.9725], dtype=torch.float64)
    assert torch.allclose(updated(m, s, 0.25, 0.1, "leaky_relu"), leaky)


def test_softplus_estimator_is_the_derivative_of_softplus():
    m = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.softplus(m).sum(), m)
    assert torch.allclose(derivative(m.detach(), "softplus"), slope)


def test_sensitivities_by_hand():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    model[1].weight.data = torch.tensor([[3.0, 0.0], [-4.0, 2.0]], dtype=torch.float64)
    groups = find_groups(model, torch.randn(1, 1, dtype=torch.float64), cache=False)
    slopes = {"1": torch.tensor([[1.0, 5.0], [0.5, -1.0]], dtype=torch.float64)}
    expected = {"sgn": [1 - 0.5, -1.0], "none": [3 - 2.0, -2.0], "unit": [1 / 5, -2 / 2]}
    for decoupling, values in expected.items():
        (found,) = sensitivities(model, groups, slopes, decoupling)
        assert torch.allclose(found, torch.tensor(values, dtype=torch.float64)), decoupling


def slopes_of(model, groups, gates, sample):
    products = {}
    with gated(model, groups, gates, on="weight", products=products):
        loss = F.cross_entropy(model(sample.x), sample.y)
    layers = list(products)
    return dict(
        zip(layers, torch.autograd.grad(loss, [products[n][0] for n in layers]), strict=True)
    )


@pytest.mark.parametrize("cls", zoo.EXACT)
def test_coupled_sensitivities_are_the_gradient_of_gates_by_finite_differences(cls):
    model, x, groups = zoo.certified(cls)
    sample, (gates, _) = zoo.sample_for(x), zoo.started(groups, x)
    (found,) = sensitivities(model, groups, slopes_of(model, groups, gates, sample), "none")
    found = Joined(groups, found).parts(found)
    for name in groups:
        for channel in (0, 1, groups[name].channels - 1):
            losses = []
            for step in (1e-6, -1e-6):
                moved = gates | {name: gates[name].clone()}
                moved[name][channel] += step
                with torch.no_grad(), gated(model, groups, moved, on="weight"):
                    losses.append(float(F.cross_entropy(model(sample.x), sample.y)))
            assert float(found[name][channel]) == pytest.approx(
                (losses[0] - losses[1]) / 2e-6, rel=1e-4, abs=1e-8
            )


def test_at_fixed_slopes_only_the_decoupled_rule_ignores_the_size_of_weights():
    model, x, groups = zoo.certified(zoo.Plain)
    sample, (gates, _) = zoo.sample_for(x), zoo.started(groups, x)
    slopes = slopes_of(model, groups, gates, sample)
    decouplings = ("sgn", "unit", "none")
    before = sensitivities(model, groups, slopes, *decouplings)
    for layer in slopes:
        model.get_submodule(layer).weight.data *= 3
    after = sensitivities(model, groups, slopes, *decouplings)
    for decoupling, old, new in zip(decouplings, before, after, strict=True):
        assert torch.allclose(new, 3 * old if decoupling == "none" else old)


def test_under_function_preserving_rescaling_only_the_coupled_rule_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    groups = find_groups(model, x[:1], cache=False)
    gates, sample = {"0": x.new_ones(6)}, zoo.sample_for(x)
    sample = type(sample)(x, y)
    scaled = copy.deepcopy(model)
    scaled[0].weight.data *= 4
    scaled[0].bias.data *= 4
    scaled[2].weight.data /= 4
    assert zoo.error(scaled(x), model(x)) < 1e-12
    for decoupling, ratio in {"none": 1.0, "sgn": 4.0, "unit": 4.0}.items():
        one, other = (
            sensitivities(m, groups, slopes_of(m, groups, gates, sample), decoupling)[0]
            for m in (model, scaled)
        )
        assert torch.allclose(other, ratio * one), decoupling


def test_no_block_is_ever_closed():
    m = torch.tensor([-3.0, -1.0, 2.0, -1.0])
    assert opened(m, torch.tensor([0, 0, 1, 1])).tolist() == [0, 1, 1, 0]
    assert opened(m, torch.tensor([0, 0, 0, 0])).tolist() == [0, 0, 1, 0]
    alike = torch.tensor([-2.0, -2.0, -2.0, 5.0])  # of equals, one
    assert opened(alike, torch.tensor([0, 0, 1, 2])).tolist() == [1, 0, 1, 1]


class Repeated:
    """The same batch again and again."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def batches(self, size, *, generator=None, augment=None):
        return iter([(self.x, self.y)])


def planted(**params):
    """Three hidden channels of which the labels need the first, and the gates over them."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0], [0.01], [0.01]])
    model[1].weight.data = torch.tensor([[-1.0, 0.01, 0.01], [1.0, 0.01, 0.01]])
    model.eval()
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    data, groups = Repeated(x, (x[:, 0] > 0).long()), find_groups(model, x[:1], cache=False)
    cost = CostModel(model, groups, x[:1])
    recipe = Recipe(epochs=10, batch_size=4, lr=1e-6, momentum=0, weight_decay=0)
    task = Task(
        model=model,
        groups=groups,
        example_input=x[:1],
        budget=Budget("channels", 0.34),
        cost=cost,
        reference=cost,
        train=data,
        val=data,
        recipe=recipe,
        fit=lambda m, t, r, **more: fit(m, t, r, macs=1, **more),
    )
    return AutoPrune(**{"epochs": 10, "eta": 0.3} | params), task


def test_a_channel_that_the_loss_needs_recovers():
    method, task = planted(mu=0.0, epochs=40, freeze=1.0)
    gates = Gates(method, task, task.recipe.model_copy(update={"epochs": 40.0}))
    gates.m["0"][0] = -0.5  # closed by hand: its slope says that the loss misses it
    gates.open.all.copy_(opened(gates.m.all, gates.block))
    for _ in range(autoprune.CLOSED):
        gates.returns.note(gates.open.all)
    model = copy.deepcopy(task.model)
    with gated(model, task.groups, gates.open, on="weight", products=gates.products):
        task.fit(model, task.train, gates.recipe, losses=gates.losses)
    assert gates.open["0"][0] == 1
    assert gates.trajectory.series["trajectory.recoveries"][-1] == 1
    assert gates.trajectory.series["trajectory.returned"][-1] == 1
    assert gates.trajectory.series["freeze"] == [40]


def test_recoveries_and_the_chances_for_them_are_counted_by_gate_and_after_a_while_only():
    returns = Returns(torch.ones(4), long=3)
    # flickers; returns after two steps; after four; stays closed
    history = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]
    for row in history:
        gates = torch.tensor(row, dtype=torch.float32)
        returns.note(gates)
    # the third channel could have at steps 4 and 5, the fourth at steps 4 to 6
    assert returns.counts(gates) == {"recoveries": 1, "shut": 2 + 3, "returned": 1}


def test_the_channel_that_the_labels_need_is_kept():
    method, task = planted()
    outcome = method.apply(task)
    assert outcome.widths == {"0": 1}
    assert outcome.plan["0"].rows.tolist() == [0]


@pytest.mark.parametrize(("model", "size"), [("lenet_300_100", 16), ("test_resnet", 32)])
def test_the_frozen_gates_equal_the_resized_network(model, size, monkeypatch):
    seen = []
    cut = autoprune.keep
    monkeypatch.setattr(autoprune, "keep", lambda rows: seen.append(rows) or cut(rows))
    outcomes, decide = [], AutoPrune.decide

    def watched(self, task, state):
        outcomes.append((task, decide(self, task, state)))
        return outcomes[-1][1]

    monkeypatch.setattr(AutoPrune, "decide", watched)
    brief = BASE.model_copy(update={"epochs": 0.5})
    given = cell({"epochs": 0.5}, model=model, size=size, seed=5, base=brief, finetune=brief)
    assert run_cell(given, Store()).status == "done"
    task, outcome = outcomes[0]
    model, x = outcome.model.eval(), torch.randn(8, *task.example_input.shape[1:])
    gates = {
        n: torch.zeros(g.channels).index_fill(0, outcome.plan[n].rows, 1.0)
        for n, g in task.groups.items()
    }
    with torch.no_grad():
        expected = resize(model, task.groups, {n: keep(p.rows) for n, p in outcome.plan.items()})(x)
        with gated(model, task.groups, gates, on="weight"):
            assert zoo.error(model(x), expected) < 1e-5
        assert zoo.error(model(x), expected) > 1e-5  # closed channels were not empty anyway


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"estimator": "linear", "decoupling": "none"},
        {"estimator": "leaky_relu", "decoupling": "unit", "penalty": "channels"},
        {"start": "fresh", "weight_decay": 0.0, "lr": 0.05},
    ],
)
def test_trajectories_go_from_everything_to_the_budget(params):
    record = run_cell(cell(params), Store())
    assert record.status == "done", record.reason
    series = record.series
    lengths = {len(v) for k, v in series.items() if k.startswith("trajectory.")}
    assert len(lengths) == 1
    macs = series["trajectory.macs"]
    assert macs[0] > 0.75
    assert 0.45 < macs[-1] <= 0.5025
    assert series["trajectory.step"] == sorted(series["trajectory.step"])
    assert series["trajectory.recoveries"] == sorted(series["trajectory.recoveries"])
    if params.get("decoupling") == "none":
        assert min(c for c in series["trajectory.cosine"] if c is not None) > 0.999
    assert (record.spent["base"].forward_macs == 0) == (params.get("start") == "fresh")
    passes = record.spent["decision"].forward_macs / record.base_macs / 32
    assert passes == pytest.approx(
        1.75 * series["trajectory.step"][-1], rel=0.03
    )  # all but the last quarter with a batch of val
    assert record.spent["decision"].backward_macs == pytest.approx(
        2 * record.spent["decision"].forward_macs, rel=0.01
    )


@pytest.mark.parametrize("budget", ["macs:0.5", "macs:0.25", "params:0.3"])
def test_mu_brings_the_open_channels_to_the_budget_before_gates_are_frozen(budget):
    series = run_cell(cell({"epochs": 4, "penalty": "channels"}, budget=budget), Store()).series
    what, target = budget.split(":")[0], float(budget.split(":")[1])
    gated_points = [
        v
        for v, mu in zip(series[f"trajectory.{what}"], series["trajectory.mu"], strict=True)
        if mu is not None
    ]
    settled = gated_points[
        2 * len(gated_points) // 3 :
    ]  # the ramp ends at half of the steps, the gates at three quarters
    assert sum(settled) / len(settled) == pytest.approx(target, rel=0.15)
    assert max(mu for mu in series["trajectory.mu"] if mu is not None) > 0


def test_prices_are_what_a_channel_adds_to_what_the_budget_counts():
    model, x, groups = zoo.certified(zoo.Plain)
    cost, sample = CostModel(model, groups, x), zoo.sample_for(x)
    shared = {
        "model": model,
        "groups": groups,
        "example_input": x,
        "cost": cost,
        "reference": cost,
        "train": sample,
        "val": sample,
    }
    recipe = Recipe(epochs=1, batch_size=4, lr=0.01)
    whole = {n: g.channels for n, g in groups.items()}
    for kind in ("macs", "params"):
        gates = Gates(AutoPrune(), Task(**shared, budget=Budget(kind, 0.5)), recipe)
        prices = gates.m.parts(gates._prices())
        assert all(len(set(p.tolist())) == 1 for p in prices.values())
        prices = {n: float(p[0]) for n, p in prices.items()}
        saved = {
            n: getattr(cost(whole), kind) - getattr(cost(whole | {n: w - groups[n].blocks}), kind)
            for n, w in whole.items()
        }
        each = {n: s / groups[n].blocks for n, s in saved.items()}
        mean = sum(each[n] * whole[n] for n in whole) / sum(whole.values())
        assert prices == pytest.approx({n: e / mean for n, e in each.items()})
    assert len({round(p, 6) for p in prices.values()}) > 1


def test_gates_learn_from_val_and_weights_from_train():
    method, task = planted(mu=0.0, epochs=30, freeze=1.0)
    x, y = task.train.x, task.train.y
    seen, fit_ = [], task.fit

    class Told(Repeated):
        def batches(self, size, *, generator=None, augment=None):
            seen.append(self.name)
            return super().batches(size, generator=generator)

    train, val = Told(x, y), Told(x, 1 - y)  # the labels of val ask for the opposite
    train.name, val.name = "train", "val"
    outcomes = {}
    for name, other in (("val", val), ("train", train)):
        gates = Gates(method, Task(**{**vars(task), "train": train, "val": other}), task.recipe)
        model = copy.deepcopy(task.model)
        with gated(model, task.groups, gates.open, on="weight", products=gates.products):
            gates._learn(model)
        outcomes[name] = gates.m["0"].clone()
    assert (
        outcomes["train"][0] > 1 > outcomes["val"][0]
    )  # channel 0 makes the labels of train, and does harm on those of val
    model = copy.deepcopy(task.model)
    gates = Gates(method, Task(**{**vars(task), "train": train, "val": val}), task.recipe)
    with gated(model, task.groups, gates.open, on="weight", products=gates.products):
        fit_(
            model,
            train,
            task.recipe.model_copy(update={"epochs": 3.0, "lr": 0.1}),
            losses=gates.losses,
        )
    assert model[1].weight[0, 0] < task.model[1].weight[0, 0]  # further towards the labels of train
    assert set(seen) == {"train", "val"}


def test_the_weights_loss_is_smoothed_as_the_recipe_says():
    method, task = planted(mu=0.0)
    for smoothing in (0.0, 0.3):
        gates = Gates(method, task, task.recipe.model_copy(update={"label_smoothing": smoothing}))
        model = copy.deepcopy(task.model)
        with gated(model, task.groups, gates.open, on="weight", products=gates.products):
            loss = next(gates.losses(model, task.train.x, task.train.y))
            expected = F.cross_entropy(model(task.train.x), task.train.y, label_smoothing=smoothing)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()))


def test_the_least_cosine_and_mean_losses_since_the_last_point_are_told(monkeypatch):
    cosines, losses, similarity, entropy = [], [], F.cosine_similarity, F.cross_entropy
    monkeypatch.setattr(
        autoprune.F,
        "cosine_similarity",
        lambda *a, **k: cosines.append(similarity(*a, **k)) or cosines[-1],
    )
    monkeypatch.setattr(
        autoprune.F, "cross_entropy", lambda *a, **k: losses.append(entropy(*a, **k)) or losses[-1]
    )
    series = run_cell(cell({"epochs": 3.7}), Store()).series
    gated_steps, begin = len(cosines), 0
    told = zip(
        *(series[f"trajectory.{n}"] for n in ("step", "cosine", "val_loss", "loss")), strict=True
    )
    val, train = (
        losses[: 2 * gated_steps : 2],
        [*losses[1 : 2 * gated_steps : 2], *losses[2 * gated_steps :]],
    )
    for step, cosine, val_loss, loss in told:
        some = cosines[begin:step]
        assert (cosine is None) == (not some)
        if some:
            assert cosine == pytest.approx(float(min(some)), rel=1e-4)
            assert val_loss == pytest.approx(
                sum(float(v.detach()) for v in val[begin:step]) / len(some), rel=1e-4
            )
        assert loss == pytest.approx(
            sum(float(v.detach()) for v in train[begin:step]) / (step - begin), rel=1e-4
        )
        begin = step
    assert series["trajectory.step"][-1] == begin
    assert (
        gated_steps not in series["trajectory.step"]
    )  # the interval in which gates are frozen holds gated steps too


def test_val_batches_leave_batch_norms_statistics_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).train()
    before = model[1].running_mean.clone()
    x = torch.randn(8, 2)
    with autoprune.norms_left_alone(model):
        inside = model(x)
    assert torch.equal(model[1].running_mean, before)
    assert int(model[1].num_batches_tracked) == 0
    assert model[1].track_running_stats
    assert torch.allclose(model(x), inside)  # by the batch's statistics
    assert not torch.equal(model[1].running_mean, before)


def two_prices(dtype=torch.float64):
    """(method, task) on a network with batch norm and channels of different prices."""
    model, x, groups = zoo.certified(zoo.Plain)
    model, x = model.to(dtype), x.to(dtype)
    cost, sample = CostModel(model, groups, x), zoo.Shuffled(x, count=12)
    task = Task(
        model=model,
        groups=groups,
        example_input=x,
        budget=Budget("macs", 0.5),
        cost=cost,
        reference=cost,
        train=sample,
        val=sample,
        recipe=Recipe(epochs=1, batch_size=4, lr=0.01),
    )
    return AutoPrune(mu=0.3, eta=0.2), task


def test_a_step_on_val_is_the_rule_with_each_channels_price_and_leaves_statistics_alone():
    method, task = two_prices()
    gates = Gates(method, task, task.recipe)
    model = copy.deepcopy(task.model).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = []
    real = autoprune.sensitivities
    with (
        gated(model, task.groups, gates.open, on="weight", products=gates.products),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(autoprune, "sensitivities", lambda *a: found.append(real(*a)) or found[-1])
        gates._learn(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    s, m = found[0][0], gates.m.all
    assert len(set(gates.price.tolist())) > 1
    whole = Gates(method, task, task.recipe)._prices()
    slope = derivative(torch.ones_like(m), "softplus")
    expected = 1 - 0.2 * (s / s.square().mean().sqrt() + 0.3 * whole) * slope
    assert torch.allclose(m, expected.to(m))


def test_without_a_price_of_channels_all_are_alike():
    method, task = two_prices()
    method = AutoPrune(mu=0.3, eta=0.2, penalty="channels")
    gates = Gates(method, task, task.recipe)
    model = copy.deepcopy(task.model).train()
    with gated(model, task.groups, gates.open, on="weight", products=gates.products):
        gates._learn(model)
    assert set(gates.price.tolist()) == {1.0}


def test_mu_is_what_closes_the_channels_that_the_line_asks_for_by_the_next_choice():
    _, task = two_prices()
    gates = Gates(
        AutoPrune(eta=0.2, ramp=0.5), task, task.recipe.model_copy(update={"epochs": 100.0})
    )
    gates.step, gates.drawn = 60, 60
    draw = torch.Generator().manual_seed(0)
    for name, m in gates.m.items():
        m.copy_(0.5 + torch.rand(m.shape, generator=draw, dtype=m.dtype))
        gates.drift[name].copy_(0.2 * torch.randn(m.shape, generator=draw, dtype=m.dtype))
    gates.price = gates._prices()
    mu, prices = gates._needed(), gates.m.parts(gates.price)
    share = 1 - 0.5 * (60 + autoprune.EVERY) / gates.ramp

    def kept(mu):
        """MACs of what is open ten steps on, by the step's own slope and the mean sensitivities."""
        there = {}
        for name, m in gates.m.items():
            fall = autoprune.EVERY * 0.2 * derivative(m, "softplus")
            after = m - fall * (gates.drift[name] / (1 - autoprune.RECENT**60) + mu * prices[name])
            there[name] = max(1, int((after > 1e-9).sum()))
        return task.cost(there).macs / task.reference.macs

    assert mu > 0
    assert kept(mu) <= share + 1e-9
    assert kept(mu * 0.99) > share


def test_what_still_fits_is_kept_in_the_order_of_the_ranking():
    _, task = two_prices()
    gates = Gates(AutoPrune(), task, task.recipe)
    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        scores = {n: torch.rand(m.shape, generator=draw) for n, m in gates.m.items()}
        cut = task.widths(scores, "global")
        full = task.filled(cut, scores)
        assert all(full[n] >= cut[n] for n in cut)
        assert gates.task.kept(full) <= 0.5
        for name, group in task.groups.items():
            if full[name] < group.channels:
                assert gates.task.kept(full | {name: full[name] + group.blocks}) > 0.5
        for name, score in scores.items():
            gates.m[name].copy_(score)
        assert {n: int(g.sum()) for n, g in gates.frozen().items()} == full


def test_val_is_shuffled_anew_in_each_pass():
    method, task = two_prices()
    gates = Gates(method, task, task.recipe)
    passes = []
    for _ in range(3):
        order = []
        for _ in range(3):  # 12 samples in batches of 4
            order += gates.val.batch(gates.drawn)[0].flatten(1).sum(dim=1).tolist()
            gates.drawn += 1
        passes.append(order)
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2]


def test_slopes_that_are_not_finite_are_named(monkeypatch):
    method, task = two_prices()
    gates = Gates(method, task, task.recipe)
    model = copy.deepcopy(task.model)
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: [g / 0 for g in real(*a, **k)])
    with (
        gated(model, task.groups, gates.open, on="weight", products=gates.products),
        pytest.raises(UsageError, match=r"mean square of its slopes (nan|inf) at step 1; lower lr"),
    ):
        gates._learn(model)


def test_a_fixed_mu_keeps_what_ends_open():
    low, high = (run_cell(cell({"mu": mu}, budget="macs:1"), Store()) for mu in (0.05, 0.6))
    for record in (low, high):
        assert record.status == "done", record.reason
        assert sum(record.widths.values()) == record.series["trajectory.open"][-1]
    assert sum(high.widths.values()) < sum(low.widths.values()) < 400
    capped = run_cell(cell({"mu": 0.0}, budget="macs:0.25"), Store())
    assert capped.kept <= 0.25 * 1.005


def test_curves_note_val_accuracy():
    record = run_cell(cell(curves=True), Store())
    assert record.series["trajectory.val_top1"][-1] == pytest.approx(
        record.rows[0].val_top1, abs=1e-3
    )


def test_a_killed_run_resumes_to_the_same_network_and_bill(fresh_cache, monkeypatch):
    monkeypatch.setattr("widthbench.training.resume.STATE_EVERY_S", 0.0)
    given = cell({"epochs": 4}, curves=True)
    whole = run_cell(given, Store())
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(fresh_cache) + "-2")
    steps = killed_at(monkeypatch, given, Gates, "_learn", 100, lambda gates, model: gates.step)
    assert_as_if_never_killed(run_cell(given, Store()), whole)
    assert 0 < steps[100] < 99  # not from the start


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ramp": 0.9, "freeze": 0.5}, "ramp must not be above freeze"),
        ({"epochs": 0}, "'epochs': Input should be greater than 0"),
        ({"eta": -1}, "'eta': Input should be greater than 0"),
        ({"eta": float("inf")}, "'eta': Input should be a finite number"),
        ({"mu": -1}, "'mu': Input should be greater than or equal to 0"),
        ({"weight_decay": -1}, "'weight_decay': Input should be greater than or equal to 0"),
        (
            {"estimator": "relu"},
            "'estimator': Input should be 'softplus', 'leaky_relu' or 'linear'",
        ),
        ({"decoupling": "sign"}, "'decoupling': Input should be 'sgn', 'unit' or 'none'"),
    ],
)
def test_parameters_that_make_no_sense(params, message):
    with pytest.raises(ValueError, match=message):
        AutoPrune(**params)


def test_divergence_is_named():
    record = run_cell(cell({"lr": 1e6}), Store())
    assert record.status == "failed"
    assert "diverged" in record.reason
    assert "lower lr" in record.reason


@pytest.mark.parametrize("mu", [None, 0.1])
def test_a_budget_below_the_floor_is_refused_before_any_work(mu):
    method, task = planted(mu=mu)
    with pytest.raises(InfeasibleBudgetError):
        method.apply(Task(**{**vars(task), "budget": Budget("macs", 0.01), "fit": pytest.fail}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_amp_and_layouts_reach_both_kinds_of_steps(layout, monkeypatch):
    _, task = two_prices(torch.float32)
    seen = []

    for place in ("widthbench.training.state", "widthbench.training.measuring"):
        monkeypatch.setattr(f"{place}.fastest_layout", lambda model: layout)
    recipe = task.recipe.model_copy(update={"amp": True})
    outcome = AutoPrune(epochs=2).apply(
        Task(**{**vars(task), "recipe": recipe, "fit": zoo.watched_fit(seen, layout)})
    )
    assert set(seen) == {(torch.bfloat16, True)}
    assert len(seen) == 2 * (
        6 + 4
    )  # two convolutions, six steps, the first four with a batch of val
    assert {p.dtype for p in outcome.resized.parameters()} == {torch.float32}
