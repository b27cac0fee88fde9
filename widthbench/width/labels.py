"""Labels that travel with the data: which channel lies at each position of every tensor of a
forward pass.

Every channel of every layer, and every position along the axes of bare parameters and buffers, gets
a number, its label. One forward pass runs under ``torch``'s dispatch mode; each operation hands
labels on: a permutation permutes them, a reshape reshapes them, an addition ties those that meet, a
matrix product ties what it sums over. What an operation does that labels cannot follow freezes
them, with the reason. At the end, labels that are tied are one channel, wherever they lie.

Labels along several axes form a grid. Where a reshape cuts an axis into a grid, as attention does
with heads and head dimensions, the cut needs equal counts; where a product runs separately for each
index of an axis of the grid (heads), that index gets a label of its own, a *block*, whose members
are the labels in its row of the grid.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker
from torch.utils.weak import WeakTensorKeyDictionary

from widthbench.width.adapters import Counted, Integer, Measured
from widthbench.width.layers import MAKING, Side, Step, axis_length, kind_of

PLAIN = (bool, int, float, complex, str, torch.dtype)
Ids = np.ndarray
Factor = tuple[tuple[int, ...], Ids]
"""Dimensions of a tensor, ascending, and the labels along them: an array with as many axes."""
Key = tuple[str, str | int]
"""An axis: a layer and its side, or a bare tensor and its dimension."""
SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]

MEETS = "its channels meet positions that are not channels"
OUTPUT = "the network's output"
ACROSS = "its channels lie across others"
INSIDE = f"within each head, {MEETS}"
WITHIN = {ACROSS, INSIDE}  # why head dimensions may not change, though heads may
FILLING = {"copy_", "fill_", "zero_", "normal_", "uniform_"}  # that leave a constant what it is


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a tensor.

    Attributes:
        factors: Labels, along disjoint sets of dimensions of size above 1.
        constant: Made within the forward pass from nothing that is labelled or put in: fits
            anything.
        data: Depends on the network's input.
        near: The nearest layers that it comes from.
        direct: No operation lies between those and it.
        scale: What it was multiplied by that the code has worked out from a width.
        product: Which contraction it is the result of, -1 if of none.
    """

    factors: tuple[Factor, ...] = ()
    constant: bool = False
    data: bool = False
    near: frozenset[str] = frozenset()
    direct: bool = True
    scale: float = 1.0
    product: int = -1

    def at(self, dim: int) -> Factor | None:
        """The factor that covers a dimension."""
        return next((f for f in self.factors if dim in f[0]), None)


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product: of activations and weights, or of two activations as in
    attention.

    Attributes:
        macs: Multiply-accumulates of the pass.
        grids: Labels along the dimensions that it runs over, one array for each independent set of
            them: its multiply-accumulates are proportional to how many of each there are.
        where: The innermost module that computes it, "" for the network itself.
    """

    macs: int
    grids: tuple[Ids, ...]
    where: str = ""


@dataclass(frozen=True)
class Contraction:
    """Two activations whose labels are summed over in a product, as queries and keys are.

    Attributes:
        left: Labels of the one, ``left_near`` the layers that it comes from.
        right: Labels of the other, in the same order.
        scaled: Whether the product is divided by the root of how many there are per head (fused
            attention's own default).
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
        divisors: Other such places, whose numbers it was divided by.
    """

    of: tuple[str, str, int | None]
    factor: Fraction
    ids: Ids
    axis: int
    divisors: tuple[Any, ...] = ()


@dataclass(frozen=True)
class View:
    """A tensor that shows a part of another one's memory.

    Attributes:
        root: That one.
        dims: Of each of its own dimensions, the root's; None for one that the root does not have.
            None where it cannot be followed.
        places: Of each dimension of the root, the positions that it shows.
    """

    root: Tensor
    dims: tuple[int | None, ...] | None
    places: tuple[Ids, ...]

    def seen(self, name: str, args: Any, view: Tensor) -> View:
        """A view of this one, by a view operation of torch's with its arguments; the first is this
        one.
        """
        dims, places, t = self.dims, list(self.places), args[0]
        if (
            dims is None
            or name in ("alias", "detach")
            or view.shape == t.shape == torch.Size([1] * t.dim())
        ):
            return self
        if name in ("slice", "select"):
            at = (args[1] if len(args) > 1 else 0) % t.dim()
            chosen: Any = (
                args[2]
                if name == "select"
                else slice(*(args[i] if len(args) > i else None for i in (2, 3, 4)))
            )
            if dims[at] is not None:
                own = int(dims[at])
                places[own] = np.atleast_1d(places[own][chosen])
            left = dims[:at] + dims[at + 1 :] if name == "select" else dims
            return View(self.root, left, tuple(places))
        if name in ("permute", "transpose", "t", "unsqueeze", "squeeze"):
            if name == "unsqueeze":
                at = args[1] % view.dim()
                return View(self.root, (*dims[:at], None, *dims[at:]), self.places)
            if name == "squeeze":
                kept = (
                    [d for d in range(t.dim()) if t.shape[d] != 1]
                    if view.dim() == sum(n != 1 for n in t.shape)
                    else None
                )
                return View(
                    self.root, None if kept is None else tuple(dims[d] for d in kept), self.places
                )
            order = [d % t.dim() for d in args[1]] if name == "permute" else list(range(t.dim()))
            if name == "transpose":
                a, b = (d % t.dim() for d in args[1:3])
                order[a], order[b] = order[b], order[a]
            elif name == "t":
                order = order[::-1]
            return View(self.root, tuple(dims[d] for d in order), self.places)
        return View(self.root, dims if view.shape == t.shape else None, self.places)


@dataclass
class Labels:
    """Everything that one forward pass showed.

    Attributes:
        axes: Of each axis, its first label and its length.
        count: Number of labels, blocks included.
        channel: ``[count]``, the channel of each label: the same number where labels are tied.
        reasons: Why channels may not change, by channel.
        joined: Channels that an addition joins with another branch.
        standardised: Channels over which weights are standardised.
        blocks: ``[B]`` labels that are blocks, and the members of each.
        normed_blocks: Channels of those that a GroupNorm normalises together.
        equal_blocks: (labels in order, number of contiguous parts that need equal counts, where).
        grids: (grid, which of its axes are heads, which one is free to change).
        contractions: Products in which activations are summed over.
        reading: Positions of bare weights that activations are multiplied with and summed over.
        products: All convolutions and matrix products.
        sizes: Numbers that state widths.
        behind: For every layer, the nearest layers that it reads from.
        adjacent: BatchNorms right behind another layer.
        apart: Layers whose tensors are used without calling them.
        made: Layers that standardise their weights.
        output: The network's output.
        program: A digest of all calls with their arguments, tensors by shape.
        steps: All operations, with the shapes of what they give.
    """

    axes: dict[Key, tuple[int, int]]
    count: int = 0
    channel: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    reasons: dict[int, str] = field(default_factory=dict)
    joined: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    standardised: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    blocks: dict[int, Ids] = field(default_factory=dict)
    normed_blocks: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    equal_blocks: list[tuple[Ids, int, str]] = field(default_factory=list)
    grids: list[tuple[Ids, tuple[int, ...], int]] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    reading: list[Ids] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    behind: dict[str, tuple[str, ...]] = field(default_factory=dict)
    adjacent: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    made: frozenset[str] = frozenset()
    output: Any = None
    program: str = ""
    steps: tuple[Step, ...] = ()


class Calls(TorchFunctionMode):
    """Looks at calls before torch takes them apart: integers that know where they come from,
    attention's own scale.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self.tracer.call
        call = self.tracer.call = Call(getattr(func, "__name__", ""), args, kwargs)
        self.tracer.program.update(call.described().encode())
        if call.name != "__get__":  # an attribute is no reading of the numbers
            for t in tree_leaves((args, kwargs)):
                self.tracer.used(t)
        try:
            if call.name == "__getitem__":
                note_whole(self.tracer, call)
            result = func(*args, **kwargs)
        finally:
            self.tracer.call = before
        if func == SHAPE or func == Tensor.size:
            return self.tracer.measured(args[0], result, *args[1:], **kwargs)
        return result


@dataclass(frozen=True)
class Call:
    """A call of one of torch's functions or methods."""

    name: str = ""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def shape(self) -> list[Any]:
        """The shape that a reshape was asked for, if this is one."""
        if self.name not in ("reshape", "view", "unflatten", "expand"):
            return []
        rest = list(self.args[1:]) or list(self.kwargs.values())
        if self.name == "unflatten" and isinstance(rest[0], int):
            t, at = self.args[0], rest[0] % self.args[0].dim()
            return [*t.shape[:at], *rest[-1], *t.shape[at + 1 :]]
        return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest

    def described(self) -> str:
        """Its name and arguments, tensors by shape: two networks that compute something else differ
        in some call.
        """
        leaves = tree_leaves([self.args, dict(self.kwargs)])
        parts = [
            (
                f"{list(a.shape)}"
                if isinstance(a, Tensor)
                else type(a).__name__ + (f" {a!r}" if isinstance(a, PLAIN) else "")
            )
            for a in leaves
        ]
        return f"{self.name}({','.join(parts)});"

    def integers(self) -> list[Integer]:
        """All integers with an origin among the arguments."""
        integers, waiting = [], [*self.args, *self.kwargs.values()]
        while waiting:
            at = waiting.pop(0)
            if isinstance(at, Integer) and not isinstance(at, Measured):
                integers.append(at)
            elif isinstance(at, list | tuple):
                waiting.extend(at)
            elif isinstance(at, slice):
                waiting.extend((at.start, at.stop))
        return integers


class Tracer(TorchDispatchMode):
    """Runs the rule of each operation; rules read and write what is known here.

    Args:
        model: The network, in eval mode.
        rules: Gives the rule of an operation: ``(tracer, name, arguments, output)`` to what is
            known of the output, or of each.
    """

    def __init__(self, model: nn.Module, rules: Callable[[Any], Callable[..., Any] | None]) -> None:
        super().__init__()
        self.rules = rules
        self.values: Any = WeakTensorKeyDictionary()
        self.call = Call()
        self.kinds = {name: kind_of(m) for name, m in model.named_modules()}
        modules = model.named_modules()
        self.attentions = {n for n, m in modules if isinstance(m, nn.MultiheadAttention)}
        self.axes: dict[Key, tuple[int, int]] = {}
        self.starts: list[int] = []
        self.keys: list[Key] = []
        self.count = 0
        self.ties: list[tuple[Ids, Ids]] = []
        self.frozen: list[tuple[Ids, str]] = []
        self.joined: list[Ids] = []
        self.standardised: list[Ids] = []
        self.rows: dict[bytes, int] = {}
        self.members: dict[int, Ids] = {}
        self.normed: set[str] = set()
        self.normed_blocks: set[int] = set()
        self.equal_blocks: list[tuple[Ids, int, str]] = []
        self.grids: list[Ids] = []
        self.contractions: list[Contraction] = []
        self.products: list[Product] = []
        self.reading: list[Ids] = []
        self.sizes: list[Size] = []
        self.behind: dict[str, dict[str, None]] = {}
        self.adjacent: set[str] = set()
        self.modules = ModuleTracker()
        self.views: Any = WeakTensorKeyDictionary()
        self.families: Any = WeakTensorKeyDictionary()
        self.program = hashlib.sha256()
        self.steps: list[Step] = []
        self.apart: set[str] = set()
        self.made: set[str] = set()  # layers that standardise their weights
        self.as_wide: set[int] = set()  # labels tied to what their number was read off
        self.serving = True  # False: what training alone computes
        self.unused: Any = WeakTensorKeyDictionary()  # what freezes if a result is read
        self._label_tensors(model)

    # labels

    def _label_tensors(self, model: nn.Module) -> None:
        """Labels for the axes of all layers, and of all floating tensors that belong to no
        layer.
        """
        for name, module in model.named_modules():
            if self.kinds[name] is None:
                continue
            out = self._axis((name, "out"), axis_length(module, "out"))
            inside = None
            if self.kinds[name] in MAKING:
                inside = self._axis((name, "in"), axis_length(module, "in"))
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                t = getattr(module, leaf, None)
                turned = leaf == "weight" and self.kinds[name] == "transposed"
                if (
                    not isinstance(t, Tensor)
                    or t in self.values
                    or t.dim() == 0
                    or t.shape[turned] != len(out)
                ):
                    continue
                factors: list[Factor] = [((int(turned),), out)]
                if leaf == "weight" and inside is not None and t.shape[not turned] == len(inside):
                    factors.append(((int(not turned),), inside))
                self.values[t] = Value(tuple(factors))
        for name, t in itertools.chain(model.named_parameters(), model.named_buffers()):
            if t in self.values:
                continue
            if not t.is_floating_point():
                self.values[t] = Value(constant=True)
                continue
            self.values[t] = Value(
                tuple(((d,), self._axis((name, d), n)) for d, n in enumerate(t.shape) if n > 1)
            )

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

    def used(self, t: Any) -> None:
        """Note that a tensor is read: what its making froze stays frozen.

        Attention that averages its weights over heads does so whether or not anybody asks.
        """
        if isinstance(t, Tensor) and (found := self.unused.pop(t, None)):
            self.frozen += found

    def freeze_all(self, values: Iterable[Value], reason: str) -> None:
        """Let all channels of some tensors stay as they are."""
        for value in values:
            for _, ids in value.factors:
                self.freeze(ids, reason)

    def blocks(self, ids: Ids, kept: Sequence[int]) -> Ids:
        """Labels for the rows of a grid along some of its axes."""
        rest = [i for i in range(ids.ndim) if i not in kept]
        rows = ids.transpose([*kept, *rest]).reshape(math.prod(ids.shape[i] for i in kept), -1)
        blocks = []
        for row in rows:
            row = np.unique(row)
            key = row.tobytes()
            if key not in self.rows:
                self.rows[key] = int(self._new(1)[0])
                self.members[self.rows[key]] = row
            blocks.append(self.rows[key])
        return np.array(blocks, dtype=np.int64).reshape([ids.shape[i] for i in kept])

    def merged(self, factors: Iterable[Factor]) -> list[Factor]:
        """Factors of tensors that meet position by position: one for each set of dimensions, the
        rest tied to it.
        """
        merged: list[Factor] = []
        for new in factors:
            at: Factor | None = new
            for old in list(merged):
                if at is not None and set(old[0]) & set(at[0]):
                    merged.remove(old)
                    at = self._met(old, at)
            if at is not None:
                merged.append(at)
        return merged

    def _met(self, a: Factor, b: Factor) -> Factor | None:
        if a[0] == b[0]:
            self.tie(a[1], b[1])
            return a
        if set(a[0]) < set(b[0]):
            a, b = b, a
        if not set(b[0]) < set(a[0]):
            for _, ids in (a, b):
                self.freeze(ids, ACROSS)
            shared = tuple(sorted({*a[0]} & {*b[0]}))
            # attention over channels: these stay within each head, the heads may go
            rows = [self.blocks(ids, [dims.index(d) for d in shared]) for dims, ids in (a, b)]
            self.tie(*rows)
            return shared, rows[0]
        axes = [a[0].index(d) for d in b[0]]
        if (
            a[1].ndim - 1 in axes
            # along the last axis of a grid: one entry for all rows, such as a norm's weights in
            # each head
        ):
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
        rule = self.rules(func)
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if self.serving:
            self.steps.extend((name, tuple(t.shape)) for t in outputs)
        for t in inputs:
            self.used(t)
        values, before = [self.of(t) for t in inputs], len(self.frozen)
        if not any(v.factors or v.data for v in values):
            result: Any = [Value(constant=True)] * len(outputs)
            if name in FILLING:
                result = [values[0]] * len(outputs)
        elif rule is None:
            self.freeze_all(values, f"the operation {name} has no rule for channels")
            result = [plain_value(values)] * len(outputs)
        else:
            result = rule(self, name, args, output)
        if isinstance(result, Value):
            result = [result] * len(outputs)
        for t, value in zip(outputs, result, strict=True):
            self.values[t] = value
        if outputs and not (func._schema.is_mutable or getattr(func, "is_view", False)):
            found = self.frozen[before:]
            del self.frozen[before:]
            if found:
                self.unused.update(dict.fromkeys(outputs, found))
        if getattr(func, "is_view", False):
            for t in outputs:
                self._see(name, args, t)
        for t in _written(func, args, kwargs):
            if all(t is not o for o in outputs):  # several at once, which are not given back
                self.freeze_all(values, f"the operation {name} has no rule for channels")
                self.values[t] = plain_value([*values, self.of(t)])
            self._write(t)
        return output

    # tensors that share their memory

    def _see(self, name: str, args: Any, view: Tensor) -> None:
        """Note which positions of which tensor a view shows."""
        base = args[0]
        above = self.views.get(base) or View(
            base, tuple(range(base.dim())), tuple(np.arange(n) for n in base.shape)
        )
        self.views[view] = above.seen(name, args, view)
        self.families.setdefault(above.root, []).append(weakref.ref(view))

    def _write(self, t: Tensor) -> None:
        """What was written into a tensor lies in all that share its memory, too: in what it is a
        view of, and in views of it.
        """
        value, view = self.values[t], self.views.get(t)
        root = t if view is None else view.root
        for member in (
            root,
            *(m for ref in self.families.get(root, ()) if (m := ref()) is not None),
        ):
            if member is not t:
                known = self.of(member)
                self.values[member] = replace(
                    known,
                    constant=known.constant and value.constant,
                    data=known.data or value.data,
                    near=known.near | value.near,
                    direct=False,
                )
        if view is not None:
            self._lift(value, view)

    def _lift(self, value: Value, view: View) -> None:
        """Give the tensor that a view shows the labels that were written into the view."""
        known = self.of(view.root)
        factors = list(known.factors)
        for dims, ids in value.factors:
            up = None if view.dims is None else tuple(view.dims[d] for d in dims)
            if up is None or None in up:
                self.freeze(
                    ids, "its channels are written into a part of a tensor that cannot be followed"
                )
                continue
            own = tuple(sorted(int(d) for d in up if d is not None))
            ids = ids.transpose(sorted(range(len(up)), key=lambda i: up[i]))  # type: ignore[arg-type, return-value]
            shape = [view.root.shape[d] for d in own]
            there = next((f for f in factors if f[0] == own), None)
            if there is None and any(set(f[0]) & set(own) for f in factors):
                self.freeze(ids, "its channels are written across others")
                continue
            whole = self._new(math.prod(shape)).reshape(shape) if there is None else there[1]
            self.tie(whole[np.ix_(*(view.places[d] for d in own))], ids)
            if there is None:
                factors.append((own, whole))
        self.values[view.root] = with_factors(known, factors)

    def layer_of(self, ids: Ids | None, side: Side = "out") -> str | None:
        """The layer whose axis labels were made for."""
        key = self.owner(ids)
        return str(key[0]) if key is not None and key[1] == side else None

    def current(self) -> set[str]:
        """The modules whose forward runs."""
        # the tracker's names begin with the network's class
        return {n.partition(".")[2] for n in self.modules.parents}

    def passes(self, layer: str | None, x: Value) -> tuple[frozenset[str], bool]:
        """Note that a layer reads a tensor; (near, direct) of what it gives."""
        if layer is None:
            return x.near, False
        if layer not in self.current():
            self.apart.add(layer)
        if x.data:
            known = self.behind.setdefault(layer, {})
            known.update(dict.fromkeys(n for n in sorted(x.near) if n != layer))
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
        grid, product = None, -1
        if fa is not None and fb is not None and ga is not None and gb is not None:
            alone = {d for d in ga if d != along} ^ {d for d in gb if d != along}
            if alone - both:  # one of them has more axes to its grid than those that both share
                self.tie(
                    *(
                        self.blocks(f[1], [g.index(along)]) if len(g) > 1 else f[1]
                        for f, g in ((fa, ga), (fb, gb))
                    )
                )
                grid = fa[1]
            else:
                order = [*sorted({d for d in (*ga, *gb) if isinstance(d, int)}), along]
                left, right = (_laid(f[1], g, order) for f, g in ((fa, ga), (fb, gb)))
                self.tie(left, right)
                left, right = np.broadcast_arrays(left, right)
                grid = left
                if va.data and vb.data:
                    depth = left.shape[-1]
                    scaled = scaled or math.isclose(va.scale * vb.scale, depth**-0.5)
                    self.contractions.append(
                        Contraction(left.ravel(), va.near, right.ravel(), vb.near, scaled, depth)
                    )
                    product = len(self.contractions) - 1
        else:
            for f, v, other in ((fa, va, vb), (fb, vb, va)):
                if f is not None and not other.constant:
                    plain = MEETS if v.data else "reads positions that are not channels"
                    self.freeze(f[1], ACROSS if len(f[0]) > 1 else plain)
        left_over: list[Factor] = []
        for value, summed, mapping in ((va, fa, maps[0]), (vb, fb, maps[1])):
            for f in value.factors:
                if f is not summed:
                    left_over.append(moved_factor(f, mapping))
                elif len(f[0]) > 1:
                    kept = [i for i, d in enumerate(f[0]) if d in mapping]
                    left_over.append(
                        moved_factor(
                            (tuple(f[0][i] for i in kept), self.blocks(f[1], kept)), mapping
                        )
                    )
        factors = self.merged(left_over)
        grids = [] if grid is None else [grid]
        seen = np.concatenate([g.ravel() for g in grids]) if grids else np.zeros(0, dtype=np.int64)
        rows = [r for _, ids in factors for r in ids.ravel().tolist() if r in self.members]
        inner = (
            np.concatenate([self.members[r] for r in rows]) if rows else np.zeros(0, dtype=np.int64)
        )
        for _, ids in factors:
            if not (
                grids and np.isin(ids, self._all_blocks()).all() and np.isin(inner, seen).any()
            ):
                grids.append(ids)
        self.counts(macs, grids)
        return Value(
            tuple(factors),
            data=va.data or vb.data,
            near=va.near | vb.near,
            direct=False,
            product=product,
        )

    def multiplied(self, value: Value, by: float) -> Value:
        """A value times a number that the code has worked out from a width."""
        if value.product < 0:
            return replace(value, scale=value.scale * by)
        known = self.contractions[value.product]
        if math.isclose(by, known.depth**-0.5):
            self.contractions[value.product] = replace(known, scaled=True)
        return value

    def counts(self, macs: int, grids: Iterable[Ids | None]) -> None:
        """Note multiply-accumulates, and the labels that they are proportional to the numbers
        of.
        """
        if not self.serving:
            return
        known = [n for n in self.modules.parents if n != "Global"]
        where = max(known, key=len, default="").partition(".")[
            2
        ]  # the tracker's names begin with the network's class
        self.products.append(Product(macs, tuple(g for g in grids if g is not None), where))

    def unread(self) -> list[str]:
        """Layers that read nothing so far."""
        return [n for n, kind in self.kinds.items() if kind is not None and n not in self.behind]

    def measured(self, t: Tensor, shape: Any, dim: int | None = None) -> Any:
        """A shape, or the size of one dimension, that remembers which channels it counts."""
        known = {
            d: Measured(t.shape[d], ids) if len(dims) == 1 else Counted(t.shape[d])
            for dims, ids in self.of(t).factors
            for d in dims
            if t.shape[d] > 1
        }
        if not known:
            return shape
        if dim is not None:
            return known.get(dim % t.dim(), shape)
        return torch.Size([known.get(d, n) for d, n in enumerate(shape)])

    def states(self, number: Integer, ids: Ids, axis: int) -> None:
        """Note that a number is the length of a grid along an axis."""
        self.sizes.append(Size(number.origin, number.factor, ids, axis, number.divisors))

    def _all_blocks(self) -> Ids:
        return np.fromiter(self.members, dtype=np.int64, count=len(self.members))

    def finish(self, output: Any) -> Labels:
        """Channels from labels, once everything has been seen."""
        channel = self._components()
        same: dict[bytes, int] = {}
        self._blocks_of_norms(channel)
        for block, row in self.members.items():  # heads of the same channels are the same
            first = same.setdefault(np.unique(channel[row]).tobytes(), block)
            self.tie(np.array([first]), np.array([block]))
        channel = self._components()
        grids = []
        heads = np.full(self.count, -1, dtype=np.int64)  # the block of each label, as its channel
        for block, row in self.members.items():
            heads[row] = channel[block]
        for grid in (_unfolded(grid, heads) for grid in self.grids):
            rows = heads[grid]
            along = [i for i in range(grid.ndim) if _varies(rows, i)] if (rows >= 0).all() else []
            if len(along) == grid.ndim:
                along = []
            free = max(
                (i for i in range(grid.ndim) if i not in along), key=lambda i: (grid.shape[i], i)
            )
            for i in range(grid.ndim):
                if i != free and i not in along:
                    self.tie(grid, grid.take([0], axis=i))
            grids.append((grid, tuple(along), free))
        stated = {size.of for size in self.sizes}  # a width over another width is neither
        self.sizes = [size for size in self.sizes if not stated & {*size.divisors}]
        self._tie_numbers(heads)
        channel = self._components()
        self._one_of_both(channel)
        reasons: dict[int, str] = {}
        blocks = {int(channel[block]) for block in self.members}
        for ids, reason in self.frozen:
            for c in np.unique(channel[ids]).tolist():
                if reason not in WITHIN or c not in blocks:  # a head is one channel there
                    reasons.setdefault(c, reason)
        return Labels(
            axes=self.axes,
            count=self.count,
            channel=channel,
            reasons=reasons,
            joined=_unique(channel, self.joined),
            standardised=_unique(channel, self.standardised),
            blocks=self.members,
            normed_blocks=np.unique(channel[np.array([*self.normed_blocks], dtype=np.int64)]),
            equal_blocks=self.equal_blocks,
            grids=grids,
            contractions=self.contractions,
            reading=self.reading,
            products=self.products,
            sizes=self.sizes,
            behind={layer: tuple(before) for layer, before in self.behind.items()},
            adjacent=frozenset(self.adjacent),
            apart=frozenset(self.apart),
            made=frozenset(self.made),
            output=output,
            program=self.program.hexdigest(),
            steps=tuple(self.steps),
        )

    def _blocks_of_norms(self, channel: Ids) -> None:
        """What a GroupNorm normalises together may go together, as heads may: what it divides the
        others by stays. Of norms that divide the same channels, the coarsest decides; nothing where
        something else divides them.
        """
        split = [ids for ids, _, where in self.equal_blocks if where not in self.normed]
        taken = set(_unique(channel, [*split, *self.members.values()]).tolist())
        wanted: dict[int, set[frozenset[int]]] = {}  # the blocks that each channel is in
        norms = [ids.reshape(n, -1) for ids, n, where in self.equal_blocks if where in self.normed]
        for rows in norms:
            for row in rows:
                block = frozenset(channel[row].tolist())
                for c in block:
                    wanted.setdefault(c, set()).add(block)
        for rows in norms:
            blocks = [frozenset(channel[row].tolist()) for row in rows]
            if all(
                taken.isdisjoint(block) and all(b <= block for c in block for b in wanted[c])
                for block in blocks
            ):
                self.normed_blocks.update(self.blocks(rows, [0]).tolist())

    def _one_of_both(self, channel: Ids) -> None:
        """Where a width that the code has read is that of heads and their dimensions together, one
        of both may change: the dimensions, or the heads if these may not.
        """
        as_wide = np.unique(channel[np.array([*self.as_wide], dtype=np.int64)])
        inside, other = (
            _unique(channel, [ids for ids, r in self.frozen if (r in WITHIN) == within])
            for within in (True, False)
        )
        for block, row in self.members.items():
            own = np.unique(channel[row])
            fixed = len(own) == 1 or np.isin(own, inside).all()
            if np.isin(own, as_wide).any() and (not fixed or np.isin(own, other).any()):
                self.freeze(np.array([block]), "its heads share the width that attention reads")

    def _tie_numbers(self, heads: Ids) -> None:
        """What one number states, such as the head dimension of queries and of values, is as wide
        everywhere: within heads, and where it is all that lies along a dimension.
        """
        first: dict[tuple[Any, ...], Ids] = {}
        for size in self.sizes:
            rows = heads[size.ids]
            if size.ids.ndim == 1 or ((rows >= 0).all() and not _varies(rows, size.axis)):
                other = first.setdefault(
                    (size.of, size.factor, size.axis, size.ids.shape), size.ids
                )
                self.tie(other, size.ids)

    def _components(self) -> Ids:
        if not self.ties:
            return np.arange(self.count)
        a, b = (np.concatenate([t[i] for t in self.ties]) for i in (0, 1))
        graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1].astype(np.int64)

    def cut(self, grid: Ids) -> None:
        """Note that labels must keep the shape of a grid."""
        self.grids.append(grid)


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    named = zip(func._schema.arguments, args, strict=False)
    given = [
        *((a, v) for a, v in named),
        *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs),
    ]
    mutable = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
    return [t for t in tree_leaves(mutable) if isinstance(t, Tensor)]


