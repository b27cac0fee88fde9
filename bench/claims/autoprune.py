"""AutoPrune: checks of the claim A2, from committed records."""

from __future__ import annotations

from typing import Any

from widthbench.claims import Evidence, Pick, Picked
from widthbench.records import Record

NEAR = 1.0  # points of val accuracy


def steps(record: Record) -> int | None:
    """Steps to the first point of a run's trajectory from which on val accuracy is within a point of the final one, or above."""
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
        shared: dict[str, Any] = {"suite": suite, "model": model, "variant": "fixed mu", "technique": "autoprune"}
        self.picks = [
            Pick(**shared, params={"start": "fresh", "estimator": e}, metric="series:trajectory.step") for e in (slow, fast)
        ]

    def __call__(self, evidence: Evidence) -> Picked:
        """The differences."""
        found = [evidence.pick(pick) for pick in self.picks]
        slow, fast = ({r.cell.seed: n for r in f.records if (n := steps(r)) is not None} for f in found)
        values = {seed: float(n - fast[seed]) for seed, n in slow.items() if seed in fast}
        return Picked(values, [r for f in found for r in f.records], sum(f.missing for f in found))


softplus_over_leaky_relu_lenet_300_100 = Slower("autoprune-lenet", "lenet_300_100", "softplus", "leaky_relu")
softplus_over_leaky_relu_lenet5 = Slower("autoprune-lenet", "lenet5", "softplus", "leaky_relu")
softplus_over_leaky_relu_vgg16_cifar = Slower("autoprune-cifar10", "vgg16_cifar", "softplus", "leaky_relu")
linear_over_softplus_lenet_300_100 = Slower("autoprune-lenet", "lenet_300_100", "linear", "softplus")
linear_over_softplus_lenet5 = Slower("autoprune-lenet", "lenet5", "linear", "softplus")
linear_over_softplus_vgg16_cifar = Slower("autoprune-cifar10", "vgg16_cifar", "linear", "softplus")
