"""Curves: what is left of the accuracy and of the loss along each technique's path, and error
curves over the gates of neurons.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from widthbench.experiment.adaptation import STOP
from widthbench.experiment.records import Record
from widthbench.report.figures import save
from widthbench.report.lines import Line, lines, over_bases
from widthbench.report.markdown import code, escaped
from widthbench.report.style import COLOURS

SHARES = (20, 40, 50, 60, 80)  # % of the channels removed, in the table
NEURONS = 12  # panels of error curves
KINDS = {
    "accuracy": ("path.top1", "test top-1, %"),
    "loss": ("loss", "loss on the samples ranked by, nats"),
}


def has_curves(records: Sequence[Record]) -> bool:
    """Whether any record has a shrinking path that was replayed."""
    return any(_drawable(r) for r in records)


def _drawable(record: Record) -> bool:
    channels, top1 = (record.series.get(f"path.{name}", []) for name in ("channels", "top1"))
    return (
        bool(channels)
        and channels[0] > 0
        and len(channels) == len(top1)
        and all(a >= b for a, b in pairwise(channels))
    )


def page(records: Sequence[Record], title: str) -> str:
    """The markdown page: for each network, how much goes before accuracy is lost, and what is left
    further along.

    Args:
        records: A suite's records.
        title: Of the suite.
    """
    parts = [f"# {title}: along the paths", "", PREFACE.format(stop=STOP), ""]
    parts += [
        f"![{what} against the share of channels removed](figures/curves-{what}.png)\n"
        for what in KINDS
    ]
    for (dataset, network), block in _networks(records).items():
        rows = [_row(line) for line in block]
        headers = [
            "technique",
            "removed, % (val)",
            "top-1 % there",
            *(f"at {s} %" for s in SHARES),
            "rank correlation",
            "n",
        ]
        base = over_bases(
            {k: r.series["path.top1"][0] for line in block for k, r in line.done.items()}
        )
        assert base is not None  # a block has records
        table = tabulate(
            rows,
            headers=headers,
            tablefmt="pipe",
            colalign=("left", *["right"] * 9),
            disable_numparse=True,
        )
        parts += [
            f"## {code(network)} on {code(dataset)}",
            "",
            f"Nothing removed: {base.text()} %.",
            "",
            table,
            "",
        ]
        if _with_errors(block):
            name = _file(network, dataset)
            parts += [
                (
                    f"![Loss over the gate of single neurons of {escaped(network)}, with its Taylor"
                    f" polynomials](figures/{name})"
                ),
                "",
            ]
    return "\n".join(parts).rstrip() + "\n"


PREFACE = """\
Each technique's order of removal, replayed point by point after all decisions;
nothing is retrained. Mean ± sample standard deviation over n base networks.

*Removed*: the share of channels that is gone at the stopping point, the last point of the path
whose **val** accuracy is at most {stop:g} points below that of the whole network; *top-1 there* is
test accuracy at this point. *At 20 %* and so on: test accuracy after that share was removed. *Rank
correlation*: Spearman's, of the predicted with the true changes of the loss, each channel of the
whole network removed alone. *Second order* is by the back-propagated diagonal, unless it says
exact. The data are the series of `records.jsonl`: `path.*`, `stop.*`, `loss`, `change GROUP`
(true), `score GROUP` (predicted), `error GROUP` (the loss at the values `gate` of a channel's
gate), `first GROUP` and `second GROUP` (its derivatives)."""


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw the curves of all networks, and error curves where records have them.

    Args:
        records: A suite's records.
        folder: Gets ``curves-accuracy.png``, ``curves-loss.png`` and an ``errors-NETWORK.png``
            each.

    Returns:
        The files written.
    """
    networks = _networks(records)
    drawn = [_curves(networks, folder / f"curves-{what}.png", what) for what in KINDS if networks]
    for (dataset, network), block in networks.items():
        if errors := _with_errors(block):
            drawn.append(
                _errors(errors, folder / _file(network, dataset), f"{network} on {dataset}")
            )
    return drawn


