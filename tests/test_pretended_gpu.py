"""Device mistakes, found on a CPU: every technique on a GPU that is pretended, from a fresh and
from a resumed state, and how often a training step waits for it."""

from functools import partial
from types import SimpleNamespace

import pretended_gpu
import pytest
import torch
from pretended_gpu import DEVICE, OnDevice, onto
from torch.utils._pytree import tree_map

from widthbench import api
from widthbench.data.splits import ImageSamples
from widthbench.networks import models
from widthbench.recipe import Recipe
from widthbench.technique import registry
from widthbench.technique.task import Task
from widthbench.training.loop import fit

BRIEF = {
    "nmf": {"iterations": 5},
    "torch-pruning:taylor": {"samples": 16},
    "torch-pruning:hessian": {"samples": 4},
    "neuron-removal": {"samples": 32},
    "autoprune": {"epochs": 3},
    "autoslim": {"epochs": 1, "steps": 2, "samples": 64, "calibration": 32},
    "splitting": {"epochs": 1, "rounds": 2, "samples": 16, "final_epochs": 1},
}
NORMED = "torch-pruning:bn-scale"  # LeNet-5 has no BatchNorm
# of each: parameters beside those above
VARIANTS = [
    *(
        (name, {})
        for name in sorted(registry.names())
        if registry.built_in(name) and name != NORMED
    ),
    ("neuron-removal", {"ranking": "first_order"}),
    ("neuron-removal", {"ranking": "second_order", "softplus_beta": 3.0}),
    ("neuron-removal", {"ranking": "random"}),
    ("splitting", {"exact": True, "samples": 8}),
    ("splitting", {"select": "random", "rounds": 1}),
]


@pytest.fixture(autouse=True)
def _as_on_a_cpu(monkeypatch, fresh_cache):
    """Wrapped tensors have no memory layouts."""
    usual = torch.contiguous_format
    for place in ("training.state", "training.measuring"):
        monkeypatch.setattr(f"widthbench.{place}.fastest_layout", lambda model: usual)


def images(count, size=20):
    x = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(0))
    y = torch.randint(10, (count,), generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE), y.to(DEVICE)


def halved(name, **params):
    """LeNet-5 at half of its MACs, on the device."""
    model = onto(models.create("lenet5", classes=10, channels=1, size=20, seed=0))
    x, y = images(64)
    return api.outcome(name, model, budget="macs:0.5", example_input=x[:1], data=(x, y), **params)


@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=lambda v: str(v) if v else "")
def test_a_technique_mixes_no_devices(name, params):
    with pretended_gpu.gpu():
        outcome = halved(name, **{**BRIEF.get(name, {}), **params})
        x, _ = images(2)
        assert {p.device for p in outcome.resized.parameters()} == {DEVICE}
        assert outcome.resized(x).shape == (2, 10)


class Batches:
    """Samples that lie on the device."""

    def __init__(self, count):
        self.x, self.y = images(count)

    def __len__(self):
        return len(self.x)

    def batches(self, size, *, generator=None, augment=None):
        for at in range(0, len(self), size):
            yield self.x[at : at + size], self.y[at : at + size]


def test_a_plain_training_step_waits_once():
    with pretended_gpu.gpu() as waits:
        model, samples = onto(models.create("lenet5", classes=10, channels=1, size=20)), Batches(64)
        recipe = Recipe(epochs=1, batch_size=8, lr=0.01)
        fit(model, samples, recipe, macs=1)  # makes the optimizer's state
        counts = []
        for epochs in (1, 2):
            waits.clear()
            fit(model, samples, recipe.model_copy(update={"epochs": epochs}), macs=1)
            counts.append(sum(waits.values()))
    assert (counts[1] - counts[0]) / 8 <= 1, waits


