"""Data sets as seeded, stratified train / val / test splits: small ones in memory as bytes, others
read by workers.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from timm.data import create_transform
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from widthbench.data import sources
from widthbench.data.augmentation import Draws, augment, draw
from widthbench.errors import UsageError
from widthbench.randomness import seeded
from widthbench.recipe import Recipe

Part = Callable[[int], slice]
"""Which samples of a batch of so many belong to this process."""

# inside an engine's own worker Python would start anew, and import torch, for every pass over the
# data
FORK = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
CENTRE = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


class _Normalised:
    """Bytes to float batches on a device, augmented on the way."""

    parted: ClassVar[bool] = True  # batches() knows ``part``
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @functools.cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(t, device=self.device)[:, None, None] for t in (self.mean, self.std)
        )
        return mean, std

    def _finish(self, x: Tensor, recipe: Recipe | None, draws: Draws | None) -> Tensor:
        """uint8 ``[B, C, H, W]`` to normalised float32 on the device: ``(x / 255 - mean) /
        std``.
        """
        x = x.to(self.device, non_blocking=True)
        if recipe is not None and draws is not None:
            x = augment(x, recipe, draws)
        mean, std = self._scale
        return x.float().div_(255).sub_(mean).div_(std)


def _drawn(
    recipe: Recipe | None, generator: torch.Generator | None, count: int, height: int, width: int
) -> Draws | None:
    """A batch's draws, where the recipe augments."""
    if recipe is None or not recipe.augments:
        return None
    if generator is None:
        raise UsageError("augmentation draws at random: give batches() a generator with it")
    return draw(recipe, count, height, width, generator)


@dataclass(frozen=True)
class ImageSamples(_Normalised):
    """Labelled images in memory.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        labels: long ``[N]``.
        mean: Per-channel mean of images in [0, 1], subtracted from every batch.
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

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Recipe | None = None,
        part: Part | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised batches.

        Args:
            size: Samples per batch; the last one may be smaller.
            generator: Shuffles with it if given, and draws what the augmentation needs.
            augment: A recipe whose random crop, flip and cutout are applied, each sample with its
                own draw.
            part: Which samples of a batch of so many to yield (perhaps none), the others being
                other processes'; None: all.

        Yields:
            float32 ``x [B, C, H, W]`` and long ``y [B]`` on the device.

        Raises:
            UsageError: If the recipe asks for what only images read from files can have.
        """
        choices = self.choices(size, generator=generator, augment=augment)
        if part is None and self.device.type != "cpu":
            for index, draws in on_device(list(choices), self.device):
                yield self.at(index, augment, draws)
            return
        for whole, draws in choices:
            mine = slice(None) if part is None else part(len(whole))
            some = None if draws is None else draws.part(mine, self.device)
            yield self.at(whole[mine].to(self.device), augment, some)

    def choices(
        self, size: int, *, generator: torch.Generator | None = None, augment: Recipe | None = None
    ) -> Iterator[tuple[Tensor, Draws | None]]:
        """The samples of each batch of ``batches``, long ``[B]``, and what is drawn for them, on
        the CPU.
        """
        if augment is not None and augment.resized_crop:
            raise UsageError(
                "recipe: resized_crop is for images that are read from files; this set is in"
                " memory: use crop"
            )
        order = (
            torch.arange(len(self))
            if generator is None
            else torch.randperm(len(self), generator=generator)
        )
        height, width = self.images.shape[2:]
        for whole in order.split(size):
            yield whole, _drawn(augment, generator, len(whole), height, width)

    def at(
        self, index: Tensor, augment: Recipe | None = None, draws: Draws | None = None
    ) -> tuple[Tensor, Tensor]:
        """A batch, without a word from the host: samples and draws are on the device.

        Args:
            index: long ``[B]``.
            augment: As in ``batches``.
            draws: What was drawn for these samples.
        """
        return self._finish(self.images[index], augment, draws), self.labels[index]


