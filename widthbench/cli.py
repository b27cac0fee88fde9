"""The command line. Exit codes: 0 done, 1 a check fell short, 2 bad input."""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from widthbench import __version__
from widthbench.errors import UsageError, visible
from widthbench.paths import settle


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit code.
    """
    if argv is None and sys.stderr is not None:
        with suppress(OSError, ValueError):  # no file
            faulthandler.enable()  # a plug-in that crashes while it is listed is named by its file
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal or pipe that has no "±" gets "?"
    args = _parser().parse_args(argv)
    for name, given in (("WIDTHBENCH_DATA", "data"), ("WIDTHBENCH_STORE", "store")):
        if getattr(args, given, None):
            os.environ[name] = getattr(args, given)
    try:
        settle()
        return int(args.run(args))
    except UsageError as error:
        print(f"widthbench: {visible(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "widthbench: interrupted; finished cells are kept, run again for the rest",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a name that no file can have, a folder that may not be read
        print(f"widthbench: {visible(str(error))[:300]}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="widthbench",
        description=(
            "Compare techniques that decide how wide each layer of a neural network should be."
        ),
        epilog="exit codes: 0 done, 1 a check fell short, 2 bad input",
    )
    parser.add_argument("--version", action="version", version=f"widthbench {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    verb = verbs.add_parser(
        "list", help="techniques, suites, recipes and data sets that are installed"
    )
    verb.add_argument(
        "what",
        nargs="?",
        choices=["techniques", "suites", "datasets", "recipes"],
        help="only these (default: all)",
    )
    _json(verb)
    verb.set_defaults(run=_list)

    verb = verbs.add_parser(
        "run",
        help="run the cells of a suite that have no result yet, then write its report",
        description=(
            "Run the cells of a suite that have no result yet, then write its report. Finished"
            " cells, trained base networks and half-done training are kept in the cache"
            " (WIDTHBENCH_CACHE, by default the user's cache folder): a run that was stopped goes"
            " on from there."
        ),
    )
    _suites(verb)
    verb.add_argument(
        "--jobs",
        type=_positive,
        default=None,
        metavar="N",
        help=(
            "worker processes (default: 1); with --engine ray and no --address, cores of the Ray"
            " that is started (default: all)"
        ),
    )
    verb.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only cells whose name holds one of these (as in the log)",
    )
    verb.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="where cells run: processes of this machine, or a Ray cluster (default: local)",
    )
    verb.add_argument(
        "--address",
        metavar="ADDRESS",
        help=(
            "of a running Ray cluster ('auto': the one that this machine belongs to; default: start"
            " one here)"
        ),
    )
    verb.add_argument(
        "--gpus",
        type=_share,
        metavar="N",
        help=(
            "GPUs of each Ray task, fractions allowed (default: one where there are any and the"
            " suite's device is not cpu)"
        ),
    )
    verb.add_argument(
        "--store",
        metavar="URL",
        help=(
            "where machines share finished cells and base networks if their caches are apart: a"
            " folder, or any fsspec URL (s3://…, gs://…; default: WIDTHBENCH_STORE, or none)"
        ),
    )
    verb.add_argument(
        "--within",
        type=_seconds,
        metavar="SECONDS",
        help=(
            "stop after so many seconds, a slot on a cluster, say: what is finished is kept and"
            " reported, and the next run goes on from there"
        ),
    )
    verb.add_argument(
        "--order",
        choices=["network", "seed"],
        default="network",
        help=(
            "what is finished first: all seeds of a network, or one seed of all networks (default:"
            " network)"
        ),
    )
    verb.add_argument(
        "--no-timing",
        action="store_true",
        help="measure no latency: keep the timings that are there",
    )
    _results(verb)
    _json(verb)
    verb.set_defaults(run=_run)

    verb = verbs.add_parser(
        "claims",
        help="what the source documents report against what was measured, with verdicts",
        description=(
            "Judge the claims of the source documents by the published records; with --run or"
            " --results by those in a folder of yours, where claims.md is then written. A claim"
            " that is not reproduced is a result: the exit code is 0."
        ),
    )
    verb.add_argument("--id", nargs="+", default=[], metavar="ID", help="only these (default: all)")
    verb.add_argument(
        "--run",
        dest="first",
        action="store_true",
        help="first run the cells that the claims rest on and that have no result yet",
    )
    verb.add_argument(
        "--jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="worker processes for --run (default: 1)",
    )
    verb.add_argument(
        "--publish",
        action="store_true",
        help="write claims.md and claims.json beside the published records",
    )
    _read(verb)
    _json(verb)
    verb.set_defaults(run=_claims)

    verb = verbs.add_parser(
        "data",
        help="data sets: which are there, where, how many images, and their digests",
        description=(
            "List the data sets that are known or lie where data are looked for (WIDTHBENCH_DATA or"
            " --data). With names, read them whole: a damaged file is named, and the exit code"
            " is 1."
        ),
    )
    verb.add_argument(
        "datasets",
        nargs="*",
        metavar="DATASET",
        help="read only these, every image (default: list all)",
    )
    _json(verb)
    verb.set_defaults(run=_data)

    verb = verbs.add_parser(
        "report",
        help=(
            "write a suite's leaderboard and figures from finished cells, or a page of all results"
        ),
        description=(
            "Write the leaderboards and figures of suites from what was measured here, and"
            " reproduction.md, which compares it with what was published. With --site, also one"
            " static page, site.html, of every suite there and of the claims."
        ),
    )
    _suites(verb, "*")
    verb.add_argument(
        "--no-timing",
        action="store_true",
        help="measure no latency: keep the timings that are there",
    )
    verb.add_argument(
        "--site",
        action="store_true",
        help="also write site.html; without SUITE, nothing but it, of what is published",
    )
    verb.add_argument(
        "--publish",
        action="store_true",
        help=(
            "instead put what was measured in the place of what is published, cell by cell (in a"
            " checkout: results/published)"
        ),
    )
    verb.add_argument(
        "--add",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help=(
            "first take over the records in these records.jsonl, of another machine, say, and the"
            " timings.jsonl beside them; a finished record beats a failed one"
        ),
    )
    verb.add_argument(
        "--replace",
        action="store_true",
        help="let added records take the place of others that come from another device",
    )
    verb.add_argument(
        "--results", type=Path, metavar="DIR", help="where results are (default: ./results)"
    )
    _json(verb)
    verb.set_defaults(run=_report)

    verb = verbs.add_parser(
        "cite",
        help="BibTeX of a suite's results and of the techniques in them",
        description=(
            "Print BibTeX: an entry for each suite, with the version, commit and digest of its"
            " results, and one for each technique that it compares."
        ),
    )
    _suites(verb)
    _read(verb)
    verb.set_defaults(run=_cite)

    verb = verbs.add_parser(
        "verify",
        help="whether a suite's results are what they say: digests, and cells run again",
        description=(
            "Hold the files of a suite's results and each record to their digests, then run"
            " recorded cells again from nothing, in a cache of their own. On the machine, with the"
            " code and the versions that a record names the rerun must be equal bit by bit (but for"
            " times); elsewhere its test top-1 at the last stage must lie within one point or three"
            " standard errors of the difference, and its MACs within 5 %; sizes and costs must fit"
            " (docs/citing.md). Exit code 1 if anything differs."
        ),
    )
    _suites(verb)
    verb.add_argument(
        "--sample",
        type=_count,
        metavar="N",
        help="run N cells again, drawn at random; 0: files only (default: all)",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw (default: 0)")
    verb.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="draw only from cells whose name holds one of these",
    )
    verb.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="worker processes (default: 1)"
    )
    _read(verb)
    _json(verb)
    verb.set_defaults(run=_verify)

    verb = verbs.add_parser(
        "doctor",
        help="channel groups of networks and their grades",
        description=(
            "Discover and certify the channel groups of networks: exact groups may be resized,"
            " coupled ones only with scope='all', frozen ones never. 'inner' counts the exact"
            " groups outside residual streams, 'down to' is the share of the MACs that one channel"
            " per group would leave. Exit code 1 if a network has no exact group."
        ),
    )
    verb.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="any timm model name, or lenet_300_100, lenet5, mlp_sigmoid",
    )
    verb.add_argument(
        "--all-families", action="store_true", help=argparse.SUPPRESS
    )  # of earlier versions
    verb.add_argument(
        "--size",
        type=_positive,
        metavar="PX",
        help="input height and width (default: as published)",
    )
    verb.add_argument("--groups", action="store_true", help="list every group, not only the counts")
    verb.add_argument(
        "--verify",
        action="store_true",
        help="certify anew, and show the errors of resizing all groups at once",
    )
    _json(verb)
    verb.set_defaults(run=_doctor)

    verb = verbs.add_parser(
        "regress",
        help="whether a commit made anything slower than another one",
        description=(
            "Install two commits of the repository at hand side by side, in folders of their own,"
            " and measure both in the environment at hand, sample by sample in turn; what is beyond"
            " the factor is measured again, by fresh processes and twice as often, before it is"
            " called slower. Prints a markdown table for a pull request. Exit codes: 0 nothing got"
            " worse, 1 something is slower or takes more memory, 2 a benchmark broke, or bad input."
        ),
    )
    verb.add_argument("base", metavar="BASE", help="the commit that was: a hash, a branch, a tag")
    verb.add_argument(
        "head", metavar="HEAD", nargs="?", default="HEAD", help="the commit that is (default: HEAD)"
    )
    verb.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only benchmarks whose name holds one of these",
    )
    verb.add_argument(
        "--factor",
        type=float,
        default=1.5,
        help="from which ratio on something is slower (default: 1.5)",
    )
    verb.add_argument(
        "--pairs",
        type=_positive,
        default=5,
        metavar="N",
        help="pairs of samples of a first look (default: 5)",
    )
    verb.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where to measure (default: cpu)"
    )
    verb.add_argument("--write", type=Path, metavar="FILE", help="also write the table to a file")
    _json(verb)
    verb.set_defaults(run=_regress)
    for verb in verbs.choices.values():
        if verb.prog.split()[-1] not in ("doctor", "regress"):
            verb.add_argument(
                "--data",
                metavar="DIR",
                help="where data sets lie (default: WIDTHBENCH_DATA, or the cache)",
            )
    return parser


def _suites(verb: argparse.ArgumentParser, nargs: str = "+") -> None:
    verb.add_argument(
        "suite",
        nargs=nargs,
        metavar="SUITE",
        help="name of a suite (`widthbench list suites`), or a TOML file",
    )


def _results(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where results go (default: ./results)",
    )


def _read(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="whose results (default: the published ones; those of a run here: results)",
    )


def _json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not '{text}'")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (value > 1 and value != int(value)):
        raise argparse.ArgumentTypeError(
            f"must be a share of a GPU, or a whole number of them, not '{text}'"
        )
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _show(rows: list[dict[str, Any]], as_json: bool, title: str = "") -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if title:
        print(f"{title}\n")
    shown = [
        {k: visible(str(v)) for k, v in row.items()} for row in rows
    ]  # whatever files and records may hold
    print(
        tabulate(shown, headers="keys", tablefmt="simple", disable_numparse=True)
        if rows
        else "none"
    )
    print()


def _list(args: argparse.Namespace) -> int:
    from widthbench.data import sources
    from widthbench.experiment import recipes, suites
    from widthbench.technique import registry

    found: dict[str, list[dict[str, Any]]] = {}
    bad: dict[str, str] = {}
    if args.what in (None, "techniques"):
        good, bad = registry.load_all()
        found["techniques"] = [
            {
                "technique": n,
                "data access": c.access,
                "from": registry.owner(n),
                "what it does": " ".join((c.__doc__ or "").partition("\n\n")[0].split()),
            }
            for n, c in good.items()
        ]
    if args.what in (None, "suites"):
        found["suites"] = []
        for name in suites.names():
            s = suites.load(name)
            found["suites"].append(
                {"suite": name, "cells": len(s.cells()), "seeds": len(s.seeds), "title": s.title}
            )
    if args.what in (None, "datasets"):
        found["datasets"] = [
            {"dataset": n, "where": (sources.locate(n) or ("not there",))[0]}
            for n in sources.names()
        ]
    if args.what in (None, "recipes"):
        found["recipes"] = []
        for name in recipes.names():
            r = recipes.load(name)
            reached = (
                ", ".join(f"{k} {v:.2f} %" for k, v in r.reaches.items()) or "not measured here"
            )
            found["recipes"].append(
                {
                    "recipe": name,
                    "epochs": f"{r.recipe.epochs:g}",
                    "reaches": reached,
                    "title": r.title,
                }
            )
    if args.json:
        print(json.dumps({**found, **({"broken": bad} if "techniques" in found else {})}, indent=1))
    else:
        for rows in found.values():
            _show(rows, False)
    for reason in bad.values():
        print(f"widthbench: {reason}", file=sys.stderr)
    return 1 if bad else 0


def _run(args: argparse.Namespace) -> int:
    from widthbench import cache, parallel
    from widthbench.experiment import suites
    from widthbench.paths import require_writable

    if parallel.launched() and ((args.jobs or 1) > 1 or args.engine != "local"):
        raise UsageError(
            "a launcher started several processes for each cell, so --jobs must be 1 and --engine"
            " local"
        )
    if args.engine != "ray" and (args.address is not None or args.gpus is not None):
        raise UsageError("--address and --gpus are for --engine ray")
    if args.engine == "ray" and args.within is not None:
        raise UsageError(
            "--within is for --engine local: a cluster's own scheduler has a time limit for jobs"
        )
    if args.address is not None and args.jobs is not None:
        raise UsageError(
            "a cluster has the cores that it has: leave --jobs out where --address is given"
        )
    chosen = [
        (s, [c for c in s.cells() if _wanted(c.id, args.only)]) for s in suites.load_all(args.suite)
    ]
    require_writable(args.results)
    cache.check_store()
    for suite, cells in chosen:
        if not cells:
            raise UsageError(
                f"suite {suite.name} has no cell whose name holds"
                f" {' or '.join(map(repr, args.only))}"
            )
        suites.check(suite, cells)
    cells = list({c.identity: c for _, some in chosen for c in some}.values())
    if args.order == "seed":
        cells.sort(key=lambda c: c.seed)
    limits = suites.limits(s for s, _ in chosen)
    told = _Progress(len(cells))
    parallel.start()
    try:
        if args.engine == "ray":
            from widthbench.engines import ray

            ray.run(
                cells,
                done=told,
                limits=limits,
                address=args.address,
                jobs=args.jobs,
                gpus=args.gpus,
            )
        else:
            from widthbench.engines import local

            if not local.run(
                cells, jobs=args.jobs or 1, done=told, limits=limits, within=args.within
            ):
                left = f"{len(cells) - len(told.records)} of {len(cells)} cells are left"
                print(f"widthbench: time is over, {left}: run again for the rest", file=sys.stderr)
                if not told.records:
                    return 0
        return _report(args, told.records) if parallel.first() else 0
    finally:
        parallel.stop()


class _Progress:
    """Says on standard error what is finished, and about how long the rest will take."""

    def __init__(self, total: int) -> None:
        self.records: list[Any] = []
        self._total, self._begin, self._computed = total, time.monotonic(), 0

    def __call__(self, record: Any) -> None:
        from widthbench import parallel

        self.records.append(record)
        since = time.monotonic() - self._begin
        made = datetime.fromisoformat(record.provenance.get("when", "1970-01-01T00:00:00+00:00"))
        self._computed += (
            datetime.now(UTC) - made
        ).total_seconds() <= since + 1  # the others were there before
        if not parallel.first():
            return
        left = self._total - len(self.records)
        rest = (
            f"  (about {_duration(since / self._computed * left)} left)"
            if left and self._computed
            else ""
        )
        note = f"  {record.reason}" if record.status != "done" else ""
        text = f"[{len(self.records)}/{self._total}] {record.cell.id}: {record.status}{note}{rest}"
        print(visible(text), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """``"1 h 20 min"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"


