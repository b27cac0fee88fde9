"""Brute force: the loss of a network with each of its channels closed in turn, for many channels at
once.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from loky import BrokenProcessPool, ProcessPoolExecutor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from widthbench.errors import UsageError
from widthbench.training.measuring import MIB, Meter
from widthbench.width.cost import count_macs
from widthbench.width.gates import gated
from widthbench.width.groups import Groups
from widthbench.width.layers import axis_length, kind_of
from widthbench.width.resize import detached

Criterion = Callable[[Tensor, Tensor], Tensor]
"""``criterion(logits [B, K], y [B]) -> [B]``, the loss of each sample."""

Way = Literal["update", "gates", "loop"]
LOOP_BATCH = 256
LEAST_BATCH = 16  # images at once where not all candidates fit beside each other
LOOP_WINS = 1.25  # how much faster the loop must be in the trial: near ties go to the batched way


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample, in nats: ``[B, K]`` and ``[B]`` to ``[B]``.

    As ``F.cross_entropy``, three times as fast for ten classes on a CPU; taking the label's logit
    off first keeps the losses of confident samples as precise.
    """
    return (logits - logits.gather(1, y[:, None])).logsumexp(dim=1)


@dataclass(frozen=True)
class Sample:
    """Labelled inputs that a loss is averaged over.

    Attributes:
        x: ``[S, ...]``.
        y: ``[S]``, or whatever the criterion compares logits with.
        criterion: The loss of each sample.
    """

    x: Tensor
    y: Tensor
    criterion: Criterion = cross_entropy

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``(x, y)`` in parts of at most ``size``, in order."""
        return zip(self.x.split(size), self.y.split(size), strict=True)

    def to(self, device: torch.device) -> Sample:
        """The same on another device."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))


