"""Splitting matrices of neurons: which way to split each of them, and what that does to the loss,
without forming the matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from widthbench.sensitivity.ablation import Sample, footprint, replica
from widthbench.sensitivity.graph import RELU, SMOOTH, SMOOTH_FUNCTIONS, Run, free, trace
from widthbench.training.measuring import MIB
from widthbench.width.cost import count_macs
from widthbench.width.groups import Groups

PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode
Vectors = dict[str, Tensor]  # [N, d] per group
EVERY = 3  # Lanczos steps between two looks at what has converged
# of the tolerance: a small residual says that some eigenvalue is near, a smaller one, in practice,
# that it is the least
SAFETY = 0.3


@dataclass(frozen=True)
class Neurons:
    """Where the neurons of a group are in the graph.

    Attributes:
        layer: The linear layer or convolution whose rows they are.
        producer: Its node.
        activation: The node of the elementwise activation behind it, or behind its batch norm.
        kinks: Where the activation's slope jumps, and by how much, if it is piecewise linear; else
            None.
    """

    layer: str
    producer: fx.Node
    activation: fx.Node
    kinks: tuple[tuple[float, float], ...] | None


class SplittingMatrices:
    """``S_i = E[δ_i ∇²_θ σ(θ_i · x)]`` of all neurons, by products with vectors (Liu, Wu and Wang,
    NeurIPS 2019).

    For a neuron with parameters θ_i (incoming weights, and bias if it has one) and output ``a_i =
    σ(θ_i · x)``, δ_i is the loss's derivative by that output, and ``∇²σ = σ''(θ_i · x) x xᵀ``. A
    batch norm between (in eval mode) counts its factor squared, a convolution sums over positions.
    Splitting the neuron into ``θ_i ± ε v``, each copy with half of the outgoing weights, changes
    the loss by ``ε² vᵀ S_i v / 2 + O(ε³)``. What lies between the activation and the consumers (a
    depthwise convolution and its norm and activation) is taken as linear.

    ``S_i v_i`` of all neurons of a layer together takes two matrix products: ``u = x Vᵀ``, then
    ``(δ σ'' u)ᵀ x``. Inputs x and factors δ σ'' of all samples are kept.

    Args:
        model: In eval mode; it is left alone.
        groups: Its channel groups.
        sample: What the loss is averaged over; on the model's device.
        only: Names of the groups that are wanted; all if None.
        softplus_beta: σ'' of ReLU, which has none, is that of softplus, ``β s(βz) (1 - s(βz))``
            with the logistic function s.
        memory_mib: Limit on the activations of a batch of the one forward and backward pass, in
            MiB.

    Attributes:
        neurons: By group, where they are.
        left_out: By group, why it has no splitting matrices here.
        loss: The sample's mean loss.
        forward_macs: Multiply-accumulates done so far in plain forward passes.
        backward_macs: In everything else.

    Raises:
        UsageError: If the network cannot be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        sample: Sample,
        *,
        only: Collection[str] | None = None,
        softplus_beta: float = 3.0,
        memory_mib: float = 256.0,
    ) -> None:
        self.model, self.groups, self.sample, self.beta = (
            replica(model).eval(),
            groups,
            sample,
            softplus_beta,
        )
        self.forward_macs = self.backward_macs = 0
        self.loss = 0.0
        graph = trace(self.model, sample.x[:1])
        neurons, self.left_out = _found(graph, self.model, groups)
        self.neurons = {n: f for n, f in neurons.items() if only is None or n in only}
        self.inputs: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        if self.neurons:
            self._pass(graph, memory_mib)

    def _pass(self, graph: fx.GraphModule, memory_mib: float) -> None:
        """One forward and backward pass over the sample, that keeps each layer's inputs and ``δ
        σ''``.
        """
        each = 3 * sum(size for _, size in footprint(self.model, self.sample.x))
        xs: dict[str, list[Tensor]] = {n: [] for n in self.neurons}
        hs: dict[str, list[Tensor]] = {n: [] for n in self.neurons}
        with FlopCounterMode(display=False) as counter:  # of one sample
            self._kept(graph, self.sample.x[:1], self.sample.y[:1])
        self.loss = 0.0
        for x, y in self.sample.batches(int(max(1, min(1024, memory_mib * MIB // each)))):
            for name, (value, factor) in self._kept(graph, x, y).items():
                xs[name].append(value)
                hs[name].append(factor)
        self.inputs = {n: torch.cat(parts) for n, parts in xs.items()}
        self.factors = {n: torch.cat(parts).div_(len(self.sample)) for n, parts in hs.items()}
        whole = count_macs(self.model, self.sample.x[:1])
        self.forward_macs += whole * len(self.sample)
        self.backward_macs += max(0, int(counter.get_total_flops()) // 2 - whole) * len(self.sample)

    def _kept(
        self, graph: fx.GraphModule, x: Tensor, y: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs and ``δ σ''`` of each layer for a batch."""
        run = Run(graph)
        loss = self.sample.criterion(run.run(free(x)), y).sum()
        self.loss += float(loss.detach()) / len(self.sample)
        values = run.env
        at = [values[n.activation] for n in self.neurons.values()]
        kept = {}
        slopes = torch.autograd.grad(loss, at, retain_graph=True)
        for (name, neurons), slope in zip(self.neurons.items(), slopes, strict=True):
            (before,) = neurons.activation.all_input_nodes
            z, p = values[before], values[neurons.producer]
            factor = slope * self._second(neurons, z, values[neurons.activation])
            if before is not neurons.producer:
                (scale,) = torch.autograd.grad(
                    z.sum(), p, retain_graph=True
                )  # batch norm in eval mode: one number per channel
                factor = factor * scale.square()
            (read,) = neurons.producer.all_input_nodes
            kept[name] = values[read].detach(), factor.detach()
        return kept

    def _second(self, neurons: Neurons, z: Tensor, a: Tensor) -> Tensor:
        """``σ''(z)``."""
        if neurons.kinks is not None:
            total = torch.zeros_like(z)
            for place, jump in neurons.kinks:
                s = torch.sigmoid(self.beta * (z.detach() - place))
                total = total + jump * self.beta * s * (1 - s)
            return total
        (first,) = torch.autograd.grad(a.sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z, retain_graph=True)
        return second

    def parameters(self, name: str) -> Tensor:
        """θ of a group's neurons, ``[N, d]``."""
        return neuron_parameters(self.model.get_submodule(self.neurons[name].layer))

    def product(
        self, vectors: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None = None
    ) -> Vectors:
        """``S_i v_i`` for all neurons of all layers.

        Args:
            vectors: ``[N, d]`` per group.
            rows: Which neurons a group's vectors belong to, ``[N]``; all of them if absent.

        Returns:
            ``[N, d]`` per group.
        """
        products = {}
        for name, v in vectors.items():
            module: Any = self.model.get_submodule(self.neurons[name].layer)
            x, factor = self.inputs[name], self.factors[name]
            channels = factor.dim() - 1 if isinstance(module, nn.Linear) else 1
            if rows is not None and len(rows[name]) < factor.shape[channels]:
                factor = factor.index_select(channels, rows[name])
            products[name] = _product(module, x, factor, v)
            self.backward_macs += 2 * factor.numel() * v.shape[1]
        return products

    def exact(self, name: str) -> Tensor:
        """``S_i`` of a group's neurons, formed: float64 ``[N, d, d]``. For small d."""
        module: Any = self.model.get_submodule(self.neurons[name].layer)
        x, factor = self.inputs[name].double(), self.factors[name].double()
        if isinstance(module, nn.Linear):
            x, factor = x.flatten(0, -2), factor.flatten(0, -2)
        else:
            x = (
                F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
                .transpose(1, 2)
                .flatten(0, 1)
            )
            factor = factor.flatten(2).transpose(1, 2).flatten(0, 1)
        if module.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.backward_macs += factor.numel() * x.shape[1] ** 2
        return torch.stack([(x * factor[:, i, None]).T @ x for i in range(factor.shape[1])])

    def smallest(
        self, *, tolerance: float = 1e-3, steps: int = 64, seed: int = 0
    ) -> tuple[Vectors, Vectors]:
        """The least eigenvalue of every splitting matrix and its eigenvector, all together, by
        Lanczos' method.

        Each neuron has a Krylov space of its own, built by the plain recurrence; a neuron leaves
        the products once its eigenvalue is known to about ``tolerance`` times ‖S‖₂.

        Args:
            tolerance: Of the eigenvalues, relative to the matrix's largest one by magnitude.
            steps: Most products per neuron.
            seed: Of the vectors that it starts from.

        Returns:
            ``λ_min [N]`` in float64 and unit vectors ``[N, d]``, per group.
        """
        runs = {
            n: _Lanczos(self.parameters(n), tolerance, seed + i) for i, n in enumerate(self.neurons)
        }
        for _ in range(steps):
            open_ = {n: r for n, r in runs.items() if len(r.rows)}
            if not open_:
                break
            products = self.product(
                {n: r.last for n, r in open_.items()}, {n: r.rows for n, r in open_.items()}
            )
            ended = torch.stack([run.step(products[n]) for n, run in open_.items()])
            # all groups' at once: the host waits for the device once for each product
            for run, one_ended in zip(open_.values(), ended.tolist(), strict=True):
                run.go_on(one_ended)
        for run in runs.values():
            run.stop()
        return {n: r.values for n, r in runs.items()}, {n: r.vectors for n, r in runs.items()}

    def smallest_exactly(self, name: str) -> tuple[Tensor, Tensor]:
        """As ``smallest``, of one group, from the formed matrices in float64: ``[N]`` and ``[N,
        d]``.
        """
        formed = self.exact(name)
        pairs = torch.linalg.eigh(formed.cpu())  # a GPU takes large batches one after another
        return pairs.eigenvalues[:, 0].to(formed.device), pairs.eigenvectors[:, :, 0].to(
            formed.device
        )


def _product(module: Any, x: Tensor, factor: Tensor, v: Tensor) -> Tensor:
    """``S_i v_i`` of neurons of a layer: its inputs, ``δ σ''`` ``[..., N, ...]``, vectors ``[N,
    d]``.
    """
    size = module.weight[0].numel()
    if isinstance(module, nn.Linear):
        flat, h = x.flatten(0, -2), factor.flatten(0, -2)
        u = (
            flat @ v[:, :size].T
            if module.bias is None
            else torch.addmm(v[:, size], flat, v[:, :size].T)
        )
        h = h * u
        along = h.T @ flat
    else:
        weight = v[:, :size].reshape(-1, *module.weight.shape[1:]).requires_grad_()
        u = module._conv_forward(x, weight, None if module.bias is None else v[:, size])
        h = factor * u.detach()
        (along,) = torch.autograd.grad(u, weight, h)
        along, h = along.flatten(1), h.transpose(0, 1).flatten(1).T
    return along if module.bias is None else torch.cat([along, h.sum(dim=0)[:, None]], dim=1)


def neuron_parameters(layer: Any) -> Tensor:
    """θ of a layer's neurons, ``[N, d]``: incoming weights, then the bias if there is one."""
    rows: Tensor = layer.weight.detach().flatten(1)
    return rows if layer.bias is None else torch.cat([rows, layer.bias.detach()[:, None]], dim=1)


def splittable(
    model: nn.Module, groups: Groups, x: Tensor
) -> tuple[dict[str, Neurons], dict[str, str]]:
    """Where the neurons of each group are, and of the groups that have no splitting matrices, why.

    Args:
        model: In eval mode.
        groups: Its groups.
        x: ``[1, ...]``.

    Raises:
        UsageError: If the network cannot be traced.
    """
    twin = replica(model).eval()
    return _found(trace(twin, x), twin, groups)


def _found(
    graph: fx.GraphModule, model: nn.Module, groups: Groups
) -> tuple[dict[str, Neurons], dict[str, str]]:
    wanted = _wanted(graph)
    nodes = {str(n.target): n for n in graph.graph.nodes if n.op == "call_module" and n in wanted}
    neurons = {name: _neurons(model, groups, name, nodes, wanted) for name in groups}
    return (
        {n: f for n, f in neurons.items() if isinstance(f, Neurons)},
        {n: f for n, f in neurons.items() if isinstance(f, str)},
    )


def _wanted(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes that the output depends on: without asserts and the like."""
    wanted_nodes: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        if node.op == "output" or node in wanted_nodes:
            wanted_nodes.update(node.all_input_nodes)
    return wanted_nodes


def _neurons(
    model: nn.Module, groups: Groups, name: str, nodes: Mapping[str, fx.Node], wanted: set[fx.Node]
) -> Neurons | str:
    """The neurons of a group, or why their splitting matrices cannot be had."""
    group = groups[name]
    if len(group.producers) != 1:
        return f"{len(group.producers)} layers make its channels"
    (layer,) = group.producers
    module: Any = model.get_submodule(layer)
    if type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d) or getattr(module, "groups", 1) > 1:
        return f"'{layer}' is no linear layer or ordinary convolution"
    if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(
        getattr(module, "padding", 0), str
    ):
        return f"'{layer}' pads in a way that has no rule here"
    if group.blocks > 1:
        return f"its channels come in {group.blocks} blocks, which keep equal counts"
    if layer not in nodes:
        return f"'{layer}' is not in the network's graph"
    node = nodes[layer]
    while True:
        users = [u for u in node.users if u in wanted]
        if len(users) != 1:
            return f"{len(users)} operations read '{node.name}' where an activation was expected"
        (node,) = users
        target: Any = (
            model.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        )
        if isinstance(target, (nn.BatchNorm1d, nn.BatchNorm2d, *PASSING)) or target is F.batch_norm:
            continue
        if isinstance(target, nn.Module):
            kind: Any = type(target)
            kinks = _kinks(target)
            smooth = kind in SMOOTH
        else:
            kinks = ((0.0, 1.0),) if target in RELU or target in ("relu", "relu_") else None
            smooth = target in SMOOTH_FUNCTIONS or target in ("sigmoid", "tanh")
        if kinks is None and not smooth:
            return (
                f"no elementwise activation with a rule here follows '{layer}', but '{node.name}'"
            )
        return Neurons(layer, nodes[layer], node, kinks)


def _kinks(activation: nn.Module) -> tuple[tuple[float, float], ...] | None:
    match activation:
        case nn.ReLU6():
            return (0.0, 1.0), (6.0, -1.0)
        case nn.ReLU():
            return ((0.0, 1.0),)
        case nn.LeakyReLU():
            return ((0.0, 1.0 - activation.negative_slope),)
    return None


class _Lanczos:
    """Lanczos' method for many symmetric matrices of one size at once, by the plain recurrence.

    Its vectors lose their orthogonality once an eigenvalue has converged; that repeats eigenvalues
    that are there, makes up none (Paige 1972), and here the least one ends the run. Orthogonalising
    anew would cost more than the products.

    Attributes:
        rows: The matrices that are not done, long ``[A]``.
        values: Least eigenvalues so far, float64 ``[N]``.
        vectors: Their unit eigenvectors so far, ``[N, d]``.
    """

    def __init__(self, like: Tensor, tolerance: float, seed: int) -> None:
        start = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
        self.tolerance = tolerance
        self.vectors = F.normalize(start, dim=1)
        self.values = torch.zeros(len(like), dtype=torch.float64, device=like.device)
        self.rows = torch.arange(len(like), device=like.device)
        self.size = self._beta = like.new_zeros(len(like))
        self._rest = like[:0]
        self.k = 0
        self.basis = like.new_zeros(len(like), 16, like.shape[1])  # [A, room, d]
        self.basis[:, 0] = self.vectors
        self.t = self.values.new_zeros(len(like), 16, 16)  # tridiagonal, [A, room, room]

    @property
    def last(self) -> Tensor:
        """The vectors that the next products are wanted of, ``[A, d]``."""
        return self.basis[:, self.k]

    def step(self, product: Tensor) -> Tensor:
        """Take the products ``S q`` of the last vectors in; whether one of the spaces is whole."""
        q = self.last
        alpha = (product * q).sum(dim=1)
        rest = torch.addcmul(product, alpha[:, None], q, value=-1)
        if self.k:
            rest = torch.addcmul(rest, self._beta[:, None], self.basis[:, self.k - 1], value=-1)
        self.t[:, self.k, self.k] = alpha.double()
        self.k += 1
        beta = rest.norm(dim=1)
        # ‖S‖ is no smaller than half of this
        self.size = torch.maximum(self.size, alpha.abs() + beta)
        self._rest, self._beta = rest, beta
        return (beta <= 1e-6 * self.size).any()

    def go_on(self, ended: bool) -> None:
        """Look for eigenvalues that are known well enough, every few steps and where a space has
        ``ended``; and make the next vectors.
        """
        rest, beta = self._rest, self._beta
        if ended or self.k % EVERY == 0 or self.k >= self.basis.shape[2]:
            done = self._solve(beta)
            rest, beta = rest[~done], beta[~done]
        if self.k == self.basis.shape[1]:
            self.basis = torch.cat([self.basis, torch.zeros_like(self.basis)], dim=1)
            self.t = F.pad(self.t, (0, self.k, 0, self.k))
        self.basis[:, self.k] = rest / beta.clamp_min(1e-30)[:, None]
        self.t[:, self.k, self.k - 1] = self.t[:, self.k - 1, self.k] = beta.double()
        self._beta = beta

    def _solve(self, beta: Tensor) -> Tensor:
        """Note the least eigenvalues in the spaces so far, and take out those that are known well
        enough; which ones.
        """
        values, weights = self._eigenpairs()
        size = values.abs().amax(dim=1)
        residual = beta.double() * weights[:, -1, 0].abs()
        invariant = beta.double() <= 1e-6 * size
        done = (
            invariant
            | (residual <= SAFETY * self.tolerance * size)
            | (self.k >= self.basis.shape[2])
        )
        self.values[self.rows] = values[:, 0]
        if done.any():
            self.vectors[self.rows[done]] = self._combined(self.basis[done], weights[done])
            self.rows, self.basis, self.t, self.size = (
                self.rows[~done],
                self.basis[~done],
                self.t[~done],
                self.size[~done],
            )
        return done

    def stop(self) -> None:
        """Note what is known of those that are not done."""
        if len(self.rows) and self.k:
            values, weights = self._eigenpairs()
            self.values[self.rows] = values[:, 0]
            self.vectors[self.rows] = self._combined(self.basis, weights)

    def _eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Of the tridiagonal matrices; on the CPU, since a GPU takes small ones of more than 32
        rows one after another.
        """
        pairs = torch.linalg.eigh(self.t[:, : self.k, : self.k].cpu())
        return pairs.eigenvalues.to(self.t.device), pairs.eigenvectors.to(self.t.device)

    def _combined(self, basis: Tensor, weights: Tensor) -> Tensor:
        least = weights[:, None, :, 0].to(basis)
        return F.normalize(torch.bmm(least, basis[:, : least.shape[2]])[:, 0], dim=1)
