"""What a few seeds can and cannot say: means with spreads, and ranks only where paired differences
carry them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import special

LEAST = 5  # bases below which nothing is ranked
LEVEL = 0.05  # of tests


@dataclass(frozen=True)
class Summary:
    """A mean over distinct base networks.

    Attributes:
        mean: Arithmetic mean.
        std: Sample standard deviation (n - 1); None for one value, of which no spread is known.
        n: Number of distinct bases.
    """

    mean: float
    std: float | None
    n: int

    def text(self, digits: int = 2) -> str:
        """``"97.10 ± 0.30"``, without ± for a single value."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def summarise(values: Mapping[object, float]) -> Summary:
    """Mean and spread of one value per base.

    Args:
        values: By base (seed or checkpoint digest): each base counts once.
    """
    numbers = list(values.values())
    return Summary(
        statistics.fmean(numbers), deviation(numbers) if len(numbers) > 1 else None, len(numbers)
    )


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1) of at least two values; ``statistics.stdev`` takes 26 times
    as long, over fractions.
    """
    mean = statistics.fmean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): ``p̃_(i) = max_{j<=i} min(1, (m - j + 1) p_(j))``,
    in the given order.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [0.0] * len(p_values), 0.0
    for step, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[i]))
        adjusted[i] = running
    return adjusted


def paired_p(a: Mapping[object, float], b: Mapping[object, float]) -> float | None:
    """Two-sided p-value of the paired t-test over the bases that both have.

    Returns:
        None below ``LEAST`` shared bases; 0 or 1 where all differences are equal and there is
        nothing to test.
    """
    shared = [k for k in a if k in b]
    if len(shared) < LEAST:
        return None
    differences = [a[k] - b[k] for k in shared]
    if math.isclose(max(differences), min(differences), abs_tol=1e-12):
        return 1.0 if math.isclose(differences[0], 0.0, abs_tol=1e-12) else 0.0
    # Student's t, as scipy.stats.ttest_1samp has it, without the quarter of a millisecond that this
    # takes around it
    t = statistics.fmean(differences) / (deviation(differences) / math.sqrt(len(differences)))
    return float(2 * special.stdtr(len(differences) - 1, -abs(t)))


@dataclass(frozen=True)
class Difference:
    """A paired comparison of two rows over the bases that both have.

    Attributes:
        first: A row's name.
        second: Another's.
        mean: Mean of ``first - second``.
        low: Lower end of its 95 % t-interval.
        high: Upper end.
        adjusted: p-value of the paired t-test after Holm's correction over the family.
        n: Shared bases.
    """

    first: str
    second: str
    mean: float
    low: float
    high: float
    adjusted: float
    n: int

    def verdict(self, level: float = 0.05) -> str:
        """The row that is higher, or "tied"."""
        if self.adjusted >= level or self.mean == 0:
            return "tied"
        return self.first if self.mean > 0 else self.second


def interval(values: Sequence[float], level: float = 0.05) -> tuple[float, float]:
    """The t-interval of the mean of at least two values; a point where they are all equal."""
    mean = statistics.fmean(values)
    half = (
        float(special.stdtrit(len(values) - 1, 1 - level / 2))
        * deviation(values)
        / math.sqrt(len(values))
    )
    return mean - half, mean + half


def differences(
    scores: Mapping[str, Mapping[object, float]], references: Sequence[str]
) -> list[Difference]:
    """Each row against each of the references that are there, over the bases that both have; Holm's
    correction is over these comparisons, a family that is fixed before anything is run.

    Args:
        scores: For each row one score per base.
        references: Rows that the others are held against; of two references the one named first is
            held against the other.
    """
    there = [r for r in references if r in scores]
    pairs = [
        (name, reference)
        for i, reference in enumerate(there)
        for name in scores
        if name != reference and name not in there[i:]
    ]
    compared = [(a, b, p) for a, b in pairs if (p := paired_p(scores[a], scores[b])) is not None]
    adjusted = holm([p for *_, p in compared])
    found = []
    for (a, b, _), q in zip(compared, adjusted, strict=True):
        gaps = [scores[a][k] - scores[b][k] for k in scores[a] if k in scores[b]]
        found.append(Difference(a, b, statistics.fmean(gaps), *interval(gaps), q, len(gaps)))
    return found


def _apart(scores: Mapping[str, Mapping[object, float]], a: str, b: str) -> bool:
    """Whether two rows share too few bases for a test."""
    return paired_p(scores[a], scores[b]) is None


def ranks(
    scores: Mapping[str, Mapping[object, float]], *, level: float = 0.05
) -> dict[str, int] | None:
    """Ranks of rows in the order of their means, higher first; a row shares the rank of the rows
    before it unless a paired difference tells it apart from the first of them.

    The first of a rank is held against all rows below it by the paired t-test over shared bases,
    Holm-corrected over these comparisons. A lower mean never has a better rank. A rank is one more
    than the number of rows before its first. A row with too few bases to be compared is left out.

    Args:
        scores: For each row one score per base.
        level: 1 minus the confidence.

    Returns:
        Rank by row, or None where no two rows share ``LEAST`` bases.
    """
    names = sorted(scores, key=lambda n: -statistics.fmean(scores[n].values()))
    while alone := {n for p in combinations(names, 2) if _apart(scores, *p) for n in p}:
        names.remove(min(alone, key=lambda n: (len(scores[n]), -names.index(n))))
    if len(names) < 2:
        return None
    ranked: dict[str, int] = {}
    while len(ranked) < len(names):
        at = len(ranked)
        best, below = names[at], names[at + 1 :]
        corrected = holm([paired_p(scores[best], scores[b]) or 0.0 for b in below])
        tied = next((i for i, p in enumerate(corrected) if p < level), len(below))
        ranked |= dict.fromkeys(names[at : at + 1 + tied], at + 1)
    return ranked


def mcnemar(first: int, second: int) -> float:
    """Two-sided p-value of McNemar's exact test (McNemar 1947): two networks on the same samples.

    Args:
        first: Samples that the first alone gets right.
        second: Samples that the second alone gets right.
    """
    from scipy import stats

    return float(stats.binomtest(first, first + second).pvalue) if first + second else 1.0


Tasks = Mapping[object, Sequence[float]]  # by task (a network on a data set): a score for each run


def interquartile_mean(tasks: Tasks) -> float:
    """Mean of the middle half of all runs of all tasks (Agarwal et al. 2021, "Deep Reinforcement
    Learning at the Edge of the Statistical Precipice").
    """
    from scipy import stats  # half a second, which a command line need not wait

    return float(stats.trim_mean([v for runs in tasks.values() for v in runs], 0.25))


def probability_of_improvement(first: Tasks, second: Tasks) -> float:
    """Probability that a run of the first is better than one of the second on the same task, the
    mean over tasks (Agarwal et al. 2021); equal ones count half.
    """
    signs = [np.sign(np.subtract.outer(runs, second[task])).mean() for task, runs in first.items()]
    return float(0.5 + np.mean(signs) / 2)


def stratified(
    statistic: Callable[..., float], *rows: Tasks, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """A 95 % percentile interval by the stratified bootstrap (Agarwal et al. 2021): runs are drawn
    anew within each task.

    Args:
        statistic: Of the rows.
        *rows: Each a score for each run, by task.
        draws: Bootstrap samples.
        seed: Of the draws.
    """
    draw = np.random.default_rng(seed)

    def again(row: Tasks) -> Tasks:
        return {task: draw.choice(runs, len(runs)).tolist() for task, runs in row.items()}

    values = [statistic(*map(again, rows)) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