def _networks(records: Sequence[Record]) -> dict[tuple[str, str], list[Line]]:
    """The lines with paths, by network; of one technique at several budgets, the longest path."""
    networks: dict[tuple[str, str], dict[str, Line]] = {}
    for row in lines(records):
        line = replace(row, records={k: r for k, r in row.done.items() if _drawable(r)})
        if line.records:
            block = networks.setdefault((line.dataset, line.model), {})
            if line.label not in block or _length(line) > _length(block[line.label]):
                block[line.label] = line
    return {network: list(block.values()) for network, block in networks.items()}


def _length(line: Line) -> int:
    return max(len(r.series["path.channels"]) for r in line.records.values())


def _row(line: Line) -> list[str]:
    def mean(value: Callable[[Record], float | None], digits: int = 2) -> str:
        values = {k: v for k, r in line.records.items() if (v := value(r)) is not None}
        summary = over_bases(values)
        return summary.text(digits) if summary else "–"

    def last(name: str) -> Callable[[Record], float | None]:
        return lambda r: r.series[name][-1] if r.series.get(name) else None

    at = [mean(lambda r, s=share: _at(r, s)) for share in SHARES]  # type: ignore[misc]
    return [
        escaped(short(line)),
        mean(last("stop.removed"), 1),
        mean(last("stop.top1")),
        *at,
        mean(last("correlation"), 3),
        str(line.bases),
    ]


def removed_shares(series: Mapping[str, list[Any]]) -> np.ndarray:
    """% of the channels removed at each point of a path."""
    channels = np.array(series["path.channels"], dtype=float)
    return 100 * (1 - channels / channels[0])


def _at(record: Record, share: float) -> float:
    """Test accuracy at the last point of the path with no more than that share removed."""
    reached = np.flatnonzero(removed_shares(record.series) <= share + 1e-9)
    return float(record.series["path.top1"][reached[-1]])


def short(line: Line) -> str:
    """A technique's label without its own name and those of its parameters: "second_order, exact,
    single".
    """
    cell = line.first().cell
    order = ("ranking", "diagonal", "rerank")
    names = sorted(
        cell.params,
        key=lambda n: (order.index(n) if n in order[:2] else len(order) + (n == "rerank"), n),
    )
    values = [str(cell.params[n]) if n in order else f"{n}={cell.params[n]}" for n in names]
    return ", ".join(values).replace("_", " ") or line.label


def _styles(networks: Mapping[tuple[str, str], Sequence[Line]]) -> dict[str, tuple[str, str]]:
    """(colour, line style) of each short label: rankings by colour, schemes by style."""
    labels = sorted({short(ln) for block in networks.values() for ln in block})
    families = sorted({_family(label) for label in labels})
    return {
        s: (
            COLOURS[families.index(_family(s)) % len(COLOURS)],
            "--" if s.endswith("single") else "-",
        )
        for s in labels
    }


def _family(label: str) -> str:
    return label.removesuffix(", single").removesuffix(", iterative")


def _curves(networks: Mapping[tuple[str, str], Sequence[Line]], path: Path, what: str) -> Path:
    series, ylabel = KINDS[what]
    columns = min(2, len(networks))
    height = math.ceil(len(networks) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.5 * height + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, columns, squeeze=False)
    styles, handles = _styles(networks), {}
    for place, ((dataset, network), block) in zip(axes.flat, networks.items(), strict=False):
        for line in sorted(block, key=short):
            label = short(line)
            drawn = _band(place, line, series, *styles[label])
            if drawn is not None:
                handles[label] = drawn
        place.set_title(f"{network} on {dataset}", fontsize=10)
        place.set_xlabel("channels removed, %")
        place.set_ylabel(ylabel)
        if what == "loss":
            place.set_yscale("log")
        place.set_xlim(0, 100)
        place.grid(alpha=0.3)
    for place in list(axes.flat)[len(networks) :]:
        place.set_visible(False)
    ordered = dict(sorted(handles.items()))
    figure.legend(
        ordered.values(),
        ordered.keys(),
        loc="outside lower center",
        ncols=3 if columns > 1 else 2,
        frameon=False,
        fontsize=9,
    )
    most = max(ln.bases for block in networks.values() for ln in block)
    spread = f"mean ± std over {most} base networks" if most > 1 else "one base network"
    stop = "; dots: the stopping point chosen on val" if what == "accuracy" else ""
    heading = f"{what.capitalize()} along the order of removal, nothing retrained; {spread}{stop}"
    figure.suptitle(textwrap.fill(heading, 56 * columns, break_on_hyphens=False), fontsize=12)
    return save(figure, path)


