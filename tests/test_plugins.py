"""Files of a user's own: techniques, networks, and what they import from beside them."""

import json
import sys
import tomllib

import pytest
import timm
import torch

import widthbench
from widthbench import plugins
from widthbench.cli import main
from widthbench.errors import UsageError
from widthbench.experiment import keys, protocol, suites
from widthbench.experiment.records import read_records
from widthbench.experiment.store import Store
from widthbench.networks import models
from widthbench.technique import registry

TECHNIQUE = '''
import widthbench
from own_helpers import strength


class MaxNorm(widthbench.ScoredTechnique):
    """Keeps the channels whose largest incoming weight is largest."""

    id = "own-max-norm"
    access = "none"

    def score(self, task):
        return {name: strength(task, name) for name in task.groups}
'''
HELPERS = """
import torch
from widthbench.width.groups import producer_rows


def strength(task, name):
    return torch.cat(producer_rows(task.model, task.groups, name), 1).abs().amax(1)
"""
NETWORK = """
from torch import nn


class OwnNet(nn.Module):
    def __init__(self, num_classes=10, width=6):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, width, 3), nn.Conv2d(width, 8, 3)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


def seven():
    return 7


WORD = "no factory"
"""
SUITE = """
name = "own"
datasets = ["digits"]
seeds = [0]
budgets = ["channels:0.5"]
techniques = ["own-max-norm", "l1-norm"]
controls = ["base"]
plugins = ["own_technique.py"]
base = { epochs = 1, batch_size = 64, lr = 0.05 }
finetune = { epochs = 0, lr = 0.01 }

[[models]]
factory = "own_nets.py:OwnNet"
args = { width = 4 }
size = 8
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of a user's, forgotten afterwards."""
    monkeypatch.setenv(plugins.PLUGINS, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, text in (
        ("own_technique.py", TECHNIQUE),
        ("own_helpers.py", HELPERS),
        ("own_nets.py", NETWORK),
        ("own.toml", SUITE),
    ):
        (tmp_path / name).write_text(text)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("own_")]:
        del sys.modules[name]


