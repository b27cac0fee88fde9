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
from typing import Any

from widthbench import __version__, plugins
from widthbench.cli.common import RED, paint
from widthbench.errors import UsageError, visible
from widthbench.paths import settle

GROUPS = {
    "compare techniques": ("run", "report", "compare"),
    "look": ("list", "doctor", "data"),
    "trust": ("claims", "verify", "cite"),
    "speed": ("regress",),
}
EXAMPLES = {
    "run": """\
  widthbench run smoke                              a comparison within a minute
  widthbench run digits --jobs 2 --dry-run          what there is to do, and for about how long
  widthbench run mysuite.toml --plugin mine.py      a technique of your own
  widthbench run lenets --only '*-l1-norm-*-s0'     some cells""",
    "report": """\
  widthbench report digits                          write its leaderboard and figures anew
  widthbench report --site                          a page of all that is published""",
    "compare": """\
  widthbench compare digits results/digits          published against measured here
  widthbench compare main/mine pr/mine --worse 1    in CI: did my technique get worse?""",
    "list": """\
  widthbench list techniques                        what can be compared
  widthbench list --plugin mine.py                  with one of your own""",
    "doctor": """\
  widthbench doctor resnet18 vit_tiny_patch16_224   what can be resized
  widthbench doctor mynets.py:MyNet --size 32 --groups""",
    "data": """\
  widthbench data                                   which data sets are there
  widthbench data mnist                             read one whole""",
    "claims": """\
  widthbench claims                                 all, with verdicts
  widthbench claims --id M1 A3                      some""",
    "verify": """\
  widthbench verify digits --sample 5               digests, and five cells run again
  widthbench verify digits --results results        what was measured here""",
    "cite": """\
  widthbench cite digits""",
    "regress": """\
  widthbench regress HEAD~1                         did the last commit make anything slower?""",
}
VERBS = tuple(verb for verbs in GROUPS.values() for verb in verbs)


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
    parser = _parser()
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help()
        return 0
    for name, given in (("WIDTHBENCH_DATA", "data"), ("WIDTHBENCH_STORE", "store")):
        if getattr(args, given, None):
            os.environ[name] = getattr(args, given)
    try:
        settle()
        plugins.use(getattr(args, "plugin", []))
        return int(args.run(args))
    except UsageError as error:
        print(f"{paint('widthbench:', RED)} {visible(str(error))}", file=sys.stderr)
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
        print(f"{paint('widthbench:', RED)} {visible(str(error))[:300]}", file=sys.stderr)
        return 2


class _Help(argparse.HelpFormatter):
    """Examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


class _Verbs:
    """The verbs, with what each does, for the list of all of them."""

    def __init__(self, parsers: Any) -> None:
        self.parsers, self.help = parsers, dict[str, str]()

    def add_parser(self, name: str, *, help: str, **options: Any) -> Any:
        self.help[name] = help
        return self.parsers.add_parser(
            name, formatter_class=_Help, epilog=f"examples:\n{EXAMPLES[name]}", **options
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="widthbench",
        usage="%(prog)s VERB ...",
        formatter_class=_Help,
        description=(
            "Compare techniques that decide how wide each layer of a neural network should be."
        ),
    )
    parser.add_argument("--version", action="version", version=f"widthbench {__version__}")
    verbs = _Verbs(
        parser.add_subparsers(
            prog="widthbench", metavar="VERB", dest="verb", help=argparse.SUPPRESS
        )
    )
    for name in VERBS:
        import_module(f"widthbench.cli.{name}").add(verbs)
    shown = [
        "\n".join([f"{title}:", *(f"  {n:<9} {verbs.help[n]}" for n in names)])
        for title, names in GROUPS.items()
    ]
    shown.append(
        "Begin with `widthbench run smoke`, a comparison within a minute;"
        " `widthbench VERB --help` has examples.\n"
        "Exit codes: 0 done, 1 a check fell short, 2 bad input.\n"
        "Completion: `pip install shtab`, then `shtab widthbench.cli._parser -s bash` (or zsh)."
    )
    parser.epilog = "\n\n".join(shown)
    return parser
