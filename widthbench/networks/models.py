"""Networks by name: everything that ``timm.create_model`` knows, ours included, and what it takes
to build and feed them.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import nn

from widthbench.errors import UsageError, did_you_mean, visible
from widthbench.networks import documents
from widthbench.randomness import seeded

OURS = tuple(documents.__all__)


def create(
    name: str, *, classes: int, channels: int, size: int, seed: int = 0, **kwargs: Any
) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: Any name that ``timm.create_model`` takes, ours included.
        classes: Outputs.
        channels: Image channels.
        size: Input height and width in pixels.
        seed: Seeds the initialisation; the global random state is left as it was.
        **kwargs: Passed on to the network.

    Raises:
        UsageError: If timm does not know the name, or the network refuses the settings.
    """
    require(name)
    if takes_img_size(name):
        kwargs = {"img_size": size, **kwargs}
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of odd sizes, the certificate says better
        try:
            return timm.create_model(
                name, pretrained=False, num_classes=classes, in_chans=channels, **kwargs
            ).eval()
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
    """Check that timm knows a network.

    Raises:
        UsageError: If it does not, with the closest name.
    """
    base, dot, tag = name.partition(".")
    if not timm.is_model(base):
        raise UsageError(
            f"unknown model '{name}'{did_you_mean(base, timm.list_models())} (any timm model name"
            " works)"
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
    cfg = timm.get_pretrained_cfg(name)
    channels, height, width = cfg.input_size if cfg is not None else (3, 224, 224)
    return channels, height, width, cfg.num_classes if cfg is not None else 1000


def view(name: str) -> dict[str, Any]:
    """``mean``, ``std``, ``interpolation`` and ``crop_pct`` that a network was published with."""
    require(name)
    cfg = timm.get_pretrained_cfg(name)
    config = resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg is not None else {})
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
