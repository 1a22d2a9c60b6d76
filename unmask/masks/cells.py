"""Masks made of square cells of pixels, each several tokens wide (SimMIM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.masks.mask import Mask


def hidden_cells(cells: int, ratio: float) -> int:
    """``ceil(cells * ratio)``, the official rounding. Raises ``UserError`` if no cell or every cell is hidden."""
    if not 0 < ratio < 1:
        raise UserError(f"mask_ratio={ratio} must lie strictly between 0 and 1")
    hidden = math.ceil(cells * ratio)
    if not 0 < hidden < cells:
        raise UserError(
            f"mask_ratio={ratio} leaves no visible cell of {cells}: use smaller cells (cell_size) or a lower ratio"
        )
    return hidden


def cell_grid(size: tuple[int, ...], cell: tuple[int, ...], token: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """(cells on each axis, tokens of a cell on each axis) for images of ``size``; all sizes in pixels.

    Raises ``UserError`` when the cell does not divide the image or is no multiple of the token.
    """
    for pixels, c, t in zip(size, cell, token, strict=True):
        if c < t or c % t:
            raise UserError(f"cell_size={c} is no multiple of the patch {t}: use {max(round(c / t), 1) * t}")
        if c > pixels or pixels % c:
            fits = [n for n in range(t, pixels // 2 + 1, t) if pixels % n == 0]
            near = f": use {min(fits, key=lambda n: abs(n - c))}" if fits else ""
            raise UserError(f"cell_size={c} does not divide image size {pixels}{near}")
    cells = tuple(s // c for s, c in zip(size, cell, strict=True))
    return cells, tuple(c // t for c, t in zip(cell, token, strict=True))


def spread(cells: Tensor, scale: tuple[int, ...], hidden: int) -> Mask:
    """bool ``[B, *cells]`` -> a mask of tokens, each cell repeated ``scale`` times on each axis."""
    for axis, times in enumerate(scale):
        cells = cells.repeat_interleave(times, dim=axis + 1)
    return Mask(cells.flatten(1), tuple(cells.shape[1:]), hidden * math.prod(scale))


def cell_mask(order: Tensor, ratio: float, cells: tuple[int, ...], scale: tuple[int, ...]) -> Mask:
    """Hide the first ``ceil(cells * ratio)`` cells of a random order. Xie et al. 2022, section 3.2.

    order: int64 ``[B, prod(cells)]``, a permutation of the cells (row-major) in each row. scale: tokens of a cell.
    """
    hidden = hidden_cells(math.prod(cells), ratio)
    out = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    out.scatter_(1, order[:, :hidden], True)
    return spread(out.unflatten(1, cells), scale, hidden)


def square_mask(place: Tensor, ratio: float, cells: tuple[int, ...], scale: tuple[int, ...]) -> Mask:
    """Hide one block of cells of about the wanted area at a random place. Xie et al. 2022, section 3.2.

    The block has ``round(side * sqrt(ratio))`` cells on each axis, at least one and never the whole axis of every axis.
    place: ``[B, axes]`` in [0, 1), where the block lies along each axis.
    """
    hidden_cells(math.prod(cells), ratio)
    block = [min(max(round(side * ratio ** (1 / len(cells))), 1), side) for side in cells]
    if math.prod(block) == math.prod(cells):
        longest = max(range(len(cells)), key=lambda a: cells[a])
        block[longest] -= 1
    out = torch.ones((len(place), *cells), dtype=torch.bool, device=place.device)
    for axis, (side, length) in enumerate(zip(cells, block, strict=True)):
        first = (place[:, axis] * (side - length + 1)).long().clamp(max=side - length)[:, None]
        at = torch.arange(side, device=place.device)[None]
        inside = (at >= first) & (at < first + length)
        out &= inside.view(len(place), *(side if a == axis else 1 for a in range(len(cells))))
    return spread(out, scale, math.prod(block))
