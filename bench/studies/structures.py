"""Small networks, one for each structure of the field that has been hard to resize: for the survey
(``coverage.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A network made of layers and a function of these and its inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.how = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.how(self, *inputs, **named)


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def image(*shape: int) -> Tensor:
    return torch.randn(1, 3, *(shape or (16, 16)))


def attention_of_parts(n: Any, x: Tensor) -> Tensor:
    x = n.stem(x)
    b, t, c = x.shape
    q, k, v = (f(x).view(b, t, 3, c // 3).transpose(1, 2) for f in (n.q, n.k, n.v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
    return n.head(x + n.proj(y))


def linear(i: int, o: int) -> nn.Linear:
    return nn.Linear(i, o)


def two_paths(n: Any, x: Tensor) -> Tensor:
    y = n.a(x).relu()
    return n.head(torch.cat([n.b(y).relu(), n.c(y).relu()], 1)).mean((2, 3))


def channel_attention(n: Any, x: Tensor) -> Tensor:
    y = n.a(x).relu()
    return n.head(y * n.gate(y.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3))


def to_a_map(n: Any, z: Tensor) -> Tensor:
    return n.head(n.a(z).relu().view(-1, 8, 4, 4)).mean((2, 3))


def of_clips(n: Any, x: Tensor) -> Tensor:
    y = n.b(n.a(x).relu()).relu().mean((2, 3))
    return n.head(y.view(-1, 4, y.shape[1]).mean(1))


def tokens(n: Any, ids: Tensor) -> Tensor:
    return n.head(n.a(n.words(ids)).relu().mean(1))


def swiglu(n: Any, x: Tensor) -> Tensor:
    gate, y = n.a(x).chunk(2, -1)
    return n.head(F.silu(gate) * y)


def both(n: Any, picture: Tensor, text: Tensor) -> Tensor:
    seen = n.eye(picture).relu().mean((2, 3))
    return n.head(torch.cat([seen, n.ear(text).relu()], 1))


def pyramid(n: Any, x: Tensor) -> dict[str, Tensor]:
    fine = n.a(x).relu()
    coarse = n.b(fine).relu()
    up = F.interpolate(n.side_b(coarse), scale_factor=2)
    return {"fine": n.head(n.side_a(fine) + up), "coarse": n.head(n.side_b(coarse))}


def shuffled(n: Any, x: Tensor) -> Tensor:
    y = n.a(x).relu()
    b, c, h, w = y.shape
    y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    return n.head(n.b(y).relu()).mean((2, 3))


def recurrent(n: Any, x: Tensor) -> Tensor:
    return n.head(n.rnn(n.a(x).relu())[0][:, -1])


def standardised(n: Any, x: Tensor) -> Tensor:
    return n.head(n.b(n.a(x).relu()).relu()).mean((2, 3))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


STRUCTURES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "two branches, concatenated": lambda: (
        Net(two_paths, a=conv(3, 8), b=conv(8, 6), c=conv(8, 5), head=conv(11, 4)),
        image(),
    ),
    "channel attention": lambda: (
        Net(channel_attention, a=conv(3, 8), gate=conv(8, 8, 1), head=conv(8, 4)),
        image(),
    ),
    "channel shuffle": lambda: (
        Net(shuffled, a=conv(3, 8), b=conv(8, 8), head=conv(8, 4)),
        image(),
    ),
    "pixel shuffle": lambda: (
        nn.Sequential(
            conv(3, 16), nn.ReLU(), nn.PixelShuffle(2), conv(4, 6), nn.ReLU(), conv(6, 2)
        ),
        image(),
    ),
    "transposed convolution": lambda: (
        nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), conv(6, 2)),
        image(),
    ),
    "depthwise multiplier": lambda: (
        nn.Sequential(conv(3, 8), conv(8, 16, groups=8), nn.ReLU(), conv(16, 2)),
        image(),
    ),
    "convolution in groups": lambda: (
        nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 2)),
        image(),
    ),
    "standardised weights": lambda: (
        Net(standardised, a=conv(3, 8), b=Standardised(8, 6, 3, padding=1), head=conv(6, 2)),
        image(),
    ),
    "group norm": lambda: (
        nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 2)),
        image(),
    ),
    "circular padding": lambda: (
        nn.Sequential(conv(3, 8, padding_mode="circular"), nn.ReLU(), conv(8, 2)),
        image(),
    ),
    "a map made by a linear layer": lambda: (
        Net(to_a_map, a=linear(5, 128), head=conv(8, 2)),
        torch.randn(1, 5),
    ),
    "feature pyramid": lambda: (
        Net(
            pyramid,
            a=conv(3, 8),
            b=nn.Conv2d(8, 12, 2, 2),
            side_a=conv(8, 6, 1),
            side_b=conv(12, 6, 1),
            head=conv(6, 2),
        ),
        image(),
    ),
    "separate queries, keys and values": lambda: (
        Net(
            attention_of_parts,
            stem=linear(5, 12),
            q=linear(12, 12),
            k=linear(12, 12),
            v=linear(12, 12),
            proj=linear(12, 12),
            head=linear(12, 2),
        ),
        torch.randn(1, 6, 5),
    ),
    "torch's transformer encoder": lambda: (
        nn.Sequential(
            linear(5, 12), nn.TransformerEncoderLayer(12, 3, 24, batch_first=True), linear(12, 2)
        ),
        torch.randn(1, 6, 5),
    ),
    "SwiGLU": lambda: (Net(swiglu, a=linear(5, 16), head=linear(8, 2)), torch.randn(1, 5)),
    "token ids": lambda: (
        Net(tokens, words=nn.Embedding(20, 8), a=linear(8, 12), head=linear(12, 2)),
        torch.randint(20, (1, 7)),
    ),
    "LSTM": lambda: (
        Net(recurrent, a=linear(5, 8), rnn=nn.LSTM(8, 8, batch_first=True), head=linear(8, 2)),
        torch.randn(1, 6, 5),
    ),
    "two inputs": lambda: (
        Net(both, eye=conv(3, 8), ear=linear(5, 6), head=linear(14, 2)),
        (image(), torch.randn(1, 5)),
    ),
    "a batch of clips": lambda: (
        Net(of_clips, a=conv(3, 8), b=conv(8, 6), head=linear(6, 2)),
        torch.randn(8, 3, 8, 8),
    ),
}
