"""A cell that is killed on its way, and what must be as if it had not been."""

from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store


class Killed(Exception):
    """What kills it."""


def killed_at(monkeypatch, given, owner, name, call, note=lambda *args: None):
    """Run a cell of which a method dies at one of its calls, and only there.

    Returns what ``note`` says of the method's arguments at each call, also at those to come.
    """
    real, calls = getattr(owner, name), []

    def dying(*args, **more):
        calls.append(note(*args))
        if len(calls) == call:
            raise Killed
        return real(*args, **more)

    monkeypatch.setattr(owner, name, dying)
    assert "Killed" in run_cell(given, Store()).reason
    assert len(calls) == call
    return calls


def assert_as_if_never_killed(again, whole):
    """The same network and the same bill."""
    assert whole.status == "done", whole.trace
    assert again.status == "done", again.trace
    assert again.rows == whole.rows
    assert again.series == whole.series
    spent, all_spent = again.spent["decision"], whole.spent["decision"]
    assert spent.forward_macs == all_spent.forward_macs
    assert spent.backward_macs == all_spent.backward_macs
