import json
import math
import re
from pathlib import Path

import pytest
from made import DONE
from scipy import stats

from widthbench.claims import ledger
from widthbench.claims.ledger import Claim, Evidence, Judged, Pick, Row, judge_row, overall
from widthbench.errors import UsageError
from widthbench.experiment.cell import Cell
from widthbench.experiment.records import Record, Spent, packed, read_records, write_records
from widthbench.experiment.records import Row as Scores
from widthbench.recipe import Recipe
from widthbench.report.claims import page, plain
from widthbench.statistics import summarise

ROOT = Path(__file__).parents[2]
EXPECTED = (
    [f"M{i}" for i in range(1, 10)]
    + [f"A{i}" for i in range(1, 11)]
    + [f"S{i}" for i in range(1, 9)]
    + [f"R{i}" for i in range(1, 10)]
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """The suite "tiny" has the cells that its records have, and no others."""
    cells = Evidence.cells
    monkeypatch.setattr(
        Evidence,
        "cells",
        lambda self, name: [r.cell for r in self.of(name)] if name == "tiny" else cells(self, name),
    )


def claim(*rows):
    return Claim(id="X1", text="a test", needs="nothing", rows=rows or (order(),))


def order(**changes):
    return Row(
        **{
            "what": "a - b",
            "kind": "order",
            "direction": ">",
            "at": pick("a"),
            "minus": pick("b"),
            **changes,
        }
    )


def value(**changes):
    return Row(
        **{
            "what": "a",
            "kind": "value",
            "reported": 91.73,
            "tolerance": 0.01,
            "at": pick("a"),
            **changes,
        }
    )


def pick(technique):
    return Pick(suite="tiny", technique=technique, stage="resized")


def record(technique, seed, top1, budget="macs:0.5", params=None, **provenance):
    recipe = Recipe(epochs=1, lr=0.1)
    cell = Cell(
        dataset="digits",
        model="lenet5",
        size=28,
        technique=technique,
        params=params or {},
        budget=budget,
        seed=seed,
        base=recipe,
        finetune=recipe,
    )
    row = Scores(stage="resized", top1=top1, loss=0.1, samples=450)
    return Record(
        key=f"{technique}{seed}" + "0" * 30,
        cell=cell,
        **{**DONE, "rows": (row,)},
        provenance=provenance,
    )


def evidence(tmp_path, scores, **provenance):
    records = [
        record(name, seed, top1, **provenance)
        for name, values in scores.items()
        for seed, top1 in enumerate(values)
    ]
    write_records(tmp_path / "tiny" / "records.jsonl", records)
    return Evidence(tmp_path)


def test_every_claim_of_the_documents_is_there():
    assert [c.id for d in ledger.load() for c in d.claims if c.id[0] in "MASR"] == EXPECTED


TABLES = {
    # the source documents' tables, typed here a second time, in their own layout
    "M1": """
        Tanh 90.72 67.81 81.32 13.51
        SoftSign 91.14 76.98 87.18 10.20
        ELU 91.25 77.73 89.68 11.95
        SELU 90.47 25.17 80.28 55.11
        LeakyReLU 93.89 92.10 93.46 1.36
        Hardswish 91.93 88.30 91.72 3.42
    """,
    "M2": """
        50 77.34 80.74 3.40 1.0
        60 39.39 55.88 16.49 0.7
    """,
    "M3": """
        VGG-16,50 57.00 61.18 4.18 81.05 84.90 3.85 85
        VGG-16,60 47.70 53.78 6.08 73.61 80.44 6.83 75
        VGG-16,70 34.75 43.26 8.51 60.06 71.62 11.56 64
        ResNet-34,10 62.08 66.30 4.22 84.85 87.35 2.50 19
        ResNet-34,20 40.66 53.95 13.29 67.32 78.66 11.34 17
        ResNet-34,30 12.52 35.56 23.04 29.43 61.07 31.64 15
    """,
    "M9": """
        50 88.40 88.69
        60 85.17 86.92
        70 71.26 82.75
        80 66.76 80.02
    """,
}
NAMES = {
    "M9": ("{} %, pruned", "{} %, merged"),
    "M1": ("{}, baseline", "{}, pruned", "{}, merged", "{}, gain of merging"),
    "M2": ("{} %, pruned", "{} %, merged", "{} %, gain of merging", "{} %, parameters"),
    "M3": (
        "{} %, pruned top-1",
        "{} %, merged top-1",
        "{} %, gain top-1",
        "{} %, pruned top-5",
        "{} %, merged top-5",
        "{} %, gain top-5",
        "{} %, parameters",
    ),
}
OTHERS = {
    ("M2", "baseline"): 87.90,
    ("M2", "baseline, parameters"): 3.2,
    ("M2", "40 %, parameters"): 1.4,
    ("M2", "40 %, the one value printed, read as pruned"): 84.52,
    ("M2", "40 %, the one value printed, read as merged"): 84.52,
    ("M3", "VGG-16, baseline top-1"): 73.36,
    ("M3", "VGG-16, baseline top-5"): 91.51,
    ("M3", "VGG-16, baseline parameters"): 138,
    ("M3", "ResNet-34, baseline top-1"): 73.31,
    ("M3", "ResNet-34, baseline top-5"): 91.42,
    ("M3", "ResNet-34, baseline parameters"): 21,
    ("M4", "LeNet-300-100, NMF, mean over ratios"): 15.80,
    ("M4", "LeNet-300-100, MostSim at 50 %"): 88.69,
    ("M4", "LeNet-5, NMF, mean over ratios"): 15.80,
    ("M4", "LeNet-5, MostSim"): 88.69,
    ("A1", "MobileNetV1 325 M, base, top-1 error"): 31.6,
    ("A1", "MobileNetV1 325 M, AutoSlim, top-1 error"): 28.5,
    ("A1", "MobileNetV1 325 M, AutoPrune, top-1 error"): 28.8,
    ("A1", "MobileNetV1 150 M, base, top-1 error"): 36.7,
    ("A1", "MobileNetV1 150 M, AutoSlim, top-1 error"): 32.1,
    ("A1", "MobileNetV1 150 M, AutoPrune, top-1 error"): 31.8,
    ("A1", "MobileNetV2 300 to 305 M, base, top-1 error"): 28.2,
    ("A1", "MobileNetV2 300 to 305 M, AutoSlim, top-1 error"): 25.8,
    ("A1", "MobileNetV2 300 to 305 M, AutoPrune, top-1 error"): 26.1,
    ("A1", "MobileNetV2 207 to 209 M, base, top-1 error"): 30.2,
    ("A1", "MobileNetV2 207 to 209 M, AutoSlim, top-1 error"): 27,
    ("A1", "MobileNetV2 207 to 209 M, AutoPrune, top-1 error"): 26.7,
    ("S3", "measured exponent of d"): 3,
    ("S3", "measured exponent of n"): 1,
    ("R1", "1 x 100: share removed with at most 0.5 points lost, own images"): 60,
    ("R1", "2 x 50: share removed with at most 0.5 points lost, own images"): 40,
    ("R1", "1 x 100: share removed with at most 2 points lost, own images"): 60,
    ("R1", "2 x 50: share removed with at most 2 points lost, own images"): 40,
    ("R1", "digit 1 against the rest: share removed until the error exceeds the start's"): 80,
    ("R8", "2 x 10: share removed while the error is flat"): 50,
    ("R8", "2 x 50: share removed while the error is flat"): 90,
}


def test_reported_numbers_are_those_of_the_documents():
    expected = dict(OTHERS)
    for name, text in TABLES.items():
        for line in text.strip().splitlines():
            first, *numbers = line.split()
            keys = [n.format(first.replace(",", " ")) for n in NAMES[name]]
            expected |= {
                (name, key): float(number) for key, number in zip(keys, numbers, strict=True)
            }
    found = {
        (c.id, r.what): r.reported
        for d in ledger.load()
        for c in d.claims
        for r in c.rows
        if c.id[0] in "MASR" and r.reported is not None
    }
    assert found == expected


@pytest.mark.parametrize(
    ("measured", "right"),
    [(91.73, True), (91.74, True), (91.72, True), (91.75, False), (91.0, False)],
)
def test_a_value_is_reproduced_within_its_tolerance(tmp_path, measured, right):
    judged = judge_row(value(), claim(), evidence(tmp_path, {"a": [measured]}))
    verdict = "reproduced" if right else "not reproduced"
    assert (judged.verdict, judged.measured.mean, judged.measured.n) == (verdict, measured, 1)
    assert judged.records == ("a0" + "0" * 30,)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([92, 93, 94, 95, 96], [90, 91.1, 92.2, 92.8, 94.1], "reproduced"),
        ([90, 91.1, 92.2, 92.8, 94.1], [92, 93, 94, 95, 96], "not reproduced"),
        ([92, 93, 94, 95, 96], [93, 92, 95, 94, 96], "inconclusive"),
        (
            [92, 93, 94, 95],
            [80, 81, 82, 83],
            "inconclusive",
        ),  # four bases are too few, however far apart
        (
            [92, 92, 92, 92, 92],
            [91, 91, 91, 91, 91],
            "reproduced",
        ),  # the same difference everywhere
        ([92, 92, 92, 92, 92], [92, 92, 92, 92, 92], "inconclusive"),
    ],
)
def test_an_order_needs_an_interval_beyond_the_bound_over_five_bases(tmp_path, a, b, verdict):
    assert judge_row(order(), claim(), evidence(tmp_path, {"a": a, "b": b})).verdict == verdict


