"""Generated bad inputs, into everything that reads files of others: an error that says so, or a
sound result.

No traceback, no half-written file. By default some of each kind; 10,000 in all with
`WIDTHBENCH_EXAMPLES=2000 pytest tests/cli/test_bad_inputs.py`.
"""

import copy
import io
import json
import os
import string
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import record, suite
from safetensors.torch import save

from widthbench import cli
from widthbench.claims import ledger
from widthbench.errors import UsageError
from widthbench.experiment import suites
from widthbench.experiment.records import read_lines, read_records, record_line
from widthbench.networks import weights
from widthbench.report.build import build, texts
from widthbench.report.timing import parse_timings
from widthbench.technique import registry

EXAMPLES = int(os.environ.get("WIDTHBENCH_EXAMPLES", "60"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            "../../etc/passwd",
            "macs:0.5",
            "channels:nan",
            "macs:-1",
            "l1-norm",
            "\x00",
            "\u202e",
            "a" * 5000,
        ]
    ),
)
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3),
    max_leaves=8,
)


@st.composite
def edited(draw, whole):
    """A copy of plain data with up to three places replaced, removed or added to."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        at, path = data, []
        while isinstance(at, dict | list) and at and (not path or draw(st.booleans())):
            key = draw(
                st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1)
            )
            path.append((at, key))
            at = at[key]
        if not path:
            return data
        holder, key = path[-1]
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace":
            holder[key] = draw(values)
        elif what == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(values)
        else:
            holder.append(draw(values))
    return data


def damaged(content):
    """A copy of bytes with one part cut out, doubled, or flipped."""

    @st.composite
    def strategy(draw):
        start = draw(st.integers(0, len(content)))
        stop = draw(
            st.integers(start, min(len(content), start + draw(st.sampled_from([1, 8, 200, 10**6]))))
        )
        part = content[start:stop]
        piece = draw(
            st.sampled_from(
                [b"", part * 2, bytes(b ^ draw(st.integers(0, 255)) for b in part[:64])]
            )
        )
        return content[:start] + piece + content[stop:]

    return strategy()


def toml(data):
    """Plain data as TOML, where TOML can say it."""

    def value(v):
        if isinstance(v, bool):
            return str(v).lower()
        if isinstance(v, float):
            return "nan" if v != v else {float("inf"): "inf", float("-inf"): "-inf"}.get(v, repr(v))
        if isinstance(v, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(x)}" for k, x in v.items()) + "}"
        if isinstance(v, list):
            return "[" + ", ".join(map(value, v)) + "]"
        return json.dumps(v, ensure_ascii=True) if v is not None else "none"

    return "\n".join(f"{json.dumps(k)} = {value(v)}" for k, v in data.items())


def text_of(folder, name):
    import tomllib

    return tomllib.loads((Path(__file__).parents[2] / "bench" / folder / name).read_text())


def no_part_is_left(folder):
    assert [p.name for p in folder.rglob("*") if p.name.endswith(".part")] == []


def of(data):
    """TOML of plain data, edited or cut."""
    return st.one_of(
        edited(data).map(toml),
        damaged(toml(data).encode()).map(lambda b: b.decode(errors="replace")),
    )


SUITE = text_of("suites", "smoke.toml")
CLAIMS = text_of(
    "claims",
    sorted(p.name for p in (Path(__file__).parents[2] / "bench" / "claims").glob("*.toml"))[0],
)


@many
@given(of(SUITE) | st.text(max_size=60))
def test_suites(text):
    try:
        found = suites.parse(text, "mine.toml")
    except UsageError as error:
        assert str(error).startswith("mine.toml: ")
        return
    for cell in found.cells():
        assert cell.id.isprintable()
        assert "/" not in found.name


@many
@given(of(CLAIMS))
def test_claims(text):
    try:
        document = ledger.parse(text, "mine.toml")
    except UsageError as error:
        assert str(error).startswith("mine.toml: ")
        return
    assert all(c.rows for c in document.claims)


RECORDS = [record(), record("nmf", status="failed", reason="broke"), record("base", budget=None)]
PLAIN = [json.loads(record_line(r)) for r in RECORDS]
TIMING = {"dataset": "digits", "model": "lenet5", "shape": "ab" * 6, "speed_up": 1.5, "batch": 64}


@many
@given(
    st.one_of(
        edited(PLAIN).map(lambda rows: "\n".join(map(json.dumps, rows)).encode(errors="replace")),
        damaged("\n".join(map(json.dumps, PLAIN)).encode()),
        damaged("\n".join(map(record_line, RECORDS)).encode()),
    ),
    edited(TIMING),
    st.booleans(),
)
def test_records_and_timings(tmp_path_factory, content, timing, sealed):
    folder = tmp_path_factory.mktemp("results")
    (folder / "s").mkdir()
    path = folder / "s" / "records.jsonl"
    path.write_bytes(content)
    (folder / "s" / "timings.jsonl").write_text(json.dumps(timing) + "\n")
    lines = read_lines(path)
    assert all(line.problem or line.record for line in lines)
    if sealed:  # by someone who mends the digests
        path.write_text("".join(record_line(line.record) + "\n" for line in lines if line.record))
    mine = suite(techniques=["l1-norm", "nmf"])
    try:
        found = read_records(path)
        texts(mine, found, parse_timings(folder / "s" / "timings.jsonl"), "0" * 64)
    except UsageError as error:
        assert "jsonl" in str(error)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("WIDTHBENCH_CACHE", str(folder / "cache"))
        from widthbench.experiment.store import Store

        try:
            build(mine, folder, Store(), time_shapes=False)
        except UsageError as error:
            assert "no finished cell" in str(error)
        no_part_is_left(folder)


def net():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


WEIGHTS = {".safetensors": save(dict(net().state_dict()))}
_buffer = io.BytesIO()
torch.save(net().state_dict(), _buffer)
WEIGHTS[".pt"] = _buffer.getvalue()


@many
@given(
    st.sampled_from(sorted(WEIGHTS)).flatmap(
        lambda s: st.tuples(st.just(s), damaged(WEIGHTS[s]) | st.binary(max_size=80))
    )
)
def test_checkpoints(tmp_path_factory, case):
    suffix, content = case
    path = tmp_path_factory.mktemp("weights") / f"mine{suffix}"
    path.write_bytes(content)
    model = net()
    try:
        weights.load_into(model, path)
    except UsageError as error:
        assert "mine" in str(error)
        return
    assert all(torch.isfinite(v.float()).all() for v in model.state_dict().values())


names = st.text(
    string.ascii_letters + string.digits + "-_.:/ \x00[]=%\u202e", min_size=0, max_size=12
)
targets = names | st.sampled_from(
    ["os:path", "json:dumps", "no.such:Thing", "widthbench:Technique", "sys:exit"]
)


@many
@given(st.dictionaries(names, targets, max_size=4), names, names, st.binary(max_size=30))
def test_plug_in_metadata(tmp_path_factory, points, name, version, noise):
    folder = tmp_path_factory.mktemp("site")
    lines = "\n".join(f"{k} = {v}" for k, v in points.items())
    files = {
        "odd-1.dist-info": f"[widthbench.techniques]\n{lines}\n".encode() + noise,
        "good-1.dist-info": b"[widthbench.techniques]\n"
        b"l1-norm = widthbench.baselines.l1_norm:L1Norm\n",
    }
    for info, content in files.items():
        (folder / info).mkdir()
        (folder / info / "entry_points.txt").write_bytes(content)
    (folder / "odd-1.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    (folder / "good-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: good\nVersion: 1\n"
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "path", [str(folder)])  # what is imported already stays so
        good, bad = registry.load_all()
        assert "l1-norm" in {*good, *bad}
        assert all(isinstance(reason, str) for reason in bad.values())
        for one in bad:
            with pytest.raises(UsageError):
                registry.load(one)
    registry._scanned.cache_clear()


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    """What the tests above call is what the command calls; a few go through it."""
    for text in ("", "name = 3", 'name = "a/b"', "\x00", "[[models]]\n" * 50):
        (tmp_path / "bad.toml").write_text(text)
        assert cli.main(["run", str(tmp_path / "bad.toml"), "--results", str(tmp_path / "r")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("widthbench: ")
        assert said.count("\n") == 1, said
    no_part_is_left(tmp_path)


def test_a_header_that_promises_more_than_there_is(tmp_path):
    path = tmp_path / "big.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(UsageError, match=r"big\.safetensors"):
        weights.load_into(net(), path)
