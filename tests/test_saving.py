"""Resized networks outlive the process that made them."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn import functional as F

import widthbench
from widthbench.errors import UsageError

NETWORKS = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet")


def small_of(name="test_resnet", budget="macs:0.5", technique="l1-norm", **options):
    torch.manual_seed(0)
    net, x = timm.create_model(name).eval(), torch.randn(2, 3, 160, 160)
    return widthbench.apply(technique, net, budget=budget, example_input=x, **options), x


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_network_computes_the_same_when_it_is_loaded(name, tmp_path):
    small, x = small_of(name, scope="all")
    path = widthbench.save(small, tmp_path / "small.safetensors")
    again = widthbench.load_network(name, path)
    assert torch.equal(again(x), small(x))
    assert not again.training
    assert widthbench.find_groups(again, x[:1], cache=False).keys() == (
        widthbench.find_groups(small, x[:1], cache=False).keys()
    )


def test_another_process_needs_the_file_and_the_factory_alone(tmp_path):
    small, x = small_of()
    widthbench.save(small, tmp_path / "small.safetensors")
    torch.save(x, tmp_path / "x.pt")
    code = """
import sys, timm, torch, widthbench
net = widthbench.load_network(lambda: timm.create_model("test_resnet"), "small.safetensors")
torch.save(net(torch.load("x.pt")).detach(), "y.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), small(x).detach())


def test_the_file_says_what_is_in_it(tmp_path):
    small, _ = small_of()
    with safe_open(widthbench.save(small, tmp_path / "s.safetensors"), "pt") as file:
        facts = file.metadata()
    widths, plan = json.loads(facts["widths"]), json.loads(facts["plan"])
    (plan,) = plan
    assert {n: len(rows) for n, rows in plan.items()} == widths
    assert widths["layer1.0.conv1"] == small.layer1[0].conv1.out_channels
    assert json.loads(facts["input"]) == {"shape": [2, 3, 160, 160], "dtype": "torch.float32"}


def test_trained_further_cut_twice_and_attention_made_separate(tmp_path):
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    net, x = nn.Sequential(encoder, nn.Linear(16, 3)).eval(), torch.randn(2, 5, 16)
    first = widthbench.apply("l1-norm", net, budget="channels:0.5", example_input=x)
    first[1].weight.data += 1
    again = widthbench.load_network(net, widthbench.save(first, tmp_path / "a.safetensors"))
    assert torch.equal(again(x), first(x))

    once, x = small_of(budget="channels:0.7")
    twice = widthbench.apply("l1-norm", once, budget="channels:0.5", example_input=x)
    loaded = widthbench.load_network("test_resnet", widthbench.save(twice, tmp_path / "b"))
    assert torch.equal(loaded(x), twice(x))


def test_a_network_that_grew(tmp_path):
    net, x = timm.create_model("lenet_300_100", in_chans=1).eval(), torch.randn(64, 1, 28, 28)
    y = torch.randint(10, (64,))
    grown = widthbench.apply(
        "splitting",
        net,
        budget="macs:0.2",
        example_input=x,
        data=(x, y),
        epochs=1,
        rounds=2,
        samples=32,
        final_epochs=1,
    )
    path = widthbench.save(grown, tmp_path / "grown.safetensors")
    again = widthbench.load_network(lambda: timm.create_model("lenet_300_100", in_chans=1), path)
    assert torch.equal(again(x), grown(x))


def test_a_new_network_takes_the_shape_and_keeps_its_weights():
    small, x = small_of()
    fresh = timm.create_model("test_resnet")
    shaped = widthbench.reshape_like(fresh, small)
    assert [p.shape for p in shaped.parameters()] == [p.shape for p in small.parameters()]
    rows = small.widthbench_plans[0]["layer1.0.conv1"]
    assert torch.equal(shaped.layer1[0].conv1.weight, fresh.layer1[0].conv1.weight[rows])
    shaped.load_state_dict(small.state_dict())
    assert torch.equal(shaped.eval()(x), small(x))


def test_what_cannot_be_saved_or_loaded_says_why(tmp_path):
    small, _ = small_of()
    path = widthbench.save(small, tmp_path / "s.safetensors")
    with pytest.raises(UsageError, match="how this ResNet got its shape is not known"):
        widthbench.save(timm.create_model("test_resnet"), tmp_path / "no")
    with pytest.raises(UsageError, match="the plan is of another network than this ByobNet"):
        widthbench.load_network("mobileone_s0", path)
    with pytest.raises(UsageError, match="was saved from a ResNet that this ResNet is not"):
        widthbench.load_network(lambda: timm.create_model("test_resnet", num_classes=7), path)
    with pytest.raises(UsageError, match="cannot read"):
        widthbench.load_network("test_resnet", tmp_path / "nowhere")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(UsageError, match=r"was not written by widthbench\.save"):
        widthbench.load_network("test_resnet", other)
    with pytest.raises(UsageError, match="gave a int"):
        widthbench.load_network(lambda: 7, path)


def test_numbers_keep_their_kind(tmp_path):
    net, x = timm.create_model("test_resnet").double().eval(), torch.randn(2, 3, 64, 64).double()
    small = widthbench.apply("l1-norm", net, budget="macs:0.5", example_input=x)
    again = widthbench.load_network("test_resnet", widthbench.save(small, tmp_path / "d"))
    assert torch.equal(again(x), small(x))


def test_steps_that_make_no_one_plan_are_kept_one_after_another(tmp_path):
    net, x = timm.create_model("test_vit").eval(), torch.randn(1, 3, 160, 160)
    heads = widthbench.apply(
        "l1-norm", net, budget="channels:0.5", example_input=x, include="*.heads"
    )
    widthbench.save(heads, tmp_path / "heads")
    both = widthbench.apply("l1-norm", heads, budget="channels:0.5", example_input=x)
    thrice = widthbench.apply("l1-norm", both, budget="macs:0.7", example_input=x)
    for small in (both, thrice):
        again = widthbench.load_network("test_vit", widthbench.save(small, tmp_path / "s"))
        assert torch.equal(again(x), small(x))
        assert again.widthbench_plans[0]["blocks.0.attn.qkv.heads"].numel() == 1
        shaped = widthbench.reshape_like(timm.create_model("test_vit"), small)
        assert [p.shape for p in shaped.parameters()] == [p.shape for p in small.parameters()]
    assert len(both.widthbench_plans) == 2


def test_blocks_of_a_norm_go_twice(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 4, 3)
        )

    x = torch.randn(1, 3, 16, 16)
    once = widthbench.apply("l1-norm", build(), budget="channels:0.5", example_input=x)
    twice = widthbench.apply("l1-norm", once, budget="channels:0.5", example_input=x)
    again = widthbench.load_network(build, widthbench.save(twice, tmp_path / "s"))
    assert again[1].num_groups == 2
    assert torch.equal(again(x), twice(x))


