"""How long cells may take, by what such cells took before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from widthbench.experiment.cell import Cell
from widthbench.paths import published_dir

Like = tuple[str | None, ...]


class Forecast:
    """Times of earlier records, by what they are of: the same cell, else the same technique on the
    same network.

    Args:
        results: Where results of this machine are, which count before the published ones.
    """

    def __init__(self, results: Path | None = None) -> None:
        self._results = results

    @cached_property
    def _known(self) -> dict[Like, list[float]]:
        return _times(published_dir()) | (_times(self._results) if self._results else {})

    def times(self, cells: Sequence[Cell]) -> list[float | None]:
        """Seconds of the training of a base network, where it is trained, and of each of its cells;
        None where nothing is known.
        """
        times = [self._known.get(k) for k in _training(cells[0])]
        times += [
            next((self._known[k] for k in _alike(cell) if k in self._known), None) for cell in cells
        ]
        return [median(t) if t else None for t in times]


def _times(folder: Path) -> dict[Like, list[float]]:
    known: dict[Like, list[float]] = {}
    for path in sorted(folder.glob("*/records.jsonl")):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a damaged line tells nothing
                _note(json.loads(text), known)
    return known


def _note(record: dict[str, Any], known: dict[Like, list[float]]) -> None:
    cell = Cell.model_construct(**record["cell"])
    spent = record["spent"]
    seconds = sum(spent[p]["seconds"] for p in ("decision", "adaptation") if p in spent)
    if record["status"] != "failed":  # skipped ones take no time
        for like in _alike(cell):
            known.setdefault(like, []).append(seconds)
    if cell.technique == "base" and spent["base"]["seconds"]:
        network = ("trained", cell.dataset, cell.network)
        known.setdefault(network, []).append(spent["base"]["seconds"])


def _training(cell: Cell) -> list[Like]:
    trained = cell.trains_base and cell.bases == "trained"
    return [("trained", cell.dataset, cell.network)] if trained else []


def _alike(cell: Cell) -> Iterator[Like]:
    where = (cell.dataset, cell.network)
    yield ("cell", *where, cell.label, cell.budget)
    yield ("network", *where, cell.of or cell.technique, cell.technique)
