from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from widthbench.errors import UsageError
from widthbench.technique import registry
from widthbench.technique.base import Outcome, Technique


class Toy(Technique):
    """A toy."""

    id = "toy"
    access = "none"

    def __init__(self, *, strength: float = 1.0) -> None:
        if strength < 0:
            raise ValueError(f"strength must not be negative, not {strength}")
        self.strength = strength

    def decide(self, task, state):
        return Outcome({})


class NoAccess(Toy):
    id = "no-access"
    access = "everything"


NOT_A_TECHNIQUE = 3


def point(name, target, dist="a-plugin"):
    ep = EntryPoint(name, target, registry.GROUP)
    vars(ep).update(dist=SimpleNamespace(name=dist, version="1.0"))
    return ep


@pytest.fixture
def declare(monkeypatch):
    def set_points(*points):
        monkeypatch.setattr(registry, "entry_points", lambda group: list(points))

    return set_points


HERE = __name__


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Entry points import this module by name."""
    import sys

    monkeypatch.setitem(sys.modules, "toy_plugin", sys.modules[HERE])


def test_the_built_in_techniques_load_through_the_same_entry_points():
    good, bad = registry.load_all()
    assert {"l1-norm", "random-channels"} <= set(good)
    assert bad == {}
    assert registry.owner("l1-norm").startswith("widthbench ")


def test_create_with_parameters(declare):
    declare(point("toy", "toy_plugin:Toy"))
    toy = registry.create("toy", {"strength": 2.0})
    assert repr(toy) == "toy(strength=2.0)"
    with pytest.raises(UsageError, match="takes no parameter 'strenght'; did you mean 'strength'"):
        registry.create("toy", {"strenght": 2.0})
    with pytest.raises(UsageError, match="technique 'toy': strength must not be negative"):
        registry.create("toy", {"strength": -1.0})


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(UsageError, match="unknown technique 'l1_norm'; did you mean 'l1-norm'"):
        registry.load("l1_norm")


def test_a_collision_names_both_owners(declare):
    declare(point("toy", "toy_plugin:Toy", "one"), point("toy", "other:Toy", "two"))
    with pytest.raises(
        UsageError, match=r"registered by one 1.0 \(toy_plugin:Toy\) and two 1.0 \(other:Toy\)"
    ):
        registry.load("toy")


def test_the_same_entry_seen_twice_is_no_collision(declare):
    declare(point("toy", "toy_plugin:Toy"), point("toy", "toy_plugin:Toy"))
    assert registry.load("toy") is not None


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("number", "toy_plugin:NOT_A_TECHNIQUE", "is not a subclass of widthbench.Technique"),
        ("other-id", "toy_plugin:Toy", "its class says id = 'toy'"),
        (
            "no-access",
            "toy_plugin:NoAccess",
            "set access to one of none, unlabelled, labelled, training",
        ),
        ("missing", "toy_plugin:Missing", "fails to import: AttributeError"),
        ("gone", "no_such_module:X", "of a-plugin 1.0 fails to import: ModuleNotFoundError"),
    ],
)
def test_a_broken_plug_in_is_named_and_the_others_go_on(declare, name, target, message):
    declare(point(name, target), point("toy", "toy_plugin:Toy"))
    good, bad = registry.load_all()
    assert set(good) == {"toy"}
    assert message in bad[name]
    with pytest.raises(UsageError):
        registry.load(name)
