"""What a technique is: a class that decides. Cutting, checking, measuring and data are the
harness's work.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, dataclass_transform, final

import torch
from pydantic import Field, ValidationError, validate_call
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widthbench.errors import UsageError, did_you_mean, first_problem
from widthbench.technique.budget import Allocation, check, used
from widthbench.technique.task import Access, State, Task
from widthbench.width.assembly import shapes_of
from widthbench.width.cost import Cost
from widthbench.width.inputs import Example, Inputs
from widthbench.width.resize import Plan, Resize, disagreements, resize


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
    """

    plan: Plan
    model: nn.Module | None = None
    path: Sequence[Plan] = ()
    series: Mapping[str, list[Any]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Result(Outcome):
    """What a technique decided, and what the harness made of it.

    Attributes:
        resized: The resized network.
        widths: Its channels per group.
        kept: Fraction of the reference that is kept, in the budget's own terms.
        met: False if a good part of the budget is left unused.
    """

    resized: nn.Module
    widths: dict[str, int]
    kept: float
    met: bool


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
class Technique(ABC):
    """Base of all techniques.

    A subclass sets ``id`` and ``access`` and writes ``decide``. Its parameters are annotated
    attributes, ``samples: Count = 256``; they are given by keyword, and pydantic refuses what their
    types do not allow. A check of several together goes into ``__post_init__``. (An ``__init__``
    with keyword-only parameters that stores them under their own names works, too.)

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

    def __init_subclass__(cls) -> None:
        """Make a dataclass of a class that has no ``__init__`` of its own or of a base's."""
        super().__init_subclass__()
        maker = next(c for c in cls.__mro__ if "__init__" in vars(c))
        if maker is cls:  # not the signature that a base may have left
            own = inspect.signature(cls.__init__)
            parameters = list(own.parameters.values())[1:]
            cls.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        elif maker is object or "__pydantic_validator__" in vars(maker):
            pydantic_dataclass(kw_only=True, repr=False, eq=False)(cls)
            _name_what_is_refused(cls)

    def skip(self, task: Task) -> str | None:
        """Why this technique cannot work on this task; None if it can."""
        return None

    def prepare(self, task: Task) -> State:
        """Everything that does not depend on the budget; computed once per base network, parameters
        and seed.

        ``task.budget`` and what follows from it (``task.widths``, ``task.keep_best``) raise here.
        """
        return {}

    @abstractmethod
    def decide(self, task: Task, state: State) -> Outcome:
        """Take the decision.

        Args:
            task: The network, its groups, data and budget.
            state: What ``prepare`` returned.

        Returns:
            The plan, and whatever else there is to tell.
        """

    @final
    def prepared(self, task: Task) -> State:
        """What ``prepare`` returns for a task of which it sees neither the budget nor data beyond
        the declared access.
        """
        return self.prepare(task.with_access(self.id, self.access).without_budget(self.id))

    @final
    def apply(self, task: Task, state: State | None = None) -> Result:
        """Prepare, decide, resize, and check shapes and budget.

        Args:
            task: The task; data beyond the declared access are withheld here.
            state: What ``prepare`` returned before for the same base, if it did.

        Returns:
            What was decided, the resized network, and how it keeps to the budget.

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
        met = check(task.budget, kept, task.groups)
        decided = {f.name: getattr(outcome, f.name) for f in fields(Outcome)}
        return Result(**decided, resized=resized, widths=widths, kept=kept, met=met)

    def _check(
        self, task: Task, outcome: Outcome, resized: nn.Module
    ) -> tuple[dict[str, int], Cost]:
        """Shapes, finite outputs, and the widths and cost of what came out."""
        if bad := disagreements(resized):
            raise UsageError(
                f"technique '{self.id}' left declared and real shapes in disagreement: {bad[0]}"
            )
        if outcome.model is not None and not outcome.plan:
            regrouped = task.regroup(resized)  # of one head alone nothing is found
            # as in a plan, channels per head count for all heads, those that are gone too
            full = {
                n: regrouped[n].channels * g.blocks // regrouped[n].blocks
                for n, g in task.groups.items()
                if n in regrouped
            }
            widths = {
                n: full.get(n, 1) for n, g in task.groups.items() if n in regrouped or g.heads
            }
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
    _require_known(cls, params)
    if "__pydantic_validator__" in vars(cls):
        return cls(**params)
    made = cls.__new__(cls)
    try:
        validate_call(cls.__init__)(made, **params)
    except ValidationError as error:
        raise _refused(cls, error, params) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"technique '{cls.id}': {error}") from error
    return made


def _require_known(cls: type[Technique], params: Mapping[str, Any]) -> None:
    known = inspect.signature(cls).parameters
    for name in params:
        if name not in known:
            raise UsageError(
                f"technique '{cls.id}' takes no parameter '{name}'{did_you_mean(name, known)}"
            )


def _refused(cls: type[Technique], error: ValidationError, params: Mapping[str, Any]) -> UsageError:
    name, problem = first_problem(error)
    what = f"parameter '{name}': {problem} (found {params[name]!r})" if name else problem
    return UsageError(f"technique '{cls.id}': {what}")


def _name_what_is_refused(cls: type[Technique]) -> None:
    """Have a dataclass's ``__init__`` say in one line what it refuses."""
    checked: Any = cls.__init__

    @functools.wraps(checked)
    def made(self: Technique, **params: Any) -> None:
        _require_known(cls, params)
        try:
            checked(self, **params)
        except ValidationError as error:
            raise _refused(cls, error, params) from error

    cls.__init__ = made  # type: ignore[method-assign, assignment]


class ScoredTechnique(Technique):
    """Base of techniques that score channels and keep the best: a subclass writes ``score``.

    Args:
        allocation: "uniform" keeps the same fraction of every group; "global" ranks the channels of
            all groups together.

    Attributes:
        comparable: Whether scores of different groups compare as they are; if not, "global" divides
            each group's by their mean.
    """

    allocation: Allocation = "uniform"
    comparable: ClassVar[bool] = False

    @abstractmethod
    def score(self, task: Task) -> Mapping[str, Tensor]:
        """Scores ``[N]`` per group, higher is kept."""

    def prepare(self, task: Task) -> State:
        """The scores."""
        return dict(self.score(task))

    def chosen(self, task: Task, scores: Mapping[str, Tensor]) -> dict[str, Resize]:
        """The plan that keeps the best within the budget."""
        if self.allocation == "global" and not self.comparable:
            scores = {name: s / s.mean().clamp_min(1e-30) for name, s in scores.items()}
        return task.keep_best(scores, self.allocation)

    def decide(self, task: Task, state: State) -> Outcome:
        """Keep the best within the budget."""
        return Outcome(self.chosen(task, state))


def runs(model: nn.Module, inputs: Example, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether a network gives finite outputs of the given shapes on an example of what it takes."""
    with torch.no_grad():
        output = Inputs.of(inputs).run(model)
    return shapes_of(output) == shapes and all(
        bool(torch.isfinite(t).all()) for t in tree_leaves(output) if isinstance(t, Tensor)
    )
