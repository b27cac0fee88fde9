"""The protocol: one cell to one record, the same adaptations and samples for every technique."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from widthbench import parallel
from widthbench.data import sources, splits
from widthbench.errors import DivergedError, InfeasibleBudgetError, UsageError
from widthbench.experiment.bases import (
    Base,
    fresh_model,
    load_data,
    obtain_base,
    training_path,
)
from widthbench.experiment.billing import bill, metered, prepared
from widthbench.experiment.cell import CONTROLS, Cell
from widthbench.experiment.keys import cell_key, device_of
from widthbench.experiment.records import Record, Row, Stage
from widthbench.experiment.store import Store
from widthbench.progress import Progress, quiet
from widthbench.provenance import stamp
from widthbench.recipe import Recipe, Spent
from widthbench.technique import registry
from widthbench.technique.base import Outcome, Technique, runs
from widthbench.technique.budget import Budget, feasible
from widthbench.technique.task import Nothing, Task
from widthbench.training.loop import fit
from widthbench.training.measuring import Meter, accuracy
from widthbench.training.recalibration import batch_norms, recalibrate
from widthbench.training.resume import Resume
from widthbench.width.certify import find_groups
from widthbench.width.cost import Cost, CostModel, count_macs
from widthbench.width.groups import Groups
from widthbench.width.resize import resize


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
        library.allow_tf32 = (
            False  # torch's default for convolutions; "float32" would be 10 bits of mantissa
        )
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(exact, warn_only=only_warns)
        debug.fill_uninitialized_memory = fills
        for library, allowed in tf32:
            library.allow_tf32 = allowed


def batch_of(model: nn.Module, split: splits.Data) -> int:
    """Samples in a batch of scoring: large images would fill the memory, and many small ones a
    CPU's cache.
    """
    small = isinstance(split.test, splits.ImageSamples)
    return 512 if small and next(model.parameters()).device.type == "cuda" else 64


def cost_of(model: nn.Module, base: Base) -> Cost:
    """What a network costs for each sample: one by one, and as its batches are scored, where it
    must not be more.

    Raises:
        UsageError: If a sample of a batch costs more than one alone.
    """
    cost = Cost(count_macs(model, base.example_input), sum(p.numel() for p in model.parameters()))
    size = batch_of(model, base.data)
    together = count_macs(
        model, base.example_input.expand(size, *[-1] * (base.example_input.dim() - 1))
    )
    if together > cost.macs:
        raise UsageError(
            f"the network computes {together:,} MACs for each of {size} samples, but {cost.macs:,}"
            " for one alone"
        )
    return cost


def score(model: nn.Module, split: splits.Data, stage: Stage) -> Row:
    """Test and val scores of a network."""
    size = batch_of(model, split)
    test = accuracy(model, split.test, batch_size=size)
    val = accuracy(model, split.val, batch_size=size) if len(split.val) else None
    for part, found in (("test", test), ("val", val)):
        if found is not None and not math.isfinite(found.loss):
            raise DivergedError(
                f"the network's outputs on {part} data are not finite (stage '{stage}': loss"
                f" {found.loss})"
            )
    return Row(
        stage=stage,
        top1=test.top1,
        top5=test.top5,
        loss=test.loss,
        samples=test.samples,
        val_top1=val.top1 if val else None,
        val_loss=val.loss if val else None,
    )


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
    if record := parallel.agreed(
        lambda: store.get(key)
    ):  # what is finished can be read where nothing may be written
        return record
    with parallel.held(store.lock(key)):
        if record := parallel.agreed(lambda: store.get(key)):
            return record
        with pinned(cell):
            record = parallel.agreed(partial(_compute, cell, key, store, progress), everywhere=True)
        if parallel.first():
            store.put(record)
        return record


def _compute(cell: Cell, key: str, store: Store, progress: Progress) -> Record:
    from widthbench.experiment.controls import run_control  # the controls are built on this module

    where = {
        **stamp(),
        "threads": cell.threads,
        "dtype": "float32",
        "device": str(device_of(cell)),
        "seed": cell.seed,
    }
    where["processes"] = parallel.world()
    if cell.trains_base and cell.base.amp:
        where["base_dtype"] = "bfloat16"
    where["dataset_digest"] = sources.load(cell.dataset).digest
    try:
        run = run_control if cell.technique in CONTROLS else _run_technique
        record = run(cell, key, store, progress, where)
        record.model_dump_json()  # what a technique put into its series must be plain data
        return record
    except NotApplicableError as error:
        return Record(key=key, cell=cell, status="skipped", reason=str(error), provenance=where)
    except Exception as error:  # a plug-in may raise anything; the other cells go on
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
        return Record(
            key=key, cell=cell, status="failed", reason=reason, trace=trace, provenance=where
        )


class NotApplicableError(UsageError):
    """A cell that cannot be run as a matter of fact: the technique says so, or no widths meet the
    budget.
    """


def task_of(cell: Cell, base: Base, technique: Technique, *, progress: Progress = quiet) -> Task:
    """What a technique is given for a cell: the trained base, or the same network newly initialised
    if it starts fresh.
    """
    groups = base.groups.select(cell.scope, cell.include or None)
    budget = budget_of(cell, groups, base.cost, grows=technique.grows)
    return Task(
        model=base.model if technique.start == "trained" else fresh_model(cell, cell.seed),
        groups=groups,
        example_input=base.example_input,
        budget=budget,
        cost=base.cost,
        reference=base.cost,
        train=base.data.train,
        val=base.data.val if len(base.data.val) else Nothing(cell.dataset),
        seed=cell.seed,
        device=device_of(cell),
        recipe=cell.finetune if technique.start == "trained" else cell.base,
        fit=_fit_for(base, cell, progress),
        regroup=lambda model: find_groups(model, base.example_input, cache=False),
        progress=progress,
        curves=cell.curves,
    )


def budget_of(cell: Cell, groups: Groups, cost: CostModel, *, grows: bool = True) -> Budget:
    """A cell's budget; the feasible floor where the budget lies below it and the suite runs
    those.
    """
    if cell.budget is None:
        raise UsageError(f"cell {cell.id} has no budget")
    budget = Budget.parse(cell.budget, grows=grows)
    return feasible(budget, groups, cost, cost) if cell.floor else budget


def _fit_for(base: Base, cell: Cell, progress: Progress) -> Callable[..., Spent]:
    def training(
        model: nn.Module,
        train: Any,
        recipe: Any,
        *,
        seed: int = cell.seed,
        macs: int | None = None,
        **options: Any,
    ) -> Spent:
        macs = count_macs(model, base.example_input) if macs is None else macs
        return fit(model, train, recipe, macs=macs, seed=seed, progress=progress, **options)

    return training


def _run_technique(
    cell: Cell, key: str, store: Store, progress: Progress, where: dict[str, Any]
) -> Record:
    technique = registry.create(cell.technique, cell.params)
    base = obtain_base(cell, progress=progress)
    task = task_of(cell, base, technique, progress=progress)
    if reason := technique.skip(task):
        raise NotApplicableError(f"{technique.id}: {reason}")
    state, preparing = prepared(cell, technique, task, base)
    try:
        with Meter(task.model, base.cost.original.macs) as meter:
            outcome = technique.apply(metered(task, key, meter), state)
    except InfeasibleBudgetError as error:
        raise NotApplicableError(str(error)) from error
    model = outcome.resized
    meter.leave(model)
    if not runs(model, base.example_input, base.groups.output_shapes):
        raise UsageError(
            f"technique '{technique.id}' changed the output's shape or made it non-finite"
        )
    path = replay(task, outcome, base) if cell.curves else {}
    rows, adaptation, cost = adapt(model, cell, base, progress, key)
    return Record(
        key=key,
        cell=cell,
        status="done",
        rows=rows,
        access=technique.access,
        macs=cost.macs,
        params=cost.params,
        base_macs=base.cost.original.macs,
        base_params=base.cost.original.params,
        kept=outcome.kept,
        met=outcome.met,
        floor=task.budget != Budget.parse(str(cell.budget), grows=True),
        coupled=any(task.groups[n].grade == "coupled" for n in outcome.plan),
        widths=outcome.widths,
        base_widths={n: g.channels for n, g in task.groups.items()},
        spent={
            "base": base.spent if technique.start == "trained" else Spent(),
            "decision": preparing.add(bill(meter, base)),
            "adaptation": adaptation,
        },
        series={k: list(v) for k, v in outcome.series.items()} | path,
        provenance={**where, **base.provenance},
    )


STOP = 0.25  # points of val accuracy that a path may lose at its stopping point


def replay(task: Task, outcome: Outcome, base: Base) -> dict[str, list[Any]]:
    """Test and val scores along the technique's path of plans, taken after the decision is made; {}
    if there is no path.

    Where a path shrinks, its stopping point, too: the last one whose val accuracy is at most
    ``STOP`` points below the first one's.
    """
    model = task.model if outcome.model is None else outcome.model
    found: dict[str, list[Any]] = {}
    for plan in outcome.path:
        row = score(resize(model, task.groups, plan), base.data, "resized")
        point = {
            "channels": sum(len(r.rows) for r in plan.values()),
            **row.model_dump(exclude={"stage", "samples", "top5"}),
        }
        for name, value in point.items():
            found.setdefault(f"path.{name}", []).append(value)
    return found | stopping_point(found)


def stopping_point(path: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Where val says that a shrinking path may stop; {} where it grows, or nothing is held out.

    Args:
        path: "path.channels", "path.top1" and "path.val_top1", an entry each for every point.

    Returns:
        "stop.channels", "stop.top1" (test), "stop.val_top1" and "stop.removed" (% of the channels),
        of one entry each.
    """
    channels, val = path.get("path.channels", []), path.get("path.val_top1", [])
    if not channels or None in val or any(a < b for a, b in pairwise(channels)):
        return {}
    last = max(i for i, top1 in enumerate(val) if top1 >= val[0] - STOP)
    found = {
        f"stop.{name}": [path[f"path.{name}"][last]] for name in ("channels", "top1", "val_top1")
    }
    return found | {"stop.removed": [100 * (channels[0] - channels[last]) / channels[0]]}


