"""Eigenpairs of splitting matrices: one joint product, and all to 1e-3, over one backward pass of
the same network and batch.

``python bench/speed/splitting.py [--write results/published/splitting-speed]`` prints the tables
(and writes FILE.md and FILE.jsonl). Random images stand in for data: the work is the same. The
exact eigen-decomposition's growth with the number of neurons n and of their parameters d, and how
many products gradient steps need where Lanczos' method needs few, stand beside it.
"""

import math
import statistics
import time

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from widthbench.networks import models
from widthbench.report.speed import main
from widthbench.sensitivity.ablation import Sample
from widthbench.sensitivity.splitting_matrices import SplittingMatrices
from widthbench.width import find_groups

NETWORKS = {  # (size, channels, batch)
    "lenet_300_100": (28, 1, 256),
    "lenet5": (28, 1, 256),
    "resnet20_cifar": (32, 3, 128),
    "vgg16_cifar": (32, 3, 32),
}
PAIRS = 7
TOLERANCE = 1e-3
DEPTHS = (128, 256, 512, 1024, 2048)  # d
COUNTS = (8, 16, 32, 64)  # n
REPEATS = 3


def network(name: str):
    """(network, groups, a batch of random images)."""
    size, channels, count = NETWORKS[name]
    torch.manual_seed(0)
    model = models.create(name, classes=10, channels=channels, size=size, seed=0).eval()
    sample = Sample(torch.randn(count, channels, size, size), torch.randint(0, 10, (count,)))
    return model, find_groups(model, sample.x[:1]).select("inner"), sample


def backward_seconds(model, sample: Sample) -> float:
    """One backward pass to all parameters, its forward pass not counted."""
    loss = F.cross_entropy(model(sample.x), sample.y)
    begin = time.perf_counter()
    loss.backward()
    seconds = time.perf_counter() - begin
    model.zero_grad(set_to_none=True)
    return seconds


def costs(name: str, pairs: int) -> list[dict[str, float]]:
    """Seconds of a backward pass, of one joint product, of all eigenpairs, and of those with the
    pass that they need, in turn.
    """
    model, groups, sample = network(name)
    found = []
    for _ in range(pairs + 1):  # the first is a warm-up
        backward = backward_seconds(model, sample)
        begin = time.perf_counter()
        matrices = SplittingMatrices(model, groups, sample)
        made = time.perf_counter()
        matrices.smallest(tolerance=TOLERANCE)
        eigenpairs = time.perf_counter()
        vectors = {
            n: F.normalize(torch.randn_like(matrices.parameters(n)), dim=1)
            for n in matrices.neurons
        }
        middle = time.perf_counter()
        matrices.product(vectors)
        product = time.perf_counter() - middle
        backward = (backward + backward_seconds(model, sample)) / 2  # before and after
        found.append(
            {
                "backward": backward,
                "product": product,
                "pairs": eigenpairs - made,
                "all": eigenpairs - begin,
            }
        )
    return found[1:]


