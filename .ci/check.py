"""Lint, types, documentation, tests: what `tox run` does when it is given nothing else to run."""

import subprocess
import sys

CHECKS = (  # at the same time
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    ["sphinx", "-W", "-q", "docs", "docs/_build"],
)
# a worker with nothing left takes over from another
TESTS = ["pytest", "tests", "-n", "auto", "--dist", "worksteal"]


def start(step, **output):
    """Run a module."""
    return subprocess.Popen([sys.executable, "-m", *step], **output)


codes = {}
output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
running = {tuple(step): start(step, **output) for step in CHECKS}
for step, process in running.items():
    print("+", *step, flush=True)
    print(process.communicate()[0], end="", flush=True)
    codes[" ".join(step)] = process.returncode
print("+", *TESTS, flush=True)
codes[" ".join(TESTS)] = start(TESTS).wait()

if failed := [step for step, code in codes.items() if code]:
    sys.exit("failed: " + "; ".join(failed))
