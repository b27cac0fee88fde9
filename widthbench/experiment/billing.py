"""What a decision costs, and what it keeps so that a killed run goes on."""

from __future__ import annotations

import io
from collections.abc import Callable, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from widthbench import cache, parallel
from widthbench.experiment.bases import Base, training_path
from widthbench.experiment.cell import Cell
from widthbench.experiment.keys import cell_key
from widthbench.experiment.records import digest_of
from widthbench.paths import Lock, cache_dir
from widthbench.recipe import Spent
from widthbench.technique.base import Technique
from widthbench.technique.task import State, Task
from widthbench.training.measuring import Meter
from widthbench.training.resume import Resume
from widthbench.training.state import Stateful
from widthbench.width.cost import count_macs
from widthbench.width.groups import Groups


def metered(task: Task, key: str, meter: Meter) -> Task:
    """A task that bills by a meter, and keeps intermediate states with their bills, so that a
    killed run does not start over.
    """
    samples = max(1, len(task.train)) if isinstance(task.train, Sized) else 1

    def checkpoint(name: str, make: Callable[[], State]) -> State:
        made = False

        def work() -> tuple[State, Spent]:
            nonlocal made
            made = True
            forward, backward, passes, begin = (
                meter.forward_macs,
                meter.backward_macs,
                meter.passes,
                meter.elapsed,
            )
            state = make()
            return state, Spent(
                forward_macs=meter.forward_macs - forward,
                backward_macs=meter.backward_macs - backward,
                epochs=(meter.passes - passes) / samples,
                seconds=meter.elapsed - begin,
            )

        state, spent = _billed(f"{key}-{digest_of(name)[:8]}", work)
        if not made:
            bill = spent.model_dump(include={"forward_macs", "backward_macs", "seconds"})
            meter.add(**bill, passes=spent.epochs * samples)
        return state

    def training(
        model: nn.Module,
        train: Any,
        recipe: Any,
        *,
        desc: str = "fit",
        state: Any = None,
        **options: Any,
    ) -> Spent:
        resume = Resume(training_path(f"{key}-{digest_of(desc)[:8]}"))
        options["macs"] = meter.uncounted(partial(count_macs, model, task.example_input))
        with meter.costing(options["macs"]):
            spent: Spent = task.fit(
                model,
                train,
                recipe,
                desc=desc,
                state=_WithBill(state, meter),
                resume=resume,
                **options,
            )
        resume.discard()
        return spent

    def regroup(model: nn.Module) -> Groups:
        return meter.uncounted(partial(task.regroup, model))

    return replace(
        task,
        checkpoint=checkpoint,
        spend=meter.add,
        fit=training,
        regroup=regroup,
        unbilled=meter.uncounted,
    )


class _WithBill:
    """A training run's state, and what the run has cost by its meter: a resumed one bills its
    earlier part, too.
    """

    def __init__(self, state: Stateful | None, meter: Meter) -> None:
        self._state, self._meter = state, meter
        self._before = meter.forward_macs, meter.backward_macs, meter.passes, meter.elapsed

    def state_dict(self) -> dict[str, Any]:
        forward, backward, passes, seconds = self._before
        meter = self._meter
        return {
            "state": None if self._state is None else self._state.state_dict(),
            "bill": {
                "forward_macs": meter.forward_macs - forward,
                "backward_macs": meter.backward_macs - backward,
                "passes": meter.passes - passes,
                "seconds": meter.elapsed - seconds,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._meter.add(**state["bill"])
        if self._state is not None:
            self._state.load_state_dict(state["state"])


def _billed(key: str, work: Callable[[], tuple[State, Spent]]) -> tuple[State, Spent]:
    """A state and what it cost, from the cache or computed now."""
    bill = cache_dir() / "states" / f"{key}.spent.json"

    def make() -> State:
        state, spent = work()
        if parallel.is_main():
            cache.write_json(bill, spent.model_dump())
        return state

    state = _cached_state(key, make)
    parallel.barrier()
    if (spent := cache.read_json(bill, "bill")) is None:
        cache.drop(_cached_path(key))
        state, spent = _cached_state(key, make), cache.read_json(bill, "bill")
    return state, Spent.model_validate(spent)


def _cached_state(key: str, make: Callable[[], State]) -> State:
    path = _cached_path(key)
    if parallel.world() == 1 and (state := _read_state(path)) is not None:
        return state
    with parallel.held(Lock(path.with_suffix(".lock"))):
        if (state := _read_state(path)) is not None:
            return state
        parallel.barrier()  # nobody sees the file that the first one is about to write
        state = make()
        if parallel.is_main():
            buffer = io.BytesIO()
            torch.save(tree_map_only(Tensor, _own, state), buffer)
            cache.write(path, buffer.getvalue())
        return state


def _own(tensor: Tensor) -> Tensor:
    """A copy on the CPU; a view would be written with all that it is a view of."""
    return tensor.detach().cpu().clone()


def _read_state(path: Path) -> State | None:
    if (blob := cache.read(path, "state")) is None:
        return None
    return dict(torch.load(io.BytesIO(blob), weights_only=True))


def prepared(cell: Cell, technique: Technique, task: Task, base: Base) -> tuple[State, Spent]:
    """What does not depend on the budget: computed once per base, technique, parameters and seed;
    and its bill.
    """
    shared = cell.model_copy(update={"budget": None, "finetune": cell.base, "calibration": 0})
    key = cell_key(shared)

    def work() -> tuple[State, Spent]:
        with Meter(task.model, base.cost.original.macs) as meter:
            state = technique.prepared(metered(task, key, meter))
        return state, bill(meter, base)

    return _billed(key, work)


def _cached_path(key: str) -> Path:
    return cache_dir() / "states" / f"{key}.tensors"


def bill(meter: Meter, base: Base) -> Spent:
    """What a metered block cost; its epochs are passes over as many samples as there are to train
    on.
    """
    epochs = meter.passes / max(1, len(base.data.train))
    return Spent(
        forward_macs=meter.forward_macs,
        backward_macs=meter.backward_macs,
        epochs=epochs,
        seconds=meter.seconds,
    )
