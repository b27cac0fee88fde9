"""Whatever a plug-in does to its process ends one cell, with a record that says why; the others go
on."""

import os
import signal
import subprocess
import sys
import threading
import time
import types

import psutil
import pytest
import torch
import unruly
from filelock import FileLock

from widthbench import children
from widthbench.engines import local
from widthbench.engines import worker as worker_module
from widthbench.engines.worker import Worker, WorkerError, code_of
from widthbench.experiment import keys, protocol, suites
from widthbench.experiment.limits import Limits
from widthbench.experiment.store import Store
from widthbench.report.lines import shape_of
from widthbench.report.timing import measure, measured
from widthbench.technique import registry

SUITE = """
name = "unruly"
datasets = ["digits"]
seeds = [0]
budgets = ["channels:0.5"]
techniques = [{names}]
device = "cpu"
time_limit = {time}
memory_limit = 3000
[base]
epochs = 1
lr = 0.05
[finetune]
epochs = 0
lr = 0.01
[[models]]
name = "lenet_300_100"
size = 8
"""


CLASS = """
from widthbench import Technique

class T(Technique):
    id, access = "leaves", "none"

    def decide(self, task, state):
        pass

    def __init__(self):
        {}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return unruly.installed(tmp_path_factory.mktemp("site"))


@pytest.fixture
def plug_ins(site, monkeypatch, fresh_cache):
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(site))


def suite(*names, time_limit=6):
    return suites.parse(
        SUITE.format(names=", ".join(f'"{n}"' for n in names), time=time_limit), "unruly.toml"
    )


def run(*names, jobs=1, **changes):
    made = suite(*names, **changes)
    records = []
    local.run(made.cells(), jobs=jobs, done=records.append, limits=suites.limits([made]))
    return {r.cell.technique: r for r in records}


HANGING = [w for w, why in unruly.WAYS.items() if "time_limit" in why]
# one of each kind: a signal, a record that is hard to send, one that cannot be written, an end
# without a word; what only the parent sees is below, with a child that starts in no time
KINDS = ["segfaults", "lone-surrogate", "limits-file-sizes", "leaves-others-and-ends"]


def assert_each_fails_and_the_others_go_on(*ways, time_limit):
    *most, last = ways  # before whose process starts there is one for what comes before
    others = ("l1-norm", "random-channels")
    found = run(others[0], *most, others[1], last, time_limit=time_limit)
    assert {n: found[n].status for n in ("base", *others)} == dict.fromkeys(
        ("base", *others), "done"
    )
    for way in ways:
        assert found[way].status == "failed", way
        assert unruly.WAYS[way] in found[way].reason, (way, found[way].reason)
    for way, record in found.items():
        kept = Store().failure(record.key) if way in unruly.WAYS else Store().get(record.key)
        assert kept == record


@pytest.mark.parametrize(
    "ways",
    [KINDS, pytest.param([w for w in unruly.WAYS if w not in HANGING], marks=pytest.mark.slow)],
    ids=["quick", "all"],
)
def test_each_way_to_fail_is_a_record_with_its_cause_and_the_others_go_on(plug_ins, ways):
    # how fast a machine is must not decide which limit is met first
    assert_each_fails_and_the_others_go_on(*ways, time_limit=300)
    assert gone("98763")  # what leaves-others-and-ends left running


@pytest.mark.parametrize(
    "ways",
    [
        ["waits-at-a-lock-in-the-cache", "starts-others"],
        pytest.param(HANGING, marks=pytest.mark.slow),
    ],
    ids=["quick", "all"],
)
def test_whatever_hangs_is_ended_with_all_that_it_started_and_the_others_go_on(plug_ins, ways):
    assert_each_fails_and_the_others_go_on(*ways, time_limit=6)
    assert gone("98765")


CHILD = """#!{python} -SE
import ctypes, json, os, signal, sys, time
open({log!r}, "a").write("started\\n")
print(json.dumps({{"at": "ready", "id": json.loads(sys.stdin.readline())["id"]}}), flush=True)
{does}
"""
BLOCKED = "signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})"


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("os.abort()", "its process crashed (SIGABRT)"),
        ("os._exit(7)", "its process ended with exit code 7 without a word"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "its process was killed twice by SIGKILL, from outside (out of memory?)",
        ),
        (
            "os.closerange(0, 99); time.sleep(1000)",
            "its process closed its pipe to the parent",
        ),
        (
            "kept = []\nwhile True: kept.append(b'x' * 2**25); time.sleep(0.01)",
            " MiB of memory, more than the 500 MiB that its suite allows (memory_limit)",
        ),
        (
            f"{BLOCKED}; ctypes.PyDLL(None).sleep(1000)",
            "ran longer than the 2 s that its suite allows (time_limit)",
        ),
    ],
    ids=["aborts", "ends", "is-killed", "closes-everything", "eats", "hangs-in-c"],
)
def test_however_a_child_ends_its_parent_says_it(fresh_cache, tmp_path, monkeypatch, does, why):
    """What the parent does about a child that ends or must be ended, whatever is in it."""
    child, log = tmp_path / "child", tmp_path / "log"
    child.write_text(CHILD.format(python=sys.executable, log=str(log), does=does))
    child.chmod(0o755)
    monkeypatch.setattr(children, "sys", types.SimpleNamespace(executable=str(child)))
    worker = Worker()
    limits = Limits(None if "memory" in why else 2 if "longer" in why else 60, 500)
    record = worker.run(suite("l1-norm").cells()[0], limits)
    assert record.status == "failed"
    assert record.reason.endswith(why)
    assert Store().failure(record.key) == record
    assert worker.child.pid is None
    assert log.read_text().count("started") == (2 if "twice" in why else 1)
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(child) in (p.info["cmdline"] or [])
    ]


def test_what_a_plug_in_prints_reaches_nobody_who_reads_records_and_its_input_is_empty(
    plug_ins, capfd
):
    done = run("prints")["prints"]
    assert done.status == "done"
    out = capfd.readouterr()
    assert "forged" not in out.out
    assert out.err.count("forged") == 3
    # a finished cell of a plug-in costs no process, and is imported in none
    worker = Worker()
    worker.code = "of the cell before"
    assert worker.run(done.cell) == done
    assert worker.child.pid is None
    assert worker.code == code_of(done.cell)


def test_a_relative_cache_stays_where_it_was_when_a_plug_in_changes_directory(
    plug_ins, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WIDTHBENCH_CACHE", "kept here")
    found = run("l1-norm", "changes-directory")
    assert {n: r.status for n, r in found.items()} == dict.fromkeys(
        ("base", "l1-norm", "changes-directory"), "done"
    )
    assert Store(tmp_path / "kept here" / "cells").get(found["changes-directory"].key)


def test_latencies_are_measured_where_no_plug_in_was_imported(plug_ins, in_process):
    record = run("l1-norm")["l1-norm"]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as a plug-in may do when it is imported
    try:
        (timing,) = measured([record])
    finally:
        torch.set_default_dtype(before)
    assert timing["shape"] == shape_of(record)
    assert timing["peak_memory_mib"] == pytest.approx(
        measure(record.model_dump(), print)["peak_memory_mib"]
    )


def test_nobody_but_the_worker_answers(plug_ins):
    names = ("forks", "writes-everywhere")  # the copy that is forked may answer for the next cell
    found = run(*names)
    assert {n: r.status for n, r in found.items()} == dict.fromkeys(("base", *names), "done")
    assert all(r.cell.technique == n for n, r in found.items())


def test_what_a_plug_in_changes_reaches_no_other_cell(plug_ins):
    ours = ("l1-norm", "nmf")
    cells = suite(*ours).cells()
    alone = {c.technique: protocol.run_cell(c, Store()) for c in cells}  # in this process
    for name in ours:
        Store().path(alone[name].key).unlink()
    ways = ("leaves-traces", "leaves-traces-and-interrupts")
    found = run(*(name for pair in zip(ways, ours, strict=True) for name in pair))
    for way in ways[1:]:
        assert found[way].status == "failed"
        assert unruly.WAYS[way] in found[way].reason
    assert {name: found[name].stable() for name in ours} == {
        name: alone[name].stable() for name in ours
    }
    assert gone("98764")


def test_a_task_of_ray_starts_without_torch():
    names = "sys, widthbench.engines.ray, widthbench.technique.registry as r"
    code = f"import {names}; r.built_in('l1-norm'); print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )


def running(argument):
    return ["sleep", argument] in [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]


def gone(argument):
    """Whether it has ended; a process that was killed may take a moment."""
    end = time.monotonic() + 20
    while running(argument) and time.monotonic() < end:
        time.sleep(0.1)
    return not running(argument)


def test_one_that_was_finished_under_another_device_is_finished_and_nonsense_is_an_error(
    fresh_cache,
):
    cell = next(c for c in suite("l1-norm").cells() if c.technique == "l1-norm")
    auto = cell.model_copy(update={"device": "auto"})
    assert auto.identity == cell.identity
    worker = Worker()
    try:
        first = worker.run(auto)
        assert first.status == "done"
        assert worker.run(cell) == first
        with pytest.raises(suites.UsageError, match="unknown technique 'no-such-one'"):
            worker.run(cell.model_copy(update={"technique": "no-such-one"}))
    finally:
        worker.close()


def install(folder, monkeypatch, name, code):
    """A distribution of one module, whose class ``T`` is the technique "leaves"."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[widthbench.techniques]\nleaves = {name}:T\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise SystemExit(3)", "fails to import: SystemExit"),
        pytest.param(
            "import os; os._exit(7)",
            r"importing or making it ends the process \(exit code 7\); mend or uninstall it",
            marks=pytest.mark.slow,
        ),
        (
            "import ctypes; ctypes.string_at(0)",
            r"importing or making it ends the process \(SIGSEGV\)",
        ),
        ("import time; time.sleep(1000)", r"importing or making it took more than 1 s"),
        (
            CLASS.format("raise RuntimeError('broke')"),
            r"cannot be made with {}: RuntimeError: broke",
        ),
        pytest.param(
            CLASS.format("raise SystemExit(4)"),
            r"cannot be made with {}: SystemExit: 4",
            marks=pytest.mark.slow,
        ),
        (
            CLASS.format("import os; os._exit(7)"),
            r"importing or making it ends the process \(exit code 7\); mend or uninstall it",
        ),
        (
            CLASS.format("pass").replace("__init__(self", "__init__(self, x: 'Nowhere' = 1"),
            r"cannot be made with {}: NameError: name 'Nowhere'",
        ),
    ],
)
def test_a_plug_in_that_cannot_be_imported_or_made_is_named(tmp_path, monkeypatch, code, why):
    install(tmp_path, monkeypatch, "leaves", code)
    monkeypatch.delitem(sys.modules, "leaves", raising=False)
    if "sleep" in code:
        real = registry.try_out
        monkeypatch.setattr(registry, "try_out", lambda entries: real(entries, limit_s=1))
    elif "Error" in why:  # which no process of its own is needed for: another case has one
        monkeypatch.setattr(registry, "try_out", lambda entries: None)
    with pytest.raises(suites.UsageError, match=f"'leaves' of leaves 1:? {why}"):
        suites.check(suite("leaves"))


