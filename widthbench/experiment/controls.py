"""Controls: rows that ask what the training alone would have given. Protocol rows, not
techniques.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from widthbench.errors import InfeasibleBudgetError, UsageError
from widthbench.experiment.bases import Base, example_input, fresh_model, load_data, obtain_base
from widthbench.experiment.cell import Cell
from widthbench.experiment.protocol import (
    NotApplicableError,
    adapt,
    budget_of,
    run_cell,
    score,
    task_of,
    train,
)
from widthbench.experiment.records import Record
from widthbench.experiment.store import Store
from widthbench.networks import models
from widthbench.progress import Progress
from widthbench.recipe import Recipe, Spent
from widthbench.technique import registry
from widthbench.technique.base import Result
from widthbench.technique.budget import Budget, check, uniform_widths, used
from widthbench.technique.task import Task
from widthbench.training.recalibration import batch_norms
from widthbench.width.certify import find_groups
from widthbench.width.cost import CostModel, count_macs
from widthbench.width.groups import Groups
from widthbench.width.resize import keep, resize

# keep the seeds of the controls' fresh weights apart from the base network's and from each other's
FRESH = {"uniform-width": 1_000_003, "scratch": 2_000_003, "scratch-budget": 3_000_017}


def run_control(
    cell: Cell, key: str, store: Store, progress: Progress, where: dict[str, Any]
) -> Record:
    """The record of a control cell."""
    if cell.technique == "base":
        return _base(cell, key, obtain_base(cell, progress=progress), where)
    if cell.technique == "uniform-width":
        return _uniform(cell, key, progress, where)
    if cell.technique == "l1-budget":
        return _l1_budget(cell, key, store, progress, where)
    return _scratch(cell, key, store, progress, where)


def _base(cell: Cell, key: str, base: Base, where: dict[str, Any]) -> Record:
    cost = base.cost.original
    widths = {n: g.channels for n, g in base.groups.items()}
    return Record(
        key=key,
        cell=cell,
        status="done",
        rows=(score(base.model, base.data, "base"),),
        access="training",
        macs=cost.macs,
        params=cost.params,
        base_macs=cost.macs,
        base_params=cost.params,
        kept=1.0,
        widths=widths,
        base_widths=widths,
        spent={"base": base.spent},
        provenance={**where, **base.provenance},
    )


def fresh_at(cell: Cell, widths: dict[str, int], seed: int) -> tuple[nn.Module, Groups, CostModel]:
    """The cell's network at the given widths with newly drawn weights, its full-width groups, and
    their cost.
    """
    model, x = fresh_model(cell, seed), example_input(cell)
    groups = find_groups(model, x)
    cost = CostModel(model, groups, x)
    plan = {
        n: keep(first_channels(groups[n].channels, groups[n].blocks, w)) for n, w in widths.items()
    }
    model = resize(
        model, groups, {n: r for n, r in plan.items() if len(r.rows) != groups[n].channels}
    )
    models.reinitialise(model, seed)
    return model, groups, cost


def first_channels(channels: int, blocks: int, width: int) -> torch.Tensor:
    """The first channels of each block; repeats where the width is larger than there are.
    ``[width]``.
    """
    size, new = channels // blocks, width // blocks
    inside = torch.arange(new) % size
    return (torch.arange(blocks)[:, None] * size + inside.sort().values).flatten()


def _uniform(cell: Cell, key: str, progress: Progress, where: dict[str, Any]) -> Record:
    """The base network scaled uniformly to the budget and trained by the base's own recipe."""
    model, x = fresh_model(cell, cell.seed), example_input(cell)
    everything = find_groups(model, x)
    groups = everything.select(cell.scope, cell.include or None)
    cost = CostModel(model, everything, x)
    budget = budget_of(cell, groups, cost)
    try:
        widths = uniform_widths(groups, budget, cost, cost.original)
    except InfeasibleBudgetError as error:
        raise NotApplicableError(str(error)) from error
    return _train(cell, key, widths, groups, cell.base, progress, where, None)


def _scratch(
    cell: Cell, key: str, store: Store, progress: Progress, where: dict[str, Any]
) -> Record:
    """The shape that a technique found, trained from fresh weights: for as many epochs, or for as
    many MACs, as it took.
    """
    source = _source(cell, store, progress)
    spent = [source.spent[phase] for phase in ("base", "decision", "adaptation")]
    if not cell.trains_base:  # what its training cost is unknown: the suite's base recipe stands in
        passes = (source.base_macs or 0) * round(cell.base.epochs * len(load_data(cell).train))
        spent[0] = Spent(epochs=cell.base.epochs, forward_macs=passes, backward_macs=2 * passes)
    epochs = sum(s.epochs for s in spent)
    if cell.technique == "scratch-budget":
        total = sum(s.forward_macs + s.backward_macs for s in spent)
        if source.macs is None:
            raise UsageError(f"record {source.key} has no MACs")
        epochs = min(
            total / (3 * source.macs * len(load_data(cell).train)),
            (cell.longest or math.inf) * epochs,
        )
    recipe = cell.base.model_copy(update={"epochs": epochs})
    model = fresh_model(cell, cell.seed)
    groups = find_groups(model, example_input(cell)).select(cell.scope, cell.include or None)
    return _train(cell, key, source.widths, groups, recipe, progress, where, source.key)


