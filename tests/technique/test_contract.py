"""The contract suite: every registered technique passes it, a third party's too."""

import pytest
import torch

from widthbench import contract
from widthbench.contract import ContractError, check_technique
from widthbench.technique import registry
from widthbench.technique.base import Outcome, Technique
from widthbench.width import keep

SMALL = {  # the contract asks for no more
    "neuron-removal": {"samples": 16},
    "autoprune": {"epochs": 0.1},
    "autoslim": {"epochs": 0.1, "steps": 2, "final_epochs": 0.1, "samples": 64, "calibration": 64},
    "nmf": {"iterations": 2},
    "torch-pruning:taylor": {"samples": 16},
    "torch-pruning:hessian": {"samples": 16},
    "splitting": {"epochs": 0.1, "narrow": 0.9, "rounds": 1, "samples": 16},
}
LONG = (
    "autoslim",
    "neuron-removal",
    "splitting",
)  # on the ResNet, which one budget shows as well as three


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in registry.names()],
)
def test_every_registered_technique_keeps_the_contract(name):
    assert check_technique(registry.load(name), **SMALL.get(name, {})) > 0


@pytest.mark.parametrize(
    ("networks", "budgets"),
    [(contract.NETWORKS[:2], contract.BUDGETS), (contract.NETWORKS[2:], ("channels:0.5",))],
    ids=["plain networks", "a residual network"],
)
@pytest.mark.parametrize("name", LONG)
def test_the_longest_keep_it_on_every_network_and_at_every_budget(
    name, networks, budgets, monkeypatch
):
    monkeypatch.setattr(contract, "NETWORKS", networks)
    monkeypatch.setattr(contract, "BUDGETS", budgets)
    assert check_technique(registry.load(name), **SMALL[name]) == len(networks) * len(budgets)


@pytest.mark.parametrize(
    "params",
    [
        {"ranking": "first_order", "rerank": "iterative", "step": 100},
        {"ranking": "second_order", "softplus_beta": 3.0, "allocation": "uniform"},
        {"ranking": "random"},
    ],
)
def test_the_other_rankings_of_neuron_removal_keep_it_too(params):
    assert check_technique(registry.load("neuron-removal"), samples=16, **params) == 9


@pytest.mark.parametrize("name", ["l1-norm", "random-channels"])
def test_global_allocation_keeps_it_too(name):
    assert check_technique(registry.load(name), allocation="global") == 9


class Honest(Technique):
    """Keeps the first channels."""

    id = "toy"
    access = "none"

    def decide(self, task, state):
        return Outcome({n: keep(list(range(w))) for n, w in task.widths().items()})


class Vandal(Honest):
    """Changes the network that it was given."""

    def decide(self, task, state):
        for p in task.model.parameters():
            p.data.add_(1)
        return super().decide(task, state)


class Moody(Honest):
    """Decides differently each time."""

    calls = 0

    def decide(self, task, state):
        Moody.calls += 1
        plan = {n: list(range(w)) for n, w in task.widths().items()}
        return Outcome(
            {n: keep(rows[::-1] if Moody.calls % 2 else rows) for n, rows in plan.items()}
        )


class Eager(Honest):
    """Prepares for one budget."""

    def prepare(self, task):
        return {"widths": torch.tensor(list(task.widths().values()))}


class Wordy(Honest):
    """Puts tensors into its series."""

    def decide(self, task, state):
        return Outcome(super().decide(task, state).plan, series={"loss": [torch.tensor(1.0)]})


class Positional(Honest):
    """Takes positional parameters."""

    def __init__(self, strength=1):
        self.strength = strength


class Forgetful(Honest):
    """Does not store its parameter."""

    def __init__(self, *, strength=1):
        self.power = strength


class Picky(Honest):
    """Runs on nothing."""

    def skip(self, task):
        return "nothing is good enough"


class Undocumented(Honest):
    __doc__ = ""


class Override(Honest):
    """Skips the harness's checks."""

    def apply(self, task, state=None):
        return self.decide(task, {})


def test_an_honest_technique_passes():
    assert check_technique(Honest) == 9


@pytest.mark.parametrize(
    ("cls", "rule"),
    [
        (Vandal, "leaves task.model's tensors as they were"),
        (Moody, "decides the same with the same seed"),
        (Eager, r"asks for the budget in prepare\(\)"),
        (Wordy, "its series are plain numbers"),
        (Positional, "parameters are keyword-only"),
        (Forgetful, "stores its parameter 'strength'"),
        (Picky, "runs on at least one of"),
        (Undocumented, "has a docstring"),
        (Override, r"apply\(\) is the harness's"),
    ],
)
def test_each_broken_rule_is_named(cls, rule):
    with pytest.raises(ContractError, match=rf"technique 'toy' breaks the contract: .*{rule}"):
        check_technique(cls)
