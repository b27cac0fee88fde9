import csv
import gzip
import io
import os
import shutil
import socket
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from widthbench.data import sources, splits
from widthbench.errors import UsageError
from widthbench.recipe import Recipe


@pytest.fixture
def root(tmp_path, monkeypatch, fresh_cache):
    monkeypatch.setenv("WIDTHBENCH_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def picture(label, index, size=(20, 20)):
    generator = np.random.default_rng(1000 * label + index)
    return Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def folder(
    root,
    name="own",
    *,
    suffix=".png",
    classes=("ant", "bee", "cat"),
    train=6,
    test=3,
    size=(20, 20),
    parts=("train", "test"),
):
    for part, count in zip(parts, (train, test), strict=True):
        for label, one in enumerate(classes):
            (root / name / part / one).mkdir(parents=True)
            for index in range(count):
                shape = size(index) if callable(size) else size
                options = {"lossless": True} if suffix == ".webp" else {}
                picture(label, index + 100 * (part != "train"), shape).save(
                    root / name / part / one / f"{index}{suffix}", **options
                )
    return root / name


def to_tars(place):
    for part in [p for p in place.iterdir() if p.is_dir()]:
        with tarfile.open(place / f"{part.name}.tar", "w") as tar:
            for file in sorted(part.rglob("*.*")):
                tar.add(file, file.relative_to(part))
        shutil.rmtree(part)


def idx(root, cls="MNIST", train=40, test=20, zipped=False):
    raw = root / cls / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for stem, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        content = {
            f"{stem}-images-idx3-ubyte": struct.pack(">IIII", 0x803, count, 28, 28)
            + images.tobytes(),
            f"{stem}-labels-idx1-ubyte": struct.pack(">II", 0x801, count) + labels.tobytes(),
        }
        for name, blob in content.items():
            if zipped:
                (raw / f"{name}.gz").write_bytes(gzip.compress(blob))
            else:
                (raw / name).write_bytes(blob)
    return raw


@pytest.mark.parametrize("cls", ["MNIST", "FashionMNIST"])
def test_idx_files_are_read_through_torchvision(root, cls):
    idx(root, cls)
    source = sources.load(cls.lower())
    assert (source.train.images.shape, source.test.images.shape) == (
        (40, 1, 28, 28),
        (20, 1, 28, 28),
    )
    assert (source.classes, source.channels, source.layout) == (10, 1, "idx files")
    assert source.train.labels.tolist() == [n % 10 for n in range(40)]
    assert len(source.digest) == 64


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_truncated_idx_file_is_named(root, name):
    file = idx(root) / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UsageError, match=f"dataset 'mnist': damaged file .*{name}"):
        sources.load("mnist")


