import json
import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import timm
import torch
import zoo
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d, SimpleNorm
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn import functional as F

import widthbench
from widthbench.cache import write_json
from widthbench.width import certify, discover, find_groups, keep, proofs, resize
from widthbench.width.certify import fingerprint
from widthbench.width.doctor import diagnose
from widthbench.width.groups import Group, Segment
from widthbench.width.inputs import Inputs, random_like
from widthbench.width.proofs import _split_plan, errors_of_all, randomised

NETWORKS = [
    "resnet18",
    "mobilenetv2_100",
    "densenet121",
    "test_resnet",
    "test_efficientnet",
    "test_vit",
    "resnext26ts",
]


@pytest.mark.parametrize(("name", "made"), zoo.lengths(*NETWORKS))
def test_splits_and_gates_of_all_exact_groups_at_once(name, made):
    size = 160 if name == "test_vit" else 64
    model = made(name).eval()
    groups = find_groups(model, torch.randn(1, 3, size, size))
    split, removal = errors_of_all(model, groups, torch.randn(1, 3, size, size))
    assert sum(g.grade == "exact" for g in groups.values()) >= 6
    assert split < 1e-9
    assert removal < 1e-9


@pytest.mark.parametrize(("name", "made"), zoo.lengths("densenet121"))
def test_densenet_needs_all_its_concats_in_one_coordinate_system(name, made):
    """Rebuilding the graph after each group goes wrong without an exception: every group at once
    must not."""
    model = made(name).eval()
    groups = find_groups(model, torch.randn(1, 3, 64, 64))
    assert {g.grade for g in groups.values()} == {"exact"}
    assert max(errors_of_all(model, groups, torch.randn(1, 3, 64, 64))) < 1e-9


def test_a_wrong_index_map_is_caught():
    """A map that puts channels where they are not passes every shape check, and fails
    certification."""
    model = zoo.Dense()
    x = torch.randn(1, 3, 8, 8)
    groups = discover(model, x)
    swapped = dict(groups.axes)
    swapped["c", "in"] = (Segment("b", 6), Segment("a", 4))  # the concat is (a, b)
    wrong = certify(
        model, type(groups)(groups.members, swapped, groups.output_shapes), x, cache=False
    )
    assert wrong["a"].grade == wrong["b"].grade == "frozen"
    assert wrong["c"].grade == "exact"
    assert "moves the output" in wrong["a"].reason


def test_vision_transformers_resize_attention_and_mlps():
    groups = find_groups(timm.create_model("test_vit"), torch.randn(1, 3, 160, 160))
    grades = {n: g.grade for n, g in groups.items()}
    assert grades.pop("patch_embed.proj") == "coupled"
    assert set(grades.values()) == {"exact"}
    per_block = {n.removeprefix("blocks.0.") for n in grades if n.startswith("blocks.0.")}
    assert per_block == {"attn.qkv", "attn.qkv.heads", "mlp.fc1"}
    assert set(groups["patch_embed.proj"].tensors) == {"pos_embed", "cls_token"}


@pytest.mark.parametrize(
    ("name", "made"),
    [
        *zoo.lengths("ghostnet_050", "cspresnet50", "rexnet_100"),
        pytest.param("ghostnet_100", timm.create_model, marks=pytest.mark.slow),
    ],
)
def test_numbers_in_the_code_follow_the_widths(name, made):
    """GhostNet slices and CSPNet splits at numbers that they keep; Torch-Pruning's enumeration of
    ReXNet does not end."""
    model, x = made(name).eval(), torch.randn(1, 3, 64, 64)
    groups = find_groups(model, x)
    assert {g.grade for g in groups.values()} == {"exact"}
    assert max(errors_of_all(model, groups, x)) < 1e-9


def test_randomised_leaves_no_statistic_at_its_default():
    net = randomised(timm.create_model("test_resnet"))
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if "num_batches" not in name:
            assert tensor.dtype == torch.float64
            assert tensor.numel() == 1 or tensor.std() > 0, name