def test_a_technique_and_a_network_in_files_come_onto_a_board(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["run", str(folder / "own.toml"), "--results", str(out), "--no-timing"]
    assert main(arguments) == 0, capsys.readouterr().err
    records = read_records(out / "own" / "records.jsonl")
    assert {(r.cell.technique, r.status) for r in records} == {
        ("base", "done"),
        ("own-max-norm", "done"),
        ("l1-norm", "done"),
    }
    assert {r.cell.model for r in records} == {"own_nets:OwnNet"}
    assert {r.widths["a"] for r in records if r.cell.budget} == {2}
    assert str(tmp_path) not in (out / "own" / "leaderboard.md").read_text()


def test_what_a_record_depends_on_is_in_its_key(folder):
    cells = {c.technique: c for c in suites.load(str(folder / "own.toml")).cells()}
    before = {t: keys.cell_key(c) for t, c in cells.items()}
    (folder / "own_helpers.py").write_text(HELPERS.replace("amax(1)", "sum(1)"))
    changed = {t for t, c in cells.items() if keys.cell_key(c) != before[t]}
    assert changed == {"own-max-norm"}  # by what it imports from beside it
    (folder / "own_nets.py").write_text(NETWORK.replace("relu()", "sigmoid()"))
    assert all(keys.cell_key(c) != before[t] for t, c in cells.items())


@pytest.mark.parametrize(
    "line", ['id = "own-x"', 'id: str = "own-x"', 'id, access = "own-x", "none"']
)
def test_an_id_is_found_however_it_is_written(folder, line):
    (folder / "own_ways.py").write_text(f"class Way:\n    {line}\n\n\nclass Other:\n    id = 7\n")
    plugins.use([folder / "own_ways.py"])
    assert plugins.techniques() == {"own-x": [("own_ways:Way", folder / "own_ways.py")]}


def test_a_class_can_be_applied(folder):
    plugins.use([folder / "own_technique.py"])
    cls = registry.load("own-max-norm")
    assert registry.owner("own-max-norm") == str(folder / "own_technique.py")
    net, x = timm.create_model("test_resnet"), torch.randn(1, 3, 64, 64)
    one = widthbench.apply(cls, net, budget="channels:0.5", example_input=x)
    other = widthbench.apply("own-max-norm", net, budget="channels:0.5", example_input=x)
    assert torch.equal(one(x), other(x))
    with pytest.raises(UsageError, match="takes no parameter 'size'"):
        widthbench.apply(cls, net, budget="channels:0.5", example_input=x, size=3)


def test_doctor_looks_at_ones_own_network(folder, capsys):
    where = f"{folder / 'own_nets.py'}:OwnNet"
    assert main(["doctor", where, "--size", "12", "--channels", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] == "own_nets:OwnNet"
    assert row["input"] == "1 x 12 x 12"
    assert row["exact"] == 2


def test_a_factory_gets_what_it_takes():
    net = models.create("widthbench.networks.documents:lenet5", classes=7, channels=2, size=28)
    assert net(torch.zeros(1, 2, 28, 28)).shape == (1, 7)


def test_bad_files_and_factories_are_named_with_the_remedy(folder):
    with pytest.raises(UsageError, match="is no Python file"):
        plugins.use([folder / "nowhere.py"])
    (folder / "two-words.py").touch()
    with pytest.raises(UsageError, match="'two-words' is no name of a module"):
        plugins.use([folder / "two-words.py"])
    (folder / "own_broken.py").write_text("class (")
    with pytest.raises(UsageError, match=r"own_broken\.py cannot be read"):
        plugins.use([folder / "own_technique.py", folder / "own_broken.py"])
    assert plugins.files() == []  # none of them, and nothing else suffers
    plugins.use([folder / "own_technique.py"])
    (folder / "own_technique.py").write_text("class (")
    with pytest.warns(UserWarning, match=r"own_technique\.py cannot be read"):
        assert "l1-norm" in registry.names()


def test_a_file_must_not_be_called_as_a_module_that_is_there(folder):
    (folder / "tabulate.py").touch()
    with pytest.raises(UsageError, match="another module is called 'tabulate'"):
        plugins.use([folder / "tabulate.py"])


def test_what_is_beside_one_file_does_not_hide_what_is_beside_another(folder):
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / f"own_{name}.py").write_text("import own_shared\n")
        (folder / name / "own_shared.py").write_text(f"NAME = {name!r}\n")
    plugins.use([folder / "one" / "own_one.py"])
    with pytest.raises(UsageError, match=r"another module is called 'own_shared'"):
        plugins.use([folder / "two" / "own_two.py"])
    assert [f.stem for f in plugins.files()] == ["own_one"]


def test_packages_other_files_and_what_is_only_passed_on_are_digested(folder):
    (folder / "own_package").mkdir()  # without an __init__.py
    (folder / "own_package" / "part.py").write_text("SIGN = 1\n")
    (folder / "own_layers.py").write_text("WIDTH = 4\n")
    (folder / "own_blocks.py").write_text(
        "from torch import nn\nfrom own_layers import WIDTH\n\n\n"
        "def Net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH),"
        " nn.ReLU(), nn.Linear(WIDTH, num_classes))\n"
    )
    (folder / "own_nets.py").write_text("from own_blocks import Net as OwnNet\n")
    (folder / "own_helpers.py").write_text("from own_package.part import SIGN\n" + HELPERS)
    (folder / "own.toml").write_text(SUITE.replace("args = { width = 4 }", ""))
    cells = {c.technique: c for c in suites.load(str(folder / "own.toml")).cells()}
    before = {t: keys.cell_key(c) for t, c in cells.items()}
    (folder / "own_package" / "part.py").write_text("SIGN = -1\n")
    after = {t: keys.cell_key(c) for t, c in cells.items()}
    assert {t for t in cells if after[t] != before[t]} == {"own-max-norm"}
    (folder / "own_layers.py").write_text("WIDTH = 40\n")
    assert all(keys.cell_key(c) != after[t] for t, c in cells.items())
    assert models.create("own_nets:OwnNet", classes=10, channels=1, size=8)[1].out_features == 40


def test_a_file_that_changes_while_its_cell_runs_leaves_no_result(folder, monkeypatch, fresh_cache):
    (cell,) = [c for c in suites.load(str(folder / "own.toml")).cells() if c.technique == "base"]
    real = protocol.RUNNERS["base"].run

    def edited(call):
        record = real(call)
        (folder / "own_nets.py").write_text(NETWORK.replace("width, 3", "width, 5"))
        return record

    monkeypatch.setattr(protocol.RUNNERS["base"], "run", edited)
    record = protocol.run_cell(cell, Store())
    assert record.status == "failed"
    assert "its code was changed while it ran" in record.reason


def test_one_process_sees_what_a_file_says_now(folder):
    plugins.use([folder / "own_technique.py"])
    net, x = timm.create_model("test_resnet"), torch.randn(1, 3, 64, 64)
    one = widthbench.apply("own-max-norm", net, budget="channels:0.5", example_input=x)
    (folder / "own_helpers.py").write_text(HELPERS.replace("amax(1)", "amax(1).neg()"))
    other = widthbench.apply("own-max-norm", net, budget="channels:0.5", example_input=x)
    assert not torch.equal(one(x), other(x))


def test_a_class_stands_in_a_suite_from_python(folder):
    plugins.use([folder / "own_technique.py"])
    cls = registry.load("own-max-norm")
    content = tomllib.loads(SUITE) | {"techniques": [cls, "l1-norm"], "plugins": []}
    content["models"] = [{"name": "lenet_300_100", "size": 8}]
    board = widthbench.run(content, only="*own-max-norm*", progress=False)
    assert [r.status for r in board] == ["done"]


def test_one_name_for_two_techniques_is_refused(folder):
    (folder / "own_copy.py").write_text(TECHNIQUE)
    plugins.use([folder / "own_technique.py", folder / "own_copy.py"])
    with pytest.raises(UsageError, match=r"own_copy\.py.* and .*own_technique\.py"):
        registry.load("own-max-norm")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_nets.py:Nobody", "has no attribute 'Nobody'"),
        ("own_nets.py:WORD", "is a str: name a class or a function"),
        ("own_nets.py:seven", "gives a int, not a torch.nn.Module"),
        ("own_nowhere:Net", "No module named 'own_nowhere'"),
    ],
)
def test_factories_that_make_no_network(folder, name, message):
    with pytest.raises(UsageError, match=message):
        models.create(models.named(name, folder), classes=10, channels=1, size=8)


