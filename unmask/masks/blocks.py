"""Masks made of rectangular blocks, with an exact count. After BEiT (Bao et al., ICLR 2022, algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError
from unmask.masks.mask import Mask

CANDIDATES = 32  # blocks tried for a sample before single tokens fill what is left


def block_mask(
    draw: Draw,
    batch: int,
    grid: tuple[int, ...],
    hidden: int,
    *,
    min_area: int | None = None,
    max_area: int | None = None,
    min_aspect: float = 0.3,
    name: str = "blocks",
    device: torch.device | str = "cpu",
) -> Mask:
    """Hide exactly ``hidden`` tokens of every sample in rectangular blocks.

    BEiT's rule: the next block's area is uniform between ``min_area`` and what is left to hide (at most ``max_area``), its
    aspect ratio (height over width) log-uniform between ``min_aspect`` and its inverse, its place uniform; sides are
    rounded, and cut to the grid. Blocks may overlap.
    The last block usually brings too much: of what it adds only the first tokens in row-major order are hidden, as many as
    are missing. Should 32 blocks not be enough (nearly everything hidden), visible tokens follow in row-major order from a
    random place on, until the count is complete.

    Draws ``uniform(name, [batch, 32, 4])`` and ``uniform(name + ".rest", [batch])``; a sample's mask depends on its own
    draws only. min_area and max_area in tokens; the least
    is BEiT's 16, or a quarter of what is hidden where that is smaller. Raises ``UserError`` for counts and sizes that cannot be.
    """
    if min_area is None:
        min_area = max(1, min(16, hidden // 4))
    rows, columns = _checked(grid, hidden, min_area, max_area, min_aspect)
    uniform = draw.uniform(name, (batch, CANDIDATES, 4), device=device)
    rest = draw.uniform(f"{name}.rest", (batch,), device=device)
    return blocks_from(uniform, rest, (rows, columns), hidden, min_area, max_area, min_aspect)


def blocks_from(
    uniform: Tensor,
    rest: Tensor,
    grid: tuple[int, int],
    hidden: int,
    min_area: int = 16,
    max_area: int | None = None,
    min_aspect: float = 0.3,
) -> Mask:
    """:func:`block_mask` from given numbers in [0, 1).

    uniform: ``[B, K, 4]``, for each candidate block its area, aspect, top, left. rest: ``[B]``, the place from which on
    tokens complete the count.
    """
    rows, columns = grid
    stretch = ((uniform[..., 1] * 2 - 1) * -math.log(min_aspect) * 0.5).exp()  # square root of the aspect ratio
    stretch = torch.stack((stretch, 1 / stretch), dim=-1)
    covered = torch.zeros(len(uniform), rows, columns, dtype=torch.bool, device=uniform.device)
    limit = float(max_area or hidden)
    covered, before = _grown(covered, uniform[..., 0], stretch, uniform[..., 2:], hidden, float(min_area), limit)
    return Mask(_exactly(covered.flatten(1), before.flatten(1), rest, hidden, rows * columns), grid, hidden)


def _grown(
    covered: Tensor, area: Tensor, stretch: Tensor, place: Tensor, hidden: int, min_area: float, limit: float
) -> tuple[Tensor, Tensor]:
    """Lay blocks on ``covered [B, rows, columns]`` until each sample hides enough; also what was covered before the last.

    area: ``[B, K]`` in [0, 1); stretch: factors of height and width ``[B, K, 2]``; place: of top and left ``[B, K, 2]``.
    """
    _, rows, columns = covered.shape
    sides = covered.new_tensor((rows, columns), dtype=torch.float32)
    axis = torch.arange(max(rows, columns), device=covered.device, dtype=torch.float32)
    before = torch.zeros_like(covered)
    left = hidden - covered.sum(dim=(1, 2), dtype=torch.float32)
    for k in range(area.shape[1]):
        side = (min_area + area[:, k] * (left.clamp(max=limit) - min_area).clamp(min=0)).sqrt()
        size = (side[:, None] * stretch[:, k]).round().clamp(min=1).minimum(sides)
        start = (place[:, k] * (sides - size + 1)).floor()
        inside = (axis >= start[..., None]) & (axis < (start + size)[..., None])
        open_ = left > 0
        block = (inside[:, 0, :rows] & open_[:, None])[:, :, None] & inside[:, 1, None, :columns]
        before = torch.where(open_[:, None, None], covered, before)
        covered = covered | block
        left = hidden - covered.sum(dim=(1, 2), dtype=torch.float32)
        if covered.device.type == "cpu":  # elsewhere to ask would cost a wait for the device; the result is the same
            still = (left > 0).nonzero()[:, 0]
            if 2 * len(still) <= len(left):
                if len(still) and k + 1 < area.shape[1]:
                    rest = (area[still, k + 1 :], stretch[still, k + 1 :], place[still, k + 1 :])
                    covered[still], before[still] = _grown(covered[still], *rest, hidden, min_area, limit)
                break
    return covered, before


def _exactly(covered: Tensor, before: Tensor, rest: Tensor, hidden: int, tokens: int) -> Tensor:
    """Trim the last block of samples that have too much, complete those that have too little."""
    last = covered & ~before
    room = hidden - before.sum(dim=1, keepdim=True)
    out = before | (last & (last.cumsum(dim=1) <= room))
    if out.device.type == "cpu" and bool((out.sum(dim=1) == hidden).all()):
        return out
    start = (rest * tokens).floor()[:, None]
    after = (torch.arange(tokens, device=out.device) - start).remainder(tokens)
    rank = torch.where(out, -1.0, after).argsort(dim=1, stable=True)
    return torch.zeros_like(out).scatter_(1, rank[:, :hidden], True)


def _checked(
    grid: tuple[int, ...], hidden: int, min_area: int, max_area: int | None, min_aspect: float
) -> tuple[int, int]:
    if len(grid) != 2:
        raise UserError(f"blocks need a grid of rows and columns, not {grid}")
    tokens = math.prod(grid)
    if not 0 < hidden < tokens:
        raise UserError(
            f"cannot hide {hidden} of {tokens} tokens in blocks: at least one must be hidden and one visible"
        )
    if not 0 < min_aspect <= 1:
        raise UserError(
            f"min_aspect={min_aspect} must lie in (0, 1]: heights and widths differ by at most 1 / min_aspect"
        )
    if min_area < 1 or (max_area is not None and max_area < min_area):
        raise UserError(
            f"block areas from min_area={min_area} to max_area={max_area} tokens do not fit: 1 <= min <= max"
        )
    return grid[0], grid[1]
