"""Trajectories: what techniques that train or search note along the way, as a page and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from tabulate import tabulate

from widthbench.experiment.records import Record
from widthbench.report.figures import save
from widthbench.report.lines import Line, lines, over_bases
from widthbench.report.markdown import code, escaped
from widthbench.report.style import COLOURS
from widthbench.technique.budget import Budget

STEP = "trajectory.step"
WIDTH = "width."  # series of a layer's channels, for techniques that grow
NAMED = 8  # layers that a panel can name
NAMES = {
    "open": "open channels",
    "macs": "MACs, share of the whole",
    "val_loss": "loss of the steps, nats",
    "val_top1": "val top-1, %",
    "recoveries": "recoveries so far",
    "cosine": "cosine with the gradient",
    "mu": "μ",
}
LIMITS = {"val_top1": (0, 100), "cosine": (-1, 1), "recoveries": (0, np.inf)}
DRAWN = ("open", "macs", "val_loss", "val_top1", "recoveries", "cosine")

PREFACE = """\
What each technique noted while it decided, at its smallest budget; mean ± sample
standard deviation over n base networks. The data are the series `trajectory.*` of `records.jsonl`;
quantities that no record of a technique has are left out.

*Open channels* and *MACs* are those at the end. *Val top-1 at the end*: of the network as the
trajectory leaves it, before anything else is trained. In the figures, losses are means over the
steps between two points (of val solid, of training dashed)."""

NOTES = {
    "autoprune": (
        """\
*Recoveries*: channels that opened again after at least 25 steps closed, each time counted;
*returned*: channels open at the end that had once been closed so long. *Least cosine*: between the
update of the auxiliary parameters and the gradient of the val loss by them, the least over all
steps of a run. A dotted line stands where gates are frozen: from there on only weights are trained,
with the channels that the budget allows."""
    ),
    "autoslim": "The path is the same for all budgets and ends at the parameter `least`.",
    "splitting": (
        "Steps are rounds: each trains the network, notes where it is, and splits neurons."
    ),
}


def has_trajectories(records: Sequence[Record]) -> bool:
    """Whether any record has one."""
    return any(_drawable(r) for r in records)


def _drawable(record: Record) -> bool:
    return len(record.series.get(STEP, [])) > 1


def page(records: Sequence[Record], title: str) -> str:
    """The markdown page: a table for each network, and the figures.

    Args:
        records: A suite's records.
        title: Of the suite.
    """
    parts = [f"# {title}: trajectories", "", PREFACE, ""]
    blocks = _blocks(records)
    parts += [
        f"![{technique} along its steps](figures/{_file(technique)})\n" for technique in blocks
    ]
    for technique, networks in blocks.items():
        everything = [(key, line) for key, block in networks.items() for line in block]
        columns = {
            title: [_mean(line, name, pick, digits) for _, line in everything]
            for title, name, pick, digits in (
                ("open channels", "open", last, 0),
                ("MACs, share", "macs", last, 3),
                ("recoveries", "recoveries", last, 0),
                ("returned", "returned", last, 0),
                ("least cosine", "cosine", min, 3),
                ("val top-1 % at the end", "val_top1", last, 2),
            )
        }
        columns = {title: cells for title, cells in columns.items() if set(cells) != {"–"}}
        rows = [
            [
                f"{code(network)} on {code(dataset)}",
                escaped(line.label),
                line.budget,
                *(cells[i] for cells in columns.values()),
                str(line.bases),
            ]
            for i, ((dataset, network), line) in enumerate(everything)
        ]
        headers = ["network", "technique", "budget", *columns, "n"]
        align = ("left",) * 3 + ("right",) * (len(headers) - 3)
        table = tabulate(
            rows, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True
        )
        parts += [
            f"## {technique}",
            "",
            *([NOTES[technique], ""] if technique in NOTES else []),
            table,
            "",
        ]
    return "\n".join(parts).rstrip() + "\n"


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw a figure for each technique: a row for each network, a panel for each quantity.

    Args:
        records: A suite's records.
        folder: Gets ``trajectory-TECHNIQUE.png``.

    Returns:
        The files written.
    """
    return [
        _figure(networks, folder / _file(technique), technique)
        for technique, networks in _blocks(records).items()
    ]