def test_orders_can_point_down_and_have_a_margin(tmp_path):
    found = evidence(
        tmp_path, {"a": [90, 91.1, 92.2, 92.8, 94.1], "b": [90.3, 91.3, 92.4, 93.2, 94.4]}
    )
    assert judge_row(order(direction="<"), claim(), found).verdict == "reproduced"
    assert judge_row(order(bound=-0.5), claim(), found).verdict == "reproduced"
    assert judge_row(order(bound=0.5), claim(), found).verdict == "not reproduced"


def test_pairs_share_a_base_and_a_checkpoint_counts_once(tmp_path):
    row = Row(what="gain", kind="gain", reported=2.0, tolerance=3.0, at=pick("a"), minus=pick("b"))
    seeds = judge_row(row, claim(), evidence(tmp_path, {"a": [92, 93, 94], "b": [90, 91]}))
    assert (seeds.measured.mean, seeds.measured.n) == (2.0, 2)
    one = judge_row(
        row, claim(), evidence(tmp_path, {"a": [92, 92, 92], "b": [90, 90, 90]}, checkpoint="abc")
    )
    assert (one.measured.n, one.measured.std) == (1, None)


def test_a_list_of_budgets_and_seeds_on_one_base_are_averaged(tmp_path):
    scores = {
        ("macs:0.5", 0): 90.0,
        ("macs:0.5", 1): 92.0,
        ("macs:0.25", 0): 80.0,
        ("macs:0.25", 1): 70.0,
    }
    row = value(at=Pick(suite="tiny", budget=["macs:0.5", "macs:0.25"]))
    for provenance, expected in (({}, {0: 85.0, 1: 81.0}), ({"checkpoint": "abc"}, {"abc": 83.0})):
        records = [
            record("a", seed, top1, budget, **provenance) for (budget, seed), top1 in scores.items()
        ]
        write_records(tmp_path / "tiny" / "records.jsonl", records)
        assert Evidence(tmp_path).pick(row.at).values == expected
    write_records(
        tmp_path / "tiny" / "records.jsonl",
        [record("a", s, t, b) for (b, s), t in scores.items()][:3],
    )
    picked = Evidence(tmp_path).pick(row.at)
    assert picked.values == {0: 85.0}  # a base without all budgets has no mean over them


