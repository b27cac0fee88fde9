"""The static page carries every row, claim and record, and nothing that a plug-in says can act in
it."""

import base64
import gzip
import json
import re

import pytest
from made import record, suite

from widthbench import cli
from widthbench.experiment.records import write_records
from widthbench.report import site

EVIL = "</script><img src=x onerror=alert(1)>"


def shown(records, name="s", **changes):
    return site.Shown(name, suite(**changes), records, [], "ab" * 32)


def packed(page, name):
    (text,) = re.findall(
        rf'<script type="application/gzip" data-records="{name}">([^<]*)</script>', page
    )
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_every_row_and_every_record_is_there():
    records = [record(seed=s, top1=90.0 + s) for s in range(3)] + [record("nmf", status="failed")]
    page = site.html([shown(records)])
    assert "91.00 ± 1.00" in page
    assert 'data-order="91.0"' in page
    found = packed(page, "s")
    assert set(found) == {r.key for r in records}
    assert found["l1-norm0"]["record"]["rows"][2]["top1"] == 90.0
    for one in records:
        assert f'href="#record/s/{one.key}"' in page
    assert '<span class="flag" title="it broke | badly">1 of 1 failed</span>' in page


def test_the_line_is_that_of_the_file(tmp_path):
    records = [record("nmf"), record(seed=1), record()]
    write_records(tmp_path / "records.jsonl", records)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    for key, one in packed(site.html([shown(records)]), "s").items():
        assert json.loads(lines[one["line"] - 1])["key"] == key


def test_text_of_plug_ins_is_escaped():
    evil = record(EVIL, budget="macs:0.5", access="none", key="k" * 40)
    broken = record("x", status="failed", reason=EVIL, key="b" * 40)
    claim = {
        **dict.fromkeys(("document", "title", "technique", "text", "note", "needs"), EVIL),
        "id": "M1",
        "verdict": "not run",
        "readings": {EVIL: "not run"},
        "rows": [
            {
                **dict.fromkeys(("what", "reported", "measured", "rule", "check"), EVIL),
                "verdict": "not run",
                "records": [],
            }
        ],
    }
    page = site.html([shown([evil, broken], name=EVIL, title=EVIL)], [claim])
    assert "<img src=x" not in page
    assert page.count("<script") == page.count("</script>")


def test_nothing_is_fetched():
    page = site.html([shown([record()])])
    ours = re.sub(
        r"<style>.*?</style>|<script type=.application/gzip.*?</script>", "", page, flags=re.DOTALL
    )
    assert not re.search(r"(src|href|action)=[\"'](?!#|data:)", ours)
    assert "default-src 'none'" in page
    assert "connect-src" not in page


def test_claims_lead_to_the_records_that_are_there():
    one = record()
    row = {
        "what": "x",
        "reported": "1%",
        "measured": "2%",
        "verdict": "reproduced",
        "rule": "r",
        "check": "",
        "records": [one.key, "gone"],
    }
    claim = {
        "document": "000",
        "title": "t",
        "technique": "",
        "id": "M1",
        "text": "t",
        "note": "",
        "needs": "",
        "verdict": "reproduced",
        "readings": {},
        "rows": [row],
    }
    page = site.html([shown([one])], [claim])
    assert f'href="#record/s/{one.key}"' in page
    assert "/gone" not in page
    assert ">1 record<" in page


def test_what_is_not_finite_does_not_break_the_page():
    bad = record()
    bad = bad.model_copy(
        update={"rows": tuple(r.model_copy(update={"loss": float("nan")}) for r in bad.rows)}
    )
    assert packed(site.html([shown([bad])]), "s")[bad.key]["record"]["rows"][0]["loss"] is None


def test_curves_are_left_out_and_said():
    one = record(series={"path.top1": [1.0] * 100})
    found = packed(site.html([shown([one])]), "s")[one.key]
    assert found["left out"] == {"series": ["path.top1"]}
    assert "series" not in found["record"]


def test_the_command_writes_it(tmp_path, capsys, monkeypatch):
    assert cli.main(["report", "--site", "--results", str(tmp_path)]) == 2
    assert "widthbench run digits" in capsys.readouterr().err
    assert cli.main(["report", "--results", str(tmp_path)]) == 2
    assert "--site" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    write_records(tmp_path / "mine" / "records.jsonl", [record()])
    nothing = site.ledger.Evidence(tmp_path)
    judged = [
        (d, c, site.ledger.judge(c, nothing))
        for d, c in site.ledger.choose(site.ledger.load(), ["M1"])
    ]
    monkeypatch.setattr(site.ledger, "judge_all", lambda results: judged)
    for damaged in ("[", "{}3", "7", "[7]", '[{"id": "M1"}]'):
        (tmp_path / "claims.json").write_text(damaged)
        assert cli.main(["report", "--site", "--results", str(tmp_path)]) == 2, damaged
        assert "widthbench claims" in capsys.readouterr().err
    (tmp_path / "claims.json").unlink()
    (tmp_path / "mine" / "timings.jsonl").write_text('{"half')
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "records.jsonl").write_text("")
    assert cli.main(["report", "--site", "--results", str(tmp_path)]) == 0
    assert ">mine</a>" in (tmp_path / "site.html").read_text()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(
        site, "files", lambda package: (_ for _ in ()).throw(ModuleNotFoundError(package))
    )
    with pytest.raises(site.UsageError, match=r"widthbench\[site\]"):
        site.html([shown([record()])])


def test_ranks_stand_where_statistics_carry_them():
    records = [
        record(t, s, top1=p + 0.1 * s, key=f"{t}{s}")
        for t, p in (("l1-norm", 90), ("nmf", 80))
        for s in range(5)
    ]
    rows = site._suite(shown(records, citable=True))["rows"]
    ranks = {r["technique"]: {c.name: text for c, text, _ in r["cells"]}["rank"] for r in rows}
    assert ranks == {"l1-norm": "1", "nmf": "2", "base": ""}
    assert ">rank</th>" in site.html([shown(records, citable=True)])
    assert ">rank</th>" not in site.html([shown(records)])
