"""`pytest bench` as users run it, on a tiny suite."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from widthbench.cli import main

ROOT = Path(__file__).parents[2]

SUITE = """
name = "tiny"
datasets = ["digits"]
seeds = [0, 1]
budgets = ["macs:0.5"]
techniques = ["l1-norm"]
controls = ["base", "scratch:l1-norm"]
device = "cpu"
[base]
epochs = 4
lr = 0.05
[finetune]
epochs = 4
lr = 0.01
[[models]]
name = "lenet_300_100"
size = 8
"""


@pytest.fixture
def bench(tmp_path, fresh_cache):
    (tmp_path / "tiny.toml").write_text(SUITE)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "OMP_"))}

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]

    def call(*args, what="bench"):
        return subprocess.run(
            [*command, str(ROOT / what), *args],
            cwd=ROOT,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )

    def start(*args, what="bench"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(
            [*command, str(ROOT / what), *args],
            cwd=ROOT,
            env=clean,
            start_new_session=True,
            **quiet,
        )

    call.start = start
    return call


def test_what_one_run_leaves_when_it_is_killed_two_workers_complete(bench, tmp_path, fresh_cache):
    options = (
        "--suite",
        str(tmp_path / "tiny.toml"),
        "--results",
        str(tmp_path / "results"),
    )
    running = bench.start(*options, what="bench/test_comparisons.py")
    while not (finished := list((fresh_cache / "cells").glob("??/*.json"))):
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "results").exists()
    before = {p: p.stat().st_mtime_ns for p in finished}

    # two claims, of which one is not run: all of them are judged with the committed results
    done = bench(*options, "-n", "2", "-v", "-k", "test_cell or R9 or M1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    assert "test_cell[digits-lenet_300_100-scratch:l1-norm-macs:0.5-s1]" in done.stdout
    assert "test_claim[R9]" in done.stdout
    assert "suite tiny: 6 of 6 cells done" in done.stdout  # by two workers, which share bases
    assert {p: p.stat().st_mtime_ns for p in finished} == before
    assert len(list((fresh_cache / "cells").glob("??/*.json"))) == 6
    folder = tmp_path / "results" / "tiny"
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert {r["status"] for r in records} == {"done"}
    bases = {}
    for r in records:
        bases.setdefault(r["cell"]["seed"], set()).add(r["provenance"].get("base_digest"))
    assert [len(digests - {None}) for digests in bases.values()] == [1, 1]
    board = (folder / "leaderboard.md").read_text()
    assert main(["report", *options[1:]]) == 0  # the same page from the store
    assert (folder / "leaderboard.md").read_text() == board
    again = bench(*options, "-n", "2", what="bench/test_comparisons.py").stdout
    assert re.search(r"^\[6/6\] digits-lenet_300_100-\S+: \d+\.\d\d %", again, flags=re.M)


def test_a_technique_in_a_file_is_known_to_all_workers(bench, tmp_path):
    (tmp_path / "own_widest.py").write_text(
        "import torch\nimport widthbench\n\n\n"
        "class First(widthbench.ScoredTechnique):\n"
        '    """Keeps the first channels."""\n\n'
        '    id, access = "own-first", "none"\n\n'
        "    def score(self, task):\n"
        "        return {n: -torch.arange(g.channels).float() for n, g in task.groups.items()}\n"
    )
    suite = SUITE.replace('["l1-norm"]', '["own-first"]').replace(', "scratch:l1-norm"', "")
    (tmp_path / "own.toml").write_text(suite.replace("tiny", "own"))
    options = ["--suite", str(tmp_path / "own.toml"), "--plugin", str(tmp_path / "own_widest.py")]
    done = bench(*options, "--results", str(tmp_path), "-n", "2", what="bench/test_comparisons.py")
    assert "suite own: 4 of 4 cells done" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_of_which_nothing_is_missing_gives_the_same_page(bench, tmp_path):
    options = (
        "--suite",
        str(tmp_path / "tiny.toml"),
        "--results",
        str(tmp_path / "results"),
        "-n",
        "2",
    )
    pages = []
    for _ in range(2):
        assert bench(*options).returncode == 0
        pages.append((tmp_path / "results" / "tiny" / "leaderboard.md").read_text())
    assert pages[0] == pages[1]


@pytest.mark.slow
def test_collecting_items_writes_nothing(bench, tmp_path):
    done = bench("--suite", str(tmp_path / "tiny.toml"), "--collect-only", "-q")
    assert "test_cell[digits-lenet_300_100-scratch:l1-norm-macs:0.5-s1]" in done.stdout
    assert not (tmp_path / "results").exists()


def test_bad_input_is_one_line_and_exit_code_2(bench, tmp_path):
    (tmp_path / "bad.toml").write_text(
        SUITE.replace('"l1-norm"]', '"l1"]').replace("scratch:l1-norm", "scratch:l1")
    )
    done = bench("--suite", str(tmp_path / "bad.toml"))
    assert done.returncode == 2
    assert (
        "unknown technique 'l1'; known: autoprune, autoslim, l1-norm" in done.stderr + done.stdout
    )
    assert "Traceback" not in done.stderr + done.stdout