def last(values: list[Any]) -> Any:
    """The last of some values."""
    return values[-1]


def _values(record: Record, name: str) -> list[Any]:
    return [v for v in record.series.get(f"trajectory.{name}", []) if v is not None]


def _mean(line: Line, name: str, pick: Any, digits: int) -> str:
    summary = over_bases(
        {k: float(pick(values)) for k, r in line.done.items() if (values := _values(r, name))}
    )
    return summary.text(digits) if summary else "–"


def _blocks(records: Sequence[Record]) -> dict[str, dict[tuple[str, str], list[Line]]]:
    """Lines with trajectories by technique and network, each at its smallest budget."""
    blocks: dict[str, dict[tuple[str, str], dict[str, Line]]] = {}
    for row in lines(records):
        line = replace(row, records={k: r for k, r in row.done.items() if _drawable(r)})
        if line.records:
            block = blocks.setdefault(line.first().cell.technique, {}).setdefault(
                (line.dataset, line.model), {}
            )
            if line.label not in block or _fraction(line) < _fraction(block[line.label]):
                block[line.label] = line
    return {
        t: {network: sorted(block.values(), key=_rank) for network, block in n.items()}
        for t, n in blocks.items()
    }


def _rank(line: Line) -> tuple[int, str]:
    """The technique before its variants, so that a variant has one colour in all rows of a
    figure.
    """
    return len(line.first().cell.params), line.label


def _fraction(line: Line) -> float:
    return Budget.parse(str(line.budget), grows=True).fraction


def _figure(networks: dict[tuple[str, str], list[Line]], path: Path, technique: str) -> Path:
    everything = [r for block in networks.values() for line in block for r in line.records.values()]
    names = [n for n in DRAWN if any(_values(r, n) for r in everything)]
    widths = any(k.startswith(WIDTH) for r in everything for k in r.series)
    several = any(len(block) > 1 for block in networks.values())
    columns = len(names) + widths
    figure = Figure(
        figsize=(3.1 * columns + 2 * several, 2.5 * len(networks) + 0.8), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(networks), columns, squeeze=False)
    for row, ((dataset, network), block) in zip(axes, networks.items(), strict=True):
        if widths:
            at = min(
                range(len(block)), key=lambda i: len(block[i].first().cell.params)
            )  # the technique, not a control of it
            _layers(
                row[0], block[at], _short(block)[at].replace("\n", " ") if len(block) > 1 else ""
            )
            row[0].set_title("channels per layer", fontsize=9)
        for place, name in zip(row[widths:], names, strict=True):
            for line, colour in zip(block, cycle(COLOURS), strict=False):
                _band(place, line, name, colour)
                if name == "val_loss":
                    _band(place, line, "loss", colour, dashed=True)
            place.set_title(NAMES[name], fontsize=9)
            place.tick_params(labelsize=7)
            place.grid(alpha=0.3)
            place.set_xlim(0, 100)
            for line in block:
                if (end := _frozen(line)) is not None:
                    place.axvline(end, color="0.5", linewidth=0.8, linestyle=":")
            if name == "val_loss":
                _logarithmic(place)
        row[0].set_title(f"{network} on {dataset}\n{row[0].get_title()}", fontsize=9)
        if len(block) > 1:  # a row's lines are its own: settings differ between networks
            handles = [
                Line2D([], [], color=colour)
                for colour, _ in zip(cycle(COLOURS), block, strict=False)
            ]
            row[-1].legend(
                handles,
                _short(block),
                loc="center left",
                bbox_to_anchor=(1.02, 0.5),
                frameon=False,
                fontsize=7,
            )
    for place in axes[-1]:
        place.set_xlabel("% of the steps", fontsize=8)
    key = []
    if any(_values(r, "val_loss") and _values(r, "loss") for r in everything):
        key.append("losses of val solid, of training dashed")
    if any(_frozen(line) is not None for block in networks.values() for line in block):
        key.append("dotted: gates frozen")
    most = max(line.bases for block in networks.values() for line in block)
    spread = f"mean ± std over {most} base networks" if most > 1 else "one base network"
    wide = columns > 2
    figure.suptitle(
        f"{technique} along its steps, smallest budget{'; ' if wide else chr(10)}"
        + "; ".join([spread, *key]),
        fontsize=11 if wide else 9,
    )
    return save(figure, path)


