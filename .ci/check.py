"""Lint, types, documentation, tests: what `tox run` does when it is given nothing else to run."""

import subprocess
import sys

STEPS = (
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    ["sphinx", "-W", "-q", "docs", "docs/_build"],
    ["pytest", "tests", "-n", "auto"],
)

failed = []
for step in STEPS:
    print("+", *step, flush=True)
    if subprocess.run([sys.executable, "-m", *step], check=False).returncode:
        failed.append(" ".join(step))
if failed:
    sys.exit("failed: " + "; ".join(failed))
