"""Kill a training run at random moments until it has finished, and compare its weights with those
of a run left alone.

    python bench/studies/kills.py [--kills 20] [--seed 0] > results/kills.md

The trained network is timm's test_resnet on digits, with BatchNorm, dropout, crops, flips and
cutout, so that optimizer, schedule, order, running statistics and both random states have to go on
where they were. Every kill is a SIGKILL at a moment drawn uniformly between the start of the
process and the time that a whole run takes; the process is started anew after each, as a user
would.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

SUITE = """
name = "kills"
datasets = ["digits"]
seeds = [0]
controls = ["base"]
[base]
epochs = 16
batch_size = 32
lr = 0.02
warmup_epochs = 1
crop = 2
flip = true
cutout = 4
[finetune]
epochs = 0
lr = 0.01
[[models]]
name = "test_resnet"
size = 16
args = { drop_rate = 0.2 }
"""

TRAIN = """
import sys
from widthbench.experiment import bases, protocol, suites
from widthbench.training import resume
resume.STATE_EVERY_S = 0  # keep the state after every epoch
cell = suites.load(sys.argv[1]).cells()[0]
def progress(steps, /, *, desc):
    print("from epoch", steps.start, flush=True)
    return steps
with protocol.pinned(cell):
    print("digest", protocol.obtain_base(cell, progress=progress).digest, flush=True)
"""


def start(suite: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "WIDTHBENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(suite)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "kills.toml"
        suite.write_text(SUITE)
        begin = time.perf_counter()
        alone = start(suite, Path(folder) / "alone")
        said = alone.communicate()[0].split()
        whole, expected = time.perf_counter() - begin, said[said.index("digest") + 1]
        rows, ended = [], 0
        kills = 0
        while kills < args.kills:
            cache = Path(folder) / f"killed{ended}"
            process = start(suite, cache)
            wait = draw.uniform(0, 1) * whole
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
            said = (process.communicate()[0] or "").split()
            first = said[said.index("epoch") + 1] if "epoch" in said else "-"
            found = said[said.index("digest") + 1] if "digest" in said else ""
            outcome = (
                "killed"
                if not found
                else "finished, " + ("same weights" if found == expected else "OTHER WEIGHTS")
            )
            rows.append([len(rows) + 1, first, f"{wait:.1f}", outcome])
            ended += bool(found)
            print(rows[-1], file=sys.stderr)
        process = start(suite, Path(folder) / f"killed{ended}")  # the last run is left to end
        said = process.communicate()[0].split()
        found = said[said.index("digest") + 1]
        rows.append(
            [
                len(rows) + 1,
                said[said.index("epoch") + 1],
                "",
                "finished, " + ("same weights" if found == expected else "OTHER WEIGHTS"),
            ]
        )
        files = list(Path(folder).glob("killed*/bases/*.safetensors"))
        digests = {hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    from widthbench.provenance import commit, hardware, versions

    state = commit()
    dirty = " with uncommitted changes" if state["dirty"] else ""
    print("# Killed training runs end with the same weights\n")
    print(
        f"`python {' '.join(sys.argv)}` at {str(state['commit'])[:12]}{dirty}; {hardware()['cpu']},"
        f" torch {versions()['torch']}.\n"
    )
    print(
        f"{kills} kills (SIGKILL at a random moment), {len(files)} runs ended, {len(digests)}"
        " distinct weights file(s):"
    )
    same = "the same" if digests == {expected} else "NOT THE SAME"
    print(f"{same} as of a run left alone ({whole:.0f} s, digest {expected[:12]}).\n")
    print(
        tabulate(
            rows,
            headers=["start", "from epoch", "killed after, s", "outcome"],
            tablefmt="pipe",
            disable_numparse=True,
        )
    )
    sys.exit(digests != {expected})


if __name__ == "__main__":
    main()