def _wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(text in name for text in only)


def _report(args: argparse.Namespace, fresh: Sequence[Any] = ()) -> int:
    from widthbench.experiment import suites
    from widthbench.experiment.records import Store
    from widthbench.paths import published_dir, require_writable
    from widthbench.report.build import adding, build, publish
    from widthbench.report.timing import read_timings

    failed = []
    results = args.results or Path("results")
    site, chosen = getattr(args, "site", False), suites.load_all(args.suite)
    require_writable(results)
    if not (chosen or site):
        raise UsageError("name a suite (`widthbench list suites`), or ask for --site")
    for suite in chosen:
        if getattr(args, "publish", False):
            for file in publish(suite, results, replace=args.replace):
                print(f"wrote {file}")
            continue
        added = (
            adding(suite, results, Store(), args.add, replace=args.replace)
            if getattr(args, "add", [])
            else fresh
        )
        timings = [t for file in getattr(args, "add", []) for t in read_timings(file.parent)]
        report = build(
            suite, results, Store(), time_shapes=not args.no_timing, fresh=added, timings=timings
        )
        failed += report.failed
        if args.json:
            print(json.dumps([r.model_dump(mode="json") for r in report.records]))
        else:
            print(f"\n{report.text}\n")
            for file in report.files:
                print(f"wrote {file}")
            if report.reproduction:
                print(f"\n{report.reproduction}")
    if failed:
        first = visible(f"{failed[0].cell.id}: {failed[0].reason}")
        print(f"widthbench: {len(failed)} cells failed, the first {first}", file=sys.stderr)
    if site:
        from widthbench.report.site import write

        of = (
            results if chosen or args.results else published_dir()
        )  # of what was measured, or of all that is published
        print(f"wrote {write(of, chosen, results)}", file=sys.stderr if args.json else sys.stdout)
    return 1 if failed else 0


