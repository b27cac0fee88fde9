"""Figures of a suite: error against size, and how far techniques are from training a network of the
same size from scratch, against what they cost.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from widthbench.errors import UsageError
from widthbench.experiment.records import Record
from widthbench.paths import write_atomic
from widthbench.report.lines import Line, blocks, lines, over_bases, short_names
from widthbench.report.markdown import count
from widthbench.report.style import BASE, CONTROL, Style, of_technique, styles

AXES = {"macs": "MACs of one image", "params": "parameters"}
LEAST = 0.01  # per cent of errors, below which a logarithmic axis does not go
SCRATCH = "best from scratch"
FRESH = ("scratch", "scratch-budget", "uniform-width")  # controls that train from fresh weights
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 90)
AWAY = (1, 2, 5, 0.5, 10, 1.5, 3, 20, 50, 0.7, 0.8, 1.2, 0.9, 1.1)  # shares of errors
FINE = (*TICKS, 0.7, 0.03, 0.3, 3, 7, 12, 15, 25, 30, 35, 40, 60, 70, 80)


def write(records: Sequence[Record], folder: Path, title: str) -> list[Path]:
    """Draw error against MACs and against parameters, a panel per network, and, where networks of
    the same size were trained from scratch, each technique's distance from them against its cost.

    Args:
        records: A suite's records.
        folder: Gets ``error-macs.png``, ``error-params.png`` and ``distance.png``.
        title: Printed above.

    Returns:
        The files written; none if no record is finished.
    """
    panels = _panels(lines(records))
    made = [
        save(_sizes(panels, axis, title), folder / f"error-{axis}.png") for axis in AXES if panels
    ]
    if len(away := distances(panels)) > 1:
        made.append(_distances(away, folder / "distance.png", title))
    return made


def drawn(records: Sequence[Record], axis: str, title: str) -> Figure:
    """Error against "macs" or "params", a panel per network.

    Raises:
        UsageError: If the axis is another, or no record is finished.
    """
    if axis not in AXES:
        raise UsageError(f"figures have an axis of {' or '.join(AXES)}, not '{axis}'")
    if not (panels := _panels(lines(records))):
        raise UsageError("there is nothing to draw: no technique has a finished record")
    return _sizes(panels, axis, title)


def _panels(rows: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    """Rows by network, where there is more than a base: that alone is no picture."""
    found = blocks(rows)
    return {n: b for n, b in found.items() if any(line.budget and line.done for line in b)}


def linked(rows: Sequence[Line]) -> list[str]:
    """Lines of markdown that show the figures of a suite's rows, those that ``write`` draws."""
    panels = _panels(rows)
    if not panels:
        return []
    more = (
        "Error against [MACs](figures/error-macs.png) and [parameters](figures/error-params.png)."
    )
    if len(distances(panels)) < 2:
        return ["![Test error against MACs](figures/error-macs.png)", "", more, ""]
    shown = "![Test errors against training from scratch, by cost](figures/distance.png)"
    return [shown, "", more, ""]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, the same bytes for the same figure."""
    write_atomic(path, png(figure))
    return path


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _sizes(panels: Mapping[tuple[str, str], Sequence[Line]], axis: str, title: str) -> Figure:
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(6.6 * columns, 4.6 * height + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, columns, squeeze=False)
    known = styles(line for block in panels.values() for line in block)
    for place, ((dataset, model), block) in zip(axes.flat, panels.items(), strict=False):
        _panel(place, block, axis, known)
        place.set_title(f"{model} on {dataset}", fontsize=11)
        place.set_xlabel(f"{AXES[axis]}, fewer to the right", fontsize=9)
        place.set_ylabel("test error, %, lower is better", fontsize=9)
    for place in list(axes.flat)[len(panels) :]:
        place.set_visible(False)
    most = max(line.bases for block in panels.values() for line in block)
    spread = f"means over {most} base networks, single ones as dots" if most > 1 else "one base"
    heading = textwrap.fill(f"{title}: {spread}; controls grey", 60 * columns)
    figure.suptitle(heading, fontsize=12)
    return figure


def _panel(place: Axes, block: Sequence[Line], axis: str, known: Mapping[str, Style]) -> None:
    """Error by size of one network: techniques in colour, controls grey, names at the end of their
    lines.
    """
    names, ends, sizes = short_names(block), list[tuple[float, float, str, Style]](), set[float]()
    labels = dict.fromkeys(line.label for line in block if line.done and line.budget)
    for label in labels:
        rows = [(_point(ln, axis), ln) for ln in block if ln.label == label and ln.done]
        rows.sort(key=lambda row: row[0])  # of two budgets below the floor, both may be equal
        style = known[label]
        xs, ys = [p[0] for p, _ in rows], [p[1] for p, _ in rows]
        control = rows[0][1].control
        sizes.update(xs)
        place.plot(
            xs,
            ys,
            color=style.colour,
            marker=style.marker,
            markersize=3 if control else 5,
            linestyle=style.line,
            linewidth=1.0 if control else 1.5,
            zorder=2 if control else 3,
        )
        for x, (_, line) in zip(xs, rows, strict=True):
            runs = [max(LEAST, 100 - top) for top in line.scores().values()]
            if len(runs) > 1:
                many = [x] * len(runs)
                place.scatter(
                    many, runs, s=7, color=style.colour, alpha=0.35, linewidth=0, zorder=1
                )
        failed = sum(line.failed for _, line in rows)
        cells = sum(line.cells for _, line in rows)
        text = names[label] + (f" ({failed} of {cells} failed)" if failed else "")
        ends.append((xs[0], ys[0], text, style))
    for line in block:
        if line.budget is None and line.done:
            _, error = _point(line, axis)
            place.axhline(error, color=BASE, linestyle=":", linewidth=1)
            place.annotate(
                "base",
                (0.0, error),
                (3, 3),
                place.get_yaxis_transform(),
                "offset points",
                fontsize=8,
                color=BASE,
            )
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_xlim(max(sizes) * 1.15, min(sizes) / 1.1)
    few = _apart(sorted(sizes), 0.085)
    place.set_xticks(few, [count(x) for x in few], fontsize=8)
    low, high = place.get_ylim()
    shown = [t for t in (FINE if high < 12 * low else TICKS) if low <= t <= high]
    place.set_yticks(shown, [f"{t:g}" for t in shown], fontsize=8)
    place.minorticks_off()
    place.grid(alpha=0.3)
    _names(place, ends, 1.03)


def _names(
    place: Axes, ends: Sequence[tuple[float, float, str, Style]], at: float, left: bool = False
) -> None:
    """Names beside points, each as near to its own as the others leave room for.

    Args:
        place: The panel, with logarithmic axes.
        ends: (x, y, name, style) of each point.
        at: Where the names begin, as a share of the panel's width; where they end if ``left``.
        left: Whether they stand on the left.
    """
    low, high = map(math.log, place.get_ylim())
    heights = [(math.log(y) - low) / (high - low) for _, y, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: heights[i])
    gap = min(0.042, 1 / max(1, len(ends)))
    for i, height in zip(order, apart([heights[i] for i in order], gap), strict=True):
        x, y, text, style = ends[i]
        place.annotate(
            text,
            (x, y),
            (at, height),
            "data",
            "axes fraction",
            fontsize=8,
            color="#777777" if style.colour == CONTROL else style.colour,
            va="center",
            ha="right" if left else "left",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.colour,
                "linewidth": 0.5,
                "alpha": 0.6,
                "relpos": (1.0 if left else 0.0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in 0 to 1 in ascending order, moved to at least ``gap`` from one another, by the
    least sum of squares.
    """
    from sklearn.isotonic import isotonic_regression

    if not heights:
        return []
    steps = gap * np.arange(len(heights))
    moved = isotonic_regression(np.array(heights) - steps)
    return list(np.clip(moved, 0.0, max(0.0, 1.0 - steps[-1])) + steps)


