"""Labels that travel with the data: which channel lies at each position of every tensor of a forward pass.

Every channel of every layer, and every position along the axes of bare parameters and buffers, gets a number, its label. One
forward pass runs under ``torch``'s dispatch mode; each operation hands labels on: a permutation permutes them, a reshape
reshapes them, an addition ties those that meet, a matrix product ties what it sums over. What an operation does that labels
cannot follow freezes them, with the reason. At the end, labels that are tied are one channel, wherever they lie.

Labels along several axes form a grid. Where a reshape cuts an axis into a grid, as attention does with heads and head
dimensions, the cut needs equal counts; where a product runs separately for each index of an axis of the grid (heads), that
index gets a label of its own, a *block*, whose members are the labels in its row of the grid.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from widthbench.width.adapters import Integer, watched_integers
from widthbench.width.layers import Side, axis_length, kind_of

Ids = np.ndarray
Factor = tuple[tuple[int, ...], Ids]
"""Dimensions of a tensor, ascending, and the labels along them: an array with as many axes."""
Key = tuple[str, str | int]
"""An axis: a layer and its side, or a bare tensor and its dimension."""

MEETS = "its channels meet positions that are not channels"
OUTPUT = "the network's output"


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a tensor.

    Attributes:
        factors: Labels, along disjoint sets of dimensions of size above 1.
        constant: Made within the forward pass from nothing that is labelled or put in: fits anything.
        data: Depends on the network's input.
        near: The nearest layers that it comes from.
        direct: No operation lies between those and it.
    """

    factors: tuple[Factor, ...] = ()
    constant: bool = False
    data: bool = False
    near: frozenset[str] = frozenset()
    direct: bool = True

    def at(self, dim: int) -> Factor | None:
        """The factor that covers a dimension."""
        return next((f for f in self.factors if dim in f[0]), None)


@dataclass(frozen=True)
class Product:
    """A product of two activations, as in attention.

    Attributes:
        macs: Multiply-accumulates per sample.
        grids: Labels along the dimensions that it runs over, one array for each independent set of them.
    """

    macs: int
    grids: tuple[Ids, ...]


@dataclass(frozen=True)
class Meeting:
    """Two activations whose labels are summed over in a product, as queries and keys are.

    Attributes:
        left: Labels of the one, ``left_near`` the layers that it comes from.
        right: Labels of the other, in the same order.
        scaled: Whether the product is divided by the root of how many there are per head (fused attention's own default).
        depth: How many there are per head.
    """

    left: Ids
    left_near: frozenset[str]
    right: Ids
    right_near: frozenset[str]
    scaled: bool
    depth: int


@dataclass(frozen=True)
class Size:
    """A number in the network's code that states how many labels lie along a dimension.

    Attributes:
        of: Where it is kept: (module, attribute, place in it or None).
        factor: The dimension's size over the number.
        ids: The grid.
        axis: Which of its axes.
    """

    of: tuple[str, str, int | None]
    factor: Fraction
    ids: Ids
    axis: int


@dataclass
class Labels:
    """Everything that one forward pass showed.

    Attributes:
        axes: Of each axis, its first label and its length.
        count: Number of labels, blocks included.
        channel: ``[count]``, the channel of each label: the same number where labels are tied.
        reasons: Why channels may not change, by channel.
        joined: Channels that an addition joins with another branch.
        normalised: Channels under a norm across channels.
        blocks: ``[B]`` labels that are blocks, and the members of each.
        halves: (labels in order, number of contiguous parts that need equal counts, where).
        lattices: (grid, which of its axes are heads, which one is free to change).
        meetings: Products in which activations are summed over.
        products: All products of activations.
        sizes: Numbers that state widths.
        behind: For every layer, the nearest layers that it reads from.
        adjacent: BatchNorms right behind another layer.
        applied: How many times per sample each layer's weight is applied.
        output: The network's output.
    """

    axes: dict[Key, tuple[int, int]]
    count: int = 0
    channel: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    reasons: dict[int, str] = field(default_factory=dict)
    joined: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    normalised: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    blocks: dict[int, Ids] = field(default_factory=dict)
    halves: list[tuple[Ids, int, str]] = field(default_factory=list)
    lattices: list[tuple[Ids, tuple[int, ...], int]] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    behind: dict[str, tuple[str, ...]] = field(default_factory=dict)
    adjacent: frozenset[str] = frozenset()
    applied: dict[str, int] = field(default_factory=dict)
    output: Any = None


def trace(model: nn.Module, x: Tensor) -> Labels:
    """Run a network on one input and follow its channels.

    Args:
        model: In eval mode; it is left as it was.
        x: ``[1, ...]``, on the network's device.
    """
    tracer = _Tracer(model)
    tracer.values[x] = Value(data=True)
    with torch.no_grad(), watched_integers(model), _Calls(tracer), tracer:
        output = model(x)
    for t in tree_leaves(output):
        if isinstance(t, Tensor):
            for _, ids in tracer.of(t).factors:
                tracer.freeze(ids, OUTPUT)
    return tracer.finish(output)


class _Calls(TorchFunctionMode):
    """Looks at calls before torch takes them apart: integers that know where they come from, attention's own scale."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self.tracer.call
        call = self.tracer.call = _Call(getattr(func, "__name__", ""), args, kwargs)
        try:
            if call.name == "__getitem__":
                _note_whole(self.tracer, call)
            return func(*args, **kwargs)
        finally:
            self.tracer.call = before


@dataclass(frozen=True)
class _Call:
    """A call of one of torch's functions or methods."""

    name: str = ""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def shape(self) -> list[Any]:
        """The shape that a reshape was asked for, if this is one."""
        if self.name not in ("reshape", "view", "unflatten", "expand"):
            return []
        rest = list(self.args[1:]) or list(self.kwargs.values())
        if self.name == "unflatten":
            rest = rest[-1:]
        return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest

    def integers(self) -> list[Integer]:
        """All integers with an origin among the arguments."""
        found, waiting = [], [*self.args, *self.kwargs.values()]
        while waiting:
            at = waiting.pop(0)
            if isinstance(at, Integer):
                found.append(at)
            elif isinstance(at, list | tuple):
                waiting.extend(at)
            elif isinstance(at, slice):
                waiting.extend((at.start, at.stop))
        return found


