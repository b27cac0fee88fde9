import copy
import operator

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

from widthbench.errors import UsageError
from widthbench.networks import models
from widthbench.sensitivity.ablation import Ablation, Sample
from widthbench.sensitivity.backprop_diagonal import BackpropDiagonal
from widthbench.sensitivity.derivatives import GateDerivatives, kinked
from widthbench.width import find_groups, gated
from widthbench.width.cost import count_macs


def energy(model, groups, sample, names):
    """The mean loss as a function of all gates, one vector each."""

    def value(*gates):
        with gated(model, groups, dict(zip(names, gates, strict=True))):
            return F.cross_entropy(model(sample.x), sample.y)

    return value


def test_first_derivatives_are_autograds_at_any_gates(net):
    model, x, groups = net
    sample, (gates, _) = zoo.sample_for(x), zoo.started(groups, x)
    work = GateDerivatives(model, groups, sample)
    found = work.first(gates)
    expected = torch.autograd.functional.jacobian(
        energy(model, groups, sample, list(groups)), tuple(gates.values())
    )
    assert all(
        torch.allclose(f, e, rtol=1e-10, atol=1e-13)
        for f, e in zip(found.values(), expected, strict=True)
    )
    assert work.forward_macs == len(sample) * count_macs(model, x)
    assert work.backward_macs > 0
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("memory_mib", [256.0, 0.02])
def test_exact_second_derivatives_are_the_diagonal_of_autograds_hessian(net, memory_mib):
    model, x, groups = net
    sample, (gates, candidates) = zoo.sample_for(x), zoo.started(groups, x)
    found = GateDerivatives(model, groups, sample, memory_mib=memory_mib).second(gates, candidates)
    value = energy(model, groups, sample, list(groups))
    hessian = torch.autograd.functional.hessian(value, tuple(gates.values()))
    for i, (name, d) in enumerate(found.items()):
        assert torch.allclose(
            d[candidates[name]], hessian[i][i].diagonal()[candidates[name]], rtol=1e-8, atol=1e-11
        )
        assert d[1].isnan()


def test_exact_second_derivatives_pass_attention():
    model = models.create("test_vit", classes=4, channels=3, size=32, seed=0).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    groups = find_groups(model, x[:1]).select()
    name = next(iter(groups))
    sample = Sample(x, torch.tensor([0, 3]))
    gates = {n: x.new_ones(g.channels) for n, g in groups.items()}
    some = {n: torch.arange(3 if n == name else 0) for n in groups}
    found = GateDerivatives(model, groups, sample).second(gates, some)[name][:3]
    step, brute = 1e-4, Ablation(model, groups, sample)
    up, down = (brute.losses({}, {name: torch.arange(3)}, 1 + s * step)[name] for s in (1, -1))
    assert torch.allclose(found, (up + down - 2 * brute.loss({})) / step**2, atol=1e-6)
    assert float(found.abs().max()) > 1e-5


def by_jacobians(layers, sample, gate_at, criterion):
    """The recursion with whole Jacobians, layer by layer, one sample at a time: ``[N]`` at the
    input of ``layers[gate_at]``."""
    total = 0
    for x, y in zip(sample.x, sample.y, strict=True):
        values = [x[None]]
        for layer in layers:
            values.append(layer(values[-1]))

        def loss_after(i, value, y=y):
            for layer in layers[i:]:
                value = layer(value)
            return criterion(value, y[None]).sum()

        h = torch.autograd.functional.hessian(lambda z: loss_after(len(layers), z), values[-1])
        h = h.reshape(values[-1].numel(), -1).diagonal()
        for i in reversed(range(gate_at, len(layers))):
            value = values[i]
            jacobian = torch.autograd.functional.jacobian(layers[i], value).reshape(
                -1, value.numel()
            )
            slope = torch.autograd.functional.jacobian(
                lambda v, i=i: loss_after(i + 1, v), values[i + 1]
            )
            h = jacobian.square().T @ h
            if kinkless(layers[i]):
                weighted = torch.autograd.functional.hessian(
                    lambda v, i=i, s=slope: (layers[i](v) * s).sum(), value
                )
                h = h + weighted.reshape(value.numel(), -1).diagonal()
        total = total + (values[gate_at].flatten().square() * h).reshape(
            values[gate_at].shape[1], -1
        ).sum(1)
    return total / len(sample)


def kinkless(layer):
    return not isinstance(
        layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d | nn.AvgPool2d | nn.MaxPool2d | nn.Flatten
    )


