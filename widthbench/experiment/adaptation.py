"""What is the same for every technique and control: the task, the scores, the adaptation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from widthbench.data import splits
from widthbench.errors import DivergedError, UsageError
from widthbench.experiment.bases import (
    Base,
    fresh_model,
    load_data,
    training_path,
)
from widthbench.experiment.cell import Cell
from widthbench.experiment.keys import device_of
from widthbench.experiment.records import Row, Stage, packed
from widthbench.progress import Progress, quiet
from widthbench.recipe import Recipe, Spent
from widthbench.technique.base import Outcome, Result, Technique
from widthbench.technique.budget import Budget, feasible
from widthbench.technique.task import Nothing, Task
from widthbench.training.loop import fit
from widthbench.training.measuring import accuracy
from widthbench.training.recalibration import batch_norms, recalibrate
from widthbench.training.resume import Resume
from widthbench.width.certify import find_groups
from widthbench.width.cost import Cost, CostModel, count_macs
from widthbench.width.groups import Groups
from widthbench.width.resize import resize


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


def score(model: nn.Module, split: splits.Data, stage: Stage, *, each: bool = False) -> Row:
    """Test and val scores of a network; with ``each``, also which test samples are right."""
    size = batch_of(model, split)
    test = accuracy(model, split.test, batch_size=size)
    val = accuracy(model, split.val, batch_size=size) if len(split.val) else None
    for part, result in (("test", test), ("val", val)):
        if result is not None and not math.isfinite(result.loss):
            raise DivergedError(
                f"the network's outputs on {part} data are not finite (stage '{stage}': loss"
                f" {result.loss})"
            )
    return Row(
        stage=stage,
        top1=test.top1,
        top5=test.top5,
        loss=test.loss,
        samples=test.samples,
        val_top1=val.top1 if val else None,
        val_loss=val.loss if val else None,
        right=packed(test.hits.tolist()) if each and test.hits is not None else "",
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


STOP = 0.25  # points of val accuracy that a path may lose at its stopping point


def decided(cell: Cell, task: Task, outcome: Result) -> dict[str, Any]:
    """What a record says of a decision."""
    return {
        "kept": outcome.kept,
        "met": outcome.met,
        "floor": task.budget != Budget.parse(str(cell.budget), grows=True),
        "coupled": any(task.groups[n].grade == "coupled" for n in outcome.plan),
        "widths": outcome.widths,
        "base_widths": {n: g.channels for n, g in task.groups.items()},
    }


def replay(task: Task, outcome: Outcome, base: Base) -> dict[str, list[Any]]:
    """Test and val scores along the technique's path of plans, taken after the decision is made; {}
    if there is no path.

    Where a path shrinks, its stopping point, too: the last one whose val accuracy is at most
    ``STOP`` points below the first one's.
    """
    model = task.model if outcome.model is None else outcome.model
    series: dict[str, list[Any]] = {}
    for plan in outcome.path:
        row = score(resize(model, task.groups, plan), base.data, "resized")
        point = {
            "channels": sum(len(r.rows) for r in plan.values()),
            **row.model_dump(exclude={"stage", "samples", "top5"}),
        }
        for name, value in point.items():
            series.setdefault(f"path.{name}", []).append(value)
    return series | stopping_point(series)


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
    series = {
        f"stop.{name}": [path[f"path.{name}"][last]] for name in ("channels", "top1", "val_top1")
    }
    return series | {"stop.removed": [100 * (channels[0] - channels[last]) / channels[0]]}


def adapt(
    model: nn.Module, cell: Cell, base: Base, progress: Progress, key: str
) -> tuple[tuple[Row, ...], Spent, Cost]:
    """Score a resized network as it is, after batch-norm recalibration, and after fine-tuning where
    there is any; in place.

    Returns:
        The rows, what the adaptation cost, and the network's cost.
    """
    cost = cost_of(model, base)
    # one public checkpoint has no spread over bases: orders on it are judged over its test images
    each = base.loaded
    rows = [score(model, base.data, "resized", each=each)]
    spent = recalibrate(
        model, base.data.train, samples=cell.calibration, macs=cost.macs, seed=cell.seed
    )
    recalibrated = bool(batch_norms(model))
    again = score(model, base.data, "recalibrated", each=each) if recalibrated else rows[0]
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
    rows.append(score(model, base.data, "fine-tuned", each=each))
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
