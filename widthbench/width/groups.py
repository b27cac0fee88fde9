"""Channel groups: which channels of a network must change together, and where each of them sits in every layer.

Torch-Pruning's ``DependencyGraph`` (Fang et al., "DepGraph", CVPR 2023) traces the network and propagates indices; we use
it for discovery only. What it finds is turned into *axes*: each resizable axis of a layer is a sequence of segments, and
a segment is either fixed or one whole copy of a group's channels, each channel repeated ``repeat`` times in a row (a
flatten over an H x W map repeats H·W times). Everything after discovery works on axes alone.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widthbench.errors import NoGroupsError, UsageError, did_you_mean

Side = Literal["out", "in"]
Grade = Literal["exact", "coupled", "frozen"]
Scope = Literal["inner", "all"]

TOO_LONG = "enumeration of the dependency graph took too long"
MAX_PARTS = 64  # a group cut into more parts than this has permuted channels, not concatenated ones


@dataclass(frozen=True)
class Segment:
    """A run of positions along one axis of a layer.

    Attributes:
        group: Name of the group whose channels sit here, or None where the positions are fixed.
        channels: Number of channels (of positions, where fixed).
        repeat: Consecutive positions that each channel takes, 1 except behind a flatten.
    """

    group: str | None
    channels: int
    repeat: int = 1

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.channels * self.repeat


Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class Group:
    """A set of channels that must change together.

    Attributes:
        name: The first producer's module name; ``name[a:b]`` where the group is only a part of that layer's outputs.
        channels: N, the number of channels.
        blocks: Contiguous blocks that must keep equal counts (grouped convolution, GroupNorm); 1 for most groups.
        producers: Layers whose output channels these are (convolutions and linear layers).
        riders: Channel-wise layers that ride along (BatchNorm, depthwise convolution, PReLU, LayerNorm, GroupNorm).
        consumers: Layers that read the channels.
        inner: False if an elementwise addition joins the channels with another branch (a residual stream).
        normalised: True if a norm *across* channels (LayerNorm, GroupNorm) rides along, so that a resize changes it.
        grade: "exact", "coupled" or "frozen" once certified, None before.
        reason: Why a group is frozen or coupled; "" for exact ones.
    """

    name: str
    channels: int
    blocks: int = 1
    producers: tuple[str, ...] = ()
    riders: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    inner: bool = True
    normalised: bool = False
    grade: Grade | None = None
    reason: str = ""


@dataclass(frozen=True)
class Groups(Mapping[str, Group]):
    """The channel groups of one network, by name, in forward order, with the axes that they live on.

    Attributes:
        members: The groups.
        axes: For every layer and side ("out" or "in") that a group touches, its segments. Selecting groups
            leaves the axes whole: they describe the network, not the selection.
        output_shapes: Shapes of the network's output tensors for the example input.
        problem: Why there are no groups at all, if the network could not be traced.
        behind: For every layer, the nearest layers that it reads from, through operations without weights.
        adjacent: BatchNorms whose input is the output of the layer before, with no operation in between.
    """

    members: Mapping[str, Group]
    axes: Mapping[tuple[str, Side], Axis] = field(repr=False)
    output_shapes: tuple[tuple[int, ...], ...] = ()
    problem: str = ""
    behind: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    adjacent: frozenset[str] = field(default=frozenset(), repr=False)

    def __getitem__(self, name: str) -> Group:
        try:
            return self.members[name]
        except KeyError:
            raise KeyError(f"no channel group '{name}'{did_you_mean(name, self.members)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self.members

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def places(self, name: str, side: Side) -> Iterator[tuple[str, list[int]]]:
        """Where a group's channels sit.

        Args:
            name: The group.
            side: "out" for producers and riders, "in" for consumers.

        Yields:
            ``(layer, positions)`` with ``positions`` a flat list, copy by copy, channel by channel: for a layer with c
            copies of repeat r it has c·N·r entries.
        """
        for (layer, at), axis in self.axes.items():
            if at != side:
                continue
            offset = 0
            found: list[int] = []
            for segment in axis:
                if segment.group == name:
                    found.extend(range(offset, offset + segment.size))
                offset += segment.size
            if found:
                yield layer, found

    @cached_property
    def readers(self) -> Mapping[str, tuple[str, ...]]:
        """The layers that read each layer's output next: ``behind`` the other way round."""
        found: dict[str, tuple[str, ...]] = {}
        for reader, before in self.behind.items():
            for layer in before:
                found[layer] = (*found.get(layer, ()), reader)
        return found

    def sources(self, name: str) -> tuple[str, ...]:
        """The producers that do not read the group's own channels: without the gates of squeeze-excite, which do."""
        group = self[name]
        members = {*group.producers, *group.riders}

        def reads(layer: str) -> bool:
            waiting, seen = list(self.behind.get(layer, ())), set()
            while waiting:
                at = waiting.pop()
                if at in members:
                    return True
                if at not in seen:
                    seen.add(at)
                    waiting.extend(self.behind.get(at, ()))
            return False

        return tuple(p for p in group.producers if not reads(p)) or group.producers

    def paths(self, name: str, start: Sequence[str] | None = None) -> tuple[tuple[str, ...], ...]:
        """The ways that a group's channels take from their producers towards the consumers.

        Args:
            name: The group.
            start: Where the ways begin: producers or riders; all producers if None.

        Returns:
            One tuple of layers per way: a producer, then the riders that it passes one after the other (``("conv_pw", "bn1",
            "conv_dw", "bn2")``), in forward order. A way ends where a consumer, or several branches together, read
            the channels; it forks where several riders read the same layer (the norms of DenseNet).
        """
        group = self[name]
        members = {*group.producers, *group.riders}
        following: dict[str, list[str]] = {}
        for rider in group.riders:
            before = [b for b in self.behind.get(rider, ()) if b in members]
            if len(before) == 1:
                following.setdefault(before[0], []).append(rider)

        def onward(path: tuple[str, ...]) -> list[tuple[str, ...]]:
            further = [r for r in following.get(path[-1], ()) if r not in path]
            return [way for rider in further for way in onward((*path, rider))] or [path]

        return tuple(way for first in (group.producers if start is None else start) for way in onward((first,)))

    def select(self, scope: Scope = "inner", include: str | Sequence[str] | None = None) -> Groups:
        """The certified groups that may be resized.

        Args:
            scope: "inner": exact groups that no addition joins with another branch (residual streams stay as they
                are). "all": every exact and every coupled group.
            include: fnmatch pattern(s) on group names; None selects all in the scope.

        Raises:
            NoGroupsError: If nothing is left, with the reasons.
            UsageError: If a pattern matches no group at all, or the scope is unknown.
        """
        if scope not in ("inner", "all"):
            raise UsageError(f"scope must be 'inner' or 'all', not {scope!r}")
        patterns = [include] if isinstance(include, str) else include or []
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise UsageError(f"include must be a pattern on group names or a list of them, not {include!r}")
        for pattern in patterns:
            if not fnmatch.filter(self.members, pattern):
                raise UsageError(f"include pattern '{pattern}' matches no channel group{did_you_mean(pattern, self.members)}")
        grades = {"exact"} if scope == "inner" else {"exact", "coupled"}
        chosen = {
            name: g
            for name, g in self.members.items()
            if g.grade in grades
            and (scope == "all" or g.inner)
            and (not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns))
        }
        if not chosen:
            reasons = sorted({g.reason for g in self.members.values() if g.reason})
            hint = "; ".join(reasons[:3]) or "its groups are outside the scope: try scope='all'"
            if not self.members:
                hint = self.problem or "it has no channels between two layers, so there is nothing to resize"
            raise NoGroupsError(f"no certified channel group in scope '{scope}': {hint} (see `widthbench doctor`)")
        return replace(self, members=chosen)

    def with_grades(self, grades: Mapping[str, tuple[Grade, str]]) -> Groups:
        """A copy whose groups carry the given (grade, reason)."""
        return replace(self, members={n: replace(g, grade=grades[n][0], reason=grades[n][1]) for n, g in self.items()})


