"""The two numerical proofs that a channel group's index maps are right.

On a float64 copy with randomised statistics, (1) about half of every group's channels are removed:
the output must equal that of the whole network with those input gates at 0; (2) of what is left,
the channels are permuted and a few of them split into halves: the output must not move, nor in
training mode. Both are asked of all groups in one pass, in which no two keep the same share of
their channels (where there are too few numbers for that, of a few networks more, by their shapes
alone); if that fails, of halves of them, down to those that fail alone. The input is the smallest
on which the network does the same.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from widthbench.progress import counted
from widthbench.randomness import seeded
from widthbench.width.counting import counting
from widthbench.width.gates import gated
from widthbench.width.groups import Grade, Group, Groups
from widthbench.width.inputs import Example, Inputs, random_like
from widthbench.width.labels import evaluating, steadily_training
from widthbench.width.layers import Step, kind_of
from widthbench.width.resize import (
    Plan,
    Resize,
    detached,
    disagreements,
    keep,
    narrowed,
    resize_uncertified,
)

TOLERANCE = 1e-9  # relative to the largest output, in float64
ATTEMPTS = 4  # draws of weights after which a group that the output does not depend on is given up
INSENSITIVE = "the output does not depend on its channels"
TRAINING_ALONE = "training mode alone uses its channels"
PICKED = 3  # channels split per block of a group
STRIDE, TRIED = 32, 3  # smaller images: multiples of it, and how many are tried
SLOW = 15e9  # multiply-accumulates, above which shapes are tried without numbers
FURTHER = 16  # networks that are tried by their shapes, at the most

Grades = dict[str, tuple[Grade, str]]


class _Size:
    """How large a tensor is at the first call, a power of two, which rounds nothing."""

    def __init__(self) -> None:
        self.first = 0.0

    def __deepcopy__(self, memo: Any) -> _Size:
        return self

    def of(self, x: Tensor) -> float:
        if not self.first and x.device.type != "meta":
            largest = float(x.detach().abs().max())
            self.first = 2.0 ** math.frexp(largest)[1] if math.isfinite(largest) else 1.0
        return self.first or 1.0


class _Affine(nn.Module):
    """A cross-channel norm reduced to its per-channel affine, which shows the index maps without
    the coupling.

    What enters is divided by the size that it has at the first call, in all copies of the network:
    without any norm, numbers grow from layer to layer until rounding moves the output.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm  # read at each call, and copied with it
        self.size = _Size()

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.size.of(x)
        shape = [1] * x.dim()
        # timm's LayerNorm2d, RmsNorm2d, ...Act2d have channels second, as GroupNorm
        named, at = "2d" in type(self.norm).__name__.lower(), getattr(self.norm, "channel_dim", -1)
        second = isinstance(self.norm, nn.GroupNorm) or named or at == 1
        shape[1 if second else -1] = -1
        if getattr(self.norm, "weight", None) is not None:
            x = x * self.norm.weight.view(shape)
        if getattr(self.norm, "bias", None) is not None:
            x = x + self.norm.bias.view(shape)
        return x


