"""Networks of any input: several tensors, arguments by name, batches that are taken as a whole."""

import pytest
import torch
from torch import nn

import widthbench
from widthbench import Inputs
from widthbench.errors import UsageError
from widthbench.width import CostModel, find_groups, keep, resize
from widthbench.width.inputs import random_like


class Two(nn.Module):
    """An image and a vector of its own, a mask, and a flag."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(5, 12)
        self.head = nn.Linear(28, 4)

    def forward(self, image, vector, mask=None, twice=False):
        x = self.a(image).relu().mean((2, 3)) * (2 if twice else 1)
        y = self.b(vector).relu()
        if mask is not None:
            y = y.masked_fill(~mask[:, None], 0.0)
        return {"scores": self.head(torch.cat([x, y], 1)), "sizes": (image.mean(), vector.sum(1))}


class Clips(nn.Module):
    """A batch of frames, four to a clip."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu().mean((2, 3))
        return self.head(x.view(-1, 4, x.shape[1]).mean(1))


class Listed(nn.Module):
    """A list of images of their own sizes, as detectors take them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, images):
        return [{"maps": self.b(self.a(x[None]).relu())[0]} for x in images]


IMAGE, VECTOR, MASK = torch.randn(2, 3, 8, 8), torch.randn(2, 5), torch.tensor([True, False])


@pytest.mark.parametrize(
    "example",
    [
        (IMAGE, VECTOR),
        (IMAGE[:1], VECTOR[:1]),
        {"image": IMAGE, "vector": VECTOR, "mask": MASK},
        Inputs((IMAGE, VECTOR), {"mask": MASK, "twice": True}),
    ],
    ids=["tuple", "one sample", "names", "both"],
)
def test_a_network_of_several_inputs_is_resized(example):
    net = Two().eval()
    groups = find_groups(net, example, cache=False)
    assert {n: g.grade for n, g in groups.items()} == {"a": "exact", "b": "exact"}
    cost = CostModel(net, groups, example)
    assert cost.macs == 64 * 27 * 16 + 5 * 12 + 28 * 4
    small = widthbench.apply("l1-norm", net, budget="channels:0.5", example_input=example)
    assert (small.a.out_channels, small.b.out_features, small.head.in_features) == (8, 6, 14)
    assert Inputs.of(example).run(small)["scores"].shape == (len(Inputs.of(example)), 4)
    half = resize(net, groups, {"b": keep(torch.arange(6))})
    assert cost.counted(half, {"b": 6}).macs == 64 * 27 * 16 + 5 * 6 + 22 * 4


def test_a_batch_that_is_taken_as_a_whole():
    net, x = Clips().eval(), torch.randn(8, 3, 8, 8)
    groups = find_groups(net, x, cache=False)
    assert {n: g.grade for n, g in groups.items()} == {"a": "exact", "b": "exact"}
    assert (groups.samples, groups.output_shapes) == (8, ((2, 5),))
    cost = CostModel(net, groups, x)
    assert cost.macs == 8 * 64 * (27 * 16 + 16 * 8) + 2 * 8 * 5  # of all eight: a head counts twice
    small = widthbench.apply("l1-norm", net, budget="macs:0.5", example_input=x)
    kept = {"a": small.a.out_channels, "b": small.b.out_channels}
    assert cost.counted(small, kept).macs <= 0.5 * cost.macs


def test_frames_that_a_network_puts_into_the_batch_are_all_counted():
    class Video(Clips):
        def forward(self, x):  # [B, T, C, H, W]
            return super().forward(x.flatten(0, 1))

    net, x = Video().eval(), torch.randn(2, 4, 3, 8, 8)
    groups = find_groups(net, x, cache=False)
    cost = CostModel(net, groups, x)
    assert cost.macs == 4 * 64 * (27 * 16 + 16 * 8) + 8 * 5  # of one sample
    half = resize(net, groups, {"a": keep(torch.arange(8))})
    assert cost.counted(half, {"a": 8}).macs == 4 * 64 * (27 * 8 + 8 * 8) + 8 * 5


def test_a_list_of_images_of_different_sizes():
    net, images = Listed().eval(), [torch.randn(3, 8, 8), torch.randn(3, 6, 10)]
    groups = find_groups(net, (images,), cache=False)
    assert [(n, g.grade) for n, g in groups.items()] == [("a", "exact")]
    small = widthbench.apply("l1-norm", net, budget="channels:0.5", example_input=(images,))
    assert [y["maps"].shape for y in small(images)] == [(6, 8, 8), (6, 6, 10)]


def test_wrong_groups_of_several_inputs_are_still_found_out():
    class Mixed(Two):
        def forward(self, image, vector):  # an order of channels that no label sees
            x = self.a(image).relu().mean((2, 3))
            order = torch.tensor(list(reversed(range(x.shape[1]))))
            y = self.b(vector).relu()
            x = torch.from_numpy(x.detach().numpy()[:, order])
            return self.head(torch.cat([x, y], 1))

    groups = find_groups(Mixed().eval(), (IMAGE, VECTOR), cache=False)
    assert groups["b"].grade == "exact"
    assert all(g.grade == "frozen" for n, g in groups.items() if n != "b")


def test_random_inputs_keep_what_is_no_number():
    given = Inputs((torch.zeros(1, 3), torch.tensor([[7, 9]])), {"mask": torch.tensor([[True]])})
    drawn = random_like(given, 1)
    x, tokens, mask = drawn.tensors
    assert (x.shape, x.dtype) == ((2, 3), torch.float64)
    assert not torch.equal(x[0], x[1])
    assert set(tokens.flatten().tolist()) <= {7, 9}
    assert tokens.shape == (2, 2)
    assert mask.tolist() == [[True], [True]]
    whole = random_like(Inputs((torch.zeros(4, 3), torch.arange(4))), 4)
    assert whole.tensors[1].tolist() == [0, 1, 2, 3]
    assert whole.shapes == ((4, 3), (4,))


@pytest.mark.parametrize("bad", [3, "image", {1: IMAGE}, (), (torch.tensor(1.0),)])
def test_what_is_no_input_is_refused(bad):
    with pytest.raises(UsageError, match="example_input"):
        widthbench.apply("l1-norm", Two(), budget="channels:0.5", example_input=bad)


def test_techniques_that_look_at_data_say_what_they_take():
    data = (IMAGE, torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="wrap a network of several inputs"):
        widthbench.apply(
            "neuron-removal",
            Two(),
            budget="channels:0.5",
            example_input=(IMAGE, VECTOR),
            data=data,
        )


def test_a_network_that_takes_something_else_says_so():
    with pytest.raises(UsageError, match=r"Two does not take an input of shape \[2, 3, 8, 8\]"):
        find_groups(Two(), IMAGE)
