"""Figures: accuracy against size, with error bars and the Pareto front."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from widthbench.experiment.records import Record
from widthbench.paths import write_atomic
from widthbench.report.lines import Line, lines, over_bases

# Okabe and Ito's palette, told apart by colour-blind eyes; markers tell the rows apart in print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = (
    "o",
    "s",
    "^",
    "D",
    "v",
    "P",
    "X",
    "*",
    "<",
)  # one more than colours: both together repeat only after 72
MANY = 12  # points of which quartiles tell those that lie far out
AXES = {"macs": "FLOPs (as MACs) of one image", "params": "parameters"}


def write(records: Sequence[Record], folder: Path, title: str) -> list[Path]:
    """Draw accuracy against MACs and against parameters, a panel per network.

    Args:
        records: A suite's records.
        folder: Gets ``accuracy-macs.png`` and ``accuracy-params.png``.
        title: Printed above.

    Returns:
        The files written; none if no record is finished.
    """
    finished = [line for line in lines(records) if line.done]
    panels: dict[tuple[str, str], list[Line]] = {}
    lost: dict[
        tuple[str, str], dict[str, list[int]]
    ] = {}  # by row, budgets together: how many runs failed, of how many
    for line in lines(records):
        if not line.control or line.budget:
            counts = lost.setdefault((line.dataset, line.model), {}).setdefault(line.label, [0, 0])
            counts[0], counts[1] = counts[0] + line.failed, counts[1] + line.failed + len(line.done)
    failures = {
        network: ", ".join(
            f"{label} {failed} of {whole}" for label, (failed, whole) in rows.items() if failed
        )
        for network, rows in lost.items()
    }
    for line in finished:
        panels.setdefault((line.dataset, line.model), []).append(line)
    panels = {
        k: block for k, block in panels.items() if any(ln.budget for ln in block)
    }  # a lone base is no picture
    if not panels:
        return []
    return [
        _figure(panels, failures, axis, folder / f"accuracy-{axis}.png", title) for axis in AXES
    ]


def _figure(
    panels: dict[tuple[str, str], list[Line]],
    failures: dict[tuple[str, str], str],
    axis: str,
    path: Path,
    title: str,
) -> Path:
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    labels = sorted({ln.label for block in panels.values() for ln in block if ln.label != "base"})
    abreast = legend_columns(labels, 5.4 * columns)
    below = 0.2 * max(0, math.ceil((len(labels) + 2) / abreast) - 3)  # what a longer legend takes
    figure = Figure(figsize=(5.4 * columns, 3.6 * height + 1.3 + below), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, columns, squeeze=False)
    for place, ((dataset, model), block) in zip(axes.flat, panels.items(), strict=False):
        _panel(place, block, axis, labels)
        place.set_title(f"{model} on {dataset}", fontsize=11)
        failed = failures.get((dataset, model), "")
        place.set_xlabel(
            AXES[axis] + (f"\n{textwrap.fill(f'failed runs: {failed}', 75)}" if failed else ""),
            fontsize=9,
        )
        place.set_ylabel("test top-1, %")
    for place in list(axes.flat)[len(panels) :]:
        place.set_visible(False)
    handles = {
        name: h for a in axes.flat for h, name in zip(*a.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=abreast,
        frameon=False,
        fontsize=9,
    )
    seeds = {ln.bases for block in panels.values() for ln in block}
    most = f"up to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
    spread = f"mean ± std over {most} base networks" if max(seeds) > 1 else "one base network"
    heading = textwrap.fill(
        f"{title}: after adaptation, {spread}", 52 * columns, break_on_hyphens=False
    )
    figure.suptitle(f"{heading}\n(points of one size are set side by side)", fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
    return path


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many entries of a legend fit beside each other.

    Args:
        labels: Their texts, in 9 point.
        width: Of the figure, in inches.
    """
    longest = max(map(len, [*labels, "Pareto front of the means"]))
    return max(1, min(3, int(width / (0.075 * longest + 0.6))))