class _Plain(nn.Module):
    """A convolution without what its class does to its weights."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv._conv_forward(x, self.conv.weight, self.conv.bias)
        return y


def randomised(model: nn.Module, *, seed: int = 0, redraw: bool = False) -> nn.Module:
    """A float64 copy in eval mode in which no statistic, affine or head hides an error.

    BatchNorm statistics, all vectors (norm affines, biases, layer-scales) and all tensors that are
    constant (zero-initialised heads) are drawn at random; other weights are kept, or drawn too if
    ``redraw``.
    """
    generator = torch.Generator().manual_seed(seed)
    memo = detached(model)
    for t in (*model.parameters(), *model.buffers()):
        made = t.detach().to("cpu", torch.float64 if t.is_floating_point() else None, copy=True)
        memo[id(t)] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
    # both modes: the one clears what attention keeps in the other
    net = copy.deepcopy(model, memo).cpu().double().train().eval()

    def uniform(t: Tensor) -> Tensor:
        return torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5

    def normal(t: Tensor, scale: float) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64) * scale

    with torch.no_grad():
        for name, p in net.named_parameters():
            leaf = name.rpartition(".")[2]
            if p.dim() <= 1:
                # zeros among other numbers are a choice (of channels, say)
                chosen = (p != 0).to(p) if bool((p != 0).any()) else 1.0
                p.copy_(chosen * (normal(p, 0.1) if "bias" in leaf else uniform(p)))
            elif redraw or (p.numel() > 1 and bool((p == p.flatten()[0]).all())):
                p.copy_(normal(p, p[0].numel() ** -0.5))
        for name, b in net.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(normal(b, 0.1))
            elif name.endswith("running_var"):
                b.copy_(uniform(b))
    return net


def errors_of_all(model: nn.Module, groups: Groups, example_input: Example) -> tuple[float, float]:
    """The two errors behind the grade *exact*, with all exact groups in one plan, on a randomised
    float64 copy.

    Args:
        model: The network.
        groups: Its graded groups.
        example_input: As for ``certify``.

    Returns:
        (error of splitting, error of removal against input gates at 0), relative to the largest
        output; 0 if there is no exact group.
    """
    chosen = [g for g in groups.values() if g.grade == "exact"]
    if not chosen:
        return 0.0, 0.0
    net = randomised(model)
    x = random_like(Inputs.of(example_input), groups.samples)
    split = _resized(net, groups, {g.name: _split_plan(g, i) for g, i in _placed(chosen)})
    kept = {g.name: _kept(g, n) for g, n in zip(chosen, _widths(chosen), strict=True)}
    removed = _resized(net, groups, {n: keep(k) for n, k in kept.items()})
    with gated(net, groups, _gates(chosen, kept)):
        gates = _output(net, x)
    return _error(_output(split, x), _output(net, x)), _error(_output(removed, x), gates)


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


def grades_of(model: nn.Module, groups: Groups, inputs: Inputs) -> Grades:
    """Grade and reason of each group; arguments as for ``certify``."""
    grades: Grades = {n: ("frozen", g.reason) for n, g in groups.items() if g.reason}
    candidates = [n for n in groups if n not in grades]
    if not candidates:
        return grades
    x = random_like(smallest(model, groups, inputs), groups.samples)
    for attempt in range(ATTEMPTS):
        try:
            net = randomised(model, seed=attempt, redraw=attempt > 0)
        except Exception as error:  # a network that cannot be copied cannot be resized
            reason = f"the network cannot be copied: {_first_line(error)[:120]}"
            return grades | dict.fromkeys(candidates, ("frozen", reason))
        try:
            grades |= _grade_on(net, groups, candidates, x)
        except _UnprovenError as error:
            return grades | dict.fromkeys(candidates, ("frozen", str(error)))
        # a grade holds for the architecture: channels that are dead with these weights are tried
        # with others
        candidates = [n for n in candidates if grades[n] == ("frozen", INSENSITIVE)]
        if not candidates:
            break
    return {n: grades[n] for n in groups}


def smallest(model: nn.Module, groups: Groups, inputs: Inputs) -> Inputs:
    """A smaller example on which the network does the same, if there is one: a proof on it is
    as good and cheaper.

    Images are shrunk as long as the same operations run and no map has a single pixel where there
    were several.
    """
    image = inputs.image
    if image is None or not groups.steps or groups.samples > 1:
        return inputs
    maps = [s[2:] for _, s in groups.steps if len(s) == 4 and s[0] == 1]
    least = min((n for s in maps for n in s if n > 1), default=1)
    sides = image.shape[2:]
    for more in range(TRIED):
        small = [math.ceil(n * 2 / least / STRIDE + more) * STRIDE for n in sides]
        if math.prod(small) * 2 > math.prod(sides):
            break
        x = Inputs((image[:1, :, : small[0], : small[1]],))
        try:
            with evaluating(model), counting(model), _Operations() as seen:
                x.run(model)
        except Exception:  # it takes this size alone
            continue
        if _alike(groups.steps, seen.steps) and (
            _trains(model, x) or not _trains(model, inputs.first(1))
        ):
            return x
    return inputs


def _trains(model: nn.Module, x: Inputs) -> bool:
    """Whether the network runs in training mode on an input, auxiliary heads and all."""
    try:
        with evaluating(model), steadily_training(model), torch.no_grad(), seeded(0):
            x.run(model)
    except Exception:
        return False
    return True


def _alike(steps: Sequence[Step], others: Sequence[Step]) -> bool:
    """Whether the same operations ran on maps of different sizes."""
    return len(steps) == len(others) and all(
        n == m and len(a) == len(b) and all((i > 1) == (j > 1) for i, j in zip(a, b, strict=True))
        for (n, a), (m, b) in zip(steps, others, strict=True)
    )


def _grade_on(net: nn.Module, groups: Groups, candidates: list[str], x: Inputs) -> Grades:
    """Grades of the candidates by the proofs on one randomised network."""
    coupled = "a norm runs across its channels: a resize changes what it divides by"
    named: dict[Grade, list[str]] = {"exact": [], "coupled": []}
    for n in candidates:
        named["coupled" if groups[n].normalised else "exact"].append(n)
    failed: dict[str, str] = {}
    with counted(f"certifying {len(candidates)} channel groups") as step:
        whole = _Proof(net, groups, x, step)
        left, before = [*candidates], -1
        while left and len(failed) != before:  # until all that is left has passed together
            before = len(failed)
            with _affines(net, groups, [n for n in named["coupled"] if n in left]):
                left = whole.survivors(whole.fits, left, failed)
            exact = [n for n in named["exact"] if n in left]
            if named["coupled"]:  # with the norms in place, too
                exact = whole.survivors(whole.least, exact, failed)
            exact = whole.settle(exact, failed)
            if names := [n for n in named["coupled"] if n in left]:
                # where the others are narrowed already, as a plan of all of them does
                rest = whole.narrow(exact)
                with _affines(rest.net, rest.groups, names):
                    _Proof(rest.net, rest.groups, x, step).settle(names, failed)
            left = [n for n in left if n not in failed]
    grades: Grades = dict.fromkeys(named["exact"], ("exact", ""))
    grades |= dict.fromkeys(named["coupled"], ("coupled", coupled))
    return grades | {n: ("frozen", reason) for n, reason in failed.items()}


@contextmanager
def _affines(net: nn.Module, groups: Groups, names: Iterable[str]) -> Iterator[None]:
    """With the norms across channels that ride along the named groups replaced by their affines,
    and convolutions that standardise their weights by plain ones.
    """
    replaced: list[tuple[Any, Any]] = []
    for layer in {member for n in names for member in (*groups[n].riders, *groups[n].consumers)}:
        module: Any = net.get_submodule(layer)
        own = vars(module).get("forward")
        if kind_of(module) == "channelnorm":
            module.forward = _Affine(module).forward
        elif layer in groups.made:
            module.forward = _Plain(module).forward
        else:
            continue
        replaced.append((module, own))
    try:
        yield
    finally:
        for module, own in replaced:
            del module.forward
            if own is not None:
                module.forward = own


class _UnprovenError(Exception):
    """Nothing can be proven on this network."""


class _Operations(TorchDispatchMode):
    """Notes which operations run, and the shapes of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        self.steps.extend((name, tuple(t.shape)) for t in outputs)
        return output


