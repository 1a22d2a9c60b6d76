"""ENAT: Rethinking Spatial-temporal Interactions in Token-based Image Synthesis. Ni, Wang, Zhou, Han, Guo, Liu, Yao, Huang,
NeurIPS 2024, arXiv:2411.06959.

An image is a grid of code book ids, some of them hidden; the network predicts those. Visible tokens pass a deep encoder
alone, hidden ones a shallow decoder that looks at them. From one sampling step to the next the features of visible
tokens are reused: only what has just become visible is encoded.

    model = ENAT(ENAT.Config(codebook_size=256, grid=8, classes=10, first_stage=None))
    loss = model.loss({"tokens": ids, "label": labels}, draw=Seeded(0))["loss"]       # a bare PyTorch loop is enough
    ids = model.sample_ids(labels, Seeded(0), SamplingSettings(steps=8))

``network="nat"`` is the baseline (MaskGIT's way): all tokens through all blocks at every step.

Legend: B samples, N tokens, K code book entries (also the id of a hidden token), V visible, M hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor
from torch.nn import functional as F

from unmask.config import Config as PlainConfig
from unmask.config import Field
from unmask.contracts import Batch, Losses, Picture, Progress, Trainable
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.generation.enat.average import AveragedCopy
from unmask.systems.generation.enat.masking import Split, training_split
from unmask.systems.generation.enat.network import State, TokenNetwork
from unmask.systems.generation.enat.sampling import Ask, SamplingSettings, sample_ids
from unmask.systems.generation.first_stage import FirstStage, FirstStageConfig
from unmask.systems.generation.generator import Asked, GeneratorConfig, ImageGenerator, dropped_classes


class ENAT(ImageGenerator):
    slug = "enat"
    loss_units = "nats a hidden token (cross-entropy)"
    Ask: ClassVar[type[PlainConfig]] = Ask
    measures: ClassVar[Mapping[str, str]] = {
        "cross_entropy": "cross-entropy of hidden test tokens, nats",
        "token_top1": "hidden test tokens guessed right, %",
        "frechet": "Fréchet distance of made images to test images",
    }
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"cross_entropy", "frechet"})
    preview_steps: ClassVar[int] = 8

    class Config(GeneratorConfig):
        network: Literal["enat", "nat"] = Field("enat", description="visible and hidden tokens apart, or all together")
        embed_dim: int = Field(1024, ge=1, description="width of a token")
        encoder_depth: int = Field(
            22, ge=0, description="blocks that see visible tokens (nat: all, with the decoder's)"
        )
        decoder_depth: int = Field(2, ge=1, description="blocks that see hidden tokens")
        num_heads: int = Field(16, ge=1, description="heads of attention")
        mlp_ratio: float = Field(4.0, gt=0, description="width of the MLP in widths of a token")
        dropout: float = Field(0.1, ge=0, lt=1, description="dropout of the embedded tokens")

        first_stage: FirstStageConfig | None = Field(  # type: ignore[assignment]
            FirstStageConfig(kind="vq"), description="what makes token ids of images; none: batches bring tokens"
        )
        codebook_size: int | None = Field(None, ge=2, description="ids of the code book; open: the first stage's")
        grid: int | tuple[int, int] | None = Field(
            None, description="rows and columns of tokens; open: the first stage's for this image size"
        )

        mask_beta: tuple[float, float] = Field((12.0, 3.0), description="Beta distribution of the share that is hidden")
        reuse_probability: float = Field(
            0.5, ge=0, le=1, description="share of steps that reuse a simulated step before"
        )
        ema: float = Field(
            0.9999,
            ge=0,
            lt=1,
            description="decay of the averaged network: it makes what is reused, and samples; 0: none",
        )
        label_dropout: float = Field(0.15, ge=0, le=1, description="share of labels replaced by the empty class")
        second_label_dropout: float = Field(
            0.0,
            ge=0,
            le=1,
            description="the same once more, as in the authors' embedder (their 0.1 makes 0.235 in all)",
        )
        label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over the code book")
        sampling: SamplingSettings = Field(
            SamplingSettings(), description="how images are made, where nothing else is asked"
        )
        frechet_images: int = Field(
            0, ge=0, description="images that are made to be measured (Fréchet distance); 0: none"
        )

        @field_validator("mask_beta")
        @classmethod
        def _positive(cls, value: tuple[float, float]) -> tuple[float, float]:
            if min(value) <= 0:
                raise ValueError(f"mask_beta={list(value)} must be two numbers above 0")
            return value

    config: Config  # type: ignore[assignment]
    first_stage: FirstStage | None  # type: ignore[assignment]

    def __init__(self, config: Config, sources: Mapping[str, Path] | None = None):
        """sources: folders of earlier stages; "tokenizer" is the first stage. Without one (``first_stage=None``) code book, grid
        and classes have to be given, batches bring ``tokens``, and no pictures come out."""
        if config.first_stage is None:
            Trainable.__init__(self, config)
            self.first_stage = None
        else:
            super().__init__(config, sources)
        self.config = config = fitted(self.config, self.first_stage)
        if config.classes is None:
            raise UserError(f"{self.slug}: classes is open: give classes=..., or data")
        assert config.codebook_size is not None
        assert isinstance(config.grid, tuple)
        self.grid, self.codebook_size = config.grid, config.codebook_size
        self.tokens = math.prod(self.grid)
        if self.tokens < 2:
            raise UserError(
                f"{self.slug}: a grid of {self.grid[0]}x{self.grid[1]} has nothing to hide: 2 tokens or more"
            )
        self.network = TokenNetwork(
            tokens=self.tokens,
            codebook_size=self.codebook_size,
            classes=self.num_classes,
            embed_dim=config.embed_dim,
            encoder_depth=config.encoder_depth,
            decoder_depth=config.decoder_depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            dropout=config.dropout,
            disentangled=config.network == "enat",
        )
        self.average = AveragedCopy(self.network) if config.ema else None
        self.default_steps, self.default_guidance = config.sampling.steps, 1 + config.sampling.cfg_scale  # type: ignore[misc]

    @property
    def sampler(self) -> TokenNetwork:
        """The network that makes images: the averaged one where there is one."""
        return self.network if self.average is None else self.average.network

    # --- learning ---
    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        """Cross-entropy over the hidden tokens, smoothed; ``token_top1``: the share of them guessed right."""
        tokens = self.token_ids(batch)
        classes = self.labels(batch, tokens)
        if self.training and self.num_classes:
            kept = (1 - self.config.label_dropout) * (1 - self.config.second_label_dropout)
            classes = dropped_classes(classes, draw, 1 - kept, self.empty)
        split = self.split(draw, tokens)
        features, _ = self.predict_hidden(tokens, classes, split, draw if self.training else None)
        logits = self.network.logits(features).float().flatten(0, 1)
        target = tokens.gather(1, split.hidden).flatten()
        loss = F.cross_entropy(logits, target, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "token_top1": (logits.detach().argmax(dim=1) == target).float().mean()}

    def split(self, draw: Draw, tokens: Tensor) -> Split:
        """What is hidden, and with some probability what was hidden in a simulated step before."""
        c = self.config
        reuse = c.reuse_probability if c.network == "enat" else 0.0
        return training_split(
            draw, len(tokens), self.tokens, beta=c.mask_beta, reuse_probability=reuse, device=tokens.device
        )

    def predict_hidden(
        self, tokens: Tensor, classes: Tensor, split: Split, draw: Draw | None = None
    ) -> tuple[Tensor, State]:
        """Features ``[B, M, D]`` of the hidden of ``tokens [B, N]``, and the state of the visible. draw: of dropout."""
        ids, previous, fresh = split.ids(tokens, self.codebook_size), None, None
        if split.fresh is not None and split.fresh < split.visible.shape[1]:
            with torch.no_grad():
                previous = self.sampler.state(ids, classes, split.visible[:, split.fresh :])
            fresh = split.visible[:, : split.fresh]
        return self.network(ids, classes, split.visible, split.hidden, fresh=fresh, previous=previous, draw=draw)

    def token_ids(self, batch: Batch) -> Tensor:
        """Ids ``[B, N]``: the batch's own ``tokens``, or what the first stage makes of its images.

        Raises ``UserError`` for another grid, for images without a first stage, and for given ids outside the code book.
        """
        given = batch.get("tokens")
        if given is not None:
            self._refuse_outside(given, self.codebook_size, "token id", "code book")
        elif self.first_stage is None:
            raise UserError(f"{self.slug} has no first stage to make tokens of images: give first_stage.weights=RUN")
        else:
            with torch.no_grad():
                given = self.first_stage.encode(batch["image"])
        shape = tuple(given.shape[1:])
        if shape not in (self.grid, (self.tokens,)):
            raise UserError(
                f"{self.slug}: these images make {'x'.join(map(str, shape))} tokens, and the model has a grid of "
                f"{self.grid[0]}x{self.grid[1]}: give images of the size it was made for"
            )
        return given.flatten(1).long()

    def labels(self, batch: Batch, tokens: Tensor) -> Tensor:
        """int64 ``[B]``; the empty class for all where the model knows no classes, and for labels that are missing (-1).

        Raises ``UserError`` for a class that the model does not know.
        """
        labels = batch.get("label")
        if not self.num_classes or labels is None:
            return torch.full((len(tokens),), self.empty, dtype=torch.int64, device=tokens.device)
        if labels.device.type == "cpu":  # looking costs a wait elsewhere
            self._refuse_outside(labels.clamp(min=0), self.num_classes, "class", "model's classes")
        return torch.where(labels < 0, self.empty, labels)

    def _refuse_outside(self, ids: Tensor, count: int, what: str, where: str) -> None:
        low, high = (int(v) for v in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise UserError(f"{self.slug}: {what} {wrong} is outside the {where}: it takes 0 ... {count - 1}")

    def after_step(self, progress: Progress) -> None:
        if self.average is not None:
            self.average.update(self.network, self.config.ema)

    def blocks_to_compile(self) -> list[Any]:
        return list(self.network.blocks)

    # --- making images ---
    def sample(self, n: int, draw: Draw, asked: Asked) -> Tensor:
        """float ``[n, C, H, W]`` in [-1, 1]."""
        classes = asked.classes
        if classes is None:
            classes = torch.full((n,), self.empty, dtype=torch.int64, device=self.device)
        ids = self.sample_ids(classes, draw, self.settings(asked), tell=asked.tell)
        assert self.first_stage is not None
        return self.first_stage.decode(ids.unflatten(1, self.grid))

    def sample_ids(
        self, classes: Tensor, draw: Draw, settings: SamplingSettings | None = None, **options: Any
    ) -> Tensor:
        """Ids ``[B, N]`` for classes ``[B]`` (the empty class: ``empty``). options: ``trace``, ``tell`` of ``decode``."""
        return sample_ids(self.sampler, classes, draw, settings or self.config.sampling, **options)

    def settings(self, asked: Asked) -> SamplingSettings:
        """The model's own options of sampling under those that were asked for."""
        given = asked.ask.model_dump(exclude_none=True)
        return self.config.sampling.model_copy(
            update={**given, "steps": asked.steps, "cfg_scale": asked.guidance - 1 if self.num_classes else 0.0}
        )

    def asked(self, n: int, draw: Draw, **given: Any) -> Asked:
        if self.first_stage is None:
            raise UserError(
                f"{self.slug}: these weights came without a tokenizer, so no pictures can be made: import them with "
                "tokenizer=RUN, a run of a VQ tokenizer with the same code book"
            )
        return super().asked(n, draw, **given)

    def made_by(self, asked: Asked, number: int) -> dict[str, Any]:
        told = super().made_by(asked, number)
        settings = self.settings(asked).model_dump(exclude={"steps"})
        return {**told, "options": settings, "network": self.config.network}

    # --- telling a person ---
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """The smoothed loss of all ids alike, and of each id as often as it occurs among this batch's tokens."""
        from unmask.systems.generation.enat.measuring import reference_losses

        return reference_losses(self.token_ids(batch), self.codebook_size, self.config.label_smoothing)

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        """Samples, and what one look makes of images of which most tokens are hidden."""
        if self.first_stage is None:
            return []
        from unmask.systems.generation.enat.measuring import filled_in

        return [*super().preview(batch, draw, progress), filled_in(self, batch, draw)]

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
        from unmask.systems.generation.enat.measuring import measure

        return measure(self, data, draw, limit=limit, device=device, tell=tell, folder=folder)


