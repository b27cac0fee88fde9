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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widthbench.errors import NoGroupsError, UsageError, did_you_mean
from widthbench.width.adapters import Origin
from widthbench.width.layers import Side, Step, outputs_first

Grade = Literal["exact", "coupled", "frozen"]
Scope = Literal["inner", "all"]


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
        normalised: True if a norm *across* channels (LayerNorm, GroupNorm) rides along, or
            consumers standardise their weights over them, so that a resize changes what is
            divided by.
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
class WidthAttribute:
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
        width_attributes: Numbers in the network's code that state widths.
        scales: Modules whose ``scale`` is one over the root of a group's head dimension.
        products: Convolutions and matrix products that a group touches: multiply-accumulates of
            the pass, the axes that they are proportional to, and the innermost module that computes
            them.
        input_shapes: Of the tensors that the network was followed on.
        samples: How many samples these are: one, or the whole example where the network takes no
            single one.
        everything: All groups, also those that were not selected.
        behind: For every layer, the nearest layers that it reads from, through operations without
            weights.
        apart: Layers whose tensors the network uses without calling them.
        made: Layers that standardise their weights.
        adjacent: BatchNorms whose input is the output of the layer before, with no operation in
            between.
        program: A digest of what the network computes on the example input.
        steps: The operations by which it does so, with the shapes of what they give.
    """

    members: Mapping[str, Group]
    axes: Mapping[tuple[str, Side], Axis] = field(repr=False)
    output_shapes: tuple[tuple[int, ...], ...] = ()
    problem: str = ""
    behind: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    adjacent: frozenset[str] = field(default=frozenset(), repr=False)
    apart: frozenset[str] = field(default=frozenset(), repr=False)
    made: frozenset[str] = field(default=frozenset(), repr=False)
    tensors: Mapping[tuple[str, int], Axis] = field(default_factory=dict, repr=False)
    width_attributes: tuple[WidthAttribute, ...] = field(default=(), repr=False)
    scales: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    products: tuple[tuple[int, tuple[Axis, ...], str], ...] = field(default=(), repr=False)
    input_shapes: tuple[tuple[int, ...], ...] = ()
    samples: int = 1
    everything: Mapping[str, Group] = field(default_factory=dict, repr=False)
    program: str = field(default="", repr=False)
    steps: tuple[Step, ...] = field(default=(), repr=False)

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
            positions: list[int] = []
            for segment in axis:
                if segment.made_by(name):
                    positions.extend(range(offset, offset + segment.size))
                offset += segment.size
            if positions:
                yield layer, positions

    @cached_property
    def readers(self) -> Mapping[str, tuple[str, ...]]:
        """The layers that read each layer's output next: ``behind`` the other way round."""
        readers: dict[str, tuple[str, ...]] = {}
        for reader, before in self.behind.items():
            for layer in before:
                readers[layer] = (*readers.get(layer, ()), reader)
        return readers

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
        parts.append(channel_rows(groups, name, layer, outputs_first(module, module.weight)))
        if bias and module.bias is not None:
            parts.append(channel_rows(groups, name, layer, module.bias))
    return parts