def exact_seconds(n: int, d: int) -> float:
    """Median seconds of decomposing n matrices of d x d that a layer's samples make, formed
    beforehand.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, n, bias=False), nn.Tanh(), nn.Linear(n, 10)).eval()
    sample = Sample(torch.randn(256, d), torch.randint(0, 10, (256,)))
    formed = SplittingMatrices(model, find_groups(model, sample.x[:1], cache=False), sample).exact(
        "0"
    )
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        torch.linalg.eigh(formed)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def exponent(sizes, seconds) -> float:
    """Slope of a log-log regression."""
    return statistics.linear_regression(
        [math.log(s) for s in sizes], [math.log(t) for t in seconds]
    ).slope


def products_needed() -> list[dict[str, object]]:
    """Share of LeNet-5's neurons whose least eigenvalue is within 1e-3 of ‖S‖ after so many
    products, by two methods.
    """
    model, groups, sample = network("lenet5")
    matrices = SplittingMatrices(model, groups, sample)
    names = ["conv1", "conv2"]
    exact = {n: matrices.smallest_exactly(n)[0] for n in names}
    size = {n: torch.linalg.eigvalsh(matrices.exact(n)).abs().amax(dim=1) for n in names}
    rows = []
    for steps in (4, 8, 16, 32, 64):
        lanczos, _ = matrices.smallest(tolerance=1e-9, steps=steps)
        descended = gradient_steps(matrices, names, size, steps)
        for method, values in (("Lanczos", lanczos), ("gradient steps", descended)):
            near = torch.cat(
                [((values[n] - exact[n]).abs() <= TOLERANCE * size[n]).double() for n in names]
            )
            rows.append(
                {
                    "what": "products",
                    "method": method,
                    "products": steps,
                    "share": float(near.mean()),
                }
            )
    return rows


def gradient_steps(matrices: SplittingMatrices, names, size, steps: int) -> dict[str, torch.Tensor]:
    """λ by normalised gradient steps on the Rayleigh quotient, at the largest step size that is
    sure not to diverge.
    """
    torch.manual_seed(0)
    v = {n: F.normalize(torch.randn_like(matrices.parameters(n)), dim=1) for n in names}
    for _ in range(steps):
        product = matrices.product(v)
        values = {n: (product[n] * v[n]).sum(dim=1).double() for n in names}
        v = {n: F.normalize(v[n] - product[n] / size[n][:, None].float(), dim=1) for n in names}
    return values


def measure() -> list[dict]:
    """All pairs, as plain rows."""
    torch.set_num_threads(1)
    rows = [
        {"what": "cost", "network": name, **row} for name in NETWORKS for row in costs(name, PAIRS)
    ]
    rows += [{"what": "exact", "n": 4, "d": d, "seconds": exact_seconds(4, d)} for d in DEPTHS]
    rows += [{"what": "exact", "n": n, "d": 200, "seconds": exact_seconds(n, 200)} for n in COUNTS]
    return rows + products_needed()


def table(rows: list[dict]) -> str:
    """Medians, as markdown tables."""
    lines = []
    for name in NETWORKS:
        some = [r for r in rows if r["what"] == "cost" and r["network"] == name]
        ratios = {k: [r[k] / r["backward"] for r in some] for k in ("product", "pairs", "all")}
        texts = [
            f"{statistics.median(v):.2f}x ({min(v):.2f} to {max(v):.2f})" for v in ratios.values()
        ]
        lines.append(
            [
                f"{name}, {NETWORKS[name][2]} images",
                f"{1000 * statistics.median(r['backward'] for r in some):.1f}",
                *texts,
            ]
        )
    headers = [
        "network, batch",
        "backward pass, ms",
        "one joint product",
        "all eigenpairs to 1e-3",
        "with the pass and the trace",
    ]
    parts = [
        tabulate(
            lines,
            headers=headers,
            tablefmt="pipe",
            colalign=("left", *["right"] * 4),
            disable_numparse=True,
        )
    ]
    exact = [r for r in rows if r["what"] == "exact"]
    growth = []
    for name, fixed, value in (("d", "n", 4), ("n", "d", 200)):
        some = [r for r in exact if r[fixed] == value]
        sizes, seconds = [r[name] for r in some], [r["seconds"] for r in some]
        steps = ", ".join(f"{s}: {1000 * t:.1f}" for s, t in zip(sizes, seconds, strict=True))
        growth.append([f"{name} ({fixed} = {value})", steps, f"{exponent(sizes, seconds):.2f}"])
    headers = ["exact decomposition against", "milliseconds", "exponent"]
    parts.append(tabulate(growth, headers=headers, tablefmt="pipe", disable_numparse=True))
    needed = [r for r in rows if r["what"] == "products"]
    counts = sorted({r["products"] for r in needed})
    by = {
        m: {r["products"]: r["share"] for r in needed if r["method"] == m}
        for m in ("Lanczos", "gradient steps")
    }
    lines = [
        [method, *(f"{100 * shares[c]:.0f} %" for c in counts)] for method, shares in by.items()
    ]
    parts.append(
        tabulate(
            lines,
            headers=["within 1e-3 after so many products", *map(str, counts)],
            tablefmt="pipe",
            disable_numparse=True,
        )
    )
    return "\n\n".join(parts)


PAGE = """# Cost of splitting matrices' eigenpairs

`python bench/speed/splitting.py --write results/published/splitting-speed`, random images, float32,
one thread; medians over pairs in turn in one run, with their range. A backward pass goes to all
parameters; its forward pass is not counted. The third table: LeNet-5's convolutions; gradient steps
at the step size 1/‖S‖.

{table}

{where}.
"""


if __name__ == "__main__":
    main(__doc__, PAGE, measure, table)
