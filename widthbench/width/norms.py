"""What norms and scales do to the channels of a group in eval mode: an affine map for each
channel.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from widthbench.errors import UsageError
from widthbench.width.groups import Groups, channel_rows
from widthbench.width.inputs import Example, Inputs
from widthbench.width.layers import kind_of, outputs_first


@dataclass(frozen=True)
class Norm:
    """``y = gamma · (x - mean) / sqrt(var + eps) + beta``, each ``[N]`` in float64.

    Attributes:
        gamma: Weight; ones where there is none.
        beta: Bias; zeros where there is none.
        mean: Running mean.
        var: Running variance.
        eps: What is added to it.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def sigma(self) -> Tensor:
        """``sqrt(var + eps)``, ``[N]``."""
        return (self.var + self.eps).sqrt()


def norm_of(model: nn.Module, groups: Groups, name: str, layer: str) -> Norm:
    """A BatchNorm's map on the channels of a group.

    Args:
        model: The network that the groups were found in.
        groups: Its groups.
        name: The group.
        layer: A BatchNorm among its riders. The bias of the layer right before it is taken off the
            mean, so that the map is one of that layer's output without its bias.

    Raises:
        UsageError: If the layer keeps no running statistics: it normalises by its inputs, which no
            weights tell.
    """
    module: Any = model.get_submodule(layer)
    if module.running_var is None:
        kind = type(module).__name__
        raise UsageError(
            f"layer {layer} ({kind}) keeps no running statistics: what it does is not in its"
            " weights"
        )
    mean = _entries(groups, name, layer, module.running_mean)
    gamma, beta = weight_and_bias(model, groups, name, layer)
    before = next(iter(groups.behind.get(layer, ())), None)
    if before is not None and norm_behind(groups, before) == layer:
        mean = mean - bias_of(model, groups, name, before)
    return Norm(gamma, beta, mean, _entries(groups, name, layer, module.running_var), module.eps)


def norm_behind(groups: Groups, layer: str) -> str | None:
    """The BatchNorm that reads a layer's output right behind it and is alone to read it; None if
    there is none.
    """
    readers = groups.readers.get(layer, ())
    return readers[0] if len(readers) == 1 and readers[0] in groups.adjacent else None


def filter_rows(
    model: nn.Module,
    groups: Groups,
    name: str,
    layer: str,
    *,
    fold: bool = False,
    bias: bool = True,
) -> Tensor:
    """A layer's weights by channel, with its bias as one more weight where no BatchNorm comes right
    behind it.

    Args:
        model: The network that the groups were found in.
        groups: Its groups.
        name: The group.
        layer: A producer, or a depthwise convolution among the riders.
        fold: Fold the BatchNorm right behind the layer into it: weights ``γ/σ · w``, bias ``β + γ/σ
            · (b - μ)``.
        bias: False leaves an unfolded bias out.

    Returns:
        ``[N, D]`` in float64, the bias last.
    """
    module: Any = model.get_submodule(layer)
    rows = channel_rows(groups, name, layer, outputs_first(module, module.weight)).double()
    behind = norm_behind(groups, layer)
    if behind is None:
        if module.bias is None or not bias:
            return rows
        return torch.cat([rows, channel_rows(groups, name, layer, module.bias).double()], dim=1)
    if not fold:
        return rows
    norm = norm_of(model, groups, name, behind)
    factor = norm.gamma / norm.sigma
    return torch.cat([factor[:, None] * rows, (norm.beta - factor * norm.mean)[:, None]], dim=1)


PLACES = (11, 13)  # of a probing input; a few numbers that are no likely width


def affine_of(
    model: nn.Module, groups: Groups, name: str, tensor: str
) -> tuple[Tensor, Tensor] | str:
    """What a bare tensor that rides along a group does to its channels: a frozen norm, a
    layer-scale, any module that is an affine.

    The module that holds the tensor is run by itself on probes, so that it does not matter how it
    computes what it does.

    Args:
        model: The network that the groups were found in.
        groups: Its groups.
        name: The group.
        tensor: One of its ``tensors``.

    Returns:
        ``a [N]`` and ``b [N]`` in float64 with ``y = a x + b`` for each channel; or why the tensor
        is no such affine.
    """
    owner = tensor.rpartition(".")[0]
    module, channels = model.get_submodule(owner), groups[name].channels
    if not owner or any(kind_of(m) for m in module.modules()):
        return f"tensor '{tensor}' rides along, and no module of its own says what it does"
    own = next(t for n, t in (*model.named_parameters(), *model.named_buffers()) if n == tensor)
    places = [n if n != channels else n + 4 for n in PLACES]
    for shape, dim in (
        ((1, channels, *places), 1),
        ((1, *places, channels), 3),
        ((1, places[0], channels), 2),
        ((1, channels), 1),
    ):
        probe = torch.zeros(shape, dtype=own.dtype, device=own.device)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(probe)
        try:
            with torch.no_grad():
                low, high, some = (module(p) for p in (probe, probe + 1, drawn))
        except Exception:  # an input of another form: the next
            continue
        if not (isinstance(low, Tensor) and low.shape == shape):
            continue
        low, high, some = (_flat(t, dim) for t in (low, high, some))
        b, a = low[:, :1], (high - low)[:, :1]
        if all(
            torch.allclose(t, a * x + b, rtol=1e-4, atol=1e-5)
            for t, x in ((low, 0.0), (high, 1.0), (some, _flat(drawn, dim)))
        ):
            return a[:, 0], b[:, 0]
    return (
        f"tensor '{tensor}' rides along, and {type(module).__name__} {owner} is no affine of its"
        " channels"
    )