def test_a_pick_knows_the_defaults_of_parameters(tmp_path):
    rows = [
        record("neuron-merging", 0, 90.0),
        record("neuron-merging", 0, 80.0, params={"merge": False}),
    ]
    write_records(tmp_path / "tiny" / "records.jsonl", rows)
    for merge, expected in ((True, 90.0), (False, 80.0)):
        pick = Pick(
            suite="tiny",
            technique="neuron-merging",
            params={"merge": merge, "bn_scale": "released"},
        )
        assert Evidence(tmp_path).pick(pick).values == {0: expected}


def test_a_claim_holds_in_the_reading_that_holds_and_the_page_says_which():
    def judged(verdict, reading=""):
        return Judged(value(reading=reading), verdict, summarise({0: 1.0}))

    rows = [judged("reproduced", "one"), judged("not reproduced", "two"), judged("reproduced")]
    assert overall(rows) == "reproduced"
    assert "Read as one: reproduced; Read as two: not reproduced." in page(
        [(ledger.load()[0], claim(value()), rows)]
    )
    assert overall([*rows, judged("not reproduced")]) == "not reproduced"
    assert overall([judged("not run", "one"), judged("not reproduced", "two")]) == "not reproduced"
    assert overall([judged("not run", "one"), judged("not run", "two")]) == "not run"


def test_ambiguous_picks_are_refused_even_where_the_values_agree(tmp_path):
    with pytest.raises(
        UsageError, match="matches 2 kinds of cells that differ in more than their seed"
    ):
        judge_row(value(at=Pick(suite="tiny")), claim(), evidence(tmp_path, {"a": [91], "b": [91]}))


def test_a_pick_of_nothing_that_the_suite_has_is_an_error_not_a_claim_that_was_not_run(tmp_path):
    with pytest.raises(UsageError, match="matches no cell of suite 'digits'"):
        judge_row(value(at=Pick(suite="digits", technique="l1_norm")), claim(), Evidence(tmp_path))
    with pytest.raises(UsageError, match="unknown suite 'digit'"):
        judge_row(value(at=Pick(suite="digit")), claim(), Evidence(tmp_path))
    with pytest.raises(ValueError, match="metric"):
        Pick(suite="digits", metric="top_1")


def on_images(name, hits, top1=None):
    made = record(name, 0, 50.0, checkpoint="abc")
    right = 100 * sum(hits) / len(hits) if top1 is None else top1
    row = Scores(stage="resized", top1=right, loss=0.1, samples=len(hits), right=packed(hits))
    return made.model_copy(update={"rows": (row,)})


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(20, 3, "reproduced"), (3, 20, "not reproduced"), (12, 9, "inconclusive")],
)
def test_an_order_on_one_checkpoint_is_judged_over_its_images(tmp_path, first, second, verdict):
    """McNemar: only images that one of the two gets right alone say anything."""
    a = [True] * first + [False] * second + [True] * 300 + [False] * 50
    b = [False] * first + [True] * second + [True] * 300 + [False] * 50
    write_records(tmp_path / "tiny" / "records.jsonl", [on_images("a", a), on_images("b", b)])
    judged = judge_row(order(), claim(), Evidence(tmp_path))
    assert judged.verdict == verdict
    assert f"{len(a)} images: {first} right here alone, {second} there alone" in judged.detail
    p = stats.binomtest(first, first + second).pvalue
    assert f"McNemar p = {p:.2g}" in judged.detail
    downwards = judge_row(order(direction="<"), claim(), Evidence(tmp_path)).verdict
    opposite = {"reproduced": "not reproduced", "not reproduced": "reproduced"}
    assert downwards == opposite.get(verdict, verdict)


def test_bits_of_images_are_those_of_the_score():
    hits = [True, False, True, True, False, False, True, False, True]
    row = on_images("a", hits).rows[0]
    assert row.hits == hits
    assert "right" not in Scores(stage="resized", top1=5.0, loss=0.1, samples=450).model_dump_json()
    with pytest.raises(ValueError, match="which samples top1 counts"):
        on_images("a", hits, top1=90.0)


def test_bases_that_failed_leave_an_order_open(tmp_path):
    whole = {"a": [92, 93, 94, 95, 96, 97], "b": [90, 91.1, 92.2, 92.8, 94.1, 95.0]}
    assert judge_row(order(), claim(), evidence(tmp_path, whole)).verdict == "reproduced"
    records = read_records(tmp_path / "tiny" / "records.jsonl")
    records[0] = records[0].model_copy(update={"status": "failed", "rows": ()})
    write_records(tmp_path / "tiny" / "records.jsonl", records)
    judged = judge_row(order(), claim(), Evidence(tmp_path))
    assert (judged.verdict, judged.measured.n) == ("inconclusive", 5)
    assert "incomplete: 1 cell(s) without a result" in judged.detail


