"""Data sets as seeded, stratified train / val / test splits, held in memory as bytes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from widthbench.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class ImageSamples:
    """Labelled images in memory.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        labels: long ``[N]``.
        mean: Per-channel mean of the training images in [0, 1], subtracted from every batch.
        std: Per-channel standard deviation likewise, divided by.
        device: Where batches are made.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, *, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised batches.

        Args:
            size: Samples per batch; the last one may be smaller.
            generator: Shuffles with it if given.

        Yields:
            float32 ``x [B, C, H, W]`` and long ``y [B]`` on the device.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        mean = torch.tensor(self.mean, device=self.device)[:, None, None]
        std = torch.tensor(self.std, device=self.device)[:, None, None]
        for index in order.split(size):
            x = self.images[index].to(self.device).float().div_(255).sub_(mean).div_(std)
            yield x, self.labels[index].to(self.device)


@dataclass(frozen=True)
class Data:
    """A data set, split.

    Attributes:
        name: Its name in suites.
        train: Out of the training part, less val.
        val: Out of the training part, stratified by class; every choice is made on it.
        test: Decides nothing.
        classes: Number of classes.
        channels: Image channels.
        digest: SHA-256 over all images and labels as they come, before splitting and resizing.
    """

    name: str
    train: ImageSamples
    val: ImageSamples
    test: ImageSamples
    classes: int
    channels: int
    digest: str


@dataclass(frozen=True)
class _Source:
    """A data set before splitting: uint8 images ``[N, C, H, W]`` and labels ``[N]`` of its training and test parts."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    def digest(self) -> str:
        parts = hashlib.sha256()
        for images, labels in (self.train, self.test):
            parts.update(np.ascontiguousarray(images).tobytes())
            parts.update(np.ascontiguousarray(labels, dtype=np.int64).tobytes())
        return parts.hexdigest()


@functools.cache
def _digits() -> _Source:
    """scikit-learn's 1,797 scans of 8 x 8 pixels with 17 grey levels (UCI "Optical Recognition of Handwritten Digits").

    The set has no test part of its own: a quarter (450 scans), drawn once and the same for every seed, is ours.
    """
    bunch = load_digits()
    images = np.rint(bunch.images / 16 * 255).astype(np.uint8)[:, None]
    train, test = train_test_split(np.arange(len(images)), test_size=450, random_state=0, stratify=bunch.target)
    return _Source((images[train], bunch.target[train]), (images[test], bunch.target[test]))


SOURCES: dict[str, Callable[[], _Source]] = {"digits": _digits}


def names() -> list[str]:
    """Names of all data sets."""
    return sorted(SOURCES)


def load(name: str, size: int, *, seed: int = 0, val: float = 0.2, device: torch.device | str = "cpu") -> Data:
    """A data set at the size that a network wants.

    Args:
        name: One of ``names()``.
        size: Height and width in pixels; images are resampled bilinearly (antialiased) once.
        seed: Seeds the draw of val.
        val: Fraction of the training part that becomes val, stratified by class, in (0, 1).
        device: Where batches are made.

    Raises:
        UsageError: If the data set is unknown or a number is out of range.
    """
    if name not in SOURCES:
        raise UsageError(f"unknown dataset '{name}'{did_you_mean(name, SOURCES)}")
    if not 0 < val < 1:
        raise UsageError(f"val must be a fraction of the training data between 0 and 1, not {val}")
    if not 4 <= size <= 4096:
        raise UsageError(f"input size must lie between 4 and 4096 pixels, not {size}")
    source = SOURCES[name]()
    images, labels = source.train
    try:
        train_index, val_index = train_test_split(np.arange(len(labels)), test_size=val, random_state=seed, stratify=labels)
    except ValueError as error:
        raise UsageError(f"dataset '{name}' cannot be split with val = {val}, seed = {seed}: {error}") from error
    train_images = _resample(images[train_index], size)
    scaled = train_images.float() / 255
    mean = tuple(scaled.mean(dim=(0, 2, 3)).tolist())
    std = tuple(scaled.std(dim=(0, 2, 3)).tolist())

    def samples(x: Tensor, y: np.ndarray) -> ImageSamples:
        return ImageSamples(x, torch.from_numpy(y.astype(np.int64)), mean, std, torch.device(device))

    return Data(
        name=name,
        train=samples(train_images, labels[train_index]),
        val=samples(_resample(images[val_index], size), labels[val_index]),
        test=samples(_resample(source.test[0], size), source.test[1]),
        classes=int(max(labels.max(), source.test[1].max())) + 1,
        channels=images.shape[1],
        digest=source.digest(),
    )


def _resample(images: np.ndarray, size: int) -> Tensor:
    x = torch.from_numpy(images)
    if x.shape[-2:] == (size, size):
        return x
    resized = F.interpolate(x.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
