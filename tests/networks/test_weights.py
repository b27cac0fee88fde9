import ast
import copy
import json
import struct
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from widthbench.errors import UsageError
from widthbench.networks import models, weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDTHBENCH_WEIGHTS", str(tmp_path))
    return tmp_path


def net(seed=0, classes=10):
    return models.create("lenet5", classes=classes, channels=1, size=28, seed=seed)


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_come_back_from_every_kind_of_file(folder, suffix):
    source, target = net(1), net(2)
    path = folder / f"mine{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}},
            path,
        )
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
    save_file(
        {k: v for k, v in state.items() if k != "ip1.bias"} | {"ip9.bias": torch.zeros(3)},
        folder / "a.safetensors",
    )
    save_file(net(1, classes=7).state_dict(), folder / "b.safetensors")
    target = net(2)
    with pytest.raises(
        UsageError, match=r"does not fit LeNet5: it lacks ip1.bias and has unexpected ip9.bias"
    ):
        weights.load_into(target, folder / "a.safetensors")
    with pytest.raises(
        UsageError, match=r"ip2.bias is \[7\], the network wants \[10\]|ip2.weight is \[7, 500\]"
    ):
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
    for name, message in [
        ("evil", "more than tensors"),
        ("cut", "damaged"),
        ("text", "damaged"),
        ("list", "no tensors by name"),
    ]:
        with pytest.raises(UsageError, match=message):
            weights.read(weights.find(name))
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../etc/passwd", "a b", "nothing"])
def test_names_stay_in_the_folder_and_absent_ones_say_where_to_put_them(folder, name):
    with pytest.raises(UsageError, match=r"must be a plain name|put nothing.safetensors there"):
        weights.find(name)


def test_published_weights_come_from_a_file_of_that_name_or_say_what_to_do_without_a_network(
    folder, monkeypatch
):
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
    with pytest.raises(
        UsageError, match=r"timm's weights of 'test_resnet' do not fit: fc.weight is \[7, "
    ):
        weights.pretrained("test_resnet", fresh)


def test_without_a_network_the_message_says_where_to_put_the_file(folder, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UsageError,
        match=r"'resnet18' could not be downloaded \(ConnectionError: no "
        r"route.*resnet18.safetensors",
    ):
        weights.pretrained("resnet18", nn.Identity())


def test_values_that_are_not_finite_are_refused(folder):
    state = net().state_dict()
    state["ip1.bias"][3] = float("nan")
    save_file(state, folder / "nan.safetensors")
    with pytest.raises(UsageError, match=r"values that are not finite in ip1.bias"):
        weights.read(folder / "nan.safetensors")


