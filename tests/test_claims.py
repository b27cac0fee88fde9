import re
from pathlib import Path

import pytest

from widthbench import claims
from widthbench.claims import Claim, Evidence, Judged, Pick, Row, judge_row, overall
from widthbench.errors import UsageError
from widthbench.recipe import Recipe
from widthbench.records import Cell, Record, write_records
from widthbench.records import Row as Scores
from widthbench.report.claims import page
from widthbench.report.statistics import summarise

ROOT = Path(__file__).parent.parent
EXPECTED = (
    [f"M{i}" for i in range(1, 9)]
    + [f"A{i}" for i in range(1, 10)]
    + [f"S{i}" for i in range(1, 9)]
    + [f"R{i}" for i in range(1, 10)]
)


def claim(*rows):
    return Claim(id="X1", text="a test", needs="nothing", rows=rows or (order(),))


def order(**changes):
    return Row(**{"what": "a - b", "kind": "order", "direction": ">", "at": pick("a"), "minus": pick("b"), **changes})


def value(**changes):
    return Row(**{"what": "a", "kind": "value", "reported": 91.73, "tolerance": 0.01, "at": pick("a"), **changes})


def pick(technique):
    return Pick(suite="tiny", technique=technique, stage="resized")


def record(technique, seed, top1, **provenance):
    recipe = Recipe(epochs=1, lr=0.1)
    cell = Cell(
        dataset="digits", model="lenet5", size=28, technique=technique, budget="macs:0.5", seed=seed, base=recipe, finetune=recipe
    )
    row = Scores(stage="resized", top1=top1, loss=0.1, samples=450)
    return Record(key=f"{technique}{seed}" + "0" * 30, cell=cell, status="done", rows=(row,), provenance=provenance)


def evidence(tmp_path, scores, **provenance):
    records = [record(name, seed, top1, **provenance) for name, values in scores.items() for seed, top1 in enumerate(values)]
    write_records(tmp_path / "tiny" / "records.jsonl", records)
    return Evidence(tmp_path)


def test_every_claim_of_the_documents_is_there():
    assert [c.id for d in claims.load() for c in d.claims if c.id[0] in "MASR"] == EXPECTED


def test_reported_numbers_are_those_of_the_documents():
    """A few of each, typed in here a second time."""
    found = {(c.id, r.what): r.reported for d in claims.load() for c in d.claims for r in c.rows}
    assert found["M1", "SELU, merged"] == 80.28
    assert found["M1", "SELU, gain of merging"] == 55.11
    assert found["M2", "60 %, merged"] == 55.88
    assert found["M3", "ResNet-34 30 %, gain top-5"] == 31.64
    assert found["M3", "VGG-16, baseline top-1"] == 73.36
    assert found["M4", "LeNet-5, NMF, mean over ratios"] == 15.80
    assert found["A1", "MobileNetV2 207 to 209 M, AutoPrune, top-1 error"] == 26.7
    assert found["A1", "MobileNetV1 325 M, base, top-1 error"] == 31.6


@pytest.mark.parametrize(("measured", "right"), [(91.73, True), (91.74, True), (91.72, True), (91.75, False), (91.0, False)])
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
        ([92, 93, 94, 95], [80, 81, 82, 83], "inconclusive"),  # four bases are too few, however far apart
        ([92, 92, 92, 92, 92], [91, 91, 91, 91, 91], "reproduced"),  # the same difference everywhere
        ([92, 92, 92, 92, 92], [92, 92, 92, 92, 92], "inconclusive"),
    ],
)
def test_an_order_needs_an_interval_beyond_the_bound_over_five_bases(tmp_path, a, b, verdict):
    assert judge_row(order(), claim(), evidence(tmp_path, {"a": a, "b": b})).verdict == verdict


def test_orders_can_point_down_and_have_a_margin(tmp_path):
    found = evidence(tmp_path, {"a": [90, 91.1, 92.2, 92.8, 94.1], "b": [90.3, 91.3, 92.4, 93.2, 94.4]})
    assert judge_row(order(direction="<"), claim(), found).verdict == "reproduced"
    assert judge_row(order(bound=-0.5), claim(), found).verdict == "reproduced"
    assert judge_row(order(bound=0.5), claim(), found).verdict == "not reproduced"


def test_pairs_share_a_base_and_a_checkpoint_counts_once(tmp_path):
    row = Row(what="gain", kind="gain", reported=2.0, tolerance=3.0, at=pick("a"), minus=pick("b"))
    seeds = judge_row(row, claim(), evidence(tmp_path, {"a": [92, 93, 94], "b": [90, 91]}))
    assert (seeds.measured.mean, seeds.measured.n) == (2.0, 2)
    one = judge_row(row, claim(), evidence(tmp_path, {"a": [92, 92, 92], "b": [90, 90, 90]}, checkpoint="abc"))
    assert (one.measured.n, one.measured.std) == (1, None)


