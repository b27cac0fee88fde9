import pytest
import torch
from torch.nn import functional as F

from widthbench.data.augmentation import augment, draw
from widthbench.recipe import Recipe


def recipe(**changes):
    return Recipe(epochs=1, lr=0.1, **changes)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def augmented(x, recipe, generator):
    return augment(x, recipe, draw(recipe, len(x), *x.shape[2:], generator))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_is_a_window_of_the_padded_image_with_an_offset_of_its_own(dtype):
    x = torch.arange(1, 1 + 40 * 3 * 8 * 6).reshape(40, 3, 8, 6).remainder(250).add(1).to(dtype)
    out = augmented(x, recipe(crop=2), draws())
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    padded = F.pad(x, (2, 2, 2, 2))
    found = [
        next(
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(padded[n, :, i : i + 8, j : j + 6], out[n])
        )
        for n in range(40)
    ]
    assert len(set(found)) > 10  # one draw for the whole batch would be one offset
    assert {i for i, _ in found} == {j for _, j in found} == set(range(5))


def test_a_flip_mirrors_about_half_of_the_images():
    x = torch.rand(400, 1, 4, 5)
    out = augmented(x, recipe(flip=True), draws())
    mirrored = torch.tensor([torch.equal(out[n], x[n].flip(-1)) for n in range(400)])
    same = torch.tensor([torch.equal(out[n], x[n]) for n in range(400)])
    assert bool((mirrored ^ same).all())
    assert 150 < int(mirrored.sum()) < 250


def test_cutout_blacks_a_square_out_that_may_lie_partly_outside():
    x = torch.ones(500, 2, 16, 16)
    out = augmented(x, recipe(cutout=6), draws())
    holes = (out == 0).all(1)
    assert torch.equal(holes, (out == 0).any(1))  # the same in all channels
    sizes = holes.sum((1, 2))
    assert int(sizes.max()) == 36
    assert int(sizes.min()) < 20
    for hole in holes[:20]:
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert int(hole.sum()) == int(rows * columns)  # a rectangle
    assert len({tuple(h.flatten().tolist()) for h in holes}) > 100


def test_the_generator_decides_and_the_input_is_left_alone():
    x = torch.rand(16, 3, 8, 8)
    before = x.clone()
    everything = recipe(crop=2, flip=True, cutout=3)
    a, b, c = (augmented(x, everything, draws(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(x, before)
    assert torch.equal(augmented(x, recipe(), draws()), x)


def test_crops_equal_those_of_torchvision_at_the_same_offsets():
    from torchvision.transforms import functional as tv

    x = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    out = augmented(x, recipe(crop=4), draws(7))
    offsets = torch.randint(0, 9, (2, 32), generator=draws(7))
    padded = tv.pad(x, 4)
    for n in range(32):
        assert torch.equal(
            out[n], tv.crop(padded[n], int(offsets[0, n]), int(offsets[1, n]), 32, 32)
        )
