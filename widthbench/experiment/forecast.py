"""How long cells may take, by what such cells took before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from statistics import median
from typing import Any

from widthbench.experiment.cell import Cell
from widthbench.paths import published_dir

Like = tuple[str | None, ...]


class Forecast:
    """Times of published records, by what they are of: the same cell, else the same technique on
    the same network.
    """

    @cached_property
    def _known(self) -> dict[Like, list[float]]:
        known: dict[Like, list[float]] = {}
        for path in sorted(published_dir().glob("*/records.jsonl")):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a damaged line tells nothing
                    _note(json.loads(text), known)
        return known

    def seconds(self, cells: Sequence[Cell]) -> tuple[float, int]:
        """What the cells of one base network take, its training included; and of how many of them,
        the training counted as one, nothing is known.
        """
        times = [self._known.get(k) for k in _training(cells[0])]
        times += [
            next((self._known[k] for k in _alike(cell) if k in self._known), None) for cell in cells
        ]
        return sum(median(t) for t in times if t), times.count(None)


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