class _Tracer(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.values: Any = WeakTensorKeyDictionary()
        self.call = _Call()
        self.kinds = {name: kind_of(m) for name, m in model.named_modules()}
        self.axes: dict[Key, tuple[int, int]] = {}
        self.starts: list[int] = []
        self.keys: list[Key] = []
        self.count = 0
        self.ties: list[tuple[Ids, Ids]] = []
        self.frozen: list[tuple[Ids, str]] = []
        self.joined: list[Ids] = []
        self.normalised: list[Ids] = []
        self.rows: dict[bytes, int] = {}
        self.members: dict[int, Ids] = {}
        self.halves: list[tuple[Ids, int, str]] = []
        self.grids: list[Ids] = []
        self.meetings: list[Meeting] = []
        self.products: list[Product] = []
        self.sizes: list[Size] = []
        self.behind: dict[str, dict[str, None]] = {}
        self.adjacent: set[str] = set()
        self.applied: dict[str, int] = {}
        self._label_tensors(model)

    # labels

    def _label_tensors(self, model: nn.Module) -> None:
        """Labels for the axes of all layers, and of all floating tensors that belong to no layer."""
        for name, module in model.named_modules():
            if self.kinds[name] is None:
                continue
            out = self._axis((name, "out"), axis_length(module, "out"))
            inside = None
            if self.kinds[name] in ("conv", "linear"):
                inside = self._axis((name, "in"), axis_length(module, "in"))
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                t = getattr(module, leaf, None)
                if not isinstance(t, Tensor) or t in self.values or t.dim() == 0 or t.shape[0] != len(out):
                    continue
                factors: list[Factor] = [((0,), out)]
                if leaf == "weight" and inside is not None and t.shape[1] == len(inside):
                    factors.append(((1,), inside))
                self.values[t] = Value(tuple(factors))
        for name, t in itertools.chain(model.named_parameters(), model.named_buffers()):
            if t in self.values:
                continue
            if not t.is_floating_point():
                self.values[t] = Value(constant=True)
                continue
            self.values[t] = Value(tuple(((d,), self._axis((name, d), n)) for d, n in enumerate(t.shape) if n > 1))

    def _axis(self, key: Key, length: int) -> Ids:
        self.axes[key] = (self.count, length)
        self.starts.append(self.count)
        self.keys.append(key)
        return self._new(length)

    def _new(self, length: int) -> Ids:
        self.count += length
        return np.arange(self.count - length, self.count, dtype=np.int64)

    def owner(self, ids: Ids | None) -> Key | None:
        """The axis that labels were made for."""
        if ids is None or ids.size == 0:
            return None
        first = int(ids.flat[0])
        at = bisect.bisect_right(self.starts, first) - 1
        start, length = self.axes[self.keys[at]]
        return self.keys[at] if start <= first < start + length else None

    def of(self, t: Tensor) -> Value:
        """What is known of a tensor; one that was never seen is a constant."""
        return self.values.get(t) or Value(constant=True)

    def tie(self, a: Ids, b: Ids) -> None:
        """Make labels one channel, after broadcasting."""
        if a is b:
            return
        a, b = np.broadcast_arrays(a, b)
        self.ties.append((a.ravel(), b.ravel()))

    def freeze(self, ids: Ids, reason: str) -> None:
        """Let channels stay as they are."""
        self.frozen.append((ids.ravel(), reason))

    def freeze_all(self, values: Iterable[Value], reason: str) -> None:
        """Let all channels of some tensors stay as they are."""
        for value in values:
            for _, ids in value.factors:
                self.freeze(ids, reason)

    def blocks(self, ids: Ids, kept: Sequence[int]) -> Ids:
        """Labels for the rows of a grid along some of its axes."""
        rest = [i for i in range(ids.ndim) if i not in kept]
        rows = ids.transpose([*kept, *rest]).reshape(math.prod(ids.shape[i] for i in kept), -1)
        found = []
        for row in rows:
            row = np.unique(row)
            key = row.tobytes()
            if key not in self.rows:
                self.rows[key] = int(self._new(1)[0])
                self.members[self.rows[key]] = row
            found.append(self.rows[key])
        return np.array(found, dtype=np.int64).reshape([ids.shape[i] for i in kept])

    def merged(self, factors: Iterable[Factor]) -> list[Factor]:
        """Factors of tensors that meet position by position: one for each set of dimensions, the rest tied to it."""
        found: list[Factor] = []
        for new in factors:
            at: Factor | None = new
            for old in list(found):
                if at is not None and set(old[0]) & set(at[0]):
                    found.remove(old)
                    at = self._met(old, at)
            if at is not None:
                found.append(at)
        return found

    def _met(self, a: Factor, b: Factor) -> Factor | None:
        if a[0] == b[0]:
            self.tie(a[1], b[1])
            return a
        if set(a[0]) < set(b[0]):
            a, b = b, a
        if not set(b[0]) < set(a[0]):
            for _, ids in (a, b):
                self.freeze(ids, "its channels lie across others")
            return None
        axes = [a[0].index(d) for d in b[0]]
        if a[1].ndim - 1 in axes:  # along the last axis of a grid: one entry for all rows, such as a norm's weights in each head
            shape = [a[1].shape[i] if i in axes else 1 for i in range(a[1].ndim)]
            self.tie(a[1], b[1].reshape(shape))
        else:
            self.tie(self.blocks(a[1], axes), b[1])
        return a

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        rule: Callable[..., Any] | None = RULES.get(name)
        if rule is None and (torch.Tag.pointwise in func.tags or name in POINTWISE):
            rule = _pointwise
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        values = [self.of(t) for t in inputs]
        if not any(v.factors or v.data for v in values):
            result: Any = [Value(constant=True)] * len(outputs)
            if name in IN_PLACE:
                result = [values[0]] * len(outputs)
        elif rule is None:
            self.freeze_all(values, f"the operation {name} has no rule for channels")
            result = [_plain(values)] * len(outputs)
        else:
            arguments = [*args, *kwargs.values()] if name in NAMED else args
            result = rule(self, name, arguments, output)
        if isinstance(result, Value):
            result = [result] * len(outputs)
        for t, value in zip(outputs, result, strict=True):
            self.values[t] = value
        return output

    def layer_of(self, ids: Ids | None, side: Side = "out") -> str | None:
        """The layer whose axis labels were made for."""
        key = self.owner(ids)
        return str(key[0]) if key is not None and key[1] == side else None

    def passes(self, layer: str | None, x: Value, applied: int = 0) -> tuple[frozenset[str], bool]:
        """Note that a layer reads a tensor; (near, direct) of what it gives."""
        if layer is None:
            return x.near, False
        if x.data:
            known = self.behind.setdefault(layer, {})
            known.update(dict.fromkeys(n for n in sorted(x.near) if n != layer))
            self.applied[layer] = self.applied.get(layer, 0) + applied
            if self.kinds[layer] == "batchnorm" and len(x.near) == 1 and x.direct:
                self.adjacent.add(layer)
        return frozenset((layer,)), True

    def contract(
        self,
        a: tuple[Tensor, int],
        b: tuple[Tensor, int],
        maps: tuple[Mapping[int, int], Mapping[int, int]],
        macs: int,
        scaled: bool = False,
    ) -> Value:
        """A product of two tensors, summed over one dimension of each.

        Args:
            a: The one and its dimension.
            b: The other and its dimension.
            maps: Where their other dimensions go in the output.
            macs: Multiply-accumulates.
            scaled: Divided by the root of the summed dimension's size.
        """
        (ta, da), (tb, db) = a, b
        va, vb = self.of(ta), self.of(tb)
        both = set(maps[0].values()) & set(maps[1].values())
        fa, fb = va.at(da), vb.at(db)
        along = "along"  # the summed dimension, under one name for both
        ga = None if fa is None else [maps[0].get(d, along) for d in fa[0]]
        gb = None if fb is None else [maps[1].get(d, along) for d in fb[0]]
        grid: Ids | None = None
        if fa is not None and fb is not None and ga is not None and gb is not None:
            alone = {d for d in ga if d != along} ^ {d for d in gb if d != along}
            if alone - both:  # one of them has more axes to its grid than those that both share
                self.tie(*(self.blocks(f[1], [g.index(along)]) if len(g) > 1 else f[1] for f, g in ((fa, ga), (fb, gb))))
                grid = fa[1]
            else:
                order = [*sorted({d for d in (*ga, *gb) if isinstance(d, int)}), along]
                left, right = (_laid(f[1], g, order) for f, g in ((fa, ga), (fb, gb)))
                self.tie(left, right)
                left, right = np.broadcast_arrays(left, right)
                grid = left
                if va.data and vb.data:
                    self.meetings.append(Meeting(left.ravel(), va.near, right.ravel(), vb.near, scaled, left.shape[-1]))
        else:
            for f, v, other in ((fa, va, vb), (fb, vb, va)):
                if f is not None and not other.constant:
                    self.freeze(f[1], MEETS if v.data else "reads positions that are not channels")
        left_over: list[Factor] = []
        for value, summed, mapping in ((va, fa, maps[0]), (vb, fb, maps[1])):
            for f in value.factors:
                if f is not summed:
                    left_over.append(_moved(f, mapping))
                elif len(f[0]) > 1:
                    kept = [i for i, d in enumerate(f[0]) if d in mapping]
                    left_over.append(_moved((tuple(f[0][i] for i in kept), self.blocks(f[1], kept)), mapping))
        factors = self.merged(left_over)
        if va.data and vb.data:
            grids = [] if grid is None else [grid]
            seen = np.concatenate([g.ravel() for g in grids]) if grids else np.zeros(0, dtype=np.int64)
            rows = [r for _, ids in factors for r in ids.ravel().tolist() if r in self.members]
            inner = np.concatenate([self.members[r] for r in rows]) if rows else np.zeros(0, dtype=np.int64)
            for _, ids in factors:
                if not (grids and np.isin(ids, self._all_blocks()).all() and np.isin(inner, seen).any()):
                    grids.append(ids)
            self.products.append(Product(macs, tuple(grids)))
        return Value(tuple(factors), data=va.data or vb.data, near=va.near | vb.near, direct=False)

    def _all_blocks(self) -> Ids:
        return np.fromiter(self.members, dtype=np.int64, count=len(self.members))

    def finish(self, output: Any) -> Labels:
        """Channels from labels, once everything has been seen."""
        channel = self._components()
        lattices = []
        heads = np.full(self.count, -1, dtype=np.int64)  # the block of each label, as its channel
        for block, row in self.members.items():
            heads[row] = channel[block]
        for grid in self.grids:
            rows = heads[grid]
            along = [i for i in range(grid.ndim) if _varies(rows, i)] if (rows >= 0).all() else []
            if len(along) == grid.ndim:
                along = []
            free = max((i for i in range(grid.ndim) if i not in along), key=lambda i: (grid.shape[i], i))
            for i in range(grid.ndim):
                if i != free and i not in along:
                    self.tie(grid, grid.take([0], axis=i))
            lattices.append((grid, tuple(along), free))
        channel = self._components()
        reasons: dict[int, str] = {}
        for ids, reason in self.frozen:
            for c in np.unique(channel[ids]).tolist():
                reasons.setdefault(c, reason)
        return Labels(
            self.axes,
            self.count,
            channel,
            reasons,
            _unique(channel, self.joined),
            _unique(channel, self.normalised),
            self.members,
            self.halves,
            lattices,
            self.meetings,
            self.products,
            self.sizes,
            {layer: tuple(found) for layer, found in self.behind.items()},
            frozenset(self.adjacent),
            self.applied,
            output,
        )

    def _components(self) -> Ids:
        if not self.ties:
            return np.arange(self.count)
        a, b = (np.concatenate([t[i] for t in self.ties]) for i in (0, 1))
        graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1].astype(np.int64)

    def cut(self, grid: Ids) -> None:
        """Note that labels must keep the shape of a grid."""
        self.grids.append(grid)


