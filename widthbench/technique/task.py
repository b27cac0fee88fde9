"""What a technique is given: a certified network, its data, a budget, and what the harness does for
it. Never the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from widthbench.data.samples import Samples
from widthbench.errors import AccessError, UsageError
from widthbench.progress import Progress, quiet
from widthbench.recipe import Recipe
from widthbench.sensitivity.ablation import Sample, replica
from widthbench.technique.budget import (
    Allocation,
    Budget,
    Costed,
    asked,
    global_widths,
    top_channels,
    uniform_widths,
    used,
)
from widthbench.width.cost import CostModel
from widthbench.width.groups import Groups
from widthbench.width.resize import Resize, keep

Access = Literal["none", "unlabelled", "labelled", "training"]
ACCESS: tuple[Access, ...] = ("none", "unlabelled", "labelled", "training")


BRIEF = Recipe(epochs=1, batch_size=64, lr=0.01)  # where a caller names none
State = dict[str, Any]
"""Tensors and plain data (numbers, strings, None), also in dicts and lists, by name."""


class Metered(Protocol):
    """Work that counts its multiply-accumulates."""

    forward_macs: int
    backward_macs: int


Work = TypeVar("Work", bound=Metered)


def _no_loop(*args: Any, **options: Any) -> Any:
    raise UsageError("this task has no training loop: give it one (Task.fit)")


def _no_discovery(model: nn.Module) -> Groups:
    raise UsageError("this task cannot find groups anew: give it a way to (Task.regroup)")


@dataclass(frozen=True)
class Task:
    """One decision to take.

    Attributes:
        model: The network to decide on, in eval mode. Leave it as it is; ``copy.deepcopy`` it to
            train it.
        groups: Its certified channel groups, filtered by scope and include patterns: what may be
            resized.
        example_input: What the network takes, on the device: a tensor ``[B, ...]`` for all but
            techniques that look at no data, which may get ``Inputs``.
        budget: What is to be kept.
        cost: ``cost({group: channels}) -> Cost`` (MACs and parameters), analytically.
        reference: The network that the budget is a fraction of, as its ``macs`` and ``params``.
        train: Training samples, or a guard that says what to declare if ``access`` does not cover
            them.
        val: Validation samples (every choice is made on these), or a guard likewise.
        seed: Seeds everything random in the decision.
        device: Where to compute.
        recipe: Training settings for techniques that train (``fit`` understands them): the suite's
            for fine-tuning where the technique starts from the trained base, the base's own where
            it starts fresh.
        fit: ``fit(model, train, recipe, seed=, desc=, losses=, state=)``: the one training loop
            (``widthbench.training.loop.fit``); it resumes where a killed run stopped.
        regroup: ``regroup(model) -> Groups``: discovery and certification of a network that was
            grown.
        progress: Progress bar.
        checkpoint: ``checkpoint(name, make)``: what ``make()`` gives, tensors and plain data in
            dicts and lists; kept, so that a killed run resumes behind it.
        spend: ``spend(forward_macs=..., backward_macs=...)``: bill what was computed besides whole
            passes of ``model``, which the harness counts itself.
        unbilled: ``unbilled(work)``: what ``work()`` gives, its passes of ``model`` left off the
            bill.
        curves: Whether to record what makes pictures, at extra cost (a suite's ``curves = true``).
    """

    model: nn.Module
    groups: Groups
    example_input: Any
    budget: Budget
    cost: CostModel
    reference: Costed
    train: Samples
    val: Samples
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    recipe: Recipe = BRIEF
    fit: Callable[..., Any] = _no_loop
    regroup: Callable[[nn.Module], Groups] = _no_discovery
    progress: Progress = quiet
    checkpoint: Callable[[str, Callable[[], State]], State] = lambda name, make: make()
    spend: Callable[..., None] = lambda **macs: None
    unbilled: Callable[[Callable[[], Any]], Any] = lambda work: work()
    curves: bool = False

    def with_access(self, technique: str, access: Access) -> Task:
        """This task as a technique of the given data access sees it; data beyond it raise
        ``AccessError`` on touch.
        """
        level = ACCESS.index(access)
        guards: dict[str, Any] = {}
        if level < 3:
            guards["fit"] = Denied(technique, access, "fit")
        if level == 1:
            guards |= {"train": Unlabelled(self.train), "val": Unlabelled(self.val)}
        if level == 0:
            guards |= {part: Denied(technique, access, part) for part in ("train", "val")}
        return replace(self, **guards)

    def without_budget(self, technique: str) -> Task:
        """This task without its budget; asking for it raises ``AccessError``."""
        return replace(self, budget=_NoBudget(technique))  # type: ignore[arg-type]

    def widths(
        self, scores: Mapping[str, Tensor] | None = None, allocation: Allocation = "uniform"
    ) -> dict[str, int]:
        """Channels per group that meet the budget.

        Args:
            scores: ``[N]`` per group, higher is kept; needed for "global".
            allocation: "uniform": the same fraction everywhere. "global": from one ranking of all
                channels.

        Raises:
            BudgetError: If the budget lies below the feasible floor.
            UsageError: If the allocation is unknown.
        """
        if allocation == "uniform":
            return uniform_widths(self.groups, self.budget, self.cost, self.reference)
        if allocation == "global":
            if scores is None:
                raise UsageError("allocation='global' needs scores")
            return global_widths(scores, self.groups, self.budget, self.cost, self.reference)
        raise UsageError(f"allocation must be 'uniform' or 'global', not {allocation!r}")

    @property
    def asked(self) -> float:
        """The fraction of the reference that the budget allows, in the terms of ``kept``."""
        return asked(self.budget, self.groups)

    def kept(self, widths: Mapping[str, int]) -> float:
        """The fraction of the reference that channels per group keep, in the budget's terms."""
        return used(self.budget, widths, self.groups, self.cost(widths), self.reference)

    def fits(self, widths: Mapping[str, int]) -> bool:
        """Whether channels per group are within the budget."""
        return self.kept(widths) <= self.asked * (1 + 1e-12)

    def price(self, widths: Mapping[str, int], name: str, more: int = 1) -> float:
        """What a channel of one group changes of ``kept``, when each of its blocks has so many
        more.
        """
        blocks = self.groups[name].blocks
        other = self.kept({**widths, name: widths[name] + more * blocks})
        return abs(self.kept(widths) - other) / blocks

    def filled(self, widths: Mapping[str, int], scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Widths that also take what still fits of one ranking behind the first channel that did
        not.

        Args:
            widths: Channels per group, within the budget.
            scores: ``[N]`` per group, comparable between groups, higher is kept.
        """
        order = {n: s.sort(descending=True).values.tolist() for n, s in scores.items()}
        full, groups = dict(widths), self.groups
        while True:
            rest = [n for n, w in full.items() if w < groups[n].channels]
            fits = [n for n in rest if self.fits({**full, n: full[n] + groups[n].blocks})]
            if not fits:
                return full
            best = max(fits, key=lambda n: order[n][full[n]])
            full[best] += groups[best].blocks

    @contextmanager
    def billed(self, work: Work, *, new: bool = False) -> Iterator[Work]:
        """Bill what ``work`` computes in the block, by its ``forward_macs`` and ``backward_macs``.

        Args:
            work: Ablation, derivatives, splitting matrices.
            new: It was made for the block: bill what making it took, too.
        """
        forward, backward = (0, 0) if new else (work.forward_macs, work.backward_macs)
        try:
            yield work
        finally:
            self.spend(
                forward_macs=work.forward_macs - forward,
                backward_macs=work.backward_macs - backward,
            )

    def keep_best(
        self, scores: Mapping[str, Tensor], allocation: Allocation = "uniform"
    ) -> dict[str, Resize]:
        """The plan that keeps the channels with the highest scores within the budget.

        Args:
            scores: ``[N]`` per group; comparable between groups if the allocation is global.
            allocation: As in ``widths``.

        Returns:
            One pruning resize per group.

        Raises:
            UsageError: If a score is nan.
        """
        for name in self.groups:
            if bool(scores[name].isnan().any()):
                raise UsageError(f"a score of channel group '{name}' is nan: nothing ranks it")
        widths = self.widths(scores, allocation)
        return {
            n: keep(top_channels(scores[n], widths[n], g.blocks)) for n, g in self.groups.items()
        }

    def sample(self, count: int, *, seed: int | None = None) -> Sample:
        """At most ``count`` training samples.

        Args:
            count: How many.
            seed: Of the draw; the task's if None.

        Raises:
            UsageError: If there are none, or their labels are no classes of the network's.
        """
        xs, ys, have = [], [], 0
        for x, y in self.train.batches(
            min(count, 1000),
            generator=torch.Generator().manual_seed(self.seed if seed is None else seed),
        ):
            xs.append(x)
            ys.append(y)
            have += len(x)
            if have >= count:
                break
        if not have:
            raise UsageError(
                "this technique asks for the loss on training samples, but there are none"
            )
        x, y = torch.cat(xs)[:count], torch.cat(ys)[:count]
        with torch.no_grad():
            classes = replica(self.model)(self.example_input).shape[1]
        if y.is_floating_point() or y.dim() != 1 or int(y.min()) < 0 or int(y.max()) >= classes:
            raise UsageError(
                f"labels [B] must be whole numbers in 0..{classes - 1}, as the network's outputs"
            )
        return Sample(x, y)


class Denied:
    """Stands in for data that a technique did not declare; any use names the remedy."""

    def __init__(self, technique: str, access: Access, which: str) -> None:
        self._message = (
            f"technique '{technique}' declares access = '{access}' but uses task.{which}: declare"
            " what it needs"
        )

    def _deny(self) -> AccessError:
        return AccessError(self._message)

    def __len__(self) -> int:
        raise self._deny()

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Raise ``AccessError``."""
        raise self._deny()

    def batches(
        self, size: int, *, generator: torch.Generator | None = None, augment: Recipe | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Raise ``AccessError``."""
        raise self._deny()


class Nothing:
    """Stands in for val where a suite holds nothing out; any use names the remedy."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return 0

    def batches(
        self, size: int, *, generator: torch.Generator | None = None, augment: Recipe | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Raise ``UsageError``."""
        raise UsageError(
            f"this suite holds nothing of '{self._dataset}' out (val = 0), but a choice needs val:"
            " set val above 0"
        )


class _NoBudget:
    """Stands in for the budget while ``prepare`` runs."""

    def __init__(self, technique: str) -> None:
        self._technique = technique

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AccessError(
            f"technique '{self._technique}' asks for the budget in prepare(): what depends on it"
            " belongs in decide()"
        )


class Unlabelled:
    """Samples whose labels are all -1."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def batches(
        self, size: int, *, generator: torch.Generator | None = None, augment: Recipe | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(x, y)`` with every y replaced by -1."""
        for x, y in self._samples.batches(
            size, generator=generator, **({"augment": augment} if augment else {})
        ):
            yield x, torch.full_like(y, -1)
