"""STDC: short-term dense concatenate networks. Fan et al., CVPR 2021, arXiv:2104.13188.

A block computes a chain of convolutions, each half as wide as the one before, and concatenates what all of them found.
Five halvings of the image; maps of the last four. Parameters have the authors' names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unmask.config import Config, Field, validated
from unmask.contracts import Encoder
from unmask.draw import Draw
from unmask.errors import UserError, nearest
from unmask.nn.norm import norm_of_maps

SIZES: dict[str, dict[str, Any]] = {"stdc1": {"layers": (2, 2, 2)}, "stdc2": {"layers": (4, 5, 3)}}


class STDC(Encoder):
    """Two plain convolutions, then three stages of blocks that concatenate; no residual connections."""

    class Config(Config):
        image_size: int | tuple[int, int] = Field(224, description="pixels; any size works, this one is assumed")
        in_channels: int = Field(3, ge=1)
        base: int = Field(64, ge=2, description="width at stride 4; the stages have 4, 8 and 16 times as much")
        layers: tuple[int, int, int] = Field((2, 2, 2), description="blocks of the stages at strides 8, 16, 32")
        block_num: int = Field(4, ge=2, description="convolutions in a block")
        norm: Literal["bn", "gn"] = Field("bn", description="batch norm, or group norm (for batches of one)")

    strides = (4, 8, 16, 32)
    patch_size = (32, 32)

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        parts = 2 ** (c.block_num - 1)
        if c.base % 2 or (4 * c.base) % parts or min(c.layers) < 1:
            raise UserError(
                f"stdc: base={c.base}, layers={list(c.layers)}, block_num={c.block_num} do not fit: base must be even, "
                f"4 x base divisible by {parts}, every stage at least one block long"
            )
        size = c.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.in_channels, self.embed_dim = c.in_channels, 16 * c.base
        self.map_dims = (c.base, 4 * c.base, 8 * c.base, 16 * c.base)
        blocks: list[nn.Module] = [
            ConvNorm(c.in_channels, c.base // 2, 3, 2, c.norm),
            ConvNorm(c.base // 2, c.base, 3, 2, c.norm),
        ]
        before = c.base
        for stage, depth in enumerate(c.layers):
            width = c.base * 2 ** (stage + 2)
            for place in range(depth):
                blocks.append(CatBottleneck(before, width, c.block_num, 2 if place == 0 else 1, c.norm))
                before = width
        self.features = nn.Sequential(*blocks)
        self.num_layers = len(blocks)
        ends = [2, 2 + c.layers[0], 2 + sum(c.layers[:2]), 2 + sum(c.layers)]
        self.ends = tuple(end - 1 for end in ends)  # the blocks whose outputs are maps
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

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
            raise ValueError("STDC is a convolutional network: it neither drops nor replaces tokens")
        return self.maps(x)[-1].flatten(2).transpose(1, 2)

    def maps(self, x: Tensor, *, draw: Draw | None = None) -> list[Tensor]:
        found = []
        for place, block in enumerate(self.features):
            x = block(x)
            if place in self.ends:
                found.append(x)
        return found

    def layer_of(self, parameter: str) -> int:
        found = re.match(r"features\.(\d+)\.", parameter)
        return int(found[1]) + 1 if found else 0

    def blocks_to_compile(self) -> list[nn.Module]:
        return [block for block in self.features if isinstance(block, CatBottleneck)]


class ConvNorm(nn.Module):
    """Convolution without bias, norm, ReLU."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, norm: str = "bn"):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        self.bn = norm_of_maps(norm, outside)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class CatBottleneck(nn.Module):
    """The short-term dense concatenate module: widths 1/2, 1/4 ... of the output, the last one twice.

    With stride 2 the second convolution sees the first one's output through a depthwise convolution of stride 2, and
    the first one's own share of the result is an average over the same 3 x 3 places.
    """

    def __init__(self, inside: int, outside: int, block_num: int, stride: int, norm: str = "bn"):
        super().__init__()
        widths = [outside // 2 ** (i + 1) for i in range(block_num - 1)]
        widths.append(widths[-1])
        first = ConvNorm(inside, widths[0], 1, norm=norm)
        rest = [ConvNorm(a, b, 3, norm=norm) for a, b in itertools.pairwise(widths)]
        self.conv_list = nn.ModuleList([first, *rest])
        self.avd_layer = self.skip = None
        if stride == 2:
            depthwise = nn.Conv2d(widths[0], widths[0], 3, 2, 1, groups=widths[0], bias=False)
            self.avd_layer = nn.Sequential(depthwise, norm_of_maps(norm, widths[0]))
            self.skip = nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_list[0](x)
        x = first if self.avd_layer is None else self.avd_layer(first)
        found = [first if self.skip is None else self.skip(first)]
        for convolution in self.conv_list[1:]:
            x = convolution(x)
            found.append(x)
        return torch.cat(found, dim=1)


def build(name: str, **options: Any) -> STDC:
    """``stdc1`` or ``stdc2``; any option of :class:`STDC.Config`, and ``weights=FILE`` of the authors'."""
    if name not in SIZES:
        raise UserError(f"no backbone {name!r}: {nearest(name, SIZES)}")
    options = dict(options)
    weights = options.pop("weights", None)
    encoder = STDC(validated(STDC.Config, {**SIZES[name], **options}, where=f"backbone {name}"))
    if weights is not None:
        from unmask.backbones.stdc.official import load_encoder
        from unmask.official.load import read_checkpoint

        load_encoder(encoder, read_checkpoint(weights), where=str(weights))
    return encoder
