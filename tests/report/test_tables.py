import pytest
from made import DONE, WHERE, R, record, suite

from widthbench.experiment.records import Record, Row
from widthbench.recipe import Spent
from widthbench.report import build, figures, markdown, style, tables, timing
from widthbench.report.lines import blocks, lines, shape_of


def board(records, **changes):
    return tables.leaderboard(suite(**changes), records, [], 9)


def row_of(page, name):
    """The one of the details, which come behind the matrix."""
    *_, line = [ln for ln in page.splitlines() if ln.startswith(f"| {name}")]
    return [c.strip() for c in line.strip("|").split("|")]


def test_a_row_shows_means_spreads_ratios_and_cost():
    page = board([record(seed=s, top1=90.0 + s) for s in range(3)])
    cells = row_of(page, "l1-norm")
    assert cells[:6] == [
        "l1-norm",
        "none",
        "macs:0.5",
        "71.00 ± 1.00",
        "81.00 ± 1.00",
        "91.00 ± 1.00",
    ]
    assert cells[6:] == ["500", "50", "2.00x", "2.00x", "–", "1.10x", "3"]


def test_measured_speed_up_is_base_over_row(monkeypatch):
    one = record()
    entry = {"dataset": "digits", "model": "lenet5", "shape": shape_of(one), "speed_up": 1.5}
    page = tables.leaderboard(suite(), [one], [entry], 1)
    assert row_of(page, "l1-norm")[10] == "1.50x"
    times = iter(
        [3.0, 2.0] * timing.ROUNDS + [1.0]
    )  # base, resized, base, resized, ..., and the resized one at batch 1
    monkeypatch.setattr(timing, "latency_ms", lambda *a, **k: next(times))
    cell = one.cell.model_copy(update={"model": "lenet_300_100", "size": 8, "device": "cpu"})
    measured = timing.measure(
        one.model_copy(update={"cell": cell, "widths": {"ip1": 30}}).model_dump(), print
    )
    assert measured["speed_up"] == 1.5
    assert (measured["base_latency_ms"], measured["latency_ms"]) == (3.0, 2.0)


def test_one_base_prints_no_spread():
    assert "90.00" in board([record()])
    assert "±" not in row_of(board([record()]), "l1-norm")[5]


def test_one_public_checkpoint_under_many_seeds_is_one_base_with_their_mean():
    records = [
        record(seed=s, top1=90.0 + s, provenance={**WHERE, "checkpoint": "sha"}) for s in range(5)
    ]
    cells = row_of(board(records), "l1-norm")
    assert (cells[5], cells[-1]) == ("92.00", "1")


def test_ranks_only_where_the_suite_is_citable_and_five_bases_carry_them():
    records = [
        record(t, s, top1=p + 0.1 * s)
        for t, p in (("l1-norm", 90), ("random-channels", 80))
        for s in range(5)
    ]
    assert "| rank" not in board(records).replace("  ", "")
    cited = board(records, citable=True)
    assert row_of(cited, "technique")[6] == "rank"
    assert row_of(cited, "l1-norm")[6] == "1"
    assert row_of(cited, "random-channels")[6] == "2"
    few = board([r for r in records if r.cell.seed < 4], citable=True)
    assert row_of(few, "technique")[6] == "params"


def test_smoke_suites_say_that_they_are_not_for_citation():
    assert "not for citation" in board([record()])
    assert "not for citation" not in board([record()], citable=True)


def test_flags_and_failures_are_named():
    page = board(
        [
            record(met=False),
            record("random-channels", coupled=True),
            record("base", budget=None, status="failed"),
        ]
    )
    assert "l1-norm †" in page
    assert "random-channels ‡" in page
    assert "† leaves more than 5 % of its budget unused." in page
    assert "it broke \\| badly" in page
    assert "1 failed" in page


def test_the_base_comes_first_then_budgets_from_large_to_small_then_controls():
    records = [
        record("uniform-width"),
        record("l1-norm", budget="macs:0.25"),
        record("l1-norm"),
        record("base", budget=None),
        record("random-channels", top1=95),
    ]
    order = [(ln.label, ln.budget) for ln in lines(records)]
    assert order == [
        ("base", None),
        ("random-channels", "macs:0.5"),
        ("l1-norm", "macs:0.5"),
        ("uniform-width", "macs:0.5"),
        ("l1-norm", "macs:0.25"),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e6, "2.00 M"), (132997, "133 k"), (4.089e9, "4.09 G"), (66079, "66.1 k"), (7, "7")],
)
def test_counts_have_three_figures(value, text):
    assert markdown.count(value) == text


