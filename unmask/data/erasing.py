"""Random erasing (Zhong et al. 2017, arXiv:1708.04896) for a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unmask.draw import Draw

ATTEMPTS = 10


def erased(
    images: Tensor,
    draw: Draw,
    probability: float,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    mode: str = "pixel",
) -> Tensor:
    """One rectangle of each chosen image replaced; timm's rule for its shape and place.

    images: standardised float ``[B, C, H, W]``. mode: "pixel" normal noise, "rand" one normal colour, "const" zero. The
    noise is one field a step, of which each rectangle shows its part. Draws ``erase.apply``, ``.shape``, ``.place``,
    ``.noise``.
    """
    count, channels, height, width = images.shape
    device = images.device
    shape = draw.uniform("erase.shape", (count, ATTEMPTS, 2), device=device)
    size = height * width * (area[0] + (area[1] - area[0]) * shape[..., 0])
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = (low + (high - low) * shape[..., 1]).exp()
    h, w = (size * ratio).sqrt().round(), (size / ratio).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    place = draw.uniform("erase.place", (count, 2), device=device)
    top, left = (place[:, :1] * (height - h + 1)).floor(), (place[:, 1:] * (width - w + 1)).floor()
    chosen = (draw.uniform("erase.apply", (count,), device=device) < probability) & fits.any(dim=1)
    y, x = torch.arange(height, device=device)[None], torch.arange(width, device=device)[None]
    rows, columns = (y >= top) & (y < top + h), (x >= left) & (x < left + w)
    inside = rows[:, None, :, None] & columns[:, None, None, :] & chosen[:, None, None, None]
    if mode == "pixel":
        value = draw.normal("erase.noise", (channels, height, width), device=device, shared=True)[None]
    elif mode == "rand":
        value = draw.normal("erase.noise", (count, channels), device=device)[:, :, None, None]
    else:
        value = torch.zeros(1, device=device)
    return torch.where(inside, value.to(images.dtype), images)
