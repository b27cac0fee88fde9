"""Whether a commit made anything slower."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from widthbench.cli.common import as_json, positive


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "regress",
        help="whether a commit made anything slower than another one",
        description=(
            "Install two commits of the repository at hand side by side, in folders of their own,"
            " and measure both in the environment at hand, sample by sample in turn; what is beyond"
            " the factor is measured again, by fresh processes and twice as often, before it is"
            " called slower. Prints a markdown table for a pull request. Exit codes: 0 nothing got"
            " worse, 1 something is slower or takes more memory, 2 a benchmark broke, or bad input."
        ),
    )
    verb.add_argument("base", metavar="BASE", help="the commit that was: a hash, a branch, a tag")
    verb.add_argument(
        "head", metavar="HEAD", nargs="?", default="HEAD", help="the commit that is (default: HEAD)"
    )
    verb.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only benchmarks whose name holds one of these",
    )
    verb.add_argument(
        "--factor",
        type=float,
        default=1.5,
        help="from which ratio on something is slower (default: 1.5)",
    )
    verb.add_argument(
        "--pairs",
        type=positive,
        default=5,
        metavar="N",
        help="pairs of samples of a first look (default: 5)",
    )
    verb.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where to measure (default: cpu)"
    )
    verb.add_argument("--write", type=Path, metavar="FILE", help="also write the table to a file")
    as_json(verb)
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    from widthbench.paths import write_atomic
    from widthbench.report import regress

    comparison = regress.compare(
        args.base,
        args.head,
        factor=args.factor,
        pairs=args.pairs,
        only=args.only,
        device=args.device,
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(
        json.dumps([r.plain() for r in comparison.rows], indent=1)
        if args.json
        else comparison.markdown()
    )
    if args.write:
        write_atomic(args.write, comparison.markdown())
    return comparison.exit_code
