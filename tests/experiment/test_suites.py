import pytest

from widthbench.errors import UsageError
from widthbench.experiment import suites

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
    assert ids.index("digits-lenet5-l1-norm-macs:0.5-s0") < ids.index(
        "digits-lenet5-scratch:l1-norm-macs:0.5-s0"
    )
    assert [c.group for c in cells] == sorted(
        [c.group for c in cells], key=[c.group for c in cells].index
    )
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
        (
            "seeds = [0, 1]",
            "seds = [0, 1]",
            "tiny.toml: seeds: Field required|did you mean 'seeds'",
        ),
        (
            "size = 20",
            "size = 20\nargs = { seed = 5 }",
            r"models\.0\.args: 'seed' is set by the suite",
        ),
        (
            "size = 20",
            'size = 20\nargs = { checkpoint_path = "a" }',
            r"args: 'checkpoint_path' would load weights unseen",
        ),
        (
            "size = 20",
            "size = 20\nargs = { x = 2024-01-01 }",
            r"models\.0\.args: .*holds what JSON cannot say",
        ),
        (
            'allocation = "global"',
            "allocation = nan",
            r"params: .*holds what JSON cannot say, such as nan",
        ),
        (
            'allocation = "global"',
            "allocation = [1, { x = inf }]",
            r"params: .*holds what JSON cannot say",
        ),
        ("size = 20", "size = 2", r"tiny.toml: models\.0\.size: .*greater than or equal to 4"),
        (
            "macs:0.25",
            "macs:zero",
            r"models\[0\] \(lenet5\): budget 'macs:zero' is not of the form",
        ),
        ("scratch:l1-norm", "scratch:l2-norm", "must name one of the suite's techniques"),
        ("uniform-width", "uniform", "unknown control 'uniform'; did you mean 'uniform-width'"),
        (
            "epochs = 3",
            "epochs = -3",
            r"model test_vit: base\.epochs: .*greater than or equal to 0",
        ),
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
    smoke, digits, full = (
        {c.model_dump_json() for c in suites.load(n).cells()}
        for n in ("smoke", "digits", "digits-full")
    )
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
    text = GOOD.replace(
        "size = 20\n", 'size = 20\nseeds = [7]\ncontrols = ["base"]\ncheckpoint = "x"\n'
    ).replace("citable", "")
    cells = [c for c in suites.parse(text, "tiny.toml").cells() if c.model == "lenet5"]
    assert {c.seed for c in cells} == {7}
    assert {c.technique for c in cells} == {"base", "l1-norm", "random-channels"}
    assert {c.checkpoint for c in cells} == {"x"}
    assert not any(c.trains_base for c in cells)


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
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
    with pytest.raises(
        UsageError,
        match=r"suite tiny: checkpoint 'nowhere' is not in .*put nowhere.safetensors there",
    ):
        suites.check(suites.parse(text, "tiny.toml"))


def test_networks_override_data_sets():
    text = GOOD.replace("size = 32\n", 'size = 32\ndatasets = ["digits", "cifar10"]\n')
    cells = suites.parse(text, "tiny.toml").cells()
    found = {(c.dataset, c.model) for c in cells}
    assert found == {("digits", "lenet5"), ("digits", "test_vit"), ("cifar10", "test_vit")}
    only = suites.parse(text.replace('["digits", "cifar10"]', '["cifar10"]'), "tiny.toml")
    assert {(c.dataset, c.model) for c in only.cells()} == {
        ("digits", "lenet5"),
        ("cifar10", "test_vit"),
    }
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
    with pytest.raises(
        UsageError,
        match="control 'scratch:random-channels' of lenet5 must name one of the suite's techniques",
    ):
        suites.parse(
            text.replace('controls = ["base"]\n', 'controls = ["scratch:random-channels"]\n'),
            "tiny.toml",
        )


def test_a_networks_own_techniques_are_checked_before_anything_runs():
    own = 'techniques = [{ id = "l1-norm", params = { allocation = "fair" } }]'
    text = GOOD.replace("size = 20\n", f'size = 20\ncontrols = ["base"]\n{own}\n')
    with pytest.raises(UsageError, match="parameter 'allocation'"):
        suites.check(suites.parse(text, "tiny.toml"))


def test_curves_reach_the_cells():
    assert all(
        c.curves
        for c in suites.parse(
            GOOD.replace('name = "tiny"', 'name = "tiny"\ncurves = true'), "tiny.toml"
        ).cells()
    )
    assert not any(c.curves for c in suites.parse(GOOD, "tiny.toml").cells())


