"""The documentation of each release, and of what is checked out, beside each other.

    python docs/versions.py OUT [TAG ...]

Each tag (all that begin with "v" if none is named) is built from its own sources with its own
package, into OUT/TAG; HEAD into OUT/latest. OUT/index.html lists them. Needs the extra `docs`.
"""

from __future__ import annotations

import argparse
import html
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def git(*arguments: str) -> str:
    """What git prints."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def build(ref: str, out: Path) -> None:
    """The pages of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        source, package = Path(folder, "source"), Path(folder, "package")
        git("worktree", "add", "--detach", str(source), ref)
        try:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
            pip += ["--no-build-isolation", "--target", str(package), str(source)]
            subprocess.run(pip, check=True)
            sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", str(source / "docs"), str(out)]
            # its own package, before one that is installed
            subprocess.run(sphinx, check=True, env={**os.environ, "PYTHONPATH": str(package)})
        finally:
            git("worktree", "remove", "--force", str(source))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="where the pages go")
    parser.add_argument("tags", nargs="*", metavar="TAG", help="releases (default: all v* tags)")
    options = parser.parse_args()
    tags = options.tags or git("tag", "--list", "v*", "--sort=-version:refname").split()
    known = git("tag").split()
    if missing := [tag for tag in tags if tag not in known]:
        parser.error(f"there is no tag {missing[0]}: {', '.join(known) or 'none'}")
    for ref, name in (("HEAD", "latest"), *((tag, tag) for tag in tags)):
        build(ref, options.out.resolve() / name)
    shutil.rmtree(options.out / "jupyter_execute", ignore_errors=True)  # left by myst-nb
    listed = "\n".join(
        f'<li><a href="{html.escape(n)}/index.html">{html.escape(n)}</a></li>'
        for n in ("latest", *tags)
    )
    page = f"<!doctype html><meta charset=utf-8><title>widthbench</title>\n<ul>\n{listed}\n</ul>\n"
    (options.out / "index.html").write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
