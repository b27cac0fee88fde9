import json
import math

import pytest
import torch
import zoo
from killed import assert_as_if_never_killed, killed_at
from made import DONE
from torch.nn import functional as F
from widthbench._claims import neuron_removal as checks
from widthbench.methods import neuron_removal
from widthbench.methods.neuron_removal import NeuronRemoval, Ranker

import widthbench
from widthbench.claims import ledger
from widthbench.errors import UsageError
from widthbench.experiment.adaptation import task_of
from widthbench.experiment.bases import obtain_base
from widthbench.experiment.cell import Cell
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.records import Record
from widthbench.experiment.store import Store
from widthbench.networks import models
from widthbench.recipe import Recipe
from widthbench.sensitivity.ablation import Sample
from widthbench.technique.removal import kept_after, remove, removed
from widthbench.width import resize

TAYLOR = [("first_order", {}), ("second_order", {}), ("second_order", {"diagonal": "exact"})]


def cell(**changes):
    params = {"samples": 200, "rerank": "iterative", **changes.pop("params", {})}
    return Cell(
        **{
            "dataset": "digits",
            "model": "mlp_sigmoid",
            "model_args": {"widths": (7, 6)},
            "size": 8,
            "technique": "neuron-removal",
            "params": params,
            "budget": "channels:0.5",
            "base": Recipe(epochs=3, batch_size=32, lr=0.1),
            "finetune": Recipe(epochs=0, lr=0.1),
            "device": "cpu",
            **changes,
        }
    )


def task(technique, **changes):
    given = cell(params={k: v for k, v in technique.params().items() if k != "samples"}, **changes)
    return task_of(given, obtain_base(given), technique)


def drawn(technique, on):
    return on.sample(technique.samples)


def loss(on, plan, sample):
    """Of the really resized network."""
    with torch.no_grad():
        return float(F.cross_entropy(resize(on.model, on.groups, plan)(sample.x), sample.y))


def order_of(state, groups):
    """(group, channel) in the order of removal, and what stays."""
    rows = sorted(
        (float(p), n, c) for n in groups for c, p in enumerate(state["order"][n]) if p.isfinite()
    )
    assert [r[0] for r in rows] == list(range(len(rows)))
    return [r[1:] for r in rows]


def greedy(on, sample):
    """Brute force by resizing, one removal after the other."""
    kept = {n: list(range(g.channels)) for n, g in on.groups.items()}
    order = []
    while any(len(k) > 1 for k in kept.values()):
        options = []
        for name, channels in kept.items():
            for channel in channels if len(channels) > 1 else ():
                rest = {**kept, name: [c for c in channels if c != channel]}
                plan = {n: widthbench.width.keep(k) for n, k in rest.items()}
                options.append((loss(on, plan, sample), name, channel))
        _, name, channel = min(options)
        kept[name].remove(channel)
        order.append((name, channel))
    return order


def test_iterative_brute_force_is_the_greedy_search_by_resizing():
    technique = NeuronRemoval(rerank="iterative", samples=200)
    on = task(technique)
    assert order_of(technique.prepared(on), on.groups) == greedy(on, drawn(technique, on))


def test_single_brute_force_sorts_the_first_changes():
    technique = NeuronRemoval(rerank="single", samples=200)
    on = task(technique)
    sample = drawn(technique, on)
    whole = {n: list(range(g.channels)) for n, g in on.groups.items()}
    alone = {
        (n, c): loss(on, {n: widthbench.width.keep([k for k in whole[n] if k != c])}, sample)
        for n in whole
        for c in whole[n]
    }
    order = order_of(technique.prepared(on), on.groups)
    assert len(order) == 11
    assert [alone[u] for u in order] == sorted(alone[u] for u in order)
    for name in whole:  # what stays is the dearest of its group
        stays = {(name, c) for c in whole[name]} - set(order)
        assert len(stays) == 1
        assert alone[stays.pop()] == max(alone[u] for u in alone if u[0] == name)