def test_a_set_that_is_not_there_and_cannot_be_downloaded_says_what_to_put_where(root, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    with pytest.raises(UsageError, match=r"the data folder .* does not exist: make it"):
        sources.load("mnist")
    root.mkdir()
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(
        UsageError,
        match=r"'mnist' is not there and could not be downloaded "
        r".*train-images-idx3-ubyte.*MNIST/raw.*WIDTHBENCH_DATA",
    ):
        sources.load("mnist")
    with pytest.raises(
        UsageError, match=r"'cifar100'.*cifar-100-python.tar.gz.*train.tar and test.tar"
    ):
        sources.load("cifar100")
    with pytest.raises(UsageError, match=r"'imagenet' is not there: put train and val folders"):
        sources.load("imagenet")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_folders_and_tars_of_small_images_give_the_same_arrays(root, suffix):
    place = folder(root, suffix=suffix)
    folders = sources.load("own")
    to_tars(place)
    sources._load.cache_clear()
    tars = sources.load("own")
    assert (folders.layout, tars.layout) == ("folders", "tars")
    assert (folders.classes, folders.channels, len(folders.train), len(folders.test)) == (
        3,
        3,
        18,
        9,
    )
    # a tar's own order may differ from the folder's: compare as sets
    for a, b in ((folders.train, tars.train), (folders.test, tars.test)):
        pairs = [
            sorted((bytes(x.numpy()), int(y)) for x, y in zip(p.images, p.labels, strict=True))
            for p in (a, b)
        ]
        assert pairs[0] == pairs[1]
    if suffix != ".jpg":
        want = torch.tensor(np.asarray(picture(1, 0))).permute(2, 0, 1)
        assert any(
            torch.equal(want, x)
            for x, y in zip(folders.train.images, folders.train.labels, strict=True)
            if y == 1
        )


def test_decoded_images_are_kept_and_a_changed_folder_is_read_anew(root, monkeypatch):
    place = folder(root)
    first = sources.load("own")
    sources._load.cache_clear()
    real, opened = sources.Files.open, []
    monkeypatch.setattr(sources.Files, "open", lambda self, *a: opened.append(a) or real(self, *a))
    assert sources.load("own").digest == first.digest
    assert len(opened) < 5
    picture(0, 77).save(place / "train" / "ant" / "more.png")
    sources._load.cache_clear()
    again = sources.load("own")
    assert (len(again.train), again.digest != first.digest) == (19, True)


@pytest.mark.parametrize("size", [(20, 20), (90, 70)])
def test_a_damaged_image_is_named(root, size):
    file = folder(root, size=size) / "train" / "bee" / "3.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UsageError, match=r"damaged file .*train/bee/3.png"):
        sources.verify(sources.load("own"))


def test_a_damaged_image_in_a_tar_is_named(root):
    place = folder(root)
    (place / "test" / "cat" / "1.png").write_bytes(b"no image")
    to_tars(place)
    with pytest.raises(UsageError, match=r"damaged file .*test.tar:.*cat/1.png"):
        sources.load("own")


def test_parts_must_have_the_same_classes(root):
    place = folder(root)
    shutil.rmtree(place / "test" / "bee")
    with pytest.raises(
        UsageError, match=r"test has no images of class 'bee', which the training part has"
    ):
        sources.load("own")


@pytest.mark.parametrize("name", ["../own", "/etc", "a/b", ""])
def test_names_do_not_leave_the_folder(root, name):
    folder(root)
    with pytest.raises(UsageError, match=r"dataset name|unknown dataset"):
        sources.load(name)


def test_an_unknown_name_suggests_what_there_is(root):
    folder(root, "flowers")
    with pytest.raises(
        UsageError, match=r"unknown dataset 'flower'; did you mean 'flowers'.*put train and test"
    ):
        sources.load("flower")
    assert "flowers" in sources.names()


LARGE = {"size": lambda index: (90 + index, 80), "suffix": ".jpg"}


def test_imagenet_in_all_layouts_has_the_same_images_and_labels(root):
    place = folder(root, "imagenet", classes=("n01", "n02", "n03"), parts=("train", "val"), **LARGE)
    seen = {}

    def look(layout):
        sources._load.cache_clear()
        source = sources.load("imagenet")
        seen[layout] = [
            sorted((int(part.labels[i]), bytes(np.asarray(part.open(i)))) for i in range(len(part)))
            for part in (source.train, source.test)
        ]

    look("class folders")
    competition = root / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC"
    competition.mkdir(parents=True)
    shutil.copytree(place / "train", competition / "train")
    (competition / "val").mkdir()
    with (root / "imagenet" / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for one in sorted((place / "val").rglob("*.jpg")):
            name = f"ILSVRC2012_val_{one.parent.name}_{one.stem}"
            shutil.copy(one, competition / "val" / f"{name}.JPEG")
            rows.writerow([name, f"{one.parent.name} 1 2 3 4"])
    look("competition")
    shutil.rmtree(root / "imagenet" / "ILSVRC")
    to_tars(place)
    look("tars")
    published(root / "imagenet")
    look("as published")
    for layout, found in seen.items():
        assert found == seen["class folders"], layout


def published(place):
    """ImageNet's own archives: a tar of a tar per class, and a flat tar of validation images."""
    with tarfile.open(place / "train.tar") as tar:
        tar.extractall(place / "x", filter="data")
    with tarfile.open(place / "ILSVRC2012_img_train.tar", "w") as outer:
        for one in sorted((place / "x").iterdir()):
            with tarfile.open(place / f"{one.name}.tar", "w") as inner:
                for file in sorted(one.iterdir()):
                    inner.add(file, file.name)
            outer.add(place / f"{one.name}.tar", f"{one.name}.tar")
            (place / f"{one.name}.tar").unlink()
    shutil.rmtree(place / "x")
    with tarfile.open(place / "val.tar") as tar:
        tar.extractall(place / "x", filter="data")
    with tarfile.open(place / "ILSVRC2012_img_val.tar", "w") as flat:
        for file in sorted((place / "x").rglob("*.jpg")):
            flat.add(file, f"ILSVRC2012_val_{file.parent.name}_{file.stem}.JPEG")
    for old in ("x", "train.tar", "val.tar"):
        shutil.rmtree(place / old) if (place / old).is_dir() else (place / old).unlink()


def test_unsorted_validation_images_without_a_list_are_refused(root):
    place = folder(root, "imagenet", parts=("train", "val"), **LARGE)
    for one in list((place / "val").rglob("*.jpg")):
        one.rename(place / "val" / f"{one.parent.name}{one.name}")
    for empty in [p for p in (place / "val").iterdir() if p.is_dir()]:
        empty.rmdir()
    with pytest.raises(
        UsageError, match=r"not sorted into classes: put the competition's LOC_val_solution.csv"
    ):
        sources.load("imagenet")


def large(root, workers=None, tars=False):
    if not (root / "big").exists():
        place = folder(root, "big", train=10, test=5, **LARGE)
        if tars:
            to_tars(place)
    split = splits.load("big", 48, val=0.2)
    if workers is not None:
        for part in (split.train, split.val, split.test):
            object.__setattr__(part, "workers", workers)
    return split


@pytest.mark.parametrize("tars", [False, True])
def test_large_images_are_read_by_workers_whose_number_changes_nothing(root, tars):
    recipe = Recipe(epochs=1, lr=0.1, resized_crop=0.3, flip=True, crop=4)
    passes = []
    for workers in (0, 1, 2):
        train = large(root, workers, tars).train
        assert isinstance(train, splits.FileSamples)
        state = torch.get_rng_state()
        passes.append(
            list(train.batches(7, generator=torch.Generator().manual_seed(0), augment=recipe))
        )
        assert torch.equal(state, torch.get_rng_state())
    assert [len(y) for _, y in passes[0]] == [7, 7, 7, 3]
    for other in passes[1:]:
        for (xa, ya), (xb, yb) in zip(passes[0], other, strict=True):
            assert torch.equal(xa, xb)
            assert torch.equal(ya, yb)
    plain = torch.cat(
        [x for x, _ in large(root).train.batches(7, generator=torch.Generator().manual_seed(0))]
    )
    assert not torch.equal(plain, torch.cat([x for x, _ in passes[0]]))


def test_large_images_are_resized_and_cropped_as_timm_does_it(root):
    from timm.data import create_transform

    split = large(root)
    part = split.test
    reference = create_transform(
        48,
        is_training=False,
        mean=part.mean,
        std=part.std,
        interpolation=part.interpolation,
        crop_pct=part.crop_pct,
    )
    x, y = next(part.batches(4))
    for n in range(4):
        assert torch.allclose(x[n], reference(part.files.open(n)), atol=1e-5)
        assert int(y[n]) == int(part.files.labels[n])


def test_a_random_resized_crop_of_images_in_memory_is_refused(root):
    samples = splits.load("digits", 8).train
    with pytest.raises(UsageError, match="resized_crop is for images that are read from files"):
        next(
            samples.batches(
                4, generator=torch.Generator(), augment=Recipe(epochs=1, lr=0.1, resized_crop=0.5)
            )
        )
    with pytest.raises(UsageError, match="give batches"):
        next(samples.batches(4, augment=Recipe(epochs=1, lr=0.1, flip=True)))


def test_a_class_that_only_the_test_part_has_is_not_dropped_in_silence(root):
    place = folder(root)
    (place / "test" / "wasp").mkdir()
    picture(9, 9).save(place / "test" / "wasp" / "0.png")
    with pytest.raises(
        UsageError, match=r"test has an image class 'wasp', which the training part lacks"
    ):
        sources.load("own")


def test_labels_follow_class_names_not_positions(root):
    place = folder(root)
    to_tars(place)  # tars list classes in an order of their own
    source = sources.load("own")
    for index, label in enumerate(("ant", "bee", "cat")):
        want = torch.tensor(np.asarray(picture(index, 100))).permute(2, 0, 1)
        found = [
            int(y)
            for x, y in zip(source.test.images, source.test.labels, strict=True)
            if torch.equal(x, want)
        ]
        assert found == [source.train.labels.unique().tolist()[index]], label


@pytest.mark.parametrize(("grey", "channels"), [(6, 1), (5, 3)])
def test_images_are_grey_only_if_all_of_them_are(root, grey, channels):
    place = folder(root, classes=("ant", "bee"), train=3, test=0)
    files = sorted(place.rglob("*.png"))
    for part in ("ant", "bee"):
        picture(0, 1).convert("L").save(place / "test" / part / "0.png")
    for file in files[:grey]:
        Image.open(file).convert("L").save(file)
    assert sources.load("own").channels == channels


def test_the_digest_of_a_large_set_does_not_hang_on_dates_or_places(root, tmp_path, monkeypatch):
    place = folder(root, "big", **LARGE)
    first = sources.load("big").digest
    shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    monkeypatch.setenv("WIDTHBENCH_DATA", str(tmp_path / "elsewhere"))
    assert sources.load("big").digest == first
    (tmp_path / "elsewhere" / "big" / "test" / "ant" / "0.jpg").unlink()
    sources._load.cache_clear()
    assert sources.load("big").digest != first
    assert place.is_dir()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("MNIST", "mnist"), ("Fashion-MNIST", "fashionmnist"), ("CIFAR-10", "cifar10")],
)
def test_names_as_people_write_them_lead_to_ours(root, typed, meant):
    with pytest.raises(UsageError, match=f"unknown dataset '{typed}'; did you mean '{meant}'"):
        sources.load(typed)


