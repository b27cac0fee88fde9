"""A Ray cluster of three nodes on this machine gives the records that one process gives, whatever
is lost on the way.

Needs `pip install 'widthbench[ray]'`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from made import record

from widthbench.cli import main
from widthbench.engines import local
from widthbench.engines import ray as engine
from widthbench.engines.ray import _Plan
from widthbench.engines.worker import code_of
from widthbench.errors import UsageError
from widthbench.experiment import suites
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.records import read_records
from widthbench.experiment.store import Store
from widthbench.provenance import stamp
from widthbench.recipe import Recipe

ROOT = Path(__file__).parents[2]
cluster_needed = pytest.mark.slow


def stable(folder):
    return {r.cell.id: r.stable() for r in read_records(folder / "smoke" / "records.jsonl")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What `pytest bench` makes of the smoke suite."""
    folder = tmp_path_factory.mktemp("bench")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "bench"),
        "-n",
        "2",
        "-q",
        "--suite",
        "smoke",
        "--results",
        str(folder),
    ]
    env = {**os.environ, "WIDTHBENCH_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    found = stable(folder)
    assert len(found) == 14
    return found


@pytest.fixture
def cluster(monkeypatch):
    """Three nodes of one core each."""
    pytest.importorskip("ray", reason="needs pip install 'widthbench[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.workers = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made
    made.shutdown()


def command(cluster, folder):
    return [
        "run",
        "smoke",
        "--engine",
        "ray",
        "--address",
        cluster.address,
        "--results",
        str(folder),
    ]


@cluster_needed
def test_three_nodes_give_the_records_that_pytest_bench_gives(
    cluster, expected, fresh_cache, tmp_path
):
    assert main(command(cluster, tmp_path)) == 0
    assert stable(tmp_path) == expected


@cluster_needed
def test_a_node_that_is_lost_half_way_costs_nothing(cluster, expected, fresh_cache, tmp_path):
    def kill():
        while len(list((fresh_cache / "cells").glob("*/*.json"))) < 5:
            time.sleep(0.1)
        cluster.remove_node(cluster.workers[0], allow_graceful=False)

    hand = threading.Thread(target=kill)
    hand.start()
    assert main(command(cluster, tmp_path)) == 0
    hand.join()
    assert stable(tmp_path) == expected


@cluster_needed
def test_a_driver_that_is_killed_and_started_again_loses_nothing(
    cluster, expected, fresh_cache, tmp_path
):
    driver = subprocess.Popen(
        [sys.executable, "-m", "widthbench", *command(cluster, tmp_path)], stderr=subprocess.PIPE
    )
    while len(list((fresh_cache / "cells").glob("*/*.json"))) < 5:
        assert driver.poll() is None
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    kept = {p.name: p.read_bytes() for p in (fresh_cache / "cells").glob("*/*.json")}
    assert main(command(cluster, tmp_path)) == 0
    assert stable(tmp_path) == expected
    assert {
        p.name: p.read_bytes() for p in (fresh_cache / "cells").glob("*/*.json") if p.name in kept
    } == kept


@cluster_needed
def test_ctrl_c_ends_a_run_that_goes_on_later(cluster, expected, fresh_cache, tmp_path):
    driver = subprocess.Popen(
        [sys.executable, "-m", "widthbench", *command(cluster, tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list((fresh_cache / "cells").glob("*/*.json"))) < 3:
        assert driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "interrupted; finished cells are kept" in said
    assert "Traceback" not in said
    assert main(command(cluster, tmp_path)) == 0
    assert stable(tmp_path) == expected


@cluster_needed
def test_nodes_whose_caches_are_apart_share_a_store(
    cluster, expected, fresh_cache, tmp_path, monkeypatch
):
    """The driver has a cache of its own, and the tasks' cache is emptied of everything but what
    comes from the store."""
    monkeypatch.setenv("WIDTHBENCH_STORE", f"file://{tmp_path}/store")
    assert main([*command(cluster, tmp_path), "--only", "lenet_300_100"]) == 0
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(tmp_path / "another"))
    assert main(command(cluster, tmp_path)) == 0
    assert stable(tmp_path) == expected
    whens = [
        r.provenance["when"]
        for r in read_records(tmp_path / "smoke" / "records.jsonl")
        if "lenet" in r.cell.id
    ]
    first = fresh_cache / "cells"
    assert sorted(whens) == sorted(
        Store(first).get(p.stem).provenance["when"] for p in first.glob("*/*.json")
    )


@cluster_needed
def test_what_no_node_has_is_named_before_anything_runs(cluster, fresh_cache, tmp_path, capsys):
    text = (
        (ROOT / "bench" / "suites" / "smoke.toml")
        .read_text()
        .replace("citable = false", "citable = false\nthreads = 7")
    )
    (tmp_path / "wide.toml").write_text(text)
    assert (
        main(
            [
                "run",
                str(tmp_path / "wide.toml"),
                "--engine",
                "ray",
                "--address",
                cluster.address,
                "--results",
                str(tmp_path),
            ]
        )
        == 2
    )
    assert "no node of the cluster has 7 CPU" in capsys.readouterr().err


def test_a_node_with_other_code_or_versions_is_named():
    cell = next(c for c in suites.load("smoke").cells() if c.technique == "l1-norm")
    made = record(provenance=stamp()).model_copy(update={"cell": cell})
    engine._same_code(made, "node1", code_of(cell))
    with pytest.raises(
        UsageError, match="node node1 has another code of widthbench; install the same on all nodes"
    ):
        engine._same_code(made, "node1", "0" * 64)
    other = made.model_copy(
        update={"provenance": {**stamp(), "versions": {**stamp()["versions"], "timm": "0.1"}}}
    )
    with pytest.raises(UsageError, match=r"node node1 has another timm 0\.1 \(here "):
        engine._same_code(other, "node1", code_of(cell))


def test_without_ray_the_engine_says_what_to_install(monkeypatch, capsys, tmp_path, fresh_cache):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", "smoke", "--engine", "ray", "--results", str(tmp_path)]) == 2
    assert "pip install 'widthbench[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--gpus", "-1"], ["--gpus", "1.5"], ["--gpus", "many"]])
