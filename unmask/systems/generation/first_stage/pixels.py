"""Pixels as they are: no first stage at all, or a few levels of each channel as one token id."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.generation.first_stage.stage import FirstStage


class PixelStage(FirstStage):
    """levels: where given, a pixel is the id Σ level_c · levels^c of its channels' nearest levels, 0 … levels^channels - 1."""

    kind: ClassVar[str] = "pixels"

    def __init__(self, channels: int = 3, levels: int | None = None):
        super().__init__()
        self.channels = self.image_channels = channels
        self.levels = levels
        self.codes = None if levels is None else levels**channels
        if self.codes is not None and self.codes > 2**16:
            raise UserError(
                f"first_stage.levels={levels} makes {self.codes} token ids of {channels} channels: use fewer"
            )

    def encode(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        self.check_images(images)
        if self.levels is None:
            return images
        level = ((images.float() + 1) / 2 * (self.levels - 1)).round().long().clamp(0, self.levels - 1)
        return (level * self._places(images.device)).sum(dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        if self.levels is None:
            return latents.clamp(-1, 1)
        level = latents[:, None] // self._places(latents.device) % self.levels
        return level.float() / (self.levels - 1) * 2 - 1

    def _places(self, device: torch.device) -> Tensor:
        powers = [(self.levels or 1) ** c for c in range(self.channels)]
        return torch.tensor(powers, device=device)[:, None, None]
