"""The page of claims: reported against measured, with verdicts."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from widthbench.claims.ledger import (
    VERDICTS,
    Claim,
    Document,
    Judged,
    is_sanity,
    overall,
    readings,
)
from widthbench.paths import write_atomic

NAMES = ("claims.md", "claims.json")
ROUNDING = 1e-6  # a bound up to which is one on rounding errors
STALE = (
    "is not what the records say: `widthbench claims --publish` (or `--results DIR`) writes it anew"
)

NOTES = """\
Each row is one number or one statement of a paper, with what was measured
here and a verdict by a rule that was committed before the run that it judges (`bench/claims`).

*Value*: within the tolerance of the reported number (the same weights ±0.01 points; ImageNet ±0.3;
own base networks ±1.0, gains ±3.0). *Order*: the paired difference over at least five base networks
has a 95 % t-interval beyond the bound; on one public checkpoint, McNemar's exact test over its test
images has p < 0.05. *Ratio*: the median of at least three paired runs.
*Property*: every value within the bound. *Proxy*: smaller work than the document's, or another
set-up; it can show the direction or not, and is never called reproduced or not reproduced. *Not
run* names what it needs. *Sanity checks*, at the end, are no findings: algebra, counts, and the
accuracy of public weights, which must hold before anything else is believed.