def _band(place: Axes, line: Line, series: str, colour: str, style: str) -> Any:
    """Mean and spread over bases on a common grid; the curve's handle, or None where no record has
    the series.
    """
    grid, curves, stops = np.linspace(0, 100, 201), [], []
    for record in line.records.values():
        told = record.series
        shares, values = removed_shares(told), told.get(series)
        if values is None or len(values) != len(shares):
            continue
        inside = np.interp(grid, shares, values)
        inside[grid > shares[-1] + 0.5] = np.nan
        curves.append(inside)
        if series == "path.top1" and told.get("stop.removed"):
            stops.append((told["stop.removed"][-1], told["stop.top1"][-1]))
    if not curves:
        return None
    mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1) if len(curves) > 1 else 0
    (handle,) = place.plot(grid, mean, color=colour, linestyle=style, linewidth=1.5)
    low = mean - spread if series == "path.top1" else np.maximum(mean - spread, mean / 3)
    place.fill_between(grid, low, mean + spread, color=colour, alpha=0.12, linewidth=0)
    if stops:
        place.plot(*np.mean(stops, axis=0), marker="o", color=colour, markersize=5)
    return handle


def _with_errors(block: Sequence[Line]) -> dict[str, Record]:
    """Records with error curves of one base network, by short label."""
    shown: dict[str, Record] = {}
    chosen = None
    for line in block:
        for key, record in line.records.items():
            if record.series.get("gate") and chosen in (None, key):
                chosen, shown[short(line)] = key, record
    return shown


def _errors(shown: Mapping[str, Record], path: Path, title: str) -> Path:
    """A panel per neuron: the loss over its gate, and the polynomials that rankings judge it by."""
    any_record = next(iter(shown.values()))
    series = any_record.series
    groups = [name.removeprefix("error ") for name in series if name.startswith("error ")]
    neurons = sorted(
        (series[f"change {g}"][i], g, i) for g in groups for i in range(len(series[f"change {g}"]))
    )
    chosen = [
        neurons[round(i)] for i in np.linspace(0, len(neurons) - 1, min(NEURONS, len(neurons)))
    ]
    columns = 4
    height = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(3.0 * columns, 2.5 * height + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, columns, squeeze=False)
    gate, fine = np.array(series["gate"]), np.linspace(0, 1, 50)
    for place, (change, group, i) in zip(axes.flat, chosen, strict=False):
        errors = np.array(series[f"error {group}"][i])
        place.plot(
            gate,
            errors - errors[-1],
            color="black",
            marker="o",
            markersize=3,
            label="the loss itself (brute force)",
        )
        first = series[f"first {group}"][i]
        place.plot(fine, first * (fine - 1), color=COLOURS[1], linestyle=":", label="first order")
        for at, (label, record) in enumerate(sorted(shown.items())):
            second = record.series[f"second {group}"][i]
            parabola = first * (fine - 1) + 0.5 * second * (fine - 1) ** 2
            what = _family(label) + ("" if "exact" in label else ", back-propagated")
            place.plot(
                fine,
                parabola,
                color=COLOURS[(0, 2, 3)[at % 3]],
                linestyle=("-", "--")[at % 2],
                label=what,
            )
        place.set_title(f"{group}, neuron {i}: {change:+.2g}", fontsize=9)
        place.grid(alpha=0.3)
        place.tick_params(labelsize=8)
    for place in list(axes.flat)[len(chosen) :]:
        place.set_visible(False)
    for place in axes[-1]:
        place.set_xlabel("gate: 1 as trained, 0 removed", fontsize=8)
    figure.supylabel("change of the loss, nats", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    seed = any_record.cell.seed
    figure.suptitle(
        f"{title}, seed {seed}: {len(chosen)} neurons from the least to the most wanted\n"
        "(above each: what its removal does to the loss)",
        fontsize=11,
    )
    return save(figure, path)


def _file(network: str, dataset: str) -> str:
    plain = "".join(c if c.isalnum() or c in "_." else "-" for c in f"{dataset}-{network}")
    return f"errors-{'-'.join(p for p in plain.split('-') if p)}.png"
