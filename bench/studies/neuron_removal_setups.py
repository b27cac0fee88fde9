"""Neuron removal in the set-ups of its authors (Sharma, Wolfe and Raj): ten digits, one digit
against the rest, a cosine.

    python bench/studies/neuron_removal_setups.py [--seeds 10] [--write FILE]
    python bench/studies/neuron_removal_setups.py --seeds 10 --from 10 --ten-digits FILE
    python bench/studies/neuron_removal_setups.py --surfaces FILE

MNIST must be in WIDTHBENCH_DATA. Writes FILE.md, FILE.jsonl, FILE.png and FILE-more.png; the second
call writes FILE.jsonl alone, of other seeds and the ten digits alone, for claims whose rules were
written after the first seeds were known. The third writes FILE.md and FILE.png: the error as a
neuron's output is turned down, and what both approximations make of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import MNIST

from widthbench.paths import data_dir, write_atomic
from widthbench.report.curves import save
from widthbench.report.speed import where
from widthbench.report.style import COLOURS
from widthbench.sensitivity.ablation import Ablation, Sample
from widthbench.sensitivity.backprop_diagonal import BackpropDiagonal
from widthbench.sensitivity.derivatives import GateDerivatives
from widthbench.technique.removal import (
    Scores,
    after,
    candidates,
    open_gates,
    remove,
    removed,
    unfinished,
    untouched,
)
from widthbench.width import find_groups
from widthbench.width.groups import Groups

IMAGES = 5000
FEWER = 5  # seeds of one digit against the rest, the slowest
LOST = (0.5, 2.0)  # points of accuracy
FLAT = 0.00125  # mean squared error on the cosine: 1 % of what its mean gives
RANKINGS = ("brute force", "first order", "second order")
RERANKS = ("single", "iterative")
BEST = f"{RANKINGS[0]}, {RERANKS[1]}"
SHARES = range(10, 100, 10)  # % removed, of joint and summed
MIB = 256  # the first layer's outputs for 60,000 images
Changes = Callable[[Scores], Scores]


def sigmoid_error(logits: Tensor, y: Tensor) -> Tensor:
    """Squared error of logistic sigmoid outputs, summed over the outputs: ``[B, K]`` twice to
    ``[B]``.
    """
    return (logits.sigmoid() - y).square().sum(dim=1)


def softmax_error(logits: Tensor, y: Tensor) -> Tensor:
    """Likewise of softmax outputs."""
    return (logits.softmax(dim=1) - y).square().sum(dim=1)


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    """1 where the largest output is another than the target's, else 0."""
    return (logits.argmax(dim=1) != y.argmax(dim=1)).to(logits.dtype)


def network(*widths: int) -> nn.Sequential:
    """Sigmoid layers; the outputs' own function is part of the criterion."""
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def fit(model: nn.Module, sample: Sample, lr: float, epochs: int, batch: int) -> nn.Module:
    """Adam, its learning rate falling to 0 along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * math.ceil(len(sample) / batch)
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(sample)).split(batch):
            optimizer.zero_grad()
            sample.criterion(model(sample.x[rows]), sample.y[rows]).mean().backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def fit_closely(model: nn.Module, sample: Sample, steps: int) -> nn.Module:
    """L-BFGS, on all points at once."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        max_eval=2 * steps,
        tolerance_grad=1e-12,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sample.criterion(model(sample.x), sample.y).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.eval()


def mnist(train: bool) -> tuple[Tensor, Tensor]:
    """(images ``[N, 28, 28]`` of 0 to 255, digits ``[N]``)."""
    data = MNIST(str(data_dir()), train=train)
    return data.data.float(), data.targets


def shrunk(images: Tensor) -> Tensor:
    """To 20 x 20 pixels in [0, 1], as vectors."""
    small = F.interpolate(images[:, None] / 255, size=20, mode="bilinear", antialias=True)
    return small.flatten(1).clamp(0, 1)


