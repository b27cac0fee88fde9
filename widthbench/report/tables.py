"""Leaderboards: markdown tables from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from widthbench.errors import visible
from widthbench.experiment.cell import CONTROLS
from widthbench.experiment.records import Record, Stage
from widthbench.experiment.suites import Suite
from widthbench.report.columns import Column, cells_of, for_people, legend
from widthbench.report.figures import linked
from widthbench.report.flags import FLAGS
from widthbench.report.lines import Line, blocks, lines
from widthbench.report.markdown import escaped, fenced
from widthbench.report.matrix import LEGEND, base_of, matrix
from widthbench.statistics import (
    LEAST,
    Difference,
    differences,
    interquartile_mean,
    probability_of_improvement,
    ranks,
    stratified,
    summarise,
)

NOTES = """\
One row of the details is one technique at one budget, mean ± sample standard deviation over n
distinct base networks (seeds: each has its own train/val split, base and decision; seeds on one
published checkpoint are averaged and count as one). {legend}

*Controls* are not techniques: {controls}. Where a technique spreads its budget uniformly, `scratch`
and `uniform-width` train the same widths (with other draws, for other numbers of epochs); channels
outside the suite's scope keep their width in every row."""


PAIRED = """\
Each technique against {references}, by test top-1 at the last stage; no
other pair is tested. *Difference*: the mean of the paired differences over base networks (seeds),
in points, with its 95 % t-interval; p is that of the paired t-test, after Holm's correction over
the comparisons of one network and budget. **Bold**: p below 0.05. *Ranks* are among the techniques
right after the resize, after recalibration (which looks at training images, without their labels),
and at the end (fine-tuning looks at labels, too): techniques that a paired test does not tell apart
share one."""

TOGETHER = """\
Over all networks: the interquartile mean of the test top-1 of all runs, and the probability that a
run is better than one of {references}, on the same network; both with 95 %
intervals of the stratified bootstrap (2,000 draws; Agarwal et al. 2021). Only networks that both
ran on count; a row without runs on every network has no interquartile mean, since means of
different networks cannot be compared. Failed runs are counted in the last column and in nothing
else."""


CITING = "## Citing"


def leaderboard(
    suite: Suite,
    records: Sequence[Record],
    timings: Sequence[dict[str, Any]],
    expected: int,
    *,
    digest: str = "",
    cite: str = "",
) -> str:
    """The markdown page of a suite.

    Args:
        suite: The suite.
        records: Its records.
        timings: One entry per distinct shape, from ``timings.jsonl``.
        expected: How many cells the suite has.
        digest: SHA-256 of ``records.jsonl``.
        cite: BibTeX.
    """
    parts = [f"# {suite.name}: {escaped(suite.title)}" if suite.title else f"# {suite.name}", ""]
    if not suite.citable:
        parts += [
            "**A smoke suite: not for citation.** Few seeds, small data; no ranks are given.",
            "",
        ]
    parts += [_head(suite, records, expected), "", LEGEND, ""]
    rows = lines(records, suite.cells(), timings, ranked=suite.citable)
    parts += linked(rows)
    for (dataset, model), block in blocks(rows).items():
        parts += [f"## {escaped(model)} on {escaped(dataset)}", ""]
        if known := matrix(block):
            parts += [*([known.base, ""] if known.base else []), known.markdown(), ""]
        if some := [line for line in block if line.records]:
            parts += (
                _folded(f"All columns, {len(some)} rows", table(some)) if known else [table(some)]
            )
            parts.append("")
        if left := [line for line in block if not line.records]:
            parts += [f"*Not run*: {_names(left)}.", ""]
    parts += _folded("What the columns and the controls are", notes(suite))
    parts.append("")
    parts += _problems(suite, records, rows) + _footer(records, timings)
    if digest:
        parts.append(
            f"- SHA-256 of `records.jsonl`: `{digest}`; `widthbench verify {suite.name}` checks it"
            " and reruns cells"
        )
    if cite:
        parts += ["", CITING, "", *fenced(cite, "bibtex")]
    return "\n".join(parts).rstrip() + "\n"


