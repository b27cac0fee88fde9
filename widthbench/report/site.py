"""One static page of all results: tables to sort and filter, charts, claims, and the record behind
each row.
"""

from __future__ import annotations

import base64
import gzip
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from widthbench import __version__
from widthbench.claims import ledger
from widthbench.errors import UsageError
from widthbench.experiment import suites
from widthbench.experiment.records import Record, read_records
from widthbench.experiment.suites import Suite
from widthbench.paths import write_atomic
from widthbench.report import claims as claims_page
from widthbench.report import exports, tables
from widthbench.report.build import file_digest, in_order, of_suite, read_timings
from widthbench.report.columns import Column, Value, for_people, plain
from widthbench.report.flags import FLAGS
from widthbench.report.lines import Line, blocks, lines, short_names
from widthbench.report.matrix import Matrix, matrix
from widthbench.report.style import styles
from widthbench.statistics import Summary

DROPPED = ("series", "trace")  # of records: curves and tracebacks would make up most of the page


@dataclass(frozen=True)
class Shown:
    """One suite on the page.

    Attributes:
        name: Of the suite.
        suite: The suite; None where its file is not at hand.
        records: Its records.
        timings: Its timings.
        digest: SHA-256 of ``records.jsonl``.
    """

    name: str
    suite: Suite | None
    records: Sequence[Record]
    timings: Sequence[dict[str, Any]]
    digest: str


def write(results: Path, named: Iterable[Suite] = (), into: Path | None = None) -> Path:
    """Write ``site.html`` from all suites that have records in a results folder, and from
    ``claims.json`` there.

    Args:
        results: The results folder.
        named: Suites that are not built in (read from files), so that their titles are known.
        into: The folder that the page goes to; the results folder if None.

    Returns:
        The page: one file, which asks nothing of the network.

    Raises:
        UsageError: If there are no records, they are damaged, or the extra ``site`` is not
            installed.
    """
    known = {s.name: s for s in named}
    shown = [_shown(path.parent, known) for path in sorted(results.glob("*/records.jsonl"))]
    if not shown:
        raise UsageError(
            f"no suite has records in {results}: run one first (`widthbench run digits`)"
        )
    path = (into or results) / "site.html"
    write_atomic(path, html(shown, _claims(results)))
    return path


def _shown(folder: Path, known: Mapping[str, Suite]) -> Shown:
    name = folder.name
    suite = known.get(name) or (suites.load(name) if name in suites.names() else None)
    path = folder / "records.jsonl"
    records = read_records(path)
    if suite:
        records = in_order(suite, of_suite(suite, path, records))
    return Shown(name, suite, records, read_timings(folder), file_digest(path))


def _claims(results: Path) -> list[dict[str, Any]]:
    """The claims, judged anew, where ``widthbench claims`` has been run; nothing where it has not.

    Raises:
        UsageError: If the files there say something else than the records do.
    """
    if not claims_page.there(results):
        return []
    judged = ledger.judge_all(results)
    if other := claims_page.unlike(judged, results):
        raise UsageError(f"{results / other[0]} {claims_page.STALE}")
    return claims_page.plain(judged)