def test_a_plug_in_that_leaves_something_running_is_not_taken_for_one_that_hangs(
    tmp_path, monkeypatch
):
    starts = "import subprocess; subprocess.Popen(['sleep', '98762'])\n"
    install(tmp_path, monkeypatch, "starts", starts + CLASS.format("pass"))
    registry.try_out([("leaves", {})], limit_s=60)
    assert gone("98762")


def test_a_process_killed_from_outside_is_given_a_second_chance(fresh_cache):
    cell = suite("l1-norm").cells()[0]
    slow = cell.model_copy(update={"base": cell.base.model_copy(update={"epochs": 20})})
    worker = Worker()
    found = []
    hand = threading.Thread(target=lambda: found.append(worker.run(slow)))
    hand.start()
    while not (fresh_cache / "bases").exists():
        time.sleep(0.05)
    first = worker.child.pid
    os.kill(first, signal.SIGKILL)
    hand.join()
    assert found[0].status == "done"
    assert worker.child.pid != first
    worker.close()
    with pytest.raises(WorkerError):
        worker.run(cell)


def test_waiting_for_another_process_is_not_counted(fresh_cache, monkeypatch):
    """One that computes the same cell, and then one that trains its base."""
    cell = suite("l1-norm").cells()[0]
    (fresh_cache / "bases").mkdir(parents=True)
    locks = [
        Store().lock(keys.cell_key(cell)),
        FileLock(fresh_cache / "bases" / f"{keys.base_key(cell)}.lock"),
    ]
    late, stages, enter = [0.0], [], worker_module._Clock._enter
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    monkeypatch.setattr(worker_module, "time", clock)

    def watched(self, stage):
        enter(self, stage)
        late[0] += 1000.0 * (stage == "wait")  # each wait takes so many seconds more
        stages.append(stage)

    monkeypatch.setattr(worker_module._Clock, "_enter", watched)
    for lock in locks:
        lock.acquire()
    worker = Worker()
    found = []
    hand = threading.Thread(target=lambda: found.append(worker.run(cell, Limits(time_s=120))))
    hand.start()
    waits = []
    for lock in locks:
        told = 0
        while stages[-1:] != ["wait"] or told != len(
            stages
        ):  # for a second now, at the lock that is held here
            told = len(stages)
            hand.join(1)
            assert hand.is_alive()
        waits.append(told)
        lock.release()
    hand.join()
    assert waits[0] < waits[1]  # at one after the other
    assert found[0].status == "done"
    worker.close()


