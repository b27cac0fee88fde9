"""Small networks that between them have every kind of layer and index map."""

import copy
import dataclasses
import functools

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import cspnet
from torch import nn

from widthbench.data import sources, splits
from widthbench.errors import UsageError
from widthbench.networks import weights
from widthbench.sensitivity.ablation import Sample
from widthbench.training.loop import fit
from widthbench.width import find_groups
from widthbench.width.proofs import randomised


class Mlp(nn.Module):
    """Two hidden layers, one PReLU with a slope per channel."""

    size = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.fc1, self.act1 = nn.Linear(16, 12), nn.ReLU()
        self.fc2, self.act2 = nn.Linear(12, 8), nn.PReLU(8)
        self.fc3 = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc3(self.act2(self.fc2(self.act1(self.fc1(x.flatten(1))))))


class Plain(nn.Module):
    """Convolutions with and without BatchNorm, ReLU, a flatten over a map of 2 x 2."""

    size = (2, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 10, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(10)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc1 = nn.Linear(40, 9)
        self.fc2 = nn.Linear(9, 5)

    def forward(self, x):
        x = self.conv1(x).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc2(self.fc1(self.pool(x).flatten(1)).relu())


class Residual(nn.Module):
    """An inverted residual block: expansion, depthwise convolution, projection, addition."""

    size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.bn1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.bn2 = (
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            nn.BatchNorm2d(12),
        )
        self.project, self.bn3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        y = self.bn2(self.depth(self.bn1(self.expand(x)).relu())).relu()
        return self.head((x + self.bn3(self.project(y))).mean((2, 3)))


class Dense(nn.Module):
    """Concatenations, one of them with BatchNorm behind it."""

    size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.c = nn.Conv2d(10, 5, 3, padding=1)
        self.head = nn.Linear(15, 5)

    def forward(self, x):
        a = self.a(x).relu()
        ab = torch.cat([a, self.b(a)], 1)
        c = self.c(self.bn(ab).relu())
        return self.head(torch.cat([c, ab], 1).mean((2, 3)))


class JoinedConcat(nn.Module):
    """A concatenation that is added to another branch: two groups share that branch's layer."""

    size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.c = nn.Conv2d(3, 10, 1)
        self.out = nn.Conv2d(10, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        joined = (torch.cat([self.a(x), self.b(x)], 1) + self.c(x)).relu()
        return self.head(self.out(joined).relu().mean((2, 3)))


class Grouped(nn.Module):
    """A convolution in 3 groups: in and out must keep equal counts per block."""

    size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 1)
        self.conv2, self.bn2 = nn.Conv2d(12, 18, 3, padding=1, groups=3), nn.BatchNorm2d(18)
        self.conv3 = nn.Conv2d(18, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn2(self.conv2(self.conv1(x).relu())).relu()
        return self.head(self.conv3(x).relu().mean((2, 3)))


class Normed(nn.Module):
    """GroupNorm and LayerNorm: coupled groups."""

    size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv1, self.gn = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.ln = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.conv2(self.gn(self.conv1(x)).relu())
        return self.head(self.ln(x.flatten(2).transpose(1, 2)).mean(1))


class PreActivation(nn.Module):
    """A residual stream that is read through norms only."""

    size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.bn3, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(self.conv1(self.bn1(x).relu()).relu())
        return self.head(self.bn3(x).relu().mean((2, 3)))


ALL = [Mlp, Plain, Residual, Dense, JoinedConcat, Grouped, PreActivation, Normed]
EXACT = [c for c in ALL if c is not Normed]


@functools.cache
def _made(cls):
    torch.manual_seed(0)
    model = randomised(cls().eval(), seed=3)
    x = torch.randn(2, *cls.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x, find_groups(model, x, cache=False)


def certified(cls):
    """(network, example input, certified groups); the network is a copy."""
    model, x, groups = _made(cls)
    return copy.deepcopy(model), x, groups


def sample_for(x, classes=5, count=6):
    """Random labelled inputs like a network's example input."""
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(count, *x.shape[1:], generator=generator, dtype=x.dtype)
    return Sample(xs, torch.randint(0, classes, (count,), generator=generator))


class Shuffled:
    """Random labelled inputs, in batches in the order that a generator draws."""

    def __init__(self, x, count):
        sample = sample_for(x, count=count)
        self.x, self.y = sample.x, sample.y

    def __len__(self):
        return len(self.y)

    def batches(self, size, *, generator=None, augment=None):
        order = (
            torch.arange(len(self.y))
            if generator is None
            else torch.randperm(len(self.y), generator=generator)
        )
        return ((self.x[some], self.y[some]) for some in order.split(size))


def watched_fit(seen, layout):
    """``task.fit`` that notes of each convolution's pass its output's dtype and whether its input
    has a memory layout."""

    def fitted(model, train, recipe, **more):
        note = lambda m, a, out: seen.append((out.dtype, a[0].is_contiguous(memory_format=layout)))  # noqa: E731
        hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
        spent = fit(model, train, recipe, macs=1, **more)
        for hook in hooks:
            hook.remove()
        return spent

    return fitted


def started(groups, x):
    """Gates with one channel closed in each group, and the candidates that are left."""
    gates = {n: x.new_ones(g.channels) for n, g in groups.items()}
    for gate in gates.values():
        gate[1] = 0
    return gates, {n: g.nonzero().flatten() for n, g in gates.items()}


def error(a, b):
    """Largest difference relative to the largest value of b."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def public(file, dataset):
    """Path of a public weights file; skips the test where it or its data set is absent."""
    if sources.locate(dataset) is None:
        pytest.skip(f"{dataset} is not in WIDTHBENCH_DATA")
    try:
        return weights.find(file)
    except UsageError:
        pytest.skip(f"{file}.safetensors is not in WIDTHBENCH_WEIGHTS")


class PublicLenet(nn.Module):
    """The LeNet-300-100 as anybody would write it, with the tensor names of the published
    weights."""

    def __init__(self):
        super().__init__()
        self.ip1, self.ip2, self.ip3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x):
        return self.ip3(torch.relu(self.ip2(torch.relu(self.ip1(x.flatten(1))))))


def public_lenet():
    """(the published LeNet-300-100 as a plain module, Fashion-MNIST as it was trained on)."""
    path = public("lenet_300_100-fashionmnist", "fashionmnist")
    net = PublicLenet().eval()
    net.load_state_dict(load_file(path))
    return net, splits.load("fashionmnist", 28, val=0, mean=(0.5,), std=(0.5,))


def first(split):
    """The first test image, ``[1, C, H, W]``."""
    return next(split.test.batches(1))[0]


SHORTER = {
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": 64},
    "cait_xxs24_224": {"depth": 2, "img_size": 64},
    "coat_tiny": {"serial_depths": [1, 1, 1, 1], "parallel_depth": 1, "img_size": 64},
    "cspresnet50": {
        "stages": dataclasses.replace(cspnet.model_cfgs["cspresnet50"].stages, depth=(1, 1, 1, 1))
    },
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "levit_128s": {"depth": (1, 1, 1)},
    "pit_ti_224": {"depth": [1, 1, 1]},
    "rexnet_100": {"depth_mult": 0.3},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (3, 6), "img_size": 56},
}


def shorter(name, **options):
    """A network of timm's with each kind of block that the whole one has, but fewer of them."""
    return timm.create_model(name, **SHORTER.get(name, {}) | options)


def lengths(*names):
    """(name, what makes it) of networks of timm's: shorter ones, and whole ones where there is
    time."""
    whole = [
        pytest.param(n, timm.create_model, id=f"{n}-whole", marks=pytest.mark.slow)
        for n in names
        if n in SHORTER
    ]
    return [pytest.param(n, shorter, id=n) for n in names] + whole


def side(name, made):
    """Pixels along a side of the images that a network of 224 pixels takes, be it whole or
    shorter."""
    return SHORTER[name].get("img_size", 224) if made is shorter else 224
