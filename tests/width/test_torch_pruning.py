"""Same indices, same network: our plan and Torch-Pruning's own `group.prune` must agree to the last
bit."""

import copy

import pytest
import torch
import torch_pruning as tp
import zoo
from widthbench.baselines.l1_norm import L1Norm

from widthbench.technique.budget import Budget
from widthbench.technique.task import Task
from widthbench.width import CostModel, find_groups, resize


def l1_plan(model, groups, x):
    cost = CostModel(model, groups, x)
    nothing = torch.empty(0)
    task = Task(
        model,
        groups.select("all"),
        x,
        Budget.parse("channels:0.5"),
        cost,
        cost,
        train=nothing,
        val=nothing,
    )
    technique = L1Norm()
    return technique.decide(task, technique.prepare(task)).plan


def pruned_by_torch_pruning(model, groups, plan, x):
    """Remove the same channels group by group with Torch-Pruning, on a copy."""
    model = copy.deepcopy(model)
    for name, change in plan.items():
        graph = tp.DependencyGraph().build_dependency(
            model, (x,), customized_pruners={}, ignored_layers=[], verbose=False
        )
        gone = sorted(set(range(groups[name].channels)) - set(change.rows.tolist()))
        layer = model.get_submodule(groups[name].producers[0])
        graph.get_pruning_group(layer, tp.prune_conv_out_channels, gone).prune()
    return model


@pytest.mark.parametrize(
    ("name", "made"), zoo.lengths("resnet18", "mobilenetv2_100", "densenet121")
)
def test_same_indices_same_network(name, made):
    torch.manual_seed(0)
    model, x = made(name).eval(), torch.randn(1, 3, 64, 64)
    groups = find_groups(model, x)
    plan = l1_plan(model, groups, x)
    ours, theirs = resize(model, groups, plan), pruned_by_torch_pruning(model, groups, plan, x)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(ours(x), theirs(x))
    assert sum(p.numel() for p in ours.parameters()) < 0.4 * sum(
        p.numel() for p in model.parameters()
    )
