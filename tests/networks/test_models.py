import pytest
import timm
import torch
import zoo
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import widthbench
from widthbench.data import sources, splits
from widthbench.errors import UsageError
from widthbench.networks import models, weights
from widthbench.paths import data_dir
from widthbench.training.measuring import accuracy
from widthbench.width.certify import find_groups
from widthbench.width.cost import count_macs


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("lenet_300_100", 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
        ("lenet5", 20 * 25 + 20 + 50 * 500 + 50 + 800 * 500 + 500 + 500 * 10 + 10),
        ("mlp_sigmoid", 784 * 100 + 100 + 100 * 10 + 10),
    ],
)
def test_small_networks_have_the_documented_size_and_are_timm_models(name, params):
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == params
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_layers_of_lenet_300_100_are_named_as_the_published_weights():
    assert [n for n, _ in timm.create_model("lenet_300_100").named_parameters()][::2] == [
        "ip1.weight",
        "ip2.weight",
        "ip3.weight",
    ]


@pytest.mark.parametrize(
    ("name", "size"), [("lenet5", 32), ("test_vit", 32), ("test_resnet", 64), ("mlp_sigmoid", 8)]
)
def test_networks_are_built_for_the_size_that_is_asked_for(name, size):
    model = models.create(name, classes=7, channels=1, size=size)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
    assert not model.training


def test_the_seed_decides_the_weights_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    a, b, c = (models.create("lenet5", classes=10, channels=1, size=28, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.conv1.weight, b.conv1.weight)
    assert not torch.equal(a.conv1.weight, c.conv1.weight)


def test_reinitialise_draws_every_weight_anew_for_its_own_shape():
    model = models.create("test_resnet", classes=10, channels=1, size=32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.fill_(3.0)
    models.reinitialise(model, seed=5)
    for name, value in model.state_dict().items():
        if value.dim() > 1:
            assert not torch.equal(value, before[name])
        elif "running_mean" in name:
            assert float(value.abs().max()) == 0
    weight = model.layer1[0].conv1.weight  # timm draws ResNets with kaiming_normal, fan out
    assert abs(float(weight.std()) - (2 / (weight.shape[0] * 9)) ** 0.5) < 0.01


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenet6", "unknown model 'lenet6'; did you mean 'lenet5'"),
        ("resnet_50", "did you mean 'resnet"),
    ],
)
def test_unknown_networks_get_a_suggestion(name, message):
    with pytest.raises(UsageError, match=message):
        models.create(name, classes=10, channels=1, size=28)


def test_settings_that_a_network_refuses_are_named():
    with pytest.raises(
        UsageError, match=r"model 'lenet5' refuses 10 classes, 1 x 28 x 28 px: .*depth"
    ):
        models.create("lenet5", classes=10, channels=1, size=28, depth=3)


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [
        ("vgg16_cifar", 313.2, 14_724_042),  # Li et al. 2017: 313 M
        ("resnet20_cifar", 40.6, 269_722),  # He et al. 2016: 0.27 M parameters
        ("resnet56_cifar", 125.5, 853_018),  # 0.85 M; Li et al. 2017: 125 M
        ("mobilenetv1_100_cifar", 46.4, 3_217_226),  # the neuron merging document: 3.2 M
        ("mobilenetv1_025_cifar", 3.3, 215_642),  # Howard et al. 2017: a quarter of the width
        ("mobilenetv2_100_cifar", 88.0, 2_236_682),
    ],
)
def test_networks_for_32_px_have_the_published_size(name, macs, params):
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == params
    assert count_macs(model.eval(), torch.randn(1, 3, 32, 32)) / 1e6 == pytest.approx(
        macs, abs=0.06
    )
    assert models.native(name) == (3, 32, 32, 10)


@pytest.mark.parametrize(
    ("name", "side"), [("mobilenetv1_100_cifar", 2), ("mobilenetv2_100_cifar", 4)]
)
def test_32_px_mobilenets_keep_timms_tensors_and_more_resolution(name, side):
    model, plain = (
        timm.create_model(name),
        timm.create_model(name.removesuffix("_cifar"), num_classes=10),
    )
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    assert model.forward_features(torch.randn(2, 3, 32, 32)).shape[-2:] == (side, side)


def test_shortcuts_a_and_b():
    a, b = timm.create_model("resnet20_cifar"), timm.create_model("resnet20_cifar", shortcut="B")
    assert (
        sum(p.numel() for p in b.parameters()) - sum(p.numel() for p in a.parameters())
        == 16 * 32 + 64 + 32 * 64 + 128
    )
    x = torch.randn(1, 16, 8, 8)
    out = a.layer2[0].shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert float(out[:, :8].abs().sum() + out[:, 24:].abs().sum()) == 0
    with pytest.raises(UsageError, match="shortcut must be 'A' or 'B', not 'C'"):
        models.create("resnet20_cifar", classes=10, channels=3, size=32, shortcut="C")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tanh", nn.Tanh),
        ("softsign", nn.Softsign),
        ("elu", nn.ELU),
        ("selu", nn.SELU),
        ("leaky_relu", nn.LeakyReLU),
        ("hardswish", nn.Hardswish),
        ("ReLU", nn.ReLU),
        ("gelu", nn.GELU),
    ],
)
def test_activations_go_by_name(name, kind):
    found = [
        m for m in timm.create_model("vgg16_cifar", act_layer=name).modules() if isinstance(m, kind)
    ]
    assert len(found) == 13
    assert len({id(m) for m in found}) == 13


