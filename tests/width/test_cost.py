import copy

import pytest
import timm
import torch
import torchvision
import zoo
from torch import nn
from torch.nn import functional as F
from widthbench.baselines.l1_norm import L1Norm

import widthbench
from widthbench import Outcome
from widthbench.errors import CostError, UsageError
from widthbench.technique.budget import Budget
from widthbench.width import CostModel, find_groups, keep, resize
from widthbench.width.cost import count_macs
from widthbench.width.counting import macs_by_module


def halved(groups):
    """Widths of about half, and the plan that keeps the first channels of each block."""
    widths = {n: Budget("channels", 0.5).width(g) for n, g in groups.items()}
    plan = {}
    for n, g in groups.items():
        size, new = g.channels // g.blocks, widths[n] // g.blocks
        plan[n] = keep([b * size + i for b in range(g.blocks) for i in range(new)])
    return widths, plan


def counted(model, x):
    return count_macs(model, x), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "made"),
    zoo.lengths(
        "resnet18", "mobilenetv2_100", "densenet121", "test_vit", "test_efficientnet", "regnetx_002"
    ),
)
def test_cost_equals_what_is_counted_on_the_resized_network(name, made):
    size = 160 if name == "test_vit" else 64
    model, x = made(name).eval(), torch.randn(1, 3, size, size)
    groups = find_groups(model, x)
    cost = CostModel(model, groups, x)
    widths, plan = halved(groups.select("all"))
    assert (cost.macs, cost.params) == counted(model, x)
    assert (cost(widths).macs, cost(widths).params) == counted(resize(model, groups, plan), x)


def test_small_networks_too(net):
    model, x, groups = net
    widths, plan = halved(groups)
    cost = CostModel(model, groups, x)
    assert (cost(widths).macs, cost(widths).params) == counted(resize(model, groups, plan), x)


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet50", 4089), ("mobilenetv2_100", 301), ("mobilenetv1_100", 569)]
)
def test_macs_are_the_literatures_flops(name, millions):
    assert round(count_macs(timm.create_model(name), torch.randn(1, 3, 224, 224)) / 1e6) == millions


def test_a_hand_computed_network():
    model, x, groups = zoo.certified(zoo.Plain)
    cost = CostModel(model, groups, x)
    assert cost.macs == 64 * 6 * 2 * 9 + 64 * 10 * 6 * 9 + 9 * 40 + 5 * 9
    assert cost.params == (6 * 2 * 9 + 6) + (10 * 6 * 9 + 20) + (9 * 40 + 9) + (5 * 9 + 5)
    assert cost({"conv2": 4}).macs == 64 * 6 * 2 * 9 + 64 * 4 * 6 * 9 + 9 * 16 + 5 * 9


class Shift(nn.Module):
    """A temporal shift along the height: a buffer that is filled by slices, as the field writes
    it."""

    def __init__(self, buffer):
        super().__init__()
        self.buffer = buffer

    def forward(self, x):
        fold, out = x.shape[1] // 4, self.buffer(x)
        out[:, :fold, :-1] = x[:, :fold, 1:]
        out[:, fold : 2 * fold, 1:] = x[:, fold : 2 * fold, :-1]
        out[:, 2 * fold :] = x[:, 2 * fold :]
        return out


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def indexed(x):
    out = torch.zeros_like(x)
    out[:, torch.arange(x.shape[1])] = x
    return out


def by_rows(x):
    out = x.new_empty(x.shape)
    for i in range(x.shape[2]):
        out[:, :, i] = x[:, :, -1 - i]
    return out


def transposed(x):
    out = torch.zeros_like(x)
    out.transpose(1, 2).copy_(x.transpose(1, 2))
    return out


def added(x):
    out = torch.zeros_like(x)
    torch._foreach_add_([out], [x])
    return out


def blurred(x):
    return F.conv2d(
        x, x.new_ones(1, 1, 3, 3).repeat(x.shape[1], 1, 1, 1), padding=1, groups=x.shape[1]
    )


def between(middle):
    layers = (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        middle,
        nn.Conv2d(16, 12, 3, padding=1),
        nn.ReLU(),
    )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


