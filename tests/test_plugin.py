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


EVERYTHING = """
import contextlib, io, json
from widthbench import contract
from widthbench.cli import main
from widthbench.technique import registry

with contextlib.redirect_stdout(io.StringIO()) as listed:
    code = main("list techniques --json".split())
print(json.dumps({"code": code, "listed": json.loads(listed.getvalue())}))
for command in (
    "run mine.toml --no-timing",
    "report mine.toml --site --no-timing",
    "verify mine.toml --only keep-first --results results",
):
    assert main(command.split()) == 0, command
print("decisions checked:", contract.check_technique(registry.load("keep-first")))
"""


def test_it_is_listed_runs_through_a_suite_onto_a_leaderboard_and_keeps_the_contract(run):
    (run.folder / "mine.toml").write_text(SUITE)
    done = run("-c", EVERYTHING)
    assert done.returncode == 0, done.stdout + done.stderr

    answer = json.loads(done.stdout.splitlines()[0])
    owners = {t["technique"]: t["from"] for t in answer["listed"]["techniques"]}
    assert owners["keep-first"] == "keepfirst 0.1"
    assert "l1-norm" in owners
    # the broken one beside it
    assert "fails to import: ModuleNotFoundError" in answer["listed"]["broken"]["broken-import"]
    assert "'broken-import' of keepfirst 0.1" in done.stderr
    assert answer["code"] == 1

    folder = run.folder / "results" / "with-plugin"
    assert "| keep-first" in (folder / "leaderboard.md").read_text()
    assert (folder / "figures" / "error-macs.png").stat().st_size > 1000
    assert ">keep-first</td>" in (run.folder / "results" / "site.html").read_text()
    assert "bit-equal" in done.stdout
    assert "decisions checked: 9" in done.stdout
