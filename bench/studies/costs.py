"""Predicted against counted: MACs and parameters of resized networks, over timm's families and
torchvision's networks.

    python bench/studies/costs.py [--only NAME ...] [--limit SECONDS] [--results results]

Each network is certified, then resized four times: half of every certified group, one channel (per
block) of each, and two draws of random widths. What ``CostModel`` predicts from the widths is held
against what torch counts on the resized network.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import families
import timm
import torch
import torchvision

from widthbench.errors import CostError
from widthbench.paths import write_atomic
from widthbench.report.speed import where
from widthbench.width import find_groups, keep, resize
from widthbench.width.cost import CostModel

TORCHVISION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_16",
)
SIZES = {"inception_v3": 299}  # px, where it is not 224


def built(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    if not name.startswith("torchvision:"):
        return families.built(name)
    name = name.partition(":")[2]
    options: dict[str, Any] = (
        {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    )
    px = SIZES.get(name, 224)
    return torchvision.models.get_model(name, **options).eval(), torch.randn(
        1, 3, px, px, generator=torch.Generator().manual_seed(0)
    )


def widths_of(groups: Any, how: str, seed: int = 0) -> dict[str, int]:
    """Widths of all certified groups: "half", "least" or "random"."""
    draw = random.Random(seed)
    found = {}
    for name, group in groups.items():
        size = group.channels // group.blocks
        new = {"half": max(1, size // 2), "least": 1, "random": draw.randint(1, size)}[how]
        found[name] = new * group.blocks
    return found


def compared(name: str) -> dict[str, Any]:
    """One network: how many resizes cost what was predicted, and what differs in the others."""
    begin = time.perf_counter()
    model, x = built(name)
    groups = find_groups(model, x)
    cost = CostModel(model, groups, x)
    certified = {n: g for n, g in groups.items() if g.grade in ("exact", "coupled")}
    row: dict[str, Any] = {
        "groups": len(certified),
        "MACs": cost.macs,
        "resizes": 0,
        "differences": [],
    }
    for how, seed in (("half", 0), ("least", 0), ("random", 0), ("random", 1)) if certified else ():
        widths = widths_of(certified, how, seed)
        plan = {}
        for n, width in widths.items():
            size, new = groups[n].channels // groups[n].blocks, width // groups[n].blocks
            plan[n] = keep([b * size + i for b in range(groups[n].blocks) for i in range(new)])
        row["resizes"] += 1
        try:
            cost.counted(resize(model, groups, plan), widths)
        except CostError as error:
            row["differences"].append(f"{how}: {error}")
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def page(rows: list[dict[str, Any]]) -> str:
    good = [r for r in rows if "resizes" in r]
    wrong = [r for r in good if r["differences"]]
    failed = [r for r in rows if "resizes" not in r]
    none = [r["model"] for r in good if not r["groups"]]
    ours = sum(r["model"].startswith("torchvision:") for r in good)
    listed = "\n".join(f"- `{r['model']}`: {r['differences'][0]}" for r in wrong) or "- none"
    others = "\n".join(f"- `{r['model']}`: {r['problem']}" for r in failed) or "- none"
    groups, resizes = sum(r["groups"] for r in good), sum(r["resizes"] for r in good)
    differences = sum(len(r["differences"]) for r in good)
    return f"""# Predicted against counted

{len(good)} networks ({len(good) - ours} of timm, one of each family; {ours} of torchvision),
{groups:,} certified groups, {resizes} resizes: half of every group, one channel of each, and two
draws of random widths. MACs and parameters that were predicted from the widths differ from what
torch counts on the resized network in **{differences}** of them. Without a certified group, so that
nothing could be resized: {", ".join(f"`{n}`" for n in none) or "none"}.

Differences:

{listed}

Not compared:

{others}

Written by `python bench/studies/costs.py`; {where()}, timm {timm.__version__}, torchvision
{torchvision.__version__}. """


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="these networks: timm's names, or torchvision:NAME (default: all)",
    )
    parser.add_argument(
        "--limit", type=float, default=1800, metavar="S", help="seconds for one network"
    )
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).resolve().parents[2] / "results"
    )
    args = parser.parse_args()
    every = [
        *(f"torchvision:{n}" for n in TORCHVISION),
        *(name for name, _ in families.members().values()),
    ]
    rows = []
    for name in args.only or every:
        rows.append({"model": name, **families.apart(compared, name, 1, args.limit)})
        print(json.dumps(rows[-1]), flush=True)
    write_atomic(args.results / "costs.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    write_atomic(args.results / "costs.md", page(rows))
    raise SystemExit(any(r.get("differences") for r in rows))


if __name__ == "__main__":
    main()
