import copy
import math

import pytest
import torch
import zoo
from killed import Killed
from torch import nn
from torch.nn import functional as F

from widthbench.data import splits
from widthbench.errors import DivergedError, UsageError
from widthbench.networks import models
from widthbench.recipe import Recipe
from widthbench.training.ending import Ending
from widthbench.training.loop import fit
from widthbench.training.measuring import accuracy
from widthbench.training.recalibration import batch_norms, recalibrate
from widthbench.training.resume import Resume
from widthbench.training.state import steps_of


@pytest.fixture(scope="module")
def digits():
    return splits.load("digits", 8)


def small(name="lenet_300_100", size=8):
    return models.create(name, classes=10, channels=1, size=size)


def test_training_learns_and_counts_what_it_cost(digits):
    model = small()
    spent = fit(model, digits.train, Recipe(epochs=4, batch_size=64, lr=0.05), macs=100)
    assert accuracy(model, digits.test).top1 > 85
    assert spent.forward_macs == 4 * 100 * 1077
    assert spent.backward_macs == 2 * spent.forward_macs
    assert spent.epochs == 4
    assert not model.training


def test_the_seed_decides_everything_and_the_global_state_is_left_alone(digits):
    state = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        model = small()
        fit(model, digits.train, Recipe(epochs=1, lr=0.05), macs=1, seed=seed)
        runs.append(model.ip1.weight)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_one_step_equals_nesterov_sgd_written_out(digits):
    model, reference = small(), small()
    recipe = Recipe(epochs=1, batch_size=len(digits.train), lr=0.1, momentum=0.9, weight_decay=0.01)
    fit(model, digits.train, recipe, macs=1, seed=3)
    ((x, y),) = digits.train.batches(len(digits.train), generator=torch.Generator().manual_seed(3))
    F.cross_entropy(reference(x), y).backward()
    with torch.no_grad():
        for p, new in zip(reference.parameters(), model.parameters(), strict=True):
            g = p.grad + (0.01 * p if p.dim() > 1 else 0)  # no decay on biases
            assert torch.allclose(new, p - 0.1 * (g + 0.9 * g), atol=1e-6)


def test_fractional_epochs_and_single_leftover_samples(digits):
    assert steps_of(Recipe(epochs=0.5, batch_size=64, lr=0.1), 1077) == (17, 8)
    assert steps_of(Recipe(epochs=2, batch_size=4, lr=0.1), 9) == (
        2,
        4,
    )  # a batch of one cannot be normalised
    assert steps_of(Recipe(epochs=2, batch_size=4, lr=0.1), 10) == (3, 6)
    done = fit(small(), digits.train, Recipe(epochs=0.5, lr=0.05), macs=1)
    assert done.epochs == pytest.approx(0.5, abs=0.05)


def test_divergence_is_named(digits):
    with pytest.raises(
        UsageError,
        match=r"training diverged: the loss is (nan|inf) at step \d+ of 34; lower lr = 1e\+12",
    ):
        fit(small(), digits.train, Recipe(epochs=2, lr=1e12), macs=1)


def test_the_learning_rate_warms_up_and_ends_with_a_cosine(digits, monkeypatch):
    seen = []
    real = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *a: seen.append(self.param_groups[0]["lr"]) or real(self, *a),
    )
    recipe = Recipe(epochs=4, batch_size=64, lr=0.1, warmup_epochs=1)
    fit(small(), digits.train, recipe, macs=1)
    per_epoch, total = steps_of(recipe, len(digits.train))
    assert len(seen) == total
    assert seen[0] == pytest.approx(0.001)
    assert seen[per_epoch] == pytest.approx(0.1)
    expected = [
        0.05 * (1 + math.cos(math.pi * t / (total - per_epoch))) for t in range(total - per_epoch)
    ]
    assert seen[per_epoch:] == pytest.approx(expected, abs=1e-9)


