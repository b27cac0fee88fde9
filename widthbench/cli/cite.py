"""BibTeX of results."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

from widthbench.cli.common import data_folder, folder_of, suite_names, whose_results
from widthbench.errors import visible


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "cite",
        help="BibTeX of a suite's results and of the techniques in them",
        description=(
            "Print BibTeX: an entry for each suite, with the version, commit and digest of its"
            " results, and one for each technique that it compares."
        ),
    )
    suite_names(verb)
    whose_results(verb)
    verb.set_defaults(run=run)
    data_folder(verb)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    from widthbench.experiment import suites
    from widthbench.experiment.records import read_records
    from widthbench.report.build import of_suite
    from widthbench.report.exports import citation

    for suite in map(suites.load, args.suite):
        path = folder_of(args, suite.name) / "records.jsonl"
        records = of_suite(suite, path, read_records(path)) if path.is_file() else []
        there = bool(records)
        print(
            visible(
                citation(
                    suite, records, hashlib.sha256(path.read_bytes()).hexdigest() if there else None
                ),
                "\n",
            )
        )
    return 0
