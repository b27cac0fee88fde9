"""Labels through operations: what a small network does to its channels, and the axes that must come
out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.layers import StdConv2d
from torch import nn
from torch.nn import functional as F

from widthbench.errors import NoGroupsError
from widthbench.width import discover, find_groups, gated, keep, operations, resize
from widthbench.width.groups import Segment
from widthbench.width.inputs import Inputs
from widthbench.width.operations import _chunks, trace


class Two(nn.Module):
    """Two linear layers with something in between."""

    def __init__(self, between, inside=8, middle=8):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, inside), nn.Linear(middle, 3), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def halves(t):
    left, right = t.chunk(2, dim=-1)
    return left * torch.sigmoid(right)


CASES = [
    ("relu", torch.relu, 8, 8, {"a": 8}, [("a", 8, 1)]),
    ("in place", lambda t: t.relu_().add_(1), 8, 8, {"a": 8}, [("a", 8, 1)]),
    (
        "repeated",
        lambda t: t[..., None].expand(-1, -1, 3).flatten(1),
        4,
        12,
        {"a": 4},
        [("a", 4, 3)],
    ),
    ("tiled", lambda t: t.repeat(1, 3), 4, 12, {"a": 4}, [("a", 4, 1)] * 3),
    ("concatenated", lambda t: torch.cat([t, t.tanh()], 1), 4, 8, {"a": 4}, [("a", 4, 1)] * 2),
    ("gated halves", halves, 8, 4, {"a": 4}, [("a", 4, 1)]),
    ("zeros behind", lambda t: F.pad(t, (0, 2)), 8, 10, {"a": 8}, [("a", 8, 1), (None, 2, 1)]),
    ("all but the last", lambda t: t[:, :-2], 8, 6, {"a[0:6]": 6}, [("a[0:6]", 6, 1)]),
    (
        "equal halves",
        lambda t: torch.cat(t.chunk(2, 1)[::-1], 1),
        8,
        8,
        {"a": 4},
        [("a", 4, 1)] * 2,
    ),
    (
        "shuffled",
        lambda t: t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1),
        8,
        8,
        {"a": 4},
        [("a", 4, 2)],
    ),
    ("pooled pairs", lambda t: t.unflatten(1, (2, -1)).sum(1), 8, 4, {"a": 4}, [("a", 4, 1)]),
    (
        "softmax over pairs",
        lambda t: t.unflatten(1, (2, -1)).softmax(1).flatten(1),
        8,
        8,
        {"a": 4},
        [("a", 4, 1)] * 2,
    ),
    (
        "by a function",
        lambda t: F.pad(t, (0, 0)).clone(memory_format=torch.contiguous_format),
        8,
        8,
        {"a": 8},
        [("a", 8, 1)],
    ),
]


@pytest.mark.parametrize(
    ("between", "inside", "middle", "groups", "axis"),
    [c[1:] for c in CASES],
    ids=[c[0] for c in CASES],
)
def test_channels_are_followed_and_proven(between, inside, middle, groups, axis):
    torch.manual_seed(0)
    found = find_groups(Two(between, inside, middle), torch.randn(2, 4), cache=False)
    exact = {n: g.channels for n, g in found.items() if g.grade == "exact"}
    assert exact == groups
    assert found.axes["b", "in"] == tuple(Segment(*s) for s in axis)


def outer(t, at):
    """Two runs of channels along two dimensions."""
    return t[:, at : at + 2, None] * t[:, None, 2 * at : 2 * at + 4]


FROZEN = [
    ("flipped", lambda t: t.flip(1), 8, "permuted"),
    ("rolled", lambda t: t.roll(1, 1), 8, "rolled"),
    ("normalised", lambda t: t / t.norm(dim=1, keepdim=True), 8, "runs over its channels"),
    ("softmax", lambda t: t.softmax(1), 8, "a softmax runs over its channels"),
    ("picked", lambda t: t[:, :1] * t[:, 3:4] + t[:, [0]], 1, ""),
    ("sorted", lambda t: t.sort(1).values, 8, "the operation sort has no rule"),
    ("cropped", lambda t: F.pad(t, (0, -2)), 6, "a negative padding cuts its channels"),
    (
        "with itself",
        lambda t: torch.cat([t @ t.T, t], 1)[:, -8:] * (t @ t.T).sum(),
        8,
        "its channels are multiplied with themselves",
    ),
    (
        "crossed",
        lambda t: torch.stack([outer(t, 0), outer(t, 2)], 1).flatten(1),
        16,
        "a stack lays its channels across others",
    ),
    (
        "across",
        lambda t: (t.unflatten(1, (2, 4))[:, :, :, None] * t.unflatten(1, (4, 2))[:, None]).flatten(
            1
        ),
        16,
        "lie across others",
    ),
]


@pytest.mark.parametrize(
    ("between", "middle", "reason"), [c[1:] for c in FROZEN], ids=[c[0] for c in FROZEN]
)
def test_what_labels_cannot_follow_is_frozen(between, middle, reason):
    found = find_groups(Two(between, 8, middle), torch.randn(2, 4), cache=False)
    assert all(g.grade == "frozen" for n, g in found.items() if "[" not in n)
    assert any(reason in g.reason for g in found.values())


def test_one_channel_that_meets_many_is_frozen_and_they_are_not():
    found = find_groups(Two(lambda t: t[:, :1] * t[:, 1:], 8, 7), torch.randn(2, 4), cache=False)
    assert (found["a[0:1]"].grade, found["a[0:1]"].reason) == (
        "frozen",
        "a single channel meets many",
    )
    assert found["a[1:8]"].grade == "exact"


class Convs(nn.Module):
    """A convolution, something, a convolution."""

    def __init__(self, between, middle=8):
        super().__init__()
        self.a, self.between, self.c = nn.Conv2d(3, 8, 3), between, nn.Conv2d(middle, 2, 1)

    def forward(self, x):
        return self.c(self.between(self.a(x).relu()))


@pytest.mark.parametrize("blocks", [1, 2])
def test_weights_that_are_standardised_couple_the_channels_that_it_runs_over(blocks):
    """Rows are exact, since each is standardised by itself; columns change what others are."""
    model = Convs(StdConv2d(8, 6, 3, groups=blocks), 6).eval()
    x = torch.randn(1, 3, 9, 9)
    found = find_groups(model, x, cache=False)
    assert {n: g.grade for n, g in found.items()} == {"a": "coupled", "between": "exact"}
    small = resize(model, found, {"a": keep([0, 1, 4, 5])})
    one = nn.Conv2d(3, 4, 3)
    one.load_state_dict({k: v[[0, 1, 4, 5]] for k, v in model.a.state_dict().items()})
    like = StdConv2d(4, 6, 3, groups=blocks)
    columns = [0, 1, 4, 5] if blocks == 1 else [0, 1]
    state = {**model.between.state_dict(), "weight": model.between.weight[:, columns]}
    like.load_state_dict(state)
    assert torch.allclose(small(x), model.c(like(one(x).relu())), atol=1e-6)


class Mapped(nn.Module):
    """A linear layer whose outputs become maps, and channels that become places."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.end = nn.Linear(4, 32), nn.Conv2d(8, 12, 1), end
        self.c, self.maps = nn.Conv2d(3, 2, 1), 8

    def forward(self, x):
        h = self.b(self.end(self.a(x).relu().view(-1, self.maps, 2, 2)))
        return self.c(F.pixel_shuffle(h, 2))