def test_zipped_idx_files_are_read_without_touching_the_folder(root):
    raw = idx(root, zipped=True)
    before = sorted(p.name for p in raw.iterdir())
    zipped = sources.load("mnist")
    assert sorted(p.name for p in raw.iterdir()) == before
    for file in list(raw.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    sources._load.cache_clear()
    assert sources.load("mnist").digest == zipped.digest


def test_a_truncated_zipped_file_is_named(root):
    file = idx(root, zipped=True) / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"damaged file .*train-images-idx3-ubyte.gz"):
        sources.load("mnist")


def deep(place):
    for kind in ("in", "out"):
        (place / "train" / "ant" / kind).mkdir()
        picture(0, 5).save(place / "train" / "ant" / kind / "0.png")


def alike(place):
    for label in ("ant", "bee", "cat"):
        for part in ("train", "test"):
            (place / part / label / "in").mkdir()
            for file in (place / part / label).glob("*.png"):
                file.rename(file.parent / "in" / file.name)


def sixteen(place):
    Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16)).save(
        place / "train" / "ant" / "0.png"
    )


def unreadable(place):
    for part in ("train", "test"):
        (place / part / "wasp").mkdir()
        picture(0, 5).save(place / part / "wasp" / "0.bmp")


def empty(place):
    for part in ("train", "test"):
        (place / part / "wasp").mkdir()


