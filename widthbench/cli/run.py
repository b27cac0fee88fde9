"""Run suites."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from widthbench.cli import report
from widthbench.cli.common import (
    Told,
    as_json,
    data_folder,
    duration,
    own_files,
    positive,
    results_folder,
    seconds,
    share,
    show,
    suite_names,
)
from widthbench.errors import UsageError


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "run",
        help="run the cells of a suite that have no result yet, then write its report",
        description=(
            "Run the cells of a suite that have no result yet, then write its report. Finished"
            " cells, trained base networks and half-done training are kept in the cache"
            " (WIDTHBENCH_CACHE, by default the user's cache folder): a run that was stopped goes"
            " on from there."
        ),
    )
    suite_names(verb, nargs="*")
    verb.add_argument(
        "--jobs",
        type=positive,
        default=None,
        metavar="N",
        help=(
            "worker processes (default: 1); with --engine ray and no --address, cores of the Ray"
            " that is started (default: all)"
        ),
    )
    verb.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help=(
            "only cells whose name (as in the log) is like one of these, as in '*-l1-norm-*-s0', or"
            " holds one"
        ),
    )
    verb.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="where cells run: processes of this machine, or a Ray cluster (default: local)",
    )
    verb.add_argument(
        "--address",
        metavar="ADDRESS",
        help=(
            "of a running Ray cluster ('auto': the one that this machine belongs to; default: start"
            " one here)"
        ),
    )
    verb.add_argument(
        "--gpus",
        type=share,
        metavar="N",
        help=(
            "GPUs of each Ray task, fractions allowed (default: one where there are any and the"
            " suite's device is not cpu)"
        ),
    )
    verb.add_argument(
        "--store",
        metavar="URL",
        help=(
            "where machines share finished cells and base networks if their caches are apart: a"
            " folder, or any fsspec URL (s3://…, gs://…; default: WIDTHBENCH_STORE, or none)"
        ),
    )
    verb.add_argument(
        "--within",
        type=seconds,
        metavar="SECONDS",
        help=(
            "stop after so many seconds (the time of a job on a cluster): what is finished is kept"
            " and reported, and the next run goes on from there"
        ),
    )
    verb.add_argument(
        "--dry-run",
        action="store_true",
        help="say what there is to do, and for about how long, by the times of earlier records",
    )
    verb.add_argument(
        "--order",
        choices=["network", "seed"],
        default="network",
        help=(
            "what is finished first: all seeds of a network, or one seed of all networks (default:"
            " network)"
        ),
    )
    verb.add_argument(
        "--no-timing",
        action="store_true",
        help="measure no latency: keep the timings that are there",
    )
    results_folder(verb)
    own_files(verb)
    as_json(verb)
    verb.set_defaults(run=run)
    data_folder(verb)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    from widthbench import cache, parallel
    from widthbench.experiment import suites
    from widthbench.paths import require_writable

    if parallel.launched() and ((args.jobs or 1) > 1 or args.engine != "local"):
        raise UsageError(
            "a launcher started several processes for each cell, so --jobs must be 1 and --engine"
            " local"
        )
    if args.engine != "ray" and (args.address is not None or args.gpus is not None):
        raise UsageError("--address and --gpus are for --engine ray")
    if args.engine == "ray" and args.within is not None:
        raise UsageError(
            "--within is for --engine local: a cluster's own scheduler has a time limit for jobs"
        )
    if args.address is not None and args.jobs is not None:
        raise UsageError(
            "a cluster has the cores that it has: leave --jobs out where --address is given"
        )
    if not args.suite:  # `--only PATTERN SUITE`: argparse has given it all to --only
        args.suite = [n for n in args.only if n.endswith(".toml") or n in suites.names()]
        args.only = [n for n in args.only if n not in args.suite]
        if not args.suite:
            raise UsageError("name a suite (`widthbench list suites`), or a TOML file")
        if not args.only:
            raise UsageError(f"--only has no pattern, only the suite {args.suite[0]}")
    chosen = [
        (s, [c for c in s.cells() if suites.matches(c.id, args.only)])
        for s in suites.load_all(args.suite)
    ]
    require_writable(args.results)
    cache.check_store()
    for suite, cells in chosen:
        if not cells:
            raise UsageError(
                f"suite {suite.name} has no cell whose name is like"
                f" {' or '.join(map(repr, args.only))}"
            )
        suites.check(suite, cells)
    cells = list({c.identity: c for _, some in chosen for c in some}.values())
    if args.dry_run:
        _plan(cells, args.jobs or 1, args.results, args.json)
        return 0
    if args.order == "seed":
        cells.sort(key=lambda c: c.seed)
    limits = suites.limits(s for s, _ in chosen)
    told = Told(len(cells))
    parallel.start()
    try:
        if args.engine == "ray":
            from widthbench.engines import ray

            ray.run(
                cells,
                done=told,
                limits=limits,
                address=args.address,
                jobs=args.jobs,
                gpus=args.gpus,
            )
        else:
            from widthbench.engines import local

            if not local.run(
                cells, jobs=args.jobs or 1, done=told, limits=limits, within=args.within
            ):
                left = f"{len(cells) - len(told.records)} of {len(cells)} cells are left"
                print(f"widthbench: time is over, {left}: run again for the rest", file=sys.stderr)
                if not told.records:
                    return 0
        return report.run(args, told.records) if parallel.is_main() else 0
    finally:
        parallel.stop()


def _plan(cells: Sequence[Any], jobs: int, results: Path, as_json: bool) -> None:
    """Say what there is to do, and for about how long."""
    from widthbench.experiment import keys
    from widthbench.experiment.forecast import Forecast
    from widthbench.experiment.store import Store

    store, forecast = Store(), Forecast(results)
    left = [c for c in cells if store.get(keys.cell_key(c)) is None]
    groups: dict[str, list[Any]] = {}
    for cell in left:
        groups.setdefault(cell.group, []).append(cell)
    times = {name: forecast.times(some) for name, some in groups.items()}
    seconds = {name: sum(t for t in known if t is not None) for name, known in times.items()}
    unknown = {name: known.count(None) for name, known in times.items()}
    # one base network's cells run one after another
    least = max([*seconds.values(), sum(seconds.values()) / max(1, min(jobs, len(groups)))])
    if as_json:
        plan = {
            "cells": len(cells),
            "to run": len(left),
            "jobs": jobs,
            "seconds": least,
            "unknown": sum(unknown.values()),
            "groups": [
                {
                    "group": name,
                    "cells": [c.id for c in some],
                    "seconds": seconds[name],
                    "unknown": unknown[name],
                }
                for name, some in groups.items()
            ],
        }
        print(json.dumps(plan, indent=1))
        return
    rows = [
        {
            "network, data set, seed": name,
            "cells to run": len(some),
            "about": _about(seconds[name], unknown[name], len(times[name])),
        }
        for name, some in groups.items()
    ]
    show(rows, as_json)
    print(f"{len(cells) - len(left)} of {len(cells)} cells are finished, {len(left)} are to be run")
    if left:
        total = _about(least, sum(unknown.values()), sum(map(len, times.values())))
        print(
            f"{total} with {jobs} job(s), by what such cells took before, here or on the published"
            " records' machines (a base network's training counts as one)"
        )


def _about(seconds: float, unknown: int, of: int) -> str:
    """A time, if anything is known of it."""
    if unknown == of:
        return "unknown"
    return f"about {duration(seconds)}" + (f" and {unknown} of unknown time" if unknown else "")
