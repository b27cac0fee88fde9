"""Torch-Pruning's importances: its scores of channels on our groups, cut by our resize."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

from widthbench.sensitivity.ablation import Sample, cross_entropy
from widthbench.technique.base import ScoredTechnique
from widthbench.technique.parameters import Count
from widthbench.technique.task import Access, Task
from widthbench.width.groups import Groups
from widthbench.width.layers import Side, kind_of

PRUNING: dict[tuple[str, Side], Callable[..., Any]] = {
    ("conv", "out"): tp.prune_conv_out_channels,
    ("conv", "in"): tp.prune_conv_in_channels,
    ("transposed", "out"): tp.prune_conv_out_channels,
    ("transposed", "in"): tp.prune_conv_in_channels,
    ("linear", "out"): tp.prune_linear_out_channels,
    ("linear", "in"): tp.prune_linear_in_channels,
    ("depthwise", "out"): tp.prune_depthwise_conv_out_channels,
    ("batchnorm", "out"): tp.prune_batchnorm_out_channels,
    ("prelu", "out"): tp.prune_prelu_out_channels,
}


class _Item(tuple[Any, list[int]]):
    """One layer of a group as importances read it: (dependency, positions), and the channel that
    each position belongs to.
    """

    root_idxs: list[int]

    def __new__(
        cls, layer: nn.Module, pruning: Any, positions: list[int], channels: list[int]
    ) -> _Item:
        dependency = SimpleNamespace(
            layer=layer, target=SimpleNamespace(module=layer), pruning_fn=pruning, handler=pruning
        )
        self = super().__new__(cls, (dependency, positions))
        self.root_idxs = channels
        return self


def as_group(model: nn.Module, groups: Groups, name: str) -> list[Any]:
    """A channel group in the form that Torch-Pruning's importances take.

    Args:
        model: The network that the groups were found in.
        groups: Its groups.
        name: The group.

    Returns:
        One item per layer and side, the first producer first. A first producer that holds each
        channel more than once (heads) comes in as many items, since importances take the first
        item's length for the number of channels.
    """
    count = groups[name].channels
    items = []
    for side in ("out", "in"):
        for layer, positions in groups.places(name, side):
            module = model.get_submodule(layer)
            kind = kind_of(module)
            pruning: Any = PRUNING.get((str(kind), side))
            if kind == "channelnorm":
                pruning = (
                    tp.prune_layernorm_out_channels
                    if isinstance(module, nn.LayerNorm)
                    else tp.prune_groupnorm_out_channels
                )
            channels = _channels(groups, name, layer, side)
            several = (
                len(positions) // count
                if layer == groups[name].producers[0] and side == "out"
                else 1
            )
            for i in range(several):
                some = [j for j in range(len(positions)) if several == 1 or _nth(channels, j) == i]
                items.append(
                    _Item(
                        module, pruning, [positions[j] for j in some], [channels[j] for j in some]
                    )
                )
    head, making = (
        model.get_submodule(groups[name].producers[0]),
        (PRUNING["conv", "out"], PRUNING["linear", "out"]),
    )
    return sorted(
        items, key=lambda item: not (item[0].layer is head and item[0].pruning_fn in making)
    )


def _channels(groups: Groups, name: str, layer: str, side: Side) -> list[int]:
    """The channel at each of a group's positions along an axis, in the order of
    ``Groups.places``.
    """
    channels: list[int] = []
    for s in groups.axes[layer, side]:
        if s.made_by(name) if side == "out" else name in (s.group, s.outer):
            each = s.size // groups[name].channels
            channels += [c for c in range(groups[name].channels) for _ in range(each)]
    return channels


def _nth(channels: list[int], at: int) -> int:
    """How often a position's channel has come before."""
    return channels[:at].count(channels[at])


