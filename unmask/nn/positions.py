"""Positions: fixed tables, learned tables, relative biases, and their resizing to other grids."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.errors import UserError


@functools.lru_cache(maxsize=64)
def sincos_table(
    dim: int, grid: tuple[int, ...], order: tuple[int, ...] | None = None, temperature: float = 10000.0
) -> Tensor:
    """Fixed sine-cosine positions, float32 ``[N, dim]``, row-major over ``grid``.

    The width is shared out equally among the axes; ``order`` says which axis the first channels encode. The default,
    last axis first, is MAE's (columns, then rows). Of each axis' share the first half are sines, the second cosines
    of ``position * temperature^(-k / (dim / (2 * axes)))``, computed in float64. He et al. 2022, appendix A.
    Raises ``UserError`` when ``dim`` is not divisible by twice the number of axes.
    """
    axes = len(grid)
    if dim % (2 * axes):
        raise UserError(f"width {dim} does not fit sine-cosine positions: it must be divisible by {2 * axes}")
    order = order or tuple(reversed(range(axes)))
    half = dim // (2 * axes)
    at = {"dtype": torch.float64, "device": "cpu"}  # cached: never on a device that a context chose
    omega = temperature ** -(torch.arange(half, **at) / half)  # type: ignore[call-overload]
    place = torch.cartesian_prod(*(torch.arange(g, **at) for g in grid)).reshape(-1, axes)  # type: ignore[call-overload]
    parts = []
    for axis in order:
        angle = place[:, axis, None] * omega
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()


@functools.lru_cache(maxsize=64)
def sine_map(dim: int, grid: tuple[int, int], temperature: float = 10000.0) -> Tensor:
    """Fixed positions of a map, float32 ``[N, dim]``, row-major over ``grid``; rows in the first half of the channels.

    A coordinate runs over ``2 pi (1 ... size) / size``; channels ``2k`` and ``2k + 1`` of an axis are its sine and cosine at
    ``temperature^(-2k / (dim / 2))``. Carion et al., "End-to-End Object Detection with Transformers" (DETR), ECCV 2020.
    Raises ``UserError`` when 4 does not divide ``dim``.
    """
    if dim % 4:
        raise UserError(f"width {dim} does not fit positions of maps: it must be divisible by 4")
    half = dim // 2
    at = {"dtype": torch.float64, "device": "cpu"}  # cached: never on a device that a context chose
    omega = temperature ** -(torch.arange(0, half, 2, **at) / half)  # type: ignore[call-overload]
    parts = []
    for size in grid:
        place = torch.arange(1, size + 1, **at) / (size + 1e-6) * 2 * math.pi  # type: ignore[call-overload]
        angle = place[:, None] * omega
        parts.append(torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1))
    rows, columns = parts
    both = (rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1))
    return torch.cat(both, dim=2).flatten(0, 1).float()


def resize_table(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """A learned table ``[..., N, D]`` over grid ``old`` interpolated to grid ``new`` (bicubic for two axes, else linear)."""
    if tuple(old) == tuple(new):
        return table
    flat = table.reshape(-1, *old, table.shape[-1]).movedim(-1, 1)
    mode = {1: "linear", 2: "bicubic", 3: "trilinear"}[len(old)]
    out = F.interpolate(flat.float(), size=tuple(new), mode=mode, align_corners=False)
    return out.movedim(1, -1).reshape(*table.shape[:-2], math.prod(new), table.shape[-1]).to(table.dtype)


def relative_index(window: Sequence[int], prefix: int = 0) -> Tensor:
    """int64 ``[L, L]``: the row of a relative table for each (query, key) of a window with any number of axes.

    Entry (a, b) holds the mixed-radix number of ``a - b`` shifted to start at 0: ``(Δrow + h - 1)(2w - 1) + Δcol + w - 1``.
    With one class token in front (``prefix=1``; BEiT) three more rows follow: class to token, token to class, class to class.
    """
    place = torch.cartesian_prod(*(torch.arange(w) for w in window)).reshape(-1, len(window))
    delta = place[:, None] - place[None]
    index = torch.zeros(delta.shape[:2], dtype=torch.int64)
    for axis, size in enumerate(window):
        index = index * (2 * size - 1) + delta[..., axis] + size - 1
    if not prefix:
        return index
    rows = math.prod(2 * w - 1 for w in window) + 3
    out = torch.empty(len(index) + 1, len(index) + 1, dtype=torch.int64)
    out[1:, 1:], out[0, :], out[:, 0], out[0, 0] = index, rows - 3, rows - 2, rows - 1
    return out


class RelativePositionBias(nn.Module):
    """A learned bias for each head and relative place: ``forward()`` gives ``[heads, L, L]`` to add to attention logits."""

    relative_position_index: Tensor

    def __init__(self, window: Sequence[int], num_heads: int, prefix: int = 0):
        super().__init__()
        self.window, self.prefix = tuple(window), prefix
        rows = math.prod(2 * w - 1 for w in window) + (3 if prefix else 0)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.register_buffer("relative_position_index", relative_index(window, prefix), persistent=False)

    def forward(self) -> Tensor:
        index = self.relative_position_index
        return self.relative_position_bias_table[index.flatten()].reshape(*index.shape, -1).permute(2, 0, 1)


def resize_relative_table(
    table: Tensor, old: Sequence[int], new: Sequence[int], *, extra: int = 0, spacing: str = "even"
) -> Tensor:
    """A relative table ``[(2h - 1)(2w - 1) + extra, heads]`` of window ``old`` for window ``new``; extra rows are kept.

    spacing "even": bicubic over the table (Swin's ``load_pretrained``). "geometric": the old offsets are spread in a
    geometric progression so that near offsets keep their values (BEiT), with a cubic spline between them.
    """
    if tuple(old) == tuple(new):
        return table
    kept, grid = table[len(table) - extra :], table[: len(table) - extra]
    sizes, wanted = [2 * w - 1 for w in old], [2 * w - 1 for w in new]
    if spacing == "even":
        return torch.cat((resize_table(grid, sizes, wanted), kept))
    from scipy.interpolate import RectBivariateSpline

    values = grid.detach().double().reshape(*sizes, -1).cpu().numpy()
    rows, columns = (_geometric_places(s, w) for s, w in zip(sizes, wanted, strict=True))
    at = [np.arange(-(w // 2), w // 2 + 1) for w in wanted]
    degree = [min(3, s - 1) for s in sizes]
    heads = [
        RectBivariateSpline(rows, columns, values[..., h], kx=degree[0], ky=degree[1])(*at)
        for h in range(values.shape[-1])
    ]
    out = torch.as_tensor(np.stack(heads, -1), dtype=table.dtype, device=table.device).reshape(-1, table.shape[1])
    return torch.cat((out, kept))


def _geometric_places(size: int, wanted: int) -> np.ndarray:
    """Where ``size`` old offsets lie on the new axis: 0, then steps growing by a ratio that ends at ``wanted // 2``."""
    n, target = size // 2, wanted // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**n) / (1 - ratio) > target else (ratio, high)
    steps = np.cumsum(((low + high) / 2) ** np.arange(n))
    return np.concatenate([-steps[::-1], [0.0], steps])
