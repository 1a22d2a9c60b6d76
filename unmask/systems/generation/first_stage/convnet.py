"""The small convolutional encoder and decoder that our tokenizer and autoencoder share.

Each further multiplier halves the picture: ``(1, 2, 2)`` makes cells of 4 x 4 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """norm, SiLU, 3 x 3, twice; the shortcut is 1 x 1 where the width changes."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class PictureEncoder(nn.Module):
    """``[B, C, H, W]`` to ``[B, out, H / f, W / f]`` with f = 2^(len(multipliers) - 1)."""

    def __init__(self, channels: int, width: int, multipliers: Sequence[int], blocks: int, out_channels: int):
        super().__init__()
        here = width * multipliers[0]
        layers: list[nn.Module] = [nn.Conv2d(channels, here, 3, padding=1)]
        for level, multiplier in enumerate(multipliers):
            if level:
                layers.append(nn.Conv2d(here, here, 3, stride=2, padding=1))
            for _ in range(blocks):
                layers.append(ResidualBlock(here, width * multiplier))
                here = width * multiplier
        self.layers = nn.Sequential(*layers, _norm(here), nn.SiLU(), nn.Conv2d(here, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PictureDecoder(nn.Module):
    """The way back: ``[B, in, h, w]`` to ``[B, C, H, W]``, without an activation at the end."""

    def __init__(self, channels: int, width: int, multipliers: Sequence[int], blocks: int, in_channels: int):
        super().__init__()
        here = width * multipliers[-1]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, here, 3, padding=1)]
        for level, multiplier in enumerate(reversed(multipliers)):
            if level:
                layers += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(here, here, 3, padding=1)]
            for _ in range(blocks):
                layers.append(ResidualBlock(here, width * multiplier))
                here = width * multiplier
        self.layers = nn.Sequential(*layers, _norm(here), nn.SiLU(), nn.Conv2d(here, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