def test_a_part_of_the_cells_reproduces_nothing_and_cells_of_no_suite_do_not_count(
    tmp_path, monkeypatch
):
    whole = evidence(tmp_path, {"a": [91.73] * 5})
    assert judge_row(value(), claim(), whole).verdict == "reproduced"
    meant = [r.cell for r in whole.of("tiny")]
    monkeypatch.setattr(Evidence, "cells", lambda self, name: meant)
    records = read_records(tmp_path / "tiny" / "records.jsonl")
    for kept, verdict, missing in (
        (records[:1], "inconclusive", 4),
        (records[:4], "inconclusive", 1),
    ):
        write_records(tmp_path / "tiny" / "records.jsonl", kept)
        judged = judge_row(value(), claim(), Evidence(tmp_path))
        assert judged.verdict == verdict
        assert f"incomplete: {missing} cell(s) without a result" in judged.detail
    foreign = records[0].model_copy(
        update={"cell": meant[0].model_copy(update={"base": Recipe(epochs=2, lr=0.1)})}
    )
    write_records(tmp_path / "tiny" / "records.jsonl", [foreign])
    assert judge_row(value(), claim(), Evidence(tmp_path)).verdict == "not run"


def test_a_verdict_names_what_is_odd_about_its_records(tmp_path):
    judged = judge_row(value(), claim(), evidence(tmp_path, {"a": [91.73]}, dirty=True))
    assert "1 record(s) from uncommitted code" in judged.detail
    assert judged.verdict == "inconclusive"
    records = [
        r.model_copy(update={"floor": True, "met": False})
        for r in read_records(tmp_path / "tiny" / "records.jsonl")
    ]
    write_records(tmp_path / "tiny" / "records.jsonl", records)
    detail = judge_row(value(), claim(), Evidence(tmp_path)).detail
    assert "1 record(s) at the feasible floor; 1 record(s) below their budget" in detail


def test_without_records_a_claim_is_not_run_and_shows_no_number(tmp_path):
    judged = judge_row(
        value(at=Pick(suite="digits", technique="base", model="lenet5")),
        claim(),
        Evidence(tmp_path),
    )
    assert (judged.verdict, judged.measured, judged.detail) == ("not run", None, "nothing")
    last = page([(ledger.load()[0], claim(value()), [judged])]).splitlines()[-1].split("|")
    assert [c.strip() for c in last[2:5]] == ["91.73", "–", "**not run**"]


def test_proxies_are_never_reproduced(tmp_path):
    found = evidence(tmp_path, {"a": [92, 93, 94, 95, 96], "b": [90, 91.1, 92.2, 92.8, 94.1]})
    shown, hidden = (judge_row(order(proxy=True, direction=d), claim(), found) for d in "><")
    assert (shown.verdict, hidden.verdict) == (
        "proxy: direction shown",
        "proxy: direction not shown",
    )


def test_checks_measure_ratios_and_properties(tmp_path, monkeypatch):
    from widthbench import _claims

    monkeypatch.setattr(_claims, "numbers", lambda: [1.2, 1.9, 9.0], raising=False)
    monkeypatch.setattr(ledger, "_function", lambda name: _claims.numbers)
    rule = {"what": "x", "check": "some:numbers", "direction": "<=", "bound": 2.0}
    ratio, held = (
        judge_row(Row(kind=k, **rule), claim(), Evidence(tmp_path)) for k in ("ratio", "property")
    )
    assert (ratio.verdict, ratio.measured.mean) == ("reproduced", 1.9)
    assert (held.verdict, held.detail) == ("not reproduced", "<= 2 in 2 of 3")
    monkeypatch.setattr(_claims, "numbers", lambda: [1.2, 1.9], raising=False)
    assert (
        judge_row(Row(kind="ratio", **rule), claim(), Evidence(tmp_path)).verdict == "inconclusive"
    )
    monkeypatch.setattr(_claims, "numbers", lambda: [float("nan")], raising=False)
    assert (
        judge_row(Row(kind="property", **rule), claim(), Evidence(tmp_path)).verdict
        == "not reproduced"
    )


def test_a_check_that_takes_the_evidence_reads_records_and_says_what_is_missing(
    tmp_path, monkeypatch
):
    found = evidence(tmp_path, {"a": [1, 2, 3]}, dirty=True)

    def check(evidence):
        assert evidence is found
        return ledger.Picked({0: 0.5, 1: 0.7}, found.of("tiny"), missing=2)

    monkeypatch.setattr(ledger, "_function", lambda name: check)
    judged = judge_row(
        Row(what="x", kind="property", check="some:check", direction="<=", bound=2.0),
        claim(),
        found,
    )
    assert (judged.verdict, judged.measured.n, len(judged.records)) == ("inconclusive", 2, 3)
    assert "incomplete: 2 cell(s) without a result" in judged.detail
    assert "3 record(s) from uncommitted code" in judged.detail