def _unique(channel: Ids, parts: list[Ids]) -> Ids:
    return np.unique(channel[np.concatenate([p.ravel() for p in parts])]) if parts else np.zeros(0, dtype=np.int64)


def _varies(ids: Ids, axis: int) -> bool:
    return ids.shape[axis] > 1 and not bool((ids == ids.take([0], axis=axis)).all())


def _laid(ids: Ids, names: Sequence[Any], order: Sequence[Any]) -> Ids:
    """An array whose axes have names, with its axes in an order, and size 1 where a name is missing."""
    present = [n for n in order if n in names]
    ids = ids.transpose([list(names).index(n) for n in present])
    return ids.reshape([ids.shape[present.index(n)] if n in present else 1 for n in order])


def _moved(factor: Factor, mapping: Mapping[int, int]) -> Factor:
    """A factor whose dimensions have moved."""
    dims = [mapping[d] for d in factor[0]]
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    return tuple(dims[i] for i in order), factor[1].transpose(order)


def _simple(dims: Sequence[int], ids: Ids) -> list[Factor]:
    """A factor without the axes along which its labels do not change; a single channel keeps them."""
    if ids.ndim and bool((ids == ids.flat[0]).all()):
        return [(tuple(dims), ids)]
    for axis in reversed(range(ids.ndim)):
        if not _varies(ids, axis):
            ids = ids.take(0, axis=axis)
            dims = [d for i, d in enumerate(dims) if i != axis]
    return [(tuple(dims), ids)] if ids.ndim else []