def test_figures_are_drawn(tmp_path):
    records = [record("base", s, 99, None, macs=100, params=1000) for s in range(2)] + [
        record(seed=s, top1=90 + s) for s in range(2)
    ]
    files = figures.write(records, tmp_path, "title")
    assert [f.name for f in files] == ["error-macs.png", "error-params.png"]
    records += [record("uniform-width", s, 95) for s in range(2)]
    files = figures.write(records, tmp_path, "title")
    assert [f.name for f in files] == ["error-macs.png", "error-params.png", "distance.png"]
    assert all(f.read_bytes()[:4] == b"\x89PNG" for f in files)
    assert figures.write([], tmp_path, "title") == []


def test_two_budgets_that_end_at_one_point_are_drawn(tmp_path):
    records = [record(seed=0, budget=b, key=b) for b in ("macs:0.5", "macs:0.25")]
    assert figures.write(records, tmp_path, "title")


def test_a_distance_is_the_ratio_of_errors_to_the_best_from_scratch():
    records = [
        record("uniform-width", 0, 95.0),
        record("l1-norm", 0, 90.0),
        record("l1-norm", 0, 80.0, "macs:0.25", key="none to compare with"),
    ]
    spent = record("scratch", 0, 96.0, key="s")
    records.append(spent.model_copy(update={"cell": spent.cell.model_copy(update={"of": "nmf"})}))
    panels = blocks(lines(records))
    assert figures.distances(panels) == {
        ("l1-norm", "l1-norm"): [(pytest.approx(1.1), pytest.approx(10 / 4))],
        (figures.SCRATCH, ""): [(pytest.approx(1.1), 1.0)],
    }


def test_names_are_moved_apart_no_further_than_they_must():
    assert figures.apart([], 0.1) == []
    assert figures.apart([0.2, 0.8], 0.1) == pytest.approx([0.2, 0.8])
    assert figures.apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert figures.apart([0.99, 1.0], 0.1) == pytest.approx([0.9, 1.0])


def test_a_technique_looks_the_same_everywhere_and_variants_by_their_lines():
    one = [record("nmf", 0, 90.0), record("l1-norm", 0, 90.0)]
    other = [
        record("l1-norm", 0, 90.0),
        record("base", 0, 99.0, None),
        record("uniform-width", 0, 90.0),
    ]
    more = record("l1-norm", 0, 91.0, key="v")
    other.append(
        more.model_copy(update={"cell": more.cell.model_copy(update={"params": {"scale": 2}})})
    )
    first, second = (style.styles(lines(some)) for some in (one, other))
    assert first["l1-norm"] == second["l1-norm"]
    variant = second["l1-norm(scale=2)"]
    assert (variant.colour, variant.marker) == (first["l1-norm"].colour, first["l1-norm"].marker)
    assert variant.line != first["l1-norm"].line
    assert second["uniform-width"].colour == style.CONTROL
    assert style.of_technique("mine") == style.of_technique("mine")
    colours = [colour for colour, *_ in style.KNOWN.values()]
    assert len(set(colours)) == len(colours)


def citable(**changes):
    return {"citable": True, "seeds": list(range(5)), **changes}


def test_rows_at_the_floor_are_flagged_and_explained():
    page = board([record(seed=s, floor=True) for s in range(2)])
    assert row_of(page, "l1-norm")[0] == "l1-norm §"
    assert "§ the budget lies below the feasible floor" in page
    assert "§" not in board([record()])


def test_top_5_is_a_column_where_it_was_measured():
    rows = tuple(
        Row(stage=s, top1=50.0, top5=t, loss=1, samples=9)
        for s, t in (("resized", 60.0), ("recalibrated", 75.0))
    )
    page = board([record(rows=rows)])
    assert row_of(page, "technique")[6] == "top-5 %, last"
    assert row_of(page, "l1-norm")[6:8] == ["75.00", "500"]
    assert "top-5" not in board([record()])


def test_halved_batches_are_flagged_and_explained():
    spent = {
        "base": Spent(forward_macs=100),
        "decision": Spent(),
        "adaptation": Spent(forward_macs=30, halved=1),
    }
    page = board([record(spent=spent)])
    assert row_of(page, "l1-norm")[0] == "l1-norm ¶"
    assert "¶ some of its batches were computed in halves" in page
    assert "¶" not in board([record()])