class Mixer(nn.Module):
    """Layers over places: they are applied once for each channel."""

    def __init__(self):
        super().__init__()
        self.embed, self.t1, self.t2 = nn.Conv2d(3, 16, 4, 4), nn.Linear(4, 9), nn.Linear(9, 4)
        self.c1, self.c2, self.head = nn.Linear(16, 20), nn.Linear(20, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.t2(self.t1(self.embed(x).flatten(2)).relu()).transpose(1, 2)
        return self.head(self.c2(self.c1(x).relu()).mean(1))


class Recurrent(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.a, self.r, self.b, self.h = (
            nn.Linear(10, 16),
            cls(16, 12, batch_first=True),
            nn.Linear(12, 20),
            nn.Linear(20, 5),
        )

    def forward(self, x):
        return self.h(self.b(self.r(self.a(x).relu())[0][:, -1]).relu())


class Gram(nn.Module):
    """Attention of places among themselves, on a map of channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x).flatten(2)
        y = y @ (y.transpose(1, 2) @ y)
        return self.h(self.b(y.view(len(x), -1, *x.shape[2:])).relu().mean((2, 3)))


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    return nn.Sequential(
        nn.Linear(10, 32),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Linear(32, 5),
    )


IMAGE, SEQUENCE = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 10)
FIELD = {
    "encoder": (encoder, SEQUENCE),
    "vision transformer": (
        lambda: torchvision.models.VisionTransformer(16, 8, 1, 2, 32, 48, num_classes=5),
        torch.randn(2, 3, 16, 16),
    ),
    "shift of zeros_like": (lambda: between(Shift(torch.zeros_like)), IMAGE),
    "shift of new_zeros": (lambda: between(Shift(lambda x: x.new_zeros(x.shape))), IMAGE),
    "indexed": (lambda: between(Apply(indexed)), IMAGE),
    "by rows": (lambda: between(Apply(by_rows)), IMAGE),
    "transposed": (lambda: between(Apply(transposed)), IMAGE),
    "several at once": (lambda: between(Apply(added)), IMAGE),
    "circular": (lambda: between(nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")), IMAGE),
    "blurred": (lambda: between(Apply(blurred)), IMAGE),
    "mixer": (Mixer, IMAGE),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "gram": (Gram, IMAGE),
}


@pytest.mark.parametrize("name", FIELD)
def test_networks_of_the_field_cost_what_was_predicted(name):
    make, x = FIELD[name]
    torch.manual_seed(0)
    model = make().eval()
    groups = find_groups(model, x, cache=False)
    certified = groups.select("all")
    cost = CostModel(model, groups, x)
    for names in (
        [n] for n in certified
    ):  # alone, and below all together: what depends on two widths shows in either
        widths, plan = halved({n: groups[n] for n in names})
        assert cost.counted(resize(model, groups, plan), widths) == cost(widths)
    widths, plan = halved(certified)
    assert cost.counted(resize(model, groups, plan), widths).macs < cost.macs


def macs_of(step, inputs, width=12):
    """Of a recurrent layer of ``width``, all of whose gates are matrices over input and state."""
    return step * 6 * width * (inputs + width)


@pytest.mark.parametrize(
    ("layer", "x", "macs"),
    [
        (nn.LSTM(10, 12, batch_first=True), SEQUENCE, macs_of(4, 10)),
        (nn.LSTM(10, 12, bidirectional=True, batch_first=True), SEQUENCE, 2 * macs_of(4, 10)),
        (nn.GRU(10, 12, batch_first=True), SEQUENCE, macs_of(3, 10)),
        (nn.RNN(10, 12, batch_first=True), SEQUENCE, macs_of(1, 10)),
        (nn.MultiheadAttention(10, 2, batch_first=True), SEQUENCE, 6 * 10 * 40 + 2 * 6 * 6 * 10),
        (nn.Linear(10, 7), SEQUENCE, 6 * 70),
    ],
)
def test_torch_is_told_what_it_does_not_count(layer, x, macs):
    net = Apply(lambda x: layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x))
    net.layer = layer
    assert count_macs(net, x) == macs
    assert macs_by_module(net, x) == {"": 2 * macs, "layer": 2 * macs} or isinstance(
        layer, nn.MultiheadAttention
    )
    assert torch.backends.mha.get_fastpath_enabled()  # as it was


def test_matrices_on_vectors_and_deformable_convolutions_count():
    matrix, vector = nn.Parameter(torch.randn(7, 10)), torch.randn(1, 10)
    net = Apply(lambda x: matrix @ x[0])
    net.matrix = matrix
    assert count_macs(net, vector) == 70
    deformed = torchvision.ops.DeformConv2d(4, 6, 3, padding=1)
    net = Apply(lambda x: deformed(x, x.new_zeros(len(x), 18, 8, 8)))
    net.deformed = deformed
    assert count_macs(net, torch.randn(2, 4, 8, 8)) == 6 * 4 * 9 * 64


def test_operations_that_nobody_knows_the_cost_of_are_refused():
    @torch.library.custom_op("widthbench_tests::unknown", mutates_args=())
    def secret(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    net = Apply(lambda x: secret(x, net.w))
    net.w = nn.Parameter(torch.randn(10, 5))
    with pytest.raises(
        UsageError, match="widthbench_tests::unknown takes weights, and has no formula"
    ):
        count_macs(net, torch.randn(2, 10))


def test_a_difference_is_an_error_that_names_the_module():
    model, x, groups = zoo.certified(zoo.Plain)
    cost, small = CostModel(model, groups, x), resize(model, groups, {"conv2": keep([0, 1, 2, 3])})
    assert cost.counted(small, {"conv2": 4}) == cost({"conv2": 4})
    with pytest.raises(CostError, match=r"conv2 \([\d,]+ predicted, [\d,]+ counted\)"):
        cost.counted(small, {"conv2": 5})


def test_a_technique_whose_network_costs_more_than_its_widths_say_is_refused():
    class Heavier(L1Norm):
        """Hides the whole network behind a hook."""

        def decide(self, task, state):
            outcome = super().decide(task, state)
            model, whole = copy.deepcopy(task.model), [copy.deepcopy(task.model)]
            model.register_forward_hook(lambda module, args, output: output + 0 * whole[0](args[0]))
            return Outcome(outcome.plan, model)

    model, x, _ = zoo.certified(zoo.Plain)
    with pytest.raises(CostError, match="was predicted to have"):
        widthbench.apply(Heavier(), model, budget="channels:0.5", example_input=x)
