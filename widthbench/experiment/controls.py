"""Controls: rows that ask what the training alone would have given. Protocol rows, not
techniques.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from widthbench.errors import InfeasibleBudgetError, UsageError
from widthbench.experiment.adaptation import (
    NotApplicableError,
    adapt,
    budget_of,
    decided,
    score,
    task_of,
    train,
)
from widthbench.experiment.bases import Base, example_input, fresh_model, load_data, obtain_base
from widthbench.experiment.cell import CONTROLS, Cell
from widthbench.experiment.keys import source_of, technique_of
from widthbench.experiment.records import Record, Row
from widthbench.networks import models
from widthbench.progress import Progress
from widthbench.recipe import Recipe, Spent
from widthbench.technique import registry
from widthbench.technique.base import Result
from widthbench.technique.budget import Budget, check, uniform_widths, used
from widthbench.technique.task import Task
from widthbench.training.recalibration import batch_norms
from widthbench.width.certify import find_groups
from widthbench.width.cost import Cost, CostModel, count_macs
from widthbench.width.groups import Groups
from widthbench.width.resize import keep, resize

RUNNERS: dict[str, Control] = {}


@dataclass(frozen=True)
class Call:
    """What a control is given.

    Attributes:
        cell: Its cell.
        key: Of its record.
        obtain: Gives the record of another cell, computed where there is none.
        progress: Progress bar.
        where: What its record says of the machine.
    """

    cell: Cell
    key: str
    obtain: Callable[[Cell], Record]
    progress: Progress
    where: dict[str, Any]

    def record(self, full: Cost, cost: Cost, rows: tuple[Row, ...], **more: Any) -> Record:
        """A finished record.

        Args:
            full: The base network's cost.
            cost: That of the network that the rows are of.
            rows: Its scores.
            **more: Further fields.
        """
        return Record(
            key=self.key,
            cell=self.cell,
            status="done",
            rows=rows,
            macs=cost.macs,
            params=cost.params,
            base_macs=full.macs,
            base_params=full.params,
            trials=self.cell.trials,
            **{"access": "training", **more},
        )

    def source(self) -> Record:
        """The finished record of the technique that the control is about: the published one where
        the suite starts from what is published, whatever machine it is of.
        """
        if (known := source_of(self.cell)) is not None:
            return known
        source = self.obtain(technique_of(self.cell))
        if source.status == "failed":  # the next run tries it again, and with it this control
            raise UsageError(f"its source {source.cell.id} failed: {source.reason}")
        if source.status != "done":
            raise NotApplicableError(
                f"its source {source.cell.id} is {source.status}: {source.reason}"
            )
        return source


class Control(ABC):
    """A row that is no technique. A subclass says which by ``name=``, and is then one of
    ``RUNNERS``.

    Attributes:
        fresh: Keeps the seeds of its fresh weights apart from the base network's and from other
            controls'; from its name if a class says none.
    """

    fresh: ClassVar[int]

    def __init_subclass__(cls, *, name: str) -> None:
        """Take it among the controls.

        Raises:
            TypeError: If the name stands for none.
        """
        if name not in CONTROLS:
            raise TypeError(f"control '{name}' has no entry in CONTROLS of experiment/cell.py")
        if "fresh" not in vars(cls):
            cls.fresh = zlib.crc32(name.encode())
        RUNNERS[name] = cls()

    @abstractmethod
    def run(self, call: Call) -> Record:
        """Its record."""

    def trained(
        self, call: Call, widths: dict[str, int], groups: Groups, recipe: Recipe, source: str | None
    ) -> Record:
        """The record of a network at some widths that is trained from fresh weights."""
        cell = call.cell
        model, _, model_cost = fresh_at(cell, widths, cell.seed + self.fresh)
        cost, full = model_cost.counted(model, widths), model_cost.original
        budget = budget_of(cell, groups, model_cost)
        split = load_data(cell)
        spent = train(
            model, cell, recipe, call.key, macs=cost.macs, progress=call.progress, desc=cell.id
        )
        kept = used(budget, widths, groups, cost, full)
        return call.record(
            full,
            cost,
            (score(model, split, "trained"),),
            kept=kept,
            met=check(budget, kept, groups),
            floor=budget != Budget.parse(str(cell.budget), grows=True),
            coupled=any(groups[n].grade == "coupled" for n in widths if n in groups),
            widths=widths,
            base_widths={n: g.channels for n, g in groups.items()},
            spent={"base": Spent(), "decision": Spent(), "adaptation": spent},
            source=source,
            provenance={**call.where, "val_seen": False},
        )


class Whole(Control, name="base"):
    """The base network as it is."""

    def run(self, call: Call) -> Record:
        """Its scores."""
        base = obtain_base(call.cell, progress=call.progress)
        cost, widths = base.cost.original, {n: g.channels for n, g in base.groups.items()}
        return call.record(
            cost,
            cost,
            (score(base.model, base.data, "base", each=base.loaded),),
            kept=1.0,
            widths=widths,
            base_widths=widths,
            spent={"base": base.spent},
            provenance={**call.where, **base.provenance},
        )


class UniformWidth(Control, name="uniform-width"):
    """The base network scaled uniformly to the budget and trained by the base's own recipe."""

    fresh = 1_000_003

    def run(self, call: Call) -> Record:
        """Scale and train."""
        cell = call.cell
        model, x = fresh_model(cell, cell.seed), example_input(cell)
        everything = find_groups(model, x)
        groups = everything.select(cell.scope, cell.include or None)
        cost = CostModel(model, everything, x)
        budget = budget_of(cell, groups, cost)
        try:
            widths = self.widths(cell, groups, budget, cost)
        except InfeasibleBudgetError as error:
            raise NotApplicableError(str(error)) from error
        return self.trained(call, widths, groups, cell.base, None)

    def widths(self, cell: Cell, groups: Groups, budget: Budget, cost: CostModel) -> dict[str, int]:
        """Channels per group."""
        return uniform_widths(groups, budget, cost, cost.original)


