"""Leaderboards for other programs and for papers: CSV with all digits, LaTeX with booktabs,
BibTeX.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from widthbench.errors import UsageError, visible
from widthbench.experiment.cell import CONTROLS
from widthbench.experiment.records import Record
from widthbench.experiment.suites import Suite
from widthbench.report import columns
from widthbench.report.columns import COLUMNS
from widthbench.report.lines import Line, blocks
from widthbench.technique import registry

URL = "https://pypi.org/project/widthbench/"
SUITE_KEY = "widthbench"
FORMULA = tuple("=+-@\t\r\n")  # how one begins, perhaps behind what a spreadsheet passes over


def csv_text(rows: Iterable[Line]) -> str:
    """The leaderboard as CSV, a header first; every number with all its digits, empty where there
    is none.

    Text that a spreadsheet would take for a formula gets an apostrophe in front; what would break a
    line is written as its escape.
    """
    plain = [
        {k: _cell(v) if isinstance(v, str) else v for k, v in columns.plain(line).items()}
        for line in rows
    ]
    into = io.StringIO()
    writer = csv.DictWriter(into, list(plain[0]) if plain else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return into.getvalue()


def _cell(text: str) -> str:
    return ("'" if text[:1] in FORMULA or text.lstrip()[:1] in FORMULA else "") + visible(text)


def latex_text(suite: Suite, rows: Iterable[Line]) -> str:
    """The leaderboard as LaTeX, a ``table`` of booktabs for each network and data set."""
    parts = [
        f"% widthbench, suite {suite.name}; \\usepackage{{booktabs}}. FLOPs are counted as MACs."
    ]
    if not suite.citable:
        parts.append("% A smoke suite: not for citation.")
    chosen = [c for c in COLUMNS if c.paper]
    for (dataset, model), whole in blocks(rows).items():
        block = [line for line in whole if line.done]
        if not block:
            continue
        body = tabulate(
            [[_paper(c.shown(line)) for c in chosen] for line in block],
            headers=[c.paper for c in chosen],
            tablefmt="latex_raw",
            disable_numparse=True,
            colalign=["right" if c.number else "left" for c in chosen],
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


def _paper(text: str) -> str:
    return _escaped(text).replace("±", r"$\pm$").replace("–", "--")


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
    bibtex = {}
    for name in sorted({c.of or c.technique for c in suite.cells()}):
        try:
            bibtex[name] = registry.load(name).bibtex if name in registry.names() else ""
        except UsageError:
            bibtex[name] = ""
    return {n: t for n, t in bibtex.items() if t or n in registry.names()}
