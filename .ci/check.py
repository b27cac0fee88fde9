"""Lint, types, documentation, tests: what `tox run` does when it is given nothing else to run."""

import subprocess
import sys

FIRST = (["ruff", "check", "."], ["ruff", "format", "--check", "."])
BESIDE = (["mypy"], ["sphinx", "-W", "-q", "docs", "docs/_build"])  # the tests, which also wait
# a worker with nothing left takes over from another
TESTS = ["pytest", "tests", "-n", "auto", "--dist", "worksteal"]

failed = []


def start(step, **output):
    """Run a module."""
    return subprocess.Popen([sys.executable, "-m", *step], **output)


def end(step, process):
    """Show what it said, where that was kept, and note whether it failed."""
    print(process.communicate()[0] or "", end="", flush=True)
    if process.returncode:
        failed.append(" ".join(step))


for step in FIRST:
    print("+", *step, flush=True)
    end(step, start(step))
kept = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
beside = [(step, start(step, **kept)) for step in BESIDE]
print("+", *TESTS, flush=True)
end(TESTS, start(TESTS))
for step, process in beside:
    print("+", *step, flush=True)
    end(step, process)
if failed:
    sys.exit("failed: " + "; ".join(failed))
