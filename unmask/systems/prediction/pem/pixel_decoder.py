"""PEM's pixel decoder: a top-down pyramid with context from the image's mean, channel modulation, and deformable convolutions
(section 3.2 and figure 3 of the paper).

Legend: maps ``x4 ... x32`` at strides 4 ... 32; C ``conv_dim``; M ``mask_dim``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.nn.norm import norm_of_maps
from unmask.systems.prediction.pem.deformable import deformable_convolution


class ConvNorm(nn.Module):
    """Convolution without bias, norm, ReLU."""

    def __init__(self, inside: int, outside: int, norm: str, *, pooled: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 1, bias=False)
        self.norm = norm_of_maps(norm, outside, pooled=pooled)
        nn.init.kaiming_normal_(self.conv.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Modulation(nn.Module):
    """Context-based self-modulation: ``x + x s``, s a weight a channel from the map's mean.

    The authors' code squashes s by two sigmoids one after the other, so that it lies in 0.5 ... 0.73; so does this.
    """

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.norm = norm_of_maps(norm, channels // 2, pooled=True)
        self.expand = nn.Conv2d(channels // 2, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        share = self.expand(torch.relu(self.norm(self.reduce(mean)))).sigmoid().sigmoid()
        return x * (1 + share)


class Refinement(nn.Module):
    """A modulated deformable 3 x 3 convolution, and a transposed one that doubles its result: ``(y, up)``.

    deformable: False makes the first a plain convolution with the same weights.
    """

    def __init__(self, channels: int, norm: str, *, deformable: bool = True):
        super().__init__()
        self.offset = nn.Conv2d(channels, 27, 3, padding=1) if deformable else None
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = norm_of_maps(norm, channels)
        self.up = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False)
        self.up_norm = norm_of_maps(norm, channels)
        if self.offset is not None:  # starts as a plain convolution at half strength
            nn.init.zeros_(self.offset.weight)
            nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
        with torch.no_grad():  # a bilinear kernel from the first channel alone, as the authors' code leaves it
            self.up.weight[:, 0] = ramp[:, None] * ramp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.norm(self.convolved(x)))
        return y, torch.relu(self.up_norm(self.up(y)))

    def convolved(self, x: Tensor) -> Tensor:
        if self.offset is None:
            return self.conv(x)
        moved = self.offset(x)
        with torch.autocast(device_type=x.device.type, enabled=False):  # its kernels take one dtype
            moved, x = moved.float(), x.float()
            return deformable_convolution(x, moved[:, :18], moved[:, 18:].sigmoid(), self.conv.weight.float())


class PixelDecoder(nn.Module):
    """Four maps -> mask features ``[B, M, H/4, W/4]`` and memories ``[x32, x16, x8]``, each ``[B, C, h, w]``.

    map_dims: channels of the four maps, finest first. modulate: with context-based self-modulation.
    """

    def __init__(
        self,
        map_dims: tuple[int, ...],
        conv_dim: int,
        mask_dim: int,
        *,
        norm: str = "bn",
        modulate: bool = True,
        deformable: bool = True,
    ):
        super().__init__()
        self.projections = nn.ModuleList(ConvNorm(dim, conv_dim, norm) for dim in map_dims)
        self.context = ConvNorm(map_dims[-1], conv_dim, norm, pooled=True)
        self.modulations = nn.ModuleList(
            Modulation(conv_dim, norm) if modulate else nn.Identity() for _ in map_dims
        )  # coarsest first
        self.refinements = nn.ModuleList(Refinement(conv_dim, norm, deformable=deformable) for _ in range(3))
        self.out = ConvNorm(conv_dim, mask_dim, norm)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        carried = self.context(maps[-1].mean(dim=(2, 3), keepdim=True))
        memories: list[Tensor] = []
        for place, (x, projection) in enumerate(
            zip(reversed(maps), reversed(list(self.projections)), strict=True)  # coarsest first
        ):
            x = self.modulations[place](projection(x)) + carried
            if place == 3:
                return self.out(x), memories
            refined, carried = self.refinements[place](x)
            memories.append(refined)
        raise ValueError("a pixel decoder takes four maps")


def resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned; ``[B, M, h, w]`` -> ``[B, M, *size]``."""
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)
