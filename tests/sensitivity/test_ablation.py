import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

from widthbench.errors import UsageError
from widthbench.networks import models
from widthbench.sensitivity.ablation import (
    Ablation,
    Sample,
    channel_positions,
    cross_entropy,
    replica,
)
from widthbench.training.measuring import MIB, Meter, _LiveStorage
from widthbench.width import find_groups, gated
from widthbench.width.cost import count_macs


def naive(model, groups, sample, gates, candidates, value=0.0):
    """One candidate after the other, with gates on the whole network."""
    found = {}
    for name, index in candidates.items():
        losses = []
        for channel in index.tolist():
            gate = gates[name].clone()
            gate[channel] = value
            with gated(model, groups, {**gates, name: gate}), torch.no_grad():
                losses.append(float(F.cross_entropy(model(sample.x), sample.y)))
        found[name] = torch.tensor(losses, dtype=torch.float64)
    return found


def close(found, expected, tolerance):
    return found.keys() == expected.keys() and all(
        float((found[n] - e).abs().max()) < tolerance for n, e in expected.items()
    )


@pytest.mark.parametrize("value", [0.0, 0.4, 1.5])
@pytest.mark.parametrize("way", [None, "update", "gates", "loop"])
def test_every_way_equals_the_naive_loop_on_every_network(net, way, value):
    model, x, groups = net
    if way == "update" and any(
        getattr(m, "groups", 1) not in (1, getattr(m, "in_channels", 1)) for m in model.modules()
    ):
        with pytest.raises(UsageError, match="grouped convolutions"):
            Ablation(model, groups, zoo.sample_for(x), way=way).losses(
                {}, {n: torch.tensor([0]) for n in groups}
            )
        return
    sample, (gates, candidates) = zoo.sample_for(x), zoo.started(groups, x)
    found = Ablation(model, groups, sample, way=way).losses(gates, candidates, value)
    assert close(found, naive(model, groups, sample, gates, candidates, value), 1e-12)


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [("lenet_300_100", 28, 1), ("lenet5", 28, 1), ("test_resnet", 32, 3)],
)
def test_the_batched_oracle_equals_the_naive_loop_on_real_networks(name, size, channels):
    model = models.create(name, classes=10, channels=channels, size=size, seed=0).eval()
    x = torch.randn(8, channels, size, size)
    sample = Sample(x, torch.arange(8))
    groups = find_groups(model, x[:1])
    gates, candidates = zoo.started(groups.select(), x)
    candidates = {n: index[:12] for n, index in candidates.items()}
    assert close(
        Ablation(model, groups, sample).losses(gates, candidates),
        naive(model, groups, sample, gates, candidates),
        1e-6,
    )


def test_cross_entropy_is_torchs_also_where_the_network_is_sure():
    torch.manual_seed(0)
    logits, y = 30 * torch.randn(200, 7), torch.randint(0, 7, (200,))
    expected = F.cross_entropy(logits.double(), y, reduction="none")
    assert torch.allclose(cross_entropy(logits, y).double(), expected, rtol=1e-5, atol=1e-7)
    assert float(expected.min()) < 1e-9


