"""BibTeX of results."""

from __future__ import annotations

import argparse
import hashlib
import json
from typing import Any

from widthbench.cli.common import as_json, data_folder, folder_of, suite_names, whose_results
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
    as_json(verb)
    verb.set_defaults(run=run)
    data_folder(verb)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    from widthbench.experiment import suites
    from widthbench.experiment.records import read_records
    from widthbench.report.build import of_suite
    from widthbench.report.exports import citation

    cited = []
    for suite in map(suites.load, args.suite):
        path = folder_of(args, suite.name) / "records.jsonl"
        records = of_suite(suite, path, read_records(path)) if path.is_file() else []
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if records else None
        text = visible(citation(suite, records, digest), "\n")
        cited.append({"suite": suite.name, "cells": len(records), "sha256": digest, "bibtex": text})
    if args.json:
        print(json.dumps(cited, indent=1))
    else:
        print("\n".join(str(c["bibtex"]) for c in cited))
    return 0