def _folder(args: argparse.Namespace, suite: str) -> Path:
    """Where a suite's records are read: in the folder that was named, else the published ones, else
    those of a run here.
    """
    from widthbench.paths import published_dir

    if args.results is not None:
        return Path(args.results) / suite
    published = published_dir() / suite
    return published if (published / "records.jsonl").is_file() else Path("results") / suite


def _cite(args: argparse.Namespace) -> int:
    from widthbench.experiment import suites
    from widthbench.experiment.records import read_records
    from widthbench.report.build import of_suite
    from widthbench.report.exports import citation

    for suite in map(suites.load, args.suite):
        path = _folder(args, suite.name) / "records.jsonl"
        records = of_suite(suite, path, read_records(path)) if path.is_file() else []
        there = bool(records)
        print(
            visible(
                citation(
                    suite, records, hashlib.sha256(path.read_bytes()).hexdigest() if there else None
                ),
                "\n",
            )
        )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from widthbench.experiment import suites
    from widthbench.experiment.records import read_lines
    from widthbench.paths import published_dir
    from widthbench.report import verify

    checks = []
    for suite in map(suites.load, args.suite):
        folder = _folder(args, suite.name)
        found = verify.check_files(suite, folder)
        records = [line.record for line in read_lines(folder / "records.jsonl") if line.record]
        wanted = [r for r in records if _wanted(r.cell.id, args.only)]
        if records and not wanted:
            raise UsageError(
                f"suite {suite.name} has no record whose name holds"
                f" {' or '.join(map(repr, args.only))}"
            )
        drawn = [] if args.sample == 0 else verify.sample(wanted, args.sample, args.seed)
        if drawn:
            spent = sum(s.seconds for r in drawn for s in r.spent.values())
            print(
                f"{suite.name}: {len(drawn)} of {len(records)} cells again; they took"
                f" {spent:.0f} s",
                file=sys.stderr,
            )
            found += verify.rerun(
                suite,
                drawn,
                beside=records,
                jobs=args.jobs,
                tell=lambda c: print(
                    visible(f"{c.what}: {'holds' if c.ok else 'DIFFERS'} ({c.by}) {c.note}"),
                    file=sys.stderr,
                ),
            )
        checks += [{"suite": suite.name, **c.plain()} for c in found]
    checks += [
        {"suite": "", **c.plain()} for c in verify.check_claims(args.results or published_dir())
    ]
    _show(checks, args.json)
    bad = sum(c["verdict"] != "holds" for c in checks)
    if not args.json:
        equal, near = (sum(c["by"] == how for c in checks) for how in ("bit-equal", "tolerance"))
        print(f"{bad} of {len(checks)} checks differ" if bad else f"all {len(checks)} checks hold")
        if equal or near:
            print(
                f"reruns: {equal} checks bit by bit, {near} within tolerance (records of other"
                " code, versions or hardware)"
            )
    return 1 if bad else 0