@pytest.mark.parametrize(
    "end", [nn.Identity(), nn.Upsample(scale_factor=2), nn.AvgPool2d(2), nn.BatchNorm2d(8)]
)
def test_maps_that_a_linear_layer_makes_have_a_channel_for_all_their_places(end):
    found = find_groups(Mapped(end).eval(), torch.randn(2, 4), cache=False)
    assert {n: (g.channels, g.grade) for n, g in found.items()} == {
        "a": (8, "exact"),
        "b": (3, "exact"),  # pixel shuffle: four channels make one
    }


class Several(nn.Module):
    """A depthwise convolution with two filters for each channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8)
        self.c = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def test_several_filters_of_a_channel_go_with_it():
    model, x = Several(), torch.randn(2, 3, 6, 6)
    found = find_groups(model, x, cache=False)
    assert {n: (g.channels, g.grade) for n, g in found.items()} == {"a": (8, "exact")}
    small = resize(model, found, {"a": keep([1, 4, 6])})
    assert (small.b.in_channels, small.b.out_channels, small.b.groups) == (3, 6, 3)
    assert torch.equal(small.b.weight, model.b.weight[[2, 3, 8, 9, 12, 13]])
    assert small.c.in_channels == 6


def test_token_ids_are_drawn_from_the_examples_own():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))
    found = find_groups(model, torch.randint(0, 50, (2, 7)), cache=False)
    assert found["1"].grade == "exact"


class BareWeights(nn.Module):
    """A layer's channels are read by weights that are no layer's."""

    def __init__(self, read):
        super().__init__()
        self.a, self.c, self.read = nn.Linear(4, 8), nn.Linear(6, 3), read
        self.w, self.v = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return self.c(self.read(self, self.a(x).relu()).relu())


BARE = {
    "linear": lambda net, h: F.linear(h, net.w),
    "matmul": lambda net, h: h @ net.v,
    "einsum": lambda net, h: torch.einsum("bi,io->bo", h, net.v),
    "on the left": lambda net, h: (net.w @ h.T).T,
    "picked and turned": lambda net, h: h @ net.w[[3, 1, 2, 0, 5, 4]].T,
}


@pytest.mark.parametrize("how", BARE)
def test_bare_weights_read_channels_as_a_layer_does(how):
    model, x = BareWeights(BARE[how]), torch.randn(2, 4)
    found = find_groups(model, x, cache=False)
    (group,) = found.values()
    assert (group.name, group.grade, group.consumers) == ("a", "exact", ())
    kept = torch.tensor([1, 4, 5])
    gates = torch.zeros(8).index_fill(0, kept, 1.0)
    small = resize(model, found, {"a": keep(kept)})
    for on in ("input", "weight"):
        with gated(model, found, {"a": gates}, on=on):
            torch.testing.assert_close(model(x), small(x))
    assert "w" not in vars(model)


def test_bare_weights_may_be_shared_between_modules():
    class Holder(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, h):
            return h @ self.weight

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)
            self.p = Holder(nn.Parameter(torch.randn(8, 3)))
            self.q = Holder(self.p.weight)

        def forward(self, x):
            return self.p(self.a(x).relu()) + self.q(self.b(x).relu())

    model = Twice()
    found = find_groups(model, torch.randn(2, 4), cache=False)
    assert [(g.channels, g.grade) for g in found.values()] == [(8, "exact")]  # tied by the weights
    small = resize(model, found, {"a": keep(torch.tensor([1, 4]))})
    assert small.p.weight is small.q.weight
    assert small(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("side", [1, 3])
def test_bare_weights_of_a_convolution_read_channels(side):
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.k = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(2, 8, side, side))

        def forward(self, x):
            return F.conv2d(self.a(x).relu(), self.k)

    model, x = Kernel(), torch.randn(2, 3, 8, 8)
    found = find_groups(model, x, cache=False)
    assert [(g.name, g.grade) for g in found.values()] == [("a", "exact")]
    kept = torch.tensor([0, 5])
    small = resize(model, found, {"a": keep(kept)})
    masked = F.conv2d(model.a(x).relu()[:, kept], model.k[:, kept])
    torch.testing.assert_close(small(x), masked)


class Read(nn.Module):
    """A layer reads, in a product, what bare weights make."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.w = nn.Linear(4, 8), nn.Linear(4, 6), nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        made = (self.a(x).relu() @ self.w).unsqueeze(1)
        return (made @ self.b(x).tanh().unsqueeze(2)).squeeze(2)