def kind_of(module: nn.Module) -> str | None:
    """The layer's kind: conv, depthwise, linear, batchnorm, channelnorm, prelu; None if it cannot be resized."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        single = module.groups == module.in_channels == module.out_channels and module.groups > 1
        return "depthwise" if single else "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return "batchnorm"
    if (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1) or isinstance(module, nn.GroupNorm):
        return "channelnorm"
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return "prelu"
    return None


def axis_length(module: nn.Module, side: Side) -> int:
    """Number of positions along a layer's axis."""
    m: Any = module
    match kind_of(module):
        case "conv" | "depthwise":
            return int(m.in_channels if side == "in" else m.out_channels)
        case "linear":
            return int(m.in_features if side == "in" else m.out_features)
        case "batchnorm":
            return int(m.num_features)
        case "channelnorm":
            return int(m.normalized_shape[0] if isinstance(m, nn.LayerNorm) else m.num_channels)
        case "prelu":
            return int(m.num_parameters)
    raise UsageError(f"layers of type {type(module).__name__} cannot be resized")


def tensors_on(module: nn.Module, side: Side) -> list[tuple[str, int]]:
    """The (tensor name, dimension) pairs of a layer that run along an axis."""
    if side == "in":
        return [("weight", 1)]
    names = ("weight", "bias", "running_mean", "running_var")
    return [(n, 0) for n in names if isinstance(getattr(module, n, None), Tensor)]