def test_a_pick_takes_an_entry_of_a_series_and_tells_variants_and_arguments_apart(tmp_path):
    records = []
    for variant, args in (
        ("", {"widths": [5]}),
        ("short", {"widths": [5]}),
        ("", {"widths": [5], "act_layer": "tanh"}),
    ):
        old = record("a", 0, 90.0)
        cell = old.cell.model_copy(update={"variant": variant, "model_args": args})
        series = {"loss": [1.0, len(variant), len(args)]}
        records.append(
            old.model_copy(update={"key": variant + str(args), "cell": cell, "series": series})
        )
    write_records(tmp_path / "tiny" / "records.jsonl", records)
    found = Evidence(tmp_path)

    def read(**changes):
        args = {"args": {"widths": [5]}, "exactly": True, "metric": "series:loss", **changes}
        return list(found.pick(Pick(suite="tiny", technique="a", **args)).values.values())

    assert read(entry=0) == [1.0]
    assert read(entry=1) == [0.0]
    assert read(entry=1, variant="short") == [5.0]
    assert read() == [1.0]
    assert read(args={"act_layer": "tanh"}, exactly=False) == [2.0]
    assert read(entry=3) == []
    assert read(entry="least") == [0.0]
    assert read(metric="series:nothing") == []
    with pytest.raises(UsageError, match="2 kinds of cells"):
        read(exactly=False)


def test_the_least_entry_leaves_out_those_that_are_not_there():
    noted = record("a", 0, 90.0).model_copy(
        update={"series": {"cosine": [0.5, 0.25, 0.75, None], "none": [None]}}
    )
    assert Pick(suite="tiny", metric="series:cosine", entry="least").value(noted) == 0.25
    assert Pick(suite="tiny", metric="series:none", entry="least").value(noted) is None


def test_compression_is_of_parameters_and_an_error_is_what_is_left_of_a_hundred():
    small = record("a", 0, 90.0).model_copy(update={"base_params": 3000, "params": 1200})
    assert Pick(suite="tiny", metric="compression").value(small) == 2.5
    assert Pick(suite="tiny", metric="top1_error").value(small) == 10.0
    assert (
        Pick(suite="tiny", metric="compression").value(small.model_copy(update={"params": None}))
        is None
    )


def converging(estimator, seed, accuracy):
    shared = {
        "dataset": "mnist",
        "model": "lenet5",
        "variant": "fixed mu",
        "technique": "autoprune",
        "budget": "macs:1",
        "seed": seed,
    }
    meant = [
        c
        for c in ledger.suites.load("autoprune-lenet").cells()
        if all(getattr(c, k) == v for k, v in shared.items())
        and c.params.get("start") == "fresh"
        and c.params.get("estimator", "softplus") == estimator
    ]
    series = {
        "trajectory.step": [10 * (i + 1) for i in range(len(accuracy))],
        "trajectory.val_top1": accuracy,
    }
    old = record("a", seed, 90.0)
    return old.model_copy(update={"key": f"{estimator} {seed}", "cell": meant[0], "series": series})


def test_steps_to_convergence_are_counted_to_the_point_after_which_no_accuracy_is_a_point_short(
    tmp_path,
):
    from widthbench._claims import autoprune

    late, early = [50.0, 97.5, 96.4, 97.0, 98.0, 98.0], [97.0, 99.0, 97.0, 97.0, 97.0, 98.0]
    assert autoprune.steps(converging("softplus", 0, late)) == 40
    assert autoprune.steps(converging("softplus", 0, early)) == 10
    assert autoprune.steps(converging("softplus", 0, [98.0])) == 10
    assert autoprune.steps(record("a", 0, 90.0)) is None
    runs = [("softplus", 0, late), ("leaky_relu", 0, early), ("softplus", 1, late)]
    write_records(
        tmp_path / "autoprune-lenet" / "records.jsonl", [converging(*run) for run in runs]
    )
    check = autoprune.Slower("autoprune-lenet", "lenet5", "softplus", "leaky_relu")
    found = check(Evidence(tmp_path))
    assert (found.values, len(found.records), found.missing) == ({0: 30.0}, 3, 7)


def test_recoverability_is_recoveries_per_chance(tmp_path):
    from widthbench._claims import autoprune

    def gated(decay, seed, recoveries, shut):
        cells = ledger.suites.load("autoprune-lenet").cells()
        (meant,) = [
            c
            for c in cells
            if (c.model, c.variant, c.technique, c.seed)
            == ("lenet5", "fixed mu", "autoprune", seed)
            and c.params.get("weight_decay") == decay
            and "decoupling" not in c.params
        ]
        series = {"trajectory.recoveries": [0, recoveries], "trajectory.shut": [0, shut]}
        return record("a", seed, 90.0).model_copy(
            update={"key": f"{decay} {seed}", "cell": meant, "series": series}
        )

    assert autoprune.rate(gated(0, 0, 3, 600)) == 5.0
    assert autoprune.rate(gated(0, 0, 0, 0)) is None
    runs = [(0, 0, 3, 600), (5e-4, 0, 4, 1000), (0, 1, 1, 500), (5e-4, 1, 0, 0)]
    write_records(tmp_path / "autoprune-lenet" / "records.jsonl", [gated(*run) for run in runs])
    found = autoprune.Recoverability("autoprune-lenet", "lenet5")(Evidence(tmp_path))
    assert (found.values, len(found.records), found.missing) == ({0: 1.0}, 4, 6)


def test_a_check_that_does_not_exist_is_named(tmp_path):
    row = Row(what="x", kind="property", check="nowhere:nothing", direction=">", bound=0)
    with pytest.raises(UsageError, match="no check 'nowhere:nothing'"):
        judge_row(row, claim(), Evidence(tmp_path))


SHOWN, HIDDEN = "proxy: direction shown", "proxy: direction not shown"


