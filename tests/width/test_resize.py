import copy

import pytest
import torch
import zoo
from torch import nn

from widthbench.errors import PlanError
from widthbench.width import Resize, discover, keep, resize
from widthbench.width.resize import disagreements


def test_pruning_equals_zeroed_consumers():
    model, x, groups = zoo.certified(zoo.Plain)
    small = resize(model, groups, {"conv2": keep([0, 3, 7])})
    reference = copy.deepcopy(model)
    gone = [i for i in range(40) if i // 4 not in (0, 3, 7)]
    with torch.no_grad():
        reference.fc1.weight[:, gone] = 0
    assert small.conv2.weight.shape == (3, 6, 3, 3)
    assert small.bn2.num_features == 3
    assert small.fc1.in_features == 12
    assert zoo.error(small(x), reference(x)) < 1e-12


def test_a_dense_mix_is_the_consumers_product():
    model, _, groups = zoo.certified(zoo.Plain)
    mix = torch.randn(10, 4, dtype=torch.float64)
    small = resize(model, groups, {"conv2": Resize(torch.tensor([1, 2, 5, 9]), mix)})
    old = model.fc1.weight.view(9, 10, 4)
    assert torch.allclose(small.fc1.weight.view(9, 4, 4), torch.einsum("oni,np->opi", old, mix))
    assert torch.equal(small.conv2.weight, model.conv2.weight[[1, 2, 5, 9]])


def test_a_mix_reaches_every_block_of_a_grouped_consumer():
    model, x, groups = zoo.certified(zoo.Grouped)
    rows = torch.tensor([0, 1, 4, 5, 8, 9])
    mix = torch.zeros(12, 6, dtype=torch.float64)
    mix[rows, torch.arange(6)] = 1
    mix[2, 0] = mix[6, 2] = mix[11, 5] = 0.5
    small = resize(model, groups, {"conv1": Resize(rows, mix)})
    # the same network at full width, with the dropped channels fed by their stand-ins
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for dropped, stand_in in ((2, 0), (6, 4), (11, 9)):
            reference.conv1.weight[dropped] = 0.5 * model.conv1.weight[stand_in]
            reference.conv1.bias[dropped] = 0.5 * model.conv1.bias[stand_in]
        for dropped in (3, 7, 10):
            reference.conv1.weight[dropped] = 0
            reference.conv1.bias[dropped] = 0
    assert small.conv2.weight.shape == (18, 2, 3, 3)
    assert zoo.error(small(x), reference(x)) < 1e-12


def test_tensor_overrides_replace_rows_in_input_coordinates():
    model, x, groups = zoo.certified(zoo.Plain)
    step = 0.1 * torch.randn(12, 6, 3, 3, dtype=torch.float64)
    rows = torch.tensor([*range(10), 0, 1])
    new = model.conv2.weight[rows] + step
    mix = torch.eye(10, dtype=torch.float64)[:, rows]
    mix[0, [0, 10]] = mix[1, [1, 11]] = 0.5
    plan = {"conv2": Resize(rows, mix, {"conv2.weight": new}), "conv1": keep([0, 2, 4])}
    grown = resize(model, groups, plan)
    assert torch.equal(grown.conv2.weight, new[:, [0, 2, 4]])
    assert grown(x).shape == (2, 5)


def test_overrides_of_a_shared_layer_stay_in_their_own_part():
    model, _, groups = zoo.certified(zoo.JoinedConcat)
    value = torch.full((2, 3, 1, 1), 7.0, dtype=torch.float64)
    small = resize(model, groups, {"b": Resize(torch.tensor([0, 5]), None, {"c.weight": value})})
    assert torch.equal(small.c.weight[:4], model.c.weight[:4])
    assert torch.equal(small.c.weight[4:], value)


def test_the_given_network_is_never_touched_and_the_copy_is_like_it():
    model, _, groups = zoo.certified(zoo.Residual)
    model.train()
    model.expand.weight.requires_grad_(False)
    model.expand.weight.mark = "kept"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = resize(model, groups, {"stem": keep([1, 4]), "expand": keep([0, 2, 4, 6])})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert small.training
    assert not small.expand.weight.requires_grad
    assert small.stem.weight.requires_grad
    assert small.expand.weight.mark == "kept"
    assert not {p.data_ptr() for p in small.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }
    assert small.depth.groups == small.depth.in_channels == 4


def test_disagreements_sees_a_layer_that_lies():
    model = zoo.Plain()
    assert disagreements(model) == []
    model.conv2.out_channels = 3
    assert disagreements(model)[0].startswith("conv2: declares")


GOOD = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"conv3": keep([0])}, "no channel group of this network: 'conv3'; did you mean"),
        ({"conv2": keep([])}, "must leave at least 1 channel"),
        ({"conv2": keep([0, 10])}, r"rows must lie in 0\.\.9, not 0\.\.10"),
        ({"conv2": Resize(torch.tensor([0.0]))}, "rows must be a long vector"),
        (
            {"conv2": Resize(GOOD, torch.ones(9, 2))},
            r"mix must be \[N, P\] = \[10, 2\], not \[9, 2\]",
        ),
        (
            {"conv2": Resize(GOOD, torch.full((10, 2), torch.nan))},
            "mix has values that are not finite",
        ),
        (
            {"conv2": Resize(GOOD, None, {"conv1.weight": torch.ones(1)})},
            "'conv1.weight' is not a tensor of its producers",
        ),
        (
            {"conv2": Resize(GOOD, None, {"conv2.weight": torch.ones(3, 6, 3, 3)})},
            r"must have shape \[2, 6, 3, 3\]",
        ),
        ({"conv2": Resize(GOOD, None, {"bn2.bias": torch.tensor([0.0, torch.inf])})}, "not finite"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, message):
    model, _, groups = zoo.certified(zoo.Plain)
    with pytest.raises(PlanError, match=message):
        resize(model, groups, plan)


def test_blocks_must_keep_equal_counts_and_mixes_must_not_cross_them():
    model, _, groups = zoo.certified(zoo.Grouped)
    for rows in ([0, 1, 2, 3], [0, 1, 2, 4, 5, 6], [4, 0, 8]):
        with pytest.raises(PlanError, match="3 blocks must keep equal counts"):
            resize(model, groups, {"conv1": keep(rows)})
    mix = torch.zeros(12, 3)
    mix[[0, 4, 8], [0, 1, 2]] = 1
    mix[1, 1] = 1
    with pytest.raises(PlanError, match="must not cross its 3 blocks"):
        resize(model, groups, {"conv1": Resize(torch.tensor([0, 4, 8]), mix)})


def test_nothing_is_resized_ungraded_or_frozen():
    model = zoo.Plain()
    groups = discover(model, torch.randn(1, 2, 8, 8))
    with pytest.raises(PlanError, match="is not certified"):
        resize(model, groups, {"conv2": keep([0])})
    with pytest.raises(PlanError, match="is frozen: because"):
        resize(
            model,
            groups.with_grades(dict.fromkeys(groups, ("frozen", "because"))),
            {"conv2": keep([0])},
        )


def test_half_a_plan_is_never_applied():
    model, _, groups = zoo.certified(zoo.Plain)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PlanError):
        resize(model, groups, {"conv1": keep([0]), "conv2": keep([99])})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_half_precision_and_other_dtypes_are_kept():
    model, _, groups = zoo.certified(zoo.Plain)
    model = model.to(torch.bfloat16)
    small = resize(
        model,
        groups,
        {"conv2": Resize(torch.tensor([0, 1]), torch.rand(10, 2, dtype=torch.float64))},
    )
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert isinstance(small.fc1.weight, nn.Parameter)
