"""What a resized network gains in time: latency, peak memory and speed-up, achieved against
theoretical, by budget of MACs.

    python bench/studies/latency.py [--device cuda] [--write results/latency-cpu]

Networks are halved and halved again by L1 norm in their certified inner groups, and run in their
fastest memory layout without gradients, on a GPU as replays of a CUDA graph, in float32 without
TF32. Every budget of a network is timed in turn, in several rounds, so that a slow minute strikes
all alike. Prints a table; ``--write FILE`` keeps FILE.md, FILE.jsonl and FILE.png.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from speed.measuring import MODELS, milliseconds
from tabulate import tabulate

import widthbench
from widthbench.networks import models
from widthbench.paths import write_atomic
from widthbench.report.speed import where
from widthbench.report.style import COLOURS, KNOWN
from widthbench.training.measuring import fastest_layout, peak_memory_mib, replayed
from widthbench.width.cost import count_macs

NETWORKS = (
    "resnet20_cifar",
    "vgg16_cifar",
    "mobilenetv2_100_cifar",
    "vit_tiny_patch16_224",
    "resnet50",
)
BUDGETS = (1.0, 0.5, 0.25, 0.125)
BATCHES = {"cpu": (1, 16), "cuda": (1, 1024)}
ROUNDS = 7


def measure(name: str, device: str, batch: int, least: float) -> list[dict[str, Any]]:
    """A row for each budget of a network."""
    size, channels, classes = MODELS[name]
    torch.manual_seed(0)
    whole = models.create(name, classes=classes, channels=channels, size=size).to(device).eval()
    one = torch.randn(1, channels, size, size, device=device)
    rows, calls = [], []
    for budget in BUDGETS:
        model = (
            whole
            if budget == 1
            else widthbench.apply("l1-norm", whole, budget=f"macs:{budget}", example_input=one)
        )
        layout = fastest_layout(model)
        model.to(memory_format=layout)
        x = torch.randn(batch, channels, size, size, device=device).contiguous(memory_format=layout)
        row = {
            "model": name,
            "device": device,
            "batch": batch,
            "budget": budget,
            "macs": count_macs(model, one),
        }
        rows.append(
            row
            | {
                "params": sum(p.numel() for p in model.parameters()),
                "peak_mib": peak_memory_mib(model, x),
            }
        )
        calls.append(_call(model, x))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for found, call in zip(times, calls, strict=True):
            found += milliseconds(call, device, 1, least)
    for row, found in zip(rows, times, strict=True):
        row |= {"ms": statistics.median(found), "least_ms": min(found), "most_ms": max(found)}
        row["theory"] = rows[0]["macs"] / row["macs"]
        row["achieved"] = statistics.median(a / b for a, b in zip(times[0], found, strict=True))
    return rows


def _call(model: torch.nn.Module, x: torch.Tensor) -> Any:
    def forward() -> None:
        with torch.no_grad():
            model(x)

    return replayed(forward) if x.is_cuda else forward


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        {
            "network": r["model"],
            "batch": r["batch"],
            "MACs of one image": f"{r['macs'] / 1e6:.4g} M",
            "latency, ms": f"{r['ms']:.3g}",
            "range": f"{r['least_ms']:.3g} to {r['most_ms']:.3g}",
            "peak memory, MiB": f"{r['peak_mib']:.3g}",
            "speed-up, theory": f"{r['theory']:.2f}x",
            "achieved": f"{r['achieved']:.2f}x",
            "of theory": f"{100 * r['achieved'] / r['theory']:.0f} %",
        }
        for r in rows
    ]
    return tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)


def draw(rows: list[dict[str, Any]], on: str) -> bytes:
    """Latency against MACs, a panel for each batch size; the grey lines are latency proportional to
    MACs.
    """
    batches = sorted({r["batch"] for r in rows})
    figure = Figure(figsize=(5.4 * len(batches), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, batch in zip(
        figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True
    ):
        for i, name in enumerate(dict.fromkeys(r["model"] for r in rows)):
            some = [r for r in rows if r["model"] == name and r["batch"] == batch]
            xs, ys = [r["macs"] * batch for r in some], [r["ms"] for r in some]
            spread = [
                [y - r["least_ms"] for y, r in zip(ys, some, strict=True)],
                [r["most_ms"] - r["ms"] for r in some],
            ]
            place.plot(
                [xs[0], xs[-1]],
                [ys[0], ys[0] * xs[-1] / xs[0]],
                color="#BBBBBB",
                linewidth=1,
                zorder=0,
            )
            place.errorbar(
                xs,
                ys,
                yerr=spread,
                color=COLOURS[i],
                marker=[*KNOWN.values()][i][1],
                markersize=5.5,
                capsize=3,
                label=name,
            )
        place.set_xscale("log")
        place.set_yscale("log")
        place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.yaxis.set_minor_formatter(NullFormatter())
        place.set_xlabel("FLOPs (as MACs) of the batch")
        place.set_ylabel("latency of the batch, ms")
        place.set_title(f"batch of {batch}", fontsize=11)
        place.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        f"Latency against MACs on {on}: median and range (grey: as fast as MACs fall)",
        fontsize=12,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=NETWORKS,
        metavar="MODEL",
        help=f"of {', '.join(MODELS)}",
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="keep FILE.md, FILE.jsonl and FILE.png"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; use --device cpu")
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for name in options.models:
        for batch in BATCHES[options.device]:
            rows += measure(name, options.device, batch, 0.2)
            print(table(rows[-len(BUDGETS) :]), flush=True)
        if options.write:  # what is measured stays, if the rest is cut off
            write(rows, options)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    gpu = torch.cuda.get_device_name(0) if options.device == "cuda" else "a CPU, one thread"
    text = f"""# Latency of resized networks

On {gpu}; float32, medians of {ROUNDS} rounds in which the budgets of a network take turns. Theory
is the ratio of MACs; achieved is the ratio of latencies, median over rounds. Peak memory counts
weights, input and what lives between operations.

![Latency against MACs]({options.write.with_suffix(".png").name})

{table(rows)}

Written by `python bench/studies/latency.py --device {options.device} --write {options.write}`.
{where()} """
    write_atomic(options.write.with_suffix(".png"), draw(rows, gpu))
    write_atomic(options.write.with_suffix(".jsonl"), "".join(json.dumps(r) + "\n" for r in rows))
    write_atomic(options.write.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
