"""Where to crop: boxes for a batch at once, from draws. A box is (top, left, height, width) in pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unmask.draw import Draw

ATTEMPTS = 10


def random_boxes(sizes: Tensor, draw: Draw, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """int64 ``[B, 4]``: torchvision's RandomResizedCrop (Inception's), all samples at once.

    Ten attempts at an area share uniform in ``scale`` and a width / height log-uniform in ``ratio``; the first that fits,
    else the largest central box within ``ratio``. sizes: int64 ``[B, 2]``, (height, width). Draws ``crop.shape`` and
    ``crop.place``.
    """
    device, count = sizes.device, len(sizes)
    height, width = sizes[:, :1].to(torch.float32), sizes[:, 1:].to(torch.float32)
    shape = draw.uniform("crop.shape", (count, ATTEMPTS, 2), device=device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * shape[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * shape[..., 1]).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first), h.gather(1, first)
    # the central fallback: the whole image, cut to the nearest allowed ratio
    own = width / height
    fallback_w = torch.where(own > ratio[1], (height * ratio[1]).round(), width).clamp(min=1)
    fallback_h = torch.where(own < ratio[0], (width / ratio[0]).round(), height).clamp(min=1)
    some = fits.any(dim=1, keepdim=True)
    w = torch.where(some, w, torch.minimum(fallback_w, width))
    h = torch.where(some, h, torch.minimum(fallback_h, height))
    place = draw.uniform("crop.place", (count, 2), device=device)
    top = torch.where(some, (place[:, :1] * (height - h + 1)).floor(), ((height - h) / 2).floor())
    left = torch.where(some, (place[:, 1:] * (width - w + 1)).floor(), ((width - w) / 2).floor())
    # float32 may round u * (n + 1) up to n + 1
    top, left = torch.minimum(top, height - h), torch.minimum(left, width - w)
    return torch.cat((top, left, h, w), dim=1).to(torch.int64)


def shifted(images: Tensor, draw: Draw, padding: int) -> Tensor:
    """Random crops of the images' own size after reflecting ``padding`` pixels at each border (CIFAR's habit).

    images: ``[B, C, H, W]``. Draws ``shift``.
    """
    if padding == 0:
        return images
    count, _, height, width = images.shape
    offset = draw.integers("shift", -padding, padding + 1, (count, 2), device=images.device)
    rows = _mirrored(torch.arange(height, device=images.device)[None] + offset[:, :1], height)
    columns = _mirrored(torch.arange(width, device=images.device)[None] + offset[:, 1:], width)
    batch = torch.arange(count, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices beyond a border reflected back in, without repeating the border pixel."""
    if size == 1:
        return torch.zeros_like(index)
    period = 2 * (size - 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def flipped(images: Tensor, draw: Draw, probability: float) -> Tensor:
    """Each image mirrored left to right with the given probability. Draws ``flip``."""
    if probability == 0:
        return images
    chosen = draw.uniform("flip", (len(images),), device=images.device) < probability
    if images.device.type == "cpu":  # where only the chosen ones need be touched
        out = images.clone()
        rows = chosen.nonzero().squeeze(1)
        out[rows] = images[rows].flip(-1)
        return out
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)
