"""The two window attentions of Swin: learned relative biases (V1), and cosine attention with continuous ones (V2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.errors import UserError
from unmask.nn.windows import Windows, clamp_window, cut, window_attention, window_index


class WindowAttention(nn.Module):
    """Self-attention in (shifted) windows with a relative-position table. Liu et al. 2021, section 3.2, equation 4.

    window: tokens of a window on each axis; the table is made for it, and smaller maps read its middle.
    shift: whether windows are moved by half their side, where the map has more than one.
    ``forward(x [B, N, C], size)`` with N = prod(size), row-major.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Sequence[int],
        *,
        shift: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"num_heads={num_heads} does not divide the stage's width {dim}")
        self.num_heads, self.window = num_heads, tuple(window)
        self.shift = tuple(w // 2 if shift else 0 for w in self.window)
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self._make(dim, qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _make(self, dim: int, qkv_bias: bool) -> None:
        rows = math.prod(2 * w - 1 for w in self.window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, self.num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def windows(self, size: Sequence[int], device: torch.device) -> Windows:
        """How a map of ``size`` is cut here."""
        return cut(size, *clamp_window(size, self.window, self.shift), device)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.proj(self.mix(self.project(x), size))

    @torch.compiler.disable  # cached tables and in-place products gain nothing from a compiler; all around them does
    def mix(self, qkv: Tensor, size: Sequence[int]) -> Tensor:
        """Attention inside the windows: ``[B, N, 3, heads, d]`` -> ``[B, N, C]``."""
        windows = self.windows(size, qkv.device)
        return window_attention(qkv, self.bias(windows), windows, scale=self.logit_factor)

    @property
    def logit_factor(self) -> float:
        return self.scale

    def project(self, x: Tensor) -> Tensor:
        """``[B, N, 3, heads, d]``."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1))

    def bias(self, windows: Windows) -> Tensor:
        """``[heads, K, K]``."""
        index = window_index(windows.window, self.window, str(windows.index.device))
        rows = self.table().index_select(0, index)
        return rows.view(windows.slots, windows.slots, self.num_heads).permute(2, 0, 1).contiguous()

    def table(self) -> Tensor:
        """Biases of all relative places, ``[prod(2 w - 1), heads]``."""
        return self.relative_position_bias_table


class CosineWindowAttention(WindowAttention):
    """Scaled cosine attention, with biases that a small network computes from log-spaced offsets. Liu et al. 2022
    (arXiv:2111.09883), sections 3.2 and 3.3.

    pretrained: the window of the pre-training, to whose offsets the coordinates are normalised; zeros: this window's.
    """

    table_coordinates: Tensor

    def __init__(self, *args: Any, pretrained: Sequence[int] = (0, 0), **options: Any):
        self.pretrained = tuple(pretrained)
        super().__init__(*args, **options)
        self.register_buffer(
            "table_coordinates", log_spaced_coordinates(self.window, self.pretrained), persistent=False
        )
        self._cached: tuple[object, Tensor] | None = None

    def _make(self, dim: int, qkv_bias: bool) -> None:
        self.logit_scale = nn.Parameter(torch.full((self.num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(len(self.window), 512), nn.ReLU(inplace=True), nn.Linear(512, self.num_heads, bias=False)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    @property
    def logit_factor(self) -> float:
        return 1.0  # already in the queries

    def project(self, x: Tensor) -> Tensor:
        """Unit queries times the learned scale, unit keys, values."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1))
        factor = torch.linalg.vector_norm(qkv[:, :, :2].float(), dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()
        query = factor[:, :, :1] * self.logit_scale.clamp(max=math.log(100.0)).exp().float().view(1, 1, 1, -1, 1)
        factors = torch.cat((query, factor[:, :, 1:], torch.ones_like(query)), dim=2)
        return qkv * factors.to(qkv.dtype)

    def table(self) -> Tensor:
        # a function of the weights alone: without gradients it is computed once for each state of them
        reusable = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
        key = tuple((p.data_ptr(), p._version) for p in self.cpb_mlp.parameters()) if reusable else ()
        if reusable and self._cached is not None and self._cached[0] == key:
            return self._cached[1]
        with torch.autocast(self.table_coordinates.device.type, enabled=False):  # few numbers, each of which matters
            table = 16 * torch.sigmoid(self.cpb_mlp(self.table_coordinates))
        if reusable:
            self._cached = (key, table)
        return table


def log_spaced_coordinates(window: Sequence[int], pretrained: Sequence[int]) -> Tensor:
    """float32 ``[prod(2 w - 1), axes]``: sign(c) log2(|c| + 1) / log2(8) of offsets c scaled to -8 ... 8.

    An axis of one token has the single coordinate 0.
    """
    axes = [
        torch.arange(1 - w, w, dtype=torch.float32) / max((p or w) - 1, 1) * 8
        for w, p in zip(window, pretrained, strict=True)
    ]
    places = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    return places.sign() * (places.abs() + 1).log2() / math.log2(8)
