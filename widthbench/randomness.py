"""Seeding that leaves the caller's random state alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, *, gpu: bool = True) -> Iterator[None]:
    """Seed torch for a block; the states are as they were afterwards.

    Args:
        seed: The seed.
        gpu: Also on every GPU. Worker processes must leave GPUs alone: CUDA cannot be initialised
            anew in a forked process.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if gpu else []):
        if gpu:
            torch.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield
