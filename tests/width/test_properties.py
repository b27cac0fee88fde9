"""What must hold for any plan, on networks that between them have every kind of index map."""

import copy
import io

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from widthbench.width import CostModel, Resize, find_groups, keep, resize
from widthbench.width.cost import count_macs
from widthbench.width.resize import disagreements

common = settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
seeds = st.integers(0, 2**32 - 1)


def rows_of(group, draw, low, high):
    """Random rows with equal counts per block, between low and high times as many as there are."""
    size = group.channels // group.blocks
    count = max(
        1, int(torch.randint(int(low * size) or 1, int(high * size) + 1, (1,), generator=draw))
    )
    rows = torch.randint(0, size, (group.blocks, count), generator=draw)
    return (rows + torch.arange(group.blocks)[:, None] * size).flatten()


def split_plan(groups, draw):
    """Every channel at least once, some several times, with random shares that add up to one, in
    any order."""
    plan = {}
    for name, g in groups.items():
        size, more = g.channels // g.blocks, int(torch.randint(0, 5, (1,), generator=draw))
        parts = []
        for b in range(g.blocks):
            extra = torch.randint(0, size, (more,), generator=draw)
            parts.append(
                b * size
                + torch.cat([torch.arange(size), extra])[
                    torch.randperm(size + more, generator=draw)
                ]
            )
        rows = torch.cat(parts)
        share = torch.rand(len(rows), generator=draw, dtype=torch.float64) + 0.1
        total = torch.zeros(g.channels, dtype=torch.float64).index_add(0, rows, share)
        mix = torch.zeros(g.channels, len(rows), dtype=torch.float64)
        mix[rows, torch.arange(len(rows))] = share / total[rows]
        plan[name] = Resize(rows, mix)
    return plan


@pytest.mark.parametrize("cls", zoo.EXACT)
@common
@given(seed=seeds)
def test_splitting_is_the_identity(cls, seed):
    model, x, groups = zoo.certified(cls)
    plan = split_plan(groups, torch.Generator().manual_seed(seed))
    assert zoo.error(resize(model, groups, plan)(x), model(x)) < 1e-9


PLANTED = {zoo.Mlp: ["fc1"], zoo.Plain: ["conv1", "fc1"], zoo.Dense: ["c"]}  # no BN, ReLU behind


@pytest.mark.parametrize("cls", list(PLANTED))
@common
@given(seed=seeds)
def test_merging_planted_multiples_is_the_identity(cls, seed):
    """relu(s z) = s relu(z) for s > 0: a channel that is s times another merges into it with mix
    s."""
    model, x, groups = zoo.certified(cls)
    draw = torch.Generator().manual_seed(seed)
    plan = {}
    for name in PLANTED[cls]:
        layer, n = model.get_submodule(name), groups[name].channels
        order = torch.randperm(n, generator=draw)
        kept, gone = order[: n // 2].sort().values, order[n // 2 :]
        into = kept[
            torch.randint(0, len(kept), (len(gone),), generator=draw)
        ]  # several may share one kept channel
        scale = torch.rand(len(gone), generator=draw, dtype=torch.float64) * 3 + 0.1
        with torch.no_grad():
            layer.weight[gone] = layer.weight[into] * scale.view(
                -1, *[1] * (layer.weight.dim() - 1)
            )
            layer.bias[gone] = layer.bias[into] * scale
        mix = torch.zeros(n, len(kept), dtype=torch.float64)
        mix[kept, torch.arange(len(kept))] = 1
        mix[gone, torch.searchsorted(kept, into)] = scale
        plan[name] = Resize(kept, mix)
    assert zoo.error(resize(model, groups, plan)(x), model(x)) < 1e-9


@pytest.mark.parametrize("cls", zoo.ALL)
@settings(common, max_examples=8)
@given(seed=seeds)
def test_sequences_of_plans_keep_networks_sound(cls, seed):
    model, x, groups = zoo.certified(cls)
    draw = torch.Generator().manual_seed(seed)
    for step in range(3):
        sound = [
            g for g in groups.values() if g.grade != "frozen"
        ]  # later steps may meet dead channels: rightly frozen
        assert step or len(sound) == len(groups)
        plan = {
            g.name: Resize(rows_of(g, draw, 0.3, 1.6))
            for g in sound
            if torch.rand(1, generator=draw) < 0.8
        }
        cost = CostModel(model, groups, x)({n: len(r.rows) for n, r in plan.items()})
        model = resize(model, groups, plan)
        assert disagreements(model) == []
        assert (cost.macs, cost.params) == (
            count_macs(model, x),
            sum(p.numel() for p in model.parameters()),
        )
        out = model(x)
        assert out.shape == (2, 5)
        assert torch.isfinite(out).all()
        gradients = torch.autograd.grad(
            out.square().sum(), list(model.parameters()), allow_unused=True
        )
        assert all(
            g is None or g.shape == p.shape
            for g, p in zip(gradients, model.parameters(), strict=True)
        )
        if step < 2:
            groups = find_groups(model, x, cache=False)


def some_resized(cls, seed=1):
    model, x, groups = zoo.certified(cls)
    draw = torch.Generator().manual_seed(seed)
    plan = {n: Resize(rows_of(g, draw, 0.4, 1.5)) for n, g in groups.items()}
    return resize(model, groups, plan), plan, x


@pytest.mark.parametrize("cls", zoo.ALL)
def test_deepcopy_and_save_load_survive(cls):
    small, plan, x = some_resized(cls)
    assert torch.equal(copy.deepcopy(small)(x), small(x))
    blob = save({k: v.contiguous() for k, v in small.state_dict().items()})
    other = resize(cls().double().eval(), zoo.certified(cls)[2], plan)  # fresh weights, same plan
    other.load_state_dict(load(blob))
    assert torch.equal(other(x), small(x))
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), small(x))


@pytest.mark.parametrize("cls", zoo.ALL)
def test_torch_export_survives(cls):
    small, _, x = some_resized(cls)
    exported = torch.export.export(small, (x,)).module()
    assert zoo.error(exported(x), small(x)) < 1e-12


def test_keep_takes_lists_and_tensors():
    assert torch.equal(keep([2, 0]).rows, keep(torch.tensor([2, 0])).rows)
