"""Steps of a plain training on a GPU, replayed as one CUDA graph.

A small network's step is a few hundred kernels of some microseconds each: launched one by one, the
card waits for the host. Here an epoch's samples, crops and flips are drawn on the CPU in the order
of the plain loop and copied once; forward pass, backward pass and optimizer are recorded once and
replayed; the losses are looked at when the epoch has ended. The results are those of the plain loop
but for rounding (tests/test_cuda.py).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from widthbench import parallel
from widthbench.data.augmentation import Draws
from widthbench.data.splits import ImageSamples
from widthbench.training.state import Run

WARM_UP = 3  # real steps before the recording: libraries choose their algorithms, buffers are made
RECORDABLE = ("cuda",)
LEAST_STEPS = 20  # of full batches that make a recording worth its time


def epochs(run: Run) -> Callable[[], None] | None:
    """What passes over a run's samples once, as ``run.one_epoch`` does.

    Returns:
        None where steps must be taken one by one: not on a GPU; samples that are read from files; a
        technique's own losses; batches in parts; averaged weights; ``torch.compile``, which has
        graphs of its own; several processes; hooks, which a replay would not call.
    """
    recipe, train = run.recipe, run.train
    if not (isinstance(train, ImageSamples) and train.device.type in RECORDABLE):
        return None
    one_by_one = (
        not run.plain
        or run.average is not None
        or recipe.compile
        or run.parts > 1
        or parallel.world() > 1
    )
    short = run.total < LEAST_STEPS or len(train) < recipe.batch_size
    return None if one_by_one or short or _hooked(run.model) else _Steps(run, train).one_epoch


def _hooked(model: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(m, kind) for m in model.modules() for kind in kinds)


class _Steps:
    """The steps of a run, and what they read and write on the device.

    Args:
        run: The run.
        train: Its samples.
    """

    def __init__(self, run: Run, train: ImageSamples) -> None:
        self.run, self.train = run, train
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warmed, self.one_by_one = 0, False
        self.labels = train.labels.cpu()
        self.rates = torch.tensor(_rates(run), device=train.device)
        self.lr = torch.zeros((), device=train.device)
        self.step = torch.zeros(1, dtype=torch.long, device=train.device)  # of the run
        self.place = torch.zeros_like(self.step)  # in the epoch
        self.losses = torch.zeros(run.per_epoch, device=train.device)
        self.index: Tensor | None = None
        self.draws = Draws()
        for group in run.optimizer.param_groups:
            group |= {"lr": self.lr, "fused": True, "foreach": False}
            if "capturable" in group:
                group["capturable"] = True
        for state in run.optimizer.state.values():  # of a run that goes on
            state |= {k: v.to(train.device) for k, v in state.items() if isinstance(v, Tensor)}

    def one_epoch(self) -> None:
        """Pass over the samples once, or over as many as are left to do."""
        run = self.run
        if self.one_by_one:
            run.one_epoch()
            return
        options: dict[str, Any] = {"augment": run.recipe} if run.recipe.augments else {}
        choices = list(self.train.choices(run.recipe.batch_size, generator=run.order, **options))
        steps = min(
            len(choices), run.per_epoch, run.total - run.step
        )  # a last sample alone is left out
        full = min(steps, len(self.train) // run.recipe.batch_size)
        self._copy(choices[:full])
        self.step.fill_(run.step)
        self.place.zero_()
        done, why = 0, ""
        try:
            for _ in range(full):
                self._next()
                done += 1
            if full < steps:
                self._take(*self._moved(choices[full]))
                done += 1
        except torch.OutOfMemoryError as error:
            why = f"memory ran out ({str(error).splitlines()[0]})"
        if why:
            self._give_up(why)  # out of the handler, whose traceback holds activations
        self._account(choices[:done])
        for choice in choices[done:steps]:
            index, draws = self._moved(choice)
            run.one_step(*self.train.at(index, run.recipe, draws), whole=len(index))

    def _copy(self, choices: list[tuple[Tensor, Draws | None]]) -> None:
        """An epoch's samples and draws to the device, to the places where a recording reads
        them.
        """
        index = torch.stack([i for i, _ in choices])
        drawn = zip(*((d or Draws()).tensors() for _, d in choices), strict=True)
        stacked = [
            None if all_of_one[0] is None else torch.stack(all_of_one) for all_of_one in drawn
        ]
        if self.index is None:
            self.index = index.to(self.train.device)
            self.draws = Draws(*(None if t is None else t.to(self.train.device) for t in stacked))
            return
        self.index[: len(index)].copy_(index)
        for old, new in zip(self.draws.tensors(), stacked, strict=True):
            if old is not None and new is not None:
                old[: len(new)].copy_(new)

    def _moved(self, choice: tuple[Tensor, Draws | None]) -> tuple[Tensor, Draws | None]:
        index, draws = choice
        device = self.train.device
        return index.to(device), None if draws is None else draws.part(slice(None), device)

    def _next(self) -> None:
        """The next step of full size: as it is at first, then recorded, then replayed."""
        if self.graph is not None:
            self.graph.replay()
        elif self.warmed < WARM_UP or self.one_by_one:
            self.warmed += 1
            side = torch.cuda.Stream(self.train.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._from_tables()
            torch.cuda.current_stream().wait_stream(side)
        else:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._from_tables()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # the network looks at its values on the host
                self._give_up(f"its steps cannot be recorded ({str(error).splitlines()[0]})")
                self._from_tables()
            else:
                self.graph = graph
                graph.replay()

    def _from_tables(self) -> None:
        """A step whose samples and draws lie in the tables, at the places that the device
        counts.
        """
        assert self.index is not None
        draws = Draws(
            *(None if t is None else t.index_select(0, self.place)[0] for t in self.draws.tensors())
        )
        self._take(self.index.index_select(0, self.place)[0], draws)

    def _take(self, index: Tensor, draws: Draws | None) -> None:
        """One step on the device alone."""
        run = self.run
        x, y = self.train.at(index, run.recipe, draws)
        if x.dim() == 4:
            x = x.contiguous(memory_format=run.layout)
        self.lr.copy_(self.rates.index_select(0, self.step)[0])
        for p in run.model.parameters():
            p.grad = None
        with torch.autocast(
            x.device.type, torch.bfloat16, enabled=run.recipe.amp, cache_enabled=False
        ):
            loss = next(run.objective(run.network, x, y))
        loss.backward()
        run.clip()
        run.optimizer.step()
        self.losses.index_copy_(0, self.place, loss.detach().float()[None])
        self.step += 1
        self.place += 1

    def _account(self, choices: list[tuple[Tensor, Draws | None]]) -> None:
        """Look at the losses of the steps that were taken, and count these."""
        run = self.run
        for (index, _), loss in zip(choices, self.losses[: len(choices)].tolist(), strict=True):
            if not math.isfinite(loss):
                raise run.diverged(loss, run.step)
            run.ending.add(run.step, loss, self.labels[index])
            run.seen += len(index)
            run.step += 1

    def _give_up(self, why: str) -> None:
        self.graph, self.one_by_one = None, True
        torch.cuda.empty_cache()
        warnings.warn(f"{self.run.desc}: steps are taken one by one: {why}", stacklevel=5)


def _rates(run: Run) -> list[float]:
    """The learning rate of each step, which the schedule sets in all groups alike."""
    rates = []
    for step in range(run.total):
        run.schedule.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    return rates
