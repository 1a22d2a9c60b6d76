"""FiT's attention: rotary positions, normed queries and keys, and several images in one sequence."""

from __future__ import annotations

from torch import Tensor, nn

from unmask.nn.attention import Attention, attend
from unmask.nn.block import Mlp
from unmask.nn.rotary import rotate
from unmask.nn.swiglu import SwiGLU


class RotaryAttention(Attention):
    """qk_norm: LayerNorm of each head's queries and keys, before they are turned; weight: with a factor a channel, without bias.
    turn_values: rotate values, too."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool = True,
        qk_norm_weight: bool = False,
        turn_values: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__(dim, num_heads)
        self.turn_values = turn_values
        if qk_norm:
            head = dim // num_heads
            self.q_norm = nn.LayerNorm(head, eps=norm_eps, elementwise_affine=qk_norm_weight, bias=False)
            self.k_norm = nn.LayerNorm(head, eps=norm_eps, elementwise_affine=qk_norm_weight, bias=False)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        allowed: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """cos, sin: ``[B, N, head_dim]``. allowed: bool ``[B, 1, N, N]``, who may look at whom. real: ``[B, N, 1]``, 0 at
        padding, whose mixed values are dropped before the last projection."""
        query, key, value = self.project(x)
        if cos is not None and sin is not None:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            value = rotate(value, cos, sin) if self.turn_values else value
        mixed = attend(query, key, value.to(query.dtype), bias=allowed).transpose(1, 2).flatten(2)
        return self.proj(mixed if real is None else mixed * real.to(mixed.dtype))


def feed_forward(kind: str, dim: int, mlp_ratio: float) -> nn.Module:
    """swiglu: a hidden width of two thirds, so that it costs what a GELU MLP costs; swiglu_large: the whole width."""
    hidden = int(dim * mlp_ratio)
    if kind == "gelu":
        return Mlp(dim, hidden, gelu="tanh")
    return SwiGLU(dim, hidden * 2 // 3 if kind == "swiglu" else hidden)
