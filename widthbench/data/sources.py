"""Where data sets come from: scikit-learn, torchvision's files, image folders and tars through
timm's readers, ImageNet.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_dataset
from timm.data.readers import add_img_extensions
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from widthbench import cache
from widthbench.errors import UsageError, did_you_mean
from widthbench.paths import Lock, cache_dir, data_dir, write_atomic
from widthbench.provenance import code_digest

READABLE = (".png", ".jpg", ".jpeg", ".webp")
SMALL = 64  # px: sets of images up to this size are held in memory
MEMORY = 2**31  # bytes: as long as they fit
PIXELS = 2**28  # of one image: 0.8 GB when decoded
WAIT = 3  # s of reading contents, after which a line on stderr says how far it is

TORCHVISION: dict[str, Any] = {
    "mnist": datasets.MNIST,
    "fashionmnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}
KNOWN = ("digits", *TORCHVISION, "imagenet")
PARTS = ("train", "test")
ARCHIVES = ("train", "ILSVRC2012_img_train"), ("val", "ILSVRC2012_img_val")
ARRAYS = "arrays.safetensors"  # of a data set that ``add_data`` has written
SAFE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{,199}\Z")


@dataclass(frozen=True)
class Arrays:
    """Small images in memory: uint8 ``[N, C, H, W]`` and long ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Files:
    """Images that are read when they are needed.

    Args:
        root: Folder or tar; class names are those of the folders inside, sorted.
    """

    def __init__(self, root: Path) -> None:
        add_img_extensions(".webp")
        self.root = root
        options: Any = (
            {"cache_tarinfo": False} if root.is_file() else {}
        )  # timm would pickle an index beside the tar
        try:
            (_require_plain_tar if root.is_file() else _require_plain_folder)(root)
            reader = create_dataset("", root=str(root), class_map={}, **options).reader
        except UsageError:
            raise
        except (RuntimeError, AssertionError, OSError, ValueError, EOFError) as error:
            raise UsageError(f"cannot read images from {root}: {error}") from error
        except Exception as error:  # tarfile's own errors have no common ground with these
            raise UsageError(f"damaged file {root}: {type(error).__name__}: {error}") from error
        self._reader, self._pid = reader, os.getpid()
        targets = getattr(reader, "targets", None)
        self.labels = np.asarray(
            [s[1] for s in reader.samples] if targets is None else targets, dtype=np.int64
        )
        self.classes: dict[str, int] = getattr(reader, "class_to_idx", None) or getattr(
            reader, "class_name_to_idx", {}
        )

    @property
    def unsorted(self) -> bool:
        """Whether no image lies in a class folder."""
        return set(self.classes) == {""}

    def answer(self, classes: dict[str, int], answers: dict[str, str]) -> None:
        """Label images that are not sorted into classes.

        Args:
            classes: Class name to label.
            answers: File stem to class name.

        Raises:
            UsageError: If an image has no answer.
        """
        stems = [Path(self._reader.filename(i)).stem for i in range(len(self))]
        if unknown := [s for s in stems if answers.get(s) not in classes]:
            raise UsageError(
                f"{self.root}: no label for {unknown[0]} (and {len(unknown) - 1} more) in the list"
                " of answers"
            )
        self.labels, self.classes = (
            np.asarray([classes[answers[s]] for s in stems], dtype=np.int64),
            classes,
        )

    def require_one_folder_per_class(self) -> None:
        """Refuse what timm's readers would mislabel or leave out in silence.

        Raises:
            UsageError: If images lie outside of class folders or deeper than them, or a class
                folder holds none that can be read.
        """
        folders: dict[int, str] = {}
        for index, label in enumerate(self.labels.tolist()):
            if self._inner_tar(index):
                continue
            above = os.path.dirname(self._reader.filename(index))
            if not above:
                raise UsageError(
                    f"{self.name(index)} lies outside of the class folders: move it into one, or"
                    " take it out"
                )
            if folders.setdefault(label, above) != above:
                raise UsageError(
                    f"{self.root}: images lie in {folders[label]} and in {above}: put them directly"
                    " into one folder per class, without folders inside"
                )
        parents = {os.path.dirname(above) for above in folders.values()}
        if len(parents) > 1:
            both = " and ".join(repr(p or ".") for p in sorted(parents)[:2])
            raise UsageError(
                f"{self.root}: class folders lie in {both}: put them side by side, with the images"
                " directly inside"
            )
        if self.root.is_dir():
            self._require_readable()

    def _inner_tar(self, index: int) -> bool:
        sample = self._reader.samples[index]
        return self.root.is_file() and sample[2] is not None

    def _require_readable(self) -> None:
        others = _others()
        for folder in sorted(
            p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")
        ):
            with os.scandir(folder) as entries:
                odd = next(
                    (e.name for e in entries if os.path.splitext(e.name)[1].lower() in others), None
                )
            if odd:
                raise UsageError(
                    f"{folder / odd} is neither PNG, JPEG nor WebP: convert it, or take it out"
                )
            if folder.name not in self.classes:
                raise UsageError(
                    f"{folder} holds no PNG, JPEG or WebP image: fill it, or take it out"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The file's name, for people."""
        inside = self._reader.filename(index)
        return f"{self.root}:{inside}" if self.root.is_file() else str(self.root / inside)

    def open(self, index: int, mode: str | None = "RGB") -> Image.Image:
        """A decoded image.

        Raises:
            UsageError: If the file is damaged; it is named.
        """
        if (
            os.getpid() != self._pid
        ):  # a worker: file positions must not be shared with other processes
            self._pid = os.getpid()
            _forget(getattr(self._reader, "tar_state", None))
        try:
            with self._reader[index][0] as file, _any_size():
                image = Image.open(file)
                width, height = image.size
                deep = image.mode.startswith(("I", "F")) or ";16" in str(image.tile)
                if not deep and width * height <= PIXELS:
                    image.load()
                    clear = (
                        image.mode == "P" and "transparency" in image.info
                    )  # Pillow would warn of going straight to RGB
                    plain: Image.Image = image.convert("RGBA") if clear else image
                    return plain.convert(mode) if mode else plain
        except MemoryError:
            raise
        except OSError as error:
            if error.errno:  # the system's, not the decoder's
                raise UsageError(f"cannot read {self.name(index)}: {error.strerror}") from error
            raise UsageError(
                f"damaged file {self.name(index)}: {error}; restore it, or take it out"
            ) from error
        except Exception as error:  # a damaged file may trip any part of a decoder
            raise UsageError(
                f"damaged file {self.name(index)}: {error}; restore it, or take it out"
            ) from error
        if deep:
            raise UsageError(
                f"{self.name(index)} has more than 8 bits per channel: convert it to 8 bits"
            )
        raise UsageError(
            f"{self.name(index)} has {width} x {height} pixels, more than {PIXELS:,}: make it"
            " smaller, or take it out"
        )

    def relabel(self, classes: dict[str, int]) -> None:
        """Take the labels of another part, by class name.

        Raises:
            UsageError: If this part has a class that the other lacks, or the other way round.
        """
        for own, other, has in (
            (self.classes, classes, "an image class"),
            (classes, self.classes, "no images of class"),
        ):
            if absent := sorted(set(own) - set(other)):
                more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
                lacks = (
                    "which the training part lacks"
                    if own is self.classes
                    else "which the training part has"
                )
                raise UsageError(
                    f"{self.root} has {has} '{absent[0]}'{more}, {lacks}: both parts need the same"
                    " classes"
                )
        new = np.zeros(len(classes), dtype=np.int64)
        for name, label in self.classes.items():
            new[label] = classes[name]
        self.labels, self.classes = new[self.labels], classes

    def stamp(self) -> str:
        """SHA-256 over names, sizes, labels and times of change: quick, and another one when a file
        is written again.
        """
        digest = hashlib.sha256()
        packed = self.root.is_file()
        if packed:
            digest.update(f"{_version(self.root)}".encode())
        for index, label in enumerate(self.labels):
            name = self._reader.filename(index)
            known = self._reader.samples[index][0].size if packed else _version(self.root / name)
            digest.update(os.fsencode(name) + f"\0{known}\0{label}\n".encode())
        return digest.hexdigest()

    def contents(self) -> str:
        """SHA-256 over contents and labels: of a tar as a whole, of files in folders with their
        names.
        """
        digest = hashlib.sha256()
        if self.root.is_file():
            with _progress(self.root, self.root.stat().st_size, "B") as bar:
                digest.update(_hashes(self.root, [""], bar)[0].encode() + self.labels.tobytes())
            return digest.hexdigest()
        folders: dict[str, list[int]] = {}
        for index in range(len(self)):
            folders.setdefault(os.path.dirname(self._reader.filename(index)), []).append(index)
        with _progress(self.root, len(self), "file") as bar:
            for folder, indices in folders.items():
                names = [self._reader.filename(i, basename=True) for i in indices]
                for name, known_digest, index in zip(
                    names, _hashes(self.root / folder, names, bar), indices, strict=True
                ):
                    digest.update(
                        os.fsencode(os.path.join(folder, name))
                        + f"\0{known_digest}\0{self.labels[index]}\n".encode()
                    )
        return digest.hexdigest()


@contextmanager
def _any_size() -> Iterator[None]:
    """Let Pillow open images of any size: it takes large ones for attacks, and stops at a size that
    cameras reach.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _require_plain_folder(root: Path) -> None:
    """Refuse links that lead round in circles, and what is neither file nor folder: reading a pipe
    would wait for ever.

    Raises:
        UsageError: At the first of them, or a folder that cannot be read.
    """
    try:
        top = root.stat()
        stack = [(str(root), frozenset({(top.st_dev, top.st_ino)}))]
        while stack:
            folder, above = stack.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        status = entry.stat()
                        if (key := (status.st_dev, status.st_ino)) in above:
                            raise UsageError(
                                f"{entry.path} is a link to a folder that it lies in: take it out"
                            )
                        stack.append((entry.path, above | {key}))
                    elif not entry.is_file():
                        raise UsageError(
                            f"{entry.path} is neither a file nor a folder, or a link to nowhere:"
                            " take it out"
                        )
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error


def _require_plain_tar(root: Path) -> None:
    """Refuse what timm's reader leaves out of a tar in silence: links, images in other formats,
    tars in tars in tars.

    Raises:
        UsageError: At the first of them.
    """
    others = _others()

    def check(tar: tarfile.TarFile, where: str, outer: bool) -> None:
        for member in tar:
            ending, name = os.path.splitext(member.name)[1].lower(), f"{where}:{member.name}"
            if member.isdir() or ending not in {*READABLE, *others, ".tar"}:
                continue
            if not member.isfile():
                kind = (
                    f"a link to {member.linkname}"
                    if member.islnk() or member.issym()
                    else "not a file"
                )
                raise UsageError(
                    f"{name} is {kind}: pack the file itself (GNU tar: --dereference"
                    " --hard-dereference)"
                )
            if ending in others:
                raise UsageError(
                    f"{name} is neither PNG, JPEG nor WebP: convert it, or take it out"
                )
            if ending == ".tar":
                if not outer:
                    raise UsageError(
                        f"{name} is a tar in a tar in a tar: put its images into the class's tar"
                    )
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    check(inner, name, False)

    with tarfile.open(root, mode="r:") as tar:
        check(tar, str(root), True)


def _others() -> set[str]:
    """How the names of images end that timm's readers would leave out."""
    return {ending for ending in Image.registered_extensions() if ending not in READABLE}


def _version(path: Path) -> list[int]:
    """Size of a file and its times of change, of which the second cannot be set back."""
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _progress(root: Path, total: int, unit: str) -> Any:
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=True,
        delay=WAIT,
        leave=False,
        desc=f"reading {root} for its digest",
    )


