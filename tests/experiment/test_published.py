"""Base networks that are published: taken without training, whatever code trained them."""

import json

import pytest
import torch

from widthbench.errors import UsageError
from widthbench.experiment import bases, keys, published
from widthbench.experiment.cell import Cell
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.records import read_records, write_records
from widthbench.experiment.store import Store
from widthbench.experiment.suites import parse
from widthbench.paths import cache_dir
from widthbench.recipe import Recipe
from widthbench.report import build
from widthbench.technique import registry

TOML = """
name = "few"
title = "few"
datasets = ["digits"]
seeds = [0]
budgets = ["macs:0.5"]
techniques = ["l1-norm"]
bases = "published"
[base]
epochs = 1
lr = 0.05
[finetune]
epochs = 1
lr = 0.01
[[models]]
name = "lenet_300_100"
size = 8
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, fresh_cache):
    """Nothing is published yet."""
    place = tmp_path / "published"
    for module in (published, build):
        monkeypatch.setattr(module, "published_dir", lambda: place)
    return place


def cell(**changes):
    recipe = Recipe(epochs=1, lr=0.05)
    given = {"dataset": "digits", "model": "lenet_300_100", "size": 8, "technique": "base"}
    return Cell(**{**given, "base": recipe, "finetune": recipe, "bases": "published", **changes})


def publish(one):
    trained = bases.obtain_base(one)
    source = published.cached(trained.digest)
    published.publish(source, published.place(one, keys.BASE_FIELDS), {"commit": "abc"})
    return trained


def test_what_is_published_is_taken_and_not_trained(folder, monkeypatch):
    trained = publish(cell())
    for file in (cache_dir() / "bases").iterdir():
        file.unlink()
    monkeypatch.setattr(bases, "fit", None)
    taken = bases.obtain_base(cell())
    assert taken.digest == trained.digest
    assert taken.spent == trained.spent
    assert taken.spent.forward_macs > 0
    assert not taken.loaded  # trained on this suite's split, which val is no part of
    for name, value in trained.model.state_dict().items():
        assert torch.equal(taken.model.state_dict()[name], value)
    with pytest.raises(TypeError, match="NoneType"):
        bases.obtain_base(cell(bases="trained"))


def test_the_key_is_the_networks_and_not_the_codes(folder, monkeypatch):
    before = keys.base_key(cell())
    publish(cell())
    after = keys.base_key(cell())
    assert before != after
    monkeypatch.setattr(keys, "code_digest", lambda *rooms: "changed")
    keys._base_digest.cache_clear()
    assert keys.base_key(cell()) == after
    assert keys.base_key(cell(bases="trained")) != before


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"base": Recipe(epochs=2, lr=0.05)}, {"size": 16}, {"val": 0.1}]
)
def test_other_settings_are_another_network(folder, changes):
    publish(cell())
    assert keys.published_base(cell()) is not None
    assert keys.published_base(cell(**changes)) is None
    # what a base network does not depend on changes nothing
    assert keys.published_base(cell(variant="3 epochs", calibration=8)) is not None
    assert keys.published_base(cell(technique="l1-norm", budget="macs:0.5", threads=1)) is not None


def test_trials_go_from_the_suite_to_the_record_and_its_controls(fresh_cache):
    text = TOML.replace(
        '"l1-norm"]', '{ id = "l1-norm", trials = 3 }]\ncontrols = ["scratch:l1-norm"]'
    )
    cells = parse(text, "few.toml").cells()
    assert [c.trials for c in cells] == [3, 3]
    assert [run_cell(c, Store()).trials for c in cells] == [3, 3]


def test_a_file_that_was_changed_is_named_and_loses_nothing(folder):
    publish(cell())
    path = published.place(cell(), keys.BASE_FIELDS)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match=r"is not the network that was published .* bases = \"tr"):
        bases.obtain_base(cell())
    assert path.is_file()


def test_a_control_takes_its_technique_s_published_record(folder, monkeypatch):
    """So that controls can be run on another machine than their techniques were."""
    publish(cell())
    technique = cell(technique="l1-norm", budget="macs:0.5")
    control = cell(technique="scratch", of="l1-norm", budget="macs:0.5")
    alone = keys.cell_key(control)
    known = run_cell(technique, Store())
    elsewhere = known.model_copy(
        update={"key": "f" * 40, "provenance": {**known.provenance, "device": "cuda"}}
    )
    write_records(folder / "few" / "records.jsonl", [elsewhere])
    with_source = keys.cell_key(control)
    monkeypatch.setattr(registry, "create", lambda *_: pytest.fail("its technique ran again"))
    record = run_cell(control, Store())
    assert record.status == "done", record.trace
    assert (record.source, record.widths) == ("f" * 40, known.widths)
    assert len({alone, with_source}) == 2  # another source is another cell
    assert keys.cell_key(technique) == known.key  # and what is published of it does not hide it


@pytest.mark.parametrize("change", ["another base network", "failed", "damaged", "another setting"])
def test_what_is_no_record_of_its_technique_is_not_taken(folder, change):
    publish(cell())
    one = cell(technique="l1-norm", budget="macs:0.5")
    known = run_cell(one, Store())
    path = folder / "few" / "records.jsonl"
    updates = {
        "another base network": {"provenance": {**known.provenance, "base_digest": "0" * 64}},
        "failed": {"status": "failed", "reason": "no memory"},
        "another setting": {"cell": one.model_copy(update={"budget": "macs:0.25"})},
    }
    write_records(path, [known.model_copy(update=updates.get(change, {}))])
    if change == "damaged":
        path.write_text(
            path.read_text().replace(f'"macs":{known.macs}', f'"macs":{known.macs + 1}')
        )
    control = cell(technique="scratch", of="l1-norm", budget="macs:0.5")
    assert keys.source_of(control) is None
    assert run_cell(control, Store()).source == known.key
    write_records(path, [known])
    assert keys.source_of(control) == known
    assert keys.source_of(control.model_copy(update={"bases": "trained"})) is None


def test_publishing_a_suite_publishes_its_base_networks(folder, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    suite, results = parse(TOML, "few.toml"), tmp_path / "results"
    folder = folder.parent / "results" / "published"
    records = [run_cell(c, Store()) for c in suite.cells()]
    assert [r.status for r in records] == ["done", "done"]
    write_records(results / "few" / "records.jsonl", records)
    with pytest.MonkeyPatch.context() as patch:
        for module in (published, build):
            patch.setattr(module, "published_dir", lambda: folder)
        files = build.publish(suite, results)
        (network,) = (f for f in files if f.suffix == ".safetensors")
        facts = json.loads(network.with_suffix(".json").read_text())
        assert facts["sha256"] == records[0].provenance["base_digest"]
        assert facts["provenance"] == records[0].provenance
        assert read_records(folder / "few" / "records.jsonl") == records
        # again: what is there stays
        assert not [f for f in build.publish(suite, results) if f.suffix == ".safetensors"]
