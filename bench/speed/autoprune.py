"""AutoPrune's gated step over a plain training step, in turn in one run.

``python bench/speed/autoprune.py [--write results/autoprune-speed]`` prints the table (and writes
FILE.md and FILE.jsonl). A gated step trains the weights behind closed and open gates; a step of the
auxiliary parameters (a forward and a backward pass of a batch of val) is timed beside it, since the
two alternate.
"""

import copy
import itertools
import statistics
import time

import torch
from tabulate import tabulate
from torch.nn import functional as F
from widthbench.methods.autoprune import AutoPrune, Gates

from widthbench.networks import models
from widthbench.recipe import Recipe
from widthbench.report.speed import main
from widthbench.technique.budget import Budget
from widthbench.technique.task import Task
from widthbench.width import CostModel, find_groups, gated

NETWORKS = {  # (size, channels, batch)
    "lenet_300_100": (28, 1, 128),
    "lenet5": (28, 1, 128),
    "resnet20_cifar": (32, 3, 128),
    "vgg16_cifar": (32, 3, 64),
    "mobilenetv2_100_cifar": (32, 3, 64),
}
PAIRS = 15
BLOCK = 0.3  # seconds at least that a block of steps takes


class Batch:
    """The same random batch again and again."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def batches(self, size, **_):
        return itertools.repeat((self.x, self.y))


def steps(name: str):
    """(a plain step, a gated one, one of the auxiliary parameters) of a network, as calls."""
    size, channels, count = NETWORKS[name]
    torch.manual_seed(0)
    data = Batch(torch.randn(count, channels, size, size), torch.randint(0, 10, (count,)))
    plain = models.create(name, classes=10, channels=channels, size=size, seed=0).eval()
    groups = find_groups(plain, data.x[:1])
    cost = CostModel(plain, groups, data.x[:1])
    task = Task(
        model=plain,
        groups=groups.select("inner"),
        example_input=data.x[:1],
        budget=Budget("macs", 0.25),
        cost=cost,
        reference=cost,
        train=data,
        val=data,
    )
    held = copy.deepcopy(plain).train()
    plain.train()
    gates = Gates(AutoPrune(), task, Recipe(epochs=10_000, batch_size=count, lr=1e-6))
    for gate in gates.open.values():
        gate[::4] = 0.0
    optimizers = {
        m: torch.optim.SGD(m.parameters(), lr=1e-6, momentum=0.9, nesterov=True)
        for m in (plain, held)
    }

    def step(model) -> None:
        optimizers[model].zero_grad(set_to_none=True)
        F.cross_entropy(model(data.x), data.y).backward()
        optimizers[model].step()

    def gated_step() -> None:
        with gated(held, task.groups, gates.open, on="weight", products=gates.products):
            step(held)
            gates._forget()

    def auxiliary_step() -> None:
        with gated(held, task.groups, gates.open, on="weight", products=gates.products):
            gates._learn(held)
            gates._forget()
            gates.step += 1

    return (lambda: step(plain)), gated_step, auxiliary_step


def seconds(call, repeats: int) -> float:
    """Mean seconds of a call."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def pairs(name: str, count: int) -> list[dict]:
    """Milliseconds of each kind of step, in blocks that take turns."""
    calls = steps(name)
    for call in calls:
        seconds(call, 3)
    repeats = max(1, round(BLOCK / seconds(calls[0], 3)))
    rows = []
    for i in range(count):
        order = calls if i % 2 else calls[::-1]
        times = {call: 1e3 * seconds(call, repeats) for call in order}
        rows.append(
            dict(
                zip(("plain", "gated", "auxiliary"), (times[c] for c in calls), strict=True),
                network=name,
            )
        )
    return rows


def measure() -> list[dict]:
    """All pairs of all networks, as plain rows."""
    torch.set_num_threads(1)
    return [row for name in NETWORKS for row in pairs(name, PAIRS)]


def table(rows: list[dict]) -> str:
    """Medians by network, as markdown."""
    found = []
    for name in dict.fromkeys(r["network"] for r in rows):
        some = [r for r in rows if r["network"] == name]
        gated_ratios = [r["gated"] / r["plain"] for r in some]
        medians = [
            f"{statistics.median(r[k] for r in some):.2f}" for k in ("plain", "gated", "auxiliary")
        ]
        spread = f"{min(gated_ratios):.2f} to {max(gated_ratios):.2f}"
        both = statistics.median((r["gated"] + r["auxiliary"]) / r["plain"] for r in some)
        ratio = f"{statistics.median(gated_ratios):.2f}x"
        found.append(
            [
                f"{name}, batch {NETWORKS[name][2]}",
                *medians,
                ratio,
                spread,
                f"{both:.2f}x",
                str(len(some)),
            ]
        )
    headers = [
        "network",
        "plain step, ms",
        "gated step, ms",
        "step of m, ms",
        "gated / plain",
        "range",
        "both / plain",
        "pairs",
    ]
    return tabulate(
        found,
        headers=headers,
        tablefmt="pipe",
        colalign=("left", *["right"] * 7),
        disable_numparse=True,
    )


PAGE = """# Speed of AutoPrune's steps

`python bench/speed/autoprune.py --write results/autoprune-speed`: random images, float32, one
thread; medians, kinds of steps taking turns in one run. Forward, backward and SGD with Nesterov
momentum, no data loading. A step of m is one of the auxiliary parameters.

{table}

{where}.
"""

if __name__ == "__main__":
    main(__doc__, PAGE, measure, table)