def test_torch_reads_weights_only_wherever_it_reads():
    """Lint refuses pickle itself, eval, exec and whole archives; torch.load it does not know."""
    root = Path(__file__).parents[2]
    calls = [
        (path, node)
        for folder in ("widthbench", "methods", "baselines", "bench")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for path, call in calls:
        assert "weights_only=True" in [ast.unparse(k) for k in call.keywords], (
            f"{path}:{call.lineno}"
        )


def odd(**one):
    """A state of lenet5 with some tensors replaced; each is given as a function of the sound
    one."""
    state = net(1).state_dict()
    return state | {
        name.replace("__", "."): change(state[name.replace("__", ".")])
        for name, change in one.items()
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: {0: torch.ones(1)}, r"has a tensor under 0, which is no name"),
        (
            lambda: {b"a": torch.ones(1), "b": torch.ones(1)},
            r"has a tensor under b'a', which is no name",
        ),
        (
            lambda: odd(ip1__bias=lambda t: t.to(torch.float8_e4m3fn)),
            r"ip1.bias is quantised \(torch.float8_e4m3fn\): save it as",
        ),
        (
            lambda: odd(ip1__bias=lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
            r"ip1.bias is quantised \(torch.qint8\)",
        ),
        (
            lambda: odd(ip1__weight=lambda t: t.to_sparse()),
            r"ip1.weight is sparse \(torch.sparse_coo\)",
        ),
        (
            lambda: odd(ip1__weight=lambda t: t.to_sparse_csr()),
            r"ip1.weight is sparse \(torch.sparse_csr\)",
        ),
        (
            lambda: odd(ip1__bias=lambda t: torch.nested.nested_tensor([t, t[:3]])),
            r"ip1.bias is nested",
        ),
        (
            lambda: odd(ip1__bias=lambda t: t.to("meta")),
            r"ip1.bias has a shape but no values \(device meta\)",
        ),
        (
            lambda: odd(ip1__weight=lambda t: t[:1, :1].as_strided((10**6, 10**6), (0, 0))),
            r"asks for 4,000,000,000,000 bytes, of which",
        ),
        (
            lambda: odd(ip1__weight=lambda t: (t * 100).to(torch.int8)),
            r"ip1.weight is torch.int8, which the network's torch.float32",
        ),
        (lambda: odd(ip1__weight=lambda t: t.to(torch.uint8)), r"ip1.weight is torch.uint8"),
        (lambda: odd(ip1__weight=lambda t: t > 0), r"ip1.weight is torch.bool"),
        (lambda: odd(ip1__weight=lambda t: t * 1j), r"ip1.weight is torch.complex64"),
        (
            lambda: odd(ip1__bias=lambda t: t.double() + 1e300),
            r"ip1.bias is torch.float64, which the network's torch.float32 cannot hold",
        ),
        (lambda: odd() | {"x\n\x1b[2J": torch.ones(1)}, r"unexpected x\\n\\x1b\[2J$"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_the_network_cannot_hold_are_named_in_one_line_and_nothing_is_loaded(
    folder, content, message
):
    target = net(2)
    torch.save(content(), folder / "odd.pth")
    with pytest.raises(UsageError, match=r"^checkpoint \S*odd.pth") as caught:
        weights.load_into(target, folder / "odd.pth")
    caught.match(message)
    assert "\n" not in str(caught.value)
    assert same(target, net(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_weights_of_other_widths_and_whole_counters_are_loaded(folder, dtype):
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source.num_batches_tracked += 7
    state = {
        k: v.to(dtype) if v.is_floating_point() else v.to(torch.int32)
        for k, v in source.state_dict().items()
    }
    torch.save(state, folder / "a.pt")
    weights.load_into(target, folder / "a.pt")
    assert same(source, target)
    torch.save(state | {"num_batches_tracked": torch.tensor(7.0)}, folder / "a.pt")
    with pytest.raises(
        UsageError,
        match=r"num_batches_tracked is torch.float32, which the network's torch.int64 cannot hold",
    ):
        weights.load_into(target, folder / "a.pt")


def test_a_counter_that_would_wrap_around_is_refused(folder):
    target = nn.Module()
    target.register_buffer("index", torch.zeros(2, dtype=torch.int16))
    torch.save({"index": torch.tensor([1, 2**17])}, folder / "a.pt")
    with pytest.raises(
        UsageError, match=r"index is torch.int64, which the network's torch.int16 cannot hold"
    ):
        weights.load_into(target, folder / "a.pt")


def header(entries, body=b""):
    blob = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(blob)) + blob + body


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "damaged checkpoint"),
        (
            header(
                {"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
            ),
            "damaged checkpoint",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}),
            "damaged checkpoint",
        ),
        (header(b'{"a":' * 20_000), "damaged checkpoint"),
        (header({}), "holds no tensors by name"),
        (
            header({"a": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}, b"1"),
            "a is quantised",
        ),
    ],
)
def test_absurd_headers_are_refused_in_one_line(folder, blob, message):
    (folder / "a.safetensors").write_bytes(blob)
    with pytest.raises(UsageError, match=message) as caught:
        weights.read(folder / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_downloaded_weights_are_held_to_the_same(folder, monkeypatch):
    target = timm.create_model("test_resnet")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: source)
    source = copy.deepcopy(target).half()
    source.fc.bias.data[0] = float("inf")
    with pytest.raises(
        UsageError, match=r"timm's weights of 'test_resnet': values that are not finite in fc.bias"
    ):
        weights.pretrained("test_resnet", target)
    source = copy.deepcopy(target).to(torch.complex64)
    with pytest.raises(
        UsageError, match=r"timm's weights of 'test_resnet' do not fit: .* is torch.complex64"
    ):
        weights.pretrained("test_resnet", target)
    source = copy.deepcopy(target)
    del source.layer1
    with pytest.raises(
        UsageError, match=r"timm's weights of 'test_resnet' do not fit: it lacks layer1"
    ):
        weights.pretrained("test_resnet", target)


@pytest.mark.parametrize(
    "name", ["n" * 300, "~nosuchuser/a.pth", "/" + "n" * 300 + ".pt", "a/\0.pt", "x\x00y"]
)
def test_paths_that_no_system_knows_are_refused(folder, name):
    with pytest.raises(
        UsageError,
        match=r"no checkpoint at|is not in|no home folder of '~nosuchuser'|must be a plain name",
    ):
        weights.find(name)
