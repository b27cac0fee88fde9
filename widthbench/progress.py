"""Progress bars."""

from __future__ import annotations

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


def quiet(steps: Any, /, *, desc: str) -> Any:
    """No progress bar."""
    return steps
