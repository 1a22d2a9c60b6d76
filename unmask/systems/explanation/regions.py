"""Regions of an image: squares, SLIC, quickshift; and from which regions are present to which pixels are visible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unmask.errors import MissingExtra, UserError

Kind = Literal["squares", "slic", "quickshift"]


def squares(size: Sequence[int], side: int) -> Tensor:
    """int64 ``[H, W]``: squares of ``side`` pixels, numbered row by row; the last of a row or column may be smaller."""
    height, width = size
    if side < 1:
        raise UserError(f"region_size={side}: a square has 1 pixel or more")
    columns = -(-width // side)
    return (torch.arange(height) // side)[:, None] * columns + (torch.arange(width) // side)[None]


def slic(picture: np.ndarray, n_segments: int = 250, compactness: float = 10.0, sigma: float = 0.0) -> Tensor:
    """SLIC superpixels of a uint8 picture ``[H, W, 3]`` (scikit-image)."""
    found = _segmentation().slic(
        picture, n_segments=n_segments, compactness=compactness, sigma=sigma, start_label=0, channel_axis=-1
    )
    return renumbered(torch.from_numpy(np.asarray(found)).long())


def quickshift(picture: np.ndarray, kernel_size: float = 4, max_dist: float = 200, ratio: float = 0.2) -> Tensor:
    """Quickshift of a uint8 picture ``[H, W, 3]`` with the ``lime`` package's settings (scikit-image; its ties by seed 0)."""
    found = _segmentation().quickshift(picture, kernel_size=kernel_size, max_dist=max_dist, ratio=ratio, rng=0)
    return renumbered(torch.from_numpy(np.asarray(found)).long())


def regions(
    picture: np.ndarray, kind: Kind = "slic", *, side: int | None = None, n_segments: int = 250, kernel_size: float = 4
) -> Tensor:
    """int64 ``[H, W]``, ids 0 ... F - 1. picture: uint8 ``[H, W, 3]``. side: of squares; default 1/14 of the height, as 16
    of 224."""
    size = picture.shape[:2]
    if kind == "squares":
        return squares(size, side or max(round(size[0] / 14), 1))
    return slic(picture, n_segments) if kind == "slic" else quickshift(picture, kernel_size)


def checked(segments: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """The region map itself. Raises ``UserError`` for ids with gaps, below 0, or of another size than the image."""
    if segments.ndim != 2 or segments.is_floating_point():
        raise UserError(
            f"a region map is whole numbers [H, W], this one is {segments.dtype} of {tuple(segments.shape)}"
        )
    if size is not None and tuple(segments.shape) != tuple(size):
        raise UserError(f"a region map of {tuple(segments.shape)} does not fit an image of {tuple(size)}")
    present = torch.unique(segments)
    count = int(present[-1]) + 1
    if int(present[0]) < 0 or len(present) != count:
        lacking = sorted(set(range(count)) - set(present.tolist()))
        which = f"no region {lacking[0]}" if lacking else f"a region {int(present[0])}"
        raise UserError(f"a region map numbers its regions 0 ... F - 1 without gaps, this one has {which}")
    return segments


def renumbered(segments: Tensor) -> Tensor:
    """The same regions, numbered without gaps."""
    return torch.unique(segments, return_inverse=True)[1].reshape(segments.shape)


def count_of(segments: Tensor) -> int:
    return int(segments.max()) + 1


def visible_of(presence: Tensor, segments: Tensor) -> Tensor:
    """Masks ``[n, 1, H, W]``, 1 = visible, of present regions ``[n, F]`` (ones and zeros): one gather for all."""
    return presence[:, segments.to(presence.device)][:, None].float()


def sums(values: Tensor, segments: Tensor) -> Tensor:
    """``[F]``: the sum of ``values [H, W]`` in each region."""
    out = torch.zeros(count_of(segments), dtype=torch.float64)
    return out.index_add_(0, segments.flatten().cpu(), values.flatten().double().cpu()).float()


def painted(weights: Tensor, segments: Tensor) -> Tensor:
    """``[H, W]``: each region's weight at its pixels."""
    return weights[segments.to(weights.device)]


def growing_boxes(heat: Tensor, steps: int = 10) -> list[Tensor]:
    """Boxes around the highest place of a heat map, from a point to the image, as masks ``[H, W]`` (1 inside)."""
    height, width = heat.shape
    top = int(heat.flatten().argmax())
    row, column = top // width, top % width
    out = []
    for step in range(1, steps + 1):
        reach = step / steps
        mask = torch.zeros(height, width)
        mask[
            max(round(row - reach * height), 0) : round(row + reach * height) + 1,
            max(round(column - reach * width), 0) : round(column + reach * width) + 1,
        ] = 1
        out.append(mask)
    return out


def contours(heat: Tensor, steps: int = 10) -> list[Tensor]:
    """The highest 1/steps, 2/steps ... of a heat map's pixels, as masks ``[H, W]`` (1 inside)."""
    rank = heat.flatten().argsort(descending=True, stable=True).argsort()
    return [(rank < round(step / steps * heat.numel())).float().reshape(heat.shape) for step in range(1, steps + 1)]


def _segmentation():  # type: ignore[no-untyped-def]
    try:
        from skimage import segmentation
    except ImportError:
        raise MissingExtra("regions=slic and regions=quickshift", "scikit-image", "explain") from None
    return segmentation
