"""A pyramid of maps from the one map of a plain vision transformer. Li, Mao, Girshick, He, "Exploring Plain Vision
Transformer Backbones for Object Detection", ECCV 2022, arXiv:2203.16527, section 3.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class MapNorm(nn.Module):
    """LayerNorm over the channels of ``[B, C, h, w]``."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class SimplePyramid(nn.Module):
    """``[B, dim, h, w]`` -> maps at each of ``scales`` times its resolution, finest first: transposed convolutions for 4 and 2,
    the map itself for 1, max pooling below. ``map_dims``: their channels (a quarter, a half, all)."""

    def __init__(self, dim: int, scales: tuple[float, ...] = (4, 2, 1, 0.5)):
        super().__init__()
        self.scales = scales
        self.map_dims = tuple({4: dim // 4, 2: dim // 2}.get(s, dim) for s in scales)  # type: ignore[call-overload]
        self.levels = nn.ModuleList(self._level(dim, scale) for scale in scales)

    @staticmethod
    def _level(dim: int, scale: float) -> nn.Module:
        if scale == 4:
            return nn.Sequential(
                nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                MapNorm(dim // 2),
                nn.GELU(),
                nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
            )
        if scale == 2:
            return nn.ConvTranspose2d(dim, dim // 2, 2, 2)
        return nn.Identity() if scale == 1 else nn.MaxPool2d(round(1 / scale), round(1 / scale))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(x) for level in self.levels]


def pyramid_scales(patch: int) -> tuple[float, ...]:
    """Factors that bring maps of stride ``patch`` to strides 4, 8, 16, 32; four halvings from patch / 4 on where the patch is
    no power of two from 2 to 16."""
    if patch in (2, 4, 8):
        return tuple(patch / stride for stride in (4, 8, 16, 32))
    return (4, 2, 1, 0.5)


def is_pyramid(strides: tuple[int, ...]) -> bool:
    """Whether maps of these strides are four, each half as fine as the one before."""
    return len(strides) == 4 and all(b == 2 * a for a, b in itertools.pairwise(strides))


def padded_to(x: Tensor, multiple: int, value: float = 0.0) -> Tensor:
    """``[..., H, W]`` filled up at the right and below until ``multiple`` divides both sides."""
    height, width = x.shape[-2:]
    down, right = -height % multiple, -width % multiple
    return torch.nn.functional.pad(x, (0, right, 0, down), value=value) if down or right else x
