"""The package as others get it: built, installed where nothing else of the project is, and used
from an empty folder; and the workflow of docs/in-ci.md, step by step.

    pytest -m slow tests/test_package.py
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
MINE = """
name = "mine"
datasets = ["digits"]
seeds = [0, 1]
budgets = ["channels:0.25"]
techniques = ["mine", "l1-norm"]
controls = []
plugins = ["mytechnique.py"]
base = { epochs = 4, lr = 0.05 }
finetune = { epochs = 0, lr = 0.01 }

[[models]]
name = "lenet_300_100"
size = 8
"""
TECHNIQUE = """
import torch
from widthbench import ScoredTechnique
from widthbench.width.groups import producer_rows


class Mine(ScoredTechnique):
    id, access = "mine", "none"

    def score(self, task):
        rows = {name: producer_rows(task.model, task.groups, name) for name in task.groups}
        return {name: torch.cat(r, 1).abs().sum(1) for name, r in rows.items()}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of what is committed, and the wheel that is made of it."""
    pytest.importorskip("build", reason="pip install build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    subprocess.run(build, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Variables with which programs of an environment run that has the wheel, and of the project
    nothing else."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    (inside,) = place.glob("lib/python*/site-packages")
    # dependencies from here; a path in such a file brings no editable installation along
    (inside / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("WIDTHBENCH", "PYTHON"))}
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    return variables | {"PATH": path, "WIDTHBENCH_CACHE": str(tmp_path_factory.mktemp("cache"))}


def widthbench(variables, folder, *arguments):
    return subprocess.run(
        ["widthbench", *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_built_holds_what_is_needed_and_no_pictures(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], check=True, capture_output=True, text=True
    ).stdout
    for name in ("_suites/digits.toml", "_recipes/lenet5.toml", "_claims/autoprune.toml"):
        assert f"widthbench/{name}" in listed
    assert "widthbench/_published/digits/records.jsonl" in listed
    assert re.search(r"_published/bases/.*\.safetensors", listed)
    assert ".png" not in listed
    assert "tests/" not in listed
    assert wheel.stat().st_size < 20e6
    assert sdist.stat().st_size < 20e6


def test_it_works_in_an_empty_folder(installed, tmp_path):
    where = subprocess.run(
        ["python", "-c", "import widthbench; print(widthbench.__file__)"],
        cwd=tmp_path,
        env=installed,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(ROOT) not in where
    for arguments, shown in (
        (["list", "suites"], "digits"),
        (["list", "techniques"], "autoprune"),
        (["claims", "--id", "W1"], "W1"),
        (["verify", "digits", "--sample", "0"], "digits"),
        (["cite", "digits"], "@"),
        (["doctor", "test_resnet"], "exact"),
        (["run", "digits", "--dry-run"], "are to be run"),
        (["compare", "digits", "digits"], "are equal bit by bit"),
    ):
        said = widthbench(installed, tmp_path, *arguments)
        assert said.returncode == 0, said.stderr
        assert shown in said.stdout, arguments
    assert not list(tmp_path.iterdir())  # nothing but `run` writes without being asked
    assert widthbench(installed, tmp_path, "run", "smoke", "--no-timing").returncode == 0
    assert (tmp_path / "results/smoke/leaderboard.md").is_file()
    page = widthbench(installed, tmp_path, "report", "smoke", "--site", "--no-timing")
    assert page.returncode == 0, page.stderr


class Runner:
    """As little of GitHub's as the workflow needs."""

    def __init__(self, folder, variables):
        self.folder, self.outcomes, self.failed = folder, {}, False
        self.summary = folder / "summary.md"
        gh = folder / "bin" / "gh"
        gh.parent.mkdir()
        gh.write_text('#!/bin/bash\necho "$@" >> "$GH_SAID"\n[[ "$*" != *--edit-last* ]]\n')
        gh.chmod(0o755)  # it finds no comment to edit, as on a first pull request
        self.variables = variables | {
            "PATH": f"{gh.parent}:{variables['PATH']}",
            "GH_SAID": str(folder / "said"),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }

    def run(self, steps):
        for step in steps:
            if "run" not in step or "pip install" in step["run"]:
                continue
            if not self.holds(step.get("if", "")):
                continue
            script = re.sub(r"\$\{\{.*?\}\}", "7", step["run"])
            done = subprocess.run(
                ["bash", "-eo", "pipefail", "-c", script],
                cwd=self.folder,
                env=self.variables,
                check=False,
            )
            if done.returncode and not step.get("continue-on-error"):
                self.failed = True
                return
            if "id" in step:
                self.outcomes[step["id"]] = "failure" if done.returncode else "success"

    def holds(self, condition):
        if found := re.fullmatch(r"hashFiles\('(.*)'\) != ''", condition):
            return (self.folder / found[1]).is_file()
        if found := re.fullmatch(r"steps\.(\w+)\.outcome == 'failure'", condition):
            return self.outcomes.get(found[1]) == "failure"
        assert not condition, f"the runner does not know {condition}"
        return True


def workflow():
    """Its steps."""
    page = (ROOT / "docs/in-ci.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    return yaml.safe_load(text)["jobs"]["compare"]["steps"]


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        (lambda text: text, False),
        (lambda text: text.replace(".sum(1)", ".sum(1).neg()"), True),  # the weakest are kept
        (lambda text: text.replace("torch.cat", "torch.no_such_thing"), True),
        (None, False),  # main has no suite yet
    ],
    ids=["unchanged", "worse", "broken", "first"],
)
def test_the_workflow_tells_worse_from_unchanged(installed, tmp_path, change, fails):
    for side in ("main", "pr"):
        folder = tmp_path / side / "bench"
        folder.mkdir(parents=True)
        if side == "main" and change is None:
            continue
        (folder / "mine.toml").write_text(MINE)
        text = change(TECHNIQUE) if side == "pr" and change else TECHNIQUE
        (folder / "mytechnique.py").write_text(text)
    runner = Runner(tmp_path, installed)
    runner.run(workflow())
    assert runner.failed == fails
    if change is None:
        assert not (tmp_path / "said").exists()
        return
    table = (tmp_path / "table.md").read_text()
    assert table == runner.summary.read_text()
    assert "mine" in table
    assert ("4 of 4 cells are equal bit by bit" in table) == (not fails)
    said = (tmp_path / "said").read_text().splitlines()
    assert [line.split()[:3] for line in said] == [["pr", "comment", "7"]] * 2


def test_a_main_branch_that_no_longer_runs_is_no_success(installed, tmp_path):
    """There is nothing to compare with, and that is said."""
    for side, text in (("main", MINE.replace("[0, 1]", '"none"')), ("pr", MINE)):
        folder = tmp_path / side / "bench"
        folder.mkdir(parents=True)
        (folder / "mine.toml").write_text(text)
        (folder / "mytechnique.py").write_text(TECHNIQUE)
    runner = Runner(tmp_path, installed)
    runner.run(workflow())
    assert runner.failed
    assert not (tmp_path / "table.md").exists()


def test_what_was_measured_with_the_wheel_is_compared_with_what_is_published(installed, tmp_path):
    widthbench(installed, tmp_path, "run", "smoke", "--no-timing", "--only", "*l1-norm*-s0")
    said = widthbench(installed, tmp_path, "compare", "digits", "results/smoke", "--json")
    rows = json.loads(said.stdout)
    assert rows, said.stderr
    assert all(r["both"] for r in rows)