def adapt(
    model: nn.Module, cell: Cell, base: Base, progress: Progress, key: str
) -> tuple[tuple[Row, ...], Spent, Cost]:
    """Score a resized network as it is, after batch-norm recalibration, and after fine-tuning where
    there is any; in place.

    Returns:
        The rows, what the adaptation cost, and the network's cost.
    """
    cost = cost_of(model, base)
    rows = [score(model, base.data, "resized")]
    spent = recalibrate(
        model, base.data.train, samples=cell.calibration, macs=cost.macs, seed=cell.seed
    )
    again = score(model, base.data, "recalibrated") if batch_norms(model) else rows[0]
    rows.append(again.model_copy(update={"stage": "recalibrated"}))
    if not cell.finetune.epochs:
        return tuple(rows), spent, cost
    tuned = train(
        model,
        cell,
        cell.finetune,
        key,
        macs=cost.macs,
        progress=progress,
        desc=f"fine-tune {cell.id}",
    )
    rows.append(score(model, base.data, "fine-tuned"))
    return tuple(rows), spent.add(tuned), cost


def train(
    model: nn.Module,
    cell: Cell,
    recipe: Recipe,
    key: str,
    *,
    macs: int,
    progress: Progress,
    desc: str,
) -> Spent:
    """Train one of a cell's networks on its data, resuming where a killed run stopped."""
    resume = Resume(training_path(key))
    samples = load_data(cell).train
    spent = fit(
        model,
        samples,
        recipe,
        macs=macs,
        seed=cell.seed,
        progress=progress,
        desc=desc,
        resume=resume,
    )
    resume.discard()
    return spent
