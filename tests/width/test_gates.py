import pytest
import torch
import zoo

from widthbench.errors import PlanError
from widthbench.width import gated, keep, resize


def closed(groups, seed=0):
    """Gates that close a third of each block of every group, and the plan that removes the same
    channels."""
    generator = torch.Generator().manual_seed(seed)
    gates, plan = {}, {}
    for name, g in groups.items():
        gate = torch.ones(g.blocks, g.channels // g.blocks, dtype=torch.float64)
        for row in gate:
            row[torch.randperm(len(row), generator=generator)[: max(1, len(row) // 3)]] = 0
        gates[name] = gate.flatten()
        plan[name] = keep(gates[name].nonzero().flatten())
    return gates, plan


@pytest.mark.parametrize("on", ["input", "weight"])
@pytest.mark.parametrize("cls", zoo.EXACT)
def test_gate_zero_equals_removal(cls, on):
    model, x, groups = zoo.certified(cls)
    gates, plan = closed(groups)
    removed = resize(model, groups, plan)(x)
    with gated(model, groups, gates, on=on):
        assert zoo.error(model(x), removed) < 1e-12
    assert zoo.error(model(x), removed) > 1e-6


@pytest.mark.parametrize("on", ["input", "weight"])
def test_open_gates_change_nothing_and_nothing_stays_behind(net, on):
    model, x, groups = net
    before = model(x)
    with gated(model, groups, {n: torch.ones(g.channels) for n, g in groups.items()}, on=on):
        assert zoo.error(model(x), before) < 1e-12
    assert torch.equal(model(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("weight" not in vars(m) for m in model.modules())


def test_gates_are_differentiable_against_finite_differences():
    model, x, groups = zoo.certified(zoo.Plain)
    gate = torch.rand(10, dtype=torch.float64, requires_grad=True)

    def loss(g):
        with gated(model, groups, {"conv2": g}):
            return model(x).square().sum()

    assert torch.autograd.gradcheck(loss, gate)


@pytest.mark.parametrize(("on", "alive"), [("input", False), ("weight", True)])
def test_a_closed_channels_weights_see_a_gradient_only_with_gates_on_weights(on, alive):
    model, x, groups = zoo.certified(zoo.Plain)
    gate = torch.ones(9, dtype=torch.float64)
    gate[4] = 0
    seen = []
    with gated(model, groups, {"fc1": gate}, on=on):
        handle = model.fc2.register_forward_pre_hook(
            lambda module, args: seen.append(module.weight)
        )
        loss = model(x).square().sum()
        handle.remove()
    (gradient,) = torch.autograd.grad(
        loss, seen
    )  # of the weight that the layer really used: t = w * gate
    assert (gradient[:, 4].abs().max() > 0) == alive


def test_an_error_in_the_forward_pass_leaves_no_gate_behind():
    model, x, groups = zoo.certified(zoo.Plain)
    with pytest.raises(RuntimeError), gated(model, groups, {"conv1": torch.ones(6)}, on="weight"):
        model(x[:, :1])
    assert all("weight" not in vars(m) for m in model.modules())


def test_gates_work_under_vmap():
    model, x, groups = zoo.certified(zoo.Dense)
    gates = torch.rand(5, 4, dtype=torch.float64)

    def run(gate):
        with gated(model, groups, {"a": gate}):
            return model(x)

    batched = torch.func.vmap(run)(gates)
    assert torch.allclose(batched, torch.stack([run(g) for g in gates]), atol=1e-12)


def test_bad_gates_are_refused():
    model, _, groups = zoo.certified(zoo.Plain)
    with (
        pytest.raises(PlanError, match="did you mean 'conv2'"),
        gated(model, groups, {"conv_2": torch.ones(10)}),
    ):
        pass
    with (
        pytest.raises(PlanError, match=r"takes 10 gates, not \[9\]"),
        gated(model, groups, {"conv2": torch.ones(9)}),
    ):
        pass
    with (
        pytest.raises(PlanError, match="'input' or 'weight'"),
        gated(model, groups, {}, on="output"),
    ):
        pass