def test_ambiguous_picks_are_refused(tmp_path):
    with pytest.raises(UsageError, match="two records with different values match"):
        judge_row(value(at=Pick(suite="tiny")), claim(), evidence(tmp_path, {"a": [91], "b": [92]}))


def test_without_records_a_claim_is_not_run_and_shows_no_number(tmp_path):
    judged = judge_row(value(), claim(), Evidence(tmp_path))
    assert (judged.verdict, judged.measured, judged.detail) == ("not run", None, "nothing")
    last = page([(claims.load()[0], claim(value()), [judged])]).splitlines()[-1].split("|")
    assert [c.strip() for c in last[2:5]] == ["91.73", "–", "**not run**"]


def test_proxies_are_never_reproduced(tmp_path):
    found = evidence(tmp_path, {"a": [92, 93, 94, 95, 96], "b": [90, 91.1, 92.2, 92.8, 94.1]})
    shown, hidden = (judge_row(order(proxy=True, direction=d), claim(), found) for d in "><")
    assert (shown.verdict, hidden.verdict) == ("proxy scale", "proxy scale")
    assert shown.detail.startswith("direction shown")
    assert hidden.detail.startswith("direction not shown")


def test_checks_measure_ratios_and_properties(tmp_path, monkeypatch):
    from widthbench import _claims

    monkeypatch.setattr(_claims, "numbers", lambda: [1.2, 1.9, 9.0], raising=False)
    monkeypatch.setattr(claims, "_function", lambda name: _claims.numbers)
    rule = {"what": "x", "check": "some:numbers", "direction": "<=", "bound": 2.0}
    ratio, held = (judge_row(Row(kind=k, **rule), claim(), Evidence(tmp_path)) for k in ("ratio", "property"))
    assert (ratio.verdict, ratio.measured.mean) == ("reproduced", 1.9)
    assert (held.verdict, held.detail) == ("not reproduced", "<= 2 in 2 of 3")
    monkeypatch.setattr(_claims, "numbers", lambda: [float("nan")], raising=False)
    assert judge_row(Row(kind="property", **rule), claim(), Evidence(tmp_path)).verdict == "not reproduced"


def test_a_check_that_does_not_exist_is_named(tmp_path):
    row = Row(what="x", kind="property", check="nowhere:nothing", direction=">", bound=0)
    with pytest.raises(UsageError, match="no check 'nowhere:nothing'"):
        judge_row(row, claim(), Evidence(tmp_path))


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "not reproduced", "not run"], "not reproduced"),
        (["reproduced", "not run"], "inconclusive"),
        (["not run", "not run"], "not run"),
        (["reproduced", "proxy scale"], "proxy scale"),
    ],
)
def test_a_claim_is_as_good_as_its_rows(verdicts, expected):
    assert overall([Judged(value(), v, summarise({0: 1.0})) for v in verdicts]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerance": None}, "needs reported and tolerance"),
        ({"kind": "ratio"}, "needs direction and bound"),
        ({"minus": pick("b")}, "takes no minus"),
        ({"kind": "gain"}, "needs minus"),
        ({"check": "a:b"}, "exclude each other"),
        ({"kind": "order", "direction": ">=", "minus": pick("b")}, "an order is strict"),
    ],
)
def test_incomplete_rules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        value(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("document =", "x.toml: not valid TOML"), ('document = "a"\ntitle = "b"\n', "x.toml: claims: Field required")],
)
def test_malformed_files_are_named(text, message):
    with pytest.raises(UsageError, match=message):
        claims.parse(text, "x.toml")


def test_unknown_ids_suggest_others():
    with pytest.raises(UsageError, match="unknown claim 'M99'"):
        claims.choose(claims.load(), ["M99"])


def test_the_committed_page_says_what_the_committed_records_say():
    found = Evidence(ROOT / "results")
    judged = [(d, c, claims.judge(c, found)) for d, c in claims.choose(claims.load()) if not any(r.check for r in c.rows)]
    committed = (ROOT / "results" / "claims.md").read_text()
    for document, one, rows in judged:
        section = page([(document, one, rows)]).partition(f"### {one.id}: ")[2]
        assert f"### {one.id}: {section}".rstrip() in committed, f"{one.id}: run `widthbench claims` and commit results/claims.md"


def test_a_reported_number_never_fills_a_measured_column():
    for line in (ROOT / "results" / "claims.md").read_text().splitlines():
        cells = [c.strip() for c in line.split("|")]
        if len(cells) > 5 and "**not run**" in cells:
            assert cells[3] == "–"
        elif len(cells) > 5 and re.match(r"\*\*", cells[4]):
            assert "(n=" in cells[3]
            assert cells[6]  # the records it rests on
