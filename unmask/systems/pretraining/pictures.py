"""Pictures that masked pre-training shows: original, what the model saw, what it predicted, both pasted together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.contracts import Picture, Preprocessing

GREY = 0.5  # what hidden pixels look like in "what the model saw"


def displayable(images: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    """Standardised ``[B, C, H, W]`` -> float ``[B, 3, H, W]`` in [0, 1].

    One or two channels are shown as grey (the first), more than three as the first three. Data deeper than eight bits is
    stretched between its 0.5 and 99.5 percentiles, an image at a time, as viewers do.
    """
    images = images.detach().float().cpu()
    channels = images.shape[1]
    if preprocessing is not None and len(preprocessing.mean) == channels:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        images = images * std + mean
    images = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    if preprocessing is None or preprocessing.full_range != 255.0:
        flat = images.flatten(1)
        low, high = (flat.quantile(q, dim=1).view(-1, 1, 1, 1) for q in (0.005, 0.995))
        images = (images - low) / (high - low).clamp(min=1e-6)
    return images.clamp(0, 1)


def uint8_images(images: Tensor) -> list[np.ndarray]:
    """float ``[B, 3, H, W]`` in [0, 1] -> list of uint8 ``[H, W, 3]``."""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())


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
    columns: dict[str, Tensor] = {
        "original": first,
        "what the model saw": torch.where(hidden, torch.full_like(first, GREY), first),
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