def replica(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors, counts no cost, overwrites no activation, and runs attention
    by plain products.

    Plain products have batching rules; fused attention has none.
    """
    memo = detached(model) | {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    module: Any
    for module in twin.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Meter):
                module._forward_hooks.pop(key)
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    return twin


def channel_positions(groups: Groups, name: str, layer: str) -> Tensor:
    """Where a consumer reads each channel of a group: long ``[N, copies · repeat]`` positions along
    its input axis.
    """
    rows, offset = [], 0
    for s in groups.axes[layer, "in"]:
        if name in (s.group, s.outer):
            rows.append(torch.arange(offset, offset + s.size).view(groups[name].channels, -1))
        offset += s.size
    return torch.cat(rows, dim=1)


def footprint(model: nn.Module, x: Tensor) -> list[tuple[str, int]]:
    """(layer, bytes of its input and output for one sample) of every layer without children, in the
    order in which they run.
    """
    seen: list[tuple[str, int]] = []
    handles = []
    for name, module in model.named_modules():
        if not list(module.children()):

            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                tensors = [t for t in (*args, output) if isinstance(t, Tensor)]
                seen.append((name, sum(t.numel() * t.element_size() for t in tensors)))

            handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Ablation:
    """The loss with channels closed one at a time (brute force), over a fixed sample.

    What lies before the closed channel's consumers is computed once for all candidates; what no
    gate can reach, once and for all, where it fits into memory. Where the consumers are linear
    layers or ungrouped convolutions, closing channel c subtracts what they make of it, ``W x - W[:,
    c] x_c``, a rank-1 update (way "update"); elsewhere the consumers run once per candidate, with
    gates (way "gates"). Both batch the candidates by ``torch.func.vmap``. A plain loop over
    candidates (way "loop") is taken where it is faster on the first batch, or, with a warning,
    where some operation has no batching rule; with linear consumers the update always wins and is
    taken without a trial. Losses by different ways agree to about 1e-7, so that a way chosen by the
    clock can change a last bit, and the order of near ties.

    Args:
        model: In eval mode; it is left alone.
        groups: Its channel groups.
        sample: What the loss is averaged over; on the model's device.
        memory_mib: Limit on the activations of a batch of candidates, in MiB, and once more on what
            is kept of all samples; None: 64 on a CPU (more does not fit its caches), a quarter of
            what is free on a GPU. One candidate on 16 samples runs whatever that takes.
        way: Force one way; "update" and "gates" raise where they do not apply.
        processes: Share the sample among this process and ``processes - 1`` workers, each on its
            own GPU where there are GPUs, else with as many threads as this process has now.

    Attributes:
        forward_macs: Multiply-accumulates done so far, rank-1 updates included and the trial left
            out.
        backward_macs: 0.
    """

    backward_macs = 0

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        sample: Sample,
        *,
        memory_mib: float | None = None,
        way: Way | None = None,
        processes: int = 1,
    ) -> None:
        self.groups, self.sample, self.way = groups, sample, way
        self.model = replica(model).eval()
        self.forward_macs = 0
        self._limit = _memory(sample.x.device) if memory_mib is None else memory_mib * MIB
        self._footprint = footprint(self.model, sample.x)
        self._rows = slice(0, 1)
        self._chosen: dict[str, Way] = {}
        self._costs: dict[tuple[str, Way], tuple[int, int]] = {}
        self._positions: dict[tuple[str, str], Tensor] = {}
        torch.empty(
            31 * MIB, dtype=torch.uint8
        )  # glibc, once it has freed this much at once, keeps freed memory for the next batch
        processes = min(processes, len(sample))
        self._mine = -(-len(sample) // processes)  # the first samples are this process's
        self._workers = _workers(
            self._mine, self.model, groups, sample, {"memory_mib": memory_mib, "way": way}
        )
        self._remember()
        self._whole = count_macs(self.model, sample.x[:1])

    def _remember(self) -> None:
        """Compute the convolutions and linear layers that no gate can reach, keep what they give,
        and give that from here on.
        """
        consumers = {c for g in self.groups.values() for c in (*g.consumers, *g.keys)}
        behind = self.groups.behind

        def reached(layer: str, seen: set[str]) -> bool:
            if layer in seen:
                return False
            seen.add(layer)
            return (
                layer not in behind
                or layer in consumers
                or any(reached(b, seen) for b in behind[layer])
            )

        times = Counter(layer for layer, _ in self._footprint)
        kinds = {n: kind_of(m) for n, m in self.model.named_modules()}
        front = [
            n
            for n in times
            if times[n] == 1
            and kinds[n] in ("conv", "depthwise", "linear")
            and not reached(n, set())
        ]
        size = sum(dict(self._footprint)[n] for n in front) * len(self.sample)
        if not front or size > self._limit:
            return
        kept: dict[str, list[Tensor]] = {n: [] for n in front}
        few = min(3, len(self.sample))  # of which the last ones are to be told apart from the first
        with ExitStack() as stack, torch.no_grad():
            expected = self.model(self.sample.x[few // 2 : few])
            for name in front:
                handle = self.model.get_submodule(name).register_forward_hook(
                    partial(_keep, kept[name])
                )
                stack.callback(handle.remove)
            for x, _ in self.sample.batches(LOOP_BATCH):
                self.model(x)
        self.forward_macs += count_macs(self.model, self.sample.x[:1]) * len(self.sample)
        sizes = [len(y) for _, y in self.sample.batches(LOOP_BATCH)]
        if any([len(p) for p in parts] != sizes for parts in kept.values()):
            return  # the samples do not come first: patches or windows do
        for name, parts in kept.items():
            self.model.get_submodule(name).forward = partial(self._recall, torch.cat(parts))
        self._rows = slice(few // 2, few)
        with torch.no_grad():
            again = self.model(self.sample.x[self._rows])
        self._rows = slice(0, 1)
        if not torch.allclose(again, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
            for name in front:
                del self.model.get_submodule(name).forward

    def _recall(self, values: Tensor, *_: Any) -> Tensor:
        return values[self._rows].clone()  # what follows may write into it

    def _batches(self, size: int, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The (first) samples in parts; what is remembered is that of the part at hand."""
        some = (
            self.sample
            if count is None
            else replace(self.sample, x=self.sample.x[:count], y=self.sample.y[:count])
        )
        for i, batch in enumerate(some.batches(size)):
            self._rows = slice(i * size, i * size + len(batch[0]))
            yield batch
        self._rows = slice(0, 1)

    def __enter__(self) -> Ablation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes, if there are any."""
        for worker in self._workers:
            worker.shutdown(kill_workers=True)

    def loss(self, gates: Mapping[str, Tensor]) -> float:
        """The mean loss with the given gates.

        Args:
            gates: ``[N]`` per group; groups that are not named are open.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.sample.x.device)
        with torch.no_grad(), gated(self.model, self.groups, gates) as net:
            for x, y in self._batches(LOOP_BATCH):
                total += self.sample.criterion(net(x), y).sum(dtype=torch.float64)
        self.forward_macs += self._whole * len(self.sample)
        return float(total) / len(self.sample)

    def losses(
        self,
        gates: Mapping[str, Tensor],
        candidates: Mapping[str, Tensor],
        value: float = 0.0,
        done: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Tensor]:
        """The mean loss with each candidate's gate at a value, all others as given.

        Args:
            gates: ``[N]`` of ones and zeros per group; groups that are not named are open.
            candidates: long ``[C]`` open channels per group.
            value: Of the candidate's gate; 0 removes it.
            done: Told the number of candidates after each part of the work.

        Returns:
            float64 ``[C]`` on the CPU per group.

        Raises:
            UsageError: If a candidate is closed already or is no channel of its group, or worker
                processes die.
        """
        for name, index in candidates.items():
            channels = self.groups[name].channels
            if len(index) and (int(index.min()) < 0 or int(index.max()) >= channels):
                raise UsageError(
                    f"channel group '{name}': candidates must lie in 0..{channels - 1}"
                )
            if name in gates and bool((gates[name].cpu()[index.cpu()] != 1).any()):
                raise UsageError(f"channel group '{name}': a candidate's gate must be 1")
        shut = {n: g.cpu().tolist() for n, g in gates.items()}
        some = {n: index.cpu() for n, index in candidates.items() if len(index)}
        losses = {
            n: torch.zeros(len(index), dtype=torch.float64) for n, index in candidates.items()
        }
        try:
            jobs = {
                n: [w.submit(_work, shut, n, index.tolist(), value) for w in self._workers]
                for n, index in some.items()
            }
            for name, index in some.items():
                losses[name] += self._group(name, index, gates, value)
                for job in jobs[name]:
                    sums, macs = job.result()
                    losses[name] += torch.tensor(sums, dtype=torch.float64)
                    self.forward_macs += macs
                losses[name] /= len(self.sample)
                done(len(index))
        except BrokenProcessPool as error:
            raise UsageError(
                "the worker processes of processes > 1 died: is there memory for one network and"
                " sample in each?"
            ) from error
        return losses

    def _group(self, name: str, index: Tensor, gates: Mapping[str, Tensor], value: float) -> Tensor:
        """Losses summed over this process's samples, float64 ``[C]`` on the CPU, for the candidates
        ``index [C]``.
        """
        chosen = self._chosen.get(name)
        if chosen is None:
            chosen = self._chosen[name] = self._choose(name, index, gates, value)
        parts, size = (
            self._parts(name, len(index)) if chosen != "loop" else (len(index), LOOP_BATCH)
        )
        index = index.to(self.sample.x.device)
        total = torch.zeros(len(index), dtype=torch.float64, device=index.device)
        for at in range(0, len(index), parts):
            for x, y in self._batches(size, self._mine):
                total[at : at + parts] += self._batch(
                    chosen, name, index[at : at + parts], gates, value, x, y
                )
        once, each = self._cost(name, chosen)
        self.forward_macs += self._mine * (once * -(-len(index) // parts) + each * len(index))
        return total.cpu()

    def _choose(self, name: str, index: Tensor, gates: Mapping[str, Tensor], value: float) -> Way:
        """The faster of the batched way and the loop, on the first batch."""
        batched: Way = "update" if self._updatable(name) else "gates"
        if self.way == "update" and batched != "update":
            what = (
                "is multiplied with keys"
                if self.groups[name].keys
                else "has grouped convolutions among its consumers"
            )
            raise UsageError(f"channel group '{name}' {what}: way='update' does not apply")
        if self.way is not None:
            return self.way
        parts, size = self._parts(name, len(index))
        index = index[:parts].to(self.sample.x.device)
        few = index[: max(1, min(4, len(index)))]
        x, y = self.sample.x[:size], self.sample.y[:size]
        self._rows = slice(0, len(x))
        try:
            self._batch(batched, name, index, gates, value, x, y)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"memory_mib = {self._limit / MIB:.0f} is more than the device has free: lower it"
            ) from error
        except RuntimeError as error:
            problem = (str(error).strip().splitlines() or [""])[0]
            if "alloc" in problem.lower():
                raise UsageError(
                    f"no memory for memory_mib = {self._limit / MIB:.0f}: lower it ({problem})"
                ) from error
            warnings.warn(
                f"channel group '{name}' is closed channel by channel, since torch cannot batch it:"
                f" {problem}",
                stacklevel=2,
            )
            return "loop"
        kinds = {kind_of(self.model.get_submodule(c)) for c in self.groups[name].consumers}
        if batched == "update" and kinds == {"linear"}:
            return batched
        begin = time.perf_counter()
        self._batch(batched, name, index, gates, value, x, y).cpu()  # waits for the device
        middle = time.perf_counter()
        self._batch("loop", name, few, gates, value, x, y).cpu()
        loop = (time.perf_counter() - middle) / len(few) * len(index)
        return "loop" if loop * LOOP_WINS < middle - begin else batched

    def _updatable(self, name: str) -> bool:
        layers = [self.model.get_submodule(c) for c in self.groups[name].consumers]
        return not self.groups[name].keys and all(
            kind_of(m) == "linear" or (kind_of(m) == "conv" and getattr(m, "groups", 1) == 1)
            for m in layers
        )

    def _parts(self, name: str, count: int) -> tuple[int, int]:
        """(candidates, samples) at once, within the memory limit: rather all candidates on fewer
        samples, which share the front.
        """
        consumers = {*self.groups[name].consumers, *self.groups[name].keys}
        first = next(i for i, (layer, _) in enumerate(self._footprint) if layer in consumers)
        each = 3 * max(
            size for _, size in self._footprint[first:]
        )  # input, output, and what the operation holds meanwhile
        fit = max(1, int(self._limit // each))
        if count * LEAST_BATCH <= fit:
            return count, max(1, min(fit // count, len(self.sample), 1024))
        return max(1, fit // LEAST_BATCH), LEAST_BATCH

    def _batch(
        self,
        way: Way,
        name: str,
        index: Tensor,
        gates: Mapping[str, Tensor],
        value: float,
        x: Tensor,
        y: Tensor,
    ) -> Tensor:
        """Summed losses of one batch of samples, float64 ``[C]`` on the device, for the candidates
        ``index [C]``.
        """
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            if way == "update":
                logits = torch.func.vmap(partial(self._updated, name, gates, value, x))(index)
                return _sums(self.sample.criterion, logits, y)
            vector = gates[name].to(x) if name in gates else x.new_ones(self.groups[name].channels)
            vectors = vector.expand(len(index), -1).scatter(1, index[:, None], value)
            run = partial(self._gated, name, gates, x)
            if way == "gates":
                return _sums(self.sample.criterion, torch.func.vmap(run)(vectors), y)
            sums = [self.sample.criterion(run(v), y).sum(dtype=torch.float64) for v in vectors]
            return torch.stack(sums)

    def _gated(self, name: str, gates: Mapping[str, Tensor], x: Tensor, vector: Tensor) -> Tensor:
        with gated(self.model, self.groups, {**gates, name: vector}) as net:
            return net(x)

    def _updated(
        self, name: str, gates: Mapping[str, Tensor], value: float, x: Tensor, channel: Tensor
    ) -> Tensor:
        """Logits with one channel's part taken out of what the consumers give."""
        with gated(self.model, self.groups, gates) as net, ExitStack() as stack:
            for layer in self.groups[name].consumers:
                where = self._where(name, layer)
                handle = net.get_submodule(layer).register_forward_hook(
                    partial(_subtract, where, channel, 1 - value)
                )
                stack.callback(handle.remove)
            return net(x)

    def _where(self, name: str, layer: str) -> Tensor:
        """``channel_positions`` on the device, copied there once."""
        if (name, layer) not in self._positions:
            where = channel_positions(self.groups, name, layer)
            self._positions[name, layer] = where.to(self.sample.x.device)
        return self._positions[name, layer]

    def _cost(self, name: str, way: Way) -> tuple[int, int]:
        """MACs for one sample: (once for all candidates, for each of them)."""
        if way == "loop":
            return 0, self._whole
        if (name, way) not in self._costs:
            x, y = self.sample.x[:1], self.sample.y[:1]
            self._rows = slice(0, 1)
            counts = []
            for some in (1, 2):
                index = torch.arange(self.groups[name].channels, device=x.device).repeat(2)[:some]
                with FlopCounterMode(display=False) as counter:
                    self._batch(way, name, index, {}, 0.0, x, y)
                counts.append(int(counter.get_total_flops()) // 2)
            each = counts[1] - counts[0]
            self._costs[name, way] = (
                counts[0] - each,
                each + (self._products(name) if way == "update" else 0),
            )
        return self._costs[name, way]

    def _products(self, name: str) -> int:
        """Multiplications of rank-1 updates, which are elementwise and not among the operations
        that torch counts.
        """
        count = 0
        for layer in self.groups[name].consumers:
            module = self.model.get_submodule(layer)
            if (
                kind_of(module) == "linear"
                and channel_positions(self.groups, name, layer).shape[1] == 1
            ):
                count += axis_length(module, "out")
        return count


def _sums(criterion: Criterion, logits: Tensor, y: Tensor) -> Tensor:
    """Losses summed over samples: ``logits [C, B, K]`` and ``y [B]`` to float64 ``[C]``."""
    if criterion is cross_entropy and logits.device.type == "cpu":
        # exponentials as they are, 2.5 times as fast on a CPU; the label's own term is 1, so that
        # none vanish
        own = logits.gather(2, y[:, None].expand(len(logits), -1, 1))
        sums = logits.sub(own).exp_().sum(dim=2).log_().sum(dim=1, dtype=torch.float64)
        if bool(sums.isfinite().all()):
            return sums
    repeated = y.repeat(len(logits), *[1] * (y.dim() - 1))
    return (
        criterion(logits.flatten(0, 1), repeated)
        .view(len(logits), -1)
        .sum(dim=1, dtype=torch.float64)
    )


def _keep(into: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    into.append(output.clone())


def _subtract(
    where: Tensor,
    channel: Tensor,
    share: float,
    module: Any,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    """A consumer's output without (a share of) one channel: ``where [N, r]`` are the channels'
    positions.
    """
    at = where[channel]
    x, linear = args[0], kind_of(module) == "linear"
    part, weight = x.index_select(-1 if linear else 1, at), module.weight.index_select(1, at)
    if linear and len(at) == 1:
        return torch.addcmul(output, part, weight.squeeze(1), value=-share)
    gone = F.linear(part, weight) if linear else module._conv_forward(part, weight, None)
    return output - gone if share == 1 else output - share * gone


def _memory(device: torch.device) -> float:
    """Default limit, in bytes."""
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else 64 * MIB


_mine: list[Ablation] = []  # of a worker process


def _workers(
    size: int, model: nn.Module, groups: Groups, sample: Sample, options: dict[str, Any]
) -> list[ProcessPoolExecutor]:
    """A process each for all but the first ``size`` samples, with the network and its own part of
    the sample.
    """
    if size >= len(sample):
        return []
    gpus = torch.cuda.device_count() if sample.x.device.type == "cuda" else 0
    here = sample.x.device.index or 0
    twin, workers = copy.deepcopy(model).cpu(), []
    for i, (x, y) in islice(enumerate(sample.batches(size)), 1, None):
        device = f"cuda:{(here + i) % gpus}" if gpus else "cpu"
        part = replace(sample, x=x, y=y).to(torch.device("cpu"))
        arguments = (device, torch.get_num_threads(), twin, groups, part, options)
        workers.append(ProcessPoolExecutor(1, initializer=_start, initargs=arguments))
    return workers


def _start(
    device: str,
    threads: int,
    model: nn.Module,
    groups: Groups,
    sample: Sample,
    options: dict[str, Any],
) -> None:
    torch.set_num_threads(threads)
    _mine.append(Ablation(model.to(device), groups, sample.to(torch.device(device)), **options))


def _work(
    gates: dict[str, list[float]], name: str, index: list[int], value: float
) -> tuple[list[float], int]:
    """(losses summed over this process's samples, multiply-accumulates done)."""
    mine = _mine[0]
    before = mine.forward_macs
    shut = {n: torch.tensor(g, device=mine.sample.x.device) for n, g in gates.items()}
    sums = mine._group(name, torch.tensor(index), shut, value)
    return sums.tolist(), mine.forward_macs - before
