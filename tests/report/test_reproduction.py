"""Two machines that were made up: what one published, what the other measures, and what is then
shown."""

import shutil
import threading
import time

import pytest
from made import WHERE, record, suite

from widthbench import cli
from widthbench.errors import UsageError
from widthbench.experiment import suites
from widthbench.experiment.records import read_records, write_records
from widthbench.experiment.store import Store
from widthbench.report import build, reproduction, tables

THEIRS = {
    **WHERE,
    "hardware": {"cpu": "Their Processor", "cores": 64},
    "when": "2026-01-01T00:00:00+00:00",
}
OURS = {
    **WHERE,
    "hardware": {"cpu": "Our Processor", "cores": 2},
    "when": "2026-02-01T00:00:00+00:00",
}


@pytest.fixture
def made():
    return suite(techniques=["l1-norm"], controls=[], seeds=[0, 1, 2])


@pytest.fixture
def published(made, tmp_path, monkeypatch):
    """Their records, published: 80, 81 and 82 %."""
    folder = tmp_path / "repository" / "results" / "published"
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "pyproject.toml").write_text("")
    monkeypatch.setattr(build, "published_dir", lambda: folder)
    records = [
        record(cell=c, key=f"key{c.seed}", top1=80.0 + c.seed, provenance=THEIRS)
        for c in made.cells()
    ]
    write_records(folder / made.name / "records.jsonl", records)
    return records


def ours(made, top1=(80.0, 81.5, 83.0), **changes):
    cells = zip(made.cells(), top1, strict=True)
    return [
        record(cell=c, key=f"key{c.seed}", top1=t, provenance=OURS, **changes) for c, t in cells
    ]


def built(made, tmp_path, fresh=(), store=None, **options):
    return build.build(
        made,
        tmp_path / "results",
        store or Store(tmp_path / "cells"),
        time_shapes=False,
        fresh=fresh,
        **options,
    )


def test_a_run_shows_what_it_measured_and_compares_it_with_what_was_published(
    made, published, tmp_path
):
    report = built(made, tmp_path, ours(made))
    assert read_records(report.folder / "records.jsonl") == report.records == ours(made)
    assert "81.50 ± 1.50" in report.text
    assert "81.00 ± 1.00" not in report.text
    assert "Our Processor" in report.text
    assert "Their Processor" not in report.text + (report.folder / "leaderboard.md").read_text()
    assert "Their Processor" in report.reproduction
    assert "1 of 3 cells are equal bit by bit, 1 have the same test top-1" in report.reproduction
    assert "by +0.50 at most (l1-norm" in report.reproduction
    page = (report.folder / "reproduction.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| l1-norm")]
    cells = [c.strip() for c in row.strip("|").split("|")]
    assert cells[2:] == ["81.00 ± 1.00", "81.50 ± 1.50", "+0.50", "+0.4", "+1.00", "1 of 3"]
    assert "| hardware " in page
    for name in (
        "Their Processor",
        "Our Processor",
        "1 of 1 rows lie within one standard deviation",
    ):
        assert name in page
    assert (
        read_records(build.published_dir() / made.name / "records.jsonl") == published
    )  # it stays as it is


def test_a_report_shows_what_this_machine_computed_not_a_record_of_the_same_key(
    made, published, tmp_path, monkeypatch
):
    store = Store(tmp_path / "cells")
    for one in ours(made):
        store.put(one)
    keys = {r.cell.identity: r.key for r in ours(made)}
    monkeypatch.setattr(build.keys, "cell_key", lambda cell: keys[cell.identity])
    write_records(
        tmp_path / "results" / made.name / "records.jsonl", published
    )  # a folder that somebody copied here
    assert [r.key for r in published] == list(keys.values())
    assert built(made, tmp_path, store=store).records == ours(made)


def test_a_run_whose_cells_fail_shows_that_and_loses_nothing(made, published, tmp_path):
    first = built(made, tmp_path, ours(made))
    failing = [
        r.model_copy(update={"status": "failed", "reason": "took 5 MiB", "rows": ()})
        for r in ours(made)[:2]
    ]
    with pytest.warns(
        UserWarning, match="2 cells failed that had results|2 earlier records are kept in"
    ):
        report = built(made, tmp_path, failing)
    assert [r.status for r in report.records] == ["failed", "failed", "done"]
    assert len(report.failed) == 2
    assert "1 of 3 cells done, 2 failed" in report.text
    assert "(2 of 3 failed)" in report.text
    assert "(2 of 3 failed)" in (report.folder / "reproduction.md").read_text()
    kept = read_records(report.folder / build.ASIDE)
    assert kept == first.records[:2]
    again = built(made, tmp_path, ours(made))
    assert not again.failed
    assert read_records(report.folder / build.ASIDE) == kept