def test_recalibration_gives_the_statistics_of_the_training_data(digits):
    model = small("test_resnet", 8)
    with torch.no_grad():
        for m in batch_norms(model):
            m.running_mean.fill_(5.0)
    before = copy.deepcopy(model.state_dict())
    spent = recalibrate(model, digits.train, samples=10_000, macs=7, batch_size=len(digits.train))
    x = next(digits.train.batches(len(digits.train)))[0]
    stem = model.conv1[0](x)
    bn = model.conv1[1]
    assert torch.allclose(bn.running_mean, stem.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(bn.running_var, stem.var((0, 2, 3)), atol=1e-4)
    assert spent.forward_macs == 7 * 1077
    assert all(m.momentum == 0.1 for m in batch_norms(model))
    after = model.state_dict()
    assert all(
        torch.equal(before[k], after[k])
        for k in before
        if "running" not in k and "num_batches" not in k
    )


def test_recalibration_without_batch_norm_is_free(digits):
    assert recalibrate(small(), digits.train, samples=100, macs=7).forward_macs == 0
    assert isinstance(zoo.Plain().bn2, nn.BatchNorm2d)


def trained(digits, path, stop_after=None, **changes):
    """A network trained with a state after every epoch; "killed" after an epoch if that is asked
    for."""
    recipe = Recipe(
        **{"epochs": 5, "batch_size": 64, "lr": 0.02, "crop": 1, "warmup_epochs": 1, **changes}
    )
    model = models.create("test_resnet", classes=10, channels=1, size=8)
    model.add_module("drop", nn.Dropout(0.1))  # draws on the global generator
    plain = type(model).forward
    model.forward = lambda x: model.drop(plain(model, x))

    def after(epoch):
        if epoch == stop_after:
            raise Killed

    spent = fit(
        model,
        digits.train,
        recipe,
        macs=1,
        seed=4,
        after_epoch=after,
        resume=Resume(path, every_s=0),
    )
    return model, spent


def test_a_killed_run_goes_on_to_the_same_weights(digits, tmp_path):
    whole, spent = trained(digits, tmp_path / "whole")
    for epoch in (1, 3, 4):
        with pytest.raises(Killed):
            trained(digits, tmp_path / "killed", stop_after=epoch)
        assert (tmp_path / "killed").is_file()
    resumed, again = trained(digits, tmp_path / "killed")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert (again.epochs, again.forward_macs) == (spent.epochs, spent.forward_macs)
    assert again.seconds > spent.seconds / 10


def test_states_that_are_damaged_or_of_another_run_are_named_and_not_used(digits, tmp_path):
    whole, _ = trained(digits, tmp_path / "whole")
    with pytest.raises(Killed):
        trained(digits, tmp_path / "a", stop_after=2)
    content = bytearray((tmp_path / "a").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"damaged training state .*a \(its digest does not match\)"
    ):
        again, _ = trained(digits, tmp_path / "a")
    assert torch.equal(again.fc.weight, whole.fc.weight)
    with pytest.raises(Killed):
        trained(digits, tmp_path / "b", stop_after=2, lr=0.03)
    with pytest.warns(UserWarning, match="belongs to another recipe"):
        again, _ = trained(digits, tmp_path / "b")
    assert torch.equal(again.fc.weight, whole.fc.weight)


def test_augmented_training_learns_and_changes_what_is_seen(digits):
    a, b = small("lenet5", 16), small("lenet5", 16)
    split = splits.load("digits", 16)
    fit(a, split.train, Recipe(epochs=3, lr=0.05), macs=1)
    fit(b, split.train, Recipe(epochs=3, lr=0.05, crop=1), macs=1)
    assert not torch.equal(a.conv1.weight, b.conv1.weight)
    assert accuracy(b, split.test).top1 > 80


@pytest.mark.parametrize("name", ["lenet5", "test_resnet"])
def test_accuracy_is_the_same_at_any_batch_size(name):
    split = splits.load("digits", 16)
    model = small(name, 16)
    fit(model, split.train, Recipe(epochs=1, lr=0.05), macs=1)
    scores = [accuracy(model, split.test, batch_size=size) for size in (1, 7, 64, 450, 1000)]
    assert {s.top1 for s in scores} == {scores[0].top1}
    assert {s.samples for s in scores} == {450}
    assert max(s.loss for s in scores) - min(s.loss for s in scores) < 1e-6


@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_one_clipped_step_equals_torchs_own(digits, clip):
    """Gradients of a larger norm than ``clip`` are scaled down to it, others left as they are."""
    recipe = Recipe(epochs=1, batch_size=len(digits.train), lr=0.1, momentum=0, weight_decay=0)
    model, twin = small(), small()
    fit(model, digits.train, recipe.model_copy(update={"clip": clip}), macs=1)
    ((x, y),) = digits.train.batches(len(digits.train), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(twin(x), y).backward()
    norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
    assert 0.1 < norm < 1e6
    scale = min(1.0, clip / float(norm))
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, other - 0.1 * scale * other.grad, atol=1e-6)


def test_one_adamw_step_with_label_smoothing_equals_torchs_own(digits):
    model, reference = small(), small()
    recipe = Recipe(
        epochs=1,
        batch_size=len(digits.train),
        optimizer="adamw",
        lr=0.01,
        weight_decay=0.1,
        label_smoothing=0.2,
    )
    fit(model, digits.train, recipe, macs=1, seed=3)
    ((x, y),) = digits.train.batches(len(digits.train), generator=torch.Generator().manual_seed(3))
    matrices = [p for p in reference.parameters() if p.dim() > 1]
    vectors = [p for p in reference.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}], lr=0.01
    )
    loss = -(
        0.8 * F.log_softmax(reference(x), 1)[range(len(y)), y]
        + 0.02 * F.log_softmax(reference(x), 1).sum(1)
    ).mean()
    loss.backward()
    optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(
            a, b, atol=1e-5
        )  # a gradient near AdamW's epsilon, 1e-8, makes a step of lr g / (g + epsilon)


