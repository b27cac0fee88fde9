import ast
import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from widthbench import models, weights
from widthbench.errors import UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDTHBENCH_WEIGHTS", str(tmp_path))
    return tmp_path


def net(seed=0, classes=10):
    return models.create("lenet5", classes=classes, channels=1, size=28, seed=seed)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_come_back_from_every_kind_of_file(folder, suffix):
    source, target = net(1), net(2)
    path = folder / f"mine{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    digest = weights.load_into(target, weights.find("mine"))
    assert same(source, target)
    assert digest == weights.digest(path)
    assert weights.find(f"mine{suffix}") == weights.find(str(path)) == path


def test_a_digest_that_does_not_match_is_refused(folder):
    save_file(net().state_dict(), folder / "a.safetensors")
    found = weights.digest(folder / "a.safetensors")
    weights.load_into(net(), folder / "a.safetensors", found[:12])
    with pytest.raises(UsageError, match=r"has digest .*, not 00000000: it is another file"):
        weights.load_into(net(), folder / "a.safetensors", "00000000")


def test_missing_unexpected_and_misshapen_tensors_are_named_and_nothing_is_loaded(folder):
    state = net(1).state_dict()
    save_file({k: v for k, v in state.items() if k != "ip1.bias"} | {"ip9.bias": torch.zeros(3)}, folder / "a.safetensors")
    save_file(net(1, classes=7).state_dict(), folder / "b.safetensors")
    target = net(2)
    with pytest.raises(UsageError, match=r"does not fit LeNet5: it lacks ip1.bias and has unexpected ip9.bias"):
        weights.load_into(target, folder / "a.safetensors")
    with pytest.raises(UsageError, match=r"ip2.bias is \[7\], the network wants \[10\]|ip2.weight is \[7, 500\]"):
        weights.load_into(target, folder / "b.safetensors")
    assert same(target, net(2))


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_files_that_could_run_code_or_are_damaged_are_refused(folder, capsys):
    torch.save({"a": Evil()}, folder / "evil.pth")
    (folder / "cut.safetensors").write_bytes(b"\x08\x00\x00")
    (folder / "text.pth").write_text("hello")
    torch.save([1, 2], folder / "list.pth")
    for name, message in [("evil", "more than tensors"), ("cut", "damaged"), ("text", "damaged"), ("list", "no tensors by name")]:
        with pytest.raises(UsageError, match=message):
            weights.read(weights.find(name))
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../etc/passwd", "a b", "nothing"])
def test_names_stay_in_the_folder_and_absent_ones_say_where_to_put_them(folder, name):
    with pytest.raises(UsageError, match=r"must be a plain name|put nothing.safetensors there"):
        weights.find(name)


def test_published_weights_come_from_a_file_of_that_name_or_say_what_to_do_without_a_network(folder, monkeypatch):
    source, target = net(1), net(2)
    save_file(source.state_dict(), folder / "lenet5.safetensors")
    assert weights.pretrained("lenet5", target) == weights.digest(folder / "lenet5.safetensors")
    assert same(source, target)
    with pytest.raises(UsageError, match="timm publishes no weights for 'vgg16_cifar': train it"):
        weights.pretrained("vgg16_cifar", nn.Identity())


def test_downloaded_weights_are_loaded_and_must_fit(folder, monkeypatch):
    source = timm.create_model("test_resnet")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: source)
    fresh = copy.deepcopy(source)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    digest = weights.pretrained("test_resnet", fresh)
    assert same(source, fresh)
    assert len(digest) == 64
    with torch.no_grad():
        source.fc.bias[0] += 1
    assert weights.pretrained("test_resnet", fresh) != digest
    source.fc = nn.Linear(source.fc.in_features, 7)
    with pytest.raises(UsageError, match=r"timm's weights of 'test_resnet' do not fit: fc.weight is \[7, "):
        weights.pretrained("test_resnet", fresh)


def test_without_a_network_the_message_says_where_to_put_the_file(folder, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"'resnet18' could not be downloaded \(ConnectionError: no route.*resnet18.safetensors"):
        weights.pretrained("resnet18", nn.Identity())


def test_values_that_are_not_finite_are_refused(folder):
    state = net().state_dict()
    state["ip1.bias"][3] = float("nan")
    save_file(state, folder / "nan.safetensors")
    with pytest.raises(UsageError, match=r"values that are not finite in ip1.bias"):
        weights.read(folder / "nan.safetensors")


def test_torch_reads_weights_only_wherever_it_reads():
    """Lint refuses pickle itself, eval, exec and whole archives; torch.load it does not know."""
    root = Path(weights.__file__).parent
    calls = [
        (path, node)
        for folder in (root, root.parent / "methods", root.parent / "baselines", root.parent / "bench")
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for path, call in calls:
        assert "weights_only=True" in [ast.unparse(k) for k in call.keywords], f"{path}:{call.lineno}"
