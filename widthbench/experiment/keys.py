"""Digests of everything that a base network and a record depend on."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from widthbench.data import sources
from widthbench.errors import UsageError
from widthbench.experiment import published
from widthbench.experiment.cell import CONTROLS, Cell
from widthbench.experiment.records import Record, digest_of
from widthbench.networks import models, weights
from widthbench.provenance import code_digest, files_digest, source_digest, stamp, versions
from widthbench.technique import registry

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
    *(
        f"experiment/{room}.py"
        for room in ("adaptation", "bases", "billing", "controls", "keys", "protocol", "published")
    ),
)


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


# what a base network does not depend on: a setting that nobody has listed here is part of its key
DECISION_FIELDS = {
    "technique",
    "params",
    "trials",
    "of",
    "budget",
    "variant",
    "scope",
    "include",
    "finetune",
    "calibration",
    "longest",
    "floor",
    "curves",
    "sha256",  # the digest of what the checkpoint holds is
    "device",  # its type is
}
BASE_FIELDS = sorted(Cell.model_fields.keys() - DECISION_FIELDS)


def base_key(cell: Cell) -> str:
    """Digest of everything that the base network depends on."""
    return _base_key(cell, cell.model_dump(mode="json", include=set(BASE_FIELDS)))


def _base_key(cell: Cell, plain: Mapping[str, Any]) -> str:
    text = json.dumps({name: plain[name] for name in BASE_FIELDS}, sort_keys=True)
    if (known := published_base(cell)) is not None:  # whatever code and versions trained it
        return digest_of({"published": known[1]["sha256"], "device": device_of(cell).type})[:40]
    data_digest, weights_digest = sources.load(cell.dataset).digest, _weights_digest(cell)
    used = tuple(sorted(_relevant_versions().items()))
    code = code_digest(*BASE_CODE)
    if own := models.factory(cell.model):
        code = f"{code} {source_digest(own)} {files_digest(models.sources(cell.model))}"
    return _base_digest(text, device_of(cell).type, data_digest, weights_digest, used, code)


def published_base(cell: Cell) -> tuple[Path, dict[str, Any]] | None:
    """The published base network that a cell takes, with what is published of it; None where it
    takes none.
    """
    if cell.bases != "published" or not cell.trains_base:
        return None
    path = published.place(cell, BASE_FIELDS)
    facts = published.facts(path)
    return None if facts is None else (path, facts)


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
    plain = cell.model_dump(mode="json")
    return digest_of(
        {
            "cell": {k: v for k, v in plain.items() if k != "device"},
            "base": _base_key(cell, plain),
            "code": code_digest(*CELL_CODE),
            "technique": technique_digest(cell),
            **(
                {"source": digest_of(source.model_dump(mode="json"))}
                if (source := source_of(cell))
                else {}
            ),
        }
    )[:40]


def technique_of(cell: Cell) -> Cell:
    """The cell of the technique that a control is about."""
    return cell.model_copy(update={"technique": cell.of, "of": None})


def source_of(cell: Cell) -> Record | None:
    """The published record that a control takes of its technique, if it is of the published base
    network that the control starts from; None where it takes none.
    """
    base = published_base(cell) if cell.of else None
    if base is None or (source := published.record(technique_of(cell))) is None:
        return None
    return source if source.provenance.get("base_digest") == base[1]["sha256"] else None


def technique_digest(cell: Cell) -> str | None:
    """Digest of the techniques' code that a cell's record comes from; None for a control that has
    none.
    """
    technique = cell.of or cell.technique
    source = None if technique in CONTROLS else source_digest(registry.load(technique))
    if cell.technique == "l1-budget":
        source = f"{source} {source_digest(registry.load('l1-norm'))}"
    return source


def machine_of(cell: Cell, processes: int = 1) -> dict[str, Any]:
    """What a cell's record says of where it was computed."""
    where = {
        **stamp(),
        "threads": cell.threads,
        "dtype": "bfloat16" if cell.finetune.amp and cell.finetune.epochs else "float32",
        "device": str(device_of(cell)),
        "seed": cell.seed,
        "processes": processes,
    }
    if cell.trains_base and cell.base.amp:
        where["base_dtype"] = "bfloat16"
    return where | {"dataset_digest": sources.load(cell.dataset).digest}


def _relevant_versions() -> dict[str, str]:
    return {k: v for k, v in versions().items() if k != "widthbench"}  # our own code is digested
