"""Certification: no channel group is resized before two numerical proofs that its index maps are
right (``widthbench.width.proofs``). Grades are cached by a fingerprint of all that they depend on.
"""

from __future__ import annotations

import builtins
import functools
import gc
import hashlib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from widthbench.cache import read_json, write_json
from widthbench.errors import UsageError
from widthbench.paths import cache_dir
from widthbench.provenance import code_digest, meaning
from widthbench.randomness import seeded
from widthbench.width.assembly import discover
from widthbench.width.groups import Grade, Groups
from widthbench.width.inputs import Example, Inputs
from widthbench.width.proofs import grades_of

_PLUMBING = {
    *vars(nn.Module()),
    "default_cfg",
    "pretrained_cfg",
    "feature_info",
}  # what every module has, and timm's cards


def find_groups(model: nn.Module, example_input: Example, *, cache: bool = True) -> Groups:
    """Discover and certify the channel groups of a network.

    Args:
        model: The network; it is left as it was.
        example_input: What the network takes, on its device, as for ``discover``: a tensor ``[B,
            C, H, W]``, a tuple of arguments, a mapping of arguments by name, or ``Inputs``.
        cache: Take grades from the cache where this architecture has been certified with these
            versions before.

    Returns:
        All groups with their grades: "exact", "coupled" or "frozen", the latter two with the
        reason.
    """
    with _uncollected():
        return certify(model, discover(model, example_input), example_input, cache=cache)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles, which may look at every object of torch and timm
    and finds nothing: 0.25 of 2.0 s in a first call on ViT-Tiny.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def certify(
    model: nn.Module, groups: Groups, example_input: Example, *, cache: bool = True
) -> Groups:
    """Grade the groups of a network.

    Args:
        model: The network that the groups were found in; it is left as it was.
        groups: Its groups.
        example_input: As for ``find_groups``; certification draws random inputs of its shapes.
        cache: Read and write grades in ``WIDTHBENCH_CACHE``.

    Returns:
        The groups with grades. *exact*: splitting leaves the output unchanged (relative error <
        1e-9 in float64), removal equals gates at 0, and the output depends on the group. *coupled*:
        the same once each norm across channels that rides along is replaced by its per-channel
        affine. *frozen*: anything else.

    Raises:
        UsageError: Under ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError(
            "channel groups are certified by gradients: leave torch.inference_mode() for it"
        )
    key = fingerprint(model, groups, example_input) if cache else None
    path = cache_dir() / "grades" / f"{key}.json"
    if key and (kept := read_json(path, "grades")) is not None:
        grades = {n: (cast(Grade, g), str(r)) for n, (g, r) in kept["grades"].items()}
        if set(grades) == set(groups):
            return groups.with_grades(grades)
    with seeded(0):  # what a network draws in training mode leaves the caller's random state alone
        grades = grades_of(model, groups, Inputs.of(example_input))
    if key:
        try:
            write_json(path, {"model": type(model).__name__, "grades": grades})
        except UsageError as error:
            warnings.warn(f"grades are not cached: {error}", stacklevel=2)
    return groups.with_grades(grades)


class _OpaqueError(Exception):
    """Something that a grade may depend on and that cannot be told apart by a digest."""


def fingerprint(model: nn.Module, groups: Groups, example_input: Example) -> str | None:
    """A digest of everything that grades depend on.

    Versions, this package's own source, the found groups, the input's shape; of every layer its
    settings, other attributes (functions by their code), buffers less running statistics, the
    source files of its classes outside torch and timm.

    Returns:
        None if something cannot be digested (a class without readable source, hooks, opaque
        objects): then nothing is cached.
    """
    digest = hashlib.sha256()
    for package in ("torch", "timm"):
        digest.update(f"{package}={version(package)};".encode())
    digest.update(code_digest("width").encode())
    digest.update(
        f"{Inputs.of(example_input).shapes};{groups.members!r};{sorted(groups.axes.items())!r};".encode()
    )
    digest.update(
        f"{sorted(groups.tensors.items())!r};{groups.width_attributes!r};{groups.scales!r};{groups.program};".encode()
    )
    try:
        for name, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise _OpaqueError
            digest.update(f"{name}:{type(module).__qualname__}({module.extra_repr()});".encode())
            own = [(n, list(t.shape)) for n, t in module.named_parameters(recurse=False)]
            digest.update(f"{own};".encode())
            for key, value in sorted(vars(module).items()):
                if key not in _PLUMBING:
                    digest.update(f"{key}={_described(value)};".encode())
            for key, buffer in module.named_buffers(recurse=False):
                if not key.startswith(("running_", "num_batches_tracked")):
                    digest.update(f"{key}={_described(buffer)};".encode())
        for cls in sorted(
            {type(m) for m in model.modules()}, key=lambda c: f"{c.__module__}.{c.__qualname__}"
        ):
            digest.update(_source(cast(Any, cls)).encode())
    except _OpaqueError:
        return None
    return digest.hexdigest()[:32]


def _described(value: Any, depth: int = 0) -> str:
    """A text that differs where two attributes differ."""
    if depth > 6:
        raise _OpaqueError
    if value is None or isinstance(
        value, bool | int | float | str | bytes | torch.dtype | torch.device | torch.Size
    ):
        return repr(value)
    if isinstance(value, Tensor):
        content = (
            value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
            if value.numel()
            else b""
        )
        return f"{value.dtype}{list(value.shape)}{hashlib.sha256(content).hexdigest()}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}[{','.join(_described(v, depth + 1) for v in value)}]"
    if isinstance(value, set | frozenset):
        return f"{{{','.join(sorted(_described(v, depth + 1) for v in value))}}}"
    if isinstance(value, dict):
        pairs = (f"{_described(k, depth + 1)}:{_described(v, depth + 1)}" for k, v in value.items())
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, functools.partial):
        return f"partial({_described((value.func, value.args, value.keywords), depth + 1)})"
    if isinstance(value, nn.Module):
        return "module"  # named_modules comes to it
    if isinstance(value, type):
        digest = hashlib.sha256(_source(cast(Any, value)).encode()).hexdigest()
        return f"{value.__module__}.{value.__qualname__}{digest}"
    if inspect.isbuiltin(value) or type(value).__name__ in (
        "OpOverload",
        "OpOverloadPacket",
        "method_descriptor",
    ):
        return f"{getattr(value, '__module__', '')}.{value}"
    if inspect.ismethod(value):
        return f"method {_described(value.__func__, depth + 1)}"
    if inspect.isfunction(value):
        cells = [c.cell_contents for c in value.__closure__ or ()]
        outer = [
            v for n in value.__code__.co_names if inspect.isfunction(v := value.__globals__.get(n))
        ]
        parts = (_code(value.__code__), value.__defaults__, value.__kwdefaults__, cells, outer)
        return f"function({_described(parts, depth + 1)})"
    raise _OpaqueError


def _code(code: Any) -> tuple[Any, ...]:
    """A function's code as plain data: bytes, names, and constants with nested code in turn."""
    return (
        code.co_code,
        code.co_names,
        tuple(_code(c) if inspect.iscode(c) else repr(c) for c in code.co_consts),
    )


@functools.cache
def _source(cls: Any) -> str:
    """Digests of the files that a class and its bases are defined in, outside torch and timm, whose
    versions are known.
    """
    parts = []
    for base in cls.__mro__:
        if (
            base.__module__.split(".")[0] in ("torch", "timm")
            or vars(builtins).get(base.__name__) is base
        ):
            continue
        try:
            path = inspect.getsourcefile(base)
            content = Path(path).read_bytes() if path else None
        except (OSError, TypeError):
            content = None
        if (
            content is None or base.__module__ == "__main__"
        ):  # a notebook's or a prompt's classes may change under one name
            raise _OpaqueError
        parts.append(f"{base.__qualname__}:{hashlib.sha256(meaning(content)).hexdigest()}")
    return ";".join(parts)
