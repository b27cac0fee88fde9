"""Run the suite `imagenet` end to end on generated images of five classes, with generated weights in the place of timm's.

    python bench/imagenet_generated.py DEST [--images 20] [--jobs 2]

Writes DEST/data/imagenet (train and val, one folder per class, JPEG), DEST/weights (untrained networks under the names that timm's
weights would have), and DEST/results. It shows that the suite works as it stands, from loading to leaderboard; the accuracies mean
nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

CLASSES = ("n01440764", "n02102040", "n02979186", "n03000684", "n03888257")


def draw(label: int, generator: np.random.Generator) -> Image.Image:
    """A noisy picture whose colour and stripes hang on its class; sizes and shapes vary, as ImageNet's do."""
    height, width = generator.integers(200, 320, 2)
    rows, columns = np.mgrid[0:height, 0:width]
    stripes = 127 + 90 * np.sin((rows * np.cos(label) + columns * np.sin(label)) / (6 + 3 * label))
    colour = np.roll(np.array([1.0, 0.6, 0.3]), label)
    pixels = stripes[..., None] * colour + generator.normal(0, 25, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dest", type=Path)
    parser.add_argument("--images", type=int, default=20, help="training images per class; a quarter as many for validation")
    parser.add_argument("--jobs", default="2")
    parser.add_argument("--only", nargs="+", default=[], help="only cells whose name holds one of these")
    args = parser.parse_args()
    from widthbench import models, suites

    generator = np.random.default_rng(0)
    for part, count in (("train", args.images), ("val", max(2, args.images // 4))):
        for label, name in enumerate(CLASSES):
            folder = args.dest / "data" / "imagenet" / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                draw(label, generator).save(folder / f"{name}_{index}.JPEG")
    weights = args.dest / "weights"
    weights.mkdir(exist_ok=True)
    for network in suites.load("imagenet").models:
        model = models.create(network.name, classes=len(CLASSES), channels=3, size=network.size, **network.args)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights / f"{network.name}.safetensors")
    environment = {**os.environ, "WIDTHBENCH_DATA": str(args.dest / "data"), "WIDTHBENCH_WEIGHTS": str(weights)}
    command = ["widthbench", "run", "imagenet", "--jobs", args.jobs, "--results", str(args.dest / "results")]
    command += ["--only", *args.only] if args.only else []
    return subprocess.run([sys.executable, "-m", *command], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
