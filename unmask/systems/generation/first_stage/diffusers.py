"""diffusers' ``AutoencoderKL``, from a user's folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import MissingExtra, UserError
from unmask.systems.generation.first_stage.stage import FirstStage, FirstStageConfig

SCALE = 0.18215  # of Stable Diffusion's first autoencoders, whose configuration does not always say it


class DiffusersStage(FirstStage):
    """Latents are (z - shift) · scale, z the mean of the autoencoder's posterior or, with a draw, a sample of it."""

    kind: ClassVar[str] = "diffusers"

    def __init__(self, net: Any, scale: float | None):
        super().__init__()
        self.net = net
        known = net.config
        self.channels, self.image_channels = known.latent_channels, known.in_channels
        self.factor = 2 ** (len(known.block_out_channels) - 1)
        self.scale = scale or getattr(known, "scaling_factor", None) or SCALE
        self.shift = getattr(known, "shift_factor", None) or 0.0

    @torch.no_grad()
    def encode(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        self.check_images(images)
        believed = self.net.encode(images).latent_dist
        z = believed.mean
        if draw is not None:
            z = z + believed.std * draw.normal("posterior", z.shape, device=z.device)
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.net.decode(latents / self.scale + self.shift).sample.float().clamp(-1, 1)


def opened(config: FirstStageConfig) -> tuple[FirstStage, FirstStageConfig]:
    """The autoencoder of ``weights``, or (built, empty) of a saved generator. Raises ``UserError``."""
    if config.built is None and config.weights is None:  # before the import, which takes seconds
        raise UserError("first_stage.kind=diffusers has nothing to read: give first_stage.weights=FOLDER or a hub id")
    try:
        from diffusers import AutoencoderKL  # type: ignore[attr-defined]
    except ImportError:
        raise MissingExtra("first_stage.kind=diffusers", "diffusers", "generate") from None
    if config.built is not None and config.weights is None:
        net = AutoencoderKL.from_config(dict(config.built))
    else:
        from unmask.official.hub import hub_reason
        from unmask.official.reach import quick_hub

        try:
            with quick_hub():
                net = AutoencoderKL.from_pretrained(config.weights)
        except Exception as error:  # the library's, the Hub client's and OSError for what is one fact to a user
            where = "" if Path(str(config.weights)).exists() else " (no folder is there, so the Hub was asked)"
            why = hub_reason(error)
            raise UserError(f"first_stage.weights={config.weights} gives no AutoencoderKL{where}: {why}") from None
    built = {k: v for k, v in dict(net.config).items() if not k.startswith("_")}
    return DiffusersStage(net, config.scale), config.model_copy(update={"built": built, "weights": None})
