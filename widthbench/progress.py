"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm


class Progress(Protocol):
    """A progress bar: wraps an iterable."""

    def __call__(self, steps: Any, /, *, desc: str) -> Any:
        """The iterable, shown as a bar labelled ``desc``."""
        ...


def bar(steps: Any, /, *, desc: str) -> Any:
    """A progress bar with the time left, on stderr where that is a terminal."""
    return tqdm(steps, desc=desc, leave=False, disable=None)


@contextmanager
def counted(desc: str) -> Iterator[Callable[[], Any]]:
    """A count of steps whose number nobody knows, on stderr where that is a terminal, and where
    they take more than two seconds.

    Yields:
        What to call at each step.
    """
    shape = "{desc}: {n_fmt} steps, {elapsed}"
    with tqdm(desc=desc, bar_format=shape, leave=False, disable=None, delay=2) as shown:
        yield shown.update


def quiet(steps: Any, /, *, desc: str) -> Any:
    """No progress bar."""
    return steps
