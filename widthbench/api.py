"""The library's front door: one call to resize a network."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widthbench.data.augmentation import augment as augmented
from widthbench.data.augmentation import draw
from widthbench.data.samples import Samples
from widthbench.errors import UsageError
from widthbench.progress import bar, quiet
from widthbench.recipe import Recipe
from widthbench.technique import registry
from widthbench.technique.base import Result, Technique, build, runs
from widthbench.technique.budget import Budget
from widthbench.technique.task import Task
from widthbench.training.loop import fit
from widthbench.width.attention import separated
from widthbench.width.certify import find_groups
from widthbench.width.cost import CostModel, count_macs
from widthbench.width.groups import Scope
from widthbench.width.inputs import Example, Inputs
from widthbench.width.labels import evaluating


class Batches:
    """Samples from what users have: a pair of tensors ``(x [N, ...], y [N])``, or a DataLoader of
    such pairs.

    Args:
        source: The tensors or the loader.
        device: Where batches go.
    """

    def __init__(self, source: Any, device: torch.device) -> None:
        self._source, self._device = source, device
        pair = (
            isinstance(source, tuple | list)
            and len(source) == 2
            and all(isinstance(t, Tensor) for t in source)
        )
        self._pair: tuple[Tensor, Tensor] | None = (source[0], source[1]) if pair else None
        if self._pair is not None and len(self._pair[0]) != len(self._pair[1]):
            raise UsageError(
                f"data: {len(self._pair[0])} inputs do not match {len(self._pair[1])} labels"
            )
        if self._pair is None and (
            isinstance(source, str | bytes) or not isinstance(source, Iterable)
        ):
            raise UsageError(
                "data must be a pair of tensors (x, y) or a DataLoader, not"
                f" {type(source).__name__}"
            )

    def __len__(self) -> int:
        if self._pair is not None:
            return len(self._pair[1])
        return len(getattr(self._source, "dataset", self._source))

    def batches(
        self, size: int, *, generator: torch.Generator | None = None, augment: Recipe | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(x, y)``; a DataLoader keeps its own batch size, order and augmentation."""
        if self._pair is None:
            for x, y in self._source:
                yield x.to(self._device), y.to(self._device)
            return
        x, y = self._pair
        order = (
            torch.arange(len(y))
            if generator is None
            else torch.randperm(len(y), generator=generator)
        )
        for index in order.split(size):
            batch = x[index].to(self._device)
            if augment is not None and generator is not None:
                draws = draw(augment, len(batch), batch.shape[2], batch.shape[3], generator)
                batch = augmented(batch, augment, draws.part(slice(None), self._device))
            yield batch, y[index].to(self._device)


def apply(
    technique: str | Technique | type[Technique],
    model: nn.Module,
    *,
    budget: str | Budget,
    example_input: Example,
    data: Any = None,
    scope: Scope = "inner",
    include: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
    **params: Any,
) -> nn.Module:
    """Resize a network with a registered technique.

    Args:
        technique: Its id, an instance, or a class.
        model: The network; it is left as it was.
        budget: What is kept: ``"channels:0.5"``, ``"macs:0.5"``, ``"params:0.25"``, or a
            ``Budget``.
        example_input: What the network takes, on its device: a tensor ``[B, ...]``, a tuple of
            arguments, a mapping of arguments by name, or ``Inputs`` for both.
        data: For techniques that look at data: ``(x, y)`` tensors or a DataLoader (used for
            training and choices alike), or anything with ``train`` and ``val``, each of which is
            either.
        scope: "inner" leaves residual streams alone; "all" resizes every certified group.
        include: Pattern(s) on group names (``widthbench doctor`` shows them); None means all in the
            scope.
        seed: Seeds everything random in the decision.
        progress: Show bars with the time left, where a technique has them.
        **params: The technique's parameters.

    Returns:
        A resized copy in eval mode. ``nn.MultiheadAttention`` in it has become
        ``SeparateAttention``, which has a layer each for queries, keys and values.

    Raises:
        UsageError: On bad input, naming the thing and the remedy.

    Example:
        >>> import timm, torch, widthbench
        >>> net = timm.create_model("test_resnet")
        >>> x = torch.randn(1, 3, 160, 160)
        >>> small = widthbench.apply("l1-norm", net, budget="channels:0.5", example_input=x)
        >>> small(x).shape
        torch.Size([1, 1000])
    """
    return outcome(
        technique,
        model,
        budget=budget,
        example_input=example_input,
        data=data,
        scope=scope,
        include=include,
        seed=seed,
        progress=progress,
        **params,
    ).resized


