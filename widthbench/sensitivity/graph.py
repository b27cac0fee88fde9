"""Networks as graphs of operations (torch.fx): tracing, and running with every value kept."""

from __future__ import annotations

import operator
from typing import Any

import torch
from timm.layers import get_notrace_functions
from torch import Tensor, fx, nn
from torch.nn import functional as F

from widthbench.errors import UsageError

SMOOTH = (
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.Softsign,
    nn.LogSigmoid,
)
SMOOTH_FUNCTIONS = (
    torch.sigmoid,
    torch.tanh,
    F.sigmoid,
    F.tanh,
    F.softplus,
    F.gelu,
    F.silu,
    F.mish,
    F.elu,
    F.selu,
    F.celu,
    F.softsign,
)
RELU = (F.relu, torch.relu, torch.relu_)


class Run(fx.Interpreter):
    """Runs a graph and keeps every value: what it would overwrite is computed anew."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The function, not in place."""
        plain = {
            operator.iadd: operator.add,
            operator.imul: operator.mul,
            torch.relu_: torch.relu,
        }.get(target, target)
        if plain in RELU or plain in SMOOTH_FUNCTIONS:  # inplace=True, by name or by place
            args, kwargs = (
                tuple(a is not True and a for a in args),
                {k: v for k, v in kwargs.items() if k != "inplace"},
            )
        return super().call_function(plain, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The method, not in place."""
        return super().call_method(
            {"add_": "add", "mul_": "mul", "relu_": "relu"}.get(target, target), args, kwargs
        )


def trace(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """The graph of a network in eval mode.

    Args:
        model: The network.
        x: ``[1, ...]``, an input on which the graph is compared with the network.

    Raises:
        UsageError: If it cannot be traced, or the graph gives something else.
    """
    try:
        graph = fx.GraphModule(
            model, fx.Tracer(autowrap_functions=tuple(get_notrace_functions())).trace(model)
        )
    except Exception as error:  # tracing runs the network's own forward: anything may go wrong
        raise UsageError(f"the network cannot be traced ({error})") from error
    with torch.no_grad():
        traced, real = Run(graph).run(x), model(x)
    if not torch.allclose(traced, real, rtol=1e-4, atol=1e-5 * float(real.abs().max())):
        raise UsageError("what the network overwrites (its traced graph gives something else)")
    return graph


def free(value: Tensor) -> Tensor:
    """A tensor to differentiate by that is no leaf, since torch's counter of operations refuses
    those as inputs of layers.
    """
    return value.detach().requires_grad_().view_as(value)
