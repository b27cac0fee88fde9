"""Networks of the source documents that timm does not have, registered with timm: LeNets, MLPs, and
those for images of 32 px.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.layers import get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import Tensor, nn
from torch.nn import functional as F

from widthbench.errors import did_you_mean

__all__ = [
    "lenet5",
    "lenet_300_100",
    "mlp_sigmoid",
    "mobilenetv1_025_cifar",
    "mobilenetv1_100_cifar",
    "mobilenetv2_100_cifar",
    "resnet20_cifar",
    "resnet56_cifar",
    "vgg16_cifar",
]


def _cfg(channels: int, size: int, **extra: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (channels, size, size),
        "pool_size": None,
        "first_conv": None,
        "classifier": "",
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "interpolation": "bilinear",
        **extra,
    }


default_cfgs = generate_default_cfgs(
    {
        "lenet_300_100.untrained": _cfg(1, 28, fixed_input_size=True),
        "lenet5.untrained": _cfg(1, 28, fixed_input_size=True),
        "mlp_sigmoid.untrained": _cfg(1, 28, fixed_input_size=True),
        "vgg16_cifar.untrained": _cfg(3, 32),
        "resnet20_cifar.untrained": _cfg(3, 32),
        "resnet56_cifar.untrained": _cfg(3, 32),
        "mobilenetv1_025_cifar.untrained": _cfg(3, 32),
        "mobilenetv1_100_cifar.untrained": _cfg(3, 32),
        "mobilenetv2_100_cifar.untrained": _cfg(3, 32),
    }
)


def activation(layer: str | type[nn.Module]) -> type[nn.Module]:
    """An activation class from itself or its name: any of ``torch.nn``'s, or any that
    ``timm.layers`` knows.

    Raises:
        ValueError: If the name is unknown.
    """
    if not isinstance(layer, str):
        return layer
    known: dict[str, Any] = {
        name.lower(): getattr(nn.modules.activation, name) for name in nn.modules.activation.__all__
    }
    layer_class = known.get(layer.lower().replace("_", ""))
    try:
        layer_class = layer_class or get_act_layer(layer)
    except (KeyError, AssertionError):
        layer_class = None
    if layer_class is None:
        raise ValueError(f"unknown activation '{layer}'{did_you_mean(layer, known)}")
    return layer_class


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class MLP(nn.Module):
    """A multi-layer perceptron on flattened images; layers are named ip1, ip2, ... as in the
    published LeNet weights.

    Args:
        widths: Hidden widths.
        act_layer: Activation between layers, a class or its name.
        num_classes: Outputs.
        in_chans: Image channels.
        img_size: Height and width in pixels, or one number for both.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (300, 100),
        act_layer: str | type[nn.Module] = nn.ReLU,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        act_layer = activation(act_layer)
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
    """The LeNet-5 of the pruning literature (Caffe's): 20 and 50 convolutions of 5 x 5, then 500
    and the classes, ReLU.

    Args:
        num_classes: Outputs.
        in_chans: Image channels.
        img_size: Height and width in pixels, or one number for both; at least 16.
        act_layer: Activation, a class or its name.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        act_layer: str | type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        act_layer = activation(act_layer)
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


class VGGCifar(nn.Module):
    """VGG-16 for images of 32 px: 13 convolutions of 3 x 3 with BatchNorm, five max-poolings, one
    linear layer.

    The network of Li et al. (2017) and of the neuron merging paper, after Simonyan and Zisserman
    (2015), configuration D.

    Args:
        num_classes: Outputs.
        in_chans: Image channels.
        act_layer: Activation, a class or its name: "tanh", "softsign", "elu", "selu", "leaky_relu",
            "hardswish", ...
    """

    LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, act_layer: str | type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        act = activation(act_layer)
        layers: list[nn.Module] = []
        for width in self.LAYERS:
            if width:
                layers += [
                    nn.Conv2d(in_chans, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    act(),
                ]
                in_chans = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """He et al. (2015): normal with variance ``2 / fan_out`` for convolutions."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` with H and W of at least 32 to logits ``[B, num_classes]``."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; tensor names as in the published weights.

    Args:
        inside: Input channels.
        width: Output channels.
        stride: Of the first convolution.
        shortcut: "A": every second pixel and zero channels, no weights; "B": a 1 x 1 convolution
            with BatchNorm.
    """

    def __init__(self, inside: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != width:
            if shortcut == "A":
                self.shortcut = PadShortcut(stride, width - inside)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inside, H, W]`` to ``[B, width, H / stride, W / stride]``."""
        out = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(out)) + self.shortcut(x))


