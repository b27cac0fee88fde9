"""Networks by name: everything that ``timm.create_model`` knows, ours included, and factories of a
user's own (``module:factory``); what it takes to build and feed them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import nn

from widthbench import plugins
from widthbench.errors import UsageError, did_you_mean, visible
from widthbench.networks import documents
from widthbench.randomness import seeded

OURS = tuple(documents.__all__)
_PLAIN = {"input_size": (3, 224, 224)}  # where nothing else is known, timm's defaults


def factory(name: str) -> Callable[..., nn.Module] | None:
    """What builds a network of a user's own; None for the names of timm.

    Args:
        name: ``module:factory``, where ``factory`` is a class or a function. It is called with
            those of ``num_classes``, ``in_chans`` and ``img_size`` that it takes.

    Raises:
        UsageError: If the module cannot be imported, or has no such factory.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        return None
    plugins.reach()
    try:
        made = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise UsageError(
            f"network '{name}' cannot be imported ({type(error).__name__}: {error}): name a file"
            f" that is there, as in 'mynets.py:{attribute or 'MyNet'}', or a module on Python's"
            " path"
        ) from error
    if not callable(made):
        raise UsageError(f"network '{name}' is a {type(made).__name__}: name a class or a function")
    called: Callable[..., nn.Module] = made
    return called


def sources(name: str) -> list[Path]:
    """The files that a network of a user's own is made of; none for the names of timm."""
    if factory(name) is None:
        return []
    at = getattr(import_module(name.partition(":")[0]), "__file__", None)
    return plugins.sources(Path(at)) if at and "site-packages" not in at else []


def named(name: str, folder: Path | None = None) -> str:
    """A network's name as records have it: of ``mynets.py:MyNet`` the file becomes known, and
    ``mynets:MyNet`` is left.

    Args:
        name: As it is given.
        folder: What a file's path is relative to; the folder at hand if None.
    """
    file, colon, attribute = name.rpartition(":")
    if not (colon and file.endswith(".py")):
        return name
    path = (folder or Path()) / file
    plugins.use([path])
    return f"{path.stem}:{attribute}"


def _taken(call: Callable[..., Any]) -> Callable[[str], bool]:
    """Whether a call takes an argument by name."""
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return lambda name: False
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return lambda name: name in parameters or (anything and name != "img_size")


def create(
    name: str, *, classes: int, channels: int, size: int, seed: int = 0, **kwargs: Any
) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: Any name that ``timm.create_model`` takes, ours included, or ``module:factory``.
        classes: Outputs.
        channels: Image channels.
        size: Input height and width in pixels.
        seed: Seeds the initialisation; the global random state is left as it was.
        **kwargs: Passed on to the network.

    Raises:
        UsageError: If timm does not know the name, or the network refuses the settings.
    """
    require(name)
    own = factory(name)
    if own is None:
        kwargs = {"pretrained": False, "num_classes": classes, "in_chans": channels, **kwargs}
        if takes_img_size(name):
            kwargs = {"img_size": size, **kwargs}
    else:
        takes = _taken(own)
        given = {"num_classes": classes, "in_chans": channels, "img_size": size}
        kwargs = {k: v for k, v in given.items() if takes(k)} | kwargs
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of odd sizes, the certificate says better
        try:
            model = own(**kwargs) if own else timm.create_model(name, **kwargs)
            if not isinstance(model, nn.Module):
                raise TypeError(f"it gives a {type(model).__name__}, not a torch.nn.Module")
            return model.eval()
        except Exception as error:  # a setting that does not fit may trip any part of a constructor
            first = visible((str(error).strip().splitlines() or [""])[0])[:300]
            if (
                not isinstance(error, TypeError | ValueError | AssertionError | RuntimeError)
                or not first
            ):
                first = (
                    f"{type(error).__name__} {first}".strip()
                )  # alone it would say little: "'reluu'"
            hint = f"; correct its args {visible(repr(kwargs))[:300]}" if kwargs else ""
            raise UsageError(
                f"model '{name}' refuses {classes} classes, {channels} x {size} x {size} px:"
                f" {first}{hint}"
            ) from error


def require(name: str) -> None:
    """Check that timm knows a network, or that its factory can be imported.

    Raises:
        UsageError: If it does not, with the closest name.
    """
    if factory(name):
        return
    base, dot, tag = name.partition(".")
    if not timm.is_model(base):
        raise UsageError(
            f"unknown model '{name}'{did_you_mean(base, timm.list_models())} (any timm model name"
            " works; one of your own as 'mynets.py:MyNet')"
        )
    if dot:
        known = [t for n in timm.list_models(base, include_tags=True) if (t := n.partition(".")[2])]
        if tag not in known:
            raise UsageError(
                f"model '{base}' has no weights tagged '{tag}'{did_you_mean(tag, known)}; the bare"
                " name works too"
            )


def takes_img_size(name: str) -> bool:
    """Whether a network is built for one input size, which it must be told."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return bool(cfg and getattr(cfg, "fixed_input_size", False))


def native(name: str) -> tuple[int, int, int, int]:
    """``(C, H, W, classes)`` that a network was published with.

    Raises:
        UsageError: If timm does not know the name.
    """
    require(name)
    if own := factory(name):
        defaults = {
            p.name: p.default
            for p in inspect.signature(own).parameters.values()
            if isinstance(p.default, int)
        }
        side = defaults.get("img_size", 224)
        return defaults.get("in_chans", 3), side, side, defaults.get("num_classes", 1000)
    cfg = timm.get_pretrained_cfg(name)
    channels, height, width = cfg.input_size if cfg is not None else (3, 224, 224)
    return channels, height, width, cfg.num_classes if cfg is not None else 1000


def view(name: str) -> dict[str, Any]:
    """``mean``, ``std``, ``interpolation`` and ``crop_pct`` that a network was published with."""
    require(name)
    cfg = None if factory(name) else timm.get_pretrained_cfg(name)
    config = resolve_data_config(args={}, pretrained_cfg=cfg.to_dict() if cfg else _PLAIN)
    return {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct")}


def reinitialise(model: nn.Module, seed: int) -> None:
    """Draw fresh weights for the shapes that a network has now, in place.

    Every layer's own ``reset_parameters`` is called, then the network's ``init_weights`` where it
    has one without required arguments (timm's ResNet, ByobNet, ViT, ...). Bare parameters (class
    tokens, layer-scales) keep the values that their constructor gave them.

    Args:
        model: A newly built, perhaps resized network.
        seed: Seeds the draw; the global random state is left as it was.
    """
    with seeded(seed):
        for module in model.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        init: Any = getattr(model, "init_weights", None)
        if callable(init) and all(
            p.default is not p.empty for p in inspect.signature(init).parameters.values()
        ):
            init()
