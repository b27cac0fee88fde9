import json

import pytest
import timm
import torch
import zoo

from widthbench.width import certify, discover, find_groups
from widthbench.width.certify import errors_of_all, fingerprint, randomised
from widthbench.width.groups import Segment

NETWORKS = ["resnet18", "mobilenetv2_100", "densenet121", "test_resnet", "test_efficientnet", "test_vit", "resnext26ts"]


@pytest.mark.parametrize("name", NETWORKS)
def test_splits_and_gates_of_all_exact_groups_at_once(name):
    size = 160 if name == "test_vit" else 64
    model = timm.create_model(name).eval()
    groups = find_groups(model, torch.randn(1, 3, size, size))
    split, removal = errors_of_all(model, groups, torch.randn(1, 3, size, size))
    assert sum(g.grade == "exact" for g in groups.values()) >= 6
    assert split < 1e-9
    assert removal < 1e-9


def test_densenet_needs_all_its_concats_in_one_coordinate_system():
    """Rebuilding the graph after each group went wrong by 0.57 without an exception: every group at once must not."""
    model = timm.create_model("densenet121").eval()
    groups = find_groups(model, torch.randn(1, 3, 64, 64))
    assert {g.grade for g in groups.values()} == {"exact"}
    assert max(errors_of_all(model, groups, torch.randn(1, 3, 64, 64))) < 1e-9


def test_a_wrong_index_map_is_caught():
    """A map that puts channels where they are not passes every shape check, and fails certification."""
    model = zoo.Dense()
    x = torch.randn(1, 3, 8, 8)
    groups = discover(model, x)
    swapped = dict(groups.axes)
    swapped["c", "in"] = (Segment("b", 6), Segment("a", 4))  # the concat is (a, b)
    wrong = certify(model, type(groups)(groups.members, swapped, groups.output_shapes), x, cache=False)
    assert wrong["a"].grade == wrong["b"].grade == "frozen"
    assert wrong["c"].grade == "exact"
    assert "moves the output" in wrong["a"].reason


def test_vision_transformers_resize_their_mlps_only():
    groups = find_groups(timm.create_model("test_vit"), torch.randn(1, 3, 160, 160))
    assert all(g.grade == ("exact" if ".mlp.fc1" in n else "frozen") for n, g in groups.items())
    assert "bare parameter" in groups["patch_embed.proj"].reason


def test_ghostnet_is_not_resized_where_its_index_maps_are_lost():
    groups = find_groups(timm.create_model("ghostnet_050"), torch.randn(1, 3, 64, 64))
    assert any(g.grade == "frozen" for g in groups.values())
    split, removal = errors_of_all(timm.create_model("ghostnet_050").eval(), groups, torch.randn(1, 3, 64, 64))
    assert max(split, removal) < 1e-9


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
    path.write_text(json.dumps(content))
    assert find_groups(zoo.Plain(), x)["conv1"].reason == "from the cache"
    assert find_groups(model, x, cache=False)["conv1"].grade == first["conv1"].grade == "exact"
    path.write_text("{ damaged")
    assert find_groups(model, x)["conv1"].grade == "exact"
    assert json.loads(path.read_text())["grades"]["conv1"] == ["exact", ""]


def test_the_fingerprint_sees_what_a_grade_depends_on():
    x = torch.randn(1, 2, 8, 8)

    def of(model, x=x):
        return fingerprint(model, discover(model, x), x)

    strided = zoo.Plain()
    strided.conv2.padding = (0, 0)
    assert of(zoo.Plain()) == of(zoo.Plain())
    assert of(zoo.Plain()) != of(strided)
    assert of(zoo.Plain()) != of(zoo.Plain(), torch.randn(1, 2, 10, 10))
