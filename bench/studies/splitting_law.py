"""Splitting where gradient descent is stuck: the fall of the loss against ε² λ_min / 2, and a small
network that grows.

    python bench/studies/splitting_law.py [--write results/published/splitting-law]

A regression on one dimension in float64: tanh neurons on a sum of sines. Writes FILE.md, FILE.png
and FILE.jsonl. Takes two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from widthbench.methods.splitting import split_neurons

from widthbench.paths import write_atomic
from widthbench.report.curves import save
from widthbench.report.speed import where
from widthbench.sensitivity.ablation import Sample
from widthbench.sensitivity.splitting_matrices import SplittingMatrices
from widthbench.width import find_groups

EPSILONS = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
NEURONS = 8
STEPS = 3000
SEEDS = (0, 1, 2, 3, 4)


def problem(seed: int):
    """(one tanh neuron, a sum of sines at 100 points)."""
    torch.manual_seed(seed)
    x = torch.linspace(-3, 3, 100, dtype=torch.float64)[:, None]
    one, other = torch.rand(2, dtype=torch.float64) * 6
    y = torch.sin(x + one) + 0.5 * torch.sin(2.5 * x + other)
    return network(1), Sample(x, y, lambda out, target: (out - target).square().mean(dim=1))


def network(neurons: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, neurons), nn.Tanh(), nn.Linear(neurons, 1)).double().eval()


def loss_of(model, sample: Sample) -> torch.Tensor:
    return sample.criterion(model(sample.x), sample.y).mean()


def descend(model, sample: Sample, steps: int, origins: Sequence[int] = ()) -> list[float]:
    """Losses along gradient descent with momentum; neurons of one origin stay copies of each other
    (their slopes are the same but for rounding, which momentum would let part them).
    """
    share = torch.tensor(origins)[:, None] == torch.tensor(origins) if origins else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, sample)
        loss.backward()
        optimizer.step()
        if share is not None:
            mean = share.double() / share.sum(dim=1, keepdim=True)
            with torch.no_grad():
                for p in (model[0].weight, model[0].bias):
                    p.copy_(mean @ p)
                model[2].weight.copy_(model[2].weight @ mean)
        losses.append(float(loss.detach()))
    return losses


def to_the_minimum(model, sample: Sample) -> float:
    """Train until the slope is gone; its norm."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=2000,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, sample)
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    return float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())


def law(seed: int) -> list[dict]:
    """Falls of the loss of a stuck network after a split, by ε, beside the law's."""
    model, sample = problem(seed)
    descend(model, sample, STEPS)
    slope = to_the_minimum(model, sample)
    groups = find_groups(model, sample.x[:1], cache=False)
    values, vectors = SplittingMatrices(model, groups, sample).smallest_exactly("0")
    rows = []
    with torch.no_grad():
        before = float(loss_of(model, sample))
        for epsilon in EPSILONS:
            split = split_neurons(model, groups, {"0": (torch.tensor([0]), vectors)}, epsilon)
            fall = before - float(loss_of(split, sample))
            rows.append(
                {
                    "what": "law",
                    "seed": seed,
                    "slope": slope,
                    "loss": before,
                    "lambda": float(values[0]),
                    "epsilon": epsilon,
                    "fall": fall,
                    "law": -(epsilon**2) * float(values[0]) / 2,
                }
            )
    return rows


def grow(seed: int, select: str) -> list[float]:
    """Losses of a network that grows by one neuron a round: split by the law, along a random
    direction, at ε = 0 as tied copies, or not at all.
    """
    model, sample = problem(seed)
    losses: list[float] = []
    origins = [0]  # of copies
    draw = torch.Generator().manual_seed(seed)
    for neurons in range(1, NEURONS + 1):
        losses += descend(model, sample, STEPS, origins if select == "copies" else ())
        if select == "none" or neurons == NEURONS:
            continue
        groups = find_groups(model, sample.x[:1], cache=False)
        values, vectors = SplittingMatrices(model, groups, sample).smallest_exactly("0")
        row = int(values.argmin())
        if select == "random":
            row = int(torch.randint(neurons, (), generator=draw))
            vectors = F.normalize(
                torch.randn(vectors.shape, generator=draw, dtype=torch.float64), dim=1
            )
        origins.append(origins[row])
        epsilon = 0.0 if select == "copies" else 0.05
        model = split_neurons(
            model, groups, {"0": (torch.tensor([row]), vectors[row : row + 1])}, epsilon
        )
    return losses