def _head(suite: Suite, records: Sequence[Record], expected: int) -> str:
    """How much was run, on what, and where more is."""
    bases = {
        (r.cell.dataset, r.cell.network, r.provenance.get("checkpoint") or r.cell.seed)
        for r in records
    }
    networks = {b[:2] for b in bases}
    most = max((sum(b[:2] == network for b in bases) for network in networks), default=0)
    each = (
        f"{most} base networks each at most"
        if most > 1
        else "one base network each: no ± and no ranks"
    )
    head = f"{_state(records, expected)}; {each}."
    if images := {row.samples for r in records for row in r.rows}:
        head += (
            f" Test sets of {', '.join(map(str, sorted(images)))} images: one is"
            f" {100 / min(images):.2g} points."
        )
    if comparable(suite):
        head += " Each technique against L1 and uniform width: [paired.md](paired.md)."
    head += " How to read it: `docs/reading-a-board.md`."
    return head


def notes(suite: Suite | None = None) -> str:
    """What the columns and the controls are, in markdown.

    Args:
        suite: Whose controls may end early; any, if None.
    """
    longest = (
        f", but for at most {suite.longest:g} times X's epochs (*train cost* says how far that"
        " went)"
        if suite and suite.longest
        else ""
    )
    controls = "; ".join(c.note for c in CONTROLS.values() if c.note).format(longest=longest)
    return NOTES.format(legend=legend(), controls=controls)


def _folded(summary: str, text: str) -> list[str]:
    """Text that a page shows when it is asked to."""
    return ["<details>", f"<summary>{escaped(summary)}</summary>", "", text, "", "</details>"]


def _state(records: Sequence[Record], expected: int) -> str:
    """``"300 of 303 cells done, 2 skipped, 1 failed"``."""
    text = f"{sum(r.status == 'done' for r in records)} of {expected} cells done"
    for status in ("skipped", "failed"):
        if number := sum(r.status == status for r in records):
            text += f", {number} {status}"
    return text


def table(block: Sequence[Line]) -> str:
    """The rows of one network as a markdown table."""

    def cell(line: Line, column: Column, text: str) -> str:
        text = escaped(text)
        if column.name == "technique":
            return text + _flags(line)
        return text

    columns = for_people(block)
    rows = [[cell(line, *pair) for pair in cells_of(line, columns)] for line in block]
    return _tabulated(columns, rows)