def by_ranking(ranking: str, model: nn.Module, groups: Groups, brute: Ablation) -> Changes:
    """A function from what was removed so far to what each further removal does to the error, true
    or predicted.
    """
    like = brute.sample.x
    if ranking == "brute force":

        def true(order: Scores) -> Scores:
            here = candidates(order, groups)
            losses = brute.losses(open_gates(order, like), here)
            return {
                n: torch.full_like(o, math.inf).index_copy(0, here[n], losses[n])
                for n, o in order.items()
            }

        return true
    slopes = GateDerivatives(model, groups, brute.sample)
    curvature = BackpropDiagonal(model, groups, brute.sample) if ranking == RANKINGS[2] else None

    def predicted(order: Scores) -> Scores:
        gates = open_gates(order, like)
        changes = {n: -d for n, d in slopes.first(gates).items()}
        if curvature is None:
            return changes
        second = curvature.second(gates)
        return {n: d + 0.5 * second[n] for n, d in changes.items()}

    return predicted


def order_by(changes: Changes, groups: Groups, rerank: str) -> Scores:
    """Which neuron goes when, until each layer is left with one."""
    order = untouched(groups)
    while unfinished(order, groups):
        remove(order, changes(order), groups, 1 if rerank == "iterative" else None)
    return order


def along(order: Scores, brute: Ablation) -> list[float]:
    """The mean of a sample's criterion after 0, 1, 2, ... removals."""
    like = brute.sample.x
    return [brute.loss(open_gates(after(order, k), like)) for k in range(removed(order) + 1)]


def accuracies(order: Scores, brute: Ablation) -> list[float]:
    """In %, of a sample whose criterion is ``wrong``."""
    return [round(100 * (1 - w), 6) for w in along(order, brute)]


def last(values: Sequence[float], holds: Callable[[float], bool]) -> int:
    """The most removals after which it holds; 0 if it never does."""
    return max((k for k, v in enumerate(values) if holds(v)), default=0)


def until(values: Sequence[float], holds: Callable[[float], bool]) -> int:
    """Removals before the first one after which it does not hold."""
    return next((k for k, v in enumerate(values[1:]) if not holds(v)), len(values) - 1)


def healed(errors: Sequence[float], ceiling: float = math.inf) -> float:
    """Which part of all rises of the error later removals undo.

    Falls count as far as they undo rises before them. The curve counts until it first exceeds the
    ceiling: beyond the error of a constant output, no network is left that could heal.
    """
    errors = errors[: 1 + until(errors, lambda e: e <= ceiling)]
    rise = undone = standing = 0.0
    for a, b in pairwise(errors):
        fall = min(standing, max(0.0, a - b))
        rise, undone = rise + max(0.0, b - a), undone + fall
        standing += max(0.0, b - a) - fall
    return undone / rise if rise else 0.0


def joint_and_summed(order: Scores, changes: Changes, brute: Ablation) -> tuple[Tensor, Tensor]:
    """Increase of the error after the first k neurons of an order have gone together, and the sum
    of what each of them alone does: ``[U+1]`` each.

    ``changes`` is that of brute force.
    """
    joint = torch.tensor(along(order, brute), dtype=torch.float64)
    alone = torch.zeros_like(joint)
    for name, closed in changes(untouched(brute.groups)).items():
        gone = order[name].isfinite()
        alone[order[name][gone].long() + 1] = (closed - joint[0])[gone]
    return joint - joint[0], alone.cumsum(0)


def rounded(values: Sequence[float] | Tensor) -> list[float]:
    return [float(f"{float(v):.6g}") for v in values]


def for_ten_digits(seed: int, widths: tuple[int, ...], data, epochs: int = 250):
    """(trained network, the images that it was trained on); ``data`` as for ``ten_digits``."""
    torch.manual_seed(seed)
    x, digits, *_ = data
    rows = torch.randperm(len(x))[:IMAGES]
    own = Sample(x[rows], F.one_hot(digits[rows], 10).float(), sigmoid_error)
    return fit(network(x.shape[1], *widths, 10), own, 0.01, epochs, 100), own


