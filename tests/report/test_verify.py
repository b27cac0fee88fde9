"""Edits, truncations and numbers that no run gives are found; what was run is equal bit by bit when
it is run again."""

import json
import subprocess
from pathlib import Path

import pytest

from widthbench import cli
from widthbench.experiment import suites
from widthbench.experiment.records import digest_of, read_records, write_records
from widthbench.experiment.store import Store
from widthbench.report import verify
from widthbench.report.build import ASIDE

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
def ran(tmp_path_factory, run_cells_here):
    folder = tmp_path_factory.mktemp("verify")
    (folder / "tiny.toml").write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WIDTHBENCH_CACHE", str(folder / "cache"))
        run_cells_here(patch)  # and in a process of their own when they are run again
        assert (
            cli.main(["run", str(folder / "tiny.toml"), "--results", str(folder / "results")]) == 0
        )
    return folder


@pytest.fixture
def results(ran, tmp_path, monkeypatch):
    """A copy of the results, to damage."""
    subprocess.run(["cp", "-r", ran / "results", ran / "tiny.toml", tmp_path], check=True)
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(ran / "cache"))
    return tmp_path


def check(results, *args):
    return cli.main(
        ["verify", str(results / "tiny.toml"), "--results", str(results / "results"), *args]
    )


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
        timings = [
            json.loads(line) for line in path.with_name("timings.jsonl").read_text().splitlines()
        ]
        for name, text in verify.texts(
            suite, verify.in_order(suite, read_records(path)), timings, verify.file_digest(path)
        ).items():
            path.with_name(name).write_text(text)
    lines = [
        f"{verify.file_digest(path.parent / n)}  {n}"
        for n in (ln.partition("  ")[2] for ln in sums.read_text().splitlines())
    ]
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
    subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=records_file(results).parent, check=True
    )


def test_one_changed_digit_is_found_and_named(results, capsys):
    path = records_file(results)
    lines = path.read_text().splitlines()
    number = json.loads(lines[1])["rows"][0]["loss"]
    lines[1] = lines[1].replace(
        str(number), str(number)[:4] + str((int(str(number)[4]) + 1) % 10) + str(number)[5:]
    )
    path.write_text("\n".join(lines) + "\n")
    assert {"records.jsonl", "records.jsonl:2"} <= {c.what for c in bad(results)}
    assert check(results, "--sample", "0") == 1
    assert "was changed after it was written" in capsys.readouterr().out
    assert (
        cli.main(["cite", str(results / "tiny.toml"), "--results", str(results / "results")]) == 2
    )
    assert "records.jsonl:2" in capsys.readouterr().err


def test_a_number_changed_with_all_its_digests_is_found_by_running_the_cell_again(
    results, in_process, capsys
):
    resealed(results, better)
    assert bad(results) == []
    assert check(results, "--sample", "0") == 0
    capsys.readouterr()
    assert check(results, "--only", "l1-norm") == 1
    assert "rows[0].top1: recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (
            lambda p: p.write_text("".join(p.read_text().splitlines(keepends=True)[:-1])),
            "was changed after",
        ),
        (lambda p: p.write_text(p.read_text()[:-40]), "not a record"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:900] + b"\xff" + p.read_bytes()[901:]),
            "records.jsonl:1",
        ),
        (lambda p: p.write_text(p.read_text() + p.read_text()), "more than one record"),
        (lambda p: p.with_name("SHA256SUMS").unlink(), "there is none"),
        (lambda p: p.with_name("leaderboard.md").unlink(), "the file is gone"),
        (
            lambda p: p.with_name("SHA256SUMS").write_text("00  ../../tiny.toml\n"),
            "not a line of digest and file",
        ),
        (lambda p: p.with_name("SHA256SUMS").write_text(""), "is not in SHA256SUMS"),
        (lambda p: p.with_name("extra.md").write_text("x"), "extra.md is not in SHA256SUMS"),
        (
            lambda p: p.with_name("SHA256SUMS").write_text("00  a\0b\n"),
            "not a line of digest and file",
        ),
        (
            lambda p: p.with_name("SHA256SUMS").write_text("00  " + "x" * 5000 + "\n"),
            "not a line of digest and file",
        ),
        (
            lambda p: p.with_name("SHA256SUMS").write_text("00  figures\n"),
            "not a line of digest and file",
        ),
        (lambda p: p.with_name("timings.jsonl").write_text("{"), "timings.jsonl:1 is no timing"),
        (lambda p: p.with_name("timings.jsonl").unlink(), "timings.jsonl cannot be read"),
    ],
)
def test_damage_is_found(results, damage, found):
    damage(records_file(results))
    assert any(found in f"{c.what} {c.note}" for c in bad(results)), bad(results)


