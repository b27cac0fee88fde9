"""Base networks, with everything that their cells share: trained once, or loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from widthbench import cache, parallel
from widthbench.data import sources, splits
from widthbench.errors import DivergedError
from widthbench.experiment import published
from widthbench.experiment.cell import Cell
from widthbench.experiment.keys import base_key, device_of, published_base
from widthbench.networks import models, weights
from widthbench.paths import Lock, cache_dir, write_atomic
from widthbench.progress import Progress, quiet
from widthbench.recipe import Spent
from widthbench.training.loop import fit
from widthbench.training.resume import Resume
from widthbench.width.certify import find_groups
from widthbench.width.cost import CostModel, count_macs
from widthbench.width.groups import Groups


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
        facts: dict[str, Any] = {"base_digest": self.digest, "val_seen": self.loaded}
        return facts | ({"checkpoint": self.digest} if self.loaded else {})


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
    if (known := published_base(cell)) is not None:
        cost, digest = published.read(known[0], model)
        return Base(model, *_known(cell, model, x), split, x, cost, digest)
    key = base_key(cell)
    path = cache_dir() / published.FOLDER / f"{key}.safetensors"
    if (
        spent := _read_weights(path, model)
    ) is not None and parallel.world() == 1:  # where nothing may be written, too
        return _based(cell, model, x, split, path, spent)
    with parallel.held(Lock(path.with_suffix(".lock"))):
        spent = _read_weights(path, model)
        parallel.barrier()
        if spent is None:
            if (
                died := cache.read_json(_died(path), "base network")
            ) is not None:  # the other cells of this base need not find out
                raise DivergedError(died["reason"])
            macs = count_macs(model, x)
            desc = f"base {cell.group}"
            resume = Resume(training_path(key))
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
                if parallel.is_main():
                    cache.write_json(_died(path), {"reason": f"its base network: {error}"})
                raise DivergedError(f"its base network: {error}") from error
            if parallel.is_main():
                _write_weights(path, model, spent)
                resume.discard()
            parallel.barrier()
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


def training_path(key: str) -> Path:
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
