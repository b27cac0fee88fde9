import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widthbench.errors import BudgetError, InfeasibleBudgetError
from widthbench.technique.budget import (
    Budget,
    check,
    global_widths,
    top_channels,
    uniform_widths,
    used,
)
from widthbench.width import Cost
from widthbench.width.groups import Group

GROUPS = {"a": Group("a", 6), "b": Group("b", 12, blocks=3), "c": Group("c", 9)}


def cost(widths):
    """A chain 5 -> a -> b -> c -> 2 of linear layers."""
    sizes = [5, *(widths.get(n, g.channels) for n, g in GROUPS.items()), 2]
    return Cost(
        sum(a * b for a, b in itertools.pairwise(sizes)),
        sum(a * b + b for a, b in itertools.pairwise(sizes)),
    )


FULL = cost({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs", "not of the form kind:fraction"),
        ("macs:half", "not of the form kind:fraction"),
        ("mac:0.5", "did you mean 'macs'"),
        ("macs:0", "above 0"),
        ("macs:-1", "above 0"),
        ("macs:nan", "above 0"),
        ("macs:inf", "above 0"),
        ("macs:1.5", "more than there is"),
    ],
)
def test_bad_budgets_are_named(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


def test_growing_techniques_may_keep_more_than_all():
    assert Budget.parse("params:1.5", grows=True).fraction == 1.5


@pytest.mark.parametrize(
    ("n", "fraction", "rounding", "kept"),
    [
        (300, 0.7, "nearest", 210),
        (300, 0.7, "floor", 210),
        (7, 0.5, "nearest", 4),
        (7, 0.5, "floor", 3),
        (5, 0.01, "nearest", 1),
    ],
)
def test_channel_budgets_round_as_documented(n, fraction, rounding, kept):
    assert Budget("channels", fraction, rounding).width(Group("g", n)) == kept


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(["macs", "params"]), st.floats(0.16, 1.0))
def test_uniform_widths_stay_within_the_budget_and_use_it(kind, fraction):
    budget = Budget(kind, fraction)
    widths = uniform_widths(GROUPS, budget, cost, FULL)
    assert budget.of(FULL) >= Budget(kind, 1.0).of(cost(widths))
    assert all(
        g.blocks <= widths[n] <= g.channels and widths[n] % g.blocks == 0 for n, g in GROUPS.items()
    )
    # no single step of one more channel per block everywhere would fit as well
    more = {n: min(g.channels, widths[n] + g.blocks) for n, g in GROUPS.items()}
    assert more == widths or Budget(kind, 1.0).of(cost(more)) > budget.of(FULL)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(["macs", "params", "channels"]), st.floats(0.3, 1.0), st.integers(0, 1000))
def test_global_widths_stay_within_the_budget(kind, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(g.channels, generator=generator) for n, g in GROUPS.items()}
    budget = Budget(kind, fraction)
    widths = global_widths(scores, GROUPS, budget, cost, FULL)
    kept = used(budget, widths, GROUPS, cost(widths), FULL)
    check(budget, kept, GROUPS)
    assert all(
        g.blocks <= widths[n] <= g.channels and widths[n] % g.blocks == 0 for n, g in GROUPS.items()
    )


def test_global_widths_follow_the_scores():
    scores = {"a": torch.ones(6), "b": torch.zeros(12), "c": torch.ones(9)}
    assert global_widths(scores, GROUPS, Budget("channels", 18 / 27), cost, FULL) == {
        "a": 6,
        "b": 3,
        "c": 9,
    }


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_budget_below_the_floor_says_so(allocation):
    scores = {n: torch.rand(g.channels) for n, g in GROUPS.items()}
    arguments = (GROUPS, Budget("macs", 0.01), cost, FULL)
    # one channel per block: 5 + 3 + 3 + 2 = 13 of 30 + 72 + 108 + 18 = 228 MACs
    with pytest.raises(
        InfeasibleBudgetError, match=r"below the feasible floor: .* still keeps 0\.057"
    ):
        uniform_widths(*arguments) if allocation == "uniform" else global_widths(scores, *arguments)


def test_check_refuses_more_and_flags_much_less():
    budget = Budget("macs", 0.5)
    assert check(budget, 0.5, GROUPS)
    assert check(budget, 0.49, GROUPS)
    assert not check(budget, 0.4, GROUPS)
    with pytest.raises(
        BudgetError, match=r"keeps 0\.5100 of the macs, more than the budget 'macs:0\.5'"
    ):
        check(budget, 0.51, GROUPS)


def test_top_channels_takes_equally_many_per_block_in_order():
    score = torch.tensor([1.0, 9, 3, 8, 7, 2])
    assert top_channels(score, 3).tolist() == [1, 3, 4]
    assert top_channels(score, 2, blocks=2).tolist() == [1, 3]
    assert top_channels(torch.zeros(4), 2).tolist() == [0, 1]
