"""Neuron merging of all inner groups of a ResNet-56, vectorised, against a Python loop over the
pairs: both in one run, in turn.

    python bench/speed/neuron_merging.py [--rounds 5] [--keep 0.5]

Each round times `widthbench.apply` (discovery of the channel groups, grades from the cache,
decision, resize), the decision alone, and the same decision by a loop over pairs, once with torch's
and once with NumPy's scalars, with the same weights, formulas and kept channels. All decisions must
be the same.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from widthbench.methods.neuron_merging import NeuronMerging, filters, score

import widthbench
from widthbench.networks import models
from widthbench.technique.budget import top_channels
from widthbench.width import find_groups
from widthbench.width.groups import Groups
from widthbench.width.proofs import randomised

APPLY, DECISION = "`widthbench.apply`: discovery, decision, resize", "the decision alone"
LOOP = "the decision by a loop over pairs"


def loop(
    filters: Any,
    norm: dict[str, Any],
    eps: float,
    kept: list[int],
    bn_scale: str,
    threshold: float,
    lam: float,
) -> np.ndarray:
    """The mix ``[N, P]`` of one convolution ``filters [N, D]`` with BatchNorm, one pair of channels
    after the other.

    Args:
        filters: Rows of a torch tensor or a NumPy array; the arithmetic is then done with that
            library's scalars.
        norm: ``weight``, ``bias``, ``running_mean`` and ``running_var``, ``[N]`` each, of the same
            library.
        eps: Of the BatchNorm.
        kept: The kept channels.
        bn_scale: "released" or "derived".
        threshold: t.
        lam: λ.
    """
    gamma, beta, mean, var = (norm[k] for k in ("weight", "bias", "running_mean", "running_var"))
    mix = np.zeros((len(filters), len(kept)))
    for n in range(len(filters)):
        if n in kept:
            mix[n, kept.index(n)] = 1.0
            continue
        pairs = []
        for at, p in enumerate(kept):
            size_n, size_p = (filters[n] @ filters[n]) ** 0.5, (filters[p] @ filters[p]) ** 0.5
            cosine, s = filters[n] @ filters[p] / (size_n * size_p), size_n / size_p
            if bn_scale == "released":
                scale = s * (gamma[p] / gamma[n]) * (var[n] / var[p])
                shift = (gamma[p] / var[p]) * (
                    s * (mean[n] - var[n] * beta[n] / gamma[n]) - mean[p]
                ) + beta[p]
                mismatch = abs(shift) / scale
            else:
                sigma_n, sigma_p = (var[n] + eps) ** 0.5, (var[p] + eps) ** 0.5
                scale = s * (gamma[n] / gamma[p]) * (sigma_p / sigma_n)
                mismatch = abs(
                    (gamma[n] / sigma_n) * (s * (mean[p] - sigma_p * beta[p] / gamma[p]) - mean[n])
                    + beta[n]
                )
                if not scale > 0:
                    continue
            if math.isfinite(scale) and math.isfinite(mismatch) and scale != 0:
                pairs.append((at, float(cosine), float(scale), float(mismatch)))
        if not pairs:
            continue
        low, high = min(m for *_, m in pairs), max(m for *_, m in pairs)
        bad = [
            lam * (1 - c) + (1 - lam) * ((m - low) / (high - low) if high > low else 0.0)
            for _, c, _, m in pairs
        ]
        at, cosine, scale, _ = pairs[bad.index(min(bad))]
        if cosine >= threshold:
            mix[n, at] = scale
    return mix


def by_loop(
    model: nn.Module, groups: Groups, plan: dict[str, Tensor], library: str
) -> dict[str, np.ndarray]:
    """The mixes of all groups, each one convolution with a BatchNorm, by the loop."""
    mixes = {}
    for name, kept in plan.items():
        norm: Any = model.get_submodule(groups[name].riders[0])
        tensors = {
            k: getattr(norm, k).detach().double()
            for k in ("weight", "bias", "running_mean", "running_var")
        }
        filters: Any = model.get_submodule(name).weight.detach().flatten(1).double()
        if library == "numpy":
            filters, tensors = filters.numpy(), {k: v.numpy() for k, v in tensors.items()}
        mixes[name] = loop(filters, tensors, norm.eps, kept.tolist(), "released", 0.1, 0.85)
    return mixes


def measure(rounds: int, keep: float = 0.5) -> tuple[dict[str, list[float]], str]:
    """Seconds of each way, by round, and a sentence on the work; all ways must decide the same."""
    budget = f"channels:{keep}:floor"
    model = randomised(
        models.create("resnet56_cifar", classes=10, channels=3, size=32, seed=0)
    ).float()
    x = torch.randn(1, 3, 32, 32)
    groups = find_groups(model, x)  # the grades are cached from here on
    inner = groups.select()
    technique = NeuronMerging()
    kept = {n: kept_by_l1(model, groups, n, keep) for n in inner}

    def decide() -> dict[str, np.ndarray]:
        return {n: technique.merged(model, groups, n, rows).mix.numpy() for n, rows in kept.items()}

    ways: dict[str, Callable[[], Any]] = {
        APPLY: lambda: widthbench.apply(technique, model, budget=budget, example_input=x),
        DECISION: decide,
        f"{LOOP}, torch": lambda: by_loop(model, groups, kept, "torch"),
        f"{LOOP}, NumPy": lambda: by_loop(model, groups, kept, "numpy"),
    }
    times: dict[str, list[float]] = {what: [] for what in ways}
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for what, work in ways.items():
            start = time.perf_counter()
            found[what] = work()
            times[what].append(time.perf_counter() - start)
    small, ours, *loops = found.values()
    for mixes in loops:
        worst = max(float(np.abs(mixes[n] - ours[n]).max()) for n in kept)
        assert worst < 1e-9, f"a loop decides otherwise, by {worst}"
    for n, rows in kept.items():
        assert torch.equal(
            small.get_submodule(n).weight[:, :3], model.get_submodule(n).weight[rows][:, :3]
        ), f"{n} keeps other channels"
    pairs = sum(len(rows) * (inner[n].channels - len(rows)) for n, rows in kept.items())
    return (
        times,
        (
            f"ResNet-56, {len(inner)} inner groups, {pairs} pairs, {budget}, medians of {rounds}"
            " rounds, one thread"
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each is timed (default: 5)"
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=0.5,
        help="fraction of the channels that is kept (default: 0.5)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    times, work = measure(options.rounds, options.keep)
    print(f"{work}\n")
    rows = [
        [
            what,
            f"{1000 * statistics.median(taken):.1f}",
            *(f"{ratio(taken, times[other]):.2f}" for other in (APPLY, DECISION)),
        ]
        for what, taken in times.items()
    ]
    headers = ["what", "ms", "over apply", "over the decision alone"]
    print(
        tabulate(
            rows,
            headers=headers,
            tablefmt="pipe",
            colalign=("left", *["right"] * 3),
            disable_numparse=True,
        )
    )


def ratio(taken: list[float], other: list[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(taken, other, strict=True))


def kept_by_l1(model: nn.Module, groups: Groups, name: str, fraction: float) -> Tensor:
    """The channels that the technique keeps."""
    return top_channels(
        score(filters(model, groups, name), "l1"),
        math.floor(groups[name].channels * fraction + 1e-9),
    )


if __name__ == "__main__":
    main()