def test_a_public_checkpoint_counts_once_has_no_cost_and_says_that_val_may_be_seen():
    where = {**WHERE, "checkpoint": "abc", "val_seen": True}
    stages = tuple(Row(stage=s, top1=50.0, loss=1, samples=9) for s in ("resized", "recalibrated"))
    page = board([record(seed=s, provenance=where, rows=stages) for s in range(3)])
    cells = row_of(page, "l1-norm")
    assert cells[3:6] == ["50.00", "50.00", ""]  # nothing was fine-tuned
    assert cells[-2:] == ["–", "1"]
    assert "may have seen this suite's val split" in page
    assert "one base network each: no ± and no ranks" in page


def cells_of(page, label):
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith(f"| {label} ")
    ]


def test_techniques_are_held_against_l1_and_uniform_width_and_nothing_else():
    gaps = [0.0, 0.1, -0.1, 0.05, 0.02]
    records = [record(seed=s, top1=90.0 + gaps[s]) for s in range(5)]
    records += [record("uniform-width", seed=s, top1=92.0 - gaps[s]) for s in range(5)]
    page = tables.paired(suite(**citable()), records)
    over_all, alone = cells_of(page, "l1-norm")
    assert over_all[1:] == ["1", "5", "90.02 (89.93 to 90.07)", "", "0.00 (0.00 to 0.00)", "0"]
    assert alone[1:4] == ["90.01 ± 0.07", "– / – / –", "**-1.97** (-2.16 to -1.79)"]
    assert len(cells_of(page, "uniform-width")) == 1  # it is the reference: over all networks only
    more = [record("random-channels", seed=s, top1=80.0 + s) for s in range(4)]
    more.append(record("random-channels", seed=4, status="failed"))
    page = tables.paired(suite(**citable()), records + more)
    assert cells_of(page, "random-channels")[0][-1] == "1 of 5"
    assert [c[0] for c in cells_of(page, "random-channels")] == [
        "random-channels"
    ]  # 4 bases: no test
    few = tables.paired(suite(**citable()), records[:3] + records[5:8])
    assert "No reference with 5 shared bases" in few
    assert tables.comparable(suite(**citable()))
    assert not tables.comparable(suite(**citable(seeds=[0])))


def test_interquartile_means_of_different_networks_do_not_stand_in_one_column():
    other = record().cell.model_copy(update={"model": "lenet_300_100"})
    records = [record(seed=s, top1=99.0) for s in range(5)]
    records += [
        record(seed=s, cell=other.model_copy(update={"seed": s}), top1=90.0) for s in range(5)
    ]
    records += [record("random-channels", seed=s, top1=98.0) for s in range(5)]
    both = [{"name": "lenet5", "size": 20}, {"name": "lenet_300_100", "size": 20}]
    page = tables.paired(suite(**citable(models=both)), records)
    assert cells_of(page, "l1-norm")[0][1:4] == ["2", "10", "94.50 (94.50 to 94.50)"]
    assert cells_of(page, "random-channels")[0][1:5] == ["1", "5", "–", "0.00 (0.00 to 0.00)"]


def test_trials_are_a_column_where_settings_were_tried():
    page = board([record(trials=4)])
    at = row_of(page, "technique").index("trials")
    assert row_of(page, "l1-norm")[at] == "4"
    assert "trials" not in row_of(board([record()]), "technique")


def test_each_stage_is_ranked_by_itself():
    """Recalibration can undo a lead: what is ahead after the resize need not be so at the end."""

    def run(technique, seed, resized, last):
        rows = [
            Row(stage=s, top1=top1 + 0.1 * seed, loss=1, samples=1000)
            for s, top1 in (("resized", resized), ("recalibrated", last), ("fine-tuned", last))
        ]
        return record(technique, seed, rows=tuple(rows))

    records = [run("l1-norm", s, 40.0, 80.0) for s in range(5)]
    records += [run("random-channels", s, 60.0, 70.0) for s in range(5)]
    page = tables.paired(suite(**citable()), records)
    assert cells_of(page, "random-channels")[1][2] == "1 / 2 / 2"


