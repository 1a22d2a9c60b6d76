"""Multi-head attention: one module for self- and cross-attention, one function that computes it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.errors import UserError


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v for ``[B, heads, L, d]``. bias: bool (True = may look) or float, broadcastable to
    ``[B, heads, Lq, Lk]``. The default scale is d^-0.5."""
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(query.dtype)
    if _products_are_faster(query, key):
        return _attend_by_products(query, key, value, bias, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _products_are_faster(query: Tensor, key: Tensor) -> bool:
    """On CPUs the flash kernel's backward pass misses the bf16 matrix units: with one thread it costs five times as much as
    plain products for 50 tokens, and twice for 197. Long sequences stay with it, for their memory."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return False
    return key.shape[-2] <= 1024


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if bias is not None:
        logits = logits.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else logits + bias
    return logits.softmax(dim=-1) @ value


def attention_map(query: Tensor, key: Tensor, *, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The weights that :func:`attend` applies, float32 ``[B, heads, Lq, Lk]``, rows summing to 1."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query.float() * scale) @ key.float().transpose(-2, -1)
    if bias is not None:
        logits = logits.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else logits + bias
    return logits.softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head attention with fused query, key and value weights (rows q, then k, then v, each head-major).

    qkv_bias: True, False, or "qv" for BEiT's separate ``q_bias`` and ``v_bias`` without one for keys.
    qk_norm: LayerNorm over each head's queries and keys. scale: of the logits; default head_dim^-0.5.
    Raises ``UserError`` when the heads do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool | Literal["qv"] = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        norm_eps: float = 1e-6,
        scale: float | None = None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"num_heads={num_heads} does not divide width {dim}: {_fitting(dim, num_heads)}")
        self.num_heads, self.scale = num_heads, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias is True)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(
        self, x: Tensor, *, context: Tensor | None = None, bias: Tensor | None = None, need_map: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``x [B, Lq, D]`` looks at ``context [B, Lk, D]`` (itself by default) -> ``[B, Lq, D]``, with the attention map
        ``[B, heads, Lq, Lk]`` behind it if asked."""
        query, key, value = self.project(x, context)
        mixed = attend(query, key, value, bias=bias, scale=self.scale)
        out = self.proj(mixed.transpose(1, 2).flatten(2))
        return (out, attention_map(query, key, bias=bias, scale=self.scale)) if need_map else out

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[B, heads, L, d]``."""
        if context is None and self.q_bias is None:  # as a call, so that who watches or replaces the layer is asked
            query, key, value = self._heads(self.qkv(x), 3)
            return self.q_norm(query), self.k_norm(key), value
        weight: Tensor = self.qkv.weight
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if context is None:
            query, key, value = self._heads(F.linear(x, weight, bias), 3)
        else:
            dim = weight.shape[1]
            query = self._heads(F.linear(x, weight[:dim], None if bias is None else bias[:dim]), 1)[0]
            key, value = self._heads(F.linear(context, weight[dim:], None if bias is None else bias[dim:]), 2)
        return self.q_norm(query), self.k_norm(key), value

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(2, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _fitting(dim: int, heads: int) -> str:
    fits = [h for h in range(1, dim + 1) if dim % h == 0]
    near = sorted(fits, key=lambda h: abs(h - heads))[:2]
    return "use " + " or ".join(str(h) for h in sorted(near))
