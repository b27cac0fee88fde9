"""Transposed convolutions, which keep their inputs first."""

import pytest
import torch
from torch import nn

import widthbench
from widthbench.errors import UsageError
from widthbench.width import CostModel, find_groups, gated, keep, resize
from widthbench.width.groups import producer_rows
from widthbench.width.proofs import errors_of_all


class Decoder(nn.Module):
    """As in U-Nets: down, up again beside what was there before."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, (3, 2), stride=2, padding=(1, 0), output_padding=(1, 0))
        self.side, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(11, 4, 1)

    def forward(self, x):
        y = self.up(self.deep(self.norm(self.down(x)).relu()).relu()).relu()
        return self.head(torch.cat([y, self.side(x).relu()], 1)).mean((2, 3))


X = torch.randn(2, 3, 8, 8)


def test_they_make_and_read_channels():
    net = Decoder().eval()
    groups = find_groups(net, X, cache=False)
    assert {n: g.grade for n, g in groups.items()} == dict.fromkeys(
        ("down", "deep", "up", "side"), "exact"
    )
    assert groups["deep"].consumers == ("up",)
    assert groups["up"].producers == ("up",)
    assert max(errors_of_all(net, groups, X)) < 1e-12
    (rows,) = producer_rows(net, groups, "up")
    torch.testing.assert_close(rows, net.up.weight.transpose(0, 1).flatten(1))
    cost = CostModel(net, groups, X)
    small = resize(net, groups, {"deep": keep([1, 4, 7]), "up": keep([0, 5])})
    assert (small.up.in_channels, small.up.out_channels) == (3, 2)
    torch.testing.assert_close(small.up.weight, net.up.weight[[1, 4, 7]][:, [0, 5]])
    counted = cost.counted(small, {"deep": 3, "up": 2})
    assert counted.macs == 16 * 27 * 8 + 16 * 72 * 3 + 16 * 3 * 2 * 6 + 64 * (15 + 7 * 4)
    open_ = {"deep": torch.zeros(12), "up": torch.zeros(6)}
    open_["deep"][[1, 4, 7]] = open_["up"][[0, 5]] = 1.0
    for on in ("input", "weight"):
        with gated(net, groups, open_, on=on), torch.no_grad():
            torch.testing.assert_close(small(X), net(X), rtol=1e-5, atol=1e-6)


def test_mixes_go_into_the_weights_that_read():
    net = Decoder().double().eval()
    groups = find_groups(net, X.double(), cache=False)
    net.deep.weight.data[3], net.deep.bias.data[3] = net.deep.weight[5] / 9, net.deep.bias[5] / 9
    small = widthbench.apply(
        "neuron-merging",
        net,
        budget="channels:0.92",
        include="deep",
        example_input=X.double(),
        threshold=0.1,
    )
    torch.testing.assert_close(small(X.double()), net(X.double()))
    assert small.up.in_channels == 11
    assert groups["deep"].channels == 12


@pytest.mark.parametrize("conv", ["1d", "3d"])
def test_in_one_and_three_dimensions(conv):
    one = conv == "1d"
    plain, turned = (nn.Conv1d, nn.ConvTranspose1d) if one else (nn.Conv3d, nn.ConvTranspose3d)
    net = nn.Sequential(plain(2, 6, 3), nn.ReLU(), turned(6, 5, 2, 2), nn.ReLU(), plain(5, 3, 1))
    x = torch.randn(2, 2, *([9] if one else [5, 5, 5]))
    groups = find_groups(net.eval(), x, cache=False)
    assert [g.grade for g in groups.values()] == ["exact", "exact"]


def test_depthwise_ones_ride_along_and_others_in_groups_stay():
    own = nn.ConvTranspose2d(8, 8, 2, 2, groups=8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), own, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    groups = find_groups(net, X, cache=False)
    assert (groups["0"].grade, groups["0"].riders) == ("exact", ("1",))
    small = resize(net, groups, {"0": keep([0, 2, 5])})
    assert (small[1].groups, small[1].weight.shape[0]) == (3, 3)
    net[1] = nn.ConvTranspose2d(8, 8, 2, 2, groups=4)
    groups = find_groups(net, X, cache=False)
    assert groups["0"].reason == "a transposed convolution in groups has no rule"


@pytest.mark.parametrize(
    "technique",
    ["l1-norm", "neuron-merging", "random-channels", "torch-pruning:magnitude", "neuron-removal"],
)
def test_techniques_take_them(technique):
    data = (torch.randn(12, 3, 8, 8), torch.arange(12) % 4)
    small = widthbench.apply(
        technique, Decoder(), budget="channels:0.5", example_input=X, data=data
    )
    assert small.up.out_channels + small.up.in_channels < 18
    assert small(X).shape == (2, 4)


def test_autoprune_and_autoslim_learn_their_channels():
    data = (torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    for technique in ("autoprune", "autoslim"):
        small = widthbench.apply(
            technique, Decoder(), budget="macs:0.5", example_input=X, data=data, epochs=1
        )
        assert small(X).shape == (2, 4)


def test_factorisation_says_that_it_does_not_take_them():
    with pytest.raises(UsageError, match="layer up is a transposed convolution"):
        widthbench.apply("nmf", Decoder(), budget="channels:0.5", example_input=X, include="up")
