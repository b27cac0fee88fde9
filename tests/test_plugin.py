"""A complete third-party package: installed by this test, found through its entry point, run
through a suite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SUITE = """
name = "with-plugin"
datasets = ["digits"]
seeds = [0]
budgets = ["channels:0.5"]
techniques = ["keep-first"]
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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "plugin"
    subprocess.run(["cp", "-r", str(HERE / "plugin"), str(source)], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
        str(source),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    folder = tmp_path_factory.mktemp("work")
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def call(*args):
        return subprocess.run(
            [sys.executable, *args],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    call.folder = folder
    return call


def test_it_is_listed_and_the_broken_one_beside_it_is_named(run):
    done = run("-m", "widthbench", "list", "techniques", "--json")
    listed = json.loads(done.stdout)
    assert {"keep-first", "l1-norm"} <= {t["technique"] for t in listed["techniques"]}
    assert (
        next(t["from"] for t in listed["techniques"] if t["technique"] == "keep-first")
        == "keepfirst 0.1"
    )
    assert "fails to import: ModuleNotFoundError" in listed["broken"]["broken-import"]
    assert "'broken-import' of keepfirst 0.1" in done.stderr
    assert done.returncode == 1


EVERYTHING = """
from widthbench import contract
from widthbench.cli import main
from widthbench.technique import registry

for command in (
    "run mine.toml",
    "report mine.toml --site",
    "verify mine.toml --only keep-first --results results",
):
    assert main(command.split()) == 0, command
print("decisions checked:", contract.check_technique(registry.load("keep-first")))
"""


def test_it_runs_through_a_suite_onto_a_leaderboard_and_keeps_the_contract(run):
    (run.folder / "mine.toml").write_text(SUITE)
    done = run("-c", EVERYTHING)
    assert done.returncode == 0, done.stdout + done.stderr
    board = (run.folder / "results" / "with-plugin" / "leaderboard.md").read_text()
    assert "| keep-first" in board
    assert (
        run.folder / "results" / "with-plugin" / "figures" / "accuracy-macs.png"
    ).stat().st_size > 1000
    assert ">keep-first</td>" in (run.folder / "results" / "site.html").read_text()
    assert "bit-equal" in done.stdout
    assert "decisions checked: 9" in done.stdout
