"""Masks for video: the same patches hidden in every frame, or in stretches of frames."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.masks.mask import Mask
from unmask.masks.random import mask_from_scores, visible_count


def tube_mask(noise: Tensor, ratio: float, grid: tuple[int, ...]) -> Mask:
    """Hide the same patches in every frame: ``h * w - int(h * w * (1 - ratio))`` a frame, those with the largest noise.

    noise: ``[B, h * w]``; grid: ``(t, h, w)``. Tong et al., NeurIPS 2022, arXiv:2203.12602, section 3.3.
    """
    return tubelet_mask(noise[:, None], ratio, grid, span=grid[0])


def tubelet_mask(noise: Tensor, ratio: float, grid: tuple[int, ...], *, span: int) -> Mask:
    """Hide the same patches during ``span`` frames of the grid, then others; the last stretch may be shorter.

    noise: ``[B, ceil(t / span), h * w]``, one plane a stretch; ``span=t`` is a tube, ``span=1`` draws every frame anew.
    Every frame hides the same number, so every sample does. Raises ``UserError`` for a grid that is not ``(t, h, w)``.
    """
    if len(grid) != 3:
        raise UserError(f"tubes need a grid of frames, rows and columns, not {grid}")
    frames, rows, columns = grid
    if not 1 <= span <= frames:
        raise UserError(f"span={span} must lie in 1 ... {frames}, the frames of the grid {grid}")
    stretches, area = -(-frames // span), rows * columns
    if noise.shape[1:] != (stretches, area):
        raise ValueError(
            f"noise must be [B, {stretches}, {area}] for grid {grid} and span {span}, got {list(noise.shape)}"
        )
    hidden = area - visible_count(area, ratio)
    planes = mask_from_scores(noise.flatten(0, 1), hidden, (rows, columns)).hidden.view(len(noise), stretches, area)
    stretch = torch.arange(frames, device=noise.device) // span
    return Mask(planes[:, stretch].flatten(1), (frames, rows, columns), hidden * frames)