def test_the_memory_limit_holds_and_changes_nothing():
    model = models.create("lenet5", classes=10, channels=1, size=28, seed=0).eval()
    x = torch.randn(64, 1, 28, 28)
    groups, sample = find_groups(model, x[:1]), Sample(x, torch.arange(64) % 10)
    candidates = {n: torch.arange(g.channels) for n, g in groups.items()}
    expected = Ablation(model, groups, sample).losses({}, candidates)
    for limit in (2.0, 8.0):
        for way in ("update", "gates"):
            work = Ablation(model, groups, sample, memory_mib=limit, way=way)
            with _LiveStorage() as live:
                found = work.losses({}, candidates)
            assert close(found, expected, 1e-6)
            assert live.peak < limit * MIB + 4 * (
                x.numel() + sum(p.numel() for p in model.parameters())
            )


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_losses_are_cross_entropies_also_where_exponentials_overflow(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, y = scale * torch.randn(20, 4), torch.arange(20) % 3
    found = Ablation(model, find_groups(model, x[:1]), Sample(x, y), way="update").losses(
        {}, {"0": torch.arange(6)}
    )["0"]
    assert bool(found.isfinite().all())
    for channel in range(6):
        shut = copy.deepcopy(model)
        shut[2].weight.data[:, channel] = 0
        assert float(found[channel]) == pytest.approx(float(F.cross_entropy(shut(x), y)), rel=1e-5)


def test_processes_share_the_sample():
    processes = 3
    model, x, groups = zoo.certified(zoo.Plain)
    sample, (gates, candidates) = zoo.sample_for(x, count=7), zoo.started(groups, x)
    alone, told = Ablation(model, groups, sample, way="gates"), []
    with Ablation(model, groups, sample, way="gates", processes=processes) as work:
        found = work.losses(gates, candidates, done=told.append)
        assert close(found, alone.losses(gates, candidates), 1e-12)
        assert sum(told) == sum(map(len, candidates.values()))
        assert work.forward_macs == alone.forward_macs
        assert len(work._workers) == processes - 1
        for worker in work._workers:
            for process in worker._processes.values():
                os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(UsageError, match="worker processes of processes > 1 died"):
            work.losses(gates, candidates)


def test_a_script_without_a_guard_may_use_processes(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text("""
import torch, widthbench
from torch import nn
x, y = torch.randn(8, 4), torch.tensor([0, 1] * 4)
net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
small = widthbench.apply("neuron-removal", net, budget="channels:0.5", example_input=x[:1],
                         data=(x, y), processes=2)
print(small[0].out_features)
""")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["3"], done.stderr


class Peeking(nn.Module):
    """Takes a number out of a tensor on the way, which vmap cannot batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        z = self.b(self.a(x).relu())
        return z + float(z.sum()) * 0


def test_operations_without_a_batching_rule_are_run_one_by_one():
    torch.manual_seed(0)
    model, x = Peeking().eval(), torch.randn(5, 4)
    groups = find_groups(model, x)
    work = Ablation(model, groups, Sample(x, torch.tensor([0, 1, 2, 0, 1])))
    with pytest.warns(
        UserWarning,
        match="channel group 'a' is closed channel by channel, since torch cannot batch it",
    ):
        found = work.losses({}, {"a": torch.arange(6)})
    assert work._chosen == {"a": "loop"}
    assert close(
        found, naive(model, groups, work.sample, {"a": torch.ones(6)}, {"a": torch.arange(6)}), 1e-6
    )


class InPlace(nn.Module):
    """Overwrites what its first layer gives, by a layer, a function or an addition."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        self.act = how if isinstance(how, nn.Module) else nn.Identity()
        self.how = how

    def forward(self, x):
        y = self.act(self.a(x))
        if self.how == "function":
            y = y.mul_(2).clamp_(min=-0.5)
        if self.how == "addition":
            y += x
        return self.c(self.b(y).sin().mean((2, 3)))


@pytest.mark.parametrize(
    "how", [nn.LeakyReLU(0.1, inplace=True), nn.SiLU(inplace=True), "function", "addition"], ids=str
)
def test_activations_that_are_overwritten_are_not_remembered_overwritten(how):
    torch.manual_seed(0)
    model, x = InPlace(how).double().eval(), torch.randn(5, 1, 6, 6, dtype=torch.float64)
    groups, sample = find_groups(model, x[:1]), Sample(x, torch.tensor([0, 1, 2, 3, 0]))
    with torch.no_grad():
        expected = float(F.cross_entropy(model(x), sample.y))
    for way in (None, "loop"):
        work = Ablation(model, groups, sample, way=way)
        gates, candidates = zoo.started(groups, x)
        for _ in range(3):
            assert work.loss({}) == pytest.approx(expected, rel=1e-12)
            assert close(
                work.losses(gates, candidates),
                naive(model, groups, sample, gates, candidates),
                1e-12,
            )
    assert [getattr(m, "inplace", None) for m in model.modules()] == [
        getattr(m, "inplace", None) for m in InPlace(how).modules()
    ]


class Folding(nn.Module):
    """Its first layer sees four patches of each image as samples, or (turned) the images along its
    second axis."""

    def __init__(self, turned):
        super().__init__()
        self.a, self.b, self.c, self.turned = (
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
            turned,
        )

    def forward(self, x):
        patches = x.view(len(x), 4, 4)
        y = (
            self.a(patches.transpose(0, 1)).transpose(0, 1)
            if self.turned
            else self.a(patches.flatten(0, 1)).view(-1, 4, 6)
        )
        return self.c(self.b(y.relu().mean(1)).relu())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [4, 7, 300])
def test_layers_whose_first_axis_is_not_the_samples_are_not_remembered(turned, count):
    torch.manual_seed(0)
    model, x = Folding(turned).double().eval(), torch.randn(count, 16, dtype=torch.float64)
    sample = Sample(x, torch.arange(count) % 3)
    groups = find_groups(model, x[:1]).select("all", "b")
    gates, candidates = zoo.started(groups, x)
    assert close(
        Ablation(model, groups, sample).losses(gates, candidates),
        naive(model, groups, sample, gates, candidates),
        1e-12,
    )


def test_memory_that_is_not_there_is_an_error_and_no_reason_to_loop(monkeypatch):
    model, x, groups = zoo.certified(zoo.Plain)
    real = Ablation._batch

    def starving(self, way, *args):
        if way != "loop":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
            )
        return real(self, way, *args)

    monkeypatch.setattr(Ablation, "_batch", starving)
    with pytest.raises(UsageError, match="no memory for memory_mib = 64: lower it"):
        Ablation(model, groups, zoo.sample_for(x)).losses({}, {"conv1": torch.arange(3)})


