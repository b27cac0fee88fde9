"""Errors that name the thing, what was wrong with it, and the remedy; the command line exits with 2
on each.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UsageError(ValueError):
    """Bad input: something that the caller can put right. One line, exit code 2."""


class BudgetError(UsageError):
    """A budget that cannot be parsed, is out of range, or that no plan can meet."""


class InfeasibleBudgetError(BudgetError):
    """A budget below what one channel per block of each group costs."""


class PlanError(UsageError):
    """A plan that does not fit the network it is applied to."""


class CostError(UsageError):
    """A resized network whose MACs or parameters are not those that were predicted from its
    widths.
    """


class DivergedError(UsageError):
    """A training run that came to nothing: a loss that is not finite, or that ends where it would
    be without looking at inputs.
    """


class NoGroupsError(UsageError):
    """A network in which no channel group could be certified, so nothing in it may be resized."""


class AccessError(UsageError):
    """A technique that touched data it did not declare it needs."""


def visible(text: str, keep: str = "") -> str:
    r"""Text with whatever would act on a terminal, or that no file can hold, written as its escape:
    ``\x1b``, ``\ud800``.

    Args:
        text: Anyone's.
        keep: Characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, else the list of known names (at
    most 20).
    """
    names = sorted(known)
    folded = {_folded(n): n for n in reversed(names)}
    close = difflib.get_close_matches(_folded(name), list(folded), n=1)
    if close:
        return f"; did you mean '{folded[close[0]]}'?"
    if not names:
        return "; none is known"
    shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
    return f"; known: {shown}"


def _folded(name: str) -> str:
    """Without case and separators, in which people differ: MNIST, fashion-mnist."""
    return name.casefold().replace("-", "").replace("_", "")


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Where the first thing that pydantic refuses stands, with dots, and what is wrong with it."""
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