def _hashes(place: Path, names: list[str], bar: Any) -> list[str]:
    """SHA-256 of files, kept in the cache as long as sizes and times stay.

    Args:
        place: Their folder; each has one entry in the cache.
        names: Their names in it; "" for the place itself, a tar.
        bar: Counts files, or the bytes of a tar.
    """
    path = (
        cache_dir()
        / "contents"
        / f"{hashlib.sha256(os.fsencode(place.absolute())).hexdigest()[:40]}.json"
    )

    def read(name: str) -> str:
        sha = hashlib.sha256()
        try:
            with (place / name).open("rb") as file:
                while block := file.read(2**20):
                    sha.update(block)
                    if not name:
                        bar.update(len(block))
        except OSError as error:
            raise UsageError(f"cannot read {place / name}: {error.strerror}") from error
        return sha.hexdigest()

    def known() -> tuple[dict[str, list[Any]], list[str]]:
        """Versions of the files, with their digests where the cache has them; and the names of the
        others.
        """
        old = (cache.read_json(path, "digests of files") or {}).get("files", {})
        versions = {name: _version(place / name) for name in names}
        versions |= {
            name: old[name]
            for name, version in versions.items()
            if old.get(name, [])[:-1] == version
        }
        return versions, [name for name in names if versions[name] is not old.get(name)]

    new, left = known()
    if left:  # else there is nothing to write, and nothing to wait for
        with Lock(path.with_suffix(".lock")):
            new, left = known()
            bar.update(sum(map(bool, names)) - len(left) if names != [""] else 0)
            with ThreadPoolExecutor(min(16, 4 + (os.cpu_count() or 1))) as pool:
                for name, digest in zip(left, pool.map(read, left), strict=True):
                    new[name].append(digest)
                    if name:
                        bar.update()
            cache.write_json(path, {"place": str(place), "files": new})
    return [new[name][-1] for name in names]


