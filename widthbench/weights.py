"""Weights from files and from timm's hubs: found by name, checked by digest, loaded without pickle, every mismatch named."""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from widthbench.errors import UsageError, did_you_mean
from widthbench.paths import weights_dir

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


def find(name: str) -> Path:
    """The file of a checkpoint.

    Args:
        name: A name in the weights folder (``WIDTHBENCH_WEIGHTS``), with or without its suffix, or a path to a file.

    Raises:
        UsageError: If there is none; the message says where it was looked for.
    """
    if name.endswith(SUFFIXES) and ("/" in name or "\\" in name):
        if (path := Path(name).expanduser()).is_file():
            return path
        raise UsageError(f"no checkpoint at {path}")
    if not NAME.match(name):
        raise UsageError(f"checkpoint '{name}' must be a plain name, or the path of a file ending in {', '.join(SUFFIXES)}")
    if found := _in_folder(name):
        return found
    folder, file = weights_dir(), name if name.endswith(SUFFIXES) else f"{name}.safetensors"
    known = sorted(p.stem for p in folder.iterdir() if p.suffix in SUFFIXES) if folder.is_dir() else []
    raise UsageError(
        f"checkpoint '{name}' is not in {folder}{did_you_mean(name, known)}: "
        f"put {file} there, set WIDTHBENCH_WEIGHTS, or give a path with a '/' in it"
    )


def _in_folder(name: str) -> Path | None:
    folder = weights_dir()
    options = [folder / name] if name.endswith(SUFFIXES) else [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((p for p in options if p.is_file()), None)


def published(name: str) -> Path | None:
    """The file that stands for timm's published weights of a network in the weights folder; None if there is none."""
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
    """The tensors of a file: safetensors, or a torch file that holds nothing but tensors and plain containers.

    Wrappers under "state_dict", "model" and the like are opened, and a common "module." in front of all names is dropped.

    Raises:
        UsageError: If the file is damaged, holds other things, or has no tensors.
    """
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"checkpoint {path} is damaged, or holds more than tensors, which could run code when it is read: "
            "save model.state_dict() instead"
        ) from error
    except Exception as error:  # a damaged file may trip any part of the readers
        raise UsageError(f"damaged checkpoint {path}: {error}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise UsageError(f"checkpoint {path} holds no tensors by name: save model.state_dict()")
    if broken := [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]:
        raise UsageError(f"checkpoint {path} has values that are not finite in {_some(broken)}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    return tensors


def load_into(model: nn.Module, path: Path, sha256: str | None = None) -> str:
    """Load a file's tensors into a network, all or none.

    Args:
        model: Its tensors must have the file's names and shapes; counters of batches may be missing.
        path: The file.
        sha256: What its digest must be, in hex, or its beginning.

    Returns:
        The file's digest.

    Raises:
        UsageError: On another digest, or missing, unexpected or differently shaped tensors; they are named.
    """
    found = digest(path)
    if sha256 and not found.startswith(sha256.lower()):
        raise UsageError(f"checkpoint {path} has digest {found[: max(12, len(sha256))]}, not {sha256}: it is another file")
    tensors, own = read(path), model.state_dict()
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in tensors if n not in own]
    if missing or unexpected:
        parts = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("has unexpected", unexpected)) if names]
        raise UsageError(f"checkpoint {path} does not fit {type(model).__name__}: it {' and '.join(parts)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"checkpoint {path} does not fit {type(model).__name__}: {name} is {list(tensor.shape)}, "
                f"the network wants {list(own[name].shape)}"
            )
    model.load_state_dict(tensors, strict=False)
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def pretrained(name: str, model: nn.Module) -> str:
    """Load the weights that timm publishes for a network: a file of its name in the weights folder, or timm's download.

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
            f"timm publishes no weights for '{name}': train it (pretrained = false), or put {name}.safetensors in {weights_dir()}"
        )
    try:
        source = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub clients raise a dozen unrelated kinds
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        raise UsageError(
            f"the weights of '{name}' could not be downloaded ({type(error).__name__}: {reason}): without a network put them as "
            f"{name}.safetensors in {weights_dir()}, or set WIDTHBENCH_WEIGHTS"
        ) from error
    tensors, own = source.state_dict(), model.state_dict()
    for key, tensor in tensors.items():
        if key not in own or own[key].shape != tensor.shape:
            raise UsageError(
                f"timm's weights of '{name}' do not fit: {key} is {list(tensor.shape)}; is the number of classes the same?"
            )
    model.load_state_dict(tensors)
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(key.encode() + tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
