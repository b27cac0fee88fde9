"""What a network is called with: one tensor, several, or arguments by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from widthbench.errors import UsageError


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call of a network, as ``torch.export`` takes them.

    Attributes:
        args: By place; tensors may lie within lists, tuples and mappings.
        kwargs: By name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Example) -> Inputs:
        """From a tensor, a tuple of arguments, or a mapping of arguments by name.

        Raises:
            UsageError: If it is none of these, or holds no tensor.
        """
        if isinstance(example, Inputs):
            made = example
        elif isinstance(example, Tensor):
            made = cls((example,))
        elif isinstance(example, Mapping) and all(isinstance(k, str) for k in example):
            made = cls(kwargs=dict(example))
        elif isinstance(example, tuple | list):
            made = cls(tuple(example))
        else:
            raise UsageError(
                "example_input must be a tensor [B, ...], a tuple of what the network is called"
                f" with, or a mapping of its arguments by name, not {type(example).__name__}"
            )
        if not any(t.dim() for t in made.tensors):
            raise UsageError("example_input holds no tensor [B, ...]")
        return made

    def run(self, model: nn.Module) -> Any:
        """The network's output."""
        return model(*self.args, **self.kwargs)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors in it, in order."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of its tensors."""
        return tuple(tuple(t.shape) for t in self.tensors)

    @property
    def described(self) -> str:
        """Its shapes, for messages."""
        return " and ".join(str(list(s)) for s in self.shapes)

    @property
    def elements(self) -> int:
        """How many numbers its tensors hold."""
        return sum(t.numel() for t in self.tensors)

    @property
    def image(self) -> Tensor | None:
        """The images ``[B, C, H, W]``, if these are all that there is."""
        alone = len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Tensor)
        return self.args[0] if alone and self.args[0].dim() == 4 else None

    def __len__(self) -> int:
        """Samples: the length of the first tensor."""
        return next(len(t) for t in self.tensors if t.dim())

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with other tensors."""
        args, kwargs = tree_map(partial(_changed, change), (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def batch(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with other tensors where there is one entry for each sample."""
        samples = len(self)
        return self.map(lambda t: change(t) if t.dim() and len(t) == samples else t)

    def first(self, count: int) -> Inputs:
        """The first samples."""
        return self if count >= len(self) else self.batch(lambda t: t[:count])


Example = Tensor | Sequence[Any] | Mapping[str, Any] | Inputs


def _changed(change: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    return change(leaf) if isinstance(leaf, Tensor) else leaf


def random_like(inputs: Inputs, samples: int) -> Inputs:
    """Random numbers of these shapes in float64, on the CPU.

    Whole numbers, such as those of tokens, are drawn from the example's own; truth values, and a
    batch that is taken as a whole, are as they are.

    Args:
        inputs: The example.
        samples: How many the network needs at least. If 1, there are two: the smallest batch that
            still shows a mix-up of the batch with the channels.
    """
    generator = torch.Generator().manual_seed(1)

    def drawn(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return torch.randn(t.shape, generator=generator, dtype=torch.float64)
        own = t.detach().cpu()
        if samples > 1 or t.dtype == torch.bool or not t.dim():
            return own
        return own.flatten()[torch.randint(own.numel(), t.shape, generator=generator)]

    if samples == 1:
        one = inputs.first(1)
        inputs = one.batch(lambda t: t.expand(2, *t.shape[1:]))
    return inputs.map(drawn)
