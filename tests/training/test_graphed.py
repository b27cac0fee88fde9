"""The bookkeeping of graphed training, on a CPU that records steps as a GPU would
(tests/test_cuda.py has a real one)."""

import contextlib

import pytest
import torch
from timm.optim import create_optimizer_v2

from widthbench.data import splits
from widthbench.errors import DivergedError
from widthbench.networks import models
from widthbench.recipe import Recipe
from widthbench.training import graphed, state
from widthbench.training.loop import fit
from widthbench.training.resume import Resume


class Recorded:
    """In place of a CUDA graph: what is recorded is not done until it is replayed."""

    recording = None

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.work()


@pytest.fixture
def recorder(monkeypatch):
    graphs = []
    real = graphed._Steps._from_tables

    def from_tables(steps):
        if Recorded.recording is None:
            real(steps)
        else:
            Recorded.recording.work = lambda: real(steps)

    @contextlib.contextmanager
    def graph(made):
        graphs.append(made)
        Recorded.recording = made
        try:
            yield
        finally:
            Recorded.recording = None

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(graphed, "RECORDABLE", ("cpu",))
    monkeypatch.setattr(graphed._Steps, "_from_tables", from_tables)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return graphs


@pytest.fixture(scope="module")
def digits():
    return splits.load("digits", 8)


def network():
    return models.create("test_resnet", classes=10, channels=1, size=8)


RECIPE = {
    "epochs": 2.2,
    "batch_size": 64,
    "lr": 0.02,
    "crop": 1,
    "flip": True,
    "cutout": 2,
    "warmup_epochs": 1,
}


def fused(*args, **options):
    optimizer = create_optimizer_v2(*args, **options)
    for group in optimizer.param_groups:
        group |= {"fused": True, "foreach": False}
    optimizer.register_step_pre_hook(as_on_the_device)
    return optimizer


def as_on_the_device(optimizer, *_):
    """A learning rate is a float32 there."""
    for group in optimizer.param_groups:
        group["lr"] = float(torch.tensor(group["lr"], dtype=torch.float32))


def assert_plain_gives(expected, digits, recipe, monkeypatch):
    """That steps one by one, with the fused optimizer, give the same weights bit by bit."""
    monkeypatch.setattr(graphed, "RECORDABLE", ())
    monkeypatch.setattr(state, "create_optimizer_v2", fused)
    plain = network()
    spent = fit(plain, digits.train, recipe, macs=7)
    for p, q in zip(expected.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    return spent


@pytest.mark.parametrize(
    "changes", [{}, {"batch_size": 76}, {"optimizer": "adamw", "lr": 1e-3}], ids=str
)
def test_a_graphed_training_is_the_plain_one(digits, recorder, monkeypatch, changes):
    recipe = Recipe(**RECIPE | changes)
    assert len(digits.train) % 76 == 13  # a last batch that is smaller
    graph = network()
    one = fit(graph, digits.train, recipe, macs=7)
    (recorded,) = recorder
    other = assert_plain_gives(graph, digits, recipe, monkeypatch)
    full = len(digits.train) // recipe.batch_size
    assert recorded.replays > full - graphed.WARM_UP
    assert (one.forward_macs, one.epochs) == (other.forward_macs, other.epochs)
    assert not graph.training


def test_a_killed_graphed_training_goes_on_to_the_same_weights(digits, recorder, tmp_path):
    recipe, path = Recipe(**RECIPE), tmp_path / "state"
    whole, stopped = network(), network()
    fit(whole, digits.train, recipe, macs=1)

    def stop(epoch):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(stopped, digits.train, recipe, macs=1, resume=Resume(path, every_s=0), after_epoch=stop)
    again = network()
    fit(again, digits.train, recipe, macs=1, resume=Resume(path, every_s=0))
    for p, q in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_divergence_is_named_with_its_step(digits, recorder):
    with pytest.raises(
        DivergedError, match=r"the loss is (nan|inf) at step \d+ of 34; lower lr = 1e\+12"
    ):
        fit(network(), digits.train, Recipe(epochs=2, lr=1e12), macs=1)
    assert recorder


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("operation not permitted when stream is capturing"),
        torch.OutOfMemoryError("out of memory"),
    ],
)
def test_what_cannot_be_recorded_is_trained_step_by_step(digits, recorder, monkeypatch, fault):
    @contextlib.contextmanager
    def graph(made):
        raise fault
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    recipe = Recipe(**RECIPE)
    one = network()
    with pytest.warns(UserWarning, match="steps are taken one by one"):
        spent = fit(one, digits.train, recipe, macs=7)
    assert spent == assert_plain_gives(one, digits, recipe, monkeypatch).model_copy(
        update={"seconds": spent.seconds}
    )


def test_what_a_replay_would_leave_out_is_trained_step_by_step(digits, recorder):
    calls = []
    model = network()
    model.register_forward_hook(lambda *a: calls.append(1))
    fit(model, digits.train, Recipe(**RECIPE), macs=1)
    fit(network(), digits.train, Recipe(**RECIPE | {"ema": 0.9}), macs=1)
    assert calls
    assert not recorder
