"""A slot of some minutes on another machine: a run that ends in time, and its records taken
home."""

import json

import pytest

from widthbench.cli import main
from widthbench.experiment.records import read_records, write_records

SUITE = """
name = "slot"
datasets = ["digits"]
seeds = [0, 1]
budgets = ["macs:0.5"]
techniques = ["l1-norm"]
device = "cpu"
[base]
epochs = 1
lr = 0.05
[finetune]
epochs = 0
[[models]]
name = "lenet_300_100"
size = 8
[[models]]
name = "mlp_sigmoid"
size = 8
"""


@pytest.fixture
def here(tmp_path, monkeypatch, fresh_cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slot.toml").write_text(SUITE)
    return tmp_path


def test_a_run_ends_when_its_time_is_over_and_the_next_goes_on(here, capsys):
    assert main(["run", "slot.toml", "--within", "0.01", "--no-timing"]) == 0
    assert "time is over, 8 of 8 cells are left: run again for the rest" in capsys.readouterr().err
    assert not (here / "results").exists()
    assert main(["run", "slot.toml", "--within", "500", "--no-timing"]) == 0
    out = capsys.readouterr()
    assert "8 of 8 cells done" in out.out
    assert "time is over" not in out.err
    assert (here / "results/slot/timings.jsonl").read_text() == ""


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "inf", "nan"])
def test_a_time_that_is_none_is_refused(here, capsys, seconds):
    with pytest.raises(SystemExit):
        main(["run", "slot.toml", "--within", seconds])
    assert "must be a number of seconds above 0" in capsys.readouterr().err


def test_one_seed_of_all_networks_comes_first_where_that_is_asked_for(here, in_process, capsys):
    assert main(["run", "slot.toml", "--order", "seed", "--no-timing"]) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("[")]
    assert [x.rpartition("-s")[2][0] for x in lines] == list("00001111")


def on_a_gpu(records):
    return [r.model_copy(update={"provenance": r.provenance | {"device": "cuda"}}) for r in records]


def test_records_of_another_machine_are_added_but_replace_none_of_another_device(
    here, in_process, capsys, monkeypatch
):
    cache = here / "cache-there"
    assert main(["run", "slot.toml", "--only", "s0", "--no-timing"]) == 0
    with monkeypatch.context() as there:
        there.setenv("WIDTHBENCH_CACHE", str(cache))
        assert main(["run", "slot.toml", "--no-timing", "--results", "there"]) == 0
    theirs = here / "theirs.jsonl"
    write_records(theirs, on_a_gpu(read_records(here / "there/slot/records.jsonl")))
    mine = here / "results/slot/records.jsonl"
    before = mine.read_text()
    assert main(["report", "slot.toml", "--no-timing", "--add", str(theirs)]) == 2
    error = capsys.readouterr().err
    assert "was measured on cuda, and there is a record from cpu, which it would replace" in error
    assert "--replace" in error
    assert mine.read_text() == before

    write_records(theirs, [r for r in read_records(theirs) if r.cell.seed == 1])
    assert main(["report", "slot.toml", "--no-timing", "--add", str(theirs)]) == 0
    found = {(r.cell.seed, r.provenance["device"]) for r in read_records(mine)}
    assert found == {(0, "cpu"), (1, "cuda")}

    write_records(theirs, on_a_gpu(read_records(here / "there/slot/records.jsonl")))
    assert main(["report", "slot.toml", "--no-timing", "--add", str(theirs), "--replace"]) == 0
    assert {r.provenance["device"] for r in read_records(mine)} == {"cuda"}


def test_a_finished_record_beats_a_failed_one_in_whatever_order(
    here, in_process, capsys, monkeypatch
):
    assert main(["run", "slot.toml", "--no-timing", "--results", "there"]) == 0
    done = read_records(here / "there/slot/records.jsonl")
    failed = [
        r.model_copy(update={"status": "failed", "reason": "it broke", "rows": ()}) for r in done
    ]
    write_records(here / "done.jsonl", done)
    write_records(here / "failed.jsonl", failed)
    for name, files in {"a": ("done", "failed"), "b": ("failed", "done")}.items():
        monkeypatch.setenv("WIDTHBENCH_CACHE", str(here / f"cache-{name}"))
        added = [str(here / f"{f}.jsonl") for f in files]
        command = ["report", "slot.toml", "--no-timing", "--results", name, "--add", *added]
        assert main(command) == 0
        kept = read_records(here / name / "slot/records.jsonl")
        assert [r.status for r in kept] == ["done"] * 8


def test_a_file_of_another_suite_is_named(here, in_process, capsys):
    assert main(["run", "slot.toml", "--only", "s0", "--no-timing"]) == 0
    line = json.loads((here / "results/slot/records.jsonl").read_text().splitlines()[0])
    other = read_records(here / "results/slot/records.jsonl")[0]
    other = other.model_copy(update={"cell": other.cell.model_copy(update={"seed": 77})})
    write_records(here / "other.jsonl", [other])
    assert line["cell"]["seed"] == 0
    assert main(["report", "slot.toml", "--no-timing", "--add", "other.jsonl"]) == 2
    assert "other.jsonl has no record of suite 'slot'" in capsys.readouterr().err