def test_batches_of_one_are_refused():
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        Recipe(epochs=1, lr=0.1, batch_size=1)


def states(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_parts_make_the_whole_batchs_step(digits, parts):
    """Without batch norm; 64 do not divide by 3."""
    one, two = small(), small()
    recipe = Recipe(epochs=0.5, batch_size=64, lr=0.05, label_smoothing=0.1)
    bills = [
        fit(m, digits.train, r, macs=7)
        for m, r in ((one, recipe), (two, recipe.model_copy(update={"accumulate": parts})))
    ]
    assert bills[0].forward_macs == bills[1].forward_macs
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_an_average_of_weights_is_what_the_training_ends_with(digits):
    recipe = Recipe(epochs=1, batch_size=256, lr=0.05)
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            if self.training:
                seen.append(self.net.ip1.weight.detach().clone())
            return self.net(x)

    last, averaged = small(), Watched()
    fit(last, digits.train, recipe, macs=1, seed=2)
    fit(averaged, digits.train, recipe.model_copy(update={"ema": 0.9}), macs=1, seed=2)
    expected = seen[0].clone()  # the average starts from the first weights
    for weights in [*seen[1:], last.ip1.weight.detach()]:
        expected.lerp_(weights, 0.1)
    assert torch.allclose(averaged.net.ip1.weight, expected, atol=1e-6)
    assert not torch.allclose(averaged.net.ip1.weight, last.ip1.weight, atol=1e-4)


def test_a_resumed_average_goes_on(digits, tmp_path):
    recipe = Recipe(epochs=4, batch_size=256, lr=0.05, ema=0.9)
    whole, torn = small(), small()
    fit(whole, digits.train, recipe, macs=1)

    def stop(epoch):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(torn, digits.train, recipe, macs=1, resume=Resume(tmp_path / "a", 0), after_epoch=stop)
    again = small()
    fit(again, digits.train, recipe, macs=1, resume=Resume(tmp_path / "a", 0))
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True)
    )


class Hungry(torch.nn.Module):
    """Runs out of memory above so many samples, as a GPU does."""

    def __init__(self, most):
        super().__init__()
        self.net, self.most, self.sizes = small(), most, []

    def forward(self, x):
        if self.training:
            self.sizes.append(len(x))
            if len(x) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return self.net(x)


