"""The one place that cuts or grows a network: a plan of per-group resizes, applied at once, on a
copy.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widthbench.errors import PlanError, did_you_mean
from widthbench.width.adapters import Origin, declare_integer
from widthbench.width.groups import Axis, Group, Groups, Segment, WidthAttribute
from widthbench.width.layers import (
    MAKING,
    Side,
    axis_length,
    kind_of,
    outputs_first,
    tensors_on,
)


@dataclass(frozen=True)
class Resize:
    """New channels of one group in terms of its old ones.

    With P new and N old channels, producers and riders take row ``rows[p]`` for new channel p, and
    every consumer's incoming weight becomes ``W_in @ mix``.

    Attributes:
        rows: long ``[P]``, the old channel that each new one is copied from; repeats allowed.
        mix: ``[N, P]``, old by new; None means one-hot of ``rows`` (applied by selection, never as
            a product).
        tensors: New values for tensors of producers or riders, by full name (``"conv1.weight"``),
            ``[P, ...]`` in the original network's input coordinates (``[P·repeat·copies, ...]``
            where a layer holds each channel more than once).
    """

    rows: Tensor
    mix: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


Plan = Mapping[str, Resize]
"""One resize per group, by group name, in the coordinates of the network that the plan was made
for."""


def keep(rows: Tensor | list[int]) -> Resize:
    """The resize that keeps the given channels and drops the others: pruning.

    Args:
        rows: ``[P]`` indices of the channels to keep.
    """
    return Resize(torch.as_tensor(rows, dtype=torch.long).cpu())


def resize(model: nn.Module, groups: Groups, plan: Plan) -> nn.Module:
    """Apply a plan to a network.

    All maps are composed in the original network's coordinates, and nothing is rebuilt between
    groups. Either the whole plan is applied or an error is raised; the given network is never
    touched.

    Args:
        model: The network that ``groups`` was found in.
        groups: Its certified groups.
        plan: One resize per group; groups that it does not name stay as they are.

    Returns:
        A resized copy, with the same device, dtype, mode and ``requires_grad``; gradients are not
        carried over.

    Raises:
        PlanError: If the plan does not fit: unknown or uncertified group, rows out of range or none
            at all, unequal counts per block, a mix or tensor of the wrong shape or with values that
            are not finite.
    """
    for name in plan:
        if name not in groups:
            raise PlanError(
                "the plan names no channel group of this network:"
                f" '{name}'{did_you_mean(name, groups)}"
            )
        group = groups[name]
        if group.grade not in ("exact", "coupled"):
            why = (
                f"is frozen: {group.reason}"
                if group.grade == "frozen"
                else "is not certified: call certify() first"
            )
            raise PlanError(f"channel group '{name}' {why}")
    resized: Any = resize_uncertified(model, groups, plan)
    resized.widthbench_plans = _followed_by(model, groups, plan)
    return resized


def plans_of(model: nn.Module) -> list[dict[str, Tensor]]:
    """Which channels of the network that it was made of a resized network holds, ``[P]`` by group;
    one plan after another where groups of a later step are no part of those before.

    Empty if it was not resized.
    """
    plans: list[dict[str, Tensor]] = getattr(model, "widthbench_plans", [])
    return plans


def _followed_by(model: nn.Module, groups: Groups, plan: Plan) -> list[dict[str, Tensor]]:
    """A network's plans and one more: in terms of the network before the last of them, if it can
    be.
    """
    new = {name: change.rows.cpu().clone() for name, change in plan.items()}
    if not (plans := plans_of(model)):
        return [new]
    *earlier, last = plans
    known = groups.everything or groups.members
    if any(
        name not in known or known[name].heads or known[name].channels != len(rows)
        for name, rows in last.items()
    ):
        return [*plans, new]  # heads that are gone have taken dimensions along
    joint = {n: last[n][rows] if n in last else rows for n, rows in new.items()}
    return [*earlier, last | joint]


def resize_uncertified(
    model: nn.Module, groups: Groups, plan: Plan, *, share: bool = False
) -> nn.Module:
    """``resize`` without asking for a grade: for certification itself.

    With ``share``, parameters that stay as they are belong to both networks.
    """
    for name, change in plan.items():
        _check(model, groups, groups[name], change)
    layers: dict[str, dict[Side, Axis]] = {}
    for (layer, side), axis in groups.axes.items():
        if touched(axis, plan):
            layers.setdefault(layer, {})[side] = axis
    numbers = _numbers(groups, plan)

    memo = detached(model)
    if share:
        memo |= {id(p): p for p in model.parameters()}
    widths: dict[str, dict[Side, int]] = {}
    channels = {n: len(change.rows) for n, change in plan.items()}
    with torch.no_grad():
        for layer, sides in layers.items():
            module = model.get_submodule(layer)
            widths[layer] = {
                side: axis_width(axis, channels, groups.everything) for side, axis in sides.items()
            }
            for name, new in _tensors(layer, module, sides, plan, groups).items():
                _replace(getattr(module, name), new, memo)
        for name, tensor in _bare(model, groups, plan).items():
            _replace(_tensor(model, name), tensor, memo)
    # deepcopy takes the new tensors from the memo, so that the old ones are never copied
    resized = copy.deepcopy(model, memo)
    modes = [m.training for m in resized.modules()]
    resized.train()  # forgets what networks keep in evaluation, at the old widths
    for module, mode in zip(resized.modules(), modes, strict=True):
        module.training = mode
    for layer, new_widths in widths.items():
        for side, width in new_widths.items():
            # of the layer before: fewer inputs may make a depthwise convolution of a grouped one
            _declare(resized.get_submodule(layer), kind_of(model.get_submodule(layer)), side, width)
        _declare_blocks(resized.get_submodule(layer), layers[layer].get("out", ()), plan, groups)
    for origin, number in numbers.items():
        declare_integer(resized, origin, number)
    for name, group in groups.scales:
        if group in plan:
            scaling: Any = resized.get_submodule(name)
            scaling.scale *= math.sqrt(groups[group].channels / len(plan[group].rows))
    _declare_features(model, resized)
    return resized


def touched(axis: Axis, names: Container[str]) -> bool:
    """Whether an axis has positions of any of these groups."""
    return any(s.group in names or s.outer in names for s in axis)


def narrowed(groups: Groups, left: Mapping[str, int]) -> Groups:
    """The groups of the network after so many channels of some of them are left.

    Args:
        groups: The groups of the network before.
        left: Channels per group; those of the others stay. Where heads go, so do their dimensions.
    """
    members = dict(groups.everything or groups.members)
    axes = [*groups.axes.values(), *groups.tensors.values()]
    outer = {str(s.group): s.outer for axis in axes for s in axis if s.group and s.outer in left}

    def of_heads(number: int, heads: str | None) -> int:
        if heads is None or heads not in left:
            return number
        return number * left[heads] // members[heads].channels

    def smaller(group: Group) -> Group:
        heads = outer.get(group.name)
        channels = left.get(group.name, group.channels)
        return replace(
            group, channels=of_heads(channels, heads), blocks=of_heads(group.blocks, heads)
        )

    def along(axis: Axis) -> Axis:
        return tuple(
            replace(s, channels=new[s.group].channels if s.group else of_heads(s.channels, s.outer))
            for s in axis
        )

    def stated(number: WidthAttribute) -> WidthAttribute:
        width = axis_width(number.axis, left, members)
        axis = along(number.axis)
        return replace(
            number, axis=axis, over=number.over * sum(s.size for s in axis) / max(1, width)
        )

    new = {n: smaller(g) for n, g in members.items()}
    return replace(
        groups,
        members={n: new[n] for n in groups.members},
        everything={n: new[n] for n in groups.everything},
        axes={k: along(a) for k, a in groups.axes.items()},
        tensors={k: along(a) for k, a in groups.tensors.items()},
        width_attributes=tuple(map(stated, groups.width_attributes)),
    )


def _replace(old: Tensor, new: Tensor, memo: dict[int, Any]) -> None:
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
    memo[id(old)] = new


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def _bare(model: nn.Module, groups: Groups, plan: Plan) -> dict[str, Tensor]:
    """Bare parameters and buffers with the plan's rows along each of their dimensions."""
    new: dict[str, Tensor] = {}
    for (name, dim), axis in groups.tensors.items():
        if touched(axis, plan):
            tensor = new.get(name, _tensor(model, name).detach())
            for stage in _stages(axis, plan, groups):
                old = tensor.movedim(dim, 0)
                tensor = old.index_select(0, _index(stage, plan).to(tensor.device))
                _keys(old, tensor, stage, plan)
                tensor = tensor.movedim(0, dim)
            new[name] = tensor.contiguous()
    return new


