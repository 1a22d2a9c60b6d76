"""``Autoencoder``: what training our tokenizer and our KL autoencoder have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask import config as configs
from unmask.config import Field
from unmask.contracts import Batch, DataFacts, Picture, Progress, Trainable
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.generation.first_stage.convnet import PictureDecoder, PictureEncoder
from unmask.systems.generation.pictures import to_uint8


class AutoencoderConfig(configs.Config):
    image_size: tuple[int, int] | None = Field(None, description="pixels (height, width); from the data if open")
    channels: int | None = Field(None, ge=1, description="of the images; from the data if open")
    width: int = Field(32, ge=4, description="channels of the convolutions, times each multiplier")
    multipliers: tuple[int, ...] = Field((1, 2, 2), min_length=1, description="one a scale; each further one halves")
    blocks: int = Field(1, ge=1, description="residual blocks a scale")
    absolute: float = Field(1.0, ge=0, description="weight of the absolute error of pixels")
    squared: float = Field(1.0, ge=0, description="weight of the squared error of pixels")


class Autoencoder(Trainable):
    """Pictures in [-1, 1] through a narrow middle and back. The data are to be normalised with ``normalise: half``."""

    loss_units = "absolute and squared error of pixels in [-1, 1]"
    measures: ClassVar = {"psnr": "PSNR of decoded test images, dB"}

    Config = AutoencoderConfig
    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, moments: int, latent: int):
        """moments: channels that the encoder gives; latent: channels that the decoder takes."""
        super().__init__(config)
        if config.channels is None:
            raise UserError(f"{self.slug}: channels is open: give their number (channels=3), or data")
        parts = (config.channels, config.width, config.multipliers, config.blocks)
        self.down, self.up = PictureEncoder(*parts, moments), PictureDecoder(*parts, latent)
        self.factor = 2 ** (len(config.multipliers) - 1)
        for pixels in config.image_size or ():
            if pixels % self.factor:
                raise UserError(
                    f"{self.slug}: image size {pixels} is no multiple of {self.factor}: use fewer multipliers"
                )

    @classmethod
    def adapted(cls, config: Any, facts: DataFacts) -> Any:
        values: dict[str, Any] = {}
        if config.channels is None and facts.channels:
            values["channels"] = facts.channels
        if config.image_size is None and facts.image_size:
            values["image_size"] = tuple(facts.image_size)
        if facts.mean and facts.std and any(abs(v - 0.5) > 1e-6 for v in (*facts.mean, *facts.std)):
            raise UserError(f"{cls.slug} wants pixels in [-1, 1]: use data.normalise=half")
        return config.model_copy(update=values)

    def rebuilt(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` through the middle and back, clamped to [-1, 1]."""
        raise NotImplementedError

    def pixel_loss(self, rebuilt: Tensor, images: Tensor) -> Tensor:
        rebuilt, images = rebuilt.float(), images.float()
        return self.config.absolute * F.l1_loss(rebuilt, images) + self.config.squared * F.mse_loss(rebuilt, images)

    # --- telling a person ---
    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        images = batch["image"][:8]
        rows = [list(pair) for pair in zip(to_uint8(images), to_uint8(self.rebuilt(images)), strict=True)]
        return [
            Picture(
                "reconstruction", ["image", "decoded"], rows, "What the generator's pictures can look like at best."
            )
        ]

    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> dict[str, Tensor]:
        images = batch["image"]
        return {
            "mean colour of each image": self.pixel_loss(
                images.mean(dim=(2, 3), keepdim=True).expand_as(images), images
            )
        }

    @torch.no_grad()
    def measure(
        self,
        data: Any,
        draw: Draw,
        *,
        limit: int | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        from unmask.systems.generation.metrics import real_images

        where = device or next(self.parameters()).device
        self.to(where).eval()
        total, flat, count = 0.0, 0.0, 0
        for batch in real_images(
            data, limit or 1000, size=self.config.image_size, channels=self.config.channels, device=where
        ):
            images = batch["image"]
            error = (self.rebuilt(images) - images).square().flatten(1).mean(dim=1)
            mean = (images.mean(dim=(2, 3), keepdim=True) - images).square().flatten(1).mean(dim=1)
            total, flat = total + float(_psnr(error).sum()), flat + float(_psnr(mean).sum())
            count += len(images)
        return {
            "psnr": total / count,
            "samples": count,
            "baseline": {"mean colour of each image": {"psnr": flat / count}},
        }


def _psnr(error: Tensor) -> Tensor:
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
