"""What a benchmark script ends with: its table on the terminal, and on request as a page with the
rows behind it.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from widthbench.paths import write_atomic
from widthbench.provenance import commit, hardware

Rows = Sequence[Mapping[str, Any]]


def main(doc: str, page: str, measure: Callable[[], Rows], table: Callable[[Rows], str]) -> None:
    """Measure, print, and write FILE.md and FILE.jsonl where ``--write FILE`` is given.

    Args:
        doc: The script's docstring, whose first line is the help.
        page: Markdown with ``{table}`` and ``{where}`` (commit, versions and hardware).
        measure: Gives the rows.
        table: Rows to a markdown table.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    parser.add_argument("--write", metavar="FILE", help="also write FILE.md and FILE.jsonl")
    options = parser.parse_args()
    rows = measure()
    print(table(rows))
    if options.write:
        path = Path(options.write)
        write_atomic(path.with_suffix(".jsonl"), "".join(json.dumps(r) + "\n" for r in rows))
        write_atomic(path.with_suffix(".md"), page.format(table=table(rows), where=where()))


def where() -> str:
    """Commit, versions and hardware, in a line."""
    made = commit()
    dirty = " with uncommitted changes" if made["dirty"] else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"Commit {str(made['commit'])[:12]}{dirty}, {versions}, {hardware().get('cpu')}"