Runs that failed or diverged are counted, and never averaged in. A bound on rounding errors stands
for the errors themselves, which no two machines share. Measured: mean ± sample standard deviation
over n distinct base networks (ratios: the median of n runs), from the published records named
beside it, or by the named check, which runs whenever this page is written. A claim is reproduced
only if each of its rows is; one whose sentence can be read in several ways, only if each row of one
reading is, and the page says of which."""


def page(judged: Sequence[tuple[Document, Claim, Sequence[Judged]]]) -> str:
    """The markdown page of all claims.

    Args:
        judged: Documents and claims with their judged rows, in order.
    """
    claims = [item for item in judged if not is_sanity(item[0], item[2])]
    checks = [item for item in judged if is_sanity(item[0], item[2])]
    parts = ["# Claims", "", f"{len(claims)} claims: {_counted(claims)}.", ""]
    if checks:
        parts[-1:] = [f"{len(checks)} sanity checks: {_counted(checks)}.", ""]
    parts += [NOTES, ""]
    last = ""
    for document, claim, rows in [*claims, *checks]:
        check = is_sanity(document, rows)
        heading = "Sanity checks" if check else f"{document.document}: {document.title}"
        if heading != last:
            last = heading
            parts += [f"## {heading}", ""]
        parts += [f"### {claim.id}: {overall(rows)}", "", claim.text, ""]
        if claim.note:
            parts += [claim.note, ""]
        if len(several := readings(rows)) > 1:
            parts += [
                "; ".join(f"Read as {name}: {verdict}" for name, verdict in several.items()) + ".",
                "",
            ]
        if "not run" in (verdicts := {j.verdict for j in rows}):
            parts += [
                (
                    f"{'Needs' if len(verdicts) == 1 else 'The rows that were not run need'}:"
                    f" {claim.needs}."
                ),
                "",
            ]
        body = [
            [
                _cell(j.row.what),
                _reported(j),
                _measured(j),
                f"**{j.verdict}**",
                _cell(_why(j)),
                _records(j),
            ]
            for j in rows
        ]
        headers = ["what", "reported", "measured", "verdict", "rule", "evidence"]
        align = ("left", "right", "right", "left", "left", "left")
        parts += [
            tabulate(body, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True),
            "",
        ]
    return "\n".join(parts).rstrip() + "\n"


def _counted(judged: Sequence[tuple[Document, Claim, Sequence[Judged]]]) -> str:
    """``"7 reproduced, 4 not reproduced"``."""
    counts = Counter(overall(rows) for _, _, rows in judged)
    return ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])


def plain(judged: Sequence[tuple[Document, Claim, Sequence[Judged]]]) -> list[dict[str, Any]]:
    """All claims as plain data: what ``claims.json`` holds and the static page shows."""
    return [
        {
            "document": document.document,
            "title": document.title,
            "technique": document.technique,
            "id": claim.id,
            "text": claim.text,
            "note": claim.note,
            "needs": claim.needs,
            "verdict": overall(rows),
            "sanity": is_sanity(document, rows),
            "readings": readings(rows) if len(readings(rows)) > 1 else {},
            "rows": [
                {
                    "what": j.row.what,
                    "reported": _reported(j),
                    "measured": _measured(j),
                    "verdict": j.verdict,
                    "rule": _why(j),
                    "check": j.row.check if j.row.check and j.measured else "",
                    "records": list(j.records),
                }
                for j in rows
            ],
        }
        for document, claim, rows in judged
    ]


def summary(claims: Sequence[Mapping[str, Any]]) -> str:
    """How many claims have which verdict, in a line: ``"12 reproduced, 2 not reproduced"``.

    Args:
        claims: As ``plain`` gives them.
    """
    found = Counter(c["verdict"] for c in claims if not c["sanity"])
    ordered = sorted(found, key=lambda v: (v == "not run", -found[v], v))
    return ", ".join(f"{found[v]} {v}" for v in ordered)


def write(judged: Sequence[tuple[Document, Claim, Sequence[Judged]]], results: Path) -> list[Path]:
    """Write ``claims.md`` and ``claims.json`` to a results folder; gives their paths."""
    paths = [results / name for name in NAMES]
    write_atomic(paths[0], page(judged))
    write_atomic(paths[1], as_json(judged))
    return paths


def there(results: Path) -> bool:
    """Whether claims were judged in a results folder."""
    return any((results / name).is_file() for name in NAMES)


def unlike(judged: Sequence[tuple[Document, Claim, Sequence[Judged]]], results: Path) -> list[str]:
    """Those of ``claims.md`` and ``claims.json`` that say something else than the judged claims.

    Numbers that a claim's check measures when the page is written (no records) may differ by 5 %
    elsewhere.

    Args:
        judged: As ``claims.judge_all`` gives them.
        results: The folder of the files.
    """
    checks = {j.row.check for _, _, rows in judged for j in rows if j.row.check and not j.records}
    names = []
    for name, text in zip(NAMES, (page(judged), as_json(judged)), strict=True):
        try:
            lines = (results / name).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            lines = []
        said = text.splitlines()
        free = _free(said, checks)
        if len(lines) != len(said) or any(
            a != b and not (i in free and close(a, b))
            for i, (a, b) in enumerate(zip(lines, said, strict=True))
        ):
            names.append(name)
    return names


def _free(lines: Sequence[str], checks: Collection[str]) -> set[int]:
    """The lines of a page that hold what a check measured: its row in markdown; in JSON, lines of
    its object.
    """
    rows = {
        i
        for i, line in enumerate(lines)
        if any(f"check `{c}`" in line or f'"check": "{c}"' in line for c in checks)
    }
    return rows | {
        i - d for i in rows for d in (1, 2, 3) if lines[i].lstrip().startswith('"check"')
    }


def close(one: str, other: str) -> bool:
    """Whether two lines are the same but for measured numbers that differ by less than 5 %; in a
    table, outside *reported*, too.
    """
    pairs = list(zip(one.split("|"), other.split("|"), strict=False))
    if one.count("|") != other.count("|") or (
        one.startswith("|") and pairs[2][0].split() != pairs[2][1].split()
    ):
        return False
    number = r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    if re.sub(number, "#", one).split() != re.sub(number, "#", other).split():
        return False
    numbers = zip(re.findall(number, one), re.findall(number, other), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.05, abs_tol=1e-6) for a, b in numbers)


def as_json(judged: Sequence[tuple[Document, Claim, Sequence[Judged]]]) -> str:
    """What ``claims.json`` holds."""
    return json.dumps(plain(judged), indent=1, ensure_ascii=False) + "\n"


def rows_of(judged: Sequence[tuple[Document, Claim, Sequence[Judged]]]) -> list[dict[str, str]]:
    """The rows as plain text, for a terminal or JSON."""
    return [
        {
            "claim": claim.id,
            "what": j.row.what,
            "reported": _reported(j),
            "measured": _measured(j),
            "verdict": j.verdict,
            "why": _why(j) if j.verdict != "not run" else f"needs {claim.needs}",
        }
        for _, claim, rows in judged
        for j in rows
    ]


def _reported(judged: Judged) -> str:
    row = judged.row
    if row.reported is not None:
        return _number(row.reported, row.unit)
    return "–"


def _measured(judged: Judged) -> str:
    measured = judged.measured
    if measured is None:
        return "–"
    row = judged.row
    if (
        judged.verdict == "reproduced"
        and row.direction in ("<", "<=")
        and row.bound is not None
        and 0 < row.bound <= ROUNDING
    ):
        # rounding errors, which no two machines share
        return f"{row.direction} {row.bound:g}{_unit(row.unit)} (n={measured.n})"
    small = measured.mean and abs(measured.mean) < 0.01
    value = f"{measured.mean:.2e}" if small else f"{measured.mean:.2f}"
    spread = (
        ""
        if measured.std is None
        else f" ± {measured.std:.2e}"
        if small
        else f" ± {measured.std:.2f}"
    )
    return f"{value}{spread}{_unit(judged.row.unit)} (n={measured.n})"


def _why(judged: Judged) -> str:
    row = judged.row
    if judged.detail and judged.verdict != "not run":
        return judged.detail
    if row.kind in ("value", "gain"):
        return f"±{row.tolerance:g}"
    return f"{row.kind}, {row.direction} {row.bound or 0:g}"


def _records(judged: Judged) -> str:
    if judged.row.check and judged.measured:
        return f"check `{judged.row.check}`"
    keys = [f"`{key[:8]}`" for key in judged.records]
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more


def _number(value: float, unit: str) -> str:
    return f"{value:.2f}".removesuffix(".00") + _unit(unit) if unit != "%" else f"{value:.2f}%"


def _unit(unit: str) -> str:
    return f" {unit}" if unit and unit != "%" else unit


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
