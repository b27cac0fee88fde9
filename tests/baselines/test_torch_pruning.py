"""Torch-Pruning's importances on our groups: the scores that Torch-Pruning itself gives, where it
finds the same group."""

import warnings

import pytest
import torch
import torch_pruning as tp
import zoo
from torch.nn import functional as F
from widthbench.baselines.torch_pruning import FPGM, BNScale, Hessian, Taylor, as_group

from widthbench.errors import UsageError
from widthbench.networks import models
from widthbench.sensitivity.ablation import Sample
from widthbench.technique import registry
from widthbench.width import find_groups

IMPORTANCES = [
    tp.importance.GroupMagnitudeImportance,
    tp.importance.LAMPImportance,
    tp.importance.FPGMImportance,
    tp.importance.GroupTaylorImportance,
    tp.importance.GroupHessianImportance,
]


@pytest.mark.parametrize("importance", IMPORTANCES, ids=lambda i: i.__name__)
@pytest.mark.parametrize(
    "cls", [zoo.Plain, zoo.Residual, zoo.Dense, zoo.Grouped], ids=lambda c: c.__name__
)
def test_scores_are_torch_prunings_own(cls, importance):
    model, x, groups = zoo.certified(cls)
    model = model.float()
    F.cross_entropy(model(x.float()), torch.tensor([0, 1])).backward()
    graph = tp.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(model, (x.float(),), verbose=False)
    grouped = (
        cls is zoo.Grouped and importance is tp.importance.FPGMImportance
    )  # its own code fails on grouped convolutions
    for name, group in () if grouped else groups.items():
        layer = model.get_submodule(group.producers[0])
        pruning = (
            tp.prune_linear_out_channels
            if isinstance(layer, torch.nn.Linear)
            else tp.prune_conv_out_channels
        )
        theirs = importance()(graph.get_pruning_group(layer, pruning, list(range(group.channels))))
        ours = importance()(as_group(model, groups, name))
        assert torch.allclose(ours, theirs, rtol=1e-5), name


def test_heads_are_scored_by_everything_that_they_have():
    model = models.create("test_vit", classes=10, channels=3, size=32)
    groups = find_groups(model, torch.randn(1, 3, 32, 32)).select("inner")
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, 32:] = 0  # nobody reads the second head
    importance = tp.importance.GroupMagnitudeImportance()
    score = importance(as_group(model, groups, "blocks.0.attn.qkv.heads"))[:2]
    each = [model.blocks[0].attn.qkv.weight.view(3, 2, -1).square().sum(-1)[:, h] for h in (0, 1)]
    assert score[1] / score[0] == pytest.approx(
        float(each[1].sum() / (each[0].sum() + model.blocks[0].attn.proj.weight.square().sum())),
        rel=1e-4,
    )


def test_gradients_are_those_of_the_mean_loss_and_squares_those_of_single_samples():
    model, x, _ = zoo.certified(zoo.Plain)
    sample = zoo.sample_for(x, count=5)
    Taylor().fill(model, sample)
    expected = torch.autograd.grad(F.cross_entropy(model(sample.x), sample.y), model.conv1.weight)[
        0
    ]
    assert torch.allclose(model.conv1.weight.grad, expected)
    Hessian().fill(model, sample)
    squares = [
        torch.autograd.grad(F.cross_entropy(model(a), b), model.conv1.weight)[0].square()
        for a, b in Sample(sample.x, sample.y).batches(1)
    ]
    assert torch.allclose(model.conv1.weight.grad, torch.stack(squares).mean(0))


def test_groups_without_a_batch_norm_are_named():
    model, _, groups = zoo.certified(zoo.Mlp)
    task = type("Task", (), {"model": model, "groups": groups})
    assert "'fc1' has none of the layers that BNScaleImportance reads" in BNScale().skip(task)


def test_grouped_convolutions_are_named():
    for cls, reason in (
        (zoo.Grouped, "fails on grouped convolutions, such as 'conv2'"),
        (zoo.Plain, None),
    ):
        model, _, groups = zoo.certified(cls)
        found = FPGM().skip(type("Task", (), {"model": model, "groups": groups}))
        assert found is None if reason is None else reason in found


def test_samples_must_be_some():
    with pytest.raises(UsageError, match="'samples': Input should be greater than or equal to 1"):
        registry.create("torch-pruning:taylor", {"samples": 0})