def _claims(args: argparse.Namespace) -> int:
    from widthbench.claims import ledger
    from widthbench.paths import published_dir, require_writable
    from widthbench.report.claims import rows_of, write

    chosen = ledger.choose(ledger.load(), args.id)
    here = args.results or Path("results")
    where = here if args.results or args.first else published_dir()
    wanted = not args.id and (args.publish or where != published_dir())
    if args.publish and where != published_dir():
        raise UsageError(
            "--publish is for claims that are judged by the published records: leave out --run and"
            " --results"
        )
    if wanted:
        require_writable(where)
    failed = _run_claims([claim for _, claim in chosen], here, args.jobs) if args.first else 0
    judged = ledger.judge_all(where, args.id)
    _show(rows_of(judged), args.json)
    if not args.json:
        print(f"judged by the records in {where}")
    for file in write(judged, where) if wanted else ():
        print(f"wrote {file}", file=sys.stderr if args.json else sys.stdout)
    return 1 if failed else 0


def _run_claims(chosen: Sequence[Any], results: Path, jobs: int) -> int:
    """Run what the claims rest on, and write the suites' results; gives the number of failed
    cells.
    """
    from widthbench.claims import ledger
    from widthbench.engines import local
    from widthbench.experiment import suites
    from widthbench.experiment.records import Store
    from widthbench.report.build import build

    failed = 0
    for name, cells in ledger.cells(chosen).items():
        suites.check(suites.load(name), cells)
        told = _Progress(len(cells))
        local.run(cells, jobs=jobs, limits=suites.limits([suites.load(name)]), done=told)
        failed += len(build(suites.load(name), results, Store(), fresh=told.records).failed)
    return failed