def stray(place):
    picture(0, 5).save(place / "train" / "stray.png")


def nested(place):
    for part in ("train", "test"):
        for index, label in enumerate(("ant", "bee", "cat")):
            old = place / part / label
            old.rename(place / part / f"x{label}")
            (place / part / f"y{index}").mkdir()
            (place / part / f"x{label}").rename(place / part / f"y{index}" / label)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (deep, r"class folders lie in '\.' and 'ant': put them side by side"),
        (alike, r"images lie in ant/in and in bee/in: put them directly into one folder per class"),
        (nested, "class folders lie in 'y0' and 'y1': put them side by side"),
        (sixteen, r"train/ant/0.png has more than 8 bits per channel"),
        (unreadable, r"wasp/0.bmp is neither PNG, JPEG nor WebP"),
        (empty, r"train/wasp holds no PNG, JPEG or WebP image"),
        (stray, r"train/stray.png lies outside of the class folders"),
    ],
)
def test_images_that_would_be_mislabelled_or_left_out_are_refused(root, spoil, message):
    spoil(folder(root))
    with pytest.raises(UsageError, match=message):
        sources.load("own")


@pytest.mark.parametrize(
    ("setting", "value"), [("crop", 8), ("flip", True), ("cutout", 20), ("resized_crop", 0.2)]
)
def test_each_augmentation_reaches_images_that_are_read_from_files(root, setting, value):
    train = large(root, 0).train
    plain, changed = (
        torch.cat(
            [
                x
                for x, _ in train.batches(
                    10, generator=torch.Generator().manual_seed(0), augment=recipe
                )
            ]
        )
        for recipe in (None, Recipe(epochs=1, lr=0.1, **{setting: value}))
    )
    assert not torch.equal(plain, changed)


