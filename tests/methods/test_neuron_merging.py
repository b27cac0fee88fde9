"""Neuron merging against loops, explicit outer products and planted networks; on public weights,
against the published table."""

import itertools
import math

import pytest
import timm
import torch
import zoo
from speed.neuron_merging import loop
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from widthbench._claims import neuron_merging as checks
from widthbench.methods.neuron_merging import (
    NeuronMerging,
    compare,
    filters,
    score,
    through_norm,
)
from zoo import error

import widthbench
from widthbench.data import splits
from widthbench.errors import UsageError
from widthbench.networks import models, weights
from widthbench.randomness import seeded
from widthbench.sensitivity.pairs import Pairs
from widthbench.training.measuring import accuracy
from widthbench.width import Resize, find_groups, resize
from widthbench.width.norms import filter_rows, norm_of
from widthbench.width.proofs import randomised

BN_SCALES = ("released", "derived")


@pytest.fixture
def block():
    """A convolution with BatchNorm in a small network, γ of both signs: (network, input, groups,
    the group's name)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 3)
    ).double()
    net = randomised(net)
    with torch.no_grad():
        net[1].weight[[2, 7]] *= -1
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    return net, x, find_groups(net, x, cache=False), "0"


@pytest.mark.parametrize("check", [checks.planted, checks.shared, checks.planted_with_batch_norm])
def test_planted_multiples_merge_exactly(check):
    assert max(check()) < 1e-9


@pytest.mark.parametrize(
    "activation", ["tanh", "softsign", "elu", "selu", "leaky_relu", "hardswish", "gelu", "sigmoid"]
)
def test_any_activation_merges_and_exactly_where_it_is_positively_homogeneous(activation):
    errors = checks.planted(activation)
    assert max(errors) < (1e-9 if activation == "leaky_relu" else 1)
    assert activation == "leaky_relu" or max(errors) > 1e-9


def test_pruning_does_not_pass_for_merging(monkeypatch):
    """The planted channels matter: without the merge the same networks move."""
    apply = widthbench.apply
    monkeypatch.setattr(widthbench, "apply", lambda *a, **k: apply(*a, **k, merge=False))
    for check in (checks.planted, checks.shared, checks.planted_with_batch_norm):
        assert min(check()) > 1e-5


def test_depthwise_block_merges_exactly_through_both_norms():
    net, x, _ = zoo.certified(zoo.Residual)
    half = torch.arange(6)
    with torch.no_grad():
        net.expand.weight[6:] = 0.5 * net.expand.weight[half]
        net.depth.weight[6:] = 0.5 * net.depth.weight[half]
    after_first = checks.agree(net.bn1, 0.5, half)
    checks.agree(net.bn2, 0.5 * after_first, half)
    kwargs = {"budget": "channels:0.5", "example_input": x, "include": "expand"}
    small = widthbench.apply("neuron-merging", net, bn_scale="derived", **kwargs)
    assert small.expand.weight.shape[0] == 6
    assert error(small(x), net(x)) < 1e-9
    assert error(widthbench.apply("neuron-merging", net, merge=False, **kwargs)(x), net(x)) > 1e-5


def test_opposite_filters_of_a_depthwise_block_are_no_multiples():
    net, _, groups = zoo.certified(zoo.Residual)
    with torch.no_grad():
        net.expand.weight[6:] = -net.expand.weight[:6]
        net.depth.weight[6:] = -net.depth.weight[:6]
    pair = (torch.tensor([6]), torch.tensor([0]))
    pairs = compare(net, groups, "expand", *pair, "derived")
    assert float(pairs.cosine) == pytest.approx(1.0)
    assert pairs.scale.isnan().all()


@pytest.mark.parametrize("bn_scale", BN_SCALES)
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("threshold", [-1.0, 0.1, 0.3])
def test_equals_a_loop_over_pairs(block, bn_scale, lam, threshold):
    net, _, groups, name = block
    norm = {
        k: getattr(net[1], k).detach() for k in ("weight", "bias", "running_mean", "running_var")
    }
    technique = NeuronMerging(bn_scale=bn_scale, lam=lam, threshold=threshold)
    for kept in ([0, 1, 2, 3, 4, 5], [2, 5, 7, 11], [6]):
        change = technique.merged(net, groups, name, torch.tensor(kept))
        expected = loop(
            net[0].weight.detach().flatten(1), norm, net[1].eps, kept, bn_scale, threshold, lam
        )
        assert torch.allclose(change.mix, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_derived_and_released_differ_and_only_released_may_turn_signs(block):
    net, _, groups, name = block
    mixes = {
        b: NeuronMerging(bn_scale=b, threshold=-1.0).merged(net, groups, name, torch.arange(6)).mix
        for b in BN_SCALES
    }
    assert not torch.allclose(mixes["released"], mixes["derived"])
    assert (mixes["derived"] >= 0).all()
    assert (mixes["released"] < 0).any()


def test_bias_of_a_convolution_before_a_norm_counts_as_part_of_the_mean(block):
    net, _, groups, name = block
    biased = nn.Sequential(nn.Conv2d(3, 12, 3), *list(net)[1:]).double().eval()
    shift = torch.randn(12, dtype=torch.float64)
    with torch.no_grad():
        biased[0].weight.copy_(net[0].weight)
        biased[0].bias.copy_(shift)
    for bn_scale in BN_SCALES:
        ours = NeuronMerging(bn_scale=bn_scale).merged(biased, groups, name, torch.arange(5))
        net[1].running_mean -= shift
        assert torch.equal(
            NeuronMerging(bn_scale=bn_scale).merged(net, groups, name, torch.arange(5)).mix,
            ours.mix,
        )
        net[1].running_mean += shift


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric-median"])
def test_criteria_equal_brute_force_on_explicit_outer_products(criterion):
    a, b = (torch.randn(7, d, dtype=torch.float64) for d in (5, 4))
    outer = torch.einsum("ni,nj->nij", a, b).flatten(1)
    assert torch.allclose(score([a, b], criterion), brute_force(outer, criterion), rtol=1e-10)
    if (
        criterion == "geometric-median"
    ):  # duplicates lie at distance 0, not at that of rounding errors
        twice = score([torch.ones(3, 5).double() * math.pi], criterion)
        assert torch.allclose(twice, torch.zeros(3).double(), atol=1e-6)


def brute_force(filters, criterion):
    if criterion == "geometric-median":
        return torch.stack([sum((f - g).norm() for g in filters) for f in filters])
    return filters.abs().sum(1) if criterion == "l1" else filters.square().sum(1).sqrt()


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric-median"])
def test_depthwise_blocks_are_ranked_by_the_outer_product(criterion):
    net, x, _ = zoo.certified(zoo.Residual)
    with torch.no_grad():
        net.depth.weight *= (
            torch.linspace(3, 0.3, 12).double().view(-1, 1, 1, 1)
        )  # so that the 1x1 alone would rank otherwise
    outer = torch.einsum(
        "ni,nj->nij", net.expand.weight.detach().flatten(1), net.depth.weight.detach().flatten(1)
    ).flatten(1)
    best = brute_force(outer, criterion).topk(6).indices.sort().values
    small = widthbench.apply(
        "neuron-merging",
        net,
        budget="channels:0.5",
        example_input=x,
        include="expand",
        criterion=criterion,
    )
    assert torch.equal(small.expand.weight, net.expand.weight[best])
    assert not torch.equal(
        best,
        brute_force(net.expand.weight.detach().flatten(1), criterion).topk(6).indices.sort().values,
    )


def test_the_criterion_decides_what_is_kept():
    net, x, groups = zoo.certified(zoo.Plain)
    for criterion in ("l1", "l2", "geometric-median"):
        small = widthbench.apply(
            "neuron-merging", net, budget="channels:0.5", example_input=x, criterion=criterion
        )
        best = score(filters(net, groups, "conv1"), criterion).topk(3).indices.sort().values
        assert torch.equal(small.conv1.weight, net.conv1.weight[best])


def test_depthwise_similarity_is_that_of_the_outer_product():
    net, _, groups = zoo.certified(zoo.Residual)
    outer = torch.einsum(
        "ni,nj->nij", net.expand.weight.detach().flatten(1), net.depth.weight.detach().flatten(1)
    ).flatten(1)
    removed, kept = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5, 6])
    pairs = compare(net, groups, "expand", removed, kept, "released")
    assert torch.allclose(
        pairs.cosine,
        torch.cosine_similarity(outer[removed][:, None], outer[kept][None], dim=2),
        rtol=1e-12,
    )
    norm = net.bn2
    expected = loop(outer, vars_of(norm), norm.eps, kept.tolist(), "released", -1.0, 0.85)
    ours = NeuronMerging(threshold=-1.0).merged(net, groups, "expand", kept).mix
    assert torch.allclose(ours, torch.from_numpy(expected), rtol=1e-10)


def test_derived_passes_both_norms_of_a_depthwise_block_as_a_loop_does():
    net, _, groups = zoo.certified(zoo.Residual)
    removed, kept = torch.arange(6, 12), torch.arange(6)
    pairs = compare(net, groups, "expand", removed, kept, "derived")
    for at, n in enumerate(removed):
        for p in kept:
            scale = net.expand.weight[n].norm() / net.expand.weight[p].norm()
            left = 0.0
            for norm, layer in ((net.bn1, None), (net.bn2, net.depth)):
                if layer is not None:
                    left = left * layer.weight[n].sum().abs()
                    scale = scale * layer.weight[n].norm() / layer.weight[p].norm()
                sigma = (norm.running_var + norm.eps).sqrt()
                gain_n, gain_p = norm.weight[n] / sigma[n], norm.weight[p] / sigma[p]
                # y_n = gain_n (s x_p - mean_n) + beta_n with x_p = (y_p - beta_p) / gain_p + mean_p
                rest = (
                    gain_n
                    * (
                        scale * (norm.running_mean[p] - norm.bias[p] / gain_p)
                        - norm.running_mean[n]
                    )
                    + norm.bias[n]
                )
                left = left * gain_n.abs() + rest.abs()
                scale = scale * gain_n / gain_p
            if not pairs.scale[at, p].isnan():
                assert float(pairs.mismatch[at, p]) == pytest.approx(float(left), rel=1e-9)
                assert float(pairs.scale[at, p]) == pytest.approx(float(scale), rel=1e-9)
    assert (~pairs.scale.isnan()).sum() > 5


@pytest.mark.parametrize("relu", [True, False])
def test_a_depthwise_bias_without_a_norm_merges_exactly(relu):
    act = nn.ReLU() if relu else nn.Identity()
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 1), act, nn.Conv2d(8, 8, 3, groups=8), act, nn.Conv2d(8, 4, 1)
        ).double()
    with torch.no_grad():
        for layer, scale in ((net[0], 0.05), (net[2], 0.3)):
            layer.weight[4:] = scale * layer.weight[:4]
        net[0].bias[4:] = 0.05 * net[0].bias[:4]
        net[2].bias[4:] = 0.05 * 0.3 * net[2].bias[:4]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for bn_scale in BN_SCALES:
        small = widthbench.apply(
            "neuron-merging",
            net,
            budget="channels:0.5",
            example_input=x,
            bn_scale=bn_scale,
            threshold=0.9,
        )
        assert error(small(x), net(x)) < 1e-9


def test_a_depthwise_bias_is_a_mismatch_without_a_norm_and_part_of_its_mean_with_one():
    removed, kept = torch.arange(4, 8), torch.arange(4)
    with seeded(0):
        bare = nn.Sequential(
            nn.Conv2d(3, 8, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        )
        normed = nn.Sequential(*list(bare)[:3], nn.BatchNorm2d(8), *list(bare)[3:]).double().eval()
    bare = bare.double()
    with torch.no_grad():
        for layer in (bare[0], bare[2]):
            layer.weight.abs_()  # all filters point the same way, so that every pair is possible
    groups = find_groups(bare, torch.randn(1, 3, 8, 8, dtype=torch.float64), cache=False)
    pairs = compare(bare, groups, "0", removed, kept, "released")
    bias = bare[2].bias.detach().clone()
    assert torch.allclose(pairs.mismatch, (bias[removed][:, None] - pairs.scale * bias[kept]).abs())
    found = find_groups(normed, torch.randn(1, 3, 8, 8, dtype=torch.float64), cache=False)
    for bn_scale in BN_SCALES:
        before = compare(normed, found, "0", removed, kept, bn_scale)
        with torch.no_grad():  # the same function, the bias moved into the mean
            normed[3].running_mean -= normed[2].bias
            normed[2].bias.zero_()
        after = compare(normed, found, "0", removed, kept, bn_scale)
        assert torch.allclose(after.mismatch, before.mismatch)
        with torch.no_grad():
            normed[2].bias.copy_(bias)
            normed[3].running_mean += bias


class Forked(nn.Module):
    """Two norms that read the same channels side by side."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.bn1, self.b = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.bn2, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x)
        return torch.cat([self.b(self.bn1(x).relu()), self.c(self.bn2(x).relu())], 1).mean((2, 3))


