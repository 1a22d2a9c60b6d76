"""Vision transformer. Dosovitskiy et al., ICLR 2021, arXiv:2010.11929; with the variants of MAE and BEiT.

Any number of axes (a third makes tubelets of a clip), any image size, any number of channels. Hidden tokens can be
dropped (they never enter) or replaced by a mask token.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unmask.config import Config, Field, validated
from unmask.contracts import Encoder
from unmask.draw import Draw
from unmask.errors import UserError, nearest
from unmask.nn.block import Block, drop_path_rates
from unmask.nn.patch import PatchEmbed, replace_hidden, tuple_of
from unmask.nn.positions import RelativePositionBias, resize_table, sincos_table

SIZES: dict[str, dict[str, Any]] = {
    "nano": {"embed_dim": 128, "depth": 4, "num_heads": 4},
    "micro": {"embed_dim": 192, "depth": 6, "num_heads": 3},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}


class ViT(Encoder):
    """Patches, positions, a class token, pre-norm blocks, a final norm."""

    can_drop = True
    can_replace = True

    class Config(Config):
        image_size: int | tuple[int, ...] = Field(224, description="pixels: a side, or one number an axis")
        patch_size: int | tuple[int, ...] = Field(16, description="pixels of a patch")
        in_channels: int = Field(3, ge=1)
        embed_dim: int = Field(768, ge=1, description="width")
        depth: int = Field(12, ge=1, description="blocks")
        num_heads: int = Field(12, ge=1)
        mlp_ratio: float = Field(4.0, gt=0)
        qkv_bias: bool | Literal["qv"] = Field(True, description='"qv": biases for queries and values only (BEiT)')
        qk_scale: float | None = Field(None, description="factor on the logits; default head_dim^-0.5")
        qk_norm: bool = False
        init_values: float | None = Field(None, description="LayerScale's start; none: no LayerScale")
        class_token: bool = True
        position: Literal["sincos", "learned", "none"] = "sincos"
        relative: tuple[Literal["shared", "per_block"], ...] = Field((), description="relative position biases")
        drop_path: float = Field(0.0, ge=0, lt=1, description="rate in the last block; from 0 in the first")
        final_norm: bool = True
        norm_eps: float = Field(1e-6, gt=0)
        out_layers: tuple[int, ...] = Field((), description="blocks whose outputs `maps` returns; default the last")
        init: Literal["xavier", "beit"] = Field("xavier", description="xavier: MAE's; beit: truncated normal 0.02")

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        axes = max(len(v) for v in (c.image_size, c.patch_size, (0, 0)) if isinstance(v, tuple))
        self.image_size, self.patch_size = tuple_of(c.image_size, axes), tuple_of(c.patch_size, axes)
        self.in_channels, self.embed_dim, self.num_layers = c.in_channels, c.embed_dim, c.depth
        out = c.out_layers or (c.depth - 1,)
        # along the width; a patch that is not square has another along the height, in the ratio of its sides
        self.strides, self.map_dims = (self.patch_size[-1],) * len(out), (c.embed_dim,) * len(out)
        self.prefix_tokens = 1 if c.class_token else 0
        grid = self.grid()

        self.patch_embed = PatchEmbed(c.in_channels, c.embed_dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim)) if c.class_token else None
        learned = torch.zeros(1, self.prefix_tokens + math.prod(grid), c.embed_dim)
        self.pos_embed = nn.Parameter(learned) if c.position == "learned" else None
        if c.position == "sincos":
            sincos_table(c.embed_dim, grid)  # complains early about a width that does not fit
        shared, each = "shared" in c.relative, "per_block" in c.relative
        self.rel_pos_bias = RelativePositionBias(grid, c.num_heads, self.prefix_tokens) if shared else None
        self.block_biases = (
            nn.ModuleList(RelativePositionBias(grid, c.num_heads, self.prefix_tokens) for _ in range(c.depth))
            if each
            else None
        )
        self.blocks = nn.ModuleList(
            Block(
                c.embed_dim,
                c.num_heads,
                mlp_ratio=c.mlp_ratio,
                qkv_bias=c.qkv_bias,
                qk_norm=c.qk_norm,
                init_values=c.init_values,
                norm_eps=c.norm_eps,
                drop_path=rate,
                scale=c.qk_scale,
            )
            for rate in drop_path_rates(c.drop_path, c.depth)
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps) if c.final_norm else nn.Identity()
        self._initialise()

    # --- the encoder's contract ---
    def tokens(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        return self.norm(self._outputs(x, (self.config.depth - 1,), keep, hidden, mask_token, draw)[0])

    def maps(self, x: Tensor, *, draw: Draw | None = None) -> list[Tensor]:
        grid = self.grid(x.shape[2:])
        wanted = self.config.out_layers or (self.config.depth - 1,)
        outputs = self._outputs(x, wanted, None, None, None, draw)
        return [self.norm(o)[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, grid) for o in outputs]

    def layer_of(self, parameter: str) -> int:
        found = re.match(r"(?:blocks|block_biases)\.(\d+)\.", parameter)
        if found:
            return int(found[1]) + 1
        return self.num_layers + 1 if parameter.startswith("norm.") else 0

    def no_weight_decay(self) -> set[str]:
        kept = {"cls_token", "pos_embed"}
        return kept | {n for n, _ in self.named_parameters() if n.endswith("relative_position_bias_table")}

    def blocks_to_compile(self) -> list[nn.Module]:
        return list(self.blocks)

    # --- the way of a batch ---
    def _outputs(
        self,
        x: Tensor,
        wanted: tuple[int, ...],
        keep: Tensor | None,
        hidden: Tensor | None,
        mask_token: Tensor | None,
        draw: Draw | None,
    ) -> list[Tensor]:
        grid = self.grid(x.shape[2:])
        position = self.positions(grid, x.device)
        tokens = self.patch_embed(x, keep)
        if hidden is not None:
            if mask_token is None:
                raise ValueError("hidden needs mask_token")
            tokens = replace_hidden(tokens, hidden, mask_token)
        if position is not None:
            patches = position[self.prefix_tokens :]
            tokens = tokens + (patches if keep is None else patches[keep]).to(tokens.dtype)
        if self.cls_token is not None:
            first = self.cls_token if position is None else self.cls_token + position[:1]
            tokens = torch.cat((first.expand(x.shape[0], -1, -1).to(tokens.dtype), tokens), dim=1)
        drops: tuple[Tensor | None, ...] = (None,) * self.config.depth
        if draw is not None and self.config.drop_path > 0 and self.training:
            drops = draw.uniform("drop_path", (len(x), self.config.depth, 2), device=x.device).unbind(1)
        outputs = []
        for i, (block, drop) in enumerate(zip(self.blocks, drops, strict=True)):
            tokens = block(tokens, bias=self.bias(i, grid, keep), drop=drop)
            if i in wanted:
                outputs.append(tokens)
        return outputs

    def positions(self, grid: tuple[int, ...], device: torch.device) -> Tensor | None:
        """``[prefix + N, D]`` for any grid; the class token's row is zero in the fixed table."""
        if self.pos_embed is not None:
            prefix = self.prefix_tokens
            patches = resize_table(self.pos_embed[0, prefix:], self.grid(), grid)
            return torch.cat((self.pos_embed[0, :prefix], patches))
        if self.config.position == "none":
            return None
        table = sincos_table(self.embed_dim, grid).to(device)
        return torch.cat((table.new_zeros(self.prefix_tokens, self.embed_dim), table))

    def bias(self, block: int, grid: tuple[int, ...], keep: Tensor | None = None) -> Tensor | None:
        """Relative position bias of a block, ``[heads, L, L]`` (``[B, heads, L, L]`` when tokens are dropped), or None."""
        parts = [] if self.rel_pos_bias is None else [self.rel_pos_bias]
        if self.block_biases is not None:
            parts.append(self.block_biases[block])  # type: ignore[arg-type]
        if not parts:
            return None
        if grid != self.grid():
            raise UserError(
                f"this ViT's relative positions were made for the grid {self.grid()}, not {grid}: resize the model"
            )
        bias = sum(p() for p in parts)
        if keep is None:
            return bias  # type: ignore[return-value]
        ids = torch.cat((keep.new_zeros(len(keep), self.prefix_tokens), keep + self.prefix_tokens), dim=1)
        return bias[:, ids[:, :, None], ids[:, None]].transpose(0, 1)  # type: ignore[index]

    def _initialise(self) -> None:
        c = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight) if c.init == "xavier" else _truncated(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RelativePositionBias):
                _truncated(module.relative_position_bias_table)
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(len(weight), -1)) if c.init == "xavier" else _truncated(weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02) if c.init == "xavier" else _truncated(self.cls_token)
        if self.pos_embed is not None:
            _truncated(self.pos_embed)
        if c.init == "beit":  # residual branches start smaller the deeper they are
            for i, block in enumerate(self.blocks):
                for linear in (block.attn.proj, block.mlp.fc2):
                    with torch.no_grad():
                        linear.weight.div_(math.sqrt(2 * (i + 1)))


def _truncated(tensor: Tensor, std: float = 0.02) -> None:
    nn.init.trunc_normal_(tensor, std=std, a=-std, b=std)


def build(name: str, **options: Any) -> ViT:
    """``vit_{size}_patch{p}``; sizes nano, micro, tiny, small, base, large, huge; any option of :class:`ViT.Config`."""
    found = re.fullmatch(r"vit_([a-z]+)_patch(\d+)", name)
    if not found or found[1] not in SIZES:
        known = [f"vit_{s}_patch{p}" for s in SIZES for p in (2, 4, 8, 14, 16)]
        raise UserError(f"no backbone {name!r}: {nearest(name, known)}")
    options = {"patch_size": int(found[2]), **SIZES[found[1]], **options}
    return ViT(validated(ViT.Config, options, where=f"backbone {name}"))