def _forget(state: Any) -> None:
    """Drop open tar files of timm's reader, with those inside them."""
    for one in state.values() if isinstance(state, dict) else [state] if state is not None else []:
        one.reset()
        _forget(one.children)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set before splitting.

    Attributes:
        name: Its name in suites.
        where: Its folder, or "built in".
        layout: How it lies there.
        train: The training part.
        test: The test part.
        digest: SHA-256 over all images and labels for sets in memory, over files and labels for
            others.
    """

    name: str
    where: str
    layout: str
    train: Arrays | Files
    test: Arrays | Files
    digest: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(max(self.train.labels.max(), self.test.labels.max())) + 1

    @property
    def image(self) -> str:
        """``"3 x 32 x 32"``, or that sizes differ."""
        return (
            " x ".join(map(str, self.train.images.shape[1:]))
            if isinstance(self.train, Arrays)
            else "3 channels, files"
        )

    @property
    def channels(self) -> int:
        """Image channels."""
        return self.train.images.shape[1] if isinstance(self.train, Arrays) else 3


def names() -> list[str]:
    """The known data sets, and every folder with a training and a test part where data are looked
    for.
    """
    root = data_dir()
    try:
        known = sorted(
            p.name
            for p in root.iterdir()
            if p.is_dir() and SAFE.match(p.name) and p.name not in KNOWN
        )
    except OSError:
        known = []
    return [
        *KNOWN,
        *(n for n in known if _parts(root / n) is not None or os.path.isfile(root / n / ARRAYS)),
    ]


def locate(name: str) -> tuple[str, str] | None:
    """``(where, layout)`` of a data set that is there, without reading it; None if it is not."""
    if name == "digits":
        return "built in", "in the package"
    root = data_dir()
    if parts := _parts(_folder(name, root)):
        return str(parts[0].parent), "tars" if parts[0].is_file() else "folders"
    if os.path.isfile(root / name / ARRAYS):
        return str(root / name), "arrays"
    if name not in TORCHVISION:
        return None
    cls, folder = TORCHVISION[name], _torchvision_folder(name, root)
    if hasattr(cls, "resources"):
        there = all(
            os.path.isfile(p) or os.path.isfile(p.with_suffix(""))
            for p in (folder / Path(url).name for url, _ in _idx(cls))
        )
    else:
        there = os.path.isdir(folder)
    return (
        (str(folder), "idx files" if hasattr(cls, "resources") else "pickled batches")
        if there
        else None
    )


def wanted(name: str) -> str:
    """What to put where, for a data set that is not there."""
    root = data_dir()
    if name in TORCHVISION:
        cls = TORCHVISION[name]
        folder = _torchvision_folder(name, root)
        if hasattr(cls, "resources"):
            return f"{', '.join(Path(u).name for u, _ in cls.resources)} (or unzipped) in {folder}"
        return (
            f"the unpacked {cls.filename} as {folder}, or train.tar and test.tar (images in one"
            f" folder per class) in {root / name}"
        )
    if name == "imagenet":
        return (
            "train and val folders with one folder per class, or train.tar and val.tar, in"
            f" {root / name}"
        )
    return (
        "train and test (or val) folders, or train.tar and test.tar, with one folder per class, in"
        f" {root / name}"
    )


def load(name: str) -> Source:
    """A data set, downloaded if torchvision knows where and the network allows.

    Args:
        name: One of the known ones, or a folder where data are looked for (``WIDTHBENCH_DATA``).

    Raises:
        UsageError: If it is unknown, not there (the message says what to put where), or damaged
            (the file is named).
    """
    return _load(name, data_dir())


@functools.lru_cache(maxsize=4)
def _load(name: str, root: Path) -> Source:
    if name == "digits":
        return _digits()
    if not SAFE.match(name):
        raise UsageError(
            f"dataset name '{name}' may hold letters, digits, '_', '-' and '.' only; it is a folder"
            f" in {root}"
        )
    if parts := _parts(_folder(name, root)):
        return _images(name, *parts)
    if os.path.isfile(path := root / name / ARRAYS):
        return _added(name, path)
    if name in TORCHVISION:
        return _torchvision(name, root)
    if name == "imagenet":
        raise UsageError(
            f"dataset 'imagenet' is not there: put {wanted(name)}, or set WIDTHBENCH_DATA or --data"
        )
    raise UsageError(
        f"unknown dataset '{name}'{did_you_mean(name, names())}; for one of your own put"
        f" {wanted(name)}"
    )


def forget() -> None:
    """Read data sets anew: one has been written."""
    _load.cache_clear()


def _added(name: str, path: Path) -> Source:
    try:
        tensors = load_tensors(path.read_bytes())
        train, test = (Arrays(tensors[f"{p}_images"], tensors[f"{p}_labels"]) for p in PARTS)
    except (OSError, SafetensorError, KeyError) as error:
        raise UsageError(f"damaged file {path}: {error}; write it anew (add_data)") from error
    return in_memory(name, str(path.parent), "arrays", train, test)


def verify(source: Source) -> None:
    """Read every image of a data set that is not in memory already.

    Raises:
        UsageError: At the first damaged file; it is named.
    """
    for part in (source.train, source.test):
        if isinstance(part, Files):
            for index in range(len(part)):
                part.open(index).close()


def in_memory(name: str, where: str, layout: str, train: Arrays, test: Arrays) -> Source:
    """A source of small images, with its digest."""
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(part.images.numpy().tobytes())
        digest.update(part.labels.numpy().tobytes())
    return Source(name, where, layout, train, test, digest.hexdigest())


def _digits() -> Source:
    """scikit-learn's 1,797 scans of 8 x 8 pixels with 17 grey levels (UCI "Optical Recognition of
    Handwritten Digits").

    The set has no test part of its own: a quarter (450 scans), drawn once and the same for every
    seed, is ours.
    """
    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images / 16 * 255).astype(np.uint8)[:, None])
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(images)), test_size=450, random_state=0, stratify=bunch.target
    )
    parts = (Arrays(images[i], labels[i]) for i in (train, test))
    return in_memory("digits", "built in", "in the package", *parts)


def _folder(name: str, root: Path) -> Path:
    """Where a data set's images lie; ImageNet also as its competition archive unpacks."""
    competition = root / name / "ILSVRC" / "Data" / "CLS-LOC"
    return competition if os.path.isdir(competition) else root / name


