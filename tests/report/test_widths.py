"""The figure of widths shows what records say, at the middle budget."""

import numpy as np
import pytest
from made import record
from matplotlib.figure import Figure

from widthbench.report import widths
from widthbench.report.lines import lines

BASE = {"a": 10, "b2": 20, "b10": 30}


def made(technique, seed=0, budget="macs:0.25", kept=(5, 10, 15), **changes):
    return record(
        technique,
        seed,
        budget=budget,
        widths=dict(zip(BASE, kept, strict=True)),
        base_widths=BASE,
        **changes,
    )


def test_cells_are_mean_shares_of_the_base():
    block = lines(
        [
            made("l1-norm", 0, kept=(4, 10, 15)),
            made("l1-norm", 1, kept=(6, 10, 30)),
            made("nmf", kept=(10, 20, 30)),
        ]
    )
    place = Figure().subplots()
    picture = widths._panel(place, block, widths._groups(block))
    shares = dict(
        zip(
            [t.get_text() for t in place.get_yticklabels()],
            np.asarray(picture.get_array()),
            strict=True,
        )
    )
    assert list(shares["base"]) == [1, 1, 1]
    assert list(shares["l1-norm"]) == pytest.approx([0.5, 0.5, 0.75])
    assert list(shares["nmf"]) == [1, 1, 1]
    assert [t.get_text() for t in place.get_xticklabels()] == ["a", "b2", "b10"]
    assert [t.get_text() for t in place.texts[3:6]] == ["5", "10", "22"]  # 22.5 to even


def test_the_middle_budget_is_drawn_and_controls_with_a_source_are_not(tmp_path):
    block = lines([made("l1-norm", budget=f"macs:{b}") for b in (0.5, 0.25, 0.125)])
    assert {line.budget for line in widths._at_middle(block)} == {"macs:0.25"}
    scratch = made("scratch")
    cell = scratch.cell.model_copy(update={"of": "l1-norm"})
    scratch = scratch.model_copy(update={"cell": cell})
    assert widths.write([scratch], tmp_path) == []
    assert widths.write([record()], tmp_path) == []
    (path,) = widths.write([made("l1-norm"), scratch], tmp_path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_group_that_a_record_does_not_name_is_left_blank():
    one = made("splitting").model_copy(update={"widths": {"a": 5}})
    line = lines([one])[0]
    assert widths._mean(line, "a") == 5
    assert np.isnan(widths._mean(line, "b2"))


@pytest.mark.parametrize("many", [3, 30, 90])
def test_any_number_of_groups_is_drawn(tmp_path, many):
    base = {f"layer{i}": 8 for i in range(many)}
    one = record(widths=dict.fromkeys(base, 4), base_widths=base)
    (path,) = widths.write([one], tmp_path)
    assert path.stat().st_size > 5000
