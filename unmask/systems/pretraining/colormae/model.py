"""ColorMAE. Hinojosa, Liu, Ghanem, ECCV 2024, arXiv:2407.13036.

MAE with one change: what is hidden follows filtered noise, so that hidden regions have a chosen grain. Green noise, a
middle band of frequencies, teaches dense tasks best; network and cost stay MAE's.

    model = ColorMAE(ColorMAE.Config(backbone="vit_small_patch16", color="green"))
    loss = model.loss({"image": images}, draw=Seeded(0))["loss"]
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from unmask.config import Field
from unmask.contracts import Batch, Picture, Progress
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.masks.color import COLORS, Color, Range, checked_sigmas, color_mask, noise_bank, shared_crop_mask
from unmask.masks.mask import Mask
from unmask.masks.random import random_mask, visible_count
from unmask.systems.pretraining.mae.model import MAE


class ColorMAE(MAE):
    slug = "colormae"

    class Config(MAE.Config):
        masking: Literal["color"] = Field("color", description="always coloured noise; for others use mae")  # type: ignore[assignment]
        color: Color = Field("green", description="white, red, blue, green or purple noise")
        schedule: tuple[tuple[float, Color], ...] = Field(
            (), description="other colours from given epochs on: [[200, blue], [400, red]]"
        )
        bank_size: int = Field(3072, ge=1, description="noise images, made once")
        noise_size: int = Field(64, ge=1, description="side of a noise image in patches; at least the grid's")
        bank_seed: int = Field(0, description="seed of the noise images")
        sigmas: tuple[Range, ...] | None = Field(
            None, description="blurs of `color` in patches: [[low, high]], for green and purple two; default by colour"
        )
        shared_crop: bool = Field(False, description="the authors' way: one crop and flip for all samples of a round")

        @field_validator("schedule")
        @classmethod
        def _rising_epochs(cls, value: tuple[tuple[float, Color], ...]) -> tuple[tuple[float, Color], ...]:
            epochs = [epoch for epoch, _ in value]
            if any(later <= earlier for earlier, later in itertools.pairwise([0.0, *epochs])):
                raise ValueError(f"epochs {epochs} are out of order: they must be positive and rising")
            return value

        @model_validator(mode="after")
        def _sigmas_fit(self) -> ColorMAE.Config:
            try:
                checked_sigmas(self.color, self.sigmas)
            except UserError as error:
                raise ValueError(str(error)) from None
            return self

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        if max(self.grid) > config.noise_size:
            grid = "x".join(str(g) for g in self.grid)
            raise UserError(
                f"colormae: grid {grid} is larger than noise_size={config.noise_size}: use noise_size={max(self.grid)} or more"
            )
        self._banks: dict[tuple[str, str], Tensor] = {}  # made again from the seed wherever they are needed

    def mask(self, images: Tensor, draw: Draw, progress: Progress | None = None) -> Mask:
        """Which patches to hide: exactly ``N - int(N * (1 - ratio))`` a sample, where the noise is low."""
        return self.mask_of(self.color_at(progress), images, draw)

    def color_at(self, progress: Progress | None) -> str:
        """The colour in force: the last of the schedule whose epoch has begun."""
        epoch = progress.epoch if progress is not None else 0.0
        return next((color for start, color in reversed(self.config.schedule) if epoch >= start), self.config.color)

    def mask_of(self, color: str, images: Tensor, draw: Draw) -> Mask:
        """A mask of one colour."""
        c, grid, batch = self.config, self.encoder.grid(images.shape[2:]), len(images)
        if color == "white" and not c.shared_crop:
            noise = draw.uniform("noise", (batch, grid[0] * grid[1]), device=images.device)
            return random_mask(noise, c.mask_ratio, grid)  # white noise has no grain to keep: MAE's masks
        make = shared_crop_mask if c.shared_crop else color_mask
        return make(self.bank(color, images.device), draw, batch, grid, c.mask_ratio)

    def bank(self, color: str, device: torch.device) -> Tensor:
        """The noise images of a colour on a device, ``[bank_size, noise_size, noise_size]``."""
        c, key = self.config, (color, str(device))
        if key not in self._banks:
            sigmas = c.sigmas if color == c.color else None
            self._banks[key] = noise_bank(
                color, c.bank_size, c.noise_size, seed=c.bank_seed, sigmas=sigmas, device=device
            )
        return self._banks[key]

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        """Reconstructions, and for each colour a mask of the same images."""
        images = batch["image"][:4]
        ratio = 1 - visible_count(self.grid[0] * self.grid[1], self.config.mask_ratio) / (self.grid[0] * self.grid[1])
        rows = [
            [_shown(m) for m in masks] for masks in zip(*(self._masks(c, images, draw) for c in COLORS), strict=True)
        ]
        caption = f"Masks by colour, {ratio:.0%} hidden (dark). This step uses {self.color_at(progress)}."
        return [*super().preview(batch, draw, progress), Picture("masks", list(COLORS), rows, caption)]

    def _masks(self, color: str, images: Tensor, draw: Draw) -> Tensor:
        return self.mask_of(color, images, draw).on_grid().cpu()

    def no_weight_decay(self) -> set[str]:
        """mmpretrain's recipe also spares the class and mask tokens."""
        return super().no_weight_decay() | {"encoder.cls_token", "decoder.mask_token"}


def _shown(hidden: Tensor) -> np.ndarray:
    """A mask ``[h, w]`` as uint8 ``[H, W, 3]``: hidden dark, visible light, eight pixels a patch."""
    grey = torch.where(hidden, 40, 230).to(torch.uint8)
    return grey.repeat_interleave(8, 0).repeat_interleave(8, 1)[..., None].expand(-1, -1, 3).contiguous().numpy()
