"""Where a training run keeps its state, so that a killed one goes on to the same final weights."""

from __future__ import annotations

import io
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from widthbench import cache
from widthbench.errors import UsageError
from widthbench.recipe import Recipe

STATE_EVERY_S = 10.0  # writing a state costs far less than what is lost without it


@dataclass
class Resume:
    """Where a training run keeps its state after an epoch.

    Attributes:
        path: The file; its name must depend on everything that the run depends on.
        every_s: Seconds between two states at least.
    """

    path: Path
    every_s: float = field(default_factory=lambda: STATE_EVERY_S)

    def __post_init__(self) -> None:
        self._last = time.perf_counter()

    def due(self) -> bool:
        """Whether the last state is old enough."""
        return time.perf_counter() - self._last >= self.every_s

    def write(self, recipe: Recipe, samples: int, state: dict[str, Any]) -> None:
        """Keep a state, with its digest, atomically."""
        buffer = io.BytesIO()
        torch.save({"recipe": recipe.model_dump(), "samples": samples, **state}, buffer)
        blob = buffer.getvalue()
        try:
            cache.write(self.path, blob, shared=False)
        except UsageError as error:  # the training itself goes on
            warnings.warn(f"the state of a training run is not kept: {error}", stacklevel=2)
        self._last = time.perf_counter()

    def read(self, recipe: Recipe, samples: int) -> dict[str, Any] | None:
        """The last state; None if there is none, or (named in a warning) it is damaged or another
        run's.
        """
        blob = cache.read(self.path, "training state")
        if blob is None:
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(blob), weights_only=True, map_location="cpu")
        if state.pop("recipe") == recipe.model_dump() and state.pop("samples") == samples:
            return state
        what = f"training state {self.path} belongs to another recipe or data set"
        warnings.warn(f"{what}: training starts over", stacklevel=2)
        return None

    def discard(self) -> None:
        """Remove the state of a run whose result has been stored."""
        self.path.unlink(missing_ok=True)
