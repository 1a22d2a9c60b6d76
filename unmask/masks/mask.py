"""``Mask``: which tokens are hidden, per sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which tokens of a grid are hidden. Every sample hides the same number.

    hidden: bool ``[B, N]``, True = hidden, row-major over ``grid``.
    grid: the token grid, any number of axes: ``(h, w)`` images, ``(t, h, w)`` video, ``(T,)`` text or sound.
    count: hidden tokens in a sample; given by whoever knows it so that nothing waits for the device, else read once.
    """

    hidden: Tensor
    grid: tuple[int, ...]
    count: int | None = None

    def __post_init__(self) -> None:
        if self.hidden.dtype != torch.bool or self.hidden.ndim != 2:
            raise ValueError(f"hidden must be bool [B, N], got {self.hidden.dtype} {tuple(self.hidden.shape)}")
        if math.prod(self.grid) != self.hidden.shape[1]:
            raise ValueError(f"grid {self.grid} does not hold {self.hidden.shape[1]} tokens")
        if self.count is None:
            object.__setattr__(self, "count", int(self.hidden[0].sum()) if len(self.hidden) else 0)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.hidden.shape[1]

    @property
    def num_hidden(self) -> int:
        """Hidden tokens in each sample."""
        assert self.count is not None
        return self.count

    @property
    def num_visible(self) -> int:
        """Visible tokens in each sample."""
        return self.num_tokens - self.num_hidden

    @cached_property
    def order(self) -> Tensor:
        """int64 ``[B, N]``: ids of the visible tokens, then of the hidden ones, each ascending."""
        return self.hidden.to(torch.uint8).argsort(dim=1, stable=True)

    @property
    def keep(self) -> Tensor:
        """int64 ``[B, N - hidden]``: visible token ids, ascending."""
        return self.order[:, : self.num_visible]

    @property
    def hide(self) -> Tensor:
        """int64 ``[B, hidden]``: hidden token ids, ascending."""
        return self.order[:, self.num_visible :]

    @cached_property
    def restore(self) -> Tensor:
        """int64 ``[B, N]``: where each grid token stands in ``[visible, hidden]`` (inverse of ``order``)."""
        return self.order.argsort(dim=1, stable=True)

    def on_grid(self) -> Tensor:
        """bool ``[B, *grid]``."""
        return self.hidden.unflatten(1, self.grid)

    def pixels(self, patch_size: tuple[int, ...]) -> Tensor:
        """bool ``[B, 1, *pixels]``: the mask repeated to pixels."""
        out = self.on_grid()[:, None]
        for axis, size in enumerate(patch_size):
            out = out.repeat_interleave(size, dim=axis + 2)
        return out

    def to(self, device: torch.device | str) -> Mask:
        return Mask(self.hidden.to(device), self.grid, self.count)