NETWORKS = {
    "mlp": (
        lambda: [nn.Linear(6, 7), nn.Sigmoid(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)],
        (6,),
    ),
    "conv": (
        lambda: [
            nn.Conv2d(2, 4, 3),
            nn.Tanh(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(6),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 5, 1),
            nn.Softplus(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(5, 3),
        ],
        (2, 10, 10),
    ),
}


@pytest.mark.parametrize(
    "criterion",
    [None, lambda z, y: (z - y[:, None].double()).pow(4).sum(1)],
    ids=["cross-entropy", "quartic"],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_back_propagated_diagonal_is_the_recursion(name, criterion):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = zoo.randomised(nn.Sequential(*make()).eval())
    x = torch.randn(5, *shape, dtype=torch.float64)
    sample = Sample(
        x, torch.randint(0, 3, (5,)), **({} if criterion is None else {"criterion": criterion})
    )
    groups = find_groups(model, x[:1], cache=False)
    gates = {n: x.new_ones(g.channels) for n, g in groups.items()}
    work = BackpropDiagonal(model, groups, sample)
    found = work.second(gates)
    layers = list(model)
    assert len(found) >= 2
    for group, d in found.items():
        (consumer,) = groups[group].consumers
        if group == "6":  # read through a flatten
            continue
        assert torch.allclose(
            d, by_jacobians(layers, sample, int(consumer), sample.criterion), rtol=1e-9, atol=1e-12
        )
    assert work.forward_macs == 5 * count_macs(model, x)


def test_a_closed_gate_cuts_what_lies_behind_it_out_of_the_diagonal():
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Linear(6, 7), nn.Sigmoid(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4))
        .double()
        .eval()
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    sample, groups = (
        Sample(x, torch.tensor([0, 1, 2, 3, 0])),
        find_groups(model, x[:1], cache=False),
    )
    shut = {"0": x.new_ones(7), "2": torch.tensor([1.0, 0, 1, 0, 1]).double()}
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut[4].weight[:, [1, 3]] = 0
    expected = BackpropDiagonal(cut, groups, sample).second(
        {n: torch.ones_like(g) for n, g in shut.items()}
    )
    assert torch.allclose(
        BackpropDiagonal(model, groups, sample).second(shut)["0"], expected["0"], rtol=1e-10
    )


def test_second_order_is_exact_on_a_quadratic():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Sigmoid(), nn.Linear(9, 4)).double().eval()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    sample = Sample(x, y, criterion=lambda z, t: (z - t).square().sum(1))
    groups, index = find_groups(model, x[:1], cache=False), {"0": torch.arange(9)}
    gates, brute = {"0": x.new_ones(9)}, Ablation(model, groups, sample)
    true = brute.losses(gates, index)["0"] - brute.loss(gates)
    work = GateDerivatives(model, groups, sample)
    for second in (
        work.second(gates, index)["0"],
        BackpropDiagonal(model, groups, sample).second(gates)["0"],
    ):
        assert torch.allclose(-work.first(gates)["0"] + 0.5 * second, true, rtol=1e-10)
        assert float((-work.first(gates)["0"] - true).abs().max()) > 0.01  # the first order is not


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_softplus_lends_relu_its_second_derivative(beta):
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4))
        .double()
        .eval()
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    sample, groups = (
        Sample(x, torch.tensor([0, 1, 2, 3, 0])),
        find_groups(model, x[:1], cache=False),
    )
    gates = {"0": x.new_ones(7), "2": x.new_ones(5)}
    found = BackpropDiagonal(model, groups, sample, softplus_beta=beta).second(gates)["0"]
    hidden = model[:2](x)
    a = model[2](hidden).detach().requires_grad_()
    slope = torch.autograd.grad(F.cross_entropy(model[4](F.relu(a)), sample.y, reduction="sum"), a)[
        0
    ]
    dy = torch.autograd.grad(
        F.cross_entropy(
            model[4](r := F.relu(a).detach().requires_grad_()), sample.y, reduction="sum"
        ),
        r,
    )[0]
    p = model[4:](F.relu(a)).softmax(1)
    h = (a > 0) * ((p * (1 - p)) @ model[4].weight.square())
    b = a.detach().requires_grad_()
    first = torch.autograd.grad(F.softplus(b, beta=beta).sum(), b, create_graph=True)[0]
    h = h + torch.autograd.grad(first.sum(), b)[0] * dy
    assert torch.allclose(
        found, (hidden.square() * (h @ model[2].weight.square())).mean(0), rtol=1e-9
    )
    assert torch.allclose(slope, (a > 0) * dy)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            nn.ReLU(),
            r"layer '3' \(ReLU\) has no second derivative: pass softplus_beta= .* or "
            r"diagonal='exact'",
        ),
        (
            nn.LeakyReLU(),
            r"layer '3' \(LeakyReLU\) has no second derivative; take diagonal='exact'",
        ),
        (nn.LayerNorm(5), r"no rule for layer '3' \(LayerNorm\): take diagonal='exact'"),
    ],
)
def test_layers_that_the_diagonal_cannot_pass_are_named(act, message):
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), act, nn.Linear(5, 4)).eval()
    x = torch.randn(2, 6)
    groups = find_groups(model, x)
    with pytest.raises(UsageError, match=message):
        BackpropDiagonal(model, groups, Sample(x, torch.tensor([0, 1])))
    behind = groups.select("all", "2") if "2" in groups and groups["2"].grade == "exact" else None
    if behind:  # nothing that bends lies behind the last group's gates
        BackpropDiagonal(model, behind, Sample(x, torch.tensor([0, 1])))


