"""Finished cells, one file each: validated, digested, written atomically."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from widthbench import cache
from widthbench.experiment.cell import Cell
from widthbench.experiment.records import Record
from widthbench.paths import Lock, cache_dir


class Store:
    """Finished cells, one file each, shared by all suites and workers.

    Args:
        root: Its folder; ``cells`` in the cache if None.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir() / "cells"

    def path(self, key: str) -> Path:
        """Where a record lies."""
        return self.root / key[:2] / f"{key}.json"

    def lock(self, key: str) -> Lock:
        """Held while a cell is computed, so that two runs on one cache do its work once."""
        return Lock(self.root / "locks" / f"{key}.lock")

    def get(self, key: str) -> Record | None:
        """The finished record, or None; a damaged file is named in a warning and counts as
        missing.
        """
        return self._read(self.path(key), key)

    def _read(self, path: Path, key: str) -> Record | None:
        content = cache.read_json(path, "record")
        if content is None:
            return None
        try:
            record = Record.model_validate(content["record"])
            if record.key == key:
                return record
            why = "it is of another cell"
        except (ValueError, KeyError) as error:
            why = str(error).splitlines()[0]
        cache.damaged(path, "record", why)
        return None

    def put(self, record: Record) -> None:
        """Keep a record. Failed ones are kept apart: they are reported, and tried again by the next
        run.
        """
        content = {"record": record.model_dump(mode="json")}
        if record.status == "failed":
            cache.write_json(self._failed(record.key), content)
        else:
            cache.write_json(self.path(record.key), content)
            cache.drop(self._failed(record.key))

    def failure(self, key: str) -> Record | None:
        """The record of the last failed attempt, if the cell has not been finished since."""
        return self._read(self._failed(key), key)

    def cells(self, *, at_most: int | None = None) -> set[str] | None:
        """Identities of the cells that the store has records of, failures too.

        Args:
            at_most: Look at no more files than that.

        Returns:
            None if there are more, or a damaged one (named in a warning), or others may add to it,
            at a URL.
        """
        if cache.shared():
            return None
        paths = [p for pattern in ("??", "failed") for p in self.root.glob(f"{pattern}/*.json")]
        if at_most is not None and len(paths) > at_most:
            return None
        cells = set()
        for path in paths:
            content = cache.read_json(path, "record")
            if content is None:
                return None
            with suppress(ValueError, KeyError, TypeError):  # of a time when cells had other fields
                cells.add(Cell.model_validate(content["record"]["cell"]).identity)
        return cells

    def _failed(self, key: str) -> Path:
        return self.root / "failed" / f"{key}.json"
