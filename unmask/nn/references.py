"""Trivial predictors of hidden pixels: what a loss must beat to mean anything.

Each takes standardised images ``[B, C, H, W]`` and ``hidden [B, 1, H, W]`` (True = hidden) and returns images whose hidden
pixels are filled from the visible ones of the same image.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F


def fill_mean(images: Tensor, hidden: Tensor) -> Tensor:
    """Every hidden pixel gets the mean of the image's visible pixels, channel by channel."""
    seen = (~hidden).to(images.dtype)
    mean = (images * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(hidden, mean, images)


def fill_nearest_patch(images: Tensor, hidden: Tensor, patch: tuple[int, int]) -> Tensor:
    """Every hidden patch becomes a copy of the nearest visible one (Euclidean distance on the grid; of equals the first)."""
    from unmask.nn.patch import patchify, select, unpatchify

    grid = (images.shape[2] // patch[0], images.shape[3] // patch[1])
    hid = hidden[:, 0, :: patch[0], :: patch[1]].flatten(1)
    far = _distances(grid).to(images.device)
    nearest = far.masked_fill(hid[:, None], torch.inf).argmin(dim=2)  # [B, N, N] -> [B, N]; a visible patch is its own
    return unpatchify(select(patchify(images, patch), nearest), grid, patch)


def fill_bilinear(images: Tensor, hidden: Tensor) -> Tensor:
    """A smooth fill: visible pixels are averaged in a pyramid of halved images, and holes are filled from the level above,
    enlarged bilinearly (the pull-push scheme of Gortler et al. 1996, "The Lumigraph", section 3.4)."""
    weight = (~hidden).to(images.dtype)
    levels = [(images * weight, weight)]
    while max(levels[-1][0].shape[2:]) > 1:
        value, seen = levels[-1]
        odd = [s % 2 for s in value.shape[2:]]
        value, seen = (F.pad(t, (0, odd[1], 0, odd[0])) for t in (value, seen))
        levels.append((F.avg_pool2d(value, 2) * 4, F.avg_pool2d(seen, 2) * 4))
    fill = levels[-1][0] / levels[-1][1].clamp(min=1)
    for value, seen in reversed(levels[:-1]):
        up = F.interpolate(fill, size=value.shape[2:], mode="bilinear", align_corners=False)
        fill = torch.where(seen > 0, value / seen.clamp(min=1), up)
    return fill


@functools.lru_cache(maxsize=16)
def _distances(grid: tuple[int, int]) -> Tensor:
    place = torch.cartesian_prod(*(torch.arange(g, device="cpu") for g in grid)).float()
    return torch.cdist(place, place)


def fills(images: Tensor, hidden: Tensor, patch: tuple[int, int]) -> dict[str, Tensor]:
    """All three, by the words a report prints."""
    return {
        "mean of the visible": fill_mean(images, hidden),
        "nearest visible patch": fill_nearest_patch(images, hidden, patch),
        "bilinear fill": fill_bilinear(images, hidden),
    }
