import numpy as np
import pytest
from made import DONE
from PIL import Image

from widthbench.experiment import suites
from widthbench.experiment.cell import Cell
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.records import Record
from widthbench.experiment.store import Store
from widthbench.recipe import Recipe
from widthbench.report import build, curves

SUITE = """
name = "tiny"
datasets = ["digits"]
seeds = [0, 1]
budgets = ["channels:0.5"]
controls = ["base"]
curves = true
techniques = [
  { id = "neuron-removal", params = { ranking = "oracle", samples = 50 } },
  { id = "neuron-removal", params = { ranking = "second_order", rerank = "single", samples = 50 } },
  { id = "neuron-removal", params = { ranking = "second_order", \
diagonal = "exact", rerank = "single", samples = 50 } },
]
[base]
epochs = 1
lr = 0.1
[finetune]
epochs = 0
lr = 0.1
[[models]]
name = "mlp_sigmoid"
args = { widths = [6, 5] }
size = 8
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    suite = suites.parse(SUITE, "tiny.toml")
    records = [run_cell(c, Store()) for c in suite.cells()]
    assert {r.status for r in records} == {"done"}
    folder = tmp_path_factory.mktemp("results")
    return build.build(suite, folder, Store(), time_shapes=False), records


def test_a_suite_with_curves_gets_a_page_and_figures(written):
    report, _ = written
    names = {str(p.relative_to(report.folder)) for p in report.files}
    errors = "figures/errors-digits-mlp_sigmoid-widths-6-5.png"
    assert {"curves.md", "figures/curves-accuracy.png", "figures/curves-loss.png", errors} <= names
    page = (report.folder / "curves.md").read_text()
    for name in names:
        if name.startswith(("figures/curves", "figures/errors")):
            assert f"({name})" in page
            with Image.open(report.folder / name) as image:
                assert image.width > 600
                assert (
                    len(
                        np.unique(
                            np.asarray(image).reshape(-1, np.asarray(image).shape[-1]), axis=0
                        )
                    )
                    > 50
                )


def test_the_table_says_what_the_records_say(written):
    report, records = written
    page = (report.folder / "curves.md").read_text()
    row = next(
        line
        for line in page.splitlines()
        if line.startswith("| second order, exact, samples=50, single")
    )
    cells = [c.strip() for c in row.split("|")[1:-1]]
    mine = [r for r in records if r.cell.params.get("diagonal")]
    assert cells[1].startswith(f"{np.mean([r.series['stop.removed'][0] for r in mine]):.1f} ±")
    assert cells[2].startswith(f"{np.mean([r.series['stop.top1'][0] for r in mine]):.2f} ±")
    # of 11 neurons, 40 % are 4.4: the last point with no more is that after four
    assert cells[4].startswith(f"{np.mean([r.series['path.top1'][4] for r in mine]):.2f} ±")
    assert cells[8].startswith(f"{np.mean([r.series['correlation'][0] for r in mine]):.3f} ±")
    assert cells[9] == "2"
    assert "–" in next(
        line for line in page.splitlines() if line.startswith("| oracle, samples=50")
    )


def path(values, channels, seed=0, budget="channels:0.5"):
    recipe = Recipe(epochs=1, lr=0.1)
    cell = Cell(
        dataset="digits",
        model="lenet5",
        size=28,
        technique="l1-norm",
        budget=budget,
        seed=seed,
        base=recipe,
        finetune=recipe,
    )
    series = {"path.channels": channels, "path.top1": values}
    return Record(key=f"{seed}{budget}", cell=cell, **DONE, access="none", series=series)


def test_paths_of_any_technique_are_drawn_on_a_common_grid(tmp_path):
    records = [path([90, 80, 10], [10, 5, 1]), path([92, 70], [10, 2], seed=1)]
    assert curves.has_curves(records)
    drawn = curves.write(records, tmp_path)
    assert [p.name for p in drawn] == ["curves-accuracy.png", "curves-loss.png"]
    page = curves.page(records, "x")
    row = next(line for line in page.splitlines() if line.startswith("| l1-norm"))
    assert [c.strip() for c in row.split("|")[2:-1]][:4] == [
        "–",
        "–",
        "91.00 ± 1.41",
        "91.00 ± 1.41",
    ]


def test_of_several_budgets_the_longest_path_is_shown(tmp_path):
    records = [
        path([90, 80], [10, 9]),
        path([90, 80, 70, 10], [10, 7, 5, 1], budget="channels:0.1"),
    ]
    row = next(
        line for line in curves.page(records, "x").splitlines() if line.startswith("| l1-norm")
    )
    assert "70.00" in row


@pytest.mark.parametrize(
    "odd",
    [([90, 80], [10, 5, 1]), ([90, 80], [0, 0]), ([90, 80], [5, 10])],
    ids=["too short", "no channels", "growing"],
)
def test_odd_paths_are_left_out(odd, tmp_path):
    assert not curves.has_curves([path(*odd)])
    records = [path([90, 80, 10], [10, 5, 1]), path(*odd, seed=1)]
    row = next(
        line for line in curves.page(records, "x").splitlines() if line.startswith("| l1-norm")
    )
    assert row.split("|")[-2].strip() == "1"
    assert len(curves.write(records, tmp_path)) == 2


def test_nothing_is_drawn_without_paths():
    assert not curves.has_curves([])
    assert not curves.has_curves([path([90], [])])
