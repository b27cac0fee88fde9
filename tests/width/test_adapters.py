"""Numbers that know where they come from."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from torch import nn

from widthbench.errors import PlanError
from widthbench.networks import models
from widthbench.width import find_groups, keep, resize
from widthbench.width.adapters import Integer, Root, declare_integer, watched_integers
from widthbench.width.proofs import errors_of_all, randomised


def test_products_and_quotients_keep_the_origin():
    n = Integer(6, ("m", "width", None))
    assert (int(n * 2), (n * 2).factor) == (12, 2)
    assert (int(n // 3), (n // 3).factor) == (2, Fraction(1, 3))
    assert ((2 * n) // 4).factor == Fraction(1, 2)
    assert [type(v) for v in (n // 4, n + 1, n * n, 30 // n, n * 0.5)] == [
        int,
        int,
        int,
        int,
        float,
    ]
    assert (n // 4, 30 // n) == (1, 5)
    assert type(copy.deepcopy(n)) is int
    assert type(pickle.loads(pickle.dumps(n))) is int


class Keeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.flag, self.parts, self.shape, self.name = 8, True, [2, 3], (4, 1), "x"
        self.conv = nn.Conv2d(3, 8, 3)


def test_numbers_are_themselves_again_afterwards():
    model = Keeper()
    before = dict(vars(model))
    with pytest.raises(RuntimeError, match="torn"), watched_integers(model):  # noqa: PT012
        assert isinstance(model.width, Integer)
        assert isinstance(model.parts[1], Integer)
        assert type(model.shape[1]) is int  # 1 states nothing
        assert type(model.conv.out_channels) is int  # layers are declared by the resize
        raise RuntimeError("torn")
    assert all(vars(model)[k] is v for k, v in before.items())


def test_declaring_a_place_in_a_tuple():
    model = Keeper()
    declare_integer(model, ("", "shape", 0), 7)
    declare_integer(model, ("", "width", None), 5)
    assert (model.shape, model.width) == ((7, 1), 5)


def test_padding_shortcuts_follow_both_widths():
    model = models.create("resnet20_cifar", classes=10, channels=3, size=32, shortcut="A").eval()
    x = torch.randn(1, 3, 32, 32)
    groups = find_groups(model, x)
    assert {g.grade for g in groups.values()} == {"exact"}
    assert max(errors_of_all(model, groups, x)) < 1e-9
    small = resize(
        model, groups, {"layer2.0.conv2[0:8]": keep([1, 2, 5]), "conv1": keep(range(10))}
    )
    assert small.get_submodule("layer2.0.shortcut").more == 6
    assert small.get_submodule("layer2.1.conv1").in_channels == 16
    assert small(x).shape == (1, 10)


class Twice(nn.Module):
    """One number for two widths that nothing ties."""

    def __init__(self):
        super().__init__()
        self.half = 4
        self.a, self.b, self.c, self.d = (
            nn.Linear(3, 6),
            nn.Linear(3, 6),
            nn.Linear(4, 2),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        return self.c(self.a(x).relu()[:, : self.half]) + self.d(self.b(x).relu()[:, : self.half])


def test_one_number_for_two_widths_ties_them():
    model, x = Twice(), torch.randn(2, 3)
    groups = find_groups(model, x, cache=False)
    (group,) = groups.values()
    assert (group.name, group.grade, group.producers) == ("a[0:4]", "exact", ("a", "b"))
    small = resize(model, groups, {"a[0:4]": keep([0, 2, 3])})
    assert (small.half, small.c.in_features, small.d.in_features) == (3, 3, 3)


class Unlike(Twice):
    """One number for a width, and twice of it for another."""

    def __init__(self):
        super().__init__()
        self.d = nn.Linear(8, 2)
        self.b = nn.Linear(3, 10)

    def forward(self, x):
        twice = self.b(x).relu()[:, : 2 * self.half]
        return self.c(self.a(x).relu()[:, : self.half]) + self.d(twice)


def test_one_number_cannot_state_two_widths():
    model, x = Unlike(), torch.randn(2, 3)
    groups = find_groups(model, x, cache=False)
    assert {g.grade for g in groups.values()} == {"frozen"}
    assert "the number 'half' states its width and another one" in groups["a[0:4]"].reason
    free = groups.with_grades(dict.fromkeys(groups, ("exact", "")))
    with pytest.raises(PlanError, match="'half' would have to be both 3 and 2"):
        resize(model, free, {"a[0:4]": keep([0, 1]), "b[0:8]": keep(range(6))})


class Halves(nn.Module):
    """A width over the number of its parts, and the rest of a width, as selective kernels and
    partial convolutions have them.
    """

    def __init__(self):
        super().__init__()
        self.width, self.paths, self.first = 8, 2, 3
        self.stem = nn.Linear(5, 8)
        self.ways = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6)])
        self.middle, self.part, self.head = nn.Linear(6, 8), nn.Linear(3, 3), nn.Linear(8, 2)

    def forward(self, x):
        parts = torch.split(self.stem(x).relu(), self.width // self.paths, 1)
        x = self.middle(sum(way(p) for way, p in zip(self.ways, parts, strict=True)))
        a, b = torch.split(x.relu(), [self.first, self.width - self.first], dim=1)
        return self.head(torch.cat([self.part(a).relu(), b], 1))


def test_quotients_and_differences_of_two_numbers():
    model, x = Halves(), torch.randn(2, 5)
    groups = find_groups(model, x, cache=False)
    grades = {n: g.grade for n, g in groups.items()}
    # `width` states two widths that nothing else ties
    assert "width" in groups["stem"].reason
    assert grades["ways.0"] == "exact"

    class Apart(Halves):
        def __init__(self):
            super().__init__()
            self.total = 8

        def forward(self, x):
            parts = torch.split(self.stem(x).relu(), self.width // self.paths, 1)
            x = self.middle(sum(way(p) for way, p in zip(self.ways, parts, strict=True)))
            a, b = torch.split(x.relu(), [self.first, self.total - self.first], dim=1)
            return self.head(torch.cat([self.part(a).relu(), b], 1))

    model = Apart()
    groups = find_groups(model, x, cache=False)
    assert {g.grade for g in groups.values()} == {"exact"}
    plan = {"stem": keep([0, 2, 3]), "middle[0:3]": keep([1]), "middle[3:8]": keep(range(4))}
    small = resize(model, groups, plan)
    assert (small.width, small.paths, small.first, small.total) == (6, 2, 1, 5)
    assert small(x).shape == (2, 2)


def test_only_roots_of_widths_are_roots():
    n = Integer(16, ("m", "width", None))
    assert [type(v) for v in (n**-0.5, n**0.5, n**2, n**1.5)] == [Root, Root, int, float]
    assert (n**-0.5, 1 / n**0.5, 2 / n**0.5) == (0.25, 0.25, 0.5)
    assert [type(v) for v in (1 / n**0.5, 2 / n**0.5, n**0.5 * 2)] == [Root, float, float]
    torch.testing.assert_close(n ** torch.tensor([0.5, 2.0]), torch.tensor([4.0, 256.0]))
    assert (n - 0.5, type(n - 0.5)) == (15.5, float)
    assert (type(copy.deepcopy(n**0.5)), pickle.loads(pickle.dumps(n**0.5))) == (float, 4.0)


def test_a_number_of_heads_divides_no_width():
    n, heads = Integer(12, ("m", "width", None)), Integer(3, ("m", "num_heads", None))
    size = n // heads
    assert (int(size), size.origin, size.divisors) == (4, n.origin, (heads.origin,))
    left = n - heads
    assert (int(left), left.whole, left.less) == (9, n, heads)
    assert (type(n - 1), type(copy.deepcopy(left)), pickle.loads(pickle.dumps(left))) == (
        int,
        int,
        9,
    )


class PaddedLike(nn.Module):
    """A shortcut of the padding kind, with zeros in the shape of its input laid behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Conv2d(8, 5, 1),
        )

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x) + torch.cat([x, torch.zeros_like(x)], 1)
        return self.c(y.relu()).mean((2, 3))


def test_zeros_in_the_shape_of_channels_go_with_them():
    torch.manual_seed(0)
    model, x = randomised(PaddedLike().eval()), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    groups = find_groups(model, x, cache=False)
    assert {n: (g.channels, g.grade) for n, g in groups.items()} == {"a": (4, "exact")}
    small = resize(model, groups, {"a": keep([1, 3])})
    assert (small.a.out_channels, small.b.out_channels) == (2, 4)
    assert torch.equal(small.b.weight, model.b.weight[[1, 3, 5, 7]][:, [1, 3]])
    assert max(errors_of_all(model, groups, x)) < 1e-9