@pytest.mark.parametrize("index", [-1, 12])
def test_candidates_that_are_no_channels_are_refused(index):
    model, x, groups = zoo.certified(zoo.Mlp)
    with pytest.raises(UsageError, match=r"channel group 'fc1': candidates must lie in 0\.\.11"):
        Ablation(model, groups, zoo.sample_for(x)).losses({}, {"fc1": torch.tensor([index])})


def test_what_is_billed():
    model, x, groups = zoo.certified(zoo.Mlp)
    sample, index = zoo.sample_for(x), {"fc1": torch.arange(12)}
    first, second, last, whole = 16 * 12, 12 * 8, 8 * 5, count_macs(model, x)
    made = 6 * whole  # one pass, from which the first layer's outputs are kept
    loop = Ablation(model, groups, sample, way="loop")
    assert loop.forward_macs == made
    loop.losses({}, index)
    assert loop.forward_macs == made + 12 * 6 * (second + last)
    loop.loss({})
    assert loop.forward_macs == made + 13 * 6 * (second + last)
    update = Ablation(model, groups, sample, way="update")
    update.losses({}, index)
    assert update.forward_macs == made + 6 * (
        second + 12 * (last + 8)
    )  # rank-1 updates of 8 outputs
    gates = Ablation(model, groups, sample, way="gates")
    gates.losses({}, index)
    assert gates.forward_macs == made + 6 * 12 * (second + last)
    forgetful = Ablation(model, groups, sample, way="gates", memory_mib=1e-4)
    forgetful.losses({}, index)
    assert forgetful.forward_macs == 6 * 12 * (first + second + last)  # a candidate at a time


@pytest.mark.parametrize("memory_mib", [64.0, 0.05])
def test_what_no_gate_reaches_is_computed_once_and_only_that(net, memory_mib):
    model, x, groups = net
    some = groups.select("all", list(groups)[-1:])
    work = Ablation(model, some, zoo.sample_for(x), memory_mib=memory_mib, way="loop")
    kept = {n for n, m in work.model.named_modules() if "forward" in vars(m)}
    consumers = {c for g in some.values() for c in g.consumers}
    assert not kept & consumers
    assert kept or memory_mib < 1
    gates, candidates = zoo.started(some, x)
    for index in (candidates, {n: i[:2] for n, i in candidates.items()}):  # parts of other sizes
        assert close(
            work.losses(gates, index), naive(model, groups, work.sample, gates, index), 1e-12
        )
    assert work.loss(gates) == pytest.approx(
        float(
            naive(model, groups, work.sample, gates, {n: torch.tensor([1]) for n in some})[
                next(iter(some))
            ]
        )
    )
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_replica_shares_its_tensors_and_counts_nothing():
    model, x, _ = zoo.certified(zoo.Plain)
    with Meter(model, 7) as meter:
        twin = replica(model)
        twin(x)
        assert meter.forward_macs == 0
        model(x)
    assert meter.forward_macs == 7 * len(x)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_closed_candidate_is_refused():
    model, x, groups = zoo.certified(zoo.Mlp)
    gates, _ = zoo.started(groups, x)
    with pytest.raises(UsageError, match="channel group 'fc1': a candidate's gate must be 1"):
        Ablation(model, groups, zoo.sample_for(x)).losses(gates, {"fc1": torch.tensor([0, 1])})


def test_channel_positions_are_those_of_places(net):
    _, _, groups = net
    for name, group in groups.items():
        for layer, places in groups.places(name, "in"):
            rows = channel_positions(groups, name, layer)
            assert len(rows) == group.channels
            assert sorted(rows.flatten().tolist()) == sorted(places)