class _Mean(_Operations):
    """The same, where draws of zeros and ones give their mean: dropout that a forward writes itself
    does nothing, as the layer does in evaluation.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, more = func.overloadpacket.__name__, kwargs or {}
        t: Any = args[0] if args else None
        if name == "bernoulli_":
            p = args[1] if len(args) > 1 else more.get("p", 0.5)
            return t.copy_(p) if isinstance(p, Tensor) else t.fill_(p)
        if name == "bernoulli":
            return torch.full_like(t, args[1]) if len(args) > 1 else t.clone()
        if name == "native_dropout":
            return t.clone(), torch.ones_like(t, dtype=torch.bool)
        return super().__torch_dispatch__(func, types, args, kwargs)


Stage = Callable[[Sequence[str]], str]


@dataclass
class _Narrow:
    """The network with channels removed, and the one on which all is proven that does not need the
    whole network: the same, as long as no layer has become another kind.

    Attributes:
        removed: The network.
        kept: The channels that are left, by group.
        what_is_left: Its output on the proof's input.
        net: The network to prove the rest on.
        groups: Its groups.
        output: On the proof's input.
        steps: The operations that gave it.
    """

    removed: nn.Module
    kept: dict[str, Tensor]
    what_is_left: list[Tensor]
    net: nn.Module
    groups: Groups
    output: list[Tensor]
    steps: list[Step]


class _Proof:
    """The stages of the proof, each asked of several groups at once: why they cannot be resized
    together, "" if they can. What has passed is not asked again.

    What removal leaves must equal the whole network with gates at 0. All else (splits, gates on
    weights, gradients, training) is then shown on what is left, a quarter of the arithmetic: the
    index maps are the same.

    Args:
        net: A randomised network.
        groups: Its groups.
        x: What it is called with: two samples, or a batch that is taken as a whole.
        step: Called before each question.
    """

    def __init__(
        self, net: nn.Module, groups: Groups, x: Inputs, step: Callable[[], Any] = lambda: None
    ) -> None:
        self.net, self.groups, self.x, self.step = net, groups, x, step
        self.one = x.first(groups.samples)
        self.made: dict[tuple[str, ...], _Narrow] = {}
        self.passed: set[tuple[Stage, tuple[str, ...]]] = set()
        traced = sum(map(math.prod, groups.input_shapes))
        self.slow = sum(macs for macs, *_ in groups.products) * x.elements > SLOW * traced

    @cached_property
    def shapes(self) -> tuple[nn.Module, Inputs]:
        """What widths are tried on: without numbers, where passes are slow and that works."""
        if self.slow:
            try:
                tensors = (*self.net.parameters(), *self.net.buffers())
                memo: dict[int, Any] = {id(t): _bare(t) for t in tensors}
                shapes, y = copy.deepcopy(self.net, memo), self.x.map(_bare)
                _output(shapes, y)
            except Exception:  # a network that looks at values
                return self.net, self.x
            return shapes, y
        return self.net, self.x

    def settle(self, names: Sequence[str], failed: dict[str, str]) -> list[str]:
        """The groups that pass all further stages; the reasons of the others go into ``failed``."""
        left = self.survivors(self.removes, names, failed)
        if left:
            failed |= self.insensitive(left)
        for stage in (self.splits, self.weighs, self.trains):
            left = self.survivors(stage, [n for n in left if n not in failed], failed)
        return left

    def survivors(self, stage: Stage, names: Sequence[str], failed: dict[str, str]) -> list[str]:
        """The groups that pass together; the reasons of the others go into ``failed``."""

        def asked(some: Sequence[str]) -> str:
            if (key := (stage, tuple(some))) in self.passed:
                return ""
            self.step()
            if not (why := stage(some)):
                self.passed.add(key)
            return why

        if not names or not (why := asked(names)):
            return [*names]
        self._runs_itself()
        passed = self._alone(asked, names, why, failed)
        if not passed or (len(passed) < len(names) and not asked(passed)):
            return passed
        together: list[str] = []
        for n in passed:
            if asked([*together, n]):
                whom = together[-1] if together else n
                failed[n] = f"passes alone, but not together with {whom}"
            else:
                together.append(n)
        return together

    def _runs_itself(self) -> None:
        """Ask it only once something has failed: a pass of the whole network costs most."""
        try:
            _output(self.net, self.x)
        except Exception as error:
            reason = f"nothing can be proven on two samples in float64: {_first_line(error)[:120]}"
            raise _UnprovenError(reason) from error

    def _alone(
        self, stage: Stage, names: Sequence[str], why: str, failed: dict[str, str]
    ) -> list[str]:
        """Those of groups that do not pass together that do in smaller sets, by halves."""
        if len(names) == 1:
            failed[names[0]] = why
            return []
        half = len(names) // 2
        passed: list[str] = []
        for part in (names[:half], names[half:]):
            why = stage(part)
            passed += self._alone(stage, part, why, failed) if why else part
        return passed

    def fits(self, names: Sequence[str]) -> str:
        """Widths fit together, by shapes: down to one channel per block, and for any two groups a
        network in which they keep different shares of their channels.
        """
        chosen = [self.groups[n] for n in names]
        try:
            for widths, samples in _rounds(chosen):
                kept = zip(chosen, widths, strict=True)
                plan = {g.name: keep(_kept(g, left)) for g, left in kept}
                x = self.shapes[1].first(max(samples, self.groups.samples))
                _output(_resized(self.shapes[0], self.groups, plan), x)
        except Exception as error:
            return _does_not_run(error)
        return ""

    def least(self, names: Sequence[str]) -> str:
        """One channel per block of each runs, norms and all."""
        try:
            plan = {n: keep(_kept(self.groups[n], 1)) for n in names}
            _output(_resized(self.net, self.groups, plan), self.x)
        except Exception as error:
            return _does_not_run(error)
        return ""

    def narrow(self, names: Sequence[str]) -> _Narrow:
        """The network in which about half of the channels of these groups are left."""
        if (key := tuple(names)) not in self.made:
            chosen = [self.groups[n] for n in names]
            kept = {g.name: _kept(g, n) for g, n in zip(chosen, _widths(chosen), strict=True)}
            net = removed = _resized(self.net, self.groups, {n: keep(k) for n, k in kept.items()})
            groups = narrowed(self.groups, {n: len(k) for n, k in kept.items()})
            with _Operations() as seen:
                output = left = _output(net, self.x)
            pairs = zip(self.net.modules(), removed.modules(), strict=True)
            if any(kind_of(a) != kind_of(b) for a, b in pairs):
                # a grouped convolution of one channel per group is a depthwise one
                net, groups = self.net, self.groups
                with _Operations() as seen:
                    output = _output(net, self.x)
            self.made.clear()
            self.made[key] = _Narrow(removed, kept, left, net, groups, output, seen.steps)
        return self.made[key]

    def removes(self, names: Sequence[str]) -> str:
        """Removing channels equals gates at 0 on inputs."""
        try:
            small = self.narrow(names)
            values = _gates([self.groups[n] for n in names], small.kept)
            with gated(self.net, self.groups, values):
                problem = _difference(small.what_is_left, _output(self.net, self.x))
        except Exception as error:
            return _does_not_run(error)
        return f"removing channels instead of gating them {problem}" if problem else ""

    def insensitive(self, names: Sequence[str]) -> dict[str, str]:
        """Groups that the output does not depend on, on which a proof would be empty, and whether
        that of training does.
        """
        small = self.narrow(names)
        found = self._without_gradient(small, names, self.one)
        # attention does not depend on queries where a single sample is a single place
        if found:
            found = self._without_gradient(small, found, self.x)
        if not found:
            return {}
        with steadily_training(small.net), seeded(0):
            try:
                nowhere = self._without_gradient(small, found, self.one)
            except Exception:  # not in training mode
                nowhere = found
        return {n: INSENSITIVE if n in nowhere else TRAINING_ALONE for n in found}

    def _without_gradient(self, small: _Narrow, names: Sequence[str], x: Inputs) -> list[str]:
        """Groups at whose gates no output has a gradient."""
        values = {
            n: torch.ones(small.groups[n].channels, dtype=torch.float64, requires_grad=True)
            for n in names
        }
        with torch.enable_grad(), gated(small.net, small.groups, values):
            output = _tensors(x.run(small.net))
            total = torch.stack([t.square().sum() for t in output]).sum()
            gradients = torch.autograd.grad(total, list(values.values()), allow_unused=True)
        found = zip(names, gradients, strict=True)
        return [n for n, g in found if g is None or float(g.abs().max()) == 0.0]

    def splits(self, names: Sequence[str]) -> str:
        """Splitting channels leaves the output as it is."""
        try:
            small = self.narrow(names)
            problem = _difference(_output(self._wide(small, names), self.x), small.output)
        except Exception as error:
            return _does_not_run(error)
        return f"splitting its channels {problem}" if problem else ""

    def _wide(self, small: _Narrow, names: Sequence[str]) -> nn.Module:
        chosen = [small.groups[n] for n in names]
        plan = {g.name: _split_plan(g, i) for g, i in _placed(chosen)}
        return _resized(small.net, small.groups, plan)

    def weighs(self, names: Sequence[str]) -> str:
        """Gates on weights equal gates on inputs."""
        try:
            small = self.narrow(names)
            chosen = [small.groups[n] for n in names]
            kept = {g.name: _kept(g, n) for g, n in zip(chosen, _widths(chosen), strict=True)}
            values = _gates(chosen, kept)
            with gated(small.net, small.groups, values):
                inputs = _output(small.net, self.one)
            with gated(small.net, small.groups, values, on="weight"):
                problem = _difference(_output(small.net, self.one), inputs)
        except Exception as error:
            return _does_not_run(error)
        return f"gating weights instead of inputs {problem}" if problem else ""

    def trains(self, names: Sequence[str]) -> str:
        """What only training mode uses (auxiliary heads) is not in the trace: there, too, a split
        must change nothing, and removal must equal gates.

        Batch norms and dropout stay as in evaluation. A network that runs the same operations as
        then, to the same output, has nothing more to show; one that draws at random otherwise is
        not compared, and must run.
        """
        try:
            small = self.narrow(names)
            output, steps = self._in_training(small.net)
            if steps == small.steps and not _difference(output, small.output):
                return ""
            if not _difference(self._in_training(small.net, seed=1)[0], output):
                wide, _ = self._in_training(self._wide(small, names))
                if problem := _difference(wide, output):
                    return f"in training mode splitting its channels {problem}"
                values = _gates([self.groups[n] for n in names], small.kept)
                with gated(self.net, self.groups, values):
                    masked, _ = self._in_training(self.net)
                if problem := _difference(self._in_training(small.removed)[0], masked):
                    return f"in training mode removing channels instead of gating them {problem}"
            self.made.clear()  # training changes the statistics of batch norms
            _output(small.removed.train(), self.x)
        except Exception as error:
            if not _trains(self.net, self.x):
                return ""
            return f"a resized network does not run in training mode: {_first_line(error)[:120]}"
        return ""

    def _in_training(self, net: nn.Module, seed: int = 0) -> tuple[list[Tensor], list[Step]]:
        with steadily_training(net), seeded(seed), _Mean() as seen:
            return _output(net, self.x), seen.steps


def _bare(t: Tensor) -> Tensor:
    """The tensor without its numbers."""
    bare = t.detach().to("meta")
    return nn.Parameter(bare, t.requires_grad) if isinstance(t, nn.Parameter) else bare


def _first_line(error: Exception) -> str:
    """What it says, or where it was raised if it says nothing."""
    if said := str(error).strip():
        return said.splitlines()[0]
    *_, frame = traceback.extract_tb(error.__traceback__) or [None]
    where = f" in {frame.name}: {frame.line}" if frame is not None else ""
    return f"{type(error).__name__}{where}"


def _does_not_run(error: Exception) -> str:
    return f"a resized network does not run: {_first_line(error)[:160]}"


def _resized(net: nn.Module, groups: Groups, plan: Plan) -> nn.Module:
    # a deep copy, which binds an instance's own forward to the copy
    new = resize_uncertified(net, groups, plan, share=True)
    if bad := disagreements(new):
        raise RuntimeError(f"declared and real shapes differ at {bad[0]}")
    return new


def _output(net: nn.Module, x: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(x.run(net))


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


def _kept(group: Group, left: int) -> Tensor:
    """A random part of the channels, in order: ``left`` of each block."""
    generator = torch.Generator().manual_seed(group.channels + 1)
    size = group.channels // group.blocks
    mask = torch.ones(group.channels, dtype=torch.bool)
    mask[_picks(group, generator, size - left).flatten()] = False
    return mask.nonzero().flatten()


def _widths(chosen: Iterable[Group]) -> list[int]:
    """How many channels of each block the proof of removal keeps: about half, and another share of
    its channels for each group, as long as its numbers last.

    Widths that must be equal, or in a fixed proportion, and are not tied are found out by it.
    """
    widths: list[int] = []
    taken: Counter[tuple[int, int]] = Counter()
    for group in chosen:
        size = group.channels // group.blocks
        start = int(size * (0.4 + size * 0.618 % 0.2))
        options = (1 + (start + i) % max(1, size - 1) for i in range(max(1, size - 1)))
        # the first that nobody has, else the one that fewest have
        best, least = 1, math.inf
        for width in options:
            if (many := taken[_share(width, size)]) < least:
                best, least = width, many
            if not many:
                break
        widths.append(best)
        taken[_share(best, size)] += 1
    return widths


def _share(width: int, size: int) -> tuple[int, int]:
    """A fraction in its lowest terms."""
    common = math.gcd(width, size)
    return width // common, size // common


def _rounds(chosen: Sequence[Group]) -> Iterator[tuple[list[int], int]]:
    """Networks to try by their shapes: channels that are left of each block, and how many samples
    show it.

    The first is that of ``_widths``; all groups are at one channel per block in one of them, and
    for any two there is one in which they keep different shares: of those across which norms run,
    and of the others, which are narrowed apart later. Groups of few channels run out of numbers:
    these need more networks.
    """
    normalised = np.array([g.normalised for g in chosen])
    sizes = np.array([g.channels // g.blocks for g in chosen])
    widths = np.ones(len(sizes), dtype=int)
    for which in (False, True):
        widths[normalised == which] = _widths(g for g in chosen if g.normalised == which)
    first = widths.tolist()
    can_change = (sizes > 1)[:, None] | (sizes > 1)[None]
    together = normalised[:, None] == normalised[None]
    alike = can_change & together & ~np.eye(len(sizes), dtype=bool) & _same_share(first, sizes)
    yield first, 1
    if any(n > 1 for n in first):
        yield [1] * len(first), 2
    draw = np.random.default_rng(0)
    for _ in range(FURTHER):
        if not alike.any():
            return
        widths = np.array(first)
        for i in np.flatnonzero(alike.any(axis=1)):
            options = draw.permutation(sizes[i])[:8] + 1
            others = np.flatnonzero(alike[i, :i])
            clashes = options[:, None] * sizes[others] == widths[others] * sizes[i]
            widths[i] = options[clashes.sum(axis=1).argmin()]
        yield widths.tolist(), 1
        alike &= _same_share(widths.tolist(), sizes)


def _same_share(widths: Sequence[int], sizes: Any) -> Any:
    """``[G, G]``: pairs of groups that keep the same share of their channels."""
    across = np.array(widths)[:, None] * sizes
    return across == across.T