def test_sanity_checks_decide_nothing_unless_they_fail_and_are_listed_apart():
    number, check = value(), value(sanity=True)
    found = summarise({0: 1.0})
    holds, fails = (Judged(check, v, found) for v in ("reproduced", "not reproduced"))
    assert overall([holds, Judged(number, "not run")]) == "not run"
    assert overall([fails, Judged(number, "reproduced", found)]) == "not reproduced"
    assert overall([holds]) == "reproduced"
    document = ledger.load()[0]
    finding = (document, claim(number), [Judged(number, "reproduced", found), holds])
    alone = (document, claim(check), [holds])
    text = page([alone, finding])
    assert "1 claims: 1 reproduced." in text
    assert "1 sanity checks: 1 reproduced." in text
    assert text.index("## Sanity checks") > text.index(f"## {document.document}")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "not reproduced", "not run"], "not reproduced"),
        (["reproduced", "not run"], "inconclusive"),
        (["not run", "not run"], "not run"),
        (["reproduced", SHOWN], SHOWN),
        (["reproduced", HIDDEN, "not run"], HIDDEN),
    ],
)
def test_a_claim_is_as_good_as_its_rows(verdicts, expected):
    assert overall([Judged(value(), v, summarise({0: 1.0})) for v in verdicts]) == expected


@pytest.mark.parametrize(
    ("proxies", "expected"),
    [
        ([SHOWN, SHOWN], SHOWN),
        ([SHOWN, "not run"], "inconclusive"),
        ([SHOWN, HIDDEN], HIDDEN),
        (["not run"], "not run"),
    ],
)
def test_proxies_stand_in_for_those_at_full_scale_that_were_not_run(proxies, expected):
    rows = [Judged(value(proxy=True), v, summarise({0: 1.0})) for v in proxies]
    assert overall([*rows, Judged(value(), "not run")]) == expected
    assert (
        overall([*rows, Judged(value(), "not reproduced", summarise({0: 1.0}))]) == "not reproduced"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerance": None}, "needs reported and tolerance"),
        ({"kind": "ratio"}, "needs direction and bound"),
        ({"kind": "ratio", "direction": "<", "bound": 1.0}, "measured by a check"),
        ({"minus": pick("b")}, "takes no minus"),
        ({"kind": "gain"}, "needs minus"),
        ({"check": "a:b"}, "exclude each other"),
        ({"kind": "order", "direction": ">=", "minus": pick("b")}, "an order is strict"),
    ],
)
def test_incomplete_rules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        value(**changes)


def _write(tmp_path, name, rows):
    (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))


def weights_run(variant, seed, mu, **values):
    usual = {"network": "lenet_300_100", "base_val_top1": 98.0, "val_top1": 98.0, "top1": 97.0}
    usual |= {"compression": 10.0, "converged": 100, "returned": 1, "recoveries": 4, "shut": 10**6}
    usual |= {"product": 0.0, "cosine": 0.5}
    return {**usual, "variant": variant, "seed": seed, "mu": mu, **values}


def test_single_weights_are_compared_at_equal_accuracy_and_at_equal_compression(tmp_path):
    from widthbench._claims import autoprune

    rule = [
        weights_run("rule", 5, 0.4, val_top1=97.6, compression=100.0, top1=96.0, recoveries=8),
        weights_run("rule", 5, 0.1, compression=10.0, top1=98.0, returned=3),
        weights_run("rule", 5, 0.8, val_top1=97.4, compression=1000.0, top1=90.0),
        weights_run("rule", 5, 1.0, val_top1=11.0, compression=9e4, top1=11.0, returned=900),
    ]
    coupled = [
        weights_run("coupled", 5, 0.1, compression=10.0, top1=97.0),
        weights_run("coupled", 5, 0.4, val_top1=97.0, compression=100.0, top1=96.0),
    ]
    # the seeds that rules were written by judge nothing
    earlier = [r | {"seed": 0, "top1": 50.0} for r in rule + coupled]
    _write(tmp_path, "autoprune-weights.jsonl", rule + coupled + earlier)
    found, pair = Evidence(tmp_path), ("rule", "coupled")
    # half a point is lost halfway between 100 and 1000 times, and between 10 and 100 times
    assert autoprune.more_compact(found, *pair).values == {5: pytest.approx(1.0)}
    # halfway between 10 and 1000 in the logarithm lies 31.6; at 30: 97.05 against 96.52
    share = (math.log(30) - math.log(10)) / (math.log(100) - math.log(10))
    expected = (98 - 2 * share) - (97 - share)
    assert autoprune.more_accurate(found, *pair).values == {5: pytest.approx(expected)}
    assert autoprune.slower(found, *pair).values == {5: 0.0}
    # without the network at chance: (1 + 3 + 1) of (8 + 4 + 4), and 2 of 8
    assert autoprune.stays_open(found, *pair).values == {5: pytest.approx(5 / 16 - 2 / 8)}
    at = {"at": "compression"}
    assert autoprune.recovers_more(found, *pair, **at).values == {5: pytest.approx(4 * share)}
    # halfway between 8 and 4, against 4
    at = {"at": "accuracy"}
    assert autoprune.recovers_more(found, *pair, **at).values == {5: pytest.approx(2.0)}
    assert autoprune.more_compact(found, "rule", "absent").values == {}
    far = [
        weights_run("far", 5, 0.1, compression=50.0),
        weights_run("far", 5, 0.4, compression=60.0),
    ]
    _write(tmp_path, "autoprune-weights.jsonl", rule + far)
    found = Evidence(tmp_path)
    assert autoprune.more_accurate(found, "rule", "far").values == {}  # none near 30
    assert autoprune.more_compact(found, "rule", "far").values == {}  # half a point is not lost