def _parts(folder: Path) -> tuple[Path, Path] | None:
    """(training, test) part in a folder: tars or folders."""
    parts: list[Path] = []
    labelled = (
        () if folder.name in ("imagenet", "CLS-LOC") else ("test",)
    )  # the competition's own test part has no labels
    for stems in (ARCHIVES[0], (*labelled, *ARCHIVES[1])):
        options = [p for s in stems for p in (folder / f"{s}.tar", folder / s) if os.path.exists(p)]
        if not options:
            return None
        parts.append(options[0])
    return parts[0], parts[1]


def _images(name: str, train_at: Path, test_at: Path) -> Source:
    layout = "tars" if train_at.is_file() else "folders"
    train, test = Files(train_at), Files(test_at)
    train.require_one_folder_per_class()
    if len(train.classes) < 2:
        raise UsageError(
            f"{train_at} holds {len(train.classes)} class(es): images must lie in one folder per"
            " class"
        )
    if name == "imagenet" and test.unsorted:
        test.answer(train.classes, _answers(test_at))
    else:
        test.require_one_folder_per_class()
        test.relabel(train.classes)
    where = str(train_at.parent)
    sizes = {train.open(0, None).size, test.open(0, None).size}
    if len(sizes) == 1 and max(sizes.pop()) <= SMALL:
        arrays = _decoded(name, train, test)
        if arrays is not None:
            return in_memory(name, where, layout, *arrays)
    digest = hashlib.sha256(f"{train.contents()} {test.contents()}".encode()).hexdigest()
    return Source(name, where, layout, train, test, digest)


