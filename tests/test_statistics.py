import math
import random
import statistics

import pytest
from scipy import stats

from widthbench.statistics import (
    deviation,
    differences,
    holm,
    interval,
    paired_p,
    ranks,
    summarise,
)


def test_a_single_base_has_no_spread():
    assert summarise({0: 97.5}).text() == "97.50"
    assert summarise({0: 97.0, 1: 98.0}).text() == "97.50 ± 0.71"
    assert summarise({0: 97.0, 1: 98.0}).n == 2


def test_holm_against_a_published_example():
    """Holm's procedure on p = 0.01, 0.04, 0.03, 0.005 (a textbook case)."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_paired_p_is_scipys_paired_t_test_over_shared_bases():
    a = {0: 1.0, 1: 2.0, 2: 3.5, 3: 4.0, 4: 5.5, 9: 100.0}
    b = {0: 0.5, 1: 1.0, 2: 3.0, 3: 4.5, 4: 4.0, 8: -100.0}
    expected = stats.ttest_rel([a[k] for k in range(5)], [b[k] for k in range(5)]).pvalue
    assert paired_p(a, b) == pytest.approx(expected)


def test_fewer_than_five_bases_are_not_ranked():
    few = dict.fromkeys(range(4), 1.0)
    assert paired_p(few, few) is None
    assert ranks({"a": few, "b": few}) is None
    assert ranks({"a": dict.fromkeys(range(9), 1.0)}) is None


def test_ranks_are_tied_unless_a_paired_difference_carries_them():
    seeds = range(5)
    noise = [0.0, 0.3, -0.2, 0.1, -0.1]
    good = {k: 98 + noise[k] for k in seeds}
    alike = {k: 98 + noise[(k + 2) % 5] for k in seeds}
    worse = {k: 95 + noise[(k + 1) % 5] for k in seeds}
    assert ranks({"worse": worse, "good": good, "alike": alike}) == {
        "good": 1,
        "alike": 1,
        "worse": 3,
    }


def test_a_lower_mean_never_has_a_better_rank():
    """One that is told apart from the best, and one of a lower mean that spreads too widely to
    be."""
    seeds = range(5)
    noise = [0.0, 0.03, -0.02, 0.01, -0.01]
    best = {k: 98 + noise[k] for k in seeds}
    second = {k: 97 + noise[(k + 1) % 5] for k in seeds}
    wide = {k: 60 + 35 * (-1) ** k for k in seeds}
    assert paired_p(best, second) < 0.01 < 0.05 < paired_p(best, wide)
    found = ranks({"wide": wide, "second": second, "best": best})
    assert found == {"best": 1, "second": 2, "wide": 2}


def test_constant_differences_do_not_divide_by_zero():
    a, b = {k: float(k) for k in range(5)}, {k: k + 1.0 for k in range(5)}
    assert paired_p(a, b) == 0.0
    assert paired_p(a, a) == 1.0
    assert not math.isnan(paired_p(a, b))


def test_differences_have_scipys_intervals_and_holms_p_values():
    seeds = range(5)
    a = {k: 98 + v for k, v in zip(seeds, [0.0, 0.3, -0.2, 0.1, -0.1], strict=True)}
    b = {k: 97 + v for k, v in zip(seeds, [0.1, 0.2, -0.1, 0.3, -0.2], strict=True)}
    c = {k: 98 + v for k, v in zip(seeds, [0.1, 0.1, -0.1, 0.2, -0.2], strict=True)}
    ab, ac, bc = differences({"a": a, "b": b, "c": c})
    whole = stats.ttest_rel(list(a.values()), list(b.values()))
    low, high = whole.confidence_interval()
    assert (ab.first, ab.second, ab.n) == ("a", "b", 5)
    assert (ab.low, ab.high) == pytest.approx((low, high))
    assert ab.mean == pytest.approx(0.96, abs=1e-9)
    raw = [
        stats.ttest_rel(list(x.values()), list(y.values())).pvalue
        for x, y in ((a, b), (a, c), (b, c))
    ]
    assert [d.adjusted for d in (ab, ac, bc)] == pytest.approx(holm(raw))
    assert (ab.verdict(), ac.verdict(), bc.verdict()) == ("a", "tied", "c")
    assert differences({"a": {0: 1.0}, "b": {0: 2.0}}) == []


def test_deviations_and_intervals_are_those_of_the_libraries():
    draw = random.Random(0)
    for n in (5, 6, 20):
        a, b = ({k: draw.uniform(0, 100) for k in range(n)} for _ in range(2))
        gaps = [a[k] - b[k] for k in a]
        assert deviation(gaps) == pytest.approx(statistics.stdev(gaps), rel=1e-12)
        expected = stats.ttest_1samp(gaps, 0.0).confidence_interval()
        assert interval(gaps) == pytest.approx((expected.low, expected.high), rel=1e-9)