def test_a_held_scratch_budget_is_said():
    assert (
        "for as many MACs, but for at most 2 times X's epochs (*train cost* says how far that "
        "went);" in " ".join(board([record()], longest=2).split())
    )
    assert "for as many MACs; `l1-budget:X`" in " ".join(board([record()]).split())


def test_running_a_part_of_a_suite_keeps_what_an_earlier_report_had(tmp_path, monkeypatch):
    from widthbench.experiment.records import read_records, write_records
    from widthbench.experiment.store import Store

    whole = suite(techniques=["l1-norm", "random-channels"], controls=["base"])
    records = [
        Record(key=f"{i:040d}", cell=c, **DONE, provenance=WHERE)
        for i, c in enumerate(whole.cells())
    ]
    store = Store(tmp_path / "cells")
    new = records[0].model_copy(update={"reason": "new"})
    store.put(new)
    monkeypatch.setattr(
        build.keys, "cell_key", lambda cell: next(r.key for r in records if r.cell == cell)
    )
    assert build.collect(whole, store) == [new]
    older = [records[0].model_copy(update={"key": "o" * 40}), *records[1:]]
    assert build.collect(whole, store, older) == [new, *records[1:]]
    assert build.collect(whole, store, records) == [
        new,
        *records[1:],
    ]  # what this machine computed, of an equal key too
    fresh = records[1].model_copy(update={"reason": "of another machine", "key": "f" * 40})
    assert build.collect(whole, store, older, [fresh]) == [new, fresh, records[2]]
    failed = records[1].model_copy(update={"status": "failed", "reason": "ran longer"})
    assert (
        build.collect(whole, store, records, [failed])[1].status == "failed"
    )  # not hidden by an older result
    assert (
        build.collect(whole, store, older, [failed.model_copy(update={"key": "f" * 40})])[1].status
        == "failed"
    )
    other = suite(techniques=["l1-norm"], controls=["base"], seeds=[1])
    monkeypatch.setattr(build.keys, "cell_key", lambda cell: "0" * 40 + "x")
    assert build.collect(other, store, records) == []
    write_records(tmp_path / "records.jsonl", records)
    before = [line.record for line in build._before(tmp_path / "records.jsonl").lines]
    assert (
        before
        == sorted(records, key=lambda r: r.cell.id)
        == read_records(tmp_path / "records.jsonl")
    )
    (tmp_path / "records.jsonl").write_text("nonsense")
    with pytest.warns(
        UserWarning, match="1 of 1 earlier records are not taken over, .*records.jsonl:1"
    ):
        found = build._before(tmp_path / "records.jsonl")
    assert (found.lines, found.aside) == ([], ["nonsense"])


def test_rows_that_were_not_run_and_cells_that_are_missing_are_seen():
    """A seed that is left out makes a row of four of five, not one of four."""
    page = board(
        [record(seed=s, top1=90.0 + s) for s in range(4)],
        seeds=list(range(5)),
        techniques=["l1-norm", "nmf"],
    )
    cells = row_of(page, "l1-norm ✕")
    assert cells[-1] == "4 of 5"
    assert "✕ some of its cells have no result" in page
    assert "\n*Not run*: base; nmf at macs:0.5.\n" in page
    assert "not run" not in page.split("*Not run*")[0].split("\n## ")[1]
    nothing = board([], seeds=[0], techniques=["l1-norm", "nmf"], budgets=["macs:0.5", "macs:0.25"])
    assert "*Not run*: base; l1-norm, nmf at macs:0.5, macs:0.25." in nothing
    assert "| technique" not in nothing
    assert "*not run*: 11 cells of the suite" in page  # base and nmf on five seeds, l1-norm on one
    one = [record(seed=s, provenance={**WHERE, "checkpoint": "sha"}) for s in range(4)]
    assert row_of(board(one, seeds=list(range(5))), "l1-norm ✕")[-1] == "1 (4 of 5 cells)"


EVIL = "</td><img src=x onerror=alert(1)> a|b `c` *d* [e](javascript:f)"


def test_text_of_plug_ins_stays_text_in_markdown():
    bad = record(EVIL, status="failed", key="b", reason=f"{EVIL}\n## Title\x1b[31m\ud800")
    page = board(
        [
            record(EVIL, key="a"),
            bad.model_copy(update={"cell": bad.cell.model_copy(update={"seed": 1})}),
        ],
        title=EVIL,
    )
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\n## Title" not in page
    assert r"a\|b \`c\` \*d\* \[e\](javascript:f)" in page
    assert r"\\x1b\[31m\\ud800" in page
    page.encode()
    widths = {
        line.replace(r"\|", "").count("|") for line in page.splitlines() if line.startswith("|")
    }
    assert widths == {14, 5, 4}


