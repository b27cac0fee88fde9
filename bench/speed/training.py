"""Training throughput of our loop, a plain PyTorch loop, and one with Hugging Face accelerate, side
by side in one run.

    python bench/speed/training.py [--models MODEL ...] > results/training-speed.md

All three train the same network from the same seed on the same random pictures of 32 px, with
SGD, Nesterov's momentum and weight decay (torch's fused kernels in all three), in batches of 128.
The other two loops are given the layout that is fastest here (channels-last) and pictures that lie
in memory, normalised: nothing in them is slower than it must be. A round is as many steps of
each in turn, after one that does not count; what counts are ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from widthbench.data.splits import ImageSamples
from widthbench.networks import models
from widthbench.provenance import commit, hardware, versions
from widthbench.recipe import Recipe
from widthbench.training.state import Run

MODELS = ("resnet20_cifar", "mobilenetv1_100_cifar", "vgg16_cifar")
BATCH = 128
IMAGES = {"resnet20_cifar": 1024, "mobilenetv1_100_cifar": 512, "vgg16_cifar": 256}
SETTINGS = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}

Pictures = tuple[Tensor, Tensor]


def fresh(name: str) -> nn.Module:
    return models.create(name, classes=10, channels=3, size=32, seed=0).train()


def loader(pictures: Pictures) -> DataLoader:
    pixels, labels = pictures
    normalised = (pixels.float() / 255 - 0.5) / 0.25
    return DataLoader(TensorDataset(normalised, labels), BATCH, shuffle=True)


def ours(name: str, pictures: Pictures, amp: bool) -> Callable[[], None]:
    """The epochs of ``loop.fit``, without what it does before the first and after the last."""
    model = fresh(name)
    recipe = Recipe(epochs=1000, batch_size=BATCH, amp=amp, **SETTINGS)
    samples = ImageSamples(*pictures, (0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
    return Run(model, samples, recipe, seed=0, desc=name).one_epoch


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), nesterov=True, fused=True, **SETTINGS)


def plain(name: str, pictures: Pictures, amp: bool) -> Callable[[], None]:
    model, batches = fresh(name).to(memory_format=torch.channels_last), loader(pictures)
    optimizer = optimizer_of(model)

    def epoch() -> None:
        for x, y in batches:
            x = x.to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def accelerated(name: str, pictures: Pictures, amp: bool) -> Callable[[], None]:
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision in a process, else
    accelerator = Accelerator(mixed_precision="bf16" if amp else "no", cpu=True)
    model = fresh(name).to(memory_format=torch.channels_last)
    model, optimizer, batches = accelerator.prepare(model, optimizer_of(model), loader(pictures))

    def epoch() -> None:
        for x, y in batches:
            x = x.to(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

    return epoch


LOOPS = {"ours": ours, "plain PyTorch": plain, "accelerate": accelerated}


def seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def rounds(name: str, amp: bool, count: int) -> Iterator[dict[str, float]]:
    """Images per second of each loop, in turn."""
    images, draw = IMAGES.get(name, 512), torch.Generator().manual_seed(0)
    pictures = (
        torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=draw),
        torch.randint(10, (images,), generator=draw),
    )
    epochs = {loop: make(name, pictures, amp) for loop, make in LOOPS.items()}
    for number in range(count + 1):
        speeds = {loop: images / seconds(epoch) for loop, epoch in epochs.items()}
        if number:
            yield speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        for amp in (False, True):
            speeds = list(rounds(name, amp, options.rounds))
            ratios = [s["ours"] / max(v for k, v in s.items() if k != "ours") for s in speeds]
            medians = {loop: statistics.median(s[loop] for s in speeds) for loop in LOOPS}
            rows.append(
                {"network": name, "precision": "bfloat16" if amp else "float32"}
                | {f"{loop}, images/s": f"{v:.0f}" for loop, v in medians.items()}
                | {"ours over the best": f"{statistics.median(ratios):.2f}x"}
                | {"least": f"{min(ratios):.2f}x", "most": f"{max(ratios):.2f}x"}
            )
            print(rows[-1], file=sys.stderr)
    state = commit()
    print("# Training throughput, side by side\n")
    print(
        f"`python {' '.join(sys.argv)}` at {str(state['commit'])[:12]}; {options.threads} thread(s)"
        f" of {hardware()['cpu']}, torch {versions()['torch']}. Medians of {options.rounds} rounds;"
        " a ratio is of one round. bfloat16 is autocast: weights stay float32.\n"
    )
    print(tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
