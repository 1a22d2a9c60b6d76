"""Patches of n-dimensional inputs: cutting, embedding and putting back together.

Legend: ``x [B, C, *S]`` with any number of spatial axes; ``patch`` has one size an axis; ``N`` patches, row-major.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def patchify(x: Tensor, patch: Sequence[int], *, channels_first: bool = False) -> Tensor:
    """``[B, C, *S]`` -> ``[B, N, prod(patch) * C]``.

    Inside a patch the order is (row, column, channel), MAE's; with ``channels_first`` (channel, row, column), a
    convolution's. Every patch size must divide its axis.
    """
    n = len(patch)
    batch, channels, *size = x.shape
    grid = [s // p for s, p in zip(size, patch, strict=True)]
    x = x.reshape(batch, channels, *(v for pair in zip(grid, patch, strict=True) for v in pair))
    cells, inner = [2 + 2 * i for i in range(n)], [3 + 2 * i for i in range(n)]
    order = [0, *cells, 1, *inner] if channels_first else [0, *cells, *inner, 1]
    return x.permute(order).reshape(batch, math.prod(grid), -1)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int], *, channels_first: bool = False) -> Tensor:
    """The inverse of :func:`patchify`: ``[B, N, prod(patch) * C]`` -> ``[B, C, *S]``."""
    n = len(patch)
    channels = tokens.shape[-1] // math.prod(patch)
    if channels_first:
        x = tokens.reshape(len(tokens), *grid, channels, *patch)
        order = [0, n + 1, *(v for i in range(n) for v in (1 + i, n + 2 + i))]
    else:
        x = tokens.reshape(len(tokens), *grid, *patch, channels)
        order = [0, 2 * n + 1, *(v for i in range(n) for v in (1 + i, n + 1 + i))]
    return x.permute(order).reshape(len(tokens), channels, *(g * p for g, p in zip(grid, patch, strict=True)))


def select(tokens: Tensor, ids: Tensor) -> Tensor:
    """``tokens [B, N, ...]`` at ``ids [B, M]`` -> ``[B, M, ...]``.

    Whole rows are copied, which costs a tenth of a gather value by value on a CPU.
    """
    batch, count = tokens.shape[:2]
    rows = ids + torch.arange(batch, device=ids.device)[:, None] * count
    return tokens.reshape(batch * count, *tokens.shape[2:]).index_select(0, rows.flatten()).unflatten(0, ids.shape)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: a convolution with stride = kernel, computed as a matrix product.

    Called with ``ids [B, V]`` it embeds only those patches, so that hidden ones cost nothing.
    """

    def __init__(self, in_channels: int, embed_dim: int, patch_size: Sequence[int], bias: bool = True):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.proj = _CONV[len(self.patch_size)](in_channels, embed_dim, self.patch_size, self.patch_size, bias=bias)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """``[B, C, *S]`` -> ``[B, N or V, embed_dim]``."""
        patches = patchify(x, self.patch_size, channels_first=True)
        if ids is not None:
            patches = select(patches, ids)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def tuple_of(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """A size for every axis: ``16`` -> ``(16, 16)``."""
    return (int(value),) * axes if isinstance(value, int) else tuple(int(v) for v in value)


def replace_hidden(tokens: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
    """``tokens [B, N, D]`` with ``mask_token [D]`` wherever ``hidden [B, N]``."""
    return torch.where(hidden[..., None], mask_token.to(tokens.dtype), tokens)
