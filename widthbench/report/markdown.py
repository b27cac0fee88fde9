"""Anyone's text, and numbers, as markdown shows them."""

from __future__ import annotations

import re


def escaped(text: str) -> str:
    """Anyone's text as markdown that says it, in a table's cell too, and does nothing else."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in text)


def code(text: str) -> str:
    """Anyone's text as code in a line or a table's cell of markdown."""
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def fenced(text: str, language: str) -> list[str]:
    """The lines of a block of code that its text cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text.strip(), fence]


def count(value: float) -> str:
    """``"2.29 M"``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.0f}"