def _answers(val: Path) -> dict[str, str]:
    """Class of each image of ImageNet's unsorted validation part, from the competition's list."""
    places = [folder / "LOC_val_solution.csv" for folder in (val.parent, *val.parent.parents[:3])]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UsageError(
            f"{val} is not sorted into classes: put the competition's LOC_val_solution.csv beside"
            " it, or one folder per class inside"
        )
    try:
        with path.open(newline="") as file:
            return {
                row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)
            }
    except (KeyError, IndexError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"{path} is not the competition's list: it needs the columns ImageId and"
            " PredictionString"
        ) from error


def _decoded(name: str, train: Files, test: Files) -> tuple[Arrays, Arrays] | None:
    """Small images as arrays, kept decoded in the cache; None if they differ in size or are too
    many.
    """
    stamp = f" {train.stamp()} {test.stamp()} {version('pillow')} {code_digest('data/sources.py')}"
    key = hashlib.sha256(os.fsencode(train.root) + stamp.encode()).hexdigest()[:40]
    path = cache_dir() / "decoded" / f"{name}-{key}.tensors"
    if (there := _read_decoded(path)) is not None:
        return there
    with Lock(path.with_suffix(".lock")):
        if (there := _read_decoded(path)) is not None:
            return there
        first = train.open(0, None)
        if (len(train) + len(test)) * 3 * first.size[0] * first.size[1] > MEMORY:
            return None
        stacked, grey = [], True
        for part in (train, test):
            images = np.empty((len(part), *first.size[::-1], 3), dtype=np.uint8)
            for index in range(len(part)):
                image = part.open(index, None)
                if image.size != first.size:
                    return None
                grey = grey and image.mode in ("1", "L")
                images[index] = np.asarray(image.convert("RGB"))
            stacked.append(torch.from_numpy(images).permute(0, 3, 1, 2))
        parts = [
            Arrays((x[:, :1] if grey else x).contiguous(), torch.from_numpy(part.labels))
            for x, part in zip(stacked, (train, test), strict=True)
        ]
        tensors = {"train": parts[0].images, "train_labels": parts[0].labels}
        cache.write(
            path,
            save({**tensors, "test": parts[1].images, "test_labels": parts[1].labels}),
            shared=False,
        )
        return parts[0], parts[1]


