import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import DONE

from widthbench import cache
from widthbench.errors import UsageError
from widthbench.experiment.cell import Cell
from widthbench.experiment.records import (
    Record,
    Row,
    digest_of,
    read_lines,
    read_records,
    record_line,
    write_records,
)
from widthbench.experiment.store import Store
from widthbench.paths import write_atomic
from widthbench.recipe import Recipe, Spent

BRIEF = Recipe(epochs=1, lr=0.1)


def cell(**changes):
    return Cell(
        **{
            "dataset": "digits",
            "model": "lenet5",
            "size": 20,
            "technique": "l1-norm",
            "budget": "macs:0.5",
            "base": BRIEF,
            "finetune": BRIEF,
            **changes,
        }
    )


def record(key="k" * 40, **changes):
    row = Row(stage="resized", top1=50.0, loss=1.0, samples=10, val_top1=51.0, val_loss=1.1)
    spent = {"base": Spent(forward_macs=3, seconds=1.5)}
    return Record(**{"key": key, "cell": cell(), **DONE, "rows": (row,), "spent": spent, **changes})


def test_a_cells_id_names_what_it_is():
    assert cell().id == "digits-lenet5-l1-norm-macs:0.5-s0"
    assert (
        cell(params={"allocation": "global"}).id
        == "digits-lenet5-l1-norm(allocation=global)-macs:0.5-s0"
    )
    assert (
        cell(technique="scratch", of="l1-norm", seed=2).id
        == "digits-lenet5-scratch:l1-norm-macs:0.5-s2"
    )


def test_the_store_gives_back_what_it_was_given(tmp_path):
    store, one = Store(tmp_path), record()
    assert store.get(one.key) is None
    store.put(one)
    assert store.get(one.key) == one


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: text.replace("50.0", "60.0"),
        lambda text: text.replace('"digest"', '"digits"'),
        lambda text: "",
        lambda text: "[]",
    ],
)
def test_a_damaged_record_is_named_and_counts_as_missing(tmp_path, damage):
    store, one = Store(tmp_path), record()
    store.put(one)
    path = store.path(one.key)
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=f"damaged record .*{one.key}"):
        assert store.get(one.key) is None


def test_failures_are_kept_apart_and_forgotten_once_the_cell_is_done(tmp_path):
    store = Store(tmp_path)
    store.put(record(status="failed", reason="boom", rows=()))
    assert store.get("k" * 40) is None
    assert store.failure("k" * 40).reason == "boom"
    store.put(record())
    assert store.failure("k" * 40) is None


def test_a_cell_is_the_same_after_reading_whatever_its_parameters_hold(tmp_path):
    one = record(
        cell=cell(
            params={"layers": [{"name": "x", "keep": 0.5}]}, model_args={"b": {"z": 1, "a": [2]}}
        )
    )
    (back,) = read_lines_of(tmp_path, one)
    assert back.cell.identity == one.cell.identity
    assert one.cell.identity != cell(params={"layers": [{"name": "x", "keep": 0.25}]}).identity
    assert cell(device="cpu").identity == cell(device="auto").identity != cell(seed=1).identity


def read_lines_of(folder, *some):
    write_records(folder / "records.jsonl", some)
    return [line.record for line in read_lines(folder / "records.jsonl")]


def test_machines_that_differ_in_kind_only_are_told_apart(tmp_path):
    whole = record(provenance={"hardware": {"cores": 2}})
    broken = record(key="b" * 40, cell=cell(seed=1), provenance={"hardware": {"cores": 2.0}})
    found = read_lines_of(tmp_path, whole, broken)
    assert [repr(r.provenance["hardware"]["cores"]) for r in found] == ["2", "2.0"]


def test_a_flipped_bit_anywhere_in_a_line_is_named(tmp_path):
    line = record_line(record())
    path = tmp_path / "records.jsonl"
    path.write_bytes(
        b"\n".join(
            line[:i].encode() + bytes([ord(line[i]) ^ 1]) + line[i + 1 :].encode()
            for i in range(len(line))
        )
    )
    lines = read_lines(path)
    assert len(lines) >= len(line)
    assert all(found.problem for found in lines)


def test_lines_are_read_however_their_json_is_written(tmp_path):
    path = tmp_path / "records.jsonl"
    line = record_line(record())
    spaced = json.dumps(json.loads(line), sort_keys=True)
    path.write_text(f"{line}\n{spaced}\n")
    assert [(found.record, found.problem) for found in read_lines(path)] == [(record(), "")] * 2
    path.write_text(spaced.replace('"key": "', '"key": "x'))
    assert "digest does not match" in read_lines(path)[0].problem


