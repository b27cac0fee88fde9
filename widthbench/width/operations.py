"""What each of torch's operations does to the channels of its inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widthbench.randomness import seeded
from widthbench.width.adapters import Integer, Measured, Rest, Root, watched_integers
from widthbench.width.counting import counting
from widthbench.width.inputs import Inputs
from widthbench.width.labels import (
    INSIDE,
    MEETS,
    OUTPUT,
    Calls,
    Factor,
    Ids,
    Labels,
    Tracer,
    Value,
    as_wide,
    moved_factor,
    note_size,
    plain_value,
    simple_factors,
    steadily_training,
    with_factors,
)


def trace(model: nn.Module, inputs: Inputs) -> Labels:
    """Run a network once and follow its channels.

    Where layers were not reached, training mode may reach them (auxiliary heads): it is run, too.

    Args:
        model: In eval mode; it is left as it was.
        inputs: What it is called with, on its device.
    """
    tracer = Tracer(model, rule_of)
    for t in inputs.tensors:
        tracer.values[t] = Value(data=True)
    with counting(model), watched_integers(model), Calls(tracer), tracer.modules, tracer:
        output = inputs.run(model)
    outputs = [output]
    if tracer.unread():
        tracer.serving = False
        # it may run in training mode on more than one sample alone, or not at all
        with (
            suppress(Exception),
            steadily_training(model),
            seeded(0),
            counting(model),
            watched_integers(model),
            Calls(tracer),
            tracer.modules,
            tracer,
        ):
            outputs.append(inputs.run(model))
    for t in tree_leaves(outputs):
        if isinstance(t, Tensor):
            tracer.used(t)
            for _, ids in tracer.of(t).factors:
                tracer.freeze(ids, OUTPUT)
    return tracer.finish(output)


def _pointwise(tracer: Tracer, name: str, args: Any, output: Any) -> Value:
    outs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    out = outs[0]
    inputs = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
    factors: list[Factor] = []
    plain: set[int] = set()
    branches: dict[tuple[int, ...], list[Ids]] = {}
    for t in inputs:
        value, shift = tracer.of(t), out.dim() - t.dim()
        covered: set[int] = set()
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
            one = (
                1 if value.data else 0
            )  # a single position that is no channel may meet a single channel
            plain |= {
                d + shift
                for d, n in enumerate(t.shape)
                if d not in covered and (n > 1 or n == one == out.shape[d + shift])
            }
    factors = [f for f in (_apart(tracer, f, plain) for f in factors) if f is not None]
    kept = tracer.merged(factors)
    if name in JOINING:
        for parts in branches.values():
            if len(parts) > 1 and any(
                p is not parts[0] and not np.array_equal(p, parts[0]) for p in parts
            ):
                tracer.joined.append(parts[0])
    values = [tracer.of(t) for t in inputs]
    value = plain_value(values)
    root = next((a for a in tracer.call.args if isinstance(a, Root)), None)
    if root is not None and len(inputs) == 1 and name in (*TIMES, *OVER):
        by = float(root) if name in TIMES else 1 / float(root)
        value = tracer.multiplied(replace(values[0], direct=False), by)
    elif name in ("clone", "_to_copy"):
        value = values[0]
    return with_factors(
        value, kept, direct=name in ("clone", "_to_copy", "alias", "detach") and values[0].direct
    )


def _apart(tracer: Tracer, factor: Factor, plain: set[int]) -> Factor | None:
    """What is left of labels where some of their dimensions meet positions that are no channels:
    the heads, if it is within each head that they do.
    """
    dims, ids = factor
    left = tuple(d for d in dims if d not in plain)
    if left == dims:
        return factor
    tracer.freeze(ids, INSIDE if left else MEETS)
    return (left, tracer.blocks(ids, [dims.index(d) for d in left])) if left else None


def _like(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    """A constant in the shape of a tensor has as many channels as that, so that each goes with one
    of them.
    """
    return Value(tracer.of(args[0]).factors)


def _fixed(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    """A constant of a stated shape."""
    return Value(constant=True)


def _same(tracer: Tracer, name: str, args: Any, output: Any) -> Value:
    value = tracer.of(args[0])
    if output.shape != args[0].shape:  # other strides are the same positions, another shape is not
        tracer.freeze_all([value], f"the operation {name} has no rule for channels")
        return with_factors(value, [], direct=False)
    return value


def _remapped(tracer: Tracer, t: Tensor, mapping: Mapping[int, int]) -> Value:
    value = tracer.of(t)
    for dims, ids in value.factors:
        if not all(d in mapping for d in dims):
            tracer.freeze(ids, "its only channel is squeezed away")
    return with_factors(
        value, [moved_factor(f, mapping) for f in value.factors if all(d in mapping for d in f[0])]
    )


def _permute(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
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


def _unsqueeze(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    at = args[1] % output.dim()
    return _remapped(tracer, args[0], {d: d + (d >= at) for d in range(args[0].dim())})


def _squeeze(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    t = args[0]
    dims = range(t.dim()) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = {d % t.dim() for d in dims if t.shape[d] == 1}
    kept = [d for d in range(t.dim()) if d not in gone]
    return _remapped(tracer, t, {d: i for i, d in enumerate(kept)})


def _expand(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    t = args[0]
    shift = output.dim() - t.dim()
    return _remapped(tracer, t, {d: d + shift for d in range(t.dim())})


def _chunks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of dimensions of two shapes that hold the same elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        a: list[int] = []
        b: list[int] = []
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


def _view(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, value = args[0], tracer.of(args[0])
    if not value.factors:
        return value
    chunks = list(_chunks(list(t.shape), list(output.shape)))
    factors: list[Factor] = []
    for dims, ids in value.factors:
        touched = [(a, b) for a, b in chunks if set(a) & set(dims)]
        if (
            ids.size == 1
            # a single channel: it goes where its dimension goes, repeated where others are merged
            # with it
        ):
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
        if any(len([d for d in a if t.shape[d] > 1]) > 1 for a, _ in touched) or math.prod(
            full.shape
        ) != math.prod(output.shape[d] for d in news):
            full = np.broadcast_to(full, [t.shape[d] for d in olds])
        simple = simple_factors(news, full.reshape([output.shape[d] for d in news]))
        for f in simple:
            if f[1].ndim > len(dims):
                tracer.cut(f[1])
        factors += simple
    taken = [d for dims, _ in factors for d in dims]
    if len(taken) > len(set(taken)):
        tracer.freeze_all([value], "a reshape merges its channels with others")
        factors = []
    alike = len(factors) == len(value.factors) and all(
        np.array_equal(new[1], old[1]) for new, old in zip(factors, value.factors, strict=True)
    )
    for i, size in enumerate(tracer.call.shape()):
        if (
            isinstance(size, Integer)
            and len(tracer.call.shape()) == output.dim()
            and size == output.shape[i]
        ):
            if isinstance(size, Measured):
                as_wide(tracer, size, factors, i)
            else:
                note_size(tracer, size, factors, i)
    return with_factors(value, factors, direct=value.direct and alike)


def _picked(
    tracer: Tracer, t: Tensor, dim: int, picks: Callable[[Ids, int], Ids], keepdim: bool
) -> Value:
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
            factors += (
                simple_factors([d - (not keepdim and d > dim) for d in left], chosen)
                if chosen.ndim
                else []
            )
        else:
            factors.append((tuple(d - (not keepdim and d > dim) for d in dims), ids))
    return with_factors(value, factors)


def _select(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    return _picked(tracer, args[0], args[1], partial(_taken, part=args[2]), False)


def _slice(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    t = args[0]
    dim = (args[1] if len(args) > 1 else 0) % t.dim()
    length = t.shape[dim]
    start, stop, step = (
        args[i] if len(args) > i and args[i] is not None else d
        for i, d in ((2, 0), (3, length), (4, 1))
    )
    start, stop, _ = slice(start, stop).indices(length)
    factor = tracer.of(t).at(dim)
    if factor is not None:
        axis = factor[0].index(dim)
        known = [i for i in tracer.call.integers() if int(i) in (start, stop)]
        for integer in known:
            part = factor[1].take(range(int(integer)), axis=axis)
            tracer.states(integer, part, axis)
        if not known and (start, stop) != (0, length):
            _even(tracer, factor, axis, start, stop)
    return _picked(tracer, t, dim, partial(_taken, part=range(start, stop, step)), True)


def _even(tracer: Tracer, factor: Factor, axis: int, start: int, stop: int) -> None:
    """A part whose size nothing states: where it is one of several equal ones, they need equal
    counts.
    """
    size, length = stop - start, factor[1].shape[axis]
    if size and length % size == 0 and start % size == 0:
        ids = np.moveaxis(factor[1], axis, -1)
        tracer.cut(ids.reshape(*ids.shape[:-1], length // size, size))


def _split(tracer: Tracer, name: str, args: Any, output: Any) -> list[Value]:
    t = args[0]
    dim = (args[2] if len(args) > 2 else 0) % t.dim()
    factor = tracer.of(t).at(dim)
    sizes = [o.shape[dim] for o in output]
    starts = [0, *itertools.accumulate(sizes)]
    if factor is not None:
        axis = factor[0].index(dim)
        if len(set(sizes)) == 1 and name != "split_with_sizes":
            _even(tracer, factor, axis, 0, sizes[0])
        for integer in {id(i): i for i in tracer.call.integers()}.values():
            matching = [i for i, s in enumerate(sizes) if s == int(integer)]
            stated = tracer.call.args[1] if len(tracer.call.args) > 1 else None
            if isinstance(stated, list | tuple):
                matching = [i for i in matching if i < len(stated) and stated[i] is integer]
            else:
                matching = matching[:1]
            for i in matching:
                part = factor[1].take(range(starts[i], starts[i + 1]), axis=axis)
                tracer.states(integer, part, axis)
        _rests(tracer, factor[1], axis, starts)
        if len(set(sizes)) == 1 and name == "split_with_sizes" and not tracer.call.integers():
            _even(tracer, factor, axis, 0, sizes[0])
    return [
        _picked(tracer, t, dim, partial(_taken, part=range(a, b)), True)
        for a, b in itertools.pairwise(starts)
    ]


def _rests(tracer: Tracer, ids: Ids, axis: int, starts: Sequence[int]) -> None:
    """A split into a part and what is left of a number states that number."""
    asked = tracer.call.args[1] if len(tracer.call.args) > 1 else None
    if not isinstance(asked, list | tuple) or len(asked) != len(starts) - 1:
        return
    for i, rest in enumerate(asked):
        if not isinstance(rest, Rest):
            continue
        for first in (i - 1, i):
            if 0 <= first < len(asked) - 1 and rest.less in (asked[first], asked[first + 1]):
                whole = ids.take(range(starts[first], starts[first + 2]), axis=axis)
                tracer.states(rest.whole, whole, axis)
                break


def _taken(ids: Ids, axis: int, part: Any) -> Ids:
    """What lies at some places, or at one, along an axis."""
    return ids.take(part, axis=axis)


def _unbind(tracer: Tracer, name: str, args: Any, output: Any) -> list[Value]:
    dim = args[1] if len(args) > 1 else 0
    return [
        _picked(tracer, args[0], dim, partial(_taken, part=i), False) for i in range(len(output))
    ]


def _cat(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    tensors = [t for t in args[0] if t.numel() or t.dim() == output.dim()]
    dim = (args[1] if len(args) > 1 else 0) % output.dim()
    values = [tracer.of(t) for t in tensors]
    base = plain_value(values)
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
        return with_factors(base, others, direct=False)
    dims = max((f[0] for f in along if f is not None), key=len)
    parts = []
    for f, t in zip(along, tensors, strict=True):
        shape = [t.shape[d] for d in dims]
        if f is not None and f[0] == dims:
            parts.append(f[1])
        elif f is not None and set(f[0]) < set(dims):
            parts.append(
                np.broadcast_to(f[1].reshape([t.shape[d] if d in f[0] else 1 for d in dims]), shape)
            )
        elif f is None:  # fixed positions between channels: tokens in front of others, or constants
            new = tracer._new(math.prod(shape)).reshape(shape)
            tracer.freeze(new, "fixed positions lie beside its channels")
            parts.append(new)
        else:
            tracer.freeze_all(values, "a concatenation lays its channels across others")
            return with_factors(base, [], direct=False)
    whole: Factor = (dims, np.concatenate(parts, axis=dims.index(dim)))
    return with_factors(
        base, [*[f for f in others if not set(f[0]) & set(dims)], whole], direct=False
    )


def _stack(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    tensors = args[0]
    dim = (args[1] if len(args) > 1 else 0) % output.dim()
    mapping = {d: d + (d >= dim) for d in range(output.dim() - 1)}
    values = [_remapped(tracer, t, mapping) for t in tensors]
    base = plain_value(values)
    shapes = {tuple(f[0] for f in v.factors) for v in values}
    if len(shapes) != 1:
        tracer.freeze_all(values, MEETS)
        return with_factors(base, [], direct=False)
    factors: list[Factor] = []
    for several in zip(*(v.factors for v in values), strict=True):
        dims = (dim, *several[0][0])
        ids = np.stack([ids for _, ids in several])
        tracer.cut(ids) if not all(np.array_equal(ids[0], i) for i in ids) else None
        factors += [moved_factor(f, {d: d for d in dims}) for f in simple_factors(dims, ids)]
    taken = [d for dims, _ in factors for d in dims]
    if len(taken) > len(set(taken)):
        tracer.freeze_all(values, "a stack lays its channels across others")
        factors = []
    return with_factors(base, factors, direct=False)


def _pad(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
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
                return with_factors(
                    value, [f for f in value.factors if f[1] is not ids], direct=False
                )
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
                        tracer.states(stated, new[-1], axis)
            ids = np.concatenate(parts, axis=axis)
        factors.append((dims, ids))
    return with_factors(value, factors, direct=False)


def _index(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, indices = args[0], list(args[1])
    value = tracer.of(t)
    at = [i for i, index in enumerate(indices) if index is not None]
    given = [indices[i] for i in at]
    if any(i.dtype in (torch.bool, torch.uint8) for i in given):
        tracer.freeze_all([value], "a mask picks among its channels")
        return with_factors(value, [], direct=False)
    rank = max(i.dim() for i in given)
    start = at[0] if at == list(range(at[0], at[0] + len(at))) else 0
    kept = [d for d in range(t.dim()) if d not in at]
    mapping = {d: n if n < start else n + rank for n, d in enumerate(kept)}
    factors: list[Factor] = []
    for dims, ids in value.factors:
        if not set(dims) & set(at):
            factors.append(moved_factor((dims, ids), mapping))
        elif len(dims) == len(at) == 1 and tracer.of(given[0]).constant:
            factors += simple_factors(range(start, start + rank), ids[given[0].cpu().numpy()])
        elif value.data:
            tracer.freeze(ids, "an index picks among its channels")
    return with_factors(value, factors, direct=False)


def _index_select(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    index = args[2].cpu().numpy()
    return _picked(tracer, args[0], args[1], partial(_taken, part=index), True)


def _flip(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, value = args[0], tracer.of(args[0])
    turned = {
        d % t.dim()
        for d in (args[1] if name == "flip" else args[2] if len(args) > 2 else range(t.dim()))
    }
    factors: list[Factor] = []
    for dims, ids in value.factors:
        if turned & set(dims):
            if name == "roll":
                tracer.freeze(ids, "its channels are rolled")
                continue
            ids = np.flip(ids, tuple(dims.index(d) for d in turned & set(dims)))
        factors.append((dims, ids))
    return with_factors(value, factors, direct=False)


def _repeat(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    t, value = args[0], tracer.of(args[0])
    shift = output.dim() - t.dim()
    factors = []
    for dims, ids in value.factors:
        moved = tuple(d + shift for d in dims)
        factors.append(
            (
                moved,
                np.tile(
                    ids, [output.shape[m] // t.shape[d] for m, d in zip(moved, dims, strict=True)]
                ),
            )
        )
    return with_factors(value, factors, direct=False)


def _reduce(tracer: Tracer, name: str, args: Any, output: Any) -> Value | list[Value]:
    t = args[0]
    at = 2 if name in ("linalg_vector_norm", "norm") else 1  # behind the norm's order
    given = args[at] if len(args) > at else None
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
    norm = next((n for n in tracer.current() if tracer.kinds.get(n) == "channelnorm"), None)
    tracer.passes(norm, value)
    for own, ids in value.factors:
        over = [i for i, d in enumerate(own) if d in dims]
        if over and norm is not None:  # what it divides by
            if rest := [i for i in range(len(own)) if i not in over]:
                rows = tracer.blocks(ids, rest)
                factors.append(moved_factor((tuple(own[i] for i in rest), rows), mapping))
            continue
        if len(over) == len(own):
            tracer.freeze(ids, f"{name} runs over its channels")
            continue
        left = ids
        for axis in sorted(over, reverse=True):
            tracer.tie(left, left.take([0], axis=axis))
            left = left.take(0, axis=axis)
        factors.append(
            moved_factor((tuple(d for i, d in enumerate(own) if i not in over), left), mapping)
        )
    return with_factors(value, factors, direct=False)


def _glu(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    """The first half of the channels, times a function of the second: pairs go together."""
    t, dim = args[0], (args[1] if len(args) > 1 else -1) % args[0].dim()
    factor = tracer.of(t).at(dim)
    if factor is not None:
        axis, half = factor[0].index(dim), output.shape[dim]
        first, second = (factor[1].take(range(a, a + half), axis=axis) for a in (0, half))
        tracer.tie(first, second)
    return _picked(tracer, t, dim, partial(_taken, part=range(output.shape[dim])), True)


def _softmax(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
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
    return with_factors(value, factors, direct=False)


def _mapped(tracer: Tracer, value: Value) -> Value:
    """Channels come second, places after: what lies along both (a linear layer's outputs that were
    made a map of) is a channel that has its places.
    """
    factors: list[Factor] = []
    for dims, ids in value.factors:
        if 1 in dims and len(dims) > 1 and min(dims) == 1:
            first = ids.transpose([dims.index(d) for d in sorted(dims)])
            first = first.reshape(len(first), -1)
            tracer.tie(first, first[:, :1])
            factors.append(((1,), first[:, 0]))
        else:
            factors.append((dims, ids))
    return with_factors(value, factors)


def _pixel_shuffle(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    """Channels become places, or places channels: r² of the one for each of the other."""
    t, r = args[:2]
    value, at = tracer.of(t), t.dim() - 3
    factors: list[Factor] = []
    for dims, ids in value.factors:
        if dims != (at,):
            tracer.freeze(ids, f"{name} runs over its channels")
        elif name == "pixel_shuffle":
            each = ids.reshape(-1, r * r)
            tracer.tie(each, each[:, :1])
            factors.append((dims, each[:, 0]))
        else:
            factors.append((dims, ids.repeat(r * r)))
    return with_factors(value, factors, direct=False)


def _unfold(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    """Windows along one dimension; what lies in them comes last."""
    value, at = tracer.of(args[0]), args[1] % args[0].dim()
    factors = []
    for dims, ids in value.factors:
        if at in dims:
            tracer.freeze(ids, f"{name} runs over its channels")
        else:
            factors.append((dims, ids))
    return with_factors(value, factors, direct=False)


def _spatial(tracer: Tracer, name: str, args: Any, output: Any) -> Value:
    """Pooling and interpolation: channels come second."""
    value = _mapped(tracer, tracer.of(args[0]))
    factors = _samples(tracer, value, f"{name} runs over its channels")
    factors += [f for f in value.factors if f[0] == (1,)]
    return with_factors(value, factors, direct=False)


def _samples(tracer: Tracer, value: Value, reason: str) -> list[Factor]:
    """What lies along the first dimension, of samples: each is treated alike, so that whole heads
    may be among them. Labels on others than the second dimension may not change.
    """
    kept: list[Factor] = []
    for dims, ids in value.factors:
        if dims == (1,):
            continue
        if dims != (0,):
            tracer.freeze(ids, INSIDE if 0 in dims else reason)
        if 0 in dims:
            kept.append(((0,), ids if dims == (0,) else tracer.blocks(ids, [dims.index(0)])))
    return kept


def _convolution(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
    x, w, b = args[:3]
    transposed, groups = args[6], args[8]
    vx, vw = _mapped(tracer, tracer.of(x)), tracer.of(w)
    samples = _samples(tracer, vx, "a convolution runs over its channels as if they were places")
    fx = next((ids for dims, ids in vx.factors if dims == (1,)), None)
    depthwise, several = groups == x.shape[1] > 1, output.shape[1] // groups
    turned = transposed and not depthwise  # inputs first
    fo = next((ids for dims, ids in vw.factors if dims == (int(turned),)), None)
    fi = next((ids for dims, ids in vw.factors if dims == (int(not turned),)), None)
    layer = tracer.layer_of(fo)
    ruled = groups == 1 or (depthwise and several == 1)
    key = tracer.owner(fi)
    if groups == 1 and not vw.data and key is not None and isinstance(key[1], int):
        start, length = tracer.axes[key]  # bare weights
        tracer.reading.append(np.arange(start, start + length))
        for dims, ids in vw.factors:
            if min(dims) > 1:
                tracer.freeze(ids, "places of a convolution")
        vw = with_factors(vw, [f for f in vw.factors if min(f[0]) < 2])
    if (
        (transposed and not ruled)
        or vw.data
        or any(dims not in ((0,), (1,)) for dims, _ in vw.factors)
    ):
        what = (
            "a transposed convolution in groups"
            if transposed
            else "a convolution whose weights are made from activations"
            if vw.data
            else "a convolution with bare weights"
        )
        tracer.freeze_all([vx, vw], f"{what} has no rule")
        return with_factors(plain_value([vx, vw]), [])
    macs = (x if transposed else output).numel() * math.prod(w.shape[1:])
    if vw.constant and groups == x.shape[1]:  # fixed filters for each channel, of any number
        made = None if fx is None else fx.repeat(several)
        tracer.counts(macs, [made])
        made_too = [] if made is None else [((1,), made)]
        return with_factors(vx, [*samples, *made_too], direct=False)
    made = fo
    if groups == 1:
        if fx is not None and fi is not None:
            tracer.tie(fx, fi)
        elif fi is not None and not vx.constant:
            tracer.freeze(fi, "reads positions that are not channels")
        elif fx is not None:
            tracer.freeze(fx, MEETS)
    elif depthwise:
        if fx is not None and fo is not None:
            tracer.tie(fx[:, None], fo.reshape(groups, several))
            made = fx.repeat(several)
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
            fi = inside
            tracer.equal_blocks.append((inside, groups, layer))
            if fo is not None:
                tracer.equal_blocks.append((fo, groups, layer))
        else:
            tracer.freeze(inside, MEETS)
            if fo is not None:
                tracer.freeze(
                    fo, f"{layer} reads positions that are not channels in {groups} blocks"
                )
    else:
        tracer.freeze_all([vx, vw], "a grouped convolution with weights of its own making")
    if b is not None and made is not None and (fb := tracer.of(b).at(0)) is not None:
        tracer.tie(made, fb[1])
    tracer.counts(macs, [*(ids for _, ids in samples), *([made] if depthwise else [fo, fi])])
    near, direct = tracer.passes(layer, vx)
    made_too = [] if made is None else [((1,), made)]
    return Value((*samples, *made_too), data=vx.data, near=near, direct=direct)


def _matmul(tracer: Tracer, name: str, args: Any, output: Tensor) -> Value:
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
    scaled = (
        tracer.call.name == "scaled_dot_product_attention"
        and tracer.call.kwargs.get("scale") is None
    )
    sides = ((va, va.at(contracted[0][1])), (vb, vb.at(contracted[1][1])))
    for (value, made), (other, read) in (sides, sides[::-1]):
        key = tracer.owner(made[1]) if made is not None and not value.data else None
        if key is None or not isinstance(key[1], int) or not other.data or read is None:
            continue
        if str(key[0]).rpartition(".")[0] in tracer.attentions:
            remedy = "widthbench.separated(model) makes layers of them"
            tracer.freeze(read[1], f"the bare weights '{key[0]}' read it: {remedy}")
        start, length = tracer.axes[key]
        tracer.reading.append(np.arange(start, start + length))
    value = tracer.contract(*contracted, maps, macs, scaled)
    layer = None
    if not vb.data:
        dims = (0,) if name == "linear" else (n + 1,)
        layer = tracer.layer_of(next((ids for d, ids in vb.factors if d == dims), None))
    near, direct = tracer.passes(layer, va)
    if layer is not None:
        value = with_factors(value, value.factors, near=near, direct=direct)
    if isinstance(bias, Tensor):
        vbias, shift = tracer.of(bias), output.dim() - bias.dim()
        moved = [(tuple(d + shift for d in dims), ids) for dims, ids in vbias.factors]
        value = with_factors(value, tracer.merged([*value.factors, *moved]))
    return value


def _attention(tracer: Tracer, name: str, args: Any, output: Any) -> list[Value]:
    q, k, v = args[:3]
    if any(own not in (1, other) for own, other in zip(k.shape[:-2], q.shape[:-2], strict=True)):
        tracer.freeze_all(
            [tracer.of(t) for t in (q, k, v)], "an attention whose heads share keys has no rule"
        )
        plain = plain_value([tracer.of(t) for t in (q, k, v)])
        return [plain] * len([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    batch = {d: d for d in range(q.dim() - 2)}
    n = len(batch)
    scaled = (
        tracer.call.kwargs.get("scale") is None
        and tracer.call.name == "scaled_dot_product_attention"
    )
    heads = q.shape[1] if q.dim() == 4 else 1
    logits = q.shape[0] * heads * q.shape[-2] * k.shape[-2]
    first = tracer.contract(
        (q, n + 1), (k, n + 1), ({**batch, n: n}, {**batch, n: n + 1}), logits * q.shape[-1], scaled
    )
    mask = tracer.call.kwargs.get(
        "attn_mask", tracer.call.args[3] if len(tracer.call.args) > 3 else None
    )
    if isinstance(mask, Tensor):
        shift = q.dim() - mask.dim()
        moved = [(tuple(d + shift for d in dims), ids) for dims, ids in tracer.of(mask).factors]
        first = with_factors(first, tracer.merged([*first.factors, *moved]))
    weights = q.new_empty(0)
    tracer.values[weights] = first
    second = tracer.contract(
        (weights, n + 1), (v, n), ({**batch, n: n}, {**batch, n + 1: n + 1}), logits * v.shape[-1]
    )
    count = len([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    return [second, *[with_factors(second, [])] * (count - 1)]


def _batch_norm(tracer: Tracer, name: str, args: Any, output: Any) -> list[Value]:
    x = args[0]
    vx = _mapped(tracer, tracer.of(x))
    tensors = [a for a in args[1:5] if isinstance(a, Tensor)]
    training = (
        next((a for a in args[1:] if isinstance(a, bool)), False) and "no_training" not in name
    )
    owners = [f for t in tensors if (f := tracer.of(t).at(0)) is not None]
    layer = next((name_of for _, ids in owners if (name_of := tracer.layer_of(ids))), None)
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
            if training and dims != (1,) and vx.data:
                tracer.freeze(ids, "a batch norm runs over its channels as if they were places")
            made = tracer.layer_of(ids) if training and dims == (1,) and not vx.data else None
            if made is not None and (made, "in") in tracer.axes:  # weights, standardised by row
                tracer.made.add(made)
                start, length = tracer.axes[made, "in"]
                tracer.standardised.append(np.arange(start, start + length))
    near, direct = tracer.passes(layer, vx)
    count = len([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    return [
        with_factors(vx, factors, near=near, direct=direct),
        *[with_factors(vx, [])] * (count - 1),
    ]


def _layer_norm(tracer: Tracer, name: str, args: Any, output: Any) -> list[Value]:
    x, shape = args[0], args[1]
    vx = tracer.of(x)
    affine = [
        f[1] for t in args[2:4] if isinstance(t, Tensor) and (f := tracer.of(t).at(0)) is not None
    ]
    layer = next((name_of for ids in affine if (name_of := tracer.layer_of(ids))), None)
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
            factors.append((dims, ids))
    if vx.at(last) is None:
        for own in affine:
            tracer.freeze(own, MEETS)
    near, direct = tracer.passes(layer, vx)
    count = len([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    return [
        with_factors(vx, factors, near=near, direct=direct),
        *[with_factors(vx, [])] * (count - 1),
    ]


def _group_norm(tracer: Tracer, name: str, args: Any, output: Any) -> list[Value]:
    x, groups = args[0], args[6]
    vx = tracer.of(x)
    affine = [
        f[1] for t in args[1:3] if isinstance(t, Tensor) and (f := tracer.of(t).at(0)) is not None
    ]
    layer = next((name_of for ids in affine if (name_of := tracer.layer_of(ids))), None)
    factors = []
    for dims, ids in vx.factors:
        if dims != (1,) or layer is None:
            tracer.freeze(ids, "a norm across its channels that is no layer of ours")
            continue
        for own in affine:
            tracer.tie(ids, own)
        if groups > 1:
            tracer.equal_blocks.append((ids, groups, layer))
            tracer.normed.add(layer)
        factors.append((dims, ids))
    if vx.at(1) is None:
        for own in affine:
            tracer.freeze(own, MEETS)
    near, direct = tracer.passes(layer, vx)
    count = len([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    return [
        with_factors(vx, factors, near=near, direct=direct),
        *[with_factors(vx, [])] * (count - 1),
    ]


TIMES, OVER = ("mul", "mul_"), ("div", "div_")
JOINING = ("add", "add_", "sub", "sub_", "rsub", "_foreach_add", "maximum", "minimum")
# which of them torch tags as pointwise differs between its versions
ACTIVATIONS = (
    *("celu", "clamp", "clamp_max", "clamp_min", "elu", "gelu", "hardshrink", "hardsigmoid"),
    *("hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "selu", "sigmoid", "silu"),
    *("softplus", "softshrink", "tanh", "threshold"),
)
POINTWISE = {
    *ACTIVATIONS,
    *(f"{name}_" for name in ACTIVATIONS),
    *(
        "_conj",
        "_prelu_kernel",
        "_to_copy",
        "contiguous",
        "copy_",
        "lift_fresh",
        "log_sigmoid_forward",
        "logical_not_",
    ),
    *("masked_fill_", "native_dropout", "prelu", "rsub", "where"),
}
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            "detach",
            "alias",
            "lift_fresh",
            "_conj",
            "detach_",
            "fill_",
            "zero_",
            "as_strided_",
            "as_strided",
        ),
        _same,
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), _like),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _fixed),
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
    "unfold": _unfold,
    "repeat": _repeat,
    **dict.fromkeys(
        (
            "mean",
            "sum",
            "amax",
            "amin",
            "max",
            "min",
            "var",
            "std",
            "var_mean",
            "std_mean",
            "prod",
            "any",
            "all",
            "logsumexp",
            "linalg_vector_norm",
            "norm",
            "argmax",
            "argmin",
        ),
        _reduce,
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax"), _softmax),
    **dict.fromkeys(
        (
            "avg_pool1d",
            "avg_pool2d",
            "avg_pool3d",
            "max_pool2d",
            "max_pool2d_with_indices",
            "max_pool3d_with_indices",
            "adaptive_avg_pool1d",
            "adaptive_avg_pool2d",
            "_adaptive_avg_pool2d",
            "_adaptive_avg_pool3d",
            "adaptive_max_pool2d",
            "upsample_nearest1d",
            "upsample_nearest2d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
            "_upsample_bilinear2d_aa",
            "_upsample_bicubic2d_aa",
            "_upsample_nearest_exact2d",
            "reflection_pad1d",
            "reflection_pad2d",
            "replication_pad1d",
            "replication_pad2d",
            "mkldnn_max_pool2d",
            "mkldnn_adaptive_avg_pool2d",
        ),
        _spatial,
    ),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "linear"), _matmul),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "cudnn_batch_norm",
            "_batch_norm_with_update",
            "miopen_batch_norm",
        ),
        _batch_norm,
    ),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _pixel_shuffle),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    "native_group_norm": _group_norm,
    "glu": _glu,
}


def rule_of(operation: Any) -> Callable[..., Any] | None:
    """The rule of an operation of torch's: by name, or that of everything that works position by
    position.
    """
    name = operation.overloadpacket.__name__
    if name in RULES or torch.Tag.pointwise not in operation.tags:
        return RULES.get(name) or (_pointwise if name in POINTWISE else None)
    return _pointwise
