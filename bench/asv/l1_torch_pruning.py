"""L1 pruning to half, discovery included: our time and peak memory over those of Torch-Pruning's own pruner, in pairs of one run.

``python bench/asv/l1_torch_pruning.py [--write results/l1-torch-pruning]`` prints the pairs; asv tracks the median ratios. Each
measurement is made in a process of its own, one thread; ours takes its grades from the cache, as any second call does.
"""

import copy
import gc
import json
import multiprocessing
import statistics
import time
import warnings
from pathlib import Path

import timm
import torch
import torch_pruning as tp
from tabulate import tabulate

import widthbench
from widthbench.report import speed

PAIRS = 5
NETWORKS = ("resnet50", "vit_tiny_patch16_224")
MIB = 2**20
PAGE = """# L1 pruning to half, ours over Torch-Pruning's

Whole calls: Torch-Pruning builds its graph, scores, and prunes in place (the copy that it works on is not on its clock);
`widthbench.apply("l1-norm", ..., scope="all")` discovers, looks its certificate up, decides, returns a resized copy, and checks
that it runs. Medians of {pairs} pairs, who goes first alternating, each in a process of its own on one thread. Peak memory is the
process's high-water mark above what it held before the call.

{{table}}

Written by `python bench/asv/l1_torch_pruning.py --write results/l1-torch-pruning`. {{where}}
""".format(pairs=PAIRS)


def ours(model: torch.nn.Module, x: torch.Tensor) -> None:
    widthbench.apply("l1-norm", model, budget="channels:0.5", example_input=x, scope="all")


def theirs(model: torch.nn.Module, x: torch.Tensor) -> None:
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")}
    importance = tp.importance.MagnitudeImportance(p=1)
    options = {"num_heads": heads, "prune_head_dims": True} if heads else {}
    head = model.get_classifier()
    tp.pruner.MagnitudePruner(model, (x,), importance, pruning_ratio=0.5, ignored_layers=[head], **options).step()


def _status(field: str) -> float:
    """A line of this process's memory, in MiB; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / MIB


def measure(name: str, which: str) -> dict[str, float]:
    """Seconds and MiB of one call, in the process at hand."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    work = copy.deepcopy(model) if which == "theirs" else model
    call = ours if which == "ours" else theirs
    call(copy.deepcopy(work), x)  # loads code; ours finds its certificate from here on
    gc.collect()
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    except OSError:
        pass
    begin = time.perf_counter()
    call(work, x)
    return {"seconds": time.perf_counter() - begin, "mib": max(0.0, _status("VmHWM") - before)}


def _send(name: str, which: str, into: object) -> None:
    into.send(measure(name, which))  # type: ignore[attr-defined]


def apart(name: str, which: str) -> dict[str, float]:
    """``measure`` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(name, which, sender))
    process.start()
    found: dict[str, float] = receiver.recv()
    process.join()
    return found


def pairs(name: str) -> list[dict[str, dict[str, float]]]:
    """``{"ours": ..., "theirs": ...}`` per pair."""
    apart(name, "ours")  # certifies once
    found = []
    for i in range(PAIRS):
        order = ("theirs", "ours") if i % 2 else ("ours", "theirs")
        found.append({which: apart(name, which) for which in order})
    return found


def ratio(found: list[dict[str, dict[str, float]]], what: str) -> float:
    return statistics.median(p["ours"][what] / max(p["theirs"][what], 1e-9) for p in found)


class TrackL1:
    """Ours over Torch-Pruning's; lower is better."""

    params = NETWORKS
    param_names = ("model",)
    timeout = 900
    unit = "ours / Torch-Pruning"

    def setup_cache(self) -> dict[str, list[dict[str, dict[str, float]]]]:
        return {name: pairs(name) for name in NETWORKS}

    setup_cache.timeout = 900

    def track_seconds(self, found: dict[str, list[dict[str, dict[str, float]]]], model: str) -> float:
        return ratio(found[model], "seconds")

    def track_peak_memory(self, found: dict[str, list[dict[str, dict[str, float]]]], model: str) -> float:
        return ratio(found[model], "mib")


def rows() -> list[dict[str, object]]:
    found = []
    for name in NETWORKS:
        for pair in pairs(name):
            found.append({"model": name, **pair})
            print(json.dumps(found[-1]), flush=True)
    return found


def table(found: list[dict[str, object]]) -> str:
    lines = []
    for name in NETWORKS:
        some: list = [r for r in found if r["model"] == name]
        for what, unit in (("seconds", "s"), ("mib", "MiB")):
            ratios = sorted(p["ours"][what] / max(p["theirs"][what], 1e-9) for p in some)
            lines.append(
                {
                    "network": name,
                    "what": {"seconds": "time", "mib": "peak memory"}[what],
                    "ours": f"{statistics.median(p['ours'][what] for p in some):.3g} {unit}",
                    "Torch-Pruning": f"{statistics.median(p['theirs'][what] for p in some):.3g} {unit}",
                    "ratio": f"{statistics.median(ratios):.2f}",
                    "of pairs": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                }
            )
    return tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    speed.main(__doc__, PAGE, rows, table)
