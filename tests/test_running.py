"""Suites from Python, as in a notebook."""

import numpy as np
import pytest
import torch

import widthbench
from widthbench.data import sources
from widthbench.errors import UsageError
from widthbench.experiment.suites import matches

SUITE = {
    "name": "here",
    "datasets": ["digits"],
    "seeds": [0, 1],
    "budgets": ["macs:0.5"],
    "techniques": ["l1-norm", "random-channels"],
    "base": {"epochs": 2, "lr": 0.05, "batch_size": 64},
    "finetune": {"epochs": 0, "lr": 0.01},
    "models": [{"name": "lenet_300_100", "size": 8}],
}


@pytest.fixture(scope="module")
def board():
    return widthbench.run(SUITE, progress=False)


def test_a_mapping_is_run_and_gives_records_in_the_order_of_cells(board):
    assert [(r.cell.seed, r.cell.technique) for r in board] == [
        (seed, technique) for seed in (0, 1) for technique in ("base", "l1-norm", "random-channels")
    ]
    assert repr(board) == "<Results of here: 6 cells>"
    assert board[0].status == "done"
    assert not board.failed


def test_a_part_is_run_by_patterns_and_looked_up_where_it_is_known(board, monkeypatch):
    some = widthbench.run(SUITE, only="*-l1-norm-*", progress=False)
    assert [r.key for r in some] == [r.key for r in board if r.cell.technique == "l1-norm"]
    with pytest.raises(UsageError, match="no cell whose name is like"):
        widthbench.run(SUITE, only=["nobody"], progress=False)


def test_a_frame_has_a_row_for_each_cell(board):
    pandas = pytest.importorskip("pandas")
    frame = board.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 6
    one = frame[(frame.technique == "l1-norm") & (frame.seed == 1)].iloc[0]
    record = next(r for r in board if r.cell.technique == "l1-norm" and r.cell.seed == 1)
    assert one.top1 == record.row().top1
    assert one.macs == record.macs
    assert one.top1_resized == record.row("resized").top1


def test_tables_and_pictures(board):
    assert "| l1-norm" in board._repr_markdown_()
    assert "l1-norm" in str(board)
    assert "lenet_300_100 on digits" in str(board)
    figure = board.plot()
    assert [a.get_title() for a in figure.axes] == ["lenet_300_100 on digits"]
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="macs or params, not 'time'"):
        board.plot("time")


def test_results_are_written_where_asked_and_read_again(tmp_path, board):
    again = widthbench.run(SUITE, results=tmp_path, progress=False)
    assert (tmp_path / "here" / "leaderboard.md").is_file()
    assert sorted(r.key for r in widthbench.load(tmp_path / "here")) == sorted(r.key for r in again)
    with pytest.raises(UsageError, match="no results at"):
        widthbench.load(tmp_path / "nothing")


def test_published_results_are_read_by_name():
    assert len(widthbench.load("digits")) > 100


def test_patterns():
    name = "digits-lenet5-l1-norm-macs:0.25-s0"
    assert matches(name, [])
    assert matches(name, ["lenet5-l1"])
    assert matches(name, ["*-macs:0.25-*"])
    assert not matches(name, ["*-macs:0.2-*"])
    assert not matches(name, ["lenet5*"])  # a pattern is of the whole name


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDTHBENCH_DATA", str(tmp_path))
    sources.forget()
    yield tmp_path
    sources.forget()


def test_tensors_become_a_data_set_of_suites(data):
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    x = (torch.rand(120, 1, 8, 8) / 2 + (y / 4)[:, None, None, None]).clamp(0, 1)
    widthbench.add_data("levels", (x[:90], y[:90]), (x[90:], y[90:]))
    source = sources.load("levels")
    assert (source.classes, source.channels) == (3, 1)
    assert torch.equal(source.train.images, (x[:90] * 255).round().to(torch.uint8))
    assert sources.locate("levels") == (str(data / "levels"), "arrays")
    assert "levels" in sources.names()
    board = widthbench.run(SUITE | {"datasets": ["levels"], "seeds": [0]}, progress=False)
    assert board[0].row().top1 > 60
    before = source.digest
    widthbench.add_data("levels", (1 - x[:90], y[:90]), (x[90:], y[90:]))
    assert sources.load("levels").digest != before


def test_data_sets_of_torch_and_of_pictures_are_taken(data):
    from PIL import Image

    pictures = [(Image.fromarray(np.full((6, 5, 3), i, dtype=np.uint8)), i % 2) for i in range(8)]
    flat = torch.utils.data.TensorDataset(torch.zeros(4, 3, 6, 5), torch.tensor([0, 1, 1, 0]))
    widthbench.add_data("mixed", pictures, flat)
    source = sources.load("mixed")
    assert source.train.images.shape == (8, 3, 6, 5)
    assert source.train.images[3].unique().tolist() == [3]


def test_a_shuffled_source_keeps_its_labels(data):
    x = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 1, 4, 4)
    pairs = torch.utils.data.TensorDataset(x, torch.arange(30) % 3)
    loader = torch.utils.data.DataLoader(pairs, batch_size=None, shuffle=True)
    widthbench.add_data("shuffled", loader, pairs)
    train = sources.load("shuffled").train
    assert torch.equal(train.images[:, 0, 0, 0].long() % 3, train.labels)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((torch.zeros(4, 12, 12, 3), torch.zeros(4).long()), "look like .N, H, W, C."),
        ((torch.zeros(4, 1, 8, 8), torch.tensor([1, 2, 3, 1])), "labels of train must be 0 to K"),
        ((torch.zeros(4, 1, 0, 8), torch.zeros(4).long()), "images without pixels"),
        ((torch.randn(4, 1, 8, 8), torch.zeros(4)), "must lie between 0 and 1"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(3).long()), "not .N, C, H, W."),
        ((torch.zeros(4, 8, 8).int(), torch.zeros(4).long()), "make them uint8"),
        ((torch.zeros(4, 8, 8), torch.zeros(4)), "whole numbers from 0"),
        (7, "must be a pair"),
    ],
)
def test_what_is_no_data_is_refused_by_name(data, train, message):
    good = torch.zeros(4, 1, 8, 8), torch.zeros(4).long()
    with pytest.raises(UsageError, match=message):
        widthbench.add_data("mine", train, good)
    with pytest.raises(UsageError, match="name of a known data set"):
        widthbench.add_data("mnist", good, good)
