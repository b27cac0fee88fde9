"""One setting for each technique, chosen by val, at most four tried for each.

    python bench/studies/tuning.py [--write results/tuning] [--seeds 2]

LeNet-300-100 on MNIST at 1/16 of the MACs, on seeds that no suite has (100, 101, ...), fine-tuned
as in the suite ``lenets``. Test data are not looked at. What a technique has no setting for is not
tried: there are fewer than four then. Writes FILE.md and FILE.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from tabulate import tabulate

from widthbench.experiment import suites
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store
from widthbench.paths import write_atomic
from widthbench.report.speed import where

BUDGET, NETWORK, DATASET = "macs:0.0625", "lenet_300_100", "mnist"
TRIED: dict[str, list[dict]] = {
    "l1-norm": [{}, {"allocation": "global"}],
    "neuron-merging": [{"threshold": t} for t in (0.3, 0.45, 0.6, 0.75)],
    "nmf": [{"signed": True}, {"signed": True, "spread": 0.01}, {"signed": True, "spread": 0.2}],
    "neuron-removal": [
        {"ranking": "oracle", "rerank": rerank, "allocation": allocation}
        for rerank in ("single", "iterative")
        for allocation in ("uniform", "global")
    ],
    "torch-pruning:taylor": [
        {"samples": samples, "allocation": allocation}
        for samples in (256, 4096)
        for allocation in ("uniform", "global")
    ],
    "autoprune": [{"epochs": 8, "eta": eta} for eta in (0.03, 0.1, 0.3)]
    + [{"epochs": 8, "start": "fresh"}],
    "autoslim": [
        {"epochs": 6, "final_epochs": 4, "final": final, "narrowest": narrowest}
        for final in ("slimmable", "fresh")
        for narrowest in (0.1, 0.03)
    ],
    "splitting": [{"epochs": 2, "epsilon": e} for e in (0.01, 0.1, 0.3)]
    + [{"epochs": 2, "begin": 0.05}],
}


def runs(seeds: int) -> list[dict]:
    """Val accuracy of each run; None where it failed."""
    suite = suites.load("lenets")
    like = next(
        c
        for c in suite.cells()
        if (c.model, c.dataset, c.budget) == (NETWORK, DATASET, BUDGET) and c.technique == "l1-norm"
    )
    rows = []
    for technique, tried in TRIED.items():
        for params in tried:
            for seed in range(100, 100 + seeds):
                changes = {"technique": technique, "params": params, "seed": seed, "trials": 1}
                record = run_cell(like.model_copy(update=changes), Store())
                row = {"technique": technique, "params": params, "seed": seed}
                row["val_top1"] = record.rows[-1].val_top1 if record.rows else None
                row["reason"] = record.reason
                rows.append(row)
                print(row, flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Means by setting; the best of each technique in bold, of those under which no run failed."""
    lines = []
    for technique, tried in TRIED.items():
        means: list[float | None] = []
        for params in tried:
            mine = [r for r in rows if (r["technique"], r["params"]) == (technique, params)]
            values = [r["val_top1"] for r in mine]
            means.append(None if None in values else statistics.fmean(values))
        best = max(m for m in means if m is not None)
        for params, mean in zip(tried, means, strict=True):
            inside = ", ".join(f"{k} = {v}" for k, v in params.items()) or "defaults"
            shown = "failed" if mean is None else f"{mean:.2f}"
            lines.append([technique, inside, f"**{shown}**" if mean == best else shown])
    headers = ["technique", "setting", "val top-1 %"]
    align = ("left", "left", "right")
    return tabulate(lines, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)


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
            f"# Settings of techniques\n\n{(__doc__ or '').strip()}\n\n{table(rows)}\n\n{where()}\n"
        )
        write_atomic(options.write.with_suffix(".md"), text)
        lines = "".join(f"{json.dumps(r)}\n" for r in rows)
        write_atomic(options.write.with_suffix(".jsonl"), lines)


if __name__ == "__main__":
    main()