@pytest.mark.parametrize("bn_scale", BN_SCALES)
def test_norms_side_by_side_are_averaged(bn_scale):
    net = randomised(Forked())
    groups = find_groups(net, torch.randn(1, 3, 8, 8, dtype=torch.float64), cache=False)
    removed, kept = torch.arange(4, 8), torch.arange(4)
    pairs = compare(net, groups, "a", removed, kept, bn_scale)
    single = [
        through_norm(pair, norm_of(net, groups, "a", norm), bn_scale)
        for norm in ("bn1", "bn2")
        for pair in [Pairs.of([filter_rows(net, groups, "a", "a")], removed, kept)]
    ]
    assert torch.allclose(pairs.scale, (single[0].scale + single[1].scale) / 2, equal_nan=True)
    assert torch.allclose(
        pairs.mismatch, (single[0].mismatch + single[1].mismatch) / 2, equal_nan=True
    )
    assert not torch.allclose(single[0].scale, single[1].scale, equal_nan=True)


def test_norms_that_read_a_residual_stream_count():
    net = randomised(zoo.PreActivation())
    half = torch.arange(4)
    with torch.no_grad():
        for layer in (net.stem, net.conv2):
            layer.weight[4:], layer.bias[4:] = 0.02 * layer.weight[:4], 0.02 * layer.bias[:4]
        for norm in (net.bn1, net.bn3):
            sigma = (norm.running_var + norm.eps).sqrt()
            norm.weight[4:] = (
                0.7 * norm.weight[:4] / sigma[:4] * sigma[4:] / 0.02
            )  # S = 0.7 through both
            checks.agree(norm, 0.02, half)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    groups = find_groups(net, x, cache=False)
    assert groups.paths("stem") == (("stem", "bn1"), ("conv2",))  # bn3 reads the sum
    kwargs = {"budget": "channels:0.5", "example_input": x, "scope": "all", "include": "stem"}
    small = widthbench.apply("neuron-merging", net, bn_scale="derived", **kwargs)
    assert small.stem.weight.shape[0] == 4
    assert error(small(x), net(x)) < 1e-9
    assert error(widthbench.apply("neuron-merging", net, merge=False, **kwargs)(x), net(x)) > 1e-3


