"""The protocol: one cell to one record, the same adaptations and samples for every technique."""

from __future__ import annotations

import hashlib
import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from widthbench import data, models, registry
from widthbench.budget import Budget
from widthbench.errors import InfeasibleBudgetError, UsageError
from widthbench.measure import Meter, accuracy
from widthbench.paths import cache_dir, write_atomic
from widthbench.provenance import code_digest, source_digest, stamp, versions
from widthbench.recipe import Spent
from widthbench.records import CONTROLS, Cell, Record, Row, Stage, Store, digest_of
from widthbench.task import Progress, Task
from widthbench.technique import Outcome, Technique, runs
from widthbench.training import batch_norms, fit, recalibrate
from widthbench.width.certify import find_groups
from widthbench.width.cost import Cost, CostModel, count_macs
from widthbench.width.groups import Groups
from widthbench.width.resize import resize

BASE_CODE = ("data.py", "models.py", "training.py", "recipe.py")
CELL_CODE = (*BASE_CODE, "width", "budget.py", "task.py", "technique.py", "measure.py", "protocol.py", "controls.py")


def quiet(steps: Any, /, *, desc: str) -> Any:
    """No progress bar."""
    return steps


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
    """

    model: nn.Module
    groups: Groups
    cost: CostModel
    data: data.Data
    example_input: Tensor
    spent: Spent
    digest: str


def device_of(cell: Cell) -> torch.device:
    """The device that a cell runs on.

    Raises:
        UsageError: If it asks for a GPU and there is none.
    """
    available = torch.cuda.is_available()
    if cell.device == "cuda" and not available:
        raise UsageError("the suite asks for device = 'cuda', but torch finds no GPU; use 'auto' or 'cpu'")
    return torch.device("cuda" if available and cell.device != "cpu" else "cpu")


@contextmanager
def pinned(cell: Cell) -> Iterator[None]:
    """The cell's number of threads, and the old one afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def base_key(cell: Cell) -> str:
    """Digest of everything that the base network depends on."""
    source = {
        **cell.model_dump(mode="json", include={"dataset", "model", "model_args", "size", "seed", "base", "val", "threads"}),
        "device": device_of(cell).type,
        "data": load_data(cell).digest,
        "versions": _relevant_versions(),
        "code": code_digest(*BASE_CODE),
    }
    return digest_of(source)[:40]


def cell_key(cell: Cell) -> str:
    """Digest of everything that a cell's record depends on.

    Raises:
        UsageError: If the technique, model or data set is unknown.
    """
    technique = cell.of or cell.technique
    source = None if technique in CONTROLS else source_digest(registry.load(technique))
    return digest_of(
        {
            "cell": cell.model_dump(mode="json", exclude={"device"}),
            "base": base_key(cell),
            "code": code_digest(*CELL_CODE),
            "technique": source,
        }
    )[:40]


def _relevant_versions() -> dict[str, str]:
    return {k: v for k, v in versions().items() if k != "widthbench"}  # our own code is digested


_loaded: dict[tuple[Any, ...], data.Data] = {}


def load_data(cell: Cell) -> data.Data:
    """The cell's data; the last split stays in memory, since cells of one group follow each other."""
    key = (cell.dataset, cell.size, cell.seed, cell.val, device_of(cell))
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = data.load(cell.dataset, cell.size, seed=cell.seed, val=cell.val, device=device_of(cell))
    return _loaded[key]


def fresh_model(cell: Cell, seed: int) -> nn.Module:
    """The cell's network at full width, newly initialised, on its device."""
    split = load_data(cell)
    model = models.create(cell.model, classes=split.classes, channels=split.channels, size=cell.size, seed=seed, **cell.model_args)
    return model.to(device_of(cell))


def example_input(cell: Cell) -> Tensor:
    """A fixed random input ``[1, C, H, W]`` on the cell's device."""
    shape = (1, load_data(cell).channels, cell.size, cell.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device_of(cell))


