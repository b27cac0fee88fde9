"""Pack what a bare machine with a GPU needs: this package, the wheels that it lacks, CIFAR-10, the
commit.

    python bench/gpu/pack.py DEST [--part-mib 48] [--python 3.12] [--need NAME ...]

Writes DEST/1, DEST/2, ...: each at most so large, for machines that take files in parts. There
``bench/gpu/run.sh`` puts them together. The checkout must be clean, since records name its commit.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from widthbench.data.sources import locate
from widthbench.experiment.published import FOLDER

ROOT = Path(__file__).resolve().parents[2]
NEED = (
    "torch-pruning",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "platformdirs",
    "loky",
)
TARS = ("train.tar", "test.tar")
GLIBC = (17, 27, 28, 31, 34)
MIB = 2**20


def command(*words: str) -> str:
    return subprocess.run(
        words, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def wheels(folder: Path, python: str, need: list[str]) -> None:
    """This package as it is committed, with the published base networks and no other results, and
    packages in the versions that are installed here, for Linux on x86-64.
    """
    pip = [sys.executable, "-m", "pip", "-q"]
    with tempfile.TemporaryDirectory() as clean:  # a build in the checkout takes old files along
        command("git", "archive", "-o", f"{clean}/.tar", "HEAD")
        shutil.unpack_archive(f"{clean}/.tar", clean, "tar", filter="data")
        for path in Path(clean, "results", "published").iterdir():
            if path.is_dir() and path.name != FOLDER:
                shutil.rmtree(path)
        command(*pip, "wheel", "--no-deps", "-w", str(folder), clean)
    wanted = [f"{name}=={version(name)}" for name in need]
    platforms = [word for n in GLIBC for word in ("--platform", f"manylinux_2_{n}_x86_64")]
    target = [
        "--python-version",
        python,
        "--implementation",
        "cp",
        *platforms,
        "--platform",
        "manylinux2014_x86_64",
    ]
    command(
        *pip, "download", "--no-deps", "--only-binary=:all:", *target, "-d", str(folder), *wanted
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("dest", type=Path, metavar="DEST")
    parser.add_argument(
        "--part-mib", type=int, default=48, metavar="N", help="size of a part at most (48)"
    )
    parser.add_argument(
        "--python", default="3.12", metavar="X.Y", help="of the other machine (3.12)"
    )
    parser.add_argument(
        "--need", nargs="+", default=list(NEED), metavar="NAME", help="packages that it lacks"
    )
    options = parser.parse_args()
    if command("git", "status", "--porcelain", "--", ".", ":!results"):
        parser.error("commit first: records will name the commit that is checked out")
    where = locate("cifar10")
    tars = [Path(where[0]) / name for name in TARS] if where else []
    if not tars or not all(tar.is_file() for tar in tars):
        parser.error(f"cifar10 must lie as {' and '.join(TARS)} where data are looked for")
    ours = (options.dest / "1" / "COMMIT").is_file()
    if options.dest.is_dir() and not ours and any(options.dest.iterdir()):
        parser.error(f"{options.dest} holds what this script did not write: name another folder")
    shutil.rmtree(options.dest, ignore_errors=True)
    first = options.dest / "1"
    wheels(first / "wheels", options.python, options.need)
    (first / "COMMIT").write_text(command("git", "rev-parse", "HEAD") + "\n")
    taken = sum(f.stat().st_size for f in first.rglob("*") if f.is_file())
    number, room = 1, options.part_mib * MIB - taken
    if room <= 0:
        parser.error(f"the wheels alone are {taken / MIB:.0f} MiB: raise --part-mib")
    for tar in tars:
        with tempfile.TemporaryFile() as packed:
            with tar.open("rb") as file, lzma.open(packed, "wb", preset=1) as out:
                shutil.copyfileobj(file, out)  # headers of small files are a third of a tar
            packed.seek(0)
            piece = 0
            while data := packed.read(room):
                folder = options.dest / str(number)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{tar.name}.xz.{piece:03d}").write_bytes(data)
                piece, room = piece + 1, room - len(data)
                if not room:
                    number, room = number + 1, options.part_mib * MIB
    for part in sorted(options.dest.iterdir()):
        size = sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
        print(f"{part}: {size / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
