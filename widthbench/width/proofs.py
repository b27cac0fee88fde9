"""The two numerical proofs that a channel group's index maps are right.

On a float64 copy with randomised statistics, (1) every group's channels are permuted and a few of
them split into halves: the output must not move, nor in training mode; (2) half of the channels are
removed: the output must equal that of the whole network with those input gates at 0. Each group
alone must fit together by its shapes; both proofs are then asked of all groups in one pass, in
which those of one width go to different ones as far as there are any; if that fails, of each alone.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from widthbench.randomness import seeded
from widthbench.width.gates import gated
from widthbench.width.groups import Grade, Group, Groups
from widthbench.width.layers import kind_of
from widthbench.width.resize import Plan, Resize, detached, disagreements, keep, resize_uncertified

TOLERANCE = 1e-9  # relative to the largest output, in float64
ATTEMPTS = 4  # draws of weights after which a group that the output does not depend on is given up
INSENSITIVE = "the output does not depend on its channels"
PICKED = 3  # channels split per block of a group

Grades = dict[str, tuple[Grade, str]]


class _Affine(nn.Module):
    """A cross-channel norm reduced to its per-channel affine, which shows the index maps without
    the coupling.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm  # read at each call, and copied with it

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        last = (
            isinstance(self.norm, nn.LayerNorm) and "2d" not in type(self.norm).__name__.lower()
        )  # timm's LayerNorm2d, ...Act2d
        shape[-1 if last else 1] = -1
        if self.norm.weight is not None:
            x = x * self.norm.weight.view(shape)
        if self.norm.bias is not None:
            x = x + self.norm.bias.view(shape)
        return x


def randomised(model: nn.Module, *, seed: int = 0, redraw: bool = False) -> nn.Module:
    """A float64 copy in eval mode in which no statistic, affine or head hides an error.

    BatchNorm statistics, all vectors (norm affines, biases, layer-scales) and all tensors that are
    constant (zero-initialised heads) are drawn at random; other weights are kept, or drawn too if
    ``redraw``.
    """
    generator = torch.Generator().manual_seed(seed)
    net = (
        copy.deepcopy(model, detached(model)).cpu().double().train().eval()
    )  # which clears what attention keeps in evaluation

    def uniform(t: Tensor) -> Tensor:
        return torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5

    def normal(t: Tensor, scale: float) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64) * scale

    with torch.no_grad():
        for name, p in net.named_parameters():
            leaf = name.rpartition(".")[2]
            if p.dim() <= 1:
                p.copy_(normal(p, 0.1) if "bias" in leaf else uniform(p))
            elif redraw or (p.numel() > 1 and bool((p == p.flatten()[0]).all())):
                p.copy_(normal(p, p[0].numel() ** -0.5))
        for name, b in net.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(normal(b, 0.1))
            elif name.endswith("running_var"):
                b.copy_(uniform(b))
    return net


def errors_of_all(model: nn.Module, groups: Groups, example_input: Tensor) -> tuple[float, float]:
    """The two errors behind the grade *exact*, with all exact groups in one plan, on a randomised
    float64 copy.

    Args:
        model: The network.
        groups: Its graded groups.
        example_input: ``[B, ...]``; only the shape is used.

    Returns:
        (error of splitting, error of removal against input gates at 0), relative to the largest
        output; 0 if there is no exact group.
    """
    chosen = [g for g in groups.values() if g.grade == "exact"]
    if not chosen:
        return 0.0, 0.0
    net, x = randomised(model), _random_input(example_input)
    split = _resized(net, groups, {g.name: _split_plan(g, i) for g, i in _placed(chosen)})
    kept = {g.name: _kept(g, i) for g, i in _placed(chosen)}
    removed = _resized(net, groups, {n: keep(k) for n, k in kept.items()})
    with gated(net, groups, _gates(chosen, kept)):
        gates = _output(net, x)
    return _error(_output(split, x), _output(net, x)), _error(_output(removed, x), gates)