def test_single_weights_angles_recoveries_and_compression(tmp_path):
    from widthbench._claims import autoprune

    rows = [
        weights_run("rule", 0, 0.1, product=-0.5, cosine=0.2, recoveries=7),
        weights_run("rule", 0, 0.2, recoveries=3),
        weights_run("rule", 1, 0.1, network="lenet5", val_top1=97.95, compression=400.0),
        weights_run("rule", 1, 0.2, network="lenet5", val_top1=97.8, compression=900.0),
        weights_run("rule", 2, 0.1, network="lenet5", val_top1=97.0),
        weights_run("coupled", 0, 0.1, product=-9.0),
    ]
    _write(tmp_path, "autoprune-weights.jsonl", rows)
    found = Evidence(tmp_path)
    assert autoprune.least_product(found).values[("lenet_300_100", 0)] == -0.5
    assert autoprune.least_cosine(found).values[("lenet_300_100", 0)] == 0.2
    assert autoprune.recoveries(found).values == {0: 3}
    assert autoprune.without_loss(found).values == {1: 400.0}
    assert autoprune.recoveries(Evidence(tmp_path / "nowhere")).values == {}


def test_splittings_costs_are_read_as_ratios_of_their_pairs(tmp_path):
    from widthbench._claims import splitting

    pairs = [
        {"what": "cost", "network": n, "backward": 2.0, "product": p, "all": 7 * p}
        for n in ("lenet5", "x")
        for p in (1.0, 3.0)
    ]
    times = [{"what": "exact", "n": 4, "d": d, "seconds": d**2.5} for d in (512, 1024, 2048)]
    # smaller ones, where LAPACK has not settled, are left out
    times.append({"what": "exact", "n": 4, "d": 128, "seconds": 1e9})
    times += [{"what": "exact", "n": n, "d": 200, "seconds": 3 * n} for n in (8, 16, 32)]
    _write(tmp_path, "splitting-speed.jsonl", pairs + times)
    found = Evidence(tmp_path)
    assert splitting.product_lenet5(found).values == {0: 0.5, 1: 1.5}
    assert splitting.eigenpairs_lenet5(found).values == {0: 3.5, 1: 10.5}
    assert splitting.eigenpairs_vgg16_cifar(found).values == {}
    assert splitting.exponent_of_d(found).values[0] == pytest.approx(2.5)
    assert splitting.exponent_of_n(found).values[0] == pytest.approx(1.0)


def test_splittings_law_is_read_at_one_epsilon(tmp_path):
    from widthbench._claims import splitting

    laws = [
        {"what": "law", "seed": s, "epsilon": e, "fall": 0.9 * e, "law": e}
        for s in (0, 1)
        for e in (0.05, 0.1)
    ]
    finals = [
        {"what": "final", "select": n, "losses": v}
        for n, v in (("eigen", [0.1, 0.4]), ("none", [0.3, 0.3]))
    ]
    _write(tmp_path, "splitting-law.jsonl", laws + finals)
    found = Evidence(tmp_path)
    assert splitting.fall(found).values == pytest.approx({0: 0.045, 1: 0.045})
    assert splitting.against_the_law(found).values == pytest.approx({0: 0.1, 1: 0.1})
    assert splitting.gain_of_growing(found).values == pytest.approx({0: 0.2, 1: -0.1})
    assert splitting.gain_of_growing(Evidence(tmp_path / "nothing")).values == {}


def test_rounds_are_held_against_widths_only_where_all_sizes_are_there(tmp_path):
    from widthbench._claims import splitting

    def grown(cell, rounds):
        series = {
            "trajectory.open": [20 + 12 * rounds],
            "trajectory.step": [rounds],
            "trajectory.splits": [12 * rounds],
        }
        return Record(
            key=f"{cell.budget}{cell.seed}".ljust(40, "0"), cell=cell, **DONE, series=series
        )

    cells = [
        c for c in ledger.suites.load("growing").cells() if c.variant == "rounds" and c.seed < 2
    ]
    assert len(cells) == 10
    records = [grown(c, 3 + i) for i, c in enumerate(cells)]
    write_records(tmp_path / "growing" / "records.jsonl", records[:-1])
    found = splitting.rounds_against_width(Evidence(tmp_path))
    assert found.values == pytest.approx({0: 1.0})
    assert found.missing == 25 - 9
    odd = records[4].model_copy(update={"series": records[4].series | {"trajectory.step": [1]}})
    write_records(tmp_path / "growing" / "records.jsonl", [*records[:4], odd, *records[5:]])
    found = splitting.rounds_against_width(Evidence(tmp_path))
    assert found.values[0] < 0.95
    assert found.values[1] == pytest.approx(1.0)
    assert splitting.splits_against_width(Evidence(tmp_path)).values == pytest.approx(
        {0: 1.0, 1: 1.0}
    )


