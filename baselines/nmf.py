"""NMF: each layer's non-negative weights as a product of fewer new filters and a mixing matrix for
the next layer.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF as Factorisation
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from widthbench.technique.base import Outcome, Technique
from widthbench.technique.parameters import Count, NotNegative
from widthbench.technique.task import State, Task
from widthbench.width.groups import Groups
from widthbench.width.layers import kind_of
from widthbench.width.norms import filter_rows, norm_behind
from widthbench.width.resize import Resize


class NMF(Technique):
    """Factorise each layer's weights by non-negative matrix factorisation (Lee and Seung 1999).

    The alternative to MostSim that Kim et al. tried (author response to neuron merging, reviewer
    4): "we tried to decompose the weight using NMF algorithm by zeroizing negative weights".
    BatchNorm is folded in, the bias appended, negative entries become zero, and ``W₊ ≈ Y Z``,
    columns being channels: Y ``[D, P]`` are the new filters (a folded BatchNorm stays as the
    identity), the consumers absorb Z ``[P, N]``. Z is dense, so that nothing makes ``relu(Zᵀ Yᵀ
    x)`` equal ``Zᵀ relu(Yᵀ x)``. Convolutions are flattened to one row per channel.

    Args:
        iterations: The most that scikit-learn's coordinate descent may take; its own default.
        tolerance: Where it stops before: the violation of the optimality conditions over that at
            the start; its own default. With ``signed``: the relative fall of the error in a step.
        signed: Semi-NMF (Ding, Li and Jordan 2010) instead: W and Y keep their signs, Z alone is
            non-negative.
        spread: With ``signed``, what is added to the clusters that Z starts from. With 0 each
            channel stays a positive multiple of one filter, so that ReLU commutes with Z; Ding et
            al. add 0.2, with which Z gets dense (the public LeNet-300-100 at half its channels then
            scores 10 %, and 89 % with 0).
    """

    id = "nmf"
    access = "none"
    bibtex = """@article{lee1999learning,
  title = {Learning the parts of objects by non-negative matrix factorization},
  author = {Lee, Daniel D. and Seung, H. Sebastian},
  journal = {Nature},
  volume = {401},
  pages = {788--791},
  year = {1999}
}"""

    iterations: Count = 200
    tolerance: NotNegative = 1e-4
    signed: bool = False
    spread: NotNegative = 0.0

    def skip(self, task: Task) -> str | None:
        """The first group that cannot be factorised, and why."""
        for name in task.groups:
            if reason := obstacle(task.model, task.groups, name):
                return f"channel group '{name}': {reason}"
        return None

    def decide(self, task: Task, state: State) -> Outcome:
        """Factorise every group at its width, from a random start by the task's seed."""
        plan, residuals = {}, {}
        for name, width in task.widths().items():
            weights = folded(task.model, task.groups, name)
            if width == len(weights):
                continue
            mix, filters, residuals[name] = self.factorise(weights, width, task.seed)
            plan[name] = replaced(task.model, task.groups, name, mix, filters)
        shares = {f"residual {name}": [value] for name, value in residuals.items()}
        return Outcome(plan, series=shares)

    def factorise(
        self, weights: np.ndarray, width: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """``Wᵀ [N, D]`` as ``Zᵀ [N, P]`` times ``Yᵀ [P, D]``, and ``‖W - Y Z‖`` (Frobenius); W's
        negative entries are zeroed unless signs are kept.
        """
        if self.signed:
            return semi_nmf(weights, width, seed, self.spread, self.iterations, self.tolerance)
        model = Factorisation(
            width, init="random", random_state=seed, max_iter=self.iterations, tol=self.tolerance
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are a parameter
            mix = model.fit_transform(np.maximum(weights, 0))
        return mix, model.components_, float(model.reconstruction_err_)


def obstacle(model: nn.Module, groups: Groups, name: str) -> str | None:
    """Why a group's weights are not one matrix whose factor can take their place; None if they
    are.
    """
    group = groups[name]
    if len(group.producers) > 1:
        return f"{len(group.producers)} layers make its channels"
    (producer,) = group.producers
    if group.blocks > 1:
        return f"its {group.blocks} blocks must not be mixed"
    if kind_of(model.get_submodule(producer)) == "transposed":
        return f"layer {producer} is a transposed convolution, which keeps its inputs first"
    norm = norm_behind(groups, producer)
    if norm is not None and model.get_submodule(norm).running_var is None:
        return f"layer {norm} keeps no running statistics that could be folded"
    if others := [rider for rider in group.riders if rider != norm]:
        return (
            f"layer {others[0]} ({kind_of(model.get_submodule(others[0]))}) rides along, which has"
            " no part in the factorisation"
        )
    if group.tensors:
        return f"tensor '{group.tensors[0]}' rides along, which has no part in the factorisation"
    return None


def folded(model: nn.Module, groups: Groups, name: str) -> np.ndarray:
    """``Wᵀ [N, D]``: one row per channel, BatchNorm folded, bias last."""
    rows = filter_rows(model, groups, name, groups[name].producers[0], fold=True)
    return rows.cpu().numpy()


def non_negative(model: nn.Module, groups: Groups, name: str) -> np.ndarray:
    """``W₊ᵀ [N, D]``: ``folded``, negative entries set to zero."""
    return np.maximum(folded(model, groups, name), 0)


def semi_nmf(
    weights: np.ndarray, width: int, seed: int, spread: float, iterations: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Semi-NMF by the multiplicative updates of Ding, Li and Jordan ("Convex and Semi-Nonnegative
    Matrix Factorizations", 2010, equations 10 and 11), from the clusters of k-means as there.

    Args:
        weights: ``Wᵀ [N, D]``, of any sign.
        width: P.
        seed: Of k-means.
        spread: Added to the clusters.
        iterations: The most updates.
        tolerance: Ends where the error falls by less, relative to itself.

    Returns:
        ``Zᵀ [N, P]``, not negative; ``Yᵀ [P, D]``; ``‖W - Y Z‖`` (Frobenius), which no update
        raises.
    """
    w = weights.astype(np.float64)
    clusters = KMeans(width, n_init=1, random_state=seed).fit_predict(w)
    z = np.eye(width)[clusters] + spread
    error = math.inf
    for _ in range(iterations):
        y = np.linalg.pinv(z) @ w
        before, error = error, float(np.linalg.norm(w - z @ y))
        if before - error <= tolerance * error:
            break
        up, square = w @ y.T, y @ y.T
        positive = np.maximum(up, 0) + z @ np.maximum(-square, 0)
        negative = np.maximum(-up, 0) + z @ np.maximum(square, 0)
        z *= np.sqrt(positive / np.maximum(negative, 1e-12))
    y = np.linalg.pinv(z) @ w
    return z, y, float(np.linalg.norm(w - z @ y))


def replaced(
    model: nn.Module, groups: Groups, name: str, mix: np.ndarray, filters: np.ndarray
) -> Resize:
    """The resize that gives a group's producer the filters ``[P, D]`` and its consumers ``mix [N,
    P]``.
    """
    (producer,) = groups[name].producers
    layer: Any = model.get_submodule(producer)
    rows = torch.from_numpy(filters).to(layer.weight)
    size = layer.weight[0].numel()
    weights, bias = rows[:, :size], rows[:, size:].sum(dim=1)  # one column of biases, or none
    tensors = {f"{producer}.weight": weights.reshape(-1, *layer.weight.shape[1:])}
    norm = norm_behind(groups, producer)
    if layer.bias is not None:
        tensors[f"{producer}.bias"] = bias if norm is None else torch.zeros_like(bias)
    if norm is not None:  # the identity but for the bias
        module: Any = model.get_submodule(norm)
        ones = torch.ones_like(bias)
        if module.affine:
            values = {
                "weight": ones * math.sqrt(1 + module.eps),
                "bias": bias,
                "running_mean": 0 * ones,
                "running_var": ones,
            }
        else:
            values = {"running_mean": -bias, "running_var": ones * (1 - module.eps)}
        tensors |= {f"{norm}.{key}": value for key, value in values.items()}
    return Resize(torch.arange(len(rows)), torch.from_numpy(mix), tensors)
