"""Pictures of generators: uint8 from values in [-1, 1], contact sheets, previews of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unmask.contracts import Picture

GAP = 2  # pixels between the images of a sheet


def to_uint8(images: Tensor) -> list[np.ndarray]:
    """float ``[B, C, H, W]`` in [-1, 1] to uint8 ``[H, W, 3]`` each; one channel becomes grey, of more than three the first."""
    pixels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3]
    if pixels.shape[1] == 2:
        pixels = torch.cat((pixels, torch.zeros_like(pixels[:, :1])), dim=1)
    return list(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()))


def from_uint8(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 ``[H, W, 3]`` of one size back to float ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float() / 127.5 - 1


def sheet(images: Sequence[np.ndarray], columns: int | None = None, gap: int = GAP) -> np.ndarray:
    """All images on one white sheet, uint8 ``[H, W, 3]``, row by row; about as many columns as rows unless said.

    Images may differ in size: each stands at the upper left of a cell as large as the largest.
    """
    if not images:
        raise ValueError("a sheet needs an image")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = -(-len(images) // columns)
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    out = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out


def samples_picture(
    images: Sequence[np.ndarray],
    names: Sequence[str] = (),
    *,
    name: str = "samples",
    caption: str = "",
    columns: int = 4,
) -> Picture:
    """A preview: samples in rows of ``columns``, under what they were asked to be."""
    rows = [list(images[i : i + columns]) for i in range(0, len(images), columns)]
    heads = [n if len(images) <= columns else "" for n in names[: len(rows[0])]] if names else []
    return Picture(name, heads or [""] * len(rows[0]), rows, caption)
