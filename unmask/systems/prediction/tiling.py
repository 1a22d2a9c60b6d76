"""Pictures of any size through a network that wants multiples, or that has no room for all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.errors import UserError

Padding = Literal["reflect", "replicate", "zero"]


def padded_to(images: Tensor, multiple: int, *, mode: Padding = "reflect", least: int = 1) -> Tensor:
    """``[B, C, H, W]`` made larger at the right and the bottom until both sides are multiples of ``multiple`` and at least
    ``least``. Reflection (without the border pixel) goes in several rounds where the padding is as large as the side;
    a side of one pixel is repeated."""
    height, width = images.shape[-2:]
    wanted = [-(-max(side, least) // multiple) * multiple for side in (height, width)]
    if mode != "reflect":
        pads = (0, wanted[1] - width, 0, wanted[0] - height)
        return F.pad(images, pads, mode="constant" if mode == "zero" else mode) if any(pads) else images
    while list(images.shape[-2:]) != wanted:
        height, width = images.shape[-2:]
        down, right = wanted[0] - height, wanted[1] - width
        how = "replicate" if (down and height == 1) or (right and width == 1) else "reflect"
        if how == "reflect":
            down, right = min(down, height - 1), min(right, width - 1)
        elif height > 1 or width > 1:  # only the side of one pixel is repeated, the other goes on by reflection
            down, right = (down if height == 1 else 0), (right if width == 1 else 0)
        images = F.pad(images, (0, right, 0, down), mode=how)
    return images


def check_side(images: Tensor, least: int, *, name: str, what: str) -> None:
    """Raises ``UserError`` where a side of ``[..., H, W]`` is below ``least`` pixels."""
    height, width = images.shape[-2:]
    if min(height, width) < least:
        raise UserError(f"{name} has {width} x {height} pixels: {what} needs {least} a side")


def check_tiles(tile: int, overlap: int, multiple: int) -> None:
    """Raises ``UserError`` where tile or overlap is no multiple of ``multiple``."""
    for key, value, least in (("tile", tile, multiple), ("overlap", overlap, 0)):
        if value < least or value % multiple:
            near = max(round(value / multiple) * multiple, least)
            raise UserError(f"{key}={value} must be a multiple of the window {multiple}: use {key}={near}")


@torch.no_grad()
def in_tiles(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    tile: int,
    overlap: int = 0,
    scale: int = 1,
    batch: int = 1,
    tell: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Tile by tile, each with ``overlap`` pixels of its surroundings that are cut off again (the scheme of published
    super-resolution code). Not the same as the whole at once where a network looks farther than the overlap.

    run: ``[b, C, h, w]`` -> ``[b, C', h * scale, w * scale]``. images: ``[B, C, H, W]``. Neighbouring tiles of one size go
    through in batches of ``batch``. tell: called with (tiles done, of how many).
    """
    _, _, height, width = images.shape
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    count = 0
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            outer = (
                max(top - overlap, 0),
                max(left - overlap, 0),
                min(bottom + overlap, height),
                min(right + overlap, width),
            )
            groups.setdefault((outer[2] - outer[0], outer[3] - outer[1]), []).append((top, left, bottom, right, *outer))
            count += 1
    out: Tensor | None = None
    done = 0
    for places in groups.values():
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            made = run(torch.cat([images[..., y0:y1, x0:x1] for *_, y0, x0, y1, x1 in some]))
            if out is None:
                out = made.new_zeros(len(images), made.shape[1], height * scale, width * scale)
            for part, (top, left, bottom, right, y0, x0, *_) in zip(made.split(len(images)), some, strict=True):
                inner = part[
                    ...,
                    (top - y0) * scale : (bottom - y0) * scale,
                    (left - x0) * scale : (right - x0) * scale,
                ]
                out[..., top * scale : bottom * scale, left * scale : right * scale] = inner
            done += len(some)
            if tell is not None:
                tell(done, count)
    assert out is not None
    return out


@torch.no_grad()
def blended(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    tile: int | tuple[int, int],
    overlap: float = 0.25,
    batch: int = 1,
    tell: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Overlapping tiles of one size whose answers fade into each other (for class scores): each pixel is the mean of the
    tiles that see it, weighted by the distance from their borders. An image smaller than a tile is padded by reflection.

    run: ``[b, C, *tile]`` -> ``[b, K, *tile]``. overlap: share of a tile that the next one sees again, below 1.
    """
    if not 0 <= overlap < 1:
        raise UserError(f"overlap={overlap} must be a share in 0 ... 1, 1 excluded")
    tall, wide = (tile, tile) if isinstance(tile, int) else tile
    height, width = images.shape[-2:]
    images = _at_least(images, tall, wide)
    rows, columns = _starts(images.shape[-2], tall, overlap), _starts(images.shape[-1], wide, overlap)
    places = [(y, x) for y in rows for x in columns]
    weight = _ramp(tall, images)[:, None] * _ramp(wide, images)[None]
    total: Tensor | None = None
    weights = images.new_zeros(images.shape[-2:], dtype=torch.float32)
    for start in range(0, len(places), batch):
        some = places[start : start + batch]
        made = run(torch.cat([images[..., y : y + tall, x : x + wide] for y, x in some])).float()
        if total is None:
            total = made.new_zeros(len(images), made.shape[1], *images.shape[-2:])
        for part, (y, x) in zip(made.split(len(images)), some, strict=True):
            total[..., y : y + tall, x : x + wide] += part * weight
            weights[y : y + tall, x : x + wide] += weight
        if tell is not None:
            tell(start + len(some), len(places))
    assert total is not None
    return (total / weights)[..., :height, :width]


def _at_least(images: Tensor, tall: int, wide: int) -> Tensor:
    """Reflected at the bottom and the right until it is tall x wide or more."""
    height, width = max(images.shape[-2], tall), max(images.shape[-1], wide)
    if (height, width) == tuple(images.shape[-2:]):
        return images
    return padded_to(images, 1, least=max(height, width))[..., :height, :width]


def _starts(size: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin: evenly spread, the last ends at the border."""
    step = max(int(tile * (1 - overlap)), 1)
    count = -(-(size - tile) // step) + 1
    return [0] if count == 1 else [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(size: int, like: Tensor) -> Tensor:
    """Weights along a side: falling linearly to the borders, never 0."""
    place = torch.arange(size, dtype=torch.float32, device=like.device)
    return torch.minimum(place + 1, size - place) / ((size + 1) / 2)
