import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from widthbench.data import splits
from widthbench.errors import UsageError
from widthbench.recipe import Recipe


def test_digits_splits_are_stratified_disjoint_and_complete():
    split = splits.load("digits", 8)
    assert (len(split.train), len(split.val), len(split.test)) == (1077, 270, 450)
    assert (split.classes, split.channels) == (10, 1)
    for part in (split.train, split.val, split.test):
        counts = torch.bincount(part.labels)
        assert counts.max() - counts.min() <= 0.1 * len(part) / 10 + 2
    together = (
        torch.cat([split.train.images, split.val.images, split.test.images]).flatten(1).numpy()
    )
    whole = np.rint(load_digits().data / 16 * 255).astype(np.uint8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, whole))


def test_seeds_redraw_val_and_never_test():
    a, b, again = (
        splits.load("digits", 8, seed=0),
        splits.load("digits", 8, seed=1),
        splits.load("digits", 8, seed=0),
    )
    assert torch.equal(a.test.images, b.test.images)
    assert not torch.equal(a.val.images, b.val.images)
    assert torch.equal(a.val.images, again.val.images)
    assert a.digest == b.digest


def test_batches_are_normalised_by_the_training_part_and_cover_every_sample_once():
    split = splits.load("digits", 28)
    x = torch.cat([x for x, _ in split.train.batches(100)])
    assert x.shape == (1077, 1, 28, 28)
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3
    shuffled = torch.cat(
        [y for _, y in split.train.batches(100, generator=torch.Generator().manual_seed(0))]
    )
    assert not torch.equal(shuffled, split.train.labels)
    assert torch.equal(shuffled.sort().values, split.train.labels.sort().values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digit", 8), "unknown dataset 'digit'; did you mean 'digits'"),
        (("digits", 2), "between 4 and 4096 pixels"),
        (("digits", 8, 1.0), "fraction of the training data in \\[0, 1\\), not 1.0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        splits.load(arguments[0], arguments[1], val=arguments[2] if len(arguments) > 2 else 0.2)


@pytest.mark.parametrize("changes", [{}, {"crop": 2, "flip": True, "cutout": 3}])
def test_what_is_copied_to_a_device_at_once_is_what_each_batch_draws(changes):
    pixels = torch.randint(256, (21, 3, 8, 8), dtype=torch.uint8)
    cpu = torch.device("cpu")
    samples = splits.ImageSamples(pixels, torch.arange(21), (0.5,) * 3, (0.25,) * 3, cpu)
    recipe = Recipe(epochs=1, lr=0.1, **changes)
    asked = recipe if recipe.augments else None

    def drawn():
        return {"generator": torch.Generator().manual_seed(1), "augment": asked}

    there = splits.on_device(list(samples.choices(8, **drawn())), cpu)
    at_once = [samples.at(index, asked, draws) for index, draws in there]
    for (x, y), (other, labels) in zip(samples.batches(8, **drawn()), at_once, strict=True):
        assert torch.equal(x, other)
        assert torch.equal(y, labels)
