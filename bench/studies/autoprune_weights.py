"""AutoPrune weight by weight, as its paper has it: each weight of LeNet-300-100 and LeNet-5 has an
auxiliary parameter.

    python bench/studies/autoprune_weights.py [--write results/published/autoprune-weights]

On MNIST, from a trained network. Half of the training images train weights, 25,000 others the
auxiliary parameters (there are so many that 6,000 images are learnt by heart), and the last 5,000
are val, by which runs are held against each other. Steps alternate between a batch for the
auxiliary parameters, ``m ← m - η (s / ρ + μ) ĥ'(m)``, ``s = ∂L/∂t · sgn(w)``, ρ the running root
mean square of s, and a batch for the weights; after three quarters of the steps gates stay as they
are. Swept is μ, so that rules are held against each other at equal accuracy or at
equal compression (weights over open weights, biases left out). Variants: two more straight-through
estimators; the gradient in place of the rule ("coupled", ``s = ∂L/∂t · w``); weight decay; gates
that drift by noise of the same size alone. Writes FILE.md, FILE.png and FILE.jsonl, in which seeds
that are not run again stay.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from widthbench.methods.autoprune import MEMORY, START, derivative, updated

from widthbench.data import splits
from widthbench.data.samples import Passes
from widthbench.experiment import recipes
from widthbench.networks import models
from widthbench.paths import write_atomic
from widthbench.recipe import Recipe
from widthbench.report.curves import save
from widthbench.report.speed import where
from widthbench.technique.trajectory import Returns
from widthbench.training.loop import fit
from widthbench.training.measuring import accuracy
from widthbench.training.state import steps_of

SEEDS = tuple(range(10))  # of which claims are judged on the last five
NETWORKS = {"lenet_300_100": (15, 10.0), "lenet5": (6, 8.0)}  # epochs of the base, of gates
HELD_OUT = 5000  # of the half that trains no weights
RATES = {"lr": 0.02, "batch_size": 128, "weight_decay": 0.0, "clip": 1.0}
ETA, FREEZE, CLOSED, POINTS = 0.05, 0.75, 25, 20
MUS = (0.05, 0.1, 0.2, 0.4, 0.8)
MILDER = {"noise": (0.0125, 0.025, 0.05)}  # at more than that these networks end at chance
RULE = {"estimator": "softplus", "decoupling": "sgn", "weight_decay": 0.0, "noise": False}
VARIANTS = {
    "rule": {},
    "leaky ReLU": {"estimator": "leaky_relu"},
    "linear": {"estimator": "linear"},
    "coupled": {"decoupling": "none"},
    "decay 5e-3": {"weight_decay": 5e-3},
    "noise": {"noise": True},
}
ONLY = {"lenet5": ("rule",)}  # the others on LeNet-300-100 alone
FEWER = {"lenet5": 3}  # seeds
NEAR = 1.0  # points of val accuracy, of "converged"
ALIVE = 10.0  # points of val accuracy, of which a network that lost more says nothing


class Gate(nn.Module):
    """A layer's weights times their gates; the product is kept, to differentiate by."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("open", torch.ones_like(weight), persistent=False)
        self.product: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """``w h``."""
        self.product = weight * self.open
        return self.product


