"""The study of neuron removal in its authors' set-ups, and the checks that read what it writes."""

import json

import pytest
import torch
from speed import neuron_removal as speed
from studies import neuron_removal_setups as study
from widthbench._claims import neuron_removal as checks

from widthbench.claims.ledger import Evidence
from widthbench.sensitivity.ablation import Ablation, Sample
from widthbench.technique.removal import kept_after
from widthbench.width import find_groups, resize


@pytest.fixture
def tiny():
    """(network, groups, sample): 5 inputs, layers of 4 and 3, two sigmoid outputs."""
    torch.manual_seed(0)
    model = study.network(5, 4, 3, 2).eval()
    y = torch.nn.functional.one_hot(torch.randint(0, 2, (40,)), 2).float()
    sample = Sample(torch.randn(40, 5), y, study.sigmoid_error)
    return model, find_groups(model, sample.x[:1], cache=False), sample


def closed_by_hand(model, sample, neurons):
    """The mean error with the outputs of these (layer, neuron) at zero, without the library."""
    with torch.no_grad():
        h = sample.x
        for layer in (0, 2):
            h = torch.sigmoid(h @ model[layer].weight.T + model[layer].bias)
            for at, neuron in neurons:
                if at == layer:
                    h[:, neuron] = 0
        out = torch.sigmoid(h @ model[4].weight.T + model[4].bias)
        return float((out - sample.y).square().sum(dim=1).mean())


def sequence(order):
    """(layer, neuron) in the order of removal."""
    gone = [(float(k), int(n), i) for n, o in order.items() for i, k in enumerate(o)]
    return [(n, i) for k, n, i in sorted(gone) if k < float("inf")]


@pytest.mark.parametrize("rerank", study.RERANKS)
@pytest.mark.parametrize("ranking", study.RANKINGS)
def test_a_curve_is_that_of_networks_without_the_neurons(tiny, ranking, rerank):
    model, groups, sample = tiny
    brute = Ablation(model, groups, sample)
    order = study.order_by(study.by_ranking(ranking, model, groups, brute), groups, rerank)
    errors = study.along(order, brute)
    wrongs = study.accuracies(
        order, Ablation(model, groups, Sample(sample.x, sample.y, study.wrong))
    )
    assert len(errors) == 4 + 3 - 1
    for k, (error, accuracy) in enumerate(zip(errors, wrongs, strict=True)):
        with torch.no_grad():
            out = resize(model, groups, kept_after(order, k))(sample.x)
        expected = (out.sigmoid() - sample.y).square().sum(dim=1).mean()
        assert error == pytest.approx(float(expected), rel=1e-5)
        assert accuracy == 100 * float((out.argmax(1) == sample.y.argmax(1)).double().mean())
        assert error == pytest.approx(closed_by_hand(model, sample, sequence(order)[:k]), rel=1e-5)


def test_iterative_brute_force_takes_the_least_missed_neuron_each_time(tiny):
    model, groups, sample = tiny
    changes = study.by_ranking("brute force", model, groups, Ablation(model, groups, sample))
    taken = sequence(study.order_by(changes, groups, "iterative"))
    left = {0: {0, 1, 2, 3}, 2: {0, 1, 2}}
    for k, (layer, neuron) in enumerate(taken):
        options = {
            (at, i): closed_by_hand(model, sample, [*taken[:k], (at, i)])
            for at, some in left.items()
            if len(some) > 1
            for i in some
        }
        assert (layer, neuron) == min(options, key=options.get)
        left[layer].remove(neuron)


@pytest.mark.parametrize("ranking", study.RANKINGS[1:])
def test_predictions_are_the_derivatives_by_finite_differences(tiny, ranking):
    """For the last layer, where no off-diagonal term is dropped behind one output."""
    _, _, sample = tiny
    torch.manual_seed(1)
    model = study.network(5, 3, 1).double().eval()
    sample = Sample(sample.x.double(), sample.y[:, :1].double(), sample.criterion)
    groups = find_groups(model, sample.x[:1], cache=False)
    changes = study.by_ranking(ranking, model, groups, Ablation(model, groups, sample))
    ((name, found),) = changes(study.untouched(groups)).items()
    brute, step = Ablation(model, groups, sample), 1e-3
    for i in range(3):
        low, mid, high = (
            brute.loss({name: torch.ones(3).double().index_fill(0, torch.tensor([i]), 1 + s)})
            for s in (-step, 0, step)
        )
        slope, bend = (high - low) / (2 * step), (high - 2 * mid + low) / step**2
        assert float(found[i]) == pytest.approx(
            -slope + (bend / 2 if ranking == "second order" else 0), rel=1e-4
        )


