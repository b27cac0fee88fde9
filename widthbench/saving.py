"""Resized networks in files: safetensors, with the plan that gives a network built anew their
shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from widthbench.errors import PlanError, UsageError
from widthbench.networks import models
from widthbench.width.attention import SeparateAttention, separated
from widthbench.width.certify import find_groups
from widthbench.width.inputs import Example
from widthbench.width.labels import evaluating
from widthbench.width.resize import keep, plans_of, resize

FORMATS = ("widthbench 1", "widthbench 2")  # the first has one plan, the second a list
Factory = str | nn.Module | Callable[[], nn.Module]


def save(model: nn.Module, path: str | Path, *, example_input: Example | None = None) -> Path:
    """Write a resized network's weights and shape to a safetensors file.

    Args:
        model: What ``apply`` or ``resize`` gave, trained further or not.
        path: The file; written anew if it is there.
        example_input: What the network takes, where it is not one tensor that ``apply`` was given.

    Returns:
        The file.

    Raises:
        UsageError: If the network was not resized by widthbench.
    """
    plans = plans_of(model)
    if not plans:
        raise UsageError(
            f"save: how this {type(model).__name__} got its shape is not known: give it what"
            " widthbench.apply() or resize() returned, or save its state_dict"
        )
    known = _known(example_input) or getattr(model, "widthbench_input", None)
    facts = {
        "format": FORMATS[-1],
        "widthbench": version("widthbench"),
        "network": type(model).__name__,
        "plan": json.dumps([{n: rows.tolist() for n, rows in p.items()} for p in plans]),
        "widths": json.dumps({n: len(rows) for p in plans for n, rows in p.items()}),
        "input": json.dumps(known),
        "output": json.dumps(_output(model, known)),
        "separated": str(any(isinstance(m, SeparateAttention) for m in model.modules())).lower(),
    }
    path = Path(path)
    try:
        save_model(model, str(path), metadata=facts)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"save: cannot write {path}: {error}") from error
    return path


def load_network(
    factory: Factory, path: str | Path, *, example_input: Example | None = None
) -> nn.Module:
    """A resized network from a file that ``save`` wrote.

    Args:
        factory: What builds the network at its original widths: a class or function without
            arguments, a network, a timm model name, or ``"mynets.py:MyNet"``. Its weights do not
            matter; it is left as it is.
        path: The file.
        example_input: What the network takes, where the file does not say.

    Returns:
        The network, in eval mode, of the saved numbers' type, on the factory's device.

    Raises:
        UsageError: If the file is none of ``save``'s, does not fit the network, or the network then
            computes something else than the saved one did.
    """
    facts = _facts(path)
    model = _built(factory)
    given = json.loads(facts["plan"])
    plans = [
        {n: torch.tensor(rows) for n, rows in plan.items()}
        for plan in (given if isinstance(given, list) else [given])
    ]
    known = json.loads(facts["input"])
    if example_input is None:
        if known is None:
            raise UsageError(
                f"load_network: {path} does not say what the network takes: pass example_input"
            )
        example_input = _example(known, model)
    shaped = _shaped(model, plans, example_input, separate=facts["separated"] == "true")
    kinds = {t.dtype for t in load_file(path).values() if t.is_floating_point()}
    if len(kinds) == 1:
        shaped.to(kinds.pop())
    try:
        load_model(shaped, str(path))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise UsageError(
            f"load_network: {path} was saved from a {facts['network']} that this"
            f" {type(model).__name__} is not: {first}"
        ) from error
    shaped.eval()
    before, now = json.loads(facts["output"]), _output(shaped, known)
    near = 0.01 * max(map(abs, before), default=0.0)
    if before and now and not np.allclose(before, now, rtol=0.01, atol=near, equal_nan=True):
        raise UsageError(
            f"load_network: the weights of {path} fit this {type(model).__name__}, but it computes"
            " something else than the network that was saved: build it with the same arguments"
        )
    return shaped


def reshape_like(
    model: nn.Module, resized: nn.Module, *, example_input: Example | None = None
) -> nn.Module:
    """A network in the shape of a resized one.

    Args:
        model: Built as the resized network's original was; it is left as it is.
        resized: What ``apply`` or ``resize`` gave.
        example_input: What they take, where ``apply`` was not given one tensor.

    Returns:
        A copy of ``model`` that keeps the channels that ``resized`` kept, with its own weights.

    Raises:
        UsageError: If the two do not fit, or nothing is known of the second's shape.
    """
    plans = plans_of(resized)
    if not plans:
        raise UsageError(
            f"reshape_like: how this {type(resized).__name__} got its shape is not known: give it"
            " what widthbench.apply() or resize() returned"
        )
    if example_input is None:
        known = getattr(resized, "widthbench_input", None)
        if known is None:
            raise UsageError("reshape_like: pass example_input, what the networks take")
        example_input = _example(known, model)
    separate = any(isinstance(m, SeparateAttention) for m in resized.modules())
    return _shaped(model, plans, example_input, separate=separate)


def _shaped(
    model: nn.Module,
    plans: Iterable[Mapping[str, Tensor]],
    example_input: Example,
    *,
    separate: bool,
) -> nn.Module:
    model = separated(model) if separate else model
    try:
        for plan in plans:
            groups = find_groups(model, example_input)
            model = resize(model, groups, {name: keep(rows) for name, rows in plan.items()})
    except PlanError as error:
        raise UsageError(
            f"the plan is of another network than this {type(model).__name__}: {error}"
        ) from error
    return model


def _built(factory: Factory) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    if isinstance(factory, str):
        name = models.named(factory)
        channels, height, _, classes = models.native(name)
        return models.create(name, classes=classes, channels=channels, size=height)
    try:
        made = factory()
    except Exception as error:  # anybody's code
        raise UsageError(
            f"load_network: the factory raises {type(error).__name__}: {error}; it is called"
            " without arguments"
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"load_network: factory() gave a {type(made).__name__}, not a network")
    return made


def _facts(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            facts: dict[str, Any] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"load_network: cannot read {path}: {error}") from error
    if facts.get("format") not in FORMATS:
        raise UsageError(f"load_network: {path} was not written by widthbench.save()")
    try:
        plan, known, output = (json.loads(facts[k]) for k in ("plan", "input", "output"))
        steps = [plan] if facts["format"] == FORMATS[0] else plan
        sound = isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
        sound = sound and isinstance(output, list) and "separated" in facts
        sound = sound and (known is None or {*known} == {"shape", "dtype"})
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UsageError(f"load_network: what {path} says of itself is damaged: save it anew")
    return facts


def _known(example: Example | None) -> dict[str, Any] | None:
    """What an input is, if it is one tensor."""
    if not isinstance(example, Tensor):
        return None
    return {"shape": list(example.shape), "dtype": str(example.dtype)}


def _example(known: Mapping[str, Any], model: nn.Module) -> Tensor:
    """An input of that kind, the same wherever it is drawn; indices are 0."""
    first = next(model.parameters(), torch.empty(0))
    dtype = getattr(torch, known["dtype"].removeprefix("torch."))
    if not dtype.is_floating_point:
        return torch.zeros(known["shape"], dtype=dtype, device=first.device)
    drawn = torch.randn(known["shape"], generator=torch.Generator().manual_seed(0))
    return drawn.to(first.device, first.dtype)


def _output(model: nn.Module, known: Mapping[str, Any] | None) -> list[float]:
    """Some numbers of what a network gives, by which another one is told apart; none where its
    input is not known, or its output no tensor.
    """
    if known is None:
        return []
    with evaluating(model), torch.no_grad():
        output = model(_example(known, model))
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return []
    flat = output.double().flatten().cpu()
    return [*flat[:8].tolist(), float(flat.mean()), float(flat.std()) if len(flat) > 1 else 0.0]
