"""What happens inside a worker's process. All that is slow to import is imported here, before the
first cell's time begins.
"""

from __future__ import annotations

from typing import Any

from widthbench.children import Say
from widthbench.engines.worker import code_of
from widthbench.experiment.cell import Cell
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store
from widthbench.paths import Lock, settle
from widthbench.progress import bar, quiet

settle()


def answer(request: Any, say: Say) -> dict[str, Any]:
    """Run a cell.

    Args:
        request: The cell, and whether to show progress bars.
        say: Told where it is: waiting for one that computes the same cell, trains its base, decodes
            its images.

    Returns:
        The record, and the digest of the code that it comes from.
    """
    Lock.tell = say
    cell = Cell.model_validate(request["cell"])
    record = run_cell(cell, Store(), progress=bar if request["bar"] else quiet)
    return {"record": record.model_dump(mode="json"), "code": code_of(cell)}