def test_records_without_digests_are_refused(results):
    path = records_file(results)
    lines = [
        {k: v for k, v in json.loads(line).items() if k != "digest"}
        for line in path.read_text().splitlines()
    ]
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
        "1 records are of cells that the suite does not have, the first of "
        "digits-lenet_300_100-l1-norm-channels:0.5-s0"
    ]
    assert any("2 cells of the suite have none" in c.note for c in checks)


def test_a_competitor_that_is_said_to_have_failed_is_found(results, in_process, capsys):
    resealed(
        results,
        lambda r: r.model_copy(
            update={"status": "failed", "reason": "broke"} if r.cell.technique == "l1-norm" else {}
        ),
    )
    assert check(results, "--sample", "0") == 0
    assert check(results, "--only", "l1-norm") == 1
    assert "recorded failed, now done" in capsys.readouterr().out


@pytest.mark.parametrize("excuse", [{"key": "0" * 40}, {"hardware": {"cpu": "another"}}])
def test_what_no_machine_changes_cannot_be_excused(results, in_process, capsys, excuse):
    def edited(record):
        where = {**record.provenance, **{k: v for k, v in excuse.items() if k == "hardware"}}
        rows = tuple(r.model_copy(update={"samples": 1}) for r in record.rows)
        return record.model_copy(
            update={
                "provenance": where,
                "rows": rows,
                "params": 10,
                "key": excuse.get("key", record.key),
            }
        )

    resealed(results, edited)
    assert check(results, "--only", "l1-norm") == 1
    out = capsys.readouterr().out
    assert "samples[0]: recorded 1, now 450" in out or "rows[0].samples: recorded 1, now 450" in out


def test_a_report_takes_over_what_is_sound_and_keeps_the_rest_aside(results, monkeypatch):
    path = records_file(results)
    before = read_records(path)
    changed = path.read_text().replace('"top1":', '"top1":1', 1)
    path.write_text(changed)
    (first, *_) = changed.splitlines()
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(results / "empty"))
    with pytest.warns(
        UserWarning,
        match=r"1 of 3 earlier records are not taken over, the first at .*records.jsonl:1|are "
        r"kept in",
    ):
        assert (
            cli.main(["report", str(results / "tiny.toml"), "--results", str(results / "results")])
            == 0
        )
    assert read_records(path) == before[1:]
    assert path.with_name(ASIDE).read_text() == f"{first}\n"


def test_elsewhere_a_rerun_must_lie_within_the_tolerance(ran):
    (_, old, _) = read_records(ran / "results" / "tiny" / "records.jsonl")
    assert verify.compare(old, old).by == "bit-equal"
    clean = old.model_copy(update={"provenance": {**old.provenance, "dirty": False}})
    assert (
        "key: recorded" in verify.compare(clean, clean.model_copy(update={"key": "0" * 40})).note
    )  # nothing explains it
    elsewhere = {**old.provenance, "commit": "0" * 40, "dirty": False}
    other = old.model_copy(update={"key": "0" * 40, "provenance": elsewhere})
    assert verify.compare(old, other) == verify.Check(
        old.cell.id, "tolerance", True, verify.compare(old, other).note
    )
    assert "other code or data" in verify.compare(old, other).note
    last = old.rows[-1]
    allowed = verify.tolerance(last.top1, last.samples)
    for apart, holds in ((0.99 * allowed, True), (1.01 * allowed, False)):
        rows = (*old.rows[:-1], last.model_copy(update={"top1": last.top1 - apart}))
        assert verify.compare(old, other.model_copy(update={"rows": rows})).ok is holds
    assert not verify.compare(old, other.model_copy(update={"macs": int(old.macs * 1.06)})).ok
    assert not verify.compare(
        old, other.model_copy(update={"status": "failed", "reason": "broke"})
    ).ok
    gpu = old.model_copy(update={"provenance": {**old.provenance, "hardware": {"gpu": "H200"}}})
    assert "other hardware" in verify.compare(gpu, old).note


