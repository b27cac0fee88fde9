"""Files of the cache are sound or made again; a store at a URL holds what several machines
share."""

import warnings

import fsspec
import pytest

from widthbench import cache, cli
from widthbench.errors import UsageError
from widthbench.experiment.bases import obtain_base
from widthbench.experiment.cell import Cell
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store
from widthbench.recipe import Recipe

CELL = Cell(
    dataset="digits",
    model="lenet_300_100",
    size=8,
    technique="l1-norm",
    budget="channels:0.5",
    device="cpu",
    base=Recipe(epochs=1, lr=0.05),
    finetune=Recipe(epochs=0, lr=0.1),
)


def test_every_flipped_bit_is_found_and_named(tmp_path):
    path, data = tmp_path / "a.json", {"a": 1.5, "b": [None, "x"]}
    cache.write_json(path, data)
    assert cache.read_json(path, "thing") == data
    whole = path.read_bytes()
    for at in range(8 * len(whole)):
        content = bytearray(whole)
        content[at // 8] ^= 1 << at % 8
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = cache.read_json(path, "thing")
        assert found is None, at
        assert "damaged thing" in str(said[0].message)
    cache.write(path, b"abc")
    for at in range(8 * 35):
        content = bytearray(path.read_bytes())
        content[at // 8] ^= 1 << at % 8
        (tmp_path / "b").write_bytes(content)
        with pytest.warns(UserWarning, match="damaged thing"):
            assert cache.read(tmp_path / "b", "thing") is None
    assert cache.read(path, "thing") == b"abc"
    assert cache.read(tmp_path / "none", "thing") is None


@pytest.fixture
def store(monkeypatch, fresh_cache):
    """A store in memory, and a way to go to another machine: one with an empty cache."""
    fs = fsspec.filesystem("memory")
    monkeypatch.setenv("WIDTHBENCH_STORE", "memory://shared/widthbench")

    def elsewhere(name):
        monkeypatch.setenv("WIDTHBENCH_CACHE", str(fresh_cache.parent / name))

    yield fs, elsewhere
    if fs.exists("/shared"):
        fs.rm("/shared", recursive=True)


def test_what_one_machine_has_finished_another_takes_from_the_store(store):
    fs, elsewhere = store
    first, base = run_cell(CELL, Store()), obtain_base(CELL)
    assert first.status == "done"
    elsewhere("another")
    assert run_cell(CELL, Store()) == first  # the minute, too
    assert obtain_base(CELL).digest == base.digest
    assert Store().cells() is None
    (blob,) = [p for p in fs.find("/shared") if p.endswith(".safetensors")]
    fs.pipe_file(blob, fs.cat_file(blob)[:-1] + b"?")
    elsewhere("third")
    with pytest.warns(UserWarning, match="damaged base network"):
        assert obtain_base(CELL).digest == base.digest  # trained again


def test_a_damaged_file_is_fetched_again_if_the_store_has_a_sound_one(store):
    first = run_cell(CELL, Store())
    path = Store().path(first.key)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="damaged record"):
        assert Store().get(first.key) == first


def test_failures_are_shared_and_dropped_like_records(store):
    record = run_cell(CELL, Store())
    failed = record.model_copy(update={"status": "failed", "reason": "boom", "rows": ()})
    Store().path(record.key).unlink()
    Store().put(failed)
    _, elsewhere = store
    elsewhere("another")
    assert Store().failure(record.key) == failed
    Store().put(record)
    elsewhere("third")
    assert Store().failure(record.key) is None


@pytest.mark.parametrize("url", ["nothing://x/y", "s3://", "file:///proc/nowhere"])
def test_a_store_that_cannot_be_used_is_named_before_anything_runs(
    url, monkeypatch, tmp_path, fresh_cache, capsys
):
    monkeypatch.setenv("WIDTHBENCH_STORE", "")  # which is put back afterwards
    assert cli.main(["run", "smoke", "--store", url, "--results", str(tmp_path)]) == 2
    assert f"the store {url} cannot be used" in capsys.readouterr().err


def test_a_store_that_goes_away_costs_nothing(store, monkeypatch):
    monkeypatch.setattr(cache, "_place", lambda url, path: (_ for _ in ()).throw(OSError("gone")))
    with pytest.warns(UserWarning, match="could not be put into memory://"):
        record = run_cell(CELL, Store())
    assert Store().get(record.key) == record
    with pytest.raises(UsageError, match="cannot be used"):
        cache.check_store()


def test_a_store_that_is_a_folder_is_the_same_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, meant in (
        ("here/store", f"{tmp_path}/here/store"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("", None),
    ):
        monkeypatch.setenv(cache.STORE, given)
        assert cache.url() == meant
