"""What only a real GPU can show; skipped where there is none, under a minute where there is one."""

import pytest
import torch
from speed.measuring import TECHNIQUES
from torch import nn
from torch.nn import functional as F

from widthbench import api
from widthbench.data import splits
from widthbench.experiment import billing, protocol
from widthbench.experiment.suites import Suite
from widthbench.networks import models
from widthbench.recipe import Recipe
from widthbench.training import graphed, state
from widthbench.training.loop import fit
from widthbench.training.measuring import latency_ms, peak_memory_mib
from widthbench.training.resume import Resume

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture
def float32():
    """Convolutions in float32, as the protocol has them."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def digits():
    return splits.load("digits", 8, device="cuda")


def network():
    return models.create("test_resnet", classes=10, channels=1, size=8).cuda()


RECIPE = Recipe(epochs=1.5, batch_size=32, lr=0.02, crop=1, flip=True, cutout=2, warmup_epochs=0.5)


def distance(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(
        float((p.double() - q.double()).norm() / (q.double().norm() + 1e-3)) for p, q in pairs
    )


@pytest.mark.parametrize(
    "changes", [{}, {"amp": True}, {"optimizer": "adamw", "lr": 1e-3}], ids=str
)
def test_a_graphed_training_is_the_plain_one(digits, float32, monkeypatch, changes):
    recipe = RECIPE.model_copy(update=changes)
    replays = []
    real = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: replays.append(1) or real(g))
    start, graph, plain = network(), network(), network()
    fit(graph, digits.train, recipe, macs=1)
    assert len(replays) > 30
    monkeypatch.setattr(graphed, "RECORDABLE", ())
    fit(plain, digits.train, recipe, macs=1)
    assert distance(graph, plain) < (0.05 if changes else 1e-3) * max(1.0, distance(graph, start))


def test_a_killed_graphed_training_goes_on(digits, float32, tmp_path):
    def stop(epoch):
        raise KeyboardInterrupt

    whole, again = network(), network()
    fit(whole, digits.train, RECIPE, macs=1)
    resume = Resume(tmp_path / "state", every_s=0)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), digits.train, RECIPE, macs=1, resume=resume, after_epoch=stop)
    fit(again, digits.train, RECIPE, macs=1, resume=Resume(tmp_path / "state", every_s=0))
    assert distance(again, whole) < 1e-3


def test_memory_that_runs_out_is_met_by_smaller_parts(digits, monkeypatch):
    real = state.Run._gradients

    def short(run, x, y, whole):
        if run.parts == 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(run, x, y, whole)

    def none_left(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(state.Run, "_gradients", short)
    monkeypatch.setattr(graphed._Steps, "_from_tables", none_left)
    with pytest.warns(UserWarning, match="one by one"), pytest.warns(UserWarning, match="2 parts"):
        spent = fit(network(), digits.train, RECIPE, macs=1)
    assert spent.halved == 1


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_technique_runs_on_a_gpu(technique):
    torch.manual_seed(0)
    model = models.create("test_resnet", classes=10, channels=1, size=16).cuda()
    x = torch.randn(1, 1, 16, 16, device="cuda")
    pair = torch.rand(256, 1, 16, 16, device="cuda"), torch.randint(10, (256,), device="cuda")
    out = api.outcome(
        technique, model, budget="macs:0.5", example_input=x, data=pair, **TECHNIQUES[technique]
    )
    assert next(out.resized.parameters()).is_cuda
    assert out.resized(x).isfinite().all()


SUITE = {
    "name": "gpu",
    "datasets": ["digits"],
    "seeds": [0],
    "budgets": ["macs:0.5"],
    "techniques": [
        {"id": n, "params": p}
        for n, p in TECHNIQUES.items()
        if n in ("splitting", "autoprune", "autoslim")
    ],
    "base": RECIPE,
    "finetune": RECIPE,
    "models": [{"name": "test_resnet", "size": 8}],
    "device": "cuda",
}


def test_a_killed_technique_goes_on_from_what_it_had_kept(fresh_cache, monkeypatch):
    """Splitting keeps its optimizer's state after a round: it comes back from a file, which is on
    the CPU."""
    from widthbench.experiment.store import Store

    cell = next(c for c in Suite(**SUITE).cells() if c.technique == "splitting")
    rounds = []
    real = billing._cached_state

    def killed(key, make):
        state = real(key, make)
        rounds.append(key)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return state

    monkeypatch.setattr(billing, "_cached_state", killed)
    with pytest.raises(KeyboardInterrupt):
        protocol.run_cell(cell, Store())
    record = protocol.run_cell(cell, Store())
    assert record.status == "done", record.trace
    assert record.provenance["device"].startswith("cuda")


def test_float32_means_float32():
    cell = Suite(**SUITE).cells()[0]
    conv = nn.Conv2d(64, 64, 3, bias=False).cuda()
    x = torch.randn(4, 64, 32, 32, device="cuda")
    exact = F.conv2d(x.double(), conv.weight.double())
    with protocol.pinned(cell):
        error = float((conv(x).double() - exact).norm() / exact.norm())
    assert error < 2e-6  # TF32 has about 3e-4


def test_peak_memory_and_latency_are_those_of_the_network_itself():
    wide, narrow = (
        nn.Sequential(nn.Conv2d(3, n, 3), nn.Conv2d(n, 8, 3)).cuda().eval() for n in (256, 16)
    )
    x = torch.randn(64, 3, 32, 32, device="cuda")
    alone = peak_memory_mib(narrow, x)
    ballast = torch.zeros(2**26, device="cuda")  # 256 MiB that are not the network's
    assert peak_memory_mib(narrow, x) == pytest.approx(alone, rel=0.05)
    assert alone < peak_memory_mib(wide, x) / 4
    assert latency_ms(narrow, x) < latency_ms(wide, x)
    assert ballast.sum() == 0
