"""The survey of timm's families."""

import os
import time

import pytest
import torch
from studies import families
from torch import nn

from widthbench.errors import UsageError


def test_the_member_with_the_fewest_parameters_stands_for_a_family():
    found = families.members(["ghostnet", "vgg"])
    assert found["vgg"][0] == "vgg11"
    assert found["ghostnet"][0] == "ghostnet_050"
    assert found["vgg"][1] > 5


def test_unknown_families_are_named():
    with pytest.raises(UsageError, match="timm has no family 'ghostnt'; did you mean 'ghostnet'"):
        families.members(["ghostnt"])


def test_a_row_has_grades_errors_and_a_half_that_runs():
    row = families.survey("test_vit")
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
    assert families.passed(row)


def test_a_network_without_exact_groups_does_not_pass(monkeypatch):
    monkeypatch.setattr(families, "built", lambda name: (nn.Flatten(), torch.randn(1, 3, 8, 8)))
    row = families.survey("none")
    assert not families.passed(row)
    assert row["problem"] == "no exact group"


def test_a_network_that_does_not_load_is_a_row(monkeypatch):
    def refuse(name):
        raise UsageError("no such weights")

    monkeypatch.setattr(families, "built", refuse)
    assert families.survey("x") == {"model": "x", "problem": "does not load: no such weights"}


class Drifting(nn.Linear):
    """Gives something else each time."""

    def forward(self, x):
        return super().forward(x) + torch.rand(())


def test_a_half_that_does_not_come_back_from_saved_weights_is_seen():
    x = torch.randn(2, 3)
    assert families._reloads(nn.Linear(3, 2), x)
    assert not families._reloads(Drifting(3, 2), x)


def test_a_half_without_finite_gradients_is_seen():
    x = torch.randn(2, 3)
    assert families._backwards(nn.Linear(3, 2), x)
    broken = nn.Linear(3, 2)
    nn.init.constant_(broken.weight, float("inf"))
    assert not families._backwards(broken, x)


def test_torch_pruning_alone_halves_a_convolutional_network():
    row = families.survey_alone("test_resnet")
    assert 0.2 < row["alone"] < 0.4


def _sleeps(name):
    time.sleep(60)


def _dies(name):
    os._exit(3)


def test_a_network_that_takes_too_long_or_kills_its_process_is_a_row():
    assert families.apart(_sleeps, "x", 1, 0.5) == {"problem": "took more than 0.5 s"}
    assert families.apart(_dies, "x", 1, 60) == {
        "problem": "its process ended with exit code 3 without a word"
    }


def test_the_page_counts_what_passes_and_names_the_rest():
    good = {
        "family": "a",
        "members": 3,
        "model": "a_s",
        "exact": 2,
        "split error": "1e-15",
        "gates vs removal": "2e-15",
    }
    good |= {
        "problem": "",
        "half MACs": 0.25,
        "alone": 0.3,
        "reasons": {"splitting it changes the output by 1e-3": 2},
    }
    bad = {
        "family": "b",
        "members": 1,
        "model": "b_s",
        "problem": "does not load: weights",
        "alone": "raises ValueError: no",
    }
    page = " ".join(families.page([good, bad]).split())
    assert "1 of 2 (50 %) load" in page
    assert "- b (`b_s`): does not load: weights" in page
    assert "- b (`b_s`): raises ValueError: no" in page
    assert "splitting 1.0e-15, removal against gates 2.0e-15" in page
    assert "in 1 of 2 families the network" in page


def test_the_script_writes_the_page_and_fails_below_nine_tenths(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["families.py", *arguments])
        return families.main()

    rows = [{"family": "vgg", "members": 1, "model": "vgg11", "problem": "no exact group"}]
    monkeypatch.setattr(families, "survey_all", lambda *a, **k: iter(rows))
    monkeypatch.setattr(families, "members", lambda families: {"vgg": ("vgg11", 1)})
    assert run("--results", str(tmp_path)) == 1
    assert "no exact group" in (tmp_path / "coverage.md").read_text()
    assert (tmp_path / "coverage.jsonl").read_text().count("\n") == 1
    assert "coverage.md" in capsys.readouterr().out
    rows[0]["problem"] = ""
    assert run("vgg", "--results", str(tmp_path / "other")) == 0
    assert "vgg11" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()  # a part of the families is no page


def test_the_command_of_an_earlier_version_says_where_it_is(capsys):
    from widthbench.cli import main

    assert main(["doctor", "--all-families"]) == 2
    assert "python bench/studies/families.py" in capsys.readouterr().err
