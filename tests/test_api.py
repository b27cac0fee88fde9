import pytest
import timm
import torch
import zoo
from torch import nn

import widthbench
from widthbench.errors import AccessError, BudgetError, NoGroupsError, UsageError
from widthbench.width.cost import count_macs


class Peeks(widthbench.Technique):
    """Looks at labels that it did not declare."""

    id = "peeks"
    access = "none"

    def decide(self, task, state):
        next(task.train.batches(1))


class Greedy(widthbench.Technique):
    """Keeps everything whatever the budget."""

    id = "greedy"
    access = "none"

    def decide(self, task, state):
        return widthbench.Outcome({})


class Learns(widthbench.Technique):
    """Counts labelled samples."""

    id = "learns"
    access = "labelled"

    def decide(self, task, state):
        seen = sum(len(y) for _, y in task.val.batches(3))
        return widthbench.Outcome(
            {n: widthbench.keep(range_of(g.channels, seen)) for n, g in task.groups.items()}
        )


def range_of(channels, seen):
    return list(range(min(channels, seen)))


def test_apply_resizes_a_plain_network():
    model, x = zoo.Plain().train(), torch.randn(1, 2, 8, 8)
    small = widthbench.apply("l1-norm", model, budget="channels:0.5", example_input=x)
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features) == (3, 5, 4)
    kept = model.conv2.weight.abs().sum((1, 2, 3)).topk(5).indices.sort().values
    assert torch.equal(small.bn2.weight, model.bn2.weight[kept])
    assert model.training
    assert not small.training


@pytest.mark.parametrize("budget", ["macs:0.5", "params:0.4", "channels:0.7"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_apply_meets_budgets_on_a_timm_network(budget, allocation):
    model, x = timm.create_model("test_resnet"), torch.randn(1, 3, 64, 64)
    small = widthbench.apply(
        "l1-norm", model, budget=budget, example_input=x, scope="all", allocation=allocation
    )
    kind, fraction = budget.split(":")
    if kind == "macs":
        assert 0.9 < count_macs(small, x) / count_macs(model, x) / float(fraction) <= 1
    if kind == "params":
        ratio = sum(p.numel() for p in small.parameters()) / sum(
            p.numel() for p in model.parameters()
        )
        assert 0.9 < ratio / float(fraction) <= 1


def test_include_limits_what_is_resized():
    model, x = zoo.Plain(), torch.randn(1, 2, 8, 8)
    small = widthbench.apply(
        "l1-norm", model, budget="channels:0.5", example_input=x, include="conv*"
    )
    assert (small.conv1.out_channels, small.fc1.out_features) == (3, 9)


@pytest.mark.parametrize(
    ("technique", "options", "error", "message"),
    [
        ("l1-nrm", {}, UsageError, "did you mean 'l1-norm'"),
        ("l1-norm", {"budget": "macs:2"}, BudgetError, "more than there is"),
        ("l1-norm", {"budget": "macs:0.0001"}, BudgetError, "below the feasible floor"),
        (
            "l1-norm",
            {"example_input": torch.randn(1, 3, 8, 8)},
            UsageError,
            r"does not take an input of shape \[1, 3, 8, 8\]",
        ),
        (
            "l1-norm",
            {"allocation": "best"},
            UsageError,
            "parameter 'allocation': .*'uniform' or 'global' .found 'best'",
        ),
        (
            None,
            {},
            UsageError,
            "technique must be a registered name, a class or an instance, not None",
        ),
        ("l1-norm", {"model": "lenet5"}, UsageError, "must be a torch.nn.Module, not str"),
        ("l1-norm", {"example_input": "image"}, UsageError, "must be a tensor .B, ...., a tuple"),
        ("l1-norm", {"example_input": torch.zeros(0, 2, 8, 8)}, UsageError, "B of at least 1"),
        (
            "l1-norm",
            {"example_input": torch.full((1, 2, 8, 8), torch.nan)},
            UsageError,
            "not finite",
        ),
        ("l1-norm", {"include": 3}, UsageError, "include must be a pattern"),
        ("l1-norm", {"seed": "a"}, UsageError, "seed must be a whole number"),
        (Learns(), {"data": "abc"}, UsageError, "pair of tensors"),
        ("l1-norm", {"include": "layer9"}, UsageError, "matches no channel group"),
        (
            "l1-norm",
            {"model": torch.nn.Linear(2, 2), "example_input": torch.randn(1, 2)},
            NoGroupsError,
            "so there is nothing to resize",
        ),
        (Peeks(), {}, AccessError, "declares access = 'none' but uses task.train"),
        (
            Greedy(),
            {},
            BudgetError,
            "keeps 1.0000 of the channels, more than the budget 'channels:0.5'",
        ),
        (Learns(), {}, UsageError, "pass data="),
        (Learns(), {"data": 3}, UsageError, "pair of tensors"),
        (
            Learns(),
            {"data": (torch.zeros(3, 2), torch.zeros(2))},
            UsageError,
            "3 inputs do not match 2 labels",
        ),
        (Learns(), {"strength": 1}, UsageError, "go into the instance"),
    ],
)
def test_bad_input_is_named(technique, options, error, message):
    arguments = {
        "model": zoo.Plain(),
        "budget": "channels:0.5",
        "example_input": torch.randn(1, 2, 8, 8),
        **options,
    }
    with pytest.raises(error, match=message):
        widthbench.apply(technique, arguments.pop("model"), **arguments)


@pytest.mark.parametrize("loader", [False, True])
def test_data_come_as_tensors_or_loaders(loader):
    x, y = torch.randn(3, 2, 8, 8), torch.zeros(3, dtype=torch.long)
    given = (
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
        if loader
        else (x, y)
    )
    small = widthbench.apply(
        Learns(),
        zoo.Plain(),
        budget="channels:0.5",
        example_input=x[:1],
        data=given,
        include="conv*",
    )
    assert small.conv2.out_channels == 3


def test_inference_mode_is_named():
    with torch.inference_mode(), pytest.raises(UsageError, match=r"leave torch\.inference_mode"):
        widthbench.apply(
            "l1-norm", zoo.Plain(), budget="channels:0.5", example_input=torch.randn(1, 2, 8, 8)
        )


def test_timms_reset_classifier_works_after_the_last_stream_is_resized():
    model, x = timm.create_model("test_resnet"), torch.randn(1, 3, 64, 64)
    small = widthbench.apply("l1-norm", model, budget="channels:0.5", example_input=x, scope="all")
    assert small.num_features == small.fc.in_features == model.num_features // 2
    small.reset_classifier(7)
    assert small(x).shape == (1, 7)


def test_an_unwritable_cache_costs_time_and_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="grades are not cached"):
        widthbench.apply(
            "l1-norm", zoo.Plain(), budget="channels:0.5", example_input=torch.randn(1, 2, 8, 8)
        )


def test_importing_the_package_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, widthbench, widthbench.engines.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'aply'"):
        _ = widthbench.aply
    assert "apply" in dir(widthbench)


def test_what_does_not_run_is_said_before_what_it_gives():
    x, y = torch.randn(4, 5), torch.zeros(4, dtype=torch.long)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(UsageError, match="does not take an input of shape"):
        widthbench.apply("autoprune", net, budget="channels:0.5", example_input=x, data=(x, y))


def test_a_technique_with_a_loss_refuses_an_output_that_is_no_tensor():
    class Mapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return {"out": self.b(self.a(x).relu())}

    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UsageError, match="needs a loss, and the network gives a dict"):
        widthbench.apply(
            "autoprune", Mapping(), budget="channels:0.5", example_input=x, data=(x, y)
        )
