"""Data sets of a user's own, from Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from widthbench.data import sources
from widthbench.errors import UsageError
from widthbench.paths import data_dir, write_atomic


def add_data(name: str, train: Any, test: Any) -> None:
    """Keep a data set of small images under a name that suites can use.

    It lies in ``WIDTHBENCH_DATA`` (by default in the cache) as ``NAME/arrays.safetensors``, and is
    written anew if it is there.

    Args:
        name: Letters, digits, "_", "-" and ".".
        train: A pair of tensors: images ``[N, C, H, W]`` or ``[N, H, W]``, uint8, or floating with
            values from 0 to 1 (which are kept in 256 steps), and labels ``[N]`` from 0; or a data
            set of such pairs, or of PIL images and labels.
        test: Likewise.

    Raises:
        UsageError: If the name is taken, or images or labels are not of that kind.
    """
    if name in sources.KNOWN or not sources.SAFE.match(name):
        raise UsageError(
            f"add_data: '{name}' is the name of a known data set, or holds more than letters,"
            " digits, '_', '-' and '.'"
        )
    parts = {"train": _arrays(train, "train"), "test": _arrays(test, "test")}
    shapes = {tuple(images.shape[1:]) for images, _ in parts.values()}
    if len(shapes) > 1:
        raise UsageError(f"add_data: images of train and test differ in shape: {sorted(shapes)}")
    seen = {part: set(labels.tolist()) for part, (_, labels) in parts.items()}
    if seen["train"] != set(range(len(seen["train"]))) or not seen["test"] <= seen["train"]:
        raise UsageError(
            "add_data: labels of train must be 0 to K - 1, each there, and those of test among"
            f" them; there are {sorted(seen['train'])[:12]} and {sorted(seen['test'])[:12]}"
        )
    path = data_dir() / name / sources.ARRAYS
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}_{what}": tensor.clone().contiguous()  # parts may share memory
        for part, both in parts.items()
        for what, tensor in zip(("images", "labels"), both, strict=True)
    }
    write_atomic(path, save(tensors))
    sources.forget()


def _arrays(given: Any, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[N, C, H, W]`` and labels long ``[N]``."""
    pair = isinstance(given, tuple | list) and len(given) == 2 and hasattr(given[0], "shape")
    if not pair:
        try:
            pairs = [(_image(x), int(y)) for x, y in given]  # once: it may be shuffled
            given = torch.stack([x for x, _ in pairs]), [y for _, y in pairs]
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"add_data: {part} must be a pair (images, labels) of tensors, or a data set of"
                f" such pairs of one size: {error}"
            ) from error
    images, labels = torch.as_tensor(given[0]), torch.as_tensor(given[1])
    images = images[:, None] if images.dim() == 3 else images
    if images.dim() != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise UsageError(
            f"add_data: {part} has images {list(images.shape)} and labels {list(labels.shape)}, not"
            " [N, C, H, W] (or [N, H, W]) and [N]"
        )
    if images.shape[1] > 4 and images.shape[3] in (1, 3):
        raise UsageError(
            f"add_data: {part} has images {list(images.shape)}, which look like [N, H, W, C]: give"
            " [N, C, H, W]"
        )
    if not images.numel():
        raise UsageError(f"add_data: {part} has images without pixels: {list(images.shape)}")
    if images.is_floating_point():
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):
            raise UsageError(
                f"add_data: {part} has values from {low:g} to {high:g}: floating images must lie"
                " between 0 and 1; do not normalise them, suites do"
            )
        images = (images * 255).round()
    elif images.dtype != torch.uint8:
        raise UsageError(f"add_data: {part} has images of {images.dtype}: make them uint8")
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise UsageError(f"add_data: labels of {part} must be whole numbers from 0")
    return images.to(torch.uint8), labels.long()


def _image(x: Any) -> Tensor:
    """One image ``[C, H, W]``."""
    if isinstance(x, Tensor):
        return x if x.dim() == 3 else x[None]
    if hasattr(x, "convert") and x.mode not in ("L", "RGB"):
        x = x.convert("RGB")  # a palette's indices are no pixels
    pixels = torch.from_numpy(np.array(x))
    return pixels[None] if pixels.dim() == 2 else pixels.movedim(2, 0)
