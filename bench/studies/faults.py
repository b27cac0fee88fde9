"""Break runs in every way that a machine can, and count what is lost and what is wrong afterwards.

    sudo python bench/studies/faults.py [--kills 50] [--seed 0] [--only TEXT ...] > FILE.md

The suite is small (digits, two networks, 11 cells) and is first run undisturbed; its records, less
times and hosts, are what every disturbed run must end with. A record is *lost* if it was finished
before a fault and is not there, byte by byte, after it; it is *wrong* if at the end it differs from
the undisturbed one. Needs root (tmpfs, read-only mounts) and libfaketime (`apt-get install
faketime`) for the clock; what cannot be done here is said in its row.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from tabulate import tabulate

from widthbench.engines.worker import ANSWER
from widthbench.experiment.records import Record, read_records
from widthbench.provenance import commit, hardware

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
name = "faults"
datasets = ["digits"]
seeds = [0, 1]
budgets = ["macs:0.5"]
techniques = ["l1-norm", "neuron-merging"]
controls = ["base", "scratch:l1-norm"]
device = "cpu"
time_limit = 300
[base]
epochs = 6
batch_size = 32
lr = 0.02
[finetune]
epochs = 2
batch_size = 32
lr = 0.005
[[models]]
name = "lenet_300_100"
size = 28
[[models]]
name = "test_resnet"
size = 32
seeds = [0]
techniques = ["l1-norm", { id = "autoprune", params = { epochs = 1 } }]
controls = ["base"]
"""
RUN, BENCH = "widthbench run", "pytest bench"
LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


NOTES = """\
# Faults

Written by `bench/studies/faults.py`. *Records lost*: finished before a fault, and not there or
changed after it. *Wrong*: what at the end differs from an undisturbed run's records (less times and
hosts), a cell without a record, a traceback, a file that is not named. """