@pytest.mark.parametrize(("ranking", "more"), TAYLOR)
def test_taylor_rankings_follow_their_formulas_at_every_step(ranking, more):
    """Predicted changes against derivatives by finite differences of the gated loss, on the network
    that is left."""
    technique = NeuronRemoval(ranking=ranking, rerank="iterative", samples=200, **more)
    on = task(technique)
    sample = drawn(technique, on)
    on.model.double()
    sample = Sample(sample.x.double(), sample.y)
    order = {
        n: torch.full((g.channels,), math.inf, dtype=torch.float64) for n, g in on.groups.items()
    }
    order["ip1"][2], order["ip2"][3] = 0, 1
    with widthbench.sensitivity.ablation.Ablation(on.model, on.groups, sample) as brute:
        found = Ranker(technique, on, sample, brute).changes(order)
        gates = {n: o.isinf().double() for n, o in order.items()}
        for name, gate in gates.items():
            here, step = gate.nonzero().flatten(), 1e-4
            up, down = (brute.losses(gates, {name: here}, 1 + s * step)[name] for s in (1, -1))
            expected = -(up - down) / (2 * step)
            if more:
                expected = expected + 0.5 * (up + down - 2 * brute.loss(gates)) / step**2
            if ranking == "first_order" or more:
                assert torch.allclose(found[name][here], expected, atol=1e-6)
            else:  # the other diagonal, but of the same sign and size
                assert torch.corrcoef(torch.stack([found[name][here], expected]))[0, 1] > 0.5
                assert not torch.allclose(found[name][here], expected, atol=1e-6)
            assert found[name][gate == 0].isinf().all()
    on.model.float()


def test_random_is_drawn_by_the_seed_and_bills_nothing():
    orders = []
    for seed in (0, 0, 1):
        technique = NeuronRemoval(ranking="random", samples=200)
        orders.append(
            order_of(technique.prepared(task(technique, seed=seed)), task(technique).groups)
        )
    assert orders[0] == orders[1] != orders[2]
    record = run_cell(cell(params={"ranking": "random"}), Store())
    assert record.spent["decision"].forward_macs == 0


def test_step_removes_several_between_rankings():
    technique = NeuronRemoval(rerank="iterative", samples=200, step=3)
    on = task(technique)
    state = technique.prepared(on)
    first = NeuronRemoval(rerank="single", samples=200)
    alike = order_of(first.prepared(on), on.groups)
    order = order_of(state, on.groups)
    assert order[:3] == alike[:3]
    assert order != alike
    assert len(order) == 11


def test_blocks_lose_one_channel_each_at_a_time():
    model, x, groups = zoo.certified(zoo.Grouped)
    changes = {n: torch.rand(g.channels, dtype=torch.float64) for n, g in groups.items()}
    order = {n: torch.full((g.channels,), math.inf, dtype=torch.float64) for n, g in groups.items()}
    remove(order, changes, groups)
    blocked = [n for n, g in groups.items() if g.blocks > 1]
    assert blocked
    for k in range(removed(order) + 1):
        small = resize(model, groups, kept_after(order, k))  # refuses unequal blocks
        assert torch.isfinite(small(x)).all()
    for name in blocked:
        table, costs = (
            order[name].view(groups[name].blocks, -1),
            changes[name].view(groups[name].blocks, -1),
        )
        assert all(set(row.tolist()) == set(table[0].tolist()) for row in table)
        goes = table[0][table[0].isfinite()].sort().values
        sums = [sum(float(c[p == at]) for c, p in zip(costs, table, strict=True)) for at in goes]
        assert sums == sorted(sums)


@pytest.mark.parametrize("params", [{}, {"rerank": "single"}, {"ranking": "second_order"}])
def test_a_network_with_blocks_and_residual_streams_is_shrunk(params):
    model, x, _ = zoo.certified(zoo.Grouped)
    params = {**params, "softplus_beta": 2.0} if params.get("ranking") else params
    small = widthbench.apply(
        "neuron-removal",
        model,
        budget="channels:0.5",
        example_input=x,
        data=(x, torch.arange(2)),
        scope="all",
        **params,
    )
    assert small(x).shape == model(x).shape


def test_predictions_that_are_not_finite_are_named():
    with pytest.raises(
        UsageError, match="channel group 'a': the loss or its derivatives are not finite"
    ):
        remove(
            {"a": torch.full((3,), math.inf)},
            {"a": torch.tensor([0.0, math.nan, 1])},
            {"a": type("G", (), {"blocks": 1})},
        )


@pytest.mark.parametrize("params", [{}, {"rerank": "single"}, {"ranking": "first_order"}])
def test_a_killed_run_resumes_half_way_to_the_same_order_and_bill(params, fresh_cache, monkeypatch):
    monkeypatch.setattr(neuron_removal, "SAVE_EVERY", 0.0)
    given = cell(params=params)
    whole = run_cell(given, Store())
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(fresh_cache) + "-2")
    if params.get("rerank") == "single":
        brute = widthbench.sensitivity.ablation.Ablation
        of, at = (brute, "losses"), 2
        noted = lambda self, gates, candidates, *_: list(candidates)  # noqa: E731
    else:
        of, at = (Ranker, "changes"), 5
        noted = lambda self, order: removed(order)  # noqa: E731
    seen = killed_at(monkeypatch, given, *of, at, noted)
    again = run_cell(given, Store())
    assert_as_if_never_killed(again, whole)
    assert again.widths == whole.widths
    # ip1 was kept, or four removals were
    assert seen[at] == (["ip2"] if params.get("rerank") == "single" else 4)