def test_a_block_of_code_cannot_be_ended_by_its_text():
    page = tables.leaderboard(suite(), [record()], [], 1, cite="@misc{a,\n```\n# Out\n````\n}")
    assert page.endswith("`````bibtex\n@misc{a,\n```\n# Out\n````\n}\n`````\n")


@pytest.mark.parametrize(
    "line",
    [
        '{"dataset": "d", "model": "m", "shape": "s", "speed_up": NaN}',
        '{"dataset": "d", "model": "m", "shape": "s", "speed_up": 1e999}',
        '{"dataset": "d", "model": "m", "shape": "s", "speed_up": "fast"}',
        '{"dataset": "d", "model": "m", "shape": [], "speed_up": 1}',
        '{"dataset": "d", "model": "m", "speed_up": 1}',
        "[" * 100_000,
        "7",
    ],
)
def test_damaged_timings_are_named_and_measured_again(tmp_path, line):
    (tmp_path / "timings.jsonl").write_text(f"{line}\n")
    assert timing.read_timings(tmp_path) == []
    with pytest.raises(build.UsageError, match=r"timings.jsonl:1 is no timing"):
        timing.parse_timings(tmp_path / "timings.jsonl")


def test_a_damaged_timing_in_the_cache_is_measured_again_and_what_a_report_has_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(tmp_path))
    made = record(provenance=WHERE)
    entry = {
        "dataset": "digits",
        "model": "lenet5",
        "shape": shape_of(made),
        "speed_up": 1.5,
        "hardware": timing.hardware(),
    }
    measured = []
    monkeypatch.setattr(
        timing,
        "measured",
        lambda some: [measured.append(r) or {**entry, "speed_up": 2.0} for r in some],
    )
    assert timing.timings_of([made], measure=True, before=[entry]) == [entry]
    assert not measured
    path = tmp_path / "timings" / f"{timing._timing_key(made)}.json"
    path.parent.mkdir()
    path.write_text("{")
    with pytest.warns(UserWarning, match="damaged timing"):
        (again,) = timing.timings_of([made], measure=True, before=[entry])
    assert again["speed_up"] == 2.0
    assert timing.timings_of([made], measure=True, before=[entry]) == [again]
    assert len(measured) == 1


def test_bfloat16_is_said_of_a_row():
    for where in ({"base_dtype": "bfloat16"}, {"dtype": "bfloat16"}):
        page = board([record(provenance={**WHERE, **where})])
        assert row_of(page, "l1-norm")[0] == "l1-norm ᵇ"
        assert "ᵇ its base network or its fine-tuning was computed in bfloat16" in page
    assert "ᵇ" not in board([record()])


def test_a_record_of_another_kind_of_device_stays_with_a_warning(fresh_cache):
    from widthbench.experiment.store import Store

    there, here = ({**WHERE, "device": d} for d in ("cuda:0", "cpu"))
    old, new = record(top1=90.0, provenance=there), record(top1=80.0, provenance=here)
    mine = suite(techniques=["l1-norm"], controls=[])
    old, new = (r.model_copy(update={"cell": mine.cells()[0]}) for r in (old, new))
    with pytest.warns(UserWarning, match="another kind of device, and stay"):
        assert build.collect(mine, Store(), [old], [new]) == [old]
    failed = old.model_copy(update={"status": "failed"})
    assert build.collect(mine, Store(), [failed], [new]) == [new]


def test_a_base_that_was_cut_short_costs_a_part_of_the_whole_one():
    """`l1-budget` shortens its own base where it may not cost more than a cheap technique."""
    whole = {"base": Spent(forward_macs=100, backward_macs=200, epochs=R.epochs)}
    short = {"base": Spent(forward_macs=10, backward_macs=20, epochs=R.epochs / 10)}
    (line,) = lines([record(spent=whole | {"adaptation": Spent(forward_macs=30)})])
    assert line.cost().mean == pytest.approx(1.1)
    (line,) = lines([record(spent=short | {"adaptation": Spent(forward_macs=30)})])
    assert line.cost().mean == pytest.approx(0.2)
