"""SimMIM. Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu, CVPR 2022, arXiv:2111.09886.

Hide large random cells, put one learned token in their place, encode the full sequence, so that hierarchical encoders
work too, and predict the hidden pixels with a single linear layer and an L1 loss.

    model = SimMIM(SimMIM.Config(backbone="swin_tiny"))
    loss = model.loss({"image": images}, draw=Seeded(0))["loss"]        # a bare PyTorch loop is enough

Legend: images ``[B, C, H, W]``, standardised; N tokens where they enter; L output places of the encoder, each ``stride``
pixels wide; P = prod(stride) pixels of a place; values of a place in the order (channel, row, column), as in PixelShuffle.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import config as configs
from unmask.backbones import BackboneConfig, build_encoder
from unmask.config import Field
from unmask.contracts import Batch, Losses, Picture, Preprocessing, Progress, Trainable
from unmask.draw import Draw, permutation
from unmask.errors import UserError
from unmask.masks.blocks import block_mask
from unmask.masks.cells import cell_grid, cell_mask, hidden_cells, square_mask
from unmask.masks.mask import Mask
from unmask.nn.block import Mlp
from unmask.nn.patch import patchify, select, unpatchify
from unmask.nn.references import fills
from unmask.systems.pretraining.pictures import reconstruction_picture
from unmask.systems.pretraining.simmim.target import Target

UNITS = {
    "l1": "absolute error a value, in deviations of the data",
    "l2": "squared error a value, in variances of the data",
    "smooth_l1": "smooth L1 error a value, in deviations of the data",
    "cross_entropy": "nats a value (cross-entropy over bins)",
}


class SimMIM(Trainable):
    slug = "simmim"

    class Config(configs.Config):
        backbone: BackboneConfig = Field(
            BackboneConfig(name="swin_base", window_size=6),
            description="an encoder that can replace tokens, or a convnet (the token is painted into the pixels)",
        )
        mask_ratio: float = Field(0.6, gt=0, lt=1, description="share of the cells hidden, rounded up")
        cell_size: int | None = Field(
            None, ge=1, description="pixels of a cell's side; open: 32, or about a sixth of a small image's side"
        )
        masking: Literal["random", "square", "block"] = Field(
            "random", description="random cells, one square of cells, or blocks of tokens as BEiT's"
        )
        head: Literal["linear", "mlp"] = Field("linear", description="mlp: two layers with a GELU between")
        loss: Literal["l1", "l2", "smooth_l1", "cross_entropy"] = Field(
            "l1", description="cross_entropy: over each channel's value cut into bins"
        )
        bins: Literal[8, 256] = Field(8, description="equal bins of a channel's range, for cross_entropy")
        predict: Literal["hidden", "all"] = Field("hidden", description="the pixels that the loss counts")
        local_norm: int | None = Field(
            None, ge=3, description="target standardised in a window of so many pixels, odd (47 in SimMIM of SwinV2)"
        )

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.encoder = encoder = build_encoder(config.backbone)
        channels, size = encoder.in_channels, encoder.image_size
        if config.local_norm is not None and config.local_norm % 2 == 0:
            raise UserError(f"local_norm={config.local_norm} must be odd: use {config.local_norm + 1}")
        if config.local_norm is not None and config.loss == "cross_entropy":
            raise UserError("local_norm gives values without a range to cut into bins: use loss=l1 with it")
        # hierarchical encoders leave with wider places than they enter with; a convnet enters with single pixels
        self.token = encoder.patch_size if encoder.can_replace else (1,) * len(size)
        widening = encoder.strides[-1] // encoder.patch_size[-1] if encoder.can_replace else 1
        self.stride = (
            tuple(p * widening for p in encoder.patch_size)
            if encoder.can_replace
            else (encoder.strides[-1],) * len(size)
        )
        self.cell = (config.cell_size or default_cell(size, self.token),) * len(size)
        cells, _ = cell_grid(size, self.cell, self.token)
        hidden_cells(math.prod(cells), config.mask_ratio)  # complains early
        # one token for the patch embedding, or one value a channel to paint into hidden pixels
        self.mask_token = nn.Parameter(torch.zeros(encoder.map_dims[0] if encoder.can_replace else channels))
        self.loss_units = UNITS[config.loss].replace("the data", "its window" if config.local_norm else "the data")
        self.target = Target(config.loss, config.bins, config.local_norm)
        width = encoder.embed_dim if encoder.can_replace else encoder.map_dims[-1]
        values = math.prod(self.stride) * channels * self.target.values_each
        self.decoder = nn.Linear(width, values) if config.head == "linear" else Mlp(width, width, values)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if config.head == "mlp":
            for name, parameter in self.decoder.named_parameters():
                nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.trunc_normal_(parameter, std=0.02)

    # --- learning ---
    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        images = batch["image"]
        mask = self.mask(images, draw)
        features = self.features(images, mask, draw)
        return {"loss": self.compare(features, self.wanted(images), self.places(mask, images), mask)}

    def mask(self, images: Tensor, draw: Draw) -> Mask:
        """Which tokens to hide (pixels, for a convnet); the same number in every sample."""
        c, batch, device = self.config, len(images), images.device
        cells, scale = cell_grid(tuple(images.shape[2:]), self.cell, self.token)
        if c.masking == "square":
            return square_mask(draw.uniform("square", (batch, len(cells)), device=device), c.mask_ratio, cells, scale)
        if c.masking == "block":
            unit = tuple(1 if self.encoder.can_replace else s for s in scale)  # a convnet's blocks are made of cells
            grid = tuple(n * s // u for n, s, u in zip(cells, scale, unit, strict=True))
            hidden = hidden_cells(math.prod(grid), c.mask_ratio)
            mask = block_mask(draw, batch, grid, hidden, device=device)
            wide = mask.pixels(unit)[:, 0]
            return Mask(wide.flatten(1), tuple(wide.shape[1:]), hidden * math.prod(unit))
        order = permutation(draw, "permutation", (batch, math.prod(cells)), device=device)
        return cell_mask(order, c.mask_ratio, cells, scale)

    def features(self, images: Tensor, mask: Mask, draw: Draw | None = None) -> Tensor:
        """Output places of the full sequence, ``[B, L, D]``, row-major."""
        if self.encoder.can_replace:
            tokens = self.encoder.tokens(images, hidden=mask.hidden, mask_token=self.mask_token, draw=draw)
            return tokens[:, self.encoder.prefix_tokens :]
        painted = torch.where(mask.pixels(self.token), self.mask_token[:, None, None].to(images.dtype), images)
        return self.encoder.maps(painted, draw=draw)[-1].flatten(2).transpose(1, 2)

    def grid(self, images: Tensor) -> tuple[int, ...]:
        """Output places on each axis; the last may reach over the image's end."""
        return tuple(-(-s // t) for s, t in zip(images.shape[2:], self.stride, strict=True))

    def places(self, mask: Mask, images: Tensor) -> Tensor | None:
        """Ids ``[B, M]`` of the output places to predict, where each is hidden as a whole or not at all; else None: the
        loss then weighs pixels."""
        fits = all(s % t == 0 for s, t in zip(images.shape[2:], self.stride, strict=True))
        single = self.config.masking == "block" and self.encoder.can_replace
        unit = self.token if single else self.cell
        if self.config.predict == "all" or not fits or any(u % s for u, s in zip(unit, self.stride, strict=True)):
            return None
        step = tuple(s // t for s, t in zip(self.stride, self.token, strict=True))
        if math.prod(step) == 1:
            return mask.hide
        coarse = mask.on_grid()
        for axis, s in enumerate(step):
            first = torch.arange(0, coarse.shape[axis + 1], s, device=coarse.device)
            coarse = coarse.index_select(axis + 1, first)
        return Mask(coarse.flatten(1), tuple(coarse.shape[1:]), mask.num_hidden // math.prod(step)).hide

    def wanted(self, images: Tensor) -> Tensor:
        """What to predict, ``[B, L, C P]``: pixels in the target's units, zero beyond the image's end."""
        return self._cut(self.target.of(images, self._preprocessing()))

    def compare(self, features: Tensor, wanted: Tensor, places: Tensor | None, mask: Mask) -> Tensor:
        """The official mean: summed over counted pixels and channels / (counted pixels + 1e-5) / channels."""
        channels, weight = self.encoder.in_channels, None
        if places is None:
            weight = self._weight(mask)
        else:
            features, wanted = select(features, places), select(wanted, places)
        return self.target.loss(self.decoder(features), wanted, channels, weight)

    def _weight(self, mask: Mask) -> Tensor:
        """float ``[B, L, P]``: 1 for pixels that count."""
        pixels = mask.pixels(self.token).float()
        return self._cut(torch.ones_like(pixels) if self.config.predict == "all" else pixels)

    def _cut(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, L, C P]``."""
        short = [-s % t for s, t in zip(images.shape[2:], self.stride, strict=True)]
        if any(short):
            images = F.pad(images, [v for s in reversed(short) for v in (0, s)])
        return patchify(images, self.stride, channels_first=True)

    def reconstruction(self, features: Tensor, images: Tensor) -> Tensor:
        """Predictions of every pixel, ``[B, C, H, W]``, in the target's units (bins: their expected value)."""
        values = self.target.values(self.decoder(features).float(), self.encoder.in_channels, self._preprocessing())
        whole = unpatchify(values, self.grid(images), self.stride, channels_first=True)
        for axis, size in enumerate(images.shape[2:], start=2):
            whole = whole.narrow(axis, 0, size)  # without what the last places reach over
        return whole

    def _preprocessing(self) -> Preprocessing:
        found, channels = self.encoder.preprocessing, self.encoder.in_channels
        if found is not None and len(found.mean) == channels:
            return found
        plain = Preprocessing()
        return plain if channels == len(plain.mean) else Preprocessing((0.5,) * channels, (0.25,) * channels)

    # --- telling a person ---
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """The loss of trivial fills of the same hidden pixels; for bins, of the visible pixels' histogram."""
        images = batch["image"]
        mask = self.mask(images, draw)
        wanted, weight = self.wanted(images), self._weight(mask)
        hidden = mask.pixels(self.token)
        channels = self.encoder.in_channels
        if self.config.loss == "cross_entropy":
            seen = self._cut((~hidden).float())
            return {"histogram of the visible": self.target.histogram_loss(wanted, channels, seen, weight)}
        unit = self.cell if self.config.masking != "block" or not self.encoder.can_replace else self.token
        found = {}
        for words, filled in fills(images, hidden, unit).items():  # type: ignore[arg-type]
            guess = self._cut(self.target.like(filled, images, self._preprocessing()))
            found[words] = self.target.loss(guess, wanted, channels, weight)
        return found

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        images = batch["image"][:8]
        mask = self.mask(images, draw)
        guess = self.reconstruction(self.features(images, mask), images)
        caption, more = "", {}
        if self.config.local_norm is not None:
            more["prediction, raw"] = guess
            guess = self.target.back(guess, images)
            caption = (
                "The target is standardised in a window around each pixel; for the picture every pixel has the true window's "
                "mean and contrast back. The last column shows the prediction as it is."
            )
        picture = reconstruction_picture(
            images, guess, mask.pixels(self.token), self.encoder.preprocessing, caption=caption, more=more
        )
        return [picture]

    def no_weight_decay(self) -> set[str]:
        return {"mask_token", *super().no_weight_decay()}


def default_cell(size: tuple[int, ...], token: tuple[int, ...]) -> int:
    """32 pixels where they divide the image and leave four cells on an axis; else the cell nearest to a sixth of the side,
    of at least two tokens where that fits."""
    side, step = min(size), max(token)
    if side >= 128 and all(s % 32 == 0 for s in size) and all(32 % t == 0 for t in token):
        return 32
    fits = [n for n in range(step, side // 2 + 1) if all(s % n == 0 for s in size) and all(n % t == 0 for t in token)]
    wide = [n for n in fits if n >= 2 * step and n > 1] or fits
    return min(wide, key=lambda n: (abs(n - side / 6), n)) if wide else step
