"""AutoPrune: checks of the claims A2 to A4, A6, A7 and A10, from committed records and the study of
single weights.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from widthbench.claims.ledger import Evidence, Pick, Picked
from widthbench.experiment.records import Record

NEAR = 1.0  # points of val accuracy
NETWORKS = ("lenet_300_100", "lenet5")


def steps(record: Record) -> int | None:
    """Steps to the first point of a run's trajectory from which on val accuracy is within a point
    of the final one, or above.
    """
    accuracy = record.series.get("trajectory.val_top1") or []
    if not accuracy:
        return None
    short = [i for i, value in enumerate(accuracy) if value < accuracy[-1] - NEAR]
    return int(record.series["trajectory.step"][short[-1] + 1 if short else 0])


class Slower:
    """How many more steps one estimator takes than another, by seed, from scratch at a fixed μ.

    Args:
        suite: Whose records are read.
        model: The network.
        slow: Estimator.
        fast: Estimator whose steps are subtracted.
    """

    def __init__(self, suite: str, model: str, slow: str, fast: str) -> None:
        shared: dict[str, Any] = {
            "suite": suite,
            "model": model,
            "variant": "fixed mu",
            "technique": "autoprune",
        }
        self.picks = [
            Pick(
                **shared, params={"start": "fresh", "estimator": e}, metric="series:trajectory.step"
            )
            for e in (slow, fast)
        ]

    def __call__(self, evidence: Evidence) -> Picked:
        """The differences."""
        return _difference(evidence, self.picks, steps)


def rate(record: Record) -> float | None:
    """Recoveries per 1000 channel-steps in which there could have been one; None if there were
    none.
    """
    returned, shut = (
        record.series.get(f"trajectory.{name}") or [0] for name in ("recoveries", "shut")
    )
    return 1000 * returned[-1] / shut[-1] if shut[-1] else None


class Recoverability:
    """How much higher the rate of recoveries is without weight decay than with it, by seed, at a
    fixed μ.

    Args:
        suite: Whose records are read.
        model: The network.
        decay: Weight decay.
    """

    def __init__(self, suite: str, model: str, decay: float = 5e-4) -> None:
        shared: dict[str, Any] = {
            "suite": suite,
            "model": model,
            "variant": "fixed mu",
            "technique": "autoprune",
        }
        self.picks = [
            Pick(
                **shared,
                params={"start": "trained", "decoupling": "sgn", "weight_decay": w},
                metric="series:trajectory.shut",
            )
            for w in (0, decay)
        ]

    def __call__(self, evidence: Evidence) -> Picked:
        """The differences."""
        return _difference(evidence, self.picks, rate)


def _difference(
    evidence: Evidence, picks: Sequence[Pick], measure: Callable[[Record], float | None]
) -> Picked:
    found = [evidence.pick(pick) for pick in picks]
    one, other = (
        {r.cell.seed: value for r in f.records if (value := measure(r)) is not None} for f in found
    )
    values: dict[object, float] = {
        seed: float(value - other[seed]) for seed, value in one.items() if seed in other
    }
    return Picked(values, [r for f in found for r in f.records], sum(f.missing for f in found))


softplus_over_leaky_relu_vgg16_cifar = Slower(
    "autoprune-cifar10", "vgg16_cifar", "softplus", "leaky_relu"
)
linear_over_softplus_vgg16_cifar = Slower("autoprune-cifar10", "vgg16_cifar", "linear", "softplus")
recoverability_vgg16_cifar = Recoverability("autoprune-cifar10", "vgg16_cifar")


HALF_A_POINT, A_TENTH = 0.5, 0.1  # of val
FEWER = 30  # times fewer weights, where sweeps are compared
ALIVE = 10.0  # points of val that a network may lose and still say something
JUDGED = 5  # the first seed that rules are judged on: they were written with those before in sight


def _runs(evidence: Evidence, variant: str, network: str = "lenet_300_100") -> dict[int, list[Any]]:
    """Runs of the study by seed, in the order of μ."""
    path = evidence.results / "autoprune-weights.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    found: dict[int, list[Any]] = {}
    for row in sorted(rows, key=lambda r: float(r["mu"])):
        if (row["variant"], row["network"]) == (variant, network):
            found.setdefault(row["seed"], []).append(row)
    return found


def _between(
    evidence: Evidence, one: str, other: str, measure: Callable[[list[Any]], float | None]
) -> Picked:
    """A measure of one variant's sweep minus another's, by seed, of those that rules are judged
    on.
    """
    values: dict[object, float] = {}
    sweeps = [_runs(evidence, name) for name in (one, other)]
    for seed in sorted(s for s in sweeps[0].keys() & sweeps[1].keys() if s >= JUDGED):
        pair = [measure(some[seed]) for some in sweeps]
        if pair[0] is not None and pair[1] is not None:
            values[seed] = pair[0] - pair[1]
    return Picked(values)


def compression(runs: list[Any], loss: float = HALF_A_POINT) -> float | None:
    """The largest compression of a sweep that loses at most so many points of val; None where all
    lose more.
    """
    fine = [r["compression"] for r in runs if r["val_top1"] >= r["base_val_top1"] - loss]
    return max(fine, default=None)


def _lost(runs: list[Any], points: float = HALF_A_POINT) -> float | None:
    """The decimal logarithm of the compression at which a sweep has lost so many points of val for
    good, between the runs on either side of it; None where no two are.
    """
    sweep = sorted((math.log10(r["compression"]), r["base_val_top1"] - r["val_top1"]) for r in runs)
    for (x, before), (y, after) in reversed([*itertools.pairwise(sweep)]):
        if before <= points < after:
            return x + (points - before) / (after - before) * (y - x)
    return None


def _at(runs: list[Any], where: float | None, measure: Callable[[Any], float]) -> float | None:
    """A measure of runs at the decimal logarithm of a compression, between those on either side of
    it.
    """
    if where is None:
        return None
    x, y = zip(*sorted((math.log10(r["compression"]), measure(r)) for r in runs), strict=True)
    return float(np.interp(where, x, y)) if x[0] <= where <= x[-1] else None


def more_compact(evidence: Evidence, one: str, other: str) -> Picked:
    """Difference of the decimal logarithms of compressions at half a point of val."""
    return _between(evidence, one, other, _lost)


def more_accurate(evidence: Evidence, one: str, other: str) -> Picked:
    """Difference of test top-1 at a thirtieth of the weights."""
    return _between(
        evidence, one, other, lambda runs: _at(runs, math.log10(FEWER), lambda r: float(r["top1"]))
    )


def slower(evidence: Evidence, slow: str, fast: str) -> Picked:
    """Difference of the steps to convergence, mean over the sweep."""
    return _between(evidence, slow, fast, lambda runs: fmean(r["converged"] for r in runs))


def stays_open(evidence: Evidence, one: str, other: str) -> Picked:
    """Difference of the shares of recovered weights that are still open at the end, of networks
    that have lost ten points of val at most.
    """

    def share(runs: list[Any]) -> float | None:
        alive = [r for r in runs if r["val_top1"] >= r["base_val_top1"] - ALIVE]
        recovered = sum(r["recoveries"] for r in alive)
        return sum(r["returned"] for r in alive) / recovered if recovered else None

    return _between(evidence, one, other, share)


def _recovery(run: Any) -> float:
    """Per million closed weight-steps."""
    return 1e6 * float(run["recoveries"]) / max(1.0, float(run["shut"]))


def recovers_more(evidence: Evidence, one: str, other: str, at: str) -> Picked:
    """Difference of the recoveries per million closed weight-steps.

    Args:
        evidence: Where records lie.
        one: Variant.
        other: Variant that is subtracted.
        at: "compression" for a thirtieth of the weights, "accuracy" for half a point of val lost:
            at the same μ one variant keeps more weights than the other.
    """

    def measure(runs: list[Any]) -> float | None:
        where = math.log10(FEWER) if at == "compression" else _lost(runs)
        return _at(runs, where, _recovery)

    return _between(evidence, one, other, measure)


def recoveries(evidence: Evidence) -> Picked:
    """Recoveries of a run, the least of the sweep, by seed."""
    runs = _runs(evidence, "rule")
    return Picked({seed: min(r["recoveries"] for r in some) for seed, some in runs.items()})


def _least(evidence: Evidence, name: str) -> Picked:
    runs = {(n, s): v for n in NETWORKS for s, v in _runs(evidence, "rule", n).items()}
    return Picked({key: min(r[name] for r in some) for key, some in runs.items()})


def least_product(evidence: Evidence) -> Picked:
    """The least product of update and gradient at one weight, over the largest, by network and
    seed.
    """
    return _least(evidence, "product")


def least_cosine(evidence: Evidence) -> Picked:
    """The least cosine between update and gradient, by network and seed."""
    return _least(evidence, "cosine")


def without_loss(evidence: Evidence) -> Picked:
    """LeNet-5's compression at a tenth of a point of val, by seed."""
    runs = _runs(evidence, "rule", "lenet5")
    found = {seed: compression(some, A_TENTH) for seed, some in runs.items()}
    return Picked({seed: value for seed, value in found.items() if value is not None})
