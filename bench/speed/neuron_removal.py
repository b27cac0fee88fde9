"""Brute force on neurons: ours over the plain loop, a whole greedy curve, two processes over one,
and over two independent copies, side by side in one run.

``python bench/speed/neuron_removal.py [--write results/published/neuron-removal-speed]`` prints the
table (and writes FILE.md and FILE.jsonl). Random images stand in for data: the work is the same.
"""

import math
import statistics
import time

import torch
from tabulate import tabulate
from torch.nn import functional as F

from widthbench.networks import models
from widthbench.report.speed import main
from widthbench.sensitivity.ablation import Ablation, Sample
from widthbench.technique.removal import remove, unfinished
from widthbench.width import find_groups

IMAGES = 10_000
PAIRS = 5


def network(name: str, images: int = IMAGES, **args):
    """(network, groups, a sample of random images)."""
    torch.manual_seed(0)
    model = models.create(name, classes=10, channels=1, size=28, seed=0, **args).eval()
    sample = Sample(torch.randn(images, 1, 28, 28), torch.randint(0, 10, (images,)))
    return model, find_groups(model, sample.x[:1]), sample


def plain_loop(model, layer: str, sample: Sample, batch: int = 1000) -> torch.Tensor:
    """The loss with each column of a layer's weight zeroed in turn: one whole forward pass of all
    images for each.
    """
    weight, losses = model.get_submodule(layer).weight.data, []
    with torch.no_grad():
        for channel in range(weight.shape[1]):
            column = weight[:, channel].clone()
            weight[:, channel] = 0
            total = sum(
                float(F.cross_entropy(model(x), y, reduction="sum"))
                for x, y in sample.batches(batch)
            )
            weight[:, channel] = column
            losses.append(total / len(sample))
    return torch.tensor(losses, dtype=torch.float64)


def first_layer(images: int = IMAGES) -> tuple[float, float]:
    """(ours, plain loop) in seconds: all 300 neurons of LeNet-300-100's first layer; the losses
    must agree to 1e-6.
    """
    model, groups, sample = network("lenet_300_100", images)
    begin = time.perf_counter()
    found = Ablation(model, groups, sample).losses({}, {"ip1": torch.arange(300)})["ip1"]
    middle = time.perf_counter()
    expected = plain_loop(model, "ip2", sample)
    end = time.perf_counter()
    worst = float((found - expected).abs().max())
    assert worst < 1e-6, f"the losses differ by {worst}"
    return middle - begin, end - middle


def greedy(work: Ablation, groups) -> float:
    """Seconds of a whole greedy curve with re-ranking: every neuron but the last, each the least
    missed of those left.
    """
    begin = time.perf_counter()
    order = {n: torch.full((g.channels,), math.inf, dtype=torch.float64) for n, g in groups.items()}
    while unfinished(order, groups):
        gates = {n: o.isinf().float() for n, o in order.items()}
        losses = work.losses(gates, {n: g.nonzero().flatten() for n, g in gates.items()})
        changes = {
            n: torch.full_like(o, math.inf).index_copy(0, gates[n].nonzero().flatten(), losses[n])
            for n, o in order.items()
        }
        remove(order, changes, groups, 1)
    return time.perf_counter() - begin


def first_layer_by_one_and_two(pairs: int) -> tuple[list[tuple[float, float]], float]:
    """Seconds for all 300 neurons of LeNet-300-100's first layer by one process and by two, in
    turn, and seconds of their start.
    """
    model, groups, sample = network("lenet_300_100")
    return _in_turn(
        model,
        groups,
        sample,
        pairs,
        lambda work: _seconds(lambda: work.losses({}, {"ip1": torch.arange(300)})),
    )


def _seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def one_and_two(
    pairs: int, widths: tuple[int, ...] = (100,)
) -> tuple[list[tuple[float, float]], float]:
    """Seconds of greedy curves by one process and by two, in turn, and seconds that the two took to
    start.
    """
    model, groups, sample = network("mlp_sigmoid", widths=widths)
    return _in_turn(model, groups, sample, pairs, lambda work: greedy(work, groups))


def _in_turn(model, groups, sample, pairs: int, job) -> tuple[list[tuple[float, float]], float]:
    alone = Ablation(model, groups, sample)
    begin = time.perf_counter()
    with Ablation(model, groups, sample, processes=2) as both:
        both.losses({}, {n: torch.arange(4) for n in groups})
        started = time.perf_counter() - begin
        found = []
        for i in range(pairs):
            if i % 2:
                two, one = job(both), job(alone)
            else:
                one, two = job(alone), job(both)
            found.append((one, two))
    return found, started


