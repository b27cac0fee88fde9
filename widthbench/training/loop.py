"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from torch import nn

from widthbench import parallel
from widthbench.data.samples import Samples
from widthbench.progress import Progress, quiet
from widthbench.randomness import seeded
from widthbench.recipe import Recipe, Spent
from widthbench.training import graphed
from widthbench.training.resume import Resume
from widthbench.training.state import Losses, OptimizerState, Run, Stateful


def fit(
    model: nn.Module,
    train: Samples,
    recipe: Recipe,
    *,
    macs: int,
    seed: int = 0,
    progress: Progress = quiet,
    desc: str = "train",
    losses: Losses | None = None,
    state: Stateful | None = None,
    optimizer_state: OptimizerState | None = None,
    after_epoch: Callable[[int], None] | None = None,
    resume: Resume | None = None,
) -> Spent:
    """Train a network in place; it is left in eval mode.

    Networks with convolutions are trained in channels-last layout and left in the usual one. In
    several processes (``parallel``) each takes its part of every batch, gradients and BatchNorm's
    statistics are those of the whole batch, and all end with the same weights. Where memory runs
    out, batches are computed in halves from there on, once, with a warning, and the bill says so.
    On a GPU the steps of a plain training are replayed as a CUDA graph
    (``widthbench.training.graphed``).

    Args:
        model: Gives logits ``[B, K]``.
        train: The training samples.
        recipe: How to train; a fractional number of epochs ends within an epoch.
        macs: The network's MACs per sample, for the bill.
        seed: Seeds the order of samples and dropout; the global random state is left as it was.
        progress: Progress bar over epochs.
        desc: Its label.
        losses: What a step minimises; None: the cross-entropy, smoothed as the recipe says.
        state: Kept and restored with the network where a run resumes.
        optimizer_state: What the optimizer begins with, by parameter; replaced by what it ends
            with. For networks that grow.
        after_epoch: Called with the number of epochs done.
        resume: Where the state after an epoch is kept, so that a killed run goes on from there to
            the same final weights.

    Returns:
        What it cost; with ``resume``, earlier runs included.

    Raises:
        DivergedError: If the loss is no longer finite, or ends at chance (``ending.CHANCE``; plain
            losses only).
        UsageError: If there are too few samples for one batch, memory runs out in halves too, or
            the recipe asks for what does not go together.
    """
    run = Run(model, train, recipe, seed, desc, losses, state, optimizer_state)
    begin = time.perf_counter()
    with seeded(seed + parallel.rank()), parallel.batch_statistics():
        if resume is not None and (last := resume.read(recipe, len(train))) is not None:
            begin -= run.load_state_dict(last)
        model.train()
        epoch_of = graphed.epochs(run) or run.one_epoch
        for epoch in progress(range(run.epoch, math.ceil(run.total / run.per_epoch)), desc=desc):
            epoch_of()
            run.epoch = epoch + 1
            if resume is not None and run.step < run.total and parallel.broadcast(resume.due):
                kept = run.state_dict(time.perf_counter() - begin)
                if parallel.is_main():
                    resume.write(recipe, len(train), kept)
            if after_epoch is not None:
                after_epoch(run.epoch)
    run.finish(optimizer_state)
    return Spent(
        forward_macs=macs * run.seen,
        backward_macs=2 * macs * run.seen,
        epochs=run.step / run.per_epoch,
        seconds=time.perf_counter() - begin,
        halved=run.halved,
    )
