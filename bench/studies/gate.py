"""Does the gate on speed hold? A planted slowdown must fail it, an unchanged commit must pass, each
time.

    python bench/studies/gate.py [--unchanged 10] [--write results/gate.md]

Works on a clone of this repository's HEAD, with the benchmarks that CI compares
(``.ci/stable-benchmarks``). The plant: neuron removal prepares twice. The exit code is 1 if the
gate did not hold.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from widthbench.paths import write_atomic
from widthbench.report import regress
from widthbench.report.speed import where

ROOT = Path(__file__).resolve().parents[2]
PLANT = (
    "methods/neuron_removal.py",
    "    def prepare(self, task: Task)",
    "    def _once(self, task: Task)",
)
TWICE = '''
    def prepare(self, task: Task) -> dict[str, Tensor]:
        """Everything twice."""
        self._once(task)
        return self._once(task)

'''
SLOWED = "technique neuron-removal"


def git(root: Path, *words: str) -> str:
    identity = ("-c", "user.name=gate", "-c", "user.email=gate@localhost")
    return subprocess.run(
        ["git", *identity, *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def planted(root: Path) -> str:
    """A commit on top of HEAD that is slow in one technique; gives its hash."""
    path, old, new = root / PLANT[0], PLANT[1], PLANT[2]
    text = path.read_text()
    assert text.count(old) == 1, f"{PLANT[0]} has changed: plant the slowdown anew"
    path.write_text(text.replace(old, TWICE.lstrip("\n") + new))
    git(root, "commit", "-qam", "A planted slowdown")
    return git(root, "rev-parse", "HEAD")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--unchanged",
        type=int,
        default=10,
        metavar="N",
        help="how often an unchanged commit is tried (10)",
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="also write the tables to a file"
    )
    options = parser.parse_args()
    only = (ROOT / ".ci" / "stable-benchmarks").read_text().splitlines()
    tell = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        git(ROOT, "clone", "-q", str(ROOT), str(clone))
        base = git(clone, "rev-parse", "HEAD")
        slow = planted(clone)
        begin = time.perf_counter()
        found = regress.compare(base, slow, root=clone, only=only, tell=tell)
        seconds = time.perf_counter() - begin
        slower = [r.what for r in found.rows if r.verdict == "slower"]
        caught = found.exit_code == 1 and len(slower) == 1 and slower[0].startswith(SLOWED)
        codes, rows = [], []
        for i in range(options.unchanged):
            same = regress.compare(base, base, root=clone, only=only, tell=tell)
            codes.append(same.exit_code)
            ratios = {r.what: r.ratio for r in same.rows}
            worst = max(ratios, key=lambda n: ratios[n])
            again = sum(r.pairs > 5 for r in same.rows)
            rows.append(f"| {i + 1} | {same.exit_code} | {ratios[worst]:.2f} ({worst}) | {again} |")
    held = caught and not any(codes)
    verdict = (
        "caught, in that technique alone"
        if caught
        else f"NOT caught as it should be (slower: {slower or 'none'})"
    )
    text = f"""# The gate on speed

A planted slowdown, `{SLOWED}` preparing twice: exit code {found.exit_code}, {verdict};
{seconds:.0f} s with both installations.

{found.markdown()}
An unchanged commit passes {codes.count(0)} times of {len(codes)}:

| run | exit code | largest ratio | looked at twice |
|---|---|---|---|
{chr(10).join(rows)}

Written by `python bench/studies/gate.py --write results/gate.md`. {where()}
"""
    print(text)
    if options.write:
        write_atomic(options.write, text)
    sys.exit(not held)


if __name__ == "__main__":
    main()