def test_the_bill_of_brute_force_is_what_its_passes_take():
    record = run_cell(cell(params={"rerank": "single"}), Store())
    first, second, front = 7, 6, 64 * 7
    whole = 7 * 6 + 6 * 10  # behind the first layer, which is computed once
    one = 7 * 6 + first * (6 + 6 * 10)  # rank-1 updates of 6 outputs, then the last layer
    two = whole + second * 10
    assert record.spent["decision"].forward_macs == 200 * (front + whole + whole + one + two)


def test_curves_are_what_the_resized_networks_score(fresh_cache):
    params = {"ranking": "second_order", "rerank": "single"}
    given = cell(params=params, curves=True)
    record = run_cell(given, Store())
    technique = NeuronRemoval(**given.params)
    base = obtain_base(given)
    on = task_of(given, base, technique)
    state = technique.prepared(on)
    sample, s = drawn(technique, on), record.series
    outcome = technique.apply(on, state)
    assert len(outcome.path) == 12 == len(s["loss"]) == len(s["path.top1"])
    for k in (0, 1, 6, 11):
        assert s["loss"][k] == pytest.approx(loss(on, outcome.path[k], sample), abs=1e-5)
        assert s["path.channels"][k] == 13 - k
    assert s["joint"] == pytest.approx([e - s["loss"][0] for e in s["loss"]], abs=1e-5)
    singles = []
    for name, channel in order_of(state, on.groups):
        rest = [c for c in range(on.groups[name].channels) if c != channel]
        alone = loss(on, {name: widthbench.width.keep(rest)}, sample) - s["loss"][0]
        assert s[f"change {name}"][channel] == pytest.approx(alone, abs=1e-5)
        singles.append(alone)
    assert s["summed"] == pytest.approx([sum(singles[:k]) for k in range(12)], abs=1e-4)
    assert s["gate"] == [i / 8 for i in range(9)]
    for name in on.groups:
        for channel, errors in enumerate(s[f"error {name}"]):
            assert errors[0] - errors[-1] == pytest.approx(s[f"change {name}"][channel], abs=1e-5)
            assert errors[-1] == pytest.approx(s["loss"][0], abs=1e-5)
            predicted = -s[f"first {name}"][channel] + 0.5 * s[f"second {name}"][channel]
            assert s[f"score {name}"][channel] == pytest.approx(predicted, rel=1e-4, abs=1e-9)
    assert 0.3 < s["correlation"][0] <= 1
    assert record.spent["decision"] == run_cell(cell(params=params), Store()).spent[
        "decision"
    ].model_copy(update={"seconds": record.spent["decision"].seconds})
    json.dumps(s)


def test_the_stopping_point_is_chosen_on_val(fresh_cache):
    record = run_cell(cell(curves=True), Store())
    s = record.series
    held = [i for i, v in enumerate(s["path.val_top1"]) if v >= s["path.val_top1"][0] - 0.25]
    assert s["stop.channels"] == [13 - held[-1]]
    assert s["stop.top1"] == [s["path.top1"][held[-1]]]
    assert s["stop.removed"] == [pytest.approx(100 * held[-1] / 13)]


def test_exact_derivatives_through_relu_are_marked(fresh_cache):
    given = cell(
        model_args={"widths": (7, 6), "act_layer": "relu"},
        curves=True,
        params={"ranking": "second_order", "diagonal": "exact", "rerank": "single"},
    )
    assert run_cell(given, Store()).series["almost_everywhere"] == ["act1", "act2"]


def test_relu_behind_a_gate_is_skipped_with_the_remedy_and_softplus_is_one(fresh_cache):
    relu = {"model_args": {"widths": (7, 6), "act_layer": "relu"}}
    record = run_cell(cell(params={"ranking": "second_order"}, **relu), Store())
    assert record.status == "skipped"
    assert "layer 'act2' (ReLU) has no second derivative: pass softplus_beta=" in record.reason
    assert (
        run_cell(
            cell(params={"ranking": "second_order", "softplus_beta": 3.0}, **relu), Store()
        ).status
        == "done"
    )
    one = {
        "model_args": {"widths": (7,), "act_layer": "relu"}
    }  # nothing bends behind the only gates
    assert run_cell(cell(params={"ranking": "second_order"}, **one), Store()).status == "done"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ranking": "third_order"}, "parameter 'ranking'"),
        ({"samples": 0}, "'samples': Input should be greater than or equal to 1"),
        ({"step": 0}, "'step': Input should be greater than or equal to 1"),
        ({"processes": 0}, "'processes': Input should be greater than or equal to 1"),
        ({"memory_mib": 0}, "'memory_mib': Input should be greater than 0"),
        ({"softplus_beta": 1.0}, "softplus_beta needs ranking='second_order'"),
        (
            {"softplus_beta": 1.0, "ranking": "second_order", "diagonal": "exact"},
            "softplus_beta needs",
        ),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(UsageError, match=message):
        widthbench.technique.registry.create("neuron-removal", params)


