"""Scalable diffusion models with transformers (DiT). Peebles, Xie, ICCV 2023, arXiv:2212.09748.

Gaussian noise hides an image (or its latents); a transformer that time and class modulate says what the noise was.

    model = DiT(DiT.Config(variant="S", image_size=(32, 32), classes=10, patch_size=4))
    loss = model.loss({"image": images, "label": labels}, draw=Seeded(0))["loss"]     # images in [-1, 1]
    samples = model.generate(4, Seeded(0), condition="cat", steps=50, guidance=1.5)

Legend: images ``[B, C, H, W]`` in [-1, 1]; x0 what the first stage makes of them, ``[B, c, h, w]``; t int64 ``[B]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn

from unmask import config as configs
from unmask.config import Field
from unmask.contracts import Batch, Losses, Progress
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.generation import samplers
from unmask.systems.generation.diffusion import GaussianDiffusion
from unmask.systems.generation.dit.answers import alone
from unmask.systems.generation.dit.network import VARIANTS, DiTNetwork, with_variant
from unmask.systems.generation.generator import Asked, GeneratorConfig, ImageGenerator, dropped_classes
from unmask.systems.generation.guidance import combined, doubled, with_empty


class DiT(ImageGenerator):
    slug = "dit"
    loss_units = "squared error of the noise"
    default_steps = 250
    default_guidance = 1.5
    measures: ClassVar[Mapping[str, str]] = {
        "epsilon_mse": "squared error of the noise at fixed times",
        "frechet": "Fréchet distance of samples to test images",
    }
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"epsilon_mse", "frechet"})

    class Config(GeneratorConfig, DiTNetwork.Config):
        class_dropout: float = Field(0.1, ge=0, le=1, description="share of classes replaced by none, for guidance")
        diffusion_steps: int = Field(1000, ge=1, description="steps of the noise process")
        noise_schedule: Literal["linear", "cosine"] = "linear"
        fixed_variance: Literal["large", "small"] = Field(
            "large", description="the sampler's variance where none is learned: β or the posterior's"
        )
        guidance_channels: int | Literal["all"] = Field(
            3, description="latent channels that guidance acts on: 3 (the authors', even of four), a number, or all"
        )
        measure_samples: int = Field(0, ge=0, description="samples for the Fréchet distance of `measure`; 0: none")

        @model_validator(mode="before")
        @classmethod
        def _sizes_of_the_variant(cls, values: Any) -> Any:
            return with_variant(values, VARIANTS)

        @model_validator(mode="after")
        def _channels_to_guide(self) -> Any:
            if self.guidance_channels != "all" and int(self.guidance_channels) < 1:
                raise ValueError(f"guidance_channels={self.guidance_channels} must be at least 1, or all")
            return self

    class Ask(configs.Config):
        sampler: Literal["ddpm", "ddim"] = Field("ddpm", description="ancestral, or DDIM (fewer steps, no noise)")
        eta: float = Field(0.0, ge=0, le=1, description="noise of DDIM: 0 none, 1 as much as ddpm's small variance")
        clip: bool | None = Field(
            None,
            description="keep guesses of the image within [-1, 1] at every step; open: for pixels, not for latents",
        )

        @model_validator(mode="after")
        def _eta_is_ddims(self) -> Any:
            if self.eta and self.sampler != "ddim":
                raise ValueError(f"eta={self.eta:g} is an option of sampler=ddim")
            return self

    config: Config

    def __init__(self, config: Config, sources: Mapping[str, Path] | None = None):
        super().__init__(config, sources)
        self.most_steps = config.diffusion_steps
        if config.learn_sigma:
            self.loss_units = "squared error of the noise, and bits of the variational bound"
        self.diffusion = GaussianDiffusion.of(config.noise_schedule, config.diffusion_steps, config.fixed_variance)
        size = self.config.image_size or (0, 0)
        grid = token_grid(size, self.first_stage.grid(size), config.patch_size, self.first_stage.factor, self.slug)
        self.network = self.make_network(config, grid)

    def make_network(self, config: Config, grid: tuple[int, int]) -> nn.Module:
        """``network(x_t, t, classes)`` for x_t ``[B, c, h, w]``: what a system built on this one replaces."""
        return DiTNetwork(config, in_channels=self.first_stage.channels, grid=grid, classes=self.num_classes)

    # --- learning ---
    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        """``mse`` of the noise and, where the variance is learned, ``vb``, the variational bound in bits; their sum."""
        x0 = self.latents(batch["image"], draw)
        classes = self.labels(batch, draw)
        t = draw.integers("time", 0, self.config.diffusion_steps, (len(x0),), device=x0.device)
        noise = draw.normal("noise", x0.shape, device=x0.device)
        terms = self.loss_terms(x0, t, noise, classes)
        return {"loss": sum(terms.values()).mean(), **{k: v.mean().detach() for k, v in terms.items()}}  # type: ignore[union-attr]

    def loss_terms(self, x0: Tensor, t: Tensor, noise: Tensor, classes: Tensor | None) -> dict[str, Tensor]:
        """ "mse" and, with a learned variance, "vb" of each sample, ``[B]``."""
        noisy = self.diffusion.noisy(x0, t, noise)
        output = self.network(noisy, t, classes).float()
        return self.diffusion.loss_terms(output, x0, noisy, t, noise)

    def latents(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """x0, without gradients: the first stage is not trained here."""
        with torch.no_grad():
            return self.first_stage.encode(images, draw).float()

    def labels(self, batch: Batch, draw: Draw | None = None) -> Tensor | None:
        """int64 ``[B]``, unknown ones (-1) as the empty class, some dropped while training; None without classes."""
        if not self.num_classes:
            return None
        labels = batch.get("label")
        if labels is None:
            count, device = len(batch["image"]), batch["image"].device
            return torch.full((count,), self.empty, dtype=torch.int64, device=device)
        labels = torch.where(labels < 0, torch.full_like(labels, self.empty), labels)
        if draw is None or not self.training:
            return labels
        return dropped_classes(labels, draw, self.config.class_dropout, self.empty)

    def blocks_to_compile(self) -> list[nn.Module]:
        return list(cast(nn.ModuleList, self.network.blocks))

    # --- sampling ---
    def sample(self, n: int, draw: Draw, asked: Asked) -> Tensor:
        rows, columns = self.first_stage.grid(asked.size)
        start = samplers.start_noise(draw, (n, self.first_stage.channels, rows, columns), device=self.device)
        field, diffusion = self.field(asked.classes, asked.guidance), self.diffusion.respaced(asked.steps)
        clip = self.first_stage.kind == "pixels" if asked.ask.clip is None else asked.ask.clip
        if asked.ask.sampler == "ddim":
            x = samplers.ddim(field, diffusion, start, draw, eta=asked.ask.eta, clip=clip, tell=asked.tell)
        else:
            x = samplers.ddpm(field, diffusion, start, draw, clip=clip, tell=asked.tell)
        return self.first_stage.decode(x)

    def field(self, classes: Tensor | None, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided network as samplers know it; both passes run as one batch, on the same x."""

        def plain(x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, classes).float()

        if classes is None or guidance == 1:
            return plain
        both, some = with_empty(classes, self.empty), self.config.guidance_channels

        def guided(x: Tensor, t: Tensor) -> Tensor:
            out = self.network(doubled(x), doubled(t), both).float()
            if some != "all":
                return combined(out, guidance, channels=int(some))
            if out.shape[1] == x.shape[1]:
                return combined(out, guidance)
            return combined(out, guidance, channels=x.shape[1])  # the variance values stay the conditional ones

        return guided

    def preview_options(self) -> dict[str, Any]:
        return {"sampler": "ddim"}

    # --- telling ---
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """The noise error, at the same times and noise, of predicting none, and of the best linear guess that looks at every value
        alone and knows the data's mean square."""
        x0 = self.latents(batch["image"])
        t = draw.integers("time", 0, self.config.diffusion_steps, (len(x0),), device=x0.device)
        noise = draw.normal("noise", x0.shape, device=x0.device)
        guess = alone(self.diffusion, self.diffusion.noisy(x0, t, noise), t, x0.square().mean())
        return {"no noise": noise.square().mean(), "each value alone": (guess - noise).square().mean()}

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
        """``epsilon_mse``: every test image (at most 1,000) at four of ten fixed times, with its own fixed noise."""
        from unmask.systems.generation.dit.measuring import measure

        return measure(self, data, draw, limit=limit, device=device, tell=tell, folder=folder)


def token_grid(
    size: tuple[int, int], latent: tuple[int, int], patch: int, factor: int, slug: str = "dit"
) -> tuple[int, int]:
    """(rows, columns) of tokens of latents. Raises ``UserError`` where the patch does not divide them."""
    if any(side % patch for side in latent):
        unit = patch * factor
        near = [max(round(pixels / unit), 1) * unit for pixels in size]
        raise UserError(
            f"{slug}: image size {size[0]}x{size[1]} does not fit: it takes multiples of {unit} (patch_size {patch}"
            f"{f' x first stage {factor}' if factor > 1 else ''}), such as {near[0]}x{near[1]}"
        )
    return latent[0] // patch, latent[1] // patch
