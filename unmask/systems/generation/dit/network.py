"""The network of DiT: latent patches to tokens, blocks that a time and a class modulate, tokens to noise (and variances).

    network = DiTNetwork(DiTNetwork.Config(embed_dim=384, depth=12, num_heads=6), in_channels=4, grid=(16, 16), classes=10)
    output = network(latents, time, classes)             # [B, C or 2C, H, W]

Legend: latents ``[B, C, H, W]``, N tokens of p x p, D the width; time ``[B]``, class ids int64 ``[B]``, the last id is "none".
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn

from unmask import config as configs
from unmask.config import Field
from unmask.errors import UserError
from unmask.nn.adaln import Modulations
from unmask.nn.patch import PatchEmbed, unpatchify
from unmask.nn.positions import sincos_table
from unmask.nn.timestep import ClassEmbedding, TimeEmbedding
from unmask.systems.generation.dit.blocks import DiTBlock, FinalLayer

Conditioning = Literal["adaln_zero", "adaln", "in_context"]
VARIANTS: dict[str, dict[str, int]] = {
    "S": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "B": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "L": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "XL": {"embed_dim": 1152, "depth": 28, "num_heads": 16},
}


def with_variant(values: Any, variants: dict[str, dict[str, int]]) -> Any:
    """Options with the sizes that ``variant`` names, where they are not given themselves."""
    if isinstance(values, dict) and values.get("variant") in variants:
        return {**variants[values["variant"]], **values}
    return values


class DiTNetwork(nn.Module):
    """in_channels: C. grid: (rows, columns) of tokens. classes: 0 for a network that knows none."""

    class Config(configs.Config):
        variant: Literal["S", "B", "L", "XL"] | None = Field(
            None, description="a size of the paper, instead of numbers"
        )
        patch_size: int = Field(2, ge=1, description="latent cells (or pixels) along a side of a token")
        embed_dim: int = Field(1152, ge=4, description="width")
        depth: int = Field(28, ge=1, description="blocks")
        num_heads: int = Field(16, ge=1)
        mlp_ratio: float = Field(4.0, gt=0)
        conditioning: Conditioning = Field(
            "adaln_zero",
            description="how time and class enter: adaln_zero, adaln (shift and scale, no zero start), in_context (two tokens)",
        )
        learn_sigma: bool = Field(True, description="predict the variance beside the noise")

        @model_validator(mode="before")
        @classmethod
        def _sizes_of_the_variant(cls, values: Any) -> Any:
            return with_variant(values, VARIANTS)

    def __init__(self, config: Config, *, in_channels: int = 4, grid: tuple[int, int] = (16, 16), classes: int = 1000):
        super().__init__()
        self.config, self.in_channels, self.grid, self.classes = config, in_channels, grid, classes
        dim, patch = config.embed_dim, config.patch_size
        self.out_channels = in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbed(in_channels, dim, (patch, patch))
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = ClassEmbedding(classes, dim) if classes else None
        in_context = config.conditioning == "in_context"
        self.blocks = nn.ModuleList(
            DiTBlock(dim, config.num_heads, config.mlp_ratio, plain=in_context) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(dim, patch * patch * self.out_channels, adaptive=not in_context)
        self.modulations: Modulations | None = None
        self.register_buffer("pos_embed", sincos_table(dim, grid)[None].clone(), persistent=False)
        self._start()
        if not in_context:
            zero = config.conditioning == "adaln_zero"
            self.modulations = Modulations(config.depth, dim, 6 if zero else 4, zero=zero)

    def _start(self) -> None:
        """Xavier weights and zero biases in the blocks and the patch embedding (the paper's code, after ViT)."""
        linears = [m for block in self.blocks for m in block.modules() if isinstance(m, nn.Linear)]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)

    # --- the parts of a forward pass, in order ---
    def embed(self, latents: Tensor) -> Tensor:
        """``[B, N, D]``. Raises ``UserError`` for latents of another size or channels."""
        size = tuple(g * self.config.patch_size for g in self.grid)
        if latents.shape[1] != self.in_channels or tuple(latents.shape[2:]) != size:
            raise UserError(
                f"dit takes {self.in_channels} channels of {size[0]}x{size[1]}, got {tuple(latents.shape[1:])}: "
                "data.image_size and first_stage decide them"
            )
        return self.x_embedder(latents) + cast(Tensor, self.pos_embed)

    def condition(self, time: Tensor, classes: Tensor | None) -> Tensor:
        """``[B, D]``: the sum of time and class."""
        embedded = self.t_embedder(time)
        if self.y_embedder is None:
            return embedded
        if classes is None:
            classes = torch.full(time.shape, self.classes, dtype=torch.int64, device=time.device)
        return embedded + self.y_embedder(classes)

    def context_tokens(self, time: Tensor, classes: Tensor | None) -> Tensor:
        """``[B, 2, D]`` (1 without classes): what stands beside the image tokens with conditioning=in_context."""
        tokens = [self.t_embedder(time)]
        if self.y_embedder is not None:
            empty = torch.full(time.shape, self.classes, dtype=torch.int64, device=time.device)
            tokens.append(self.y_embedder(empty if classes is None else classes))
        return torch.stack(tokens, dim=1)

    def forward(self, latents: Tensor, time: Tensor, classes: Tensor | None = None) -> Tensor:
        """``[B, C, H, W]`` noise, with ``learn_sigma`` ``[B, 2C, H, W]``: noise, then variance values."""
        x = self.embed(latents)
        if self.modulations is None:
            context = self.context_tokens(time, classes)
            x = torch.cat((x, context.to(x.dtype)), dim=1)
            for block in self.blocks:
                x = block(x)
            return self.image(self.final_layer(x[:, : -context.shape[1]], None))
        c = self.condition(time, classes)
        for block, modulation in zip(self.blocks, self.modulations(c).unbind(0), strict=True):
            x = block(x, modulation)
        return self.image(self.final_layer(x, self.final_layer.modulation(c)))

    def image(self, tokens: Tensor) -> Tensor:
        """``[B, N, p·p·C]`` back to ``[B, C, H, W]``; inside a patch the order is (row, column, channel)."""
        return unpatchify(tokens, self.grid, (self.config.patch_size,) * 2)
