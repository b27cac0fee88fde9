"""What benchmarks time, in a process of its own that answers one request after the other.

    python bench/speed/measuring.py --list                                  what there is
    python bench/speed/measuring.py "inference resnet20_cifar batch=16"     one of them, as JSON

A client (``Worker``) starts this file with any installation of widthbench on its path, sends items,
and gets milliseconds or MiB back: asv's benchmarks and ``widthbench regress`` both do. torch is
imported there alone, so that asv's many short processes start at once. On CUDA, times are those of
events after a warm-up, and memory is what the allocator says; on a CPU, ``perf_counter`` and the
high-water mark of the resident set above what was held before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MODELS = {  # pixels, channels, classes
    "lenet5": (28, 1, 10),
    "test_resnet": (32, 3, 10),
    "test_vit": (32, 3, 10),
    "resnet20_cifar": (32, 3, 10),
    "vgg16_cifar": (32, 3, 10),
    "mobilenetv2_100_cifar": (32, 3, 10),
    "vit_tiny_patch16_224": (224, 3, 1000),
    "resnet50": (224, 3, 1000),
}
TECHNIQUES: dict[
    str, dict[str, Any]
] = {  # with parameters that keep the work small; a test compares them with the registry
    "autoprune": {"epochs": 1},
    "autoslim": {"epochs": 1, "steps": 5, "samples": 256, "calibration": 64},
    "l1-norm": {},
    "neuron-merging": {},
    "neuron-removal": {"samples": 256},
    "nmf": {"iterations": 5},
    "random-channels": {},
    "splitting": {"epochs": 1, "rounds": 2, "samples": 64, "final_epochs": 1},
    "torch-pruning:bn-scale": {},
    "torch-pruning:fpgm": {},
    "torch-pruning:hessian": {"samples": 64},
    "torch-pruning:lamp": {},
    "torch-pruning:magnitude": {},
    "torch-pruning:taylor": {"samples": 64},
}
KINDS = ("training step", "inference", "discovery", "certification", "resize", "technique")
SAMPLES = 256  # random images that techniques look at
STEPS = {
    "cpu": (2, 10),
    "cuda": (22, 122),
}  # of two trainings; the difference of their times is that of steps alone
MIB = 2**20
FRUGAL = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}  # glibc hands freed tensors back at once


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing that is measured.

    Attributes:
        kind: One of ``KINDS``.
        model: One of ``MODELS``.
        technique: One of ``TECHNIQUES``, where the kind is "technique".
        budget: Such as "macs:0.5": what the technique, or L1 in "inference", leaves; "" for the
            whole network.
        device: "cpu" or "cuda".
        batch: Images in a training step or a forward pass.
    """

    kind: str
    model: str
    technique: str = ""
    budget: str = ""
    device: str = "cpu"
    batch: int = 1

    def __str__(self) -> str:
        words = [self.kind, self.technique, self.model, self.budget]
        more = [f"batch={self.batch}"] if self.kind in ("training step", "inference") else []
        return " ".join(
            w for w in (*words, *more, "" if self.device == "cpu" else self.device) if w
        )


def items(device: str = "cpu") -> list[Item]:
    """Everything that ``widthbench regress`` compares: each technique, and each operation on a
    small network.
    """
    found = [
        Item("training step", "resnet20_cifar", device=device, batch=64),
        Item("inference", "resnet20_cifar", device=device, batch=64),
        Item("inference", "resnet20_cifar", budget="macs:0.5", device=device, batch=64),
        Item("discovery", "resnet20_cifar", device=device),
        Item("certification", "test_resnet", device=device),
        Item("resize", "resnet20_cifar", device=device),
    ]
    for technique in TECHNIQUES:
        model = (
            "test_resnet" if technique == "torch-pruning:bn-scale" else "lenet5"
        )  # the former has batch norms
        found.append(
            Item("technique", model, technique=technique, budget="macs:0.5", device=device)
        )
    return found


# the client