def test_images_from_files_are_viewed_as_their_network_was_trained(root):
    folder(root, "big", train=10, test=5, **LARGE)
    settings = (
        ("bicubic", 0.9, 0.5),
        ("bilinear", 0.9, 0.5),
        ("bicubic", 0.7, 0.5),
        ("bicubic", 0.9, 0.4),
    )
    views = [
        {"interpolation": i, "crop_pct": c, "mean": (m,) * 3, "std": (0.5,) * 3}
        for i, c, m in settings
    ]
    batches = [next(splits.load("big", 48, view=view).test.batches(4))[0] for view in views]
    assert len({x.sum().item() for x in batches}) == 4
    assert torch.allclose(batches[0] + 0.2, batches[3], atol=1e-5)


def test_workers_leave_gpus_alone(root, monkeypatch):
    """A forked worker cannot initialise CUDA: with a GPU in the parent, seeding it there would end
    the run."""

    def touched(*args, **kwargs):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    train = large(root, 2).train
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("get_rng_state", "set_rng_state"):  # what fork_rng touches
        monkeypatch.setattr(torch.cuda, name, touched)
    assert len(list(train.batches(7, generator=torch.Generator().manual_seed(0)))) == 4


def test_a_damaged_image_is_named_in_one_line_from_a_worker_too(root):
    split = large(root, 1)
    file = next((root / "big" / "train").rglob("*.jpg"))
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(UsageError, match=r"^damaged file [^\n]*jpg: [^\n]*take it out$"):
        [list(part.batches(2)) for part in (split.train, split.val)]