def test_grades_are_cached_per_architecture(fresh_cache):
    model, x = zoo.Plain(), torch.randn(1, 2, 8, 8)
    first = find_groups(model, x)
    (path,) = (fresh_cache / "grades").glob("*.json")
    content = json.loads(path.read_text())
    content["grades"]["conv1"] = ["frozen", "from the cache"]
    path.write_text(json.dumps(content))  # a digest that is no longer that of what it holds
    with pytest.warns(UserWarning, match="damaged grades"):
        assert find_groups(zoo.Plain(), x)["conv1"].grade == "exact"
    content.pop("digest")
    write_json(path, content)
    assert find_groups(zoo.Plain(), x)["conv1"].reason == "from the cache"
    assert find_groups(model, x, cache=False)["conv1"].grade == first["conv1"].grade == "exact"
    path.write_text("{ damaged")
    with pytest.warns(UserWarning, match="damaged grades"):
        assert find_groups(model, x)["conv1"].grade == "exact"
    assert json.loads(path.read_text())["grades"]["conv1"] == ["exact", ""]


class Between(nn.Module):
    """Applies a function, and adds a buffer, between two layers."""

    def __init__(self, function=torch.relu, buffer=None, setting=(1, 2)):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.function, self.setting = function, setting
        self.register_buffer("shift", torch.zeros(1) if buffer is None else buffer)

    def forward(self, x):
        return self.b(self.function(self.a(x)) + self.shift)


def flipped(t):
    return t.flip(1)


def test_the_cache_never_takes_one_network_for_another(fresh_cache):
    x = torch.randn(2, 4)
    assert find_groups(Between(), x)["a"].grade == "exact"
    assert find_groups(Between(flipped), x)["a"].grade == "frozen"
    assert find_groups(Between(lambda t: t.flip(1)), x)["a"].grade == "frozen"
    assert find_groups(Between(buffer=torch.rand(8)), x)["a"].tensors == (
        "shift",
    )  # one value per channel rides along
    keys = {
        fingerprint(m, discover(m, x), x)
        for m in (Between(), Between(flipped), Between(setting=(1, 3)), Between(torch.tanh))
    }
    assert len(keys) == 4
    assert None not in keys


def test_what_cannot_be_digested_is_not_cached(fresh_cache):
    x = torch.randn(2, 4)
    scope = {"nn": nn, "Between": Between, "__name__": "__main__"}
    exec(
        "class Typed(Between):\n    def forward(self, x):\n        return "
        "self.b(self.a(x).relu().roll(1, 1))",
        scope,
    )
    hooked = Between()
    hooked.a.register_forward_hook(lambda m, a, out: out)
    nameless = {"Between": Between}
    exec("class Typed(Between):\n    pass", nameless)  # its module is then said to be builtins
    for model in (scope["Typed"](), nameless["Typed"](), Between(function=Opaque()), hooked):
        assert fingerprint(model, discover(model, x), x) is None
        find_groups(model, x)
    assert not (fresh_cache / "grades").exists()


class Opaque:
    def __call__(self, t):
        return t.relu()


def test_a_grade_is_the_architectures_not_the_weights(monkeypatch):
    model, x = zoo.Plain(), torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        model.fc1.weight.copy_(
            -100 * model.fc1.weight.abs() - 100
        )  # its inputs are not negative: every unit is dead
    groups = discover(model, x)
    assert {g.grade for g in certify(model, groups, x, cache=False).values()} == {"exact"}
    # the package's attribute of that name is the function
    monkeypatch.setattr(proofs, "ATTEMPTS", 1)
    assert "does not depend" in certify(model, groups, x, cache=False)["fc1"].reason


class Auxiliary(nn.Module):
    """A head that only training uses, which no trace in eval mode shows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 6)
        self.end = nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return (self.b(h), self.end(self.aux(h))) if self.training else self.b(h)


def test_heads_that_training_alone_uses_ride_along():
    model, x = Auxiliary(), torch.randn(2, 4)
    groups = find_groups(model, x, cache=False)
    assert groups["a"].grade == "exact"
    assert groups["a"].consumers == ("b", "aux")
    assert sum(macs for macs, *_ in groups.products) == 4 * 8 + 8 * 3  # of evaluation
    small = resize(model, groups, {"a": keep([1, 2, 5])})
    with torch.no_grad():
        h = F.linear(small.a(x).relu(), model.aux.weight[:, [1, 2, 5]], model.aux.bias)
        assert torch.equal(small.train()(x)[1], model.end(h))
    assert groups["aux"].reason == "training mode alone uses its channels"


class Reading(nn.Module):
    """Training looks at channels by numbers of its own, through no layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return (self.b(h), h.view(len(x), 2, 4).sum(2)) if self.training else self.b(h)


