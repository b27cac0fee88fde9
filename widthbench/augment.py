"""Batch-wise augmentation with one draw per sample, on the device where the batch is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from widthbench.recipe import Recipe


def augment(
    x: Tensor, recipe: Recipe, generator: torch.Generator, *, fill: float = 0, of: tuple[int, slice] | None = None
) -> Tensor:  # fmt: skip
    """Random crop, horizontal flip and cutout, drawn for each sample of a batch.

    Args:
        x: ``[B, C, H, W]``, of any dtype and on any device; it is left as it was.
        recipe: Its ``crop``, ``flip`` and ``cutout`` say what is done.
        generator: On the CPU, so that the draws are the same on every device.
        fill: Value of the padding and of what is cut out.
        of: Where ``x`` is a part of a batch, the batch's size and which part: each sample's draws are those of the whole batch.

    Returns:
        ``[B, C, H, W]``.
    """
    height, width = x.shape[2:]
    count, part = of or (len(x), slice(None))
    if recipe.crop:  # as torchvision's RandomCrop(size, padding)
        pad = recipe.crop
        offsets = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)[:, part].to(x.device)
        windows = F.pad(x, (pad,) * 4, value=fill).unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, 2p+1, 2p+1, H, W]
        x = windows[torch.arange(len(x), device=x.device), :, offsets[0], offsets[1]]
    if recipe.flip:
        mirrored = (torch.rand(count, generator=generator)[part] < 0.5).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if recipe.cutout:  # DeVries and Taylor 2017: the square's centre may be any pixel, so that part of it may lie outside
        half = recipe.cutout / 2
        drawn = torch.rand((2, count), generator=generator)[:, part].to(x.device)
        centre = drawn * torch.tensor([[height], [width]], device=x.device)
        inside = [
            ((torch.arange(size, device=x.device) + 0.5 - c[:, None]).abs() < half)
            for size, c in zip((height, width), centre, strict=True)
        ]
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        x = x.masked_fill(hole, fill)
    return x