def for_the_cosine(seed: int, width: int, steps: int = 3000):
    """(fitted network, its points)."""
    torch.manual_seed(seed)
    x = torch.linspace(-math.pi, math.pi, 200, dtype=torch.float64)[:, None]
    sample = Sample(x, (1 + x.cos()) / 2, sigmoid_error)  # a logistic output lies in 0 to 1
    return fit_closely(network(1, width, width, 1).double(), sample, steps), sample


def ten_digits(seed: int, widths: tuple[int, ...], data, epochs: int = 250) -> dict:
    """A network for ten digits: all rankings, joint and summed, faults that heal.

    ``data`` is (training vectors, their digits, held-out vectors, their digits).
    """
    model, own = for_ten_digits(seed, widths, data, epochs)
    *_, other, others = data
    rest = Sample(other, F.one_hot(others, 10).float(), wrong)
    groups = find_groups(model, own.x[:1], cache=False)
    neurons = sum(widths)
    brute = Ablation(model, groups, own)
    judges = {
        "own": Ablation(model, groups, Sample(own.x, own.y, wrong)),
        "held out": Ablation(model, groups, rest),
    }
    share = own.y.mean(dim=0)
    constant = float((share * (1 - share)).sum())
    row: dict = {
        "setup": "ten digits",
        "network": " x ".join(map(str, (len(widths), widths[0]))),
        "seed": seed,
        "constant": constant * len(own),
        "curves": {},
        "removable": {},
        "healed": {},
    }
    for ranking in RANKINGS:
        changes = by_ranking(ranking, model, groups, brute)
        for rerank in RERANKS:
            order = order_by(changes, groups, rerank)
            name = f"{ranking}, {rerank}"
            error = along(order, brute)
            scores = {j: accuracies(order, judge) for j, judge in judges.items()}
            row["curves"][name] = {"error": rounded([e * len(own) for e in error]), **scores}
            row["removable"][name] = {
                f"{j}, {lost:g}": 100
                * last(scores[j], lambda v, a=scores[j][0] - lost: v >= a - 1e-9)
                / neurons
                for j in judges
                for lost in LOST
            }
            row["healed"][name] = healed(error, constant)
    changes = by_ranking(RANKINGS[0], model, groups, brute)
    at = [round(s * neurons / 100) for s in SHARES]
    for rerank in RERANKS:
        pair = joint_and_summed(order_by(changes, groups, rerank), changes, brute)
        row[rerank] = {
            k: rounded(v[at] * len(own)) for k, v in zip(("joint", "summed"), pair, strict=True)
        }
    return row


def one_digit(seed: int, digit: int, data, epochs: int = 3) -> dict:
    """A network that tells one digit from the rest: iterative brute force."""
    torch.manual_seed(100 * digit + seed)
    x, digits, other, others = data
    own = Sample(x, F.one_hot((digits == digit).long(), 2).float(), softmax_error)
    rest = Sample(other, F.one_hot((others == digit).long(), 2).float(), wrong)
    model = fit(network(x.shape[1], 100, 2), own, 1e-3, epochs, 200)
    groups = find_groups(model, x[:1], cache=False)
    brute = Ablation(model, groups, own, memory_mib=MIB)
    order = order_by(by_ranking(RANKINGS[0], model, groups, brute), groups, "iterative")
    error = along(order, brute)
    return {
        "setup": "one digit",
        "network": "1 x 100",
        "digit": digit,
        "seed": seed,
        "error": rounded([e * len(own) for e in error]),
        "held out": accuracies(order, Ablation(model, groups, rest)),
        "fall": rounded([100 * (1 - e / error[0]) for e in error[:11]]),
        "below": until(error, lambda e: e <= error[0]),
    }


