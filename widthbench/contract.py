"""What every technique must do, as one call: for the tests of this project and of anybody's
plug-in.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from widthbench.errors import AccessError
from widthbench.experiment.adaptation import task_of
from widthbench.experiment.bases import obtain_base
from widthbench.experiment.cell import Cell
from widthbench.recipe import Recipe
from widthbench.technique.base import Result, Technique, build
from widthbench.technique.budget import Budget, check
from widthbench.technique.budget import used as used_of
from widthbench.technique.task import State
from widthbench.width.cost import Cost, count_macs

NETWORKS = (
    {"model": "lenet_300_100", "size": 16},
    {"model": "lenet5", "size": 20},
    {"model": "test_resnet", "size": 32},
)
BUDGETS = ("channels:0.5", "macs:0.5", "params:0.5")


class ContractError(AssertionError):
    """A technique that breaks a rule that all techniques keep; it names the technique and the
    rule.
    """


def check_technique(cls: type[Technique], **params: Any) -> int:
    """Hold a technique to the contract.

    The class: an id, a data access, a docstring, keyword-only parameters stored under their own
    names. On an MLP, a LeNet and a ResNet, briefly trained, at budgets of channels, MACs and
    parameters: the budget is met, the network that came in is left as it was, the network that
    comes out runs forward and backward with the same output shape, the same seed gives the same
    decision, and ``prepare`` does not depend on the budget.

    Args:
        cls: The technique.
        **params: Its parameters, where the defaults are not meant.

    Returns:
        The number of decisions that were checked; networks that the technique skips are not among
        them.

    Raises:
        ContractError: At the first rule that is broken.
    """
    _check_class(cls)
    checked = 0
    for network in NETWORKS:
        for budget in BUDGETS:
            checked += _check_decision(build(cls, params), network, budget)
    _demand(
        checked > 0, cls, "runs on at least one of " + ", ".join(str(n["model"]) for n in NETWORKS)
    )
    return checked


def _demand(holds: bool, technique: type[Technique] | Technique, rule: str) -> None:
    if not holds:
        raise ContractError(f"technique '{technique.id}' breaks the contract: {rule}")


def _check_class(cls: type[Technique]) -> None:
    _demand(
        bool(inspect.getdoc(cls)),
        cls,
        "the class has a docstring, whose first line says what it does",
    )
    kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
    _demand(kinds <= {inspect.Parameter.KEYWORD_ONLY}, cls, "its parameters are keyword-only")
    made = cls()
    for name, parameter in inspect.signature(cls).parameters.items():
        _demand(hasattr(made, name), cls, f"__init__ stores its parameter '{name}' under that name")
        _demand(
            getattr(made, name) == parameter.default,
            cls,
            f"__init__ stores '{name}' as it was given",
        )
    _demand(cls.apply is Technique.apply, cls, "apply() is the harness's and is not overridden")


def _cell(technique: Technique, network: dict[str, Any], budget: str) -> Cell:
    brief = Recipe(epochs=1, batch_size=64, lr=0.02)
    return Cell(
        dataset="digits",
        technique=technique.id,
        params=technique.params(),
        budget=budget,
        base=brief,
        finetune=brief,
        **network,
    )


def _check_decision(technique: Technique, network: dict[str, Any], budget: str) -> int:
    cell = _cell(technique, network, budget)
    base = obtain_base(cell)
    task = task_of(cell, base, technique)
    reason = technique.skip(task)
    if reason is not None:
        _demand(
            isinstance(reason, str) and bool(reason), technique, "skip() gives None or a reason"
        )
        return 0
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    where = f"on {network['model']} at {budget}"

    other = replace(task, budget=Budget(task.budget.kind, 0.9 * task.budget.fraction))
    try:
        states = [technique.prepared(t) for t in (task, other)]
    except AccessError as error:
        raise ContractError(f"technique '{technique.id}' breaks the contract: {error}") from error
    _demand(_alike(*states), technique, f"prepare() does not depend on the budget {where}")
    first, again = technique.apply(task), build(type(technique), technique.params()).apply(task)
    after = task.model.state_dict()
    _demand(
        list(before) == list(after), technique, f"leaves task.model's layers as they were {where}"
    )
    _demand(
        all(torch.equal(before[k], after[k]) for k in before),
        technique,
        f"leaves task.model's tensors as they were {where}",
    )
    _demand(not task.model.training, technique, f"leaves task.model in eval mode {where}")
    _demand(_same(first, again), technique, f"decides the same with the same seed {where}")

    try:
        json.dumps({k: list(v) for k, v in first.series.items()})
    except TypeError as error:
        raise ContractError(
            f"technique '{technique.id}' breaks the contract: its series are plain numbers: {error}"
        ) from error
    resized = first.resized
    x = base.example_input
    with torch.no_grad():
        _demand(
            resized(x).shape == task.model(x).shape, technique, f"keeps the output's shape {where}"
        )
    parsed = Budget.parse(budget, grows=technique.grows)
    real = Cost(count_macs(resized, x), sum(p.numel() for p in resized.parameters()))
    kept = used_of(parsed, first.widths, task.groups, real, task.reference)
    check(parsed, kept, task.groups)  # raises if the budget is exceeded
    _backward(resized, base.data.train.batches(16))
    return 1


def _alike(a: State, b: State) -> bool:
    """Whether two states hold the same tensors and plain data."""
    (ours, shape), (theirs, other) = tree_flatten(a), tree_flatten(b)
    return shape == other and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(ours, theirs, strict=True)
    )


def _same(a: Result, b: Result) -> bool:
    if a.widths != b.widths or set(a.plan) != set(b.plan) or a.resized is None or b.resized is None:
        return False
    one, two = a.resized.state_dict(), b.resized.state_dict()
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


def _backward(model: nn.Module, batches: Any) -> None:
    x, y = next(iter(batches))
    model.train()
    loss: Tensor = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    if not all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None):
        raise ContractError("gradients of the resized network are not finite")
