"""What must hold of neuron merging and of NMF by construction: checks of the claims M4 to M6, on
small networks in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn import decomposition
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from widthbench.baselines.nmf import NMF, non_negative, replaced

import widthbench
from widthbench.networks.models import create
from widthbench.randomness import seeded
from widthbench.width.certify import find_groups

SEEDS = range(5)


def planted(activation: str = "relu") -> list[float]:
    """Relative error of an MLP and of a LeNet-5 whose small channels are positive multiples of
    others, bias included.
    """
    errors = []
    for seed in SEEDS:
        for name, size in (("lenet_300_100", 12), ("lenet5", 20)):
            net = (
                create(name, classes=5, channels=1, size=size, seed=seed, act_layer=activation)
                .double()
                .eval()
            )
            for layer in [m for m in net.children() if isinstance(m, nn.Linear | nn.Conv2d)][:-1]:
                plant(layer, seed)
            errors.append(
                moved(
                    net,
                    torch.randn(8, 1, size, size, dtype=torch.float64, generator=generator(seed)),
                )
            )
    return errors


def shared() -> list[float]:
    """Relative error where all removed neurons are multiples of one kept neuron, each by a scale of
    its own.
    """
    errors = []
    for seed in SEEDS:
        with seeded(seed):
            net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        with torch.no_grad():
            for row, scale in enumerate((0.01, 0.002, 0.05, 0.03), 4):
                net[0].weight[row], net[0].bias[row] = (
                    scale * net[0].weight[1],
                    scale * net[0].bias[1],
                )
        errors.append(
            moved(net, torch.randn(16, 6, dtype=torch.float64, generator=generator(seed)))
        )
    return errors


def planted_with_batch_norm() -> list[float]:
    """Relative error of a convolutional network with BatchNorm, planted so that B = 0 and γ of a
    pair have one sign.
    """
    errors = []
    for seed in SEEDS:
        with seeded(seed):
            net = nn.Sequential(
                nn.Conv2d(3, 8, 3, bias=seed % 2 == 0),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 4, 3),
            )
        net = net.double().eval()
        plant_with_batch_norm(net[0], net[1], seed)
        x = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=generator(seed))
        errors.append(moved(net, x, bn_scale="derived"))
    return errors


def residual() -> list[float]:
    """``residuals`` of an untrained LeNet-300-100, whose weights anybody has."""
    return residuals(create("lenet_300_100", classes=10, channels=1, size=28, seed=0).eval())


def residuals(net: nn.Module, kept: Sequence[float] = (0.1, 0.2)) -> list[float]:
    """Relative difference of ``‖W₊ - Y Z‖`` between what nmf puts into a LeNet-300-100 and
    scikit-learn's own, by layer and width.

    scikit-learn's own is its defaults from random starts: the mean of three.
    """
    differences = []
    groups = find_groups(net, torch.zeros(1, 1, 28, 28))
    for name in groups:
        weights = non_negative(net, groups, name)
        for width in (round(share * len(weights)) for share in kept):
            mix, filters, _ = NMF().factorise(weights, width, seed=0)
            change = replaced(net, groups, name, mix, filters)
            tensors = [change.tensors[f"{name}.weight"], change.tensors[f"{name}.bias"][:, None]]
            product = change.mix @ torch.cat(tensors, dim=1).double()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                starts = [
                    decomposition.NMF(width, init="random", random_state=seed).fit(weights)
                    for seed in (1, 2, 3)
                ]
            own = np.mean([model.reconstruction_err_ for model in starts])
            differences.append(float(abs(np.linalg.norm(weights - product.numpy()) - own) / own))
    return differences


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(net: nn.Module, x: Tensor, **params: object) -> float:
    """How far the output moves, over its largest value, when half of all channels are merged
    away.
    """
    small = widthbench.apply(
        "neuron-merging", net, budget="channels:0.5", example_input=x[:1], threshold=0.99, **params
    )
    with torch.no_grad():
        before, after = net(x), small(x)
    return float((after - before).abs().max() / before.abs().max())


def plant(layer: nn.Module, seed: int) -> Tensor:
    """Make the second half of a layer's channels small positive multiples of the first, in random
    order; gives the scales.
    """
    half = len(layer.weight) // 2
    source = torch.randperm(half, generator=generator(seed))
    scale = 0.001 + 0.01 * torch.rand(half, generator=generator(seed), dtype=torch.float64)
    with torch.no_grad():
        layer.weight[half:] = layer.weight[source] * scale.view(-1, *[1] * (layer.weight.dim() - 1))
        if layer.bias is not None:
            layer.bias[half:] = layer.bias[source] * scale
    return scale


def plant_with_batch_norm(layer: nn.Module, norm: nn.Module, seed: int) -> None:
    """Plant a layer's second half, and draw a BatchNorm behind it whose biases then agree: B =
    0.
    """
    scale = plant(layer, seed)
    half = len(scale)
    source = torch.randperm(half, generator=generator(seed))
    draw = generator(seed + 1)
    with torch.no_grad():
        for tensor in (norm.weight, norm.running_var):
            tensor.copy_(0.5 + torch.rand(2 * half, generator=draw, dtype=torch.float64))
        sign = torch.where(torch.rand(half, generator=draw) < 0.3, -1.0, 1.0)
        norm.weight[:half] *= sign
        norm.weight[half:] *= sign[source]
        for tensor in (norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(2 * half, generator=draw, dtype=torch.float64))
    agree(norm, scale, source, layer.bias)


def agree(
    norm: nn.Module, scale: Tensor | float, source: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Set a BatchNorm's biases so that its second half gives S times its first where its inputs do
    so by ``scale``; gives S.
    """
    half = len(source)
    sigma = (norm.running_var + norm.eps).sqrt()
    mean = (
        norm.running_mean if bias is None else norm.running_mean - bias
    )  # of the layer before without its bias
    with torch.no_grad():
        shift = (
            scale * (mean[source] - sigma[source] * norm.bias[source] / norm.weight[source])
            - mean[half:]
        )
        norm.bias[half:] = -norm.weight[half:] / sigma[half:] * shift
        return scale * (norm.weight[half:] / norm.weight[source]) * (sigma[source] / sigma[half:])
