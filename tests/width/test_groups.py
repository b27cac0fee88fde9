import pytest
import timm
import torch
import zoo
from torch import nn

from widthbench.errors import NoGroupsError, UsageError
from widthbench.width import discover, find_groups
from widthbench.width.groups import Segment, producer_rows


def names(cls, grade=None):
    return {n for n, g in zoo.certified(cls)[2].items() if grade in (None, g.grade)}


def test_every_group_of_the_small_networks_is_graded_as_it_should_be():
    for cls in zoo.EXACT:
        assert names(cls) == names(cls, "exact"), cls
    assert names(zoo.Normed, "coupled") == {"conv1", "conv2"}
    assert names(zoo.Normed, "exact") == {"conv1.blocks"}


def test_a_flatten_repeats_each_channel():
    groups = zoo.certified(zoo.Plain)[2]
    assert groups.axes["fc1", "in"] == (Segment("conv2", 10, 4),)
    assert groups["conv2"].riders == ("bn2",)
    assert groups["conv2"].consumers == ("fc1",)


def test_a_concat_lays_segments_side_by_side():
    groups = zoo.certified(zoo.Dense)[2]
    assert groups.axes["bn", "out"] == (Segment("a", 4), Segment("b", 6))
    assert groups.axes["head", "in"] == (Segment("c", 5), Segment("a", 4), Segment("b", 6))


def test_a_joined_concat_is_cut_where_the_concat_cuts():
    groups = zoo.certified(zoo.JoinedConcat)[2]
    assert groups.axes["c", "out"] == (Segment("a", 4), Segment("b", 6))
    assert not groups["a"].inner
    assert groups["out"].inner


def test_residual_streams_are_not_inner_and_depthwise_convolutions_ride():
    groups = zoo.certified(zoo.Residual)[2]
    assert not groups["stem"].inner
    assert set(groups["stem"].producers) == {"stem", "project"}
    assert groups["expand"].inner
    assert groups["expand"].riders == ("bn1", "depth", "bn2")


def test_grouped_convolutions_ask_for_equal_counts():
    groups = zoo.certified(zoo.Grouped)[2]
    assert (groups["conv1"].blocks, groups["conv2"].blocks, groups["conv3"].blocks) == (3, 3, 1)


def test_discovery_leaves_the_network_as_it_was():
    model = zoo.Residual().train()
    model.stem.weight.requires_grad_(False)
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    discover(model, torch.randn(1, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model.bn1.training
    assert not model.stem.weight.requires_grad
    assert not any(m._forward_hooks for m in model.modules())


def test_a_frozen_network_can_be_traced():
    model = zoo.Mlp().requires_grad_(False)
    assert set(discover(model, torch.randn(1, 1, 4, 4))) == {"fc1", "fc2"}


def test_an_input_that_does_not_fit_is_named():
    with pytest.raises(UsageError, match=r"Mlp does not take an input of shape \[1, 1, 5, 5\]"):
        discover(zoo.Mlp(), torch.randn(1, 1, 5, 5))


def test_producer_rows_are_the_filters():
    model, _, groups = zoo.certified(zoo.JoinedConcat)
    (first, second) = producer_rows(model, groups, "b")
    assert torch.equal(first, model.b.weight.flatten(1))
    assert torch.equal(second, model.c.weight[4:].flatten(1))
    assert [tuple(p.shape) for p in producer_rows(model, groups, "out", bias=True)] == [
        (8, 90),
        (8, 1),
    ]


def test_select_by_scope_and_pattern():
    groups = zoo.certified(zoo.Residual)[2]
    assert list(groups.select("inner")) == ["expand"]
    assert list(groups.select("all")) == ["stem", "expand"]
    assert list(groups.select("all", "st*")) == ["stem"]
    with pytest.raises(UsageError, match="did you mean 'expand'"):
        groups.select("all", "expnd")
    with pytest.raises(UsageError, match="scope must be"):
        groups.select("outer")


def test_coupled_groups_need_scope_all():
    layers = nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 5, 1)
    groups = find_groups(nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8), cache=False)
    assert set(groups.select("all")) == {"0"}
    with pytest.raises(NoGroupsError, match="norm runs across its channels"):
        groups.select("inner")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


class Spatial(nn.Module):
    """Sums over channels in a way that no index map shows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = self.a(x).relu()
        return self.b(h / (1 + h.mean(1, keepdim=True)))


class Unread(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(x) + 0.0 * self.b(self.a(x).relu())


@pytest.mark.parametrize(
    ("cls", "group", "reason"),
    [
        (Tied, "a", "shares its tensors"),
        (Spatial, "a", "mean runs over its channels"),
        (Unread, "a", "does not depend on its channels"),
    ],
)
def test_what_cannot_be_proven_is_frozen_with_the_reason(cls, group, reason):
    torch.manual_seed(0)
    groups = find_groups(cls(), torch.randn(2, 6), cache=False)
    assert groups[group].grade == "frozen"
    assert reason in groups[group].reason


def test_paths_pass_norms_and_depthwise_convolutions_in_order():
    groups = zoo.certified(zoo.Residual)[2]
    assert groups.paths("expand") == (("expand", "bn1", "depth", "bn2"),)
    assert groups.paths("stem") == (("stem", "bn"), ("project", "bn3"))  # an addition ends both
    assert groups.readers["stem"] == ("bn",)
    assert set(groups.behind["head"]) == {"bn", "bn3"}
    assert groups.adjacent == {"bn", "bn1", "bn2", "bn3"}


def test_paths_fork_where_norms_read_side_by_side_and_know_concatenations():
    model = timm.create_model("densenet121").eval()
    groups = discover(model, torch.randn(1, 3, 64, 64))
    ways = groups.paths("features.denseblock1.denselayer1.conv2")
    assert len(ways) == 6
    assert all(len(way) == 2 and way[1].endswith(("norm1", "transition1.norm")) for way in ways)
    assert zoo.certified(zoo.Dense)[2].paths("a") == (("a", "bn"),)


def test_a_norm_with_an_activation_inside_is_adjacent_and_one_behind_an_activation_is_not():
    groups = discover(timm.create_model("test_efficientnet").eval(), torch.randn(1, 3, 64, 64))
    assert "bn1" in groups.adjacent
    late = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
    ).eval()
    groups = discover(late, torch.randn(1, 3, 8, 8))
    assert not groups.adjacent
    assert groups.paths("0") == (("0", "2"),)
