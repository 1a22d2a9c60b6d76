"""Images of any shape as sequences: cutting a canvas into each sample's own tokens, and putting several samples into one row.

Legend: a canvas ``[B, C, H, W]`` holds each sample at its upper left, ``size [B, 2]`` its (rows, columns) of tokens; N the length
of a sequence; a token is (channel, row, column) of a patch, P values. A grid is ``[B, 2, N]``, column first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.data.aspect import packed as shared_rows
from unmask.errors import UserError
from unmask.nn.patch import patchify, select, unpatchify


@dataclass(frozen=True)
class Tokens:
    """One image a row. data ``[B, N, P]``, 0 at padding; grid int64 ``[B, 2, N]``, (0, 0) at padding; mask int64 ``[B, N]``: 1
    real, 0 padding; size int64 ``[B, 1, 2]``: rows and columns."""

    data: Tensor
    grid: Tensor
    mask: Tensor
    size: Tensor


@dataclass(frozen=True)
class Packing:
    """R rows of L tokens with up to k images each. source int64 ``[R, L]``: the token of the images' ``[B · N]`` that stands there,
    -1 at padding; mask ``[R, L]``: 0, or the number of the image in its row, from 1; owner int64 ``[R, k]``: which sample is the
    row's k-th image (0 for none); grid ``[R, 2, L]`` and size ``[R, k, 2]`` as for single images."""

    source: Tensor
    mask: Tensor
    owner: Tensor
    grid: Tensor
    size: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """Values ``[B, N, P]`` of single images in these rows ``[R, L, P]``, 0 at padding."""
        real = self.source >= 0
        return values.flatten(0, 1)[self.source.clamp(min=0)] * real[..., None].to(values.dtype)

    def apart(self, rows: Tensor, batch: int, length: int) -> Tensor:
        """Rows ``[R, L, P]`` back to ``[batch, length, P]`` of single images, 0 at padding."""
        bin_ = batch * length  # where padding goes, cut off again
        place = torch.where(self.source >= 0, self.source, bin_).flatten()
        out = rows.new_zeros(bin_ + 1, rows.shape[2]).index_copy(0, place, rows.flatten(0, 1))
        return out[:bin_].unflatten(0, (batch, length))


def tokens_of(canvas: Tensor, size: Tensor, patch: int, length: int) -> Tokens:
    """Each sample's tokens, row-major over its own grid, padded with zeros to ``length``. Waits for no device."""
    columns = canvas.shape[3] // patch
    every = patchify(canvas, (patch, patch), channels_first=True)
    place = torch.arange(length, device=canvas.device)[None]
    wide = size[:, 1:].clamp(min=1)
    row, column = place // wide, place % wide
    real = place < size.prod(dim=1, keepdim=True)
    ids = torch.where(real, row * columns + column, 0)
    data = select(every, ids) * real[..., None].to(every.dtype)
    return Tokens(data, torch.stack((column * real, row * real), dim=1), real.long(), size[:, None])


def packed(tokens: Tokens, length: int) -> Packing:
    """The images put together, as many as fit into rows of ``length`` tokens, each with a mask number of its own.

    It asks the device for the sizes once. Raises ``UserError`` where an image alone is longer than a row.
    """
    counts = tokens.size[:, 0].prod(dim=1).tolist()
    rows = shared_rows(counts, length)
    most, each = max(len(row) for row in rows), tokens.data.shape[1]
    source = torch.full((len(rows), length), -1, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    owner = torch.full((len(rows), most), -1, dtype=torch.int64)
    for r, row in enumerate(rows):
        at = 0
        for k, sample in enumerate(row):
            count = counts[sample]
            source[r, at : at + count] = sample * each + torch.arange(count)
            mask[r, at : at + count] = k + 1
            owner[r, k] = sample
            at += count
    source, mask, owner = (v.to(tokens.data.device) for v in (source, mask, owner))
    real, present = source >= 0, owner >= 0
    grid = tokens.grid.transpose(1, 2).flatten(0, 1)[source.clamp(min=0)] * real[..., None]
    size = tokens.size[:, 0][owner.clamp(min=0)] * present[..., None]
    return Packing(source, mask, owner.clamp(min=0), grid.transpose(1, 2), size)


def image_of(tokens: Tensor, grid: Sequence[int], patch: int) -> Tensor:
    """``[B, rows · columns, P]`` back to ``[B, C, H, W]``."""
    return unpatchify(tokens[:, : grid[0] * grid[1]], grid, (patch, patch), channels_first=True)


def full_grid(count: int, grid: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Grid ``[B, 2, rows · columns]`` and size ``[B, 1, 2]`` of samples that all have this grid."""
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], device=device), torch.arange(grid[1], device=device), indexing="ij"
    )
    places = torch.stack((columns.flatten(), rows.flatten()))
    size = torch.tensor([list(grid)], device=device)
    return places.expand(count, -1, -1), size.expand(count, 1, 2)


def check_sizes(grid: Tensor, mask: Tensor, size: Tensor) -> None:
    """Raises ``UserError`` where a size does not match the grid and the mask: such a picture would be silently wrong. It waits
    for the device: for data from outside, not for training steps."""
    for r in range(len(mask)):
        for k in range(size.shape[1]):
            mine = mask[r] == k + 1
            rows, columns = (int(v) for v in size[r, k])
            count = int(mine.sum())
            reach = [int(v) + 1 for v in grid[r][:, mine].amax(dim=1)] if count else [0, 0]
            if count != rows * columns or (count and reach != [columns, rows]):
                raise UserError(
                    f"fitv2: size {rows}x{columns} (rows x columns) of sample {r} does not match its grid: it has {count} tokens "
                    f"in {reach[1]} rows and {reach[0]} columns"
                )
