"""Seconds of an epoch of 45,000 images of 32 px on a GPU: plain and graphed steps, float32 and
bfloat16, batches, layouts.

    python bench/gpu/speed.py [--models MODEL ...] [--write FILE.jsonl]

The time of an epoch is the difference between trainings of two epochs and of one, so that set-up,
warm-up and recording do not count. Pictures are random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from unittest import mock

import torch
from tabulate import tabulate

from widthbench.data.splits import ImageSamples
from widthbench.networks import models
from widthbench.recipe import Recipe
from widthbench.training import graphed, loop, state

MODELS = ("vgg16_cifar", "mobilenetv1_100_cifar", "resnet20_cifar")
IMAGES = 45_000


def epoch_s(
    name: str, recipe: Recipe, train: ImageSamples, layout: torch.memory_format, graph: bool
) -> float:
    def seconds(epochs: int) -> float:
        model = models.create(name, classes=10, channels=3, size=32).to(train.device)
        begin = time.perf_counter()
        loop.fit(model, train, recipe.model_copy(update={"epochs": epochs}), macs=1)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    with (
        mock.patch.object(state, "fastest_layout", return_value=layout),
        mock.patch.object(graphed, "RECORDABLE", ("cuda",) if graph else ()),
    ):
        seconds(1)
        return seconds(2) - seconds(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda")
    pixels = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8, device=device)
    train = ImageSamples(
        pixels,
        torch.zeros(IMAGES, dtype=torch.long, device=device),
        (0.5,) * 3,
        (0.25,) * 3,
        device,
    )
    layouts = {"channels last": torch.channels_last, "usual": torch.contiguous_format}
    wanted = [
        (name, batch, amp, layout, graph)
        for name, batch, amp, layout in itertools.product(
            options.models, (128, 512), (False, True), layouts
        )
        for graph in (
            (True, False)
            if layout == "channels last" and not (batch == 512 and not amp)
            else (True,)
        )
        if amp or (batch == 128 and layout == "channels last")
    ]
    rows = []
    for name, batch, amp, layout, graph in wanted:
        recipe = Recipe(epochs=1, batch_size=batch, lr=1e-4, crop=4, flip=True, amp=amp)
        row = {
            "network": name,
            "batch": batch,
            "precision": "bfloat16" if amp else "float32",
            "layout": layout,
            "steps": "graph" if graph else "plain",
            "s an epoch": round(epoch_s(name, recipe, train, layouts[layout], graph), 3),
        }
        print(json.dumps(row), flush=True)
        rows.append(row | {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__})
        if options.write:
            options.write.write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(tabulate([{k: r[k] for k in list(r)[:6]} for r in rows], headers="keys"))


if __name__ == "__main__":
    main()
