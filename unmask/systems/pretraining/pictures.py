"""Pictures that masked pre-training shows: original, what the model saw, what it predicted, both pasted together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.contracts import Picture, Preprocessing
from unmask.data.showing import displayable, uint8_images

HIDDEN = (94, 112, 140)  # a blue-grey that few photographs hold: hidden pixels in "what the model saw"


def reconstruction_picture(
    original: Tensor,
    predicted: Tensor,
    hidden: Tensor,
    preprocessing: Preprocessing | None,
    *,
    name: str = "reconstruction",
    caption: str = "",
    more: dict[str, Tensor] | None = None,
) -> Picture:
    """A row a sample: original | what the model saw | prediction | pasted.

    original, predicted: standardised ``[B, C, H, W]``; hidden: bool ``[B, 1, H, W]``. more: further columns, standardised.
    """
    together = torch.cat([original, predicted, *(more or {}).values()], dim=0)
    shown = displayable_together(together, len(original), preprocessing)
    first, guess, *others = shown
    hidden = hidden.cpu()
    paint = torch.tensor(HIDDEN, dtype=first.dtype).view(1, 3, 1, 1) / 255
    columns: dict[str, Tensor] = {
        "original": first,
        "what the model saw": torch.where(hidden, paint, first),
        "prediction": guess,
        "pasted": torch.where(hidden, guess, first),
        **dict(zip(more or {}, others, strict=True)),
    }
    return picture_of(name, columns, caption)


def displayable_together(images: Tensor, each: int, preprocessing: Preprocessing | None) -> list[Tensor]:
    """Several columns ``[k * each, C, H, W]`` stretched alike, by what the first column (the original) needs."""
    if preprocessing is not None and preprocessing.full_range == 255.0:
        return list(displayable(images, preprocessing).split(each))
    # side by side an original and its prediction must share one stretch: put them into one tall image, then cut again
    parts = images.split(each)
    tall = displayable(torch.cat(parts, dim=2), preprocessing)
    return list(tall.split(images.shape[2], dim=2))


def picture_of(name: str, columns: dict[str, Tensor], caption: str = "") -> Picture:
    """A picture from columns of float ``[B, 3, H, W]`` images."""
    cells: list[list[Any]] = [uint8_images(c) for c in columns.values()]
    return Picture(name, list(columns), [list(row) for row in zip(*cells, strict=True)], caption)
