"""Derivatives of a network's loss with respect to its gates: first, and second by automatic
differentiation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from widthbench.sensitivity.ablation import Sample, footprint, replica
from widthbench.training.measuring import MIB
from widthbench.width.cost import count_macs
from widthbench.width.gates import gated
from widthbench.width.groups import Groups

KINKED = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Threshold,
)
"""Activations whose second derivative is 0, or jumps, at some points and is no help in between."""


class GateDerivatives:
    """Derivatives of the mean loss with respect to input gates, at given gates.

    Args:
        model: In eval mode; it is left alone.
        groups: Its channel groups: the gates.
        sample: What the loss is averaged over; on the model's device.
        memory_mib: Limit on the activations of a batch, in MiB.

    Attributes:
        forward_macs: Multiply-accumulates done so far in plain forward passes.
        backward_macs: In everything else.
    """

    def __init__(
        self, model: nn.Module, groups: Groups, sample: Sample, *, memory_mib: float = 256.0
    ) -> None:
        self.model, self.groups, self.sample = replica(model).eval(), groups, sample
        self.forward_macs = self.backward_macs = 0
        self._whole = count_macs(self.model, sample.x[:1])
        self._freeze()
        layers = footprint(self.model, sample.x)
        self._each = 3 * sum(
            size for _, size in layers
        )  # values and gradients of all layers are alive together
        self._limit = memory_mib * MIB

    def _freeze(self) -> None:
        """Give the replica parameters of its own over the same storage that ask for no gradient."""
        for module in self.model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = nn.Parameter(p.detach(), requires_grad=False)

    @property
    def batch_size(self) -> int:
        """Samples at once."""
        return int(max(1, min(1024, self._limit // self._each)))

    def first(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``∂E/∂g`` of every gate.

        Args:
            gates: ``[N]`` per group.

        Returns:
            float64 ``[N]`` on the CPU per group.
        """
        free = {n: gates[n].to(self.sample.x).clone().requires_grad_() for n in self.groups}
        total = {n: torch.zeros(len(g), dtype=torch.float64) for n, g in free.items()}
        with gated(self.model, self.groups, free) as net:
            for i, (x, y) in enumerate(self.sample.batches(self.batch_size)):
                with self._counted(len(x), i):
                    loss = self.sample.criterion(net(x), y).sum()
                    for n, d in zip(
                        free, torch.autograd.grad(loss, list(free.values())), strict=True
                    ):
                        total[n] += d.double().cpu()
        return {n: t / len(self.sample) for n, t in total.items()}

    def second(
        self, gates: Mapping[str, Tensor], candidates: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """``∂²E/∂g²`` of the candidates, exact: forward mode over reverse mode, all candidates'
        directions batched.

        With piecewise linear activations it holds almost everywhere: their own second derivative
        counts as 0.

        Args:
            gates: ``[N]`` per group.
            candidates: long ``[C]`` per group.

        Returns:
            float64 ``[N]`` on the CPU per group; NaN for channels that are not candidates.
        """
        names, sizes = list(self.groups), [self.groups[n].channels for n in self.groups]
        offsets = dict(zip(names, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
        point = torch.cat([gates[n].to(self.sample.x) for n in names])
        where = torch.cat([candidates[n].cpu() + offsets[n] for n in names])
        total = torch.full((len(point),), torch.nan, dtype=torch.float64)
        total[where] = 0
        parts = int(max(1, self._limit // (16 * self._each)))
        size = int(max(1, min(1024, self._limit // (self._each * max(1, min(parts, len(where)))))))
        for chunk in where.split(parts):
            directions = torch.eye(len(point), device=point.device, dtype=point.dtype)[
                chunk.to(point.device)
            ]
            for i, (x, y) in enumerate(self.sample.batches(size)):
                gradient = torch.func.grad(partial(self._loss, sizes, x, y))
                along = partial(_directional, gradient, point)
                with self._counted(len(x), i), sdpa_kernel(SDPBackend.MATH):
                    rows = torch.func.vmap(along)(directions)
                total[chunk] += (
                    rows.gather(1, chunk[:, None].to(rows.device)).squeeze(1).double().cpu()
                )
        return dict(zip(names, (total / len(self.sample)).split(sizes), strict=True))

    def _loss(self, sizes: list[int], x: Tensor, y: Tensor, point: Tensor) -> Tensor:
        with gated(
            self.model, self.groups, dict(zip(self.groups, point.split(sizes), strict=True))
        ) as net:
            return self.sample.criterion(net(x), y).sum()

    @contextmanager
    def _counted(self, samples: int, batch: int) -> Iterator[None]:
        """Count the MACs of the first batch, and take the others to cost as much for each
        sample.
        """
        if batch:
            yield
        else:
            with FlopCounterMode(display=False) as counter:
                yield
            self._beyond = counter.get_total_flops() / 2 / samples - self._whole
        self.forward_macs += self._whole * samples
        self.backward_macs += round(self._beyond * samples)


def _directional(gradient: object, point: Tensor, direction: Tensor) -> Tensor:
    """The Hessian times a direction."""
    return torch.func.jvp(gradient, (point,), (direction,))[1]  # type: ignore[arg-type]


def kinked(model: nn.Module) -> list[str]:
    """Names of the activations whose second derivative exists almost everywhere only."""
    return [name for name, module in model.named_modules() if isinstance(module, KINKED)]
