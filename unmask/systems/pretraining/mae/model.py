"""Masked autoencoder (MAE). He, Chen, Xie, Li, Dollár, Girshick, CVPR 2022, arXiv:2111.06377.

Hide three patches of four, encode only what is left, rebuild the rest from it with a light decoder.

    model = MAE(MAE.Config(backbone="vit_small_patch16"))
    loss = model.loss({"image": images}, draw=Seeded(0))["loss"]        # a bare PyTorch loop is enough

Legend: images ``[B, C, H, W]``, standardised; N patches, V visible, M hidden; P values in a patch.
"""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn

from unmask import config as configs
from unmask.backbones import BackboneConfig, build_encoder
from unmask.config import Field
from unmask.contracts import Batch, Losses, Picture, Progress, Trainable, need
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.masks.mask import Mask
from unmask.masks.random import mask_from_scores, random_mask, visible_count
from unmask.nn.collective import summed_over_processes
from unmask.nn.decoder import PatchDecoder
from unmask.nn.losses import reconstruction_loss, standardise_patches
from unmask.nn.patch import patchify, select, unpatchify
from unmask.nn.references import fills
from unmask.systems.pretraining.pictures import reconstruction_picture

UNITS = {
    "standardised": "squared error a value, of patches with mean 0 and variance 1",
    "pixels": "squared error a value, in variances of the data",
    "pca": "squared error a coefficient",
}