def cosine(seed: int, width: int, steps: int = 3000) -> dict:
    """Two layers fitted to one period of a cosine: iterative brute force."""
    model, sample = for_the_cosine(seed, width, steps)
    groups = find_groups(model, sample.x[:1], cache=False)
    brute = Ablation(model, groups, sample)
    order = order_by(by_ranking(RANKINGS[0], model, groups, brute), groups, "iterative")
    error = along(order, brute)
    return {
        "setup": "cosine",
        "network": f"2 x {width}",
        "neurons": 2 * width,
        "seed": seed,
        "error": rounded(error),
        "flat": 100 * until(error, lambda e: e <= FLAT) / (2 * width),
        "needed": 2 * width - last(error, lambda e: e <= FLAT),
    }


def measure(seeds: Sequence[int], only: str = "") -> list[dict]:
    """All rows, or those of one set-up, with a line for each on the terminal."""
    rows: list[dict] = []
    begin = time.monotonic()

    def done(row: dict) -> None:
        rows.append(row)
        told = [str(row[k]) for k in ("setup", "network", "digit", "seed") if k in row]
        print(f"{time.monotonic() - begin:.0f} s: {', '.join(told)}", flush=True)

    (images, digits), (others, their) = mnist(True), mnist(False)
    data = shrunk(images), digits, shrunk(others), their
    whole = images.flatten(1), digits, others.flatten(1), their
    for seed in seeds:
        for width in (10, 25, 50) if only in ("", "cosine") else ():
            done(cosine(seed, width))
        for widths in ((100,), (50, 50)) if only in ("", "ten digits") else ():
            done(ten_digits(seed, widths, data))
        for digit in (0, 1, 2) if seed < FEWER and not only else ():
            done(one_digit(seed, digit, whole))
    return rows


def surfaces(path: Path) -> str:
    """A figure and its page: the error by a neuron's gate, its tangent and its parabola at 1."""
    (images, digits), shown = mnist(True), 4
    data = shrunk(images), digits
    made = {
        "ten digits, 1 x 100": for_ten_digits(0, (100,), data),
        "ten digits, 2 x 50": for_ten_digits(0, (50, 50), data),
        "cosine, 2 x 10": for_the_cosine(0, 10),
    }
    figure = Figure(figsize=(11.5, 8), layout="constrained")
    FigureCanvasAgg(figure)
    lines, gates = [], torch.linspace(0, 1, 41, dtype=torch.float64)
    for (title, (model, sample)), places in zip(
        made.items(), figure.subplots(3, shown), strict=True
    ):
        model = model.double()
        sample = Sample(sample.x.double(), sample.y.double(), sample.criterion)
        groups = find_groups(model, sample.x[:1], cache=False)
        brute = Ablation(model, groups, sample)
        whole = open_gates(untouched(groups), sample.x)
        start = brute.loss(whole)
        slope = GateDerivatives(model, groups, sample).first(whole)
        bend = BackpropDiagonal(model, groups, sample).second(whole)
        neurons = [(n, i) for n, g in groups.items() for i in range(g.channels)]
        true = brute.losses(whole, {n: torch.arange(g.channels) for n, g in groups.items()})
        exact = np.array([float(true[n][i]) - start for n, i in neurons])
        first = np.array([-float(slope[n][i]) for n, i in neurons])
        second = first + np.array([float(bend[n][i]) / 2 for n, i in neurons])
        lines.append(
            [title, *(f"{spearmanr(exact, p).statistic:.2f}" for p in (first, second))]
            + [f"{np.mean((p > 0) == (exact > 0)):.0%}" for p in (first, second)]
        )
        order = exact.argsort()
        for k, place in zip(np.linspace(0, len(order) - 1, shown).round(), places, strict=True):
            name, i = neurons[at := int(order[int(k)])]
            errors = []
            for gate in gates:
                turned = whole | {name: whole[name].index_fill(0, torch.tensor([i]), float(gate))}
                errors.append(brute.loss(turned) - start)
            away = (1 - gates).numpy()
            bent = away * first[at] + away**2 * (second - first)[at]
            for values, colour, style, label in (
                (errors, "0.2", "-", "true"),
                (away * first[at], COLOURS[1], "--", "first order"),
                (bent, COLOURS[2], "-.", "second order"),
            ):
                place.plot(gates, values, color=colour, linestyle=style, label=label)
            place.axhline(0, color="0.7", linewidth=0.6)
            place.grid(alpha=0.3)
            nth = f"neuron {int(k) + 1} of {len(order)} by the true rise"
            place.set_title(f"{title}\n{nth}", fontsize=9)
        places[0].set_ylabel("rise of the mean squared error")
    for place in places:
        place.set_xlabel("gate on the neuron's output")
    figure.axes[0].legend(fontsize=9, frameon=False)
    image = save(figure, path.with_suffix(".png"))
    headers = ["network", "rank correlation, 1st", "2nd", "sign right, 1st", "2nd"]
    table = tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)
    return SURFACES.format(image=image.name, table=table, where=where())


