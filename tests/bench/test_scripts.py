"""The measuring scripts of bench/ in small: that they run and say what they found."""

import subprocess
import sys
from pathlib import Path

import pytest

from widthbench.data import sources

ROOT = Path(__file__).parents[2]


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_pipeline():
    if any(sources.locate(name) is None for name in ("fashionmnist", "cifar10")):
        pytest.skip("fashionmnist and cifar10 are not in WIDTHBENCH_DATA")
    out = run("speed/pipeline.py", "--epochs", "0.02", "--seeds", "0", "--rounds", "1")
    assert "| cifar10 " in out


@pytest.mark.slow
def test_kills():
    assert "the same as of a run left alone" in run("studies/kills.py", "--kills", "2")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folders", "tars"])
def test_imagenet_generated(tmp_path, layout):
    out = run(
        "imagenet_generated.py",
        str(tmp_path),
        "--brief",
        "--layout",
        layout,
        "--only",
        "mobilenetv1",
        "resnet34.tv_in1k-nmf",
    )
    assert "suite imagenet: 18 of 56 cells done" in out


@pytest.mark.slow
def test_latency(tmp_path):
    out = run(
        "latency.py",
        "--models",
        "resnet20_cifar",
        "--device",
        "cpu",
        "--write",
        str(tmp_path / "latency"),
    )
    assert out.count("| resnet20_cifar ") == 8
    assert "speed-up, theory" in (tmp_path / "latency.md").read_text()
    assert (tmp_path / "latency.png").stat().st_size > 10_000