def test_channels_that_bare_weights_make_are_listed_with_the_reason():
    found = find_groups(Read(), torch.randn(2, 4), cache=False)
    assert found["a"].grade == "exact"
    assert found["b"].reason == "the bare weights 'w' make its channels: make them a layer"


def test_a_network_of_bare_weights_alone_says_so():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 2))

        def forward(self, x):
            return (x @ self.w).relu() @ self.v

    with pytest.raises(NoGroupsError, match="bare weights such as 'w' make its channels"):
        find_groups(Alone(), torch.randn(2, 4), cache=False).select("all")


def test_gates_on_bare_weights_have_gradients():
    model, x = BareWeights(BARE["linear"]), torch.randn(2, 4)
    found = find_groups(model, x, cache=False)
    gates = torch.ones(8, requires_grad=True)
    with gated(model, found, {"a": gates}):
        (slope,) = torch.autograd.grad(model(x).square().sum(), gates)
    h = model.a(x).relu().detach().requires_grad_()
    (wanted,) = torch.autograd.grad(model.c((h @ model.w.T).relu()).square().sum(), h)
    torch.testing.assert_close(slope, (wanted * h).sum(dim=0))


class Pooling(nn.Module):
    """Attention whose queries are convolved head by head, with one filter for all heads (MViT)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 36), nn.Linear(12, 6)
        self.pool, self.end = nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.Linear(6, 2)
        self.heads = 3

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(len(x), 16, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        maps = q.reshape(-1, 4, 4, q.shape[-1]).permute(0, 3, 1, 2)
        q = self.pool(maps).flatten(2).transpose(1, 2).reshape(len(x), self.heads, 16, -1)
        y = (q @ k.mT).softmax(-1) @ v
        return self.end(self.proj(y.transpose(1, 2).flatten(2)).mean(dim=1))


def test_heads_may_go_where_each_is_a_sample_of_a_convolution():
    found = find_groups(Pooling(), torch.randn(2, 16, 6), cache=False)
    heads = next(g for g in found.values() if g.heads)
    assert (heads.grade, heads.channels) == ("exact", 3)
    small = resize(Pooling(), found, {heads.name: keep(torch.tensor([2]))})
    assert (small.heads, small.proj.in_features, small.pool.in_channels) == (1, 4, 4)


def test_windows_leave_channels_alone():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8 * 9, 2)

        def forward(self, x):
            h = self.a(x).relu().unfold(2, 3, 3).unfold(3, 3, 3)  # [B, 8, 2, 2, 3, 3]
            return self.b(h.mean(dim=(2, 3)).flatten(1))

    found = find_groups(Windows(), torch.randn(2, 3, 8, 8), cache=False)
    assert [(g.name, g.grade) for g in found.values()] == [("a", "exact")]


@pytest.mark.parametrize("made", [nn.utils.parametrizations.weight_norm, torch.jit.script])
def test_weights_that_something_makes_are_named(made):
    layer = made(nn.Linear(4, 8))
    model = layer if made is torch.jit.script else nn.Sequential(layer)
    found = find_groups(model, torch.randn(2, 4), cache=False)
    with pytest.raises(NoGroupsError, match=r"ScriptModule|make the weights of '0'"):
        found.select("all")


def fixed_filter(dtype):
    return lambda t: F.conv2d(
        t, torch.ones(t.shape[1], 1, 3, 3, dtype=dtype or t.dtype), groups=t.shape[1]
    )


def test_a_filter_made_for_any_number_of_channels_lets_them_pass():
    found = find_groups(Convs(fixed_filter(None)).eval(), torch.randn(1, 3, 9, 9), cache=False)
    assert (found["a"].grade, found["a"].consumers) == ("exact", ("c",))


def test_a_network_of_one_precision_is_frozen_and_says_so():
    found = find_groups(
        Convs(fixed_filter(torch.float32)).eval(), torch.randn(1, 3, 9, 9), cache=False
    )
    assert found["a"].grade == "frozen"
    assert (
        "nothing can be proven on two samples in float64: expected scalar type" in found["a"].reason
    )


class Biased(nn.Module):
    """Fused attention with a learned bias for each head."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.heads, self.bias = 2, nn.Parameter(torch.randn(1, 2, 5, 5))

    def forward(self, x):
        q, k, v = (
            m(x).reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for m in (self.q, self.k, self.v)
        )
        return self.o(
            F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2).flatten(2)
        )