def curves(rows: list[dict], path: Path) -> Path:
    """Ten digits: error and accuracies along every ranking, means and ranges over seeds."""
    figure = Figure(figsize=(11.5, 8), layout="constrained")
    FigureCanvasAgg(figure)
    columns = [(n, r) for n in ("1 x 100", "2 x 50") for r in RERANKS]
    names = {
        "error": "squared error, own images",
        "own": "accuracy, own images, %",
        "held out": "accuracy, held out, %",
    }
    places = figure.subplots(3, 4, sharex=True, sharey="row")
    for (net, rerank), column in zip(columns, places.T, strict=True):
        some = [r for r in rows if r["network"] == net]
        for (what, name), place in zip(names.items(), column, strict=True):
            for ranking, colour in zip(RANKINGS, COLOURS, strict=False):
                values = np.array([r["curves"][f"{ranking}, {rerank}"][what] for r in some])
                band(place, np.arange(values.shape[1]), values, colour, ranking)
            place.grid(alpha=0.3)
            if net == columns[0][0] and rerank == RERANKS[0]:
                place.set_ylabel(name)
        column[0].set_title(f"{net}, {rerank} ranking", fontsize=10)
        column[-1].set_xlabel("neurons removed, %")
    places[0, 0].legend(fontsize=9, frameon=False)
    return save(figure, path)


def band(place, x, values, colour: str, label: str, style: str = "-") -> None:
    """Mean and range over the first axis."""
    place.plot(x, values.mean(axis=0), color=colour, linestyle=style, linewidth=1.4, label=label)
    place.fill_between(
        x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0
    )


def more(rows: list[dict], path: Path) -> Path:
    """Joint and summed removals; one digit against the rest; the cosine."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (*joint, middle, right) = figure.subplots(2, 2).flatten()
    for place, rerank in zip(joint, RERANKS, strict=True):
        for net, colour in zip(("1 x 100", "2 x 50"), COLOURS, strict=False):
            some = [r for r in rows if r["setup"] == "ten digits" and r["network"] == net]
            for what, style in (("joint", "-"), ("summed", "--")):
                values = np.array([r[rerank][what] for r in some])
                band(place, np.array(SHARES), values, colour, f"{net}, {what}", style)
        place.set_yscale("symlog", linthresh=10)
        place.set_ylim(-2, 1e6)  # room for the legend
        place.set_ylabel("increase of the squared error")
        place.set_title(f"Ten digits: the first of a ranking, {rerank}", fontsize=10)
    for digit, colour in zip((0, 1, 2), COLOURS, strict=False):
        values = np.array([r["error"] for r in rows if r.get("digit") == digit])
        band(middle, np.arange(values.shape[1]), values / values[:, :1], colour, f"digit {digit}")
    middle.axhline(1, color="0.4", linewidth=0.8)
    middle.set_ylim(0.996, 1.02)  # where the error falls, and where it is back
    middle.set_xlim(0, 60)
    middle.set_ylabel("squared error / that of the whole network")
    middle.set_title("One digit against the rest", fontsize=10)
    for width, colour in zip((10, 25, 50), COLOURS, strict=False):
        values = np.array(
            [r["error"] for r in rows if r["network"] == f"2 x {width}" and r["setup"] == "cosine"]
        )
        band(right, 50 * np.arange(values.shape[1]) / width, values, colour, f"2 x {width}")
    right.axhline(FLAT, color="0.4", linewidth=0.8)
    right.set_yscale("log")
    right.set_ylabel("mean squared error")
    right.set_title("Cosine", fontsize=10)
    for place in (*joint, middle, right):
        place.set_xlabel("neurons removed, %")
        place.legend(
            fontsize=9, frameon=False, loc="lower right" if place is right else "upper left"
        )
        place.grid(alpha=0.3)
    return save(figure, path)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation."""
    return (
        f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=min(1, len(values) - 1)):.{digits}f}"
    )


