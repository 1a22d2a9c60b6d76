"""The network of FiT and FiTv2: DiT's blocks over sequences of any shape, with rotary positions in rows and columns.

Legend: tokens ``[B, N, P]``, P = channels · p · p; time float ``[B]`` (int64 for diffusion), class ids int64 ``[B]``, the last
is "none"; grid ``[B, 2, N]`` of (column, row); mask ``[B, N]``: 0 padding, else the image's number in its row; size ``[B, k, 2]``
of (rows, columns). Where a row holds k images, time and classes are ``[B, k]``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import config as configs
from unmask.config import Field
from unmask.errors import UserError
from unmask.nn.adaln import ModulationKind, Modulations
from unmask.nn.rotary import RotaryMethod, rotary_tables
from unmask.nn.timestep import ClassEmbedding, TimeEmbedding
from unmask.systems.generation.dit.blocks import DiTBlock, FinalLayer
from unmask.systems.generation.dit.network import with_variant
from unmask.systems.generation.fitv2.blocks import RotaryAttention, feed_forward
from unmask.systems.generation.schedules import shifted_time

_V1: dict[str, Any] = {"objective": "diffusion", "qk_norm": False, "adaln": "normal", "learn_sigma": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "S": {"embed_dim": 384, "depth": 15, "num_heads": 6, "adaln_rank": 96},
    "B": {"embed_dim": 768, "depth": 15, "num_heads": 12, "adaln_rank": 192},
    "L": {"embed_dim": 1024, "depth": 30, "num_heads": 16, "adaln_rank": 256},
    "XL": {"embed_dim": 1152, "depth": 36, "num_heads": 16, "adaln_rank": 288},
    "3B": {"embed_dim": 2304, "depth": 40, "num_heads": 24, "adaln_rank": 576},
    "v1_B": {"embed_dim": 768, "depth": 12, "num_heads": 12, **_V1},
    "v1_XL": {"embed_dim": 1152, "depth": 28, "num_heads": 16, **_V1},
}


class RotarySettings(configs.Config):
    """Rotary positions and how they reach sizes beyond those of training."""

    theta: float = Field(10000.0, gt=1)
    method: RotaryMethod = Field("normal", description="how positions are stretched beyond `trained`")
    decouple: bool = Field(False, description="rows and columns each by their own length (the vision variants)")
    online: bool = Field(False, description="stretch by each sample's own size, not by the largest")
    trained: int | None = Field(None, ge=1, description="tokens of a side in training; open: the context's square root")
    max_rows: int | None = Field(None, ge=1, description="the largest size, in tokens; open: the largest of a batch")
    max_columns: int | None = Field(None, ge=1, description="the same across")
    values: bool = Field(False, description="turn values as well as queries and keys")


class FiTNetwork(nn.Module):
    """in_channels: of the latents. classes: 0 for a network that knows none."""

    class Config(configs.Config):
        variant: Literal["S", "B", "L", "XL", "3B", "v1_B", "v1_XL"] | None = Field(
            None, description="a size of the papers, instead of numbers; v1: FiT with its noise prediction"
        )
        patch_size: int = Field(2, ge=1, description="latent cells (or pixels) along a side of a token")
        context: int = Field(256, ge=1, description="tokens of an image in training, at most")
        embed_dim: int = Field(1152, ge=4, description="width")
        depth: int = Field(36, ge=1, description="blocks")
        num_heads: int = Field(16, ge=1)
        mlp_ratio: float = Field(4.0, gt=0)
        feed_forward: Literal["swiglu", "swiglu_large", "gelu"] = "swiglu"
        qk_norm: bool = Field(True, description="norm queries and keys before they are turned")
        qk_norm_weight: bool = Field(False, description="with a learned factor a channel")
        adaln: ModulationKind = Field("lora", description="how the condition becomes modulations: normal, lora, swiglu")
        adaln_rank: int = Field(288, ge=1, description="rank of adaln=lora")
        position: Literal["rotary", "learned"] = Field(
            "rotary", description="learned: one absolute table, resized bicubically to each size (a baseline)"
        )
        rotary: RotarySettings = RotarySettings()
        objective: Literal["flow", "diffusion"] = Field(
            "flow", description="rectified flow, or FiT v1's noise prediction"
        )
        learn_sigma: bool = Field(False, description="predict variances, too (diffusion only)")
        time_shift: float = Field(
            1.0, gt=0, description="s of t -> s t / (1 + (s - 1) t), as the network is told the time"
        )

        @model_validator(mode="before")
        @classmethod
        def _sizes_of_the_variant(cls, values: Any) -> Any:
            return with_variant(values, VARIANTS)

        @model_validator(mode="after")
        def _fits(self) -> Any:
            if self.embed_dim % self.num_heads:
                raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}")
            if self.position == "rotary" and self.embed_dim // self.num_heads % 4:
                raise ValueError(
                    f"embed_dim / num_heads = {self.embed_dim // self.num_heads} must be divisible by 4 for rotary positions"
                )
            if self.learn_sigma and self.objective == "flow":
                raise ValueError("learn_sigma goes with objective=diffusion")
            return self

    def __init__(self, config: Config, *, in_channels: int = 4, classes: int = 1000):
        super().__init__()
        self.config, self.in_channels, self.classes = config, in_channels, classes
        dim, values = config.embed_dim, in_channels * config.patch_size**2
        self.head_dim = dim // config.num_heads
        self.x_embedder = nn.Sequential()  # holds proj, under the authors' name
        self.x_embedder.proj = nn.Linear(values, dim)
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = ClassEmbedding(classes, dim) if classes else None
        self.blocks = nn.ModuleList(
            DiTBlock(
                dim,
                config.num_heads,
                attention=RotaryAttention(
                    dim,
                    config.num_heads,
                    qk_norm=config.qk_norm,
                    qk_norm_weight=config.qk_norm_weight,
                    turn_values=config.rotary.values,
                ),
                feed_forward=feed_forward(config.feed_forward, dim, config.mlp_ratio),
            )
            for _ in range(config.depth)
        )
        for module in [self.x_embedder, *self.blocks]:
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.zeros_(linear.bias)
        self.modulations = Modulations(config.depth, dim, 6, kind=config.adaln, rank=config.adaln_rank)
        last: ModulationKind = "swiglu" if config.adaln == "swiglu" else "normal"
        self.final_layer = FinalLayer(dim, values * (2 if config.learn_sigma else 1), kind=last)
        self.position_table: nn.Parameter | None = None
        if config.position == "learned":
            self.position_table = nn.Parameter(torch.randn(dim, self.trained, self.trained) * 0.02)

    @property
    def trained(self) -> int:
        """Tokens along a side in training."""
        return self.config.rotary.trained or math.isqrt(self.config.context)

    # --- positions ---
    def rotary(
        self, grid: Tensor, size: Tensor | None, mask: Tensor | None = None, settings: RotarySettings | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin ``[B, N, head_dim]``. settings: instead of the network's own."""
        r = settings or self.config.rotary
        lengths: Any = None
        if r.method != "normal":
            if r.online or r.max_rows is None or r.max_columns is None:
                if size is None:
                    raise UserError(f"fitv2: rotary method {r.method} needs the sizes (rows, columns) of the samples")
                lengths = self._by_token(size, mask) if r.online else size.flatten(0, 1).amax(dim=0)
            else:
                lengths = (r.max_rows, r.max_columns)
        return rotary_tables(
            grid,
            head_dim=self.head_dim,
            theta=r.theta,
            method=r.method,
            decouple=r.decouple,
            trained=r.trained or self.trained,
            lengths=lengths,
        )

    def _by_token(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, k, ...]`` of the images of a row as ``[B, N, ...]`` of its tokens; ``[B, 1, ...]`` where a row holds one."""
        if values.shape[1] == 1 or mask is None:
            return values[:, :1]
        image = (mask.long() - 1).clamp(min=0)
        return values.gather(1, image.reshape(*image.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))

    def absolute(self, grid: Tensor, size: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, N, D]``: the learned table, resized to each image's own grid (bicubic) and read at its tokens."""
        assert self.position_table is not None
        sides = self._by_token(size, mask).flip(2).clamp(min=1)  # (columns, rows)
        place = (grid.transpose(1, 2).float() + 0.5) / sides * 2 - 1
        table = self.position_table[None].expand(len(grid), -1, -1, -1)
        found = F.grid_sample(
            table.float(), place[:, :, None], mode="bicubic", padding_mode="border", align_corners=False
        )
        return found[..., 0].transpose(1, 2)

    # --- the condition ---
    def condition(self, time: Tensor, classes: Tensor | None) -> Tensor:
        """``[..., D]`` of times and classes ``[...]``."""
        if self.config.objective == "flow":
            time = shifted_time(time, self.config.time_shift).clamp(max=1.0)
        embedded = self.t_embedder(time)
        if self.y_embedder is None:
            return embedded
        if classes is None:
            classes = torch.full(time.shape, self.classes, dtype=torch.int64, device=time.device)
        return embedded + self.y_embedder(classes)

    def forward(
        self,
        tokens: Tensor,
        time: Tensor,
        classes: Tensor | None,
        grid: Tensor,
        mask: Tensor | None = None,
        size: Tensor | None = None,
        rotary: RotarySettings | None = None,
    ) -> Tensor:
        """``[B, N, P]`` velocity (or noise; ``[B, N, 2P]`` with variances), 0 at padding. mask: None where no token is padding
        and each row is one image. rotary: other settings than the network's own, for sizes never trained."""
        if tokens.shape[2] != self.x_embedder.proj.in_features:
            raise UserError(
                f"fitv2 takes tokens of {self.x_embedder.proj.in_features} values (channels x patch x patch), got {tokens.shape[2]}"
            )
        x = self.x_embedder.proj(tokens)
        around: dict[str, Tensor] = {}
        if self.position_table is None:
            around["cos"], around["sin"] = self.rotary(grid, size, mask, rotary)
        else:
            if size is None:
                raise UserError("fitv2: position=learned needs the sizes (rows, columns) of the samples")
            x = x + self.absolute(grid, size, mask).to(x.dtype)
        real = None
        if mask is not None:
            around["allowed"] = (mask[:, :, None] == mask[:, None])[:, None]
            real = around["real"] = (mask != 0)[..., None]
        c = self.condition(time, classes)
        images = c.shape[1] if c.ndim == 3 else 0
        every = self.modulations(c.flatten(0, 1) if images else c)
        last = self.final_layer.modulation(c.flatten(0, 1) if images else c)
        for block, modulation in zip(self.blocks, every.unbind(0), strict=True):
            x = block(x, self._spread(modulation, images, mask), **around)
        assert last is not None
        out = self.final_layer(x, self._spread(last, images, mask))
        return out if real is None else out * real.to(out.dtype)

    def _spread(self, modulation: Tensor, images: int, mask: Tensor | None) -> Tensor:
        """A modulation ``[B · k, parts, D]`` for each token of the rows, ``[B, N, parts, D]``; unchanged where k is 0."""
        return self._by_token(modulation.unflatten(0, (-1, images)), mask) if images else modulation