class Gated(nn.Module):
    """Channels that are a product: of two layers, or of one and its squeeze-excite, which is
    registered first."""

    def __init__(self, excite):
        super().__init__()
        self.excite = excite
        self.gate = nn.Linear(4, 8) if excite else nn.Linear(5, 8)
        self.squeeze = nn.Linear(8, 4) if excite else None
        self.value, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.value(x)
        gate = self.gate(self.squeeze(y).relu() if self.excite else x)
        return self.out(y * gate.sigmoid())


@pytest.mark.parametrize("excite", [True, False])
def test_products_merge_by_what_is_multiplied_and_not_by_squeeze_excite(excite):
    with seeded(0):
        net = Gated(excite).double()
        x = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        net.value.weight[4:], net.value.bias[4:] = (
            0.01 * net.value.weight[:4],
            0.01 * net.value.bias[:4],
        )
        if not excite:
            net.gate.weight[4:], net.gate.bias[4:] = net.gate.weight[:4], net.gate.bias[:4]
    groups = find_groups(net, x, cache=False)
    name = next(n for n, g in groups.items() if "value" in g.producers)
    assert groups.sources(name) == (("value",) if excite else ("gate", "value"))
    mix = NeuronMerging().merged(net, groups, name, torch.arange(4)).mix
    assert torch.allclose(mix[4:], 0.01 * torch.eye(4).double(), rtol=1e-9)
    if not excite:
        assert error(resize(net, groups, {name: Resize(torch.arange(4), mix)})(x), net(x)) < 1e-9
        for layer in (net.value, net.gate):  # one equal factor does not make equal channels
            with torch.no_grad():
                layer.weight[4:] = layer.weight[4:].flip(0, 1)
            assert not torch.allclose(
                NeuronMerging().merged(net, groups, name, torch.arange(4)).mix, mix
            )
            with torch.no_grad():
                layer.weight[4:] = layer.weight[4:].flip(0, 1)