def test_the_tolerance_is_a_point_or_three_standard_errors():
    assert verify.tolerance(93.4, 10_000) == pytest.approx(
        3 * 100 * (2 * 0.934 * 0.066 / 10_000) ** 0.5
    )
    assert verify.tolerance(93.4, 10_000) > 1
    assert verify.tolerance(99.9, 50_000) == 1.0
    assert verify.tolerance(100.0, 9) == 1.0


def test_the_sample_is_the_same_for_one_seed_and_spares_nothing(ran):
    records = read_records(ran / "results" / "tiny" / "records.jsonl")
    many = [
        r.model_copy(update={"cell": r.cell.model_copy(update={"seed": s})})
        for r in records
        for s in range(20)
    ]
    drawn = verify.sample(many, 10)
    assert drawn == verify.sample(many[::-1], 10)
    assert drawn != verify.sample(many, 10, seed=1)
    assert len({r.cell.id for r in drawn}) == 10
    assert verify.sample(many, None) == verify.sample(many, 99)
    assert len(verify.sample([r.model_copy(update={"status": "failed"}) for r in records], 2)) == 2
    with pytest.raises(verify.UsageError, match="nothing can be run again"):
        verify.sample([], 3)


def test_a_rerun_leaves_no_trace_in_the_cache_or_the_environment(results, in_process, ran):
    before = sorted(p for p in (ran / "cache").rglob("*") if p.is_file())
    suite = suites.load(str(results / "tiny.toml"))
    (found,) = verify.rerun(suite, read_records(records_file(results))[:1])
    assert found.ok
    assert sorted(p for p in (ran / "cache").rglob("*") if p.is_file()) == before
    assert verify.os.environ["WIDTHBENCH_CACHE"] == str(ran / "cache")


def test_a_store_does_not_answer_for_a_rerun(results, in_process, monkeypatch, tmp_path):
    """It holds the very records that are in question."""
    monkeypatch.setenv("WIDTHBENCH_STORE", f"file://{tmp_path}/store")
    forged = read_records(records_file(results))[1]
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(tmp_path / "forger"))
    Store().put(better(forged))
    (found,) = verify.rerun(suites.load(str(results / "tiny.toml")), [better(forged)])
    assert not found.ok
    assert verify.os.environ["WIDTHBENCH_STORE"] == f"file://{tmp_path}/store"


def test_digests_do_not_hang_on_the_order_of_keys(ran):
    line = json.loads(records_file(ran).read_text().splitlines()[0])
    digest = line.pop("digest")
    assert digest == digest_of(dict(reversed(line.items())))


def test_a_report_of_earlier_records_needs_no_data(tmp_path, monkeypatch, capsys):
    """Who has cloned the results can write their tables again."""
    text = SUITE.replace('"tiny"', '"elsewhere"').replace('["digits"]', '["not-here"]')
    (tmp_path / "elsewhere.toml").write_text(text)
    arguments = [
        "report",
        str(tmp_path / "elsewhere.toml"),
        "--results",
        str(tmp_path / "results"),
        "--no-timing",
    ]
    assert cli.main(arguments) == 2
    assert "not-here" in capsys.readouterr().err
    (one, *_) = suites.load(str(tmp_path / "elsewhere.toml")).cells()
    done = verify.Record(
        key="k" * 40,
        cell=one,
        status="skipped",
        reason="why",
        provenance={"versions": {}, "hardware": {}},
    )
    write_records(tmp_path / "results" / "elsewhere" / "records.jsonl", [done])
    assert cli.main(arguments) == 0
    assert "skipped" in (tmp_path / "results" / "elsewhere" / "leaderboard.md").read_text()


