"""Where time goes: in one epoch of training, and in one cell from loading to record; what of it is
the harness's own.

    python bench/studies/where_time_goes.py [--write results/where-time-goes]

Functions are timed without what other timed functions take inside them, so that the parts add up. A
cell's *harness* is all that is neither training, decision, resize, recalibration nor scoring:
digests, locks, loading, looking groups up, records, files.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate

from widthbench.data import splits
from widthbench.experiment import adaptation, bases, protocol, recipes, suites
from widthbench.experiment.cell import Cell
from widthbench.experiment.store import Store
from widthbench.networks import models
from widthbench.paths import write_atomic
from widthbench.report.speed import where
from widthbench.technique import base
from widthbench.training import loop, state

WORK = ("training", "decision", "resize", "recalibration", "scores")
CELLS = (
    ("digits", "digits-test_resnet-l1-norm-macs:0.5-s0"),
    ("digits", "digits-test_vit-l1-norm-macs:0.5-s0"),
    ("lenets", "mnist-lenet5-l1-norm-macs:0.0625-s0"),
    ("cifar10", "cifar10-resnet20_cifar-l1-norm-macs:0.5-s0"),
)
EPOCHS = (  # network, recipe, data, pixels
    ("lenet_300_100", "lenet_300_100", "mnist", 28),
    ("lenet5", "lenet5", "mnist", 28),
    ("resnet20_cifar", "cifar-resnet", "cifar10", 32),
)


def _now() -> float:
    """Seconds, once a GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds by name, each without those of what it calls."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float]] = []

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        begin = _now()
        self._open.append((name, 0.0))
        try:
            yield
        finally:
            took = _now() - begin
            _, inside = self._open.pop()
            self.seconds[name] += took - inside
            if self._open:
                outer, before = self._open[-1]
                self._open[-1] = outer, before + took

    def timed(self, name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.on(name):
                return function(*args, **kwargs)

        return run

    def patch(self, stack: ExitStack, owner: Any, attribute: str, name: str) -> None:
        stack.enter_context(
            mock.patch.object(owner, attribute, self.timed(name, getattr(owner, attribute)))
        )


def two_cells(suite: str, name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a cell's parts, its base network in the cache; and of the next budget's, as most
    cells of a suite are.
    """
    cells = {c.id: c for c in suites.load(suite).cells()}
    cell, following = cells[name], cells[name.replace("macs:0.5", "macs:0.25")]
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, {"WIDTHBENCH_CACHE": cache}),
    ):
        bases.obtain_base(cell)  # trained, certified: what the first cell of a base pays for all
        bases._loaded.clear()
        bases._groups.clear()
        return _parts(cell), _parts(following)


def _parts(cell: Cell) -> dict[str, float]:
    watch = Stopwatch()
    with ExitStack() as stack:
        for owner, attribute, part in (
            (bases, "fit", "training"),
            (adaptation, "fit", "training"),
            (adaptation, "recalibrate", "recalibration"),
            (adaptation, "score", "scores"),
            (base.Technique, "apply", "decision"),
            (base, "resize", "resize"),
            (bases, "load_data", "load data"),
            (bases, "fresh_model", "build network"),
            (bases, "find_groups", "look groups up"),
            (bases, "CostModel", "cost model"),
            (protocol, "cell_key", "digests"),
            (bases, "_read_weights", "read weights"),
            (bases, "count_macs", "count MACs"),
        ):
            watch.patch(stack, owner, attribute, part)
        with watch.on("rest"):
            record = protocol.run_cell(cell, Store())
    assert record.status == "done", record.reason
    return dict(watch.seconds)


def one_epoch(network: str, name: str, dataset: str, size: int) -> dict[str, float]:
    """Seconds of an epoch's parts, after a tenth of one that warms up."""
    source = splits.load(dataset, size)
    model = models.create(network, classes=source.classes, channels=source.channels, size=size)
    recipe = recipes.load(name).recipe.model_copy(update={"epochs": 0.1})
    loop.fit(model, source.train, recipe, macs=1)
    watch, train = Stopwatch(), source.train

    class Timed:
        def __len__(self) -> int:
            return len(train)

        def batches(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            found = train.batches(*args, **kwargs)
            while (
                batch := watch.timed("batches and augmentation", lambda: next(found, None))()
            ) is not None:
                yield batch

    with ExitStack() as stack:
        watch.patch(stack, torch.Tensor, "backward", "backward")
        watch.patch(stack, torch.optim.Optimizer, "zero_grad", "optimizer")
        make = state.create_optimizer_v2

        def optimizer(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            made.step = watch.timed("optimizer", made.step)
            return made

        stack.enter_context(mock.patch.object(state, "create_optimizer_v2", optimizer))
        model.forward = watch.timed("forward", model.forward)
        with watch.on("the loop itself"):
            loop.fit(model, Timed(), recipe.model_copy(update={"epochs": 1.0}), macs=1)
    return dict(watch.seconds)


def table(rows: dict[str, dict[str, float]], last: tuple[str, ...] = ()) -> str:
    names = sorted(
        {n for parts in rows.values() for n in parts},
        key=lambda n: (n in last, -max(p.get(n, 0) for p in rows.values())),
    )
    body = [
        {
            "": title,
            "seconds": f"{sum(parts.values()):.2f}",
            **{n: f"{100 * parts.get(n, 0) / sum(parts.values()):.1f} %" for n in names},
        }
        for title, parts in rows.items()
    ]
    return tabulate(body, headers="keys", tablefmt="pipe", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write FILE.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    epochs = {
        f"{network} on {dataset}": one_epoch(network, name, dataset, size)
        for network, name, dataset, size in EPOCHS
    }
    cells = {}
    for suite, name in CELLS:
        cells[f"`{name}`, first"], cells[f"`{name.replace('0.5', '0.25')}`, next"] = two_cells(
            suite, name
        )
    shares = {
        title: sum(s for n, s in parts.items() if n not in WORK) / sum(parts.values())
        for title, parts in cells.items()
    }
    text = f"""# Where time goes

One epoch of training by the network's recipe:

{table(epochs)}

One cell whose base network is in the cache, everything included: the first of a process, which
loads the data and looks up groups for all of its base's cells, and the next:

{table(cells)}

The harness's own part (all but {", ".join(WORK)}):
{"; ".join(f"{t} {100 * s:.1f} %" for t, s in shares.items())}.

Written by `python bench/studies/where_time_goes.py --write results/where-time-goes`, one thread.
{where()} """
    print(text)
    if args.write:
        write_atomic(args.write.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