BASE = "size = 20\nargs = { a = %s }"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", f"seeds = [{'1' * 5000}]", r"tiny.toml: not valid TOML: .*5000 digits"),
        (
            "seeds = [0, 1]",
            f"seeds = [0x{'f' * 5000}]",
            r"tiny.toml: seeds: an integer of more than 64 bits",
        ),
        (
            "size = 20",
            BASE % f"{'[' * 20_000}{']' * 20_000}",
            r"tiny.toml: .* more than 50 deep: flatten",
        ),
        (
            "size = 20",
            BASE % f"{'{ a = ' * 300}1{' }' * 300}",
            r"tiny.toml: .* more than 50 deep: flatten",
        ),
        (
            "size = 20",
            f"size = 20\nargs.{'.'.join('a' * 2_000)} = 1",
            r"tiny.toml: .* more than 50 deep: flatten",
        ),
        ("size = 20", "size = 20\nmean = [nan]\nstd = [1]", r"models\.0\.mean\.0: .*finite"),
        ("size = 20", "size = 20\nmean = [1e999]\nstd = [1]", r"models\.0\.mean\.0: .*finite"),
        (
            'name = "tiny"',
            f'name = "{"n" * 300}"',
            r"tiny.toml: name: String should have at most 100 characters",
        ),
        (
            'name = "tiny"',
            'name = "tiny"\n"a\\nb\\u001b[2J" = 1',
            r"tiny.toml: a\\nb\\x1b\[2J: unknown key",
        ),
        ("seeds = [0, 1]", f'seeds = "{"9" * 10_000}"', r"tiny.toml: seeds: .{0,300}$"),
        (
            "[finetune]\nepochs = 1\nlr = 0.01",
            "[finetune]\nepochs = 1",
            r"tiny.toml: finetune: lr: Field required, since",
        ),
    ],
)
def test_what_python_cannot_read_or_print_is_an_error_in_one_line(old, new, message):
    assert old in GOOD
    with pytest.raises(UsageError, match=message) as caught:
        suites.parse(GOOD.replace(old, new, 1), "tiny.toml")
    assert "\n" not in str(caught.value)


def test_cells_are_counted_before_they_are_made(monkeypatch):
    seeds, budgets = list(range(3000)), [f"macs:0.{n:04}" for n in range(1, 2001)]
    text = GOOD.replace("seeds = [0, 1]", f"seeds = {seeds}").replace(
        '["macs:0.5", "macs:0.25"]', str(budgets)
    )
    made = suites.Suite._cells
    monkeypatch.setattr(suites.Suite, "_cells", lambda self: pytest.fail("cells were made"))
    with pytest.raises(
        UsageError, match=r"tiny.toml: 24018000 cells are more than 100000: name fewer"
    ):
        suites.parse(text, "tiny.toml")
    monkeypatch.setattr(suites.Suite, "_cells", made)
    for name in suites.names():
        suite = suites.load(name)
        assert suite._count() == len(suite.cells())


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_marks_and_line_ends_of_other_systems_change_nothing(tmp_path, mark, end):
    path = tmp_path / "mine.toml"
    path.write_bytes((mark + GOOD.replace("\n", end)).encode())
    assert suites.load(str(path)).cells() == suites.parse(GOOD, "mine.toml").cells()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "mine.toml"
    path.write_bytes(GOOD.replace('"tiny"', '"tiny"\ntitle = "größer"').encode(encoding))
    with pytest.raises(
        UsageError,
        match=r"cannot read suite .*mine.toml: (it is UTF-16|not UTF-8 text in line 3).*save "
        r"it as UTF-8",
    ):
        suites.load(str(path))


@pytest.mark.parametrize("name", ["a" * 300 + ".toml", "\0.toml", "."])
def test_paths_that_no_system_knows_are_refused(name):
    with pytest.raises(UsageError, match=r"cannot read suite|unknown suite"):
        suites.load(name)


def test_a_recipe_without_epochs_needs_nothing_else():
    text = GOOD.replace("[finetune]\nepochs = 1\nlr = 0.01\n", "[finetune]\nepochs = 0\n")
    assert {c.finetune.epochs for c in suites.parse(text, "tiny.toml").cells()} == {0}
    with pytest.raises(
        UsageError, match=r"model test_vit: finetune: lr: Field required, since there are epochs"
    ):
        suites.parse(
            text.replace("base = { epochs = 3 }", "finetune = { epochs = 3 }"), "tiny.toml"
        )
    own = suites.parse(
        text.replace("base = { epochs = 3 }", "finetune = { epochs = 3, lr = 0.2 }"), "tiny.toml"
    ).cells()
    assert {(c.finetune.epochs, c.finetune.lr) for c in own if c.model == "test_vit"} == {(3, 0.2)}
