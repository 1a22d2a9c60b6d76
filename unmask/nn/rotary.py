"""Rotary positions on a grid of two axes, and the ways to stretch them beyond the sizes of training.

    cos, sin = rotary_tables(grid, head_dim=64, method="ntk-aware", trained=16, lengths=(32, 16))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)

The first half of a head turns with the row, the second with the column (Su et al. 2021; Lu et al. 2024, FiT). Legend: d the
channels of one axis (head_dim / 2), f_k = θ^(-2k / d) for k < d / 2, L the length of training, s = max(L_test / L, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from unmask.errors import UserError, nearest

RotaryMethod = Literal["normal", "linear", "ntk-aware", "ntk-by-parts", "yarn", "ntk-aware-pro1", "ntk-aware-pro2"]
METHODS: tuple[str, ...] = get_args(RotaryMethod)


def rotary_tables(
    grid: Tensor,
    *,
    head_dim: int,
    theta: float = 10000.0,
    method: str = "normal",
    decouple: bool = False,
    trained: int | None = None,
    lengths: Tensor | Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 ``[B, N, head_dim]``, of a grid ``[B, 2, N]`` of (column, row) numbers.

    trained: rows (and columns) that a side had in training. lengths: (rows, columns) to be reached, for all ``[2]``, for each
    sample ``[B, 2]`` or for each token ``[B, N, 2]``. decouple: rows and columns are stretched each by its own length, else
    both by the longer. Raises ``UserError`` for a head_dim that four does not divide and a method nobody knows.
    """
    if head_dim % 4:
        raise UserError(f"head_dim={head_dim} does not fit rotary positions of two axes: it must be divisible by 4")
    if method not in METHODS:
        raise UserError(f"no rotary method {method!r}: {nearest(method, METHODS)}")
    if method != "normal" and (trained is None or lengths is None):
        raise UserError(f"rotary method {method} needs the length of training and the length to reach")
    place = grid.flip(1).transpose(1, 2).double()  # [B, N, (row, column)]
    if method == "normal":
        frequency, factor = base_frequencies(head_dim // 2, theta, grid.device), None
    else:
        reach = torch.as_tensor(lengths, dtype=torch.float64, device=grid.device)
        reach = reach.reshape(1, 1, 2) if reach.ndim == 1 else reach[:, None] if reach.ndim == 2 else reach
        own = reach if decouple else reach.amax(dim=-1, keepdim=True).expand_as(reach)
        frequency = stretched_frequencies(head_dim // 2, theta, method, float(trained or 1), own)
        factor = stretch_factor(method, float(trained or 1), reach)
    angle = (place[..., None] * frequency).flatten(2).repeat_interleave(2, dim=2)  # rows, then columns; each twice
    cos, sin = angle.cos(), angle.sin()
    if factor is not None:
        cos, sin = cos * factor[..., None], sin * factor[..., None]
    return cos.float(), sin.float()


def base_frequencies(dim: int, theta: float, device: torch.device | str = "cpu") -> Tensor:
    """float64 ``[dim / 2]``: θ^(-2k / dim)."""
    k = torch.arange(dim // 2, dtype=torch.float64, device=device)
    return theta ** (-2 * k / dim)


def stretched_frequencies(dim: int, theta: float, method: str, trained: float, lengths: Tensor) -> Tensor:
    """float64 ``[..., dim / 2]`` for axes of ``lengths [...]``.

    linear: f / s. ntk-aware: θ · s^(d / (d - 2)) instead of θ. ntk-by-parts and yarn: fast channels stay, slow ones are
    stretched, with a ramp between them (Peng et al. 2023, YaRN, section 3.2).
    """
    plain = base_frequencies(dim, theta, lengths.device)
    k = torch.arange(dim // 2, dtype=torch.float64, device=lengths.device)
    stretch = (lengths / trained).clamp(min=1)[..., None]
    linear = plain / stretch
    power = dim / (dim - 2) if dim > 2 else math.inf
    ntk = (theta * stretch**power) ** (-2 * k / dim)

    def ramp(many: float, few: float) -> Tensor:
        low, high = (dim * math.log(trained / (2 * math.pi * n)) / (2 * math.log(theta)) for n in (many, few))
        first, last = float(max(math.floor(low), 0)), float(min(math.ceil(high), dim - 1))
        return ((k - first) / ((last if last != first else last + 0.001) - first)).clamp(0, 1)

    if method == "linear":
        return linear
    if method == "ntk-by-parts":
        share = 1 - ramp(1.25, 0.75)
        mixed = linear * (1 - share) + ntk * share
        share = 1 - ramp(16, 2)
        return mixed * (1 - share) + plain * share
    if method == "yarn":
        share = 1 - ramp(32, 1)
        return linear * (1 - share) + plain * share
    return ntk


def stretch_factor(method: str, trained: float, lengths: Tensor) -> Tensor | None:
    """What cos and sin are multiplied by, ``[...]`` for ``lengths [..., 2]``: it always reads the longer side (pro2: the area)."""
    longest = lengths.amax(dim=-1)
    if method == "yarn":
        return 0.1 * (longest / trained).clamp(min=1).log() + 1
    if method in ("ntk-aware-pro1", "ntk-aware-pro2"):
        reached, known = (longest, trained) if method.endswith("1") else (lengths.prod(dim=-1), trained**2)
        grown = ((2 * reached).log() / math.log(known)).clamp(min=0).sqrt() if known > 1 else torch.ones_like(reached)
        return torch.where(2 * reached > known, grown, torch.ones_like(grown))
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, heads, N, head_dim]`` turned by tables ``[B, N, head_dim]``: each adjacent pair (a, b) becomes
    (a·cos - b·sin, b·cos + a·sin)."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return torch.addcmul(x * cos, turned, sin)
