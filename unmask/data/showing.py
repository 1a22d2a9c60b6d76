"""Standardised tensors as a person sees them: the way back from what a model takes to pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unmask.contracts import Preprocessing


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
