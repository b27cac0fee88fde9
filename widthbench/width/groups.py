"""Channel groups: which channels of a network must change together, and where each of them sits in
every layer.

Labels that travel with one forward pass (``widthbench.width.labels``) say which channel lies where.
What they show is turned into *axes*: each resizable axis of a layer is a sequence of segments, and
a segment is either fixed or one whole copy of a group's channels, each channel repeated ``repeat``
times in a row (a flatten over an H x W map repeats H·W times). In attention two groups lie on the
same positions: heads, and within them head dimensions. Everything after discovery works on axes
alone.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widthbench.errors import NoGroupsError, UsageError, did_you_mean
from widthbench.width.adapters import Origin
from widthbench.width.labels import OUTPUT, Ids, Key, Labels, Product, Size, evaluating
from widthbench.width.layers import Side, kind_of
from widthbench.width.operations import trace

Grade = Literal["exact", "coupled", "frozen"]
Scope = Literal["inner", "all"]

MAX_PARTS = 64  # a group cut into more parts than this has permuted channels, not concatenated ones


@dataclass(frozen=True)
class Segment:
    """A run of positions along one axis of a layer.

    Attributes:
        group: Name of the group whose channels sit here, or None where the positions are fixed.
        channels: Number of channels (of positions, where fixed).
        repeat: Consecutive positions that each channel takes, 1 except behind a flatten.
        outer: The group of heads that these positions are divided into, if any: as many equal parts
            as it has channels.
        reads: On an output axis: whether the positions read the group's channels instead of making
            them, as attention's keys do in their product with the queries.
        scaled: Whether they carry what attention's own division by the root of the head dimension
            changes.
    """

    group: str | None
    channels: int
    repeat: int = 1
    outer: str | None = None
    reads: bool = False
    scaled: bool = False

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.channels * self.repeat

    def made_by(self, name: str) -> bool:
        """Whether these positions hold a group's own channels: all of its positions, but for
        keys.
        """
        return self.outer == name or (self.group == name and not self.reads)


Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class Group:
    """A set of channels that must change together.

    Attributes:
        name: The first producer's module name; ``name[a:b]`` where the group is only a part of that
            layer's outputs.
        channels: N, the number of channels.
        blocks: Contiguous blocks that must keep equal counts (grouped convolution, GroupNorm); 1
            for most groups.
        producers: Layers whose output channels these are (convolutions and linear layers).
        riders: Channel-wise layers that ride along (BatchNorm, depthwise convolution, PReLU,
            LayerNorm, GroupNorm).
        consumers: Layers that read the channels.
        keys: Layers whose outputs are multiplied with the channels and summed over them, as
            attention's keys are.
        tensors: Bare parameters and buffers that ride along (position embeddings, layer-scales,
            tables of relative positions).
        heads: True for the heads of an attention: each channel is a head, with all of its
            dimensions.
        inner: False if an elementwise addition joins the channels with another branch (a residual
            stream).
        normalised: True if a norm *across* channels (LayerNorm, GroupNorm) rides along, so that a
            resize changes it.
        grade: "exact", "coupled" or "frozen" once certified, None before.
        reason: Why a group is frozen or coupled; "" for exact ones.
    """

    name: str
    channels: int
    blocks: int = 1
    producers: tuple[str, ...] = ()
    riders: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    heads: bool = False
    inner: bool = True
    normalised: bool = False
    grade: Grade | None = None
    reason: str = ""


@dataclass(frozen=True)
class Stated:
    """A number in the network's code that states a width.

    Attributes:
        origin: Where it is kept: (module, attribute, place in it or None).
        axis: What it counts.
        over: The axis's width divided by the number.
    """

    origin: Origin
    axis: Axis
    over: float


@dataclass(frozen=True)
class Groups(Mapping[str, Group]):
    """The channel groups of one network, by name, in forward order, with the axes that they live
    on.

    Attributes:
        members: The groups.
        axes: For every layer and side ("out" or "in") that a group touches, its segments. Selecting
            groups leaves the axes whole: they describe the network, not the selection.
        output_shapes: Shapes of the network's output tensors for the example input.
        problem: Why there are no groups at all, if the network could not be traced.
        tensors: Segments of bare parameters and buffers that a group touches, by name and
            dimension.
        stated: Numbers in the network's code that state widths.
        scales: Modules whose ``scale`` is one over the root of a group's head dimension.
        products: Convolutions and matrix products that a group touches: multiply-accumulates per
            sample, the axes that they are proportional to, and the innermost module that computes
            them.
        input_shape: Of the example input, without the batch.
        everything: All groups, also those that were not selected.
        behind: For every layer, the nearest layers that it reads from, through operations without
            weights.
        adjacent: BatchNorms whose input is the output of the layer before, with no operation in
            between.
        program: A digest of what the network computes on the example input.
    """

    members: Mapping[str, Group]
    axes: Mapping[tuple[str, Side], Axis] = field(repr=False)
    output_shapes: tuple[tuple[int, ...], ...] = ()
    problem: str = ""
    behind: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    adjacent: frozenset[str] = field(default=frozenset(), repr=False)
    tensors: Mapping[tuple[str, int], Axis] = field(default_factory=dict, repr=False)
    stated: tuple[Stated, ...] = field(default=(), repr=False)
    scales: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    products: tuple[tuple[int, tuple[Axis, ...], str], ...] = field(default=(), repr=False)
    input_shape: tuple[int, ...] = ()
    everything: Mapping[str, Group] = field(default_factory=dict, repr=False)
    program: str = field(default="", repr=False)

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
            side: "out" for producers and riders, "in" for consumers. Keys, which lie on output axes
                and read, are left out.

        Yields:
            ``(layer, positions)`` with ``positions`` a flat list, copy by copy, channel by channel:
            for a layer with c copies of repeat r it has c·N·r entries.
        """
        for (layer, at), axis in self.axes.items():
            if at != side:
                continue
            offset = 0
            found: list[int] = []
            for segment in axis:
                if segment.made_by(name):
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
        """The producers that do not read the group's own channels: without the gates of
        squeeze-excite, which do.
        """
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
            One tuple of layers per way: a producer, then the riders that it passes one after the
            other (``("conv_pw", "bn1", "conv_dw", "bn2")``), in forward order. A way ends where a
            consumer, or several branches together, read the channels; it forks where several riders
            read the same layer (the norms of DenseNet).
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

        return tuple(
            way
            for first in (group.producers if start is None else start)
            for way in onward((first,))
        )

    def select(self, scope: Scope = "inner", include: str | Sequence[str] | None = None) -> Groups:
        """The certified groups that may be resized.

        Args:
            scope: "inner": exact groups that no addition joins with another branch (residual
                streams stay as they are). "all": every exact and every coupled group.
            include: fnmatch pattern(s) on group names; None selects all in the scope.

        Raises:
            NoGroupsError: If nothing is left, with the reasons.
            UsageError: If a pattern matches no group at all, or the scope is unknown.
        """
        if scope not in ("inner", "all"):
            raise UsageError(f"scope must be 'inner' or 'all', not {scope!r}")
        patterns = [include] if isinstance(include, str) else include or []
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise UsageError(
                f"include must be a pattern on group names or a list of them, not {include!r}"
            )
        for pattern in patterns:
            if not fnmatch.filter(self.members, pattern):
                raise UsageError(
                    f"include pattern '{pattern}' matches no channel"
                    f" group{did_you_mean(pattern, self.members)}"
                )
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
                hint = (
                    self.problem
                    or "it has no channels between two layers, so there is nothing to resize"
                )
            raise NoGroupsError(
                f"no certified channel group in scope '{scope}': {hint} (see `widthbench doctor`)"
            )
        return replace(self, members=chosen)

    def with_grades(self, grades: Mapping[str, tuple[Grade, str]]) -> Groups:
        """A copy whose groups carry the given (grade, reason)."""
        return replace(
            self,
            members={
                n: replace(g, grade=grades[n][0], reason=grades[n][1]) for n, g in self.items()
            },
        )