def channel_rows(groups: Groups, name: str, layer: str, tensor: Tensor) -> Tensor:
    """What a tensor of a producer or rider holds for each channel of a group.

    Args:
        groups: The groups of the network.
        name: The group.
        layer: One of its producers or riders.
        tensor: ``[O, ...]``, running along that layer's output axis.

    Returns:
        ``[N, D]``; D counts repeats and copies of the channel too. A view where the layer holds nothing else.
    """
    axis = groups.axes[layer, "out"]
    copies = [s for s in axis if s.group == name]
    tensor = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
    if len(copies) < len(axis):
        ends = itertools.accumulate(s.size for s in axis)
        tensor = torch.cat([tensor[end - s.size : end] for s, end in zip(axis, ends, strict=True) if s.group == name])
    if len(copies) > 1 or copies[0].repeat > 1:  # [copies, N, repeat, D] -> [N, copies * repeat * D]
        cube = tensor.reshape(len(copies), groups[name].channels, copies[0].repeat, -1)
        tensor = cube.transpose(0, 1).flatten(1)
    return tensor


def producer_rows(model: nn.Module, groups: Groups, name: str, *, bias: bool = False) -> list[Tensor]:
    """The producer weights of each channel, flattened, one part per producer.

    Args:
        model: The network that the groups were found in.
        groups: Its groups.
        name: The group.
        bias: Append each producer's bias as one more part.

    Returns:
        ``[N, D]`` per producer (and ``[N, 1]`` per bias): row n holds weights that make channel n. ``torch.cat(rows, 1)`` is
        the channel's whole filter. Parts are views where the layer holds nothing else.
    """
    parts = []
    for layer in groups[name].producers:
        module: Any = model.get_submodule(layer)
        parts.append(channel_rows(groups, name, layer, module.weight))
        if bias and module.bias is not None:
            parts.append(channel_rows(groups, name, layer, module.bias))
    return parts


class _Deadline(list[Any]):
    """A dependency list that stops Torch-Pruning's enumeration (it does not end on some graphs) when time is up."""

    until: ClassVar[float] = math.inf  # of the group that is being enumerated

    def __iter__(self) -> Iterator[Any]:
        if time.monotonic() > self.until:
            raise TimeoutError
        return super().__iter__()