class Place:
    """A folder with a suite, a cache and results of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache, self.results = root, root / "cache", root / "results"
        root.mkdir(parents=True, exist_ok=True)
        (root / "faults.toml").write_text(SUITE)

    def command(self, how: str) -> list[str]:
        if how == BENCH:
            arguments = [
                "-m",
                "pytest",
                str(ROOT / "bench"),
                "-n",
                "2",
                "-q",
                "-p",
                "no:cacheprovider",
            ]
            arguments += ["--suite", str(self.root / "faults.toml")]
        else:
            arguments = ["-m", "widthbench", "run", str(self.root / "faults.toml"), "--jobs", "2"]
        return [sys.executable, *arguments, "--results", str(self.results)]

    def start(self, how: str = RUN, **env: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "WIDTHBENCH_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            **env,
        }
        return subprocess.Popen(
            self.command(how),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, how: str = RUN, **env: str) -> tuple[int, str]:
        process = self.start(how, **env)
        said, _ = process.communicate(timeout=900)
        return process.returncode, said

    def finished(self) -> dict[str, bytes]:
        """Finished records as they lie in the store."""
        return {p.name: p.read_bytes() for p in (self.cache / "cells").glob("??/*.json")}

    def records(self) -> dict[str, Record]:
        return {r.cell.id: r for r in read_records(self.results / "faults" / "records.jsonl")}


class Count:
    """What a fault did."""

    def __init__(self, what: str) -> None:
        self.what, self.times, self.lost, self.wrong, self.said = what, 0, 0, 0, ""

    def row(self) -> list[Any]:
        return [self.what, self.times, self.lost, self.wrong, self.said]

    def compare(
        self, place: Place, expected: dict[str, dict[str, Any]], but: tuple[str, ...] = ()
    ) -> None:
        """Count what differs at the end, but for some fields of the provenance; records of all
        cells must be there.
        """
        found = (
            {i: r.stable() for i, r in place.records().items()}
            if (place.results / "faults" / "records.jsonl").exists()
            else {}
        )
        if but:
            found, expected = (
                {i: _less(r, but) for i, r in some.items()} for some in (found, expected)
            )
        self.wrong += sum(found.get(i) != r for i, r in expected.items()) + len(
            found.keys() - expected.keys()
        )
        self.wrong += len(
            [
                p
                for p in place.root.rglob("*.part")
                if p.is_file() and p.parent == place.results / "faults"
            ]
        )

    def kept(self, before: dict[str, bytes], place: Place) -> None:
        """Count finished records that are gone or changed."""
        after = place.finished()
        self.lost += sum(after.get(name) != content for name, content in before.items())


def _less(record: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    return {
        **record,
        "provenance": {k: v for k, v in record["provenance"].items() if k not in fields},
    }


def victims(process: subprocess.Popen[str], how: str, whom: str) -> list[psutil.Process]:
    try:
        driver = psutil.Process(process.pid)
        if whom in ("driver", "controller"):
            return [driver]
        below = driver.children(recursive=True)
        if whom == "xdist worker":
            return [
                p for p in driver.children() if "readline" in " ".join(p.cmdline())
            ]  # as execnet starts them
        return [p for p in below if ANSWER in p.cmdline()]
    except psutil.Error:
        return []


def kills(
    folder: Path,
    how: str,
    whom: str,
    count: int,
    lasts: float,
    draw: random.Random,
    expected: dict[str, Any],
) -> Count:
    """SIGKILL at moments drawn uniformly over what an undisturbed run takes; after a kill of the
    driver it is started again.
    """
    found = Count(f"kill -9, {whom} of `{how}`")
    rounds = runs = 0
    while found.times < count and rounds < 10 * count:
        rounds += 1
        place = Place(folder / f"{how.replace(' ', '-')}-{whom.replace(' ', '-')}-{rounds}")
        code = -1
        while code != 0:
            runs += 1
            process = place.start(how)
            reader = threading.Thread(target=process.stdout.read, daemon=True)  # type: ignore[union-attr]
            reader.start()
            moment = time.monotonic() + draw.uniform(0, lasts)
            while found.times < count and process.poll() is None:
                time.sleep(max(0.0, moment - time.monotonic()))
                targets = victims(process, how, whom)
                if not targets:
                    time.sleep(0.2)  # between two workers
                    continue
                before = place.finished()
                try:
                    draw.choice(targets).kill()
                except psutil.Error:
                    continue
                found.times += 1
                if whom in ("driver", "controller"):
                    process.wait()
                found.kept(before, place)
                moment = time.monotonic() + draw.uniform(0, lasts)
            code = process.wait()
            reader.join()
        found.compare(place, expected)
        shutil.rmtree(place.root)
    found.wrong += count - found.times  # nobody was hit
    found.said = f"{runs} starts to finish {rounds} run(s)"
    return found


@contextmanager
def mounted(where: Path, *options: str) -> Iterator[bool]:
    where.mkdir(parents=True, exist_ok=True)
    done = (
        subprocess.run(["mount", *options, str(where)], capture_output=True, check=False).returncode
        == 0
    )
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(where)], check=False)


def disk_full(folder: Path, expected: dict[str, Any]) -> Count:
    """The cache on a tmpfs that fills up; then, with room again, the same command."""
    found = Count("disk full (tmpfs of 1.5, 2.5 and 3.4 MB as cache, of which a run needs 3.8)")
    said = []
    for size in ("1500k", "2500k", "3400k"):
        place = Place(folder / f"full-{size}")
        with mounted(place.cache, "-t", "tmpfs", "-o", f"size={size}", "tmpfs") as done:
            if not done:
                found.said = "not run: cannot mount a tmpfs here"
                return found
            code, text = place.run()
            found.times += 1
            before = place.finished()
            found.wrong += "Traceback (most recent" in text
            line = next((ln for ln in text.splitlines() if "No space left" in ln), "")
            said.append(f"exit {code}, {len(before)} finished")
            found.wrong += not line
            shutil.copytree(place.cache, place.root / "copy", dirs_exist_ok=True)
        shutil.rmtree(place.cache)
        shutil.move(place.root / "copy", place.cache)
        found.kept(before, place)
        place.run()
        found.kept(before, place)
        found.compare(place, expected)
    found.said = "names the file and `No space left on device`; " + "; ".join(said)
    return found


def read_only(folder: Path, expected: dict[str, Any]) -> Count:
    found = Count("read-only results, read-only cache")
    place = Place(folder / "read-only")
    said = []
    for which in (place.results, place.cache):
        with mounted(which, "-t", "tmpfs", "-o", "ro", "tmpfs") as done:
            if not done:
                found.said = "not run: cannot mount here"
                return found
            begin = time.monotonic()
            code, text = place.run()
            found.times += 1
            found.wrong += code != 2 or "Traceback" in text or "cannot write" not in text
            said.append(f"exit {code} after {time.monotonic() - begin:.0f} s")
    place.run()
    found.compare(place, expected)
    found.said = f"`cannot write …`, before anything runs: {', '.join(said)}"
    return found


def bit_flips(folder: Path, count: int, draw: random.Random, expected: dict[str, Any]) -> Count:
    """One bit in one file of each kind in the cache; what depends on other files is made again, so
    that all of them are read.
    """
    found = Count("bit flip in a cached file")
    place = Place(folder / "flips")
    place.run()
    whole = folder / "whole"
    shutil.copytree(place.cache, whole)
    kinds = {
        "record": "cells/??/*.json",
        "base network": "bases/*.safetensors",
        "base network's digest": "bases/*.json",
        "state": "states/*.tensors",
        "bill": "states/*.spent.json",
        "grades": "grades/*.json",
        "timing": "timings/*.json",
    }
    named = 0
    for kind, pattern in kinds.items():
        for _ in range(count):
            shutil.rmtree(place.cache)
            shutil.copytree(whole, place.cache)
            files = sorted(place.cache.glob(pattern))
            if not files:
                found.wrong += 1
                continue
            if kind not in ("record", "timing"):
                shutil.rmtree(place.cache / "cells")
            path = draw.choice(files)
            content = bytearray(path.read_bytes())
            at = draw.randrange(8 * len(content))
            content[at // 8] ^= 1 << at % 8
            path.write_bytes(content)
            before = {n: c for n, c in place.finished().items() if n != path.name}
            code, text = place.run()
            found.times += 1
            found.kept(before, place)
            found.compare(place, expected)
            rebuilt = path.is_file() and path.read_bytes() != bytes(content)
            named += path.name in text and "damaged" in text and rebuilt and code == 0
    found.wrong += found.times - named
    found.said = f"{named} of {found.times} files named and made again ({', '.join(kinds)})"
    return found


def training_states(
    folder: Path, count: int, draw: random.Random, expected: dict[str, Any]
) -> Count:
    """A bit flip in the state of a training run that was killed."""
    found = Count("bit flip in an unfinished training run's state")
    named = missed = 0
    for attempt in range(count):
        place = Place(folder / f"training-{attempt}")
        patch = place.root / "patch"
        patch.mkdir()
        (patch / "sitecustomize.py").write_text(EAGER)
        process = place.start(PYTHONPATH=str(patch))
        while (
            not (states := list((place.cache / "training").glob("*.state")))
            and process.poll() is None
        ):
            time.sleep(0.02)
        below = victims(process, RUN, "worker")
        process.kill()
        for child in below:
            with suppress(psutil.Error):
                child.kill()
        process.communicate()
        time.sleep(1)
        states = list((place.cache / "training").glob("*.state"))
        if not states:
            missed += 1
            continue
        path = draw.choice(states)
        content = bytearray(path.read_bytes())
        at = draw.randrange(8 * len(content))
        content[at // 8] ^= 1 << at % 8
        path.write_bytes(content)
        before = place.finished()
        _, text = place.run()
        found.times += 1
        named += "damaged training state" in text and path.name in text
        found.kept(before, place)
        found.compare(place, expected)
    found.wrong += (
        found.times - named + missed
    )  # a run that had ended before its state was seen proves nothing
    found.said = f"{named} of {found.times} named, training starts over"
    return found


EAGER = """
import importlib.abc, importlib.util, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "widthbench.training":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            def eager(module):
                run(module)
                module.STATE_EVERY_S = 0
            spec.loader.exec_module = eager
            return spec
