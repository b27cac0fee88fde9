"""Neuron merging: what a removed channel did is given to the kept channel that is most like it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from widthbench.errors import UsageError
from widthbench.technique.base import Outcome, ScoredTechnique
from widthbench.technique.task import State, Task
from widthbench.width.groups import Groups
from widthbench.width.layers import kind_of
from widthbench.width.norms import (
    Norm,
    affines_of,
    bias_of,
    filter_rows,
    norm_behind,
    norm_of,
    passed_by,
    weight_and_bias,
)
from widthbench.width.resize import Resize

Criterion = Literal["l1", "l2", "geometric-median"]
BnScale = Literal["released", "derived"]


class NeuronMerging(ScoredTechnique):
    """Remove channels by a criterion, then merge each into its most similar kept one (Kim et al.,
    NeurIPS 2020).

    With W ≈ Y Z, Y the kept filters and Z ``[P, N]`` = mixᵀ, the consumers absorb Z: exact under
    ReLU if Z is non-negative with at most one positive entry per column (Theorem 1, Corollary 1.1).
    MostSim (algorithm 2) gives removed filter ``w_n`` to ``p = argmax cos(w_n, w_p)`` with the
    scale ``s = ‖w_n‖ / ‖w_p‖`` if that cosine is at least t, else to none. Where a layer has a bias
    and no norm, the bias is one more weight.

    A per-channel affine ``y = a x + b`` that is no BatchNorm (frozen norms, layer-scales) takes s
    to ``s a_n / a_p``; a tensor that rides along and is none is refused.

    With BatchNorm, ``p = argmin λ(1 - cos) + (1 - λ) B̂``, B̂ the mismatch of biases scaled to [0,
    1] over the candidates. With σ = √(var + eps), ``w_n = s w_p`` gives ``y_n = S y_p + B``
    (section 3.3):

    - derived: ``S = s (γ_n/γ_p)(σ_p/σ_n)``, ``B = (γ_n/σ_n)(s(μ_p - σ_p β_p/γ_p) - μ_n) + β_n``;
    - released: what the published code computes, variances v in the place of σ and the two
      channels' roles exchanged, ``S = s (γ_p/γ_n)(v_n/v_p)``, ``B = ((γ_p/v_p)(s(μ_n - v_n β_n/γ_n)
      - μ_p) + β_p) / S``.

    A depthwise convolution behind the producer makes one filter with it, their outer product
    (author response, reviewer 3): cosines and norms multiply; "released" looks at the last norm
    alone, "derived" at each in turn. In "derived" a pair needs S > 0; the published code asks for
    no sign, so that channels whose γ differ in sign get negative scales, which Theorem 1 does not
    cover.

    Args:
        criterion: What is kept: the largest L1 or L2 norms, or the largest sums of distances to all
            others (geometric median).
        bn_scale: "released" reproduces the paper's tables; "derived" is exact for filters that are
            multiples of each other.
        threshold: t; None takes the published settings, 0.45 without BatchNorm and 0.1 with it.
        lam: λ in [0, 1], the weight of the cosine against that of the biases.
        merge: False prunes by the same criterion and merges nothing: the control of the paper's
            tables.
        allocation: As in ``ScoredTechnique``.
    """

    id = "neuron-merging"
    access = "none"
    bibtex = """@inproceedings{kim2020neuron,
  title = {Neuron Merging: Compensating for Pruned Neurons},
  author = {Kim, Woojeong and Kim, Suhyun and Park, Mincheol and Jeon, Geonseok},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}"""

    criterion: Criterion = "l1"
    bn_scale: BnScale = "released"
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None  # a cosine
    lam: Annotated[float, Field(ge=0, le=1)] = 0.85
    merge: bool = True

    def skip(self, task: Task) -> str | None:
        """What the algebra does not cover, if channels are to be merged: statistics outside the
        weights, other bare tensors.
        """
        if not self.merge:
            return None
        for rider in {rider for group in task.groups.values() for rider in group.riders}:
            module = task.model.get_submodule(rider)
            if kind_of(module) == "batchnorm" and module.running_var is None:
                return f"layer {rider} ({type(module).__name__}) keeps no running statistics"
        for name in task.groups:
            if isinstance(affines := affines_of(task.model, task.groups, name), str):
                return (
                    f"channel group '{name}': {affines}, so that nothing can be merged there (leave"
                    " it out by include)"
                )
            for owner in affines:
                if why := passed_by(task.model, task.groups, name, owner, task.example_input):
                    return f"channel group '{name}': {why}"
        return None

    def score(self, task: Task) -> dict[str, Tensor]:
        """From the original weights of every layer."""
        return {
            name: score(filters(task.model, task.groups, name), self.criterion)
            for name in task.groups
        }

    def decide(self, task: Task, state: State) -> Outcome:
        """Keep the best within the budget, and merge the others into them."""
        plan = self.chosen(task, state)
        if self.merge:
            plan = {n: self.merged(task.model, task.groups, n, r.rows) for n, r in plan.items()}
        return Outcome(plan)

    def merged(self, model: nn.Module, groups: Groups, name: str, kept: Tensor) -> Resize:
        """The resize of one group that keeps the channels ``kept [P]`` and merges the others into
        them.
        """
        group = groups[name]
        removed = (
            torch.ones(group.channels, dtype=torch.bool)
            .index_fill(0, kept, False)
            .nonzero()
            .flatten()
        )
        pairs = compare(model, groups, name, removed, kept, self.bn_scale)
        same_block = (removed * group.blocks // group.channels)[
            :, None
        ] == kept * group.blocks // group.channels
        possible = (
            same_block.to(pairs.scale.device) & pairs.scale.isfinite() & pairs.mismatch.isfinite()
        )
        lam = self.lam if bool((pairs.mismatch != 0).any()) else 1.0
        badness = lam * (1 - pairs.cosine) + (1 - lam) * _rescaled(pairs.mismatch, possible)
        threshold = (
            self.threshold
            if self.threshold is not None
            else 0.1
            if _normed(model, group.riders)
            else 0.45
        )
        scale = pairs.scale.where(possible & (pairs.cosine >= threshold), 0)
        mix = scale.new_zeros(group.channels, len(kept))
        mix[kept, torch.arange(len(kept))] = 1
        if len(removed):
            best = badness.where(possible, math.inf).argmin(dim=1, keepdim=True)
            mix[removed] = torch.zeros_like(scale).scatter(1, best, scale.gather(1, best))
        return Resize(kept, mix)


def filters(model: nn.Module, groups: Groups, name: str) -> list[Tensor]:
    """The filter of each channel of a group as the factors of an outer product, ``[N, D]`` each.

    The producer, and the depthwise convolutions that its channels pass. Where an addition joins
    several producers, they are one factor, side by side; where they multiply, a factor each, but
    for the gates of squeeze-excite, which are left out.
    """
    if not groups[name].inner:
        return [
            torch.cat([filter_rows(model, groups, name, p) for p in groups[name].producers], dim=1)
        ]
    sources = groups.sources(name)
    way = groups.paths(name, sources)[0]
    depthwise = [layer for layer in way if kind_of(model.get_submodule(layer)) == "depthwise"]
    return [filter_rows(model, groups, name, p) for p in sources] + [
        filter_rows(model, groups, name, layer, bias=False) for layer in depthwise
    ]


def score(factors: list[Tensor], criterion: Criterion) -> Tensor:
    """What the criterion gives each channel, ``[N]``; higher is kept.

    Args:
        factors: ``[N, D]`` each, of an outer product: its norms are the products of theirs, its
            inner products likewise.
        criterion: "l1", "l2" or "geometric-median" (He et al., CVPR 2019): the sum of distances to
            all channels.
    """
    if criterion != "geometric-median":
        return torch.stack([f.norm(p=1 if criterion == "l1" else 2, dim=1) for f in factors]).prod(
            dim=0
        )
    gram = torch.stack([f @ f.T for f in factors]).prod(dim=0)
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp_min(0).sqrt().sum(dim=1)


@dataclass
class Pairs:
    """What merging each removed channel n into each kept channel p would do, ``[R, P]`` in float64
    each.

    Attributes:
        removed: ``[R]``.
        kept: ``[P]``.
        cosine: Of their filters.
        ratio: s, the ratio of their norms.
        scale: S, what p's output is to be multiplied by; NaN where the pair is impossible.
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

    def through_depthwise(self, rows: Tensor, bias: Tensor, bn_scale: BnScale) -> Pairs:
        """After a depthwise convolution: filters ``[N, D]``, and what its bias ``[N]`` adds where
        no norm takes it.
        """
        c, s = _compared(rows, self.removed, self.kept)
        scale = self.scale * s
        if (
            bn_scale == "derived"
        ):  # opposite filters are no multiples through the activation between them
            scale = scale.where((self.cosine > 0) & (c > 0), math.nan)
        n, p = _pair(bias, self.removed, self.kept)
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
        (an, ap), (bn, bp) = (_pair(v, self.removed, self.kept) for v in (scale, shift))
        new = self.scale * an / ap
        return replace(
            self,
            scale=new.where(new > 0, math.nan),
            mismatch=self.mismatch * an.abs() + (bn - new * bp).abs(),
        )

    def through_norm(self, norm: Norm, bn_scale: BnScale) -> Pairs:
        """After a BatchNorm, by the formulas of the class above."""
        (gn, gp), (bn, bp), (mn, mp), (vn, vp), (sn, sp) = (
            _pair(v, self.removed, self.kept)
            for v in (norm.gamma, norm.beta, norm.mean, norm.var, norm.sigma)
        )
        if bn_scale == "released":
            s = self.ratio
            scale = s * (gp / gn) * (vn / vp)
            rest = (gp / vp) * (s * (mn - vn * bn / gn) - mp) + bp
            return replace(self, scale=scale, mismatch=rest.abs() / scale)
        scale = self.scale * (gn / gp) * (sp / sn)
        rest = (gn / sn) * (self.scale * (mp - sp * bp / gp) - mn) + bn
        carried = self.mismatch * (gn / sn).abs()
        return replace(self, scale=scale.where(scale > 0, math.nan), mismatch=carried + rest.abs())