def tables(rows: list[dict]) -> dict[str, str]:
    """A markdown table for each set-up."""
    kinds = ("own, 0.5", "own, 2", "held out, 0.5", "held out, 2")
    ten, joint = [], []
    for net in ("1 x 100", "2 x 50"):
        some = [r for r in rows if r["setup"] == "ten digits" and r["network"] == net]
        own, out = (spread([r["curves"][BEST][j][0] for r in some], 2) for j in ("own", "held out"))
        ten.append([f"{net}: accuracy of the whole network, %", own, "", out, "", ""])
        for name in some[0]["curves"]:
            removable = ([r["removable"][name][k] for r in some] for k in kinds)
            healed_here = spread([100 * r["healed"][name] for r in some])
            ten.append([f"{net}: {name}", *map(spread, removable), healed_here])
        for rerank in RERANKS:
            for what in ("joint", "summed"):
                columns = zip(*(r[rerank][what] for r in some), strict=True)
                joint.append([f"{net}, {rerank}: {what}", *(spread(v) for v in columns)])
    digits = [
        [
            digit,
            *(spread([r["error"][0] for r in some]), spread([r["held out"][0] for r in some], 2)),
            *(spread([r["fall"][k] for r in some], 2) for k in (1, 5, 10)),
            sum(r["fall"][5] > 0 for r in some),
            spread([r["below"] for r in some]),
        ]
        for digit in (0, 1, 2)
        for some in ([r for r in rows if r.get("digit") == digit],)
    ]
    cosines = [
        [
            f"2 x {width}",
            f"{np.median([r['error'][0] for r in some]):.1e}",
            *(spread([r[k] for r in some]) for k in ("flat", "needed")),
        ]
        for width in (10, 25, 50)
        for some in ([r for r in rows if r["setup"] == "cosine" and r["neurons"] == 2 * width],)
    ]
    heads = {
        "ten": [
            "network and ranking",
            *(f"{k.replace(', ', ', lost ')}" for k in kinds),
            "healed, %",
        ],
        "joint": ["removed, %", *SHARES],
        "digits": [
            "digit",
            "error at the start",
            "held out, %",
            *(f"fall after {k}, %" for k in (1, 5, 10)),
            "falls by 5",
            "removals below the start",
        ],
        "cosines": ["network", "error at the start (median)", "flat, %", "neurons needed"],
    }
    made = {"ten": ten, "joint": joint, "digits": digits, "cosines": cosines}
    return {
        k: tabulate(v, headers=list(map(str, heads[k])), tablefmt="pipe", disable_numparse=True)
        for k, v in made.items()
    }


