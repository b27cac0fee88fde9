import pytest
import timm
import torch
import zoo

from widthbench.budget import Budget
from widthbench.width import CostModel, find_groups, keep, resize
from widthbench.width.cost import count_macs


def halved(groups):
    """Widths of about half, and the plan that keeps the first channels of each block."""
    widths = {n: Budget("channels", 0.5).width(g) for n, g in groups.items()}
    plan = {}
    for n, g in groups.items():
        size, new = g.channels // g.blocks, widths[n] // g.blocks
        plan[n] = keep([b * size + i for b in range(g.blocks) for i in range(new)])
    return widths, plan


def counted(model, x):
    return count_macs(model, x), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "densenet121", "test_vit", "test_efficientnet", "regnetx_002"])
def test_cost_equals_what_is_counted_on_the_resized_network(name):
    size = 160 if name == "test_vit" else 64
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, size, size)
    groups = find_groups(model, x)
    cost = CostModel(model, groups, x)
    widths, plan = halved(groups.select("all"))
    assert (cost.macs, cost.params) == counted(model, x)
    assert (cost(widths).macs, cost(widths).params) == counted(resize(model, groups, plan), x)


def test_small_networks_too(net):
    model, x, groups = net
    widths, plan = halved(groups)
    cost = CostModel(model, groups, x)
    assert (cost(widths).macs, cost(widths).params) == counted(resize(model, groups, plan), x)


@pytest.mark.parametrize(("name", "millions"), [("resnet50", 4089), ("mobilenetv2_100", 301), ("mobilenetv1_100", 569)])
def test_macs_are_the_literatures_flops(name, millions):
    assert round(count_macs(timm.create_model(name), torch.randn(1, 3, 224, 224)) / 1e6) == millions


def test_a_hand_computed_network():
    model, x, groups = zoo.certified(zoo.Plain)
    cost = CostModel(model, groups, x)
    assert cost.macs == 64 * 6 * 2 * 9 + 64 * 10 * 6 * 9 + 9 * 40 + 5 * 9
    assert cost.params == (6 * 2 * 9 + 6) + (10 * 6 * 9 + 20) + (9 * 40 + 9) + (5 * 9 + 5)
    assert cost({"conv2": 4}).macs == 64 * 6 * 2 * 9 + 64 * 4 * 6 * 9 + 9 * 16 + 5 * 9