@dataclass
class _Raw:
    """One group as Torch-Pruning enumerates it: positions and the root channel that each belongs to."""

    channels: int
    entries: list[tuple[str, Side, np.ndarray, np.ndarray]]
    joined: bool
    reason: str


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode and gradients on for the trace; both as they were afterwards."""
    training = {m: m.training for m in model.modules()}
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        model.eval()
        for p in frozen:
            p.requires_grad_(True)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for m, mode in training.items():
            m.training = mode


def discover(model: nn.Module, example_input: Tensor, *, time_limit: float = 60.0) -> Groups:
    """Find the channel groups of a network; they are not graded yet (see ``certify``).

    Args:
        model: Any network that autograd can trace; it is left as it was.
        example_input: ``[B, C, H, W]`` (or whatever the network takes), on the network's device.
        time_limit: Seconds after which enumeration stops; groups not found by then stay unresized.

    Returns:
        The groups in forward order. Groups that cannot be resized are frozen, with the reason.

    Raises:
        UsageError: If the network does not run on the example input.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError("channel groups are traced through autograd: leave torch.inference_mode() for it")
    names = {module: name for name, module in model.named_modules()}
    with _traceable(model):
        graph = tp.DependencyGraph()
        outputs: list[Any] = []

        def forward(network: nn.Module, inputs: tuple[Tensor]) -> Any:
            try:
                outputs.append(network(*inputs))
            except Exception as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                shape = list(example_input.shape)
                raise UsageError(f"{type(model).__name__} does not take an input of shape {shape}: {first}") from error
            return outputs[-1]

        try:
            graph.build_dependency(
                model,
                (example_input,),
                forward_fn=forward,
                output_transform=lambda output: [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad],
                customized_pruners={},
                ignored_layers=[],
                verbose=False,
            )
            behind, adjacent = _flow(graph, names)
            raws = _enumerate(graph, names, time_limit)
        except UsageError:
            raise
        except Exception as error:  # Torch-Pruning meets something that it does not know
            first = (str(error).strip().splitlines() or [""])[0]
            problem = f"Torch-Pruning cannot trace it: {type(error).__name__}: {first[:120]}"
            return Groups({}, {}, shapes_of(outputs[-1]), problem)
    tracked = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(outputs[-1]))
    problem = "" if tracked else "its output has no gradient (a forward pass under no_grad?), so it cannot be traced"
    return replace(_assemble(model, raws), output_shapes=shapes_of(outputs[-1]), problem=problem, behind=behind, adjacent=adjacent)


def shapes_of(output: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of all tensors in a network's output."""
    return tuple(tuple(t.shape) for t in tree_leaves(output) if isinstance(t, Tensor))


def _flow(graph: Any, names: Mapping[nn.Module, str]) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """What each resizable layer reads from, and the BatchNorms that sit right behind a layer."""
    behind: dict[str, tuple[str, ...]] = {}
    adjacent: set[str] = set()
    for module, node in graph.module2node.items():
        if module not in names or kind_of(module) is None:
            continue
        found: dict[str, None] = {}
        between = 0
        seen, waiting = {node}, list(node.inputs)
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            if at.module in names and kind_of(at.module) is not None:
                found[names[at.module]] = None
                continue
            # a norm with an activation inside (timm's BatchNormAct2d) shows its own normalisation as one operation more
            between += "BatchNorm" not in str(at.name)
            waiting.extend(at.inputs)
        behind[names[module]] = tuple(found)
        if kind_of(module) == "batchnorm" and len(found) == 1 and not between:
            adjacent.add(names[module])
    return behind, frozenset(adjacent)


def _enumerate(graph: Any, names: Mapping[nn.Module, str], time_limit: float) -> list[_Raw]:
    """All groups that start at a convolution or linear layer, each channel of every layer visited once.

    One group may take a tenth of the time limit, so that one that does not end does not starve the rest.
    """
    end = time.monotonic() + time_limit
    for node in graph.module2node.values():
        node.dependencies = _Deadline(node.dependencies)
    raws: list[_Raw] = []
    seen: set[nn.Module] = set()
    for module in list(graph.module2node):
        if module in seen or not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            continue
        pruner = graph.get_pruner_of_module(module)
        channels = pruner.get_out_channels(module)
        _Deadline.until = min(end, time.monotonic() + time_limit / 10)
        try:
            items = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(channels)))
        except TimeoutError:
            entry: tuple[str, Side, np.ndarray, np.ndarray] = (names[module], "out", np.arange(channels), np.arange(channels))
            raws.append(_Raw(channels, [entry], False, TOO_LONG))
            continue
        raw = _Raw(channels, [], False, "")
        for item in items:
            node, target = item.dep.target, item.dep.target.module
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            if out:
                seen.add(target)
            _collect(raw, node, target, "out" if out else "in", item, names)
        raws.append(raw)
    return raws


