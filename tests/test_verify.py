"""Edits, truncations and numbers that no run gives are found; what was run is equal bit by bit when it is run again."""

import json
import subprocess
from pathlib import Path

import pytest

from widthbench import cli, suites, verify
from widthbench.records import digest_of, read_records, write_records

SUITE = """
name = "tiny"
datasets = ["digits"]
seeds = [0]
budgets = ["channels:0.5"]
techniques = ["l1-norm", "random-channels"]
device = "cpu"
[base]
epochs = 1
lr = 0.05
[finetune]
epochs = 1
lr = 0.01
[[models]]
name = "lenet_300_100"
size = 8
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    (folder / "tiny.toml").write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WIDTHBENCH_CACHE", str(folder / "cache"))
        assert cli.main(["run", str(folder / "tiny.toml"), "--results", str(folder / "results")]) == 0
    return folder


@pytest.fixture
def results(ran, tmp_path, monkeypatch):
    """A copy of the results, to damage."""
    subprocess.run(["cp", "-r", ran / "results", ran / "tiny.toml", tmp_path], check=True)
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(ran / "cache"))
    return tmp_path


def check(results, *args):
    return cli.main(["verify", str(results / "tiny.toml"), "--results", str(results / "results"), *args])


def bad(results):
    suite = suites.load(str(results / "tiny.toml"))
    return [c for c in verify.check_files(suite, results / "results" / "tiny") if not c.ok]


def records_file(results):
    return results / "results" / "tiny" / "records.jsonl"


def resealed(results, change):
    """The records after a change by someone who also mends every digest."""
    path = records_file(results)
    records = [r for r in map(change, read_records(path)) if r is not None]
    write_records(path, records)
    resummed(path)


def resummed(path, *, tables=True):
    """SHA256SUMS as somebody would write it who has changed files, tables made anew."""
    sums = path.parent / verify.SUMS
    if tables:
        suite = suites.load(str(path.parents[2] / "tiny.toml"))
        timings = [json.loads(line) for line in path.with_name("timings.jsonl").read_text().splitlines()]
        for name, text in verify.leaderboards(suite, read_records(path), timings, verify.file_digest(path)).items():
            path.with_name(name).write_text(text)
    lines = [f"{verify.file_digest(path.parent / n)}  {n}" for n in (ln.partition("  ")[2] for ln in sums.read_text().splitlines())]
    sums.write_text("\n".join(lines) + "\n")


def better(record):
    rows = tuple(r.model_copy(update={"top1": r.top1 + 0.01}) for r in record.rows)
    return record.model_copy(update={"rows": rows})


def test_cells_run_again_are_equal_bit_by_bit(results, capsys):
    assert check(results, "--sample", "2") == 0
    out = capsys.readouterr()
    assert out.out.count("bit-equal") == 2
    assert "all " in out.out
    assert not list(results.glob("**/widthbench-verify-*"))


def test_the_sums_are_as_sha256sum_reads_them(results):
    subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=records_file(results).parent, check=True)


def test_one_changed_digit_is_found_and_named(results, capsys):
    path = records_file(results)
    lines = path.read_text().splitlines()
    number = json.loads(lines[1])["rows"][0]["loss"]
    lines[1] = lines[1].replace(str(number), str(number)[:-1] + str((int(str(number)[-1]) + 1) % 10))
    path.write_text("\n".join(lines) + "\n")
    assert {"records.jsonl", "records.jsonl:2"} <= {c.what for c in bad(results)}
    assert check(results, "--sample", "0") == 1
    assert "was changed after it was written" in capsys.readouterr().out
    assert cli.main(["cite", str(results / "tiny.toml"), "--results", str(results / "results")]) == 2
    assert "records.jsonl:2" in capsys.readouterr().err


def test_a_number_changed_with_all_its_digests_is_found_by_running_the_cell_again(results, capsys):
    resealed(results, better)
    assert bad(results) == []
    assert check(results, "--sample", "0") == 0
    capsys.readouterr()
    assert check(results, "--only", "l1-norm") == 1
    assert "rows[0].top1: recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda p: p.write_text("".join(p.read_text().splitlines(keepends=True)[:-1])), "was changed after"),
        (lambda p: p.write_text(p.read_text()[:-40]), "not a record"),
        (lambda p: p.write_bytes(p.read_bytes()[:900] + b"\xff" + p.read_bytes()[901:]), "records.jsonl:1"),
        (lambda p: p.write_text(p.read_text() + p.read_text()), "more than one record"),
        (lambda p: p.with_name("SHA256SUMS").unlink(), "there is none"),
        (lambda p: p.with_name("leaderboard.md").unlink(), "the file is gone"),
        (lambda p: p.with_name("SHA256SUMS").write_text("00  ../../tiny.toml\n"), "not a line of digest and file"),
        (lambda p: p.with_name("SHA256SUMS").write_text(""), "is not in SHA256SUMS"),
        (lambda p: p.with_name("extra.md").write_text("x"), "extra.md is not in SHA256SUMS"),
        (lambda p: p.with_name("SHA256SUMS").write_text("00  a\0b\n"), "not a line of digest and file"),
        (lambda p: p.with_name("SHA256SUMS").write_text("00  " + "x" * 5000 + "\n"), "not a line of digest and file"),
        (lambda p: p.with_name("SHA256SUMS").write_text("00  figures\n"), "not a line of digest and file"),
        (lambda p: p.with_name("timings.jsonl").write_text("{"), "timings.jsonl cannot be read"),
    ],
)
def test_damage_is_found(results, damage, found):
    damage(records_file(results))
    assert any(found in f"{c.what} {c.note}" for c in bad(results)), bad(results)


def test_records_without_digests_are_refused(results):
    path = records_file(results)
    lines = [{k: v for k, v in json.loads(line).items() if k != "digest"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sum("carries no digest" in c.note for c in bad(results)) == 3
    with pytest.raises(verify.UsageError, match=r"records.jsonl:1: .* carries no digest"):
        read_records(path)


def test_a_table_that_was_changed_with_its_sum_is_found(results):
    path = records_file(results)
    board = path.with_name("leaderboard.md")
    (one, *_) = [line for line in board.read_text().splitlines() if line.startswith("| l1-norm")]
    board.write_text(board.read_text().replace(one, one.replace("**", "**9", 1)))
    resummed(path, tables=False)
    assert [(c.what, c.by) for c in bad(results)] == [("leaderboard.md", "table")]


def test_records_of_other_cells_are_found_and_missing_ones_said(results):
    def longer(record):
        if record.cell.technique == "random-channels":
            return None
        if record.cell.technique != "l1-norm":
            return record
        return record.model_copy(update={"cell": record.cell.model_copy(update={"calibration": 7})})

    resealed(results, longer)
    suite = suites.load(str(results / "tiny.toml"))
    checks = verify.check_files(suite, records_file(results).parent)
    assert [c.note for c in checks if not c.ok] == [
        "1 records are of cells that the suite does not have, the first of digits-lenet_300_100-l1-norm-channels:0.5-s0"
    ]
    assert any("2 cells of the suite have none" in c.note for c in checks)


def test_a_competitor_that_is_said_to_have_failed_is_found(results, capsys):
    resealed(
        results, lambda r: r.model_copy(update={"status": "failed", "reason": "broke"} if r.cell.technique == "l1-norm" else {})
    )
    assert check(results, "--sample", "0") == 0
    assert check(results, "--only", "l1-norm") == 1
    assert "recorded failed, now done" in capsys.readouterr().out


@pytest.mark.parametrize("excuse", [{"key": "0" * 40}, {"hardware": {"cpu": "another"}}])
def test_what_no_machine_changes_cannot_be_excused(results, capsys, excuse):
    def edited(record):
        where = {**record.provenance, **{k: v for k, v in excuse.items() if k == "hardware"}}
        rows = tuple(r.model_copy(update={"samples": 1}) for r in record.rows)
        return record.model_copy(update={"provenance": where, "rows": rows, "params": 10, "key": excuse.get("key", record.key)})

    resealed(results, edited)
    assert check(results, "--only", "l1-norm") == 1
    out = capsys.readouterr().out
    assert "samples[0]: recorded 1, now 450" in out or "rows[0].samples: recorded 1, now 450" in out


def test_a_report_takes_over_what_is_sound_and_keeps_the_rest_aside(results, monkeypatch):
    path = records_file(results)
    before = read_records(path)
    changed = path.read_text().replace('"top1": ', '"top1": 1', 1)
    path.write_text(changed)
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(results / "empty"))
    with pytest.warns(UserWarning, match=r"1 of 3 earlier records .*records.jsonl:1 .*records.damaged.jsonl"):
        assert cli.main(["report", str(results / "tiny.toml"), "--results", str(results / "results")]) == 0
    assert read_records(path) == before[1:]
    assert path.with_name("records.damaged.jsonl").read_text() == changed


def test_elsewhere_a_rerun_must_lie_within_the_tolerance(ran):
    (_, old, _) = read_records(ran / "results" / "tiny" / "records.jsonl")
    assert verify.compare(old, old).by == "bit-equal"
    clean = old.model_copy(update={"provenance": {**old.provenance, "dirty": False}})
    assert "key: recorded" in verify.compare(clean, clean.model_copy(update={"key": "0" * 40})).note  # nothing explains it
    elsewhere = {**old.provenance, "commit": "0" * 40, "dirty": False}
    other = old.model_copy(update={"key": "0" * 40, "provenance": elsewhere})
    assert verify.compare(old, other) == verify.Check(old.cell.id, "tolerance", True, verify.compare(old, other).note)
    assert "other code or data" in verify.compare(old, other).note
    last = old.rows[-1]
    allowed = verify.tolerance(last.top1, last.samples)
    for apart, holds in ((0.99 * allowed, True), (1.01 * allowed, False)):
        rows = (*old.rows[:-1], last.model_copy(update={"top1": last.top1 - apart}))
        assert verify.compare(old, other.model_copy(update={"rows": rows})).ok is holds
    assert not verify.compare(old, other.model_copy(update={"macs": int(old.macs * 1.06)})).ok
    assert not verify.compare(old, other.model_copy(update={"status": "failed", "reason": "broke"})).ok
    gpu = old.model_copy(update={"provenance": {**old.provenance, "hardware": {"gpu": "H200"}}})
    assert "other hardware" in verify.compare(gpu, old).note


def test_the_tolerance_is_a_point_or_three_standard_errors():
    assert verify.tolerance(93.4, 10_000) == pytest.approx(3 * 100 * (2 * 0.934 * 0.066 / 10_000) ** 0.5)
    assert verify.tolerance(93.4, 10_000) > 1
    assert verify.tolerance(99.9, 50_000) == 1.0
    assert verify.tolerance(100.0, 9) == 1.0


def test_the_sample_is_the_same_for_one_seed_and_spares_nothing(ran):
    records = read_records(ran / "results" / "tiny" / "records.jsonl")
    many = [r.model_copy(update={"cell": r.cell.model_copy(update={"seed": s})}) for r in records for s in range(20)]
    drawn = verify.sample(many, 10)
    assert drawn == verify.sample(many[::-1], 10)
    assert drawn != verify.sample(many, 10, seed=1)
    assert len({r.cell.id for r in drawn}) == 10
    assert verify.sample(many, None) == verify.sample(many, 99)
    assert len(verify.sample([r.model_copy(update={"status": "failed"}) for r in records], 2)) == 2
    with pytest.raises(verify.UsageError, match="nothing can be run again"):
        verify.sample([], 3)


def test_a_rerun_leaves_no_trace_in_the_cache_or_the_environment(results, ran, monkeypatch):
    before = sorted(p for p in (ran / "cache").rglob("*") if p.is_file())
    suite = suites.load(str(results / "tiny.toml"))
    (found,) = verify.rerun(suite, read_records(records_file(results))[:1])
    assert found.ok
    assert sorted(p for p in (ran / "cache").rglob("*") if p.is_file()) == before
    assert verify.os.environ["WIDTHBENCH_CACHE"] == str(ran / "cache")


def test_digests_do_not_hang_on_the_order_of_keys(ran):
    line = json.loads(records_file(ran).read_text().splitlines()[0])
    digest = line.pop("digest")
    assert digest == digest_of(dict(reversed(line.items())))


def test_a_report_of_earlier_records_needs_no_data(tmp_path, monkeypatch, capsys):
    """Who has cloned the results can write their tables again."""
    text = SUITE.replace('"tiny"', '"elsewhere"').replace('["digits"]', '["not-here"]')
    (tmp_path / "elsewhere.toml").write_text(text)
    arguments = ["report", str(tmp_path / "elsewhere.toml"), "--results", str(tmp_path / "results"), "--no-timing"]
    assert cli.main(arguments) == 2
    assert "not-here" in capsys.readouterr().err
    (one, *_) = suites.load(str(tmp_path / "elsewhere.toml")).cells()
    done = verify.Record(key="k" * 40, cell=one, status="skipped", reason="why", provenance={"versions": {}, "hardware": {}})
    write_records(tmp_path / "results" / "elsewhere" / "records.jsonl", [done])
    assert cli.main(arguments) == 0
    assert "skipped" in (tmp_path / "results" / "elsewhere" / "leaderboard.md").read_text()


RESULTS = Path(__file__).parent.parent / "results"


@pytest.mark.parametrize("name", sorted(p.parent.name for p in RESULTS.glob("*/records.jsonl")))
def test_committed_results_hold(name):
    """Digests, sums, and tables that say what the records say; a change of the tables' form wants `widthbench report NAME`."""
    assert [c.plain() for c in verify.check_files(suites.load(name), RESULTS / name) if not c.ok] == []
