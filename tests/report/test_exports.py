"""CSV, LaTeX and BibTeX say what the leaderboard says."""

import csv
import hashlib
import io
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from made import record, suite

from widthbench import cli
from widthbench.experiment import suites
from widthbench.experiment.records import read_records, write_records
from widthbench.report import exports
from widthbench.report.lines import lines, shape_of

ROOT = Path(__file__).resolve().parents[2]


def csv_rows(records, timings=()):
    return list(csv.DictReader(io.StringIO(exports.csv_text(lines(records, (), timings)))))


def test_csv_has_every_number_with_all_its_digits():
    some = [record(seed=s, top1=90.0 + s / 3) for s in range(3)]
    timing = {
        "dataset": "digits",
        "model": "lenet5",
        "shape": shape_of(some[0]),
        "speed_up": 1.5,
    }
    (row,) = csv_rows(some, [timing])
    tops = [90.0 + s / 3 for s in range(3)]
    assert float(row["top1_final_mean"]) == pytest.approx(statistics.fmean(tops), abs=1e-12)
    assert float(row["top1_final_std"]) == pytest.approx(statistics.stdev(tops), abs=1e-12)
    assert float(row["top1_resized_mean"]) == pytest.approx(statistics.fmean(tops) - 20, abs=1e-12)
    facts = {
        k: row[k]
        for k in (
            "dataset",
            "network",
            "technique",
            "data",
            "budget",
            "n",
            "status",
            "control",
            "top5_mean",
        )
    }
    assert facts == {
        "dataset": "digits",
        "network": "lenet5",
        "technique": "l1-norm",
        "data": "none",
        "budget": "macs:0.5",
        "n": "3",
        "status": "done",
        "control": "False",
        "top5_mean": "",
    }
    names = ("params", "macs", "compression", "speed_up_theory", "speed_up_measured", "train_cost")
    assert [float(row[k]) for k in names] == [500, 50, 2, 2, 1.5, pytest.approx(1.1)]


def test_what_has_no_number_is_empty_and_flags_are_columns():
    odd, failed = csv_rows(
        [record(status="failed"), record("nmf", met=False, coupled=True, floor=True)]
    )
    assert (
        failed["status"],
        failed["top1_final_mean"],
        failed["params"],
        failed["train_cost"],
    ) == ("failed", "", "", "")
    assert [odd[k] for k in ("budget_unused", "coupled", "below_floor", "batches_in_halves")] == [
        "True"
    ] * 3 + ["False"]


def test_text_is_no_formula_in_a_spreadsheet_and_what_was_not_run_has_a_row():
    text = exports.csv_text(
        lines([record("=HYPERLINK(1)")], suite(seeds=[0, 1], controls=[]).cells())
    )
    formula, unrun = csv.DictReader(io.StringIO(text))
    assert formula["technique"] == "'=HYPERLINK(1)"
    assert (unrun["technique"], unrun["status"], unrun["cells"], unrun["cells_done"]) == (
        "l1-norm",
        "not run",
        "2",
        "0",
    )


def test_only_sound_records_of_the_suite_are_cited(tmp_path, capsys):
    (tmp_path / "smoke").mkdir()
    path = tmp_path / "smoke" / "records.jsonl"
    (cell, *_) = suites.load("smoke").cells()
    for records, said in (
        ([record(cell=cell), record(cell=cell)], "a second record of"),
        ([record()], "suite 'smoke' has no such cell as digits-lenet5-l1-norm"),
    ):
        write_records(path, records)
        assert cli.main(["cite", "smoke", "--results", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
        assert cli.main(["report", "--site", "--results", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    path.write_text("")
    assert cli.main(["cite", "smoke", "--results", str(tmp_path)]) == 0
    assert "no results of its own yet" in capsys.readouterr().out


def test_csv_agrees_with_the_committed_leaderboard():
    records = read_records(ROOT / "results" / "published" / "lenet-public" / "records.jsonl")
    page = (ROOT / "results" / "published" / "lenet-public" / "leaderboard.md").read_text()
    rows = csv_rows(records)
    assert len(rows) == len(lines(records))
    merged = [
        r
        for r in rows
        if r["technique"] == "neuron-merging" and r["budget"].startswith("channels:0.5")
    ]
    assert merged
    for row in merged:
        assert f"{float(row['top1_resized_mean']):.2f}" in page


def test_latex_escapes_and_has_a_table_for_each_network():
    text = exports.latex_text(
        suite(),
        lines(
            [record(seed=s, top1=90.0 + s) for s in range(2)] + [record("random_100%&", top1=1.0)]
        ),
    )
    assert text.count(r"\begin{table}") == 1
    assert r"random\_100\%\&" in text
    assert r"90.50 $\pm$ 0.71" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\hline")] == [
        1,
        1,
        1,
        0,
    ]
    assert r"\label{tab:s-lenet5-digits}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(tmp_path):
    body = exports.latex_text(suite(), lines([record(seed=s) for s in range(2)]))
    (tmp_path / "a.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
        + body
        + "\\end{document}\n"
    )
    subprocess.run(
        ["pdflatex", "-interaction=batchmode", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True
    )


def test_citations_name_version_commit_digest_and_each_paper_once():
    text = exports.citation(suites.load("lenet-public"), [record()], "ab" * 32)
    assert text.count("@misc{widthbench-lenet-public,") == 1
    assert "commit abc" in text
    assert "SHA-256 of the records " + "ab" * 32 in text
    assert text.count("@inproceedings{kim2020neuron,") == 1
    assert "year = {2026}" in text
    assert "smoke" not in text
    smoke = exports.citation(suites.load("smoke"), [], None)
    assert smoke.startswith("% smoke is a smoke suite: its numbers are not for citation.")
    assert "no results of its own yet" in smoke
    assert "% random-channels: names no paper" in smoke


def test_entries_are_balanced_and_have_keys():
    for name in suites.names():
        for text in exports.entries(suites.load(name)).values():
            assert text.count("{") == text.count("}")
            assert not text or text.lstrip().startswith("@")


def test_the_command_cites_what_lies_in_the_results(tmp_path, capsys):
    folder = tmp_path / "smoke"
    folder.mkdir()
    (cell, *_) = suites.load("smoke").cells()
    write_records(folder / "records.jsonl", [record(cell=cell)])
    assert cli.main(["cite", "smoke", "--results", str(tmp_path)]) == 0
    assert (
        hashlib.sha256((folder / "records.jsonl").read_bytes()).hexdigest()
        in capsys.readouterr().out
    )
    assert cli.main(["cite", "smokey"]) == 2
    assert "smoke" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\r\n", " =", "\t@"])
def test_no_name_becomes_a_formula_or_breaks_a_line(start):
    one = record()
    odd = one.model_copy(
        update={"cell": one.cell.model_copy(update={"dataset": f"{start}cmd\rx\u2028y"})}
    )
    text = exports.csv_text(lines([odd]))
    assert len(text.splitlines()) == 2
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["dataset"].startswith("'")
    assert row["dataset"].isprintable()
    assert len(exports.latex_text(suite(), lines([odd])).splitlines()) == len(
        exports.latex_text(suite(), lines([one])).splitlines()
    )
