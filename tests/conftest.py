"""One cache for the whole run, one thread per worker, and the small networks that most tests
use."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import zoo


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory, worker_id):
    base = tmp_path_factory.getbasetemp()
    shared = (
        base.parent if worker_id != "master" else base
    )  # xdist gives each worker a folder below a shared one
    before = os.environ.get("WIDTHBENCH_CACHE")
    os.environ["WIDTHBENCH_CACHE"] = str(shared / "widthbench-cache")
    torch.set_num_threads(1)
    yield
    if before is None:
        del os.environ["WIDTHBENCH_CACHE"]
    else:
        os.environ["WIDTHBENCH_CACHE"] = before


@pytest.fixture(params=zoo.ALL, ids=lambda c: c.__name__)
def net(request):
    """(network, example input, certified groups) of each small network, in float64 with randomised
    statistics."""
    return zoo.certified(request.param)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """An empty cache of the test's own."""
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def run_cells_here():
    """What has cells run in this process, not in one of their own, by a monkeypatch: for tests of
    what comes before and after cells."""
    from widthbench.engines.worker import Worker
    from widthbench.experiment.protocol import run_cell
    from widthbench.experiment.store import Store

    def run(self, cell, limits=None, *, bar=False):
        return run_cell(cell, Store())

    return lambda patch: patch.setattr(Worker, "run", run)


@pytest.fixture
def in_process(monkeypatch, run_cells_here):
    """Cells are run in this process."""
    run_cells_here(monkeypatch)
