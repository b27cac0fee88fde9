"""One test item per cell: it passes when the cell has a record, and the record is what the report is made of."""

from collections.abc import Mapping

import pytest

from widthbench.engines.worker import Worker
from widthbench.limits import Limits
from widthbench.records import Cell


def test_cell(cell: Cell, worker: Worker, limits: Mapping[str, Limits]) -> None:
    record = worker.run(cell, limits[cell.identity])
    if record.status == "skipped":
        pytest.skip(record.reason)
    assert record.status == "done", f"{record.reason}\n{record.trace}"