class PadShortcut(nn.Module):
    """He et al.'s option A: the identity at every ``stride``-th pixel, padded with zero channels,
    half of them in front.
    """

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C + more, H / stride, W / stride]``."""
        front = self.more // 2
        return F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.more - front)
        )


class ResNetCifar(nn.Module):
    """The CIFAR ResNets of He et al. (2016), section 4.2: ``6n + 2`` layers of 16, 32 and 64
    channels.

    Args:
        blocks: n, residual blocks per stage.
        shortcut: "A" (as published) or "B" (1 x 1 convolutions where the shape changes).
        num_classes: Outputs.
        in_chans: Image channels.
    """

    def __init__(
        self, blocks: int, shortcut: str = "A", num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' or 'B', not {shortcut!r}")
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        inside = 16
        for stage, width in enumerate((16, 32, 64), 1):
            layers = []
            for block in range(blocks):
                layers.append(
                    CifarBlock(inside, width, 2 if stage > 1 and block == 0 else 1, shortcut)
                )
                inside = width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """He et al. (2015): normal with variance ``2 / fan_in`` for convolutions and the linear
        layer.
        """
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        x = self.act1(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        return self.linear(self.pool(x).flatten(1))


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
    """Sigmoid MLP of Sharma, Wolfe and Raj (2017): one hidden layer of 100 units unless ``widths``
    says otherwise.
    """
    kwargs = {"widths": (100,), "act_layer": nn.Sigmoid, **kwargs}
    return build_model_with_cfg(MLP, "mlp_sigmoid", pretrained, **kwargs)


@register_model
def vgg16_cifar(pretrained: bool = False, **kwargs: Any) -> VGGCifar:
    """VGG-16 for 32 px with BatchNorm and one linear layer; ``act_layer`` sets its activation."""
    return build_model_with_cfg(VGGCifar, "vgg16_cifar", pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """CIFAR ResNet with 20 layers (He et al. 2016); ``shortcut`` is "A" or "B"."""
    return build_model_with_cfg(
        ResNetCifar, "resnet20_cifar", pretrained, **{"blocks": 3, **kwargs}
    )


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """CIFAR ResNet with 56 layers (He et al. 2016); ``shortcut`` is "A" or "B"."""
    return build_model_with_cfg(
        ResNetCifar, "resnet56_cifar", pretrained, **{"blocks": 9, **kwargs}
    )


@register_model
def mobilenetv1_100_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's mobilenetv1_100 for 32 px: the stem keeps the resolution, so that the last layers see
    2 x 2 pixels.
    """
    return _for_32_px("mobilenetv1_100", pretrained, kwargs, unstrided=1)


@register_model
def mobilenetv1_025_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """``mobilenetv1_100_cifar`` with a quarter of the channels in each layer, the classifier's 256
    inputs included.
    """
    # timm registers no such width; its constructor of all widths is private
    build = partial(_gen_mobilenet_v1, "mobilenetv1_100", 0.25)
    return _for_32_px("mobilenetv1_025", pretrained, kwargs, unstrided=1, build=build)


@register_model
def mobilenetv2_100_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's mobilenetv2_100 for 32 px: stem and first stage keep the resolution, so that the last
    layers see 4 x 4 pixels.
    """
    return _for_32_px("mobilenetv2_100", pretrained, kwargs, unstrided=2)


def _for_32_px(
    name: str,
    pretrained: bool,
    kwargs: dict[str, Any],
    *,
    unstrided: int,
    build: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """A timm network whose first strided convolutions are not strided; its weights have the same
    names and shapes.
    """
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("pretrained")}
    if pretrained:
        raise ValueError(f"no weights are published for the 32 px variant of {name}")
    build = build or partial(timm.create_model, name)
    model: Any = build(**{"num_classes": 10, **kwargs})
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    for layer in strided[:unstrided]:
        layer.stride = (1, 1)
    model.pretrained_cfg = model.default_cfg = default_cfgs[f"{name}_cifar"].default.to_dict()
    return model