def pixels(place, seed):
    generator = np.random.default_rng(seed)
    for file in sorted(place.rglob("*.png")):
        Image.fromarray(generator.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(
            file, compress_level=0
        )


@pytest.mark.parametrize("tars", [False, True])
def test_other_pixels_of_the_same_sizes_give_another_digest(root, tars):
    found = []
    for seed in (0, 1, 0):
        shutil.rmtree(root / "big", ignore_errors=True)
        place = folder(root, "big", size=(80, 80))
        pixels(place, seed)
        for file in [*place.rglob("*")]:
            os.utime(file, (1e9, 1e9))  # dates that a copy has kept must not hide it
        if tars:
            to_tars(place)
        sources._load.cache_clear()
        found.append(sources.load("big").digest)
    assert (found[0] == found[2], found[0] == found[1]) == (True, False)


def test_contents_are_read_once_as_long_as_files_stay(root, monkeypatch):
    place = folder(root, "big", size=(80, 80))
    digest, opened, real = sources.load("big").digest, [], sources.Path.open

    def counted(self, *args, **kwargs):
        opened.append(self.name)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(sources.Path, "open", counted)
    sources._load.cache_clear()
    assert sources.load("big").digest == digest
    assert not [name for name in opened if name.endswith(".png")]
    (place / "train" / "ant" / "0.png").write_bytes(
        (place / "train" / "ant" / "1.png").read_bytes()
    )
    opened.clear()
    sources._load.cache_clear()
    assert sources.load("big").digest != digest
    assert [name for name in opened if name.endswith(".png")] == ["0.png"]


def test_reading_contents_for_long_says_how_far_it_is(root, monkeypatch, capsys):
    folder(root, "big", size=(80, 80))
    monkeypatch.setattr(sources, "WAIT", 0)
    sources.load("big")
    assert "train for its digest" in capsys.readouterr().err


def pipe(place):
    os.mkfifo(place / "train" / "ant" / "9.png")


def door(place):
    at = os.getcwd()
    os.chdir(place / "train" / "ant")  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("9.png")
    finally:
        os.chdir(at)


def device(place):
    (place / "train" / "ant" / "9.png").symlink_to("/dev/zero")


def nowhere(place):
    (place / "train" / "ant" / "9.png").symlink_to("gone.png")


def itself(place):
    (place / "train" / "ant" / "9.png").symlink_to("9.png")


def loops(place):
    for name in "abcdef":
        (place / "train" / "ant" / name).symlink_to("..")


def round_about(place):
    (place / "train" / "ant" / "x").symlink_to("../bee")
    (place / "train" / "bee" / "y").symlink_to("../ant")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pipe, "ant/9.png is neither a file nor a folder"),
        (door, "ant/9.png is neither a file nor a folder"),
        (device, "ant/9.png is neither a file nor a folder"),
        (nowhere, "ant/9.png is neither a file nor a folder, or a link to nowhere"),
        (itself, "cannot read .*ant/9.png: Too many levels of symbolic links|ant/9.png is neither"),
        (loops, "train/ant/[a-f] is a link to a folder that it lies in"),
        (round_about, "is a link to a folder that it lies in"),
    ],
)
def test_what_would_wait_or_go_round_for_ever_is_named(root, spoil, message):
    spoil(folder(root))
    with pytest.raises(UsageError, match=message):
        sources.load("own")


def test_links_to_files_and_class_folders_elsewhere_are_followed(root):
    place = folder(root)
    plain = sources.load("own").digest
    (place / "train" / "ant").rename(root / "ants")
    (place / "train" / "ant").symlink_to(root / "ants")
    (root / "ants" / "0.png").rename(root / "first.png")
    (root / "ants" / "0.png").symlink_to(root / "first.png")
    sources._load.cache_clear()
    assert sources.load("own").digest == plain


def packed(place, change):
    """The data set as tars, the training one with a member added by ``change``."""
    to_tars(place)
    with tarfile.open(place / "train.tar", "a") as tar:
        change(tar)


def link(kind):
    def add(tar):
        one = tarfile.TarInfo("ant/9.png")
        one.type, one.linkname = kind, "ant/0.png"
        tar.addfile(one)

    return add


def file(name, content=b"x"):
    def add(tar):
        one = tarfile.TarInfo(name)
        one.size = len(content)
        tar.addfile(one, io.BytesIO(content))

    return add


