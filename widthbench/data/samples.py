"""What a technique and the training loop take for a data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from widthbench.recipe import Recipe


class Samples(Protocol):
    """A data set in batches."""

    def __len__(self) -> int: ...

    def batches(
        self, size: int, *, generator: torch.Generator | None = None, augment: Recipe | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(x [B, C, H, W], y [B])``; shuffled if a generator is given, the last batch may
        be smaller.

        With a recipe as ``augment``, its random crop, flip and cutout are applied.
        """
        ...


class Passes:
    """Batches of samples without end, numbered from 0 and shuffled anew in each pass; partial
    batches at a pass's end are left out.

    Args:
        samples: The samples.
        size: Of a batch; fewer where there are fewer samples.
        seed: Of the first pass; each has the next.
    """

    def __init__(self, samples: Samples, size: int, seed: int) -> None:
        self._samples, self._size, self._seed = samples, size, seed
        self._at = -1
        self._pass: Iterator[tuple[Tensor, Tensor]] = iter(())

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The batch of that number; fast if it is the one behind the last."""
        each = max(1, len(self._samples) // self._size)
        if number != self._at + 1 or number % each == 0:
            order = torch.Generator().manual_seed(self._seed + number // each)
            size = min(self._size, len(self._samples))
            self._pass = self._samples.batches(size, generator=order)
            for _ in range(number % each):
                next(self._pass)
        self._at = number
        return next(self._pass)


class First:
    """The first of some samples."""

    def __init__(self, samples: Samples, count: int) -> None:
        self._samples, self._count = samples, count

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches until there are ``count`` samples."""
        left = self._count
        for x, y in self._samples.batches(size):
            yield x[:left], y[:left]
            left -= len(y)
            if left <= 0:
                return