def test_channels_that_training_reads_elsewhere_are_frozen():
    group = find_groups(Reading(), torch.randn(2, 4), cache=False)["a"]
    assert group.grade == "frozen"
    assert "does not run in training mode" in group.reason


class Shuffled(nn.Module):
    """Interleaves the two halves of its channels, as ShuffleNet does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return self.b(torch.stack([h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]], 2).flatten(1))


def test_a_shuffle_keeps_both_channels_of_each_pair():
    (group,) = find_groups(Shuffled(), torch.randn(2, 4), cache=False).values()
    assert (group.channels, group.grade) == (4, "exact")


def test_the_split_probe_permutes_within_blocks():
    rows = _split_plan(Group("g", 12, blocks=3)).rows
    assert [sorted(set(part.tolist())) for part in rows.view(3, -1)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    whole = _split_plan(Group("g", 50)).rows
    assert not torch.equal(whole, whole.sort().values)
    assert not torch.equal(whole[:50], torch.arange(50))


def test_layer_norm_over_channels_first_is_coupled_also_where_sides_coincide():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 16, 1), LayerNorm2d(16), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.b(self.norm(self.a(x)).relu()).mean((2, 3))

    assert find_groups(Net(), torch.randn(1, 3, 16, 16), cache=False)["a"].grade == "coupled"


class Caching(nn.Module):
    """Keeps a tensor with a history in an attribute, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = (
            nn.Linear(4, 8),
            nn.Linear(8, 3),
            nn.Parameter(torch.ones(1, 1)),
        )
        self.kept = {}

    def forward(self, x):
        self.kept["scale"] = self.scale * 2
        return {"out": self.b(self.a(x).relu() * self.kept["scale"]), "none": None, "count": 3}


def test_cached_tensors_with_a_history_and_odd_outputs_are_no_obstacle():
    model = Caching()
    assert find_groups(model, torch.randn(2, 4), cache=False)["a"].grade == "exact"


@pytest.mark.parametrize(("name", "made"), zoo.lengths("levit_128s", "pit_ti_224", "coat_tiny"))
def test_networks_that_trip_the_tools_are_diagnosed(name, made):
    model, size = made(name), zoo.side(name, made)
    x = torch.randn(1, 3, size, size)
    row = diagnose(model, find_groups(model, x), x)
    assert row["exact"] >= (4 if made is zoo.shorter else 8)


def test_the_fingerprint_sees_what_a_grade_depends_on():
    x = torch.randn(1, 2, 8, 8)

    def of(model, x=x):
        return fingerprint(model, discover(model, x), x)

    strided = zoo.Plain()
    strided.conv2.padding = (0, 0)
    assert of(zoo.Plain()) == of(zoo.Plain())
    assert of(zoo.Plain()) != of(strided)
    assert of(zoo.Plain()) != of(zoo.Plain(), torch.randn(1, 2, 10, 10))