class TorchPruning(ScoredTechnique):
    """Channels scored by one of Torch-Pruning's importances (Fang et al., "DepGraph", CVPR 2023).

    The importance sees every layer of a group, producers, norms and consumers, as in Torch-Pruning
    itself; groups are ours, so that it also scores what Torch-Pruning does not reach, and plans are
    cut by our resize.
    """

    access: ClassVar[Access] = "none"
    comparable = True  # importances normalise by group
    importance: ClassVar[Callable[[], Any]]
    bibtex = """@inproceedings{fang2023depgraph,
  title = {{DepGraph}: Towards Any Structural Pruning},
  author = {Fang, Gongfan and Ma, Xinyin and Song, Mingli and Mi, Michael Bi and Wang, Xinchao},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}
}"""

    def skip(self, task: Task) -> str | None:
        """Where the importance has nothing to say of a group."""
        for name in task.groups:
            types = tuple(type(self).importance().target_types)
            if not any(
                isinstance(item[0].layer, types) for item in as_group(task.model, task.groups, name)
            ):
                return (
                    f"channel group '{name}' has none of the layers that"
                    f" {type(self).importance.__name__} reads"
                )
        return None

    def scored(self, task: Task) -> nn.Module:
        """The network that the importance looks at."""
        return task.model

    def score(self, task: Task) -> dict[str, Tensor]:
        """What the importance gives."""
        model, importance = self.scored(task), type(self).importance()
        scores = {}
        for name, group in task.groups.items():
            score = importance(as_group(model, task.groups, name))
            scores[name] = torch.as_tensor(score).detach()[: group.channels]
        return scores


class Magnitude(TorchPruning):
    """Torch-Pruning's group magnitude: L2 norms of everything that a channel has in its group,
    averaged over layers.
    """

    id = "torch-pruning:magnitude"
    importance = tp.importance.GroupMagnitudeImportance


class BNScale(TorchPruning):
    """Torch-Pruning's BN scale: ``|γ|`` of a channel's batch norms (Liu et al., "Network Slimming",
    ICCV 2017).
    """

    id = "torch-pruning:bn-scale"
    importance = tp.importance.BNScaleImportance


class LAMP(TorchPruning):
    """Torch-Pruning's LAMP: magnitudes over the sum of all larger ones in the group (Lee et al.,
    ICLR 2021).
    """

    id = "torch-pruning:lamp"
    importance = tp.importance.LAMPImportance


class FPGM(TorchPruning):
    """Torch-Pruning's FPGM: distances to all other filters (He et al., "Geometric Median", CVPR
    2019).
    """

    id = "torch-pruning:fpgm"
    importance = tp.importance.FPGMImportance

    def skip(self, task: Task) -> str | None:
        """Also where a grouped convolution reads a group: Torch-Pruning 1.6's FPGM fails there."""
        for name, group in task.groups.items():
            for layer in group.consumers:
                if (
                    kind_of(module := task.model.get_submodule(layer)) == "conv"
                    and getattr(module, "groups", 1) > 1
                ):
                    return (
                        f"FPGM fails on grouped convolutions, such as '{layer}', which reads"
                        f" channel group '{name}'"
                    )
        return super().skip(task)


class _WithGradients(TorchPruning):
    """Importances that read gradients of the loss.

    Args:
        allocation: As in ``TorchPruning``.
        samples: Training samples that the loss is taken on.
    """

    access: ClassVar[Access] = "labelled"

    samples: Count = 256

    def scored(self, task: Task) -> nn.Module:
        """A copy whose parameters have gradients."""
        model = copy.deepcopy(task.model).eval().requires_grad_(True)
        sample = task.sample(self.samples)
        self.fill(model, sample)
        whole = task.cost({}).macs * len(sample)
        task.spend(forward_macs=whole, backward_macs=2 * whole)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return model

    def fill(self, model: nn.Module, sample: Sample) -> None:
        """Gradients of the mean loss."""
        for x, y in sample.batches(64):
            (cross_entropy(model(x), y).sum() / len(sample)).backward()


class Taylor(_WithGradients):
    """Torch-Pruning's Taylor: ``|w ∂L/∂w|`` summed over everything that a channel has (Molchanov et
    al., CVPR 2019).
    """

    id = "torch-pruning:taylor"
    importance = tp.importance.GroupTaylorImportance


class Hessian(_WithGradients):
    """Torch-Pruning's Hessian: w² E[(∂L/∂w)²], the Fisher diagonal in place of the Hessian's (LeCun
    et al., OBD, 1989).

    Squares are averaged over single samples here; Torch-Pruning 1.6's own accumulation keeps the
    last sample's alone.
    """

    id = "torch-pruning:hessian"
    importance = tp.importance.GroupHessianImportance

    def fill(self, model: nn.Module, sample: Sample) -> None:
        """Mean squared gradients of single samples' losses, in place of gradients."""
        squares = {p: torch.zeros_like(p) for p in model.parameters()}
        for x, y in sample.batches(1):
            model.zero_grad(set_to_none=True)
            cross_entropy(model(x), y).sum().backward()
            for p, total in squares.items():
                if p.grad is not None:
                    total += p.grad.square()
        for p, total in squares.items():
            p.grad = total / len(sample)
