import pytest
import torch

from widthbench.experiment.bases import obtain_base
from widthbench.experiment.cell import CONTROLS, Cell
from widthbench.experiment.controls import RUNNERS, Control, first_channels, fresh_at
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store
from widthbench.recipe import Recipe
from widthbench.training.measuring import accuracy

BASE, TUNE = Recipe(epochs=2, lr=0.05), Recipe(epochs=1, lr=0.01)


def cell(technique, **changes):
    return Cell(
        **{
            "dataset": "digits",
            "model": "lenet_300_100",
            "size": 8,
            "technique": technique,
            "budget": "macs:0.5",
            "base": BASE,
            "finetune": TUNE,
            "device": "cpu",
            **changes,
        }
    )


def run(technique, **changes):
    record = run_cell(cell(technique, **changes), Store())
    assert record.status == "done", record.trace
    return record


def test_base_is_the_network_that_techniques_start_from():
    record, base = run("base", budget=None), obtain_base(cell("l1-norm"))
    assert record.row().top1 == accuracy(base.model, base.data.test).top1
    assert record.provenance["base_digest"] == base.digest
    assert record.macs == record.base_macs


def test_uniform_width_trains_the_scaled_network_by_the_bases_recipe():
    record = run("uniform-width")
    assert record.widths == run("l1-norm").widths  # the same shape at the same budget
    assert record.spent["adaptation"].epochs == BASE.epochs
    assert record.row().stage == "trained"


def test_scratch_trains_the_found_shape_for_as_many_epochs():
    source, record = run("l1-norm"), run("scratch", of="l1-norm")
    assert record.source == source.key
    assert record.widths == source.widths
    assert record.spent["adaptation"].epochs == BASE.epochs + TUNE.epochs


def test_controls_of_one_shape_draw_different_weights():
    """Uniformly spread budgets give `scratch` and `uniform-width` the same widths: they must not be
    the same experiment."""
    drawn = [
        fresh_at(cell("scratch"), {"ip1": 75}, seed=control.fresh)[0].ip1.weight
        for control in RUNNERS.values()
    ]
    base = obtain_base(cell("l1-norm")).model.ip1.weight[:75]
    assert len({w.detach().numpy().tobytes() for w in [*drawn, base]}) == len(RUNNERS) + 1


def test_scratch_budget_trains_it_for_as_many_macs():
    source, record = run("l1-norm"), run("scratch-budget", of="l1-norm")
    whole = sum(s.forward_macs + s.backward_macs for s in source.spent.values())
    own = record.spent["adaptation"].forward_macs + record.spent["adaptation"].backward_macs
    assert own == pytest.approx(whole, rel=0.02)  # in whole steps
    assert (
        record.spent["adaptation"].epochs > run("scratch", of="l1-norm").spent["adaptation"].epochs
    )


@pytest.mark.parametrize("params", [{"epochs": 2}, {"epochs": 4, "start": "fresh"}])
def test_l1_budget_fine_tunes_until_it_has_cost_as_much(params):
    source, plain = run("autoprune", params=params), run("l1-norm")
    record = run("l1-budget", of="autoprune", params=params)
    assert record.source == source.key
    assert record.widths == plain.widths
    assert record.rows[0] == plain.rows[0]  # the same channels
    costs = [
        sum(s.forward_macs + s.backward_macs for s in r.spent.values()) for r in (source, record)
    ]
    assert costs[1] == pytest.approx(costs[0], rel=0.02)  # in whole steps
    assert record.rows[-1].stage == "fine-tuned"
    held = run("l1-budget", of="autoprune", params=params, longest=1)
    epochs = [sum(s.epochs for s in r.spent.values()) for r in (source, held, record)]
    assert epochs[1] == pytest.approx(epochs[0], abs=0.1)
    assert epochs[1] < epochs[2]


def test_l1_budget_shortens_its_base_where_the_source_never_trained_one():
    params = {"epochs": 0.25, "rounds": 2, "select": "random"}
    source = run("splitting", params=params)
    record = run("l1-budget", of="splitting", params=params)
    costs = [
        sum(s.forward_macs + s.backward_macs for s in r.spent.values()) for r in (source, record)
    ]
    assert costs[0] < 3 * 1077 * BASE.epochs * record.base_macs  # less than the base alone
    assert costs[1] == pytest.approx(costs[0], rel=0.03)  # in whole steps
    assert record.spent["base"].epochs < BASE.epochs
    shares = (
        record.spent["base"].epochs / BASE.epochs,
        record.spent["adaptation"].epochs / TUNE.epochs,
    )
    assert shares[0] == pytest.approx(shares[1], rel=0.15)
    assert record.rows[-1].stage == "fine-tuned"


def test_scratch_trains_for_as_many_epochs_as_a_network_that_grew():
    params = {"epochs": 0.25, "rounds": 2, "select": "random"}
    source, record = run("splitting", params=params), run("scratch", of="splitting", params=params)
    trained = 0.25 * len(source.series["trajectory.step"]) + TUNE.epochs
    assert record.spent["adaptation"].epochs == pytest.approx(trained, abs=0.1)


def test_a_scratch_control_computes_its_source_first_and_skips_with_it(fresh_cache):
    record = run("scratch", of="l1-norm", seed=1)
    assert Store().get(record.source).cell == cell("l1-norm", seed=1)
    skipped = run_cell(cell("scratch", of="l1-norm", budget="macs:0.0001"), Store())
    assert skipped.status == "skipped"
    assert "its source digits-lenet_300_100-l1-norm-macs:0.0001-s0 is skipped" in skipped.reason


def test_fresh_weights_are_not_the_bases_and_are_drawn_for_the_new_shape():
    model, _, _ = fresh_at(cell("scratch"), {"ip1": 75}, seed=3)
    base = obtain_base(cell("l1-norm")).model
    assert model.ip1.out_features == model.ip2.in_features == 75
    assert not torch.equal(model.ip1.weight, base.ip1.weight[:75])
    assert float(model.ip2.weight.detach().abs().max()) == pytest.approx(
        75**-0.5, rel=0.01
    )  # torch draws from ±1/sqrt(fan in)


def test_first_channels_takes_them_from_every_block_and_repeats_when_growing():
    assert first_channels(6, 1, 3).tolist() == [0, 1, 2]
    assert first_channels(6, 2, 4).tolist() == [0, 1, 3, 4]
    assert first_channels(3, 1, 5).tolist() == [0, 0, 1, 1, 2]


def test_a_control_whose_source_failed_has_failed_and_is_tried_again(fresh_cache, monkeypatch):
    """It would otherwise stay skipped for good, though the source is fine the next time."""
    monkeypatch.setattr(
        "widthbench.baselines.l1_norm.L1Norm.decide",
        lambda *a: (_ for _ in ()).throw(OSError("disk full")),
    )
    control = cell("scratch", of="l1-norm", budget="channels:0.5")
    first = run_cell(control, Store())
    assert first.status == "failed"
    assert "its source" in first.reason
    assert "disk full" in first.reason
    monkeypatch.undo()
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(fresh_cache))
    assert run_cell(control, Store()).status == "done"


def test_every_control_has_a_name_that_suites_know_and_seeds_of_its_own():
    assert list(RUNNERS) == list(CONTROLS)
    assert len({c.fresh for c in RUNNERS.values()}) == len(RUNNERS)


def test_a_control_without_an_entry_says_where_it_belongs():
    with pytest.raises(TypeError, match=r"'new' has no entry in CONTROLS of experiment/cell.py"):

        class New(Control, name="new"):
            pass
