"""The one training loop, and batch-norm recalibration."""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from widthbench import cache, parallel
from widthbench.errors import DivergedError, UsageError
from widthbench.measure import fastest_layout
from widthbench.randomness import seeded
from widthbench.recipe import Recipe, Spent
from widthbench.task import Progress, Samples

STATE_EVERY_S = 10.0  # writing a state costs far less than what is lost without it


def steps_of(recipe: Recipe, samples: int) -> tuple[int, int]:
    """(steps per epoch, steps in all) of a recipe on so many samples."""
    full, rest = divmod(samples, recipe.batch_size)
    per_epoch = full + (rest >= _least())
    return per_epoch, max(1, round(recipe.epochs * per_epoch))


def _least() -> int:
    """Samples that a batch must have: BatchNorm cannot normalise one, and each process needs one."""
    return max(2, parallel.world())


CHANCE = 0.999  # of the loss of the best constant answer: a training loss that does not end below it has learned nothing
LEAST_STEPS = 10  # that say something about how training ends


class _Ending:
    """Whether a plain training run ends at chance: by its mean loss over the last epoch, or over its last half if it is shorter.

    Chance is the entropy of the labels, which is the cross-entropy of the best answer that does not look at the inputs.

    Args:
        per_epoch: Steps of an epoch.
        total: Steps in all.
    """

    def __init__(self, per_epoch: int, total: int) -> None:
        self._first = total - min(per_epoch, -(-total // 2))
        self._enough = total - self._first >= LEAST_STEPS
        self._sum = 0.0
        self._counts = torch.zeros(0, dtype=torch.long)

    def add(self, step: int, loss: float, y: Tensor) -> None:
        """Note a step, counted from 0: its mean loss and its labels ``[B]``."""
        if self._enough and step >= self._first and not y.is_floating_point() and y.dim() == 1:
            counts = torch.bincount(y.cpu(), minlength=len(self._counts))
            counts[: len(self._counts)] += self._counts
            self._counts, self._sum = counts, self._sum + loss * len(y)

    def state_dict(self) -> dict[str, Any]:
        """What was noted."""
        return {"sum": self._sum, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._sum, self._counts = state["sum"], state["counts"]

    def require_learned(self) -> None:
        """Raise if the loss ends at chance.

        Raises:
            DivergedError: It names the loss and chance, in nats.
        """
        samples = int(self._counts.sum())
        if not samples:
            return
        shares = self._counts[self._counts > 0].double() / samples
        chance, loss = float(-(shares * shares.log()).sum()), self._sum / samples
        if chance > 0 and loss >= CHANCE * chance:
            raise DivergedError(
                f"training diverged: its loss ends at chance ({loss:.4f} nats over the last epoch; the best constant answer has "
                f"{chance:.4f}): lower lr, or warm up"
            )


Losses = Callable[[nn.Module, Tensor, Tensor], Iterator[Tensor]]
"""``losses(model, x [B, ...], y [B])`` yields the losses of one step, each as it is computed; their gradients add up."""


OptimizerState = dict[str, dict[str, Any]]
"""By name of the parameter: its momentum buffer and the like, as the optimizer names them."""


class Stateful(Protocol):
    """What belongs to a training run besides the network and the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take them back."""
        ...


def fit(
    model: nn.Module,
    train: Samples,
    recipe: Recipe,
    *,
    macs: int,
    seed: int = 0,
    progress: Progress = lambda steps, /, *, desc: steps,
    desc: str = "train",
    losses: Losses | None = None,
    state: Stateful | None = None,
    optimizer_state: OptimizerState | None = None,
    after_epoch: Callable[[int], None] | None = None,
    resume: Resume | None = None,
) -> Spent:
    """Train a network in place; it is left in eval mode.

    Networks with convolutions are trained in channels-last layout and left in the usual one. In several processes (``parallel``)
    each takes its part of every batch, gradients and BatchNorm's statistics are those of the whole batch, and all end with the same
    weights. Where memory runs out, batches are computed in halves from there on, once, with a warning, and the bill says so.

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
        optimizer_state: What the optimizer begins with, by parameter; replaced by what it ends with. For networks that grow.
        after_epoch: Called with the number of epochs done.
        resume: Where the state after an epoch is kept, so that a killed run goes on from there to the same final weights.

    Returns:
        What it cost; with ``resume``, earlier runs included.

    Raises:
        DivergedError: If the loss is no longer finite, or ends at chance (``CHANCE``; plain losses only).
        UsageError: If there are too few samples for one batch, memory runs out in halves too, or the recipe asks for what does not
            go together.
    """
    per_epoch, total = steps_of(recipe, len(train))
    if per_epoch < 1:
        raise UsageError(f"training needs at least 2 samples, not {len(train)}")
    optimizer = create_optimizer_v2(
        model,
        opt="adamw" if recipe.optimizer == "adamw" else "nesterov" if recipe.momentum else "momentum",
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
    named = dict(model.named_parameters())
    for name, kept in (optimizer_state or {}).items():
        optimizer.state[named[name]] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}
    objective = losses or partial(_cross_entropy, recipe.label_smoothing)
    _require_possible(recipe, losses)
    whole_batches = losses is None and parallel.world() == 1  # what can be halved
    parts, halved, ending = recipe.accumulate, 0, _Ending(per_epoch, total)
    begin, seen, step, first = time.perf_counter(), 0, 0, 0
    layout = fastest_layout(model)
    model.to(memory_format=layout)
    network: Any = torch.compile(model) if recipe.compile and losses is None else model
    average = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
    order = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"augment": recipe} if recipe.augments else {}
    several, parted = parallel.world() > 1, getattr(train, "parted", False)
    if several and parted:
        options["part"] = parallel.part
    with seeded(seed + parallel.rank()), parallel.batch_statistics():
        if resume is not None and (last := resume.read(recipe, len(train))) is not None:
            model.load_state_dict(last["model"])
            optimizer.load_state_dict(last["optimizer"])
            order.set_state(last["order"])
            if average is not None:
                average.module.load_state_dict(last["average"])
            random, random_gpu = last["random"][parallel.rank() % len(last["random"])]
            torch.set_rng_state(random)
            if random_gpu:
                torch.cuda.set_rng_state_all(random_gpu)
            parts, halved = last["parts"], last["halved"]
            ending.load_state_dict(last["ending"])
            if state is not None:
                state.load_state_dict(last["state"])
            seen, step, first = last["seen"], last["step"], last["epoch"]
            begin -= last["seconds"]
        model.train()
        for epoch in progress(range(first, math.ceil(total / per_epoch)), desc=desc):
            left = len(train)
            for x, y in train.batches(recipe.batch_size, generator=order, **options):
                whole = min(recipe.batch_size, left) if several and parted else len(y)
                left -= whole
                if step >= total:
                    break
                if whole < _least():
                    continue
                if several and not parted:
                    x, y = x[parallel.part(whole)], y[parallel.part(whole)]
                schedule.step_update(step)
                if x.dim() == 4:
                    x = x.contiguous(memory_format=layout)
                loss = None
                while loss is None:
                    try:
                        loss = _gradients(network, objective, x, y, recipe, parts=parts, whole=whole)
                    except torch.OutOfMemoryError as error:
                        if halved or not whole_batches or whole < 4 * parts:
                            remedy = f"lower batch_size = {recipe.batch_size}" + (", or raise accumulate" if losses is None else "")
                            what = f"out of memory in a training step of {whole} samples in {parts} part(s)"
                            raise UsageError(f"{what}: {remedy}") from error
                        parts, halved = 2 * parts, 1
                        text = f"{desc}: out of memory: batches of {whole} are computed in {parts} parts from here on"
                        warnings.warn(text, stacklevel=2)
                        torch.cuda.empty_cache()
                if not math.isfinite(loss):
                    what = f"the loss is {loss} at step {step + 1} of {total}"
                    raise DivergedError(f"training diverged: {what}; lower lr = {recipe.lr:g}")
                optimizer.step()
                if losses is None:
                    ending.add(step, loss, y)
                if average is not None:
                    average.update(model)
                seen += whole
                step += 1
            if resume is not None and step < total and parallel.agreed(resume.due):
                random_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
                kept = {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "order": order.get_state(),
                    "random": parallel.gathered((torch.get_rng_state(), random_gpu)),
                    "average": None if average is None else average.module.state_dict(),
                    "state": None if state is None else state.state_dict(), "parts": parts, "halved": halved,
                    "ending": ending.state_dict(),
                    "seen": seen, "step": step, "epoch": epoch + 1, "seconds": time.perf_counter() - begin,
                }  # fmt: skip
                if parallel.first():
                    resume.write(recipe, len(train), kept)
            if after_epoch is not None:
                after_epoch(epoch + 1)
    ending.require_learned()
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    model.to(memory_format=torch.contiguous_format)
    model.eval()
    optimizer.zero_grad(set_to_none=True)
    if optimizer_state is not None:
        optimizer_state.clear()
        optimizer_state.update({n: dict(optimizer.state[p]) for n, p in named.items() if p in optimizer.state})
    return Spent(
        forward_macs=macs * seen,
        backward_macs=2 * macs * seen,
        epochs=step / per_epoch,
        seconds=time.perf_counter() - begin,
        halved=halved,
    )


def _require_possible(recipe: Recipe, losses: Losses | None) -> None:
    if losses is not None and recipe.accumulate > 1:
        raise UsageError(f"recipe: accumulate = {recipe.accumulate} is for plain steps; this technique's own take whole batches")
    if recipe.compile and parallel.world() > 1:
        raise UsageError("recipe: compile = true is for one process: BatchNorm's statistics are shared outside compiled code")


def _gradients(
    model: nn.Module, objective: Losses, x: Tensor, y: Tensor, recipe: Recipe, *, parts: int, whole: int
) -> float:  # fmt: skip
    """Fill in the gradients of one step, summed over parts and processes; gives the loss, of several the last."""
    for p in model.parameters():
        p.grad = None
    seen = 0.0
    with parallel.sharing(whole, len(y)):
        for some_x, some_y in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            share = len(some_y) / whole
            found = objective(model, some_x, some_y)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.amp):
                loss = next(found, None)
            value = 0.0
            while loss is not None:
                value = float(loss.detach())
                if not math.isfinite(value) and parallel.world() == 1:
                    return value
                (loss if share == 1 else loss * share).backward()
                with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.amp):
                    loss = next(found, None)
            seen += share * value
    if parallel.world() > 1:
        total = torch.tensor([seen], dtype=torch.float32, device=x.device)
        parallel.add_up([total, *(p.grad for p in model.parameters() if p.grad is not None)])
        return float(total)
    return seen


def _cross_entropy(smoothing: float, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    yield F.cross_entropy(model(x), y, label_smoothing=smoothing)


@dataclass
class Resume:
    """Where a training run keeps its state after an epoch.

    Attributes:
        path: The file; its name must hang on everything that the run depends on.
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
        """The last state; None if there is none, or (named in a warning) it is damaged or another run's."""
        blob = cache.read(self.path, "training state")
        if blob is None:
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(blob), weights_only=True, map_location="cpu")
        if state.pop("recipe") == recipe.model_dump() and state.pop("samples") == samples:
            return state
        warnings.warn(f"training state {self.path} belongs to another recipe or data set: training starts over", stacklevel=2)
        return None

    def discard(self) -> None:
        """Remove the state of a run whose result has been stored."""
        self.path.unlink(missing_ok=True)


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
