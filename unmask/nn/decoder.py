"""Light decoders that predict hidden tokens from visible ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unmask.config import Config, Field
from unmask.nn.block import Block
from unmask.nn.patch import select
from unmask.nn.positions import sincos_table


class PatchDecoder(nn.Module):
    """MAE's decoder: mask tokens join the encoded visible ones, a few blocks mix them, a linear layer predicts.

    He et al. 2022, section 3. No token is put back into grid order: attention does not care, so positions are added to
    ``[prefix, visible, hidden]`` as they come, and the last block computes queries for hidden tokens only.
    """

    class Config(Config):
        embed_dim: int = Field(512, ge=1, description="width")
        depth: int = Field(8, ge=1, description="blocks")
        num_heads: int = Field(16, ge=1)
        mlp_ratio: float = Field(4.0, gt=0)
        norm_eps: float = Field(1e-6, gt=0)

    def __init__(self, config: Config, in_dim: int, out_dim: int, prefix: int = 1):
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(in_dim, config.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads, mlp_ratio=config.mlp_ratio, norm_eps=config.norm_eps)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.predict = nn.Linear(config.embed_dim, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)

    def positions(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """The fixed table ``[N, embed_dim]``."""
        return sincos_table(self.mask_token.shape[2], grid).to(device)

    def sequence(self, encoded: Tensor, keep: Tensor, hide: Tensor, grid: tuple[int, ...]) -> Tensor:
        """What the blocks see: ``[B, prefix + V + M, D']`` from ``encoded [B, prefix + V, D]`` and token ids.

        An encoder that saw mask tokens itself gives ``[B, prefix + V + M, D]``: its hidden tokens then take the place of
        this decoder's mask token.
        """
        table = self.positions(grid, encoded.device)
        x = self.embed(encoded)
        seen = self.prefix + keep.shape[1]
        visible = x[:, self.prefix : seen] + table[keep].to(x.dtype)
        hidden = table[hide] + (self.mask_token if x.shape[1] == seen else x[:, seen:])
        return torch.cat((x[:, : self.prefix], visible, hidden.to(x.dtype)), dim=1)

    def forward(self, encoded: Tensor, keep: Tensor, hide: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Predictions of the hidden tokens, ``[B, M, out_dim]``, in the order of ``hide [B, M]``."""
        x = self.sequence(encoded, keep, hide, grid)
        *first, last = self.blocks
        for block in first:
            x = block(x)
        return self.predict(self.norm(last(x, queries=slice(x.shape[1] - hide.shape[1], None))))

    def all_tokens(self, encoded: Tensor, keep: Tensor, hide: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Predictions of every token, ``[B, N, out_dim]``, in grid order: for pictures and comparisons."""
        x = self.sequence(encoded, keep, hide, grid)
        for block in self.blocks:
            x = block(x)
        out = self.predict(self.norm(x))[:, self.prefix :]
        return select(out, torch.cat((keep, hide), dim=1).argsort(dim=1))