@pytest.mark.parametrize("recipe", [{}, {"crop": 2, "flip": True, "cutout": 4}, {"clip": 1.0}])
def test_a_step_on_images_in_memory_waits_once(recipe):
    """For its loss; samples and what is drawn for them go there once a pass."""
    with pretended_gpu.gpu() as waits:
        model = onto(models.create("lenet5", classes=10, channels=1, size=20))
        pixels = torch.randint(256, (64, 1, 20, 20), dtype=torch.uint8).to(DEVICE)
        labels = torch.zeros(64, dtype=torch.long).to(DEVICE)
        samples = ImageSamples(pixels, labels, (0.5,), (0.25,), DEVICE)
        made = Recipe(epochs=1, batch_size=8, lr=0.01, **recipe)
        fit(model, samples, made, macs=1)
        counts = []
        for size in (8, 4):  # eight steps an epoch, and sixteen
            waits.clear()
            fit(model, samples, made.model_copy(update={"batch_size": size}), macs=1)
            counts.append(sum(waits.values()))
    assert (counts[1] - counts[0]) / 8 <= 1, waits


class Kept:
    """States as they come back from a file: on the CPU."""

    def __init__(self):
        self.trainings, self.checkpoints, self.kills = {}, {}, 1

    def fit(self, model, train, recipe, *, desc, **options):
        """A training that is killed after its first epoch, once, and then goes on."""
        state = self.trainings.setdefault(desc, {})

        def after_epoch(epoch):
            if self.kills and epoch >= 1 and state:
                self.kills = 0
                raise KeyboardInterrupt

        resume = SimpleNamespace(
            read=lambda recipe, samples: state or None,
            due=lambda: True,
            write=lambda recipe, samples, kept: state.update(on_the_cpu(kept)),
        )
        return fit(model, train, recipe, after_epoch=after_epoch, resume=resume, **options)

    def checkpoint(self, name, make):
        """What comes back from the store in every case, so that what follows starts from it."""
        if name not in self.checkpoints:
            self.checkpoints[name] = on_the_cpu(make())
        return tree_map(lambda v: v, self.checkpoints[name])


def on_the_cpu(state):
    return tree_map(lambda v: v.held.clone() if isinstance(v, OnDevice) else v, state)


@pytest.mark.parametrize("name", ["autoprune", "autoslim", "splitting", "neuron-removal"])
def test_a_resumed_technique_mixes_no_devices(monkeypatch, name):
    kept = Kept()
    monkeypatch.setattr(api, "fit", kept.fit)
    monkeypatch.setattr(api, "Task", partial(Task, checkpoint=kept.checkpoint))
    params = {**BRIEF[name], **({} if name == "neuron-removal" else {"epochs": 3})}
    with pretended_gpu.gpu():
        if name != "neuron-removal":
            with pytest.raises(KeyboardInterrupt):
                halved(name, **params)
            assert any(kept.trainings.values())
        assert {p.device for p in halved(name, **params).resized.parameters()} == {DEVICE}


def test_an_index_is_what_it_is_on_a_cpu():
    foreign = torch.empty(3, device=DEVICE)
    with pretended_gpu.gpu() as waits:
        x = OnDevice(torch.arange(6.0).view(2, 3))
        assert x[:, [2, 0]].held.tolist() == [[2.0, 0.0], [5.0, 3.0]]
        assert x[[1]].held.tolist() == [[3.0, 4.0, 5.0]]
        x[[0]] = 7.0
        assert x.held.tolist() == [[7.0, 7.0, 7.0], [3.0, 4.0, 5.0]]
        assert sum(waits.values()) == 3  # each index goes there
        with pytest.raises(RuntimeError, match="a tensor without numbers"):
            x + foreign


def test_it_would_find_a_mistake():
    with pretended_gpu.gpu() as waits:
        x, _ = images(2)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(20)
        with pytest.raises(TypeError, match="no numpy array"):
            x.numpy()
        float(x.sum())
        assert sum(waits.values()) == 3, waits  # two copies to the device, one number back
