"""The command line, a file a verb. Exit codes: 0 done, 1 a check fell short, 2 bad input."""

from __future__ import annotations

import argparse
import faulthandler
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from widthbench import __version__, plugins
from widthbench.errors import UsageError, visible
from widthbench.paths import settle

VERBS = ("list", "run", "claims", "data", "report", "cite", "verify", "doctor", "regress")


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
        plugins.use(getattr(args, "plugin", []))
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
        epilog=(
            "Begin with `widthbench run smoke`, a comparison within a minute."
            " Exit codes: 0 done, 1 a check fell short, 2 bad input."
        ),
    )
    parser.add_argument("--version", action="version", version=f"widthbench {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name in VERBS:
        import_module(f"widthbench.cli.{name}").add(verbs)
    return parser