def test_global_allocation_compares_groups_by_their_means():
    net, x, _ = zoo.certified(zoo.Plain)
    kwargs = {"budget": "params:0.5", "example_input": x, "allocation": "global"}
    before = widthbench.apply("neuron-merging", net, **kwargs)
    with torch.no_grad():
        net.conv1.weight *= 1000
        net.conv1.bias *= 1000
    after = widthbench.apply("neuron-merging", net, **kwargs)
    assert [p.shape for p in after.parameters()] == [p.shape for p in before.parameters()]


def vars_of(norm):
    return {k: getattr(norm, k).detach() for k in ("weight", "bias", "running_mean", "running_var")}


def test_mostsim_without_a_norm_takes_the_bias_as_a_weight():
    net, _, groups = zoo.certified(zoo.Mlp)
    rows = torch.cat([net.fc1.weight, net.fc1.bias[:, None]], 1).detach()
    kept = [1, 4, 8]
    mix = NeuronMerging(threshold=0.0).merged(net, groups, "fc1", torch.tensor(kept)).mix
    for n in range(12):
        if n in kept:
            assert mix[n].tolist() == [float(p == n) for p in kept]
            continue
        cosines = [float(torch.cosine_similarity(rows[n], rows[p], dim=0)) for p in kept]
        best = cosines.index(max(cosines))
        expected = [0.0] * 3
        if cosines[best] >= 0:
            expected[best] = float(rows[n].norm() / rows[kept[best]].norm())
        assert mix[n].tolist() == pytest.approx(expected, rel=1e-12)


