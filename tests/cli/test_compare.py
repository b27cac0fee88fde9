"""Two sets of results beside each other, and what there is to do."""

import json

import pytest
from made import record

from widthbench.cli import EXAMPLES, VERBS, main
from widthbench.experiment import keys, suites
from widthbench.experiment.forecast import Forecast
from widthbench.experiment.records import write_records
from widthbench.recipe import Spent

SUITE = """
name = "plan"
datasets = ["digits"]
seeds = [0]
budgets = ["macs:0.5"]
techniques = ["l1-norm"]
base = { epochs = 1, lr = 0.05 }
finetune = { epochs = 0, lr = 0.01 }
[[models]]
name = "lenet_300_100"
size = 28
"""


def written(folder, tops, technique="l1-norm", **more):
    folder.mkdir()
    records = [record(technique, seed, top, **more) for seed, top in enumerate(tops)]
    write_records(folder / "records.jsonl", records)
    return str(folder)


def test_rows_differences_intervals_and_equal_cells(tmp_path, capsys):
    one = written(tmp_path / "a", [90.0, 91.0, 92.0, 93.0])
    other = written(tmp_path / "b", [91.0, 92.5, 92.0, 94.5])
    assert main(["compare", one, other, "--write", str(tmp_path / "page.md")]) == 0
    page = capsys.readouterr().out
    assert "+1.00 (-0.13 to +2.13)" in page  # t(3) 3.182 * 0.7071 / 2
    assert "|  1 of 4 |" in page
    assert (tmp_path / "page.md").read_text() == page[:-1]
    assert main(["compare", one, other, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["differences"] == [1.0, 1.5, 0.0, 1.5]
    assert (row["equal"], row["both"]) == (1, 4)
    assert row["difference"] == 1.0
    assert row["interval"] == pytest.approx([-0.125, 2.125], abs=0.001)


def test_cells_that_one_side_alone_has_are_named(tmp_path, capsys):
    one = written(tmp_path / "a", [90.0, 91.0])
    other = written(tmp_path / "b", [90.0])
    main(["compare", one, other])
    out = capsys.readouterr().out
    assert f"In {one} only: 1 cells" in out
    assert f"In {other} only" not in out


@pytest.mark.parametrize(("worse", "code"), [("1.5", 0), ("0.5", 1)])
def test_a_technique_that_got_worse_is_an_exit_code(tmp_path, capsys, worse, code):
    one, other = written(tmp_path / "a", [90.0, 91.0]), written(tmp_path / "b", [89.0, 90.0])
    assert main(["compare", one, other, "--worse", worse]) == code
    assert ("worse: l1-norm at macs:0.5" in capsys.readouterr().err) == bool(code)


def test_a_row_that_no_longer_finishes_is_worse_and_one_that_is_new_is_not(tmp_path):
    one = written(tmp_path / "a", [90.0])
    (tmp_path / "b").mkdir()
    failed = record("l1-norm", 0, status="failed")
    write_records(tmp_path / "b" / "records.jsonl", [failed])
    assert main(["compare", one, str(tmp_path / "b"), "--worse", "50"]) == 1
    assert main(["compare", str(tmp_path / "b"), one, "--worse", "0"]) == 0


def test_other_seeds_do_not_count_and_failed_or_missing_rows_do(tmp_path, capsys):
    one = written(tmp_path / "a", [90.0, 98.0])
    assert main(["compare", one, written(tmp_path / "b", [90.0]), "--worse", "0.5"]) == 0
    (tmp_path / "c").mkdir()
    better = [record("l1-norm", 0, status="failed"), record("l1-norm", 1, 98.0)]
    write_records(tmp_path / "c" / "records.jsonl", better)
    assert main(["compare", one, str(tmp_path / "c"), "--worse", "5"]) == 1
    both = [record(t, 0, 90.0) for t in ("l1-norm", "nmf")]
    (tmp_path / "d").mkdir()
    write_records(tmp_path / "d" / "records.jsonl", both)
    assert main(["compare", str(tmp_path / "d"), one, "--worse", "5"]) == 1
    assert "nmf at macs:0.5 on lenet5: not there" in capsys.readouterr().err


def test_nothing_in_common_is_said(tmp_path, capsys):
    one, other = written(tmp_path / "a", [90.0]), written(tmp_path / "b", [90.0], technique="nmf")
    assert main(["compare", one, other]) == 2
    assert "have no row in common" in capsys.readouterr().err
    assert main(["compare", one, "nowhere"]) == 2
    assert "no results at nowhere" in capsys.readouterr().err


def test_a_dry_run_says_what_is_left_and_runs_nothing(tmp_path, capsys, fresh_cache):
    (tmp_path / "plan.toml").write_text(SUITE)
    arguments = ["run", str(tmp_path / "plan.toml"), "--results", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    assert "0 of 2 cells are finished, 2 are to be run" in capsys.readouterr().out
    assert not (tmp_path / "out" / "plan").exists()
    assert main([*arguments, "--no-timing"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 0
    assert "2 of 2 cells are finished, 0 are to be run" in capsys.readouterr().out


def test_a_forecast_is_the_median_of_such_cells():
    cells = [c for c in suites.load("digits").cells() if c.group.startswith("digits-lenet5-")]
    mine = [c for c in cells if c.seed == 0]
    times = Forecast().times(mine)
    assert len(times) == len(mine) + 1  # the base network's training
    assert None not in times
    assert 1 < sum(times) < 3600
    nobody = mine[0].model_copy(update={"model": "nobody"})
    assert Forecast().times([nobody]) == [None, None]
    assert keys.cell_key(mine[0])


def test_times_of_this_machine_count_before_published_ones(tmp_path):
    one = next(c for c in suites.load("digits").cells() if c.technique == "l1-norm")
    here = record("l1-norm", cell=one, spent={"adaptation": Spent(seconds=4321.0)})
    (tmp_path / "mine").mkdir()
    write_records(tmp_path / "mine" / "records.jsonl", [here])
    assert Forecast(tmp_path).times([one])[-1] == 4321.0
    assert Forecast().times([one])[-1] != 4321.0


def test_a_dry_run_of_what_nobody_ran_says_so_and_counts_in_json(tmp_path, capsys, fresh_cache):
    text = SUITE.replace('name = "lenet_300_100"', 'name = "lenet5"\nargs = { act_layer = "tanh" }')
    (tmp_path / "plan.toml").write_text(text)
    arguments = ["run", str(tmp_path / "plan.toml"), "--results", str(tmp_path), "--dry-run"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "unknown" in out
    assert "0 s" not in out
    assert main([*arguments, "--json", "--jobs", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["cells"], plan["to run"], plan["unknown"], plan["jobs"]) == (2, 2, 3, 2)
    assert [len(g["cells"]) for g in plan["groups"]] == [2]


def test_only_leaves_the_suite_to_the_suites(tmp_path, capsys, fresh_cache):
    (tmp_path / "plan.toml").write_text(SUITE)
    suite, rest = str(tmp_path / "plan.toml"), ["--results", str(tmp_path), "--dry-run"]
    assert main(["run", *rest, "--only", "*l1-norm*", suite]) == 0
    assert "0 of 1 cells are finished" in capsys.readouterr().out
    assert main(["run", *rest, "--only", "smoke"]) == 2
    assert "--only has no pattern" in capsys.readouterr().err
    assert main(["run", *rest]) == 2
    assert "name a suite" in capsys.readouterr().err


def test_rows_that_were_measured_otherwise_are_pointed_out(tmp_path, capsys):
    recipe = record().cell.finetune.model_copy(update={"epochs": 3})
    other = record().cell.model_copy(update={"finetune": recipe})
    one = written(tmp_path / "a", [90.0])
    longer = written(tmp_path / "b", [91.0], cell=other)
    assert main(["compare", one, longer]) == 0
    out = capsys.readouterr().out
    assert "**Rows differ in their settings**: finetune.epochs 10.0 against 3.0 (1 of 1)." in out
    main(["compare", one, longer, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["settings"] == [{"name": "finetune.epochs", "first": 10.0, "second": 3.0, "rows": 1}]
    assert (row["difference"], row["interval"]) == (1.0, None)
    data = written(tmp_path / "c", [90.0], provenance={"dataset_digest": "12345678abc"})
    main(["compare", one, data])
    assert "data  against 12345678" in capsys.readouterr().out
    main(["compare", one, one])
    assert "differ in their settings" not in capsys.readouterr().out


def test_the_command_alone_shows_its_verbs_in_groups(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb}" in out for verb in VERBS)
    assert out.index("compare techniques:") < out.index("trust:")


@pytest.mark.parametrize("verb", VERBS)
def test_examples_in_help_are_accepted(verb, capsys):
    from widthbench.cli import _parser

    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "examples:" in capsys.readouterr().out
    for line in EXAMPLES[verb].splitlines():
        words = line.split("  ")[1].replace("'", "").split()
        assert _parser().parse_args(words[1:]).verb == verb
