"""Benchmarks' measuring process: numbers, reasons, and what happens to one that hangs or dies."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from asv_runner.discovery import disc_benchmarks
from speed import measuring
from speed.measuring import Item, Worker

from widthbench.technique import registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with Worker(environment={"WIDTHBENCH_CACHE": str(tmp_path_factory.mktemp("cache"))}) as found:
        yield found


def test_every_built_in_technique_is_measured():
    ours = {n for n in registry.names() if registry.owner(n).startswith("widthbench ")}
    assert set(measuring.TECHNIQUES) == ours


def test_names_tell_items_apart():
    names = [str(i) for i in measuring.items()]
    assert len(set(names)) == len(names)
    assert (
        str(Item("inference", "lenet5", budget="macs:0.5", batch=4, device="cuda"))
        == "inference lenet5 macs:0.5 batch=4 cuda"
    )


@pytest.mark.parametrize(
    "item",
    [
        Item("training step", "lenet5", batch=8),
        Item("inference", "lenet5", budget="macs:0.5", batch=8),
        Item("discovery", "lenet5"),
        Item("certification", "lenet5"),
        Item("resize", "lenet5"),
        Item("technique", "lenet5", technique="l1-norm", budget="macs:0.5"),
    ],
    ids=str,
)
def test_each_kind_gives_milliseconds_and_memory(worker, item):
    found = worker.ask(item, rounds=3)
    assert len(found["ms"]) == 3, found
    assert min(found["ms"]) > 0
    memory = worker.ask(item, memory=True)
    assert memory["held"] > 50  # torch itself
    assert memory["peak"] >= 0


def test_larger_batches_take_longer(worker):
    small, large = (
        min(worker.ask(Item("inference", "lenet5", batch=b), rounds=5, least=0.02)["ms"])
        for b in (1, 64)
    )
    assert large > 2 * small


def test_memory_is_that_of_the_work(tmp_path):
    """A block of 64 MiB that a call makes and drops is its peak, with allocation that hands memory
    back."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom speed import measuring\nimport torch\n"
        "print(measuring.memory(lambda: torch.ones(2**24).sum(), 'cpu')['peak'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "bench")],
        capture_output=True,
        text=True,
        check=True,
        env=measuring.FRUGAL,
    )
    assert 60 < float(done.stdout) < 80


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (Item("inference", "lenet5", device="cuda"), "torch finds no GPU"),
        (
            Item("technique", "lenet5", technique="torch-pruning:bn-scale", budget="macs:0.5"),
            "has none of the layers",
        ),
        (
            Item("technique", "lenet5", technique="not-there", budget="macs:0.5"),
            "has no technique 'not-there'",
        ),
    ],
    ids=str,
)
def test_what_is_not_here_is_skipped_with_the_reason(worker, item, reason):
    import torch

    if item.device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert reason in worker.ask(item)["skip"]
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        measuring.applicable({str(item): {"skip": reason}}, item)


def test_what_fails_says_why_and_the_next_item_works(worker):
    assert (
        "KeyError: 'no such network'" in worker.ask(Item("inference", "no such network"))["error"]
    )
    assert "ms" in worker.ask(Item("inference", "lenet5"))
    with pytest.raises(RuntimeError, match="boom"):
        measuring.number({"discovery lenet5": {"error": "boom"}}, Item("discovery", "lenet5"), "ms")


def test_a_process_that_hangs_or_dies_is_replaced(worker):
    item = Item("inference", "lenet5")
    assert "ms" in worker.ask(item)
    worker._process.kill()
    assert "exit code -9" in worker.ask(item)["error"]
    hanging = worker.ask(Item("discovery", "test_resnet"), timeout=0.001)
    assert "took longer than 0.001 s" in hanging["error"]  # in another process
    assert "ms" in worker.ask(item)


def test_benchmarks_are_called_as_asv_calls_them(capsys):
    """What the test below has asv look at in a process of its own, by asv's own looks."""
    folder = str(ROOT / "bench" / "speed")
    found = list(disc_benchmarks(folder))
    assert {b.name.split(".")[0] for b in found} == {"operations", "ratios", "techniques"}
    assert [b.name for b in found if not b.check(folder)] == [], capsys.readouterr().out


@pytest.mark.slow
def test_asv_finds_nothing_wrong_with_the_benchmarks():
    done = subprocess.run(
        [sys.executable, "-m", "asv", "check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No problems found" in done.stdout