PAGE = """# Neuron removal in the set-ups of its authors

`python bench/studies/neuron_removal_setups.py --write results/published/neuron-removal-setups`,
{seeds} seeds; means ± standard deviations over them. No retraining; each layer keeps a neuron.
What the authors do not say, and is ours: how networks are trained and that ten of each are.
What one neuron does to the error, and both approximations of it: [the error as one neuron is turned
down](neuron-removal-surfaces.md).

## Ten digits

5,000 MNIST training images by seed, 20 x 20 (antialiased), pixels in [0, 1]; sigmoid hidden and
output units, squared error; Adam, 250 epochs in batches of 100. Rankings by the change of the
squared error. Largest share of the neurons, in %, after whose removal the accuracy is at most 0.5
or 2 points below the start, on the own 5,000 images and on the 10,000 test images; beside it the
part of all rises of the error that later removals undo (until the error exceeds that of a constant
output). The first row of each network has its accuracies on either, in %; the authors start at 100
on their own.

{ten}

Joint and summed: the rise of the squared error when the first neurons of a brute force ranking go
together, and the sum of what each of them alone does to the whole network, by the share removed.

{joint}

![error and accuracies along the rankings]({curves})

## One digit against the rest

All 60,000 training images, raw pixels, 784-100-2, sigmoid hidden and softmax output units, squared
error; Adam, 3 epochs in batches of 200; {fewer} seeds. Iterative brute force; errors are sums over
all images. *Below the start*: removals until the error first exceeds it.

{digits}

## Cosine

One period at 200 points, moved into 0 to 1; one input, two sigmoid layers and a sigmoid output, as
the authors have them; float64, 3,000 steps of L-BFGS, which is ours. *Flat*: the mean squared error
has not exceeded {flat:g}, 1 % of what a constant gives. *Needed*: the fewest neurons left, along
the order of removal, with that error.

{cosines}

![joint and summed, one digit, cosine]({more})

{where}.
"""


SURFACES = """# The error as one neuron is turned down

`python bench/studies/neuron_removal_setups.py --surfaces
results/published/neuron-removal-surfaces`: one network of each kind (seed 0), float64, its own
training data. The rise of the error as the gate on one neuron's output goes from 1 to 0, all
others left alone, and the tangent and the parabola at 1 that stand for it in the rankings of first
and second order. Four neurons of each network: the least, two between and the greatest by the true
rise at 0. The second derivative is that of the diagonal back-propagated as the authors do.

![the error by the gate of one neuron]({image})

Over all neurons of a network: Spearman's rank correlation of the predicted with the true rise at 0,
and how often its sign is right.

{table}

{where}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--from", type=int, default=0, metavar="SEED", dest="first")
    parser.add_argument("--write", metavar="FILE", help="write FILE.md, .jsonl, .png, -more.png")
    parser.add_argument("--ten-digits", metavar="FILE", help="write FILE.jsonl of these alone")
    parser.add_argument(
        "--cosine", metavar="FILE", help="measure these anew in FILE.jsonl and page"
    )
    parser.add_argument("--surfaces", metavar="FILE", help="write FILE.md and .png of these alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.surfaces:
        page = surfaces(Path(options.surfaces))
        write_atomic(Path(options.surfaces).with_suffix(".md"), page)
        print(page)
        return 0
    code, seeds = where(), range(options.first, options.first + options.seeds)
    only = "ten digits" if options.ten_digits else "cosine" if options.cosine else ""
    rows = measure(seeds, only)
    if options.cosine:
        options.write = options.cosine
        kept = map(json.loads, Path(f"{options.cosine}.jsonl").read_text().splitlines())
        rows = [r for r in kept if r["setup"] != "cosine"] + rows
    if options.ten_digits:
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        write_atomic(Path(options.ten_digits).with_suffix(".jsonl"), lines)
        return 0
    made = tables(rows)
    print("\n\n".join(made.values()))
    if options.write:
        path = Path(options.write)
        write_atomic(path.with_suffix(".jsonl"), "".join(json.dumps(r) + "\n" for r in rows))
        ten = [r for r in rows if r["setup"] == "ten digits"]
        first = curves(ten, path.with_suffix(".png"))
        second = more(rows, path.with_name(f"{path.name}-more.png"))
        fixed = {
            "seeds": options.seeds,
            "fewer": min(FEWER, options.seeds),
            "flat": FLAT,
            "where": code,
        }
        page = PAGE.format(**made, **fixed, curves=first.name, more=second.name)
        write_atomic(path.with_suffix(".md"), page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