class Scratch(Control, name="scratch"):
    """The shape that a technique found, trained from fresh weights for the epochs that it took."""

    fresh = 2_000_003

    def run(self, call: Call) -> Record:
        """Obtain the shape and train."""
        cell, source = call.cell, call.source()
        spent = [source.spent[phase] for phase in ("base", "decision", "adaptation")]
        if not cell.trains_base:  # what that cost is unknown: the suite's base recipe stands in
            passes = (source.base_macs or 0) * round(cell.base.epochs * len(load_data(cell).train))
            spent[0] = Spent(epochs=cell.base.epochs, forward_macs=passes, backward_macs=2 * passes)
        recipe = cell.base.model_copy(update={"epochs": self.epochs(cell, source, spent)})
        model = fresh_model(cell, cell.seed)
        groups = find_groups(model, example_input(cell)).select(cell.scope, cell.include or None)
        return self.trained(call, source.widths, groups, recipe, source.key)

    def epochs(self, cell: Cell, source: Record, spent: Sequence[Spent]) -> float:
        """How long to train."""
        return sum(s.epochs for s in spent)


class ScratchBudget(Scratch, name="scratch-budget"):
    """The same for as many MACs as the technique took."""

    fresh = 3_000_017

    def epochs(self, cell: Cell, source: Record, spent: Sequence[Spent]) -> float:
        """How long to train, at most a multiple of the technique's epochs."""
        total = sum(s.forward_macs + s.backward_macs for s in spent)
        if source.macs is None:
            raise UsageError(f"record {source.key} has no MACs")
        return min(
            total / (3 * source.macs * len(load_data(cell).train)),
            (cell.longest or math.inf) * super().epochs(cell, source, spent),
        )


class L1Budget(Control, name="l1-budget"):
    """The base pruned by L1 norm to the same budget, fine-tuned until all of it has cost what the
    source has.

    Where the suite's base and fine-tuning together cost more than that (the source never trained
    the whole network), the base is trained for a shorter time, too: by the same share as the
    fine-tuning.
    """

    def run(self, call: Call) -> Record:
        """Prune and fine-tune."""
        cell, source = call.cell, call.source()
        base = obtain_base(cell, progress=call.progress)
        total = sum(s.forward_macs + s.backward_macs for s in source.spent.values())
        task, outcome, macs = self._pruned(call, base)
        usual = (
            3
            * len(base.data.train)
            * (base.cost.original.macs * cell.base.epochs + macs * cell.finetune.epochs)
        )
        if cell.trains_base and not source.spent["base"].forward_macs and total < usual:
            shorter = cell.base.model_copy(update={"epochs": cell.base.epochs * total / usual})
            base = obtain_base(cell.model_copy(update={"base": shorter}), progress=call.progress)
            task, outcome, macs = self._pruned(call, base)
        calibration = macs * cell.calibration * bool(batch_norms(outcome.resized))
        left = total - base.spent.forward_macs - base.spent.backward_macs - calibration
        epochs = sum(s.epochs for s in source.spent.values())
        most = (cell.longest or math.inf) * epochs - base.spent.epochs
        epochs = max(0.0, min(left / (3 * macs * len(base.data.train)), most))
        finetune = cell.finetune.model_copy(update={"epochs": epochs})
        tuned = cell.model_copy(update={"finetune": finetune})
        rows, adaptation, cost = adapt(outcome.resized, tuned, base, call.progress, call.key)
        return call.record(
            base.cost.original,
            cost,
            rows,
            spent={"base": base.spent, "decision": Spent(), "adaptation": adaptation},
            source=source.key,
            provenance={**call.where, **base.provenance},
            **decided(cell, task, outcome),
        )

    def _pruned(self, call: Call, base: Base) -> tuple[Task, Result, int]:
        technique = registry.create("l1-norm", {})
        task = task_of(call.cell, base, technique, progress=call.progress)
        try:
            outcome = technique.apply(task)
        except InfeasibleBudgetError as error:
            raise NotApplicableError(str(error)) from error
        return task, outcome, count_macs(outcome.resized, base.example_input)


if missing := CONTROLS.keys() - RUNNERS.keys():
    raise ImportError(f"experiment/controls.py has no class for {', '.join(sorted(missing))}")


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