def _collect(raw: _Raw, node: Any, target: Any, side: Side, item: Any, names: Mapping[nn.Module, str]) -> None:
    """Add one item of Torch-Pruning's group to ours: an axis entry, a join, or a reason to freeze."""
    if isinstance(target, nn.Parameter):
        raw.reason = raw.reason or f"a bare parameter of shape {list(target.shape)} carries its channels"
    elif isinstance(target, nn.Module) and target in names:
        kind = kind_of(target)
        if kind is None:
            if not isinstance(target, nn.PReLU):  # a PReLU with one parameter acts on any width
                raw.reason = raw.reason or f"layer {names[target]} ({type(target).__name__}) cannot be resized"
            return
        entry_side: Side = side if kind in ("conv", "linear") else "out"
        if None in item.root_idxs:
            raw.reason = raw.reason or f"its index map is lost on the way to {names[target]}"
            return
        raw.entries.append((names[target], entry_side, np.asarray(item.idxs), np.asarray(item.root_idxs)))
    elif type(target).__name__ == "_OutputOp":
        raw.reason = raw.reason or "the network's output"
    elif "AddBackward" in str(node.name) or "SubBackward" in str(node.name):
        raw.joined = raw.joined or len(set(node.inputs)) > 1


def _assemble(model: nn.Module, raws: list[_Raw]) -> Groups:
    """Raw index lists to groups and axes: cut where concats cut, lay out every axis, check that copies are whole."""
    modules = dict(model.named_modules())
    order = {name: i for i, name in enumerate(modules)}
    shared = _shared_layers(model)
    lengths = {(lay, s): axis_length(modules[lay], s) for raw in raws for lay, s, _, _ in raw.entries}
    for raw in raws:
        for layer, side, positions, roots in raw.entries:
            if positions.max() >= lengths[layer, side] or roots.max() >= raw.channels:
                raw.reason = raw.reason or f"its index map runs beyond the axis of {layer}"
        raw.entries = [e for e in raw.entries if e[2].max() < lengths[e[0], e[1]] and e[3].max() < raw.channels]
    owner = {key: np.full(n, -1, dtype=np.int64) for key, n in lengths.items()}
    channel = {key: np.zeros(n, dtype=np.int64) for key, n in lengths.items()}

    atoms: list[dict[str, Any]] = []
    for raw in raws:
        if not raw.reason and not any(side == "in" for _, side, _, _ in raw.entries):
            continue  # nobody reads it: the network's output
        cuts = _cuts(raw)
        if len(cuts) - 1 > MAX_PARTS:
            raw.reason = raw.reason or "its channels are permuted on the way to a consumer"
            cuts = [0, raw.channels]
        for start, stop in itertools.pairwise(cuts):
            atom: dict[str, Any] = {"n": stop - start, "joined": raw.joined, "reason": raw.reason, "keys": []}
            for layer, side, positions, roots in raw.entries:
                here = (roots >= start) & (roots < stop)
                if not here.any():
                    continue
                key, at = (layer, side), positions[here]
                again = (owner[key][at] == len(atoms)) & (channel[key][at] == roots[here] - start)
                if again.all():
                    continue  # a depthwise convolution is reached from both of its sides
                if (owner[key][at] >= 0).any():
                    clash = f"two groups claim the same positions of {layer}"
                    for other in set(owner[key][at].tolist()) - {-1}:
                        atoms[other]["reason"] = atoms[other]["reason"] or clash
                    atom["reason"] = atom["reason"] or clash
                    continue
                owner[key][at], channel[key][at] = len(atoms), roots[here] - start
                atom["keys"].append(key)
                if layer in shared:
                    atom["reason"] = atom["reason"] or f"layer {layer} {shared[layer]}"
            atoms.append(atom)

    layouts = {key: _layout(key[0], owner[key], channel[key], atoms) for key in owner}
    for index, atom in enumerate(atoms):
        _describe(index, atom, layouts, modules, order)
    kept = sorted((i for i, a in enumerate(atoms) if a["group"]), key=lambda i: order[atoms[i]["group"].producers[0]])
    members = {atoms[i]["group"].name: atoms[i]["group"] for i in kept}
    axes = {
        key: tuple(Segment(atoms[i]["group"].name if i >= 0 and atoms[i]["group"] else None, n, r) for i, n, r in layout)
        for key, layout in sorted(layouts.items(), key=lambda kv: (order[kv[0][0]], kv[0][1]))
    }
    return Groups(members, axes)


