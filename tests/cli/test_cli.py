import io
import json
import re
import sys

import pytest
from PIL import Image

from widthbench.claims import ledger
from widthbench.cli import main

SUITE = """
name = "tiny"
datasets = ["digits"]
seeds = [0]
budgets = ["macs:0.5", "macs:0.0001"]
techniques = ["l1-norm"]
device = "cpu"
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
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(SUITE)
    return tmp_path


def test_run_writes_a_leaderboard_and_report_writes_it_again(here, in_process, capsys):
    assert main(["run", "tiny.toml"]) == 0
    out = capsys.readouterr()
    assert "suite tiny: 2 of 3 cells done" in out.out
    assert "digits-lenet_300_100-l1-norm-macs:0.0001-s0: skipped  budget" in out.err
    written = {p.name for p in (here / "results" / "tiny").rglob("*") if p.is_file()}
    boards = {f"leaderboard.{ending}" for ending in ("md", "csv", "tex")}
    assert written == boards | {
        "SHA256SUMS",
        "records.jsonl",
        "timings.jsonl",
        "error-macs.png",
        "error-params.png",
        "widths.png",
    }
    board = (here / "results" / "tiny" / "leaderboard.md").read_text()
    (here / "results" / "tiny" / "leaderboard.md").unlink()
    assert main(["report", "tiny.toml"]) == 0
    assert (here / "results" / "tiny" / "leaderboard.md").read_text() == board


def test_report_of_a_suite_that_was_never_run_writes_nothing(here, capsys, fresh_cache):
    assert main(["report", "tiny.toml"]) == 2
    assert "suite 'tiny' has no finished cell yet: run it first" in capsys.readouterr().err
    assert not (here / "results").exists()


def test_run_with_two_processes_and_json(here, capsys):
    assert main(["run", "tiny.toml", "--jobs", "2", "--json", "--results", "elsewhere"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["status"] for r in records] == ["done", "done", "skipped"]
    assert (here / "elsewhere" / "tiny" / "records.jsonl").is_file()


def test_list_names_techniques_suites_and_datasets(capsys):
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"l1-norm", "random-channels"} <= {t["technique"] for t in listed["techniques"]}
    assert {"digits", "smoke", "digits-full"} <= {s["suite"] for s in listed["suites"]}
    assert {"dataset": "digits", "where": "built in"} in listed["datasets"]
    assert main(["list", "suites"]) == 0
    assert "a one-minute selection" in capsys.readouterr().out


def test_doctor_counts_grades_and_exits_with_1_where_nothing_is_exact(capsys):
    assert main(["doctor", "lenet5", "test_vit", "--json", "--verify"]) == 0
    lenet, vit = json.loads(capsys.readouterr().out)
    assert (lenet["exact"], lenet["frozen"], vit["exact"]) == (3, 0, 18)
    assert float(lenet["split error"]) < 1e-9
    assert float(vit["gates vs removal"]) < 1e-9
    assert main(["doctor", "lenet5", "--groups", "--json"]) == 0
    assert [g["group"] for g in json.loads(capsys.readouterr().out)] == ["conv1", "conv2", "ip1"]
    assert main(["doctor", "mlp_sigmoid", "--size", "8"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digit"], "unknown suite 'digit'; did you mean 'digits'"),
        (["run", "broken.toml"], "broken.toml: name: Field required"),
        (["run", "technique.toml"], "unknown technique 'l1-nrm'; did you mean 'l1-norm'"),
        (["run", "model.toml"], "unknown model 'lenet_300'; did you mean"),
        (["run", "dataset.toml"], "unknown dataset 'digit'; did you mean 'digits'"),
        (["run", "budget.toml"], "suite tiny: budget 'macs:1.5' keeps more than there is"),
        (["run", "size.toml"], "suite tiny: LeNet5 does not take an input of shape"),
        (["run", "groups.toml"], "so there is nothing to resize"),
        (
            ["run", "value.toml"],
            "parameter 'allocation': Input should be 'uniform' or 'global' (found 'glob')",
        ),
        (["run", "include.toml"], "include pattern 'nope*' matches no channel group"),
        (["run", "args.toml"], "refuses 10 classes, 1 x 8 x 8 px"),
        (["run", "lr.toml"], "finite number"),
        (["run", "seed.toml"], "seeds.0: Input should be greater than or equal to 0 (found -1)"),
        (["run", "val.toml"], "cannot be split with val = 0.001"),
        (["run", "cuda.toml"], "asks for device = 'cuda', but torch finds no GPU"),
        (
            ["run", "key.toml"],
            "models.0.sise: unknown key; did you mean 'size'?|models.0.size: Field required",
        ),
        (["run", "tiny.toml", "--results", "tiny.toml/x"], "cannot write tiny.toml/x"),
        (["report", "nowhere.toml"], "cannot read suite nowhere.toml"),
        (["doctor", "lenet55"], "unknown model 'lenet55'; did you mean 'lenet5'"),
        (["doctor", "lenet5", "--size", "12"], "does not take an input of shape [1, 1, 12, 12]"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(here, capsys, arguments, message):
    (here / "broken.toml").write_text("title = 'x'\n")
    (here / "technique.toml").write_text(SUITE.replace("l1-norm", "l1-nrm"))
    (here / "model.toml").write_text(SUITE.replace("lenet_300_100", "lenet_300"))
    (here / "dataset.toml").write_text(SUITE.replace('"digits"', '"digit"'))
    model = 'name = "lenet_300_100"'
    for name, old, new in (
        ("budget", '"macs:0.5"', '"macs:1.5"'),
        ("size", 'name = "lenet_300_100"', 'name = "lenet5"'),
        ("groups", model, 'name = "mlp_sigmoid"\nargs = { widths = [] }'),
        ("value", '["l1-norm"]', '[{ id = "l1-norm", params = { allocation = "glob" } }]'),
        ("include", model, f'{model}\ninclude = ["nope*"]'),
        ("args", model, f"{model}\nargs = {{ foo = 3 }}"),
        ("lr", "lr = 0.05", "lr = inf"),
        ("seed", "seeds = [0]", "seeds = [-1]"),
        ("val", "seeds = [0]", "seeds = [0]\nval = 0.001"),
        ("cuda", 'device = "cpu"', 'device = "cuda"'),
        ("key", "size = 8", "size = 8\nsise = 9"),
    ):
        assert old in SUITE
        (here / f"{name}.toml").write_text(SUITE.replace(old, new))
    before = set(here.rglob("*"))
    assert main(arguments) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1
    assert err.startswith("widthbench: ")
    assert any(m in err for m in message.split("|"))
    assert set(here.rglob("*")) == before


def test_wrong_arguments_exit_with_2(capsys):
    for arguments in (["compare"], ["run", "digits", "--jobs", "0"], ["lst"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "must be a whole number of at least 1" in capsys.readouterr().err


def test_help_and_version(capsys):
    for arguments in (["--help"], ["run", "--help"], ["doctor", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert "Begin with `widthbench run smoke`" in capsys.readouterr().out


def test_data_lists_what_is_there_and_what_to_put_where(here, capsys, monkeypatch):
    monkeypatch.setenv("WIDTHBENCH_DATA", str(here / "nothing"))
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert f"data are looked for in {here / 'nothing'}" in out
    assert re.search(r"digits\s+built in\s+in the package\s+10\s+1,347\s+450\s+1 x 8 x 8", out)
    assert "cifar100: put the unpacked cifar-100-python.tar.gz" in out
    assert main(["data", "digits", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["train"], len(row["digest"])) == ("1,347", 64)


def test_data_names_a_damaged_file_and_exits_with_1(here, capsys):
    for part in ("train", "test"):
        for label in ("a", "b"):
            folder = here / "data" / "own" / part / label
            folder.mkdir(parents=True)
            Image.new("RGB", (90, 70)).save(folder / "0.png")
    assert main(["data", "own", "--data", str(here / "data")]) == 0
    (here / "data" / "own" / "test" / "b" / "0.png").write_bytes(b"no image")
    assert main(["data", "own", "--data", str(here / "data")]) == 1
    assert re.search(r"widthbench: damaged file .*test/b/0.png", capsys.readouterr().err)


def test_claims_writes_the_page_and_names_what_is_unknown(here, capsys, monkeypatch):
    monkeypatch.setattr(
        ledger, "_function", lambda name: lambda *args, **given: []
    )  # checks have tests of their own
    assert main(["claims", "--results", str(here / "results")]) == 0
    page = (here / "results" / "claims.md").read_text()
    assert "claims: " in page
    assert "### A8: not run" in page
    assert {
        c["id"]: c["verdict"] for c in json.loads((here / "results" / "claims.json").read_text())
    }["A8"] == "not run"
    (here / "results" / "claims.md").unlink()
    capsys.readouterr()
    assert main(["claims", "--id", "M1", "--results", str(here / "results"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["claim"] for r in rows} == {"M1"}
    assert {r["measured"] for r in rows} == {"–"}
    assert not (here / "results" / "claims.md").exists()
    assert main(["claims", "--id", "M77"]) == 2
    assert "unknown claim 'M77'" in capsys.readouterr().err


def test_lists_of_recipes_and_data_sets(capsys):
    assert main(["list", "recipes"]) == 0
    assert re.search(r"lenet5\s+6", capsys.readouterr().out)
    assert main(["list", "datasets", "--json"]) == 0
    assert "digits" in [d["dataset"] for d in json.loads(capsys.readouterr().out)["datasets"]]


def test_run_can_be_held_to_some_cells(here, fresh_cache, in_process, capsys):
    assert main(["run", "tiny.toml", "--only", "base", "--no-timing"]) == 0
    out = capsys.readouterr()
    assert "suite tiny: 1 of 3 cells done" in out.out
    assert main(["run", "tiny.toml", "--only", "nothing"]) == 2
    assert "suite tiny has no cell whose name is like 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("terminal", "variables", "colour"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(monkeypatch, terminal, variables, colour):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["run", "nothing-of-that-name"]) == 2
    assert stream.getvalue().startswith("\x1b[31mwidthbench:\x1b[0m " if colour else "widthbench: ")


def test_a_citation_as_json_holds_what_the_text_does(capsys):
    assert main(["cite", "digits", "smoke"]) == 0
    text = capsys.readouterr().out
    assert main(["cite", "digits", "smoke", "--json"]) == 0
    cited = json.loads(capsys.readouterr().out)
    assert [c["suite"] for c in cited] == ["digits", "smoke"]
    assert "\n".join(c["bibtex"] for c in cited) + "\n" == text
    assert cited[0]["cells"] > 100
    assert cited[0]["sha256"] in cited[0]["bibtex"].replace("\n", "")
    assert cited[1]["sha256"] is None
