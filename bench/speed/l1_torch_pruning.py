"""L1 pruning to half, discovery included: our time and peak memory over those of Torch-Pruning's
own pruner, in pairs of one run.

``python bench/speed/l1_torch_pruning.py [--write results/l1-torch-pruning]`` prints the pairs. Each
measurement is made in a process of its own on one thread; ours takes its grades from the cache, as
any second call does.
"""

import contextlib
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
from tabulate import tabulate

import widthbench
from widthbench.report import speed
from widthbench.width.inputs import Example, Inputs
from widthbench.width.layers import kind_of

PAIRS = 5
SMALL = {
    "resnet50": "test_resnet",
    "vit_tiny_patch16_224": "test_vit",
}  # ours, and one alike that costs little
NETWORKS = tuple(SMALL)
FRUGAL = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}  # glibc hands freed tensors back at once
MIB = 2**20
PAGE = f"""# L1 pruning to half, ours over Torch-Pruning's

Whole calls: Torch-Pruning builds its graph, scores, and prunes in place (the copy that it works on
is not on its clock); `widthbench.apply("l1-norm", ..., scope="all")` discovers, looks its
certificate up, decides, returns a resized copy, and checks that it runs. Medians of {PAIRS} pairs,
who goes first alternating, each in a process of its own on one thread. Time is a second call's;
peak memory is the high-water mark of a process in its first call, above what it held before
(network, libraries). "Ours, certifying" is the first call ever on an architecture, before its
certificate is in the cache.

{{table}}

Written by `python bench/speed/l1_torch_pruning.py --write results/l1-torch-pruning`. {{where}}
"""


def pruner_alone(model: torch.nn.Module, example: Example, fraction: float = 0.5) -> Any:
    """Torch-Pruning's own pruner by L1 norm, as its documentation has it: to compare with, no
    technique of ours. ``step()`` prunes the network in place.

    Args:
        model: The network. The classifier that it names stays, or its last layer if it names none;
            modules with ``qkv`` and ``num_heads`` count as attention.
        example: What it takes.
        fraction: Of each of its groups, what goes.
    """
    head: Any = getattr(model, "get_classifier", lambda: None)()
    if head is None:
        head = [m for m in model.modules() if kind_of(m)][-1]
    heads = {
        m.qkv: m.num_heads
        for m in model.modules()
        if hasattr(m, "num_heads") and isinstance(getattr(m, "qkv", None), torch.nn.Linear)
    }
    options: dict[str, Any] = {"num_heads": heads, "prune_head_dims": True} if heads else {}
    ignored = [
        m for m in (head.modules() if isinstance(head, torch.nn.Module) else ()) if kind_of(m)
    ]
    importance = tp.importance.MagnitudeImportance(p=1)
    inputs = Inputs.of(example)
    return tp.pruner.MagnitudePruner(
        model,
        dict(inputs.kwargs) if inputs.kwargs else inputs.args,
        importance,
        pruning_ratio=fraction,
        ignored_layers=ignored,
        **options,
    )


def ours(model: torch.nn.Module, x: torch.Tensor) -> None:
    widthbench.apply("l1-norm", model, budget="channels:0.5", example_input=x, scope="all")


def theirs(model: torch.nn.Module, x: torch.Tensor) -> None:
    pruner_alone(model, x).step()


def _status(field: str) -> float:
    """A line of this process's memory, in MiB; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / MIB


def measure(name: str, which: str, what: str) -> float:
    """Seconds of a second call, or MiB above what the process held before a first one, in the
    process at hand.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    call = theirs if which == "theirs" else ours
    if what == "seconds":
        call(copy.deepcopy(model), x)
    # code is loaded by a small network: what a first call on this one leaves behind would hide what
    # a second needs
    else:
        call(timm.create_model(SMALL[name]).eval(), torch.randn(1, 3, 160, 160))
    empty = tempfile.TemporaryDirectory()
    if which == "certifying":
        os.environ["WIDTHBENCH_CACHE"] = empty.name
    gc.collect()
    before = _status("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    begin = time.perf_counter()
    call(model, x)
    return time.perf_counter() - begin if what == "seconds" else _status("VmHWM") - before


def apart(name: str, which: str, what: str) -> float:
    """``measure`` in a fresh process, for memory one that hands each freed tensor back to the
    system at once.
    """
    words = [sys.executable, __file__, "--one", name, which, what]
    environment = os.environ | ({} if what == "seconds" else FRUGAL) | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{which} on {name} ended with exit code {done.returncode}:"
            f" {done.stderr.strip()[-300:]}"
        )
    return float(done.stdout.split()[-1])


def pairs(name: str) -> list[dict[str, dict[str, float]]]:
    """``{"ours": ..., "theirs": ..., "certifying": ours with no certificate in the cache}`` per
    pair.
    """
    apart(name, "ours", "seconds")  # certifies once
    found = []
    for i in range(PAIRS):
        order = ("theirs", "ours", "certifying") if i % 2 else ("ours", "theirs", "certifying")
        found.append(
            {
                which: {what: apart(name, which, what) for what in ("seconds", "mib")}
                for which in order
            }
        )
    return found


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
            ratios = sorted(p["ours"][what] / p["theirs"][what] for p in some)
            lines.append(
                {
                    "network": name,
                    "what": {"seconds": "time", "mib": "peak memory"}[what],
                    "ours": f"{statistics.median(p['ours'][what] for p in some):.3g} {unit}",
                    "Torch-Pruning": (
                        f"{statistics.median(p['theirs'][what] for p in some):.3g} {unit}"
                    ),
                    "ratio": f"{statistics.median(ratios):.2f}",
                    "of pairs": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                    "ours, certifying": (
                        f"{statistics.median(p['certifying'][what] for p in some):.3g} {unit}"
                    ),
                }
            )
    return tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(measure(*sys.argv[2:]))
        sys.exit()
    speed.main(__doc__, PAGE, rows, table)