def _flat(t: Tensor, dim: int) -> Tensor:
    return t.double().movedim(dim, 0).flatten(1)


def affines_of(
    model: nn.Module, groups: Groups, name: str
) -> dict[str, tuple[Tensor, Tensor]] | str:
    """The affines of all bare tensors that ride along a group, by the module that holds them; or
    why there is none for one.
    """
    affines: dict[str, tuple[Tensor, Tensor]] = {}
    group = groups[name]
    for tensor in group.tensors:
        owner = tensor.rpartition(".")[0]
        if not group.inner or len(groups.sources(name)) > 1:
            return (
                f"tensor '{tensor}' rides along with {len(group.producers)} layers, and may not be"
                " behind all of them"
            )
        if owner not in affines:
            affine = affine_of(model, groups, name, tensor)
            if isinstance(affine, str):
                return affine
            affines[owner] = affine
    return affines


def passed_by(
    model: nn.Module, groups: Groups, name: str, owner: str, example_input: Example
) -> str | None:
    """Why a module does not scale a group's channels once on every way to its consumers; None if it
    does.

    Args:
        model: The network that the groups were found in.
        groups: Its groups.
        name: The group.
        owner: The module.
        example_input: What the network takes.
    """
    seen: list[dict[str, Tensor]] = []
    runs: list[None] = []
    places = dict(groups.places(name, "in"))
    for changed in (False, True):
        inputs: dict[str, Tensor] = {}
        with ExitStack() as stack:
            if changed:
                hook = model.get_submodule(owner).register_forward_hook(partial(_changed, runs))
                stack.callback(hook.remove)
            for layer, positions in places.items():
                module = model.get_submodule(layer)
                at = -1 if kind_of(module) == "linear" else 1

                keep = partial(_noted, inputs, layer, at, positions)
                stack.callback(module.register_forward_pre_hook(keep).remove)
            with torch.no_grad():
                Inputs.of(example_input).run(model)
        seen.append(inputs)
    if len(runs) != 1:
        return f"module {owner}, which scales it, runs {len(runs)} times"
    around = next(
        (
            layer
            for layer in places
            if layer in seen[0] and torch.equal(seen[0][layer], seen[1][layer])
        ),
        None,
    )
    return (
        None
        if around is None
        else f"layer {around} reads it around module {owner}, which scales it for others"
    )


def _changed(runs: list[None], module: nn.Module, args: Any, output: Tensor) -> Tensor:
    runs.append(None)
    return output.flip(0) + 1


def _noted(
    into: dict[str, Tensor],
    layer: str,
    dim: int,
    positions: list[int],
    module: nn.Module,
    args: Any,
) -> None:
    into[layer] = args[0].detach().index_select(dim, torch.tensor(positions, device=args[0].device))


def weight_and_bias(
    model: nn.Module, groups: Groups, name: str, layer: str
) -> tuple[Tensor, Tensor]:
    """A norm's weight and bias by channel, ``[N]`` each in float64; ones and zeros where it has
    none.
    """
    module: Any = model.get_submodule(layer)
    ones = torch.ones(
        groups[name].channels, dtype=torch.float64, device=next(model.parameters()).device
    )
    weight, bias = (
        None if t is None else _entries(groups, name, layer, t)
        for t in (module.weight, module.bias)
    )
    return ones if weight is None else weight, torch.zeros_like(ones) if bias is None else bias


def bias_of(model: nn.Module, groups: Groups, name: str, layer: str) -> Tensor:
    """A layer's bias by channel, ``[N]`` in float64; zeros where it has none."""
    module: Any = model.get_submodule(layer)
    if module.bias is None:
        return module.weight.new_zeros(groups[name].channels, dtype=torch.float64)
    return _entries(groups, name, layer, module.bias)


def _entries(groups: Groups, name: str, layer: str, tensor: Tensor) -> Tensor:
    """A layer's vector by channel, ``[N]`` in float64; the mean where a flatten gives a channel
    several entries.
    """
    rows = channel_rows(groups, name, layer, tensor).double()
    return rows[:, 0] if rows.shape[1] == 1 else rows.mean(dim=1)