def _tabulated(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(
        rows,
        headers=[c.title for c in columns],
        tablefmt="pipe",
        colalign=["right" if c.number else "left" for c in columns],
        disable_numparse=True,
    )


def _names(block: Sequence[Line]) -> str:
    """Rows by their names, those at the same budgets together: ``"base; l1-norm, nmf at macs:0.5,
    macs:0.25"``.
    """
    budgets: dict[str, list[str]] = {}
    for line in block:
        budgets.setdefault(line.label, []).append(line.budget or "")
    together: dict[tuple[str, ...], list[str]] = {}
    for label, some in budgets.items():
        together.setdefault(tuple(some), []).append(escaped(label))
    return "; ".join(
        ", ".join(labels) + (f" at {', '.join(some)}" if any(some) else "")
        for some, labels in together.items()
    )


def comparable(suite: Suite) -> bool:
    """Whether some network of a suite has enough bases for paired statistics, and the suite is
    there for them.
    """
    trained = [n for n in suite.models if not (n.checkpoint or n.pretrained)]
    most = max((len(suite.seeds if n.seeds is None else n.seeds) for n in trained), default=0)
    return suite.citable and most >= LEAST


def paired(suite: Suite, records: Sequence[Record]) -> str:
    """The markdown page that holds each technique against the suite's references: over all
    networks, then on each.
    """
    named = " and ".join(f"`{r}`" for r in suite.references)
    parts = [f"# {suite.name}: comparisons", "", TOGETHER.format(references=named), ""]
    rows = [line for line in lines(records, suite.cells()) if line.records and line.budget]
    budgets: dict[str, list[Line]] = {}
    for line in rows:
        budgets.setdefault(str(line.budget), []).append(line)
    for kept, block in budgets.items():
        parts += [f"## {kept}", "", _together(block, suite.references), ""]
    parts += ["# Network by network", "", PAIRED.format(references=named), ""]
    grouped: dict[tuple[str, str, str | None], list[Line]] = {}
    for line in rows:
        if line.done:
            grouped.setdefault((line.dataset, line.model, line.budget), []).append(line)
    for (dataset, model, budget), block in grouped.items():
        parts += [f"## {escaped(model)} on {escaped(dataset)}, {budget}", ""]
        scores = {line.label: line.scores() for line in block}
        compared = {(d.first, d.second): d for d in differences(scores, suite.references)}
        if not compared:
            parts += [f"No reference with {LEAST} shared bases: nothing is compared.", ""]
            continue
        parts += [_compared(block, compared), ""]
    return "\n".join(parts).rstrip() + "\n"


def _compared(block: Sequence[Line], compared: Mapping[tuple[str, str], Difference]) -> str:
    """Rows of one network and budget, each with its differences from the references."""
    there = list(dict.fromkeys(second for _, second in compared))
    stages: tuple[Stage | None, ...] = ("resized", "recalibrated", None)
    competing = [line for line in block if not line.control]
    ranked = [ranks({ln.label: ln.scores(s) for ln in competing if ln.scores(s)}) for s in stages]
    headers = ["technique", "top-1", "ranks"]
    for reference in there:
        headers += [f"difference from {reference}", "p, Holm"]
    cells = []
    for line in block:
        if not any(first == line.label for first, _ in compared):
            continue
        places = [str((known or {}).get(line.label, "–")) for known in ranked]
        row = [escaped(line.label), summarise(line.scores()).text()]
        row.append("" if line.control else " / ".join(places))
        for reference in there:
            if (d := compared.get((line.label, reference))) is None:
                row += ["", ""]
                continue
            mark = "**" if d.adjusted < 0.05 else ""
            row += [
                f"{mark}{d.mean:+.2f}{mark} ({d.low:+.2f} to {d.high:+.2f})",
                f"{d.adjusted:.2g}",
            ]
        cells.append(row)
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(cells, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def _together(block: Sequence[Line], against: Sequence[str]) -> str:
    """Rows of one budget over all networks."""
    tasks: dict[str, dict[object, list[float]]] = {}
    for line in block:
        if line.done:
            runs = [*line.scores().values()]
            tasks.setdefault(line.label, {})[line.dataset, line.model] = runs
    references = [r for r in against if r in tasks]
    every = {network for mine in tasks.values() for network in mine}
    headers = ["technique", "networks", "runs", "interquartile mean"]
    cells = []
    for label, mine in tasks.items():
        text = "–"
        if set(mine) == every:
            low, high = stratified(interquartile_mean, mine)
            text = f"{interquartile_mean(mine):.2f} ({low:.2f} to {high:.2f})"
        row = [escaped(label), str(len(mine)), str(sum(map(len, mine.values()))), text]
        for reference in references:
            shared = {k: v for k, v in mine.items() if k in tasks[reference]}
            if label == reference or not shared:
                row.append("")
                continue
            low, high = stratified(probability_of_improvement, shared, tasks[reference])
            share = probability_of_improvement(shared, tasks[reference])
            row.append(f"{share:.2f} ({low:.2f} to {high:.2f})")
        same = [line for line in block if line.label == label]
        failed, of = sum(line.failed for line in same), sum(line.cells for line in same)
        cells.append([*row, f"{failed} of {of}" if failed else "0"])
    headers += [*(f"better than {r}" for r in references), "failed"]
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(cells, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def terminal(suite: Suite, records: Sequence[Record], expected: int) -> str:
    """What a terminal shows at the end of a run: techniques by budgets, a block for each network on
    a data set.
    """
    machines = "; ".join(origins(records).get("hardware", []))
    state = f"suite {suite.name}: {_state(records, expected)}; {machines}"
    parts = [state, "test top-1 in %, mean ± std over base networks; *: the best technique"]
    # of a part of a suite, what was not run has no row
    rows = [ln for ln in lines(records, suite.cells(), ranked=suite.citable) if ln.records]
    for (dataset, model), block in blocks(rows).items():
        parts += ["", f"{visible(model)} on {visible(dataset)}"]
        parts += [text] if (text := base_of(block)) else []
        parts += ["", known.plain()] if (known := matrix(block)) else []
    return "\n".join(parts)


def _flags(line: Line) -> str:
    return "".join(f" {flag.mark}" for flag in FLAGS if flag.holds(line))


def _problems(suite: Suite, records: Sequence[Record], rows: Sequence[Line]) -> list[str]:
    parts = [f"{f.mark} {f.note}." for f in FLAGS if any(map(f.holds, rows))]
    bad = [r for r in records if r.status != "done"]
    if unrun := sum(max(0, line.expected - len(line.records)) for line in rows):
        parts.append(
            f"*not run*: {unrun} cells of the suite (`widthbench run {suite.name}` runs them)."
        )
    if bad:
        parts += ["", "## Cells without a result", ""]
        reasons = [[escaped(r.cell.id), r.status, escaped(r.reason[:300])] for r in bad]
        parts.append(
            tabulate(
                reasons,
                headers=["cell", "status", "reason"],
                tablefmt="pipe",
                disable_numparse=True,
            )
        )
    return [*parts, ""] if parts else []


def origins(
    records: Sequence[Record], timings: Sequence[dict[str, Any]] = ()
) -> dict[str, list[str]]:
    """Where records come from: versions, hardware, device and threads, commit, date; each with all
    that occur.

    With timings, also which machine latencies were measured on, and how.
    """
    facts: dict[str, set[str]] = {}
    for p in (r.provenance for r in records):
        packages = ("widthbench", "torch", "timm", "torch-pruning")
        used, machine = p.get("versions", {}), p.get("hardware", {})
        facts.setdefault("versions", set()).add(", ".join(f"{k} {used.get(k)}" for k in packages))
        facts.setdefault("hardware", set()).add(str(machine.get("gpu") or machine.get("cpu")))
        facts.setdefault("device and threads", set()).add(
            f"{p.get('device')}, {p.get('threads')} thread(s)"
            + (f", {p['processes']} processes" if p.get("processes", 1) > 1 else "")
        )
        state = " with uncommitted changes" if p.get("dirty") else ""
        facts.setdefault("commit", set()).add(
            f"{p['commit'][:12]}{state}" if p.get("commit") else "not a checkout"
        )
        facts.setdefault("date", set()).add(str(p.get("when"))[:10])
    for t in timings:
        machine = t.get("hardware") or {}
        where = (
            f"{machine.get('gpu') or machine.get('cpu')}, median latency of a batch of"
            f" {t.get('batch', 64)}"
        )
        facts.setdefault("measured speed-up", set()).add(
            f"{where}, taken one shape at a time after all cells had ended"
        )
    return {name: sorted(map(visible, values)) for name, values in facts.items()}


def _footer(records: Sequence[Record], timings: Sequence[dict[str, Any]]) -> list[str]:
    """Where the numbers come from."""
    if not records:
        return []
    rows = [
        f"- {name}: {escaped('; '.join(values))}"
        for name, values in origins(records, timings).items()
    ]
    return ["---", "", *rows]