def _apart(values: Sequence[float], share: float) -> list[float]:
    """Values of a logarithmic axis that are at least a share of it from one another."""
    room = (values[-1] / values[0]) ** share if values else 1.0
    kept: list[float] = []
    for value in values:
        if not kept or value >= max(room, 1.05) * kept[-1]:
            kept.append(value)
    return kept


def _point(line: Line, axis: str) -> tuple[float, float]:
    """(size, mean error in per cent)."""
    final = line.summary(None)
    size = over_bases({k: float(getattr(r, axis)) for k, r in line.done.items()})
    assert final is not None  # only finished lines are drawn
    assert size is not None
    return size.mean, max(LEAST, 100 - final.mean)


def distances(
    panels: Mapping[tuple[str, str], Sequence[Line]],
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """For each technique: (everything that it cost over the cost of the base network, its test
    errors over those of the best network of the same size that was trained from scratch), once for
    each network and budget that has both. By short name and technique; those without any are left
    out. Under ``SCRATCH``, what these best networks cost themselves.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for block in panels.values():
        names = short_names(block)
        fresh: dict[str | None, float] = {}
        costs: dict[str | None, float] = {}
        for line in block:
            if line.done and line.control and line.first().cell.technique in FRESH:
                error = max(LEAST, 100 - fmean(line.scores().values()))
                if error < fresh.get(line.budget, math.inf):
                    fresh[line.budget] = error
                    costs[line.budget] = cost.mean if (cost := line.cost()) else math.nan
        for budget, own in costs.items():
            if any(line.budget == budget and line.done and not line.control for line in block):
                found.setdefault((SCRATCH, ""), []).append((own, 1.0))
        for line in block:
            cost = line.cost()
            if line.control or not line.done or line.budget not in fresh or cost is None:
                continue
            error = max(LEAST, 100 - fmean(line.scores().values()))
            key = names[line.label], line.first().cell.technique
            found.setdefault(key, []).append((cost.mean, error / fresh[line.budget]))
    return found


def _distances(
    away: Mapping[tuple[str, str], Sequence[tuple[float, float]]],
    path: Path,
    title: str,
) -> Path:
    """One point a technique: geometric means over networks and budgets, with the whole range."""
    figure = Figure(figsize=(8.4, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    place = figure.subplots()
    ends, seen = list[tuple[float, float, str, Style]](), list[str]()
    for (name, technique), pairs in sorted(away.items(), key=lambda a: (len(a[0][0]), a[0])):
        style = of_technique(technique, seen.count(technique))
        if name == SCRATCH:
            style = Style(BASE, "h", "")
        seen.append(technique)
        x, y = (float(np.exp(np.mean(np.log(v)))) for v in zip(*pairs, strict=True))
        ratios = [ratio for _, ratio in pairs]
        place.plot([x, x], [min(ratios), max(ratios)], color=style.colour, linewidth=1, alpha=0.4)
        place.plot(x, y, color=style.colour, marker=style.marker, markersize=8, linestyle="")
        if name == SCRATCH:
            place.annotate(
                name,
                (x, y),
                (0, -16),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=BASE,
            )
            continue
        ends.append((x, y, name, style))
    place.axhline(1.0, color=BASE, linewidth=1.2)
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_xlim(place.get_xlim()[0], place.get_xlim()[1] * 1.3)
    place.set_ylim(place.get_ylim()[0] / 1.1, place.get_ylim()[1])
    low, high = place.get_ylim()
    ticks = list[float]()
    for tick in AWAY:  # those that are wanted most come first; the others need room between them
        room = min((abs(math.log(tick / t)) for t in ticks), default=math.inf)
        if low <= tick <= high and room > 0.05 * math.log(high / low):
            ticks.append(tick)
    place.set_yticks(ticks, ["as many" if t == 1 else f"{100 * (t - 1):+.0f} %" for t in ticks])
    costs = [x for x, *_ in ends]
    marks = [
        t for t in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20) if min(costs) / 2 <= t <= 2 * max(costs)
    ]
    place.set_xticks(marks, [f"{t:g}x" for t in marks])
    place.minorticks_off()
    place.grid(alpha=0.3)
    _beside(place, ends)
    place.set_xlabel("everything that was computed, as a multiple of training the base network")
    place.set_ylabel(
        "more test errors than the best network\nof the same size trained from scratch"
    )
    hint = "better: lower and further left"
    place.text(0.01, 0.985, hint, fontsize=8, va="top", transform=place.transAxes)
    many = max(map(len, away.values()))
    heading = textwrap.fill(title, 80)
    place.set_title(
        f"{heading}\nmeans over {many} pairs of network and budget, lines from best to worst",
        fontsize=10,
    )
    return save(figure, path)


def _beside(place: Axes, ends: Sequence[tuple[float, float, str, Style]]) -> None:
    """Names of points: of those at about one place along the axis together, on the side that has
    more room.
    """
    low, high = map(math.log, place.get_xlim())
    clusters: list[list[tuple[float, float, str, Style]]] = []
    at: list[tuple[float, float]] = []  # where each begins and ends
    for end in sorted(ends, key=lambda e: e[0]):
        x = (math.log(end[0]) - low) / (high - low)
        if at and x - at[-1][1] < 0.06:
            clusters[-1].append(end)
            at[-1] = at[-1][0], x
        else:
            clusters.append([end])
            at.append((x, x))
    for i, (first, last) in enumerate(at):
        before = first - (at[i - 1][1] if i else 0.0)
        after = at[i + 1][0] - last if i + 1 < len(at) else 2.0
        left = before > after
        _names(place, clusters[i], first - 0.025 if left else last + 0.025, left)