def outcome(
    technique: str | Technique | type[Technique],
    model: nn.Module,
    *,
    budget: str | Budget,
    example_input: Example,
    data: Any = None,
    scope: Scope = "inner",
    include: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
    **params: Any,
) -> Result:
    """``apply`` with everything that was decided: the plan, the widths, what is kept, and the
    resized network.
    """
    if isinstance(technique, type) and issubclass(technique, Technique):
        technique, params = build(technique, params), {}
    if not isinstance(technique, str | Technique):
        raise UsageError(
            f"technique must be a registered name, a class or an instance, not {technique!r}"
        )
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model must be a torch.nn.Module, not {type(model).__name__}; timm.create_model makes"
            " one from a name"
        )
    inputs = Inputs.of(example_input)
    if not len(inputs) or (isinstance(example_input, Tensor) and example_input.dim() < 2):
        raise UsageError("example_input must be a tensor [B, ...] with B of at least 1, or several")
    if isinstance(example_input, Tensor) and not torch.isfinite(example_input).all():
        raise UsageError("example_input has values that are not finite")
    if not isinstance(seed, int):
        raise UsageError(f"seed must be a whole number, not {seed!r}")
    if isinstance(technique, Technique) and params:
        raise UsageError(
            f"parameters {sorted(params)} go into the instance: {type(technique).__name__}(...)"
        )
    chosen = technique if isinstance(technique, Technique) else registry.create(technique, params)
    parsed = Budget.parse(budget, grows=chosen.grows)
    if data is None and chosen.access != "none":
        raise UsageError(
            f"technique '{chosen.id}' looks at data (access = '{chosen.access}'): pass data=(x, y)"
            " or a DataLoader"
        )
    if chosen.access != "none" and not isinstance(example_input, Tensor):
        raise UsageError(
            f"technique '{chosen.id}' feeds the network with batches (x, y), x one tensor: wrap a"
            " network of several inputs in a module that takes one tensor"
        )
    model = separated(model)
    groups = find_groups(model, inputs)
    if chosen.access in ("labelled", "training"):
        with evaluating(model), torch.no_grad():
            output = inputs.run(model)
        if not isinstance(output, Tensor):
            raise UsageError(
                f"technique '{chosen.id}' needs a loss, and the network gives a"
                f" {type(output).__name__}: wrap it in a module that returns class scores [B, K]"
            )
    cost = CostModel(model, groups, example_input)
    device = inputs.tensors[0].device
    train, val = (_samples(data, which, device) for which in ("train", "val"))

    shown = bar if progress else quiet

    def training(
        network: nn.Module, samples: Samples, recipe: Any, *, seed: int = seed, **options: Any
    ) -> Any:
        return fit(
            network,
            samples,
            recipe,
            macs=count_macs(network, example_input),
            seed=seed,
            progress=shown,
            **options,
        )

    task = Task(
        model=model,
        groups=groups.select(scope, include),
        example_input=example_input,
        budget=parsed,
        cost=cost,
        reference=cost,
        train=train,
        val=val,
        seed=seed,
        device=device,
        fit=training,
        regroup=lambda grown: find_groups(grown, example_input, cache=False),
        progress=shown,
    )
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        decided = chosen.apply(task)
        resized = decided.resized
        if not decided.met:
            warnings.warn(
                f"technique '{chosen.id}' leaves part of the budget {parsed} unused: it keeps"
                f" {decided.kept:.3f}",
                stacklevel=3,
            )
        resized.eval()
        if not runs(resized, example_input, groups.output_shapes):
            raise UsageError(
                f"technique '{chosen.id}' changed the output's shape or made it non-finite"
            )
    finally:
        for m, mode in modes.items():
            m.training = mode
    if isinstance(example_input, Tensor):  # what a saved network's groups are found with again
        known = {"shape": list(example_input.shape), "dtype": str(example_input.dtype)}
        resized.widthbench_input = known  # type: ignore[assignment]
    return decided


def _samples(data: Any, which: str, device: torch.device) -> Samples:
    if data is None:
        return Batches((torch.empty(0, 1), torch.empty(0, dtype=torch.long)), device)
    part = getattr(data, which, data)
    return part if hasattr(part, "batches") else Batches(part, device)
