"""DiT's block and its last layer. A block is told its modulation; the network computes those of all blocks together.

Legend: x ``[B, N, D]``; a modulation ``[B, 6, D]``, or ``[B, N, 6, D]`` where tokens differ: shift, scale, gate of the
attention, then of the feed-forward layer; four parts are shift and scale of each, without gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unmask.nn.adaln import ModulationKind, Modulations, modulated
from unmask.nn.attention import Attention
from unmask.nn.block import Mlp

Parts = tuple[Tensor, ...]


def parts_of(modulation: Tensor) -> Parts:
    """The vectors of a modulation ``[B, parts, D]`` or ``[B, N, parts, D]``, each ``[B, 1 or N, D]``."""
    if modulation.ndim == 3:
        modulation = modulation[:, None]
    return modulation.unbind(2)


class DiTBlock(nn.Module):
    """Pre-norm attention and feed-forward layer, modulated: ``x += gate · branch(LN(x) · (1 + scale) + shift)``.

    Without a modulation the block is a plain pre-norm one, for which ``plain=True`` gives its norms weights of their own.
    attention, feed_forward: other layers of the same meaning; ``forward`` hands further keywords to the attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        plain: bool = False,
        norm_eps: float = 1e-6,
        attention: nn.Module | None = None,
        feed_forward: nn.Module | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=plain)
        self.attn = attention if attention is not None else Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=plain)
        self.mlp = feed_forward if feed_forward is not None else Mlp(dim, int(dim * mlp_ratio), gelu="tanh")

    def forward(self, x: Tensor, modulation: Tensor | None = None, **attention: Any) -> Tensor:
        if modulation is None:
            x = x + self.attn(self.norm1(x), **attention)
            return x + self.mlp(self.norm2(x))
        parts = parts_of(modulation)
        if len(parts) == 4:
            shift, scale, shift2, scale2 = parts
            x = x + self.attn(modulated(self.norm1(x), shift, scale), **attention)
            return x + self.mlp(modulated(self.norm2(x), shift2, scale2))
        shift, scale, gate, shift2, scale2, gate2 = parts
        x = torch.addcmul(x, gate, self.attn(modulated(self.norm1(x), shift, scale), **attention))
        return torch.addcmul(x, gate2, self.mlp(modulated(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """LN, modulated by shift and scale, then the linear layer that predicts a patch; both linear layers start at zero."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        kind: ModulationKind = "normal",
        adaptive: bool = True,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=not adaptive)
        self.modulations = Modulations(1, dim, 2, kind=kind) if adaptive else None
        self.linear = nn.Linear(dim, out_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def modulation(self, condition: Tensor) -> Tensor | None:
        """``[B, 2, D]`` for ``condition [B, D]``; None for a last layer without modulation."""
        return None if self.modulations is None else self.modulations(condition)[0]

    def forward(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        if modulation is not None:
            shift, scale = parts_of(modulation)
            return self.linear(modulated(self.norm(x), shift, scale))
        return self.linear(self.norm(x))