def test_a_row_of_failures_says_how_many(made, tmp_path):
    failing = [
        r.model_copy(update={"status": "failed", "reason": "training diverged", "rows": ()})
        for r in ours(made)
    ]
    page = tables.leaderboard(made, failing, [], 3)
    assert "3 of 3 failed" in page
    assert page.count("training diverged") == 3


def test_a_suite_of_the_same_name_with_other_cells_drops_nothing_in_silence(made, tmp_path):
    built(made, tmp_path, ours(made))
    other = suite(techniques=["l1-norm"], controls=[], seeds=[7])
    with pytest.warns(
        UserWarning,
        match=f"3 earlier records in .* are of cells that suite '{made.name}' does not "
        f"have|are kept in",
    ):
        report = built(other, tmp_path, [record(cell=other.cells()[0], provenance=OURS)])
    assert len(report.records) == 1
    assert read_records(report.folder / build.ASIDE) == ours(made)


def test_two_suites_of_one_name_in_a_call_are_refused(tmp_path, capsys):
    text = (suites.files("widthbench._suites") / "smoke.toml").read_text()
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "b.toml").write_text(text.replace("epochs = ", "epochs = 1"))
    for verb in ("run", "report"):
        assert (
            cli.main(
                [
                    verb,
                    str(tmp_path / "a.toml"),
                    str(tmp_path / "b.toml"),
                    "--results",
                    str(tmp_path),
                ]
            )
            == 2
        )
        assert "two different suites are named 'smoke', the second in" in capsys.readouterr().err
    assert [s.name for s in suites.load_all(["smoke", "digits", "smoke"])] == ["smoke", "digits"]


def test_two_runs_into_one_folder_keep_the_cells_of_both(made, tmp_path, monkeypatch):
    slow = build.collect

    def later(*args, **options):
        found = slow(*args, **options)
        time.sleep(0.3)  # what another run writes meanwhile must not be lost
        return found

    monkeypatch.setattr(build, "collect", later)
    (tmp_path / "results" / made.name).mkdir(parents=True)
    runs = [
        threading.Thread(target=built, args=(made, tmp_path, [r], Store(tmp_path / str(i))))
        for i, r in enumerate(ours(made))
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert read_records(tmp_path / "results" / made.name / "records.jsonl") == ours(made)


def test_what_was_measured_is_published_cell_by_cell(made, published, tmp_path):
    built(made, tmp_path, ours(made)[1:])
    files = build.publish(made, tmp_path / "results")
    folder = build.published_dir() / made.name
    assert read_records(folder / "records.jsonl") == [published[0], *ours(made)[1:]]
    assert {f.parent for f in files} >= {folder}
    assert not (folder / "reproduction.md").exists()
    assert "Their Processor; Our Processor" in (folder / "leaderboard.md").read_text().replace(
        "Our Processor; Their Processor", "Their Processor; Our Processor"
    )
    shutil.rmtree(tmp_path / "results")
    build.publish(made, tmp_path / "results")  # the pages anew
    with pytest.raises(UsageError, match="has no results"):
        build.publish(suite(name="another"), tmp_path / "results")


def test_an_installed_package_is_not_written_to(made, published, tmp_path):
    (tmp_path / "repository" / "pyproject.toml").unlink()
    with pytest.raises(UsageError, match="publish from a checkout"):
        build.publish(made, tmp_path / "results")


def test_nothing_is_compared_where_nothing_was_published(made, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "published_dir", lambda: tmp_path / "nowhere")
    report = built(made, tmp_path, ours(made))
    assert report.reproduction == ""
    assert not (report.folder / "reproduction.md").exists()


def test_equal_means_everything_that_was_measured():
    one = record(provenance=THEIRS)
    assert reproduction.equal(one, one.model_copy(update={"key": "b" * 40, "provenance": OURS}))
    for change in ({"params": one.params + 1}, {"series": {"loss": [0.1]}}, {"status": "failed"}):
        assert not reproduction.equal(one, one.model_copy(update=change))