def channel_rows(groups: Groups, name: str, layer: str, tensor: Tensor) -> Tensor:
    """What a tensor of a producer or rider holds for each channel of a group.

    Args:
        groups: The groups of the network.
        name: The group.
        layer: One of its producers or riders.
        tensor: ``[O, ...]``, running along that layer's output axis.

    Returns:
        ``[N, D]``; D counts repeats and copies of the channel too. A view where the layer holds
        nothing else.
    """
    axis = groups.axes[layer, "out"]
    copies = [s for s in axis if s.made_by(name)]
    tensor = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
    if len(copies) < len(axis):
        ends = itertools.accumulate(s.size for s in axis)
        tensor = torch.cat(
            [
                tensor[end - s.size : end]
                for s, end in zip(axis, ends, strict=True)
                if any(s is c for c in copies)
            ]
        )
    if len(tensor) > groups[name].channels:  # [copies, N, repeat, D] -> [N, copies * repeat * D]
        cube = tensor.reshape(
            len(copies), groups[name].channels, copies[0].size // groups[name].channels, -1
        )
        tensor = cube.transpose(0, 1).flatten(1)
    return tensor


def producer_rows(
    model: nn.Module, groups: Groups, name: str, *, bias: bool = False
) -> list[Tensor]:
    """The producer weights of each channel, flattened, one part per producer.

    Args:
        model: The network that the groups were found in.
        groups: Its groups.
        name: The group.
        bias: Append each producer's bias as one more part.

    Returns:
        ``[N, D]`` per producer (and ``[N, 1]`` per bias): row n holds weights that make channel n.
        ``torch.cat(rows, 1)`` is the channel's whole filter. Parts are views where the layer holds
        nothing else.
    """
    parts = []
    for layer in groups[name].producers:
        module: Any = model.get_submodule(layer)
        parts.append(channel_rows(groups, name, layer, module.weight))
        if bias and module.bias is not None:
            parts.append(channel_rows(groups, name, layer, module.bias))
    return parts


