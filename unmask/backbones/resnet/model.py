"""Residual networks for small images: bottlenecks (v1.5), a 3 x 3 stem without stride. He et al., CVPR 2016, arXiv:1512.03385.

Parameters have torchvision's names. For large images there are timm's (``timm/resnet50``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unmask.config import Config, Field, validated
from unmask.contracts import Encoder
from unmask.draw import Draw
from unmask.errors import UserError, nearest

SIZES: dict[str, dict[str, Any]] = {
    "resnet_nano": {"stem": 32, "widths": (16, 32, 64), "layers": (1, 1, 1)},
    "resnet_micro": {"stem": 16, "widths": (8, 16, 32), "layers": (1, 1, 1)},
}
EXPANSION = 4


class ResNet(Encoder):
    """A stem and stages of bottlenecks; every stage after the first halves the map."""

    class Config(Config):
        image_size: int | tuple[int, int] = Field(32, description="pixels; any size works, this one is assumed")
        in_channels: int = Field(3, ge=1)
        stem: int = Field(32, ge=1, description="width of the first convolution")
        widths: tuple[int, ...] = Field(
            (16, 32, 64), description="inner widths of the stages; maps have four times as many"
        )
        layers: tuple[int, ...] = Field((1, 1, 1), description="blocks of each stage")

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if len(c.widths) != len(c.layers) or not c.widths or min(c.layers) < 1 or min(c.widths) < 1:
            raise UserError(
                f"resnet: widths={list(c.widths)} and layers={list(c.layers)} must name the same stages, all above 0"
            )
        size = c.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.in_channels, self.embed_dim = c.in_channels, EXPANSION * c.widths[-1]
        self.map_dims = tuple(EXPANSION * w for w in c.widths)
        self.strides = tuple(2**i for i in range(len(c.widths)))
        self.patch_size = (self.strides[-1],) * 2
        self.num_layers = 1 + sum(c.layers)
        self.conv1 = nn.Conv2d(c.in_channels, c.stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c.stem)
        channels = c.stem
        for stage, (width, count) in enumerate(zip(c.widths, c.layers, strict=True)):
            blocks = []
            for place in range(count):
                blocks.append(Bottleneck(channels, width, 2 if stage and not place else 1))
                channels = EXPANSION * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    @property
    def stages(self) -> list[nn.Module]:
        return [getattr(self, f"layer{i + 1}") for i in range(len(self.strides))]

    def grid(self, size: Sequence[int] | None = None) -> tuple[int, ...]:
        """The last map's places; a convolution takes any size and rounds up."""
        return tuple(-(-s // p) for s, p in zip(tuple(size or self.image_size), self.patch_size, strict=True))

    def tokens(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """The last map as ``[B, N, embed_dim]``."""
        if keep is not None or hidden is not None:
            raise ValueError("a residual network neither drops nor replaces tokens")
        return self.maps(x)[-1].flatten(2).transpose(1, 2)

    def maps(self, x: Tensor, *, draw: Draw | None = None) -> list[Tensor]:
        x = torch.relu(self.bn1(self.conv1(x)))
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def layer_of(self, parameter: str) -> int:
        found = re.match(r"layer(\d+)\.(\d+)\.", parameter)
        return 1 + sum(self.config.layers[: int(found[1]) - 1]) + int(found[2]) if found else 0

    def blocks_to_compile(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.children()]


class Bottleneck(nn.Module):
    """1 x 1 down, 3 x 3 (with the stride), 1 x 1 up, and the shortcut."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        out = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def build(name: str, **options: Any) -> ResNet:
    """``resnet_nano`` or ``resnet_micro``; any option of :class:`ResNet.Config`."""
    if name not in SIZES:
        raise UserError(f"no backbone {name!r}: {nearest(name, SIZES)}")
    return ResNet(validated(ResNet.Config, {**SIZES[name], **options}, where=f"backbone {name}"))