def test_no_samples_is_an_error():
    net, x = (
        models.create("mlp_sigmoid", classes=3, channels=1, size=8, seed=0),
        torch.randn(1, 1, 8, 8),
    )
    with pytest.raises(UsageError, match="there are none"):
        widthbench.apply(
            "neuron-removal",
            net,
            budget="channels:0.5",
            example_input=x,
            data=(x[:0], torch.zeros(0, dtype=torch.long)),
        )


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.rand(2), torch.zeros(2, 3).long()]
)
def test_labels_that_are_no_classes_are_an_error(labels):
    net, x = (
        models.create("mlp_sigmoid", classes=3, channels=1, size=8, seed=0),
        torch.randn(2, 1, 8, 8),
    )
    with pytest.raises(UsageError, match=r"labels \[B\] must be whole numbers in 0\.\.2"):
        widthbench.apply(
            "neuron-removal", net, budget="channels:0.5", example_input=x, data=(x, labels)
        )


def test_equal_predictions_have_no_correlation(fresh_cache, monkeypatch):
    first = neuron_removal.GateDerivatives.first
    monkeypatch.setattr(
        neuron_removal.GateDerivatives,
        "first",
        lambda self, gates: {n: 0 * d for n, d in first(self, gates).items()},
    )
    record = run_cell(
        cell(params={"ranking": "first_order", "rerank": "single"}, curves=True), Store()
    )
    assert record.series["correlation"] == []


def test_at_most_the_wanted_number_of_samples_is_drawn_by_the_seed():
    technique = NeuronRemoval(rerank="iterative", samples=50)
    on = task(technique)
    a, b = drawn(technique, on), drawn(technique, on)
    assert len(a) == 50
    assert torch.equal(a.x, b.x)
    assert not torch.equal(a.x, drawn(technique, task(technique, seed=1)).x)
    assert len(on.sample(10**6)) == len(on.train)


def test_worker_processes_find_the_same_order():
    alone, shared = (
        NeuronRemoval(rerank="iterative", samples=100),
        NeuronRemoval(rerank="iterative", samples=100, processes=2),
    )
    on = task(alone)
    assert order_of(alone.prepared(on), on.groups) == order_of(shared.prepared(on), on.groups)


def test_a_bar_counts_candidates():
    technique, seen = NeuronRemoval(rerank="iterative", samples=50), []

    def progress(steps, /, *, desc):
        seen.append((desc, len(steps)))
        for i in steps:
            seen.append(i)
            yield i

    import dataclasses

    on = dataclasses.replace(task(technique), progress=progress)
    technique.prepared(on)
    (desc, total), *ticks = seen
    assert desc == "neuron-removal by oracle"
    assert 0.8 * total <= len(ticks) <= total


def test_uniform_allocation_keeps_the_same_fraction_of_each_group():
    for allocation in ("uniform", "global"):
        technique = NeuronRemoval(rerank="iterative", samples=100, allocation=allocation)
        widths = technique.apply(task(technique)).widths
        assert sum(widths.values()) == 7
        assert (widths == {"ip1": 4, "ip2": 3}) is (
            allocation == "uniform"
        ) or allocation == "global"


def test_checks_read_records_and_measurements(tmp_path):
    evidence = ledger.Evidence(tmp_path)
    evidence._read["shrinking"] = [
        Record(key=c.id, cell=c, **DONE, series={"stop.channels": [10 + 0.1 * width + c.seed]})
        for c in evidence.cells("shrinking")
        for width in (c.model_args["widths"][0],)
        if c.params == {"ranking": "oracle", "rerank": "iterative"}
        and not c.variant
        and (c.seed, width) != (4, 400)
    ]
    found = checks.slope(evidence)
    assert found.missing == 1
    assert found.values == {seed: pytest.approx(0.1) for seed in range(4)}
    assert len(found.records) == 19
    needed = ledger.cells([c for _, c in ledger.choose(ledger.load(), ["R8"])])["shrinking"]
    assert {(c.model_args["widths"][0], c.seed) for c in needed} == {
        (w, s) for w in checks.WIDTHS for s in range(5)
    }