def test_a_pipelines_cost_is_all_that_it_spent(tmp_path):
    from widthbench._claims import splitting

    def spent(cell, **parts):
        bills = {k: Spent(forward_macs=v, backward_macs=2 * v) for k, v in parts.items()}
        return Record(key=cell.id.ljust(40, "0"), cell=cell, **DONE, spent=bills)

    cells = [
        c
        for c in ledger.suites.load("growing").cells()
        if c.model == "lenet5" and c.dataset == "mnist" and c.seed == 0
    ]
    split = [
        c for c in cells if c.technique == "splitting" and not c.params.keys() & {"select", "per"}
    ]
    prune = [c for c in cells if c.technique == "l1-norm"]
    assert len(split) == len(prune) == 2
    records = [spent(c, base=0, decision=20, adaptation=5) for c in split] + [
        spent(c, base=95, decision=0, adaptation=5) for c in prune
    ]
    write_records(tmp_path / "growing" / "records.jsonl", records)
    found = splitting.pipeline_lenet5(Evidence(tmp_path))
    assert found.values == {(0, c.budget): 0.25 for c in split}
    assert found.missing == 2 * 10 - 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("document =", "x.toml: not valid TOML"),
        ('document = "a"\ntitle = "b"\n', "x.toml: claims: Field required"),
    ],
)
def test_malformed_files_are_named(text, message):
    with pytest.raises(UsageError, match=message):
        ledger.parse(text, "x.toml")


def test_unknown_ids_suggest_others():
    with pytest.raises(UsageError, match="unknown claim 'M99'"):
        ledger.choose(ledger.load(), ["M99"])


@pytest.fixture(scope="module")
def published():
    """Records that are read once."""
    return Evidence(ROOT / "results" / "published")


def test_the_committed_page_says_what_the_committed_records_say(published):
    judged = [
        (d, c, ledger.judge(c, published))
        for d, c in ledger.choose(ledger.load())
        if not any(r.check for r in c.rows)
    ]
    committed = (ROOT / "results" / "published" / "claims.md").read_text()
    for document, one, rows in judged:
        section = page([(document, one, rows)]).partition(f"### {one.id}: ")[2]
        assert f"### {one.id}: {section}".rstrip() in committed, (
            f"{one.id}: run `widthbench claims` and commit results/published/claims.md"
        )


def test_a_reported_number_never_fills_a_measured_column():
    for line in (ROOT / "results" / "published" / "claims.md").read_text().splitlines():
        cells = [c.strip() for c in line.split("|")]
        all_failed = "**inconclusive**" in cells and re.search(r"\d+ of \d+ failed", line)
        if len(cells) > 5 and ("**not run**" in cells or (all_failed and "(n=" not in cells[3])):
            assert cells[3] == "–"
        elif len(cells) > 5 and re.match(r"\*\*", cells[4]):
            assert "(n=" in cells[3]
            assert cells[6]  # the records it rests on


def test_whatever_a_document_reports_leaves_every_measured_column_as_it_is(tmp_path, published):
    """The reported numbers of all claims are put up to nonsense: nothing measured moves, and
    without records nothing is there."""
    nothing = Evidence(tmp_path)
    for document in ledger.load():
        for one in document.claims:
            rows = tuple(
                r for r in one.rows if not r.check
            )  # checks take neither the row nor the document
            if not rows:
                continue
            honest = one.model_copy(update={"rows": rows})
            moved = tuple(
                r if r.reported is None else r.model_copy(update={"reported": 987654.0})
                for r in rows
            )
            absurd = one.model_copy(update={"rows": moved})
            both = [(document, c, ledger.judge(c, published)) for c in (honest, absurd)]
            columns = [[r["measured"] for r in plain([judged])[0]["rows"]] for judged in both]
            assert columns[0] == columns[1], one.id
            text = page([both[1]])
            for line in text.splitlines():
                cells = line.split("|")
                assert "987654" not in "".join(cells[3:4]), line
            assert {
                r["measured"]
                for r in plain([(document, one, ledger.judge(honest, nothing))])[0]["rows"]
            } == {"–"}


def test_the_committed_data_are_those_of_the_committed_page():
    text = (ROOT / "results" / "published" / "claims.md").read_text()
    for one in json.loads((ROOT / "results" / "published" / "claims.json").read_text()):
        assert f"### {one['id']}: {one['verdict']}" in text
        for row in one["rows"]:
            assert row["measured"] in text


def test_parameters_follow_from_structure_as_the_resized_network_has_them():
    import torch
    from widthbench._claims.structure import parameters

    import widthbench
    from widthbench.experiment import suites
    from widthbench.networks import models

    (cell, *_) = [
        c
        for c in suites.load("merging-cifar10").cells()
        if c.model == "mobilenetv1_100_cifar" and c.budget
    ]
    net = models.create(cell.model, classes=10, channels=3, size=cell.size)
    x = torch.randn(1, 3, cell.size, cell.size)
    small = widthbench.apply(
        "l1-norm", net, budget=cell.budget, example_input=x, include=list(cell.include)
    )
    (counted,) = parameters("merging-cifar10", cell.model, cell.budget)
    assert counted == sum(p.numel() for p in small.parameters()) / 1e6
    assert parameters("merging-cifar10", cell.model) == [
        sum(p.numel() for p in net.parameters()) / 1e6
    ]


def test_arguments_of_a_check_are_given_to_it_and_need_one(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_function", lambda name: lambda number: [number])
    row = Row(
        what="x",
        kind="value",
        reported=2.0,
        tolerance=0.5,
        check="some:thing",
        given={"number": 2.25},
    )
    assert judge_row(row, claim(), Evidence(tmp_path)).verdict == "reproduced"
    with pytest.raises(ValueError, match="given needs check"):
        Row(what="x", kind="value", reported=2.0, tolerance=0.5, given={"number": 2.25})
