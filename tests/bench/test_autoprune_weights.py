"""The study of single weights: its gates and its rule against hand computation."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from widthbench.recipe import Recipe

PATH = Path(__file__).parents[2] / "bench" / "studies" / "autoprune_weights.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("autoprune_weights", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Few:
    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.images, self.labels = torch.randn(24, 6, generator=draw), torch.arange(24) % 3

    def __len__(self):
        return len(self.labels)

    def batches(self, size, *, generator=None, augment=None):
        yield self.images[:size], self.labels[:size]


def gated(study, monkeypatch, mu=0.3, **rule):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    plain = [p.detach().clone() for p in net.parameters()]
    monkeypatch.setattr(study, "part", lambda data, which: data.val)
    data = SimpleNamespace(train=Few(), val=Few())
    recipe = Recipe(epochs=40, batch_size=24, lr=0.1)
    return net, plain, study.Weights(net, data, recipe, mu, 0, **rule)


def test_closed_weights_count_as_zero_and_still_have_a_slope(study, monkeypatch):
    net, plain, gates = gated(study, monkeypatch)
    gates.gates[0].open[2, 3] = 0.0
    x, y = Few().images, Few().labels
    w = plain[0].clone()
    w[2, 3] = 0.0
    by_hand = F.linear(F.linear(x, w, plain[1]).relu(), plain[2], plain[3])
    assert torch.allclose(net(x), by_hand)
    (slope,) = torch.autograd.grad(F.cross_entropy(net(x), y), [gates.gates[0].product])
    assert slope[2, 3] != 0


@pytest.mark.parametrize("decoupling", ["sgn", "none"])
def test_one_step_is_the_rule(study, monkeypatch, decoupling):
    net, plain, gates = gated(study, monkeypatch, decoupling=decoupling)
    x, y = Few().images, Few().labels
    weights = [p.requires_grad_() for p in plain]
    out = F.linear(F.linear(x, *weights[:2]).relu(), *weights[2:])
    slopes = torch.autograd.grad(F.cross_entropy(out, y), [weights[0], weights[2]])
    s = torch.cat(
        [
            (t * (w.sign() if decoupling == "sgn" else w)).flatten()
            for t, w in zip(slopes, (weights[0], weights[2]), strict=True)
        ]
    )
    gates.learn(net)
    scaled = s / s.square().mean().sqrt()  # the first step's root mean square is its own
    expected = 1 - study.ETA * (scaled + 0.3) * torch.sigmoid(torch.ones(()))
    assert torch.allclose(gates.m, expected, atol=1e-5)
    assert gates.product >= 0  # the theorem
    assert 0 < gates.cosine <= 1 + 1e-6


def test_what_the_penalty_closes_is_closed_in_the_network(study, monkeypatch):
    net, _, gates = gated(study, monkeypatch, mu=5.0)
    for step in range(12):
        gates.step = step
        gates.learn(net)
    shut = 1 - gates.open
    assert shut.sum() > 0
    assert torch.equal(gates.open, (gates.m > 0).float())
    assert gates.returns.counts(gates.open)["recoveries"] == 0  # nothing was closed for long
