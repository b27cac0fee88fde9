"""How techniques look: a colour and a marker for each, the same in every figure and on the page."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from widthbench.report.lines import Line

# Okabe and Ito's palette, told apart by colour-blind eyes: for what is no technique
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# by technique: colour, marker of matplotlib, symbol of plotly
KNOWN = {
    "l1-norm": ("#0072B2", "o", "circle"),
    "neuron-merging": ("#D55E00", "s", "square"),
    "autoprune": ("#009E73", "^", "triangle-up"),
    "splitting": ("#CC79A7", "D", "diamond"),
    "neuron-removal": ("#E69F00", "v", "triangle-down"),
    "autoslim": ("#56B4E9", "P", "cross"),
    "nmf": ("#8C5A2B", "X", "x"),
    "random-channels": ("#7F7F7F", "*", "star"),
    "torch-pruning:taylor": ("#6A3D9A", "<", "triangle-left"),
    "torch-pruning:magnitude": ("#000000", ">", "triangle-right"),
    "torch-pruning:hessian": ("#A3224F", "p", "pentagon"),
    "torch-pruning:lamp": ("#4B7F2B", "h", "hexagon"),
    "torch-pruning:fpgm": ("#5B6F8F", "d", "diamond-tall"),
    "torch-pruning:bn-scale": ("#B8A100", "8", "octagon"),
}
PLUGGED = (
    ("#C2185B", "H", "hexagon2"),
    ("#00695C", "1", "y-down"),
    ("#BF6900", "2", "y-up"),
    ("#3949AB", "3", "y-left"),
    ("#6D4C41", "4", "y-right"),
)  # of plug-ins, by their names
LINES = (("-", "solid"), ("--", "dash"), (":", "dot"), ("-.", "dashdot"))  # of variants
CONTROL = "#B5B5B5"
BASE = "#444444"


@dataclass(frozen=True)
class Style:
    """How one row of a leaderboard is drawn.

    Attributes:
        colour: Of its line and its points.
        marker: Of matplotlib.
        symbol: Of plotly.
        line: Of matplotlib; variants of a technique differ in it.
        dash: Of plotly.
    """

    colour: str
    marker: str
    symbol: str
    line: str = "-"
    dash: str = "solid"


def of_technique(name: str, variant: int = 0) -> Style:
    """The style of a technique.

    Args:
        name: Its id.
        variant: Which of its variants: by the style of the line.
    """
    colour, marker, symbol = KNOWN.get(name) or PLUGGED[zlib.crc32(name.encode()) % len(PLUGGED)]
    return Style(colour, marker, symbol, *LINES[variant % len(LINES)])


def styles(rows: Iterable[Line]) -> dict[str, Style]:
    """The style of each row, by label: controls are grey, and a technique's variants, the one with
    the fewest parameters first, differ in their lines.
    """
    variants: dict[str, set[tuple[int, str]]] = {}
    found: dict[str, Style] = {}
    for line in rows:
        if line.control:
            found[line.label] = Style(BASE if line.budget is None else CONTROL, ".", "circle")
        elif line.records:
            cell = line.first().cell
            variants.setdefault(cell.technique, set()).add((len(cell.params), line.label))
    for technique, labels in variants.items():
        for i, (_, label) in enumerate(sorted(labels)):
            found[label] = of_technique(technique, i)
    return found
