"""The LeNets' learning rate, with or without clipped gradients, by val accuracy.

    python bench/studies/recipes.py [--write results/recipes] [--seeds 2]

Each setting trains the whole network and the uniform one at 1/32 of its MACs, on seeds that no
suite has (100, 101, ...); test data are not looked at. Chosen is the highest mean over both
networks, both data sets and all seeds, of the settings under which no run dies. Writes FILE.md and
FILE.jsonl; half an hour on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from tabulate import tabulate

from widthbench.data import splits
from widthbench.errors import DivergedError
from widthbench.experiment import recipes
from widthbench.networks import models
from widthbench.paths import write_atomic
from widthbench.report.speed import where
from widthbench.technique.budget import Budget, uniform_widths
from widthbench.training.loop import fit
from widthbench.training.measuring import accuracy
from widthbench.width import CostModel, find_groups, keep, resize

NETWORKS = {"lenet_300_100": ("lenet_300_100", 10), "lenet5": ("lenet5", 3)}  # recipe, epochs
DATASETS = ("mnist", "fashionmnist")
RATES, CLIPS, NARROW = (0.02, 0.05, 0.1), (0.0, 1.0), 1 / 32


def narrowed(model, x):
    """The uniform network at ``NARROW`` of the MACs."""
    groups = find_groups(model, x).select("inner")
    cost = CostModel(model, groups, x)
    widths = uniform_widths(groups, Budget("macs", NARROW), cost, cost)
    return resize(model, groups, {n: keep(torch.arange(w)) for n, w in widths.items()})


def runs(seeds: int) -> list[dict]:
    """Val accuracy of each run; None where it died."""
    rows = []
    for network, dataset in itertools.product(NETWORKS, DATASETS):
        name, epochs = NETWORKS[network]
        for seed in range(100, 100 + seeds):
            data = splits.load(dataset, 28, seed=seed, val=0.1)
            for rate, clip, narrow in itertools.product(RATES, CLIPS, (False, True)):
                changes = {"epochs": epochs, "lr": rate, "clip": clip}
                recipe = recipes.load(name).recipe.model_copy(update=changes)
                model = models.create(network, classes=10, channels=1, size=28, seed=seed)
                model = narrowed(model, torch.zeros(1, 1, 28, 28)) if narrow else model
                row = {"network": network, "dataset": dataset, "seed": seed, "narrow": narrow}
                row |= {"lr": rate, "clip": clip}
                try:
                    fit(model, data.train, recipe, macs=1, seed=seed)
                    row["val_top1"] = accuracy(model, data.val).top1
                except DivergedError:
                    row["val_top1"] = None
                rows.append(row)
                print(row, flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Means by setting, and how many runs died."""
    lines = []
    for network, rate, clip in itertools.product(NETWORKS, RATES, CLIPS):
        mine = [r for r in rows if (r["network"], r["lr"], r["clip"]) == (network, rate, clip)]
        cells = []
        for narrow in (False, True):
            known = [r["val_top1"] for r in mine if r["narrow"] == narrow and r["val_top1"]]
            cells.append(f"{sum(known) / len(known):.2f}" if known else "–")
        died = sum(r["val_top1"] is None for r in mine)
        lines.append([network, rate, clip or "none", *cells, f"{died} of {len(mine)}"])
    headers = ["network", "lr", "clip", "val top-1 %, whole", "at 1/32 of the MACs", "died"]
    return tabulate(lines, headers=headers, tablefmt="pipe")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = runs(options.seeds)
    print(table(rows))
    if options.write:
        text = (
            f"# Recipes of the LeNets\n\n{(__doc__ or '').strip()}\n\n{table(rows)}\n\n{where()}\n"
        )
        write_atomic(options.write.with_suffix(".md"), text)
        write_atomic(
            options.write.with_suffix(".jsonl"), "".join(f"{json.dumps(r)}\n" for r in rows)
        )


if __name__ == "__main__":
    main()