def test_unknown_activations_suggest_others():
    with pytest.raises(UsageError, match="unknown activation 'tanhh'; did you mean 'tanh'"):
        models.create("vgg16_cifar", classes=10, channels=3, size=32, act_layer="tanhh")


@pytest.mark.parametrize(
    "name", ["vgg16_cifar", "resnet20_cifar", "mobilenetv1_100_cifar", "mobilenetv2_100_cifar"]
)
def test_networks_for_32_px_are_resized_on_proven_groups(name):
    model = models.create(name, classes=10, channels=3, size=32)
    x = torch.randn(1, 3, 32, 32)
    groups = find_groups(model, x).select("inner")
    assert len(groups) >= 9
    assert all(g.grade == "exact" for g in groups.values())
    small = widthbench.apply("l1-norm", model, budget="channels:0.5", example_input=x)
    assert count_macs(small, x) < 0.7 * count_macs(model, x)


PUBLIC = [
    (
        "resnet20_cifar",
        "resnet20-cifar10",
        "cifar10",
        32,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        91.73,
    ),
    (
        "resnet56_cifar",
        "resnet56-cifar10",
        "cifar10",
        32,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        93.39,
    ),
    ("lenet_300_100", "lenet_300_100-fashionmnist", "fashionmnist", 28, (0.5,), (0.5,), 89.80),
]


@pytest.mark.parametrize(
    ("name", "file", "dataset", "size", "mean", "std", "published"),
    [
        pytest.param(*p, id=p[0], marks=[pytest.mark.slow] if "resnet" in p[0] else [])
        for p in PUBLIC
    ],
)
def test_public_weights_score_exactly_what_was_published(
    name, file, dataset, size, mean, std, published
):
    path = zoo.public(file, dataset)
    split = splits.load(dataset, size, val=0, mean=mean, std=std)
    model = models.create(name, classes=10, channels=split.channels, size=size)
    weights.load_into(model, path)
    assert round(accuracy(model, split.test).top1, 2) == published


@pytest.mark.parametrize(
    ("public", "right"), [(PUBLIC[0], 458), (PUBLIC[1], 467)], ids=[p[0] for p in PUBLIC[:2]]
)
def test_public_weights_are_right_about_as_many_of_the_first_images_as_when_all_were_scored(
    public, right
):
    """The quick form of the test above: how many of the first 500 test images were right when all
    10,000 gave the number. The other 59,500 need not be decoded for that."""
    name, file, dataset, size, mean, std, _ = public
    path = zoo.public(file, dataset)
    places = [p for p in (data_dir() / dataset / n for n in ("test.tar", "test")) if p.exists()]
    if not places:
        pytest.skip(f"{dataset} is there in another form")
    images = sources.Files(places[0])
    x = torch.stack([pil_to_tensor(images.open(i)) for i in range(500)]).float() / 255
    y = torch.from_numpy(images.labels[:500])
    mean, std = (torch.tensor(t)[:, None, None] for t in (mean, std))
    model = models.create(name, classes=10, channels=3, size=size)
    weights.load_into(model, path)
    with torch.no_grad():
        assert int((model((x - mean) / std).argmax(1) == y).sum()) == right


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("test_resnet", {"act_layer": "reluu"}, "KeyError 'reluu'; correct its args .*act_layer"),
        ("test_resnet", {"norm_layer": "batchnrm"}, "KeyError"),
        ("test_resnet", {"act_layer": 5}, "px: "),
        ("test_vit", {"patch_size": 0}, "ZeroDivisionError .*correct its args .*patch_size"),
        ("test_vit", {"num_heads": 0}, "ZeroDivisionError"),
        ("test_vit", {"embed_dim": 10**30}, "px: "),
        ("test_vit", {"mlp_ratio": "a\nb\x1b"}, "px: "),
        ("test_convnext", {"depths": [1]}, "IndexError"),
    ],
)
def test_whatever_a_constructor_raises_is_an_error_in_one_line(name, args, message):
    with pytest.raises(
        UsageError, match=f"model '{name}' refuses 10 classes, 3 x 32 x 32 px: .*"
    ) as caught:
        models.create(name, classes=10, channels=3, size=32, **args)
    caught.match(message)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet.",
        "lenet5.",
        "test_resnet.nothing",
        "",
        ".",
        "a" * 300,
        "a\0b",
        "../test_resnet",
    ],
)
def test_names_that_are_almost_networks_are_refused(name):
    with pytest.raises(UsageError, match=r"unknown model|has no weights tagged"):
        models.require(name)