class Own(nn.Module):
    """A layer whose instances choose their forward, and hold a number without axes."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.register_buffer("limit", torch.tensor(float("inf")))
        self.forward = self.forward_residual

    def forward_residual(self, x):
        return x + self.layer(x).clamp(max=self.limit)


def test_an_instances_own_forward_is_the_copys():
    model, x = nn.Sequential(nn.Linear(3, 8), Own(8), nn.Linear(8, 2)), torch.randn(2, 3)
    groups = find_groups(model, x)
    assert groups["0"].grade == "exact"
    small = resize(model, groups, {"0": keep([1, 2, 5])})
    with torch.no_grad():
        small[1].layer.weight.zero_()
        small[1].layer.bias.zero_()
        assert torch.equal(small(x), small[2](small[0](x)))


def test_partial_convolutions_of_fasternet_are_exact():
    model, x = timm.create_model("fasternet_t0"), torch.randn(1, 3, 64, 64)
    assert {g.grade for g in find_groups(model, x).values()} == {"exact"}


class Dividing(nn.Module):
    """Divides by its first width, which no resize may change; what comes behind hides it or not."""

    def __init__(self, end):
        super().__init__()
        self.c1, self.c2, self.fc, self.end = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3),
            nn.Linear(8, 5),
            end,
        )

    def forward(self, x):
        h = F.relu(self.c1(x))
        return self.end(self.fc(F.relu(self.c2(h / h.shape[1])).mean((2, 3))))


@dataclass
class Held:
    logits: torch.Tensor


HIDING = {
    "mask": lambda y: y.masked_fill(torch.tensor([False, False, False, True, False]), -1e9),
    "infinite mask": lambda y: y.masked_fill(
        torch.tensor([False, False, False, True, False]), -math.inf
    ),
    "saturated": lambda y: torch.sigmoid(1e3 * y),
    "beside a large one": lambda y: (y, 1e9 * torch.ones_like(y)),
    "no batch": lambda y: y.sum(),
    "vector": lambda y: y[:, 0],
}


@pytest.mark.parametrize("end", HIDING.values(), ids=HIDING)
def test_large_entries_of_an_output_hide_no_error(end):
    torch.manual_seed(0)
    found = find_groups(Dividing(end).eval(), torch.randn(1, 3, 8, 8), cache=False)
    assert found["c1"].grade == "frozen"
    assert "moves the output" in found["c1"].reason
    assert found["c2"].grade == "exact"


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda y: (y, Held(y)), "its output holds a Held, which cannot be seen into"),
        (lambda y: y.argmax(1), "its output holds no floating-point numbers"),
    ],
)
def test_outputs_that_cannot_be_compared_freeze_everything(end, reason):
    found = find_groups(Dividing(end).eval(), torch.randn(1, 3, 8, 8), cache=False)
    assert {g.grade for g in found.values()} == {"frozen"}
    assert reason in found["c1"].reason


class Trained(nn.Module):
    """Reads two channels in training mode only; and drops some at random, which must not be in the
    way."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        h = F.relu(self.c1(x))
        y = self.fc(self.drop(F.relu(self.c2(h)).mean((2, 3))))
        return (y, h[:, :2].mean((2, 3))) if self.training else y


def test_what_training_alone_computes_must_not_change():
    found = find_groups(Trained(), torch.ones(1, 3, 8, 8), cache=False)
    assert found["c1"].reason.startswith("in training mode splitting its channels moves the output")
    assert found["c2"].grade == "exact"


def test_certification_leaves_the_random_state_alone():
    model, state = Trained(), torch.get_rng_state()
    find_groups(model, torch.ones(1, 3, 8, 8), cache=False)
    assert torch.equal(torch.get_rng_state(), state)


class Equal(nn.Module):
    """Two branches whose widths must be equal, which only a plan for one of them alone shows."""

    def __init__(self, name):
        super().__init__()
        self.conv1, self.f1, self.f2 = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)
        self.name = name
        self.add_module(name, nn.Conv2d(3, 8, 3))

    def forward(self, x):
        h, g = F.relu(self.conv1(x)), F.relu(self.get_submodule(self.name)(x))
        return self.f1(h.mean((2, 3))) + self.f2(g.reshape(len(x), h.shape[1] + 0, -1).mean(-1))


@pytest.mark.parametrize("name", ["skip", "side", "branch", "gate"])
def test_groups_are_tried_alone_whatever_they_are_called(name):
    found = find_groups(Equal(name), torch.randn(1, 3, 8, 8), cache=False)
    assert {g.grade for g in found.values()} == {"frozen"}


class EqualAmongMany(Equal):
    """The same behind nine layers that may change freely, none of which is to be tried for itself
    unless something is wrong."""

    def __init__(self, name, equal):
        super().__init__(name)
        self.stem = nn.Sequential(
            *[nn.Conv2d(3 if i == 0 else 6, 6 if i < 9 else 3, 1) for i in range(10)]
        )
        self.equal = equal

    def forward(self, x):
        h, g = F.relu(self.conv1(x := self.stem(x))), F.relu(self.get_submodule(self.name)(x))
        return self.f1(h.mean((2, 3))) + self.f2(
            g.reshape(len(x), h.shape[1] + 0 if self.equal else g.shape[1], -1).mean(-1)
        )


