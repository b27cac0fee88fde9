"""What the README shows is what the committed results say, and its code runs."""

import doctest
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

from widthbench.cli import main
from widthbench.experiment import suites
from widthbench.experiment.cell import CONTROLS
from widthbench.experiment.records import read_records
from widthbench.report.claims import summary
from widthbench.report.columns import COLUMNS
from widthbench.report.flags import FLAGS
from widthbench.report.lines import lines

ROOT = Path(__file__).parent.parent
DOCS = list((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()


def excerpt_from(board: str) -> str:
    """The part of the leaderboard that the README shows: of one network's matrix two budgets, all
    techniques and controls, by the second of them.
    """
    (block,) = re.findall(r"^## lenet_300_100 on mnist\n.*?(^\|.*?)\n\n", board, flags=re.S | re.M)
    rows = [[c.strip() for c in row.strip("|").split("|")] for row in block.splitlines()]
    head = rows[0]
    columns = ("technique", "looks at", "macs:0.25", "macs:0.03125")
    shown = [head.index(c) for c in columns]
    kept = [[r[i] for i in shown] for r in rows[2:-1]]
    kept.sort(key=lambda r: (not r[1], -float(r[3].strip("*").split()[0])))
    lines = [[head[i] for i in shown], [":--", ":--", "--:", "--:"], *kept]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def committed(path: str) -> str:
    """A file as it was committed: running the suite rewrites the one in the working tree."""
    done = subprocess.run(
        ["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout


def test_the_excerpt_is_the_committed_leaderboards():
    board = committed("results/published/lenets/leaderboard.md")
    (shown,) = re.findall(
        r"<!-- excerpt -->\n(.*?)\n<!-- /excerpt -->", committed("README.md"), flags=re.S
    )
    assert shown == excerpt_from(board)


def epochs_of(line):
    """Epochs that a row took in all, over those of its base network."""
    return fmean(
        sum(spent.epochs for spent in r.spent.values()) / r.cell.base.epochs
        for r in line.done.values()
    )


def test_controls_lead_as_often_as_it_says():
    scratch = ("scratch", "scratch-budget", "uniform-width")
    best: dict[tuple, dict[bool, float]] = {}
    once, longest = {}, {}
    for line in lines(read_records(ROOT / "results" / "published" / "lenets" / "records.jsonl")):
        fresh = line.first().cell.technique in scratch
        if line.done and line.budget and (fresh or not line.control):
            found = best.setdefault((line.dataset, line.model, line.budget), {})
            top = line.summary(None).mean
            if line.label == "uniform-width":
                once[line.dataset, line.model, line.budget] = top
            if fresh and top > found.get(True, 0.0):
                longest[line.dataset, line.model, line.budget] = epochs_of(line)
            found[fresh] = max(found.get(fresh, 0.0), top)
    both = [b for b in best.values() if {True, False} <= b.keys()]
    led = sum(b[True] > b[False] for b in both)
    readme = " ".join(README.split())
    assert f"In {led} of the {len(both)} comparisons of this suite" in readme
    low, high = (round(f(longest.values())) for f in (min, max))
    assert f"after {low} to {high} times the training epochs of the whole network" in readme
    ahead = sum(top > best[place][False] for place, top in once.items())
    assert f"no longer than the whole network did, is ahead in {ahead}." in readme


def test_it_counts_the_committed_verdicts():
    (shown,) = re.findall(
        r"<!-- claims -->(.*?)<!-- /claims -->", committed("README.md"), flags=re.S
    )
    assert shown == summary(json.loads(committed("results/published/claims.json"))), (
        "run `widthbench claims`, and put its verdicts here"
    )


def test_no_placeholder_is_left():
    assert not re.search(r"\b(TIMES|TODO|FIXME|PLACEHOLDER|XXX)\b", README)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in DOCS)])
def test_files_that_pages_link_to_are_there(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text()):
        if not target.startswith("_made/"):
            assert (path.parent / target).exists(), target


def test_it_is_short():
    """A stranger reads it in a few minutes."""
    assert len(re.findall(r"\S*\w\S*", README)) <= 900  # words, without the rules of tables


def test_the_notebook_runs(tmp_path, monkeypatch):
    """All of its code, and what it shows is what it gives."""
    pytest.importorskip("pandas")
    cells = json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"]
    scope = {"__name__": "notebook"}
    monkeypatch.chdir(tmp_path)
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
            assert cell["outputs"] or "published" in scope
    shown = "".join(cells[1]["outputs"][0]["data"]["text/markdown"])
    assert [line.split("|")[1] for line in shown.splitlines() if line.startswith("|")] == [
        line.split("|")[1] for line in scope["board"].to_markdown().splitlines() if "|" in line
    ]
    assert torch.equal(scope["small"](scope["x"]), scope["again"](scope["x"]))


def test_the_tutorials_suite_runs(tmp_path, monkeypatch, capsys):
    """Its files as it describes them: a technique, a network, a suite."""
    text = (ROOT / "docs/tutorial.md").read_text()
    (suite,) = re.findall(r"```toml\n(.*?)```", text, flags=re.S)
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    technique, network = (
        next(b for b in code if f"class {name}" in b) for name in ("MaxNorm", "MyNet")
    )
    monkeypatch.setenv("WIDTHBENCH_PLUGINS", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    Path("mytechnique.py").write_text(technique)
    Path("mynets.py").write_text(network)
    Path("mine.toml").write_text(suite)
    try:
        assert main(["run", "mine.toml", "--no-timing", "--only", "*MyNet*-s0"]) == 0
    finally:
        for name in ("mytechnique", "mynets"):
            sys.modules.pop(name, None)
    assert "max-norm" in capsys.readouterr().out


def test_the_tutorial_runs(tmp_path, monkeypatch):
    """All of its code, from top to bottom."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(), flags=re.S)
    scope = {"__name__": "tutorial"}
    monkeypatch.chdir(tmp_path)
    for block in code:
        exec(block, scope)
    assert len(code) == 8
    assert scope["again"](scope["x"]).shape == (8, 10)
    assert scope["small"](scope["x"]).shape == (8, 10)


def test_the_page_on_boards_knows_every_column_mark_and_control():
    text = (ROOT / "docs/reading-a-board.md").read_text()
    for flag in FLAGS:
        assert flag.mark in text
    for column in COLUMNS:
        if column.title and "," not in column.title and column.title != "fine-tuned / trained":
            assert column.title in text, column.title
    for name, control in CONTROLS.items():
        assert f"`{name}" in text or not control.note


@pytest.mark.parametrize("page", ["README.md", "docs/your-own-technique.md"])
def test_its_technique_in_ten_lines_keeps_the_contract(page):
    from widthbench.contract import check_technique

    (code,) = [
        b
        for b in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
        if "class MaxNorm" in b
    ]
    scope = {"__name__": "mytechnique"}
    exec(code, scope)
    assert check_technique(scope["MaxNorm"]) == 9


def test_its_call_in_your_own_code_runs():
    (code,) = [
        b for b in re.findall(r"```python\n(.*?)```", README, flags=re.S) if "widthbench.apply" in b
    ]
    scope = {}
    exec(code, scope)
    assert isinstance(scope["small"], torch.nn.Module)


def test_suites_have_as_many_cells_as_their_page_says():
    said = {
        name: int(cells)
        for name, cells in re.findall(
            r"^\| `([\w-]+)` \|.*\| (\d+) \|$", (ROOT / "docs/suites.md").read_text(), flags=re.M
        )
    }
    assert said == {name: len(suites.load(name).cells()) for name in suites.names()}


EXAMPLES = [
    path.relative_to(ROOT).with_suffix("")
    for folder in ("widthbench", "methods", "baselines")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("module", [".".join(path.parts) for path in EXAMPLES])
def test_examples_of_the_reference_run(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted
    assert not found.failed