def test_gpus_are_shares_or_whole(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["run", "smoke", "--engine", "ray", *wrong])
    assert "a share of a GPU" in capsys.readouterr().err


def test_options_of_ray_are_refused_for_another_engine(capsys):
    assert main(["run", "smoke", "--address", "auto"]) == 2
    assert "--engine ray" in capsys.readouterr().err
    assert main(["run", "smoke", "--engine", "ray", "--address", "auto", "--jobs", "2"]) == 2
    assert "leave --jobs out" in capsys.readouterr().err


def test_bases_and_sources_come_before_what_needs_them():
    cells = suites.load("digits").cells()
    plan, given = _Plan(cells), []
    while plan:
        now = list(plan.ready(50))
        assert now
        for cell in now:
            first = next(c for c in cells if c.group == cell.group)
            assert cell is first or first in given
            if cell.of:
                source = cell.model_copy(update={"technique": cell.of, "of": None})
                assert source in given
        given += now
        for cell in now:
            plan.finish(cell)
    assert sorted(c.id for c in given) == sorted(c.id for c in cells)


def test_a_control_that_is_listed_before_its_source_does_not_wait_for_itself():
    cells = [
        c
        for c in suites.load("smoke").cells()
        if "lenet" in c.id and (c.of or c.technique == "l1-norm")
    ][::-1]
    assert cells[0].of
    plan, given = _Plan(cells), []
    while plan:
        now = list(plan.ready(9))
        assert now
        given += now
        for cell in now:
            plan.finish(cell)
    assert given == cells[::-1]


def test_several_processes_give_the_same_as_this_one(fresh_cache, tmp_path, monkeypatch):
    """The same records, whatever --jobs says, of two base networks, which as many processes
    share."""
    brief = Recipe(epochs=1, lr=0.02)
    cells = [
        c.model_copy(update={"seed": seed, "base": brief, "finetune": brief})
        for seed in (0, 1)
        for c in suites.load("smoke").cells()
        if c.model == "lenet_300_100" and c.technique in ("base", "l1-norm", "uniform-width")
    ]
    assert len({c.group for c in cells}) == 2
    records = []
    local.run(cells, jobs=2, done=records.append)
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(tmp_path / "one"))
    one = {c.id: run_cell(c, Store()).stable() for c in cells}
    assert len(one) == 6
    assert {r.cell.id: r.stable() for r in records} == one