@pytest.mark.parametrize("name", ["skip", "gate"])
@pytest.mark.parametrize("equal", [True, False])
def test_groups_that_fit_only_together_are_found_among_many(name, equal, monkeypatch):
    tried = []
    real = proofs._resized
    monkeypatch.setattr(
        proofs,
        "_resized",
        lambda net, groups, plan: tried.append(plan) or real(net, groups, plan),
    )
    found = find_groups(EqualAmongMany(name, equal), torch.randn(1, 3, 8, 8), cache=False)
    grades = {n: g.grade for n, g in found.items()}
    frozen = {"conv1", name} if equal else set()
    assert {n for n, g in grades.items() if g == "frozen"} == frozen
    assert any(len(p) == 1 for p in tried) == equal


class Uneven(nn.Module):
    """``chunk`` into 4, 4 and 3 channels, which no other width gives."""

    def __init__(self):
        super().__init__()
        self.c1, self.a, self.b, self.c = (
            nn.Conv2d(3, 11, 3),
            nn.Conv2d(4, 2, 1),
            nn.Conv2d(4, 2, 1),
            nn.Conv2d(3, 2, 1),
        )

    def forward(self, x):
        p, q, r = F.relu(self.c1(x)).chunk(3, 1)
        return self.a(p) + self.b(q) + self.c(r)


class Squeezed(nn.Module):
    """Runs at any width but one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x)[:, :, None].relu().squeeze())


class Chunked(nn.Module):
    """Queries, keys and values by ``chunk``, heads by ``view``."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o, self.heads = nn.Linear(24, 72), nn.Linear(24, 24), 3

    def forward(self, x):
        q, k, v = (
            t.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Uneven(), (1, 3, 8, 8)), (Squeezed(), (2, 4)), (Chunked(), (1, 7, 24))],
    ids=["uneven", "squeezed", "chunked"],
)
def test_every_exact_group_takes_any_legal_width_alone(model, shape):
    x = torch.randn(shape)
    found = find_groups(model, x, cache=False)
    for name, group in found.items():
        if group.grade == "exact":
            for each in range(1, group.channels // group.blocks + 1):
                rows = torch.arange(group.channels).reshape(group.blocks, -1)[:, :each].flatten()
                assert torch.isfinite(resize(model, found, {name: keep(rows)})(x)).all(), (
                    name,
                    each,
                )


def test_what_attention_keeps_in_evaluation_is_forgotten():
    model, x = zoo.shorter("levit_128s").eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        model(x)
    found = find_groups(model, x)
    heads = [n for n, g in found.items() if g.heads and g.grade == "exact"]
    assert len(heads) >= 3
    small = resize(model, found, {heads[0]: keep(range(found[heads[0]].channels - 1))})
    assert small(x).shape == (1, 1000)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_mambaout"])
def test_a_new_classifier_fits_a_resized_network(name):
    size = timm.get_pretrained_cfg(name).input_size[1]
    model, x = timm.create_model(name), torch.randn(1, 3, size, size)
    small = widthbench.apply("l1-norm", model, budget="channels:0.5", example_input=x, scope="all")
    small.reset_classifier(5)
    assert small(x).shape == (1, 5)


def test_the_fingerprint_sees_what_a_helper_elsewhere_computes():
    x = torch.randn(1, 3, 8, 8)
    prints = set()
    for helper in (lambda h: h * 0.5, lambda h: h * 0.25, lambda h: h / h.shape[1]):
        model = Helped()
        HELPERS["norm"] = helper
        prints.add(fingerprint(model, discover(model, x), x))
    assert len(prints) == 3


HELPERS = {}


class Helped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.b(HELPERS["norm"](F.relu(self.a(x))))


@pytest.mark.parametrize(
    "sizes", [[64], [3] * 12 + [64] * 12, [2] * 9, [8, 64, 128, 256], [1, 1, 4]]
)
def test_any_two_groups_keep_different_shares_in_some_network(sizes):
    """Or widths that must be equal, or in proportion, would not be found out."""
    chosen = [Group(f"g{i}", n) for i, n in enumerate(sizes)]
    rounds = [widths for widths, _ in proofs._rounds(chosen)]
    assert rounds[0] == proofs._widths(chosen)
    assert len(rounds) <= 3 + 2 * max(1, (len(sizes) - 1).bit_length())
    for i, a in enumerate(sizes):
        assert any(r[i] == 1 for r in rounds)
        assert all(1 <= r[i] <= a for r in rounds)
        assert rounds[0][i] < a or a == 1
        for j, b in enumerate(sizes[:i]):
            assert any(r[i] * b != r[j] * a for r in rounds) or a == b == 1


class Proportional(nn.Module):
    """The second width must be twice the first, which is no tie."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 16)
        self.c, self.d = nn.Linear(8, 3), nn.Linear(16, 3)

    def forward(self, x):
        h, g = self.a(x).relu(), self.b(x).relu()
        return self.c(h) + self.d(g.reshape(len(x), h.shape[1] + h.shape[1]))


def test_a_width_that_must_be_in_proportion_to_another_is_found_out():
    found = find_groups(Proportional(), torch.randn(2, 4), cache=False)
    assert {g.grade for g in found.values()} == {"frozen"}


class Leaning(nn.Module):
    """Either layer fits the other one if both are narrow; the output depends on one of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)
        self.c, self.d = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        h, g = self.a(x).relu(), self.b(x).relu()
        if (self.a.weight.numel() < 32) != (self.b.weight.numel() < 32):
            raise ValueError("both or none")
        return self.c(h) + self.d(g) * 0


