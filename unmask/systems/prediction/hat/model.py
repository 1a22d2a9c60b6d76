"""HAT: hybrid attention transformer for image restoration. Chen, Wang, Zhou, Qiao, Dong, CVPR 2023, arXiv:2205.04437;
Chen et al., arXiv:2309.05239 (denoising, JPEG artefacts, real-world super-resolution).

Nothing is hidden by a mask: what is missing are the pixels that a degradation took. Each picture is made worse on the fly,
and the network gives back what was there.

    model = HAT(HAT.Config(size="hat_s", scale=2))
    loss = model.loss({"image": sharp}, draw=Seeded(0))["loss"]         # sharp [B, 3, 128, 128] in 0 ... 1; low is made of it

Legend: high ``[B, C, H, W]`` and low ``[B, C, h, w]`` in 0 ... 1, H = h s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.contracts import Batch, DataFacts, Group, Losses, Picture, Progress, Trainable
from unmask.data.bicubic import resize_bicubic
from unmask.data.restoration import RestorationBatches, RestorationSettings
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.prediction.hat.config import HATConfig
from unmask.systems.prediction.hat.discriminator import PerceptualLoss, UNetDiscriminator, adversarial_loss
from unmask.systems.prediction.hat.measuring import measure
from unmask.systems.prediction.hat.network import HATNetwork
from unmask.systems.prediction.hat.predicting import Ask, predict, restored
from unmask.systems.prediction.hat.start import start_from
from unmask.systems.prediction.results import PictureResult

RECENT = 200  # the most steps that a trivial predictor's loss is a mean over


class HAT(Trainable):
    slug = "hat"
    loss_units = "mean absolute error, of a range of 1"
    Config = HATConfig
    Data = RestorationSettings
    Ask = Ask
    predict_batch = 1  # a photograph takes a while: each is kept as soon as it is done
    measures: ClassVar[Mapping[str, str]] = {"psnr_y": "PSNR of the luminance, dB", "ssim_y": "SSIM of the luminance"}

    config: HATConfig

    def __init__(self, config: HATConfig):
        super().__init__(config)
        self.network = HATNetwork(config)
        self.discriminator: UNetDiscriminator | None = None
        self._vgg: list[PerceptualLoss] = []  # in a list: its weights are not this system's
        self._plain: deque[Tensor] = deque(maxlen=RECENT)  # errors of the enlarged inputs of the last steps
        self._made: dict[int, Tensor] = {}  # what the generator's phase made of a batch, for the discriminator's
        if config.adversarial is not None:
            a = config.adversarial
            self.discriminator = UNetDiscriminator(self.network.channels, a.num_feat, a.skip_connection)
            self.phases = ("generator", "discriminator")  # type: ignore[misc]  # this model's own
            self.loss_units = "weighted sum of pixel, perceptual and adversarial losses"

    # --- construction ---
    @classmethod
    def open_batches(cls, config: Any, data: Any, batch_size: int, seed: int) -> RestorationBatches:
        from unmask.data.opening import open_source

        scale = config.scale
        size = data.size or tuple(s * scale for s in config.training_size)
        if any(s % (scale * config.window_size) for s in size):
            near = max(round(size[0] / (scale * config.window_size)), 1) * scale * config.window_size
            raise UserError(
                f"hat trains on crops whose sides scale x window_size = {scale * config.window_size} divides, "
                f"not {size[0]}x{size[1]}: use data.image_size={near}"
            )
        source = open_source(
            data.uri, data.split, columns=data.columns, limit=data.limit, cache=data.cache, workers=data.workers
        )
        return RestorationBatches(source, data, batch_size, seed, scale=scale, size=size, channels=config.in_channels)

    @classmethod
    def adapted(cls, config: Any, facts: DataFacts) -> Any:
        values: dict[str, Any] = {}
        if config.in_channels is None:
            values["in_channels"] = facts.channels
        if facts.extra.get("low_size"):
            values["image_size"] = tuple(facts.extra["low_size"])
        return cls.Config.model_validate({**config.model_dump(), **values})

    @classmethod
    def build(cls, config: Any, sources: Mapping[str, Path] | None = None) -> HAT:
        """The system with the weights of ``init`` (or of an earlier stage named "init"). They are then its own: its config
        names them no more."""
        folder = (sources or {}).get("init") or config.init
        model = cls(config)
        if folder:
            start_from(model, folder)
            model.config = config.model_copy(update={"init": None})
        return model

    # --- learning ---
    def pixel_loss(self, made: Tensor, high: Tensor) -> Tensor:
        """Mean absolute error over everything."""
        return F.l1_loss(made.float(), high)

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        """L1; in the second stage of real-world training the generator's and the discriminator's losses in turn.

        batch: ``image`` (high), ``low`` (without it: bicubic of ``image``), ``sharp`` (the target of pixels and features).
        """
        high = batch["image"]
        low, target = self.low_of(batch), batch.get("sharp", high)
        if self.discriminator is None:
            if self.training:
                self._plain.append(self.plain_error(low, target))
            return {"loss": self.pixel_loss(self.network(low, draw), target)}
        if phase == "discriminator":
            return self.discriminator_loss(batch, high, low, draw)
        return self.generator_loss(batch, target, low, draw)

    def low_of(self, batch: Batch) -> Tensor:
        if "low" in batch:
            return batch["low"]
        if self.config.scale == 1:
            raise UserError("hat: a batch for scale=1 needs low, the degraded pictures, beside image")
        return resize_bicubic(batch["image"], 1 / self.config.scale)

    def generator_loss(self, batch: Batch, target: Tensor, low: Tensor, draw: Draw) -> Losses:
        a = self.config.adversarial
        assert a is not None
        assert self.discriminator is not None
        made = self.network(low, draw)
        if self.training:
            self._made = {**self._made, id(batch): made.detach()}
        losses: Losses = {"pixel": self.pixel_loss(made, target)}
        total = a.pixel_weight * losses["pixel"]
        if a.perceptual_weight:
            if not self._vgg:
                self._vgg.append(PerceptualLoss(a.vgg_weights))
            losses["perceptual"] = self._vgg[0](made, target)
            total = total + a.perceptual_weight * losses["perceptual"]
        if a.gan_weight:
            losses["adversarial"] = adversarial_loss(self.discriminator(made, frozen=True), real=True)
            total = total + a.gan_weight * losses["adversarial"]
        return {"loss": total, **losses}

    def discriminator_loss(self, batch: Batch, high: Tensor, low: Tensor, draw: Draw) -> Losses:
        """Real pictures (not sharpened) against what the generator made of the same batch a moment ago."""
        assert self.discriminator is not None
        made = self._made.pop(id(batch), None)
        if made is None:  # the step is looked at again, alone
            with torch.no_grad():
                made = self.network(low, draw)
        real, fake = self.discriminator(high), self.discriminator(made)
        losses = adversarial_loss(real, real=True), adversarial_loss(fake, real=False)
        return {
            "loss": losses[0] + losses[1],
            "score_real": real.detach().mean(),
            "score_made": fake.detach().mean(),
        }

    def after_step(self, progress: Progress) -> None:
        self._made = {}

    def parameter_groups(self, phase: str = "main", layer_decay: float = 1.0) -> list[Group]:
        """The authors decay nothing; each phase has its own network."""
        part = "discriminator." if phase == "discriminator" else "network."
        named = [(n, p) for n, p in self.named_parameters() if n.startswith(part) and p.requires_grad]
        return [Group([n for n, _ in named], [p for _, p in named])]

    def blocks_to_compile(self) -> list[nn.Module]:
        return [block for group in self.network.groups for block in group.blocks]

    # --- telling a person ---
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """The error of the enlarged (or untouched) input: of this batch, or, in a training, the mean over the last steps. Crops
        differ so much that one batch says little about a loss that is a mean over many."""
        if self.discriminator is not None:
            return {}
        name = "bicubic" if self.config.scale > 1 else "the input as it is"
        if self.training and self._plain:
            # the last twentieth of the run, in tens, as the loss that is told at its end
            recent = max((progress.steps if progress else 1) // 200 * 10, 10)
            return {name: torch.stack(list(self._plain)[-recent:]).mean()}
        return {name: self.plain_error(self.low_of(batch), batch.get("sharp", batch["image"]))}

    @torch.no_grad()
    def plain_error(self, low: Tensor, target: Tensor) -> Tensor:
        return self.pixel_loss(self.enlarged(low), target)

    def enlarged(self, low: Tensor) -> Tensor:
        """The input at the output's size, by bicubic."""
        return resize_bicubic(low.float(), self.config.scale).clamp(0, 1) if self.config.scale > 1 else low

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        high, low = batch["image"][:8], self.low_of(batch)[:8]
        made = self.restored(low)
        columns = ["input", "bicubic", "restored", "true"] if self.config.scale > 1 else ["input", "restored", "true"]
        parts = [low, self.enlarged(low), made, high] if self.config.scale > 1 else [low, made, high]
        arrays = [as_uint8(p) for p in parts]
        return [Picture("restored", columns, [list(row) for row in zip(*arrays, strict=True)])]

    # --- predicting and measuring ---
    def restored(self, low: Tensor, *, tile: int | None = None, overlap: int = 32, **options: Any) -> Tensor:
        """``[B, C, h s, w s]`` of pictures of any size, by reflection to multiples of the window; whole, or in tiles. Not
        clamped. See ``predicting.restored``."""
        return restored(self, low, tile=tile, overlap=overlap, **options)

    def predict(
        self, inputs: list[Any], *, tell: Callable[[str], None] | None = None, **options: Any
    ) -> list[PictureResult]:
        """Files, Pillow images, arrays or tensors, restored; options: :class:`Ask`. tell: called with words, tile by tile."""
        return predict(self, inputs, tell=tell, **options)

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
        """PSNR and SSIM on the luminance by the field's protocol (8 bits, borders of ``scale`` pixels cut), beside bicubic."""
        return measure(self, data, draw, limit=limit, device=device, tell=tell, folder=folder)


def as_uint8(images: Tensor) -> Any:
    """``[B, C, H, W]`` in 0 ... 1 -> uint8 ``[B, H, W, 3]``."""
    three = images.float().clamp(0, 1).expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float().clamp(0, 1)
    return (three * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
