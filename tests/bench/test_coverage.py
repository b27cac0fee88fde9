"""The survey of networks."""

import copy
import os
import time

import pytest
import torch
from studies import coverage
from torch import nn

from widthbench.errors import UsageError
from widthbench.provenance import code_digest
from widthbench.width import Inputs


def test_the_smallest_of_each_family_come_first():
    assert coverage.names(["ghostnet"])[0] == "ghostnet_050"
    assert coverage.names(["test_vit", "structure:LSTM"]) == ["test_vit", "structure:LSTM"]


def test_all_networks_are_taken_in_turns(monkeypatch):
    monkeypatch.setattr(coverage, "families", lambda chosen: {"a": ["a1", "a2", "a3"], "b": ["b1"]})
    order = coverage.names()
    assert order[0].startswith("structure:")
    timms = [n for n in order if ":" not in n]
    assert timms == ["a1", "b1", "a2", "a3"]
    assert order.index("b1") < order.index("torchvision:resnet18") < order.index("a2")


def test_unknown_networks_are_named():
    with pytest.raises(UsageError, match="no network 'ghostnt_050'; did you mean 'ghostnet_050'"):
        coverage.names(["ghostnt_050"])


def test_a_row_has_grades_errors_and_a_half_that_runs():
    row = coverage.survey("test_vit")
    assert (row["exact"], row["heads"], row["coupled"], row["frozen"], row["problem"]) == (
        18,
        6,
        1,
        0,
        "",
    )
    assert float(row["split error"]) < 1e-9
    assert float(row["gates vs removal"]) < 1e-9
    assert 0.2 < row["half MACs"] < 0.3
    assert coverage.passed(row)


def test_a_network_without_exact_groups_does_not_pass(monkeypatch):
    monkeypatch.setattr(
        coverage, "built", lambda name: (nn.Flatten(), Inputs.of(torch.randn(1, 3, 8, 8)))
    )
    row = coverage.survey("none")
    assert not coverage.passed(row)
    assert row["problem"] == "no exact group"


def test_a_network_that_does_not_load_is_a_row(monkeypatch):
    def refuse(name):
        raise UsageError("no such weights")

    monkeypatch.setattr(coverage, "built", refuse)
    assert coverage.survey("x") == {"model": "x", "problem": "does not load: no such weights"}


class Drifting(nn.Linear):
    """Gives something else each time."""

    def forward(self, x):
        return super().forward(x) + torch.rand(())


def test_a_half_that_does_not_come_back_from_saved_weights_is_seen():
    x = Inputs.of(torch.randn(2, 3))
    assert coverage._reloads(nn.Linear(3, 2), x)
    assert not coverage._reloads(Drifting(3, 2), x)


def test_a_half_without_finite_gradients_is_seen():
    x = Inputs.of(torch.randn(2, 3))
    assert coverage._backwards(nn.Linear(3, 2), x)
    broken = nn.Linear(3, 2)
    nn.init.constant_(broken.weight, float("inf"))
    assert not coverage._backwards(broken, x)


def test_torch_pruning_alone_halves_a_convolutional_network():
    row = coverage.survey_alone("test_resnet")
    assert 0.2 < row["share"] < 0.4
    assert row["alone"] == "as masked"


def test_wrong_indices_of_another_pruner_are_seen(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = Inputs.of(torch.randn(1, 3, 4, 4))
    monkeypatch.setattr(coverage, "built", lambda name, apart: (copy.deepcopy(net), x))
    assert coverage.survey_alone("x")["alone"] == "as masked"
    pruner = coverage.pruner_alone

    def shifted(model, x):
        made = pruner(model, x)
        step = made.step

        def wrong(**options):
            yield from step(**options)
            model[2].weight.data = model[2].weight.data.roll(1, 1)

        made.step = wrong
        return made

    monkeypatch.setattr(coverage, "pruner_alone", shifted)
    assert coverage.survey_alone("x")["alone"] == "not as masked"


def _sleeps(name):
    time.sleep(60)


def _dies(name):
    os._exit(3)


def test_a_network_that_takes_too_long_or_kills_its_process_is_a_row():
    assert coverage.apart(_sleeps, "x", 1, 0.5) == {"problem": "took more than 0.5 s"}
    assert coverage.apart(_dies, "x", 1, 60) == {
        "problem": "its process ended with exit code 3 without a word"
    }


def test_the_page_counts_what_passes_and_names_the_rest():
    good = {
        "model": "a_s",
        "exact": 2,
        "down to": "0.5 %",
        "split error": "1e-15",
        "gates vs removal": "2e-15",
        "problem": "",
        "half MACs": 0.25,
        "alone": "as masked",
        "share": 0.3,
        "resizes": 3,
        "differences": ["10 predicted, 11 counted"],
        "reasons": {"splitting it changes the output by 1e-3": 2},
    }
    far = good | {"model": "c", "down to": "40.0 %", "reasons": {"a softmax runs over it": 3}}
    bad = {"model": "b_s", "problem": "does not load: weights", "alone": "raises ValueError: no"}
    page = " ".join(coverage.page([good, far, bad], 7).split())
    assert "3 of 7 networks" in page
    assert "leaves 40.0 % of the MACs of timm's architectures in the median, 100.0 %" in page
    assert "- `c`: 40.0 %; 3 groups: a softmax runs over it" in page
    assert "- `b_s`: all; does not load: weights" in page
    assert "2 of 3 load" in page
    assert "- `b_s`: raises ValueError: no" in page
    assert "splitting 1.0e-15, removal against gates 2.0e-15" in page
    assert "in 4 of 6 resizes" in page
    assert "- `a_s`: 10 predicted, 11 counted" in page
    assert "at zero in 2 of 3" in page


def test_the_script_goes_on_from_what_this_code_has_measured(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["coverage.py", *arguments])
        return coverage.main()

    asked = []

    def both(name, limit_s):
        asked.append(name)
        row = {"model": name, "code": code_digest("width")}
        return row | {"problem": "no exact group" if name == "vgg11" else ""}

    monkeypatch.setattr(coverage, "both", both)
    monkeypatch.setattr(coverage, "names", lambda chosen: [*chosen] or ["vgg11", "vgg13"])
    assert run("--results", str(tmp_path)) == 1
    assert "no exact group" in (tmp_path / "coverage.md").read_text()
    assert (tmp_path / "coverage.jsonl").read_text().count("\n") == 2
    assert "coverage.md" in capsys.readouterr().out
    assert run("--results", str(tmp_path)) == 1
    assert asked == ["vgg11", "vgg13"]
    (tmp_path / "coverage.jsonl").write_text('{"model": "vgg11", "code": "older"}\n')
    assert run("--results", str(tmp_path), "--hours", "0") == 0
    assert asked == ["vgg11", "vgg13"]
    assert run("vgg13", "--results", str(tmp_path / "other")) == 0
    assert "vgg13" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()  # some networks are no page


def test_the_command_of_an_earlier_version_says_where_it_is(capsys):
    from widthbench.cli import main

    assert main(["doctor", "--all-families"]) == 2
    assert "python bench/studies/coverage.py" in capsys.readouterr().err