def _copy(pipe, widths: tuple[int, ...], images: int) -> None:
    """A process of its own: a greedy curve whenever it is told to."""
    torch.set_num_threads(1)
    model, groups, sample = network("mlp_sigmoid", images, widths=widths)
    work = Ablation(model, groups, sample)
    work.losses({}, {n: torch.arange(4) for n in groups})
    pipe.send(True)
    while pipe.recv():
        greedy(work, groups)
        pipe.send(True)


def beside_copies(
    rounds: int, widths: tuple[int, ...], images: int = IMAGES
) -> list[tuple[float, float, float]]:
    """Seconds of a greedy curve by one copy alone, of two independent copies that each do all of
    it at once, and by two processes that share one, in turn.
    """
    model, groups, sample = network("mlp_sigmoid", images, widths=widths)
    spawn = torch.multiprocessing.get_context("spawn")
    ends = [spawn.Pipe() for _ in range(2)]
    copies = [
        spawn.Process(target=_copy, args=(theirs, widths, images), daemon=True)
        for _, theirs in ends
    ]
    for copy in copies:
        copy.start()
    pipes = [ours for ours, _ in ends]

    def answers(some) -> None:
        for pipe in some:
            pipe.recv()

    def together(some) -> None:
        for pipe in some:
            pipe.send(True)
        answers(some)

    answers(pipes)
    found = []
    with Ablation(model, groups, sample, processes=2) as shared:
        shared.losses({}, {n: torch.arange(4) for n in groups})
        jobs = [
            lambda: together(pipes[:1]),
            lambda: together(pipes),
            lambda: greedy(shared, groups),
        ]
        for i in range(rounds):
            turn = [(i + k) % 3 for k in range(3)]
            seconds = {k: _seconds(jobs[k]) for k in turn}
            found.append((seconds[0], seconds[1], seconds[2]))
    for pipe, copy in zip(pipes, copies, strict=True):
        pipe.send(False)
        copy.join()
    return found


def measure() -> list[dict]:
    """All pairs, as plain rows."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(PAIRS if threads == 1 else 3):
            ours, loop = first_layer()
            what = (
                "300 neurons of the first layer of lenet_300_100, ours over the plain loop,"
                f" {threads} thread(s)"
            )
            rows.append({"what": what, "one": loop, "two": ours})
    torch.set_num_threads(1)
    for widths in ((100,), (50, 50)):
        pairs, started = one_and_two(PAIRS if widths == (100,) else 3, widths)
        name = f"mlp_sigmoid {' x '.join(map(str, widths))}"
        what = "greedy curve, one process over two" + ("" if widths == (100,) else f", {name}")
        rows += [{"what": what, "one": one, "two": two, "start": started} for one, two in pairs]
        rows += [
            {
                "what": f"greedy curve, half of two copies at once over two processes, {name}",
                "copies": " x ".join(map(str, (len(widths), widths[0]))),
                "alone": alone,
                "one": both / 2,
                "two": shared,
            }
            for alone, both, shared in beside_copies(PAIRS, widths)
        ]
    pairs, started = first_layer_by_one_and_two(PAIRS)
    what = "300 neurons of the first layer of lenet_300_100, one process over two"
    rows += [{"what": what, "one": one, "two": two, "start": started} for one, two in pairs]
    return rows


def table(rows: list[dict]) -> str:
    """Medians by kind, as markdown."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(row["what"], []).append(row)
    lines = []
    for what, some in kinds.items():
        one, two = (statistics.median(r[k] for r in some) for k in ("one", "two"))
        ratio = statistics.median(r["one"] / r["two"] for r in some)
        spread = (
            f"{min(r['one'] / r['two'] for r in some):.2f} to"
            f" {max(r['one'] / r['two'] for r in some):.2f}"
        )
        start = f"{some[0]['start']:.1f}" if "start" in some[0] else "–"
        lines.append([what, f"{one:.2f}", f"{two:.2f}", f"{ratio:.2f}x", spread, start, len(some)])
    headers = ["what", "seconds", "seconds", "ratio", "range", "start of two processes, s", "pairs"]
    return tabulate(
        lines,
        headers=headers,
        tablefmt="pipe",
        colalign=("left", *["right"] * 6),
        disable_numparse=True,
    )


PAGE = """# Speed of brute force on neurons

`python bench/speed/neuron_removal.py --write results/published/neuron-removal-speed`, 10,000 random
images, float32; medians, each pair measured in turn in one run. The losses of both ways agree to
1e-6 (asserted). Processes have one thread each. Half the time of two independent copies is what
a curve takes where the machine is full: two processes that share one can reach no more.

{table}

{where}.
"""


if __name__ == "__main__":
    main(__doc__, PAGE, measure, table)
