"""Leaderboards, figures and the page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from widthbench.cli.common import as_json, data_folder, own_files, suite_names
from widthbench.errors import UsageError, visible


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "report",
        help=(
            "write a suite's leaderboard and figures from finished cells, or a page of all results"
        ),
        description=(
            "Write the leaderboards and figures of suites from what was measured here, and"
            " reproduction.md, which compares it with what was published. With --site, also one"
            " static page, site.html, of every suite there and of the claims."
        ),
    )
    suite_names(verb, "*")
    verb.add_argument(
        "--no-timing",
        action="store_true",
        help="measure no latency: keep the timings that are there",
    )
    verb.add_argument(
        "--site",
        action="store_true",
        help="also write site.html; without SUITE, nothing but it, of what is published",
    )
    verb.add_argument(
        "--publish",
        action="store_true",
        help=(
            "instead put what was measured in the place of what is published, cell by cell (in a"
            " checkout: results/published)"
        ),
    )
    verb.add_argument(
        "--add",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help=(
            "first take over the records in these records.jsonl, of another machine, say, and the"
            " timings.jsonl beside them; a finished record beats a failed one"
        ),
    )
    verb.add_argument(
        "--replace",
        action="store_true",
        help="let added records take the place of others that come from another device",
    )
    verb.add_argument(
        "--results", type=Path, metavar="DIR", help="where results are (default: ./results)"
    )
    own_files(verb)
    as_json(verb)
    verb.set_defaults(run=run)
    data_folder(verb)


def run(args: argparse.Namespace, fresh: Sequence[Any] = ()) -> int:
    """Do it; gives the exit code."""
    from widthbench.experiment import suites
    from widthbench.experiment.store import Store
    from widthbench.paths import published_dir, require_writable
    from widthbench.report.build import adding, build, publish
    from widthbench.report.timing import read_timings

    failed = []
    results = args.results or Path("results")
    site, chosen = getattr(args, "site", False), suites.load_all(args.suite)
    require_writable(results)
    if not (chosen or site):
        raise UsageError("name a suite (`widthbench list suites`), or ask for --site")
    for suite in chosen:
        if getattr(args, "publish", False):
            for file in publish(suite, results, replace=args.replace):
                print(f"wrote {file}")
            continue
        added = (
            adding(suite, results, Store(), args.add, replace=args.replace)
            if getattr(args, "add", [])
            else fresh
        )
        timings = [t for file in getattr(args, "add", []) for t in read_timings(file.parent)]
        report = build(
            suite,
            results,
            Store(),
            time_shapes=not args.no_timing,
            fresh=added,
            timings=timings,
            replace=getattr(args, "replace", False),
        )
        failed += report.failed
        if args.json:
            print(json.dumps([r.model_dump(mode="json") for r in report.records]))
        else:
            print(f"\n{report.text}\n")
            for file in report.files:
                print(f"wrote {file}")
            if report.reproduction:
                print(f"\n{report.reproduction}")
    if failed:
        first = visible(f"{failed[0].cell.id}: {failed[0].reason}")
        print(f"widthbench: {len(failed)} cells failed, the first {first}", file=sys.stderr)
    if site:
        from widthbench.report.site import write

        of = (
            results if chosen or args.results else published_dir()
        )  # of what was measured, or of all that is published
        print(f"wrote {write(of, chosen, results)}", file=sys.stderr if args.json else sys.stdout)
    return 1 if failed else 0
