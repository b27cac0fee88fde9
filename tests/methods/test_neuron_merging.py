"""Neuron merging against loops, explicit outer products and planted networks; on public weights, against the published table."""

import itertools
import math

import pytest
import timm
import torch
import zoo
from merging_speed import loop
from torch import nn
from widthbench._claims import neuron_merging as checks
from widthbench.methods.neuron_merging import NeuronMerging, filters, score, similarity
from zoo import error

import widthbench
from widthbench import data, models, weights
from widthbench.errors import UsageError
from widthbench.measure import accuracy
from widthbench.width import find_groups, resize
from widthbench.width.certify import randomised

BN_SCALES = ("released", "derived")


@pytest.fixture
def block():
    """A convolution with BatchNorm in a small network, γ of both signs: (network, input, groups, the group's name)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 3)).double()
    net = randomised(net)
    with torch.no_grad():
        net[1].weight[[2, 7]] *= -1
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    return net, x, find_groups(net, x, cache=False), "0"


@pytest.mark.parametrize("check", [checks.planted, checks.shared, checks.planted_with_batch_norm])
def test_planted_multiples_merge_exactly(check):
    assert max(check()) < 1e-9


@pytest.mark.parametrize("activation", ["tanh", "softsign", "elu", "selu", "leaky_relu", "hardswish", "gelu", "sigmoid"])
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
    cosine, scale, _ = similarity(net, groups, "expand", *pair, "derived")
    assert float(cosine) == pytest.approx(1.0)
    assert scale.isnan().all()


@pytest.mark.parametrize("bn_scale", BN_SCALES)
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("threshold", [-1.0, 0.1, 0.3])
def test_equals_a_loop_over_pairs(block, bn_scale, lam, threshold):
    net, _, groups, name = block
    norm = {k: getattr(net[1], k).detach() for k in ("weight", "bias", "running_mean", "running_var")}
    technique = NeuronMerging(bn_scale=bn_scale, lam=lam, threshold=threshold)
    for kept in ([0, 1, 2, 3, 4, 5], [2, 5, 7, 11], [6]):
        change = technique.merged(net, groups, name, torch.tensor(kept))
        expected = loop(net[0].weight.detach().flatten(1), norm, net[1].eps, kept, bn_scale, threshold, lam)
        assert torch.allclose(change.mix, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_derived_and_released_differ_and_only_released_may_turn_signs(block):
    net, _, groups, name = block
    mixes = {b: NeuronMerging(bn_scale=b, threshold=-1.0).merged(net, groups, name, torch.arange(6)).mix for b in BN_SCALES}
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
        assert torch.equal(NeuronMerging(bn_scale=bn_scale).merged(net, groups, name, torch.arange(5)).mix, ours.mix)
        net[1].running_mean += shift


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric-median"])
def test_criteria_equal_brute_force_on_explicit_outer_products(criterion):
    a, b = (torch.randn(7, d, dtype=torch.float64) for d in (5, 4))
    outer = torch.einsum("ni,nj->nij", a, b).flatten(1)
    expected = {
        "l1": outer.abs().sum(1),
        "l2": outer.square().sum(1).sqrt(),
        "geometric-median": torch.stack([sum((outer[n] - outer[m]).norm() for m in range(7)) for n in range(7)]),
    }
    assert torch.allclose(score([a, b], criterion), expected[criterion], rtol=1e-10)
    if criterion == "geometric-median":  # duplicates lie at distance 0, not at that of rounding errors
        twice = score([torch.ones(3, 5).double() * math.pi], criterion)
        assert torch.allclose(twice, torch.zeros(3).double(), atol=1e-6)


def test_the_criterion_decides_what_is_kept():
    net, x, groups = zoo.certified(zoo.Plain)
    for criterion in ("l1", "l2", "geometric-median"):
        small = widthbench.apply("neuron-merging", net, budget="channels:0.5", example_input=x, criterion=criterion)
        best = score(filters(net, groups, "conv1"), criterion).topk(3).indices.sort().values
        assert torch.equal(small.conv1.weight, net.conv1.weight[best])


def test_depthwise_similarity_is_that_of_the_outer_product():
    net, _, groups = zoo.certified(zoo.Residual)
    outer = torch.einsum("ni,nj->nij", net.expand.weight.detach().flatten(1), net.depth.weight.detach().flatten(1)).flatten(1)
    removed, kept = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5, 6])
    cosine, scale, mismatch = similarity(net, groups, "expand", removed, kept, "released")
    assert torch.allclose(cosine, torch.cosine_similarity(outer[removed][:, None], outer[kept][None], dim=2), rtol=1e-12)
    norm = net.bn2
    expected = loop(outer, vars_of(norm), norm.eps, kept.tolist(), "released", -1.0, 0.85)
    ours = NeuronMerging(threshold=-1.0).merged(net, groups, "expand", kept).mix
    assert torch.allclose(ours, torch.from_numpy(expected), rtol=1e-10)
    assert scale.shape == mismatch.shape == (3, 4)


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


def test_published_thresholds_are_the_defaults(block):
    net, _, groups, name = block
    kept = torch.arange(5)
    assert torch.equal(
        NeuronMerging().merged(net, groups, name, kept).mix, NeuronMerging(threshold=0.1).merged(net, groups, name, kept).mix
    )
    mlp, _, found = zoo.certified(zoo.Mlp)
    own, published = (NeuronMerging(threshold=t).merged(mlp, found, "fc1", kept).mix for t in (None, 0.45))
    assert torch.equal(own, published)
    assert not torch.equal(own, NeuronMerging(threshold=0.1).merged(mlp, found, "fc1", kept).mix)


def test_blocks_do_not_mix():
    net, _, groups = zoo.certified(zoo.Grouped)
    mix = NeuronMerging(threshold=-1.0).merged(net, groups, "conv1", torch.tensor([0, 4, 5, 8])).mix
    assert (mix[1:4, 1:] == 0).all()
    assert (mix[1:4, 0] != 0).all()


def test_added_branches_are_compared_by_their_effective_filters():
    """Channels of a residual stream merge exactly where every branch into it is planted."""
    net, x, _ = zoo.certified(zoo.Residual)
    with torch.no_grad():
        for layer, norm in ((net.stem, net.bn), (net.project, net.bn3)):
            layer.weight[3:] = 0.01 * layer.weight[:3]
            for tensor in (norm.running_mean, norm.running_var, norm.bias, norm.weight):
                tensor[3:] = tensor[:3]
            norm.running_mean[3:] *= 0.01
            norm.running_var[3:] = 1e-4 * (norm.running_var[:3] + norm.eps) - norm.eps
            norm.weight[3:] *= 0.01
            norm.bias[3:] *= 0.01
    small = widthbench.apply("neuron-merging", net, budget="channels:0.5", example_input=x, scope="all", include="stem")
    assert small.stem.weight.shape[0] == 3
    assert error(small(x), net(x)) < 1e-9


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
        change = NeuronMerging(bn_scale=bn_scale, threshold=-1.0).merged(net, groups, name, torch.tensor(kept))
        assert change.mix.isfinite().all()
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
        ({"lam": 1.5}, "lam must lie in"),
        ({"threshold": 2.0}, "threshold is a cosine"),
        ({"criterion": "l3"}, "'l1', 'l2' or 'geometric-median'"),
        ({"bn_scale": "paper"}, "'released' or 'derived'"),
    ],
)
def test_bad_parameters_are_named(params, message):
    net, x, _ = zoo.certified(zoo.Plain)
    with pytest.raises(UsageError, match=message):
        widthbench.apply("neuron-merging", net, budget="channels:0.5", example_input=x, **params)


def test_norms_without_statistics_are_named():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(UsageError, match=r"layer 1 \(BatchNorm2d\) keeps no running statistics"):
        widthbench.apply("neuron-merging", net, budget="channels:0.5", example_input=torch.randn(2, 3, 8, 8))


MODELS = ("test_resnet", "test_efficientnet", "test_vit", "resnetv2_18", "mobilenetv3_small_050", "regnetx_002")


@pytest.mark.parametrize(("name", "scope", "bn_scale"), list(itertools.product(MODELS, ("inner", "all"), BN_SCALES)))
def test_merges_any_certified_group_of_timm_models(name, scope, bn_scale):
    check_model(name, scope, bn_scale)


LARGER = (
    "densenet121", "inception_v3", "efficientnet_b0", "mobilenetv1_100", "repvgg_a0", "resnext50_32x4d", "hrnet_w18_small",
    "vgg11_bn", "convnext_atto", "dla34",
)  # fmt: skip


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
    small = widthbench.apply("neuron-merging", model, budget="channels:0.5", example_input=x, scope=scope, bn_scale=bn_scale)
    assert small(x).shape == model(x).shape
    merged = 0
    for group in chosen.values():
        kept = torch.arange(group.channels).view(group.blocks, -1)[:, : max(1, group.channels // group.blocks // 2)].flatten()
        mix = NeuronMerging(bn_scale=bn_scale, threshold=-1.0).merged(model, groups, group.name, kept).mix
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
        assert torch.allclose(there, NeuronMerging(bn_scale=bn_scale).merged(net.cpu(), groups, name, kept).mix, rtol=1e-9)


# Kim et al.'s repository, LeNet-300-100 on Fashion-MNIST, L1, no fine-tuning: share kept, pruned, merged
PUBLISHED = [(0.5, 88.40, 88.69), (0.4, 85.17, 86.92), (0.3, 71.26, 82.75), (0.2, 66.76, 80.02)]


@pytest.mark.parametrize(("kept", "pruned", "merged"), PUBLISHED)
def test_public_lenet_gives_the_published_table_to_the_hundredth(kept, pruned, merged):
    net, split = zoo.public_lenet()
    for merge, published in ((False, pruned), (True, merged)):
        small = widthbench.apply(
            "neuron-merging", net, budget=f"channels:{kept}", example_input=zoo.first(split), threshold=0.45, merge=merge
        )
        assert round(accuracy(small, split.test).top1, 2) == published


# measured with this code on the public ResNet-56 of CIFAR-10, inner channels, floor rounding; see results/merging-cifar10
@pytest.mark.slow
@pytest.mark.parametrize(("params", "at_80"), [({"merge": False}, 89.86), ({}, 91.06), ({"bn_scale": "derived"}, 91.47)])
def test_public_resnet_56_at_20_percent(params, at_80):
    path = zoo.public("resnet56-cifar10", "cifar10")
    split = data.load("cifar10", 32, val=0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    net = models.create("resnet56_cifar", classes=10, channels=3, size=32)
    weights.load_into(net, path)
    small = widthbench.apply("neuron-merging", net, budget="channels:0.8:floor", example_input=zoo.first(split), **params)
    assert accuracy(small, split.test).top1 == pytest.approx(at_80, abs=0.03)
