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