def test_a_cell_that_makes_no_sense_is_an_error_not_a_record(fresh_cache, in_process):
    cell = suite("l1-norm").cells()[1].model_copy(update={"technique": "no-such-one"})
    with pytest.raises(suites.UsageError, match="unknown technique 'no-such-one'"):
        local.run([cell], jobs=2, done=lambda record: None)


PARENT = """
import json, sys
from widthbench.engines.worker import Worker
Worker().child.ask({"cell": json.loads(sys.argv[1]), "bar": False})
"""


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["worker", "widthbench run"]
)
def test_nothing_outlives_a_parent_that_is_killed(plug_ins, tmp_path, monkeypatch, whole):
    monkeypatch.setenv("UNRULY_SLEEP", "98767")  # other tests look for theirs at the same time
    path = tmp_path / "slow.toml"
    path.write_text(SUITE.format(names='"starts-others"', time=600))
    cell = suites.load(str(path)).cells()[1].model_dump_json()
    command = ["-m", "widthbench", "run", path, "--results", tmp_path / "r"]
    parent = subprocess.Popen(
        [sys.executable, *(command if whole else ("-c", PARENT, cell))], stderr=subprocess.DEVNULL
    )
    below = []
    try:
        while len(below) < 2:  # the worker, and what its plug-in started
            assert parent.poll() is None
            time.sleep(0.1)
            below = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(below, timeout=20)
    assert alive == []


def test_latencies_that_make_no_sense_are_named_in_a_warning(plug_ins, in_process):
    record = run("l1-norm")["l1-norm"]
    cell = record.cell.model_copy(update={"dataset": "no-such-one"})
    with pytest.warns(UserWarning, match="1 shapes were not measured: unknown dataset"):
        assert list(measured([record.model_copy(update={"cell": cell})])) == []


def test_suites_that_share_a_cell_allow_it_what_the_roomier_one_does():
    assert Limits(3, None).roomier(Limits(5, 7)) == Limits(5, None)
    assert Limits(3, 8).roomier(Limits(None, 7)) == Limits(None, 8)
    short, long = suite("l1-norm"), suite("l1-norm", time_limit=9)
    assert (
        set(suites.limits([short, long]).values())
        == set(suites.limits([long, short]).values())
        == {Limits(9, 3000)}
    )


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", '"long"'])
def test_a_limit_is_a_number_above_nothing(value):
    with pytest.raises(suites.UsageError, match=r"unruly.toml: time_limit"):
        suite("l1-norm", time_limit=value)