def _numbers(groups: Groups, plan: Plan) -> dict[Origin, int]:
    """What numbers in the network's code become."""
    numbers: dict[Origin, int] = {}
    widths = {n: len(change.rows) for n, change in plan.items()}
    for attribute in groups.width_attributes:
        if not touched(attribute.axis, plan):
            continue
        number = axis_width(attribute.axis, widths, groups.everything) / attribute.over
        name = ".".join(p for p in attribute.origin[:2] if p)
        if number != round(number):
            raise PlanError(
                f"'{name}' would have to be {number:g}, which is no whole number: its parts must"
                " keep equal counts"
            )
        if numbers.setdefault(attribute.origin, round(number)) != round(number):
            raise PlanError(
                f"'{name}' would have to be both {numbers[attribute.origin]} and {round(number)}"
            )
    return numbers


def _stages(axis: Axis, plan: Plan, groups: Groups) -> list[Axis]:
    """An axis as its groups see it, and, where heads are resized too, once more as heads see what
    is then left.
    """
    if not any(s.outer in plan for s in axis):
        return [axis]
    widths = {n: len(change.rows) for n, change in plan.items()}
    second = []
    for s in axis:
        size = axis_width((replace(s, outer=None),), widths, groups.everything)
        heads = groups.everything[str(s.outer)].channels if s.outer in plan else 0
        second.append(Segment(s.outer, heads, size // heads) if heads else Segment(None, size))
    return [axis, tuple(second)]


def axis_width(axis: Axis, widths: Mapping[str, int], groups: Mapping[str, Group]) -> int:
    """Positions along an axis with the given channels per group; groups that are not named keep
    theirs.
    """
    total = 0
    for s in axis:
        size = (
            widths.get(s.group, s.channels) * s.repeat
            if s.group is not None
            else s.channels * s.repeat
        )
        if s.outer is not None and s.outer in widths:
            size = size * widths[s.outer] // groups[s.outer].channels
        total += size
    return total


def detached(model: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy``: stand-ins for tensors with a history, which it refuses, and for
    empty containers.

    Networks that keep tensors in attributes (LeViT's bias cache) have the former; every module has
    a dozen of the latter (its hooks), and copying those one by one takes longer than cutting the
    weights.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if not isinstance(value, dict | list | tuple | set | Tensor):
                continue
            if type(value) in (dict, OrderedDict, list, set) and not value:
                memo[id(value)] = type(value)()
                continue
            if value is module._modules or value is module._parameters:
                continue
            for leaf in (value,) if isinstance(value, Tensor) else tree_leaves(value):
                if isinstance(leaf, Tensor) and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach().clone()
    return memo


FEATURES = ("num_features", "head_hidden_size", "embed_dim", "in_features")


def _declare_features(model: Any, resized: Any) -> None:
    """Keep timm's ``num_features`` and the like true, which its ``reset_classifier`` builds a new
    head from.
    """
    if not callable(getattr(model, "get_classifier", None)):
        return
    old, new = model.get_classifier(), resized.get_classifier()
    if not isinstance(old, nn.Linear) or old.in_features == new.in_features:
        return
    for part in (
        resized,
        getattr(resized, "head", None),
    ):  # a head may be a module that holds pooling, norm and classifier
        for name in FEATURES if isinstance(part, nn.Module) else ():
            if getattr(part, name, None) == old.in_features:
                setattr(part, name, new.in_features)


def _check(model: nn.Module, groups: Groups, group: Group, change: Resize) -> None:
    rows, name = change.rows, f"channel group '{group.name}'"
    if rows.dim() != 1 or rows.dtype != torch.long:
        raise PlanError(
            f"{name}: rows must be a long vector [P], not {rows.dtype} of shape {list(rows.shape)}"
        )
    if rows.numel() == 0:
        raise PlanError(f"{name}: a plan must leave at least {group.blocks} channel(s)")
    if int(rows.min()) < 0 or int(rows.max()) >= group.channels:
        raise PlanError(
            f"{name}: rows must lie in 0..{group.channels - 1}, not"
            f" {int(rows.min())}..{int(rows.max())}"
        )
    new = rows.numel()
    if group.blocks > 1:
        old_block = rows.cpu() * group.blocks // group.channels
        new_block = torch.arange(new) * group.blocks // max(new, 1)
        if new % group.blocks or not torch.equal(old_block, new_block):
            raise PlanError(
                f"{name}: its {group.blocks} blocks must keep equal counts, in order, but P = {new}"
            )
    if change.mix is not None:
        if tuple(change.mix.shape) != (group.channels, new):
            raise PlanError(
                f"{name}: mix must be [N, P] = {[group.channels, new]}, not"
                f" {list(change.mix.shape)}"
            )
        if not torch.isfinite(change.mix).all():
            raise PlanError(f"{name}: mix has values that are not finite")
        if group.blocks > 1:
            a = (torch.arange(group.channels) * group.blocks // group.channels)[:, None]
            b = (torch.arange(new) * group.blocks // new)[None]
            if bool((change.mix.cpu() != 0)[a != b].any()):
                raise PlanError(f"{name}: mix must not cross its {group.blocks} blocks")
    known: dict[str, tuple[int, ...]] = {}
    for layer, positions in groups.places(group.name, "out"):
        module = model.get_submodule(layer)
        for tensor, _ in tensors_on(module, "out"):
            size = len(positions) // group.channels * new
            held = getattr(module, tensor)
            held = outputs_first(module, held) if tensor == "weight" else held
            known[f"{layer}.{tensor}"] = (size, *held.shape[1:])
    for tensor, value in change.tensors.items():
        if tensor not in known:
            raise PlanError(
                f"{name}: '{tensor}' is not a tensor of its producers or"
                f" riders{did_you_mean(tensor, known)}"
            )
        if tuple(value.shape) != known[tensor]:
            raise PlanError(
                f"{name}: '{tensor}' must have shape {list(known[tensor])}, not {list(value.shape)}"
            )
        if not torch.isfinite(value).all():
            raise PlanError(f"{name}: '{tensor}' has values that are not finite")


def _change(segment: Segment, plan: Plan) -> Resize | None:
    """What the plan does to a segment, if anything."""
    return plan.get(segment.group) if segment.group is not None else None


def _index(axis: Axis, plan: Plan) -> Tensor:
    """The old position of each new position of an axis, ``[P']``, as if every mix were one-hot."""
    parts, offset = [], 0
    for s in axis:
        if change := _change(s, plan):
            rows = change.rows.cpu()
            parts.append((offset + rows[:, None] * s.repeat + torch.arange(s.repeat)).flatten())
        else:
            parts.append(torch.arange(offset, offset + s.size))
        offset += s.size
    return torch.cat(parts)


def _tensors(
    layer: str, module: nn.Module, sides: Mapping[Side, Axis], plan: Plan, groups: Groups
) -> dict[str, Tensor]:
    """The new tensors of one layer."""
    new: dict[str, Tensor] = {}
    if "out" in sides:
        for stage in _stages(sides["out"], plan, groups):
            index = _index(stage, plan)
            for name, _ in tensors_on(module, "out"):
                old = new.get(name, getattr(module, name).detach())
                old = outputs_first(module, old) if name == "weight" else old
                new[name] = old.index_select(0, index.to(old.device))
                _keys(old, new[name], stage, plan)
                _override(f"{layer}.{name}", new[name], stage, plan)
    if "in" in sides:
        weight = new.get("weight", module.weight.detach())  # type: ignore[operator]
        weight = weight if "weight" in new else outputs_first(module, weight)
        count = getattr(module, "groups", 1) if kind_of(module) == "conv" else 1
        for stage in _stages(sides["in"], plan, groups):
            weight = _consume(weight, stage, plan, count)
        new["weight"] = weight
    if kind_of(module) == "transposed" and "weight" in new:
        new["weight"] = outputs_first(module, new["weight"]).contiguous()
    return new


def _keys(old: Tensor, new: Tensor, axis: Axis, plan: Plan) -> None:
    """Rows, of keys or of bare weights, that read a group's channels in a product: mixed as
    consumers' weights are, in place.
    """
    before = after = 0
    for s in axis:
        change = _change(s, plan)
        size = s.size if change is None else len(change.rows) * s.repeat
        if s.reads and change is not None:
            part = new.narrow(0, after, size)
            if change.mix is not None:
                rows = old.narrow(0, before, s.size).unflatten(0, (s.channels, s.repeat))
                part.copy_(torch.tensordot(change.mix.to(old).T, rows, dims=1).flatten(0, 1))
            if s.scaled:  # attention divides by the root of the head dimension
                part.mul_(math.sqrt(size / s.size))
        before, after = before + s.size, after + size


def _override(name: str, tensor: Tensor, axis: Axis, plan: Plan) -> None:
    """Write the plan's own values for a tensor over the gathered rows, in place."""
    offset, taken = 0, dict.fromkeys(plan, 0)
    for s in axis:
        change = _change(s, plan)
        if change is None or s.group is None or s.reads:
            offset += s.size if change is None else len(change.rows) * s.repeat
            continue
        size = len(change.rows) * s.repeat
        if name in change.tensors:
            done = taken[s.group]
            tensor[offset : offset + size] = change.tensors[name][done : done + size].to(tensor)
            taken[s.group] = done + size
        offset += size


def _consume(weight: Tensor, axis: Axis, plan: Plan, count: int) -> Tensor:
    """Incoming weights ``[O, I/count, ...]`` after ``W_in @ mix`` along an axis of I positions in
    ``count`` blocks.
    """
    if count > 1:  # a grouped convolution: one segment, each block on its own
        (segment,) = axis
        block_change = plan[str(segment.group)]
        blocks = weight.unflatten(0, (count, -1))  # [G, O/G, I/G, ...]
        size = segment.channels // count
        rows = (
            block_change.rows.view(count, -1).to(weight.device)
            - torch.arange(count, device=weight.device)[:, None] * size
        )
        if block_change.mix is None:
            picked = [block.index_select(1, r) for block, r in zip(blocks, rows, strict=True)]
        else:
            mixes = block_change.mix.to(weight).unflatten(0, (count, -1)).unflatten(2, (count, -1))
            picked = [_mixed(block, mixes[g, :, g]) for g, block in enumerate(blocks)]
        return torch.cat(picked)
    if all((change := _change(s, plan)) is None or change.mix is None for s in axis):
        return weight.index_select(1, _index(axis, plan).to(weight.device))
    parts, offset = [], 0
    for s in axis:
        part = weight.narrow(1, offset, s.size)
        offset += s.size
        if (change := _change(s, plan)) is not None:
            part = part.unflatten(1, (s.channels, s.repeat))
            if change.mix is None:
                part = part.index_select(1, change.rows.to(weight.device))
            else:
                part = _mixed(part, change.mix.to(weight))
            part = part.flatten(1, 2)
        parts.append(part)
    return torch.cat(parts, dim=1)


def _mixed(weight: Tensor, mix: Tensor) -> Tensor:
    """``[O, N, ...]`` times ``[N, P]`` over N, to ``[O, P, ...]``."""
    if int((mix != 0).sum(dim=0).max()) <= 1:  # each new channel carries a part of an old one
        rows = mix.abs().argmax(dim=0)
        parts = mix.gather(0, rows[None])[0]
        taken, changed = weight.index_select(1, rows), (parts != 1).nonzero().flatten()
        scaled = taken.index_select(1, changed) * parts[changed].view(-1, *[1] * (weight.dim() - 2))
        return taken.index_copy_(1, changed, scaled)
    return torch.tensordot(weight, mix, dims=([1], [0])).movedim(-1, 1).contiguous()


def _declare(module: Any, kind: str | None, side: Side, width: int) -> None:
    """Bring a layer's declared width in line with its tensors."""
    match kind:
        case "depthwise":
            several = module.out_channels // module.groups  # filters of each channel
            module.in_channels = module.groups = width // several
            module.out_channels = width
        case "conv" | "transposed":
            setattr(module, f"{side}_channels", width)
        case "linear":
            setattr(module, f"{side}_features", width)
        case "batchnorm":
            module.num_features = width
        case "channelnorm":
            if isinstance(module, nn.GroupNorm):
                module.num_channels = width
            elif hasattr(module, "normalized_shape"):
                module.normalized_shape = (width,)
        case "prelu":
            module.num_parameters = width


def _declare_blocks(module: nn.Module, axis: Axis, plan: Plan, groups: Groups) -> None:
    """Bring the number of blocks that a GroupNorm normalises in line with those that are left."""
    if not isinstance(module, nn.GroupNorm):
        return
    total, left = sum(s.size for s in axis), Fraction(0)
    for s in axis:
        kept = Fraction(s.size * module.num_groups, total)
        for name in (s.outer, s.group):
            if name in plan and groups.everything[str(name)].heads:
                kept *= Fraction(len(plan[str(name)].rows), groups.everything[str(name)].channels)
        left += kept
    if left.denominator == 1:
        module.num_groups = int(left)


def disagreements(model: nn.Module) -> list[str]:
    """Layers whose declared widths and real tensor shapes differ; empty for a sound network."""
    bad = []
    for name, module in model.named_modules():
        m: Any = module
        kind = kind_of(m)
        if kind is None:
            continue
        if kind in ("depthwise", *MAKING):
            count = getattr(m, "groups", 1)
            declared = (axis_length(m, "out"), axis_length(m, "in") // count)
            ok = tuple(outputs_first(m, m.weight).shape[:2]) == declared and (
                m.bias is None or len(m.bias) == declared[0]
            )
        else:
            ok = all(
                getattr(m, t).shape[0] == axis_length(m, "out") for t, _ in tensors_on(m, "out")
            )
        if not ok:
            bad.append(
                f"{name}: declares {m.extra_repr()}, holds"
                f" {[list(p.shape) for p in m.parameters(recurse=False)]}"
            )
    return bad
