"""torch's own attention, in layers that can be resized."""

import itertools
import math

import pytest
import torch
import torchvision
from torch import nn

import widthbench
from widthbench.width import find_groups, separated
from widthbench.width.attention import SeparateAttention


def options(**kinds):
    return [dict(zip(kinds, values, strict=True)) for values in itertools.product(*kinds.values())]


@pytest.mark.parametrize(
    "made", options(bias=[True, False], batch_first=[True, False], other=[0, 1])
)
@pytest.mark.parametrize(
    "asked", options(need_weights=[True, False], average_attn_weights=[True, False])
)
def test_it_does_what_torchs_own_does(made, asked):
    torch.manual_seed(0)
    made = dict(made)
    own = {"kdim": 5, "vdim": 7} if made.pop("other") else {}
    attention = nn.MultiheadAttention(12, 3, **made, **own).double().eval()
    for p in attention.parameters():
        nn.init.normal_(p)
    q, k, v = (torch.randn(2, n, d).double() for n, d in ((4, 12), (6, 5), (6, 7)))
    if not own:
        k, v = torch.randn(2, 6, 12).double(), torch.randn(2, 6, 12).double()
    padding = torch.tensor([[False] * 6, [False, False, True, False, True, True]])
    masks = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(4, 6).double(), "key_padding_mask": padding},
        {"attn_mask": (torch.rand(2 * 3, 4, 6) < 0.3) & (torch.arange(6) > 0)},
    ]
    if not made["batch_first"]:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    separate = SeparateAttention(attention)
    for mask in masks:
        expected, weights = attention(q, k, v, **mask, **asked)
        found, others = separate(q, k, v, **mask, **asked)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        if weights is None:
            assert others is None
        else:
            torch.testing.assert_close(others, weights, rtol=1e-12, atol=1e-12)
    one = (q[0], k[0], v[0]) if made["batch_first"] else (q[:, 0], k[:, 0], v[:, 0])
    torch.testing.assert_close(separate(*one, **asked)[0], attention(*one, **asked)[0])


def test_a_causal_hint_without_a_mask_is_refused_as_by_torch():
    attention, x = nn.MultiheadAttention(12, 3, batch_first=True), torch.randn(2, 5, 12)
    for kind in (attention, SeparateAttention(attention)):
        with pytest.raises(RuntimeError, match="is_causal"):
            kind(x, x, x, is_causal=True)


def test_networks_that_keep_what_they_have_worked_out_are_copied():
    net = Reads(need_weights=False)
    net.kept = net.stem.weight * 2  # a tensor with a history, which deepcopy refuses
    assert isinstance(separated(net).attention, SeparateAttention)


def test_dropout_falls_in_training_alone():
    attention = nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True)
    separate, x = SeparateAttention(attention), torch.randn(2, 5, 12)
    for need in (True, False):
        assert not torch.equal(separate(x, x, x, need_weights=need)[0], separate.eval()(x, x, x)[0])
        separate.train()


class Reads(nn.Module):
    def __init__(self, **asked):
        super().__init__()
        self.stem, self.head, self.asked = nn.Linear(5, 12), nn.Linear(12, 4), asked
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x):
        h = self.stem(x)
        out, weights = self.attention(h, h, h, **self.asked)
        y = self.head(h + out)
        return (y, weights) if self.asked.get("average_attn_weights") else y


@pytest.mark.parametrize("asked", [{}, {"need_weights": False}])
def test_heads_and_their_dimensions_can_go(asked):
    net, x = Reads(**asked).eval(), torch.randn(2, 6, 5)
    groups = find_groups(separated(net), x, cache=False)
    assert {n: (g.grade, g.heads) for n, g in groups.items()} == {
        "stem": ("exact", False),
        "attention.q_proj": ("exact", False),
        "attention.q_proj.heads": ("exact", True),
        "attention.v_proj": ("exact", False),
    }
    small = widthbench.apply("l1-norm", net, budget="channels:0.67", example_input=x)
    assert (small.attention.num_heads, small(x).shape) == (2, (2, 6, 4))
    assert isinstance(net.attention, nn.MultiheadAttention)  # the network given is as it was


def test_weights_averaged_over_heads_keep_them_if_somebody_reads_them():
    net, x = Reads(average_attn_weights=True).eval(), torch.randn(2, 6, 5)
    groups = find_groups(separated(net), x, cache=False)
    assert groups["attention.q_proj.heads"].grade == "frozen"
    assert "mean" in groups["attention.q_proj.heads"].reason


def test_encoders_and_decoders_of_torch():
    x, y = torch.randn(2, 6, 12), torch.randn(2, 5, 12)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 24, batch_first=True), 2)
    net = nn.Sequential(nn.Linear(12, 12), encoder, nn.Linear(12, 3)).eval()
    separate = separated(net)
    with torch.no_grad():
        torch.testing.assert_close(separate(x), net(x))
        padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
        masked = separate[1](x, src_key_padding_mask=padding)
        torch.testing.assert_close(
            masked[~padding], encoder(x, src_key_padding_mask=padding)[~padding]
        )
    groups = find_groups(separate, x, cache=False)
    assert [g.grade for g in groups.values()].count("frozen") == 0
    both = nn.Transformer(12, 3, 1, 1, 24, batch_first=True).eval()
    torch.testing.assert_close(separated(both)(x, y), both(x, y))


