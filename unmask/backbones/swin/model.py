"""Swin Transformer, versions 1 and 2. Liu et al., ICCV 2021, arXiv:2103.14030; CVPR 2022, arXiv:2111.09883.

Attention inside windows, moved by half a window in every second block; patches merge between stages, so that the cost
grows linearly with the image and the maps have strides 4, 8, 16, 32.

    encoder = build("swin_tiny", image_size=224)
    features = encoder.maps(images)          # [B, 96, 56, 56], [B, 192, 28, 28], [B, 384, 14, 14], [B, 768, 7, 7]

Parameters have the authors' names. Any image size works: images are padded right and bottom to whole patches, maps to
whole windows (a mask hides the padding), and a map smaller than a window gets a smaller one.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import config as configs
from unmask.backbones.swin.attention import CosineWindowAttention, WindowAttention
from unmask.config import Field, validated
from unmask.contracts import Encoder
from unmask.draw import Draw
from unmask.errors import UserError, nearest
from unmask.nn.block import Mlp, drop_path, drop_path_rates
from unmask.nn.patch import PatchEmbed, replace_hidden, tuple_of
from unmask.nn.positions import resize_table
from unmask.nn.windows import clamp_window

SIZES: dict[str, dict[str, Any]] = {
    "nano": {"embed_dim": 48, "depths": (2, 4, 2), "num_heads": (2, 4, 8)},
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
VERSIONS: dict[str, dict[str, Any]] = {
    "swin": {"version": 1, "window_size": 7, "image_size": 224},
    "swinv2": {"version": 2, "window_size": 8, "image_size": 256},
}
MakeMlp = Callable[[int, int], nn.Module]


class SwinBlock(nn.Module):
    """Version 1, pre-norm: ``x + attn(LN(x))``, then ``x + mlp(LN(x))``. Version 2, res-post-norm: ``x + LN(attn(x))``,
    then ``x + LN(mlp(x))``. Both branches with drop path.

    make_mlp: (width, hidden width) -> the module that stands for the MLP, for variants that replace it.
    """

    def __init__(
        self,
        attention: WindowAttention,
        dim: int,
        *,
        post_norm: bool,
        mlp_ratio: float,
        norm_eps: float,
        drop_path: float,
        make_mlp: MakeMlp = Mlp,
    ):
        super().__init__()
        self.post_norm, self.drop_path_rate = post_norm, drop_path
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = make_mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, size: tuple[int, ...], drop: Tensor | None = None) -> Tensor:
        """``x [B, N, C]`` over a map of ``size``; drop: uniforms ``[B, 2]`` for drop path of the two branches."""
        first, second = (None, None) if drop is None else drop.unbind(1)
        if self.post_norm:
            x = x + drop_path(self.norm1(self.attn(x, size)), first, self.drop_path_rate)
            return x + drop_path(self.norm2(self.mlp(x)), second, self.drop_path_rate)
        x = x + drop_path(self.attn(self.norm1(x), size), first, self.drop_path_rate)
        return x + drop_path(self.mlp(self.norm2(x)), second, self.drop_path_rate)


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width. An odd map is padded with zeros right and bottom.

    The neighbours stand in the authors' order: row parity changes first. Version 1 normalises before the reduction,
    version 2 after it.
    """

    def __init__(self, dim: int, *, norm_after: bool, norm_eps: float):
        super().__init__()
        self.norm_after = norm_after
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if norm_after else 4 * dim, eps=norm_eps)

    def forward(self, x: Tensor, size: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """``[B, N, C]`` over a map of ``size`` -> ``[B, N / 4, 2 C]`` and the new size."""
        rows, columns = size
        x = x.unflatten(1, size)
        if rows % 2 or columns % 2:
            x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        smaller = ((rows + 1) // 2, (columns + 1) // 2)
        x = x.view(x.shape[0], smaller[0], 2, smaller[1], 2, -1).permute(0, 1, 3, 4, 2, 5)
        x = x.reshape(x.shape[0], math.prod(smaller), -1)
        x = self.norm(self.reduction(x)) if self.norm_after else self.reduction(self.norm(x))
        return x, smaller


class Stage(nn.Module):
    """Blocks at one resolution, and the merging that leads to the next (None in the last stage)."""

    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Swin(Encoder):
    can_replace = True

    class Config(configs.Config):
        version: Literal[1, 2] = Field(1, description="2: cosine attention, continuous biases, norms behind branches")
        image_size: int | tuple[int, int] = Field(224, description="pixels: a side, or (height, width)")
        patch_size: int | tuple[int, int] = Field(4, description="pixels of a patch")
        in_channels: int = Field(3, ge=1)
        embed_dim: int = Field(96, ge=1, description="width of the first stage; it doubles at each merging")
        depths: tuple[int, ...] = Field((2, 2, 6, 2), description="blocks of each stage")
        num_heads: tuple[int, ...] = Field((3, 6, 12, 24), description="heads of each stage")
        window_size: int | tuple[int, int] = Field(7, description="tokens of a window: a side, or (rows, columns)")
        shift: bool = Field(True, description="move the windows of every second block; false: the paper's ablation")
        mlp_ratio: float = Field(4.0, gt=0)
        qkv_bias: bool = True
        qk_scale: float | None = Field(None, description="factor on the logits of version 1; default head_dim^-0.5")
        absolute_positions: bool = Field(False, description="a learned position for each patch (ape)")
        patch_norm: bool = Field(True, description="LayerNorm behind the patch embedding")
        pretrained_windows: tuple[int, ...] = Field(
            (), description="version 2: the pre-training's window in each stage; 0 or nothing: the window itself"
        )
        drop_rate: float = Field(0.0, ge=0, lt=1, description="dropout on the embedded patches")
        drop_path: float = Field(0.0, ge=0, lt=1, description="rate in the last block; from 0 in the first")
        out_norm: bool = Field(False, description="a LayerNorm for each map that `maps` returns (detection)")
        norm_eps: float = Field(1e-5, gt=0)

    def __init__(self, config: Config, make_mlp: MakeMlp = Mlp):
        super().__init__()
        c = self.config = config
        stages = len(c.depths)
        if not stages or len(c.num_heads) != stages:
            raise UserError(
                f"depths {list(c.depths)} and num_heads {list(c.num_heads)} differ in length: one of each a stage"
            )
        if c.pretrained_windows and len(c.pretrained_windows) != stages:
            raise UserError(f"pretrained_windows {list(c.pretrained_windows)} needs {stages} numbers, one a stage")
        self.image_size, self.patch_size = tuple_of(c.image_size, 2), tuple_of(c.patch_size, 2)
        self.in_channels, self.embed_dim = c.in_channels, c.embed_dim * 2 ** (stages - 1)
        # along the width; a patch that is not square has another along the height, in the ratio of its sides
        self.strides = tuple(self.patch_size[-1] * 2**i for i in range(stages))
        self.map_dims = tuple(c.embed_dim * 2**i for i in range(stages))
        self.num_layers = sum(c.depths)
        self._say_padding()
        size = self.grid()

        self.patch_embed = PatchEmbed(c.in_channels, c.embed_dim, self.patch_size)
        self.patch_embed.add_module("norm", nn.LayerNorm(c.embed_dim, eps=c.norm_eps) if c.patch_norm else None)
        learned = torch.zeros(1, math.prod(size), c.embed_dim)
        self.absolute_pos_embed = nn.Parameter(learned) if c.absolute_positions else None
        rates = drop_path_rates(c.drop_path, self.num_layers)
        window = tuple_of(c.window_size, 2)
        layers = []
        for i, (depth, heads, dim) in enumerate(zip(c.depths, c.num_heads, self.map_dims, strict=True)):
            start = sum(c.depths[:i])
            blocks = [
                SwinBlock(
                    self._attention(i, dim, heads, clamp_window(size, window, (0, 0))[0], shift=c.shift and k % 2 == 1),
                    dim,
                    post_norm=c.version == 2,
                    mlp_ratio=c.mlp_ratio,
                    norm_eps=c.norm_eps,
                    drop_path=rates[start + k],
                    make_mlp=make_mlp,
                )
                for k in range(depth)
            ]
            last = i == stages - 1
            merging = None if last else PatchMerging(dim, norm_after=c.version == 2, norm_eps=c.norm_eps)
            layers.append(Stage(blocks, merging))
            size = tuple((s + 1) // 2 for s in size)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(self.embed_dim, eps=c.norm_eps)
        self.out_norms = nn.ModuleList(nn.LayerNorm(d, eps=c.norm_eps) for d in self.map_dims) if c.out_norm else None
        self._initialise()

    def _attention(self, stage: int, dim: int, heads: int, window: tuple[int, ...], *, shift: bool) -> WindowAttention:
        c = self.config
        if c.version == 1:
            return WindowAttention(dim, heads, window, shift=shift, qkv_bias=c.qkv_bias, qk_scale=c.qk_scale)
        before = c.pretrained_windows[stage] if c.pretrained_windows else 0
        return CosineWindowAttention(dim, heads, window, shift=shift, qkv_bias=c.qkv_bias, pretrained=(before, before))

    # --- the encoder's contract ---
    def grid(self, size: Sequence[int] | None = None) -> tuple[int, ...]:
        """Patches on each axis; a last, incomplete patch counts (the image is padded). Raises ``UserError`` for images
        smaller than one patch."""
        size = tuple(size or self.image_size)
        if any(s < p for s, p in zip(size, self.patch_size, strict=True)):
            raise UserError(f"an image of {size} is smaller than one patch {self.patch_size}: use a smaller patch_size")
        return tuple(-(-s // p) for s, p in zip(size, self.patch_size, strict=True))

    def final_grid(self, size: Sequence[int] | None = None) -> tuple[int, ...]:
        """Tokens on each axis behind the last stage."""
        grid = self.grid(size)
        for _ in self.config.depths[1:]:
            grid = tuple((g + 1) // 2 for g in grid)
        return grid

    def tokens(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """The last stage's tokens after the final norm, ``[B, N', embed_dim]``, row-major over ``final_grid``."""
        if keep is not None:
            raise ValueError("Swin needs every token: hide them with hidden and mask_token")
        return self.norm(self._stages(x, hidden, mask_token, draw)[-1][0])

    def maps(self, x: Tensor, *, draw: Draw | None = None) -> list[Tensor]:
        """Each stage's output before merging, without a norm unless ``out_norm``."""
        found = self._stages(x, None, None, draw)
        norms = self.out_norms if self.out_norms is not None else [nn.Identity()] * len(found)
        return [
            norm(tokens).transpose(1, 2).unflatten(2, size) for norm, (tokens, size) in zip(norms, found, strict=True)
        ]

    def layer_of(self, parameter: str) -> int:
        found = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)", parameter)
        if found:
            before = sum(self.config.depths[: int(found[1])])
            return before + (int(found[2]) + 1 if found[2] else self.config.depths[int(found[1])])
        return self.num_layers + 1 if parameter.startswith(("norm.", "out_norms.")) else 0

    def no_weight_decay(self) -> set[str]:
        kept = ("absolute_pos_embed", "relative_position_bias_table", "logit_scale")
        return {n for n, _ in self.named_parameters() if n.endswith(kept) or ".cpb_mlp." in n}

    def blocks_to_compile(self) -> list[nn.Module]:
        return [block for layer in self.layers for block in layer.blocks]

    # --- the way of a batch ---
    def embed(self, x: Tensor, hidden: Tensor | None, mask_token: Tensor | None) -> Tensor:
        """``[B, N, map_dims[0]]``: patches, normalised, hidden ones replaced, with absolute positions."""
        grid = self.grid(x.shape[2:])
        short = [g * p - s for g, p, s in zip(grid, self.patch_size, x.shape[2:], strict=True)]
        if any(short):
            x = F.pad(x, (0, short[1], 0, short[0]))
        tokens = self.patch_embed(x)
        if self.patch_embed.norm is not None:
            tokens = self.patch_embed.norm(tokens)
        if hidden is not None:
            if mask_token is None:
                raise ValueError("hidden needs mask_token")
            tokens = replace_hidden(tokens, hidden, mask_token)
        if self.absolute_pos_embed is not None:
            tokens = tokens + resize_table(self.absolute_pos_embed, self.grid(), grid).to(tokens.dtype)
        return tokens

    def _stages(
        self, x: Tensor, hidden: Tensor | None, mask_token: Tensor | None, draw: Draw | None
    ) -> list[tuple[Tensor, tuple[int, ...]]]:
        size = self.grid(x.shape[2:])
        tokens = self.embed(x, hidden, mask_token)
        if draw is not None and self.config.drop_rate > 0 and self.training:
            kept = draw.uniform("dropout", tuple(tokens.shape), device=x.device) >= self.config.drop_rate
            tokens = tokens * kept / (1 - self.config.drop_rate)
        drops: list[Tensor | None] = [None] * self.num_layers
        if draw is not None and self.config.drop_path > 0 and self.training:
            drops = list(draw.uniform("drop_path", (len(x), self.num_layers, 2), device=x.device).unbind(1))
        outputs = []
        for layer in self.layers:
            for block in layer.blocks:
                tokens = block(tokens, size, drops.pop(0))
            outputs.append((tokens, size))
            if layer.downsample is not None:
                tokens, size = layer.downsample(tokens, size)
        return outputs

    def _say_padding(self) -> None:
        short = any(s % p for s, p in zip(self.image_size, self.patch_size, strict=True))
        if short and self.grid():
            warnings.warn(f"images of {self.image_size} are padded to whole patches of {self.patch_size}", stacklevel=3)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        if self.config.version == 2:  # every block starts as the identity
            for block in self.blocks_to_compile():
                for parameter in (*block.norm1.parameters(), *block.norm2.parameters()):
                    nn.init.zeros_(parameter)


def build(name: str, **options: Any) -> Swin:
    """``swin_{size}`` or ``swinv2_{size}``; sizes nano, tiny, small, base, large; any option of :class:`Swin.Config`."""
    family, _, size = name.partition("_")
    if family not in VERSIONS or size not in SIZES:
        raise UserError(f"no backbone {name!r}: {nearest(name, [f'{f}_{s}' for f in VERSIONS for s in SIZES])}")
    return Swin(validated(Swin.Config, {**VERSIONS[family], **SIZES[size], **options}, where=f"backbone {name}"))
