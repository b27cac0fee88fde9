"""The diagonal of second derivatives by the classical back-propagation that drops every
off-diagonal term.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from widthbench.errors import UsageError
from widthbench.sensitivity.ablation import (
    Sample,
    channel_positions,
    cross_entropy,
    footprint,
    replica,
)
from widthbench.sensitivity.derivatives import KINKED
from widthbench.sensitivity.graph import RELU, SMOOTH, SMOOTH_FUNCTIONS, Run, free, trace
from widthbench.training.measuring import MIB
from widthbench.width.cost import count_macs
from widthbench.width.gates import along_axis, gated
from widthbench.width.groups import Groups
from widthbench.width.layers import kind_of

# outputs that are inputs at other places, or sums of inputs: coefficients of 0 and 1, which are
# their own squares
SELECTING = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Flatten,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.ZeroPad2d,
    nn.AdaptiveMaxPool2d,
    nn.PixelShuffle,
    nn.ChannelShuffle,
    nn.Unflatten,
)
SELECTING_FUNCTIONS = (
    operator.add,
    operator.iadd,
    torch.add,
    operator.getitem,
    torch.flatten,
    torch.cat,
    torch.reshape,
    torch.permute,
    torch.transpose,
    F.dropout,
    F.pad,
    F.max_pool2d,
    F.adaptive_max_pool2d,
    getattr,
)
JOINING = (
    operator.add,
    operator.iadd,
    torch.add,
    operator.mul,
    operator.imul,
    torch.mul,
    "add",
    "add_",
    "mul",
    "mul_",
)
SELECTING_METHODS = (
    "add",
    "add_",
    "flatten",
    "view",
    "reshape",
    "permute",
    "transpose",
    "contiguous",
    "squeeze",
    "unsqueeze",
    "sum",
    "size",
)
AVERAGING = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
AVERAGING_FUNCTIONS = (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean)


class BackpropDiagonal:
    """``∂²E/∂g²`` of input gates by back-propagating a diagonal, in one backward sweep for all
    gates.

    For ``a = W y + b`` and ``y = σ(a)``, with every off-diagonal second derivative dropped (LeCun,
    Denker and Solla, "Optimal Brain Damage", NeurIPS 1989, equations 4 to 7):

        ∂²E/∂y_i² ≈ Σ_j W_ji² ∂²E/∂a_j²,    ∂²E/∂a_j² ≈ σ'(a_j)² ∂²E/∂y_j² + σ''(a_j) ∂E/∂y_j,

    begun with the exact diagonal at the logits (``p(1 - p)`` for cross-entropy). A gate on ``y_i``
    gets ``y_i² ∂²E/∂y_i²``, summed over the positions that it is read at. Batch norm (in eval mode)
    counts its factor squared, pooling and additions their coefficients squared.

    Args:
        model: In eval mode; it is left alone.
        groups: Its channel groups: the gates.
        sample: What the loss is averaged over; on the model's device.
        softplus_beta: Where given, the second derivative of ReLU is that of softplus, ``β s(βa) (1
            - s(βa))`` with the logistic function s; values and first derivatives stay ReLU's.
        memory_mib: Limit on the activations of a batch, in MiB.

    Attributes:
        forward_macs: Multiply-accumulates done so far in plain forward passes.
        backward_macs: In everything else.

    Raises:
        UsageError: If a layer behind a gate has no second derivative, or no rule here; it names the
            layer and the remedy.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        sample: Sample,
        *,
        softplus_beta: float | None = None,
        memory_mib: float = 256.0,
    ) -> None:
        self.model, self.groups, self.sample, self.beta = (
            replica(model).eval(),
            groups,
            sample,
            softplus_beta,
        )
        self.forward_macs = self.backward_macs = 0
        try:
            self._graph = trace(self.model, sample.x[:1])
        except UsageError as error:
            raise UsageError(_NO_RULE.format(error)) from error
        self._consumers = {
            layer: axis
            for (layer, side), axis in groups.axes.items()
            if side == "in"
            and any(n in groups for s in axis for n in (s.group, s.outer) if n is not None)
        }
        for name, group in groups.items():
            if group.keys:
                raise UsageError(
                    _NO_RULE.format(f"the product with keys that channel group '{name}' goes into")
                )
        self._behind = self._nodes_behind()
        for node in self._behind:
            self._rule(node)
        each = 6 * sum(size for _, size in footprint(self.model, sample.x))
        self.batch_size = int(max(1, min(1024, memory_mib * MIB // each)))
        self._whole = count_macs(self.model, sample.x[:1])

    def second(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``∂²E/∂g²`` of every gate, by the recursion above.

        Args:
            gates: ``[N]`` per group.

        Returns:
            float64 ``[N]`` on the CPU per group.
        """
        total = {n: torch.zeros(g.channels, dtype=torch.float64) for n, g in self.groups.items()}
        with gated(self.model, self.groups, gates):
            with FlopCounterMode(display=False) as counter:  # of one sample
                self._sweep(
                    self.sample.x[:1],
                    self.sample.y[:1],
                    gates,
                    {n: t.clone() for n, t in total.items()},
                )
            for x, y in self.sample.batches(self.batch_size):
                self._sweep(x, y, gates, total)
        self.forward_macs += self._whole * len(self.sample)
        self.backward_macs += (int(counter.get_total_flops()) // 2 - self._whole) * len(self.sample)
        return {n: t / len(self.sample) for n, t in total.items()}

    def _sweep(
        self, x: Tensor, y: Tensor, gates: Mapping[str, Tensor], total: dict[str, Tensor]
    ) -> None:
        run = Run(self._graph)
        logits = run.run(free(x))
        values = run.env
        bends = [n for n in self._behind if self._rule(n) in (_bend, _kink)]
        loss = self.sample.criterion(logits, y).sum()
        slopes = (
            dict(zip(bends, torch.autograd.grad(loss, [values[n] for n in bends]), strict=True))
            if bends
            else {}
        )
        output = next(n for n in self._graph.graph.nodes if n.op == "output")
        curvature: dict[fx.Node, Tensor] = {
            output.args[0]: _at_the_logits(self.sample.criterion, logits.detach(), y)
        }
        for node in reversed(self._graph.graph.nodes):
            if node not in self._behind or node not in curvature:
                continue
            h = curvature.pop(node)
            if node.op == "call_module" and node.target in self._consumers:
                before = self._through_consumer(node, values, h, gates, total)
            else:
                before = self._rule(node)(self, node, values, h, slopes.get(node))
            for source, part in before.items():
                if source in self._behind:
                    curvature[source] = curvature[source] + part if source in curvature else part

    def _through_consumer(
        self,
        node: fx.Node,
        values: Mapping[fx.Node, Any],
        h: Tensor,
        gates: Mapping[str, Tensor],
        total: dict[str, Tensor],
    ) -> dict[fx.Node, Tensor]:
        """As ``_through_weights``, and what the gates in front of the layer get."""
        (source,) = node.all_input_nodes
        layer = str(node.target)
        ((_, before),) = _through_weights(self, node, values, h, None).items()
        axis, x = self._consumers[layer], values[source].detach()
        channels = x.dim() - 1 if kind_of(self.model.get_submodule(layer)) == "linear" else 1
        at_gate = (
            (x.square() * before)
            .sum(dim=[d for d in range(x.dim()) if d != channels], dtype=torch.float64)
            .cpu()
        )
        for name in {n for s in axis for n in (s.group, s.outer) if n in total}:
            total[str(name)] += at_gate[channel_positions(self.groups, str(name), layer)].sum(dim=1)
        gate = along_axis(axis, gates, x)
        return {
            source: (
                before * gate.square().reshape([-1 if d == channels else 1 for d in range(x.dim())])
            )
        }

    def _nodes_behind(self) -> dict[fx.Node, None]:
        """The consumers and everything between them and the output, in order."""
        nodes = self._graph.graph.nodes
        wanted: set[fx.Node] = set()
        for node in reversed(nodes):  # asserts and the like lead nowhere
            if node.op == "output" or node in wanted:
                wanted.update(node.all_input_nodes)
        behind: dict[fx.Node, None] = {}
        for node in nodes:
            gate = node.op == "call_module" and node.target in self._consumers
            if node in wanted and (gate or any(n in behind for n in node.all_input_nodes)):
                behind[node] = None
        return behind

    def _rule(self, node: fx.Node) -> Callable[..., dict[fx.Node, Tensor]]:
        """How a node takes second derivatives backwards."""
        target: Any = node.target
        if target in JOINING and (len(node.all_input_nodes) < _tensors_in(node) or node.kwargs):
            raise UsageError(
                _NO_RULE.format(
                    f"operation '{node.name}', which takes one value twice or scales one"
                )
            )
        if node.op == "call_module":
            module: Any = self.model.get_submodule(target)
            what = f"layer '{target}' ({type(module).__name__})"
            kinds: tuple[tuple[Sequence[Any], Callable[..., Any]], ...] = (
                ((nn.ReLU,), _kink),
                (SMOOTH, _bend),
                (SELECTING, _select),
                (AVERAGING, _average),
                ((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), _through_weights),
                ((nn.BatchNorm1d, nn.BatchNorm2d), _select_scaled),
            )
            rule = next((r for types, r in kinds if type(module) in types), None)
            if rule is None and isinstance(module, KINKED):
                raise UsageError(
                    f"{what} has no second derivative; take diagonal='exact', which holds almost"
                    " everywhere"
                )
        elif node.op == "call_function":
            what = f"operation '{getattr(target, '__name__', target)}' ({node.name})"
            if target in (operator.mul, operator.imul, torch.mul):
                return _product
            kinds = (
                (RELU, _kink),
                (SMOOTH_FUNCTIONS, _bend),
                (SELECTING_FUNCTIONS, _select),
                (AVERAGING_FUNCTIONS, _average),
                ((F.batch_norm,), _select_scaled),
            )
            rule = next((r for functions, r in kinds if target in functions), None)
        else:
            what = f"operation '{target}' ({node.name})"
            names = (
                (("relu", "relu_"), _kink),
                (("sigmoid", "tanh"), _bend),
                (SELECTING_METHODS, _select),
                (("mean",), _average),
                (("mul", "mul_"), _product),
            )
            rule = next((r for known, r in names if target in known), None)
        if rule is None:
            raise UsageError(_NO_RULE.format(what))
        if rule is _kink and self.beta is None:
            raise UsageError(
                f"{what} has no second derivative: pass softplus_beta= to take that of softplus in"
                " its place, or diagonal='exact', which holds almost everywhere"
            )
        return rule


_NO_RULE = "the back-propagated diagonal has no rule for {}: take diagonal='exact'"


def _at_the_logits(criterion: Any, logits: Tensor, y: Tensor) -> Tensor:
    """The diagonal of the loss's second derivatives, ``[B, K]``."""
    if criterion is cross_entropy:
        p = logits.softmax(dim=1)
        return p * (1 - p)
    gradient = torch.func.grad(lambda z: criterion(z, y).sum())
    one = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    along = [
        torch.func.jvp(gradient, (logits,), (e.expand_as(logits),))[1][:, k]
        for k, e in enumerate(one)
    ]
    return torch.stack(along, dim=1)


def _tensors_in(node: fx.Node) -> int:
    """How many of a node's arguments are other nodes, counted as often as they stand there."""
    nodes: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), nodes.append)
    return len(nodes)


def _again(
    run: BackpropDiagonal,
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    inputs: Mapping[fx.Node, Tensor],
) -> Any:
    """The node's output for other inputs."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: inputs.get(n, values.get(n)))
    return getattr(Run(run._graph), node.op)(node.target, args, kwargs)


def _select(
    run: BackpropDiagonal, node: fx.Node, values: Mapping[fx.Node, Any], h: Any, slope: None
) -> dict[fx.Node, Any]:
    """A linear map with coefficients of 0 and 1: its own transpose."""
    sources = {n: free(values[n]) for n in node.all_input_nodes if isinstance(values[n], Tensor)}
    output = _again(run, node, values, sources)
    return dict(
        zip(
            sources,
            torch.autograd.grad(output, list(sources.values()), h, allow_unused=True),
            strict=True,
        )
    )


def _average(
    run: BackpropDiagonal, node: fx.Node, values: Mapping[fx.Node, Any], h: Tensor, slope: None
) -> dict[fx.Node, Tensor]:
    """Means over equal windows of k inputs: coefficients of 1/k, squared."""
    (source,) = node.all_input_nodes
    x = free(values[source])
    (ones,) = torch.autograd.grad(_again(run, node, values, {source: x}).sum(), x)
    probe = torch.randn(
        h.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(h)
    ((_, spread),) = _select(run, node, values, probe, None).items()
    # where each input is in one window, its share of a window's value tells that value
    if not torch.allclose(
        _again(run, node, values, {source: spread / ones}), probe, rtol=1e-3, atol=1e-3
    ):
        raise UsageError(
            _NO_RULE.format(f"pooling whose windows overlap or leave something out ({node.name})")
        )
    ((_, before),) = _select(run, node, values, h, None).items()
    return {source: before * ones}


def _through_weights(
    run: BackpropDiagonal, node: fx.Node, values: Mapping[fx.Node, Any], h: Tensor, slope: None
) -> dict[fx.Node, Tensor]:
    """``Σ_j W_ji² h_j``."""
    (source,) = node.all_input_nodes
    module: Any = run.model.get_submodule(str(node.target))
    squared = module.weight.detach().square()
    if isinstance(module, nn.Linear):
        return {source: h @ squared}
    x = free(values[source])
    (before,) = torch.autograd.grad(module._conv_forward(x, squared, None), x, h)
    return {source: before}


def _select_scaled(
    run: BackpropDiagonal, node: fx.Node, values: Mapping[fx.Node, Any], h: Tensor, slope: None
) -> dict[fx.Node, Tensor]:
    """Batch norm in eval mode: its factor squared, by passing through it twice."""
    source = node.all_input_nodes[0]
    x = free(values[source])
    for _ in range(2):
        (h,) = torch.autograd.grad(_again(run, node, values, {source: x}), x, h)
    return {source: h}


def _product(
    run: BackpropDiagonal, node: fx.Node, values: Mapping[fx.Node, Any], h: Tensor, slope: None
) -> dict[fx.Node, Tensor]:
    """``a b``: the other factor squared."""
    before = {}
    for source in node.all_input_nodes:
        x = free(values[source])
        factors = [values[n].detach() for n in node.all_input_nodes if n is not source]
        if not factors:  # the other is a plain number
            (factor,) = torch.autograd.grad(_again(run, node, values, {source: x}).sum(), x)
            factors = [factor]
        (before[source],) = torch.autograd.grad(x * factors[0].square(), x, h)
    return before


def _bend(
    run: BackpropDiagonal, node: fx.Node, values: Mapping[fx.Node, Any], h: Tensor, slope: Tensor
) -> dict[fx.Node, Tensor]:
    """``σ'² h + σ'' ∂E/∂y`` of an elementwise activation."""
    (source,) = node.all_input_nodes
    a = free(values[source])
    (first,) = torch.autograd.grad(
        _again(run, node, values, {source: a}).sum(), a, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), a)
    return {source: first.detach().square() * h + second * slope}


def _kink(
    run: BackpropDiagonal, node: fx.Node, values: Mapping[fx.Node, Any], h: Tensor, slope: Tensor
) -> dict[fx.Node, Tensor]:
    """ReLU, with softplus's second derivative."""
    (source,) = node.all_input_nodes
    assert run.beta is not None  # checked with the rule
    a = values[source].detach()
    s = torch.sigmoid(run.beta * a)
    return {source: (a > 0) * h + run.beta * s * (1 - s) * slope}
