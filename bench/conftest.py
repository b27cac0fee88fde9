"""`pytest bench`: suites and claims as test items, cells of one base network on one worker, a
report at the end.
"""

from __future__ import annotations

import os

# before torch is imported: two busy workers with one thread each beat two that fight over all of
# them
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if WORKER and (visible := [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]):
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(WORKER.removeprefix("gw")) % len(visible)]

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from widthbench import plugins
from widthbench.claims import ledger
from widthbench.cli.common import Told
from widthbench.engines.worker import Worker
from widthbench.errors import UsageError
from widthbench.experiment import suites
from widthbench.experiment.limits import Limits
from widthbench.experiment.records import Record
from widthbench.experiment.store import Store
from widthbench.paths import published_dir, require_writable, settle

SUITES = pytest.StashKey[list[suites.Suite]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("widthbench")
    group.addoption(
        "--suite",
        action="append",
        metavar="NAME",
        help="suite name or TOML path, repeatable, or 'all' (default: digits)",
    )
    group.addoption(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file with techniques (or networks) of your own; repeatable",
    )
    group.addoption(
        "--results", metavar="DIR", help="where results go (default: results/ beside bench/)"
    )
    group.addoption(
        "--data", metavar="DIR", help="where data sets lie (default: WIDTHBENCH_DATA, or the cache)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadgroup"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Cells of one base network on one worker, also where several workers are killed at once."""
    if config.option.dist != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class Groups(LoadGroupScheduling):
        """Gives no work to a worker that has replaced a lost one and has not yet said which tests
        it has.
        """

        def _reschedule(self, node: Any) -> None:
            if node in self.registered_collections:  # else it is asked for once it has
                super()._reschedule(node)

    return Groups(config, log)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): items that one worker runs")
    if folder := config.getoption("--data"):
        os.environ["WIDTHBENCH_DATA"] = folder  # workers inherit it
    names = config.getoption("--suite") or ["digits"]
    try:
        settle()
        plugins.use(config.getoption("--plugin"))
        chosen = suites.load_all(suites.names() if "all" in names else names)
        if not WORKER:
            require_writable(_results(config))
            if any("test_claims" not in str(arg) for arg in config.args):
                for suite in chosen:  # what does not work is named before anything runs
                    suites.check(suite)
    except UsageError as error:
        pytest.exit(str(error), returncode=2)
    config.stash[SUITES] = chosen
    if not WORKER and config.option.verbose <= 0 and not config.option.collectonly:
        config.pluginmanager.register(Lines(config), "widthbench lines")


def _results(config: pytest.Config) -> Path:
    return Path(config.getoption("--results") or Path(__file__).resolve().parent.parent / "results")


@pytest.fixture(scope="session")
def evidence(request: pytest.FixtureRequest) -> ledger.Evidence:
    return ledger.Evidence(published_dir())


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    """A process of its own for cells: what a plug-in does to it ends one cell."""
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> dict[str, Limits]:
    return suites.limits(request.config.stash[SUITES])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "claim" in metafunc.fixturenames:
        found = ledger.choose(ledger.load())
        metafunc.parametrize(
            ("claim", "calibrates"), [pytest.param(c, d.calibrates, id=c.id) for d, c in found]
        )
    if "cell" not in metafunc.fixturenames:
        return
    seen = {}
    for suite in metafunc.config.stash[SUITES]:
        for cell in suite.cells():
            name = cell.id if len(metafunc.config.stash[SUITES]) == 1 else f"{suite.name}-{cell.id}"
            seen[name] = pytest.param(cell, id=name, marks=pytest.mark.xdist_group(cell.group))
    metafunc.parametrize("cell", list(seen.values()))


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Cells have lines of their own, and claims a list at the end, instead of dots."""
    if report.when != "call":
        return None
    return report.outcome, "", report.outcome.upper()


class Lines:
    """A line for each finished cell, in the process that has the terminal."""

    def __init__(self, config: pytest.Config) -> None:
        cells = {c.identity for suite in config.stash[SUITES] for c in suite.cells()}
        chosen = config.option.keyword  # how many it leaves is not known here
        self.plugins = config.pluginmanager
        self.told = Told(None if chosen else len(cells), self.write)
        self.running: list[str] = []

    def write(self, text: str) -> None:
        terminal = self.plugins.get_plugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(text)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if "test_cell[" in nodeid:
            self.running.append(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.running = [n for n in self.running if n != report.nodeid]
            now = [n.partition("[")[2].partition("]")[0] for n in self.running]
            for record in _records([report], Store()):
                self.told(record, now)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    items = [
        r.nodeid for k in ("passed", "failed", "skipped") for r in terminalreporter.stats.get(k, [])
    ]
    if WORKER or config.option.collectonly or not items:
        return
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        terminalreporter.write_line(
            "interrupted: finished cells are kept, run again for the rest and for the report"
        )
        return
    from widthbench.report.build import build

    fresh = list(_measured(terminalreporter, Store()))
    for suite in config.stash[SUITES] if any("test_comparisons" in i for i in items) else ():
        try:
            report = build(suite, _results(config), Store(), fresh=fresh)
        except UsageError as error:
            terminalreporter.write_line(str(error))
            continue
        terminalreporter.section(f"leaderboard: {suite.name}")
        terminalreporter.write_line(report.text)
        terminalreporter.write_line("")
        for file in report.files:
            shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
            terminalreporter.write_line(f"wrote {shown}")
        if report.failed:
            terminalreporter.write_line(
                f"{len(report.failed)} cells failed, the first {report.failed[0].cell.id}"
            )
        if report.reproduction:
            terminalreporter.write_line(f"\n{report.reproduction}")
    if any("test_claims" in i for i in items):
        _show_claims(terminalreporter)


def _measured(terminalreporter: pytest.TerminalReporter, store: Store) -> Iterator[Record]:
    """The records of the cells that were run or looked up in this session, by their keys, which
    workers report.
    """
    for reports in terminalreporter.stats.values():
        yield from _records(reports, store)


def _records(reports: Iterable[Any], store: Store) -> Iterator[Record]:
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if (name == "failed" and (record := store.failure(value))) or (
                name == "done" and (record := store.get(value))
            ):
                yield record


def _show_claims(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the verdicts."""
    try:
        judged = ledger.judge_all(published_dir())
    except UsageError as error:
        terminalreporter.write_line(str(error))
        return
    terminalreporter.section("claims, judged by the published records")
    for verdict in ledger.VERDICTS:
        ids = [
            c.id
            for d, c, rows in judged
            if ledger.overall(rows) == verdict and not ledger.is_sanity(d, rows)
        ]
        if ids:
            terminalreporter.write_line(f"{verdict}: {', '.join(ids)}")
