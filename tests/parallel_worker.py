"""What each of several processes runs in test_parallel.py: trains and scores, and the first one
writes what came out."""

import sys
from dataclasses import dataclass

import timm
import torch

import widthbench.networks.models  # noqa: F401
from widthbench import parallel
from widthbench.data import splits
from widthbench.recipe import Recipe
from widthbench.training.loop import fit
from widthbench.training.measuring import accuracy


@dataclass
class Doubles:
    """Samples in float64, so that nothing but the order of sums differs."""

    samples: splits.ImageSamples
    parted = True

    def __len__(self):
        return len(self.samples)

    def batches(self, size, **options):
        for x, y in self.samples.batches(size, **options):
            yield x.double(), y


def train(name: str, size: int, out: str) -> None:
    digits = splits.load("digits", size)
    torch.manual_seed(0)
    model = timm.create_model(
        name, num_classes=10, in_chans=1, **({"img_size": size} if "vit" in name else {})
    ).double()
    # 1077 samples: the last batch of an epoch is a partial one, and 35 do not divide by 2
    recipe = Recipe(
        epochs=0.4,
        batch_size=35,
        lr=0.05,
        crop=2,
        flip=True,
        cutout=4,
        label_smoothing=0.1,
        ema=0.9,
    )
    spent = fit(model, Doubles(digits.train), recipe, macs=1, seed=3)
    scores = accuracy(model, Doubles(digits.test), batch_size=64)
    sums = [p.detach().sum().item() for p in model.parameters()]
    assert parallel.broadcast(lambda: sums) == sums
    if parallel.is_main():
        result = {
            "state": dict(model.state_dict()),
            "macs": spent.forward_macs,
            "scores": [scores.top1, scores.loss],
        }
        torch.save(result, out)


def main(out: str, *networks: str) -> None:
    torch.set_num_threads(1)
    parallel.start(cpu=True)
    for network in networks:
        name, size = network.split(":")
        train(name, int(size), f"{out}-{name}.pt")
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
