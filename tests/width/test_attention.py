"""Heads and head dimensions: two groups on the same positions, keys that read queries, fused and
plain products alike."""

import copy

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

from widthbench.networks import models
from widthbench.width import CostModel, Resize, find_groups, gated, keep, resize
from widthbench.width.cost import count_macs
from widthbench.width.proofs import randomised


class Attention(nn.Module):
    """Multi-head attention over 5 tokens: packed or separate layers, fused or plain, with or
    without a bias for each head."""

    def __init__(self, packed=True, fused=True, bias=False):
        super().__init__()
        self.heads, self.each, self.packed, self.fused = 3, 4, packed, fused
        self.scale = self.each**-0.5
        self.embed = nn.Linear(6, 10)
        for name in ("qkv",) if packed else ("q", "k", "v"):
            self.add_module(name, nn.Linear(10, 36 if packed else 12))
        self.bias = nn.Parameter(torch.randn(5, 5, 3)) if bias else None
        self.proj, self.head = nn.Linear(12, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = self.embed(x)
        b, n, _ = x.shape
        if self.packed:
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.each).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (
                layer(x).view(b, n, self.heads, -1).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
        bias = None if self.bias is None else self.bias.permute(2, 0, 1)[None]
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            y = q * self.scale @ k.transpose(-2, -1)
            y = (y if bias is None else y + bias).softmax(-1) @ v
        return self.head(self.proj(y.transpose(1, 2).flatten(2)).relu().mean(1))


VARIANTS = [
    {"packed": p, "fused": f, "bias": b}
    for p in (True, False)
    for f in (True, False)
    for b in (True, False)
]


def made(**options):
    torch.manual_seed(0)
    model = randomised(Attention(**options).eval())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    return model, x, find_groups(model, x, cache=False)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_heads_and_head_dimensions_are_exact(options):
    _, _, groups = made(**options)
    assert {g.grade for g in groups.values()} == {"exact"}
    first = "qkv" if options["packed"] else "q"
    heads = groups[f"{first}.heads"]
    assert (heads.channels, heads.heads, heads.consumers) == (3, True, ("proj",))
    assert set(heads.tensors) == ({"bias"} if options["bias"] else set())
    assert groups[first].blocks == 3
    assert groups[first].keys == (("qkv",) if options["packed"] else ("k",))
    if not options["packed"]:  # values are free of queries and keys
        assert (groups["v"].channels, groups["v"].blocks, groups["v"].keys) == (12, 3, ())


def random_plan(groups, seed=0):
    """Permuted and repeated channels within blocks, each copy with a share of the whole."""
    draw, plan = torch.Generator().manual_seed(seed), {}
    for name, group in groups.items():
        size = group.channels // group.blocks
        picks = [torch.randint(size, (2,), generator=draw) for _ in range(group.blocks)]
        rows = torch.cat(
            [
                torch.cat([torch.randperm(size, generator=draw), p]) + b * size
                for b, p in enumerate(picks)
            ]
        )
        mix = F.one_hot(rows, group.channels).T.double()
        plan[name] = Resize(rows, mix / mix.sum(1, keepdim=True))
    return plan


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_splitting_heads_and_dimensions_at_once_changes_nothing(options):
    model, x, groups = made(**options)
    grown = resize(model, groups, random_plan(groups))
    assert zoo.error(grown(x), model(x)) < 1e-9


@pytest.mark.parametrize("on", ["input", "weight"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_closed_gates_are_removal_of_heads_and_dimensions_at_once(options, on):
    model, x, groups = made(**options)
    kept = {}
    for name, group in groups.items():
        size = group.channels // group.blocks
        kept[name] = torch.cat(
            [
                b * size
                + torch.tensor([(b + i) % size for i in range(max(1, size - 2))]).sort().values
                for b in range(group.blocks)
            ]
        )
    gates = {
        n: torch.zeros(groups[n].channels, dtype=torch.float64).index_fill(0, k, 1.0)
        for n, k in kept.items()
    }
    small = resize(model, groups, {n: keep(k) for n, k in kept.items()})
    with gated(model, groups, gates, on=on):
        expected = model(x)
    assert zoo.error(small(x), expected) < 1e-9


class Chunked(nn.Module):
    """Queries, keys and values by ``chunk`` or from layers of their own, with one number for the
    head dimension of all three."""

    def __init__(self, packed):
        super().__init__()
        self.heads, self.each, self.packed = 3, 4, packed
        self.embed, self.proj, self.head = nn.Linear(6, 10), nn.Linear(12, 7), nn.Linear(7, 4)
        for name in ("qkv",) if packed else ("q", "k", "v"):
            self.add_module(name, nn.Linear(10, 36 if packed else 12))

    def forward(self, x):
        x = self.embed(x)
        parts = self.qkv(x).chunk(3, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        shape = (*x.shape[:2], self.heads, -1 if self.packed else self.each)
        q, k, v = (t.view(shape).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(self.proj(y.flatten(2)).relu().mean(1))


@pytest.mark.parametrize("packed", [True, False])
def test_queries_and_values_of_one_head_dimension_are_one_group(packed):
    torch.manual_seed(0)
    model, x = randomised(Chunked(packed).eval()), torch.randn(2, 5, 6, dtype=torch.float64)
    groups = find_groups(model, x, cache=False)
    first = "qkv" if packed else "q"
    assert {n: g.grade for n, g in groups.items()} == dict.fromkeys(
        ("embed", first, f"{first}.heads", "proj"), "exact"
    )
    assert (groups[first].channels, groups[first].blocks) == (12, 3)
    assert set(groups[first].producers) == ({"qkv"} if packed else {"q", "v"})
    assert zoo.error(resize(model, groups, random_plan(groups))(x), model(x)) < 1e-9
    small = resize(model, groups, {first: keep([0, 2, 5, 6, 8, 9]), f"{first}.heads": keep([0, 2])})
    assert (small.each, small.heads, small.proj.in_features) == (4 if packed else 2, 2, 4)


class SharedKeys(nn.Module):
    """Four heads of queries for each head of keys and values."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.kv, self.head = (
            nn.Linear(6, 10),
            nn.Linear(10, 32),
            nn.Linear(10, 16),
            nn.Linear(32, 3),
        )

    def forward(self, x):
        x = self.embed(x)
        q = self.q(x).view(*x.shape[:2], 8, 4).transpose(1, 2)
        k, v = self.kv(x).view(*x.shape[:2], 2, 2, 4).permute(2, 0, 3, 1, 4)
        return self.head(
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
            .mean(1)
        )


def test_attention_with_shared_keys_leaves_the_rest_of_the_network_alone():
    model, x = SharedKeys().eval(), torch.randn(2, 5, 6)
    groups = find_groups(model, x, cache=False)
    assert groups["embed"].grade == "exact"
    assert {g.grade for n, g in groups.items() if n != "embed"} == {"frozen"}


class OneKey(nn.Module):
    """Three heads of queries that share one head of keys and values."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.kv, self.head = (
            nn.Linear(6, 10),
            nn.Linear(10, 12),
            nn.Linear(10, 8),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        x = self.embed(x)
        q = self.q(x).view(*x.shape[:2], 3, 4).transpose(1, 2)
        k, v = self.kv(x).view(*x.shape[:2], 2, 1, 4).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def test_one_head_of_keys_for_all_queries_leaves_the_rest_of_the_network_alone():
    model, x = OneKey().eval(), torch.randn(2, 5, 6)
    groups = find_groups(model, x, cache=False)
    assert groups["embed"].grade == "exact"
    assert not any("share keys has no rule" in g.reason for g in groups.values())


def test_dense_mixes_of_head_dimensions_meet_in_the_product():
    """Queries that are linear in fewer ones, with keys mixed to match, give what the low-rank
    product gives."""
    model, x, groups = made(fused=False)
    rows = torch.tensor([0, 1, 4, 5, 8, 9])
    mix = torch.zeros(12, 6, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    for head in range(3):
        mix[4 * head : 4 * head + 4, 2 * head : 2 * head + 2] = torch.randn(
            4, 2, generator=draw, dtype=torch.float64
        )
    small = resize(model, groups, {"qkv": Resize(rows, mix)})
    with torch.no_grad():  # the same by hand: queries and values W = mix @ picked rows
        for part in (0, 2):
            for tensor in (model.qkv.weight, model.qkv.bias):
                block = tensor[12 * part : 12 * part + 12]
                block.copy_(torch.tensordot(mix, block[rows].clone(), dims=1))
    assert torch.allclose(small(x), model(x), rtol=1e-9, atol=1e-12)


SWIN = "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("test_vit", 32, {}),
        (SWIN, 56, {"depths": (2, 2), "num_heads": (3, 6)}),
        *[
            pytest.param(n, 224, {}, marks=pytest.mark.slow)
            for n in ("vit_tiny_patch16_224", SWIN, "deit_tiny_patch16_224")
        ],
    ],
)
def test_transformers_resize_attention_and_mlps(name, size, args):
    model = models.create(name, classes=10, channels=3, size=size, **args)
    x = torch.randn(1, 3, size, size)
    groups = find_groups(model, x)
    inner = groups.select("inner")
    assert {n.rpartition("attn.")[2] for n in inner if ".attn." in n} == {"qkv", "qkv.heads"}
    assert any(".mlp.fc1" in n for n in inner)
    widths = {n: max(1, g.channels // g.blocks // 2) * g.blocks for n, g in inner.items()}
    plan = {
        n: keep(
            torch.cat(
                [
                    torch.arange(widths[n] // g.blocks) + b * (g.channels // g.blocks)
                    for b in range(g.blocks)
                ]
            )
        )
        for n, g in inner.items()
    }
    small = resize(model, groups, plan)
    cost = CostModel(model, groups, x)(widths)
    assert cost.macs == count_macs(small, x)
    assert cost.params == sum(p.numel() for p in small.parameters())
    attention = next(m for m in small.modules() if hasattr(m, "num_heads"))
    assert attention.qkv.out_features == 3 * attention.num_heads * round(attention.scale**-2)
    small.load_state_dict(small.state_dict())


def test_fused_and_plain_attention_agree_after_a_resize():
    model = models.create("test_vit", classes=10, channels=3, size=32).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    groups = find_groups(model, x[:1])
    small = resize(
        model, groups, {"blocks.0.attn.qkv": keep(torch.arange(64).view(2, 32)[:, :5].flatten())}
    )
    fused = small(x)
    for module in small.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert torch.allclose(small(x), fused, rtol=1e-9, atol=1e-12)


def test_fused_attention_counts_as_many_macs_as_plain():
    model = models.create("test_vit", classes=10, channels=3, size=64)
    x = torch.randn(1, 3, 64, 64)
    fused = count_macs(model, x)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert count_macs(model, x) == fused


def test_tables_of_relative_positions_lose_the_columns_of_heads():
    model = zoo.shorter(SWIN).eval()
    groups = find_groups(model, torch.randn(1, 3, 56, 56))
    name = "layers.0.blocks.1.attn.qkv.heads"
    table = "layers.0.blocks.1.attn.relative_position_bias_table"
    small = resize(model, groups, {name: keep([0, 2])})
    assert torch.equal(small.get_parameter(table), model.get_parameter(table)[:, [0, 2]])
    assert small.get_submodule("layers.0.blocks.1.attn").num_heads == 2


@pytest.mark.parametrize(("name", "made"), zoo.lengths("cait_xxs24_224", "beit_base_patch16_224"))
def test_attention_that_reshapes_to_its_inputs_width_follows_the_stream(name, made):
    size = zoo.side(name, made)
    model, x = made(name).eval(), torch.randn(1, 3, size, size)
    groups = find_groups(model, x)
    stream = groups["patch_embed.proj"]
    assert stream.grade == "coupled"
    assert "blocks.0.attn.qkv" in stream.producers
    heads = [g for g in groups.values() if g.heads]
    assert heads
    assert all(g.reason == "its heads share the width that attention reads" for g in heads)
    half = torch.arange(stream.channels).reshape(stream.blocks, -1)
    small = resize(model, groups, {stream.name: keep(half[:, : half.shape[1] // 2].flatten())})
    assert small(x).shape == model(x).shape


class Reading(nn.Module):
    """Attention as many write it: widths are read off the input, weights used without a call."""

    def __init__(self, *, twice=False):
        super().__init__()
        self.embed, self.qkv, self.heads = nn.Linear(5, 12), nn.Linear(12, 36), 3
        self.proj, self.out, self.twice = nn.Linear(12, 12), nn.Linear(12, 4), twice

    def forward(self, x):
        x = self.embed(x)
        b, n, c = x.shape
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        hd = c // self.heads if not self.twice else x.size(-1) * 2 // (2 * self.heads)
        q, k, v = qkv.reshape(b, n, 3, self.heads, hd).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.out(x + self.proj(y))


@pytest.mark.parametrize("twice", [False, True])
def test_widths_that_are_read_off_a_tensor_tie_what_is_reshaped_by_them(twice):
    model, x = Reading(twice=twice), torch.randn(2, 6, 5)
    groups = find_groups(model, x, cache=False)
    group = groups["embed"]
    assert (group.grade, group.blocks, group.producers) == ("exact", 3, ("embed", "qkv", "proj"))
    assert groups.apart == {"qkv"}
    small = resize(model, groups, {"embed": keep([0, 2, 4, 7, 9, 11])})
    assert small.qkv.weight.shape == (18, 6)
    assert small.heads == 3
    values = torch.zeros(12, dtype=torch.float64)
    values[[0, 2, 4, 7, 9, 11]] = 1
    wide, y = copy.deepcopy(model).double(), x.double()
    for on in ("input", "weight"):
        with gated(wide, groups, {"embed": values}, on=on):
            assert torch.allclose(wide(y), small.double()(y))