def test_joint_and_summed_by_hand(tiny):
    model, groups, sample = tiny
    brute = Ablation(model, groups, sample)
    changes = study.by_ranking("brute force", model, groups, brute)
    order = study.order_by(changes, groups, "single")
    joint, summed = study.joint_and_summed(order, changes, brute)
    start = closed_by_hand(model, sample, [])
    alone = {
        (at, i): closed_by_hand(model, sample, [(at, i)]) - start
        for at, count in ((0, 4), (2, 3))
        for i in range(count)
    }
    taken = sequence(order)
    assert [alone[t] for t in taken] == sorted(alone[t] for t in taken)
    for k in range(len(taken) + 1):
        together = closed_by_hand(model, sample, taken[:k]) - start
        assert float(joint[k]) == pytest.approx(together, abs=1e-6)
        assert float(summed[k]) == pytest.approx(sum(alone[t] for t in taken[:k]), abs=1e-6)
    assert not torch.allclose(joint, summed, rtol=0.01)


@pytest.mark.parametrize(
    ("errors", "ceiling", "part"),
    [
        ([1, 2, 3, 4], 9, 0),
        ([1, 5, 3, 6], 9, 2 / 7),
        ([5, 3, 4, 1], 9, 1),  # what falls below the first error heals nothing
        ([1, 5, 3, 10, 2], 9, 2 / 4),  # past the ceiling nothing counts
        ([3, 2, 1], 9, 0),
    ],
)
def test_the_part_of_the_rises_that_heals(errors, ceiling, part):
    assert study.healed(errors, ceiling) == pytest.approx(part)


def test_removable_shares_by_hand():
    values = [99.0, 98.8, 98.4, 98.6, 97.5]
    assert study.last(values, lambda v: v >= 98.5) == 3
    assert study.until(values, lambda v: v >= 98.5) == 1
    assert study.until(values, lambda v: v >= 90) == 4
    assert study.last(values, lambda v: v >= 99.5) == 0


def test_a_curve_of_ten_digits_tells_its_removable_shares():
    torch.manual_seed(0)
    digits = torch.arange(10).repeat(12)
    x = torch.eye(10)[digits].repeat(1, 2) + 0.1 * torch.randn(120, 20)
    row = study.ten_digits(0, (20,), (x, digits, x[:50], digits[:50]), epochs=400)
    assert row["network"] == "1 x 20"
    for name, curve in row["curves"].items():
        assert len(curve["error"]) == len(curve["own"]) == len(curve["held out"]) == 20
        kept = [k for k, a in enumerate(curve["own"]) if a >= curve["own"][0] - 2.0]
        assert row["removable"][name]["own, 2"] == 5 * max(kept)
        assert row["removable"][name]["own, 2"] >= row["removable"][name]["own, 0.5"]
    assert row["curves"][study.BEST]["own"][0] > 95
    for rerank in study.RERANKS:
        error = row["curves"][f"brute force, {rerank}"]["error"]
        rises = [error[2 * (k + 1)] - error[0] for k in range(9)]
        assert row[rerank]["joint"] == pytest.approx(rises, abs=1e-3)
        assert len(row[rerank]["summed"]) == 9


def test_a_cosine_is_fitted_and_judged():
    row = study.cosine(0, 4, steps=300)
    assert row["error"][0] < 1e-3 < study.FLAT < row["error"][-1]
    assert row["needed"] == 8 - max(k for k, e in enumerate(row["error"]) if e <= study.FLAT)
    assert row["flat"] <= 100 * (8 - row["needed"]) / 8