def _data(args: argparse.Namespace) -> int:
    from widthbench.data import sources
    from widthbench.paths import data_dir

    rows: list[dict[str, Any]] = []
    bad, missing = [], []
    for name in args.datasets or sources.names():
        place = sources.locate(name)
        row = {
            "dataset": name,
            "where": place[0] if place else "not there",
            "layout": place[1] if place else "",
        }
        row |= dict.fromkeys(("classes", "train", "test", "image", "digest"), "")
        if not place:
            missing.append(f"{name}: put {sources.wanted(name)}")
        if place or args.datasets:
            try:
                source = sources.load(name)
                if args.datasets:
                    sources.verify(source)
                row |= {
                    "where": source.where,
                    "layout": source.layout,
                    "classes": str(source.classes),
                    "train": f"{len(source.train):,}",
                    "test": f"{len(source.test):,}",
                    "image": source.image,
                    "digest": source.digest if args.json else source.digest[:12],
                }
            except UsageError as error:
                row["layout"] = "cannot be read"
                bad.append(str(error))
        rows.append(row)
    _show(rows, args.json, f"data are looked for in {data_dir()}")
    if not args.json and not args.datasets:
        print("\n".join(missing))
    for reason in bad:
        print(f"widthbench: {reason}", file=sys.stderr)
    return 1 if bad else 0


