"""BatchNorms as affine maps by channel, against the layers themselves."""

from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn

from widthbench.errors import UsageError
from widthbench.width import discover
from widthbench.width.norms import filter_rows, norm_behind, norm_of


def chain(*layers, size=(2, 3, 8, 8)):
    """(network in float64 with random statistics, its groups)."""
    net = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(6, 4, 3)).double().eval()
    for m in net:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return net, discover(net, torch.randn(*size, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_map_and_a_folded_filter_do_what_the_layers_do(bias, affine):
    net, groups = chain(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = net[1](net[0](x))
    norm = norm_of(net, groups, "0", "1")
    column = lambda v: v.view(-1, 1, 1)  # noqa: E731
    plain = nn.functional.conv2d(x, net[0].weight)
    assert torch.allclose(
        column(norm.gamma / norm.sigma) * (plain - column(norm.mean)) + column(norm.beta), expected
    )
    rows = filter_rows(net, groups, "0", "0", fold=True)
    assert torch.allclose(
        nn.functional.conv2d(x, rows[:, :-1].view(6, 3, 3, 3), rows[:, -1]), expected
    )


def test_rows_hold_the_bias_only_where_no_norm_takes_it():
    net, groups = chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    assert filter_rows(net, groups, "0", "0").shape == (6, 27)
    (
        net,
        groups,
    ) = chain(nn.Conv2d(3, 6, 3))
    assert torch.equal(filter_rows(net, groups, "0", "0")[:, -1], net[0].bias)


def test_a_norm_that_others_bypass_is_not_folded():
    assert norm_behind(zoo.certified(zoo.Residual)[2], "stem") == "bn"
    groups = zoo.certified(zoo.PreActivation)[
        2
    ]  # the first norm reads the stem, and so does the addition
    assert "bn1" in groups.adjacent
    for order in (list, reversed):
        assert (
            norm_behind(replace(groups, behind=dict(order(list(groups.behind.items())))), "stem")
            is None
        )


def test_a_flatten_before_the_norm_averages_its_entries():
    net = (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.BatchNorm1d(6 * 4), nn.Linear(24, 5))
        .double()
        .eval()
    )
    net[2].running_mean.normal_()
    groups = discover(net, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert torch.allclose(
        norm_of(net, groups, "0", "2").mean, net[2].running_mean.view(6, 4).mean(1)
    )


def test_norms_without_running_statistics_are_refused():
    net, groups = chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    net[1].running_mean = net[1].running_var = None
    with pytest.raises(UsageError, match=r"layer 1 \(BatchNorm2d\) keeps no running statistics"):
        norm_of(net, groups, "0", "1")