def test_a_store_says_which_cells_it_has(tmp_path):
    store = Store(tmp_path)
    one, failed = (
        record(key="a" * 40),
        record(key="b" * 40, cell=cell(seed=1), status="failed", reason="boom", rows=()),
    )
    assert store.cells() == set()
    store.put(one)
    store.put(failed)
    assert store.cells() == {one.cell.identity, failed.cell.identity}
    assert store.cells(at_most=1) is None
    older = {"record": {"cell": {"of": "another time"}}}
    cache.write_json(store.path("c" * 40), older)
    assert store.cells() == {one.cell.identity, failed.cell.identity}
    store.path(one.key).write_text("{")
    with pytest.warns(UserWarning, match=f"damaged record .*{one.key}"):
        assert store.cells() is None


def test_records_are_written_sorted_and_read_back(tmp_path):
    path = tmp_path / "records.jsonl"
    both = [record(key="b", cell=cell(seed=1)), record(key="a")]
    write_records(path, both)
    assert [r.key for r in read_records(path)] == ["a", "b"]
    path.write_text(path.read_text() + '{"key": 1}\n')
    with pytest.raises(UsageError, match=r"records\.jsonl:3: not a record: "):
        read_records(path)
    with pytest.raises(UsageError, match="run the suite first"):
        read_records(tmp_path / "none.jsonl")


def test_what_is_stable_leaves_times_and_hosts_out():
    a = record(provenance={"host": "x", "when": "now", "threads": 1})
    b = record(
        provenance={"host": "y", "when": "then", "threads": 1},
        spent={"base": Spent(forward_macs=3, seconds=9)},
    )
    assert a.stable() == b.stable()
    assert a.stable() != record(provenance={"threads": 2}).stable()


def test_digests_do_not_depend_on_the_order_of_keys():
    assert (
        digest_of({"a": 1, "b": [2]})
        == digest_of({"b": [2], "a": 1})
        != digest_of({"a": 1, "b": [3]})
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.binary(max_size=2000))
def test_write_atomic_writes_all_and_leaves_nothing_else(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("atomic")
    write_atomic(folder / "sub" / "file", content)
    assert (folder / "sub" / "file").read_bytes() == content
    assert [p.name for p in (folder / "sub").iterdir()] == ["file"]


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(UsageError, match=r"cannot write .*file: disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "odd",
    [
        {"schema_version": 99},
        {"provenance": {"versions": "2.1"}},
        {"provenance": {"hardware": None}},
        {"access": "everything"},
        {"rows": []},
        {"macs": None},
        {"base_macs": 0},
        {"macs": 10**400},
        {"kept": float("inf")},
        {"key": "../../etc/passwd"},
        {"cell": {"budget": "abc"}},
        {"cell": {"budget": "macs:NaN"}},
        {"rows": [{"stage": "resized", "top1": float("nan"), "loss": 1.0, "samples": 9}]},
        {"rows": [{"stage": "resized", "top1": 101.0, "loss": 1.0, "samples": 9}]},
        {"rows": [{"stage": "resized", "top1": 50.0, "loss": float("nan"), "samples": 9}]},
    ],
)
def test_what_is_no_record_is_refused_with_its_line(tmp_path, odd):
    data = record().model_dump(mode="json")
    data |= {"cell": data["cell"] | odd["cell"]} if "cell" in odd else odd
    (tmp_path / "a.jsonl").write_text(json.dumps({**data, "digest": digest_of(data)}) + "\n")
    with pytest.raises(UsageError, match=r"a.jsonl:1: not a record"):
        read_records(tmp_path / "a.jsonl")


def test_what_would_act_on_a_terminal_is_shown():
    odd = record(status="failed", reason="\x1b[31mred\x00\ud800\u202e\nnext")
    assert odd.reason == r"\x1b[31mred\x00\ud800\u202e" + "\nnext"
    odd.model_dump_json().encode()
    assert cell(params={"a": "\r\x1b"}).label == r"l1-norm(a=\r\x1b)"


def test_records_are_plain_json():
    data = record().model_dump(mode="json")
    assert Record.model_validate(json.loads(json.dumps(data))) == record()


def test_a_cell_is_the_same_however_its_parameters_are_ordered():
    from widthbench.experiment.cell import Cell
    from widthbench.recipe import Recipe

    recipe = Recipe(epochs=1, lr=0.1)
    shared = {
        "dataset": "digits",
        "model": "mlp_sigmoid",
        "size": 8,
        "technique": "l1-norm",
        "base": recipe,
        "finetune": recipe,
    }
    args = {"widths": [5], "act_layer": "tanh"}
    one, two = (
        Cell(model_args=dict(pairs), **shared) for pairs in (args.items(), sorted(args.items()))
    )
    assert list(one.model_args) != list(two.model_args)
    assert one.identity == two.identity != one.model_copy(update={"seed": 1}).identity
