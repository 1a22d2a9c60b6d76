"""The pre-norm transformer block and its parts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from unmask.nn.attention import Attention
from unmask.nn.patch import select


class Mlp(nn.Module):
    """Linear, GELU (exact, by erf, or its tanh approximation), Linear."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        out_dim: int | None = None,
        bias: bool = True,
        gelu: Literal["none", "tanh"] = "none",
    ):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = nn.GELU(approximate=gelu)
        self.fc2 = nn.Linear(hidden_dim, out_dim or dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch (Touvron et al. 2021, CaiT, section 2.1)."""

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def drop_path(x: Tensor, uniform: Tensor | None, rate: float) -> Tensor:
    """A residual branch, zeroed for samples whose ``uniform [B]`` in [0, 1) lies below ``rate``; kept ones are divided by
    1 - rate (stochastic depth, Huang et al. 2016). ``uniform=None`` keeps all, unscaled."""
    if uniform is None or rate == 0.0:
        return x
    keep = (uniform >= rate).to(x.dtype) / (1 - rate)
    return x * keep.reshape(-1, *(1,) * (x.ndim - 1))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates of the blocks: from 0 in the first to ``rate`` in the last, evenly."""
    return torch.linspace(0, rate, depth, device="cpu").tolist()


def part(x: Tensor, queries: slice | Tensor | None) -> Tensor:
    """Some tokens of ``x [B, L, D]``: a slice, or ids ``[B, Q]``; None is all."""
    if queries is None:
        return x
    return x[:, queries] if isinstance(queries, slice) else select(x, queries)


class Block(nn.Module):
    """Pre-norm block: ``x + attn(LN(x))``, then ``x + mlp(LN(x))``, each branch with LayerScale and drop path if wanted.

    ``forward(x [B, L, D])`` gives ``[B, L, D]``, or ``[B, Q, D]`` for a subset of queries: the others are still looked at,
    but nothing is computed for them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool | Literal["qv"] = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        scale: float | None = None,
    ):
        super().__init__()
        self.drop_path_rate = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, norm_eps=norm_eps, scale=scale)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        bias: Tensor | None = None,
        drop: Tensor | None = None,
        queries: slice | Tensor | None = None,
    ) -> Tensor:
        """context: ``[B, Lk, D]``, already normalised, to look at instead of ``x``. bias: added to the logits.
        drop: uniforms ``[B, 2]`` for drop path of the two branches. queries: the tokens of ``x`` to compute."""
        normed = self.norm1(x)
        if queries is not None:
            context = normed if context is None else context
            x, normed = part(x, queries), part(normed, queries)
        first, second = (None, None) if drop is None else drop.unbind(1)
        x = x + drop_path(self.ls1(self.attn(normed, context=context, bias=bias)), first, self.drop_path_rate)
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), second, self.drop_path_rate)
