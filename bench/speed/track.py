"""Run asv's benchmarks on what is installed here, and keep the numbers under the checked-out
commit.

    python bench/speed/track.py [--quick] [--bench REGEX]  measure; results/asv/MACHINE/*.json
    python bench/speed/track.py --publish                   write all kept numbers' pages: .asv/html

The machine's name says what its numbers depend on: GPU (or processor), CUDA, torch and timm.
Everything that asv itself can do works too: ``asv compare``, ``asv show``, ``asv preview``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def machine() -> str:
    """Such as ``NVIDIA-H200-cuda13.0-torch2.14.1-timm1.0.31``, or the processor's name where there
    is no GPU.
    """
    import timm
    import torch

    from widthbench.provenance import hardware

    if torch.cuda.is_available():
        chip = f"{torch.cuda.get_device_name(0)}-cuda{torch.version.cuda}"
    else:
        chip = f"{hardware().get('cpu')}-{os.cpu_count()}cores"
    versions = [f"{m.__name__}{m.__version__.partition('+')[0]}" for m in (torch, timm)]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([chip, *versions]))


def asv(*words: str) -> int:
    """One of asv's commands in this repository."""
    print("+ asv", *words, flush=True)
    return subprocess.run([sys.executable, "-m", "asv", *words], cwd=ROOT, check=False).returncode


def anonymous(folder: Path) -> None:
    """Results under the version of Python in place of its path, which says nothing and differs from
    one environment to the next.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for path in folder.glob("*-existing-py_*.json"):
        found = json.loads(path.read_text())
        found |= {"env_name": f"existing-py{version}", "python": version}
        found["params"]["python"] = version
        path.with_name(f"{found['commit_hash'][:8]}-{found['env_name']}.json").write_text(
            json.dumps(found) + "\n"
        )
        path.unlink()


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def described(name: str) -> None:
    """What asv knows of the machine, in its own file in the user's home folder, which it wants
    before it runs.
    """
    path = Path.home() / ".asv-machine.json"
    known = json.loads(path.read_text()) if path.is_file() else {"version": 1}
    if name not in known:
        import platform

        from widthbench.provenance import hardware

        known[name] = {
            "machine": name,
            "os": platform.platform(terse=True),
            "arch": platform.machine(),
            "cpu": str(hardware().get("cpu")),
            "num_cpu": str(os.cpu_count()),
            "ram": "",
        }
        path.write_text(json.dumps(known, indent=4) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="each benchmark once, on one network, nothing kept: do they run?",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="which rows are measured (cpu)"
    )
    parser.add_argument("--bench", metavar="REGEX", action="append", default=[], help="only these")
    parser.add_argument(
        "--publish", action="store_true", help="write the pages of all numbers that are kept"
    )
    options = parser.parse_args()
    if options.publish:
        sys.exit(
            asv("publish") or print(f"open {ROOT / '.asv/html/index.html'}, or run `asv preview`")
        )
    if not options.quick and git("status", "--porcelain", "--", ".", ":!results"):
        sys.exit(
            "there are uncommitted changes: numbers are kept under a commit; commit them, or use"
            " --quick"
        )
    import widthbench

    if not Path(widthbench.__file__).resolve().is_relative_to(ROOT):
        sys.exit(
            f"what would be measured is {widthbench.__file__}, not this checkout: `pip install -e"
            " .` here first"
        )
    os.environ["WIDTHBENCH_ASV_DEVICE"] = options.device
    name = machine()
    described(name)
    kept = (
        ROOT / "results/asv/benchmarks.json"
    )  # asv's list of all benchmarks, which a quick run must leave as it is
    before = kept.read_bytes() if kept.is_file() else None
    if options.quick:
        os.environ["WIDTHBENCH_QUICK"] = "1"
    words = [
        "run",
        "--machine",
        name,
        "--environment",
        f"existing:{sys.executable}",
        "--show-stderr",
    ]
    words += [w for b in options.bench for w in ("--bench", b)]
    head = git("rev-parse", "HEAD")
    code = asv(*words, *(["--quick"] if options.quick else ["--set-commit-hash", head]))
    if not options.quick and (
        git("rev-parse", "HEAD") != head or git("status", "--porcelain", "--", ".", ":!results")
    ):
        print(
            "the checkout changed during the run: do not keep the numbers that are now filed under"
            f" {head[:12]}"
        )
        code = 1
    anonymous(kept.parent / name)
    if options.quick and before is not None:
        kept.write_bytes(before)
    sys.exit(code)


if __name__ == "__main__":
    main()
