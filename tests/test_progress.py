"""Progress bars."""

import io

import torch
from torch import nn

from widthbench import progress
from widthbench.width import find_groups, proofs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_steps_are_counted_on_a_terminal_alone_and_after_two_seconds(monkeypatch):
    def shown(stream, wait):
        clock = iter(range(0, 100, wait))
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
        with progress.counted("certifying") as step:
            step()
            step()
        return stream.getvalue()

    assert "certifying: 2 steps" in shown(Terminal(), 3)
    assert "certifying" not in shown(Terminal(), 1).split("\r")[0]
    assert shown(io.StringIO(), 3) == ""


def test_certification_counts_its_questions(monkeypatch):
    asked = []

    class Bar:
        def __init__(self, desc):
            asked.append(desc)

        def __enter__(self):
            return lambda: asked.append("step")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(proofs, "counted", Bar)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    find_groups(net, torch.randn(2, 3), cache=False)
    assert asked == ["certifying 1 channel groups", *["step"] * 5]
