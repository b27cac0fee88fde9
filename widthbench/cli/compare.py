"""Two sets of results beside each other."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from widthbench.cli.common import RED, as_json, paint, points
from widthbench.errors import UsageError


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "compare",
        help="two sets of results: rows, differences, cells that are equal",
        description=(
            "Compare two sets of results, row by row: means, paired differences over the seeds that"
            " both have, cells that are equal bit by bit, times. Prints markdown."
        ),
    )
    for side in ("first", "second"):
        verb.add_argument(
            side,
            metavar=side.upper(),
            help="a folder with records.jsonl, such a file, or the name of a published suite",
        )
    verb.add_argument(
        "--worse",
        type=points,
        metavar="POINTS",
        help=(
            "exit code 1 if a technique's row is on average more than so many points lower in"
            " SECOND, over the seeds that both have, or it has failed cells there, or is missing"
        ),
    )
    verb.add_argument("--write", type=Path, metavar="FILE", help="also write the page to a file")
    as_json(verb)
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    from widthbench.paths import write_atomic
    from widthbench.report.lines import lines
    from widthbench.report.reproduction import between, settings
    from widthbench.running import load
    from widthbench.statistics import interval

    sides = [load(args.first), load(args.second)]
    names = (args.first, args.second)
    text, paired = between(names, *(side.records for side in sides))
    if not paired:
        raise UsageError(f"{args.first} and {args.second} have no row in common")
    if args.write:
        write_atomic(args.write, text)
    if args.json:
        rows = [
            {
                "dataset": p.new.dataset,
                "network": p.new.model,
                "technique": p.new.label,
                "budget": p.new.budget,
                "first": s.mean if (s := p.old.summary(None)) else None,
                "second": s.mean if (s := p.new.summary(None)) else None,
                "difference": fmean(p.gaps) if p.gaps else None,
                "interval": interval(p.gaps) if len(p.gaps) > 2 else None,
                "differences": list(p.gaps),
                "settings": [s._asdict() for s in settings([p])],
                "equal": p.same,
                "both": p.both,
            }
            for p in paired
        ]
        print(json.dumps(rows, indent=1))
    else:
        print(text)
    if args.worse is None:
        return 0
    worse = [
        f"{p.new.label} at {p.new.budget or 'full width'} on {p.new.model}"
        for p in paired
        if not p.new.control and p.old.done and _worse(p, args.worse)
    ]
    there = {(p.new.dataset, p.new.model, p.new.label, p.new.budget) for p in paired}
    for line in lines(sides[0].records):
        place = (line.dataset, line.model, line.label, line.budget)
        if line.done and not line.control and place not in there:
            worse.append(f"{line.label} at {line.budget} on {line.model}: not there")
    for row in worse:
        print(f"{paint('widthbench: worse:', RED)} {row}", file=sys.stderr)
    return 1 if worse else 0


def _worse(pair: Any, points: float) -> bool:
    """Whether a row fell by more than so many points, over the seeds that both have, or has more
    failed cells.
    """
    return pair.new.failed > pair.old.failed or not pair.gaps or fmean(pair.gaps) < -points
