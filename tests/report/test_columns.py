"""One table of columns: what is added there is in every format and in the legend."""

import csv
import io
import re

from made import record, suite

from widthbench.report import columns, exports, site, tables
from widthbench.report.lines import lines
from widthbench.report.site import Shown


def test_a_new_column_is_in_markdown_csv_latex_page_and_legend(monkeypatch):
    images = columns.Column(
        "images",
        lambda line: line.first().rows[-1].samples,
        "test images",
        paper="images",
        note="*Test images* are those that top-1 is over.",
    )
    with monkeypatch.context() as patched:
        for module in (columns, exports):
            patched.setattr(module, "COLUMNS", (*columns.COLUMNS, images))
        made, some = suite(), [record()]
        page = tables.leaderboard(made, some, [], 9)
        (row,) = csv.DictReader(io.StringIO(exports.csv_text(lines(some))))
        paper = exports.latex_text(made, lines(some))
        html = site.html([Shown("s", made, some, [], "")])
    assert "test images |" in page
    assert "*Test images* are those that top-1 is over." in page
    assert row["images"] == "9"
    assert re.search(r"& +images", paper)
    assert '<th scope="col" class="num">test images</th>' in html
    assert "Test images are those that top-1 is over." in html
    *_, line = [ln for ln in page.splitlines() if ln.startswith("| l1-norm")]
    assert line.rstrip("| ").endswith("9")


def test_what_has_a_column_but_no_number_says_why_once():
    failed = columns.cells_of(lines([record(status="failed")])[0], columns.for_people([]))
    words = {column.name: text for column, text in failed}
    assert words["technique"] == "l1-norm"
    assert words["top1_resized"] == "1 of 1 failed"
    assert {words[c.name] for c, _ in failed if c.number and c.name != "top1_resized"} == {""}


def test_names_are_unique_and_whatever_is_shown_has_a_heading():
    names = [c.name for c in columns.COLUMNS]
    assert len(set(names)) == len(names)
    assert all(c.title for c in columns.COLUMNS if c.paper or c.optional)
