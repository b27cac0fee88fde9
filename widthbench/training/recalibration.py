"""Batch-norm statistics, estimated anew after a resize."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from widthbench.data.samples import Samples
from widthbench.recipe import Spent


def batch_norms(model: nn.Module) -> list[Any]:
    """The layers that keep running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    return [m for m in norms if m.track_running_stats]


@contextmanager
def norms_left_alone(model: nn.Module) -> Iterator[None]:
    """Batch norms that normalise by the batch, as in training, but do not take it into their
    running statistics.
    """
    tracking = [norm for norm in batch_norms(model) if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def recalibrate(
    model: nn.Module,
    train: Samples,
    *,
    samples: int,
    macs: int,
    seed: int = 0,
    batch_size: int = 64,
) -> Spent:
    """Estimate batch-norm statistics anew, as plain averages over shuffled training batches, in
    place.

    Args:
        model: Its other tensors are left alone; a network without batch norm is left as it is, at
            no cost.
        train: The training samples.
        samples: How many of them to use at most.
        macs: The network's MACs per sample, for the bill.
        seed: Seeds the choice.
        batch_size: Samples per batch; a last one of a single sample is skipped.

    Returns:
        What it cost.
    """
    norms = batch_norms(model)
    if not norms:
        return Spent()
    begin, seen = time.perf_counter(), 0
    momenta = [m.momentum for m in norms]
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a cumulative average
        m.train()
    with torch.no_grad():
        for x, y in train.batches(batch_size, generator=torch.Generator().manual_seed(seed)):
            if seen >= samples:
                break
            if len(y) > 1:
                model(x)
                seen += len(y)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    model.eval()
    return Spent(forward_macs=macs * seen, seconds=time.perf_counter() - begin)
