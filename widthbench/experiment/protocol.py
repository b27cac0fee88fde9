"""The protocol: one cell to one record, the same adaptations and samples for every technique."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from widthbench import parallel, plugins
from widthbench.errors import InfeasibleBudgetError, UsageError
from widthbench.experiment.adaptation import NotApplicableError, adapt, decided, replay, task_of
from widthbench.experiment.bases import (
    obtain_base,
)
from widthbench.experiment.billing import bill, metered, prepared
from widthbench.experiment.cell import Cell
from widthbench.experiment.controls import RUNNERS, Call
from widthbench.experiment.keys import cell_key, machine_of
from widthbench.experiment.records import Record
from widthbench.experiment.store import Store
from widthbench.progress import Progress, quiet
from widthbench.recipe import Spent
from widthbench.technique import registry
from widthbench.technique.base import runs
from widthbench.training.measuring import Meter


@contextmanager
def pinned(cell: Cell) -> Iterator[None]:
    """The cell's threads, determinism and precision (no TF32), and the old ones afterwards."""
    before, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    libraries: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    tf32 = [(library, library.allow_tf32) for library in libraries]
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    debug: Any = torch.utils.deterministic
    fills = debug.fill_uninitialized_memory
    torch.set_num_threads(cell.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
    torch.use_deterministic_algorithms(cell.deterministic, warn_only=True)
    debug.fill_uninitialized_memory = False  # a debugging aid that costs time
    for library, _ in tf32:
        # torch's default for convolutions; "float32" would be 10 bits of mantissa
        library.allow_tf32 = False
    try:
        with threadpool_limits(cell.threads, user_api="blas"):  # numpy's, for scikit-learn's NMF
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(exact, warn_only=only_warns)
        debug.fill_uninitialized_memory = fills
        for library, allowed in tf32:
            library.allow_tf32 = allowed


def run_cell(cell: Cell, store: Store, *, progress: Progress = quiet) -> Record:
    """The record of a cell: from the store, or computed once (others wait at its lock) and stored.

    Args:
        cell: What to run.
        store: Where finished cells are kept.
        progress: Progress bar for training.

    Returns:
        A record with status "done", "skipped" or "failed"; errors within the cell do not raise.

    Raises:
        UsageError: If the cell itself makes no sense: unknown technique, model or data set, no such
            device.
    """
    key = cell_key(cell)
    if record := parallel.broadcast(
        lambda: store.get(key)
    ):  # what is finished can be read where nothing may be written
        return record
    with parallel.held(store.lock(key)):
        if record := parallel.broadcast(lambda: store.get(key)):
            return record
        with pinned(cell):
            record = parallel.broadcast(
                partial(_compute, cell, key, store, progress), everywhere=True
            )
        if parallel.is_main():
            store.put(record)
        return record


def _compute(cell: Cell, key: str, store: Store, progress: Progress) -> Record:
    where = machine_of(cell, parallel.world())
    try:
        obtain = partial(run_cell, store=store, progress=progress)
        call = Call(cell, key, obtain, progress, where)
        run = RUNNERS[cell.technique].run if cell.technique in RUNNERS else _run_technique
        record = run(call)
        record.model_dump_json()  # what a technique put into its series must be plain data
        if (plugins.files() or ":" in cell.model) and cell_key(cell) != key:
            raise UsageError("its code was changed while it ran: run it again")
        return record
    except NotApplicableError as error:
        return Record(key=key, cell=cell, status="skipped", reason=str(error), provenance=where)
    except Exception as error:  # a plug-in may raise anything; the other cells go on
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
        return Record(
            key=key, cell=cell, status="failed", reason=reason, trace=trace, provenance=where
        )


def _run_technique(call: Call) -> Record:
    cell, progress = call.cell, call.progress
    technique = registry.create(cell.technique, cell.params)
    base = obtain_base(cell, progress=progress)
    task = task_of(cell, base, technique, progress=progress)
    if reason := technique.skip(task):
        raise NotApplicableError(f"{technique.id}: {reason}")
    state, preparing = prepared(cell, technique, task, base)
    try:
        with Meter(task.model, base.cost.original.macs) as meter:
            outcome = technique.apply(metered(task, call.key, meter), state)
    except InfeasibleBudgetError as error:
        raise NotApplicableError(str(error)) from error
    model = outcome.resized
    meter.leave(model)
    if not runs(model, base.example_input, base.groups.output_shapes):
        raise UsageError(
            f"technique '{technique.id}' changed the output's shape or made it non-finite"
        )
    path = replay(task, outcome, base) if cell.curves else {}
    rows, adaptation, cost = adapt(model, cell, base, progress, call.key)
    return call.record(
        base.cost.original,
        cost,
        rows,
        access=technique.access,
        spent={
            "base": base.spent if technique.start == "trained" else Spent(),
            "decision": preparing.add(bill(meter, base)),
            "adaptation": adaptation,
        },
        series={k: list(v) for k, v in outcome.series.items()} | path,
        provenance={**call.where, **base.provenance},
        **decided(cell, task, outcome),
    )