RESULTS = Path(__file__).parents[2] / "results" / "published"


@pytest.mark.parametrize("name", sorted(p.parent.name for p in RESULTS.glob("*/records.jsonl")))
def test_committed_results_hold(name):
    """Digests, sums, and tables that say what the records say; a change of the tables' form wants
    `widthbench report NAME`."""
    assert [
        c.plain() for c in verify.check_files(suites.load(name), RESULTS / name) if not c.ok
    ] == []


def elsewhere(record, **changes):
    """A record as of another commit, so that a rerun is held to it by tolerance."""
    where = {**record.provenance, "commit": "0" * 40, "dirty": False}
    return record.model_copy(update={"key": "0" * 40, "provenance": where, **changes})


@pytest.fixture
def one(ran):
    (_, found, _) = read_records(ran / "results" / "tiny" / "records.jsonl")
    return found


@pytest.mark.parametrize(
    ("forged", "found"),
    [
        (lambda r: {"params": r.params - 1}, "its widths give"),
        (lambda r: {"macs": r.macs - 100}, "macs: recorded"),
        (lambda r: {"kept": 0.3}, "kept: recorded 0.3"),
        (lambda r: {"met": False}, "met: recorded False, its widths give True"),
        (lambda r: {"widths": {n: w - 1 for n, w in r.widths.items()}}, "its widths give"),
        (lambda r: {"widths": {"nothing": 3}}, "no network of the kind has them"),
        (
            lambda r: {
                "spent": r.spent | {"base": r.spent["base"].model_copy(update={"forward_macs": 7})}
            },
            "spent.base.forward_macs",
        ),
        (
            lambda r: {"spent": r.spent | {"adaptation": verify.Spent()}},
            "spent.adaptation.epochs: recorded 0, now 1",
        ),
        (lambda r: {"floor": True}, "floor: recorded True"),
        (lambda r: {"coupled": True}, "coupled: recorded True"),
    ],
)
def test_elsewhere_what_follows_from_widths_and_recipes_must_still_agree(one, forged, found):
    """Another commit in the record excuses chance in training, and nothing else."""
    assert verify.compare(elsewhere(one), one).ok
    check = verify.compare(elsewhere(one, **forged(one)), one)
    assert not check.ok
    assert found in check.note


def test_elsewhere_earlier_stages_must_lie_within_what_seeds_differ_by(one):
    higher = one.rows[0].model_copy(update={"top1": min(100.0, one.rows[0].top1 + 40)})
    other = elsewhere(one, rows=(higher, *one.rows[1:]))
    assert "not judged" in verify.compare(other, one).note
    assert not verify.compare(other, one, {"resized": 1.0}).ok
    assert verify.compare(other, one, {"resized": 10.0}).ok


def test_numbers_do_not_widen_the_tolerance_that_they_are_judged_by(one):
    def at(technique, seed, top1):
        cell = one.cell.model_copy(update={"technique": technique, "seed": seed})
        return one.model_copy(
            update={
                "cell": cell,
                "rows": (one.rows[0].model_copy(update={"top1": top1}), *one.rows[1:]),
            }
        )

    honest = [at("nmf", 0, 50.0), at("nmf", 1, 54.0)]
    forged = [at("l1-norm", 0, 10.0), at("l1-norm", 1, 98.0)]
    found = verify.spreads([*honest, *forged])
    assert found["digits", "lenet_300_100", "l1-norm", "channels:0.5"]["resized"] == pytest.approx(
        8**0.5
    )
    assert verify.spreads(forged) == {}