def _unique(channel: Ids, parts: list[Ids]) -> Ids:
    return (
        np.unique(channel[np.concatenate([p.ravel() for p in parts])])
        if parts
        else np.zeros(0, dtype=np.int64)
    )


def _varies(ids: Ids, axis: int) -> bool:
    return ids.shape[axis] > 1 and not bool((ids == ids.take([0], axis=axis)).all())


def _unfolded(grid: Ids, heads: Ids) -> Ids:
    """A grid with an axis of its own for heads that lie one after the other along an axis, as after
    ``qkv.chunk(3)``.
    """
    rows = heads[grid]
    if (rows < 0).any():
        return grid
    for axis in range(grid.ndim):
        line = np.moveaxis(rows, axis, -1).reshape(-1, grid.shape[axis])[0]
        each = int(np.flatnonzero(line != line[0])[0]) if (line != line[0]).any() else 0
        if each < 2 or grid.shape[axis] % each:
            continue
        shape = (*grid.shape[:axis], -1, each, *grid.shape[axis + 1 :])
        if not _varies(rows.reshape(shape), axis + 1):
            return grid.reshape(shape)
    return grid


def _laid(ids: Ids, names: Sequence[Any], order: Sequence[Any]) -> Ids:
    """An array whose axes have names, with its axes in an order, and size 1 where a name is
    missing.
    """
    present = [n for n in order if n in names]
    ids = ids.transpose([list(names).index(n) for n in present])
    return ids.reshape([ids.shape[present.index(n)] if n in present else 1 for n in order])