OVERWRITING = {
    "*=": operator.imul,
    "+=": operator.iadd,
    "silu by name": lambda a, b: torch.nn.functional.silu(a, inplace=True) + b,
    "relu by place": lambda a, b: torch.nn.functional.relu(a, True) + b,
}
PLAIN = {
    "*=": lambda a, b: a * b,
    "+=": lambda a, b: a + b,
    "silu by name": lambda a, b: torch.nn.functional.silu(a) + b,
    "relu by place": lambda a, b: torch.nn.functional.relu(a) + b,
}


@pytest.mark.parametrize("name", PLAIN)
def test_values_that_the_network_overwrites_are_those_before(name):
    class Joined(nn.Module):
        def __init__(self, how):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c, self.d, self.how = (
                nn.Linear(4, 6),
                nn.Linear(6, 5),
                nn.Linear(6, 5),
                nn.Linear(5, 3),
                how,
            )

        def forward(self, x):
            y = self.a(x).sigmoid()
            return self.d(self.how(self.b(y), self.c(y)))

    x = torch.randn(4, 4, dtype=torch.float64)
    sample, found = Sample(x, torch.tensor([0, 1, 2, 0])), []
    for how in (OVERWRITING[name], PLAIN[name]):
        model = Joined(how).double().eval()
        groups = find_groups(model, x[:1], cache=False).select("all", "a")
        found.append(
            BackpropDiagonal(model, groups, sample, softplus_beta=2.0).second({"a": x.new_ones(6)})[
                "a"
            ]
        )
    assert torch.allclose(*found, rtol=1e-12)
    assert float(found[0].abs().max()) > 0


class Tail(nn.Module):
    """Something between the gates and the output."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.how = how

    def forward(self, x):
        return self.c(self.how(self.b(self.a(x).sigmoid())).mean((2, 3)))


HOWS = {
    "twice": (lambda y: y + y, "takes one value twice"),
    "squared": (lambda y: y * y, "takes one value twice"),
    "alpha": (lambda y: torch.add(y, y.tanh(), alpha=3.0), "scales one"),
    "upsampled": (nn.Upsample(scale_factor=2, mode="bilinear"), "Upsample"),
    "spread": (nn.AdaptiveAvgPool2d(8), "windows overlap or leave something out"),
    "overlap": (nn.AvgPool2d(3, stride=1), "windows overlap or leave something out"),
    "left out": (nn.AvgPool2d(3), None),
    "averaged": (nn.AdaptiveAvgPool2d(2), None),
}


@pytest.mark.parametrize("name", HOWS)
def test_operations_that_are_no_plain_sums_are_refused_or_right(name):
    how, message = HOWS[name]
    torch.manual_seed(0)
    model = Tail(how).double().eval()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    sample, groups = (
        Sample(x, torch.tensor([0, 1, 2])),
        find_groups(model, x[:1], cache=False).select("all", "a"),
    )
    gates = {"a": x.new_ones(4)}
    if message:
        with pytest.raises(UsageError, match=message):
            BackpropDiagonal(model, groups, sample).second(gates)
        return

    values = model.a(x).sigmoid().detach()
    p = model.c(how(model.b(values)).mean((2, 3))).softmax(1)
    h = (p * (1 - p)) @ model.c.weight.square()  # at the means over positions
    y = model.b(values).detach()
    coefficients = torch.autograd.functional.jacobian(lambda v: how(v).mean((2, 3))[0, 0], y[:1])[
        0, 0
    ]  # of one channel, [H, W]
    windows = how(y[:1])[0, 0].numel()
    # each window's mean enters the mean over windows: squares add where the recursion keeps the
    # windows apart, 1/k² times 1/n²
    at_b = h[:, :, None, None] * coefficients.square()
    assert windows in (1, 4)
    at_a = torch.einsum("bohw,oi->bihw", at_b, model.b.weight[:, :, 0, 0].square())
    expected = (values.square() * at_a).sum((2, 3)).mean(0)
    assert torch.allclose(
        BackpropDiagonal(model, groups, sample).second(gates)["a"], expected, rtol=1e-9
    )


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "densenet121", "vgg16_cifar", "resnet20_cifar"]
)
def test_networks_whose_operations_have_rules(name):
    kwargs = (
        {"act_layer": "gelu"}
        if name in ("test_resnet", "vgg16_cifar")
        else zoo.SHORTER.get(name, {})
    )
    model = models.create(name, classes=4, channels=3, size=32, seed=0, **kwargs).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    groups = find_groups(model, x[:1]).select()
    found = BackpropDiagonal(
        model, groups, Sample(x, torch.tensor([0, 3])), softplus_beta=3.0
    ).second({n: x.new_ones(g.channels) for n, g in groups.items()})
    assert all(torch.isfinite(d).all() for d in found.values())


def test_the_activations_that_bend_at_points_only_are_listed():
    assert kinked(models.create("lenet5", classes=4, channels=1, size=28, seed=0)) == [
        "act1",
        "act2",
        "act3",
    ]
    assert kinked(models.create("mlp_sigmoid", classes=4, channels=1, size=28, seed=0)) == []
