"""What grows with what: seconds per cell that costs nothing, by engine; time and memory of a report
by its number of records.

    python bench/studies/scale.py [--records 1000 10000 100000] > results/scale.md

A cell that costs nothing is one whose record a worker finds in the cache: what is left is the key,
the way there and back, and the record itself. Records are copies of a real one of `results/lenets`,
under cells of a made suite (10 techniques, 20 budgets, 5 networks). Each report runs in a process
of its own: from records in memory, as after a run, and from `records.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tabulate import tabulate

from widthbench.engines import local
from widthbench.experiment import keys, suites
from widthbench.experiment.records import Record, read_records
from widthbench.experiment.store import Store
from widthbench.provenance import commit, hardware, stamp
from widthbench.report.build import build

ROOT = Path(__file__).resolve().parents[2]
TEXT = """
name = "scale"
citable = true
datasets = ["digits"]
seeds = [{seeds}]
budgets = [{budgets}]
controls = []
techniques = [{techniques}]
device = "cpu"
[base]
epochs = 1
lr = 0.1
[finetune]
epochs = 1
lr = 0.1
"""
NETWORK = '[[models]]\nname = "lenet_300_100"\nvariant = "v{0}"\nsize = 28\n'


def suite_of(
    count: int, networks: int = 5, budgets: int = 20, techniques: int = 10
) -> suites.Suite:
    """A suite of about that many cells."""
    text = TEXT.format(
        seeds=", ".join(map(str, range(max(1, count // (networks * budgets * techniques))))),
        budgets=", ".join(f'"macs:{0.9 - 0.02 * i:.2f}"' for i in range(budgets)),
        techniques=", ".join(
            f'{{ id = "l1-norm", params = {{ x = {i} }} }}' for i in range(techniques)
        ),
    )
    return suites.parse(text + "".join(map(NETWORK.format, range(networks))), "scale.toml")


def made(count: int, *sizes: int) -> tuple[suites.Suite, list[Record]]:
    """A suite as ``suite_of`` makes it, and its records."""
    suite = suite_of(count, *sizes)
    real = read_records(ROOT / "results" / "published" / "lenets" / "records.jsonl")
    one = next(r for r in real if r.cell.id.startswith("mnist-lenet5-l1-norm"))
    one = one.model_copy(update={"provenance": {**one.provenance, **stamp()}})
    draw = random.Random(0)
    records = []
    for cell in suite.cells():
        rows = tuple(
            r.model_copy(update={"top1": min(100.0, r.top1 * draw.uniform(0.95, 1))})
            for r in one.rows
        )
        records.append(
            one.model_copy(update={"cell": cell, "rows": rows, "key": keys.cell_key(cell)})
        )
    return suite, records


def reports(count: int) -> dict[str, Any]:
    """Time and memory of two reports, each in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, Any] = {"records": count}
        for what, told in (("after a run", "fresh"), ("from records.jsonl", "file")):
            done = subprocess.run(
                [sys.executable, __file__, told, str(count), name],
                check=True,
                capture_output=True,
                text=True,
            )
            took, peak = json.loads(done.stdout.splitlines()[-1])
            found |= {f"{what}, s": f"{took:.1f}", f"{what}, GB": f"{peak:.1f}"}
        found["records.jsonl, MB"] = (
            f"{(Path(name) / 'scale' / 'records.jsonl').stat().st_size / 1e6:.0f}"
        )
    return found


def report(told: str, count: int, folder: Path) -> tuple[float, float]:
    """Seconds of one report, and GB of memory at the most, in this process."""
    suite, records = made(count) if told == "fresh" else (suite_of(count), [])
    os.environ["WIDTHBENCH_CACHE"] = f"{folder}/cache"
    begin = time.perf_counter()
    build(suite, folder, Store(), time_shapes=False, fresh=records)
    return time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def empty_cells(count: int) -> list[list[str]]:
    """Milliseconds per cell that is found in the cache, by engine."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["WIDTHBENCH_CACHE"] = name
        suite, records = made(count, 2, 5, 5)
        store = Store()
        for record in records:
            store.put(record)

        def timed(what: str, run: Any) -> None:
            moments: list[float] = []
            run(lambda record: moments.append(time.perf_counter()))
            # from the first answer on: starting workers is shown apart
            rows.append(
                [
                    what,
                    len(moments),
                    f"{1000 * (moments[-1] - moments[0]) / (len(moments) - 1):.2f}",
                ]
            )

        cells = suite.cells()
        timed("local, 1 worker", lambda done: local.run(cells, jobs=1, done=done))
        timed("local, 2 workers", lambda done: local.run(cells, jobs=2, done=done))
        if find_spec("ray"):
            timed("Ray, 2 cores of this machine", lambda done: through_ray(cells, done))
    return rows


def through_ray(cells: Any, done: Any) -> None:
    """All cells as tasks: the driver would otherwise see that they are finished, and send none."""
    import ray

    from widthbench.engines import ray as engine

    engine._connect(ray, None, 2)
    token = "scale"
    engine.cache.write_json(engine._token(token), {"token": token})
    needs = {c.identity: {"CPU": 1.0} for c in cells}
    engine._schedule(ray, cells, needs, {}, token, done)
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--records", nargs="+", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--cells", type=int, default=1000)
    args = parser.parse_args()
    cells = empty_cells(args.cells)
    found = [reports(count) for count in args.records]
    state = commit()
    print("# Scale\n\nWritten by `bench/studies/scale.py`.\n\n## A cell that costs nothing\n")
    print(
        tabulate(
            cells,
            headers=["engine", "cells", "ms per cell"],
            tablefmt="pipe",
            disable_numparse=True,
        )
    )
    print("\n## Reports\n")
    print(tabulate(found, headers="keys", tablefmt="pipe", disable_numparse=True))
    dirty = " with uncommitted changes" if state["dirty"] else ""
    print(
        f"\n`python bench/studies/scale.py {' '.join(sys.argv[1:])}`; commit"
        f" {str(state['commit'])[:12]}{dirty}; ",
        end="",
    )
    print(f"{hardware()['cpu']}, {hardware()['cores']} cores.")


if __name__ == "__main__":
    if sys.argv[1:2] in (["fresh"], ["file"]):  # a process that measures one report
        print(json.dumps(report(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