def moved_factor(factor: Factor, mapping: Mapping[int, int]) -> Factor:
    """A factor whose dimensions have moved."""
    dims = [mapping[d] for d in factor[0]]
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    return tuple(dims[i] for i in order), factor[1].transpose(order)


def simple_factors(dims: Sequence[int], ids: Ids) -> list[Factor]:
    """A factor without the axes along which its labels do not change; a single channel keeps
    them.
    """
    if ids.ndim and bool((ids == ids.flat[0]).all()):
        return [(tuple(dims), ids)]
    for axis in reversed(range(ids.ndim)):
        if not _varies(ids, axis):
            ids = ids.take(0, axis=axis)
            dims = [d for i, d in enumerate(dims) if i != axis]
    return [(tuple(dims), ids)] if ids.ndim else []


def plain_value(values: Iterable[Value]) -> Value:
    """What is known of an operation's output without labels."""
    values = list(values)
    near = frozenset().union(*(v.near for v in values)) if values else frozenset()
    return Value(
        constant=all(v.constant for v in values),
        data=any(v.data for v in values),
        near=near,
        direct=False,
    )


def with_factors(value: Value, factors: Iterable[Factor], **changes: Any) -> Value:
    """What is known of a tensor, with other labels."""
    return replace(value, factors=tuple(factors), **changes)


