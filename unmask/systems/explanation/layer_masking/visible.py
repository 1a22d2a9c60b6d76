"""``Visible``: which places of a map can be seen, and what follows from that, each worked out once.

Everything here depends on the mask alone, so it is shared by all channels, all layers of a resolution, and all images that share
a mask (``[1, 1, H, W]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.errors import UserError

Sides = tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes them
FILL_EPS, MEAN_EPS = 1e-5, 1e-8


class Visible:
    """A binary map ``[B or 1, 1, H, W]`` of floats, 1 = visible."""

    def __init__(self, map: Tensor):
        self.map = map
        self._kept: dict[Any, Any] = {}
        self._full: bool | None = None

    @classmethod
    def of(cls, mask: Tensor, images: Tensor) -> Visible:
        """A user's mask for ``images [B, C, H, W]``: ``[H, W]``, ``[B or 1, H, W]`` or ``[B or 1, 1, H, W]``, zeros and ones.

        Raises ``UserError`` for another shape and for values between: a soft mask has no meaning here.
        """
        given = tuple(mask.shape)
        if mask.ndim == 2:
            mask = mask[None]
        if mask.ndim == 3:
            mask = mask[:, None]
        batch, size = images.shape[0], tuple(images.shape[-2:])
        fits = mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[0] in (1, batch) and tuple(mask.shape[-2:]) == size
        if not fits:
            raise UserError(f"a mask of shape {given} does not fit images of {tuple(images.shape)}: give [B, 1, H, W]")
        mask = mask.to(images.device, images.dtype)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise UserError(
                "a mask holds zeros (hidden) and ones (visible), this one has values between: round it first"
            )
        return cls(mask)

    @property
    def full(self) -> bool:
        """Whether all is visible: then a layer does what it always does."""
        if self._full is None:
            self._full = bool(self.map.all())
        return self._full

    def along(self, axes: Sequence[str]) -> Tensor:
        """The map as it multiplies a tensor with these axes (b, c, h, w, or n for h and w in one)."""
        key = ("along", tuple(axes))
        if tuple(axes) == ("b", "c", "h", "w"):
            return self.map
        if key not in self._kept:
            batch, _, height, width = self.map.shape
            flat = self.map[:, 0]
            if "n" in axes:
                flat = flat.reshape(batch, -1)
            elif axes.index("h") > axes.index("w"):
                flat = flat.transpose(1, 2)
            sizes = {"b": batch, "c": 1, "h": height, "w": width, "n": height * width}
            self._kept[key] = flat.reshape([sizes[a] for a in axes])
        return self._kept[key]

    # --- neighbour padding ---
    def spread(self) -> tuple[Tensor, Visible]:
        """One round: the factor of a 3 x 3 sum that gives the fill of each hidden pixel, and what is known afterwards."""
        if "spread" not in self._kept:
            near = box(self.map)
            factor = (1 - self.map) / (near + FILL_EPS)
            self._kept["spread"] = factor, Visible((self.map + near).clamp(0, 1))
        return self._kept["spread"]

    # --- after a layer ---
    def windowed(
        self, kernel: tuple[int, int], stride: tuple[int, int], sides: Sides, dilation: tuple[int, int]
    ) -> Visible:
        """Visible where the window sees a visible pixel; padding is never one."""
        if kernel == (1, 1) and stride == (1, 1) and not any(sides):
            return self
        key = ("windowed", kernel, stride, sides, dilation)
        if key not in self._kept:
            padded = F.pad(self.map, sides) if any(sides) else self.map
            self._kept[key] = self._same(F.max_pool2d(padded, kernel, stride, 0, dilation))
        return self._kept[key]

    def pooled(self, key: tuple[Any, ...], pool: Any) -> Visible:
        """Visible where ``pool`` of the map is above 0."""
        if ("pooled", *key) not in self._kept:
            self._kept["pooled", *key] = self._same((pool(self.map) > 0).to(self.map.dtype))
        return self._kept["pooled", *key]

    def share(
        self, kernel: tuple[int, int], stride: tuple[int, int], sides: Sides, dilation: tuple[int, int]
    ) -> Tensor:
        """The visible share of each window (padding counts as hidden), plus 1e-8."""
        key = ("share", kernel, stride, sides, dilation)
        if key not in self._kept:
            ones = self.map.new_full((1, 1, *kernel), 1 / (kernel[0] * kernel[1]))
            self._kept[key] = F.conv2d(F.pad(self.map, sides), ones, None, stride, 0, dilation) + MEAN_EPS
        return self._kept[key]

    def changed(self, key: tuple[Any, ...], change: Any) -> Visible:
        """The map after a change of its places (padding, slicing), worked out once a key."""
        if key not in self._kept:
            self._kept[key] = self._same(change(self.map))
        return self._kept[key]

    # --- joining ---
    def both(self, other: Visible) -> Visible:
        """Visible in this map and in the other."""
        if other is self:
            return self
        key = ("both", other)
        if key not in self._kept:
            self._kept[key] = self._same(self.map * other.map, other)
        return self._kept[key]

    def _same(self, map: Tensor, other: Visible | None = None) -> Visible:
        """This object again where nothing changed, so that what it knows stays known."""
        for known in (self, other):
            if known is not None and map.shape == known.map.shape and torch.equal(map, known.map):
                return known
        return Visible(map)


def majority(masks: Sequence[Visible]) -> Visible:
    """Visible in more than half of the maps, one vote a map whatever its channels."""
    if all(m is masks[0] for m in masks):
        return masks[0]
    votes = sum((m.map for m in masks[1:]), masks[0].map)
    return Visible((votes > 0.5 * len(masks)).to(votes.dtype))


def union(masks: Sequence[Visible]) -> Visible:
    """Visible in any of the maps."""
    if all(m is masks[0] for m in masks):
        return masks[0]
    return Visible(sum((m.map for m in masks[1:]), masks[0].map).clamp(0, 1))


def filled(x: Tensor, visible: Visible, rounds: int) -> Tensor:
    """Neighbour padding: ``x`` (zero where hidden) with each hidden pixel within ``rounds`` of a visible one set to the mean of
    its neighbours known by then. No gradient flows through a fill. x: ``[B, C, H, W]``."""
    for _ in range(rounds):
        if visible.full:
            break
        factor, known = visible.spread()
        with torch.no_grad():
            near = box(x)
        x = torch.addcmul(x, factor, near)
        visible = known
    return x


def box(x: Tensor) -> Tensor:
    """Sum over each place's 3 x 3 neighbourhood, zeros outside."""
    if x.device.type != "cpu":
        return F.avg_pool2d(x, 3, 1, 1) * 9
    rows = x.clone(memory_format=torch.contiguous_format)  # on a CPU shifted sums are five times as fast as a pool
    rows[..., 1:] += x[..., :-1]
    rows[..., :-1] += x[..., 1:]
    out = rows.clone()
    out[..., 1:, :] += rows[..., :-1, :]
    out[..., :-1, :] += rows[..., 1:, :]
    return out