def compare(
    model: nn.Module, groups: Groups, name: str, removed: Tensor, kept: Tensor, bn_scale: BnScale
) -> Pairs:
    """What merging each of the channels ``removed [R]`` into each of ``kept [P]`` would do.

    Where several norms read the channels side by side (DenseNet; a residual stream before each
    block), the means over them. Where an addition joins several producers, the norms right behind
    those are folded and all are compared at once.
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
        reading = [r for r in group.riders if _normed(model, [r]) and r not in folded]
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
    found = []
    for way in ways:
        pairs = Pairs.of(factors, removed, kept)
        for layer in way:
            kind = kind_of(model.get_submodule(layer))
            if kind == "depthwise":
                rows = filter_rows(model, groups, name, layer, bias=False)
                bias = bias_of(model, groups, name, layer) * (norm_behind(groups, layer) is None)
                pairs = pairs.through_depthwise(rows, bias, bn_scale)
            elif kind == "batchnorm":
                pairs = pairs.through_norm(norm_of(model, groups, name, layer), bn_scale)
            elif kind == "channelnorm":
                pairs = pairs.through_affine(*weight_and_bias(model, groups, name, layer))
        for affine in affines.values():
            pairs = pairs.through_affine(*affine)
        found.append(pairs)
    mean = {
        k: torch.stack([getattr(p, k) for p in found]).mean(dim=0)
        for k in ("cosine", "ratio", "scale", "mismatch")
    }
    return Pairs(removed, kept, **mean)


def _normed(model: nn.Module, layers: Iterable[str]) -> bool:
    return any(kind_of(model.get_submodule(layer)) == "batchnorm" for layer in layers)


def _compared(rows: Tensor, removed: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines, and ratios of norms ``‖w_n‖ / ‖w_p‖``, ``[R, P]``; the cosine with a zero filter is
    0.
    """
    norms = rows.norm(dim=1)
    n, p = _pair(norms, removed, kept)
    return (rows[removed] @ rows[kept].T / (n * p)).nan_to_num(0.0), n / p


def _pair(values: Tensor, removed: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``[N]`` of the removed and of the kept channels, to be broadcast to ``[R, P]``."""
    return values[removed][:, None], values[kept]


def _rescaled(values: Tensor, possible: Tensor) -> Tensor:
    """Each row's possible values scaled to [0, 1]; 0 where they are all equal."""
    low = values.where(possible, math.inf).amin(dim=1, keepdim=True)
    high = values.where(possible, -math.inf).amax(dim=1, keepdim=True)
    return ((values - low) / (high - low)).nan_to_num(0.0)
