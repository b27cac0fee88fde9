"""Networks: everything that ``timm.create_model`` knows, and the small ones of the source documents, registered with timm."""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from widthbench.errors import UsageError, did_you_mean
from widthbench.randomness import seeded

__all__ = ["MLP", "LeNet5"]


def _cfg(size: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (1, size, size),
        "fixed_input_size": True,
        "pool_size": None,
        "first_conv": None,
        "classifier": "",
        "mean": (0.5,),
        "std": (0.5,),
        "interpolation": "bilinear",
    }


default_cfgs = generate_default_cfgs(
    {"lenet_300_100.untrained": _cfg(28), "lenet5.untrained": _cfg(28), "mlp_sigmoid.untrained": _cfg(28)}
)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class MLP(nn.Module):
    """A multi-layer perceptron on flattened images; layers are named ip1, ip2, ... as in the published LeNet weights.

    Args:
        widths: Hidden widths.
        act_layer: Activation between layers.
        num_classes: Outputs.
        in_chans: Image channels.
        img_size: Height and width in pixels, or one number for both.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (300, 100),
        act_layer: type[nn.Module] = nn.ReLU,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        height, width = _pair(img_size)
        sizes = (in_chans * height * width, *widths)
        for i, (a, b) in enumerate(itertools.pairwise(sizes), 1):
            self.add_module(f"ip{i}", nn.Linear(a, b))
            self.add_module(f"act{i}", act_layer())
        self.add_module(f"ip{len(sizes)}", nn.Linear(sizes[-1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        x = x.flatten(1)
        for layer in self.children():
            x = layer(x)
        return x


class LeNet5(nn.Module):
    """The LeNet-5 of the pruning literature (Caffe's): 20 and 50 convolutions of 5 x 5, then 500 and the classes, ReLU.

    Args:
        num_classes: Outputs.
        in_chans: Image channels.
        img_size: Height and width in pixels, or one number for both; at least 16.
        act_layer: Activation.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        act_layer: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        height, width = (((side - 4) // 2 - 4) // 2 for side in _pair(img_size))
        self.conv1 = nn.Conv2d(in_chans, 20, 5)
        self.act1 = act_layer()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.act2 = act_layer()
        self.pool2 = nn.MaxPool2d(2)
        self.ip1 = nn.Linear(50 * height * width, 500)
        self.act3 = act_layer()
        self.ip2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        x = self.pool1(self.act1(self.conv1(x)))
        x = self.pool2(self.act2(self.conv2(x)))
        return self.ip2(self.act3(self.ip1(x.flatten(1))))


@register_model
def lenet_300_100(pretrained: bool = False, **kwargs: Any) -> MLP:
    """LeNet-300-100: two hidden layers of 300 and 100 ReLU units (LeCun et al. 1998)."""
    return build_model_with_cfg(MLP, "lenet_300_100", pretrained, **kwargs)


@register_model
def lenet5(pretrained: bool = False, **kwargs: Any) -> LeNet5:
    """LeNet-5 in Caffe's 20-50-500 form."""
    return build_model_with_cfg(LeNet5, "lenet5", pretrained, **kwargs)


@register_model
def mlp_sigmoid(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Sigmoid MLP of Sharma, Wolfe and Raj (2017): one hidden layer of 100 units unless ``widths`` says otherwise."""
    kwargs = {"widths": (100,), "act_layer": nn.Sigmoid, **kwargs}
    return build_model_with_cfg(MLP, "mlp_sigmoid", pretrained, **kwargs)


def create(name: str, *, classes: int, channels: int, size: int, seed: int = 0, **kwargs: Any) -> nn.Module:
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
            return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **kwargs).eval()
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"model '{name}' refuses {classes} classes, {channels} x {size} x {size} px: {first}") from error


def require(name: str) -> None:
    """Check that timm knows a network.

    Raises:
        UsageError: If it does not, with the closest name.
    """
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UsageError(f"unknown model '{name}'{did_you_mean(base, timm.list_models())} (any timm model name works)")
    if tag:
        known = [n.partition(".")[2] for n in timm.list_models(base, include_tags=True)]
        if tag not in known:
            raise UsageError(f"model '{base}' has no weights tagged '{tag}'{did_you_mean(tag, known)}; the bare name works too")


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


def reinitialise(model: nn.Module, seed: int) -> None:
    """Draw fresh weights for the shapes that a network has now, in place.

    Every layer's own ``reset_parameters`` is called, then the network's ``init_weights`` where it has one without required
    arguments (timm's ResNet, ByobNet, ViT, ...). Bare parameters (class tokens, layer-scales) keep the values that their
    constructor gave them.

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
        if callable(init) and all(p.default is not p.empty for p in inspect.signature(init).parameters.values()):
            init()