def test_what_is_left_is_asked_again_without_those_that_failed():
    found = find_groups(Leaning(), torch.randn(2, 4), cache=False)
    assert found["a"].grade == "frozen"
    assert "both or none" in found["a"].reason


class Doubling(Leaning):
    """Either layer gives twice as much where it alone is narrow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(4, 16)
        self.c, self.d = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        h, g = self.a(x).relu(), self.b(x).relu()
        alone = (self.a.weight.numel() < 64) != (self.b.weight.numel() < 64)
        return self.c(h) * (2 if alone else 1) + self.d(g) * 0


def test_removal_is_asked_again_without_those_that_failed():
    found = find_groups(Doubling(), torch.randn(2, 4), cache=False)
    assert found["a"].grade == "frozen"
    assert "removing channels instead of gating them" in found["a"].reason


class InTraining(nn.Module):
    """Training mode alone does something with the channels that depends on all of them."""

    def __init__(self, more):
        super().__init__()
        self.a, self.o, self.more = nn.Linear(4, 12), nn.Linear(12, 3), more
        nn.init.constant_(self.a.bias, -1.0)

    def forward(self, x):
        h = self.a(x).tanh()
        y = self.o(h)
        return y + self.more(h) if self.training else y


ACROSS = {
    "the largest": lambda h: h.amax(1, keepdim=True),
    "a mean beside a draw": lambda h: h.mean(1, keepdim=True) * torch.full((1,), 0.8).bernoulli(),
    "a sum after dropout": lambda h: F.dropout(h, 0.3, True).sum(1, keepdim=True) / 12,
    "the first three after dropout": lambda h: F.dropout(h, 0.3, True)[:, :3],
}


@pytest.mark.parametrize("more", ACROSS)
def test_what_training_mode_does_across_channels_freezes_them(more):
    found = find_groups(InTraining(ACROSS[more]), torch.randn(2, 4), cache=False)
    assert found["a"].grade == "frozen"
    assert "training mode" in found["a"].reason


def test_dropout_in_a_forward_freezes_nothing():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.o(F.dropout(self.a(x).relu(), 0.3, self.training))

    found = find_groups(Dropped(), torch.randn(2, 4), cache=False)
    assert found["a"].grade == "exact"


class Selecting(nn.Module):
    """Passes on the channels that a number in it picks, which must stay where they are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(9, 8)
        self.c, self.d = nn.Linear(12, 8), nn.Linear(8, 3)
        self.e = nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x)
        picked = h[:, [0, 2, 3, 6, 7, 8, 9, 10, 11]]
        return self.d(self.b(picked).relu()) + self.e(self.c(h).relu())