@dataclass
class _Raw:
    """Channels that lie on the same axes, in the order of their first producer.

    Attributes:
        channels: The labels' channels.
        reason: Why they may not change.
        heads: Whether each is a head.
    """

    channels: Ids
    reason: str = ""
    heads: bool = False


def discover(model: nn.Module, example_input: Tensor) -> Groups:
    """Find the channel groups of a network; they are not graded yet (see ``certify``).

    Args:
        model: Any network; it is left as it was.
        example_input: ``[B, C, H, W]`` (or whatever the network takes), on the network's device.

    Returns:
        The groups in forward order. Groups that cannot be resized are frozen, with the reason.

    Raises:
        UsageError: If the network does not run on the example input.
    """
    with evaluating(model):
        try:
            labels = trace(model, example_input[:1])
        except UsageError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            try:
                with torch.no_grad():
                    output = model(example_input)
            except Exception as own:
                first = (str(own).strip().splitlines() or [type(own).__name__])[0]
                shape = list(example_input.shape)
                raise UsageError(
                    f"{type(model).__name__} does not take an input of shape {shape}: {first}"
                ) from own
            return Groups(
                {},
                {},
                shapes_of(output),
                f"its channels cannot be followed: {type(error).__name__}: {first[:120]}",
            )
    found = _Assembly(model, labels).groups()
    shapes = tuple((len(example_input), *s[1:]) if s else s for s in shapes_of(labels.output))
    return replace(
        found,
        output_shapes=shapes,
        input_shape=tuple(example_input.shape[1:]),
        program=labels.program,
    )