def _plain(values: Iterable[Value]) -> Value:
    """What is known of an operation's output without labels."""
    values = list(values)
    near = frozenset().union(*(v.near for v in values)) if values else frozenset()
    return Value(constant=all(v.constant for v in values), data=any(v.data for v in values), near=near, direct=False)


def _with(value: Value, factors: Iterable[Factor], **changes: Any) -> Value:
    known = {"constant": value.constant, "data": value.data, "near": value.near, "direct": value.direct}
    return Value(tuple(factors), **(known | changes))


# rules: (tracer, name, arguments, output) -> what is known of the output, or of each of them


def _pointwise(tracer: _Tracer, name: str, args: Any, output: Any) -> Value:
    outs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    out = outs[0]
    inputs = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
    factors: list[Factor] = []
    plain: set[int] = set()
    branches: dict[tuple[int, ...], list[Ids]] = {}
    for t in inputs:
        value, shift = tracer.of(t), out.dim() - t.dim()
        covered = set()
        for dims, ids in value.factors:
            moved = tuple(d + shift for d in dims)
            covered.update(dims)
            if any(t.shape[d] != out.shape[m] for d, m in zip(dims, moved, strict=True)):
                tracer.freeze(ids, "a single channel meets many")
                continue
            factors.append((moved, ids))
            if value.data:
                branches.setdefault(moved, []).append(ids)
        if not value.constant:
            one = 1 if value.data else 0  # a single position that is no channel may meet a single channel
            plain |= {d + shift for d, n in enumerate(t.shape) if d not in covered and (n > 1 or n == one == out.shape[d + shift])}
    for dims, ids in factors:
        if plain & set(dims):
            tracer.freeze(ids, MEETS)
    found = [f for f in tracer.merged(factors) if not plain & set(f[0])]
    if name in JOINING:
        for parts in branches.values():
            if len(parts) > 1 and any(p is not parts[0] and not np.array_equal(p, parts[0]) for p in parts):
                tracer.joined.append(parts[0])
    values = [tracer.of(t) for t in inputs]
    value = _plain(values)
    return _with(value, found, direct=name in ("clone", "_to_copy", "alias", "detach") and values[0].direct)


def _same(tracer: _Tracer, name: str, args: Any, output: Any) -> Value:
    value = tracer.of(args[0])
    if output.shape != args[0].shape:  # other strides are the same positions, another shape is not
        tracer.freeze_all([value], f"the operation {name} has no rule for channels")
        return _with(value, [], direct=False)
    return value


def _remapped(tracer: _Tracer, t: Tensor, mapping: Mapping[int, int]) -> Value:
    value = tracer.of(t)
    for dims, ids in value.factors:
        if not all(d in mapping for d in dims):
            tracer.freeze(ids, "its only channel is squeezed away")
    return _with(value, [_moved(f, mapping) for f in value.factors if all(d in mapping for d in f[0])])


