"""The one training loop, and batch-norm recalibration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional as F

from widthbench.errors import UsageError
from widthbench.randomness import seeded
from widthbench.recipe import Recipe, Spent
from widthbench.task import Progress, Samples


def steps_of(recipe: Recipe, samples: int) -> tuple[int, int]:
    """(steps per epoch, steps in all) of a recipe on so many samples."""
    full, rest = divmod(samples, recipe.batch_size)
    per_epoch = full + (rest > 1)
    return per_epoch, max(1, round(recipe.epochs * per_epoch))


def fit(
    model: nn.Module,
    train: Samples,
    recipe: Recipe,
    *,
    macs: int,
    seed: int = 0,
    progress: Progress = lambda steps, /, *, desc: steps,
    desc: str = "train",
    after_epoch: Callable[[int], None] | None = None,
) -> Spent:
    """Train a network in place; it is left in eval mode.

    Args:
        model: Gives logits ``[B, K]``.
        train: The training samples.
        recipe: How to train; a fractional number of epochs ends within an epoch.
        macs: The network's MACs per sample, for the bill.
        seed: Seeds the order of samples and dropout; the global random state is left as it was.
        progress: Progress bar over epochs.
        desc: Its label.
        after_epoch: Called with the number of epochs done.

    Returns:
        What it cost.

    Raises:
        UsageError: If the loss is no longer finite, or there are too few samples for one batch.
    """
    per_epoch, total = steps_of(recipe, len(train))
    if per_epoch < 1:
        raise UsageError(f"training needs at least 2 samples, not {len(train)}")
    optimizer = create_optimizer_v2(
        model,
        opt="nesterov" if recipe.optimizer == "sgd" else "adamw",
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
    )
    warmup = min(round(recipe.warmup_epochs * per_epoch), total - 1)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(1, total - warmup),
        lr_min=recipe.min_lr,
        warmup_t=warmup,
        warmup_lr_init=recipe.lr / 100,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    begin, seen, step = time.perf_counter(), 0, 0
    order = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model.train()
        for epoch in progress(range(math.ceil(total / per_epoch)), desc=desc):
            for x, y in train.batches(recipe.batch_size, generator=order):
                if step >= total:
                    break
                if len(y) < 2:
                    continue
                schedule.step_update(step)
                loss = F.cross_entropy(model(x), y, label_smoothing=recipe.label_smoothing)
                if not torch.isfinite(loss):
                    raise UsageError(
                        f"training diverged: the loss is {float(loss)} at step {step + 1} of {total}; lower lr = {recipe.lr:g}"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                seen += len(y)
                step += 1
            if after_epoch is not None:
                after_epoch(epoch + 1)
    model.eval()
    optimizer.zero_grad(set_to_none=True)
    return Spent(
        forward_macs=macs * seen,
        backward_macs=2 * macs * seen,
        epochs=step / per_epoch,
        seconds=time.perf_counter() - begin,
    )


def batch_norms(model: nn.Module) -> list[Any]:
    """The layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]


def recalibrate(model: nn.Module, train: Samples, *, samples: int, macs: int, seed: int = 0, batch_size: int = 64) -> Spent:
    """Estimate batch-norm statistics anew, as plain averages over shuffled training batches, in place.

    Args:
        model: Its other tensors are left alone; a network without batch norm is left as it is, at no cost.
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