def test_lam_weighs_nothing_where_no_norm_is():
    net, _, groups = zoo.certified(zoo.Mlp)
    kept = torch.arange(5)
    mixes = [
        NeuronMerging(lam=lam, threshold=0.0).merged(net, groups, "fc1", kept).mix
        for lam in (0.0, 0.85)
    ]
    assert torch.equal(*mixes)


def test_published_thresholds_are_the_defaults(block):
    net, _, groups, name = block
    kept = torch.arange(5)
    assert torch.equal(
        NeuronMerging().merged(net, groups, name, kept).mix,
        NeuronMerging(threshold=0.1).merged(net, groups, name, kept).mix,
    )
    mlp, _, found = zoo.certified(zoo.Mlp)
    own, published = (
        NeuronMerging(threshold=t).merged(mlp, found, "fc1", kept).mix for t in (None, 0.45)
    )
    assert torch.equal(own, published)
    assert not torch.equal(own, NeuronMerging(threshold=0.1).merged(mlp, found, "fc1", kept).mix)


def test_blocks_do_not_mix():
    net, _, groups = zoo.certified(zoo.Grouped)
    mix = NeuronMerging(threshold=-1.0).merged(net, groups, "conv1", torch.tensor([0, 4, 5, 8])).mix
    assert (mix[1:4, 1:] == 0).all()
    assert (mix[1:4, 0] != 0).all()


def test_added_branches_are_compared_by_their_effective_filters():
    """Channels of a residual stream merge exactly where every branch into it is planted, its norm
    included."""
    net, x, groups = zoo.certified(zoo.Residual)
    with torch.no_grad():
        for layer, norm, raw in ((net.stem, net.bn, 0.01), (net.project, net.bn3, 0.03)):
            layer.weight[3:] = raw * layer.weight[:3]
            sigma = (norm.running_var + norm.eps).sqrt()
            norm.weight[3:] = 0.02 / raw * norm.weight[:3] / sigma[:3] * sigma[3:]
            kept = norm.bias[:3] - norm.weight[:3] / sigma[:3] * norm.running_mean[:3]
            norm.bias[3:] = 0.02 * kept + norm.weight[3:] / sigma[3:] * norm.running_mean[3:]
    mix = NeuronMerging().merged(net, groups, "stem", torch.arange(3)).mix
    assert torch.allclose(mix[3:], 0.02 * torch.eye(3).double(), rtol=1e-9)
    small = widthbench.apply(
        "neuron-merging", net, budget="channels:0.5", example_input=x, scope="all", include="stem"
    )
    assert small.stem.weight.shape[0] == 3
    assert error(small(x), net(x)) < 1e-9


