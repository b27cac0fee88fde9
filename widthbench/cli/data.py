"""Data sets: which are there, and whether they can be read."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from widthbench.cli.common import as_json, data_folder, show
from widthbench.errors import UsageError


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "data",
        help="data sets: which are there, where, how many images, and their digests",
        description=(
            "List the data sets that are known or lie where data are looked for (WIDTHBENCH_DATA or"
            " --data). With names, read them whole: a damaged file is named, and the exit code"
            " is 1."
        ),
    )
    verb.add_argument(
        "datasets",
        nargs="*",
        metavar="DATASET",
        help="read only these, every image (default: list all)",
    )
    as_json(verb)
    verb.set_defaults(run=run)
    data_folder(verb)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    from widthbench.data import sources
    from widthbench.paths import data_dir

    rows: list[dict[str, Any]] = []
    bad, missing = [], []
    for name in args.datasets or sources.names():
        place = sources.locate(name)
        row = {
            "dataset": name,
            "where": place[0] if place else "not there",
            "layout": place[1] if place else "",
        }
        row |= dict.fromkeys(("classes", "train", "test", "image", "digest"), "")
        if not place:
            missing.append(f"{name}: put {sources.wanted(name)}")
        if place or args.datasets:
            try:
                source = sources.load(name)
                if args.datasets:
                    sources.verify(source)
                row |= {
                    "where": source.where,
                    "layout": source.layout,
                    "classes": str(source.classes),
                    "train": f"{len(source.train):,}",
                    "test": f"{len(source.test):,}",
                    "image": source.image,
                    "digest": source.digest if args.json else source.digest[:12],
                }
            except UsageError as error:
                row["layout"] = "cannot be read"
                bad.append(str(error))
        rows.append(row)
    show(rows, args.json, f"data are looked for in {data_dir()}")
    if not args.json and not args.datasets:
        print("\n".join(missing))
    for reason in bad:
        print(f"widthbench: {reason}", file=sys.stderr)
    return 1 if bad else 0