def test_checks_read_what_the_study_writes(tmp_path):
    evidence = Evidence(tmp_path)
    assert checks.removable(evidence, "1 x 100", "own, 2").values == {}
    ten = {"setup": "ten digits", "network": "2 x 50", "seed": 3}
    rows = [
        ten
        | {
            "removable": {"brute force, iterative": {"own, 2": 41.0}},
            "healed": {"second order, iterative": 0.3},
            "single": {"joint": [1, 2, 3, 4, 9], "summed": [2, 2, 2, 2, 3]},
            "iterative": {"joint": [1, 2, 3, 4, 5], "summed": [2, 2, 2, 2, 7]},
        },
        {"setup": "one digit", "network": "1 x 100", "digit": 1, "seed": 3, "below": 17}
        | {"fall": [0, 1, 2, 3, 4, 2.5], "held out": [99, 1, 1, 1, 1, 99.5]},
        *(
            {"setup": "cosine", "network": f"2 x {w}", "seed": 3, "neurons": 2 * w}
            | {"needed": 5 + w, "flat": 60.0}
            for w in (10, 25, 50)
        ),
    ]
    (tmp_path / checks.SETUPS).write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert checks.removable(evidence, "2 x 50", "own, 2").values == {3: 41.0}
    assert checks.removable(evidence, "1 x 100", "own, 2").values == {}
    assert checks.healed(evidence).values == {3: 0.3}
    assert checks.cancelled(evidence, "2 x 50", "single", 10).values == {3: 1}
    assert checks.cancelled(evidence, "2 x 50", "single", 50).values == {3: -6}
    assert checks.cancelled(evidence, "2 x 50", "iterative", 50).values == {3: 2}
    assert checks.below_the_start(evidence, 1).values == {3: 17}
    assert checks.fall_of_the_error(evidence).values == {(1, 3): 2.5}
    assert checks.gain_of_accuracy(evidence).values == {(1, 3): 0.5}
    assert checks.flat(evidence, "2 x 25").values == {3: 60.0}
    assert checks.slope_on_the_cosine(evidence).values == {3: pytest.approx(0.5)}


def test_rankings_are_compared_by_seeds_that_no_rule_had_seen(tmp_path):
    def row(network, seed, brute, first):
        shares = {"brute force, iterative": brute, "first order, iterative": first}
        removable = {name: {"own, 2": share, "own, 0.5": 0.0} for name, share in shares.items()}
        return {"setup": "ten digits", "network": network, "seed": seed, "removable": removable}

    rows = [row("2 x 50", 10, 48.0, 14.0), row("2 x 50", 11, 40.0, 45.0), row("1 x 100", 10, 9, 9)]
    text = "".join(f"{json.dumps(r)}\n" for r in rows)
    (tmp_path / checks.AGAIN).write_text(text)
    found = checks.ahead(
        Evidence(tmp_path), "2 x 50", "brute force, iterative", "first order, iterative"
    )
    assert found.values == {10: 34.0, 11: -5.0}
    (tmp_path / checks.AGAIN).rename(tmp_path / checks.SETUPS)  # the seeds that were seen
    assert checks.ahead(Evidence(tmp_path), "2 x 50", "a", "b").values == {}


def test_two_processes_are_held_against_two_copies(tmp_path):
    row = {"copies": "1 x 100", "alone": 4.0, "one": 2.5, "two": 3.0}  # copies at once: 5 s
    other = {"what": "greedy curve, one process over two", "one": 4.0, "two": 2.0}
    (tmp_path / "neuron-removal-speed.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in (row, other))
    )
    found = checks.share_of_the_ceiling(Evidence(tmp_path), "1 x 100").values
    assert found == {0: pytest.approx((4 / 3) / (2 * 4 / 5))}


def test_relu_is_refused_where_its_second_derivative_enters():
    assert checks.undefined_for_relu([[50, 50], [100]]) == [1.0, 0.0]


@pytest.mark.slow
def test_copies_run_beside_shared_work():
    (first, second) = speed.beside_copies(2, (6,), images=200)
    assert all(s > 0 for s in (*first, *second))