def obtain_base(cell: Cell, *, progress: Progress = quiet) -> Base:
    """The cell's base network: from the cache, or trained once (others wait at the lock) and cached."""
    key = base_key(cell)
    path = cache_dir() / "bases" / f"{key}.safetensors"
    model, x = fresh_model(cell, cell.seed), example_input(cell)
    split = load_data(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        spent = _read_weights(path, model)
        if spent is None:
            macs = count_macs(model, x)
            desc = f"base {cell.group}"
            spent = fit(model, split.train, cell.base, macs=macs, seed=cell.seed, progress=progress, desc=desc)
            _write_weights(path, model, spent)
    groups = find_groups(model, x)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Base(model, groups, CostModel(model, groups, x), split, x, spent, digest)


def _write_weights(path: Path, model: nn.Module, spent: Spent) -> None:
    """Write the weights, and beside them their digest and what they cost (times would make the digest of equal weights differ)."""
    blob = save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    write_atomic(path, blob)
    side = {"sha256": hashlib.sha256(blob).hexdigest(), "spent": spent.model_dump()}
    write_atomic(path.with_suffix(".json"), json.dumps(side))


def _read_weights(path: Path, model: nn.Module) -> Spent | None:
    """Load cached weights; None if there are none, or (named in a warning) they are damaged."""
    if not path.is_file():
        return None
    try:
        side = json.loads(path.with_suffix(".json").read_text())
        if hashlib.sha256(path.read_bytes()).hexdigest() != side["sha256"]:
            raise ValueError("its digest does not match")
        spent = Spent.model_validate(side["spent"])
        model.load_state_dict(load_file(path))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        warnings.warn(f"damaged base network {path} ({error}): it is trained again", stacklevel=2)
        return None
    model.eval()
    return spent


def score(model: nn.Module, split: data.Data, stage: Stage) -> Row:
    """Test and val scores of a network."""
    test, val = accuracy(model, split.test), accuracy(model, split.val)
    return Row(
        stage=stage, top1=test.top1, top5=test.top5, loss=test.loss, samples=test.samples,
        val_top1=val.top1, val_loss=val.loss,
    )  # fmt: skip


def run_cell(cell: Cell, store: Store, *, progress: Progress = quiet) -> Record:
    """The record of a cell: from the store, or computed once (others wait at its lock) and stored.

    Args:
        cell: What to run.
        store: Where finished cells are kept.
        progress: Progress bar for training.

    Returns:
        A record with status "done", "skipped" or "failed"; errors within the cell do not raise.

    Raises:
        UsageError: If the cell itself makes no sense: unknown technique, model or data set, no such device.
    """
    key = cell_key(cell)
    with store.lock(key):
        if record := store.get(key):
            return record
        with pinned(cell):
            record = _compute(cell, key, store, progress)
        store.put(record)
        return record


def _compute(cell: Cell, key: str, store: Store, progress: Progress) -> Record:
    from widthbench.controls import run_control  # the controls are built on this module

    where = {**stamp(), "threads": cell.threads, "dtype": "float32", "device": str(device_of(cell)), "seed": cell.seed}
    where["dataset_digest"] = load_data(cell).digest
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
        return Record(key=key, cell=cell, status="failed", reason=reason, trace=trace, provenance=where)


class NotApplicableError(UsageError):
    """A cell that cannot be run as a matter of fact: the technique says so, or no widths meet the budget."""


def task_of(cell: Cell, base: Base, technique: Technique, *, progress: Progress = quiet) -> Task:
    """What a technique is given for a cell: the trained base, or the same network newly initialised if it starts fresh."""
    if cell.budget is None:
        raise UsageError(f"cell {cell.id} has no budget")
    groups = base.groups.select(cell.scope, cell.include or None)
    return Task(
        model=base.model if technique.start == "trained" else fresh_model(cell, cell.seed),
        groups=groups,
        example_input=base.example_input,
        budget=Budget.parse(cell.budget, grows=technique.grows),
        cost=base.cost,
        reference=base.cost,
        train=base.data.train,
        val=base.data.val,
        seed=cell.seed,
        device=device_of(cell),
        recipe=cell.finetune,
        fit=_fit_for(base, cell, progress),
        regroup=lambda model: find_groups(model, base.example_input, cache=False),
        progress=progress,
        checkpoint=_checkpoint_for(cell),
    )


def _fit_for(base: Base, cell: Cell, progress: Progress) -> Callable[..., Spent]:
    def training(model: nn.Module, train: Any, recipe: Any, *, seed: int = cell.seed, desc: str = "fit") -> Spent:
        macs = count_macs(model, base.example_input)
        return fit(model, train, recipe, macs=macs, seed=seed, progress=progress, desc=desc)

    return training


def _checkpoint_for(cell: Cell) -> Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]:
    """Intermediate states of a decision under the cell's key, so that a killed run does not start over."""

    def checkpoint(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return _cached_tensors(f"{cell_key(cell)}-{digest_of(name)[:8]}", make)

    return checkpoint


def _cached_tensors(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    path = _cached_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            try:
                return dict(load_file(path))
            except (OSError, SafetensorError) as error:
                warnings.warn(f"damaged state {path} ({error}): it is computed again", stacklevel=2)
        state = make()
        write_atomic(path, save({k: v.detach().cpu().contiguous() for k, v in state.items()}))
        return state


def _prepared(cell: Cell, technique: Technique, task: Task, base: Base) -> tuple[dict[str, Tensor], Spent]:
    """What does not depend on the budget: computed once per base, technique, parameters and seed; and its bill."""
    shared = cell.model_copy(update={"budget": None, "finetune": cell.base, "calibration": 0})
    key = cell_key(shared)
    bill = cache_dir() / "states" / f"{key}.spent.json"

    def make() -> dict[str, Tensor]:
        with Meter(task.model, base.cost.original.macs) as meter:
            state = technique.prepared(task)
        write_atomic(bill, _bill(meter, base).model_dump_json())
        return state

    state = _cached_tensors(key, make)
    try:
        return state, Spent.model_validate_json(bill.read_text())
    except (OSError, ValueError):
        _cached_path(key).unlink(missing_ok=True)
        return _cached_tensors(key, make), Spent.model_validate_json(bill.read_text())


def _cached_path(key: str) -> Path:
    return cache_dir() / "states" / f"{key}.safetensors"


def _bill(meter: Meter, base: Base) -> Spent:
    """What a metered block cost; its epochs are passes over the training samples, by forward MACs."""
    epochs = meter.forward_macs / base.cost.original.macs / max(1, len(base.data.train))
    return Spent(forward_macs=meter.forward_macs, backward_macs=meter.backward_macs, epochs=epochs, seconds=meter.seconds)


def _run_technique(cell: Cell, key: str, store: Store, progress: Progress, where: dict[str, Any]) -> Record:
    technique = registry.create(cell.technique, cell.params)
    base = obtain_base(cell, progress=progress)
    task = task_of(cell, base, technique, progress=progress)
    if reason := technique.skip(task):
        raise NotApplicableError(f"{technique.id}: {reason}")
    state, prepared = _prepared(cell, technique, task, base)
    try:
        with Meter(task.model, base.cost.original.macs) as meter:
            outcome = technique.apply(task, state)
    except InfeasibleBudgetError as error:
        raise NotApplicableError(str(error)) from error
    model = outcome.resized
    assert model is not None  # apply() always fills it in
    meter.leave(model)
    if not runs(model, base.example_input, base.groups.output_shapes):
        raise UsageError(f"technique '{technique.id}' changed the output's shape or made it non-finite")
    path = replay(task, outcome, base)
    rows, adaptation, cost = adapt(model, cell, base, progress)
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
        coupled=any(task.groups[n].grade == "coupled" for n in outcome.plan),
        widths=outcome.widths,
        base_widths={n: g.channels for n, g in task.groups.items()},
        spent={
            "base": base.spent if technique.start == "trained" else Spent(),
            "decision": prepared.add(_bill(meter, base)),
            "adaptation": adaptation,
        },
        series={k: list(v) for k, v in outcome.series.items()} | path,
        provenance={**where, "base_digest": base.digest, "val_seen": False},
    )


def replay(task: Task, outcome: Outcome, base: Base) -> dict[str, list[Any]]:
    """Test and val scores along the technique's path of plans, taken after the decision is made; {} if there is no path."""
    model = task.model if outcome.model is None else outcome.model
    found: dict[str, list[Any]] = {}
    for plan in outcome.path:
        row = score(resize(model, task.groups, plan), base.data, "resized")
        point = {"channels": sum(len(r.rows) for r in plan.values()), **row.model_dump(exclude={"stage", "samples", "top5"})}
        for name, value in point.items():
            found.setdefault(f"path.{name}", []).append(value)
    return found


def adapt(model: nn.Module, cell: Cell, base: Base, progress: Progress) -> tuple[tuple[Row, ...], Spent, Cost]:
    """Score a resized network as it is, after batch-norm recalibration, and after fine-tuning; in place.

    Returns:
        The rows, what the adaptation cost, and the network's cost.
    """
    cost = Cost(count_macs(model, base.example_input), sum(p.numel() for p in model.parameters()))
    rows = [score(model, base.data, "resized")]
    spent = recalibrate(model, base.data.train, samples=cell.calibration, macs=cost.macs, seed=cell.seed)
    again = score(model, base.data, "recalibrated") if batch_norms(model) else rows[0]
    rows.append(again.model_copy(update={"stage": "recalibrated"}))
    desc = f"fine-tune {cell.id}"
    tuned = fit(model, base.data.train, cell.finetune, macs=cost.macs, seed=cell.seed, progress=progress, desc=desc)
    rows.append(score(model, base.data, "fine-tuned"))
    return tuple(rows), spent.add(tuned), cost
