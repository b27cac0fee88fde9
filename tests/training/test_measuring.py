import copy

import pytest
import torch
from torch import nn

from widthbench.api import Batches
from widthbench.data import splits
from widthbench.networks import models
from widthbench.training.measuring import (
    MIB,
    Meter,
    accuracy,
    fastest_layout,
    latency_ms,
    peak_memory_mib,
    replayed,
)


@pytest.fixture(scope="module")
def digits():
    return splits.load("digits", 8)


def test_accuracy_is_the_same_at_any_batch_size(digits):
    model = models.create("lenet_300_100", classes=10, channels=1, size=8).train()
    scores = [accuracy(model, digits.test, batch_size=b) for b in (1, 7, 449, 450, 10_000)]
    assert {s.top1 for s in scores} == {scores[0].top1}
    assert {s.samples for s in scores} == {450}
    assert all(s.loss == pytest.approx(scores[0].loss, rel=1e-6) for s in scores)
    assert model.training


def test_accuracy_against_counting(digits):
    model = models.create("lenet_300_100", classes=10, channels=1, size=8)
    x, y = next(digits.test.batches(450))
    right = sum(int(model(a[None]).argmax()) == int(b) for a, b in zip(x, y, strict=True))
    assert accuracy(model, digits.test).top1 == pytest.approx(100 * right / 450)
    assert accuracy(model, digits.test).top5 is None


class Rank(nn.Module):
    """Logits of 100 classes that put the label at a known rank."""

    def forward(self, x):
        return -(torch.arange(100.0) - x).abs()


class Hundred:
    def batches(self, size):
        yield torch.tensor([[3.0], [3.0], [50.0]]), torch.tensor([3, 5, 3])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_accuracy_runs_in_the_fastest_layout_and_puts_the_old_one_back(layout):
    model = models.create("resnet20_cifar", classes=10, channels=3, size=32).to(
        memory_format=layout
    )
    seen = []
    fast = {"memory_format": torch.channels_last}
    model.conv1.register_forward_hook(
        lambda m, args, out: seen.append(
            m.weight.is_contiguous(**fast) and args[0].is_contiguous(**fast)
        )
    )
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6)
    strides = [p.stride() for p in model.parameters()]
    score = accuracy(model, Batches((x, y), torch.device("cpu")), batch_size=4)
    assert seen == [True, True]
    assert [p.stride() for p in model.parameters()] == strides
    loss = nn.functional.cross_entropy(model.eval().double()(x.double()), y)
    assert score.loss == pytest.approx(float(loss), rel=1e-4)


def test_networks_with_volumes_keep_the_usual_layout():
    flat = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    assert fastest_layout(flat) is torch.channels_last
    assert fastest_layout(nn.Sequential(flat, nn.Conv3d(1, 2, 1))) is torch.contiguous_format
    assert fastest_layout(nn.Linear(3, 2)) is torch.contiguous_format
    net = nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 1, 1), nn.Flatten(1, 2), flat)
    samples = Batches((torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])), torch.device("cpu"))
    assert accuracy(net, samples).samples == 5


def test_top5_counts_from_a_hundred_classes():
    score = accuracy(Rank(), Hundred())
    assert score.top1 == pytest.approx(100 / 3)
    assert score.top5 == pytest.approx(200 / 3)


def test_meter_counts_passes_of_a_network_and_its_copies():
    model = nn.Linear(4, 2)
    with Meter(model, macs=8) as meter:
        with torch.no_grad():
            model(torch.randn(3, 4))
        clone = copy.deepcopy(model)
        clone(torch.randn(5, 4)).sum().backward()
    assert (meter.forward_macs, meter.backward_macs) == (8 * 8, 2 * 5 * 8)
    assert meter.seconds > 0
    meter.leave(clone)
    clone(torch.randn(5, 4))
    model(torch.randn(5, 4))
    assert meter.forward_macs == 64
    assert not model._forward_hooks
    assert not clone._forward_hooks


def test_peak_memory_of_a_hand_computed_network():
    model = nn.Sequential(
        nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False)
    ).eval()
    x = torch.zeros(1024, 1024)
    # two weights, the input, and both outputs: the first is still read while the second is made
    assert peak_memory_mib(model, x) == pytest.approx(5 * 1024 * 1024 * 4 / MIB, rel=0.01)


def test_latency_is_a_time():
    assert 0 < latency_ms(nn.Linear(4, 4), torch.zeros(1, 4), rounds=5) < 1000


def test_a_replay_keeps_what_its_recording_reads(monkeypatch):
    """A graph reads memory by its address: the network and the batch must live as long as the
    replay."""
    import contextlib
    import gc
    import weakref

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    batch = torch.zeros(3)
    seen = weakref.ref(batch)
    replay = replayed(lambda batch=batch: batch + 1)
    del batch
    gc.collect()
    assert seen() is not None
    replay()
    del replay
    gc.collect()
    assert seen() is None