def _read_decoded(path: Path) -> tuple[Arrays, Arrays] | None:
    if (blob := cache.read(path, "decoded images")) is None:
        return None
    t = load_tensors(blob)
    return Arrays(t["train"], t["train_labels"]), Arrays(t["test"], t["test_labels"])


def _idx(cls: Any) -> list[tuple[str, str]]:
    return list(cls.resources)


def _torchvision_folder(name: str, root: Path) -> Path:
    cls = TORCHVISION[name]
    return root / cls.__name__ / "raw" if hasattr(cls, "resources") else root / cls.base_folder


def _torchvision(name: str, root: Path) -> Source:
    cls = TORCHVISION[name]
    if locate(name) is None:
        _download(name, root)
    there = _unzipped(name, root) if hasattr(cls, "resources") else root
    try:
        loaded = [cls(str(there), train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever its parsing runs into
        detail = _damaged(name, there) or f"in {_torchvision_folder(name, root)}: {error}"
        raise UsageError(
            f"dataset '{name}': damaged file {detail}; remove it and put {wanted(name)}"
        ) from error
    parts = []
    for one in loaded:
        images = torch.as_tensor(one.data)
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        parts.append(Arrays(images.contiguous(), torch.as_tensor(one.targets, dtype=torch.int64)))
        if len(images) != len(one.targets):
            raise UsageError(
                f"dataset '{name}': {len(images)} images but {len(one.targets)} labels in {root}"
            )
    where, layout = locate(name) or (str(root), "")
    return in_memory(name, where, layout, parts[0], parts[1])


def _unzipped(name: str, root: Path) -> Path:
    """A root with plain idx files, which torchvision wants: the given one, or one in the cache if
    some are there only zipped.
    """
    folder = _torchvision_folder(name, root)
    files = [folder / Path(url).name for url, _ in _idx(TORCHVISION[name])]
    if all(f.with_suffix("").is_file() for f in files):
        return root
    digest = hashlib.sha256()
    contents = {}
    for file in files:
        plain = file.with_suffix("")
        try:
            contents[plain.name] = (
                plain.read_bytes() if plain.is_file() else gzip.decompress(file.read_bytes())
            )
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(
                f"dataset '{name}': damaged file {file}: {error}; remove it and put {wanted(name)}"
            ) from error
        digest.update(contents[plain.name])
    place = cache_dir() / "unzipped" / digest.hexdigest()[:16]
    for plain_name, content in contents.items():
        path = _torchvision_folder(name, place) / plain_name
        if not path.is_file() or path.read_bytes() != content:
            if path.is_file():
                cache.damaged(path, "unzipped file")
            write_atomic(path, content)
    return place


def _download(name: str, root: Path) -> None:
    cls = TORCHVISION[name]
    if os.environ.get("WIDTHBENCH_DATA") and not os.path.isdir(root):
        raise UsageError(
            f"the data folder {root} does not exist: make it, or correct WIDTHBENCH_DATA or --data"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with Lock(root / f".{name}.lock"):
            for train in (True, False):
                cls(str(root), train=train, download=True)
    except Exception as error:  # no network, a read-only folder, a broken mirror
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UsageError(
            f"dataset '{name}' is not there and could not be downloaded ({reason}): "
            f"put {wanted(name)}, or set WIDTHBENCH_DATA or --data"
        ) from error


def _damaged(name: str, root: Path) -> str | None:
    """The first file of a torchvision data set that cannot be read."""
    cls, folder = TORCHVISION[name], _torchvision_folder(name, root)
    if not hasattr(cls, "resources"):
        listed = [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]
        return next(
            (str(folder / n) for n, md5 in listed if not check_integrity(str(folder / n), md5)),
            None,
        )
    for url, _ in _idx(cls):
        path = (folder / Path(url).name).with_suffix("")
        if not path.is_file():
            continue
        try:
            (read_image_file if "images" in path.name else read_label_file)(str(path))
        except Exception as error:  # whatever its parsing runs into
            return f"{path} ({error or type(error).__name__})"
    return None