def note_whole(tracer: Tracer, call: Call) -> None:
    """A slice up to a number that is a dimension's whole length is no operation to torch, yet it
    states a width.
    """
    t, index = call.args
    for dim, part in enumerate(index if isinstance(index, tuple) else (index,)):
        if not isinstance(part, slice):
            if not isinstance(part, int):
                return
            continue
        if (
            isinstance(part.stop, Integer)
            and not isinstance(part.stop, Measured)
            and not part.start
            and dim < t.dim()
            and part.stop == t.shape[dim]
        ):
            note_size(tracer, part.stop, tracer.of(t).factors, dim)


def note_size(tracer: Tracer, size: Integer, factors: Iterable[Factor], dim: int) -> None:
    """Note that a number states the size of a dimension."""
    for dims, ids in factors:
        if dim in dims:
            tracer.states(size, ids, dims.index(dim))


def as_wide(tracer: Tracer, size: Measured, factors: Iterable[Factor], dim: int) -> None:
    """Tie the channels along a dimension to those that its size was read off: they are as many,
    or as many with the axes before it, which are heads.
    """
    source: Ids = size.origin
    for dims, ids in factors:
        if dim not in dims or np.isin(ids, source).all() or tracer.as_wide.issuperset(ids.ravel()):
            continue
        first = last = dims.index(dim)
        while first > 0 and math.prod(ids.shape[first : last + 1]) < len(source):
            first -= 1
        along = math.prod(ids.shape[first : last + 1])
        if along % len(source) or size.factor not in (
            Fraction(along, len(source)),
            Fraction(ids.shape[last], len(source)),
        ):
            continue
        flat = ids.ravel()
        if len(flat) == len(source) and all(int(i) in tracer.members for i in flat):
            # heads, each of which repeats as often as it has dimensions
            heads = flat[np.flatnonzero(np.diff(flat, prepend=-1))]
            tracer.tie(tracer.blocks(source.reshape(len(heads), -1), [0]), heads)
            continue
        rest = [i for i in range(ids.ndim) if not first <= i <= last]
        whole = ids.transpose([*rest, *range(first, last + 1)])
        tracer.tie(whole.reshape(-1, len(source)), source[None])
        tracer.as_wide.update(ids.ravel().tolist())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every layer's mode as it was afterwards.

    Through training mode, in which networks forget what they keep in evaluation (attention biases
    of LeViT), and back.
    """
    training = {m: m.training for m in model.modules()}
    try:
        model.train().eval()
        yield
        model.train()
    finally:
        for m, mode in training.items():
            m.training = mode


@contextmanager
def steadily_training(model: nn.Module) -> Iterator[None]:
    """Training mode, but for what estimates or draws in it: batch norms and dropout evaluate.

    Buffers (what modules of others estimate) are as they were afterwards.
    """
    modes = {m: m.training for m in model.modules()}
    kept = [(m, n, b, b.clone()) for m in modes for n, b in m._buffers.items() if b is not None]
    for m in modes:
        m.training = not (isinstance(m, _NormBase) or "drop" in type(m).__name__.lower())
    try:
        yield
    finally:
        for m, name, buffer, before in kept:
            with torch.no_grad():
                buffer.copy_(before)
            m._buffers[name] = buffer
        for m, mode in modes.items():
            m.training = mode
