"""A figure of widths: how many channels of each group every technique leaves."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from widthbench.experiment.records import Record
from widthbench.report.figures import save
from widthbench.report.lines import Line, lines, over_bases, short_names

FEW = 5  # groups whose names fit beside each other
NUMBERED = 24  # groups up to which cells carry their numbers
NAMED = 60  # and up to which columns carry their names
COLOURS = "cividis"  # made for colour-blind eyes, and monotone in grey


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw a panel for each network: techniques by channel groups, coloured by the share of the
    channels that is kept.

    The budget is the middle one of those that techniques ran at. Controls that train a technique's
    shape are left out.

    Args:
        records: A suite's records.
        folder: Gets ``widths.png``.

    Returns:
        The file; none if no technique resized anything.
    """
    panels: dict[tuple[str, str], list[Line]] = {}
    for line in lines(records):
        first = line.first()
        if line.done and line.budget and not first.cell.of and first.widths and first.base_widths:
            panels.setdefault((line.dataset, line.model), []).append(line)
    if not panels:
        return []
    chosen = {key: _at_middle(block) for key, block in panels.items()}
    groups = {key: _groups(block) for key, block in chosen.items()}
    most = max(map(len, groups.values()))
    heights = [
        1.3 * (len(_rows(block, groups[key])) + 1) + (6 if len(groups[key]) <= NAMED else 2)
        for key, block in chosen.items()
    ]
    figure = Figure(
        figsize=(min(18, max(7.5, 3.4 + 0.42 * most)), 0.27 * sum(heights) + 1.2),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), 1, squeeze=False, height_ratios=heights)[:, 0]
    for place, (key, block) in zip(axes, chosen.items(), strict=True):
        picture = _panel(place, block, groups[key])
        place.set_title(f"{key[1]} on {key[0]}, {block[0].budget}", fontsize=10)
    figure.colorbar(
        picture,
        ax=list(axes),
        label="share of the base's channels (1 and above)",
        shrink=min(1.0, 4 / (0.27 * sum(heights))),
    )
    figure.suptitle(
        "Widths before and after: channels per group, means over base networks", fontsize=11
    )
    return [save(figure, folder / "widths.png")]


def _at_middle(block: Sequence[Line]) -> list[Line]:
    """The lines at the middle one of a network's budgets."""
    budgets = list(
        dict.fromkeys(line.budget for line in block)
    )  # from large to small, as lines are
    return [line for line in block if line.budget == budgets[len(budgets) // 2]]


def _groups(block: Sequence[Line]) -> list[str]:
    """The names of the groups, numbers in them by value: layer2 before layer10."""
    names = {name for line in block for name in line.first().base_widths}
    return sorted(
        names,
        key=lambda name: [
            (p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", name)
        ],
    )


def _panel(place: Axes, block: Sequence[Line], groups: Sequence[str]):  # type: ignore[no-untyped-def]  # an image, of a private type
    base = {name: width for line in block for name, width in line.first().base_widths.items()}
    rows = {("base",): [base[g] for g in groups]} | _rows(block, groups)
    counts = np.array([*rows.values()], dtype=float)
    shares = counts / counts[0]
    picture = place.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    labels = [textwrap.fill(", ".join(names), 44, break_on_hyphens=False) for names in rows]
    place.set_yticks(range(len(rows)), labels, fontsize=8)
    if len(groups) <= NAMED:
        slant: dict[str, Any] = (
            {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(groups) > FEW else {}
        )
        place.set_xticks(range(len(groups)), list(groups), fontsize=7, **slant)
    else:
        place.set_xticks([])
        place.set_xlabel(f"{len(groups)} channel groups, by name", fontsize=8)
    if len(groups) <= NUMBERED:
        for (y, x), count in np.ndenumerate(counts):
            if np.isfinite(count):
                colour = "black" if shares[y, x] > 0.55 else "white"
                place.text(x, y, f"{count:.0f}", ha="center", va="center", fontsize=7, color=colour)
    return picture


def _rows(block: Sequence[Line], groups: Sequence[str]) -> dict[tuple[str, ...], list[float]]:
    """Mean widths by the techniques that have them: those that keep the same are one row."""
    names = short_names(block)
    alike: dict[tuple[str, ...], tuple[list[str], list[float]]] = {}
    for line in block:
        widths = [_mean(line, g) for g in groups]
        key = tuple(f"{w:.0f}" for w in widths)
        alike.setdefault(key, ([], widths))[0].append(names[line.label])
    return {tuple(some): widths for some, widths in alike.values()}


def _mean(line: Line, group: str) -> float:
    summary = over_bases(
        {key: float(r.widths[group]) for key, r in line.done.items() if group in r.widths}
    )
    return summary.mean if summary else float("nan")
