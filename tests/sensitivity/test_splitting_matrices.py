import copy

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from widthbench.methods.splitting import split_neurons

from widthbench.errors import UsageError
from widthbench.networks import models
from widthbench.sensitivity.ablation import Sample, cross_entropy
from widthbench.sensitivity.splitting_matrices import (
    SplittingMatrices,
    neuron_parameters,
    splittable,
)
from widthbench.width import find_groups
from widthbench.width.proofs import randomised


class Smooth(nn.Module):
    """Every kind of neuron with a second derivative: a convolution with a bias, one with BatchNorm
    and a stride, linear ones."""

    size = (2, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2, self.bn2 = (
            nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(5),
        )
        self.pool = nn.AvgPool2d(2)
        self.fc1, self.fc2 = nn.Linear(20, 6), nn.Linear(6, 7, bias=False)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = torch.tanh(self.conv1(x))
        x = F.softplus(self.bn2(self.conv2(x)))
        x = F.gelu(self.fc1(self.pool(x).flatten(1)))
        return self.head(torch.sigmoid(self.fc2(x)))


class Kinked(nn.Module):
    """Piecewise linear activations, in place, one behind a BatchNorm."""

    size = (2, 6, 6)

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = (
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
        )
        self.conv2, self.act2 = nn.Conv2d(4, 3, 3), nn.LeakyReLU(0.1, inplace=True)
        self.fc1, self.act3 = nn.Linear(12, 6), nn.ReLU6(inplace=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.act2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.head(self.act3(self.fc1(x.flatten(1))))


def made(cls, count=7):
    torch.manual_seed(0)
    model = randomised(cls().eval(), seed=3)
    x = torch.randn(2, *cls.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, zoo.sample_for(x, count=count), find_groups(model, x, cache=False)


def mean_loss(model, sample):
    with torch.no_grad():
        return float(cross_entropy(model(sample.x), sample.y).mean())


def unit(shape, seed=0):
    return F.normalize(
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        dim=1,
    )


@pytest.mark.parametrize("name", ["conv1", "conv2", "fc1", "fc2"])
def test_splitting_changes_the_loss_as_the_matrix_says(name):
    model, sample, groups = made(Smooth)
    matrices = SplittingMatrices(model, groups, sample)
    assert set(matrices.neurons) == {"conv1", "conv2", "fc1", "fc2"}
    assert matrices.left_out == {}
    before = mean_loss(model, sample)
    assert matrices.loss == pytest.approx(before)
    vectors = unit(matrices.parameters(name).shape)
    expected = (vectors * matrices.product({name: vectors})[name]).sum(dim=1) / 2
    for row in range(len(vectors)):
        found = []
        for epsilon in (2e-3, 1e-3):
            one = {name: (torch.tensor([row]), vectors[row : row + 1])}
            found.append(
                (mean_loss(split_neurons(model, groups, one, epsilon), sample) - before)
                / epsilon**2
            )
        extrapolated = (4 * found[1] - found[0]) / 3  # the change is even in ε
        assert float(expected[row]) == pytest.approx(extrapolated, rel=1e-4, abs=1e-8)


def formed_by_hand(model, sample, name, layer, beta):
    """S of a linear layer in front of ReLU, from its definition."""
    z, a = {}, {}
    hooks = [
        layer.register_forward_hook(lambda m, i, out: z.update(x=i[0].detach(), z=out.detach()))
    ]
    act = dict(model.named_modules())[name]
    hooks.append(act.register_forward_hook(lambda m, i, out: a.update(a=out)))
    loss = F.cross_entropy(model(sample.x), sample.y)
    (slope,) = torch.autograd.grad(loss, a["a"])
    for hook in hooks:
        hook.remove()
    s = torch.sigmoid(beta * z["z"])
    x = torch.cat([z["x"], torch.ones(len(z["x"]), 1, dtype=torch.float64)], dim=1)
    return torch.einsum("bn,bi,bj->nij", slope * beta * s * (1 - s), x, x)


def test_relu_bends_as_softplus():
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
        .double()
        .eval()
    )
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3
    groups = find_groups(model, x[:1], cache=False)
    for beta in (3.0, 1.0):
        matrices = SplittingMatrices(model, groups, Sample(x, y), softplus_beta=beta)
        for name, act in (("0", "1"), ("2", "3")):
            expected = formed_by_hand(model, Sample(x, y), act, model.get_submodule(name), beta)
            assert zoo.error(matrices.exact(name), expected) < 1e-12


@pytest.mark.parametrize("cls", [Smooth, Kinked])
def test_products_are_those_with_the_formed_matrices(cls):
    model, sample, groups = made(cls)
    matrices = SplittingMatrices(model, groups, sample)
    assert len(matrices.neurons) == len(groups)
    vectors = {n: unit(matrices.parameters(n).shape, i) for i, n in enumerate(matrices.neurons)}
    products = matrices.product(vectors)
    for name, v in vectors.items():
        formed = matrices.exact(name)
        assert zoo.error(formed, formed.transpose(1, 2)) < 1e-12
        assert zoo.error(products[name], torch.einsum("nij,nj->ni", formed, v)) < 1e-10
        rows = torch.tensor([2, 0])
        some = matrices.product({name: v[rows]}, {name: rows})[name]
        assert zoo.error(some, products[name][rows]) < 1e-10


def test_leaky_and_capped_kinks_are_sums_of_relus():
    model, sample, groups = made(Kinked)
    matrices = SplittingMatrices(model, groups, sample)
    assert matrices.neurons["conv1"].kinks == ((0.0, 1.0),)
    assert matrices.neurons["conv2"].kinks == ((0.0, 0.9),)
    assert matrices.neurons["fc1"].kinks == ((0.0, 1.0), (6.0, -1.0))


@pytest.mark.parametrize("cls", [Smooth, Kinked])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_least_eigenpairs_are_the_exact_ones(cls, tolerance):
    model, sample, groups = made(cls, count=20)
    matrices = SplittingMatrices(model, groups, sample)
    values, vectors = matrices.smallest(tolerance=tolerance)
    for name in matrices.neurons:
        formed = matrices.exact(name)
        size = torch.linalg.eigvalsh(formed).abs().amax(dim=1)
        exact, _ = matrices.smallest_exactly(name)
        assert float(((values[name] - exact).abs() / size).max()) <= tolerance
        assert torch.allclose(
            vectors[name].norm(dim=1), torch.ones(len(exact), dtype=torch.float64)
        )
        quotient = torch.einsum("ni,nij,nj->n", vectors[name], formed, vectors[name])
        assert float(((quotient - exact).abs() / size).max()) <= tolerance


@pytest.mark.parametrize(
    ("model", "size", "channels"), [("lenet5", 28, 1), ("test_resnet", 32, 3), ("test_vit", 32, 3)]
)
def test_least_eigenvalues_of_real_networks_in_float32(model, size, channels):
    net = models.create(model, classes=10, channels=channels, size=size, seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(32, channels, size, size, generator=draw),
        torch.randint(0, 10, (32,), generator=draw),
    )
    groups = find_groups(net, x[:1]).select("inner")
    matrices = SplittingMatrices(net, groups, Sample(x, y))
    values, _ = matrices.smallest()
    small = [n for n in matrices.neurons if matrices.parameters(n).shape[1] <= 600]
    assert len(small) >= 2
    for name in small:
        size_of = torch.linalg.eigvalsh(matrices.exact(name)).abs().amax(dim=1).clamp_min(1e-30)
        exact, _ = matrices.smallest_exactly(name)
        assert float(((values[name] - exact).abs() / size_of).max()) <= 1e-3, name


def test_a_dead_neuron_has_nothing_to_gain():
    model, sample, groups = made(Kinked)
    model.head.weight.data[:, 2] = 0  # no derivative reaches neuron 2 of fc1
    values, vectors = SplittingMatrices(model, groups, sample).smallest()
    assert values["fc1"][2] == 0
    assert float(vectors["fc1"][2].norm()) == pytest.approx(1)


@pytest.mark.parametrize("cls", [Smooth, Kinked, *zoo.EXACT])
def test_at_epsilon_0_the_output_stays(cls):
    model, sample, groups = made(cls)
    found, _ = splittable(model, groups, sample.x[:1])
    split = {
        n: (
            torch.tensor([0, groups[n].channels - 1]),
            unit((2, neuron_parameters(model.get_submodule(f.layer)).shape[1])),
        )
        for n, f in found.items()
    }
    with torch.no_grad():
        assert (
            zoo.error(split_neurons(model, groups, split, 0.0)(sample.x), model(sample.x)) < 1e-12
        )
        if split:
            assert (
                zoo.error(split_neurons(model, groups, split, 0.1)(sample.x), model(sample.x))
                > 1e-6
            )


def test_what_cannot_be_split_is_named():
    reasons = {}
    for cls in (zoo.Mlp, zoo.Dense, zoo.Grouped, zoo.Residual):
        model, sample, groups = made(cls)
        reasons |= splittable(model, groups, sample.x[:1])[1]
    assert "no elementwise activation" in reasons["fc2"]  # PReLU has a slope of its own per channel
    assert "'cat'" in reasons["b"]
    assert "3 blocks" in reasons["conv1"]
    assert "no linear layer or ordinary convolution" in reasons["conv2"]
    assert "layers make its channels" in reasons["stem"]


def test_the_model_is_left_alone_and_one_that_cannot_be_traced_is_named():
    model, sample, groups = made(Kinked)
    before = copy.deepcopy(model.state_dict())
    SplittingMatrices(model, groups, sample).smallest()
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert model.act1.inplace

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x) if x.sum() > -1 else self.b(-x)

    net = Branching().eval()
    with pytest.raises(UsageError, match="cannot be traced"):
        splittable(net, find_groups(net, torch.randn(1, 4), cache=False), torch.randn(1, 4))


def test_the_bill():
    model, sample, groups = made(Smooth)
    matrices = SplittingMatrices(model, groups, sample)
    passed = matrices.forward_macs, matrices.backward_macs
    assert passed[0] == 7 * (64 * 4 * 18 + 16 * 5 * 36 + 20 * 6 + 6 * 7 + 7 * 5)
    assert passed[1] == 7 * (
        16 * 5 * 36 + 20 * 6 + 6 * 7 + 7 * 5
    )  # by activations only, back to the first layer's
    matrices.product({"fc1": unit((6, 21))})
    assert matrices.backward_macs - passed[1] == 2 * 7 * 6 * 21
    matrices.product({"conv1": unit((4, 19))})
    assert matrices.backward_macs - passed[1] == 2 * 7 * 6 * 21 + 2 * 7 * 64 * 4 * 19
