"""Measurements: accuracy, loss, latency, peak memory. None of them decides anything."""

from __future__ import annotations

import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from widthbench import parallel

MIB = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Accuracy:
    """What a network scores on a set of samples.

    Attributes:
        top1: Share of samples whose highest logit is the label, in %.
        top5: Share whose label is among the five highest, in %; None below 100 classes.
        loss: Mean cross-entropy, in nats.
        samples: Number of samples; each counts once.
        hits: bool ``[samples]`` on the CPU, which samples were right, in their order; None where
            several processes share them.
    """

    top1: float
    top5: float | None
    loss: float
    samples: int
    hits: Tensor | None = field(default=None, compare=False, repr=False)


def fastest_layout(model: nn.Module) -> torch.memory_format:
    """The memory layout that a network runs fastest in: channels-last where it has convolutions of
    images.
    """
    images = any(isinstance(m, nn.Conv2d) for m in model.modules())
    volumes = any(
        p.dim() == 5 for p in model.parameters()
    )  # that layout is for tensors of four dimensions only
    return torch.channels_last if images and not volumes else torch.contiguous_format


def laid_out(x: Tensor, model: nn.Module) -> Tensor:
    """Images in the memory layout that a network runs fastest in; anything else as it is."""
    return x.contiguous(memory_format=fastest_layout(model)) if x.dim() == 4 else x


def accuracy(model: nn.Module, samples: Any, *, batch_size: int = 512) -> Accuracy:
    """Score a network in eval mode and in its fastest memory layout; both are put back afterwards.

    Args:
        model: Gives logits ``[B, K]``.
        samples: Anything with ``batches(size)``; in several processes (``parallel``) each takes its
            part of ``parted`` ones.
        batch_size: Samples per forward pass; partial batches are weighted by their size.
    """
    training, layout = model.training, fastest_layout(model)
    strided = any(p.dim() == 4 and not p.is_contiguous() for p in model.parameters())
    before = torch.channels_last if strided else torch.contiguous_format
    model.eval().to(memory_format=layout)
    total = classes = 0
    sums = torch.zeros(3, dtype=torch.float64)  # of losses, right ones, right ones among five
    hits: list[Tensor] = []
    shared = (
        {"part": parallel.part}
        if parallel.world() > 1 and getattr(samples, "parted", False)
        else {}
    )
    size = batch_size * parallel.world() if shared else batch_size
    left = len(samples) if shared else 0
    with torch.no_grad():
        for x, y in samples.batches(size, **shared):
            whole = min(size, left) if shared else len(y)
            left -= whole
            if not len(y):
                continue
            with parallel.sharing(whole, len(y)):
                logits = model(x.contiguous(memory_format=layout) if x.dim() == 4 else x).float()
            classes = logits.shape[1]
            sums = sums.to(logits.device)  # nobody waits for it there
            hit = logits.argmax(1) == y
            hits.append(hit)
            sums[0] += F.cross_entropy(logits.double(), y, reduction="sum")
            sums[1] += hit.sum()
            if classes >= 100:
                sums[2] += (logits.topk(5, dim=1).indices == y[:, None]).any(1).sum()
            total += len(y)
    loss, right, right5 = sums.tolist()
    if shared:
        parts = parallel.gather((right, right5, loss, total, classes))
        right, right5, loss, total = (sum(f[i] for f in parts) for i in range(4))
        classes = max(f[4] for f in parts)
    model.train(training).to(memory_format=before)
    top5 = 100 * right5 / total if classes >= 100 else None
    each = None if shared else torch.cat(hits).cpu()
    return Accuracy(100 * right / total, top5, loss / total, total, each)