def test_what_must_stay_takes_nothing_else_with_it():
    found = find_groups(Selecting(), torch.randn(2, 4), cache=False)
    assert {n: found[n].grade for n in ("b", "c")} == {"b": "exact", "c": "exact"}
    assert {g.grade for n, g in found.items() if n.startswith("a")} == {"frozen"}


class Strict(Leaning):
    def forward(self, x):
        if self.a.weight.numel() != 32:
            raise AssertionError
        return self.c(self.a(x).relu())


def test_an_error_without_words_is_named_by_where_it_was_raised():
    found = find_groups(Strict(), torch.randn(2, 4), cache=False)
    assert "AssertionError in forward: raise AssertionError" in found["a"].reason


class Pooled(nn.Module):
    """Takes any image; ``end`` makes something of its last map."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 4, 1)
        self.c, self.end = nn.Linear(8, 3), end

    def forward(self, x):
        return self.c(self.end(self.b(self.a(x).relu()).relu()))


def test_a_proof_takes_the_smallest_image_that_shows_the_same():
    x = torch.randn(1, 3, 256, 256)

    def side(end):
        model = Pooled(end).eval()
        return proofs.smallest(model, discover(model, x), Inputs((x,))).shapes[0][-1]

    assert side(lambda h: h.mean((2, 3))) == 32  # its last map is 2 by 2 then
    grown = lambda h: h.mean((2, 3)) if h.shape[-1] > 4 else h.amax((2, 3))  # noqa: E731
    assert side(grown) == 96
    assert side(lambda h: h[:, :, :16, :16].flatten(2).mean(2)) == 32
    auxiliary = Pooled(lambda h: h.mean((2, 3))).eval()

    def end(h):  # training takes maps of three pixels at least
        h = F.conv2d(h, torch.ones(8, 8, 3, 3)) if auxiliary.training else h
        return h.mean((2, 3))

    auxiliary.end = end
    assert proofs.smallest(auxiliary, discover(auxiliary, x), Inputs((x,))).shapes[0][-1] == 64
    fixed = Pooled(lambda h: h.reshape(1, 8, 256).mean(2)).eval()
    assert proofs.smallest(fixed, discover(fixed, x), Inputs((x,))).shapes == (x.shape,)
    one = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    x = torch.randn(2, 4)
    assert proofs.smallest(one, discover(one, x), given := Inputs((x,))) is given


@pytest.mark.parametrize(
    "norm",
    [nn.RMSNorm(8), RmsNorm(8), SimpleNorm(8), RmsNorm2d(8)]
    + [GlobalResponseNorm(8, channels_last=last) for last in (False, True)],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_of_all_kinds_couple_what_they_run_across(norm):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 4, 1)
            self.second = isinstance(norm, RmsNorm2d) or getattr(norm, "channel_dim", -1) == 1

        def forward(self, x):
            h = self.a(x)
            if not self.second:
                h = self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                h = self.norm(h)
            return self.b(h)

    model, x = Net().eval(), torch.randn(2, 3, 5, 5)
    nn.init.normal_(norm.weight)
    groups = find_groups(model, x, cache=False)
    assert {n: (g.grade, g.riders) for n, g in groups.items()} == {"a": ("coupled", ("norm",))}
    small = resize(model, groups, {"a": keep([1, 2, 6])})
    assert torch.equal(small.norm.weight, norm.weight[[1, 2, 6]])
    assert torch.isfinite(small(x)).all()


class Counting(Auxiliary):
    """Estimates something in training, as quantisers and teachers do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return super().forward(x)


def test_looking_at_training_mode_leaves_the_network_as_it_was():
    model = Counting().eval()
    groups = find_groups(model, torch.randn(2, 4), cache=False)
    assert groups["a"].consumers == ("b", "aux")
    assert float(model.seen) == 0
    assert not any(m.training for m in model.modules())


class Dividing2d(nn.Conv2d):
    """A convolution of its own kind, which no label shows: it divides by its width."""

    def forward(self, x):
        return super().forward(x / x.shape[1])