def test_streams_with_norms_have_their_threshold():
    net, _, groups = zoo.certified(zoo.Residual)
    own, published, other = (
        NeuronMerging(threshold=t).merged(net, groups, "stem", torch.arange(2)).mix
        for t in (None, 0.1, 0.45)
    )
    assert torch.equal(own, published)
    assert not torch.equal(own, other)


@pytest.mark.parametrize("bn_scale", BN_SCALES)
def test_degenerate_channels_give_no_nan(block, bn_scale):
    net, _, groups, name = block
    with torch.no_grad():
        net[0].weight[0] = 0  # kept
        net[0].weight[8] = 0  # removed
        net[0].weight[9] = net[0].weight[1]
        net[1].weight[3] = net[1].weight[10] = 0
        net[1].running_var[4] = net[1].running_var[11] = 0
    for kept in ([0, 1, 2, 3, 4, 5, 6], [0], [3], [4]):
        change = NeuronMerging(bn_scale=bn_scale, threshold=-1.0).merged(
            net, groups, name, torch.tensor(kept)
        )
        assert change.mix.isfinite().all()
        expected = loop(
            net[0].weight.detach().flatten(1),
            vars_of(net[1]),
            net[1].eps,
            kept,
            bn_scale,
            -1.0,
            0.85,
        )
        assert torch.allclose(change.mix, torch.from_numpy(expected), rtol=1e-10)
        assert resize(net, groups, {name: change})(torch.ones(1, 3, 8, 8).double()).isfinite().all()
        assert (change.mix[8] == 0).all()  # a channel without weights has nothing to give


def test_one_channel_and_all_channels():
    net, x, groups = zoo.certified(zoo.Plain)
    one = widthbench.apply("neuron-merging", net, budget="channels:0.01", example_input=x)
    assert one.conv1.weight.shape[0] == 1
    assert one(x).isfinite().all()
    whole = NeuronMerging().merged(net, groups, "conv1", torch.arange(6))
    assert torch.equal(whole.mix, torch.eye(6).double())


def test_threshold_of_one_prunes(block):
    net, x, _, _ = block
    kwargs = {"budget": "channels:0.5", "example_input": x}
    merged = widthbench.apply("neuron-merging", net, threshold=1.0, **kwargs)
    pruned = widthbench.apply("neuron-merging", net, merge=False, **kwargs)
    assert torch.equal(merged(x), pruned(x))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lam": 1.5}, "'lam': Input should be less than or equal to 1"),
        ({"threshold": 2.0}, "'threshold': Input should be less than or equal to 1"),
        ({"criterion": "l3"}, "'l1', 'l2' or 'geometric-median'"),
        ({"bn_scale": "paper"}, "'released' or 'derived'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    net, x, _ = zoo.certified(zoo.Plain)
    with pytest.raises(UsageError, match=message):
        widthbench.apply("neuron-merging", net, budget="channels:0.5", example_input=x, **params)


def test_norms_without_statistics_are_named():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    )
    kwargs = {"budget": "channels:0.5", "example_input": torch.randn(2, 3, 8, 8)}
    with pytest.raises(
        UsageError,
        match=r"technique 'neuron-merging' cannot run here: layer 1 \(BatchNorm2d\) keeps no "
        r"running",
    ):
        widthbench.apply("neuron-merging", net, **kwargs)
    assert (
        widthbench.apply("neuron-merging", net, merge=False, **kwargs)[0].out_channels == 4
    )  # nothing is merged


MODELS = (
    "test_resnet",
    "test_efficientnet",
    "test_vit",
    "resnetv2_18",
    "mobilenetv3_small_050",
    "regnetx_002",
)


@pytest.mark.parametrize(
    ("name", "scope", "bn_scale"), list(itertools.product(MODELS, ("inner", "all"), BN_SCALES))
)
def test_merges_any_certified_group_of_timm_models(name, scope, bn_scale):
    if (name, scope) == ("test_vit", "all"):  # embeddings of positions lie on its residual stream
        with pytest.raises(
            UsageError,
            match=r"channel group 'patch_embed.proj': tensor '\w+' rides along with \d+ layers",
        ):
            check_model(name, scope, bn_scale)
    else:
        check_model(name, scope, bn_scale)


