"""Pairs of channels: by which factor a kept channel can stand in for a removed one, after every
layer between producer and consumers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from widthbench.errors import UsageError
from widthbench.width.groups import Groups
from widthbench.width.layers import kind_of
from widthbench.width.norms import (
    Norm,
    affines_of,
    bias_of,
    filter_rows,
    norm_behind,
    norm_of,
    weight_and_bias,
)


@dataclass
class Pairs:
    """What merging each removed channel n into each kept channel p would do, ``[R, P]``, all
    float64.

    Attributes:
        removed: ``[R]``.
        kept: ``[P]``.
        cosine: Of their filters.
        ratio: s, the ratio of their norms.
        scale: S, the factor on p's output; NaN where the pair is impossible.
        mismatch: The size of B, what then remains of n's output.
    """

    removed: Tensor
    kept: Tensor
    cosine: Tensor
    ratio: Tensor
    scale: Tensor
    mismatch: Tensor

    @classmethod
    def of(cls, factors: list[Tensor], removed: Tensor, kept: Tensor) -> Pairs:
        """From the filters that make the channels."""
        cosine = ratio = torch.ones((), dtype=torch.float64, device=factors[0].device)
        for rows in factors:
            c, s = _compared(rows, removed, kept)
            cosine, ratio = cosine * c, ratio * s
        return cls(removed, kept, cosine, ratio, ratio, torch.zeros_like(ratio))

    def through_depthwise(self, rows: Tensor, bias: Tensor, *, opposite: bool) -> Pairs:
        """After a depthwise convolution: filters ``[N, D]``, bias ``[N]``, zero where a norm
        follows. ``opposite``: accept pairs of filters of opposite sign, which no activation in
        between preserves.
        """
        c, s = _compared(rows, self.removed, self.kept)
        scale = self.scale * s
        if not opposite:
            scale = scale.where((self.cosine > 0) & (c > 0), math.nan)
        n, p = pair(bias, self.removed, self.kept)
        carried = self.mismatch * rows.sum(dim=1)[self.removed, None].abs()
        return replace(
            self,
            cosine=self.cosine * c,
            ratio=self.ratio * s,
            scale=scale,
            mismatch=carried + (n - scale * p).abs(),
        )

    def through_affine(self, scale: Tensor, shift: Tensor) -> Pairs:
        """After ``y = a x + b``, ``[N]`` each: frozen norms, layer-scales, the affine of a norm
        across channels.
        """
        (an, ap), (bn, bp) = (pair(v, self.removed, self.kept) for v in (scale, shift))
        new = self.scale * an / ap
        return replace(
            self,
            scale=new.where(new > 0, math.nan),
            mismatch=self.mismatch * an.abs() + (bn - new * bp).abs(),
        )


ThroughNorm = Callable[[Pairs, Norm], Pairs]


def compare(
    model: nn.Module,
    groups: Groups,
    name: str,
    removed: Tensor,
    kept: Tensor,
    through_norm: ThroughNorm,
    *,
    opposite: bool,
) -> Pairs:
    """What merging each of the channels ``removed [R]`` into each of ``kept [P]`` would do.

    Where several norms read the channels side by side (DenseNet; a residual stream before each
    block), the means over them. Where an addition joins several producers, the norms right behind
    the producers are folded into the filters, which are then compared side by side.

    Args:
        model: The network.
        groups: Its groups.
        name: Of the group.
        removed: ``[R]``.
        kept: ``[P]``.
        through_norm: What a BatchNorm makes of pairs.
        opposite: As in ``Pairs.through_depthwise``.

    Raises:
        UsageError: If an affine of the group cannot be folded.
    """
    group = groups[name]
    if group.inner:
        first, *others = groups.sources(name)
        factors = [
            filter_rows(model, groups, name, first),
            *(filter_rows(model, groups, name, p, fold=True) for p in others),
        ]
        ways = [way[1:] for way in groups.paths(name, [first])]
    else:
        factors = [
            torch.cat(
                [filter_rows(model, groups, name, p, fold=True) for p in group.producers], dim=1
            )
        ]
        folded = {norm_behind(groups, p) for p in group.producers}
        reading = [r for r in group.riders if normed(model, [r]) and r not in folded]
        ways = list(groups.paths(name, reading))
        passed = {layer for way in ways for layer in way}
        if any(
            {*group.producers, *group.riders} & set(groups.behind[c]) - passed
            for c in group.consumers
        ):
            ways.append(())  # some consumers read the sum itself
    affines = affines_of(model, groups, name)
    if isinstance(affines, str):
        raise UsageError(f"channel group '{name}': {affines}")
    by_way = []
    for way in ways:
        pairs = Pairs.of(factors, removed, kept)
        for layer in way:
            kind = kind_of(model.get_submodule(layer))
            if kind == "depthwise":
                rows = filter_rows(model, groups, name, layer, bias=False)
                bias = bias_of(model, groups, name, layer) * (norm_behind(groups, layer) is None)
                pairs = pairs.through_depthwise(rows, bias, opposite=opposite)
            elif kind == "batchnorm":
                pairs = through_norm(pairs, norm_of(model, groups, name, layer))
            elif kind == "channelnorm":
                pairs = pairs.through_affine(*weight_and_bias(model, groups, name, layer))
        for affine in affines.values():
            pairs = pairs.through_affine(*affine)
        by_way.append(pairs)
    mean = {
        k: torch.stack([getattr(p, k) for p in by_way]).mean(dim=0)
        for k in ("cosine", "ratio", "scale", "mismatch")
    }
    return Pairs(removed, kept, **mean)


def normed(model: nn.Module, layers: Iterable[str]) -> bool:
    """Whether one of some layers is a BatchNorm."""
    return any(kind_of(model.get_submodule(layer)) == "batchnorm" for layer in layers)


def _compared(rows: Tensor, removed: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines, and ratios of norms ``‖w_n‖ / ‖w_p‖``, ``[R, P]``; the cosine with a zero filter is
    0.
    """
    norms = rows.norm(dim=1)
    n, p = pair(norms, removed, kept)
    return (rows[removed] @ rows[kept].T / (n * p)).nan_to_num(0.0), n / p


def pair(values: Tensor, removed: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``[N]`` of the removed and of the kept channels, to be broadcast to ``[R, P]``."""
    return values[removed][:, None], values[kept]
