"""The in-memory pipeline against torchvision's DataLoader, side by side: images per second, and
accuracy after the same epochs.

python bench/speed/pipeline.py [--epochs 3] [--seeds 0 1 2] > results/pipeline.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator

import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from widthbench.data import splits
from widthbench.networks import models
from widthbench.provenance import commit, hardware, versions
from widthbench.recipe import Recipe
from widthbench.training.loop import fit
from widthbench.training.measuring import accuracy

SETS = {"fashionmnist": 28, "cifar10": 32}
BATCH = 128


class Images(Dataset):
    """What torchvision's own data sets do: one PIL image at a time through torchvision's
    transforms.
    """

    def __init__(self, samples: splits.ImageSamples, pad: int) -> None:
        self.images, self.labels = samples.images.numpy(), samples.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(samples.images.shape[-1], padding=pad),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(samples.mean, samples.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        return self.transform(picture), self.labels[index]


class Loaded:
    """A DataLoader with two workers in the place of our samples."""

    def __init__(self, samples: splits.ImageSamples, pad: int) -> None:
        self.set = Images(samples, pad)

    def __len__(self) -> int:
        return len(self.set)

    def batches(
        self, size: int, *, generator: torch.Generator | None = None, augment: Recipe | None = None
    ) -> Iterator:
        return iter(DataLoader(self.set, size, shuffle=True, num_workers=2, generator=generator))


def images_per_second(batches: Iterator, count: int) -> float:
    """Passes over batches until so many images have come."""
    seen, begin = 0, time.perf_counter()
    for x, _ in batches:
        seen += len(x)
        if seen >= count:
            break
    return seen / (time.perf_counter() - begin)


def speeds_of(samples: splits.ImageSamples, recipe: Recipe, seed: int) -> list[float]:
    """[ours, the DataLoader's] images per second over an epoch each, less its first batch: the
    workers' start does not count.
    """
    ours = samples.batches(BATCH, generator=torch.Generator().manual_seed(seed), augment=recipe)
    theirs = Loaded(samples, recipe.crop).batches(
        BATCH, generator=torch.Generator().manual_seed(seed)
    )
    return [images_per_second((next(b), b)[1], len(samples) - BATCH) for b in (ours, theirs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    recipe = Recipe(
        epochs=args.epochs, batch_size=BATCH, lr=0.05, warmup_epochs=0.5, crop=4, flip=True
    )
    speeds, scores = [], []
    for name, size in SETS.items():
        samples = splits.load(name, size, val=0).train
        pairs = [speeds_of(samples, recipe, seed) for seed in range(args.rounds)]
        ratios = [a / b for a, b in pairs]
        middle = [f"{statistics.median(p[i] for p in pairs):,.0f}" for i in (0, 1)]
        speeds.append([name, *middle, f"{statistics.median(ratios):.1f}x", f"{min(ratios):.1f}x"])
        print(speeds[-1], file=sys.stderr)
    for name, size in SETS.items():
        for seed in args.seeds:
            split = splits.load(name, size, val=0)
            row = [name, seed]
            for train in (split.train, Loaded(split.train, recipe.crop)):
                model = models.create(
                    "lenet5", classes=split.classes, channels=split.channels, size=size, seed=seed
                )
                fit(model, train, recipe, macs=1, seed=seed)
                row.append(accuracy(model, split.test).top1)
            scores.append(row)
            print(row, file=sys.stderr)
    print("# The in-memory pipeline against a DataLoader\n")
    state = commit()
    dirty = " with uncommitted changes" if state["dirty"] else ""
    print(
        f"`python {' '.join(sys.argv)}` at {str(state['commit'])[:12]}{dirty};"
        f" {hardware()['cores']} cores of {hardware()['cpu']},"
    )
    print(
        f"torch {versions()['torch']}, 2 threads, batches of {BATCH}. Crop (4 pixels of padding)"
        " and flip for every image;"
    )
    print(
        "the DataLoader has 2 workers, with torchvision's transforms on PIL images as its own data"
        " sets do."
    )
    print(f"Medians of {args.rounds} interleaved epochs each.\n")
    headers = [
        "data set",
        "ours, images/s",
        "DataLoader, images/s",
        "ratio, median",
        "ratio, least",
    ]
    print(
        tabulate(
            speeds,
            headers=headers,
            tablefmt="pipe",
            colalign=("left", *["right"] * 4),
            disable_numparse=True,
        )
    )
    print(
        f"\nlenet5 with the same recipe ({args.epochs:g} epochs) and seed through both, test top-1"
        " in %:\n"
    )
    rows = [[*r[:2], f"{r[2]:.2f}", f"{r[3]:.2f}", f"{r[2] - r[3]:+.2f}"] for r in scores]
    for name in SETS:
        gaps = [r[2] - r[3] for r in scores if r[0] == name]
        spread = f" ± {statistics.stdev(gaps):.2f}" if len(gaps) > 1 else ""
        means = [f"{statistics.fmean(r[i] for r in scores if r[0] == name):.2f}" for i in (2, 3)]
        rows.append([name, "mean", *means, f"{statistics.fmean(gaps):+.2f}{spread}"])
    print(
        tabulate(
            rows,
            headers=["data set", "seed", "ours", "DataLoader", "difference"],
            tablefmt="pipe",
            disable_numparse=True,
        )
    )


if __name__ == "__main__":
    main()
