"""What the papers report, with verdicts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from widthbench.cli.common import Told, as_json, data_folder, positive, show, whose_results
from widthbench.errors import UsageError


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "claims",
        help="what the papers report against what was measured, with verdicts",
        description=(
            "Judge the claims of the papers by the published records; with --run or"
            " --results by those in a folder of yours, where claims.md is then written. A claim"
            " that is not reproduced is a result: the exit code is 0."
        ),
    )
    verb.add_argument("--id", nargs="+", default=[], metavar="ID", help="only these (default: all)")
    verb.add_argument(
        "--run",
        dest="first",
        action="store_true",
        help="first run the cells that the claims rest on and that have no result yet",
    )
    verb.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="worker processes for --run (default: 1)",
    )
    verb.add_argument(
        "--publish",
        action="store_true",
        help="write claims.md and claims.json beside the published records",
    )
    whose_results(verb)
    as_json(verb)
    verb.set_defaults(run=run)
    data_folder(verb)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    from widthbench.claims import ledger
    from widthbench.paths import published_dir, require_writable
    from widthbench.report.claims import rows_of, write

    chosen = ledger.choose(ledger.load(), args.id)
    here = args.results or Path("results")
    where = here if args.results or args.first else published_dir()
    wanted = not args.id and (args.publish or where != published_dir())
    if args.publish and where != published_dir():
        raise UsageError(
            "--publish is for claims that are judged by the published records: leave out --run and"
            " --results"
        )
    if wanted:
        require_writable(where)
    failed = _run_claims([claim for _, claim in chosen], here, args.jobs) if args.first else 0
    judged = ledger.judge_all(where, args.id)
    show(rows_of(judged), args.json)
    if not args.json:
        print(f"judged by the records in {where}")
    for file in write(judged, where) if wanted else ():
        print(f"wrote {file}", file=sys.stderr if args.json else sys.stdout)
    return 1 if failed else 0


def _run_claims(chosen: Sequence[Any], results: Path, jobs: int) -> int:
    """Run what the claims rest on, and write the suites' results; gives the number of failed
    cells.
    """
    from widthbench.claims import ledger
    from widthbench.engines import local
    from widthbench.experiment import suites
    from widthbench.experiment.store import Store
    from widthbench.report.build import build

    failed = 0
    for name, cells in ledger.cells(chosen).items():
        suites.check(suites.load(name), cells)
        told = Told(len(cells))
        local.run(cells, jobs=jobs, limits=suites.limits([suites.load(name)]), done=told)
        failed += len(build(suites.load(name), results, Store(), fresh=told.records).failed)
    return failed
