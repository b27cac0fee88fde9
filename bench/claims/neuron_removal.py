"""Neuron removal: checks of the claims R1 to R8, from committed measurements and
records.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch

from widthbench.claims.ledger import Evidence, Pick, Picked
from widthbench.errors import UsageError
from widthbench.networks import models
from widthbench.sensitivity.ablation import Sample
from widthbench.sensitivity.backprop_diagonal import BackpropDiagonal
from widthbench.width import find_groups

SETUPS = "neuron-removal-setups.jsonl"
AGAIN = "neuron-removal-ten-digits.jsonl"  # of other seeds
OWN = "own, 2"  # images and points, as the study names them
FIRST = 5  # removals

WIDTHS = (50, 100, 200, 400)
NEEDED = [
    Pick(
        suite="shrinking",
        technique="neuron-removal",
        args={"widths": [width]},
        exactly=True,
        metric="series:stop.channels",
        params={"ranking": "oracle", "rerank": "iterative"},
    )
    for width in WIDTHS
]


def _lines(evidence: Evidence, name: str, **fixed: object) -> list[dict[str, Any]]:
    """A committed measurement's rows that have these values."""
    path = evidence.results / name
    rows = map(json.loads, path.read_text().splitlines() if path.is_file() else [])
    return [r for r in rows if all(r.get(k) == v for k, v in fixed.items())]


def _ten_digits(evidence: Evidence, network: str) -> list[dict[str, Any]]:
    return _lines(evidence, SETUPS, setup="ten digits", network=network)


def removable(evidence: Evidence, network: str, judged: str) -> Picked:
    """Largest share, in %, after whose removal by iterative brute force the accuracy is not much
    below the start, by seed.

    Args:
        evidence: Where it is read.
        network: "1 x 100" or "2 x 50".
        judged: "own, 0.5" and the like: on which images, and how many points may be lost.
    """
    rows = _ten_digits(evidence, network)
    return Picked({r["seed"]: r["removable"]["brute force, iterative"][judged] for r in rows})


def ahead(evidence: Evidence, network: str, one: str, other: str) -> Picked:
    """Share removable at two points of the own images by one ranking minus that by another, in
    points of the share, by seed.

    Args:
        evidence: Where it is read.
        network: "1 x 100" or "2 x 50".
        one: A ranking, "brute force, iterative" and the like.
        other: Another.
    """
    rows = [(r["seed"], r["removable"]) for r in _lines(evidence, AGAIN, network=network)]
    return Picked({seed: r[one][OWN] - r[other][OWN] for seed, r in rows})


def below_the_start(evidence: Evidence, digit: int) -> Picked:
    """Share removed, in %, until the error exceeds the start's, one digit against the rest, by
    seed.
    """
    rows = _lines(evidence, SETUPS, setup="one digit", digit=digit)
    return Picked({r["seed"]: r["below"] for r in rows})  # of a hundred neurons


def fall_of_the_error(evidence: Evidence) -> Picked:
    """Fall of the error after the first removals, in % of the start's, by digit and seed."""
    rows = _lines(evidence, SETUPS, setup="one digit")
    return Picked({(r["digit"], r["seed"]): r["fall"][FIRST] for r in rows})


def gain_of_accuracy(evidence: Evidence) -> Picked:
    """Held-out accuracy after the first removals minus that before, by digit and seed."""
    rows = _lines(evidence, SETUPS, setup="one digit")
    return Picked({(r["digit"], r["seed"]): r["held out"][FIRST] - r["held out"][0] for r in rows})


def cancelled(evidence: Evidence, network: str, rerank: str, share: int) -> Picked:
    """Summed single minus joint increase of the squared error, by seed.

    Args:
        evidence: Where it is read.
        network: "1 x 100" or "2 x 50".
        rerank: "single" or "iterative", the brute force ranking that says which neurons go.
        share: How many of them, in %.
    """
    at = share // 10 - 1
    rows = [(r["seed"], r[rerank]) for r in _ten_digits(evidence, network)]
    return Picked({seed: r["summed"][at] - r["joint"][at] for seed, r in rows})


def healed(evidence: Evidence) -> Picked:
    """Which part of the rises of the error later removals undo, 2 x 50, second order, iterative, by
    seed.
    """
    rows = _ten_digits(evidence, "2 x 50")
    return Picked({r["seed"]: r["healed"]["second order, iterative"] for r in rows})


def flat(evidence: Evidence, network: str) -> Picked:
    """Share removed, in %, while the error on the cosine is flat, by seed."""
    rows = _lines(evidence, SETUPS, setup="cosine", network=network)
    return Picked({r["seed"]: r["flat"] for r in rows})


def slope_on_the_cosine(evidence: Evidence) -> Picked:
    """Least-squares slope of the neurons needed against those at the start, by seed."""
    needed: dict[object, dict[int, int]] = {}
    for r in _lines(evidence, SETUPS, setup="cosine"):
        needed.setdefault(r["seed"], {})[r["neurons"]] = r["needed"]
    return Picked(
        {
            seed: statistics.linear_regression(list(some), list(some.values())).slope
            for seed, some in needed.items()
        }
    )


def share_of_the_ceiling(evidence: Evidence, network: str) -> Picked:
    """Speed-up of two processes that share a greedy curve over the gain in throughput of two
    independent copies, of each round that ``bench/speed/neuron_removal.py`` wrote down.
    """
    rows = _lines(evidence, "neuron-removal-speed.jsonl", copies=network)
    return Picked(
        {i: (r["alone"] / r["two"]) / (r["alone"] / r["one"]) for i, r in enumerate(rows)}
    )


def undefined_for_relu(networks: list[list[int]]) -> list[float]:
    """For the widths of each ReLU network: 1 if the back-propagated diagonal is refused, but given
    with softplus's second derivative, else 0.
    """
    x, y = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(16)
    found = []
    for widths in networks:
        model = models.create(
            "mlp_sigmoid", classes=16, channels=1, size=28, seed=0, widths=widths, act_layer="relu"
        ).eval()
        groups = find_groups(model, x[:1], cache=False)
        try:
            BackpropDiagonal(model, groups, Sample(x, y))
            refused = False
        except UsageError:
            refused = True
        made = BackpropDiagonal(model, groups, Sample(x, y), softplus_beta=3.0)
        second = made.second({n: torch.ones(g.channels) for n, g in groups.items()})
        found.append(float(refused and all(bool(d.isfinite().all()) for d in second.values())))
    return found


def slope(evidence: Evidence) -> Picked:
    """Least-squares slope of the neurons left at the stopping point against the initial width, by
    seed.
    """
    found = [evidence.pick(pick) for pick in NEEDED]
    values = {
        seed: statistics.linear_regression(WIDTHS, [f.values[seed] for f in found]).slope
        for seed in found[0].values
        if all(seed in f.values for f in found)
    }
    return Picked(values, [r for f in found for r in f.records], sum(f.missing for f in found))


slope.picks = NEEDED