def test_settings_that_a_network_refuses_are_named_before_anything_runs(folder, capsys):
    text = SUITE.replace("width = 4", "height = 4")
    (folder / "own.toml").write_text(text)
    assert main(["run", str(folder / "own.toml")]) == 2
    assert "refuses" in capsys.readouterr().err
    (folder / "own.toml").write_text(SUITE.replace("factory", "factroy"))
    assert main(["run", str(folder / "own.toml")]) == 2
    assert "did you mean 'factory'?" in capsys.readouterr().err


def test_a_score_that_is_no_number_is_a_failure_and_not_a_result(folder, tmp_path, capsys):
    text = TECHNIQUE.replace("strength(task, name) for", 'strength(task, name) * float("nan") for')
    (folder / "own_technique.py").write_text(text)
    out = tmp_path / "out"
    main(["run", str(folder / "own.toml"), "--results", str(out), "--no-timing"])
    records = {r.cell.technique: r for r in read_records(out / "own" / "records.jsonl")}
    assert records["own-max-norm"].status == "failed"
    assert "a score of channel group 'a' is nan" in records["own-max-norm"].reason
    assert records["l1-norm"].status == "done"


@pytest.mark.parametrize(
    ("line", "given"),
    [("self.head = nn.Linear(8, 3)", "1 x 3"), ("self.head = nn.Conv2d(8, num_classes, 1)", "")],
)
def test_a_network_without_a_number_for_each_class_is_named_first(folder, capsys, line, given):
    text = NETWORK.replace("self.head = nn.Linear(8, num_classes)", line)
    if not given:  # a map of classes
        text, given = text.replace(".mean((2, 3))", ""), "1 x 10 x 4 x 4"
    (folder / "own_nets.py").write_text(text)
    assert main(["run", str(folder / "own.toml"), "--results", str(folder / "out")]) == 2
    said = capsys.readouterr().err
    assert f"OwnNet(width=4) gives {given} for one image, but digits has 10 classes" in said
    assert "num_classes" in said
