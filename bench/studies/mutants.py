"""Weaker certifiers: each change below takes one check away, and some test has to fail for it.

    python bench/studies/mutants.py [--only N ...] [--write results/mutants.md]

Each is made in a copy of the checkout, and the tests of ``tests/width`` run until the first
failure. A change that no test notices has *survived*; the exit code is 1 if any has.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from widthbench.paths import write_atomic
from widthbench.report.speed import where

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("widthbench", "methods", "baselines", "tests", "bench", "pyproject.toml", "README.md")
PROOFS, GATES, RESIZE, INPUTS = (
    f"widthbench/width/{room}.py" for room in ("proofs", "gates", "resize", "inputs")
)
MUTANTS: tuple[tuple[str, str, str, str], ...] = (
    # what is weaker, file, text, text in its place
    ("errors up to a hundredth pass", PROOFS, "TOLERANCE = 1e-9", "TOLERANCE = 1e-2"),
    (
        "removal is not compared with gates",
        PROOFS,
        'return f"removing channels instead of gating them {problem}" if problem else ""',
        'return ""',
    ),
    (
        "splits are not compared",
        PROOFS,
        'return f"splitting its channels {problem}" if problem else ""',
        'return ""',
    ),
    (
        "gates on weights are not compared",
        PROOFS,
        'return f"gating weights instead of inputs {problem}" if problem else ""',
        'return ""',
    ),
    (
        "training mode is not looked at",
        PROOFS,
        "            small = self.narrow(names)\n"
        "            output, steps = self._in_training(small.net)",
        '            return ""\n            output, steps = self._in_training(small.net)',
    ),
    (
        "groups that nothing depends on pass",
        PROOFS,
        "        if not found:\n            return {}",
        "        return {}",
    ),
    (
        "further widths are not tried",
        PROOFS,
        "            for widths, samples in _rounds(chosen):",
        "            for widths, samples in ():",
    ),
    (
        "all groups keep the same share",
        PROOFS,
        "        widths.append(best)",
        "        widths.append(max(1, size // 2))",
    ),
    (
        "an error is relative to the largest output",
        PROOFS,
        "scale = sizes.clamp_min(float(some.median()) if some.numel() else 1.0)",
        "scale = sizes.max()",
    ),
    ("what is not finite passes", PROOFS, "nan=math.inf", "nan=0.0"),
    (
        "vectors stay as they are",
        PROOFS,
        "            if p.dim() <= 1:",
        "            if p.dim() < 0:",
    ),
    (
        "statistics of norms stay as they are",
        PROOFS,
        '            if name.endswith("running_mean"):\n                b.copy_(normal(b, 0.1))\n'
        '            elif name.endswith("running_var"):\n                b.copy_(uniform(b))',
        "            pass",
    ),
    (
        "constant weights stay constant",
        PROOFS,
        "elif redraw or (p.numel() > 1 and bool((p == p.flatten()[0]).all())):",
        "elif redraw:",
    ),
    (
        "norms across channels are replaced everywhere",
        PROOFS,
        '        named["coupled" if groups[n].normalised else "exact"].append(n)',
        '        named["exact"].append(n)\n        _affines(net, groups, [n]).__enter__()',
    ),
    (
        "smaller images are taken unseen",
        PROOFS,
        "        if _alike(groups.steps, seen.steps) and (",
        "        if True or (",
    ),
    (
        "split channels stay in order",
        PROOFS,
        "        rows.append(both[torch.randperm(len(both), generator=generator)])",
        "        rows.append(both)",
    ),
    (
        "groups that pass alone pass together",
        PROOFS,
        "        if not passed or (len(passed) < len(names) and not asked(passed)):",
        "        if True:",
    ),
    (
        "what is left is not asked again without those that failed",
        PROOFS,
        "        while left and len(failed) != before:",
        "        while left and before < 0:",
    ),
    (
        "a failure that is asked again passes",
        PROOFS,
        "            if not (why := stage(some)):\n                self.passed.add(key)",
        "            why = stage(some)\n            self.passed.add(key)",
    ),
    ("weights are drawn once", PROOFS, "ATTEMPTS = 4", "ATTEMPTS = 1"),
    (
        "outputs of other shapes pass",
        PROOFS,
        '        return "changes the output\'s shape"',
        '        return ""',
    ),
    (
        "declared widths may differ from real ones",
        PROOFS,
        "    if bad := disagreements(new):",
        "    if bad := []:",
    ),
    (
        "one sample in place of two",
        INPUTS,
        "        inputs = one.batch(lambda t: t.expand(2, *t.shape[1:]))",
        "        inputs = one",
    ),
    (
        "inputs are all zeros",
        INPUTS,
        "return torch.randn(t.shape, generator=generator, dtype=torch.float64)",
        "return torch.zeros(t.shape, dtype=torch.float64)",
    ),
    (
        "gates on inputs stay open",
        GATES,
        "        return (x * gate, *args[1:])",
        "        return args",
    ),
    (
        "gates on weights stay open",
        GATES,
        "        gated = weight * gate.reshape(*gate.shape, *[1] * (weight.dim() - 2))",
        "        gated = weight",
    ),
    (
        "consumers forget the mix",
        RESIZE,
        "                part = _mixed(part, change.mix.to(weight))",
        "                part = part.index_select(1, change.rows.to(weight.device))",
    ),
    (
        "without their statistics norms divide by what each network has",
        PROOFS,
        'if not self.first and x.device.type != "meta":',
        'if x.device.type != "meta":',
    ),
)


def verdict(number: int) -> tuple[str, str, float]:
    """Whether some test fails for a mutant: ("killed", by which test, seconds), or ("survived", "",
    seconds).
    """
    _, file, old, new = MUTANTS[number]
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        path = Path(folder) / file
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(f"mutant {number}: {file} has its text {text.count(old)} times: {old}")
        path.write_text(text.replace(old, new))
        begin = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "tests/width"], cwd=folder, capture_output=True, text=True, check=False
        )
    took = time.monotonic() - begin
    if done.returncode == 0:
        return "survived", "", took
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if not failed:
        raise SystemExit(
            f"mutant {number}: no test has run: {done.stdout[-500:]}{done.stderr[-500:]}"
        )
    return "killed", failed[0].rpartition("/")[2], took


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these (default: all)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page of markdown")
    args = parser.parse_args()
    rows = []
    for number in args.only or range(len(MUTANTS)):
        what, test, took = verdict(number)
        rows.append({"": number, "mutant": MUTANTS[number][0], "tests say": what, "test": test})
        print(f"{number} {MUTANTS[number][0]}: {what} {test} ({took:.0f} s)", flush=True)
    left = sum(r["tests say"] == "survived" for r in rows)
    if args.write:
        table = tabulate(rows, headers="keys", tablefmt="pipe")
        text = f"""# Weaker certifiers

Each change takes one check of certification away; the tests of tests/width then run until the
first failure. {len(rows) - left} of {len(rows)} are noticed. Written by
`python bench/studies/mutants.py`.

{table}

{where()}
"""
        write_atomic(args.write, text)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