def draw(rows: list[dict], curves: dict[str, list[list[float]]], path: Path) -> Path:
    """Left: the fall over the law's, against ε. Right: losses of the networks that grow."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for seed in SEEDS:
        some = [r for r in rows if r["seed"] == seed]
        left.plot(
            [r["epsilon"] for r in some],
            [r["fall"] / r["law"] for r in some],
            marker="o",
            markersize=3,
            label=f"seed {seed}",
        )
    left.axhspan(0.9, 1.1, color="0.9")
    left.set_xscale("log")
    left.set_xlabel("ε")
    left.set_ylabel("fall of the loss / (ε² |λ_min| / 2)")
    left.set_title("One neuron at a minimum of its loss, split", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    names = {
        "eigen": "split along the eigenvector",
        "random": "a random neuron, a random direction",
        "copies": "copied as they are (ε = 0, tied)",
        "none": "not split",
    }
    for select, color in (("eigen", "C0"), ("random", "C1"), ("copies", "C2"), ("none", "0.5")):
        values = np.array(curves[select])
        middle = np.median(values, axis=0)
        steps = np.arange(len(middle))
        right.plot(steps, middle, color=color, linewidth=1.2, label=names[select])
        right.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0
        )
    right.set_yscale("log")
    right.set_xlabel(f"steps of gradient descent; one more neuron every {STEPS}")
    right.set_ylabel("mean squared error")
    right.set_title(
        f"From 1 to {NEURONS} neurons; median and range of {len(SEEDS)} seeds", fontsize=10
    )
    right.legend(fontsize=8, frameon=False)
    for place in (left, right):
        place.grid(alpha=0.3)
    return save(figure, path)


PAGE = """# Splitting where gradient descent is stuck

`python bench/studies/splitting_law.py --write results/published/splitting-law`: regression on sin(x
+ a) + sin(2.5 x + b) / 2 at 100 points, a and b by seed, tanh neurons, float64. One neuron is
trained until its slope is gone (*slope*: its norm), then split along the unit eigenvector of λ_min:
fall of the loss over ε² |λ_min| / 2, by ε.

{table}

![fall of the loss over the law's, and losses of networks that grow]({figure})

Final mean squared error with {neurons} neurons after {steps} steps, median and range of {seeds}
seeds: {finals}.

{where}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--write", metavar="FILE", help="write FILE.md, FILE.png and FILE.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in SEEDS for row in law(seed)]
    lines = []
    for seed in SEEDS:
        some = [r for r in rows if r["seed"] == seed]
        ratios = [f"{r['fall'] / r['law']:.3f}" for r in some]
        lines.append(
            [
                seed,
                f"{some[0]['loss']:.4f}",
                f"{some[0]['slope']:.1e}",
                f"{some[0]['lambda']:.5f}",
                *ratios,
            ]
        )
    headers = ["seed", "loss", "slope", "λ_min", *(f"ε = {e:g}" for e in EPSILONS)]
    table = tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)
    print(table)
    curves = {
        select: [grow(seed, select) for seed in SEEDS]
        for select in ("eigen", "random", "copies", "none")
    }
    finals = {s: sorted(c[-1] for c in many) for s, many in curves.items()}
    texts = [f"{s} {np.median(v):.2e} ({v[0]:.2e} to {v[-1]:.2e})" for s, v in finals.items()]
    print("; ".join(texts))
    if options.write:
        path = Path(options.write)
        rows += [
            {"what": "final", "select": s, "losses": [c[-1] for c in many]}
            for s, many in curves.items()
        ]
        write_atomic(path.with_suffix(".jsonl"), "".join(json.dumps(r) + "\n" for r in rows))
        figure = draw([r for r in rows if r["what"] == "law"], curves, path.with_suffix(".png"))
        page = PAGE.format(
            table=table,
            figure=figure.name,
            neurons=NEURONS,
            steps=NEURONS * STEPS,
            seeds=len(SEEDS),
            finals="; ".join(texts),
            where=where(),
        )
        write_atomic(path.with_suffix(".md"), page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