def replayed(work: Callable[[], object]) -> Callable[[], object]:
    """Work on the GPU as the replay of a CUDA graph, so that the card does not wait for the host to
    launch it.

    Args:
        work: Takes and gives no values; what it cannot be recorded for (it looks at values on the
            host) makes a warning.

    Returns:
        The replay; ``work`` itself where it cannot be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their algorithms
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        warnings.warn(
            f"timed as it is, not replayed: it cannot be recorded ({str(error).splitlines()[0]})",
            stacklevel=2,
        )
        return work

    def replay(
        keep: Callable[[], object] = work,
    ) -> None:  # what the work holds lies where the recording reads it
        graph.replay()

    return replay


def latency_ms(
    model: nn.Module, x: Tensor, *, rounds: int = 30, warm_up: int = 5, limit_s: float = 3.0
) -> float:
    """Median time of one forward pass of a batch, in ms; on a GPU of its replay as a CUDA graph.

    Args:
        model: In eval mode.
        x: ``[B, ...]``.
        rounds: Timed passes, at least 5.
        warm_up: Passes before the clock starts.
        limit_s: Stop timing after this many seconds, once five passes are in.
    """
    times: list[float] = []
    cuda = x.device.type == "cuda"
    with torch.no_grad():
        run: Callable[[], object] = partial(model, x)
        if cuda:
            run = replayed(run)
        for _ in range(warm_up):
            run()
        begin = time.perf_counter()
        while len(times) < rounds and (len(times) < 5 or time.perf_counter() - begin < limit_s):
            if cuda:
                start, end = (
                    torch.cuda.Event(enable_timing=True),
                    torch.cuda.Event(enable_timing=True),
                )
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                at = time.perf_counter()
                run()
                times.append(1000 * (time.perf_counter() - at))
    return statistics.median(times)


def peak_memory_mib(model: nn.Module, x: Tensor) -> float:
    """Peak memory of one forward pass without gradients, weights and input included, in MiB.

    On CUDA what the allocator reports, less what other tensors hold; elsewhere the largest sum of
    live tensor storage seen between operations, which leaves out scratch space inside an operation
    and is the same on every machine.

    Args:
        model: In eval mode.
        x: ``[B, ...]``.
    """
    if x.device.type == "cuda":
        own = {t.untyped_storage() for t in (*model.parameters(), *model.buffers(), x)}
        with torch.no_grad():
            model(x)
            torch.cuda.reset_peak_memory_stats(x.device)
            others = torch.cuda.memory_allocated(x.device) - sum(s.nbytes() for s in own)
            model(x)
        return (torch.cuda.max_memory_allocated(x.device) - others) / MIB
    with torch.no_grad(), _LiveStorage() as live:
        for t in (*model.parameters(), *model.buffers(), x):
            live.see(t)
        model(x)
    return live.peak / MIB


class Meter:
    """Counts the MACs that pass through a network and its copies, forward and backward, and the
    seconds, in a ``with`` block.

    Whole passes of the network count, at the cost of its original shape; a backward pass counts as
    two forward passes. What else is computed is told by ``add``.

    Args:
        model: The network.
        macs: Its MACs per sample.

    Attributes:
        passes: Samples that passed forward; of what ``add`` tells, as many as the network at its
            original shape could have taken.
    """

    def __init__(self, model: nn.Module, macs: int) -> None:
        self.model, self.macs, self.whole = model, macs, macs
        self.forward_macs = self.backward_macs = 0
        self.passes = 0.0
        self.seconds = self._earlier = 0.0

    def __enter__(self) -> Meter:
        self._handle = self.model.register_forward_hook(self._count)
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self.elapsed
        self.leave(self.model)

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self._earlier + time.perf_counter() - self._begin

    def add(
        self,
        *,
        forward_macs: int = 0,
        backward_macs: int = 0,
        seconds: float = 0.0,
        passes: float | None = None,
    ) -> None:
        """Count what is not a pass of the network, or was done by an earlier run, which says how
        many passes it was.
        """
        self.passes += forward_macs / max(1, self.whole) if passes is None else passes
        self.forward_macs += forward_macs
        self.backward_macs += backward_macs
        self._earlier += seconds

    def uncounted(self, work: Callable[[], T]) -> T:
        """What a piece of work gives, its passes left out of the count."""
        before = self.forward_macs, self.backward_macs, self.passes
        result = work()
        self.forward_macs, self.backward_macs, self.passes = before
        return result

    @contextmanager
    def costing(self, macs: int) -> Iterator[None]:
        """Count passes at other MACs per sample in the block: those of a resized copy."""
        before, self.macs = self.macs, macs
        try:
            yield
        finally:
            self.macs = before

    def leave(self, model: nn.Module) -> None:
        """Take the counting hook off the network, or off a copy of it that was made inside the
        block.
        """
        model._forward_hooks.pop(self._handle.id, None)

    def __deepcopy__(self, memo: Any) -> Meter:
        return self

    def _count(self, module: nn.Module, args: Any, output: Any) -> None:
        samples = parallel.billed(args[0].shape[0])
        done = self.macs * samples
        self.forward_macs += done
        self.passes += samples
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: self._back(2 * done))

    def _back(self, macs: int) -> None:
        self.backward_macs += macs


class _LiveStorage(TorchDispatchMode):
    """Adds up the storage of all tensors that operations return, for as long as each is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or storage.nbytes() == 0:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result
