import math
import random
import statistics

import pytest
from scipy import stats

from widthbench.statistics import (
    deviation,
    differences,
    holm,
    interquartile_mean,
    interval,
    mcnemar,
    paired_p,
    probability_of_improvement,
    ranks,
    stratified,
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
    many = dict.fromkeys(range(5), 2.0)
    assert ranks({"a": many, "b": dict.fromkeys(many, 1.0), "few": few}) == {"a": 1, "b": 2}


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
    # a and b are references: c is held against both, a against b
    ca, ab, cb = differences({"a": a, "b": b, "c": c}, ["a", "b", "absent"])
    assert [(d.first, d.second) for d in (ca, ab, cb)] == [("c", "a"), ("a", "b"), ("c", "b")]
    whole = stats.ttest_rel(list(a.values()), list(b.values()))
    low, high = whole.confidence_interval()
    assert (ab.low, ab.high, ab.n) == (pytest.approx(low), pytest.approx(high), 5)
    assert ab.mean == pytest.approx(0.96, abs=1e-9)
    raw = [
        stats.ttest_rel(list(x.values()), list(y.values())).pvalue
        for x, y in ((c, a), (a, b), (c, b))
    ]
    assert [d.adjusted for d in (ca, ab, cb)] == pytest.approx(holm(raw))
    assert (ca.verdict(), ab.verdict(), cb.verdict()) == ("tied", "a", "c")
    assert differences({"a": {0: 1.0}, "b": {0: 2.0}}, ["a"]) == []


def test_ranks_correct_for_the_comparisons_with_the_best_alone():
    """A row that spreads widely but is far below the best is not tied with it, however many other
    rows there are (NMF at 40 +- 24 beside 98.3 once held rank 1)."""
    draw = random.Random(1)
    rows = {f"r{i}": {k: 98 + 0.1 * draw.gauss(0, 1) for k in range(5)} for i in range(12)}
    rows["wide"] = dict(enumerate([30.0, 75.0, 20.0, 45.0, 32.0]))
    best = max(rows, key=lambda n: statistics.fmean(rows[n].values()))
    p = paired_p(rows[best], rows["wide"])
    assert 78 * p > 0.05 > 12 * p  # all pairs would be 78 comparisons
    assert ranks(rows)["wide"] > 1


def test_interquartile_means_and_the_probability_of_improvement_by_hand():
    tasks = {"one": [0.0, 100.0, 10.0, 20.0], "other": [30.0, 40.0, 50.0, 60.0]}
    # the middle half of eight runs: 20, 30, 40, 50
    assert interquartile_mean(tasks) == pytest.approx(35)
    first = {"one": [1.0, 3.0], "other": [5.0, 5.0]}
    second = {"one": [2.0, 2.0], "other": [5.0, 4.0]}
    assert probability_of_improvement(first, second) == pytest.approx((0.5 + 0.75) / 2)
    draw = random.Random(0)
    x, y = ([float(draw.randrange(6)) for _ in range(7)] for _ in range(2))
    u = stats.mannwhitneyu(x, y).statistic
    assert probability_of_improvement({0: x}, {0: y}) == pytest.approx(u / 49)


def test_the_stratified_bootstrap_draws_within_tasks():
    apart = {"low": [1.0, 1.0, 1.0], "high": [9.0, 9.0, 9.0]}
    # runs drawn across tasks would give other means than 5
    assert stratified(lambda t: statistics.fmean(v for r in t.values() for v in r), apart) == (5, 5)
    draw = random.Random(0)
    values = [draw.gauss(0, 1) for _ in range(40)]
    low, high = stratified(lambda t: float(statistics.fmean(t[0])), {0: values})
    same = stats.bootstrap(
        (values,), statistics.fmean, method="percentile", random_state=0, vectorized=False
    ).confidence_interval
    assert (low, high) == pytest.approx((same.low, same.high), abs=0.05)


def test_mcnemar_against_the_binomial_distribution_by_hand():
    # at most 2 of 10 on one side, either side: 2 (1 + 10 + 45) / 1024
    assert mcnemar(2, 8) == mcnemar(8, 2) == pytest.approx(112 / 1024)
    assert mcnemar(0, 0) == 1.0


def test_deviations_and_intervals_are_those_of_the_libraries():
    draw = random.Random(0)
    for n in (5, 6, 20):
        a, b = ({k: draw.uniform(0, 100) for k in range(n)} for _ in range(2))
        gaps = [a[k] - b[k] for k in a]
        assert deviation(gaps) == pytest.approx(statistics.stdev(gaps), rel=1e-12)
        expected = stats.ttest_1samp(gaps, 0.0).confidence_interval()
        assert interval(gaps) == pytest.approx((expected.low, expected.high), rel=1e-9)
