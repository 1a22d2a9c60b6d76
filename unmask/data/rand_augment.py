"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) for a batch, with timm's fifteen operations and scales.

Every sample goes through ``layers`` operations of its own. The loop is over the operations: each takes all samples that
chose it at once. Geometric operations sample bilinearly (timm draws bilinear or bicubic).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.data.color import brightness, contrast, saturation, sharpness
from unmask.data.settings import RandAugmentSettings
from unmask.draw import Draw

SCALE = 10.0  # magnitudes are out of ten
Operation = Callable[[Tensor, Tensor, Tensor, bool, Tensor], Tensor]


def rand_augment(
    images: Tensor, draw: Draw, settings: RandAugmentSettings, fill: Sequence[float] | None = None
) -> Tensor:
    """Images float ``[B, C, H, W]`` in [0, 1], with one or three channels; returns the same.

    fill: what moves in from outside, for each channel (default: 128 / 255). Draws ``rand_augment.choice``, ``.apply``,
    ``.magnitude`` and ``.sign``, on the CPU, so that which samples an operation takes is known without asking the device.
    """
    shape = (len(images), settings.layers)
    choice = draw.integers("rand_augment.choice", 0, len(OPERATIONS), shape)
    applied = draw.uniform("rand_augment.apply", shape) < settings.probability
    if math.isinf(settings.magnitude_std):
        magnitude = settings.magnitude * draw.uniform("rand_augment.magnitude", shape)
    else:
        magnitude = settings.magnitude + settings.magnitude_std * draw.normal("rand_augment.magnitude", shape)
    magnitude = magnitude.clamp(0, SCALE) / SCALE
    sign = torch.where(draw.uniform("rand_augment.sign", shape) > 0.5, -1.0, 1.0)
    outside = torch.tensor(list(fill) if fill is not None else [128 / 255] * images.shape[1]).to(images)
    images = images.clamp(0, 1)
    for layer in range(settings.layers):
        for number, operation in enumerate(OPERATIONS.values()):
            rows = ((choice[:, layer] == number) & applied[:, layer]).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            level = magnitude[rows, layer].to(images.device, non_blocking=True)
            way = sign[rows, layer].to(images.device, non_blocking=True)
            rows = rows.to(images.device, non_blocking=True)
            images[rows] = operation(images[rows], level, way, settings.increasing, outside)
    return images


# --- the scales: what a magnitude (0 ... 1) and a sign mean -------------------------------------------------------


def _enhancement(level: Tensor, sign: Tensor, increasing: bool) -> Tensor:
    return (1 + sign * level * 0.9).clamp(min=0.1) if increasing else level * 1.8 + 0.1


def _bits(level: Tensor, increasing: bool) -> Tensor:
    kept = (level * 4).floor()
    return 4 - kept if increasing else kept


def _threshold(level: Tensor, increasing: bool) -> Tensor:
    value = (level * 256).floor().clamp(max=256)
    return (256 - value if increasing else value)[:, None, None, None]


# --- the operations -----------------------------------------------------------------------------------------------


def auto_contrast(images: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; a constant one stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (images - low) / span.clamp(min=1e-12), images)


def equalize(images: Tensor) -> Tensor:
    """Each channel's histogram of 256 levels flattened, as Pillow does."""
    batch, channels, height, width = images.shape
    levels = (images * 255).round().clamp(0, 255).to(torch.int64).reshape(batch * channels, -1)
    histogram = torch.zeros(batch * channels, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    highest = levels.amax(dim=1, keepdim=True)
    step = (height * width - histogram.gather(1, highest)) // 255
    before = histogram.cumsum(dim=1) - histogram
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    flat = (table.gather(1, levels).to(images.dtype) / 255).reshape(images.shape)
    return torch.where((step == 0).reshape(batch, channels, 1, 1), images, flat)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Only the highest ``bits`` (``[B]``) of eight kept."""
    step = 2 ** (8 - bits)[:, None, None, None]
    return ((images * 255).round() / step).floor() * step / 255


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Levels from ``threshold`` (of 256) on inverted."""
    return torch.where((images * 255).round() < threshold, images, 1 - images)


def affine(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Output pixel (x, y) shows the input at ``matrix @ (x, y, 1)``, pixels counted from the upper left corner, centres
    at halves, as in Pillow. matrix: ``[B, 2, 3]``. fill: ``[C]``, shown where that lies outside."""
    batch, _, height, width = images.shape
    x = torch.arange(width, device=images.device, dtype=torch.float32) + 0.5
    y = torch.arange(height, device=images.device, dtype=torch.float32) + 0.5
    place = torch.stack(
        (x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width, device=x.device))
    )
    source = torch.einsum("bij,jhw->bhwi", matrix.to(torch.float32), place)
    size = torch.tensor([width, height], dtype=torch.float32).to(images.device, non_blocking=True)
    inside = ((source >= 0) & (source < size)).all(dim=-1)[:, None]
    grid = source * (2 / size) - 1
    moved = F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside, moved, fill[:, None, None])


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
    return torch.stack((a, b, c, d, e, f), dim=1).reshape(-1, 2, 3)


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """``[B, 2, 3]``: counter-clockwise about the centre."""
    angle = torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return _matrix(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _moved(images: Tensor, fill: Tensor, **entries: Tensor) -> Tensor:
    zero = torch.zeros(len(images), device=images.device)
    names = {"a": zero + 1, "b": zero, "c": zero, "d": zero, "e": zero + 1, "f": zero, **entries}
    return affine(images, _matrix(*names.values()), fill)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda x, level, sign, inc, fill: auto_contrast(x),
    "Equalize": lambda x, level, sign, inc, fill: equalize(x),
    "Invert": lambda x, level, sign, inc, fill: 1 - x,
    "Rotate": lambda x, level, sign, inc, fill: affine(x, rotation(sign * level * 30, x.shape[2], x.shape[3]), fill),
    "Posterize": lambda x, level, sign, inc, fill: posterize(x, _bits(level, inc)),
    "Solarize": lambda x, level, sign, inc, fill: solarize(x, _threshold(level, inc)),
    "SolarizeAdd": lambda x, level, sign, inc, fill: torch.where(
        (x * 255).round() < 128, (x + ((level * 110).floor().clamp(max=128) / 255)[:, None, None, None]).clamp(max=1), x
    ),
    "Color": lambda x, level, sign, inc, fill: saturation(x, _enhancement(level, sign, inc)),
    "Contrast": lambda x, level, sign, inc, fill: contrast(x, _enhancement(level, sign, inc)),
    "Brightness": lambda x, level, sign, inc, fill: brightness(x, _enhancement(level, sign, inc)),
    "Sharpness": lambda x, level, sign, inc, fill: sharpness(x, _enhancement(level, sign, inc)),
    "ShearX": lambda x, level, sign, inc, fill: _moved(x, fill, b=sign * level * 0.3),
    "ShearY": lambda x, level, sign, inc, fill: _moved(x, fill, d=sign * level * 0.3),
    "TranslateX": lambda x, level, sign, inc, fill: _moved(x, fill, c=sign * level * 0.45 * x.shape[3]),
    "TranslateY": lambda x, level, sign, inc, fill: _moved(x, fill, f=sign * level * 0.45 * x.shape[2]),
}