def _regress(args: argparse.Namespace) -> int:
    from widthbench.paths import write_atomic
    from widthbench.report import regress

    found = regress.compare(
        args.base,
        args.head,
        factor=args.factor,
        pairs=args.pairs,
        only=args.only,
        device=args.device,
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(json.dumps([r.plain() for r in found.rows], indent=1) if args.json else found.markdown())
    if args.write:
        write_atomic(args.write, found.markdown())
    return found.exit_code


def _doctor(args: argparse.Namespace) -> int:
    import torch

    from widthbench.networks import models
    from widthbench.width.certify import find_groups
    from widthbench.width.doctor import diagnose

    if args.all_families:
        raise UsageError(
            "doctor --all-families is a script of its own now: in a checkout, python"
            " bench/studies/families.py"
        )
    if not args.models:
        raise UsageError("name one model or more")
    for name in args.models:
        models.require(name)
    rows: list[dict[str, Any]] = []
    sound = True
    for name in args.models:
        channels, height, width, classes = models.native(name)
        if args.size:
            height = width = args.size
        model = models.create(name, classes=classes, channels=channels, size=height)
        x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
        found = find_groups(model, x, cache=not args.verify)
        if args.groups:
            rows += [
                {
                    "model": name,
                    "group": g.name,
                    "channels": g.channels,
                    "blocks": g.blocks,
                    "inner": "yes" if g.inner else "no",
                    "grade": g.grade,
                    "consumers": len(g.consumers),
                    "reason": g.reason,
                }
                for g in found.values()
            ]
        else:
            rows.append(
                {
                    "model": name,
                    "input": f"{channels} x {height} x {width}",
                    **diagnose(model, found, x, verify=args.verify),
                }
            )
        sound = sound and any(g.grade == "exact" for g in found.values())
    _show(rows, args.json)
    return 0 if sound else 1