def test_torchvisions_vit_can_lose_all_but_its_classes():
    net = torchvision.models.VisionTransformer(32, 16, 2, 4, 16, 32, num_classes=5)
    x = torch.randn(1, 3, 32, 32)
    nn.init.normal_(net.heads.head.weight)
    groups = find_groups(separated(net.eval()), x, cache=False)
    assert {g.grade for g in groups.values()} == {"exact", "coupled"}
    small = widthbench.apply("l1-norm", net, budget="channels:0.5", scope="all", example_input=x)
    assert small(x).shape == (1, 5)


def test_the_reason_names_the_remedy():
    groups = find_groups(Reads().eval(), torch.randn(2, 6, 5), cache=False)
    assert groups["stem"].reason == (
        "the bare weights 'attention.in_proj_weight' read it: widthbench.separated(model) makes"
        " layers of them"
    )


def test_attention_with_keys_of_its_own_stays():
    own = nn.MultiheadAttention(12, 3, add_bias_kv=True)
    assert separated(nn.Sequential(own))[0] is own
    with pytest.raises(ValueError, match="keys of its own"):
        SeparateAttention(own)
    shared = nn.MultiheadAttention(12, 3)
    twice = separated(nn.ModuleList([shared, shared]))
    assert twice[0] is twice[1]
    assert isinstance(separated(shared), SeparateAttention)


class Stream(nn.Module):
    """Attention whose code takes its width from the stream's, as most of timm's does."""

    def __init__(self, kind):
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Linear(5, 24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.head, self.num_heads, self.kind = nn.Linear(24, 3), 4, kind

    def forward(self, x):
        x = self.stem(x)
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.kind == "across channels":  # XCiT, DaViT
            weights = (q.transpose(-1, -2) @ k).softmax(-1)
            y = (weights @ v.transpose(-1, -2)).permute(0, 3, 1, 2)
        else:  # Swin Transformer V2
            q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
            y = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)
        return self.head(x + self.proj(y.reshape(B, N, C)))


@pytest.mark.parametrize("kind", ["across channels", "normalised queries and keys"])
def test_heads_go_with_the_stream_where_their_dimensions_cannot(kind):
    net, x = Stream(kind).eval(), torch.randn(2, 7, 5)
    groups = find_groups(net, x, cache=False)
    heads = groups["stem.heads"]
    assert (heads.grade, heads.channels, heads.heads, heads.inner) == ("exact", 4, True, False)
    assert all(g.reason for n, g in groups.items() if n != "stem.heads")
    small = widthbench.apply("l1-norm", net, budget="channels:0.5", scope="all", example_input=x)
    assert (small.num_heads, small.stem.out_features, small.qkv.out_features) == (2, 12, 36)
    assert small(x).shape == (2, 7, 3)


def test_heads_stay_where_their_dimensions_are_given_out():
    class Given(Stream):
        def forward(self, x):
            return super().forward(x), self.stem(x)

    groups = find_groups(Given("across channels").eval(), torch.randn(2, 7, 5), cache=False)
    assert {g.grade for g in groups.values()} == {"frozen"}


def test_a_module_that_goes_by_several_names_is_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
            self.again, self.head = self.first, nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.again(self.first(x)))

    net, x = Twice().eval(), torch.randn(2, 6)
    assert find_groups(net, x, cache=False)["first.0"].grade == "exact"
    small = widthbench.apply("l1-norm", net, budget="channels:0.5", example_input=x)
    assert small.again is small.first
    assert small.first[0].out_features == 8
    net.again = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
    net.again[0].weight = net.first[0].weight  # one tensor in two layers
    reasons = {g.reason for g in find_groups(net, x, cache=False).values()}
    assert any("shares its tensors with another layer" in r for r in reasons)


SCALES = {
    "power of a shape": lambda self, q, k: (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2),
    "over the root": lambda self, q, k: q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)),
    "times one over the root": lambda self, q, k: (
        (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.size(-1)))
    ),
    "power of a number": lambda self, q, k: (q * self.head_dim**-0.5) @ k.transpose(-1, -2),
}


@pytest.mark.parametrize("how", SCALES)
def test_a_scale_that_the_code_works_out_from_a_width_is_followed(how):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(5, 12) for _ in range(3))
            self.head, self.heads, self.head_dim = nn.Linear(12, 3), 3, 4

        def forward(self, x):
            parts = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
            if how == "power of a number":
                parts = (
                    f(x).reshape(len(x), -1, self.heads, self.head_dim)
                    for f in (self.q, self.k, self.v)
                )
            q, k, v = (t.transpose(1, 2) for t in parts)
            y = SCALES[how](self, q, k).softmax(-1) @ v
            return self.head(y.transpose(1, 2).flatten(2))

    net, x = Scaled().eval(), torch.randn(2, 7, 5)
    groups = find_groups(net, x, cache=False)
    assert {g.grade for g in groups.values()} == {"exact"}
    assert groups["q"].keys == ("k",)
    assert math.sqrt is math.__dict__["sqrt"]
    assert type(math.sqrt(4)) is float