class Weights:
    """Auxiliary parameters of all weights of a network, in one vector, and what is told of them.

    Attributes:
        m: Auxiliary parameters.
        cosine: The least cosine so far between the update and the gradient by them, and the least
            product of the two at one weight over the largest by magnitude.
    """

    def __init__(
        self, model: nn.Module, data: splits.Data, recipe: Recipe, mu: float, seed: int, **rule
    ):
        self.rule, self.mu, self.held_out = {**RULE, **rule}, mu, part(data, slice(HELD_OUT))
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.gates = [Gate(layer.weight) for layer in self.layers]
        for layer, gate in zip(self.layers, self.gates, strict=True):
            parametrize.register_parametrization(layer, "weight", gate)
        self.sizes = [g.open.numel() for g in self.gates]
        self.m = torch.full((sum(self.sizes),), START)
        self.returns = Returns(self.m, CLOSED)
        self.val = Passes(part(data, slice(HELD_OUT, None)), recipe.batch_size, seed)
        self.total = steps_of(recipe, len(data.train))[1]
        self.draw = torch.Generator().manual_seed(seed)
        self.step, self.square = 0, torch.zeros(())
        self.cosine, self.product, self.series = 1.0, 1.0, []

    def state_dict(self) -> dict:
        """Nothing is resumed here."""
        return {}

    @property
    def open(self) -> Tensor:
        """The gates, one vector."""
        return torch.cat([g.open.flatten() for g in self.gates])

    def losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """A step of the auxiliary parameters, and the loss for one of the weights."""
        if self.step < FREEZE * self.total:
            self.learn(model)
        yield F.cross_entropy(model(x), y)
        self.step += 1
        if self.step % (self.total // POINTS) == 0:
            score = accuracy(model, self.held_out).top1
            model.train()
            self.series.append((self.step, score, float(self.open.mean())))

    def learn(self, model: nn.Module) -> None:
        """One step on a batch of val."""
        x, y = self.val.batch(self.step)
        loss = F.cross_entropy(model(x), y)
        slopes = torch.autograd.grad(loss, [g.product for g in self.gates])
        t = torch.cat([s.flatten() for s in slopes])
        w = torch.cat([p.parametrizations.weight.original.detach().flatten() for p in self.layers])
        s = t * (w.sign() if self.rule["decoupling"] == "sgn" else w)
        slope = derivative(self.m, self.rule["estimator"])
        update, gradient = s * slope, t * w * slope
        self.cosine = min(self.cosine, float(F.cosine_similarity(update, gradient, dim=0)))
        inner = update * gradient
        self.product = min(self.product, float(inner.min() / inner.abs().max().clamp_min(1e-30)))
        self.square = MEMORY * self.square + (1 - MEMORY) * s.square().mean()
        scale = (self.square / (1 - MEMORY ** (self.step + 1))).sqrt()
        if self.rule["noise"]:
            s = scale * torch.randn(s.shape, generator=self.draw)
        self.m = updated(self.m, s / scale, self.mu, ETA, self.rule["estimator"])
        for gate, part in zip(self.gates, self.m.split(self.sizes), strict=True):
            gate.open.copy_((part > 0).view_as(gate.open))
        self.returns.note(self.open)


def part(data: splits.Data, which: slice) -> splits.ImageSamples:
    """Some of the images that train no weights."""
    return replace(data.val, images=data.val.images[which], labels=data.val.labels[which])


def base(network: str, seed: int):
    """(trained network, data, its val and test accuracy)."""
    data = splits.load("mnist", 28, seed=seed, val=0.5)
    epochs, _ = NETWORKS[network]
    recipe = recipes.load(network).recipe.model_copy(update={"epochs": epochs, "clip": 1.0})
    model = models.create(network, classes=10, channels=1, size=28, seed=seed)
    fit(model, data.train, recipe, macs=1, seed=seed)
    val = accuracy(model, part(data, slice(HELD_OUT))).top1
    return model, data, val, accuracy(model, data.test).top1


def pruned(network: str, start, variant: str, mu: float, seed: int) -> dict:
    """One run."""
    model, data, val, test = start
    net = copy.deepcopy(model)
    rule = VARIANTS[variant]
    changes = {**RATES, "weight_decay": rule.get("weight_decay", 0.0)}
    recipe = Recipe(epochs=NETWORKS[network][1], **changes)
    gates = Weights(net, data, recipe, mu, seed, **rule)
    fit(net, data.train, recipe, macs=1, seed=seed, losses=gates.losses)
    open_ = gates.open
    known = gates.returns.counts(open_)
    steps, scores, shares = (list(v) for v in zip(*gates.series, strict=True))
    last = accuracy(net, gates.held_out).top1
    below = [i for i, score in enumerate(scores) if score < last - NEAR]
    return {
        "network": network,
        "seed": seed,
        "variant": variant,
        "mu": mu,
        "base_val_top1": val,
        "base_top1": test,
        "val_top1": last,
        "top1": accuracy(net, data.test).top1,
        "compression": len(open_) / max(1.0, float(open_.sum())),
        "cosine": gates.cosine,
        "product": gates.product,
        **known,
        "converged": steps[min(below[-1] + 1, len(steps) - 1) if below else 0],
        "scores": [round(v, 3) for v in scores],
        "open": [round(v, 5) for v in shares],
    }


def draw(rows: list[dict], path: Path) -> Path:
    """Test accuracy against compression, by network and variant, all seeds; networks that have lost
    ten points are left out.
    """
    rows = [r for r in rows if r["val_top1"] >= r["base_val_top1"] - ALIVE]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, network in zip(figure.subplots(1, 2), NETWORKS, strict=True):
        mine = [r for r in rows if r["network"] == network]
        for i, variant in enumerate(v for v in VARIANTS if any(r["variant"] == v for r in mine)):
            some = [r for r in mine if r["variant"] == variant]
            at = [[r for r in some if r["mu"] == mu] for mu in sorted({r["mu"] for r in some})]
            x = [np.exp(np.mean([np.log(r["compression"]) for r in s])) for s in at if s]
            y = [np.mean([100 - r["top1"] for r in s]) for s in at if s]
            axes.plot(x, y, color=f"C{i}", marker="osv^Dx"[i], markersize=4, label=variant)
            axes.scatter(
                [r["compression"] for r in some],
                [100 - r["top1"] for r in some],
                s=4,
                color=f"C{i}",
                alpha=0.4,
            )
        error = np.mean([100 - r["base_top1"] for r in mine])
        axes.axhline(error, color="0.6", linestyle=":", label="before")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("weights / open weights")
        axes.set_ylabel("test error, %")
        axes.set_title(f"{network}, MNIST", fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    return save(figure, path)


def table(rows: list[dict]) -> str:
    """Means over seeds by network, variant and μ."""
    lines = []
    keys = {(r["network"], r["variant"], r["mu"]) for r in rows}
    for key in sorted(keys, key=lambda k: (k[0], list(VARIANTS).index(k[1]), k[2])):
        some = [r for r in rows if (r["network"], r["variant"], r["mu"]) == key]
        columns = ("compression", "val_top1", "top1", "cosine", "recoveries", "returned")
        dead = sum(r["val_top1"] < r["base_val_top1"] - ALIVE for r in some)
        means = (f"{np.mean([r[c] for r in some]):.4g}" for c in columns)
        lines.append([*key, *means, len(some), dead or ""])
    headers = ["network", "variant", "μ", "compression", "val top-1 %", "test top-1 %"]
    headers += ["least cosine", "recoveries", "open again at the end", "n", "lost ten points"]
    return tabulate(lines, headers=headers, tablefmt="pipe")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N")
    parser.add_argument("--mu", type=float, nargs="+", default=MUS)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict] = []
    kept = options.write and options.write.with_suffix(".jsonl")
    if kept and kept.is_file():  # other seeds than those that are run
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
        rows = [r for r in rows if r["seed"] not in options.seeds]
    for seed in options.seeds:
        for network in options.networks:
            if seed >= FEWER.get(network, seed + 1):
                continue
            start = base(network, seed)
            for variant in ONLY.get(network, VARIANTS):
                for mu in MILDER.get(variant, options.mu):
                    rows.append(pruned(network, start, variant, mu, seed))
                    brief = {k: v for k, v in rows[-1].items() if not isinstance(v, list)}
                    print(brief, flush=True)
        if options.write:
            lines = "".join(f"{json.dumps(r)}\n" for r in rows)
            write_atomic(options.write.with_suffix(".jsonl"), lines)
    print(table(rows))
    if options.write:
        image = draw(rows, options.write.with_suffix(".png"))
        text = f"# AutoPrune, weight by weight\n\n{(__doc__ or '').strip()}\n\n![error against"
        text += f" compression]({image.name})\n\n{table(rows)}\n\n{where()}\n"
        write_atomic(options.write.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