def _random_input(example_input: Tensor) -> Tensor:
    """Two random samples in float64: the smallest batch that still shows a mix-up of the batch with
    the channels.
    """
    shape = (2, *example_input.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _gates(chosen: Iterable[Group], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """1 for kept channels, 0 for the others."""
    return {
        g.name: torch.zeros(g.channels, dtype=torch.float64).index_fill(0, kept[g.name], 1.0)
        for g in chosen
    }


def _error(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of two outputs, each entry relative to its own size, or to its
    tensor's median one where that is more.

    Relative to the largest entry of all, a mask of -1e9 or a saturated output would hide what the
    others do.
    """
    worst = 0.0
    for new, old in zip(a, b, strict=True):
        sizes = old.abs()
        some = sizes[(sizes > 0) & sizes.isfinite()]
        scale = sizes.clamp_min(float(some.median()) if some.numel() else 1.0)
        moved = torch.where(
            new == old, 0.0, (new - old).abs() / scale
        )  # infinities that stay are no difference
        worst = max(
            worst, float(torch.nan_to_num(moved, nan=math.inf).max()) if moved.numel() else 0.0
        )
    return worst


def grades_of(model: nn.Module, groups: Groups, example_input: Tensor) -> Grades:
    """Grade and reason of each group; arguments as for ``certify``."""
    grades: Grades = {n: ("frozen", g.reason) for n, g in groups.items() if g.reason}
    candidates = [n for n in groups if n not in grades]
    if not candidates:
        return grades
    x = _random_input(example_input)
    for attempt in range(ATTEMPTS):
        try:
            net = randomised(model, seed=attempt, redraw=attempt > 0)
        except Exception as error:  # a network that cannot be copied cannot be resized
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return grades | dict.fromkeys(
                candidates, ("frozen", f"the network cannot be copied: {first[:120]}")
            )
        try:
            _output(net, x)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = f"nothing can be proven on two samples in float64: {first[:120]}"
            return grades | dict.fromkeys(candidates, ("frozen", reason))
        grades |= _grade_on(net, groups, candidates, x)
        # a grade holds for the architecture: channels that are dead with these weights are tried
        # with others
        candidates = [n for n in candidates if grades[n] == ("frozen", INSENSITIVE)]
        if not candidates:
            break
    return {n: grades[n] for n in groups}


def _grade_on(net: nn.Module, groups: Groups, candidates: list[str], x: Tensor) -> Grades:
    """Grades of the candidates by the probes on one randomised network, which may be changed."""
    grades: Grades = {}
    both: tuple[Grade, Grade] = ("exact", "coupled")
    for grade in both:
        names = [n for n in candidates if groups[n].normalised == (grade == "coupled")]
        if grade == "coupled" and names:
            net = _with_affines(net, groups, names)
        passed, failed = _passing(net, groups, names, x)
        coupled = "a norm across its channels rides along: a resize changes what it divides by"
        grades |= dict.fromkeys(passed, (grade, "" if grade == "exact" else coupled))
        grades |= {n: ("frozen", reason) for n, reason in failed.items()}
    return grades


def _with_affines(net: nn.Module, groups: Groups, names: Iterable[str]) -> nn.Module:
    """Replace the norms across channels that ride along the named groups by their affines, in
    place.
    """
    for layer in {rider for n in names for rider in groups[n].riders}:
        module = net.get_submodule(layer)
        if kind_of(module) == "channelnorm":
            module.forward = _Affine(module).forward
    return net


def _passing(
    net: nn.Module, groups: Groups, names: list[str], x: Tensor
) -> tuple[list[str], dict[str, str]]:
    """The groups that pass, first all at once, else each alone and then together; and the reasons
    of the others.
    """
    if not names:
        return [], {}
    reference = _output(net, x)
    failed = _mismatched(net, groups, names, x)
    fitting = [n for n in names if n not in failed]
    if not fitting or not _probe(net, groups, fitting, x, reference):
        return fitting, failed
    half = len(fitting) // 2  # all together have just failed
    parts = (fitting[:half], fitting[half:]) if half else (fitting,)
    passed = [n for part in parts for n in _found_out(net, groups, part, x, reference, failed)]
    if passed and _probe(net, groups, passed, x, reference):
        together: list[str] = []
        for n in passed:
            if _probe(net, groups, [*together, n], x, reference):
                failed[n] = f"passes alone, but not together with {together[-1] if together else n}"
            else:
                together.append(n)
        passed = together
    return passed, failed


def _mismatched(net: nn.Module, groups: Groups, names: list[str], x: Tensor) -> dict[str, str]:
    """Groups that cannot be resized alone, and why: to half, to one channel per block, and split,
    by shapes without numbers.

    First several at once, in rounds in which each group changes while each other one stays as it
    is: what fits then fits alone. Only where a round does not fit is each group tried for itself.
    """
    failed: dict[str, str] = {}
    try:
        shapes, y = copy.deepcopy(net).to("meta"), x.to("meta")
        _output(shapes, y)
    except Exception:  # a network that looks at values: the probes will tell
        return failed
    plans = {n: _shapes_alone(groups[n]) for n in names}

    def problem(some: Sequence[str]) -> str:
        try:
            for i in range(max(len(plans[n]) for n in some)):
                _output(
                    _resized(
                        shapes, groups, {n: plans[n][min(i, len(plans[n]) - 1)] for n in some}
                    ),
                    y,
                )
        except Exception as error:
            return _does_not_run(error)
        return ""

    rounds = _separating(names)
    if len(rounds) < len(names) and not any(map(problem, rounds)):
        return failed
    for n in names:
        if why := problem([n]):
            failed[n] = why
    return failed


def _shapes_alone(group: Group) -> list[Resize]:
    """Split, to half, and to one channel per block."""
    size = group.channels // group.blocks
    half, least = _kept(group), torch.arange(group.blocks) * size
    return [_split_plan(group), keep(half), *([keep(least)] if len(least) < len(half) else [])]


def _separating(names: Sequence[str]) -> list[list[str]]:
    """Few sets of names such that for any two one set holds the first and not the second: by the
    binary digits of their places.
    """
    digits = max(1, (len(names) - 1).bit_length())
    rounds = [
        [n for i, n in enumerate(names) if i >> d & 1 == side]
        for d in range(digits)
        for side in (0, 1)
    ]
    return [r for r in rounds if r]


def _does_not_run(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"a resized network does not run: {first[:160]}"


def _found_out(
    net: nn.Module,
    groups: Groups,
    names: list[str],
    x: Tensor,
    reference: list[Tensor],
    failed: dict[str, str],
) -> list[str]:
    """The groups that pass, by halves; the reasons of the others go into ``failed``."""
    if not names:
        return []
    why = _probe(net, groups, names, x, reference)
    if why and len(names) == 1:
        failed[names[0]] = why
    if not why or len(names) == 1:
        return [] if why else names
    half = len(names) // 2
    return [
        n
        for part in (names[:half], names[half:])
        for n in _found_out(net, groups, part, x, reference, failed)
    ]


def _probe(
    net: nn.Module, groups: Groups, names: list[str], x: Tensor, reference: list[Tensor]
) -> str:
    """Why these groups cannot be resized together; "" if they can. ``reference`` is what the
    network gives.
    """
    chosen = [groups[n] for n in names]
    try:
        wide = _resized(net, groups, {g.name: _split_plan(g, i) for g, i in _placed(chosen)})
        if problem := _difference(_output(wide, x), reference):
            return f"splitting its channels {problem}"
        kept = {g.name: _kept(g, i) for g, i in _placed(chosen)}
        small = _resized(net, groups, {n: keep(k) for n, k in kept.items()})
        removed = _output(small, x)
        values = _gates(chosen, kept)
        with gated(net, groups, values):
            if problem := _difference(removed, _output(net, x)):
                return f"removing channels instead of gating them {problem}"
        with gated(net, groups, values, on="weight"):
            if problem := _difference(removed, _output(net, x)):
                return f"gating weights instead of inputs {problem}"
        return _insensitive(net, groups, chosen, x) or _untrainable(net, wide, small, x)
    except (
        Exception
    ) as error:  # whatever a foreign forward raises: the group stays frozen, with the cause
        return _does_not_run(error)


def _resized(net: nn.Module, groups: Groups, plan: Plan) -> nn.Module:
    new = resize_uncertified(
        net, groups, plan
    )  # a deep copy, which binds an instance's own forward to the copy
    if bad := disagreements(new):
        raise RuntimeError(f"declared and real shapes differ at {bad[0]}")
    return new


def _output(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(net(x))


def _tensors(output: Any) -> list[Tensor]:
    """All floating tensors of a network's output, flat."""
    leaves = tree_leaves(output)
    for leaf in leaves:
        if not isinstance(leaf, Tensor | bool | int | float | str | None):
            raise TypeError(f"its output holds a {type(leaf).__name__}, which cannot be seen into")
    flat = [t.flatten() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    if not flat:
        raise TypeError("its output holds no floating-point numbers")
    return flat


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> str:
    if [t.shape for t in a] != [t.shape for t in b]:
        return "changes the output's shape"
    error = _error(a, b)
    return "" if error < TOLERANCE else f"moves the output by {error:.1e} (relative)"


def _picks(group: Group, generator: torch.Generator, count: int) -> Tensor:
    """``count`` random channels of each block, ``[blocks, count]``."""
    size = group.channels // group.blocks
    return torch.stack(
        [b * size + torch.randperm(size, generator=generator)[:count] for b in range(group.blocks)]
    )


def _placed(chosen: Iterable[Group]) -> Iterator[tuple[Group, int]]:
    """Groups with their places among those of as many channels, so that each of them can change to
    another number.
    """
    seen: Counter[int] = Counter()
    for group in chosen:
        yield group, seen[group.channels]
        seen[group.channels] += 1


def _split_plan(group: Group, place: int = 0) -> Resize:
    """Permute the channels within each block, and split a few into two halves: another number at
    each place.
    """
    generator = torch.Generator().manual_seed(group.channels)
    size = group.channels // group.blocks
    picks = _picks(group, generator, min(PICKED + place, size))
    rows = []
    for b in range(group.blocks):
        both = torch.cat([torch.arange(size) + b * size, picks[b]])
        rows.append(both[torch.randperm(len(both), generator=generator)])
    all_rows = torch.cat(rows)
    mix = torch.zeros(group.channels, len(all_rows), dtype=torch.float64)
    mix[all_rows, torch.arange(len(all_rows))] = (
        1.0 / torch.bincount(all_rows, minlength=group.channels)[all_rows].double()
    )
    return Resize(all_rows, mix)


def _kept(group: Group, place: int = 0) -> Tensor:
    """A random part of the channels, in order: half of each block and another number at each place;
    a block of one keeps it.

    Widths that must be equal and are not tied are found out: groups of one width shrink alike only
    where widths run out.
    """
    generator = torch.Generator().manual_seed(group.channels + 1)
    size = group.channels // group.blocks
    left = 1 + (max(1, size // 2) - 1 + place) % max(1, size - 1)
    dropped = _picks(group, generator, size - left).flatten()
    mask = torch.ones(group.channels, dtype=torch.bool)
    mask[dropped] = False
    return mask.nonzero().flatten()


def _untrainable(net: nn.Module, wide: nn.Module, small: nn.Module, x: Tensor) -> str:
    """What only training mode uses (auxiliary heads) is not in the trace: there a split must change
    nothing, a removal must run.

    Batch norms and dropout stay as in evaluation; a network that draws at random elsewhere is not
    compared.
    """
    try:
        with _training(net), seeded(0):
            reference = _output(net, x)
        with _training(net), seeded(1):
            steady = not _difference(_output(net, x), reference)
    except Exception:
        return ""  # the network itself does not run in training mode on this input
    try:
        with _training(wide), seeded(0):
            split = _output(wide, x)
        if steady and (problem := _difference(split, reference)):
            return f"in training mode splitting its channels {problem}"
        _output(small.train(), x)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"a resized network does not run in training mode: {first[:120]}"
    return ""


@contextmanager
def _training(net: nn.Module) -> Iterator[None]:
    """Training mode, but for what estimates or draws in it."""
    modes = {m: m.training for m in net.modules()}
    for m in modes:
        m.training = not (isinstance(m, _NormBase) or "drop" in type(m).__name__.lower())
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def _insensitive(net: nn.Module, groups: Groups, chosen: list[Group], x: Tensor) -> str:
    """A proof on a group that the output does not depend on would be empty: ask for a gradient at
    every group's gates.
    """
    values = {
        g.name: torch.ones(g.channels, dtype=torch.float64, requires_grad=True) for g in chosen
    }
    with torch.enable_grad(), gated(net, groups, values):
        total = torch.stack([t.square().sum() for t in _tensors(net(x))]).sum()
        gradients = torch.autograd.grad(total, list(values.values()), allow_unused=True)
    for gradient in gradients:
        if gradient is None or float(gradient.abs().max()) == 0.0:
            return INSENSITIVE
    return ""
