"""First stages that we trained ourselves: the tokenizer and the KL autoencoder, read from a run or an earlier stage."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from unmask.config import validated
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.official.hub import load_trainable
from unmask.systems.generation.first_stage.kl import KLAutoencoder
from unmask.systems.generation.first_stage.stage import FirstStage, FirstStageConfig
from unmask.systems.generation.first_stage.vq import VQTokenizer

CLASSES: dict[str, type[VQTokenizer] | type[KLAutoencoder]] = {"vq": VQTokenizer, "kl": KLAutoencoder}


class VQStage(FirstStage):
    kind: ClassVar[str] = "vq"

    def __init__(self, net: VQTokenizer):
        super().__init__()
        self.net, self.factor = net, net.factor
        self.codes, self.channels = net.config.codes, net.config.code_dim
        self.image_channels = net.config.channels or 3

    @torch.no_grad()
    def encode(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        self.check_images(images)
        return self.net.ids(images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.net.up(self.net.cells(latents)).float().clamp(-1, 1)


class KLStage(FirstStage):
    """Latents times ``scale``, so that they have about variance 1; open: from what the training measured."""

    kind: ClassVar[str] = "kl"

    def __init__(self, net: KLAutoencoder, scale: float | None):
        super().__init__()
        self.net, self.factor, self.given = net, net.factor, scale
        self.channels, self.image_channels = net.config.latent_channels, net.config.channels or 3

    @property
    def scale(self) -> Tensor | float:
        return self.given if self.given is not None else self.net.variance.clamp(min=1e-12).rsqrt()

    @torch.no_grad()
    def encode(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        self.check_images(images)
        mean, log_variance = self.net.moments(images)
        if draw is not None:
            noise = draw.normal("posterior", mean.shape, device=mean.device)
            mean = mean + torch.exp(0.5 * log_variance) * noise
        return mean * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.net.up(latents / self.scale).float().clamp(-1, 1)


def opened(config: FirstStageConfig, folder: Path | None) -> tuple[FirstStage, FirstStageConfig]:
    """The stage of an earlier stage's folder, of the run that ``weights`` names, or (built, empty) of a saved generator."""
    cls = CLASSES[config.kind]
    where = folder or (config.weights if config.built is None else None)
    if where is not None:
        net = load_trainable(_finished(Path(where)) if Path(where).is_dir() else where)
        if not isinstance(net, cls):
            raise UserError(f"{where} holds a {net.slug}, and first_stage.kind={config.kind} reads a {cls.slug}")
    elif config.built is not None:
        net = cls(validated(cls.Config, config.built, where=f"first_stage {config.kind}"))  # type: ignore[arg-type]
    else:
        raise UserError(
            f"first_stage.kind={config.kind} has nothing to read: give first_stage.weights=RUN of a {cls.slug}, or a recipe "
            "with a stage tokenizer"
        )
    described = config.model_copy(update={"built": net.config.plain(), "weights": None})
    stage: FirstStage = VQStage(net) if isinstance(net, VQTokenizer) else KLStage(net, config.scale)
    return stage, described


def _finished(folder: Path) -> Path:
    """The model in a run whose only or whose first finished stage is the tokenizer, or the folder itself."""
    for inner in ("model", "stages/tokenizer/model"):
        if (folder / inner / "config.json").is_file():
            return folder / inner
    return folder