def test_convolutions_of_their_own_kind_hide_nothing_behind_a_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), LayerNorm2d(8), Dividing2d(8, 4, 1)).eval()
    (group,) = find_groups(model, torch.randn(2, 3, 5, 5), cache=False).values()
    assert group.grade == "frozen"
    assert "moves the output" in group.reason


class Ordered(nn.Module):
    """Two layers with an order of channels between them."""

    def __init__(self, order=None):
        super().__init__()
        self.a, self.b, self.order = nn.Linear(3, 8), nn.Linear(8, 2), order

    def forward(self, x):
        y = self.a(x).tanh()
        if self.order is not None:
            # as if the resized network knew no better: the same order of those that are left
            y = y[:, self.order[: y.shape[1]] % y.shape[1]]
        return self.b(y)


class Summed(nn.Linear):
    """Reads its weights once more than a gate on its inputs would reach."""

    def forward(self, x):
        return super().forward(x) + self.weight.square().sum()


def test_each_question_is_answered_by_itself():
    """None of them leans on another one: wrong index maps fail in each."""
    groups = discover(Ordered().eval(), torch.randn(2, 3))

    def answers(net):
        proof = proofs._Proof(randomised(net), groups, random_like(Inputs((torch.randn(2, 3),)), 1))
        return [bool(stage(["a"])) for stage in (proof.removes, proof.splits, proof.weighs)]

    assert answers(Ordered()) == [False, False, False]
    assert answers(Ordered(torch.tensor([3, 0, 7, 1, 6, 2, 5, 4]))) == [True, True, False]
    net = Ordered()
    net.b = Summed(8, 2)
    assert answers(net)[2]


@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8, 8), (16, 8), (64, 64, 32), (100, 300)])
def test_no_two_groups_keep_the_same_share_of_their_channels(sizes):
    """Else widths in a fixed proportion would pass, whatever the network does with others."""
    kept = proofs._widths([Group(f"g{i}", n, producers=("a",)) for i, n in enumerate(sizes)])
    assert len({Fraction(k, n) for k, n in zip(kept, sizes, strict=True)}) == len(sizes)


def test_what_is_not_finite_is_a_difference_unless_it_stays():
    nan, inf = float("nan"), float("inf")
    one = [torch.tensor([1.0, 2.0])]
    assert proofs._error([torch.tensor([nan, 2.0])], one) == inf
    assert proofs._error([torch.tensor([inf, 2.0])], one) > 1e30
    assert proofs._error(one, [torch.tensor([nan, 2.0])]) == inf
    assert proofs._error([torch.tensor([inf, 2.0])], [torch.tensor([inf, 2.0])]) == 0.0


def test_constant_weights_are_drawn_and_others_kept():
    """A head that starts at zero would hide everything behind it."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    nn.init.zeros_(net[1].weight)
    drawn = randomised(net)
    torch.testing.assert_close(drawn[0].weight, net[0].weight.double())
    assert len(drawn[1].weight.unique()) == 18


def test_groups_that_pass_alone_and_not_together_are_told_apart():
    class Enough(nn.Module):
        """Needs more than eight channels of both together."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(16, 2)

        def forward(self, x):
            a, b = self.a(x).tanh(), self.b(x).tanh()
            if int(a.shape[1]) + int(b.shape[1]) <= 8:
                raise ValueError("too narrow")
            return self.head(torch.cat([a, b], 1))

    groups = find_groups(Enough().eval(), torch.randn(2, 3), cache=False)
    assert {n: (g.grade, g.reason) for n, g in groups.items()} == {
        "a": ("exact", ""),
        "b": ("frozen", "passes alone, but not together with a"),
    }


def test_outputs_of_other_shapes_and_undeclared_widths_are_no_proof(monkeypatch):
    assert proofs._difference([torch.zeros(2)], [torch.zeros(3)]) == "changes the output's shape"
    assert (
        proofs._difference([torch.zeros(2)], [torch.zeros(2)] * 2) == "changes the output's shape"
    )
    monkeypatch.setattr(proofs, "disagreements", lambda net: ["a: declares 8, holds 5"])
    groups = find_groups(Ordered().eval(), torch.randn(2, 3), cache=False)
    assert groups["a"].grade == "frozen"
    assert "declared and real shapes differ at a: declares 8" in groups["a"].reason