def on_device(
    choices: Sequence[tuple[Tensor, Draws | None]], device: torch.device
) -> Iterator[tuple[Tensor, Draws | None]]:
    """The samples and draws of a pass's batches on a device, copied there all at once: a step need
    not wait for its own.
    """
    sizes = [len(index) for index, _ in choices]
    whole = torch.cat([index for index, _ in choices]).to(device).split(sizes)
    if choices[0][1] is None:
        yield from ((index, None) for index in whole)
        return
    kinds = zip(*(draws.tensors() for _, draws in choices if draws is not None), strict=True)
    there = [
        repeat(None) if some[0] is None else torch.cat(some, dim=-1).to(device).split(sizes, dim=-1)
        for some in kinds
    ]
    for index, *drawn in zip(whole, *there, strict=False):
        yield index, Draws(*drawn)


@dataclass(frozen=True)
class FileSamples(_Normalised):
    """Labelled images that workers read, decode and resize; every sample's random draws depend on
    the generator alone.

    Attributes:
        files: The whole part.
        index: Positions in it.
        size: Height and width in pixels.
        mean: As in ``ImageSamples``.
        std: As in ``ImageSamples``.
        interpolation: Of the resize.
        crop_pct: Share of the resized image's side that the centre crop keeps in evaluation.
        device: Where batches are made.
        workers: Processes that read; 0 reads in this one.
    """

    files: sources.Files
    index: np.ndarray
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    device: torch.device
    workers: int

    def __len__(self) -> int:
        return len(self.index)

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Recipe | None = None,
        part: Part | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``ImageSamples.batches``; with ``resized_crop`` in the recipe, a random resized crop
        while reading.
        """
        order, seed = torch.arange(len(self)), 0
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
            seed = int(torch.randint(2**62, (), generator=generator))
        wholes = order.split(size)
        workers = self.workers if len(self) > size else 0
        transform = self._transform(0 if augment is None else augment.resized_crop)
        loader = DataLoader(
            _Decoded(self.files, self.index, transform, seed),
            batch_sampler=_Batches(wholes, part),
            num_workers=workers,
            multiprocessing_context=FORK if workers else None,
            generator=torch.Generator(),  # the workers' seeds must not draw on the global state
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        for whole in wholes:
            mine = slice(None) if part is None else part(len(whole))
            try:
                x, y = (
                    next(batches)
                    if len(whole[mine])
                    else (torch.empty(0, 3, self.size, self.size), torch.empty(0).long())
                )
            except UsageError as error:  # torch wraps a worker's error in its traceback
                raise UsageError(str(error).rpartition("UsageError: ")[2].strip()) from None
            draws = _drawn(augment, generator, len(whole), self.size, self.size)
            some = None if draws is None else draws.part(mine, self.device)
            yield self._finish(x, augment, some), y.to(self.device)

    def _transform(self, least_area: float) -> Any:
        common: dict[str, Any] = {
            "input_size": self.size,
            "interpolation": self.interpolation,
            "use_prefetcher": True,  # bytes, not floats: normalised on the device
        }
        if not least_area:
            return create_transform(**common, is_training=False, crop_pct=self.crop_pct)
        return create_transform(
            **common, is_training=True, scale=(least_area, 1.0), hflip=0.0, color_jitter=0.0
        )


class _Decoded(Dataset[tuple[Tensor, int]]):
    """Transformed images; each sample seeds its own random draws, so that the number of workers
    changes nothing.
    """

    def __init__(self, files: sources.Files, index: np.ndarray, transform: Any, seed: int) -> None:
        self.files, self.index, self.transform, self.seed = files, index, transform, seed

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        at = int(self.index[position])
        image = self.files.open(at)
        state = random.getstate()
        try:
            random.seed(
                self.seed + position
            )  # timm's transforms draw from Python's and torch's generators
            with seeded((self.seed + position) % 2**63, gpu=False):
                x = torch.from_numpy(np.ascontiguousarray(self.transform(image)))
        finally:
            random.setstate(state)
        return x, int(self.files.labels[at])


class _Batches(Sampler[list[int]]):
    def __init__(self, wholes: Sequence[Tensor], part: Part | None) -> None:
        parts = [(whole if part is None else whole[part(len(whole))]).tolist() for whole in wholes]
        self.parts = [p for p in parts if p]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class Data:
    """A data set, split.

    Attributes:
        name: Its name in suites.
        train: Out of the training part, less val.
        val: Out of the training part, stratified by class; every choice is made on it. Empty if
            nothing is held out.
        test: Decides nothing.
        classes: Number of classes.
        channels: Image channels.
        digest: SHA-256 of the source, before splitting and resizing.
    """

    name: str
    train: ImageSamples | FileSamples
    val: ImageSamples | FileSamples
    test: ImageSamples | FileSamples
    classes: int
    channels: int
    digest: str


def load(
    name: str,
    size: int,
    *,
    seed: int = 0,
    val: float = 0.2,
    device: torch.device | str = "cpu",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    view: dict[str, Any] | None = None,
) -> Data:
    """A data set at the size that a network wants.

    Args:
        name: A known one (``widthbench data`` lists them) or a folder where data are looked for.
        size: Height and width in pixels; images in memory are resampled bilinearly (antialiased)
            once.
        seed: Seeds the draw of val.
        val: Fraction of the training part that becomes val, stratified by class; 0 holds nothing
            out.
        device: Where batches are made.
        mean: Per-channel mean to normalise with; that of the training images if empty.
        std: Per-channel standard deviation likewise.
        view: ``mean``, ``std``, ``interpolation`` and ``crop_pct`` for images that are read from
            files, as timm's ``resolve_data_config`` gives them.

    Raises:
        UsageError: If the data set is unknown, absent or damaged, or a number is out of range.
    """
    if not 0 <= val < 1:
        raise UsageError(f"val must be a fraction of the training data in [0, 1), not {val}")
    if not 4 <= size <= 4096:
        raise UsageError(f"input size must lie between 4 and 4096 pixels, not {size}")
    source = sources.load(name)
    if len(mean) != len(std) or (mean and len(mean) != source.channels):
        raise UsageError(
            f"dataset '{name}' has {source.channels} channel(s): mean and std need"
            f" {source.channels} number(s) each, not {len(mean)} and {len(std)}"
        )
    labels = np.asarray(source.train.labels)
    train_index, val_index = np.arange(len(labels)), np.arange(0)
    if val:
        try:
            train_index, val_index = train_test_split(
                train_index, test_size=val, random_state=seed, stratify=labels
            )
        except ValueError as error:
            raise UsageError(
                f"dataset '{name}' cannot be split with val = {val}, seed = {seed}: {error}"
            ) from error
    everything = np.arange(len(source.test))
    parts = ((source.train, train_index), (source.train, val_index), (source.test, everything))
    at = torch.device(device)
    made: Sequence[ImageSamples | FileSamples]
    if isinstance(source.train, sources.Arrays):
        made = _from_arrays(parts, size, tuple(mean), tuple(std), at)
    else:
        made = _from_files(parts, size, {**CENTRE, **(view or {})}, tuple(mean), tuple(std), at)
    train, held_out, test = made
    return Data(name, train, held_out, test, source.classes, source.channels, source.digest)


def _from_arrays(
    parts: Any, size: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> list[ImageSamples]:
    tensors = [
        (_resample(a.images[torch.from_numpy(i)], size), a.labels[torch.from_numpy(i)])
        for a, i in parts
    ]
    if not mean:
        scaled = tensors[0][0].float() / 255
        mean, std = (
            tuple(scaled.mean(dim=(0, 2, 3)).tolist()),
            tuple(scaled.std(dim=(0, 2, 3)).tolist()),
        )
    return [ImageSamples(x.to(device), y.to(device), mean, std, device) for x, y in tensors]


def _from_files(
    parts: Any,
    size: int,
    view: dict[str, Any],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> list[FileSamples]:
    mean, std = mean or tuple(view["mean"]), std or tuple(view["std"])
    workers = min(8, os.cpu_count() or 1)
    return [
        FileSamples(
            files, index, size, mean, std, view["interpolation"], view["crop_pct"], device, workers
        )
        for files, index in parts
    ]


def _resample(x: Tensor, size: int) -> Tensor:
    if x.shape[-2:] == (size, size):
        return x
    resized = F.interpolate(
        x.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.round_().clamp_(0, 255).to(torch.uint8)
