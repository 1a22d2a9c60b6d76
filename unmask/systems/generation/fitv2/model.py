"""FiTv2: a flexible vision transformer for diffusion, and FiT before it. Wang, Lu, Liu, Bai et al., ICML 2024 (arXiv:2402.12376)
and 2024 (arXiv:2410.13925).

An image is a sequence of as many tokens as it has; noise hides it, a transformer with rotary positions says which way back.
One model makes any size and ratio, also beyond those of training.

    model = FiTv2(FiTv2.Config(variant="S", image_size=(32, 32), classes=0, patch_size=4, context=64))
    loss = model.loss({"image": canvas, "size": sizes}, draw=Seeded(0))["loss"]      # sizes [B, 2] in pixels
    wide = model.generate(4, Seeded(0), size=(32, 64), steps=50)

Legend: canvas ``[B, C, H, W]`` in [-1, 1], each sample at its upper left; tokens ``[B, N, P]``; t ``[B]`` from 0 (noise) to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from unmask import config as configs
from unmask.config import Field
from unmask.contracts import Batch, Losses, Picture, Progress, TrainingBatches
from unmask.data.aspect import AspectBatches, AspectSettings
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.nn.rotary import RotaryMethod
from unmask.systems.generation import flow
from unmask.systems.generation.diffusion import GaussianDiffusion
from unmask.systems.generation.dit.answers import alone, alone_in_flow
from unmask.systems.generation.dit.network import with_variant
from unmask.systems.generation.fitv2 import starting
from unmask.systems.generation.fitv2.network import VARIANTS, FiTNetwork
from unmask.systems.generation.fitv2.sampling import sampled
from unmask.systems.generation.fitv2.tokens import Packing, Tokens, packed, tokens_of
from unmask.systems.generation.generator import Asked, GeneratorConfig, ImageGenerator, dropped_classes
from unmask.systems.generation.schedules import logit_normal_time, uniform_time


class FiTv2(ImageGenerator):
    slug = "fitv2"
    loss_units = "squared error of the velocity"
    default_steps = 50
    default_guidance = 1.5
    Data: ClassVar[type[configs.Config]] = AspectSettings
    measures: ClassVar[Mapping[str, str]] = {
        "flow_loss": "squared error of the velocity at fixed times",
        "flow_loss_beyond": "the same at sizes never trained",
        "frechet": "Fréchet distance of samples to test images",
    }
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"flow_loss", "flow_loss_beyond", "frechet"})

    class Config(GeneratorConfig, FiTNetwork.Config):
        class_dropout: float = Field(0.1, ge=0, le=1, description="share of classes replaced by none, for guidance")
        time: Literal["logit_normal", "uniform"] = Field("logit_normal", description="times that a flow is trained at")
        diffusion_steps: int = Field(1000, ge=1, description="objective=diffusion: steps of the noise process")
        pack: int | None = Field(
            None, ge=1, description="put several images into rows of so many tokens; open: pad each to the context"
        )
        guidance_channels: int | Literal["all"] = Field(
            3, description="latent channels that guidance acts on: 3 (the authors', even of four), a number, or all"
        )
        init: str | None = Field(
            None, description="a run, an export or an official file whose weights training starts from"
        )
        train_only: Literal["all", "partial"] = Field(
            "all",
            description="partial: patch embedding, biases, norms and last layer alone (fine-tuning to larger sizes)",
        )
        measure_sizes: tuple[tuple[int, int], ...] = Field(
            (), description="sizes (height, width) beyond training that `measure` looks at, too"
        )
        measure_samples: int = Field(0, ge=0, description="samples for the Fréchet distance of `measure`; 0: none")

        @model_validator(mode="before")
        @classmethod
        def _sizes_of_the_variant(cls, values: Any) -> Any:
            return with_variant(values, VARIANTS)

        @model_validator(mode="after")
        def _rows_hold_an_image(self) -> Any:
            if self.pack is not None and self.pack < self.context:
                raise ValueError(f"pack={self.pack} must hold an image of the context, {self.context} tokens")
            if self.guidance_channels != "all" and int(self.guidance_channels) < 1:
                raise ValueError(f"guidance_channels={self.guidance_channels} must be at least 1, or all")
            return self

    class Ask(configs.Config):
        sampler: Literal["heun", "euler", "dopri5", "sde", "ddpm", "ddim"] | None = Field(
            None, description="of a flow: heun (open), euler, dopri5 (chooses its steps), sde; of v1: ddpm (open), ddim"
        )
        diffusivity: Literal["sigma", "sbdm"] = Field("sigma", description="noise of sampler=sde")
        eta: float = Field(0.0, ge=0, le=1, description="noise of sampler=ddim")
        clip: bool | None = Field(
            None,
            description="keep guesses of the image within [-1, 1] at every step; open: for pixels, not for latents",
        )
        atol: float = Field(1e-6, gt=0, description="of sampler=dopri5")
        rtol: float = Field(1e-3, gt=0, description="of sampler=dopri5")
        scale_pow: float | None = Field(
            None,
            ge=0,
            description="guidance grows from the data to the noise, by this power of a cosine; open: constant",
        )
        rotary: RotaryMethod | None = Field(None, description="how positions reach this size; open: as in training")
        decouple: bool | None = Field(None, description="rows and columns each by their own length")

    config: Config

    def __init__(self, config: Config, sources: Mapping[str, Path] | None = None):
        super().__init__(config, sources)
        self.network = FiTNetwork(config, in_channels=self.first_stage.channels, classes=self.num_classes)
        self.diffusion = GaussianDiffusion.of("linear", config.diffusion_steps)
        if config.objective == "diffusion":
            self.most_steps = config.diffusion_steps
            self.loss_units = "squared error of the noise"
        if config.train_only == "partial":
            starting.only_partial(self.network)

    # --- construction ---
    @classmethod
    def open_batches(cls, config: Any, data: Any, batch_size: int, seed: int) -> TrainingBatches:
        from unmask.data.opening import from_settings

        cell = config.patch_size * starting.factor_of(config.first_stage)
        return AspectBatches(from_settings(data), data, batch_size, seed, cell=cell, context=config.context)

    @classmethod
    def build(cls, config: Any, sources: Mapping[str, Path] | None = None) -> FiTv2:
        """The model with the weights that ``init`` names; they are then its own, and its config names them no more."""
        model = cls(config, sources)
        if config.init:
            starting.take_weights(model, config.init)
            model.config = model.config.model_copy(update={"init": None})
        return model

    @property
    def cell(self) -> int:
        """Pixels along a side of a token."""
        return self.config.patch_size * self.first_stage.factor

    # --- learning ---
    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        """The mean over samples of the mean over their real tokens; noise prediction also tells ``mse`` and ``vb``."""
        found = self.terms(self.tokens(batch, draw), self.labels(batch, draw), draw)
        return {"loss": found["loss"], **{k: v.detach().mean() for k, v in found.items() if k in ("mse", "vb")}}

    def tokens(self, batch: Batch, draw: Draw | None = None, *, context: int | None = None) -> Tokens:
        """A batch's images as sequences of the context's length (or another); without sizes all fill the canvas.

        Raises ``UserError`` where they exceed the context.
        """
        length = context or self.config.context
        canvas, size = batch["image"], batch.get("size")
        with torch.no_grad():
            if size is None:
                size = torch.tensor(canvas.shape[2:], device=canvas.device).expand(len(canvas), 2)
                latents = self.first_stage.encode(canvas, draw).float()
            else:
                latents = starting.encoded_apart(self.first_stage, canvas, size, draw).float()
        own = canvas.shape[2] // self.cell * (canvas.shape[3] // self.cell)
        if batch.get("size") is None and own > length:
            raise UserError(f"images of {own} tokens exceed context={length}: use smaller ones")
        return tokens_of(latents, size // self.cell, self.config.patch_size, length)

    def labels(self, batch: Batch, draw: Draw | None = None) -> Tensor | None:
        """int64 ``[B]``, unknown ones (-1) as the empty class, some dropped while training; None without classes."""
        if not self.num_classes:
            return None
        count, device = len(batch["image"]), batch["image"].device
        labels = batch.get("label")
        if labels is None:
            return torch.full((count,), self.empty, dtype=torch.int64, device=device)
        labels = torch.where(labels < 0, torch.full_like(labels, self.empty), labels)
        if draw is None or not self.training:
            return labels
        return dropped_classes(labels, draw, self.config.class_dropout, self.empty)

    def terms(
        self, tokens: Tokens, classes: Tensor | None, draw: Draw, time: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``loss``; ``each [B]``; ``time [B]``; the network's ``output``. time: instead of drawn ones."""
        data, device = tokens.data, tokens.data.device
        noise = draw.normal("noise", data.shape, device=device)
        if self.config.objective == "diffusion":
            t = draw.integers("time", 0, len(self.diffusion), (len(data),), device=device) if time is None else time
            x = self.diffusion.noisy(data, t, noise)
            output = self.run(x, t, classes, tokens).float()
            values = self.diffusion.loss_values(output, data, x, t, noise, axis=2)
            parts = {name: flow.masked_mean(value, tokens.mask) for name, value in values.items()}
            each = torch.stack(list(parts.values())).sum(dim=0)
            return {"loss": each.mean(), "each": each, "time": t, "output": output, **parts}
        t = self.times(draw, len(data), device) if time is None else time
        output = self.run(flow.interpolate(data, noise, t), t, classes, tokens).float()
        each = flow.flow_loss(output, data, noise, tokens.mask)
        return {"loss": each.mean(), "each": each, "time": t, "output": output}

    def times(self, draw: Draw, count: int, device: torch.device) -> Tensor:
        """Times of a flow to train at, float32 ``[count]``."""
        how = logit_normal_time if self.config.time == "logit_normal" else uniform_time
        return how(draw, "time", count, device=device)

    def run(self, x: Tensor, t: Tensor, classes: Tensor | None, tokens: Tokens) -> Tensor:
        """The network on ``x [B, N, P]``, several images in a row where ``pack`` says so: ``[B, N, P or 2P]``."""
        if self.config.pack is None or self.config.pack < x.shape[1]:
            return self.network(x, t, classes, tokens.grid, tokens.mask, tokens.size)
        p: Packing = packed(tokens, self.config.pack)
        some = None if classes is None else classes[p.owner]
        out = self.network(p.rows(x), t[p.owner], some, p.grid, p.mask, p.size)
        return p.apart(out, *x.shape[:2])

    def blocks_to_compile(self) -> list[nn.Module]:
        return list(self.network.blocks)

    # --- sampling ---
    def check_size(self, size: Any) -> tuple[int, int]:
        """Any multiple of a token's pixels. Raises ``UserError``."""
        own = size or self.config.image_size or (self.cell, self.cell)
        wanted = (int(own[0]), int(own[-1]))
        if min(wanted) < 1 or any(side % self.cell for side in wanted):
            near = "x".join(str(max(round(side / self.cell), 1) * self.cell) for side in wanted)
            raise UserError(
                f"size {wanted[0]}x{wanted[1]} cannot be made: this {self.slug} makes multiples of {self.cell}, such as {near}"
            )
        return wanted

    def sample(self, n: int, draw: Draw, asked: Asked) -> Tensor:
        return sampled(self, n, draw, asked)

    # --- telling ---
    @torch.no_grad()
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """The loss, at the same times and noise, of saying nothing, and of the best linear guess from each value alone."""
        tokens = self.tokens(batch)
        data, mask = tokens.data, tokens.mask
        noise = draw.normal("noise", data.shape, device=data.device)
        power = flow.masked_mean(data.square(), mask).mean()
        if self.config.objective == "diffusion":
            t = draw.integers("time", 0, len(self.diffusion), (len(data),), device=data.device)
            guess, target = alone(self.diffusion, self.diffusion.noisy(data, t, noise), t, power), noise
        else:
            t = self.times(draw, len(data), data.device)
            guess, target = alone_in_flow(flow.interpolate(data, noise, t), t, power), flow.velocity(data, noise)
        return {
            "nothing": flow.masked_mean(target.square(), mask).mean(),
            "each value alone": flow.masked_mean((guess - target).square(), mask).mean(),
        }

    def preview_options(self) -> dict[str, Any]:
        return {"sampler": "heun" if self.config.objective == "flow" else "ddim"}

    def shapes(self) -> list[tuple[int, int]]:
        """A square, a wide and a tall size that fill the context, in pixels."""
        side = max(math.isqrt(self.config.context), 1)
        short = max(side * 3 // 4, 1)
        long = max(self.config.context // short, 1)
        return [(a * self.cell, b * self.cell) for a, b in ((side, side), (short, long), (long, short))]

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        """Samples of three ratios and of sizes never trained, the same noise at every look."""
        from unmask.systems.generation.fitv2.measuring import samples_of_sizes

        return samples_of_sizes(self, draw, steps=min(self.preview_steps, self.most_steps or self.preview_steps))

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
        """``flow_loss`` of test images at fixed times and noise, as trained and at the sizes of ``measure_sizes``."""
        from unmask.systems.generation.fitv2.measuring import measure

        return measure(self, data, draw, limit=limit, device=device, tell=tell, folder=folder)
