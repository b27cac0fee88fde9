"""Multiply-accumulates (MACs) of a forward pass, by torch's own counter, which is told of what it
does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torchvision  # noqa: F401  (its operations)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from widthbench.errors import UsageError
from widthbench.width.inputs import Example, Inputs

OURS = {
    "aten",
    "prim",
    "prims",
}  # namespaces whose operations torch's counter knows, or has nothing to count in


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _packed(x: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(x[:-1]) * sum(prod(w) for w in weights if len(w) == 2)


def _of_output(place: int, terms: slice) -> Any:
    """A formula: as many multiply-adds for each entry of the output as an argument's dimensions
    say.
    """

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(2 * prod(out_shape) * prod(args[place][terms]))

    return count


def _trilinear(
    a: Any, weight: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """``nn.Bilinear``: ``[B, 1, I, 1]``, ``[1, O, I, J]``, ``[B, 1, 1, J]``."""
    return int(2 * a[0] * prod(weight))


_OPERATIONS = torch.ops.aten
FORMULAS: dict[Any, Any] = {
    _OPERATIONS._scaled_dot_product_flash_attention_for_cpu: _attention,
    _OPERATIONS._scaled_dot_product_attention_math: _attention,
    _OPERATIONS.mkldnn_rnn_layer: lambda x, w, u, *a, out_shape=None, **k: (
        2 * prod(x[:-1]) * (prod(w) + prod(u))
    ),
    _OPERATIONS._cudnn_rnn: _packed,
    _OPERATIONS.miopen_rnn: _packed,
    _OPERATIONS.mv: _of_output(0, slice(1, 2)),
    _OPERATIONS.addmv: _of_output(1, slice(1, 2)),
    _OPERATIONS.dot: _of_output(0, slice(0, 1)),
    _OPERATIONS.vdot: _of_output(0, slice(0, 1)),
    _OPERATIONS._addmm_activation: _of_output(1, slice(1, 2)),
    _OPERATIONS._int_mm: _of_output(0, slice(1, 2)),
    _OPERATIONS._trilinear: _trilinear,
    torch.ops.torchvision.deform_conv2d: _of_output(1, slice(1, None)),
}


@contextmanager
def counting(model: nn.Module) -> Iterator[None]:
    """Without gradients, and without torch's fused inference paths, which do in one operation what
    layers are made of.

    Args:
        model: Its parameters ask for no gradient meanwhile: torch's counter stumbles over those
            that do and get none.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    learning = [p for p in model.parameters() if p.requires_grad]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for p in learning:
            p.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for p in learning:
            p.requires_grad_(True)


def counter_of_operations() -> FlopCounterMode:
    """The counter of torch (2 per multiply-add), with formulas for what it counts nothing in."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


class _Foreign(TorchDispatchMode):
    """Names operations of other packages that take weights, and that nobody knows the cost of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = func.namespace in OURS or func.overloadpacket in FORMULAS
        if not known and any(
            isinstance(a, nn.Parameter) and a.dim() > 1 for a in tree_leaves((args, kwargs))
        ):
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def macs_by_module(model: nn.Module, example_input: Example) -> dict[str, int]:
    """MACs of one forward pass of a batch in eval mode, of each module with all that is inside it.

    Convolutions, matrix products, attention and recurrent layers count; elementwise work, norms and
    pooling do not, as is usual.

    Args:
        model: The network, in any mode; it is left as it was.
        example_input: ``[B, ...]``, or whatever the network takes (``Inputs``).

    Returns:
        By the module's name, "" for the whole; modules without any are left out.

    Raises:
        UsageError: If an operation of another package takes weights: what it costs is not known.
    """
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with counting(model), _Foreign() as foreign, counter_of_operations() as counter:
            Inputs.of(example_input).run(model)
    finally:
        for m, mode in training.items():
            m.training = mode
    if foreign.names:
        names = ", ".join(sorted(foreign.names))
        raise UsageError(
            f"MACs of {type(model).__name__} cannot be counted: {names} takes weights, and has no"
            " formula"
        )
    by_module = {
        name.partition(".")[2]: sum(c.values()) // 2
        for name, c in counter.get_flop_counts().items()
        if name != "Global"
    }
    return by_module | {"": int(counter.get_total_flops()) // 2}


def count_macs(model: nn.Module, example_input: Example) -> int:
    """MACs of one forward pass per sample, by ``torch.utils.flop_counter`` (which counts 2 per
    multiply-add), halved.

    Args:
        model: The network, in any mode; it is left as it was.
        example_input: ``[B, ...]``, or whatever the network takes (``Inputs``).

    Raises:
        UsageError: As ``macs_by_module``.
    """
    return macs_by_module(model, example_input)[""] // len(Inputs.of(example_input))