LARGER = (
    "densenet121",
    "inception_v3",
    "efficientnet_b0",
    "mobilenetv1_100",
    "repvgg_a0",
    "resnext50_32x4d",
    "hrnet_w18_small",
    "vgg11_bn",
    "convnext_atto",
    "dla34",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_merges_larger_timm_models(name, scope):
    for bn_scale in BN_SCALES:
        check_model(name, scope, bn_scale, size=128)


def check_model(name, scope, bn_scale, size=64):
    torch.manual_seed(0)
    kwargs = {"img_size": size} if "vit" in name else {}
    model = randomised(timm.create_model(name, num_classes=10, **kwargs)).float()
    x = torch.randn(1, 3, size, size)
    groups = find_groups(model, x)
    try:
        chosen = groups.select(scope)
    except UsageError as reason:
        pytest.skip(str(reason))
    small = widthbench.apply(
        "neuron-merging",
        model,
        budget="channels:0.5",
        example_input=x,
        scope=scope,
        bn_scale=bn_scale,
    )
    assert small(x).shape == model(x).shape
    merged = 0
    for group in chosen.values():
        kept = (
            torch.arange(group.channels)
            .view(group.blocks, -1)[:, : max(1, group.channels // group.blocks // 2)]
            .flatten()
        )
        mix = (
            NeuronMerging(bn_scale=bn_scale, threshold=-1.0)
            .merged(model, groups, group.name, kept)
            .mix
        )
        assert mix.isfinite().all()
        assert ((mix != 0).sum(dim=1) <= 1).all()
        assert bn_scale == "released" or (mix >= 0).all()
        merged += int((mix != 0).sum()) - len(kept)
    assert merged > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_decides_the_same_on_a_gpu(block):
    net, _, groups, name = block
    kept = torch.tensor([0, 3, 5, 8])
    for bn_scale in BN_SCALES:
        there = NeuronMerging(bn_scale=bn_scale).merged(net.cuda(), groups, name, kept).mix.cpu()
        assert torch.allclose(
            there,
            NeuronMerging(bn_scale=bn_scale).merged(net.cpu(), groups, name, kept).mix,
            rtol=1e-9,
        )


# Kim et al.'s repository, LeNet-300-100 on Fashion-MNIST, L1, no fine-tuning: share kept, pruned,
# merged
PUBLISHED = [(0.5, 88.40, 88.69), (0.4, 85.17, 86.92), (0.3, 71.26, 82.75), (0.2, 66.76, 80.02)]


@pytest.mark.parametrize(("kept", "pruned", "merged"), PUBLISHED)
def test_public_lenet_gives_the_published_table_to_the_hundredth(kept, pruned, merged):
    net, split = zoo.public_lenet()
    for merge, published in ((False, pruned), (True, merged)):
        small = widthbench.apply(
            "neuron-merging",
            net,
            budget=f"channels:{kept}",
            example_input=zoo.first(split),
            threshold=0.45,
            merge=merge,
        )
        assert round(accuracy(small, split.test).top1, 2) == published


# measured with this code on the public ResNet-56 of CIFAR-10, inner channels, floor rounding; see
# results/merging-cifar10
@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "at_80"), [({"merge": False}, 89.86), ({}, 91.06), ({"bn_scale": "derived"}, 91.47)]
)
def test_public_resnet_56_at_20_percent(params, at_80):
    path = zoo.public("resnet56-cifar10", "cifar10")
    split = splits.load("cifar10", 32, val=0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    net = models.create("resnet56_cifar", classes=10, channels=3, size=32)
    weights.load_into(net, path)
    small = widthbench.apply(
        "neuron-merging", net, budget="channels:0.8:floor", example_input=zoo.first(split), **params
    )
    assert accuracy(small, split.test).top1 == pytest.approx(at_80, abs=0.03)


class Scaled(nn.Module):
    """LayerScale of feature maps, or of the last dimension."""

    def __init__(self, channels, last=False):
        super().__init__()
        self.gamma, self.last = nn.Parameter(torch.rand(channels) + 0.5), last

    def forward(self, x):
        return x * (self.gamma if self.last else self.gamma[:, None, None])


class Shifted(Scaled):
    def __init__(self, channels):
        super().__init__(channels)
        self.beta = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return torch.addcmul(self.beta[:, None, None], x, self.gamma[:, None, None])


def planted_behind(module, place):
    """Channels 4 to 7 of the first layer are 1.5 times channels 0 to 3; the module scales them, and
    what it adds fits."""
    layers = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    net = nn.Sequential(*layers[:place], module, *layers[place:], nn.Linear(6, 4)).eval()
    with torch.no_grad():
        net[0].weight[4:] = 1.5 * net[0].weight[:4]
        for name, t in module.named_parameters():
            if name == "beta":
                t[4:] = 1.5 * module.gamma[4:] / module.gamma[:4] * t[:4]
    return net


def error_of(technique, net, x, **params):
    small = widthbench.apply(
        technique, net, budget="channels:0.5", example_input=x, include="0", **params
    )
    with torch.no_grad():
        return float((small(x) - net(x)).norm() / net(x).norm())


@pytest.mark.parametrize("place", [1, 2])  # in front of the activation and behind it
@pytest.mark.parametrize("make", [Scaled, Shifted, FrozenBatchNorm2d])
@pytest.mark.parametrize("bn_scale", ["derived", "released"])
def test_bare_scales_have_their_part_in_what_is_merged(make, place, bn_scale):
    torch.manual_seed(0)
    module = make(8)
    if isinstance(module, FrozenBatchNorm2d):
        module.weight.uniform_(0.5, 1.5)
        module.running_var.uniform_(0.5, 1.5)
    net, x = planted_behind(module, place), torch.randn(4, 3, 10, 10)
    assert error_of("neuron-merging", net, x, bn_scale=bn_scale) < 1e-6
    assert error_of("neuron-merging", net, x, merge=False) > 0.05
    with pytest.raises(UsageError, match=r"nmf.*channel group '0': tensor '\d\.\w+' rides along"):
        error_of("nmf", net, x)


def test_a_scale_of_the_last_dimension_counts_too():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 8, bias=False), Scaled(8, last=True), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    with torch.no_grad():
        net[0].weight /= net[0].weight.norm(p=1, dim=1, keepdim=True)
        net[0].weight[4:] = 1.5 * net[0].weight[:4]
    assert error_of("neuron-merging", net, torch.randn(6, 5)) < 1e-6


class Inside(nn.Module):
    """A scale that no module of its own holds; or one that only one of two readers passes."""

    def __init__(self, own):
        super().__init__()
        self.a, self.b, self.c, self.h = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(8, 6, 1),
            nn.Linear(12, 4),
        )
        self.gamma = None if own else nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.scale = Scaled(8) if own else None

    def forward(self, x):
        y = self.a(x).relu()
        y = torch.cat(
            [self.b(self.scale(y) if self.scale is not None else y * self.gamma), self.c(y)], 1
        )
        return self.h(y.relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (False, "tensor 'gamma' rides along, and no module of its own"),
        (True, "layer c reads it around module scale"),
    ],
)
def test_scales_that_cannot_be_told_are_refused_by_name(own, why):
    with pytest.raises(UsageError, match=f"channel group 'a': {why}"):
        widthbench.apply(
            "neuron-merging",
            Inside(own),
            budget="channels:0.5",
            example_input=torch.randn(2, 3, 8, 8),
            include="a",
        )


def test_the_affine_of_a_norm_across_channels_counts_too():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 8, bias=False), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    with torch.no_grad():
        net[0].weight /= net[0].weight.norm(p=1, dim=1, keepdim=True)
        net[0].weight[4:] = 1.0001 * net[0].weight[:4]  # so that these are kept
        net[1].weight.copy_(torch.rand(8) + 0.5)
    x = torch.randn(6, 5)
    small = widthbench.apply(
        "neuron-merging", net, budget="channels:0.5", example_input=x, scope="all"
    )
    with torch.no_grad():  # equal halves: mean and variance stay, so that merging is exact
        assert torch.allclose(small(x), net(x), atol=1e-3)


def test_a_scale_that_runs_twice_is_refused():
    scale = Scaled(8)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        scale,
        nn.ReLU(),
        scale,
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.LazyLinear(4),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    net(x)
    with pytest.raises(
        UsageError, match="channel group '0': module 1, which scales it, runs 2 times"
    ):
        widthbench.apply("neuron-merging", net, budget="channels:0.5", example_input=x, include="0")
