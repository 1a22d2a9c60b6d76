"""Images and their label maps changed together, a batch at once: resize, crop, colours, flip, padding.

The geometry is drawn once a sample and applied to all of its maps: the image by antialiased bilinear weights, label maps by
the nearest pixel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.contracts import Batch, Preprocessing
from unmask.data.color import hue
from unmask.data.map_settings import SegmentationData
from unmask.data.resize import Window, by_matrices
from unmask.draw import Draw, bernoulli

MAPS = {"map": -1, "segments": 0}  # what is resampled with the image, and what fills it beyond


class MapTransform:
    """For training: a drawn factor, a random crop, SSD's jitter, a flip, padding. For evaluation: resize and padding to
    multiples. Then standardisation."""

    def __init__(self, settings: SegmentationData, preprocessing: Preprocessing):
        self.settings, self.preprocessing = settings, preprocessing
        self.size: tuple[int, int] = (preprocessing.image_size[0], preprocessing.image_size[1])
        self.shortest = settings.shortest_edge or min(self.size)

    def __call__(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> dict[str, Any]:
        images, sizes = batch["image"], batch["size"]
        if not train:
            return self._evaluation(batch, images, sizes)
        if draw is None:
            raise ValueError("a training transform needs a draw")
        s = self.settings
        resized = self._drawn_sizes(sizes, draw)
        size = torch.tensor(self.size, device=sizes.device)
        place = draw.uniform("crop", (len(images), 2), device=images.device)
        start = (place * ((resized - size).clamp(min=0) + 1)).floor().long()
        start = torch.minimum(start, (resized - size).clamp(min=0))
        out = self._moved(batch, resized, start, self.size)
        pixels = out["image"]
        if s.jitter:
            pixels = ssd_jitter(pixels, draw)
        inside = torch.minimum(resized, size)
        flip = bernoulli(draw, "flip", s.flip, (len(images),), device=images.device)
        pixels = self._filled(pixels, inside, s.pad_value)
        # the image's part is mirrored in itself, so that padding stays at the right
        column = torch.arange(self.size[1], device=images.device)[None]
        mirrored = torch.where(flip[:, None] & (column < inside[:, 1:]), inside[:, 1:] - 1 - column, column)
        pixels = _columns(pixels, mirrored)
        for key in MAPS:
            if key in out:
                out[key] = _columns(out[key], mirrored)
        return {**out, "image": self.preprocessing.standardise(pixels), "size": inside}

    def _evaluation(self, batch: Batch, images: Tensor, sizes: Tensor) -> dict[str, Any]:
        s = self.settings
        resized = edges(sizes, s.test_shortest_edge or self.shortest, s.test_longest_edge)
        high, wide = (-(-int(v) // s.divisor) * s.divisor for v in resized.amax(dim=0).tolist())
        out = self._moved(batch, resized, torch.zeros_like(resized), (high, wide))
        pixels = self.preprocessing.standardise(out["image"])
        return {**out, "image": self._filled(pixels, resized, 0.0), "size": resized}

    def _drawn_sizes(self, sizes: Tensor, draw: Draw) -> Tensor:
        """int64 ``[B, 2]``: what each image is resized to."""
        s, device = self.settings, sizes.device
        uniform = draw.uniform("scale", (len(sizes),), device=device)
        factors = s.factors()
        if factors is None:
            factor = s.scale[0] + (s.scale[1] - s.scale[0]) * uniform
        else:
            factor = torch.tensor(factors, device=device)[(uniform * len(factors)).long().clamp(max=len(factors) - 1)]
        return edges(sizes, (factor.double() * self.shortest + 1e-6).floor(), s.longest_edge)

    def _moved(self, batch: Batch, resized: Tensor, start: Tensor, size: tuple[int, int]) -> dict[str, Any]:
        """Every image resized to ``resized``, of which the window of ``size`` from ``start`` is kept. Beyond the image, pixels
        are not numbers yet, and label maps hold what stands for nothing."""
        images, sizes = batch["image"], batch["size"]
        out = {k: v for k, v in batch.items() if k not in MAPS and k != "size"}
        device = images.device
        scale = sizes.double() / resized.double()
        place = [torch.arange(n, device=device)[None] + start[:, axis : axis + 1] for axis, n in enumerate(size)]
        inside = [p < resized[:, axis : axis + 1] for axis, p in enumerate(place)]
        nearest = [
            torch.minimum(((p + 0.5) * scale[:, a : a + 1]).floor().long(), sizes[:, a : a + 1] - 1)
            for a, p in enumerate(place)
        ]
        known = inside[0][:, :, None] & inside[1][:, None, :]
        rows = torch.arange(len(images), device=device)[:, None, None]
        for key, nothing in MAPS.items():
            if key in batch:
                values = batch[key][rows, nearest[0][:, :, None], nearest[1][:, None, :]]
                out[key] = torch.where(known, values, nothing).long()
        if device.type == "cpu":
            out["image"] = _by_kernel(images, sizes, resized, start, size)
        else:
            none = torch.zeros(len(images), device=device)
            windows = [
                Window((start[:, a] * scale[:, a]).float(), scale[:, a].float(), none, sizes[:, a].float())
                for a in (0, 1)
            ]
            out["image"] = by_matrices(images, windows[0], windows[1], size, "bilinear")
        return out

    @staticmethod
    def _filled(pixels: Tensor, inside: Tensor, value: float) -> Tensor:
        """``value`` beyond each sample's (height, width)."""
        high, wide = pixels.shape[-2:]
        row = torch.arange(high, device=pixels.device)[None, :, None] < inside[:, :1, None]
        column = torch.arange(wide, device=pixels.device)[None, None] < inside[:, 1:, None]
        return torch.where((row & column)[:, None], pixels, value)