def shapes_of(output: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of all tensors in a network's output."""
    return tuple(tuple(t.shape) for t in tree_leaves(output) if isinstance(t, Tensor))


@dataclass
class _Part:
    """A group in the making.

    Attributes:
        channels: ``[N]`` labels' channels, in order.
        heads: Whether they are heads.
        reason: Why it may not change.
        blocks: Contiguous blocks that keep equal counts.
        keys: The axes that it lies on.
        raw: Which cut it comes from.
    """

    channels: Ids
    heads: bool
    reason: str
    blocks: int = 1
    keys: list[Key] = field(default_factory=list)
    raw: int = 0
    group: Group | None = None


class _Assembly:
    """From labels to groups and axes: channels that lie together, cut where concatenations cut,
    laid out along every axis.
    """

    def __init__(self, model: nn.Module, labels: Labels) -> None:
        self.labels = labels
        self.modules = dict(model.named_modules())
        self.order = {name: i for i, name in enumerate(self.modules)}
        self.kinds = {name: kind_of(m) for name, m in self.modules.items()}
        self.arrays = {
            key: labels.channel[start : start + length]
            for key, (start, length) in labels.axes.items()
        }
        self.head = np.full(
            labels.count, -1, dtype=np.int64
        )  # of each channel: the head that it is a part of, a channel too
        self.is_head = np.zeros(labels.count, dtype=bool)
        self.clashes: set[int] = set()
        for block, row in labels.blocks.items():
            head, members = int(labels.channel[block]), np.unique(labels.channel[row])
            self.is_head[head] = True
            others = set(self.head[members].tolist()) - {-1, head}
            self.clashes |= {head, *others} if others else set()
            self.head[members] = head
        self.reads = np.zeros(labels.count, dtype=bool)  # by label
        self.scaled = np.zeros(labels.count, dtype=bool)
        self.reasons = dict(labels.reasons)
        self.spoiled = _shared_layers(model)
        self.parts: list[_Part] = []
        self.raws = 0
        self.part_of = np.full(labels.count, -1, dtype=np.int64)  # of each channel
        self.place_in = np.zeros(labels.count, dtype=np.int64)
        self.head_part = np.full(labels.count, -1, dtype=np.int64)
        self.head_place = np.zeros(labels.count, dtype=np.int64)
        self.scale_of: dict[str, Ids] = {}
        self.grids: dict[bytes, list[_Run]] = {}

    def groups(self) -> Groups:
        """Everything that was found."""
        self._meet()
        for raw in self._together():
            self._cut(raw)
        self._index()
        self._halve()
        self._whole_again()
        layouts = {key: self._layout(key, array) for key, array in self.arrays.items()}
        products = [
            (p, [self._grid_layout(grid, p.where) for grid in p.grids])
            for p in self.labels.products
        ]
        for part in self.parts:
            self._describe(part, layouts)
        kept = sorted(
            (p for p in self.parts if p.group),
            key=lambda p: (self.order[p.group.producers[0]], p.heads),  # type: ignore[union-attr]
        )
        self._named(kept)
        members = {p.group.name: p.group for p in kept if p.group}
        axes = {key: self._axis(layout) for key, layout in layouts.items()}
        touched = {k: a for k, a in axes.items() if any(s.group or s.outer for s in a)}
        layers = sorted(
            (k for k in touched if isinstance(k[1], str)), key=lambda k: (self.order[k[0]], k[1])
        )
        return Groups(
            members,
            {k: touched[k] for k in layers},  # type: ignore[misc]
            behind=self.labels.behind,
            adjacent=self.labels.adjacent,
            tensors={k: a for k, a in touched.items() if isinstance(k[1], int)},  # type: ignore[misc]
            stated=tuple(self._stated()),
            scales=tuple(self._scales()),
            products=tuple(self._touched(products)),
            everything=members,
        )

    def _grid_layout(self, grid: Ids, where: str) -> list[_Run]:
        """The labels that a product's multiply-accumulates are proportional to, as runs."""
        channels = self.labels.channel[grid.ravel()]
        key = channels.tobytes()
        if key not in self.grids:
            self.grids[key] = self._layout(None, channels, where)
        return self.grids[key]

    def _touched(
        self, products: Sequence[tuple[Product, list[list[_Run]]]]
    ) -> Iterator[tuple[int, tuple[Axis, ...], str]]:
        """The products that some group touches."""
        for product, layouts in products:
            axes = map(self._axis, layouts)
            if touched := tuple(a for a in axes if any(s.group or s.outer for s in a)):
                yield product.macs, touched, product.where

    def _layer(self, ids: Ids) -> str | None:
        """The one layer whose output positions labels are."""
        for key, (start, length) in self.labels.axes.items():
            if start <= ids.min() < start + length:
                return str(key[0]) if key[1] == "out" and ids.max() < start + length else None
        return None

    def _meet(self) -> None:
        """Which side of each product of activations reads the other: the keys, unless a norm lies
        behind them.
        """
        for meeting in self.labels.meetings:
            left, right = self._layer(meeting.left), self._layer(meeting.right)
            if (
                right is not None
                and meeting.right_near == {right}
                and self.kinds[right] in ("conv", "linear")
            ):
                ids, layer = meeting.right, right
            elif (
                left is not None
                and meeting.left_near == {left}
                and self.kinds[left] in ("conv", "linear")
            ):
                ids, layer = meeting.left, left
            else:
                self._freeze(
                    meeting.left, "what it is multiplied with in attention has passed a norm"
                )
                continue
            if np.intersect1d(meeting.left, meeting.right).size:
                self._freeze(ids, "its channels are multiplied with themselves")
                continue
            self.reads[ids] = True
            owner = layer.rpartition(".")[0]
            scale = getattr(self.modules[owner], "scale", None)
            kept = isinstance(scale, float) and math.isclose(scale, meeting.depth**-0.5)
            if (
                meeting.scaled or kept
            ):  # in either case as if it had been built with as many head dimensions as are left
                self.scaled[ids] = True
            if kept:
                self.scale_of[owner] = ids

    def _freeze(self, ids: Ids, reason: str) -> None:
        for c in np.unique(self.labels.channel[ids]).tolist():
            self.reasons.setdefault(c, reason)

    def _together(self) -> Iterator[_Raw]:
        """Channels by the axes that they lie on, and how often."""
        labels, draw = self.labels, np.random.default_rng(0)
        marks = np.zeros(labels.count, dtype=np.uint64)
        head_marks = np.zeros(labels.count, dtype=np.uint64)
        for key, array in self.arrays.items():
            random = draw.integers(1, 2**63, size=3, dtype=np.uint64)
            np.add.at(marks, array, random[0])
            start, length = labels.axes[key]
            if key[1] == "out":
                np.add.at(marks, array[self.reads[start : start + length]], random[1])
            heads = np.where(self.is_head[array], array, self.head[array])
            np.add.at(head_marks, heads[heads >= 0], random[2])
        for reason in sorted(set(self.reasons.values())):
            why, code = (
                [c for c, r in self.reasons.items() if r == reason],
                draw.integers(1, 2**63, dtype=np.uint64),
            )
            np.add.at(marks, why, code)
            np.add.at(head_marks, why, code)
        seen = np.zeros(labels.count, dtype=bool)
        producers = [
            n for n in self.order if self.kinds[n] in ("conv", "linear") and n in labels.behind
        ]
        for layer in producers:
            array = self.arrays[layer, "out"]
            heads = _firsts(self.head[array][self.head[array] >= 0])
            heads = heads[~seen[heads]]
            for several in _by_mark(heads, head_marks):
                seen[several] = True
                reason = (
                    "its channels belong to two kinds of heads"
                    if set(several.tolist()) & self.clashes
                    else ""
                )
                yield _Raw(several, reason or self.reasons.get(int(several[0]), ""), heads=True)
            own = _firsts(array)
            own = own[~seen[own] & ~self.is_head[own]]
            for several in _by_mark(own, marks):
                seen[several] = True
                yield _Raw(several, self.reasons.get(int(several[0]), ""))

    def _cut(self, raw: _Raw) -> None:
        """Parts of channels that follow each other in order along every axis."""
        n, place = len(raw.channels), np.full(self.labels.count, -1, dtype=np.int64)
        place[raw.channels] = np.arange(n)
        cuts, keys = {0, n}, []
        for key, array in self.arrays.items():
            at = place[array]
            if raw.heads:
                at = np.where(
                    at < 0, np.where(self.head[array] >= 0, place[self.head[array]], -1), at
                )
            positions = np.flatnonzero(at >= 0)
            if len(positions):
                keys.append(key)
                if n > 1 and not raw.reason:
                    cuts |= _cuts(positions, at[positions])
        read = any(key[1] == "in" for key in keys) or bool(
            self.reads[np.isin(self.labels.channel, raw.channels)].any()
        )
        if not read and (raw.reason in ("", OUTPUT) or raw.heads):
            return  # nobody reads it: the network's output
        reason = next(
            (f"layer {k[0]} {self.spoiled[str(k[0])]}" for k in keys if k[0] in self.spoiled),
            raw.reason,
        )
        borders = sorted(cuts)
        if len(borders) - 1 > min(MAX_PARTS, max(3, n // 2)) or (raw.heads and len(borders) > 2):
            reason = reason or "its channels are permuted on the way to a consumer"
            borders = [0, n]
        self.raws += 1
        for start, stop in itertools.pairwise(borders):
            self.parts.append(
                _Part(raw.channels[start:stop], raw.heads, reason, keys=keys, raw=self.raws)
            )

    def _index(self) -> None:
        for i, part in enumerate(self.parts):
            owner, place = (
                (self.head_part, self.head_place) if part.heads else (self.part_of, self.place_in)
            )
            owner[part.channels], place[part.channels] = i, np.arange(len(part.channels))

    def _halve(self) -> None:
        """Blocks that must keep equal counts: of grouped convolutions and norms, and of heads."""
        wanted = [
            (self.labels.channel[ids], count, where) for ids, count, where in self.labels.halves
        ]
        for grid, heads, free in self.labels.lattices:
            if heads:
                rest = [i for i in range(grid.ndim) if i not in heads and i != free]
                ids = grid.transpose([*heads, *rest, free])
                for _ in rest:
                    ids = ids.take(0, axis=len(heads))
                wanted.append(
                    (
                        self.labels.channel[ids.ravel()],
                        math.prod(grid.shape[i] for i in heads),
                        "attention",
                    )
                )
        for channels, count, where in wanted:
            parts = set(self.part_of[channels].tolist()) - {-1}
            for i in parts:
                part = self.parts[i]
                if len(parts) > 1 and where != "attention":
                    part.reason = (
                        part.reason or f"{where} splits a concatenation into {count} blocks"
                    )
                    continue
                rows = [row[self.part_of[row] == i] for row in channels.reshape(count, -1)]
                n = len(part.channels)
                even = n % count == 0 and all(
                    np.array_equal(
                        np.unique(self.place_in[row]),
                        np.arange(b * n // count, (b + 1) * n // count),
                    )
                    for b, row in enumerate(rows)
                )
                if even:
                    part.blocks = math.lcm(part.blocks, count)
                elif (
                    len({tuple(row.tolist()) for row in rows}) > 1
                ):  # else the same channels in every block
                    part.reason = (
                        part.reason or f"{n} channels do not divide into {count} blocks in order"
                    )
        for part in self.parts:
            if not part.heads and len(part.channels) % part.blocks:
                part.reason = (
                    part.reason
                    or f"{len(part.channels)} channels do not divide into {part.blocks} blocks"
                )
                part.blocks = 1

    def _whole_again(self) -> None:
        """Parts of one cut of which none may change are one group: head dimensions where heads lie
        between them.
        """
        found: list[_Part] = []
        for _, several in itertools.groupby(self.parts, key=lambda p: p.raw):
            parts = list(several)
            if len(parts) > 1 and all(p.reason for p in parts):
                parts = [replace(parts[0], channels=np.concatenate([p.channels for p in parts]))]
            found += parts
        self.parts = found
        self._index()
        self._one_number_each()

    def _one_number_each(self) -> None:
        """What one number states must be one width: parts that nothing else ties stay as they
        are.
        """
        known: dict[Origin, set[int]] = {}
        for size in self.labels.sizes:
            if (counted := self._counted(size)) is None:
                continue
            channels = counted[0]
            parts = set(
                np.where(
                    self.is_head[channels], self.head_part[channels], self.part_of[channels]
                ).tolist()
            ) - {-1}
            several = known.setdefault(size.of, parts)
            if parts != several and parts and several:
                for i in parts ^ several:
                    part, number = self.parts[i], ".".join(p for p in size.of[:2] if p)
                    part.reason = (
                        part.reason or f"the number '{number}' states its width and another one"
                    )

    def _layout(self, key: Key | None, array: Ids, where: str = "") -> list[_Run]:
        """One axis as runs of positions; a part that is not there as whole copies is frozen."""
        array = array.ravel()
        where = str(key[0]) if key is not None else where
        reads = np.zeros(len(array), dtype=bool)
        scaled = reads
        if key is not None and key[1] == "out":
            start, length = self.labels.axes[key]
            reads, scaled = self.reads[start : start + length], self.scaled[start : start + length]
        parts = [self.parts[i].channels.size for i in range(len(self.parts))]
        runs = _runs(self.part_of[array], self.place_in[array], parts)
        heads = np.where(self.is_head[array], array, self.head[array])
        owner = np.where(heads >= 0, self.head_part[heads], -1)
        outer = [
            r
            for r in _runs(owner, self.head_place[np.maximum(heads, 0)], parts)
            if r.part >= 0 or r.broken >= 0
        ]
        for run in (*runs, *outer):
            if run.broken >= 0:
                part = self.parts[run.broken]
                part.reason = (
                    part.reason or f"its channels do not lie in whole copies along {where}"
                )
        outer = [r for r in outer if r.part >= 0]
        runs = _split_fixed(runs, outer)
        for run in runs:
            if run.part >= 0 and key is not None:
                own = reads[run.start : run.stop]
                if own.any() != own.all():
                    part = self.parts[run.part]
                    part.reason = part.reason or f"only some of its channels along {where} are keys"
                run.reads, run.scaled = bool(own.all()), bool(scaled[run.start : run.stop].all())
        for head in outer:
            inside = [r for r in runs if r.start < head.stop and r.stop > head.start]
            part = self.parts[head.part]
            if all(
                r.part < 0 or self.parts[r.part].reason for r in inside
            ):  # nothing within a head can change
                if inside[0].start < head.start or inside[-1].stop > head.stop:
                    part.reason = part.reason or f"heads do not align with channels along {where}"
                    continue
                at = runs.index(inside[0])
                runs[at : at + len(inside)] = [
                    _Run(-1, head.stop - head.start, 1, head.start, head.stop, outer=head.part)
                ]
            elif (
                len(inside) == 1
                and (inside[0].start, inside[0].stop) == (head.start, head.stop)
                and not (
                    inside[0].channels % head.channels
                    or self.parts[inside[0].part].blocks % head.channels
                )
            ):
                inside[0].outer = head.part
            else:
                part.reason = part.reason or f"heads do not align with channels along {where}"
        return runs

    def _axis(self, layout: Iterable[_Run]) -> Axis:
        segments = []
        for run in layout:
            group = self.parts[run.part].group if run.part >= 0 else None
            outer = self.parts[run.outer].group if run.outer >= 0 else None
            if group is None and outer is not None:  # the heads' own positions: a table's columns
                segments.append(
                    Segment(outer.name, outer.channels, (run.stop - run.start) // outer.channels)
                )
            elif group is None:
                segments.append(Segment(None, run.stop - run.start))
            else:
                name = outer.name if outer is not None else None
                segments.append(
                    Segment(group.name, run.channels, run.repeat, name, run.reads, run.scaled)
                )
        return tuple(segments)

    def _describe(self, part: _Part, layouts: Mapping[Key, list[_Run]]) -> None:
        """Fill in ``part.group``: roles, and a reason where it cannot be resized."""
        index = next(i for i, p in enumerate(self.parts) if p is part)
        on = {k: [r for r in layouts[k] if index in (r.part, r.outer)] for k in part.keys}
        keys = [k for k, runs in on.items() if runs] if not part.reason else part.keys
        layers = sorted((k for k in keys if isinstance(k[1], str)), key=lambda k: self.order[k[0]])
        out = [str(layer) for layer, side in layers if side == "out"]
        reading = (
            {str(k[0]) for k, runs in on.items() if any(r.reads for r in runs)}
            if not part.heads
            else set()
        )
        only = {n for n in reading if all(r.reads for r in on[n, "out"])}
        producers = [n for n in out if self.kinds[n] in ("conv", "linear") and n not in only]
        consumers = [str(layer) for layer, side in layers if side == "in"]
        if not producers or not (consumers or reading or part.reason):
            return
        first = producers[0]
        name = first
        runs = layouts[first, "out"]
        mine = [r for r in runs if index in (r.part, r.outer)]
        if part.heads:
            name = f"{first}.heads"
        elif mine and any(r.part != index for r in runs):
            name = f"{first}[{mine[0].start}:{mine[0].stop}]"
        channels = set(part.channels.tolist())
        joined = bool(channels & set(self.labels.joined.tolist()))
        riders = [n for n in out if self.kinds[n] not in ("conv", "linear")]
        part.group = Group(
            name=name,
            channels=len(part.channels),
            blocks=1 if part.heads else part.blocks,
            producers=tuple(producers),
            riders=tuple(riders),
            consumers=tuple(consumers),
            keys=tuple(sorted(reading, key=lambda n: self.order[n])),
            tensors=tuple(dict.fromkeys(str(k[0]) for k in keys if isinstance(k[1], int))),
            heads=part.heads,
            inner=not joined,
            normalised=not part.heads and any(self.kinds[n] == "channelnorm" for n in riders),
            grade="frozen" if part.reason else None,
            reason=part.reason,
        )

    def _named(self, parts: Sequence[_Part]) -> None:
        """Names that are told apart."""
        taken: dict[str, int] = {}
        for part in parts:
            assert part.group is not None
            count = taken[part.group.name] = taken.get(part.group.name, 0) + 1
            if count > 1:
                part.group = replace(part.group, name=f"{part.group.name}#{count}")

    def _counted(self, size: Size) -> tuple[Ids, float, bool] | None:
        """What a number counts: channels (or heads), how many of them per unit of it, and whether
        they lie within a head.

        None where it counts what stays, such as the 3 of queries, keys and values.
        """
        grid, at = self.labels.channel[size.ids], size.axis
        rows = np.moveaxis(grid, at, -1).reshape(-1, grid.shape[at])
        heads, over = self.head[rows], float(size.factor)
        if (
            grid.ndim > 1
            and (heads >= 0).all()
            and (heads == heads[:1]).all()
            and len(set(heads[0].tolist())) == heads.shape[1]
        ):
            return heads[0], over, False  # an index for each head
        if (rows == rows[:, :1]).all() and rows.shape[1] > 1:
            return None
        kept: list[Ids] = []  # rows that hold other channels than those before
        for row in rows:
            if not any(np.array_equal(row, k) for k in kept):
                kept.append(row)
        return np.concatenate(kept), over * len(kept), grid.ndim > 1

    def _stated(self) -> Iterator[Stated]:
        """Numbers that state the width of something that can change."""
        for size in self.labels.sizes:
            if (counted := self._counted(size)) is None:
                continue
            array, over, within = counted
            runs = self._layout(None, array)
            if within:  # what lies within a head does not depend on how many there are
                for run in runs:
                    run.outer = -1
            axis = self._axis(runs)
            if any(s.group or s.outer for s in axis):
                yield Stated(size.of, axis, over)

    def _scales(self) -> Iterator[tuple[str, str]]:
        """Modules that keep one over the root of the head dimension of a product that takes it by
        itself.
        """
        for name, ids in self.scale_of.items():
            part = self.part_of[self.labels.channel[ids[0]]]
            group = self.parts[part].group if part >= 0 else None
            if group is not None:
                yield name, group.name


@dataclass
class _Run:
    """Positions along an axis: whole copies of a part's channels, or (part -1) fixed ones."""

    part: int
    channels: int
    repeat: int
    start: int
    stop: int
    broken: int = -1
    outer: int = -1
    reads: bool = False
    scaled: bool = False


def _firsts(values: Ids) -> Ids:
    """Distinct values in the order in which they first appear."""
    found, first = np.unique(values, return_index=True)
    return found[np.argsort(first)]


def _by_mark(channels: Ids, marks: Ids) -> Iterator[Ids]:
    """Channels with the same mark, those first that appear first."""
    for mark in _firsts(marks[channels]):
        yield channels[marks[channels] == mark]


def _cuts(positions: Ids, places: Ids) -> set[int]:
    """Channels at which an axis stops following a group in order: the borders of its parts."""
    cuts = {int(places[0]), int(places[-1]) + 1}
    before, after = places[:-1], places[1:]
    jump = (after != before) & (after != before + 1)
    cuts |= set((before[jump] + 1).tolist()) | set(after[jump].tolist())
    gap = np.diff(positions) > 1
    return cuts | set((before[gap] + 1).tolist()) | set(after[gap].tolist())


def _runs(owner: Ids, place: Ids, sizes: Sequence[int]) -> list[_Run]:
    """An axis cut into whole copies of parts' channels, each channel repeated equally often, and
    the rest.
    """
    runs: list[_Run] = []
    at, length = 0, len(owner)
    changes = np.flatnonzero(np.diff(owner)) + 1
    while at < length:
        part = int(owner[at])
        following = np.searchsorted(changes, at, side="right")
        end = int(changes[following]) if following < len(changes) else length
        if part >= 0:
            n = sizes[part]
            other = np.flatnonzero(place[at:end] != place[at])
            repeat = int(other[0]) if len(other) else end - at
            if n == 1:
                repeat = end - at
            stop = at + n * repeat
            if stop <= end and np.array_equal(place[at:stop], np.repeat(np.arange(n), repeat)):
                runs.append(_Run(part, n, repeat, at, stop))
                at = stop
                continue
        runs.append(_Run(-1, end - at, 1, at, end, broken=part))
        at = end
    return runs


def _split_fixed(runs: list[_Run], heads: Sequence[_Run]) -> list[_Run]:
    """Fixed positions cut where heads begin and end."""
    borders = sorted({b for h in heads for b in (h.start, h.stop)})
    found: list[_Run] = []
    for run in runs:
        cuts = (
            [run.start, *[b for b in borders if run.start < b < run.stop], run.stop]
            if run.part < 0
            else [run.start, run.stop]
        )
        if len(cuts) == 2:
            found.append(run)
        else:
            found += [_Run(-1, b - a, 1, a, b) for a, b in itertools.pairwise(cuts)]
    return found


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
