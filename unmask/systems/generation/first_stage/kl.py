"""Our KL autoencoder: latents are drawn from a narrow Gaussian a cell (Rombach et al. 2022), without the adversary."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.config import Field
from unmask.contracts import Batch, Losses, Progress
from unmask.draw import Draw
from unmask.nn.collective import summed_over_processes
from unmask.systems.generation.first_stage.autoencoder import Autoencoder, AutoencoderConfig


class KLAutoencoder(Autoencoder):
    slug = "kl_autoencoder"

    class Config(AutoencoderConfig):
        latent_channels: int = Field(4, ge=1, description="channels of the latents")
        kl: float = Field(1e-6, ge=0, description="weight of KL(latents ‖ standard normal), summed over a picture")

    config: Config
    variance: Tensor

    def __init__(self, config: Config):
        super().__init__(config, 2 * config.latent_channels, config.latent_channels)
        self.register_buffer("variance", torch.ones(()))  # of the latents: what a generator's scale is taken from
        self._waiting: list[Tensor] = []

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, each ``[B, c, h, w]``."""
        mean, log_variance = self.down(images).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def rebuilt(self, images: Tensor) -> Tensor:
        return self.up(self.moments(images)[0]).clamp(-1, 1)

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        images = batch["image"]
        mean, log_variance = self.moments(images)
        noise = draw.normal("latent", mean.shape, device=mean.device)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        pixels = self.pixel_loss(self.up(latents), images)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1).mean()
        if self.training:
            moments = torch.stack((latents.detach().square().sum(), latents.new_tensor(float(latents.numel()))))
            self._waiting.append(summed_over_processes(moments))
        return {"loss": pixels + self.config.kl * divergence, "pixels": pixels, "kl": divergence}

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        if not self._waiting:
            return
        total, count = torch.stack(self._waiting).sum(dim=0)
        self._waiting.clear()
        kept = 0.0 if progress.step == 0 else 0.95
        self.variance.lerp_(total / count, 1 - kept)
