"""Batch-wise augmentation with one draw per sample, on the device where the batch is."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from widthbench.recipe import Recipe


@dataclass(frozen=True)
class Draws:
    """What is drawn for each sample of a batch; None for what a recipe does not ask for.

    Attributes:
        offsets: long ``[2, B]``: where the crop begins in the padded image, in pixels.
        mirrored: bool ``[B]``.
        centre: float ``[2, B]``: of the square that is cut out, in pixels.
    """

    offsets: Tensor | None = None
    mirrored: Tensor | None = None
    centre: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """All of them, in the order in which ``Draws`` takes them."""
        return [getattr(self, f.name) for f in fields(self)]

    def part(self, samples: slice, device: torch.device) -> Draws:
        """Those of some samples, on a device."""
        return Draws(*(None if t is None else t[..., samples].to(device) for t in self.tensors()))


def draw(recipe: Recipe, count: int, height: int, width: int, generator: torch.Generator) -> Draws:
    """Draw a batch's crops, flips and cutouts.

    Args:
        recipe: Its ``crop``, ``flip`` and ``cutout`` say what is drawn.
        count: Samples in the batch.
        height: Of an image, in pixels.
        width: Likewise.
        generator: On the CPU, so that the draws are the same on every device.
    """
    offsets = mirrored = centre = None
    if recipe.crop:
        offsets = torch.randint(0, 2 * recipe.crop + 1, (2, count), generator=generator)
    if recipe.flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
    if recipe.cutout:
        centre = torch.rand((2, count), generator=generator) * torch.tensor([[height], [width]])
    return Draws(offsets, mirrored, centre)


def augment(x: Tensor, recipe: Recipe, draws: Draws, *, fill: float = 0) -> Tensor:
    """Random crop, horizontal flip and cutout.

    Args:
        x: ``[B, C, H, W]``, of any dtype and on any device; it is left as it was.
        recipe: Its ``crop`` and ``cutout`` say how large.
        draws: What was drawn for these samples, on the same device.
        fill: Value of the padding and of what is cut out.

    Returns:
        ``[B, C, H, W]``.
    """
    height, width = x.shape[2:]
    if draws.offsets is not None:  # as torchvision's RandomCrop(size, padding)
        padded = F.pad(x, (recipe.crop,) * 4, value=fill)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, 2p+1, 2p+1, H, W]
        x = windows[torch.arange(len(x), device=x.device), :, draws.offsets[0], draws.offsets[1]]
    if draws.mirrored is not None:
        x = torch.where(draws.mirrored[:, None, None, None], x.flip(-1), x)
    if (
        draws.centre is not None
    ):  # DeVries and Taylor 2017: the centre may be any pixel, so that part may lie outside
        inside = [
            (torch.arange(size, device=x.device) + 0.5 - c[:, None]).abs() < recipe.cutout / 2
            for size, c in zip((height, width), draws.centre, strict=True)
        ]
        x = x.masked_fill(inside[0][:, None, :, None] & inside[1][:, None, None, :], fill)
    return x