def test_what_moves_all_cells_the_same_way_is_found_though_none_is_beyond_its_tolerance(one):
    def pair(technique, seed, apart):
        cell = one.cell.model_copy(update={"technique": technique, "seed": seed})
        rows = tuple(r.model_copy(update={"top1": 90.0, "samples": 450}) for r in one.rows)
        new = one.model_copy(update={"cell": cell, "rows": rows})
        return elsewhere(
            new, rows=tuple(r.model_copy(update={"top1": 90.0 + apart}) for r in rows)
        ), new

    pairs = [pair("l1-norm", s, 3.0) for s in range(10)]
    assert all(verify.compare(*p).ok for p in pairs)
    assert [c.ok for c in verify.means(pairs, {})] == [False]
    mixed = [pair("l1-norm", s, (-1) ** s * 3.0) for s in range(10)] + [
        pair("nmf", s, 2.9) for s in range(6)
    ]
    assert {c.what: c.ok for c in verify.means(mixed, {})} == {
        "digits lenet_300_100 l1-norm channels:0.5: mean of 10": True,
        "digits lenet_300_100 nmf channels:0.5: mean of 6": False,
        "all cells: mean of 16": True,
    }
    assert verify.means(pairs[:1], {}) == []


def test_what_was_skipped_must_be_skipped_for_the_same_reason(one):
    skipped = one.model_copy(update={"status": "skipped", "rows": (), "reason": "no BatchNorm"})
    assert verify.compare(skipped, skipped).ok
    assert not verify.compare(skipped.model_copy(update={"reason": "too good"}), skipped).ok
    failed = skipped.model_copy(update={"status": "failed", "reason": "at 0x7f"})
    assert verify.compare(failed.model_copy(update={"reason": "at 0x8f"}), failed).ok


def test_the_bibtex_of_techniques_may_differ_and_nothing_else(results):
    board = records_file(results).with_name("leaderboard.md")
    text = board.read_text()
    for ok, changed in (
        (
            True,
            text.replace("% random-channels: names no paper", "@misc{another,\n  title = {x}\n}"),
        ),
        (False, text.replace("SHA-256 of the records ", "SHA-256 of the records 0")),
        (False, text + "| l1-norm | 100.00 |\n"),
        (False, text.replace("\n```bibtex", "\nThe best.\n```bibtex")),
        (
            False,
            text.replace("% random-channels", "```\n| l1-norm | 100.00 |\n```\n% random-channels"),
        ),
        (
            False,
            text.replace(
                "% random-channels", "  ```\n| l1-norm | 100.00 |\n  ```bibtex\n% random-channels"
            ),
        ),
    ):
        assert changed != text
        board.write_text(changed)
        resummed(records_file(results), tables=False)
        assert (bad(results) == []) is ok, changed[-300:]


def test_other_pages_are_held_to_the_records_too():
    suite = suites.load("autoprune-lenet")
    folder = RESULTS / suite.name
    lines = [line.record for line in verify.read_lines(folder / "records.jsonl")]
    assert {c.what for c in verify._tables(suite, folder, lines)} >= {
        "leaderboard.tex",
        "paired.md",
        "trajectories.md",
    }


def test_what_an_earlier_report_wrote_and_this_one_does_not_is_removed(results, monkeypatch):
    path = records_file(results)
    old, mine = path.with_name("paired.md"), path.with_name("curves.md")
    old.write_text("old"), mine.write_text("mine")
    sums = path.with_name("SHA256SUMS")
    sums.write_text(
        sums.read_text()
        + f"{verify.file_digest(old)}  paired.md\n{'0' * 64}  curves.md\n{'0' * 64}  "
        f"../../tiny.toml\n"
    )
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(results / "empty"))
    assert (
        cli.main(
            [
                "report",
                str(results / "tiny.toml"),
                "--results",
                str(results / "results"),
                "--no-timing",
            ]
        )
        == 0
    )
    assert not old.exists()
    assert mine.read_text() == "mine"  # somebody's by now
    assert (results / "tiny.toml").exists()
    assert {c.what for c in bad(results)} == {"curves.md"}


