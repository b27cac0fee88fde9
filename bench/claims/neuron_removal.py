"""Neuron removal: checks of the claims R5 and R8, from committed measurements and records."""

from __future__ import annotations

import json
import statistics

from widthbench.claims.ledger import Evidence, Pick, Picked

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


def speed_up(evidence: Evidence) -> Picked:
    """Seconds of one process over those of two, of each pair of runs that
    ``bench/speed/neuron_removal.py`` wrote down.
    """
    path = evidence.results / "neuron-removal-speed.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = [json.loads(line) for line in lines]
    return Picked(
        {
            i: p["one"] / p["two"]
            for i, p in enumerate(pairs)
            if p["what"] == "greedy curve, one process over two"
        }
    )


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
