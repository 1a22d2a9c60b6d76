"""``FirstStage``: what stands between pictures and what a generator models: pixels themselves, latents, or token ids.

stage, described = open_first_stage(FirstStageConfig(kind="vq"), sources={"tokenizer": folder})
ids = stage.encode(images)          # images float [B, C, H, W] in [-1, 1] -> int64 [B, h, w], or float [B, c, h, w]
images = stage.decode(ids)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from unmask.config import Config, Field
from unmask.draw import Draw
from unmask.errors import UserError

Kind = Literal["pixels", "vq", "kl", "diffusers"]


class FirstStageConfig(Config):
    """Which first stage. What was opened once is written into ``built``, so that a saved generator needs no other folder."""

    kind: Kind = Field("pixels", description="pixels as they are, our vq tokenizer or kl autoencoder, or diffusers' KL")
    weights: str | None = Field(
        None, description="vq, kl: a run of the tokenizer; diffusers: a folder or hub id of an AutoencoderKL"
    )
    codes: int | None = Field(
        None, ge=2, description="the size that the code book must have; open: the tokenizer's own"
    )
    levels: int | None = Field(None, ge=2, le=16, description="pixels: so many levels a channel, as token ids")
    scale: float | None = Field(
        None,
        gt=0,
        description="latents are multiplied by it; open: 0.18215 or the VAE's own, kl: 1 / measured deviation",
    )
    built: dict[str, Any] | None = Field(None, description="filled in: the architecture that was opened")


class FirstStage(nn.Module):
    """Frozen while a generator learns. ``channels``: of the latents; ``codes``: how many token ids, None for latents;
    ``factor``: pixels along a side of one latent cell."""

    kind: ClassVar[str] = ""
    channels: int = 3
    codes: int | None = None
    factor: int = 1
    image_channels: int = 3

    @property
    def discrete(self) -> bool:
        return self.codes is not None

    def encode(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """float ``[B, C, H, W]`` in [-1, 1] to latents float ``[B, c, h, w]`` (scaled), or ids int64 ``[B, h, w]``.

        draw: where given, latents of a KL autoencoder are sampled ("posterior"), else they are its mean.
        """
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Back to float ``[B, C, H, W]``, clamped to [-1, 1]."""
        raise NotImplementedError

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Latent cells (rows, columns) of an image size. Raises ``UserError`` where the factor does not divide it."""
        for pixels in size:
            if pixels < 1 or pixels % self.factor:
                near = max(round(pixels / self.factor), 1) * self.factor
                raise UserError(
                    f"size {size[0]}x{size[1]} does not fit: {self.kind} takes multiples of {self.factor}, such as {near}"
                )
        return int(size[0]) // self.factor, int(size[1]) // self.factor

    def check_images(self, images: Tensor) -> None:
        """Raises ``UserError`` for images of other channels, or of a size that the factor does not divide."""
        if images.shape[1] != self.image_channels:
            raise UserError(
                f"{self.kind} encodes images of {self.image_channels} channels, these have {images.shape[1]}"
            )
        self.grid(tuple(images.shape[2:]))

    def frozen(self) -> FirstStage:
        """This stage without gradients, in evaluation mode."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> FirstStage:
        """Stays in evaluation mode: it is never trained as a part of a generator."""
        return super().train(False)


def open_first_stage(
    config: FirstStageConfig, *, sources: Mapping[str, Path] | None = None, channels: int = 3
) -> tuple[FirstStage, FirstStageConfig]:
    """The frozen first stage that the options describe, and the options with all that is needed to make it again.

    sources: folders of the earlier stages of a run; "tokenizer" is read by vq and kl. channels: of the images (pixels).
    A config whose ``built`` is filled and that names no weights is built without weights: a saved generator brings them.
    Raises ``UserError``: nothing to read, another kind, a code book of another size.
    """
    from unmask.systems.generation.first_stage import diffusers, pixels, trained

    _refuse_misplaced(config)
    folder = (sources or {}).get("tokenizer")
    if config.kind == "pixels":
        stage: FirstStage = pixels.PixelStage(channels, config.levels)
        described = config.model_copy(update={"built": {"channels": channels}})
    elif config.kind == "diffusers":
        stage, described = diffusers.opened(config)
    else:
        stage, described = trained.opened(config, folder)
    if config.codes is not None and stage.codes != config.codes:
        raise UserError(
            f"first_stage.codes={config.codes} does not match: the code book of this {config.kind} stage has {stage.codes}"
        )
    return stage.frozen(), described


def _refuse_misplaced(config: FirstStageConfig) -> None:
    if config.levels is not None and config.kind != "pixels":
        raise UserError(f"first_stage.levels is for kind=pixels, not {config.kind}: leave it out")
    if config.codes is not None and config.kind in ("kl", "diffusers"):
        raise UserError(f"first_stage.codes is for token ids, and {config.kind} gives latents: leave it out")
    if config.weights is not None and config.kind == "pixels":
        raise UserError("first_stage.weights is for vq, kl and diffusers; pixels have none: leave it out")
