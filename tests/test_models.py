import pytest
import timm
import torch
from torch import nn

from widthbench import models
from widthbench.errors import UsageError


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


@pytest.mark.parametrize(("name", "size"), [("lenet5", 32), ("test_vit", 32), ("test_resnet", 64), ("mlp_sigmoid", 8)])
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
    [("lenet6", "unknown model 'lenet6'; did you mean 'lenet5'"), ("resnet_50", "did you mean 'resnet")],
)
def test_unknown_networks_get_a_suggestion(name, message):
    with pytest.raises(UsageError, match=message):
        models.create(name, classes=10, channels=1, size=28)


def test_settings_that_a_network_refuses_are_named():
    with pytest.raises(UsageError, match=r"model 'lenet5' refuses 10 classes, 1 x 28 x 28 px: .*depth"):
        models.create("lenet5", classes=10, channels=1, size=28, depth=3)