def edges(sizes: Tensor, shortest: Tensor | int, longest: int | None) -> Tensor:
    """int64 ``[B, 2]``: (height, width) whose shorter side is ``shortest``, or whose longer side is ``longest`` where that
    would be exceeded; rounded to the nearest pixel, at least 1."""
    real = sizes.double()
    factor = torch.as_tensor(shortest, dtype=torch.float64, device=sizes.device) / real.amin(dim=1)
    if longest is not None:
        factor = torch.minimum(factor, longest / real.amax(dim=1))
    return (real * factor[:, None] + 0.5).floor().clamp(min=1).long()


def _by_kernel(images: Tensor, sizes: Tensor, resized: Tensor, start: Tensor, size: tuple[int, int]) -> Tensor:
    """As the matrices do, by torch's kernel: on a CPU the matrices are nine parts zero."""
    out = torch.full((len(images), images.shape[1], *size), float("nan"))
    whole, larger, corner = sizes.tolist(), resized.tolist(), start.tolist()
    for i, ((h, w), (rh, rw), (top, left)) in enumerate(zip(whole, larger, corner, strict=True)):
        image = images[i : i + 1, :, :h, :w].float()
        if (h, w) != (rh, rw):
            image = F.interpolate(image, size=(rh, rw), mode="bilinear", antialias=True)
        part = image[0, :, top : top + size[0], left : left + size[1]]
        out[i, :, : part.shape[1], : part.shape[2]] = part
    return out


def _columns(values: Tensor, index: Tensor) -> Tensor:
    """values ``[B, (C,) H, W]`` with the columns ``index [B, W]`` of each sample."""
    shape = (len(index), *(1,) * (values.ndim - 2), index.shape[1])
    return values.gather(-1, index.reshape(shape).expand(values.shape))


def ssd_jitter(images: Tensor, draw: Draw) -> Tensor:
    """SSD's colours (Liu et al. 2016) of ``[B, 3, H, W]`` in 0 ... 255: brightness ± 32, contrast and saturation × 0.5 ... 1.5, hue
    ± 36°, each with chance 1/2; brightness first, contrast before or after saturation and hue by a coin. Clipped to 8 bits'
    range after each. Draws ``jitter.chance``, ``jitter.strength``, ``jitter.order``."""
    count, device = len(images), images.device
    chosen = draw.uniform("jitter.chance", (count, 4), device=device) < 0.5
    strength = draw.uniform("jitter.strength", (count, 4), device=device)
    first = draw.uniform("jitter.order", (count,), device=device) < 0.5
    shift = torch.where(chosen[:, 0], 64 * strength[:, 0] - 32, 0.0)
    factor = torch.where(chosen[:, 1], 0.5 + strength[:, 1], 1.0)
    vivid = torch.where(chosen[:, 2], 0.5 + strength[:, 2], 1.0)
    turn = torch.where(chosen[:, 3], (2 * strength[:, 3] - 1) * 18 / 180, 0.0)

    def contrast(pixels: Tensor, which: Tensor) -> Tensor:
        return (pixels * torch.where(which, factor, 1.0)[:, None, None, None]).clamp(0, 255)

    images = (images + shift[:, None, None, None]).clamp(0, 255)
    images = contrast(images, first)
    # saturation of HSV: the distance from the brightest channel grows, which stays; it ends where a channel is 0
    top, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    most = torch.where(top > low, top / (top - low).clamp(min=1e-6), 1.0)
    images = top - (top - images) * torch.minimum(vivid[:, None, None, None], most)
    images = hue(images / 255, turn) * 255
    return contrast(images, ~first)
