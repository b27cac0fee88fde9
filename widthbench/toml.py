"""TOML as people write it: with a byte order mark or without, and with every way to spoil it named
in one line.
"""

from __future__ import annotations

import codecs
import io
import tomllib
from pathlib import Path
from typing import Any

from widthbench.errors import UsageError

DEPTH = 50  # tables and lists in each other; what is deeper can be neither printed nor written
WIDE = (
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_BE,
)  # UTF-32's other mark begins like UTF-16's


def read(path: Path, what: str) -> dict[str, Any]:
    """The content of a file.

    Args:
        path: The file; UTF-8, with a byte order mark or without.
        what: What it is, for errors: "suite", "recipe".

    Raises:
        UsageError: If it cannot be read, or is malformed.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # the latter: a zero byte in its name
        raise UsageError(
            f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    if content.startswith(WIDE) or b"\0" in content:
        raise UsageError(
            f"cannot read {what} {path}: it is UTF-16 or UTF-32 text, or no text at all: save it as"
            " UTF-8"
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"cannot read {what} {path}: not UTF-8 text in line {line}: save it as UTF-8"
        ) from error
    return parse(io.StringIO(text, newline=None).read(), str(path))


def parse(text: str, where: str) -> dict[str, Any]:
    """The content of a text; a byte order mark in front is passed over.

    Args:
        text: The TOML.
        where: The file's name, for errors.

    Raises:
        UsageError: If it is malformed, or holds integers of more than 64 bits or tables in each
            other beyond all use.
    """
    too_deep = f"{where}: tables or lists lie in each other more than {DEPTH} deep: flatten them"
    try:
        content = tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise UsageError(too_deep) from error
    except ValueError as error:  # Python's own limit on digits
        raise UsageError(f"{where}: not valid TOML: {str(error).partition(';')[0]}") from error
    stack: list[tuple[str, Any, int]] = [("", content, 0)]
    while stack:
        key, value, depth = stack.pop()
        if depth > DEPTH:
            raise UsageError(too_deep)
        if isinstance(value, dict):
            stack += [(k, v, depth + 1) for k, v in value.items()]
        elif isinstance(value, list):
            stack += [(key, v, depth + 1) for v in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UsageError(f"{where}: {key}: an integer of more than 64 bits")
    return content