def _source(cell: Cell, store: Store, progress: Progress) -> Record:
    """The finished record of the technique that a control is about."""
    source = run_cell(source_of(cell), store, progress=progress)
    if source.status == "failed":  # the next run tries it again, and with it this control
        raise UsageError(f"its source {source.cell.id} failed: {source.reason}")
    if source.status != "done":
        raise NotApplicableError(f"its source {source.cell.id} is {source.status}: {source.reason}")
    return source


def _l1_budget(
    cell: Cell, key: str, store: Store, progress: Progress, where: dict[str, Any]
) -> Record:
    """The base pruned by L1 norm to the same budget, fine-tuned until all of it has cost what the
    source has.

    Where the suite's base and fine-tuning together cost more than that (the source never trained
    the whole network), the base is trained for a shorter time, too: by the same share as the
    fine-tuning.
    """
    source, base = _source(cell, store, progress), obtain_base(cell, progress=progress)
    technique = registry.create("l1-norm", {})
    total = sum(s.forward_macs + s.backward_macs for s in source.spent.values())

    def pruned(base: Base) -> tuple[Task, Result, nn.Module, int]:
        task = task_of(cell, base, technique, progress=progress)
        try:
            outcome = technique.apply(task)
        except InfeasibleBudgetError as error:
            raise NotApplicableError(str(error)) from error
        model = outcome.resized
        return task, outcome, model, count_macs(model, base.example_input)

    task, outcome, model, macs = pruned(base)
    usual = (
        3
        * len(base.data.train)
        * (base.cost.original.macs * cell.base.epochs + macs * cell.finetune.epochs)
    )
    if cell.trains_base and not source.spent["base"].forward_macs and total < usual:
        shorter = cell.base.model_copy(update={"epochs": cell.base.epochs * total / usual})
        base = obtain_base(cell.model_copy(update={"base": shorter}), progress=progress)
        task, outcome, model, macs = pruned(base)
    left = (
        total
        - base.spent.forward_macs
        - base.spent.backward_macs
        - macs * cell.calibration * bool(batch_norms(model))
    )
    most = (cell.longest or math.inf) * sum(
        s.epochs for s in source.spent.values()
    ) - base.spent.epochs
    epochs = max(0.0, min(left / (3 * macs * len(base.data.train)), most))
    tuned = cell.model_copy(
        update={"finetune": cell.finetune.model_copy(update={"epochs": epochs})}
    )
    rows, adaptation, cost = adapt(model, tuned, base, progress, key)
    full = base.cost.original
    return Record(
        key=key,
        cell=cell,
        status="done",
        rows=rows,
        access="training",
        macs=cost.macs,
        params=cost.params,
        base_macs=full.macs,
        base_params=full.params,
        kept=outcome.kept,
        met=outcome.met,
        floor=task.budget != Budget.parse(str(cell.budget), grows=True),
        coupled=any(task.groups[n].grade == "coupled" for n in outcome.plan),
        widths=outcome.widths,
        base_widths={n: g.channels for n, g in task.groups.items()},
        spent={"base": base.spent, "decision": Spent(), "adaptation": adaptation},
        source=source.key,
        provenance={**where, **base.provenance},
    )


def source_of(cell: Cell) -> Cell:
    """The technique's cell whose shape a scratch control trains."""
    return cell.model_copy(update={"technique": cell.of, "of": None})


def _train(
    cell: Cell,
    key: str,
    widths: dict[str, int],
    groups: Groups,
    recipe: Recipe,
    progress: Progress,
    where: dict[str, Any],
    source: str | None,
) -> Record:
    model, _, model_cost = fresh_at(cell, widths, cell.seed + FRESH[cell.technique])
    cost, full = model_cost.counted(model, widths), model_cost.original
    budget = budget_of(cell, groups, model_cost)
    split = load_data(cell)
    spent = train(model, cell, recipe, key, macs=cost.macs, progress=progress, desc=cell.id)
    kept = used(budget, widths, groups, cost, full)
    return Record(
        key=key,
        cell=cell,
        status="done",
        rows=(score(model, split, "trained"),),
        access="training",
        macs=cost.macs,
        params=cost.params,
        base_macs=full.macs,
        base_params=full.params,
        kept=kept,
        met=check(budget, kept, groups),
        floor=budget != Budget.parse(str(cell.budget), grows=True),
        coupled=any(groups[n].grade == "coupled" for n in widths if n in groups),
        widths=widths,
        base_widths={n: g.channels for n, g in groups.items()},
        spent={"base": Spent(), "decision": Spent(), "adaptation": spent},
        source=source,
        provenance={**where, "val_seen": False},
    )
