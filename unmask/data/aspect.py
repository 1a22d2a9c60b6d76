"""Images of many shapes in one batch: each keeps its ratio and gets as many cells as a context holds.

    batches = AspectBatches(source, settings, batch_size=64, cell=4, context=64)
    batch = batches.transform(raw, draw)      # image [B, C, Hc, Wc], zero outside each sample's size [B, 2]

A cell is what becomes one token: the patch times the first stage's factor, in pixels. Everything is done for the batch at
once on its device: the canvas is as large as any sample may be, so shapes never change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor

from unmask.config import Field
from unmask.contracts import Batch
from unmask.data.batches import Batches
from unmask.data.resize import Window, by_matrices
from unmask.data.settings import DataSettings
from unmask.data.source import Source
from unmask.draw import Draw
from unmask.errors import UserError


class AspectSettings(DataSettings):
    """Image settings with what mixed shapes need. ``image_size`` and ``crop_ratio`` have no meaning here; ``augment`` is none,
    flip, crop (random crops of the shapes in ``sizes``) or crop_flip."""

    sizes: tuple[tuple[int, int], ...] | None = Field(
        None,
        description="shapes (height, width) in pixels, one picked at random per visit; open: each image's own ratio",
    )
    max_ratio: float = Field(
        2.0, ge=1, description="longer images are cut, from the centre, to this ratio of the sides"
    )
    central: float = Field(
        0.0, ge=0, le=1, description="share of visits that see the central square of an image that is large enough"
    )
    enlarge: bool = Field(True, description="bring small images up to the context, too")

    @model_validator(mode="after")
    def _fits_mixed_shapes(self) -> AspectSettings:
        if self.augment not in ("none", "flip", "crop", "crop_flip"):
            raise ValueError(
                f"augment={self.augment} is for images of one size: it takes none, flip, crop or crop_flip"
            )
        if self.sizes is not None and (not self.sizes or min(map(min, self.sizes)) < 1):
            raise ValueError("sizes takes one shape (height, width) or more, for example [[32, 32], [24, 40]]")
        return self


class AspectBatches(Batches):
    """A :class:`unmask.contracts.TrainingBatches` of mixed shapes.

    cell: pixels along a side of a token. context: tokens that an image has at most. Raises ``UserError`` for shapes that the
    cell does not divide or that exceed the context.
    """

    def __init__(
        self, source: Source, settings: AspectSettings, batch_size: int = 64, seed: int = 0, *, cell: int, context: int
    ):
        if cell < 1 or context < 1:
            raise UserError(f"cell={cell} and context={context} must be at least 1")
        self.cell, self.context = cell, context
        self.shapes: list[tuple[int, int]] = [(int(h), int(w)) for h, w in settings.sizes or ()]
        for height, width in self.shapes:
            check_shape(height, width, cell, context)
        self.mixed = settings
        side = max(math.isqrt(context), 1) * cell
        self.canvas = largest(self.shapes, cell, context, settings.max_ratio)
        sized = settings.model_copy(update={"image_size": (side, side)})
        super().__init__(source, sized, batch_size, seed)
        self.facts = replace(self.facts, image_size=(side, side))

    @functools.cached_property
    def stored_side(self) -> int:
        """Pixels that the shorter side of a stored image is limited to: four times the canvas (random crops look at parts), in
        powers of two. Small canvases then read small images."""
        side = 64
        while side < 4 * max(self.canvas):
            side *= 2
        return side

    def transform(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> dict[str, Any]:
        """``image`` float32 ``[B, C, *canvas]``, standardised and 0 outside ``size`` int64 ``[B, 2]`` (height, width in pixels);
        ``index`` and ``label`` as they come. Draws ``shape``, ``crop``, ``central`` and ``flip``."""
        if train and draw is None:
            raise ValueError("a training transform needs a draw")
        images, raw = batch["image"], batch["size"]
        random = draw if train else None
        sizes, boxes = self._picked(batch, raw, random) if self.shapes else self._kept(raw, random)
        pixels = self.resampled(images, boxes, sizes)
        if random is not None and self.settings.augment in ("flip", "crop_flip") and self.settings.flip:
            chosen = random.uniform("flip", (len(images),), device=images.device) < self.settings.flip
            pixels = torch.where(chosen[:, None, None, None], mirrored(pixels, sizes[:, 1]), pixels)
        pixels = self.apply.standardised(pixels)
        pixels = torch.where(self.inside(sizes)[:, None], pixels, 0.0)
        return {**{k: v for k, v in batch.items() if k != "size"}, "image": pixels, "size": sizes}

    # --- which part, at which size ---
    def _picked(self, batch: Batch, raw: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """One of the given shapes, and a box of its ratio: at random, or (for looking) by number and from the centre."""
        device, count = raw.device, len(raw)
        shapes = torch.tensor(self.shapes, device=device)
        if draw is None:
            return self._boxed(shapes[batch["index"].to(device) % len(shapes)], raw, None, None)
        which = draw.integers("shape", 0, len(shapes), (count,), device=device)
        numbers = draw.uniform("crop", (count, 3), device=device)
        share = None
        if self.settings.augment in ("crop", "crop_flip"):
            low, high = self.settings.crop_scale
            share = (low + (high - low) * numbers[:, 0]).sqrt()
        return self._boxed(shapes[which], raw, share, numbers[:, 1:])

    def _kept(self, raw: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """Each image's own ratio, as many cells as the context holds; now and then its central square."""
        full = raw.to(torch.float64)
        limit = self.mixed.max_ratio
        shown = torch.minimum(full, full.flip(1) * limit)
        if draw is not None and self.mixed.central:
            square = full.amin(dim=1, keepdim=True).expand_as(full)
            large = full.amin(dim=1) >= math.isqrt(self.context) * self.cell
            chosen = draw.uniform("central", (len(raw),), device=raw.device) < self.mixed.central
            shown = torch.where((chosen & large)[:, None], square, shown)
        factor = (self.context * self.cell**2 / shown.prod(dim=1)).sqrt()
        if not self.mixed.enlarge:
            factor = factor.clamp(max=1)
        cells = (shown * factor[:, None] / self.cell + 1e-6).floor().clamp(min=1)
        most = torch.tensor([side // self.cell for side in self.canvas], device=raw.device, dtype=cells.dtype)
        return self._boxed((torch.minimum(cells, most) * self.cell).to(torch.int64), raw, None, None, shown)

    def _boxed(
        self, sizes: Tensor, raw: Tensor, share: Tensor | None, place: Tensor | None, within: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The largest box of the sizes' ratio inside an image (times ``share``), in its centre or at ``place`` in [0, 1)."""
        full = raw.to(torch.float64)
        inner = full if within is None else within
        wanted = sizes.to(torch.float64)
        box = wanted * (inner / wanted).amin(dim=1, keepdim=True)
        if share is not None:
            box = (box * share[:, None]).clamp(min=1).minimum(full)
        free = full - box
        corner = free / 2 if place is None else free * place
        return sizes, torch.cat((corner, box), dim=1)

    def resampled(self, images: Tensor, boxes: Tensor, sizes: Tensor) -> Tensor:
        """float32 ``[B, C, *canvas]``: each box (top, left, height, width) at its own size in the upper left corner; what lies
        outside is not defined."""
        corner, extent = boxes[:, :2].float(), boxes[:, 2:].float()
        scale = extent / sizes
        rows, columns = (
            Window(corner[:, a], scale[:, a], corner[:, a].floor(), (corner + extent)[:, a].ceil()) for a in (0, 1)
        )
        pixels = by_matrices(images, rows, columns, self.canvas, self.preprocessing.interpolation)
        return pixels.clamp(0, self.apply.full_range)

    def inside(self, sizes: Tensor) -> Tensor:
        """bool ``[B, *canvas]``: the pixels that belong to each sample."""
        rows, columns = (torch.arange(side, device=sizes.device) for side in self.canvas)
        return (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None, :]


def mirrored(images: Tensor, widths: Tensor) -> Tensor:
    """``[B, C, H, W]`` left to right within the first ``widths [B]`` columns; the others stay."""
    columns = torch.arange(images.shape[3], device=images.device)
    index = torch.where(columns < widths[:, None], widths[:, None] - 1 - columns, columns)
    return images.gather(3, index[:, None, None].expand_as(images))


def check_shape(height: int, width: int, cell: int, context: int) -> None:
    """Raises ``UserError`` where the cell does not divide a shape, or its tokens exceed the context."""
    for side in (height, width):
        if side % cell:
            near = max(round(side / cell), 1) * cell
            raise UserError(f"size {height}x{width} does not fit: sides are multiples of {cell}, such as {near}")
    tokens = height // cell * (width // cell)
    if tokens > context:
        raise UserError(
            f"size {height}x{width} has {tokens} tokens, more than the context of {context}: make it smaller"
        )


def largest(shapes: Sequence[tuple[int, int]], cell: int, context: int, max_ratio: float) -> tuple[int, int]:
    """The canvas (height, width) that every sample fits in."""
    if shapes:
        return max(h for h, _ in shapes), max(w for _, w in shapes)
    side = min(max(int(math.sqrt(context * max_ratio) + 1e-6), 1), context) * cell
    return side, side


def packed(counts: Sequence[int], context: int) -> list[list[int]]:
    """Which samples share a sequence of ``context`` tokens: the longest first, each into the first sequence with room.

    counts: tokens of each sample. Raises ``UserError`` for a sample that fits in none.
    """
    if counts and max(counts) > context:
        raise UserError(f"a sample of {max(counts)} tokens does not fit into a context of {context}")
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        row = next((r for r, left in enumerate(room) if left >= counts[sample]), None)
        if row is None:
            rows.append([])
            room.append(context)
            row = len(rows) - 1
        rows[row].append(sample)
        room[row] -= counts[sample]
    return rows