class Worker:
    """A process that measures, with an installation of widthbench of its own.

    Args:
        path: Folders that come first where modules are looked for.
        frugal: Let the process hand freed memory back to the system at once, for memory's sake.
        environment: Variables that it gets beside this process's.
    """

    def __init__(
        self,
        path: Sequence[str | Path] = (),
        *,
        frugal: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        before = os.environ.get("PYTHONPATH")
        self._environment = {
            **os.environ,
            **(environment or {}),
            **(FRUGAL if frugal else {}),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PYTHONPATH": os.pathsep.join([*map(str, path), *([before] if before else [])]),
            "PYTHONSAFEPATH": "1",  # this folder's own modules are no modules of theirs
            "WIDTHBENCH_SITE": str(path[0]) if path else "",
        }
        self._process: subprocess.Popen[str] | None = None

    def ask(self, item: Item, timeout: float = 300, **request: Any) -> dict[str, Any]:
        """What the process says: numbers, or "skip" or "error" with the reason. One that dies or
        hangs is an error.

        Args:
            item: What is measured.
            timeout: Seconds after which the process is killed; the next request starts another.
            **request: ``rounds`` and ``least`` (seconds of a timed sample), or ``memory=True``.
        """
        return self._sent({"item": dataclasses.asdict(item), **request}, timeout)

    def where(self) -> str:
        """The file of the widthbench that it measures; "" if there is none."""
        return str(self._sent({"where": True}, 300).get("where", ""))

    def _sent(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.close()
            return {"error": f"it took longer than {timeout:g} s"}
        if line is None:
            code = process.wait()
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
            self.close()
            return {
                "error": f"the process ended with exit code {code}{': ' + last[0] if last else ''}"
            }
        found: dict[str, Any] = json.loads(line)
        return found

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=self._environment,
            )
            self._lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(
                target=_reading, args=(self._process, self._lines), daemon=True
            ).start()
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._log.close()
        self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reading(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


# for asv


def quick() -> bool:
    """Whether asv was asked to run each benchmark only once."""
    if os.environ.get("WIDTHBENCH_QUICK"):
        return True
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
        return b"--quick" in words or b"-q" in words
    return False


def fewer(values: list[Any]) -> list[Any]:
    """All of some parameters; the first one where ``bench/speed/track.py --quick`` asks: asv starts
    a process for each combination.
    """
    return values[:1] if os.environ.get("WIDTHBENCH_QUICK") else values


Measured = dict[str, dict[str, Any]]


def measured(wanted: Sequence[Item]) -> Measured:
    """Milliseconds and MiB of items: time in one process, memory in another that hands what is
    freed back at once.

    In a hurry (``quick``) one call gives both, and the times are worth nothing.
    """
    found: Measured = {}
    with Worker() as timing, Worker(frugal=True) as remembering:
        for item in wanted:
            if item.device != os.environ.get("WIDTHBENCH_ASV_DEVICE", item.device):
                found[str(item)] = {"skip": f"{item.device} was not asked for"}
                continue
            answer = remembering.ask(item, memory=True, warm=not quick())
            if "ms" in answer and not quick():
                answer = answer | timing.ask(item, rounds=7, least=0.05)
            if "ms" in answer:
                answer["ms"] = statistics.median(answer["ms"])
            found[str(item)] = answer
    return found


def number(found: Measured, item: Item, name: str) -> float:
    """One number of an item.

    Raises:
        RuntimeError: If it could not be measured, with the reason.
    """
    answer = found[str(item)]
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return float(answer[name])


def applicable(found: Measured, item: Item) -> None:
    """For ``setup``: what the machine, the installation or the technique does not have is no
    benchmark.

    Raises:
        NotImplementedError: With the reason.
    """
    if reason := found.get(str(item), {}).get("skip"):
        raise NotImplementedError(reason)


# the process that measures


class NotHereError(Exception):
    """No such device, package or combination."""


def _from(name: str, *homes: str) -> Any:
    """A name from the first of some modules that is there: an earlier commit had other rooms."""
    for home in homes:
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(f"widthbench.{home}".rstrip(".")), name)
    raise ImportError(f"{name} is in none of {', '.join(homes)}")


@dataclasses.dataclass
class Timed:
    """What is timed.

    Attributes:
        call: What is called.
        times: How many times it holds the item.
        less: What it holds besides, whose time is taken off; None if nothing.
    """

    call: Callable[[], Any]
    times: int = 1
    less: Callable[[], Any] | None = None


def prepared(item: Item) -> Timed:
    """What is timed.

    Raises:
        NotHereError: With the reason.
    """
    import torch

    if item.device == "cuda" and not torch.cuda.is_available():
        raise NotHereError("torch finds no GPU")
    try:
        from widthbench import api
        from widthbench.errors import UsageError
        from widthbench.width import certify, discover, find_groups, resize

        models = importlib.import_module(_from("__name__", "networks.models", "models"))
        registry = importlib.import_module(_from("__name__", "technique.registry", "registry"))
        ImageSamples = _from("ImageSamples", "data.splits", "data")
        fastest_layout = _from("fastest_layout", "training.measuring", "measure")
        fit, Recipe = _from("fit", "training.loop", "training"), _from("Recipe", "recipe")
    except ImportError as error:
        raise RuntimeError(
            f"this widthbench cannot be measured by these benchmarks: {error}"
        ) from error
    size, channels, classes = MODELS[item.model]
    torch.manual_seed(0)
    model = (
        models.create(item.model, classes=classes, channels=channels, size=size)
        .to(item.device)
        .eval()
    )
    x = torch.randn(1, channels, size, size, device=item.device)

    def images(count: int) -> tuple[Any, Any]:
        return torch.randn(count, channels, size, size, device=item.device), torch.randint(
            classes, (count,), device=item.device
        )

    if item.kind == "training step":
        short, long = STEPS[item.device]
        shape = (item.batch * long, channels, size, size)
        pixels = torch.randint(256, shape, dtype=torch.uint8, device=item.device)
        labels = torch.zeros(
            len(pixels), dtype=torch.long, device=item.device
        )  # no chance to end at
        mean = (0.5,) * channels
        train = ImageSamples(pixels, labels, mean, mean, torch.device(item.device))

        def steps(count: int) -> Callable[[], Any]:
            few = dataclasses.replace(
                train, images=pixels[: count * item.batch], labels=labels[: count * item.batch]
            )
            recipe = Recipe(epochs=1, batch_size=item.batch, lr=1e-6, amp=item.device == "cuda")
            return lambda: fit(model, few, recipe, macs=1)

        return Timed(steps(long), long - short, less=steps(short))
    if item.kind == "inference":
        if item.budget:
            model = api.apply("l1-norm", model, budget=item.budget, example_input=x)
        layout = fastest_layout(model)
        model, batch = (
            model.to(memory_format=layout),
            images(item.batch)[0].contiguous(memory_format=layout),
        )

        def passed() -> None:
            with torch.no_grad():
                model(batch)

        return Timed(passed)
    if item.kind == "discovery":
        return Timed(lambda: discover(model, x))
    if item.kind == "certification":
        found = discover(model, x)
        return Timed(lambda: certify(model, found, x, cache=False))
    if item.kind == "resize":
        plan = api.outcome(
            "l1-norm", model, budget="channels:0.5", example_input=x, scope="all"
        ).plan
        groups = find_groups(model, x)
        return Timed(lambda: resize(model, groups, plan))
    if item.technique not in registry.names():
        raise NotHereError(f"this widthbench has no technique '{item.technique}'")
    data = images(SAMPLES)

    def applied() -> None:
        try:
            api.outcome(
                item.technique,
                model,
                budget=item.budget,
                example_input=x,
                data=data,
                **TECHNIQUES[item.technique],
            )
        except UsageError as error:
            raise NotHereError(str(error)) from error

    return Timed(applied)


def _status(field: str) -> float:
    """A line of this process's memory, in MiB; NaN where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / MIB


def memory(call: Callable[[], Any], device: str, *, warm: bool = True) -> dict[str, Any]:
    """MiB held before a second call (the first, if not ``warm``), and at its peak above that; and
    its ms, of one sample.
    """
    if warm:
        call()
    gc.collect()
    begin = time.perf_counter()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / MIB
        call()
        torch.cuda.synchronize()
        took = 1000 * (time.perf_counter() - begin)
        return {"held": held, "peak": torch.cuda.max_memory_allocated() / MIB - held, "ms": [took]}
    held = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    except OSError:  # then it is that of all that the process ever did
        held = float("nan")
    begin = time.perf_counter()
    call()
    took = 1000 * (time.perf_counter() - begin)
    above = _status("VmHWM") - held
    return {"held": held, "peak": above if above != above else max(0.0, above), "ms": [took]}


def _timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, until the device has done it."""
    begin = time.perf_counter()
    call()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - begin


def milliseconds(call: Callable[[], Any], device: str, rounds: int, least: float) -> list[float]:
    """Times of a call after a warm-up: one per round, each the mean of as many calls as ``least``
    seconds hold.
    """
    took = _timed(call, device)
    if took < least:  # the first call may be slow
        took = _timed(call, device)
    count = max(1, min(1000, round(least / max(took, 1e-6))))
    found = []
    for _ in range(rounds):
        if device == "cuda":
            import torch

            some = []
            for _ in range(count):  # one call at a time: latency, not how much fits into a queue
                start, end = (
                    torch.cuda.Event(enable_timing=True),
                    torch.cuda.Event(enable_timing=True),
                )
                torch.cuda.synchronize()
                start.record()
                call()
                end.record()
                end.synchronize()
                some.append(start.elapsed_time(end))
            found.append(statistics.fmean(some))
        else:
            begin = time.perf_counter()
            for _ in range(count):
                call()
            found.append(1000 * (time.perf_counter() - begin) / count)
    return found


_last: dict[Item, Timed] = {}


def answered(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    if "where" in request:
        import widthbench

        return {"where": widthbench.__file__}
    item = Item(**request["item"])
    try:
        if item not in _last:
            _last.clear()
            gc.collect()
            _last[item] = prepared(item)
        timed = _last[item]
        if request.get("memory"):
            found = memory(timed.call, item.device, warm=request.get("warm", True))
        else:
            found = {
                "ms": milliseconds(
                    timed.call, item.device, request.get("rounds", 1), request.get("least", 0.0)
                )
            }
        if timed.less is not None:
            rounds = len(found["ms"])
            less = milliseconds(timed.less, item.device, rounds, request.get("least", 0.0))
            found["ms"] = [max(0.0, a - b) for a, b in zip(found["ms"], less, strict=True)]
        if strays := strangers():
            return {"error": f"it ran modules of another widthbench: {', '.join(strays[:3])}"}
        return found | {"ms": [t / timed.times for t in found["ms"]]}
    except NotHereError as error:
        return {"skip": str(error)}
    except Exception:
        return {"error": traceback.format_exc()}


def strangers() -> list[str]:
    """Modules of widthbench that do not come from the installation that is to be measured."""
    site = os.environ.get("WIDTHBENCH_SITE")
    if not site:
        return []
    own = os.path.realpath(site) + os.sep
    loaded = [
        m
        for n, m in list(sys.modules.items())
        if n.partition(".")[0] == "widthbench" and getattr(m, "__file__", None)
    ]
    return [m.__name__ for m in loaded if not os.path.realpath(str(m.__file__)).startswith(own)]


def serve() -> None:
    """Answer requests, a line of JSON each; what libraries print goes to the error output."""
    if os.environ.get(
        "WIDTHBENCH_SITE"
    ):  # an editable installation would lend what the measured one lacks
        sys.meta_path[:] = [
            f
            for f in sys.meta_path
            if not getattr(f, "__module__", "").startswith("__editable___widthbench")
        ]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for line in sys.stdin:
        answers.write(json.dumps(answered(json.loads(line))) + "\n")
        answers.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("item", nargs="*", help="names as --list prints them, or parts of them")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    for item in items(options.device):
        if options.list:
            print(item)
        elif any(part in str(item) for part in options.item):
            print(item, json.dumps(measured([item])[str(item)]), flush=True)


if __name__ == "__main__":
    main()
