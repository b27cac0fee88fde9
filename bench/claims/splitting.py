"""Splitting: checks of the claims S2 to S6, by committed measurements and records."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from widthbench.claims.ledger import Evidence, Pick, Picked
from widthbench.experiment.records import Record


def _lines(evidence: Evidence, name: str) -> list[dict[str, Any]]:
    path = evidence.results / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


class Cost:
    """A cost over that of one backward pass, of each pair of runs that ``bench/speed/splitting.py``
    wrote down.

    Args:
        network: Its name.
        what: "all" for all eigenpairs and the pass that they need, "product" for one joint product.
    """

    def __init__(self, network: str, what: str) -> None:
        self.network, self.what = network, what

    def __call__(self, evidence: Evidence) -> Picked:
        """The ratios."""
        rows = [
            r for r in _lines(evidence, "splitting-speed.jsonl") if r.get("network") == self.network
        ]
        return Picked({i: r[self.what] / r["backward"] for i, r in enumerate(rows)})


eigenpairs_lenet5 = Cost("lenet5", "all")
eigenpairs_vgg16_cifar = Cost("vgg16_cifar", "all")
product_lenet5 = Cost("lenet5", "product")
product_vgg16_cifar = Cost("vgg16_cifar", "product")


def exponent_of_d(evidence: Evidence) -> Picked:
    """Slope of log seconds of the exact decomposition against log d."""
    return _exponent(evidence, "d", "n", 4)


def exponent_of_n(evidence: Evidence) -> Picked:
    """Slope of log seconds of the exact decomposition against log n."""
    return _exponent(evidence, "n", "d", 200)


LARGE = {"d": 512, "n": 8}  # where time per operation has settled


def _exponent(evidence: Evidence, name: str, fixed: str, value: int) -> Picked:
    rows = [
        r
        for r in _lines(evidence, "splitting-speed.jsonl")
        if r["what"] == "exact" and r[fixed] == value and r[name] >= LARGE[name]
    ]
    if len(rows) < 3:
        return Picked()
    logs = [[math.log(r[k]) for r in rows] for k in (name, "seconds")]
    return Picked({0: statistics.linear_regression(*logs).slope})


def fall(evidence: Evidence) -> Picked:
    """Fall of the loss of a stuck network after a split, by seed, at ε = 0.05."""
    return Picked({r["seed"]: r["fall"] for r in _stuck(evidence)})


def against_the_law(evidence: Evidence) -> Picked:
    """Relative difference between that fall and ε² |λ_min| / 2, by seed."""
    return Picked({r["seed"]: abs(r["fall"] / r["law"] - 1) for r in _stuck(evidence)})


def gain_of_growing(evidence: Evidence) -> Picked:
    """Final loss of the network that was not split minus that of the one that was, by seed."""
    return _gain(evidence, "none")


def gain_over_copies(evidence: Evidence) -> Picked:
    """Final loss of the network whose neurons were copied as they are minus that of the one that
    was split, by seed.
    """
    return _gain(evidence, "copies")


def _gain(evidence: Evidence, over: str) -> Picked:
    rows = {
        r["select"]: r["losses"]
        for r in _lines(evidence, "splitting-law.jsonl")
        if r["what"] == "final"
    }
    if over not in rows:
        return Picked()
    return Picked(
        {
            i: other - split
            for i, (other, split) in enumerate(zip(rows[over], rows["eigen"], strict=True))
        }
    )


def _stuck(evidence: Evidence) -> list[dict[str, Any]]:
    return [
        r
        for r in _lines(evidence, "splitting-law.jsonl")
        if r["what"] == "law" and r["epsilon"] == 0.05
    ]


class Growth:
    """R² of a count against the final width, over the sizes that a network grew to, by seed.

    Args:
        count: "step" for rounds, "splits" for split neurons.
    """

    picks = (
        Pick(
            suite="growing",
            variant="rounds",
            technique="splitting",
            metric="series:trajectory.open",
        ),
    )

    def __init__(self, count: str) -> None:
        self.count = count

    def __call__(self, evidence: Evidence) -> Picked:
        """The coefficients."""
        (pick,) = self.picks
        meant = [c for c in evidence.cells(pick.suite) if pick.matches(c)]
        records = [
            r for r in evidence.of(pick.suite) if r.status == "done" and pick.matches(r.cell)
        ]
        found: dict[object, float] = {}
        for seed in {c.seed for c in meant}:
            some = [r for r in records if r.cell.seed == seed]
            if len(some) == len({c.budget for c in meant}):
                x, y = (
                    [float(r.series[f"trajectory.{n}"][-1]) for r in some]
                    for n in ("open", self.count)
                )
                found[seed] = statistics.correlation(x, y) ** 2
        return Picked(found, records, len(meant) - len(records))


def most_rounds(evidence: Evidence) -> Picked:
    """Rounds of the largest network, by seed."""
    (pick,) = Growth.picks
    records = [r for r in evidence.of(pick.suite) if r.status == "done" and pick.matches(r.cell)]
    rounds: dict[object, float] = {}
    for r in records:
        seed = r.cell.seed
        rounds[seed] = max(rounds.get(seed, 0.0), float(r.series["trajectory.step"][-1]))
    return Picked(rounds, records)


most_rounds.picks = Growth.picks  # type: ignore[attr-defined]
rounds_against_width = Growth("step")
splits_against_width = Growth("splits")


class Pipeline:
    """Everything that splitting cost over everything that pruning cost, base network included, at
    the same size.

    In MACs, forward and backward, until the end of fine-tuning.

    Args:
        dataset: Its name.
        model: The network.
        suite: Of both.
        budget: Of both; None for all.
    """

    def __init__(
        self, dataset: str, model: str, suite: str = "growing", budget: str | None = None
    ) -> None:
        shared: dict[str, Any] = {"suite": suite, "dataset": dataset, "model": model}
        shared |= {"budget": budget} if budget else {}
        self.picks = [
            Pick(**shared, technique="splitting", params={"select": "eigen", "per": "cost"}),
            Pick(**shared, technique="l1-norm"),
        ]

    def __call__(self, evidence: Evidence) -> Picked:
        """The ratios, by seed and budget."""
        records = [
            [r for r in evidence.of(pick.suite) if r.status == "done" and pick.matches(r.cell)]
            for pick in self.picks
        ]
        split, prune = ({(r.cell.seed, r.cell.budget): total(r) for r in some} for some in records)
        values: dict[object, float] = {
            key: cost / prune[key] for key, cost in split.items() if key in prune
        }
        meant = sum(pick.matches(c) for pick in self.picks for c in evidence.cells(pick.suite))
        return Picked(values, [r for some in records for r in some], meant - sum(map(len, records)))


def total(record: Record) -> int:
    """Everything that a record's network cost, in MACs, forward and backward."""
    return sum(s.forward_macs + s.backward_macs for s in record.spent.values())


pipeline_lenet_300_100 = Pipeline("mnist", "lenet_300_100")
pipeline_lenet5 = Pipeline("mnist", "lenet5")
pipeline_vgg16_cifar = Pipeline("cifar10", "vgg16_cifar")
pipeline_mobilenetv1_100_cifar = Pipeline("cifar10", "mobilenetv1_100_cifar")
pipeline_mobilenetv1_025_cifar = Pipeline(
    "cifar10", "mobilenetv1_025_cifar", "cifar10-small", "macs:0.25"
)
pipeline_resnet20_cifar = Pipeline("cifar10", "resnet20_cifar", "cifar10-small", "macs:0.25")