def _shared_layers(model: nn.Module) -> dict[str, str]:
    """Layers that must not be cut: tied tensors, parametrised or lazily rebuilt weights."""
    holders: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(p), []).append(name.rpartition(".")[0])
    tied = {layer for layers in holders.values() if len(set(layers)) > 1 for layer in layers}
    bad = dict.fromkeys(tied, "shares its tensors with another layer")
    for name, module in model.named_modules():
        if nn.utils.parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
            bad[name] = "has parametrised weights"
    return bad


def _cuts(raw: _Raw) -> list[int]:
    """Channels at which some layer's axis stops following the group in order: the borders of its parts."""
    cuts = {0, raw.channels}
    for _, _, positions, roots in raw.entries:
        sequence = roots[np.argsort(positions, kind="stable")]
        cuts |= {int(sequence[0]), int(sequence[-1]) + 1}
        before, after = sequence[:-1], sequence[1:]
        jump = (after != before) & (after != before + 1)
        cuts |= set((before[jump] + 1).tolist()) | set(after[jump].tolist())
        gap = np.diff(np.sort(positions)) > 1
        cuts |= set((before[gap] + 1).tolist()) | set(after[gap].tolist())
    return sorted(cuts)


def _layout(layer: str, owner: np.ndarray, channel: np.ndarray, atoms: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """One axis as (atom or -1, channels, repeat) segments; an atom that is not there as whole copies is frozen."""
    layout: list[tuple[int, int, int]] = []
    at, length = 0, len(owner)
    while at < length:
        atom = int(owner[at])
        run = at
        if atom >= 0:
            n = atoms[atom]["n"]
            while run < length and owner[run] == atom and channel[run] == channel[at]:
                run += 1
            repeat = run - at  # of a single channel: taken for a flatten, which certification then proves or refutes
            stop = at + n * repeat
            whole = stop <= length and bool((owner[at:stop] == atom).all())
            if whole and np.array_equal(channel[at:stop], np.repeat(np.arange(n), repeat)):
                layout.append((atom, n, repeat))
                at = stop
                continue
            reason = f"its channels do not lie in whole copies along {layer}"
            atoms[atom]["reason"] = atoms[atom]["reason"] or reason
        while run < length and owner[run] == atom:
            run += 1
        layout.append((-1, run - at, 1))
        at = run
    return layout


def _describe(
    index: int,
    atom: dict[str, Any],
    layouts: Mapping[tuple[str, Side], list[tuple[int, int, int]]],
    modules: Mapping[str, nn.Module],
    order: Mapping[str, int],
) -> None:
    """Fill in ``atom["group"]``: names, roles, blocks and a reason where it cannot be resized."""
    keys = sorted(set(atom["keys"]), key=lambda key: order[key[0]])
    producers = [lay for lay, side in keys if side == "out" and kind_of(modules[lay]) in ("conv", "linear")]
    consumers = [lay for lay, side in keys if side == "in"]
    riders = [lay for lay, side in keys if side == "out" and lay not in producers]
    atom["group"] = None
    if not producers or not (consumers or atom["reason"]):
        return
    blocks, reason = 1, atom["reason"]
    for layer, side in keys:
        module: Any = modules[layer]
        count = module.groups if kind_of(module) == "conv" else getattr(module, "num_groups", 1)
        if count > 1:
            if [(i, r) for i, _, r in layouts[layer, side]] != [(index, 1)]:
                reason = reason or f"{layer} splits a concatenation into {count} blocks"
            blocks = math.lcm(blocks, count)
    if atom["n"] % blocks:
        reason = reason or f"{atom['n']} channels do not divide into {blocks} blocks"
        blocks = 1
    first = producers[0]
    layout = layouts[first, "out"]
    name = first
    if any(i != index for i, _, _ in layout):
        start = 0
        for i, n, r in layout:
            if i == index:
                name = f"{first}[{start}:{start + n * r}]"
                break
            start += n * r
    atom["group"] = Group(
        name=name,
        channels=atom["n"],
        blocks=blocks,
        producers=tuple(producers),
        riders=tuple(riders),
        consumers=tuple(consumers),
        inner=not atom["joined"],
        normalised=any(kind_of(modules[lay]) == "channelnorm" for lay in riders),
        grade="frozen" if reason else None,
        reason=reason,
    )
