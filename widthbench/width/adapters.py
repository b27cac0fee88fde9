"""Numbers in a network's own code that state widths: where they come from, and what they are in a
resized network.

Many networks keep widths outside of their layers: ``num_heads``, ``head_dim``, the channels at
which a block splits or slices its input. While a network is traced, every whole number that one of
its modules keeps is replaced by one that remembers where it came from, also through products and
quotients; a reshape, split or slice that takes such a number then says what it states. A width that
the code reads off one tensor and reshapes another one by ties the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Self

from torch import nn

Origin = tuple[str, str, int | None]
"""(module, attribute, place in it where the attribute is a list or tuple)."""


class Counted(int):
    """A whole number that is a width: its square roots are known as such."""

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        power = pow(int(self), other, mod)
        return Root(power) if isinstance(other, float) and abs(other) == 0.5 else power

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __reduce__(self) -> Any:
        return int, (int(self),)


class Integer(Counted):
    """A whole number that remembers where it is kept, and what it was multiplied by since.

    Attributes:
        origin: Where.
        factor: What it was multiplied by.
        divisors: Origins of the numbers among what it was divided by.
    """

    origin: Any
    factor: Fraction
    divisors: tuple[Any, ...]

    def __new__(
        cls,
        value: int,
        origin: Any,
        factor: Fraction = Fraction(1),
        divisors: tuple[Any, ...] = (),
    ) -> Self:
        """The number ``value``, which is ``factor`` times what is kept at ``origin``."""
        self = super().__new__(cls, value)
        self.origin, self.factor, self.divisors = origin, factor, divisors
        return self

    def _by(self, other: Any) -> bool:
        """Whether the product or quotient with a number still has this one's origin."""
        return type(other) is int and other > 0

    def __mul__(self, other: Any) -> Any:
        if self._by(other):
            factor = self.factor * int(other)
            return type(self)(int(self) * int(other), self.origin, factor, self.divisors)
        return int(self) * (int(other) if isinstance(other, Integer) else other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        known = type(self) is type(other) is Integer and other > 0
        if (known or self._by(other)) and int(self) % int(other) == 0:
            divisors = (*self.divisors, other.origin) if known else self.divisors
            factor = self.factor / int(other)
            return type(self)(int(self) // int(other), self.origin, factor, divisors)
        return int(self) // (int(other) if isinstance(other, Integer) else other)

    def __sub__(self, other: Any) -> Any:
        if type(self) is type(other) is Integer:
            return Rest(self, other)
        return int(self) - int(other) if isinstance(other, int) else NotImplemented

    def __rfloordiv__(self, other: Any) -> Any:
        return other // int(self)


class Root(float):
    """The square root of a width, or one over it, as attention divides by."""

    def __rtruediv__(self, other: Any) -> Any:
        quotient = float(other) / float(self)
        return Root(quotient) if other == 1 else quotient

    def __deepcopy__(self, memo: Any) -> float:
        return float(self)

    def __reduce__(self) -> Any:
        return float, (float(self),)


class Rest(Counted):
    """What is left of a whole number behind another one: where a split has taken that first."""

    whole: Integer
    less: Integer

    def __new__(cls, whole: Integer, less: Integer) -> Self:
        """The difference."""
        self = super().__new__(cls, int(whole) - int(less))
        self.whole, self.less = whole, less
        return self


class Measured(Integer):
    """A width that the code has read off a tensor: its origin are the channels along it."""

    def _by(self, other: Any) -> bool:
        return isinstance(other, int) and not isinstance(other, bool | Measured) and other > 0

    def __rmul__(self, other: Any) -> Any:
        return self * other


@contextmanager
def watched_integers(model: nn.Module) -> Iterator[None]:
    """Whole numbers above 1 that modules other than torch's own keep remember where they come from
    while this is open, and so do their square roots.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    root = math.sqrt
    math.sqrt = lambda x: Root(root(x)) if isinstance(x, Counted) else root(x)
    try:
        for name, module in model.named_modules():
            if type(module).__module__.startswith("torch.") or isinstance(
                module, nn.modules.conv._ConvNd | nn.Linear
            ):
                continue
            for key, value in list(vars(module).items()):
                if key.startswith("_"):
                    continue
                if type(value) is int and value > 1:
                    new: Any = Integer(value, (name, key, None))
                elif type(value) in (list, tuple) and value and all(type(v) is int for v in value):
                    new = type(value)(
                        Integer(v, (name, key, i)) if v > 1 else v for i, v in enumerate(value)
                    )
                else:
                    continue
                kept.append((module.__dict__, key, value))
                module.__dict__[key] = new
        yield
    finally:
        math.sqrt = root
        for holder, key, value in kept:
            holder[key] = value
        for module in model.modules():  # what the network has worked out from them and kept
            for key, value in vars(module).items():
                if isinstance(value, Counted | Root):
                    plain = float if isinstance(value, Root) else int
                    module.__dict__[key] = plain(value)
                elif type(value) in (list, tuple) and any(isinstance(v, Counted) for v in value):
                    module.__dict__[key] = type(value)(
                        int(v) if isinstance(v, Counted) else v for v in value
                    )


def declare_integer(model: nn.Module, origin: Origin, value: int) -> None:
    """Set a number that a module keeps.

    Args:
        model: The network.
        origin: Where.
        value: The new number.
    """
    name, key, place = origin
    module = model.get_submodule(name)
    if place is None:
        setattr(module, key, value)
        return
    old = getattr(module, key)
    setattr(module, key, type(old)(value if i == place else v for i, v in enumerate(old)))