def test_out_of_memory_halves_the_batch_once_and_says_so(digits):
    recipe = Recipe(epochs=0.2, batch_size=64, lr=0.05)
    reference, hungry = small(), Hungry(40)
    fit(reference, digits.train, recipe, macs=1)
    with pytest.warns(
        UserWarning, match="out of memory: batches of 64 are computed in 2 parts from here on"
    ):
        spent = fit(hungry, digits.train, recipe, macs=1)
    assert spent.halved == 1
    assert hungry.sizes == [64, *[32] * 2 * steps_of(recipe, len(digits.train))[1]]
    for a, b in zip(hungry.net.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    with (
        pytest.warns(UserWarning, match="in 2 parts"),
        pytest.raises(UsageError, match=r"64 samples in 2 part.*lower batch_size = 64"),
    ):
        fit(Hungry(20), digits.train, recipe, macs=1)


def test_a_techniques_own_steps_are_neither_halved_nor_accumulated(digits):
    def losses(model, x, y):
        yield F.cross_entropy(model(x), y)

    recipe = Recipe(epochs=0.2, batch_size=64, lr=0.05)
    with pytest.raises(UsageError, match=r"64 samples in 1 part.*lower batch_size = 64$"):
        fit(Hungry(40), digits.train, recipe, macs=1, losses=losses)
    with pytest.raises(UsageError, match="accumulate = 2 is for plain steps"):
        fit(
            small(),
            digits.train,
            recipe.model_copy(update={"accumulate": 2}),
            macs=1,
            losses=losses,
        )


@pytest.mark.slow
def test_compiled_training_is_the_same_training(digits):
    recipe = Recipe(epochs=0.3, batch_size=64, lr=0.05)
    plain, compiled = small(), small()
    fit(plain, digits.train, recipe, macs=1)
    fit(compiled, digits.train, recipe.model_copy(update={"compile": True}), macs=1)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert type(compiled) is type(plain)


def test_a_run_that_ends_at_chance_has_diverged(digits):
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # no gradient reaches anything but the last bias
    with pytest.raises(
        DivergedError,
        match=r"its loss ends at chance \(2\.3\d\d\d nats over the last epoch; .* has 2\.302\d\)",
    ):
        fit(model, digits.train, Recipe(epochs=2, batch_size=64, lr=0.01), macs=1)


def test_chance_is_what_labels_say_and_few_steps_say_nothing():
    def ending(losses, labels, per_epoch=20, total=40):
        found = Ending(per_epoch, total)
        for step, loss in enumerate(losses):
            found.add(step, loss, labels)
        found.require_learned()

    uneven = torch.tensor([0] * 9 + [1])  # chance: 0.325 nats
    ending([9.0] * 20 + [0.32] * 20, uneven)  # only the last epoch counts
    with pytest.raises(DivergedError, match=r"0\.3260 nats .* has 0\.3251"):
        ending([0.1] * 20 + [0.326] * 20, uneven)
    ending([9.0] * 8, uneven, 4, 8)  # four steps
    ending([9.0] * 40, torch.zeros(10, dtype=torch.long))  # one class: nothing to learn
    ending([9.0] * 40, torch.rand(10))  # no classes
    kept, resumed = Ending(20, 40), Ending(20, 40)
    for step in range(30):
        kept.add(step, 0.33, uneven)
    resumed.load_state_dict(kept.state_dict())
    for step in range(30, 40):
        resumed.add(step, 0.33, uneven)
    with pytest.raises(DivergedError):
        resumed.require_learned()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_optimizers_state_may_lie_otherwise_in_memory(optimizer):
    """Fused optimizers walk over memory as it lies: a kept state in the usual layout, beside
    weights in channels-last, must give what torch's plain optimizer gives."""
    from widthbench.data.splits import ImageSamples

    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 3, 16, 16), generator=draw, dtype=torch.uint8)
    samples = ImageSamples(
        pixels, torch.arange(32) % 10, (0.5,) * 3, (0.25,) * 3, torch.device("cpu")
    )
    recipe = Recipe(epochs=1, batch_size=32, lr=0.05, optimizer=optimizer, weight_decay=0.0)
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = models.create("resnet20_cifar", classes=10, channels=3, size=16, seed=1)
        state = {}
        for name, p in model.named_parameters():
            like = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) ** 2
            like = like.contiguous(memory_format=layout) if p.dim() == 4 else like
            kept = {"momentum_buffer": like}
            if optimizer == "adamw":
                kept = {"step": torch.tensor(3.0), "exp_avg": like, "exp_avg_sq": like.clone()}
            state[name] = kept
        fit(model, samples, recipe, macs=1, optimizer_state=state)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-6)
    if optimizer == "sgd":  # and what torch's own gives, not fused, written out
        model = models.create("resnet20_cifar", classes=10, channels=3, size=16, seed=1).train()
        ((x, y),) = samples.batches(32, generator=torch.Generator().manual_seed(0))
        F.cross_entropy(model(x), y).backward()
        by_hand = []
        for name, p in model.named_parameters():
            old = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) ** 2
            momentum = 0.9 * old + p.grad
            by_hand.append((p - 0.05 * (p.grad + 0.9 * momentum)).detach().flatten())
        assert torch.allclose(ends[0], torch.cat(by_hand), atol=1e-4)
