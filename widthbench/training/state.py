"""The state of a training run, and its steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from widthbench import parallel
from widthbench.data.samples import Samples
from widthbench.errors import DivergedError, UsageError
from widthbench.recipe import Recipe
from widthbench.training.ending import Ending
from widthbench.training.measuring import fastest_layout

Losses = Callable[[nn.Module, Tensor, Tensor], Iterator[Tensor]]
"""``losses(model, x [B, ...], y [B])`` yields the losses of one step, each as it is computed; their
gradients add up."""


FUSED = ("cpu", "cuda")  # where torch has optimizers that pass over weights and state once
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


def steps_of(recipe: Recipe, samples: int) -> tuple[int, int]:
    """(steps per epoch, steps in all) of a recipe on so many samples."""
    full, rest = divmod(samples, recipe.batch_size)
    per_epoch = full + (rest >= _least())
    return per_epoch, max(1, round(recipe.epochs * per_epoch))


def _least() -> int:
    """Samples that a batch must have: BatchNorm cannot normalise one, and each process needs
    one.
    """
    return max(2, parallel.world())


class Run:
    """The state of one training run: the network, its optimizer, and how far it has come.

    Args:
        model: As in ``fit``.
        train: As in ``fit``.
        recipe: As in ``fit``.
        seed: Of the order of samples.
        desc: What warnings call the run.
        losses: As in ``fit``.
        state: As in ``fit``.
        optimizer_state: As in ``fit``.

    Attributes:
        step: Steps done.
        seen: Samples seen.
        epoch: Epochs done.
        parts: Parts that a batch is computed in.
        halved: 1 if that was doubled for want of memory.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Samples,
        recipe: Recipe,
        seed: int,
        desc: str,
        losses: Losses | None = None,
        state: Stateful | None = None,
        optimizer_state: OptimizerState | None = None,
    ) -> None:
        self.per_epoch, self.total = steps_of(recipe, len(train))
        if self.per_epoch < 1:
            raise UsageError(f"training needs at least 2 samples, not {len(train)}")
        _require_possible(recipe, losses)
        self.model, self.train, self.recipe, self.desc = model, train, recipe, desc
        self.optimizer = create_optimizer_v2(
            model,
            opt=(
                "adamw"
                if recipe.optimizer == "adamw"
                else "nesterov"
                if recipe.momentum
                else "momentum"
            ),
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            fused=next(model.parameters()).device.type in FUSED or None,
        )
        warmup = min(round(recipe.warmup_epochs * self.per_epoch), self.total - 1)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, self.total - warmup),
            lr_min=recipe.min_lr,
            warmup_t=warmup,
            warmup_lr_init=recipe.lr / 100,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.plain = losses is None
        self.objective = losses or partial(_cross_entropy, recipe.label_smoothing)
        self.layout = fastest_layout(model)
        model.to(memory_format=self.layout)
        named = dict(model.named_parameters())
        for name, kept in (optimizer_state or {}).items():
            self.optimizer.state[named[name]] = {
                k: _beside(v, named[name]) for k, v in kept.items()
            }
        self.network: Any = torch.compile(model) if recipe.compile and self.plain else model
        self.average = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
        self.order = torch.Generator().manual_seed(seed)
        self.ending = Ending(self.per_epoch, self.total)
        self.parts, self.halved = recipe.accumulate, 0
        self.seen = self.step = self.epoch = 0
        self._state = state

    def state_dict(self, seconds: float) -> dict[str, Any]:
        """What a run of the same arguments goes on from.

        Args:
            seconds: Spent so far.
        """
        random_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "random": parallel.gather((torch.get_rng_state(), random_gpu)),
            "average": None if self.average is None else self.average.module.state_dict(),
            "state": None if self._state is None else self._state.state_dict(),
            "parts": self.parts,
            "halved": self.halved,
            "ending": self.ending.state_dict(),
            "seen": self.seen,
            "step": self.step,
            "epoch": self.epoch,
            "seconds": seconds,
        }

    def load_state_dict(self, last: dict[str, Any]) -> float:
        """Go on from there; gives the seconds that it had taken."""
        self.model.load_state_dict(last["model"])
        self.optimizer.load_state_dict(last["optimizer"])
        for parameter, kept in self.optimizer.state.items():
            kept |= {k: _beside(v, parameter) for k, v in kept.items()}
        self.order.set_state(last["order"])
        if self.average is not None:
            self.average.module.load_state_dict(last["average"])
        random, random_gpu = last["random"][parallel.rank() % len(last["random"])]
        torch.set_rng_state(random)
        if random_gpu:
            torch.cuda.set_rng_state_all(random_gpu)
        self.parts, self.halved = last["parts"], last["halved"]
        self.ending.load_state_dict(last["ending"])
        if self._state is not None:
            self._state.load_state_dict(last["state"])
        self.seen, self.step, self.epoch = last["seen"], last["step"], last["epoch"]
        return float(last["seconds"])

    def one_epoch(self) -> None:
        """Pass over the samples once, or over as many as are left to do."""
        several, parted = parallel.world() > 1, getattr(self.train, "parted", False)
        options: dict[str, Any] = {"augment": self.recipe} if self.recipe.augments else {}
        if several and parted:
            options["part"] = parallel.part
        size, left = self.recipe.batch_size, len(self.train)
        for x, y in self.train.batches(size, generator=self.order, **options):
            whole = min(size, left) if several and parted else len(y)
            left -= whole
            if self.step >= self.total:
                break
            if whole < _least():
                continue
            if several and not parted:
                x, y = x[parallel.part(whole)], y[parallel.part(whole)]
            self.one_step(x, y, whole)

    def one_step(self, x: Tensor, y: Tensor, whole: int) -> None:
        """A step of the optimizer.

        Args:
            x: ``[B, ...]``.
            y: ``[B]``.
            whole: Samples in the batch, those of other processes included.

        Raises:
            DivergedError: If the loss is not finite.
            UsageError: If memory runs out in halves, too.
        """
        self.schedule.step_update(self.step)
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.layout)
        loss = self._gradients_or_halves(x, y, whole)
        if not math.isfinite(loss):
            raise self.diverged(loss, self.step)
        self.clip()
        self.optimizer.step()
        if self.plain:
            self.ending.add(self.step, loss, y)
        if self.average is not None:
            self.average.update(self.model)
        self.seen += whole
        self.step += 1

    def clip(self) -> None:
        """Scale large gradients down, where the recipe says so."""
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)

    def diverged(self, loss: float, step: int) -> DivergedError:
        """The error that says so, for a step counted from 0."""
        what = f"the loss is {loss} at step {step + 1} of {self.total}"
        return DivergedError(f"training diverged: {what}; lower lr = {self.recipe.lr:g}")

    def _gradients_or_halves(self, x: Tensor, y: Tensor, whole: int) -> float:
        can_be_halved = self.plain and parallel.world() == 1
        while True:
            try:
                return self._gradients(x, y, whole)
            except torch.OutOfMemoryError as error:
                if self.halved or not can_be_halved or whole < 4 * self.parts:
                    remedy = f"lower batch_size = {self.recipe.batch_size}" + (
                        ", or raise accumulate" if self.plain else ""
                    )
                    what = (
                        f"out of memory in a training step of {whole} samples in {self.parts}"
                        " part(s)"
                    )
                    raise UsageError(f"{what}: {remedy}") from error
            # here the error is gone, and with it the activations that its traceback holds
            self.parts, self.halved = 2 * self.parts, 1
            text = (
                f"{self.desc}: out of memory: batches of {whole} are computed in {self.parts} parts"
                " from here on"
            )
            warnings.warn(text, stacklevel=5)
            torch.cuda.empty_cache()

    def _gradients(self, x: Tensor, y: Tensor, whole: int) -> float:
        """Fill in the gradients of one step, summed over parts and processes; gives the loss, of
        several the last.
        """
        amp = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=self.recipe.amp)
        for p in self.model.parameters():
            p.grad = None
        seen = 0.0
        with parallel.sharing(whole, len(y)):
            for some_x, some_y in zip(
                x.tensor_split(self.parts), y.tensor_split(self.parts), strict=True
            ):
                share = len(some_y) / whole
                losses = self.objective(self.network, some_x, some_y)
                with amp():
                    loss = next(losses, None)
                value = 0.0
                while loss is not None:
                    value = float(loss.detach())
                    if not math.isfinite(value) and parallel.world() == 1:
                        return value
                    (loss if share == 1 else loss * share).backward()
                    with amp():
                        loss = next(losses, None)
                seen += share * value
        if parallel.world() > 1:
            total = torch.tensor([seen], dtype=torch.float32, device=x.device)
            parallel.add_up(
                [total, *(p.grad for p in self.model.parameters() if p.grad is not None)]
            )
            return float(total)
        return seen

    def finish(self, optimizer_state: OptimizerState | None) -> None:
        """Leave the network as ``fit`` promises, and what the optimizer ended with in
        ``optimizer_state``.
        """
        self.ending.require_learned()
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.model.to(memory_format=torch.contiguous_format)
        self.model.eval()
        self.optimizer.zero_grad(set_to_none=True)
        if optimizer_state is not None:
            optimizer_state.clear()
            kept = {n: p for n, p in self.model.named_parameters() if p in self.optimizer.state}
            optimizer_state.update({n: dict(self.optimizer.state[p]) for n, p in kept.items()})


def _beside(value: Any, parameter: Tensor) -> Any:
    """A copy of an optimizer's tensor on its parameter's device, laid out as the parameter is:
    fused optimizers pass over memory as it lies, and look at neither.
    """
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:  # a counter; optimizers that are not fused want it on the CPU
        fused = parameter.device.type in FUSED
        return value.to(parameter.device, copy=True) if fused else value.clone()
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _require_possible(recipe: Recipe, losses: Losses | None) -> None:
    if losses is not None and recipe.accumulate > 1:
        raise UsageError(
            f"recipe: accumulate = {recipe.accumulate} is for plain steps; this technique's own"
            " take whole batches"
        )
    if recipe.compile and parallel.world() > 1:
        raise UsageError(
            "recipe: compile = true is for one process: BatchNorm's statistics are shared outside"
            " compiled code"
        )


def _cross_entropy(smoothing: float, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    yield F.cross_entropy(model(x), y, label_smoothing=smoothing)