class MAE(Trainable):
    slug = "mae"

    class Config(configs.Config):
        backbone: BackboneConfig = Field(
            BackboneConfig(name="vit_base_patch16"), description="a ViT that can drop tokens"
        )
        mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of patches hidden")
        masking: Literal["random", "block", "grid"] = Field("random", description="which patches; block-wise as BEiT's")
        target: Literal["standardised", "pixels", "pca"] = Field(
            "standardised",
            description="patch-wise mean 0 and variance 1 (norm_pix_loss), raw pixels, or PCA coefficients",
        )
        pca_components: int = Field(96, ge=1, description="coefficients of the PCA target")
        mask_tokens_in_encoder: bool = Field(False, description="the paper's ablation: slower and worse")
        decoder: PatchDecoder.Config = Field(
            PatchDecoder.Config(embed_dim=512, depth=8, num_heads=16), description="width, depth, heads of the decoder"
        )

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.encoder = encoder = build_encoder(config.backbone)
        need(encoder, "can_drop", system=self.slug, instead="simmim")
        if config.mask_tokens_in_encoder:
            need(encoder, "can_replace", system=self.slug)
        self.grid = encoder.grid()
        visible_count(math.prod(self.grid), config.mask_ratio)  # complains early
        values = math.prod(encoder.patch_size) * encoder.in_channels
        coefficients = min(config.pca_components, values) if config.target == "pca" else values
        self.decoder = PatchDecoder(config.decoder, encoder.embed_dim, coefficients, encoder.prefix_tokens)
        self.decoder.positions(self.grid, torch.device("cpu"))  # complains early about a width that does not fit
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.mask_token = nn.Parameter(torch.randn(encoder.embed_dim) * 0.02) if config.mask_tokens_in_encoder else None
        self.loss_units = UNITS[config.target]
        if config.target == "pca":
            self.register_buffer("pca_basis", torch.zeros(values, coefficients))
            self.register_buffer("pca_mean", torch.zeros(values))

    # --- learning ---
    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        images = batch["image"]
        mask = self.mask(images, draw, progress)
        predicted = self.predict_hidden(images, mask, draw)
        target = select(self.patches(images), mask.hide)
        return {"loss": self.compare(predicted, target)}

    def mask(self, images: Tensor, draw: Draw, progress: Progress | None = None) -> Mask:
        """Which patches to hide: exactly ``N - int(N * (1 - ratio))`` a sample."""
        ratio, grid = self.config.mask_ratio, self.encoder.grid(images.shape[2:])
        batch, tokens = len(images), math.prod(grid)
        if self.config.masking == "block":
            from unmask.masks.blocks import block_mask

            return block_mask(draw, batch, grid, tokens - visible_count(tokens, ratio), device=images.device)
        noise = draw.uniform("noise", (batch, tokens), device=images.device)
        if self.config.masking == "grid":
            return grid_mask(noise, ratio, grid)
        return random_mask(noise, ratio, grid)

    def predict_hidden(self, images: Tensor, mask: Mask, draw: Draw | None = None) -> Tensor:
        """Predictions for the hidden patches only, ``[B, M, P]``."""
        encoded = self.encode(images, mask, draw)
        return self.decoder(encoded, mask.keep, mask.hide, mask.grid)

    def encode(self, images: Tensor, mask: Mask, draw: Draw | None = None) -> Tensor:
        """Encoded visible tokens, ``[B, prefix + V, D]`` (with mask tokens inside: all tokens, visible ones first)."""
        if self.mask_token is None:
            return self.encoder.tokens(images, keep=mask.keep, draw=draw)
        tokens = self.encoder.tokens(images, hidden=mask.hidden, mask_token=self.mask_token, draw=draw)
        prefix = self.encoder.prefix_tokens
        return torch.cat((tokens[:, :prefix], select(tokens[:, prefix:], mask.order)), dim=1)

    def patches(self, images: Tensor) -> Tensor:
        """``[B, N, P]``, the order inside a patch (row, column, channel)."""
        return patchify(images, self.encoder.patch_size)

    def compare(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The loss of predictions against pixels ``[B, M, P]``, in the target's units."""
        if self.config.target == "pca":
            target = self.coefficients(target)
        return reconstruction_loss(predicted, target, standardise=self.config.target == "standardised")

    def coefficients(self, patches: Tensor) -> Tensor:
        """PCA coefficients ``[..., K]``; the basis is taken from the patches hidden first, of all processes together."""
        basis, mean = cast(Tensor, self.pca_basis), cast(Tensor, self.pca_mean)
        if self.training and not bool(basis.any()):
            found = principal_components(patches.detach().flatten(0, 1), basis.shape[1])
            mean.copy_(found[0])
            basis.copy_(found[1])
        return (patches.float() - mean) @ basis

    # --- telling a person ---
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """The loss of trivial fills of the same hidden patches, in the target's units.

        Where targets are standardised, a filled patch loses its mean and is divided by the mean contrast of the image's
        visible patches: what a guess could know without having seen the patch.
        """
        images = batch["image"]
        mask = self.mask(images, draw, progress)
        target, seen = (select(self.patches(images), ids).float() for ids in (mask.hide, mask.keep))
        found = {}
        for words, filled in fills(
            images, mask.pixels(self.encoder.patch_size), cast(tuple[int, int], self.encoder.patch_size)
        ).items():
            guess = select(self.patches(filled), mask.hide).float()
            if self.config.target == "standardised":
                contrast = standardise_patches(seen)[2].mean(dim=1, keepdim=True)
                guess = (guess - guess.mean(dim=-1, keepdim=True)) / contrast
            elif self.config.target == "pca":
                guess = self.coefficients(guess)
            found[words] = self.compare(guess, target)
        return found

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        images = batch["image"][:8]
        mask = self.mask(images, draw, progress)
        encoded = self.encode(images, mask)
        predicted = self.decoder.all_tokens(encoded, mask.keep, mask.hide, mask.grid).float()
        caption, more = "", {}
        if self.config.target == "standardised":
            _, mean, deviation = standardise_patches(self.patches(images).float())
            more["prediction, raw"] = self.image(predicted, mask.grid)
            predicted = predicted * deviation + mean
            caption = (
                "The model predicts each patch with mean 0 and variance 1; for the picture every patch has the true patch's "
                "mean and contrast back. The last column shows the prediction as it is."
            )
        elif self.config.target == "pca":
            basis, mean = cast(Tensor, self.pca_basis), cast(Tensor, self.pca_mean)
            predicted = predicted @ basis.T + mean
        hidden = mask.pixels(self.encoder.patch_size)
        guess = self.image(predicted, mask.grid)
        return [reconstruction_picture(images, guess, hidden, self.encoder.preprocessing, caption=caption, more=more)]

    def image(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """``[B, N, P]`` back to ``[B, C, H, W]``."""
        return unpatchify(tokens, grid, self.encoder.patch_size)

    def blocks_to_compile(self) -> list[nn.Module]:
        return [*self.encoder.blocks_to_compile(), *self.decoder.blocks]

    def no_weight_decay(self) -> set[str]:
        """The authors' pre-training spares parameters with one axis only; the class and mask tokens, with three, decay."""
        return {f"encoder.{n}" for n in self.encoder.no_weight_decay() if n not in ("cls_token", "pos_embed")}


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean ``[P]`` and the ``count`` first principal directions ``[P, count]`` of ``rows [n, P]``, float32, over the rows of
    all processes. Of either sign of a direction the one whose largest component is positive."""
    rows = rows.double()
    ones = rows.new_ones(len(rows), 1)
    together = torch.cat((ones, rows), dim=1)
    moments = summed_over_processes(together.T @ together)
    number, total = moments[0, 0], moments[0, 1:]
    mean = total / number
    directions = torch.linalg.eigh(moments[1:, 1:] / number - mean[:, None] * mean).eigenvectors.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return mean.float(), (directions * largest.sign()).float()


def grid_mask(noise: Tensor, ratio: float, grid: tuple[int, ...]) -> Mask:
    """Keep patches at regular distances (He et al. 2022, figure 6): of every cell of ``k`` patches the same place stays
    visible, ``k = round(1 / (1 - ratio))`` along a square cell; the place is the one with the least noise of a sample.

    noise: ``[B, N]``. Raises ``UserError`` when 1 / (1 - ratio) is no square number or its side does not divide the grid.
    """
    side = round(math.sqrt(1 / (1 - ratio)))
    if side < 2 or abs(side**2 * (1 - ratio) - 1) > 1e-6 or any(g % side for g in grid):
        raise UserError(
            f"masking=grid keeps one patch of {side or 2}x{side or 2}: mask_ratio={ratio} or grid {grid} does not fit"
        )
    place = noise[:, : side**2].argmin(dim=1)
    rows = torch.arange(grid[0], device=noise.device)[:, None] % side
    columns = torch.arange(grid[1], device=noise.device)[None] % side
    kept = (rows * side + columns).flatten()[None] == place[:, None]
    return mask_from_scores((~kept).float(), noise.shape[1] - noise.shape[1] // side**2, grid)