def _panel(place: Axes, block: Sequence[Line], axis: str, labels: Sequence[str]) -> None:
    points: list[tuple[float, float]] = []
    dots: list[tuple[float, float, str]] = []  # as drawn
    shown = [label for label in labels if any(ln.label == label for ln in block)]
    for label in ["base", *shown]:
        rows = sorted((_point(ln, axis) for ln in block if ln.label == label), key=lambda p: p[0])
        if not rows:
            continue
        xs, ys = [p[0] for p in rows], [p[1] for p in rows]
        points += list(zip(xs, ys, strict=True))
        index = labels.index(label) if label != "base" else -1
        colour = COLOURS[index % len(COLOURS)] if label != "base" else "#444444"
        marker = MARKERS[index % len(MARKERS)] if label != "base" else "H"
        # rows of one shape share an abscissa: shift them a little so that error bars do not hide
        # each other
        shift = (
            1.0 if label == "base" else 1.0 + 0.012 * (shown.index(label) - (len(shown) - 1) / 2)
        )
        errors = [p[2] for p in rows] if any(p[2] for p in rows) else None
        style = "--" if any(ln.control for ln in block if ln.label == label) else "-"
        place.errorbar(
            [x * shift for x in xs],
            ys,
            yerr=errors,
            label=label,
            color=colour,
            marker=marker,
            markersize=5.5,
            linestyle=style,
            linewidth=1.2,
            capsize=3,
        )
        dots += [(x * shift, y, colour) for x, y in zip(xs, ys, strict=True)]
    front = pareto(points)
    front.append(
        (max(p[0] for p in points), front[-1][1])
    )  # larger networks without better scores are behind it
    place.plot(
        [p[0] for p in front],
        [p[1] for p in front],
        color="#BBBBBB",
        linewidth=5,
        alpha=0.6,
        zorder=0,
        drawstyle="steps-post",
        label="Pareto front of the means",
        solid_capstyle="butt",
    )
    place.set_xscale("log")
    widest = max(p[0] for p in points)
    narrowest = min(p[0] for p in points)
    place.set_xlim(narrowest / 1.15, widest * 1.15)
    ticks = sorted({float(f"{p[0]:.3g}") for p in points})
    room = max(1.12, (widest / narrowest) ** 0.09)  # labels closer than this would overlap
    apart = [t for i, t in enumerate(ticks) if i == 0 or t > room * ticks[i - 1]]
    place.set_xticks(apart, [_short(t) for t in apart])
    place.minorticks_off()
    place.grid(alpha=0.3)
    if (bottom := floor_of([y for _, y in points])) is not None:
        top = max(y for _, y in points)
        place.set_ylim(bottom, top + max(0.5, 0.1 * (top - bottom)))
        for x, y, colour in dots:
            if y < bottom:  # off the scale: an arrow with its value
                place.annotate(
                    f"{y:.0f} %",
                    (x, 0.0),
                    xytext=(0, 16),
                    xycoords=place.get_xaxis_transform(),
                    textcoords="offset points",
                    color=colour,
                    fontsize=8,
                    ha="center",
                    arrowprops={"arrowstyle": "-|>", "color": colour},
                )


def floor_of(accuracies: Sequence[float]) -> float | None:
    """Where an axis of accuracies is to begin so that a few rows far below do not flatten all
    others; None for all of it.
    """
    ranked = sorted(accuracies)
    if len(ranked) >= MANY:  # Tukey's outer fence
        low, high = np.percentile(ranked, [25, 75])
        above = [a for a in ranked if a >= low - max(5.0, 3 * (high - low))]
    else:
        gaps = [b - a for a, b in itertools.pairwise(ranked)]
        if not gaps or max(gaps) < 20 or max(gaps) < 0.6 * (ranked[-1] - ranked[0]):
            return None
        above = ranked[gaps.index(max(gaps)) + 1 :]
    if len(above) == len(ranked) or len(above) <= len(ranked) / 2:
        return None
    return above[0] - max(1.0, 0.25 * (above[-1] - above[0]))


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _point(line: Line, axis: str) -> tuple[float, float, float]:
    """(size, mean accuracy, standard deviation or 0)."""
    final = line.summary(None)
    size = over_bases({k: float(getattr(r, axis)) for k, r in line.done.items()})
    assert final is not None  # only finished lines are drawn
    assert size is not None
    return size.mean, final.mean, final.std or 0.0


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (size, accuracy) that no other point beats in both, by size."""
    front: list[tuple[float, float]] = []
    for size, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((size, accuracy))
    return front