def test_a_seed_that_was_left_out_and_a_row_that_was_not_run_show(results):
    resealed(results, lambda r: r if r.cell.technique != "random-channels" else None)
    board = records_file(results).with_name("leaderboard.md").read_text()
    assert not [line for line in board.splitlines() if line.startswith("| random-channels")]
    assert "*Not run*: random-channels at channels:0.5." in board
    assert "*not run*: 1 cells of the suite" in board


FORGERIES = {
    "claims.json": [
        ("not reproduced", "reproduced"),
        ('"measured": "', '"measured": "9'),
        ("(n=1)", "(n=500)"),
        ('"rule": "', '"rule": "x'),
    ],
    "claims.md": [
        ("not reproduced", "reproduced"),
        ("| check `", "| exact | check `"),
        ("# Claims", "# All reproduced"),
    ],
}


@pytest.fixture(scope="module")
def judged():
    return verify.ledger.judge_all(RESULTS)


def test_claims_are_judged_anew(tmp_path, capsys, judged):
    for path in RESULTS.glob("*"):
        if path.name not in FORGERIES:
            (tmp_path / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify.ledger, "judge_all", lambda results: judged)
        for name, edits in FORGERIES.items():
            for old, new in edits:
                for each in FORGERIES:
                    text = (RESULTS / each).read_text()
                    assert each != name or old in text, old
                    (tmp_path / each).write_text(text.replace(old, new) if each == name else text)
                assert {c.what: c.ok for c in verify.check_claims(tmp_path)} == {
                    n: n != name for n in FORGERIES
                }, old
                assert cli.main(["report", "--site", "--results", str(tmp_path)]) == 2
                assert f"{name} is not what the records say" in capsys.readouterr().err
        (tmp_path / "claims.json").unlink()
        assert {c.what: c.ok for c in verify.check_claims(tmp_path)}["claims.json"] is False
    assert verify.check_claims(tmp_path / "lenet") == []


def test_numbers_that_a_check_measures_may_differ_a_little():
    assert verify.report_claims.close("| 0.2035 (n=3) | **x** |", "| 0.2036  (n=3) | **x** |")
    assert not verify.report_claims.close("| 0.2035 (n=3) |", "| 0.3 (n=3) |")
    assert not verify.report_claims.close(
        "| x | 90 | 91 |", "| x | 91 | 91 |"
    )  # what a document reports is no measurement
    assert not verify.report_claims.close("| 0.2035 (n=3) |", "| 0.2035 (n=3) exact |")


def test_files_that_no_report_writes_are_found(results):
    path = records_file(results)
    path.with_name("paired.md").write_text("| mine | 100.00 |")
    (path.parent / "figures" / "notes.txt").write_text("x")
    sums = path.with_name("SHA256SUMS")
    more = [
        f"{verify.file_digest(path.parent / n)}  {n}" for n in ("paired.md", "figures/notes.txt")
    ]
    sums.write_text(sums.read_text() + "\n".join(more) + "\n")
    assert [c.what for c in bad(results)] == ["figures/notes.txt", "paired.md"]


def test_the_committed_claims_are_what_the_committed_records_say(judged, monkeypatch):
    monkeypatch.setattr(
        verify.ledger, "judge_all", lambda results: judged if results == RESULTS else None
    )
    assert [c.plain() for c in verify.check_claims(RESULTS) if not c.ok] == []


def test_committed_sizes_follow_from_widths():
    """One record for each technique, network and budget of `digits`: a network of its widths has
    its MACs and parameters."""
    found = {
        (r.cell.network, r.cell.label, r.cell.budget): r
        for r in read_records(RESULTS / "digits" / "records.jsonl")
    }
    distinct = {}  # what gives the same widths and says the same sizes of them is one
    for r in found.values():
        if r.status == "done":
            where = (r.cell.network, r.cell.scope, r.cell.include, r.cell.budget)
            said = (r.macs, r.params, r.base_macs, r.base_params, r.kept, r.met, r.floor)
            distinct[where, tuple(r.widths.items()), said] = r
    assert len(distinct) > 40
    assert {r.cell.id: list(verify._size_differences(r)) for r in distinct.values()} == {
        r.cell.id: [] for r in distinct.values()
    }
