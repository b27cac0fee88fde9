"""Several processes, through gloo on the CPU, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import parallel_worker
import pytest
import torch

from widthbench import parallel
from widthbench.cli import main

HERE = Path(__file__).parent
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


def run(*command, cache=None):
    names = {"OMP_NUM_THREADS": "1"} | ({"WIDTHBENCH_CACHE": str(cache)} if cache else {})
    done = subprocess.run(
        command, env=os.environ | names, capture_output=True, text=True, check=False, timeout=540
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


NETWORKS = {"lenet5": 28, "test_vit": 32, "test_efficientnet": 32}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where one process, and two together, have put what came of training each network."""
    folder = tmp_path_factory.mktemp("trained")
    worker = str(HERE / "parallel_worker.py")
    networks = [f"{name}:{size}" for name, size in NETWORKS.items()]
    parallel_worker.main(str(folder / "one"), *networks)
    run(*LAUNCH, worker, str(folder / "two"), *networks)
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_train_and_score_as_one_does(trained, name):
    """In float64, with augmentation, an uneven last batch, an average of weights, and batch
    norms."""
    one, two = (torch.load(trained / f"{n}-{name}.pt", weights_only=True) for n in ("one", "two"))
    assert one["macs"] == two["macs"]
    assert one["scores"] == pytest.approx(two["scores"], rel=1e-8)
    for key, value in one["state"].items():
        assert torch.allclose(value.double(), two["state"][key].double(), rtol=1e-8, atol=1e-9), key


SUITE = """
name = "tiny"
title = "two networks"
citable = false
datasets = ["digits"]
seeds = [0]
budgets = ["macs:0.5"]
techniques = ["l1-norm", {{ id = "autoprune", params = {{ epochs = 1 }} }}]
controls = ["base", "scratch:l1-norm"]
base = {{ epochs = 1, batch_size = 64, lr = 0.02 }}
finetune = {{ epochs = 1, batch_size = 64, lr = 0.005 }}

[[models]]
name = "lenet_300_100"
size = 8
"""


def test_a_suite_in_two_processes_gives_the_records_of_one(
    tmp_path, fresh_cache, in_process, capsys
):
    suite = tmp_path / "tiny.toml"
    suite.write_text(SUITE.format())
    assert main(["run", str(suite), "--no-timing", "--results", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().err.count("] digits-") == 4
    command = (
        "-m",
        "widthbench",
        "run",
        str(suite),
        "--no-timing",
        "--results",
        str(tmp_path / "two"),
    )
    done = run(*LAUNCH, *command, cache=tmp_path / "cache-two")
    assert done.stderr.count("] digits-") == 4  # the first process alone says what is done
    found = {}
    for name in ("one", "two"):
        lines = (tmp_path / name / "tiny" / "records.jsonl").read_text().splitlines()
        found[name] = {r["cell"]["technique"]: r for r in map(json.loads, lines)}
    for technique, one in found["one"].items():
        two = found["two"][technique]
        assert (two["status"], two["macs"], two["params"]) == ("done", one["macs"], one["params"])
        assert [r["loss"] for r in two["rows"]] == pytest.approx(
            [r["loss"] for r in one["rows"]], rel=1e-3
        )
        for phase, spent in one["spent"].items():
            assert two["spent"][phase]["forward_macs"] == spent["forward_macs"], (technique, phase)
            assert two["spent"][phase]["backward_macs"] == spent["backward_macs"], (
                technique,
                phase,
            )
        assert two["provenance"]["processes"] == 2


def test_parts_of_a_batch_are_all_of_it(monkeypatch):
    for count in (1, 2, 7, 8):
        for world in (1, 2, 3, 4):
            monkeypatch.setattr(parallel, "world", lambda world=world: world)
            seen = []
            for rank in range(world):
                monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
                seen += list(range(count))[parallel.part(count)]
            assert seen == list(range(count))


def test_one_process_needs_nothing():
    assert (parallel.world(), parallel.rank(), parallel.is_main()) == (1, 0, True)
    assert parallel.broadcast(lambda: 3) == 3
    assert parallel.gather("x") == ["x"]
    parallel.barrier()
    parallel.add_up([torch.ones(2)])


def test_jobs_and_a_launcher_do_not_go_together(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "smoke", "--jobs", "2"]) == 2
    assert "--jobs must be 1" in capsys.readouterr().err