def test_a_bias_of_attention_goes_with_its_heads():
    found = find_groups(Biased(), torch.randn(2, 5, 8), cache=False)
    assert {n: (g.grade, g.channels, g.tensors) for n, g in found.items()} == {
        "q": ("exact", 8, ()),
        "q.heads": ("exact", 2, ("bias",)),
        "v": ("exact", 8, ()),
    }
    small = resize(Biased(), found, {"q.heads": keep([1])})
    assert (small.bias.shape, small.heads) == ((1, 1, 5, 5), 1)


class Unequal(nn.Module):
    """Halves whose widths must be equal though nothing ties them: ``chunk`` cuts in the middle."""

    def __init__(self):
        super().__init__()
        self.a, self.left, self.right = nn.Linear(4, 8), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        left, right = self.a(x).relu().chunk(2, dim=1)
        return self.left(left) + self.right(right)


def test_halves_that_nothing_states_keep_equal_counts():
    (group,) = find_groups(Unequal(), torch.randn(2, 4), cache=False).values()
    assert (group.channels, group.grade, group.consumers) == (4, "exact", ("left", "right"))


class Stated(nn.Module):
    """The same, split at a number that it keeps: both widths are free, in one list, at once."""

    def __init__(self):
        super().__init__()
        self.a, self.left, self.right = nn.Linear(4, 9), nn.Linear(5, 3), nn.Linear(4, 3)
        self.parts = [5, 4]

    def forward(self, x):
        left, right = self.a(x).relu().split(self.parts, dim=1)
        return self.left(left) + self.right(right)


