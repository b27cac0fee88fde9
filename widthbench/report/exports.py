"""Leaderboards for other programs and for papers: CSV with all digits, LaTeX with booktabs,
BibTeX.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tabulate import tabulate

from widthbench.errors import UsageError, visible
from widthbench.experiment.cell import CONTROLS, Cell
from widthbench.experiment.records import FINAL, Record
from widthbench.experiment.suites import Suite
from widthbench.report import tables
from widthbench.report.flags import FLAGS
from widthbench.statistics import Summary
from widthbench.technique import registry

URL = "https://pypi.org/project/widthbench/"
SUITE_KEY = "widthbench"
FORMULA = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
)  # how one begins, perhaps behind what a spreadsheet passes over


def rows(
    records: Sequence[Record], timings: Sequence[dict[str, Any]], cells: Iterable[Cell] = ()
) -> list[dict[str, Any]]:
    """One plain row for each row of the leaderboard: means, sample standard deviations, n; None
    where there is no number.

    Args:
        records: A suite's.
        timings: Its timings.
        cells: Its cells: those that were not run have rows, too.
    """
    speeds = tables.speeds_of(timings)
    found = []
    for line in tables.lines(records, cells):
        first = line.first() if line.records else None
        row: dict[str, Any] = {
            "dataset": line.dataset,
            "network": line.model,
            "technique": line.label,
            "control": line.control,
            "data": "control" if line.control else line.access,
            "budget": line.budget or "",
            "n": line.bases,
            "cells": len(line.done) + line.left,
            "cells_done": len(line.done),
            "cells_failed": line.failed,
            "status": line.status,
        }
        for name, stages in (
            ("resized", ("resized",)),
            ("recalibrated", ("recalibrated",)),
            ("final", FINAL),
        ):
            row |= _spread(
                f"top1_{name}", next((s for stage in stages if (s := line.summary(stage))), None)
            )
        row |= _spread("top5", line.top5() if line.done else None)
        ratios: tuple[tuple[Literal["params", "macs"], str], ...] = (
            ("params", "compression"),
            ("macs", "speed_up_theory"),
        )
        for name, ratio in ratios:
            value, base = (
                line.mean(name) if line.done else None,
                getattr(first, f"base_{name}", None),
            )
            row |= {
                name: value,
                f"base_{name}": base,
                ratio: base / value if value and base else None,
            }
        speed, cost = (
            (tables.speed_up_of(line, speeds), tables.cost_of(line)) if line.done else (None, None)
        )
        row["speed_up_measured"], row["train_cost"] = speed and speed.mean, cost and cost.mean
        row |= {flag.name: flag.holds(line) for flag in FLAGS}
        found.append(row)
    return found


def _spread(name: str, summary: Summary | None) -> dict[str, float | None]:
    return {
        f"{name}_mean": summary.mean if summary else None,
        f"{name}_std": summary.std if summary else None,
    }


def csv_text(
    records: Sequence[Record], timings: Sequence[dict[str, Any]], cells: Iterable[Cell] = ()
) -> str:
    """The leaderboard as CSV, a header first; every number with all its digits, empty where there
    is none.

    Arguments as for ``rows``. Text that a spreadsheet would take for a formula gets an apostrophe
    in front; what would break a line is written as its escape.
    """
    found = [
        {k: _cell(v) if isinstance(v, str) else v for k, v in row.items()}
        for row in rows(records, timings, cells)
    ]
    into = io.StringIO()
    writer = csv.DictWriter(into, list(found[0]) if found else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return into.getvalue()


def _cell(text: str) -> str:
    return ("'" if text[:1] in FORMULA or text.lstrip()[:1] in FORMULA else "") + visible(text)


def latex_text(suite: Suite, records: Sequence[Record], timings: Sequence[dict[str, Any]]) -> str:
    """The leaderboard as LaTeX, a ``table`` of booktabs for each network and data set."""
    parts = [
        f"% widthbench, suite {suite.name}; \\usepackage{{booktabs}}. FLOPs are counted as MACs."
    ]
    if not suite.citable:
        parts.append("% A smoke suite: not for citation.")
    speeds = tables.speeds_of(timings)
    for (dataset, model), block in tables.blocks(records).items():
        lines = [
            [
                _escaped(ln.label),
                _escaped(ln.budget or "--"),
                *(_plus_minus(ln.summary(stage)) for stage in ("resized", "recalibrated")),
                _plus_minus(ln.final()),
                _escaped(tables.count(ln.mean("params"))),
                _escaped(tables.count(ln.mean("macs"))),
                f"{speed.mean:.2f}" if (speed := tables.speed_up_of(ln, speeds)) else "--",
                tables.bases_of(ln),
            ]
            for ln in block
            if ln.done
        ]
        if not lines:
            continue
        headers = [
            "technique",
            "budget",
            "resized",
            "recalibrated",
            "fine-tuned",
            "params",
            "MACs",
            "speed-up",
            "$n$",
        ]
        body = tabulate(
            lines,
            headers=headers,
            tablefmt="latex_raw",
            disable_numparse=True,
            colalign=("left",) * 2 + ("right",) * 7,
        )
        most = max(ln.bases for ln in block)
        spread = (
            f"mean $\\pm$ standard deviation over up to {most} base networks"
            if most > 1
            else "one base network"
        )
        caption = (
            f"{_escaped(model)} on {_escaped(dataset)}: test top-1 in \\%, {spread}; suite"
            f" {_escaped(suite.name)}."
        )
        label = re.sub(r"[^a-z0-9]+", "-", f"{suite.name} {model} {dataset}".lower()).strip("-")
        parts += [
            "",
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{caption}}}",
            f"\\label{{tab:{label}}}",
            _booktabs(body),
            r"\end{table}",
        ]
    return "\n".join(parts) + "\n"


def _booktabs(text: str) -> str:
    """Raw LaTeX of tabulate with the rules of booktabs, which it has for escaped tables only."""
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        text = text.replace(r"\hline", rule, 1)
    return text


def _plus_minus(summary: Summary | None) -> str:
    return "" if summary is None else summary.text().replace("±", r"$\pm$")


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c) or (f"\\{c}" if c in "&%$#_{}" else c) for c in visible(text))


def citation(suite: Suite, records: Sequence[Record], digest: str | None) -> str:
    """BibTeX of a suite's results, and of every technique in them.

    Args:
        suite: The suite.
        records: Its records, which say versions, commits and dates; none if it has not been run.
        digest: SHA-256 of its ``records.jsonl``.

    Returns:
        Entries, the suite's first, each technique's once; a comment for techniques that name no
        paper.
    """
    versions = sorted(
        {
            str(r.provenance["versions"].get("widthbench"))
            for r in records
            if "versions" in r.provenance
        }
    )
    commits = sorted(
        {str(r.provenance["commit"])[:12] for r in records if r.provenance.get("commit")}
    )
    dates = sorted(str(r.provenance["when"])[:10] for r in records if r.provenance.get("when"))
    notes = [f"suite {suite.name}"]
    notes += [f"version {', '.join(versions)}"] if versions else []
    notes += [f"commit {', '.join(commits)}"] if commits else []
    notes += [f"SHA-256 of the records {digest}"] if digest else ["no results of its own yet"]
    entry = [
        f"@misc{{{SUITE_KEY}-{suite.name},",
        (
            "  title = {{widthbench}: a benchmark of techniques that decide how wide each layer of"
            " a neural network should be},"
        ),
        "  author = {{The widthbench authors}},",
        *([f"  year = {{{dates[-1][:4]}}},"] if dates else []),
        f"  howpublished = {{\\url{{{URL}}}}},",
        f"  note = {{{'; '.join(map(_escaped, notes))}}}",
        "}",
    ]
    parts = ["\n".join(entry)]
    if not suite.citable:
        parts.insert(0, f"% {suite.name} is a smoke suite: its numbers are not for citation.")
    for name, text in entries(suite).items():
        parts.append(text.strip() if text else f"% {name}: names no paper")
    away = sorted({c.of or c.technique for c in suite.cells()} - {*registry.names(), *CONTROLS})
    parts += [f"% {visible(name)}: not installed here" for name in away]
    return "\n\n".join(dict.fromkeys(parts)) + "\n"


def entries(suite: Suite) -> Mapping[str, str]:
    """The BibTeX of each technique of a suite; "" where it has none or is not installed here."""
    found = {}
    for name in sorted({c.of or c.technique for c in suite.cells()}):
        try:
            found[name] = registry.load(name).bibtex if name in registry.names() else ""
        except UsageError:
            found[name] = ""
    return {n: t for n, t in found.items() if t or n in registry.names()}
