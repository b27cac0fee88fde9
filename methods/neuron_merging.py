"""Neuron merging: what a removed channel did is given to the kept channel that is most like it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from widthbench.sensitivity.pairs import Pairs, normed, pair
from widthbench.sensitivity.pairs import compare as pairs_of
from widthbench.technique.base import Outcome, ScoredTechnique
from widthbench.technique.task import State, Task
from widthbench.width.groups import Groups
from widthbench.width.layers import kind_of
from widthbench.width.norms import Norm, affines_of, filter_rows, passed_by
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
        whole = torch.ones(group.channels, dtype=torch.bool)
        removed = whole.index_fill(0, kept, False).nonzero().flatten()
        pairs = compare(model, groups, name, removed, kept, self.bn_scale)
        block_n, block_p = (rows * group.blocks // group.channels for rows in (removed, kept))
        same_block = (block_n[:, None] == block_p).to(pairs.scale.device)
        possible = same_block & pairs.scale.isfinite() & pairs.mismatch.isfinite()
        # without a norm all mismatches are 0, and rescaled they would be noise
        lam = self.lam if bool((pairs.mismatch != 0).any()) else 1.0
        badness = lam * (1 - pairs.cosine) + (1 - lam) * _rescaled(pairs.mismatch, possible)
        published_threshold = 0.1 if normed(model, group.riders) else 0.45
        threshold = published_threshold if self.threshold is None else self.threshold
        scale = pairs.scale.where(possible & (pairs.cosine >= threshold), 0)
        mix = scale.new_zeros(group.channels, len(kept))
        mix[kept, torch.arange(len(kept))] = 1
        if len(removed):
            # rows without a possible partner stay 0, since their scale is
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


def compare(
    model: nn.Module, groups: Groups, name: str, removed: Tensor, kept: Tensor, bn_scale: BnScale
) -> Pairs:
    """What merging each of the channels ``removed [R]`` into each of ``kept [P]`` would do."""
    through = partial(through_norm, bn_scale=bn_scale)
    opposite = bn_scale == "released"
    return pairs_of(model, groups, name, removed, kept, through, opposite=opposite)


def through_norm(pairs: Pairs, norm: Norm, bn_scale: BnScale) -> Pairs:
    """Pairs behind a BatchNorm, by the formulas of the class above."""
    (gn, gp), (bn, bp), (mn, mp), (vn, vp), (sn, sp) = (
        pair(v, pairs.removed, pairs.kept)
        for v in (norm.gamma, norm.beta, norm.mean, norm.var, norm.sigma)
    )
    if bn_scale == "released":
        s = pairs.ratio
        scale = s * (gp / gn) * (vn / vp)
        rest = (gp / vp) * (s * (mn - vn * bn / gn) - mp) + bp
        # negative where S is, as in the published code: such pairs look better than they are
        return replace(pairs, scale=scale, mismatch=rest.abs() / scale)
    scale = pairs.scale * (gn / gp) * (sp / sn)
    rest = (gn / sn) * (pairs.scale * (mp - sp * bp / gp) - mn) + bn
    carried = pairs.mismatch * (gn / sn).abs()
    return replace(pairs, scale=scale.where(scale > 0, math.nan), mismatch=carried + rest.abs())


def _rescaled(values: Tensor, possible: Tensor) -> Tensor:
    """Each row's possible values scaled to [0, 1]; 0 where they are all equal."""
    low = values.where(possible, math.inf).amin(dim=1, keepdim=True)
    high = values.where(possible, -math.inf).amax(dim=1, keepdim=True)
    return ((values - low) / (high - low)).nan_to_num(0.0)