def html(shown: Sequence[Shown], claims: Sequence[dict[str, Any]] = ()) -> str:
    """The page as text.

    Args:
        shown: Its suites.
        claims: As ``report.claims.plain`` gives them.

    Raises:
        UsageError: If the extra ``site`` is not installed.
    """
    where = {r.key: s.name for s in shown for r in s.records}
    environment = Environment(
        loader=PackageLoader("widthbench.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    described = [_suite(s) for s in shown]
    return environment.get_template("site.html").render(
        version=__version__,
        suites=described,
        answered=sorted(
            (s for s in described if s["citable"] and s["answers"]),
            key=lambda s: -sum(bool(a["control"]) for a in s["answers"]),
        ),
        points={s["name"]: s["points"] for s in described},
        claims=[
            {
                **c,
                "rows": [
                    {**r, "records": [(k, where[k]) for k in r["records"] if k in where]}
                    for r in c["rows"]
                ],
            }
            for c in sorted(claims, key=_measured_first)
        ],
        verdicts=list(dict.fromkeys(c["verdict"] for c in sorted(claims, key=_measured_first))),
        packed={s.name: _packed(json.dumps(_plain(s.records), allow_nan=False)) for s in shown},
        plotly=_packed(_asset("plotly", "package_data/plotly.min.js")),
        datatables=_packed(_asset("itables", "html/dt_bundle.js")),
        datatables_css=_asset("itables", "html/dt_bundle.css"),
        libraries=", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("plotly", "itables")),
    )


def _suite(shown: Shown) -> dict[str, Any]:
    """What the page says of one suite."""
    cells = shown.suite.cells() if shown.suite else []
    citable = bool(shown.suite and shown.suite.citable)
    board = lines(shown.records, cells, shown.timings, ranked=citable)
    titled = for_people(board)
    rows = [_row(line, titled) for line in board]
    looks = styles(board)
    places = {f"{model} on {data}": (matrix(b), b) for (data, model), b in blocks(board).items()}
    return {
        "name": shown.name,
        "title": shown.suite.title if shown.suite else "",
        "citable": citable,
        "columns": titled,
        "rows": rows,
        "places": list(places),
        "matrices": {place: known for place, (known, _) in places.items() if known},
        "answers": _answers(places),
        "done": sum(r.status == "done" for r in shown.records),
        "skipped": sum(r.status == "skipped" for r in shown.records),
        "failed": sum(r.status == "failed" for r in shown.records),
        "cells": max(len(cells), len(shown.records)),
        "origins": tables.origins(shown.records, shown.timings),
        "digest": shown.digest,
        "cite": exports.citation(shown.suite, shown.records, shown.digest) if shown.suite else "",
        "points": [
            {**_point(line, row), "style": asdict(looks[line.label])}
            for line, row in zip(board, rows, strict=True)
            if line.done
        ],
    }


def _row(line: Line, titled: Sequence[Column]) -> dict[str, Any]:
    """A row of the table: under ``cells``, for each column, what is read and what is sorted by."""
    # why a row has no result stands behind its technique
    words = [(c, c.shown(line) if line.done or c.always else "") for c in titled]
    return {
        "place": f"{line.model} on {line.dataset}",
        "technique": line.label,
        "control": line.control,
        "status": line.no_result if not line.done else "",
        "reason": line.first().reason if line.records and not line.done else "",
        "flags": [flag for flag in FLAGS if flag.holds(line)],
        "cells": [(c, text, _order(c.value(line))) for c, text in words],
        "records": sorted((r.cell.seed, r.key) for r in line.records.values()),
    }


def _order(value: Value) -> float | str:
    return value.mean if isinstance(value, Summary) else -1.0 if value is None else value


def _point(line: Line, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a chart shows of a row."""
    values = plain(line)
    names = ("technique", "control", "budget", "n", "macs", "params", "train_cost")
    stages = ("resized", "recalibrated", "final")
    return {
        "place": row["place"],
        **{name: values[name] for name in names},
        **{s: [values[f"top1_{s}_mean"], values[f"top1_{s}_std"]] for s in stages},
        "records": [key for _, key in row["records"]],
    }


ANSWERS = ("reproduced", "not reproduced", "proxy", "inconclusive", "not run")


def _measured_first(claim: Mapping[str, Any]) -> int:
    """What was measured comes before what was not run."""
    return next((i for i, v in enumerate(ANSWERS) if claim["verdict"].startswith(v)), len(ANSWERS))


def _answers(
    places: Mapping[str, tuple[Matrix | None, Sequence[Line]]],
) -> list[dict[str, Any]]:
    """Who wins: for each network and budget the best technique, those that it is not told apart
    from, and the best control.
    """
    found: list[dict[str, Any]] = []
    for place, (known, block) in places.items():
        for i, budget in enumerate(known.budgets if known else []):
            assert known is not None
            here = [
                (n, c, e[i])
                for n, c, e in zip(known.names, known.controls, known.entries, strict=True)
            ]
            best = next(((n, e) for n, _, e in here if e and e.best), None)
            tops = {
                ln.label: s.mean
                for ln in block
                if ln.budget == budget and ln.control and (s := ln.summary(None))
            }
            named = short_names(block)
            control = max(tops, key=lambda label: tops[label]) if tops else ""
            if best:
                found.append(
                    {
                        "place": place,
                        "budget": budget,
                        "best": best[0],
                        "top": best[1].text,
                        "tied": [n for n, _, e in here if e and e.tied],
                        "control": named.get(control, ""),
                        "control_top": next(
                            (e.text for n, c, e in here if c and e and n == named.get(control)), ""
                        ),
                        "ahead": any(e.ahead for _, _, e in here if e),
                    }
                )
    return found


def _plain(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Records by key, with the line of ``records.jsonl`` that each stands in."""
    by_key = {}
    for number, record in enumerate(sorted(records, key=lambda r: r.cell.id), 1):
        data = json.loads(
            record.model_dump_json()
        )  # which has null for what is not finite, as JSON wants it
        left = {
            name: sorted(data[name]) if isinstance(data[name], dict) else len(data[name])
            for name in DROPPED
            if data[name]
        }
        data = {k: v for k, v in data.items() if k not in DROPPED}
        by_key[record.key] = {
            "id": record.cell.id,
            "line": number,
            "left out": left,
            "record": data,
        }
    return by_key


def _packed(text: str) -> str:
    """Text, zipped and in base64, as a page can carry it."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _asset(package: str, path: str) -> str:
    try:
        return (files(package) / path).read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UsageError(
            f"the page needs {package}: pip install 'widthbench[site]' ({error})"
        ) from error
