"""Changes of colour for a batch, each sample with its own strength. Images are float ``[B, C, H, W]`` in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.draw import Draw, permutation

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow turns colour to grey


def _each(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]


def blend(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    """``first + factor * (second - first)``, clipped: 0 gives first, 1 second, more goes beyond. factor: ``[B]``."""
    return (first + _each(factor) * (second - first)).clamp(0, 1)


def luma(images: Tensor) -> Tensor:
    """``[B, 1, H, W]`` of three channels."""
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def grey(images: Tensor) -> Tensor:
    """``[B, 1, H, W]``: luma of three channels, else the mean of the channels."""
    if images.shape[1] == 3:
        return luma(images)
    return images.mean(dim=1, keepdim=True)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """0 is black, 1 the image."""
    return (images * _each(factor)).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """0 is the mean grey, 1 the image."""
    return blend(grey(images).mean(dim=(1, 2, 3), keepdim=True), images, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """0 is grey, 1 the image; images without three channels stay as they are."""
    return blend(grey(images), images, factor) if images.shape[1] == 3 else images


_SMOOTH = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """0 is smoothed (Pillow's SMOOTH; the border stays), 1 the image, more is sharper."""
    if min(images.shape[2:]) < 3:
        return images
    kernel = _SMOOTH.to(images).expand(images.shape[1], 1, 3, 3)
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(images, kernel, groups=images.shape[1])
    return blend(smooth, images, factor)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Hue turned by ``turn`` of a full circle, ``[B]`` in [-0.5, 0.5]; images without three channels stay."""
    if images.shape[1] != 3:
        return images
    high, low = images.amax(dim=1), images.amin(dim=1)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    red, green, blue = images.unbind(dim=1)
    sixth = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = (sixth + 6 * turn[:, None, None]).remainder(6)
    # every channel is a trapezium over the hue circle
    offset = images.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    k = (offset + sixth[:, None]).remainder(6)
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


_KINDS = (brightness, contrast, saturation, hue)


def color_jitter(images: Tensor, draw: Draw, strength: tuple[float, float, float, float]) -> Tensor:
    """torchvision's ColorJitter for a batch: brightness, contrast, saturation uniform in [1 - s, 1 + s], hue in [-s, s],
    in an order of its own for each sample. Draws ``color_jitter.order`` and ``color_jitter.strength``."""
    # Drawn on the CPU, so that which samples an operation takes is known without asking the device.
    order = permutation(draw, "color_jitter.order", (len(images), 4)).tolist()
    uniform = draw.uniform("color_jitter.strength", (len(images), 4))
    images = images.clone()
    for place in range(4):
        for kind, (function, s) in enumerate(zip(_KINDS, strength, strict=True)):
            chosen = [i for i, o in enumerate(order) if o[place] == kind]
            if s == 0 or not chosen:
                continue
            low, high = (-s, s) if function is hue else (max(0.0, 1 - s), 1 + s)
            rows = torch.tensor(chosen)
            factor = (low + (high - low) * uniform[rows, kind]).to(images.device, non_blocking=True)
            rows = rows.to(images.device, non_blocking=True)
            images[rows] = function(images[rows], factor)
    return images
