"""What is installed: techniques, controls, suites, recipes, data sets."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from widthbench.cli.common import as_json, data_folder, own_files, show


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "list", help="techniques, controls, suites, recipes and data sets that are installed"
    )
    verb.add_argument(
        "what",
        nargs="?",
        choices=["techniques", "controls", "suites", "datasets", "recipes"],
        help="only these (default: all)",
    )
    own_files(verb)
    as_json(verb)
    verb.set_defaults(run=run)
    data_folder(verb)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    from widthbench.data import sources
    from widthbench.experiment import recipes, suites
    from widthbench.experiment.cell import CONTROLS
    from widthbench.experiment.controls import RUNNERS
    from widthbench.technique import registry

    tables: dict[str, list[dict[str, Any]]] = {}
    bad: dict[str, str] = {}
    if args.what in (None, "techniques"):
        good, bad = registry.load_all()
        tables["techniques"] = [
            {
                "technique": n,
                "data access": c.access,
                "from": registry.owner(n),
                "what it does": " ".join((c.__doc__ or "").partition("\n\n")[0].split()),
            }
            for n, c in good.items()
        ]
    if args.what in (None, "controls"):
        tables["controls"] = [
            {
                "control": f"{name}:TECHNIQUE" if CONTROLS[name].sourced else name,
                "what it is": " ".join((type(c).__doc__ or "").partition("\n\n")[0].split()),
            }
            for name, c in RUNNERS.items()
        ]
    if args.what in (None, "suites"):
        tables["suites"] = []
        for name in suites.names():
            s = suites.load(name)
            tables["suites"].append(
                {"suite": name, "cells": len(s.cells()), "seeds": len(s.seeds), "title": s.title}
            )
    if args.what in (None, "datasets"):
        tables["datasets"] = [
            {"dataset": n, "where": (sources.locate(n) or ("not there",))[0]}
            for n in sources.names()
        ]
    if args.what in (None, "recipes"):
        tables["recipes"] = []
        for name in recipes.names():
            r = recipes.load(name)
            reached = (
                ", ".join(f"{k} {v:.2f} %" for k, v in r.reaches.items()) or "not measured here"
            )
            tables["recipes"].append(
                {
                    "recipe": name,
                    "epochs": f"{r.recipe.epochs:g}",
                    "reaches": reached,
                    "title": r.title,
                }
            )
    if args.json:
        print(
            json.dumps({**tables, **({"broken": bad} if "techniques" in tables else {})}, indent=1)
        )
    else:
        for rows in tables.values():
            show(rows, False)
    for reason in bad.values():
        print(f"widthbench: {reason}", file=sys.stderr)
    return 1 if bad else 0
