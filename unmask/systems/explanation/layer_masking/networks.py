"""The layers and blocks that fixtures are made of, from torchvision's own classes, so that names and forwards are its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import efficientnet, mobilenetv3
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.squeezenet import Fire
from torchvision.ops.misc import SqueezeExcitation

from unmask.errors import UserError


def convolution(c: Mapping[str, Any]) -> nn.Conv2d:
    return nn.Conv2d(
        c["in"],
        c["out"],
        c["kernel"],
        c.get("stride", 1),
        c.get("padding", 0),
        c.get("dilation", 1),
        c.get("groups", 1),
        c.get("bias", True),
    )


def norm(channels: int, c: Mapping[str, Any]) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=c.get("eps", 1e-5))


def pool(kind: type[nn.MaxPool2d] | type[nn.AvgPool2d], c: Mapping[str, Any]) -> nn.Module:
    return kind(c.get("kernel", 2), c.get("stride"), c.get("padding", 0))


def blocks(config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The blocks that a config describes, by name."""
    makers = {
        "dense": dense,
        "inverted_residual": inverted_residual,
        "fire": fire,
        "mbconv": mbconv,
        "alex_stack": alex_stack,
    }
    eps = config.get("batchnorm_eps", 1e-5)
    return {name: make(config[name], eps) for name, make in makers.items() if name in config}


def dense(c: Mapping[str, Any], eps: float) -> nn.Module:
    """A dense block, and a transition (to half its channels, where the config does not say)."""
    block = _DenseBlock(c["layers"], c["in"], c["bn_size"], c["growth"], drop_rate=0.0)
    width = c["in"] + c["layers"] * c["growth"]
    told = re.search(r"-> ?(\d+)", str(c.get("then", "")))
    return _with_eps(nn.Sequential(block, _Transition(width, int(told[1]) if told else width // 2)), eps)


def inverted_residual(c: Mapping[str, Any], eps: float) -> nn.Module:
    """MobileNetV3's."""
    settings = mobilenetv3.InvertedResidualConfig(
        c["in"],
        c["kernel"],
        c["expanded"],
        c["out"],
        c.get("squeeze_excitation", True),
        "HS" if c.get("activation", "hardswish") == "hardswish" else "RE",
        c.get("stride", 1),
        c.get("dilation", 1),
        1.0,
    )
    gate = partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid)
    return mobilenetv3.InvertedResidual(settings, partial(nn.BatchNorm2d, eps=eps), gate)


def mbconv(c: Mapping[str, Any], eps: float) -> nn.Module:
    """EfficientNet's."""
    settings = efficientnet.MBConvConfig(c["expand_ratio"], c["kernel"], c.get("stride", 1), c["in"], c["out"], 1)
    return efficientnet.MBConv(settings, c.get("stochastic_depth", 0.0), partial(nn.BatchNorm2d, eps=eps))


def fire(c: Mapping[str, Any], eps: float) -> nn.Module:
    return Fire(c["in"], c["squeeze"], c["expand1x1"], c["expand3x3"])


def alex_stack(c: Any, eps: float) -> nn.Module:
    """Layers of AlexNet's kind from a sentence: ``conv 5 pad 2 (8->6), relu, maxpool 3/2, adaptive average pool to 2x2``. Raises
    ``UserError`` for a step that it does not know."""
    layers: list[nn.Module] = []
    for step in str(c).split(", "):
        words = step.partition(" (as ")[0].partition(" (AlexNet")[0].strip()
        if found := re.match(r"conv (\d+)(?: stride (\d+))?(?: pad (\d+))? \((\d+) ?-> ?(\d+)\)", words):
            kernel, stride, padding, inside, out = (int(v) if v else None for v in found.groups())
            layers.append(nn.Conv2d(inside or 1, out or 1, kernel or 1, stride or 1, padding or 0))
        elif words == "relu":
            layers.append(nn.ReLU())
        elif found := re.match(r"maxpool (\d+)/(\d+)(?: pad (\d+))?", words):
            layers.append(nn.MaxPool2d(int(found[1]), int(found[2]), int(found[3] or 0)))
        elif found := re.match(r"adaptive average pool to (\d+)x(\d+)", words):
            layers.append(nn.AdaptiveAvgPool2d((int(found[1]), int(found[2]))))
            break  # what follows is prose
        else:
            raise UserError(f"no layer is described by {step!r}")
    return nn.Sequential(*layers)


def _with_eps(module: nn.Module, eps: float) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = eps
    return module


class SmallResNet(nn.Module):
    """torchvision's ResNet (v1.5: the stride is in the 3 x 3 convolution) with any widths and any number of stages."""

    def __init__(
        self,
        stem_width: int,
        widths: list[int],
        layers: list[int],
        classes: int,
        expansion: int = 4,
        groups: int = 1,
        width_per_group: int = 64,
        eps: float = 1e-5,
    ):
        super().__init__()
        block: Any = BasicBlock if expansion == 1 else Bottleneck
        self.conv1 = nn.Conv2d(3, stem_width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, self.depth = stem_width, len(widths)
        for i, (width, count) in enumerate(zip(widths, layers, strict=True)):
            stride, out = 1 if i == 0 else 2, width * expansion
            stage = []
            for place in range(count):
                step = stride if place == 0 else 1
                shortcut = None
                if step != 1 or channels != out:
                    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, step, bias=False), nn.BatchNorm2d(out))
                stage.append(block(channels, width, step, shortcut, groups, width_per_group))
                channels = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        _with_eps(self, eps)

    @classmethod
    def described(cls, c: Mapping[str, Any]) -> SmallResNet:
        return cls(
            c["stem_width"],
            list(c["widths"]),
            list(c["layers"]),
            c["num_classes"],
            c.get("expansion", 4),
            c.get("groups", 1),
            c.get("width_per_group", 64),
            c.get("batchnorm_eps", 1e-5),
        )

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def stages(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = getattr(self, f"layer{i + 1}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.stages(self.stem(x))).flatten(1))
