"""The protocol: one cell to one record, the same adaptations and samples for every technique."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from widthbench import cache, parallel
from widthbench.data import sources, splits
from widthbench.errors import DivergedError, InfeasibleBudgetError, UsageError
from widthbench.experiment.records import CONTROLS, Cell, Record, Row, Stage, Store, digest_of
from widthbench.networks import models, weights
from widthbench.paths import Lock, cache_dir, write_atomic
from widthbench.progress import Progress, quiet
from widthbench.provenance import code_digest, source_digest, stamp, versions
from widthbench.recipe import Recipe, Spent
from widthbench.technique import registry
from widthbench.technique.base import Outcome, Technique, runs
from widthbench.technique.budget import Budget, feasible
from widthbench.technique.task import Nothing, State, Task
from widthbench.training.loop import Stateful, fit
from widthbench.training.measuring import Meter, accuracy
from widthbench.training.recalibration import batch_norms, recalibrate
from widthbench.training.resume import Resume
from widthbench.width.certify import find_groups
from widthbench.width.cost import Cost, CostModel, count_macs
from widthbench.width.groups import Groups
from widthbench.width.resize import resize

BASE_CODE = (
    "randomness.py",
    "recipe.py",
    "parallel.py",
    "_shared_statistics.py",
    "data",
    "networks",
    "training",
)
CELL_CODE = (
    *BASE_CODE,
    "width",
    "sensitivity",
    "technique",
    "experiment/protocol.py",
    "experiment/controls.py",
)


@dataclass(frozen=True)
class Base:
    """A base network with everything that its cells share.

    Attributes:
        model: Trained, in eval mode.
        groups: All its groups, graded.
        cost: Cost as a function of widths.
        data: The split data set.
        example_input: ``[1, C, H, W]``.
        spent: What its training cost.
        digest: SHA-256 of its weights file.
        loaded: Whether it was loaded from published weights, which may have seen our val split.
    """

    model: nn.Module
    groups: Groups
    cost: CostModel
    data: splits.Data
    example_input: Tensor
    spent: Spent
    digest: str
    loaded: bool = False

    @property
    def provenance(self) -> dict[str, Any]:
        """What a record says of it."""
        found: dict[str, Any] = {"base_digest": self.digest, "val_seen": self.loaded}
        return found | ({"checkpoint": self.digest} if self.loaded else {})


def device_of(cell: Cell) -> torch.device:
    """The device that a cell runs on.

    Raises:
        UsageError: If it asks for a GPU and there is none.
    """
    available = torch.cuda.is_available()
    if cell.device == "cuda" and not available:
        raise UsageError(
            "the suite asks for device = 'cuda', but torch finds no GPU; use 'auto' or 'cpu'"
        )
    return torch.device("cuda" if available and cell.device != "cpu" else "cpu")


@contextmanager
def pinned(cell: Cell) -> Iterator[None]:
    """The cell's threads, determinism and precision (no TF32), and the old ones afterwards."""
    before, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    libraries: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    tf32 = [(library, library.allow_tf32) for library in libraries]
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    debug: Any = torch.utils.deterministic
    fills = debug.fill_uninitialized_memory
    torch.set_num_threads(cell.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
    torch.use_deterministic_algorithms(cell.deterministic, warn_only=True)
    debug.fill_uninitialized_memory = False  # a debugging aid that costs time
    for library, _ in tf32:
        library.allow_tf32 = (
            False  # torch's default for convolutions; "float32" would be 10 bits of mantissa
        )
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(exact, warn_only=only_warns)
        debug.fill_uninitialized_memory = fills
        for library, allowed in tf32:
            library.allow_tf32 = allowed


BASE_FIELDS = (
    "dataset",
    "model",
    "model_args",
    "size",
    "seed",
    "base",
    "val",
    "threads",
    "checkpoint",
    "pretrained",
    "mean",
    "std",
    "deterministic",
)


def base_key(cell: Cell) -> str:
    """Digest of everything that the base network depends on."""
    return _base_key(cell, cell.model_dump(mode="json", include=set(BASE_FIELDS)))


def _base_key(cell: Cell, plain: Mapping[str, Any]) -> str:
    text = json.dumps({name: plain[name] for name in BASE_FIELDS}, sort_keys=True)
    data_digest, weights_digest = sources.load(cell.dataset).digest, _weights_digest(cell)
    used = tuple(sorted(_relevant_versions().items()))
    return _base_digest(
        text, device_of(cell).type, data_digest, weights_digest, used, code_digest(*BASE_CODE)
    )


@functools.lru_cache(maxsize=1024)  # a base has many cells
def _base_digest(
    text: str,
    device: str,
    data_digest: str,
    weights_digest: str | None,
    used: tuple[tuple[str, str], ...],
    code: str,
) -> str:
    source = {
        "device": device,
        "data": data_digest,
        "weights": weights_digest,
        "versions": dict(used),
        "code": code,
    }
    return digest_of({**json.loads(text), **source})[:40]


def _weights_digest(cell: Cell) -> str | None:
    """Digest of the file that the base network is loaded from; None where it is trained, or timm
    downloads it.
    """
    path = (
        weights.find(cell.checkpoint)
        if cell.checkpoint
        else weights.published(cell.model)
        if cell.pretrained
        else None
    )
    return None if path is None else weights.digest(path)


def cell_key(cell: Cell) -> str:
    """Digest of everything that a cell's record depends on.

    Raises:
        UsageError: If the technique, model or data set is unknown.
    """
    technique = cell.of or cell.technique
    source = None if technique in CONTROLS else source_digest(registry.load(technique))
    if cell.technique == "l1-budget":
        source = f"{source} {source_digest(registry.load('l1-norm'))}"
    plain = cell.model_dump(mode="json")
    return digest_of(
        {
            "cell": {k: v for k, v in plain.items() if k != "device"},
            "base": _base_key(cell, plain),
            "code": code_digest(*CELL_CODE),
            "technique": source,
        }
    )[:40]


def _relevant_versions() -> dict[str, str]:
    return {k: v for k, v in versions().items() if k != "widthbench"}  # our own code is digested


_loaded: dict[tuple[Any, ...], splits.Data] = {}


def load_data(cell: Cell) -> splits.Data:
    """The cell's data; the last split stays in memory, since cells of one group follow each
    other.
    """
    view = models.view(cell.model)
    mean, std = cell.mean, cell.std
    if cell.pretrained and not mean:
        mean, std = tuple(view["mean"]), tuple(view["std"])
    device = device_of(cell)
    key = (
        cell.dataset,
        sources.load(cell.dataset).digest,
        cell.size,
        cell.seed,
        cell.val,
        device,
        mean,
        std,
        tuple(view.values()),
    )
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = splits.load(
            cell.dataset,
            cell.size,
            seed=cell.seed,
            val=cell.val,
            device=device,
            mean=mean,
            std=std,
            view=view,
        )
    return _loaded[key]


def fresh_model(cell: Cell, seed: int) -> nn.Module:
    """The cell's network at full width, newly initialised, on its device."""
    source = sources.load(cell.dataset)
    model = models.create(
        cell.model,
        classes=source.classes,
        channels=source.channels,
        size=cell.size,
        seed=seed,
        **cell.model_args,
    )
    return model.to(device_of(cell))


def example_input(cell: Cell) -> Tensor:
    """A fixed random input ``[1, C, H, W]`` on the cell's device."""
    shape = (1, sources.load(cell.dataset).channels, cell.size, cell.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device_of(cell))


def obtain_base(cell: Cell, *, progress: Progress = quiet) -> Base:
    """The cell's base network: published weights, or from the cache, or trained once (others wait
    at the lock) and cached.
    """
    model, x = fresh_model(cell, cell.seed), example_input(cell)
    split = load_data(cell)
    if not cell.trains_base:
        digest = load_weights(cell, model)
        return Base(model, *_known(cell, model, x), split, x, Spent(), digest, loaded=True)
    key = base_key(cell)
    path = cache_dir() / "bases" / f"{key}.safetensors"
    if (
        spent := _read_weights(path, model)
    ) is not None and parallel.world() == 1:  # where nothing may be written, too
        return _based(cell, model, x, split, path, spent)
    with parallel.held(Lock(path.with_suffix(".lock"))):
        spent = _read_weights(path, model)
        parallel.everyone()
        if spent is None:
            if (
                died := cache.read_json(_died(path), "base network")
            ) is not None:  # the other cells of this base need not find out
                raise DivergedError(died["reason"])
            macs = count_macs(model, x)
            desc = f"base {cell.group}"
            resume = Resume(_training_path(key))
            try:
                spent = fit(
                    model,
                    split.train,
                    cell.base,
                    macs=macs,
                    seed=cell.seed,
                    progress=progress,
                    desc=desc,
                    resume=resume,
                )
            except DivergedError as error:
                if parallel.first():
                    cache.write_json(_died(path), {"reason": f"its base network: {error}"})
                raise DivergedError(f"its base network: {error}") from error
            if parallel.first():
                _write_weights(path, model, spent)
                resume.discard()
            parallel.everyone()
    return _based(cell, model, x, split, path, spent)


def _based(
    cell: Cell, model: nn.Module, x: Tensor, split: splits.Data, path: Path, spent: Spent
) -> Base:
    digest = json.loads(path.with_suffix(".json").read_text())[
        "sha256"
    ]  # which reading and writing have just made sure of
    return Base(model, *_known(cell, model, x), split, x, spent, digest)


def _died(path: Path) -> Path:
    """Where it is noted that a base network's training diverged, as it would again: keys hold all
    that it depends on.
    """
    return path.with_suffix(".diverged.json")


_groups: dict[str, tuple[Groups, CostModel]] = {}


def _known(cell: Cell, model: nn.Module, x: Tensor) -> tuple[Groups, CostModel]:
    """Groups and cost of a base network; the last ones stay in memory, since cells of one base
    follow each other.
    """
    key = base_key(cell)
    if key not in _groups:
        groups = find_groups(model, x)
        _groups.clear()
        _groups[key] = groups, CostModel(model, groups, x)
    return _groups[key]


def load_weights(cell: Cell, model: nn.Module) -> str:
    """Load the published weights of a cell's base network; gives their digest."""
    if cell.checkpoint:
        return weights.load_into(model, weights.find(cell.checkpoint), cell.sha256)
    return weights.pretrained(cell.model, model)


def _training_path(key: str) -> Path:
    """Where an unfinished training run keeps its state."""
    return cache_dir() / "training" / f"{key}.state"


def _write_weights(path: Path, model: nn.Module, spent: Spent) -> None:
    """Write the weights, and beside them their digest and what they cost (times would make the
    digest of equal weights differ).
    """
    blob = save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    write_atomic(path, blob)
    cache.push(path)
    cache.write_json(
        path.with_suffix(".json"),
        {"sha256": hashlib.sha256(blob).hexdigest(), "spent": spent.model_dump()},
    )


def _read_weights(path: Path, model: nn.Module) -> Spent | None:
    """Load cached weights; None if there are none, or (named in a warning) they are damaged."""
    side = cache.read_json(path.with_suffix(".json"), "base network's digest")
    if side is None:
        return None
    for last in (False, True):
        if path.is_file():
            if hashlib.sha256(blob := path.read_bytes()).hexdigest() == side["sha256"]:
                model.load_state_dict(load(blob))
                model.eval()
                return Spent.model_validate(side["spent"])
            cache.damaged(path, "base network")
        if last or not cache.pull(path):  # the store may have a sound one
            return None
    return None


def batch_of(model: nn.Module, split: splits.Data) -> int:
    """Samples in a batch of scoring: large images would fill the memory, and many small ones a
    CPU's cache.
    """
    small = isinstance(split.test, splits.ImageSamples)
    return 512 if small and next(model.parameters()).device.type == "cuda" else 64


def cost_of(model: nn.Module, base: Base) -> Cost:
    """What a network costs for each sample: one by one, and as its batches are scored, where it
    must not be more.

    Raises:
        UsageError: If a sample of a batch costs more than one alone.
    """
    cost = Cost(count_macs(model, base.example_input), sum(p.numel() for p in model.parameters()))
    size = batch_of(model, base.data)
    together = count_macs(
        model, base.example_input.expand(size, *[-1] * (base.example_input.dim() - 1))
    )
    if together > cost.macs:
        raise UsageError(
            f"the network computes {together:,} MACs for each of {size} samples, but {cost.macs:,}"
            " for one alone"
        )
    return cost


def score(model: nn.Module, split: splits.Data, stage: Stage) -> Row:
    """Test and val scores of a network."""
    size = batch_of(model, split)
    test = accuracy(model, split.test, batch_size=size)
    val = accuracy(model, split.val, batch_size=size) if len(split.val) else None
    for part, found in (("test", test), ("val", val)):
        if found is not None and not math.isfinite(found.loss):
            raise DivergedError(
                f"the network's outputs on {part} data are not finite (stage '{stage}': loss"
                f" {found.loss})"
            )
    return Row(
        stage=stage,
        top1=test.top1,
        top5=test.top5,
        loss=test.loss,
        samples=test.samples,
        val_top1=val.top1 if val else None,
        val_loss=val.loss if val else None,
    )


def run_cell(cell: Cell, store: Store, *, progress: Progress = quiet) -> Record:
    """The record of a cell: from the store, or computed once (others wait at its lock) and stored.

    Args:
        cell: What to run.
        store: Where finished cells are kept.
        progress: Progress bar for training.

    Returns:
        A record with status "done", "skipped" or "failed"; errors within the cell do not raise.

    Raises:
        UsageError: If the cell itself makes no sense: unknown technique, model or data set, no such
            device.
    """
    key = cell_key(cell)
    if record := parallel.agreed(
        lambda: store.get(key)
    ):  # what is finished can be read where nothing may be written
        return record
    with parallel.held(store.lock(key)):
        if record := parallel.agreed(lambda: store.get(key)):
            return record
        with pinned(cell):
            record = parallel.agreed(partial(_compute, cell, key, store, progress), everywhere=True)
        if parallel.first():
            store.put(record)
        return record


def _compute(cell: Cell, key: str, store: Store, progress: Progress) -> Record:
    from widthbench.experiment.controls import run_control  # the controls are built on this module

    where = {
        **stamp(),
        "threads": cell.threads,
        "dtype": "float32",
        "device": str(device_of(cell)),
        "seed": cell.seed,
    }
    where["processes"] = parallel.world()
    if cell.trains_base and cell.base.amp:
        where["base_dtype"] = "bfloat16"
    where["dataset_digest"] = sources.load(cell.dataset).digest
    try:
        run = run_control if cell.technique in CONTROLS else _run_technique
        record = run(cell, key, store, progress, where)
        record.model_dump_json()  # what a technique put into its series must be plain data
        return record
    except NotApplicableError as error:
        return Record(key=key, cell=cell, status="skipped", reason=str(error), provenance=where)
    except Exception as error:  # a plug-in may raise anything; the other cells go on
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
        return Record(
            key=key, cell=cell, status="failed", reason=reason, trace=trace, provenance=where
        )


class NotApplicableError(UsageError):
    """A cell that cannot be run as a matter of fact: the technique says so, or no widths meet the
    budget.
    """


def task_of(cell: Cell, base: Base, technique: Technique, *, progress: Progress = quiet) -> Task:
    """What a technique is given for a cell: the trained base, or the same network newly initialised
    if it starts fresh.
    """
    groups = base.groups.select(cell.scope, cell.include or None)
    budget = budget_of(cell, groups, base.cost, grows=technique.grows)
    return Task(
        model=base.model if technique.start == "trained" else fresh_model(cell, cell.seed),
        groups=groups,
        example_input=base.example_input,
        budget=budget,
        cost=base.cost,
        reference=base.cost,
        train=base.data.train,
        val=base.data.val if len(base.data.val) else Nothing(cell.dataset),
        seed=cell.seed,
        device=device_of(cell),
        recipe=cell.finetune if technique.start == "trained" else cell.base,
        fit=_fit_for(base, cell, progress),
        regroup=lambda model: find_groups(model, base.example_input, cache=False),
        progress=progress,
        curves=cell.curves,
    )


def budget_of(cell: Cell, groups: Groups, cost: CostModel, *, grows: bool = True) -> Budget:
    """A cell's budget; the feasible floor where the budget lies below it and the suite runs
    those.
    """
    if cell.budget is None:
        raise UsageError(f"cell {cell.id} has no budget")
    budget = Budget.parse(cell.budget, grows=grows)
    return feasible(budget, groups, cost, cost) if cell.floor else budget


def _fit_for(base: Base, cell: Cell, progress: Progress) -> Callable[..., Spent]:
    def training(
        model: nn.Module,
        train: Any,
        recipe: Any,
        *,
        seed: int = cell.seed,
        macs: int | None = None,
        **options: Any,
    ) -> Spent:
        macs = count_macs(model, base.example_input) if macs is None else macs
        return fit(model, train, recipe, macs=macs, seed=seed, progress=progress, **options)

    return training


def _metered(task: Task, key: str, meter: Meter) -> Task:
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
        resume = Resume(_training_path(f"{key}-{digest_of(desc)[:8]}"))
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
        if parallel.first():
            cache.write_json(bill, spent.model_dump())
        return state

    state = _cached_state(key, make)
    parallel.everyone()
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
        parallel.everyone()  # nobody sees the file that the first one is about to write
        state = make()
        if parallel.first():
            buffer = io.BytesIO()
            torch.save(tree_map_only(Tensor, lambda t: t.detach().cpu(), state), buffer)
            cache.write(path, buffer.getvalue())
        return state


def _read_state(path: Path) -> State | None:
    if (blob := cache.read(path, "state")) is None:
        return None
    return dict(torch.load(io.BytesIO(blob), weights_only=True))


def _prepared(cell: Cell, technique: Technique, task: Task, base: Base) -> tuple[State, Spent]:
    """What does not depend on the budget: computed once per base, technique, parameters and seed;
    and its bill.
    """
    shared = cell.model_copy(update={"budget": None, "finetune": cell.base, "calibration": 0})
    key = cell_key(shared)

    def work() -> tuple[State, Spent]:
        with Meter(task.model, base.cost.original.macs) as meter:
            state = technique.prepared(_metered(task, key, meter))
        return state, _bill(meter, base)

    return _billed(key, work)


def _cached_path(key: str) -> Path:
    return cache_dir() / "states" / f"{key}.tensors"


def _bill(meter: Meter, base: Base) -> Spent:
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


def _run_technique(
    cell: Cell, key: str, store: Store, progress: Progress, where: dict[str, Any]
) -> Record:
    technique = registry.create(cell.technique, cell.params)
    base = obtain_base(cell, progress=progress)
    task = task_of(cell, base, technique, progress=progress)
    if reason := technique.skip(task):
        raise NotApplicableError(f"{technique.id}: {reason}")
    state, prepared = _prepared(cell, technique, task, base)
    try:
        with Meter(task.model, base.cost.original.macs) as meter:
            outcome = technique.apply(_metered(task, key, meter), state)
    except InfeasibleBudgetError as error:
        raise NotApplicableError(str(error)) from error
    model = outcome.resized
    meter.leave(model)
    if not runs(model, base.example_input, base.groups.output_shapes):
        raise UsageError(
            f"technique '{technique.id}' changed the output's shape or made it non-finite"
        )
    path = replay(task, outcome, base) if cell.curves else {}
    rows, adaptation, cost = adapt(model, cell, base, progress, key)
    return Record(
        key=key,
        cell=cell,
        status="done",
        rows=rows,
        access=technique.access,
        macs=cost.macs,
        params=cost.params,
        base_macs=base.cost.original.macs,
        base_params=base.cost.original.params,
        kept=outcome.kept,
        met=outcome.met,
        floor=task.budget != Budget.parse(str(cell.budget), grows=True),
        coupled=any(task.groups[n].grade == "coupled" for n in outcome.plan),
        widths=outcome.widths,
        base_widths={n: g.channels for n, g in task.groups.items()},
        spent={
            "base": base.spent if technique.start == "trained" else Spent(),
            "decision": prepared.add(_bill(meter, base)),
            "adaptation": adaptation,
        },
        series={k: list(v) for k, v in outcome.series.items()} | path,
        provenance={**where, **base.provenance},
    )


STOP = 0.25  # points of val accuracy that a path may lose at its stopping point


def replay(task: Task, outcome: Outcome, base: Base) -> dict[str, list[Any]]:
    """Test and val scores along the technique's path of plans, taken after the decision is made; {}
    if there is no path.

    Where a path shrinks, its stopping point, too: the last one whose val accuracy is at most
    ``STOP`` points below the first one's.
    """
    model = task.model if outcome.model is None else outcome.model
    found: dict[str, list[Any]] = {}
    for plan in outcome.path:
        row = score(resize(model, task.groups, plan), base.data, "resized")
        point = {
            "channels": sum(len(r.rows) for r in plan.values()),
            **row.model_dump(exclude={"stage", "samples", "top5"}),
        }
        for name, value in point.items():
            found.setdefault(f"path.{name}", []).append(value)
    return found | stopping_point(found)


def stopping_point(path: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Where val says that a shrinking path may stop; {} where it grows, or nothing is held out.

    Args:
        path: "path.channels", "path.top1" and "path.val_top1", an entry each for every point.

    Returns:
        "stop.channels", "stop.top1" (test), "stop.val_top1" and "stop.removed" (% of the channels),
        of one entry each.
    """
    channels, val = path.get("path.channels", []), path.get("path.val_top1", [])
    if not channels or None in val or any(a < b for a, b in pairwise(channels)):
        return {}
    last = max(i for i, top1 in enumerate(val) if top1 >= val[0] - STOP)
    found = {
        f"stop.{name}": [path[f"path.{name}"][last]] for name in ("channels", "top1", "val_top1")
    }
    return found | {"stop.removed": [100 * (channels[0] - channels[last]) / channels[0]]}


def adapt(
    model: nn.Module, cell: Cell, base: Base, progress: Progress, key: str
) -> tuple[tuple[Row, ...], Spent, Cost]:
    """Score a resized network as it is, after batch-norm recalibration, and after fine-tuning where
    there is any; in place.

    Returns:
        The rows, what the adaptation cost, and the network's cost.
    """
    cost = cost_of(model, base)
    rows = [score(model, base.data, "resized")]
    spent = recalibrate(
        model, base.data.train, samples=cell.calibration, macs=cost.macs, seed=cell.seed
    )
    again = score(model, base.data, "recalibrated") if batch_norms(model) else rows[0]
    rows.append(again.model_copy(update={"stage": "recalibrated"}))
    if not cell.finetune.epochs:
        return tuple(rows), spent, cost
    tuned = train(
        model,
        cell,
        cell.finetune,
        key,
        macs=cost.macs,
        progress=progress,
        desc=f"fine-tune {cell.id}",
    )
    rows.append(score(model, base.data, "fine-tuned"))
    return tuple(rows), spent.add(tuned), cost


def train(
    model: nn.Module,
    cell: Cell,
    recipe: Recipe,
    key: str,
    *,
    macs: int,
    progress: Progress,
    desc: str,
) -> Spent:
    """Train one of a cell's networks on its data, resuming where a killed run stopped."""
    resume = Resume(_training_path(key))
    samples = load_data(cell).train
    spent = fit(
        model,
        samples,
        recipe,
        macs=macs,
        seed=cell.seed,
        progress=progress,
        desc=desc,
        resume=resume,
    )
    resume.discard()
    return spent
