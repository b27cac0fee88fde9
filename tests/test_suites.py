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
        (
            "size = 20",
            'size = 20\nargs = { checkpoint_path = "a" }',
            r"args: 'checkpoint_path' would load weights unseen",
        ),
        ("size = 20", "size = 20\nargs = { x = 2024-01-01 }", r"models\.0\.args: .*holds what JSON cannot say"),
        ('allocation = "global"', "allocation = nan", r"params: .*holds what JSON cannot say, such as nan"),
        ('allocation = "global"', "allocation = [1, { x = inf }]", r"params: .*holds what JSON cannot say"),
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


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('checkpoint = "x"\npretrained = true', "checkpoint and pretrained exclude each other"),
        ('sha256 = "0123456789"', "sha256 needs a checkpoint"),
        ("mean = [0.5]", "equally many numbers, not 1 and 0"),
        ("mean = [0.5]\nstd = [0]", "greater than 0"),
        ("base = { epochs = 0 }", r"base.epochs = 0 trains nothing: name a checkpoint"),
        ("seeds = []", "at least 1"),
        ('controls = ["scratch:nothing"]', "must name one of the suite's techniques"),
    ],
)
def test_networks_with_weights_and_settings_of_their_own_are_checked(added, message):
    with pytest.raises(UsageError, match=message):
        suites.parse(GOOD.replace("size = 20\n", f"size = 20\n{added}\n"), "tiny.toml")


def test_networks_override_seeds_and_controls():
    text = GOOD.replace("size = 20\n", 'size = 20\nseeds = [7]\ncontrols = ["base"]\ncheckpoint = "x"\n').replace("citable", "")
    cells = [c for c in suites.parse(text, "tiny.toml").cells() if c.model == "lenet5"]
    assert {c.seed for c in cells} == {7}
    assert {c.technique for c in cells} == {"base", "l1-norm", "random-channels"}
    assert {c.checkpoint for c in cells} == {"x"}
    assert not any(c.trains_base for c in cells)


@pytest.mark.parametrize("name", ["lenet", "cifar10", "imagenet"])
def test_citable_suites_have_five_budgets_and_five_seeds_where_bases_are_trained(name):
    suite = suites.load(name)
    assert suite.citable
    assert suite.budgets == ("macs:0.5", "macs:0.25", "macs:0.125", "macs:0.0625", "macs:0.03125")
    seeds = {}
    for c in suite.cells():
        assert c.floor
        seeds.setdefault((c.dataset, c.model, c.trains_base), set()).add(c.seed)
    assert all(len(s) == (5 if trained else 1) for (_, _, trained), s in seeds.items())


def test_a_missing_checkpoint_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDTHBENCH_WEIGHTS", str(tmp_path))
    text = GOOD.replace("size = 20\n", 'size = 20\ncheckpoint = "nowhere"\n')
    with pytest.raises(UsageError, match=r"suite tiny: checkpoint 'nowhere' is not in .*put nowhere.safetensors there"):
        suites.check(suites.parse(text, "tiny.toml"))


def test_networks_override_data_sets():
    text = GOOD.replace("size = 32\n", 'size = 32\ndatasets = ["digits", "cifar10"]\n')
    cells = suites.parse(text, "tiny.toml").cells()
    found = {(c.dataset, c.model) for c in cells}
    assert found == {("digits", "lenet5"), ("digits", "test_vit"), ("cifar10", "test_vit")}
    only = suites.parse(text.replace('["digits", "cifar10"]', '["cifar10"]'), "tiny.toml")
    assert {(c.dataset, c.model) for c in only.cells()} == {("digits", "lenet5"), ("cifar10", "test_vit")}
    assert only.all_datasets == ("digits", "cifar10")


def test_a_networks_own_data_set_is_checked_before_anything_runs():
    text = GOOD.replace("size = 32\n", 'size = 32\ndatasets = ["nowhere"]\n')
    with pytest.raises(UsageError, match="nowhere"):
        suites.check(suites.parse(text, "tiny.toml"))


def test_networks_override_techniques_and_tell_variants_apart():
    own = 'techniques = [{ id = "l1-norm", params = { allocation = "global" } }]'
    text = GOOD.replace("size = 20\n", f'size = 20\n{own}\ncontrols = ["base"]\n')
    twin = '\n[[models]]\nname = "lenet5"\nsize = 20\nvariant = "short"\nbase = { epochs = 3 }\n'
    cells = [c for c in suites.parse(text + twin, "tiny.toml").cells() if c.model == "lenet5"]
    whole, short = ([c for c in cells if c.variant == v] for v in ("", "short"))
    assert {c.label for c in whole} == {"base", "l1-norm(allocation=global)"}
    assert {"l1-norm", "random-channels(allocation=global)"} < {c.label for c in short}
    assert short[0].network == "lenet5, short"
    assert (whole[0].base.epochs, short[0].base.epochs) == (1, 3)
    assert len({c.group for c in cells}) == 2 * len({c.seed for c in cells})
    with pytest.raises(UsageError, match="two cells have the same name"):
        suites.parse(text + twin.replace('variant = "short"\n', ""), "tiny.toml")
    with pytest.raises(UsageError, match="control 'scratch:random-channels' of lenet5 must name one of the suite's techniques"):
        suites.parse(text.replace('controls = ["base"]\n', 'controls = ["scratch:random-channels"]\n'), "tiny.toml")


def test_a_networks_own_techniques_are_checked_before_anything_runs():
    own = 'techniques = [{ id = "l1-norm", params = { allocation = "fair" } }]'
    text = GOOD.replace("size = 20\n", f'size = 20\ncontrols = ["base"]\n{own}\n')
    with pytest.raises(UsageError, match="parameter 'allocation'"):
        suites.check(suites.parse(text, "tiny.toml"))


def test_curves_reach_the_cells():
    assert all(c.curves for c in suites.parse(GOOD.replace('name = "tiny"', 'name = "tiny"\ncurves = true'), "tiny.toml").cells())
    assert not any(c.curves for c in suites.parse(GOOD, "tiny.toml").cells())
