"""Masks that hide tokens uniformly at random."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.masks.mask import Mask


def visible_count(tokens: int, ratio: float) -> int:
    """``int(N * (1 - ratio))`` in Python floats: the rounding of MAE's code. Raises ``UserError`` if none or all stay."""
    if not 0 < ratio < 1:
        raise UserError(f"mask_ratio={ratio} must lie strictly between 0 and 1")
    visible = int(tokens * (1 - ratio))
    if not 0 < visible < tokens:
        left = "visible" if visible == 0 else "hidden"
        raise UserError(f"mask_ratio={ratio} leaves no {left} token of {tokens}: use smaller patches or another ratio")
    return visible


def mask_from_scores(scores: Tensor, hidden: int, grid: tuple[int, ...]) -> Mask:
    """Hide the ``hidden`` tokens with the largest score in every sample; of equal scores the lower index stays visible.

    scores: ``[B, N]``, any real numbers.
    """
    visible = scores.shape[1] - hidden
    if scores.device.type == "cpu" and 0 < visible < scores.shape[1]:
        return Mask(_above_threshold(scores.detach(), visible), grid, hidden)
    rank = scores.argsort(dim=1, stable=True)
    out = torch.ones_like(scores, dtype=torch.bool)
    out.scatter_(1, rank[:, :visible], False)
    return Mask(out, grid, hidden)


def _above_threshold(scores: Tensor, visible: int) -> Tensor:
    """What the sort would hide, from numpy's vectorised selection of the ``visible``-th smallest: ten times faster."""
    values = scores.numpy()
    threshold = torch.from_numpy(np.partition(values, visible - 1, axis=1)[:, visible - 1 : visible])
    out = scores > threshold
    if int(out.sum()) == out.shape[0] * (out.shape[1] - visible):
        return out
    equal = scores == threshold  # ties: the first of them, in order, stay visible
    room = visible - (scores < threshold).sum(dim=1, keepdim=True)
    return out | (equal & (equal.cumsum(dim=1) > room))


def random_mask(noise: Tensor, ratio: float, grid: tuple[int, ...]) -> Mask:
    """Hide the tokens with the largest noise: exactly ``N - int(N * (1 - ratio))`` in every sample (MAE's rounding).

    noise: ``[B, N]``, any real numbers; of equal values the lower index stays visible. He et al. 2022, section 3.
    """
    return mask_from_scores(noise, noise.shape[1] - visible_count(noise.shape[1], ratio), grid)
