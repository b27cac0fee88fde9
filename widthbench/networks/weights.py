"""Weights from files and from timm's hubs: found by name, checked by digest, loaded without pickle,
every mismatch named.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from widthbench.errors import UsageError, did_you_mean, visible
from widthbench.paths import expanded, weights_dir

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
FLOATING = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # others need scales, which no file of plain tensors has
SPREAD = 2**26  # bytes that a tensor may take above those that the file holds of it


def find(name: str) -> Path:
    """The file of a checkpoint.

    Args:
        name: A name in the weights folder (``WIDTHBENCH_WEIGHTS``), with or without its suffix, or
            a path to a file.

    Raises:
        UsageError: If there is none; the message says where it was looked for.
    """
    if name.endswith(SUFFIXES) and ("/" in name or "\\" in name):
        if os.path.isfile(path := expanded(name)):
            return path
        raise UsageError(f"no checkpoint at {path}")
    if not NAME.match(name):
        raise UsageError(
            f"checkpoint '{name}' must be a plain name, or the path of a file ending in"
            f" {', '.join(SUFFIXES)}"
        )
    if inside := _in_folder(name):
        return inside
    folder, file = weights_dir(), name if name.endswith(SUFFIXES) else f"{name}.safetensors"
    known = (
        sorted(p.stem for p in folder.iterdir() if p.suffix in SUFFIXES) if folder.is_dir() else []
    )
    raise UsageError(
        f"checkpoint '{name}' is not in {folder}{did_you_mean(name, known)}: "
        f"put {file} there, set WIDTHBENCH_WEIGHTS, or give a path with a '/' in it"
    )


def _in_folder(name: str) -> Path | None:
    folder = weights_dir()
    options = (
        [folder / name]
        if name.endswith(SUFFIXES)
        else [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    )
    return next((p for p in options if os.path.isfile(p)), None)


def published(name: str) -> Path | None:
    """The file that stands for timm's published weights of a network in the weights folder; None if
    there is none.
    """
    return _in_folder(name)


def digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        return _digest(path, path.stat().st_size, path.stat().st_mtime_ns)
    except OSError as error:
        raise UsageError(f"cannot read checkpoint {path}: {error.strerror}") from error


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, or a torch file that holds nothing but tensors and plain
    containers.

    Wrappers under "state_dict", "model" and the like are opened, and a common "module." in front of
    all names is dropped.

    Raises:
        UsageError: If the file is damaged, holds other things, has no tensors, or one that is no
            plain array of finite numbers.
    """
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, weights_only=True, map_location="cpu")
        )
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"checkpoint {path} is damaged, or holds more than tensors, which could run code when"
            " it is read: save model.state_dict() instead"
        ) from error
    except Exception as error:  # a damaged file may trip any part of the readers
        reason = (visible(str(error), keep="\n").strip().splitlines() or [type(error).__name__])[0][
            :300
        ]
        raise UsageError(f"damaged checkpoint {path}: {reason}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = (
        {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors:
        raise UsageError(f"checkpoint {path} holds no tensors by name: save model.state_dict()")
    if odd := [name for name in tensors if not isinstance(name, str)]:
        raise UsageError(
            f"checkpoint {path} has a tensor under {odd[0]!r:.80}, which is no name: save"
            " model.state_dict()"
        )
    _require_plain(tensors, f"checkpoint {path}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    return tensors


def _require_plain(tensors: dict[str, Tensor], what: str) -> None:
    """Refuse tensors that are no plain arrays of finite numbers."""
    for name, t in tensors.items():
        if problem := _oddity(t):
            raise UsageError(
                f"{what}: {_some([name])} {problem}: save it as a plain tensor in float32"
            )
    if broken := [
        name
        for name, t in tensors.items()
        if t.is_floating_point() and not bool(torch.isfinite(t).all())
    ]:
        raise UsageError(f"{what}: values that are not finite in {_some(broken)}")


def _oddity(t: Tensor) -> str | None:
    """What makes a tensor something else than a plain array in main memory."""
    if t.is_nested or t.layout != torch.strided:
        return f"is {'nested' if t.is_nested else 'sparse'} ({t.layout})"
    if type(t) not in (Tensor, nn.Parameter):
        return f"is a {type(t).__name__}"
    if t.is_quantized or (t.is_floating_point() and t.dtype not in FLOATING):
        return f"is quantised ({t.dtype})"
    if t.is_meta:
        return "has a shape but no values (device meta)"
    held, asked = t.untyped_storage().nbytes(), math.prod(t.shape) * t.element_size()
    if asked > held + SPREAD:
        return (
            f"of shape {list(t.shape)} asks for {asked:,} bytes, of which the file holds {held:,}"
        )
    return None


def load_into(model: nn.Module, path: Path, sha256: str | None = None) -> str:
    """Load a file's tensors into a network, all or none.

    Args:
        model: Its tensors must have the file's names and shapes, and hold the same kind of numbers;
            floating-point ones may have more or fewer bits. Counters of batches may be missing.
        path: The file.
        sha256: What its digest must be, in hex, or its beginning.

    Returns:
        The file's digest.

    Raises:
        UsageError: On another digest, or missing, unexpected, differently shaped or typed tensors;
            they are named.
    """
    actual = digest(path)
    if sha256 and not actual.startswith(sha256.lower()):
        raise UsageError(
            f"checkpoint {path} has digest {actual[: max(12, len(sha256))]}, not {sha256}: it is"
            " another file"
        )
    _load(model, read(path), f"checkpoint {path} does not fit {type(model).__name__}")
    return actual


def _load(model: nn.Module, tensors: dict[str, Tensor], misfit: str) -> None:
    """Load tensors into a network, all or none; errors begin with ``misfit``."""
    own = model.state_dict()
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in tensors if n not in own]
    if missing or unexpected:
        parts = [
            f"{what} {_some(names)}"
            for what, names in (("lacks", missing), ("has unexpected", unexpected))
            if names
        ]
        raise UsageError(f"{misfit}: it {' and '.join(parts)}")
    for name, tensor in tensors.items():
        want = own[name]
        if tensor.shape != want.shape:
            raise UsageError(
                f"{misfit}: {name} is {list(tensor.shape)}, the network wants {list(want.shape)}"
            )
        if not _fits(tensor, want.dtype):
            raise UsageError(
                f"{misfit}: {name} is {tensor.dtype}, which the network's {want.dtype} cannot hold:"
                " convert it"
            )
    model.load_state_dict(tensors, strict=False)


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a type holds a tensor's kind of numbers and its values: integers exactly, others but
    for rounding.
    """
    if tensor.dtype == dtype:
        return True
    kinds = [(d.is_floating_point, d.is_complex, d == torch.bool) for d in (tensor.dtype, dtype)]
    if kinds[0] != kinds[1]:
        return False
    there = tensor.to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return bool(torch.isfinite(there).all())
    return torch.equal(there.to(tensor.dtype), tensor)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(visible(name)[:200] or "''" for name in names[:3]) + more


def pretrained(name: str, model: nn.Module) -> str:
    """Load the weights that timm publishes for a network: a file of its name in the weights folder,
    or timm's download.

    Args:
        name: timm's name, with or without its tag (``resnet34.tv_in1k``).
        model: A network of that name; its shapes must fit, its number of classes included.

    Returns:
        SHA-256 of the file, or of the downloaded tensors.

    Raises:
        UsageError: If timm has none, there is no network, or they do not fit.
    """
    if path := published(name):
        return load_into(model, path)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UsageError(
            f"timm publishes no weights for '{name}': train it (pretrained = false), or put"
            f" {name}.safetensors in {weights_dir()}"
        )
    try:
        source = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub clients raise a dozen unrelated kinds
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        raise UsageError(
            f"the weights of '{name}' could not be downloaded ({type(error).__name__}: {reason}):"
            f" without a network put them as {name}.safetensors in {weights_dir()}, or set"
            " WIDTHBENCH_WEIGHTS"
        ) from error
    tensors, what = source.state_dict(), f"timm's weights of '{name}'"
    _require_plain(tensors, what)
    _load(model, tensors, f"{what} do not fit")
    sha = hashlib.sha256()
    for key in sorted(tensors):
        sha.update(
            key.encode()
            + tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return sha.hexdigest()
