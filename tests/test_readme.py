"""What the README shows is what the committed results say, and its code runs."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from widthbench.experiment import suites
from widthbench.experiment.records import read_records
from widthbench.report.claims import summary
from widthbench.report.lines import lines

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def excerpt_from(board: str) -> str:
    """The part of the leaderboard that the README shows: one network, the base and one budget."""
    (block,) = re.findall(r"^## lenet_300_100 on mnist\n\n(.*?)\n\n", board, flags=re.S | re.M)
    head, rule, *rows = block.splitlines()
    return "\n".join(
        [head, rule, *(row for row in rows if row.split("|")[3].strip() in ("–", "macs:0.25"))]
    )


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


def test_controls_lead_as_often_as_it_says():
    scratch = ("scratch", "scratch-budget", "uniform-width")
    best: dict[tuple, dict[bool | str, float]] = {}
    for line in lines(read_records(ROOT / "results" / "published" / "lenets" / "records.jsonl")):
        fresh = line.first().cell.technique in scratch
        if line.done and line.budget and (fresh or not line.control):
            found = best.setdefault((line.dataset, line.model, line.budget), {})
            found[fresh] = max(found.get(fresh, 0.0), line.summary(None).mean)
        elif line.done and line.budget:
            best.setdefault((line.dataset, line.model, line.budget), {})["longer"] = line.summary(
                None
            ).mean
    both = [b for b in best.values() if {True, False} <= b.keys()]
    led = sum(b[True] > b[False] for b in both)
    readme = " ".join(README.split())
    assert f"In {led} of the {len(both)} comparisons of this suite" in readme
    longer = [b for b in both if "longer" in b]
    beyond = [sum(b["longer"] > b[other] for b in longer) for other in (False, True)]
    assert (
        f"`l1-budget`, in {len(longer)} of the comparisons) is ahead of the best technique in"
        f" {beyond[0]}, and of the best control from scratch in {beyond[1]}." in readme
    )


def test_its_table_of_claims_is_the_committed_one():
    (shown,) = re.findall(
        r"<!-- claims -->\n(.*?)\n<!-- /claims -->", committed("README.md"), flags=re.S
    )
    assert shown == summary(json.loads(committed("results/published/claims.json"))), (
        "run `widthbench claims`, and put its verdicts here"
    )


def test_no_placeholder_is_left():
    assert not re.search(r"\b(TIMES|TODO|FIXME|PLACEHOLDER|XXX)\b", README)


def test_files_that_it_links_to_are_there():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


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


def test_suites_have_as_many_cells_as_it_says():
    said = {
        name: int(cells)
        for name, cells in re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) \|$", README, flags=re.M)
    }
    assert said == {name: len(suites.load(name).cells()) for name in suites.names()}
