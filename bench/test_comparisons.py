"""One test item per cell: it passes when the cell has a record, and the record is what the report is made of."""

import pytest

from widthbench.protocol import run_cell
from widthbench.records import Cell, Store


def test_cell(cell: Cell) -> None:
    record = run_cell(cell, Store())
    if record.status == "skipped":
        pytest.skip(record.reason)
    assert record.status == "done", f"{record.reason}\n{record.trace}"
