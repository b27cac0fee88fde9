import pytest

from widthbench import suites
from widthbench.errors import UsageError

GOOD = """
name = "tiny"
datasets = ["digits"]
seeds = [0, 1]
budgets = ["macs:0.5", "macs:0.25"]
techniques = ["l1-norm", { id = "random-channels", params = { allocation = "global" } }]
controls = ["base", "uniform-width", "scratch:l1-norm"]
[base]
epochs = 1
lr = 0.1
[finetune]
epochs = 1
lr = 0.01
[[models]]
name = "lenet5"
size = 20
[[models]]
name = "test_vit"
size = 32
budgets = ["macs:0.75"]
base = { epochs = 3 }
"""


def test_a_suite_gives_its_cells_sources_first():
    suite = suites.parse(GOOD, "tiny.toml")
    cells = suite.cells()
    assert len(cells) == 2 * (1 + 2 * 4) + 2 * (1 + 4)
    ids = [c.id for c in cells]
    assert ids.index("digits-lenet5-l1-norm-macs:0.5-s0") < ids.index("digits-lenet5-scratch:l1-norm-macs:0.5-s0")
    assert [c.group for c in cells] == sorted([c.group for c in cells], key=[c.group for c in cells].index)
    assert {c.base.epochs for c in cells if c.model == "test_vit"} == {3}
    assert {c.budget for c in cells if c.model == "test_vit"} == {None, "macs:0.75"}


def test_cells_are_the_same_every_time():
    assert suites.parse(GOOD, "a.toml").cells() == suites.parse(GOOD, "b.toml").cells()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tiny"', "name = ", "tiny.toml: not valid TOML"),
        ('name = "tiny"\n', "", "tiny.toml: name: Field required"),
        ('"tiny"', '"../tiny"', "tiny.toml: name: String should match"),
        ("seeds = [0, 1]", 'seeds = "all"', r"tiny.toml: seeds: .*found 'all'"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "two cells have the same name"),
        ("seeds = [0, 1]", "seds = [0, 1]", "tiny.toml: seeds: Field required|did you mean 'seeds'"),
        ("size = 20", "size = 20\nargs = { seed = 5 }", r"models\.0\.args: 'seed' is set by the suite"),
        ("size = 20", "size = 2", r"tiny.toml: models\.0\.size: .*greater than or equal to 4"),
        ("macs:0.25", "macs:zero", r"models\[0\] \(lenet5\): budget 'macs:zero' is not of the form"),
        ("scratch:l1-norm", "scratch:l2-norm", "must name one of the suite's techniques"),
        ("uniform-width", "uniform", "unknown control 'uniform'; did you mean 'uniform-width'"),
        ("epochs = 3", "epochs = -3", r"model test_vit: base\.epochs: .*greater than or equal to 0"),
        ("lr = 0.01", "lr = 0.01\nlearning = 1", "tiny.toml: finetune.learning: unknown key"),
    ],
)
def test_a_malformed_suite_names_file_key_and_what_was_expected(old, new, message):
    assert old in GOOD
    with pytest.raises(UsageError, match=message):
        suites.parse(GOOD.replace(old, new), "tiny.toml")


def test_unknown_suites_are_named():
    with pytest.raises(UsageError, match="unknown suite 'digit'; did you mean 'digits'"):
        suites.load("digit")
    with pytest.raises(UsageError, match=r"cannot read suite nowhere\.toml"):
        suites.load("nowhere.toml")


@pytest.mark.parametrize("name", suites.names())
def test_built_in_suites_are_sound(name):
    suite = suites.load(name)
    assert suite.name == name
    assert suite.cells()


def test_smoke_is_a_selection_of_digits_and_digits_of_digits_full():
    smoke, digits, full = ({c.model_dump_json() for c in suites.load(n).cells()} for n in ("smoke", "digits", "digits-full"))
    assert smoke < digits < full
