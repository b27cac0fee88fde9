"""From labels to channel groups: channels that lie together, cut where concatenations cut, and laid
out along every axis.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widthbench.errors import UsageError
from widthbench.width.adapters import Origin
from widthbench.width.groups import Axis, Group, Groups, Segment, WidthAttribute
from widthbench.width.inputs import Example, Inputs
from widthbench.width.labels import OUTPUT, Ids, Key, Labels, Product, Size, evaluating
from widthbench.width.layers import MAKING, kind_of, norms_apart
from widthbench.width.operations import trace

MAX_PARTS = 64  # a group cut into more parts than this has permuted channels, not concatenated ones


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


def discover(model: nn.Module, example_input: Example) -> Groups:
    """Find the channel groups of a network; they are not graded yet (see ``certify``).

    Args:
        model: Any network; it is left as it was.
        example_input: What the network takes, on its device: a tensor ``[B, ...]``, a tuple of
            arguments, or a mapping of arguments by name. The network is followed on one sample of
            it, or, where it takes no single one (a batch of clips of four frames), on all.

    Returns:
        The groups in forward order. Groups that cannot be resized are frozen, with the reason.

    Raises:
        UsageError: If the network does not run on the example input.
    """
    inputs = Inputs.of(example_input)
    with evaluating(model):
        try:
            labels, traced = _followed(model, inputs)
        except UsageError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            try:
                with torch.no_grad():
                    output = inputs.run(model)
            except Exception as own:
                first = (str(own).strip().splitlines() or [type(own).__name__])[0]
                raise UsageError(
                    f"{type(model).__name__} does not take an input of shape {inputs.described}:"
                    f" {first}"
                ) from own
            return Groups(
                {},
                {},
                shapes_of(output),
                f"its channels cannot be followed: {type(error).__name__}: {first[:120]}",
            )
    groups = _Assembly(model, labels).groups()
    if made := [n for n, m in model.named_modules() if not _own_weight(m)]:
        how = "hooks or parametrisations (weight_norm, spectral_norm, prune) make the weights of"
        problem = f"{how} '{made[0]}': remove them first, by remove_weight_norm and the like"
        groups = replace(groups, problem=problem)
    elif not groups and any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        problem = "a ScriptModule has no layers to resize: resize it before torch.jit.script"
        groups = replace(groups, problem=problem)
    elif not groups and (bare := _bare_weights(model)):
        problem = f"bare weights such as '{bare}' make its channels: make them layers"
        groups = replace(groups, problem=problem)
    shapes = shapes_of(labels.output)
    if traced is not inputs:
        shapes = tuple((len(inputs), *s[1:]) if s else s for s in shapes)
    return replace(
        groups,
        output_shapes=shapes,
        input_shapes=traced.shapes,
        samples=len(traced),
        program=labels.program,
        steps=labels.steps,
    )


def _followed(model: nn.Module, inputs: Inputs) -> tuple[Labels, Inputs]:
    """A trace on one sample, or on all where the network takes no single one; and on which."""
    one = inputs.first(1)
    try:
        return trace(model, one), one
    except UsageError:
        raise
    except Exception:
        if one is inputs:
            raise
        return trace(model, inputs), inputs


def _own_weight(module: Any) -> bool:
    """Whether the weight of a convolution or linear layer is a parameter of its own."""
    read = kind_of(module) in ("depthwise", *MAKING)
    return not read or "weight" in module._parameters


def _bare_weights(model: nn.Module) -> str:
    """A matrix of weights that is no layer's; "" if there is none."""
    owners = {name: kind_of(m) for name, m in model.named_modules()}
    weights = (n for n, p in model.named_parameters() if p.dim() > 1)
    return next((n for n in weights if owners[n.rpartition(".")[0]] is None), "")


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
        self._contract()
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
            apart=self.labels.apart,
            made=self.labels.made,
            tensors={k: a for k, a in touched.items() if isinstance(k[1], int)},  # type: ignore[misc]
            width_attributes=tuple(self._width_attributes()),
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

    def _contract(self) -> None:
        """Which side of each product of activations reads the other: the keys, unless a norm lies
        behind them; bare weights read what they are multiplied with.
        """
        for ids in self.labels.reading:
            self.reads[ids] = True
        for product in self.labels.contractions:
            left, right = self._layer(product.left), self._layer(product.right)
            if (
                right is not None
                and product.right_near == {right}
                and self.kinds[right] in ("conv", "linear")
            ):
                ids, layer = product.right, right
            elif (
                left is not None
                and product.left_near == {left}
                and self.kinds[left] in ("conv", "linear")
            ):
                ids, layer = product.left, left
            else:
                self._freeze(
                    product.left, "what it is multiplied with in attention has passed a norm"
                )
                continue
            if np.intersect1d(product.left, product.right).size:
                self._freeze(ids, "its channels are multiplied with themselves")
                continue
            self.reads[ids] = True
            owner = layer.rpartition(".")[0]
            scale = getattr(self.modules[owner], "scale", None)
            kept = isinstance(scale, float) and math.isclose(scale, product.depth**-0.5)
            if (
                product.scaled or kept
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
        producers = [n for n in self.order if self.kinds[n] in MAKING and n in labels.behind]
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
            (self.labels.channel[ids], count, where)
            for ids, count, where in self.labels.equal_blocks
        ]
        for grid, heads, free in self.labels.grids:
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
        whole: list[_Part] = []
        for _, several in itertools.groupby(self.parts, key=lambda p: p.raw):
            parts = list(several)
            if len(parts) > 1 and all(p.reason for p in parts):
                parts = [replace(parts[0], channels=np.concatenate([p.channels for p in parts]))]
            whole += parts
        self.parts = whole
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
        if key is not None and key[1] != "in":
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
            at = bisect_right(runs, head.start, key=lambda r: r.stop)
            inside = runs[at : bisect_left(runs, head.stop, lo=at, key=lambda r: r.start)]
            part = self.parts[head.part]
            if all(
                r.part < 0 or self.parts[r.part].reason for r in inside
            ):  # nothing within a head can change
                if inside[0].start < head.start or inside[-1].stop > head.stop:
                    part.reason = part.reason or f"heads do not align with channels along {where}"
                    continue
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
        read = any(r.reads for runs in on.values() for r in runs) and not part.heads
        reading = {
            str(k[0])
            for k, runs in on.items()
            if read and k[1] == "out" and any(r.reads for r in runs)
        }
        only = {n for n in reading if all(r.reads for r in on[n, "out"])}
        producers = [n for n in out if self.kinds[n] in MAKING and n not in only]
        consumers = [str(layer) for layer, side in layers if side == "in"]
        bare = next((str(k[0]) for k in keys if isinstance(k[1], int)), None)
        if not producers and only and bare:
            producers = sorted(only, key=lambda n: self.order[n])
            part.reason = (
                part.reason or f"the bare weights '{bare}' make its channels: make them a layer"
            )
        if not producers or not (consumers or read or part.reason):
            return
        first = producers[0]
        name = first
        runs = layouts[first, "out"]
        mine = [r for r in runs if index in (r.part, r.outer)]
        if part.heads:
            normed = np.isin(part.channels, self.labels.normed_blocks).all()
            name = f"{first}.{'blocks' if normed else 'heads'}"
        elif mine and any(r.part != index for r in runs):
            name = f"{first}[{mine[0].start}:{mine[0].stop}]"
        if part.blocks == len(part.channels) > 1 and not part.heads:
            part.reason = part.reason or f"each of its {part.blocks} blocks has a single channel"
        channels = set(part.channels.tolist())
        meeting = self.labels.joined
        joined = bool(channels & {*meeting.tolist(), *(self.head[meeting] if part.heads else ())})
        riders = [n for n in out if self.kinds[n] not in MAKING]
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
            normalised=any(
                self.kinds[n] == "channelnorm"
                and not (
                    part.heads
                    and all(
                        norms_apart(self.modules[n], (r.stop - r.start) // len(part.channels))
                        for r in on[n, "out"]
                    )
                )
                for n in riders
            )
            or (not part.heads and bool(channels & set(self.labels.standardised.tolist()))),
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

    def _width_attributes(self) -> Iterator[WidthAttribute]:
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
                yield WidthAttribute(size.of, axis, over)

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
    distinct, first = np.unique(values, return_index=True)
    return distinct[np.argsort(first)]


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
    moves = np.flatnonzero(np.diff(place)) + 1
    while at < length:
        part = int(owner[at])
        following = np.searchsorted(changes, at, side="right")
        end = int(changes[following]) if following < len(changes) else length
        if part >= 0:
            n = sizes[part]
            moved = np.searchsorted(moves, at, side="right")
            repeat = min(int(moves[moved]), end) - at if moved < len(moves) and n > 1 else end - at
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
    cut: list[_Run] = []
    for run in runs:
        cuts = (
            [run.start, *[b for b in borders if run.start < b < run.stop], run.stop]
            if run.part < 0
            else [run.start, run.stop]
        )
        if len(cuts) == 2:
            cut.append(run)
        else:
            cut += [_Run(-1, b - a, 1, a, b) for a, b in itertools.pairwise(cuts)]
    return cut


def _shared_layers(model: nn.Module) -> dict[str, str]:
    """Layers that must not be cut: tied tensors, parametrised or lazily rebuilt weights."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():  # one that goes by several names is one layer
        for p in module._parameters.values():
            holders.setdefault(id(p), []).append(name)
    holders.pop(id(None), None)
    tied = {layer for layers in holders.values() if len(set(layers)) > 1 for layer in layers}
    bad = dict.fromkeys(tied, "shares its tensors with another layer")
    for name, module in model.named_modules():
        if nn.utils.parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
            bad[name] = "has parametrised weights"
    return bad