def _layers(place: Any, line: Line, label: str) -> None:
    """Channels of each layer along the steps: means over bases, of one line, which is named where
    there are several.
    """
    records = list(line.done.values())
    groups = list(dict.fromkeys(k for r in records for k in r.series if k.startswith(WIDTH)))
    for group, colour in zip(groups, cycle(COLOURS), strict=False):
        _band(place, line, group, colour)
    low, high = _logarithmic(place)
    ends = sorted(
        (_mean_end(records, g), g, c) for g, c in zip(groups, cycle(COLOURS), strict=False)
    )
    if len(ends) <= NAMED:
        least = low
        for end, group, colour in ends:
            at = max(end, least)  # names keep a line's height between them
            least = at * (high / low) ** 0.04
            name = group.removeprefix(WIDTH)
            place.annotate(
                name,
                (100, at),
                (3, 0),
                "data",
                "offset points",
                fontsize=6,
                color=colour,
                va="center",
            )
    place.set_xlim(0, 100)
    place.set_ylabel(label, fontsize=8)
    place.tick_params(labelsize=7)
    place.grid(alpha=0.3)


def _logarithmic(place: Any) -> tuple[float, float]:
    """A logarithmic axis with enough numbers to read it by; gives its limits."""
    place.set_yscale("log")
    low, high = place.get_ylim()
    place.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high > 5 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
    )
    place.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    place.yaxis.set_minor_formatter(NullFormatter())
    return low, high


def _mean_end(records: Sequence[Record], series: str) -> float:
    return float(np.mean([r.series[series][-1] for r in records if series in r.series]))


def _short(block: Sequence[Line]) -> list[str]:
    """Names of a network's lines: the parameters that tell them apart."""
    params = [line.first().cell.params for line in block]
    shared = {k for k, v in params[0].items() if all(k in p and p[k] == v for p in params)}
    return [
        fill(
            ", ".join(f"{k}={v}" for k, v in sorted(p.items()) if k not in shared)
            or line.first().cell.technique,
            26,
        )
        for p, line in zip(params, block, strict=True)
    ]


def _frozen(line: Line) -> float | None:
    """Where a line's gates were frozen, in per cent of the steps."""
    series = line.first().series
    return 100 * series["freeze"][0] / series[STEP][-1] if "freeze" in series else None


def _band(place: Any, line: Line, name: str, colour: str, *, dashed: bool = False) -> None:
    """Mean and spread over bases, as far as the quantity can go; nothing where no record has the
    series.
    """
    grid, curves = np.linspace(0, 100, 101), []
    for record in line.records.values():
        steps, values = (
            record.series[STEP],
            record.series.get(name if name.startswith(WIDTH) else f"trajectory.{name}", []),
        )
        pairs = [
            (100 * s / max(1, steps[-1]), float(v))
            for s, v in zip(steps, values, strict=False)
            if v is not None
        ]
        if len(pairs) > 1:
            x, y = zip(*pairs, strict=True)
            curves.append(np.interp(grid, x, y, left=np.nan, right=np.nan))
    if not curves:
        return
    mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1) if len(curves) > 1 else 0
    place.plot(
        grid,
        mean,
        color=colour,
        linewidth=1.0 if dashed else 1.4,
        linestyle="--" if dashed else "-",
    )
    if dashed:  # no room for its spread
        return
    logarithmic = name == "val_loss" or name.startswith(WIDTH)
    low = np.maximum(mean - spread, mean / 3) if logarithmic else mean - spread
    least, most = LIMITS.get(name, (-np.inf, np.inf))
    place.fill_between(
        grid,
        np.maximum(low, least),
        np.minimum(mean + spread, most),
        color=colour,
        alpha=0.15,
        linewidth=0,
    )


def _file(technique: str) -> str:
    return f"trajectory-{''.join(c if c.isalnum() or c in '-_' else '-' for c in technique)}.png"
