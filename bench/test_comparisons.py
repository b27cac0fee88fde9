"""One test item per cell: it passes when the cell has a record, and the record is what the report
is made of.
"""

from collections.abc import Callable, Mapping

import pytest

from widthbench.engines.worker import Worker
from widthbench.experiment.cell import Cell
from widthbench.experiment.limits import Limits


def test_cell(
    cell: Cell,
    worker: Worker,
    limits: Mapping[str, Limits],
    record_property: Callable[[str, object], None],
) -> None:
    record = worker.run(cell, limits[cell.identity])
    record_property(
        "failed" if record.status == "failed" else "done", record.key
    )  # the report is made of these
    if record.status == "skipped":
        pytest.skip(record.reason)
    assert record.status == "done", f"{record.reason}\n{record.trace}"