def tar_of(change):
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode="w") as tar:
        change(tar)
    return blob.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link(tarfile.LNKTYPE), "train.tar:ant/9.png is a link to ant/0.png: pack the file itself"),
        (link(tarfile.SYMTYPE), "train.tar:ant/9.png is a link to ant/0.png: pack the file itself"),
        (link(tarfile.FIFOTYPE), "train.tar:ant/9.png is not a file"),
        (file("ant/9.bmp"), "train.tar:ant/9.bmp is neither PNG, JPEG nor WebP"),
        (
            file("dog.tar", tar_of(link(tarfile.LNKTYPE))),
            "train.tar:dog.tar:ant/9.png is a link to ant/0.png",
        ),
        (
            file("dog.tar", tar_of(file("cat.tar", tar_of(file("1.png"))))),
            "train.tar:dog.tar:cat.tar is a tar in a tar in a tar",
        ),
    ],
)
def test_what_would_be_left_out_of_a_tar_is_named(root, change, message):
    packed(folder(root), change)
    with pytest.raises(UsageError, match=message):
        sources.load("own")


@pytest.mark.parametrize("name", [".0.png.abc.part", "1.png.part", "readme.txt"])
def test_leftovers_are_no_images(root, name):
    place = folder(root)
    plain = sources.load("own").digest
    (place / "train" / "ant" / name).write_bytes(b"half")
    (place / "train.tar.part").write_bytes(b"half")
    sources._load.cache_clear()
    assert sources.load("own").digest == plain


def sixteen_bit_png(kind, channels, side=80):
    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    rows = b"".join(b"\0" + bytes(side * channels * 2) for _ in range(side))
    size = struct.pack(">IIBBBBB", side, side, 16, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sound_images_of_more_bits_are_not_called_damaged(root, kind, channels):
    place = folder(root, size=(80, 80))
    (place / "train" / "bee" / "1.png").write_bytes(sixteen_bit_png(kind, channels))
    with pytest.raises(
        UsageError,
        match=r"^\S*train/bee/1.png has more than 8 bits per channel: convert it to 8 bits$",
    ):
        sources.verify(sources.load("own"))


def test_large_images_are_read_and_absurd_ones_named(root, monkeypatch, recwarn):
    place = folder(root, size=(80, 80))
    Image.new("L", (15_000, 12_700)).save(place / "train" / "ant" / "0.png", compress_level=1)
    sources.verify(sources.load("own"))
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(sources, "PIXELS", 10**6)
    with pytest.raises(
        UsageError,
        match=r"train/ant/0.png has 15000 x 12700 pixels, more than 1,000,000: make it smaller",
    ):
        sources.load("own").train.open(0)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("CMYK", ".jpg"), ("P", ".png"), ("LA", ".png"), ("RGBA", ".webp"), ("1", ".png")],
)
def test_images_of_every_usual_mode_are_read(root, mode, suffix, recwarn):
    place = folder(root, size=(80, 80), suffix=suffix)
    options = {"transparency": bytes([0, 128, 255])} if mode == "P" else {}
    for one in place.rglob(f"*{suffix}"):
        Image.open(one).convert(mode).save(one, **options)
    source = sources.load("own")
    sources.verify(source)
    assert not recwarn.list
    assert source.train.open(0).mode == "RGB"


def test_paths_that_no_system_knows_are_refused(root, monkeypatch):
    with pytest.raises(UsageError, match="dataset name 'a"):
        sources.load("a" * 300)
    with pytest.raises(UsageError, match="dataset name"):
        sources.load("own\n")
    for folder_name in ("/" + "a" * 300, "~nosuchuser/data"):
        monkeypatch.setenv("WIDTHBENCH_DATA", folder_name)
        for name in ("own", "mnist", "cifar10", "imagenet"):
            with pytest.raises(
                UsageError,
                match=r"unknown dataset|does not exist|is not there|no home folder of "
                r"'~nosuchuser'",
            ):
                sources.load(name)