def test_numbers_that_state_parts_follow_each_of_them():
    model = Stated()
    found = find_groups(model, torch.randn(2, 4), cache=False)
    assert {n: (g.channels, g.grade) for n, g in found.items()} == {
        "a[0:5]": (5, "exact"),
        "a[5:9]": (4, "exact"),
    }
    assert all(type(v) is int for v in model.parts)


class Bare(nn.Module):
    """A parameter without a layer, and a buffer, along a residual stream; tokens in front."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.token, self.place = (
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, 6, 8)),
        )
        self.scale = nn.Parameter(torch.rand(8))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], dim=1) + self.place
        x = x + self.scale * self.mix(x + self.shift).relu()
        return self.head(x[:, 0])


def test_bare_tensors_ride_along():
    model = Bare()
    found = find_groups(model, torch.randn(2, 5, 3), cache=False)
    assert (found["embed"].grade, found["embed"].inner) == ("exact", False)
    assert set(found["embed"].tensors) == {"token", "place", "scale", "shift"}
    assert found.tensors["place", 2] == (Segment("embed", 8),)


def test_a_single_channel_is_followed_too():
    net = nn.Sequential(
        nn.Conv2d(3, 1, 3),
        nn.BatchNorm2d(1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 1),
        nn.Tanh(),
        nn.Linear(1, 2),
    )
    found = find_groups(net.eval(), torch.randn(2, 3, 4, 4), cache=False)
    assert {n: (g.channels, g.grade) for n, g in found.items()} == {
        "0": (1, "exact"),
        "4": (1, "exact"),
    }
    assert found.axes["4", "in"] == (Segment("0", 1, 4),)


def test_layers_called_by_function_count_as_layers():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return F.linear(
                F.linear(x, self.a.weight, self.a.bias).relu(), self.b.weight, self.b.bias
            )

    found = discover(Functional(), torch.randn(2, 4))
    assert found["a"].consumers == ("b",)
    assert [(macs, where) for macs, _, where in found.products] == [(32, ""), (24, "")]


def test_the_trace_says_what_each_product_costs_and_where():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.Flatten(),
        nn.Linear(5 * 9, 2),
    )
    found = trace(net.eval(), Inputs((torch.randn(1, 3, 9, 9),))).products
    assert {p.where: p.macs for p in found} == {"0": 4 * 27 * 49, "2": 5 * 36 * 9, "4": 90}


@pytest.mark.parametrize(
    ("old", "new", "chunks"),
    [
        ([1, 12], [1, 3, 4], [([0], [0]), ([1], [1, 2])]),
        ([2, 3, 4], [6, 4], [([0, 1], [0]), ([2], [1])]),
        ([2, 6], [3, 4], [([0, 1], [0, 1])]),
        ([5, 1], [5], [([0, 1], [0])]),
    ],
)
def test_runs_of_dimensions_that_hold_the_same_elements(old, new, chunks):
    found = list(_chunks(old, new))
    assert [(a, b) for a, b in found if a or b] == chunks
    for a, b in found:
        assert np.prod([old[i] for i in a]) == np.prod([new[j] for j in b])


@pytest.mark.parametrize("activation", operations.ACTIVATIONS)
@pytest.mark.parametrize("in_place", ["", "_"])
def test_activations_have_a_rule_whatever_this_torch_tags_as_pointwise(activation, in_place):
    name = activation + in_place
    untagged = SimpleNamespace(overloadpacket=SimpleNamespace(__name__=name), tags=())
    assert operations.rule_of(untagged) is not None


def test_a_gated_linear_unit_takes_channels_in_pairs():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(4, 16), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(F.glu(self.a(x), -1))

    model, x = Gated(), torch.randn(2, 4)
    found = find_groups(model, x, cache=False)
    assert {n: (g.channels, g.grade) for n, g in found.items()} == {"a": (8, "exact")}
    small = resize(model, found, {"a": keep([1, 4, 6])})
    rows = [1, 4, 6, 9, 12, 14]
    expected = F.linear(
        F.glu(F.linear(x, model.a.weight[rows], model.a.bias[rows])),
        model.c.weight[:, [1, 4, 6]],
        model.c.bias,
    )
    assert torch.allclose(small(x), expected, atol=1e-6)
