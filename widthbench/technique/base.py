"""What a technique is: a class that decides. Cutting, checking, measuring and data are the
harness's work.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widthbench.errors import UsageError, did_you_mean
from widthbench.technique.budget import check, used
from widthbench.technique.task import Access, Task
from widthbench.width.cost import Cost
from widthbench.width.groups import shapes_of
from widthbench.width.resize import Plan, disagreements, resize


@dataclass
class Outcome:
    """What a technique decided.

    Attributes:
        plan: One resize per group; groups that it does not name keep their width.
        model: The network that the plan applies to, where the technique trained or grew one; None
            means ``task.model``.
        path: Intermediate plans, in order; where a suite wants curves, the harness replays them on
            the test set afterwards.
        series: Anything to plot, by name.
        resized: The resized network. Filled in by ``Technique.apply``.
        widths: Channels per group of the resized network. Filled in by ``Technique.apply``.
        kept: Fraction of the reference that is kept, in the budget's own terms. Filled in by
            ``Technique.apply``.
        met: False if a good part of the budget is left unused. Filled in by ``Technique.apply``.
    """

    plan: Plan
    model: nn.Module | None = None
    path: Sequence[Plan] = ()
    series: Mapping[str, list[Any]] = field(default_factory=dict)
    resized: nn.Module | None = None
    widths: dict[str, int] = field(default_factory=dict)
    kept: float = 0.0
    met: bool = True


class Technique(ABC):
    """Base of all techniques.

    A subclass sets ``id`` and ``access`` and writes ``decide``; its ``__init__`` takes keyword-only
    parameters and only stores them, under their own names.

    Attributes:
        id: Name in the registry, in suites and on leaderboards.
        access: The most that the decision looks at: "none", "unlabelled" (inputs), "labelled"
            (losses and gradients) or "training" (weights are updated). Leaderboards group by it,
            and the harness withholds the rest.
        start: "trained": ``task.model`` is the trained base; "fresh": newly initialised. May be a
            parameter.
        grows: Whether budgets above 1 make sense.
        bibtex: The paper, as one BibTeX entry; "" if there is none.
    """

    id: ClassVar[str]
    access: ClassVar[Access]
    start: Literal["trained", "fresh"] = "trained"
    grows: ClassVar[bool] = False
    bibtex: ClassVar[str] = ""

    def skip(self, task: Task) -> str | None:
        """Why this technique cannot work on this task; None if it can."""
        return None

    def prepare(self, task: Task) -> dict[str, Tensor]:
        """Everything that does not depend on the budget; computed once per base network, parameters
        and seed.

        ``task.budget`` and what follows from it (``task.widths``, ``task.keep_best``) raise here.
        """
        return {}

    @abstractmethod
    def decide(self, task: Task, state: dict[str, Tensor]) -> Outcome:
        """Take the decision.

        Args:
            task: The network, its groups, data and budget.
            state: What ``prepare`` returned.

        Returns:
            The plan, and whatever else there is to tell.
        """

    @final
    def prepared(self, task: Task) -> dict[str, Tensor]:
        """What ``prepare`` returns for a task of which it sees neither the budget nor data beyond
        the declared access.
        """
        return self.prepare(task.with_access(self.id, self.access).without_budget(self.id))

    @final
    def apply(self, task: Task, state: dict[str, Tensor] | None = None) -> Outcome:
        """Prepare, decide, resize, and check shapes and budget.

        Args:
            task: The task; data beyond the declared access are withheld here.
            state: What ``prepare`` returned before for the same base, if it did.

        Returns:
            The outcome with ``resized``, ``widths``, ``kept`` and ``met`` filled in.

        Raises:
            BudgetError: If the plan exceeds the budget, or no plan can meet it.
            CostError: If the resized network costs something else than was predicted.
            PlanError: If the plan does not fit the network.
            AccessError: If the technique touches data that it did not declare.
            UsageError: If the technique says that it cannot work on this task.
        """
        if reason := self.skip(task.with_access(self.id, self.access)):
            raise UsageError(f"technique '{self.id}' cannot run here: {reason}")
        state = self.prepared(task) if state is None else state
        task = task.with_access(self.id, self.access)
        outcome = self.decide(task, state)
        if not isinstance(outcome, Outcome):
            raise UsageError(
                f"technique '{self.id}' must return an Outcome from decide(), not"
                f" {type(outcome).__name__}"
            )
        base = task.model if outcome.model is None else outcome.model
        resized = resize(base, task.groups, outcome.plan) if outcome.plan else base
        widths, cost = self._check(task, outcome, resized)
        kept = used(task.budget, widths, task.groups, cost, task.reference)
        return replace(
            outcome,
            resized=resized,
            widths=widths,
            kept=kept,
            met=check(task.budget, kept, task.groups),
        )

    def _check(
        self, task: Task, outcome: Outcome, resized: nn.Module
    ) -> tuple[dict[str, int], Cost]:
        """Shapes, finite outputs, and the widths and cost of what came out."""
        if bad := disagreements(resized):
            raise UsageError(
                f"technique '{self.id}' left declared and real shapes in disagreement: {bad[0]}"
            )
        if outcome.model is not None and not outcome.plan and task.regroup is not None:
            found = task.regroup(resized)  # of one head alone nothing is found
            # as in a plan, channels per head count for all heads, those that are gone too
            full = {
                n: found[n].channels * g.blocks // found[n].blocks
                for n, g in task.groups.items()
                if n in found
            }
            widths = {n: full.get(n, 1) for n, g in task.groups.items() if n in found or g.heads}
        else:
            widths = {
                n: len(outcome.plan[n].rows) if n in outcome.plan else g.channels
                for n, g in task.groups.items()
            }
        return widths, task.unbilled(lambda: task.cost.counted(resized, widths))

    def params(self) -> dict[str, Any]:
        """The parameters that this instance was made with, by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.params().items())
        return f"{self.id}({inside})"


def build(cls: type[Technique], params: Mapping[str, Any]) -> Technique:
    """An instance with the given parameters.

    Raises:
        UsageError: If the technique does not take one of them, or refuses its value.
    """
    known = inspect.signature(cls).parameters
    for name in params:
        if name not in known:
            raise UsageError(
                f"technique '{cls.id}' takes no parameter '{name}'{did_you_mean(name, known)}"
            )
    hints = get_type_hints(cls.__init__)
    try:
        checked = {
            n: TypeAdapter(hints[n]).validate_python(v) if n in hints else v
            for n, v in params.items()
        }
        return cls(**checked)
    except ValidationError as error:
        name = next(n for n in params if n in hints and not _fits(hints[n], params[n]))
        first = error.errors()[0]["msg"]
        raise UsageError(
            f"technique '{cls.id}': parameter '{name}': {first} (found {params[name]!r})"
        ) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"technique '{cls.id}': {error}") from error


def _fits(hint: Any, value: Any) -> bool:
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError:
        return False
    return True


def runs(model: nn.Module, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether a network gives finite outputs of the given shapes on ``x [B, ...]``."""
    with torch.no_grad():
        output = model(x)
    return shapes_of(output) == shapes and all(
        bool(torch.isfinite(t).all()) for t in tree_leaves(output) if isinstance(t, Tensor)
    )
