"""What is published with the results and taken from there, so that nobody needs to train it again:
base networks, and the records of techniques that a control is about.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import nn

from widthbench import cache
from widthbench.data import sources
from widthbench.errors import UsageError
from widthbench.experiment.cell import Cell
from widthbench.experiment.records import Record, digest_of, read_lines
from widthbench.paths import cache_dir, published_dir, write_atomic
from widthbench.recipe import Spent

FOLDER = "bases"


def place(cell: Cell, fields: Collection[str]) -> Path:
    """Where a cell's base network lies if it is published: named by its settings and data, whatever
    code trained it.

    Args:
        cell: The cell.
        fields: Those that a base network depends on. One at its default does not count, so that a
            setting that is new leaves old networks where they are.
    """
    settings = cell.model_dump(mode="json", include=set(fields) - {"bases"}, exclude_defaults=True)
    digest = digest_of({"settings": settings, "data": sources.load(cell.dataset).digest})
    network = cell.model_copy(update={"variant": ""}).network  # which no base network depends on
    name = f"{cell.dataset}-{network}-s{cell.seed}-{digest[:12]}"
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return published_dir() / FOLDER / f"{safe}.safetensors"


def facts(path: Path) -> dict[str, Any] | None:
    """What is published of a network: "sha256", "spent", "provenance"; None if it is not."""
    side = path.with_suffix(".json")
    return json.loads(side.read_text()) if side.is_file() and path.is_file() else None


def read(path: Path, model: nn.Module) -> tuple[Spent, str]:
    """Load a published network; gives what its training cost, and its digest.

    Raises:
        UsageError: If the file is not what was published.
    """
    known, blob = facts(path) or {}, path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != known.get("sha256"):
        raise UsageError(
            f"{path} is not the network that was published (its SHA-256 differs): get it anew, or"
            ' set bases = "trained" in the suite'
        )
    model.load_state_dict(load(blob))
    model.eval()
    return Spent.model_validate(known["spent"]), known["sha256"]


def cached(digest: str) -> Path | None:
    """The network of a digest in the cache, under whatever key; None if it is not there."""
    for side in sorted((cache_dir() / FOLDER).glob("*.json")):
        known = cache.read_json(side, "base network's digest") or {}
        if known.get("sha256") == digest and side.with_suffix(".safetensors").is_file():
            return side.with_suffix(".safetensors")
    return None


def record(cell: Cell) -> Record | None:
    """The finished record that is published of a cell which starts from a published network; None
    where there is none.
    """
    if cell.bases != "published":
        return None
    paths = sorted(published_dir().glob("*/records.jsonl"))
    return _records(tuple((p, p.stat().st_mtime_ns) for p in paths)).get(cell.identity)


@functools.lru_cache(maxsize=1)
def _records(paths: tuple[tuple[Path, int], ...]) -> dict[str, Record]:
    lines = (line for path, _ in paths for line in read_lines(path, '"bases":"published"'))
    sound = [line.record for line in lines if line.record and not line.problem]
    return {r.cell.identity: r for r in sound if r.status == "done"}


def publish(source: Path, target: Path, provenance: dict[str, Any]) -> list[Path]:
    """Copy a network from the cache, with what it cost and where it was trained."""
    kept = cache.read_json(source.with_suffix(".json"), "base network's digest") or {}
    write_atomic(target, source.read_bytes())
    side = target.with_suffix(".json")
    text = json.dumps({**kept, "provenance": provenance}, indent=1, sort_keys=True)
    write_atomic(side, text + "\n")
    return [target, side]