def test_a_file_of_the_first_format_is_read(tmp_path):
    small, x = small_of()
    path = widthbench.save(small, tmp_path / "s")
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    (plan,) = json.loads(facts["plan"])
    old = facts | {"format": "widthbench 1", "plan": json.dumps(plan)}
    save_model(small, str(path), metadata=old)
    assert torch.equal(widthbench.load_network("test_resnet", path)(x), small(x))


@pytest.mark.parametrize("damage", ["{", "[]", "null"])
def test_damaged_facts_are_named(tmp_path, damage):
    small, _ = small_of()
    save_model(small, str(tmp_path / "d"), metadata={"format": "widthbench 1", "plan": damage})
    with pytest.raises(UsageError, match="is damaged: save it anew"):
        widthbench.load_network("test_resnet", tmp_path / "d")
    with pytest.raises(UsageError, match="the factory raises ZeroDivisionError"):
        widthbench.load_network(lambda: 1 / 0, widthbench.save(small, tmp_path / "s"))


class Words(nn.Module):
    """Token ids in; what is added is no parameter."""

    def __init__(self, shift=1.0):
        super().__init__()
        self.table, self.a = nn.Embedding(20, 8), nn.Linear(8, 16)
        self.b, self.shift = nn.Linear(16, 3), shift

    def forward(self, ids):
        return self.b((self.a(self.table(ids)) + self.shift).relu()).mean(1)


def test_a_network_that_fits_but_computes_something_else_is_refused(tmp_path):
    ids = torch.randint(20, (2, 5))
    torch.manual_seed(0)
    small = widthbench.apply("l1-norm", Words().eval(), budget="macs:0.5", example_input=ids)
    path = widthbench.save(small, tmp_path / "w")
    assert torch.equal(widthbench.load_network(Words, path)(ids), small(ids))
    with pytest.raises(UsageError, match="computes something else"):
        widthbench.load_network(lambda: Words(shift=0.5), path)


@pytest.mark.parametrize("name", NETWORKS[:2])
def test_resized_networks_are_exported(name):
    small, x = small_of(name)
    exported = torch.export.export(small, (x,)).module()
    assert torch.allclose(exported(x), small(x), atol=1e-5)


def test_onnx_computes_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    small, x = small_of()
    torch.onnx.export(small, (x,), str(tmp_path / "small.onnx"), dynamo=True)
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(y), small(x), atol=1e-4)


def test_anybodys_loop_trains_a_resized_network():
    small, x = small_of()
    small.train()
    optimizer = timm.optim.create_optimizer_v2(small, opt="adamw", lr=1e-3)
    y, losses = torch.tensor([3, 5]), []
    for _ in range(5):
        loss = F.cross_entropy(small(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
