"""AutoPrune: checks of the claims A2 and A6, from committed records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from widthbench.claims.ledger import Evidence, Pick, Picked
from widthbench.experiment.records import Record

NEAR = 1.0  # points of val accuracy


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


softplus_over_leaky_relu_lenet_300_100 = Slower(
    "autoprune-lenet", "lenet_300_100", "softplus", "leaky_relu"
)
softplus_over_leaky_relu_lenet5 = Slower("autoprune-lenet", "lenet5", "softplus", "leaky_relu")
softplus_over_leaky_relu_vgg16_cifar = Slower(
    "autoprune-cifar10", "vgg16_cifar", "softplus", "leaky_relu"
)
linear_over_softplus_lenet_300_100 = Slower(
    "autoprune-lenet", "lenet_300_100", "linear", "softplus"
)
linear_over_softplus_lenet5 = Slower("autoprune-lenet", "lenet5", "linear", "softplus")
linear_over_softplus_vgg16_cifar = Slower("autoprune-cifar10", "vgg16_cifar", "linear", "softplus")
recoverability_lenet_300_100 = Recoverability("autoprune-lenet", "lenet_300_100")
recoverability_lenet5 = Recoverability("autoprune-lenet", "lenet5")
recoverability_vgg16_cifar = Recoverability("autoprune-cifar10", "vgg16_cifar")
recoverability_at_ten_times_lenet_300_100 = Recoverability("autoprune-lenet", "lenet_300_100", 5e-3)
recoverability_at_ten_times_lenet5 = Recoverability("autoprune-lenet", "lenet5", 5e-3)
