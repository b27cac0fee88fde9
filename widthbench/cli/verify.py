"""Whether results are what they say."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from widthbench.cli.common import (
    as_json,
    count,
    data_folder,
    folder_of,
    own_files,
    positive,
    show,
    suite_names,
    whose_results,
)
from widthbench.errors import UsageError, visible


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "verify",
        help="whether a suite's results are what they say: digests, and cells run again",
        description=(
            "Hold the files of a suite's results and each record to their digests, then run"
            " recorded cells again from nothing, in a cache of their own. On the machine, with the"
            " code and the versions that a record names the rerun must be equal bit by bit (but for"
            " times); elsewhere its test top-1 at the last stage must lie within one point or three"
            " standard errors of the difference, and its MACs within 5 %; sizes and costs must fit"
            " (docs/citing.md). Exit code 1 if anything differs."
        ),
    )
    suite_names(verb)
    verb.add_argument(
        "--sample",
        type=count,
        metavar="N",
        help="run N cells again, drawn at random; 0: files only (default: all)",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw (default: 0)")
    verb.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help=("draw only from cells whose name is like one of these ('*-l1-norm-*'), or holds one"),
    )
    verb.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="worker processes (default: 1)"
    )
    whose_results(verb)
    own_files(verb)
    as_json(verb)
    verb.set_defaults(run=run)
    data_folder(verb)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    from widthbench.experiment import suites
    from widthbench.experiment.records import read_lines
    from widthbench.paths import published_dir
    from widthbench.report import verify

    checks = []
    for suite in map(suites.load, args.suite):
        folder = folder_of(args, suite.name)
        of_files = verify.check_files(suite, folder)
        records = [line.record for line in read_lines(folder / "records.jsonl") if line.record]
        wanted = [r for r in records if suites.matches(r.cell.id, args.only)]
        if records and not wanted:
            raise UsageError(
                f"suite {suite.name} has no record whose name is like"
                f" {' or '.join(map(repr, args.only))}"
            )
        drawn = [] if args.sample == 0 else verify.sample(wanted, args.sample, args.seed)
        if drawn:
            spent = sum(s.seconds for r in drawn for s in r.spent.values())
            print(
                f"{suite.name}: {len(drawn)} of {len(records)} cells again; they took"
                f" {spent:.0f} s",
                file=sys.stderr,
            )
            of_files += verify.rerun(
                suite,
                drawn,
                beside=records,
                jobs=args.jobs,
                tell=lambda c: print(
                    visible(f"{c.what}: {'holds' if c.ok else 'DIFFERS'} ({c.by}) {c.note}"),
                    file=sys.stderr,
                ),
            )
        checks += [{"suite": suite.name, **c.plain()} for c in of_files]
    checks += [
        {"suite": "", **c.plain()} for c in verify.check_claims(args.results or published_dir())
    ]
    show(checks, args.json)
    bad = sum(c["verdict"] != "holds" for c in checks)
    if not args.json:
        equal, near = (sum(c["by"] == how for c in checks) for how in ("bit-equal", "tolerance"))
        print(f"{bad} of {len(checks)} checks differ" if bad else f"all {len(checks)} checks hold")
        if equal or near:
            print(
                f"reruns: {equal} checks bit by bit, {near} within tolerance (records of other"
                " code, versions or hardware)"
            )
    return 1 if bad else 0
