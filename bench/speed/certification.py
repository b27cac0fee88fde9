"""The first call on an architecture, nothing cached: ours over Torch-Pruning's whole pruning, in
pairs of one run.

``python bench/speed/certification.py [--write results/certification]`` prints the pairs. Each
measurement is made in a process of its own on one thread: L1 pruning to half, discovery and
certification included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch
import torchvision
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from speed.l1_torch_pruning import _status, ours, theirs
from widthbench.paths import write_atomic
from widthbench.report.speed import where

NETWORKS = {
    "resnet50": 224,
    "vit_tiny_patch16_224": 224,
    "mobilenetv2_100": 224,
    "convnext_tiny": 224,
    "googlenet": 224,  # torchvision's
    "inception_v3": 299,
    "nfnet_l0": 224,
}
PAIRS = 5
PAGE = """# A first call, ours over Torch-Pruning's

`{command}`: L1 pruning to half of a network that was never seen before. Torch-Pruning builds its
graph, scores, and prunes in place; `widthbench.apply("l1-norm", ..., scope="all")` discovers the
groups, certifies them, decides, and returns a resized copy that it has run. Each in a process of
its own on one thread, whose libraries are loaded and which has pruned a small network before.
Medians of {pairs} pairs, who goes first alternating; peak memory above what the process held.

{table}

{where}
"""


def network(name: str) -> torch.nn.Module:
    """timm's, or torchvision's."""
    if name == "googlenet":
        return torchvision.models.googlenet(init_weights=False).eval()
    return timm.create_model(name).eval()


def measure(name: str, which: str) -> tuple[float, float]:
    """Seconds and MiB of a first call, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    call = theirs if which == "theirs" else ours
    with tempfile.TemporaryDirectory() as empty:
        os.environ["WIDTHBENCH_CACHE"] = empty
        call(timm.create_model("test_resnet").eval(), torch.randn(1, 3, 160, 160))
        model, x = network(name), torch.randn(1, 3, NETWORKS[name], NETWORKS[name])
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        begin = time.perf_counter()
        call(model, x)
        return time.perf_counter() - begin, _status("VmHWM") - before


def apart(name: str, which: str) -> tuple[float, float]:
    """``measure`` in a fresh process."""
    words = [sys.executable, __file__, "--one", name, which]
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-500:]}")
    seconds, mib = json.loads(done.stdout.splitlines()[-1])
    return seconds, mib


def compared(name: str, pairs: int) -> list[str]:
    """A row of the table."""
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for i in range(pairs):
        for which in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
            found[which].append(apart(name, which))
    median = {
        w: [statistics.median(column) for column in zip(*rows, strict=True)]
        for w, rows in found.items()
    }
    ratios = [a[0] / b[0] for a, b in zip(found["ours"], found["theirs"], strict=True)]
    return [
        name,
        f"{median['ours'][0]:.2f} s",
        f"{median['theirs'][0]:.2f} s",
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        f"{median['ours'][1]:.0f} MiB",
        f"{median['theirs'][1]:.0f} MiB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    rows = []
    for name in options.networks:
        rows.append(compared(name, options.pairs))
        print(*rows[-1], sep="  ", flush=True)
    headers = ["network", "ours", "Torch-Pruning", "ratio of pairs", "memory, ours", "theirs"]
    table = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    if options.write:
        command = "python bench/speed/certification.py --write results/certification"
        page = PAGE.format(command=command, pairs=options.pairs, table=table, where=where())
        write_atomic(options.write.with_suffix(".md"), page)


if __name__ == "__main__":
    main()
