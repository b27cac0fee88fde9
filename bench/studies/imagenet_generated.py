"""Run the suite `imagenet` end to end on generated images of five classes, with generated weights
in the place of timm's.

    python bench/studies/imagenet_generated.py DEST [--images 20] [--layout folders | tars]
        [--brief] [--jobs 2]

Writes DEST/data/imagenet (train and val, one folder per class, JPEG; or archives as ImageNet is
published: a tar with one for each class, and a flat tar with LOC_val_solution.csv), DEST/weights
(untrained networks under the names that timm's weights would have), and DEST/results. It shows that
the suite works as it stands, from loading to leaderboard; the accuracies mean nothing.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

CLASSES = ("n01440764", "n02102040", "n02979186", "n03000684", "n03888257")


BRIEF = (
    (r"^budgets = .*macs:0\.5\".*$", 'budgets = ["macs:0.5"]'),
    (r"\bepochs = (30|5)\b", "epochs = 1"),
    (r"steps = 100", "steps = 5"),
    (r"rounds = 5", "rounds = 2"),
)


def pack(root: Path) -> None:
    """Turn the folders into the archives that ImageNet is published as, and remove them."""
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted((root / "train").iterdir()):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for file in sorted(folder.iterdir()):
                    tar.add(file, file.name)
            entry = tarfile.TarInfo(f"{folder.name}.tar")
            entry.size = inner.tell()
            inner.seek(0)
            outer.addfile(entry, inner)
    rows = ["ImageId,PredictionString"]
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as flat:
        for number, file in enumerate(sorted((root / "val").glob("*/*")), 1):
            name = f"ILSVRC2012_val_{number:08d}"
            flat.add(file, f"{name}.JPEG")
            rows.append(f"{name},{file.parent.name} 0 0 1 1")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "val")


def draw(label: int, generator: np.random.Generator) -> Image.Image:
    """A noisy picture whose colour and stripes depend on its class; sizes and shapes vary, as
    ImageNet's do.
    """
    height, width = generator.integers(200, 320, 2)
    rows, columns = np.mgrid[0:height, 0:width]
    stripes = 127 + 90 * np.sin((rows * np.cos(label) + columns * np.sin(label)) / (6 + 3 * label))
    colour = np.roll(np.array([1.0, 0.6, 0.3]), label)
    pixels = stripes[..., None] * colour + generator.normal(0, 25, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("dest", type=Path)
    parser.add_argument(
        "--images",
        type=int,
        default=20,
        help="training images per class; a quarter as many for validation",
    )
    parser.add_argument("--layout", choices=["folders", "tars"], default="folders")
    parser.add_argument(
        "--brief",
        action="store_true",
        help="half the MACs only, and one epoch where the suite has more",
    )
    parser.add_argument("--jobs", default="2")
    parser.add_argument(
        "--only", nargs="+", default=[], help="only cells whose name holds one of these"
    )
    args = parser.parse_args()
    from widthbench.experiment import suites
    from widthbench.networks import models

    generator = np.random.default_rng(0)
    for part, count in (("train", args.images), ("val", max(2, args.images // 4))):
        for label, name in enumerate(CLASSES):
            folder = args.dest / "data" / "imagenet" / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                draw(label, generator).save(folder / f"{name}_{index}.JPEG")
    if args.layout == "tars":
        pack(args.dest / "data" / "imagenet")
    weights = args.dest / "weights"
    weights.mkdir(exist_ok=True)
    suite = "imagenet"
    if args.brief:
        suite = str(args.dest / "imagenet.toml")
        text = (Path(__file__).parent / "suites" / "imagenet.toml").read_text()
        for pattern, new in BRIEF:
            text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
            assert count, pattern
        Path(suite).write_text(text)
    for network in suites.load(suite).models:
        model = models.create(
            network.name, classes=len(CLASSES), channels=3, size=network.size, **network.args
        )
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()},
            weights / f"{network.name}.safetensors",
        )
    environment = {
        **os.environ,
        "WIDTHBENCH_DATA": str(args.dest / "data"),
        "WIDTHBENCH_WEIGHTS": str(weights),
    }
    command = [
        "widthbench",
        "run",
        suite,
        "--jobs",
        args.jobs,
        "--results",
        str(args.dest / "results"),
    ]
    command += ["--only", *args.only] if args.only else []
    return subprocess.run([sys.executable, "-m", *command], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