sys.meta_path.insert(0, Finder())
"""


def two_runs(folder: Path, count: int, expected: dict[str, Any]) -> Count:
    found = Count("two runs at once on one cache")
    twice = 0
    for attempt in range(count):
        place = Place(folder / f"two-{attempt}")
        other = Place(folder / f"two-{attempt}")
        other.results = place.root / "other"
        running = [place.start(), other.start(BENCH)]
        readers = [threading.Thread(target=p.stdout.read, daemon=True) for p in running]  # type: ignore[union-attr]
        for reader in readers:
            reader.start()
        codes = [p.wait() for p in running]
        found.times += 1
        found.wrong += sum(c != 0 for c in codes)
        for one in (place, other):
            found.compare(one, expected)
        first, second = place.records(), other.records()
        twice += sum(
            first[i].provenance["when"] != second[i].provenance["when"]
            for i in first
            if i in second
        )
    found.wrong += twice
    found.said = f"{twice} cells computed twice"
    return found


def clock(folder: Path, count: int, draw: random.Random, expected: dict[str, Any]) -> Count:
    found = Count("a clock that jumps by up to a year, every second or so")
    if not LIBRARY.exists():
        found.said = "not run: no libfaketime (apt-get install faketime)"
        return found
    for attempt in range(count):
        place = Place(folder / f"clock-{attempt}")
        told = place.root / "faketimerc"
        told.write_text("+0\n")
        process = place.start(
            LD_PRELOAD=str(LIBRARY),
            FAKETIME_TIMESTAMP_FILE=str(told),
            FAKETIME_NO_CACHE="1",
            FAKETIME_DONT_FAKE_MONOTONIC="1",
            FAKETIME_XRESET="1",
        )
        reader = threading.Thread(target=process.stdout.read, daemon=True)  # type: ignore[union-attr]
        reader.start()
        while process.poll() is None:
            told.write_text(f"{draw.randint(-365, 365):+d}d\n")
            found.times += 1
            time.sleep(draw.uniform(0.2, 1.5))
        found.wrong += process.returncode != 0
        # libfaketime's jumps make the sleep fail in which Python waits for git, which no clock of a
        # machine does
        found.compare(place, expected, but=("commit", "dirty"))
    found.said = (
        "time limits and bills go by the monotonic clock; commit and dirty are not compared"
        " (libfaketime breaks waiting for git)"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", default=[], help="only faults whose name holds one of these"
    )
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="widthbench-faults-") as name:
        folder = Path(name)
        place = Place(folder / "undisturbed")
        begin = time.monotonic()
        code, text = place.run()
        lasts = time.monotonic() - begin
        if code:
            sys.exit(text)
        expected = {i: r.stable() for i, r in place.records().items()}
        whom = [(RUN, "driver"), (RUN, "worker"), (BENCH, "controller"), (BENCH, "xdist worker")]
        share = [args.kills // 4 + (i < args.kills % 4) for i in range(4)]
        faults: dict[str, Callable[[], Count]] = {
            f"kill {w} of {h}": lambda h=h, w=w, n=n: kills(folder, h, w, n, lasts, draw, expected)  # type: ignore[misc]
            for (h, w), n in zip(whom, share, strict=True)
        }
        faults |= {
            "disk full": lambda: disk_full(folder, expected),
            "read-only": lambda: read_only(folder, expected),
            "flips": lambda: bit_flips(folder, 3, draw, expected),
            "training": lambda: training_states(folder, 3, draw, expected),
            "two runs": lambda: two_runs(folder, 3, expected),
            "clock": lambda: clock(folder, 2, draw, expected),
        }
        rows = []
        for what, fault in faults.items():
            if not args.only or any(text in what for text in args.only):
                rows.append(fault().row())
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    state = commit()
    print(NOTES)
    headers = ["fault", "times", "records lost", "wrong", "what happened"]
    align = ("left", "right", "right", "right", "left")
    print(tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align))
    dirty = " with uncommitted changes" if state["dirty"] else ""
    print(
        f"\n`python bench/studies/faults.py {' '.join(sys.argv[1:])}`, {len(expected)} cells, an"
        f" undisturbed run takes {lasts:.0f} s; "
    )
    print(
        f"commit {str(state['commit'])[:12]}{dirty}; {hardware()['cpu']}, {hardware()['cores']}"
        " cores."
    )


if __name__ == "__main__":
    main()
