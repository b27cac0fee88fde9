import numpy as np
import pytest
from PIL import Image

from widthbench.experiment import suites
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store
from widthbench.report import build, trajectories

SUITE = """
name = "tiny"
datasets = ["digits"]
seeds = [0, 1]
budgets = ["macs:0.5", "macs:0.25"]
techniques = [
  "l1-norm",
  { id = "autoprune", params = { epochs = 1 } },
  { id = "autoprune", params = { epochs = 1, decoupling = "none" } },
  { id = "autoslim", params = { epochs = 1, steps = 3, least = 0.25 } },
]
[base]
epochs = 1
batch_size = 32
lr = 0.02
[finetune]
epochs = 0
lr = 0.02
[[models]]
name = "lenet_300_100"
size = 16
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    suite = suites.parse(SUITE, "tiny.toml")
    records = [run_cell(c, Store()) for c in suite.cells()]
    assert {r.status for r in records} == {"done"}, [r.reason for r in records]
    return build.build(
        suite, tmp_path_factory.mktemp("results"), Store(), time_shapes=False
    ), records


def test_a_figure_for_each_technique_that_notes_where_it_is(written):
    report, _ = written
    names = {str(p.relative_to(report.folder)) for p in report.files}
    drawn = {n for n in names if "trajectory" in n}
    assert drawn == {"figures/trajectory-autoprune.png", "figures/trajectory-autoslim.png"}
    page = (report.folder / "trajectories.md").read_text()
    for name in drawn:
        assert f"({name})" in page
        with Image.open(report.folder / name) as image:
            assert image.width > 600
            assert (
                len(np.unique(np.asarray(image).reshape(-1, np.asarray(image).shape[-1]), axis=0))
                > 50
            )


def test_the_table_says_what_the_records_say_at_the_smallest_budget(written):
    report, records = written
    rows = [
        line
        for line in (report.folder / "trajectories.md").read_text().splitlines()
        if "autoprune(epochs=1)" in line
    ]
    assert len(rows) == 1
    cells = [c.strip() for c in rows[0].split("|")]
    mine = [
        r
        for r in records
        if r.cell.params == {"epochs": 1}
        and r.cell.technique == "autoprune"
        and r.cell.budget == "macs:0.25"
    ]
    recoveries = [r.series["trajectory.recoveries"][-1] for r in mine]
    least = [min(c for c in r.series["trajectory.cosine"] if c is not None) for r in mine]
    assert cells[3] == "macs:0.25"
    open_, macs, returned = (
        [r.series[f"trajectory.{n}"][-1] for r in mine] for n in ("open", "macs", "returned")
    )
    assert cells[4] == f"{np.mean(open_):.0f} ± {np.std(open_, ddof=1):.0f}"
    assert cells[5] == f"{np.mean(macs):.3f} ± {np.std(macs, ddof=1):.3f}"
    assert cells[6] == f"{np.mean(recoveries):.0f} ± {np.std(recoveries, ddof=1):.0f}"
    assert cells[7] == f"{np.mean(returned):.0f} ± {np.std(returned, ddof=1):.0f}"
    assert cells[8] == f"{np.mean(least):.3f} ± {np.std(least, ddof=1):.3f}"
    assert cells[-2] == "2"  # no val accuracy without curves: that column is left out


def test_a_panel_for_each_quantity_with_the_mean_of_the_bases(written, monkeypatch):
    figures = []
    monkeypatch.setattr(trajectories, "save", lambda figure, path: figures.append(figure) or path)
    trajectories.write(written[1], written[0].folder)
    places = figures[0].axes
    assert [p.get_title().splitlines()[-1] for p in places] == [
        trajectories.NAMES[n] for n in ("open", "macs", "val_loss", "recoveries", "cosine")
    ]
    assert places[0].get_title().startswith("lenet_300_100 on digits\n")
    key = figures[0]._suptitle.get_text()
    assert "of training dashed" in key
    assert "dotted: gates frozen" in key
    labels = [t.get_text() for t in places[2].yaxis.get_ticklabels() if t.get_text()]
    assert len(labels) > 1
    block = trajectories._blocks(written[1])["autoprune"]["digits", "lenet_300_100"]
    records = list(block[0].records.values())
    solid = places[1].lines[0]
    at_the_end = np.mean([r.series["trajectory.macs"][-1] for r in records])
    assert solid.get_ydata()[-1] == pytest.approx(at_the_end)
    dashed = [line for line in places[2].lines if line.get_linestyle() == "--"]
    assert [d.get_ydata()[-1] for d in dashed] == pytest.approx(
        [
            np.mean([r.series["trajectory.loss"][-1] for r in line.records.values()])
            for line in block
        ]
    )
    dotted = {line.get_xdata()[0] for line in places[0].lines if line.get_linestyle() == ":"}
    assert dotted == {
        100
        * round(0.75 * records[0].series["trajectory.step"][-1])
        / records[0].series["trajectory.step"][-1]
    }
    cosine = places[4].collections[0].get_paths()[0].vertices[:, 1]
    assert cosine.max() <= 1


def test_lines_are_named_by_what_tells_them_apart(written):
    block = trajectories._blocks(written[1])["autoprune"]["digits", "lenet_300_100"]
    assert {
        line.label: name for line, name in zip(block, trajectories._short(block), strict=True)
    } == {
        "autoprune(epochs=1)": "autoprune",
        "autoprune(decoupling=none,epochs=1)": "decoupling=none",
    }


def test_records_without_trajectories_get_no_page(written):
    _, records = written
    assert not trajectories.has_trajectories([r for r in records if r.cell.technique == "l1-norm"])
    assert trajectories.has_trajectories(records)


def test_networks_that_grow_show_the_channels_of_each_layer(tmp_path, monkeypatch):
    text = SUITE.replace(
        '"l1-norm",', '{ id = "splitting", params = { epochs = 0.25, rounds = 3, samples = 64 } },'
    )
    cells = [
        c
        for c in suites.parse(text, "tiny.toml").cells()
        if c.technique == "splitting" and c.budget == "macs:0.25"
    ]
    records = [run_cell(c, Store()) for c in cells]
    assert {r.status for r in records} == {"done"}, [r.reason for r in records]
    figures = []
    monkeypatch.setattr(trajectories, "save", lambda figure, path: figures.append(figure) or path)
    trajectories.write(records, tmp_path)
    first, second, _ = figures[0].axes
    assert first.get_title().endswith("\nchannels per layer")
    assert second.get_title() == "open channels"
    assert "dashed" not in figures[0]._suptitle.get_text()
    ends = {t.get_text(): t.get_position()[1] for t in first.texts}
    assert set(ends) == set(records[0].widths)
    drawn = sorted(line.get_ydata()[-1] for line in first.lines)
    assert drawn == pytest.approx(
        sorted(np.mean([r.widths[n] for r in records]) for n in records[0].widths)
    )