def fitted(config: ENAT.Config, stage: FirstStage | None) -> ENAT.Config:
    """The options with code book and grid as the first stage has them. Raises ``UserError`` where they are given otherwise,
    or known from nowhere."""
    codes, grid = config.codebook_size, config.grid
    grid = (grid, grid) if isinstance(grid, int) else grid
    if stage is not None:
        if stage.codes is None:
            raise UserError(
                f"enat reads token ids, and first_stage.kind={stage.kind} gives none: use kind=vq, or pixels with levels"
            )
        if codes not in (None, stage.codes):
            raise UserError(f"codebook_size={codes} does not match: the first stage's code book has {stage.codes}")
        codes = stage.codes
        if config.image_size is not None:
            made = stage.grid(config.image_size)
            if grid not in (None, made):
                raise UserError(
                    f"grid {grid[0]}x{grid[1]} does not fit: images of {config.image_size[0]}x{config.image_size[1]} pixels "  # type: ignore[index]
                    f"make {made[0]}x{made[1]} tokens"
                )
            grid = made
    if codes is None or grid is None:
        raise UserError(
            f"enat: {'codebook_size' if codes is None else 'grid'} is open: give it, or a first stage that tells it"
        )
    return config.model_copy(update={"codebook_size": codes, "grid": grid})
