import pytest

from widthbench.data import sources
from widthbench.errors import UsageError
from widthbench.experiment import recipes, suites
from widthbench.networks import models


@pytest.mark.parametrize("name", recipes.names())
def test_built_in_recipes_are_for_networks_and_data_sets_that_exist(name):
    found = recipes.load(name)
    assert found.title
    assert found.origin
    for model in found.models:
        models.require(model)
    assert set(found.datasets) <= set(sources.KNOWN)
    assert set(found.reaches) <= set(found.datasets)


def test_every_registered_network_has_a_recipe():
    covered = {m for n in recipes.names() for m in recipes.load(n).models}
    assert set(models.OURS) <= covered


def test_a_recipe_of_ones_own_is_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('title = "mine"\n[recipe]\nepochs = 3\nlr = 0.1\ncrop = 2\n')
    assert recipes.load(str(path)).recipe.crop == 2
    assert recipes.settings({"recipe": str(path), "epochs": 5})["epochs"] == 5
    assert recipes.settings({"epochs": 5}) == {"epochs": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "not valid TOML"),
        ('title = "a"\n', r"recipe: Field required"),
        (
            'title = "a"\n[recipe]\nepochs = 3\nlr = 0.1\ncorp = 2\n',
            r"recipe.corp: unknown key; did you mean 'crop'",
        ),
        (
            'title = "a"\n[recipe]\nepochs = -3\nlr = 0.1\n',
            r"recipe.epochs: .*greater than or equal to 0",
        ),
        (
            'titel = "a"\n[recipe]\nepochs = 3\nlr = 0.1\n',
            r"titel: unknown key; did you mean 'title'|title: Field required",
        ),
    ],
)
def test_malformed_recipes_name_file_and_key(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"mine.toml: .*{message}|mine.toml: {message}"):
        recipes.load(str(path))


def test_unknown_recipes_suggest_others():
    with pytest.raises(UsageError, match="unknown recipe 'lenet'; did you mean 'lenet5'"):
        recipes.load("lenet")
    with pytest.raises(UsageError, match=r"cannot read recipe nowhere/mine.toml"):
        recipes.load("nowhere/mine.toml")


SUITE = """
name = "tiny"
datasets = ["digits"]
seeds = [0]
controls = ["base"]
base = "lenet5"
finetune = { recipe = "lenet5", epochs = 0 }
[[models]]
name = "lenet5"
size = 28
[[models]]
name = "lenet_300_100"
size = 28
base = { recipe = "lenet_300_100", epochs = 2 }
"""


def test_suites_name_recipes_and_override_single_settings():
    five, three = suites.parse(SUITE, "tiny.toml").cells()
    assert five.base == recipes.load("lenet5").recipe
    assert five.finetune.epochs == 0
    assert five.finetune.lr == five.base.lr
    assert three.base == recipes.load("lenet_300_100").recipe.model_copy(update={"epochs": 2})
    with pytest.raises(
        UsageError, match=r"tiny\.toml: base: unknown recipe 'lenet6'; did you mean 'lenet5'"
    ):
        suites.parse(SUITE.replace('base = "lenet5"', 'base = "lenet6"'), "tiny.toml")


def test_a_byte_order_mark_is_passed_over_and_other_encodings_are_named(tmp_path):
    path, text = (
        tmp_path / "mine.toml",
        'title = "größer"\r\n[recipe]\r\nepochs = 3\r\nlr = 0.1\r\n',
    )
    path.write_bytes(text.encode("utf-8-sig"))
    assert recipes.load(str(path)).title == "größer"
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(
        UsageError, match=r"cannot read recipe .*mine.toml: it is UTF-16.*save it as UTF-8"
    ):
        recipes.load(str(path))


def test_a_recipe_that_trains_needs_a_rate(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('title = "none"\n[recipe]\nepochs = 0\n')
    assert recipes.load(str(path)).recipe.epochs == 0
    path.write_text('title = "some"\n[recipe]\nepochs = 1\n')
    with pytest.raises(
        UsageError, match=r"mine.toml: recipe: lr: Field required, since there are epochs"
    ):
        recipes.load(str(path))
