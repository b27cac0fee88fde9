"""What a GroupNorm normalises together can go together: exactly, as the others' statistics stay."""

import pytest
import torch
from torch import nn

import widthbench
from widthbench.width import find_groups
from widthbench.width.cost import CostModel, count_macs
from widthbench.width.gates import gated
from widthbench.width.resize import keep, resize


class Residual(nn.Module):
    """Two norms divide one stream, into 4 blocks and into 8."""

    def __init__(self):
        super().__init__()
        self.a, self.first = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.b, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(8, 16)
        self.out = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = self.first(self.a(x))
        return self.out((x + self.second(self.b(x))).relu())


class Joined(nn.Module):
    """One norm over two layers' channels: three blocks of the first, one of the second."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.out = nn.GroupNorm(4, 16), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return self.out(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu())


def plain(*norms):
    layers = nn.Conv2d(3, 16, 3), *norms, nn.ReLU(), nn.Conv2d(16, 5, 1)
    return nn.Sequential(*layers)


NETWORKS = {
    "plain": (lambda: plain(nn.GroupNorm(4, 16)), "0.blocks", 4),
    "a norm for each channel": (lambda: plain(nn.GroupNorm(16, 16)), "0.blocks", 16),
    "two norms, the coarser decides": (Residual, "a.blocks", 4),
    "two layers, one norm": (Joined, "a.blocks", 3),
}


def found(make):
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(2, 3, 10, 10, dtype=torch.double)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model, x, find_groups(model, x[:1], cache=False)


@pytest.mark.parametrize("case", NETWORKS)
def test_blocks_go_exactly_and_cost_what_is_counted(case):
    make, name, count = NETWORKS[case]
    model, x, groups = found(make)
    assert groups[name].grade == "exact"
    assert groups[name].channels == count
    left = torch.arange(0, count, 2)
    small = resize(model, groups, {name: keep(left)})
    gate = torch.zeros(count, dtype=torch.double)
    gate[left] = 1
    with gated(model, groups, {name: gate}) as closed, torch.no_grad():
        assert torch.allclose(small(x), closed(x), rtol=0, atol=1e-12)
    assert not torch.allclose(small(x), model(x))
    cost = CostModel(model, groups, x[:1])({name: len(left)})
    assert cost.macs == count_macs(small, x[:1])
    assert cost.params == sum(p.numel() for p in small.parameters())


def test_blocks_and_channels_of_each_go_at_once():
    model, x, groups = found(lambda: plain(nn.GroupNorm(4, 16)))
    rows = torch.tensor([0, 1, 5, 6, 8, 11, 13, 14])  # two of each block
    small = resize(model, groups, {"0": keep(rows), "0.blocks": keep(torch.tensor([1, 3]))})
    assert (small[1].num_groups, small[1].num_channels) == (2, 4)
    assert torch.equal(small[0].weight, model[0].weight[[5, 6, 13, 14]])
    assert small(x).shape == model(x).shape


def test_nothing_is_new_where_something_else_divides_the_channels():
    grouped = nn.Conv2d(16, 16, 3, groups=4)
    groups = found(lambda: plain(nn.GroupNorm(4, 16), nn.ReLU(), grouped))[2]
    assert not [n for n in groups.everything if n.endswith(".blocks")]


def test_techniques_take_them_without_asking_for_groups_under_norms():
    model, x, groups = found(lambda: plain(nn.GroupNorm(8, 16)))
    assert set(groups.select("inner")) == {"0.blocks"}
    small = widthbench.apply("l1-norm", model, budget="macs:0.5", example_input=x[:1])
    assert small[1].num_groups == small[1].num_channels // 2 == 4


class Product(nn.Module):
    """A residual step whose size grows with the square of what enters, less its norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(self.up(y) * self.gate(y))


def test_a_deep_network_stays_within_what_numbers_can_say_without_its_norms():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), *(Product() for _ in range(16)), nn.Linear(16, 4))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    groups = find_groups(net, torch.randn(2, 8), cache=False)
    assert {g.grade for g in groups.values()} == {"exact", "coupled"}
    assert groups["0"].grade == "coupled"
