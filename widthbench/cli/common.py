"""What several verbs share: arguments, tables, progress."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from widthbench.errors import visible

RED, YELLOW = "31", "33"


def paint(text: str, colour: str, stream: Any = None) -> str:
    """Text in a colour, where it goes to a terminal that shows any (https://no-color.org).

    Args:
        text: The text.
        colour: A code of ANSI's.
        stream: Where it goes; standard error if None.
    """
    stream = stream or sys.stderr
    shows = stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    return f"\033[{colour}m{text}\033[0m" if shows else text


def suite_names(verb: argparse.ArgumentParser, nargs: str = "+") -> None:
    """The suites that a verb is about."""
    verb.add_argument(
        "suite",
        nargs=nargs,
        metavar="SUITE",
        help="name of a suite (`widthbench list suites`), or a TOML file",
    )


def results_folder(verb: argparse.ArgumentParser) -> None:
    """Where a verb writes results."""
    verb.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where results go (default: ./results)",
    )


def whose_results(verb: argparse.ArgumentParser) -> None:
    """Whose results a verb reads."""
    verb.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="whose results (default: the published ones; those of a run here: results)",
    )


def data_folder(verb: argparse.ArgumentParser) -> None:
    """Where a verb looks for data."""
    verb.add_argument(
        "--data",
        metavar="DIR",
        help="where data sets lie (default: WIDTHBENCH_DATA, or the cache)",
    )


def own_files(verb: argparse.ArgumentParser) -> None:
    """Files of the user's own."""
    verb.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file with techniques (or networks) of your own; repeatable",
    )


def as_json(verb: argparse.ArgumentParser) -> None:
    """Ask for JSON."""
    verb.add_argument("--json", action="store_true", help="print JSON instead of a table")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return value


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not '{text}'")
    return value


def points(text: str) -> float:
    """Points of accuracy, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be a number of points from 0 to 100, not '{text}'")
    return value


def share(text: str) -> float:
    """GPUs of a task."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (value > 1 and value != int(value)):
        raise argparse.ArgumentTypeError(
            f"must be a share of a GPU, or a whole number of them, not '{text}'"
        )
    return value


def count(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def show(rows: list[dict[str, Any]], as_json: bool, title: str = "") -> None:
    """Print a table, or JSON."""
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


class Told:
    """Says what is finished, how well it did, how many have failed so far, and about how long the
    rest will take.

    Args:
        total: How many there will be; None if nobody knows.
        say: Where it is said; on standard error if None.
    """

    def __init__(self, total: int | None, say: Callable[[str], Any] | None = None) -> None:
        self.records: list[Any] = []
        self._total, self._begin, self._computed = total, time.monotonic(), 0
        self._say = say or _print

    def __call__(self, record: Any, now: Sequence[str] = ()) -> None:
        """Tell of one.

        Args:
            record: What is finished.
            now: What is running, by name.
        """
        from widthbench import parallel

        self.records.append(record)
        since = time.monotonic() - self._begin
        made = datetime.fromisoformat(record.provenance.get("when", "1970-01-01T00:00:00+00:00"))
        self._computed += (
            datetime.now(UTC) - made
        ).total_seconds() <= since + 1  # the others were there before
        if not parallel.is_main():
            return
        count, rest = str(len(self.records)), []
        if self._total is not None:
            count += f"/{self._total}"
            left = self._total - len(self.records)
            if left and self._computed:
                rest.append(f"about {duration(since / self._computed * left)} left")
        if failed := sum(r.status == "failed" for r in self.records):
            rest.append(f"{failed} failed")
        if now:
            rest.append(f"now {', '.join(now)}")
        note = f"{record.status}  {record.reason}"
        if record.status == "done":
            row = record.row()
            note = f"{row.top1:.2f} %" if row is not None else "done"
        text = f"[{count}] {record.cell.id}: {note}" + (f"  ({', '.join(rest)})" if rest else "")
        colour = {"failed": RED, "skipped": YELLOW}.get(record.status)
        text = visible(text)
        self._say(paint(text, colour) if colour and self._say is _print else text)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``"1 h 20 min"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"


def folder_of(args: argparse.Namespace, suite: str) -> Path:
    """Where a suite's records are read: in the folder that was named, else the published ones, else
    those of a run here.
    """
    from widthbench.paths import published_dir

    if args.results is not None:
        return Path(args.results) / suite
    published = published_dir() / suite
    return published if (published / "records.jsonl").is_file() else Path("results") / suite