def _permute(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t = args[0]
    n = t.dim()
    if name == "t":
        order = list(reversed(range(n)))
    elif name.startswith("transpose"):
        order = list(range(n))
        a, b = (d % n for d in args[1:3])
        order[a], order[b] = order[b], order[a]
    else:
        order = [d % n for d in args[1]]
    return _remapped(tracer, t, {old: new for new, old in enumerate(order)})


def _unsqueeze(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    at = args[1] % output.dim()
    return _remapped(tracer, args[0], {d: d + (d >= at) for d in range(args[0].dim())})


def _squeeze(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t = args[0]
    dims = range(t.dim()) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = {d % t.dim() for d in dims if t.shape[d] == 1}
    kept = [d for d in range(t.dim()) if d not in gone]
    return _remapped(tracer, t, {d: i for i, d in enumerate(kept)})


def _expand(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t = args[0]
    shift = output.dim() - t.dim()
    return _remapped(tracer, t, {d: d + shift for d in range(t.dim())})


def _chunks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of dimensions of two shapes that hold the same elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [], []
        size_a = size_b = 1
        while True:
            if size_a <= size_b and i < len(old) and (not a or size_a < size_b):
                size_a *= old[i]
                a.append(i)
                i += 1
            elif j < len(new) and (not b or size_b < size_a):
                size_b *= new[j]
                b.append(j)
                j += 1
            else:
                break
        while i < len(old) and old[i] == 1 and j == len(new):
            a.append(i)
            i += 1
        while j < len(new) and new[j] == 1 and i == len(old):
            b.append(j)
            j += 1
        yield a, b


def _view(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, value = args[0], tracer.of(args[0])
    if not value.factors:
        return value
    chunks = list(_chunks(list(t.shape), list(output.shape)))
    factors: list[Factor] = []
    for dims, ids in value.factors:
        touched = [(a, b) for a, b in chunks if set(a) & set(dims)]
        if ids.size == 1:  # a single channel: it goes where its dimension goes, repeated where others are merged with it
            (a, b), at = touched[0], int(dims[0])
            many = [d for d in b if output.shape[d] > 1]
            if len(b) == 1 or (len(many) <= 1 and len(a) > 1 and max(t.shape[d] for d in a) > 1):
                to = many[0] if many else b[0]
                factors.append(((to,), np.full(output.shape[to], ids.flat[0])))
            elif at - a[0] < len(b) and len(a) == len(b):
                factors.append(((b[at - a[0]],), ids))
            else:
                tracer.freeze(ids, "its only channel is squeezed away")
            continue
        olds = [d for a, _ in touched for d in a]
        news = [d for _, b in touched for d in b]
        full = ids.reshape([t.shape[d] if d in dims else 1 for d in olds])
        if any(len([d for d in a if t.shape[d] > 1]) > 1 for a, _ in touched):
            full = np.broadcast_to(full, [t.shape[d] for d in olds])
        elif math.prod(full.shape) != math.prod(output.shape[d] for d in news):
            full = np.broadcast_to(full, [t.shape[d] for d in olds])
        found = _simple(news, full.reshape([output.shape[d] for d in news]))
        for f in found:
            if f[1].ndim > len(dims):
                tracer.cut(f[1])
        factors += found
    taken = [d for dims, _ in factors for d in dims]
    if len(taken) > len(set(taken)):
        tracer.freeze_all([value], "a reshape merges its channels with others")
        factors = []
    alike = len(factors) == len(value.factors) and all(
        np.array_equal(new[1], old[1]) for new, old in zip(factors, value.factors, strict=True)
    )
    for i, size in enumerate(tracer.call.shape()):
        if isinstance(size, Integer) and len(tracer.call.shape()) == output.dim() and size == output.shape[i]:
            _note_size(tracer, size, factors, i)
    return _with(value, factors, direct=value.direct and alike)


def _note_whole(tracer: _Tracer, call: _Call) -> None:
    """A slice up to a number that is a dimension's whole length is no operation to torch, yet it states a width."""
    t, index = call.args
    for dim, part in enumerate(index if isinstance(index, tuple) else (index,)):
        if not isinstance(part, slice):
            if not isinstance(part, int):
                return
            continue
        if isinstance(part.stop, Integer) and not part.start and dim < t.dim() and part.stop == t.shape[dim]:
            _note_size(tracer, part.stop, tracer.of(t).factors, dim)


def _note_size(tracer: _Tracer, size: Integer, factors: Iterable[Factor], dim: int) -> None:
    for dims, ids in factors:
        if dim in dims:
            tracer.sizes.append(Size(size.origin, size.factor, ids, dims.index(dim)))


def _picked(tracer: _Tracer, t: Tensor, dim: int, picks: Callable[[Ids, int], Ids], keepdim: bool) -> Value:
    """What is left of one dimension after a selection along it."""
    value, dim = tracer.of(t), dim % t.dim()
    factors: list[Factor] = []
    for dims, ids in value.factors:
        if dim in dims:
            axis = dims.index(dim)
            chosen = picks(ids, axis)
            left = [d for d in dims if keepdim or d != dim]
            if not keepdim and not left:
                tracer.freeze(ids, "single channels of it are picked out")
            factors += _simple([d - (not keepdim and d > dim) for d in left], chosen) if chosen.ndim else []
        else:
            factors.append((tuple(d - (not keepdim and d > dim) for d in dims), ids))
    return _with(value, factors)


def _select(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    return _picked(tracer, args[0], args[1], lambda ids, axis: ids.take(args[2], axis=axis), False)


def _slice(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t = args[0]
    dim = (args[1] if len(args) > 1 else 0) % t.dim()
    length = t.shape[dim]
    start, stop, step = (args[i] if len(args) > i and args[i] is not None else d for i, d in ((2, 0), (3, length), (4, 1)))
    start, stop, _ = slice(start, stop).indices(length)
    factor = tracer.of(t).at(dim)
    if factor is not None:
        axis = factor[0].index(dim)
        known = [i for i in tracer.call.integers() if int(i) in (start, stop)]
        for integer in known:
            part = factor[1].take(range(int(integer)), axis=axis)
            tracer.sizes.append(Size(integer.origin, integer.factor, part, axis))
        if not known and (start, stop) != (0, length):
            _even(tracer, factor, axis, start, stop)
    return _picked(tracer, t, dim, lambda ids, axis: ids.take(range(start, stop, step), axis=axis), True)


def _even(tracer: _Tracer, factor: Factor, axis: int, start: int, stop: int) -> None:
    """A part whose size nothing states: where it is one of several equal ones, they need equal counts."""
    size, length = stop - start, factor[1].shape[axis]
    if size and length % size == 0 and start % size == 0:
        ids = np.moveaxis(factor[1], axis, -1)
        tracer.cut(ids.reshape(*ids.shape[:-1], length // size, size))


def _split(tracer: _Tracer, name: str, args: Any, output: Any) -> list[Value]:
    t = args[0]
    dim = (args[2] if len(args) > 2 else 0) % t.dim()
    factor = tracer.of(t).at(dim)
    sizes = [o.shape[dim] for o in output]
    starts = [0, *itertools.accumulate(sizes)]
    if factor is not None:
        axis = factor[0].index(dim)
        if len(set(sizes)) == 1 and name != "split_with_sizes":
            _even(tracer, factor, axis, 0, sizes[0])
        for integer in tracer.call.integers():
            matching = [i for i, s in enumerate(sizes) if s == int(integer)]
            stated = tracer.call.args[1] if len(tracer.call.args) > 1 else None
            if isinstance(stated, list | tuple):
                matching = [i for i in matching if i < len(stated) and stated[i] is integer]
            for i in matching[:1]:
                part = factor[1].take(range(starts[i], starts[i + 1]), axis=axis)
                tracer.sizes.append(Size(integer.origin, integer.factor, part, axis))
        if len(set(sizes)) == 1 and name == "split_with_sizes" and not tracer.call.integers():
            _even(tracer, factor, axis, 0, sizes[0])
    return [
        _picked(tracer, t, dim, lambda ids, axis, a=a, b=b: ids.take(range(a, b), axis=axis), True)
        for a, b in itertools.pairwise(starts)
    ]


def _unbind(tracer: _Tracer, name: str, args: Any, output: Any) -> list[Value]:
    dim = args[1] if len(args) > 1 else 0
    return [
        _picked(tracer, args[0], dim, lambda ids, axis, i=i: ids.take(i, axis=axis), False) for i in range(len(output))
    ]


def _cat(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    tensors = [t for t in args[0] if t.numel() or t.dim() == output.dim()]
    dim = (args[1] if len(args) > 1 else 0) % output.dim()
    values = [tracer.of(t) for t in tensors]
    base = _plain(values)
    others = tracer.merged(f for v in values for f in v.factors if dim not in f[0])
    plain = {
        d
        for v, t in zip(values, tensors, strict=True)
        for d, n in enumerate(t.shape)
        if d != dim and n > 1 and v.at(d) is None and not v.constant
    }
    for dims, ids in others:
        if plain & set(dims):
            tracer.freeze(ids, MEETS)
    others = [f for f in others if not plain & set(f[0])]
    along = [v.at(dim) for v in values]
    if not any(along):
        return _with(base, others, direct=False)
    dims = max((f[0] for f in along if f is not None), key=len)
    parts = []
    for f, v, t in zip(along, values, tensors, strict=True):
        shape = [t.shape[d] for d in dims]
        if f is not None and f[0] == dims:
            parts.append(f[1])
        elif f is not None and set(f[0]) < set(dims):
            parts.append(np.broadcast_to(f[1].reshape([t.shape[d] if d in f[0] else 1 for d in dims]), shape))
        elif f is None:  # fixed positions between channels: tokens in front of others, or constants
            new = tracer._new(math.prod(shape)).reshape(shape)
            tracer.freeze(new, "fixed positions lie beside its channels")
            parts.append(new)
        else:
            tracer.freeze_all(values, "a concatenation lays its channels across others")
            return _with(base, [], direct=False)
    return _with(base, [*[f for f in others if not set(f[0]) & set(dims)], (dims, np.concatenate(parts, axis=dims.index(dim)))], direct=False)


def _stack(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    tensors = args[0]
    dim = (args[1] if len(args) > 1 else 0) % output.dim()
    mapping = {d: d + (d >= dim) for d in range(output.dim() - 1)}
    values = [_remapped(tracer, t, mapping) for t in tensors]
    base = _plain(values)
    shapes = {tuple(f[0] for f in v.factors) for v in values}
    if len(shapes) != 1:
        tracer.freeze_all(values, MEETS)
        return _with(base, [], direct=False)
    factors: list[Factor] = []
    for several in zip(*(v.factors for v in values), strict=True):
        dims = (dim, *several[0][0])
        ids = np.stack([ids for _, ids in several])
        tracer.cut(ids) if not all(np.array_equal(ids[0], i) for i in ids) else None
        factors += [_moved(f, {d: d for d in dims}) for f in _simple(dims, ids)]
    taken = [d for dims, _ in factors for d in dims]
    if len(taken) > len(set(taken)):
        tracer.freeze_all(values, "a stack lays its channels across others")
        factors = []
    return _with(base, factors, direct=False)


def _pad(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, pads = args[0], list(args[1])
    value = tracer.of(t)
    factors: list[Factor] = []
    for dims, ids in value.factors:
        for i in range(len(pads) // 2):
            dim = t.dim() - 1 - i
            before, after = pads[2 * i], pads[2 * i + 1]
            if dim not in dims or not (before or after):
                continue
            if before < 0 or after < 0:
                tracer.freeze(ids, "a negative padding cuts its channels")
                return _with(value, [f for f in value.factors if f[1] is not ids], direct=False)
            axis, parts = dims.index(dim), [ids]
            stated = next((i for i in tracer.call.integers() if i in (before, after)), None)
            known = stated is not None and {before, after} <= {0, int(stated)}
            new: list[Ids] = []
            for n, front in ((before, True), (after, False)):
                if n:
                    shape = [n if a == axis else s for a, s in enumerate(ids.shape)]
                    new.append(tracer._new(math.prod(shape)).reshape(shape))
                    parts = [new[-1], *parts] if front else [*parts, new[-1]]
                    if stated is None or not known:
                        tracer.freeze(new[-1], "zeros are padded to it, a fixed number of them")
                    else:  # one number for both ends: they keep equal counts
                        tracer.tie(new[0], new[-1])
                        tracer.sizes.append(Size(stated.origin, stated.factor, new[-1], axis))
            ids = np.concatenate(parts, axis=axis)
        factors.append((dims, ids))
    return _with(value, factors, direct=False)


def _index(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, indices = args[0], list(args[1])
    value = tracer.of(t)
    at = [i for i, index in enumerate(indices) if index is not None]
    given = [indices[i] for i in at]
    if any(i.dtype in (torch.bool, torch.uint8) for i in given):
        tracer.freeze_all([value], "a mask picks among its channels")
        return _with(value, [], direct=False)
    rank = max(i.dim() for i in given)
    start = at[0] if at == list(range(at[0], at[0] + len(at))) else 0
    kept = [d for d in range(t.dim()) if d not in at]
    mapping = {d: n if n < start else n + rank for n, d in enumerate(kept)}
    factors: list[Factor] = []
    for dims, ids in value.factors:
        if not set(dims) & set(at):
            factors.append(_moved((dims, ids), mapping))
        elif len(dims) == len(at) == 1 and tracer.of(given[0]).constant:
            factors += _simple(range(start, start + rank), ids[given[0].cpu().numpy()])
        elif value.data:
            tracer.freeze(ids, "an index picks among its channels")
    return _with(value, factors, direct=False)


def _index_select(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    index = args[2].cpu().numpy()
    return _picked(tracer, args[0], args[1], lambda ids, axis: ids.take(index, axis=axis), True)


def _flip(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, value = args[0], tracer.of(args[0])
    turned = {d % t.dim() for d in (args[1] if name == "flip" else args[2] if len(args) > 2 else range(t.dim()))}
    factors: list[Factor] = []
    for dims, ids in value.factors:
        if turned & set(dims):
            if name == "roll":
                tracer.freeze(ids, "its channels are rolled")
                continue
            ids = np.flip(ids, [dims.index(d) for d in turned & set(dims)])
        factors.append((dims, ids))
    return _with(value, factors, direct=False)


def _repeat(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, value = args[0], tracer.of(args[0])
    shift = output.dim() - t.dim()
    factors = []
    for dims, ids in value.factors:
        moved = tuple(d + shift for d in dims)
        factors.append((moved, np.tile(ids, [output.shape[m] // t.shape[d] for m, d in zip(moved, dims, strict=True)])))
    return _with(value, factors, direct=False)


def _reduce(tracer: _Tracer, name: str, args: Any, output: Any) -> Value | list[Value]:
    t = args[0]
    given = args[2] if name == "linalg_vector_norm" and len(args) > 2 else args[1] if len(args) > 1 and name != "linalg_vector_norm" else None
    if isinstance(given, bool) or given is None or given == []:
        dims = set(range(t.dim()))
    else:
        dims = {d % t.dim() for d in ([given] if isinstance(given, int) else given)}
    first = next(o for o in tree_leaves(output) if isinstance(o, Tensor))
    keepdim = first.dim() == t.dim()
    kept = [d for d in range(t.dim()) if keepdim or d not in dims]
    mapping = {d: i for i, d in enumerate(kept)}
    value = tracer.of(t)
    factors: list[Factor] = []
    for own, ids in value.factors:
        over = [i for i, d in enumerate(own) if d in dims]
        if len(over) == len(own):
            tracer.freeze(ids, f"{name} runs over its channels")
            continue
        left = ids
        for axis in sorted(over, reverse=True):
            tracer.tie(left, left.take([0], axis=axis))
            left = left.take(0, axis=axis)
        factors.append(_moved((tuple(d for i, d in enumerate(own) if i not in over), left), mapping))
    return _with(value, factors, direct=False)


def _softmax(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, value = args[0], tracer.of(args[0])
    dim = args[1] % t.dim()
    factors = []
    for dims, ids in value.factors:
        if dims == (dim,):
            tracer.freeze(ids, "a softmax runs over its channels")
            continue
        if dim in dims:
            tracer.tie(ids, ids.take([0], axis=dims.index(dim)))
        factors.append((dims, ids))
    return _with(value, factors, direct=False)


def _spatial(tracer: _Tracer, name: str, args: Any, output: Any) -> Value:
    """Pooling and interpolation: channels come second."""
    value = tracer.of(args[0])
    factors = []
    for dims, ids in value.factors:
        if dims == (1,):
            factors.append((dims, ids))
        else:
            tracer.freeze(ids, f"{name} runs over its channels")
    return _with(value, factors, direct=False)


def _convolution(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    x, w, b = args[:3]
    transposed, groups = args[6], args[8]
    vx, vw = tracer.of(x), tracer.of(w)
    for dims, ids in vx.factors:
        if dims != (1,):
            tracer.freeze(ids, "a convolution runs over its channels as if they were places")
    fx = next((ids for dims, ids in vx.factors if dims == (1,)), None)
    fo = next((ids for dims, ids in vw.factors if dims == (0,)), None)
    fi = next((ids for dims, ids in vw.factors if dims == (1,)), None)
    layer = tracer.layer_of(fo)
    if transposed or vw.data or any(dims not in ((0,), (1,)) for dims, _ in vw.factors):
        tracer.freeze_all([vx, vw], "a transposed convolution, or one whose weights depend on the input, has no rule")
        return _with(_plain([vx, vw]), [])
    if vw.constant and groups == x.shape[1] == output.shape[1]:
        return _with(vx, [] if fx is None else [((1,), fx)], direct=False)  # a fixed filter for each channel, of any number
    made = fo
    if groups == 1:
        if fx is not None and fi is not None:
            tracer.tie(fx, fi)
        elif fi is not None and not vx.constant:
            tracer.freeze(fi, "reads positions that are not channels")
        elif fx is not None:
            tracer.freeze(fx, MEETS)
    elif groups == x.shape[1] == output.shape[1]:
        if fx is not None and fo is not None:
            tracer.tie(fx, fo)
            made = fx
        elif fo is not None:
            tracer.freeze(fo, MEETS)
            made = None
        elif fx is not None:
            tracer.freeze(fx, MEETS)
    elif layer is not None and tracer.kinds[layer] == "conv":
        start, length = tracer.axes[layer, "in"]
        inside = np.arange(start, start + length)
        if fx is not None and length == len(fx):
            tracer.tie(fx, inside)
            tracer.halves.append((inside, groups, layer))
            if fo is not None:
                tracer.halves.append((fo, groups, layer))
        else:
            tracer.freeze(inside, MEETS)
            if fo is not None:
                tracer.freeze(fo, f"{layer} reads positions that are not channels in {groups} blocks")
    else:
        tracer.freeze_all([vx, vw], "a grouped convolution with weights of its own making")
    if b is not None and made is not None and (fb := tracer.of(b).at(0)) is not None:
        tracer.tie(made, fb[1])
    near, direct = tracer.passes(layer, vx, output.numel() // output.shape[1] // output.shape[0])
    return Value(() if made is None else (((1,), made),), data=vx.data, near=near, direct=direct)


def _matmul(tracer: _Tracer, name: str, args: Any, output: Tensor) -> Value:
    bias = args[0] if name in ("addmm", "baddbmm", "addbmm") else None
    a, b = args[1:3] if bias is not None else args[:2]
    batch = {0: 0} if output.dim() == 3 else {}
    n = len(batch)
    macs = output.numel() * a.shape[-1]
    if name == "linear":
        last = output.dim() - 1
        maps: Any = ({d: d for d in range(last)}, {0: last})
        contracted = ((a, a.dim() - 1), (b, 1))
        bias = args[2] if len(args) > 2 else None
    else:
        maps = ({**batch, n: n}, {**batch, n + 1: n + 1})
        contracted = ((a, n + 1), (b, n))
    va, vb = tracer.of(a), tracer.of(b)
    scaled = tracer.call.name == "scaled_dot_product_attention" and tracer.call.kwargs.get("scale") is None
    value = tracer.contract(*contracted, maps, macs, scaled)
    layer = None
    if not vb.data:
        dims = (0,) if name == "linear" else (n + 1,)
        layer = tracer.layer_of(next((ids for d, ids in vb.factors if d == dims), None))
    near, direct = tracer.passes(layer, va, output.numel() // output.shape[-1])
    if layer is not None:
        value = _with(value, value.factors, near=near, direct=direct)
    if isinstance(bias, Tensor):
        vbias, shift = tracer.of(bias), output.dim() - bias.dim()
        moved = [(tuple(d + shift for d in dims), ids) for dims, ids in vbias.factors]
        value = _with(value, tracer.merged([*value.factors, *moved]))
    return value


def _attention(tracer: _Tracer, name: str, args: Any, output: Any) -> list[Value]:
    q, k, v = args[:3]
    batch = {d: d for d in range(q.dim() - 2)}
    n = len(batch)
    scaled = tracer.call.kwargs.get("scale") is None and tracer.call.name == "scaled_dot_product_attention"
    heads = q.shape[1] if q.dim() == 4 else 1
    logits = q.shape[0] * heads * q.shape[-2] * k.shape[-2]
    first = tracer.contract((q, n + 1), (k, n + 1), ({**batch, n: n}, {**batch, n: n + 1}), logits * q.shape[-1], scaled)
    mask = tracer.call.kwargs.get("attn_mask", tracer.call.args[3] if len(tracer.call.args) > 3 else None)
    if isinstance(mask, Tensor):
        shift = q.dim() - mask.dim()
        moved = [(tuple(d + shift for d in dims), ids) for dims, ids in tracer.of(mask).factors]
        first = _with(first, tracer.merged([*first.factors, *moved]))
    weights = q.new_empty(0)
    tracer.values[weights] = first
    second = tracer.contract((weights, n + 1), (v, n), ({**batch, n: n}, {**batch, n + 1: n + 1}), logits * v.shape[-1])
    count = len([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    return [second, *[_with(second, [])] * (count - 1)]


def _batch_norm(tracer: _Tracer, name: str, args: Any, output: Any) -> list[Value]:
    x = args[0]
    vx = tracer.of(x)
    tensors = [a for a in args[1:5] if isinstance(a, Tensor)]
    training = next((a for a in args[1:] if isinstance(a, bool)), False) and "no_training" not in name
    owners = [f for t in tensors if (f := tracer.of(t).at(0)) is not None]
    layer = next((found for _, ids in owners if (found := tracer.layer_of(ids))), None)
    at = vx.at(1)
    factors = list(vx.factors)
    if at is not None and at[0] != (1,):
        tracer.freeze_all([vx], "a batch norm runs over its channels as if they were places")
        factors = []
    elif at is None:
        for _, ids in owners:
            tracer.freeze(ids, MEETS)
    else:
        for _, ids in owners:
            tracer.tie(at[1], ids)
        for dims, ids in vx.factors:
            if training and dims != (1,):
                tracer.freeze(ids, "weights are standardised over it")
    near, direct = tracer.passes(layer, vx)
    count = len([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    return [_with(vx, factors, near=near, direct=direct), *[_with(vx, [])] * (count - 1)]


def _layer_norm(tracer: _Tracer, name: str, args: Any, output: Any) -> list[Value]:
    x, shape = args[0], args[1]
    vx = tracer.of(x)
    affine = [f[1] for t in args[2:4] if isinstance(t, Tensor) and (f := tracer.of(t).at(0)) is not None]
    layer = next((found for ids in affine if (found := tracer.layer_of(ids))), None)
    last = x.dim() - 1
    normed = {x.dim() - 1 - i for i in range(len(shape))}
    factors = []
    for dims, ids in vx.factors:
        if not normed & set(dims):
            factors.append((dims, ids))
        elif len(shape) > 1 or layer is None:
            tracer.freeze(ids, "a norm across its channels that is no layer of ours")
        else:
            for own in affine:
                tracer.merged([(dims, ids), ((last,), own)])
            tracer.normalised.append(ids)
            factors.append((dims, ids))
    if vx.at(last) is None:
        for own in affine:
            tracer.freeze(own, MEETS)
    near, direct = tracer.passes(layer, vx)
    count = len([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    return [_with(vx, factors, near=near, direct=direct), *[_with(vx, [])] * (count - 1)]


def _group_norm(tracer: _Tracer, name: str, args: Any, output: Any) -> list[Value]:
    x, groups = args[0], args[6]
    vx = tracer.of(x)
    affine = [f[1] for t in args[1:3] if isinstance(t, Tensor) and (f := tracer.of(t).at(0)) is not None]
    layer = next((found for ids in affine if (found := tracer.layer_of(ids))), None)
    factors = []
    for dims, ids in vx.factors:
        if dims != (1,) or layer is None:
            tracer.freeze(ids, "a norm across its channels that is no layer of ours")
            continue
        for own in affine:
            tracer.tie(ids, own)
        if groups > 1:
            tracer.halves.append((ids, groups, layer))
        tracer.normalised.append(ids)
        factors.append((dims, ids))
    if vx.at(1) is None:
        for own in affine:
            tracer.freeze(own, MEETS)
    near, direct = tracer.passes(layer, vx)
    count = len([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    return [_with(vx, factors, near=near, direct=direct), *[_with(vx, [])] * (count - 1)]


JOINING = ("add", "add_", "sub", "sub_", "rsub", "_foreach_add", "maximum", "minimum")
POINTWISE = {
    "hardswish", "hardswish_", "_prelu_kernel", "prelu", "native_dropout", "log_sigmoid_forward", "_to_copy", "copy_", "rsub",
    "masked_fill_", "lift_fresh", "contiguous", "gelu_", "hardtanh_", "hardsigmoid_", "leaky_relu_", "elu_", "silu_", "celu_",
    "mish_", "clamp_", "clamp_min_", "relu6", "where", "logical_not_", "_conj",
}  # fmt: skip
IN_PLACE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "resize_", "set_"}
NAMED: set[str] = set()
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("detach", "alias", "lift_fresh", "_conj", "detach_", "fill_", "zero_", "as_strided_", "as_strided"), _same),
    **dict.fromkeys(("permute", "transpose", "transpose_", "t"), _permute),
    **dict.fromkeys(("unsqueeze", "unsqueeze_"), _unsqueeze),
    **dict.fromkeys(("squeeze", "squeeze_"), _squeeze),
    "expand": _expand,
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "reshape", "_reshape_copy"), _view),
    "select": _select,
    "slice": _slice,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "chunk"), _split),
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    "constant_pad_nd": _pad,
    "index": _index,
    "index_select": _index_select,
    **dict.fromkeys(("flip", "roll"), _flip),
    "repeat": _repeat,
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "logsumexp",
         "linalg_vector_norm", "norm", "argmax", "argmin"), _reduce,
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax"), _softmax),
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices",
         "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d",
         "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
         "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
         "replication_pad2d", "mkldnn_max_pool2d", "mkldnn_adaptive_avg_pool2d"), _spatial,
    ),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "linear"), _matmul),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable"), _attention,
    ),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
         "_batch_norm_with_update", "miopen_batch_norm"), _batch_norm,
    ),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
}  # fmt: skip


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every layer's mode as it was afterwards."""
    training = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for m, mode in training.items():
            m.training = mode
