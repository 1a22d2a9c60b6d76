"""The block of ENAT: tokens look at a context through projections of its own, and at one another.

Legend: B samples, L tokens, V context tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.errors import UserError
from unmask.nn.attention import attend
from unmask.nn.patch import select

CHUNKS = 8  # of a block's modulation, in the authors' order: see ``Block``


class MultiwayAttention(nn.Module):
    """Attention over [context, tokens]: keys and values of the context have a projection of their own.

    ``context_kv`` is the authors' expert A (absent with ``context=False``); ``qkv`` holds the query and their expert B,
    rows q, then k, then v, each head-major. Raises ``UserError`` when the heads do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int, *, context: bool = True):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            near = min((h for h in range(1, dim + 1) if dim % h == 0), key=lambda h: abs(h - num_heads))
            raise UserError(f"num_heads={num_heads} does not divide embed_dim={dim}: use num_heads={near}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.context_kv = nn.Linear(dim, 2 * dim) if context else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """``x [B, L, D]``, ``context [B, V, D]`` -> ``[B, L, D]``; without context the tokens look at one another.
        queries: ``[B, Q]``, the tokens of ``x`` that are computed; all by default."""
        if queries is None:
            query, key, value = self._heads(self.qkv(x), 3)
        else:
            (weight, rest), (bias, rest_bias) = (_first_and_rest(p) for p in (self.qkv.weight, self.qkv.bias))
            query = self._heads(F.linear(select(x, queries), weight, bias), 1)[0]
            key, value = self._heads(F.linear(x, rest, rest_bias), 2)
        if context is not None and context.shape[1]:
            assert self.context_kv is not None
            context_key, context_value = self._heads(self.context_kv(context), 2)
            key, value = torch.cat((context_key, key), dim=2), torch.cat((context_value, value), dim=2)
        return self.proj(attend(query, key, value).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(2, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _first_and_rest(rows: Tensor) -> tuple[Tensor, ...]:
    """The rows of queries, and those of keys and values."""
    return rows.split((len(rows) // 3, len(rows) - len(rows) // 3))


class TanhMlp(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-zero block, modulated by the class alone.

    Order of the chunks: shift and scale of the tokens, shift and scale of the context, gate of the attention; shift,
    scale and gate of the MLP. Scales come out with 1 already added.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, *, context: bool = True):
        super().__init__()
        self.attn = MultiwayAttention(dim, num_heads, context=context)
        self.mlp = TanhMlp(dim, int(dim * mlp_ratio))
        self.modulate = nn.Linear(dim, CHUNKS * dim)

    def modulation(self, activated: Tensor) -> Tensor:
        """``silu(class) [B, D]`` -> ``[8, B, 1, D]``: the same in all steps of a sampling, which computes it once."""
        parts = self.modulate(activated).unflatten(1, (CHUNKS, -1)).transpose(0, 1).unsqueeze(2)
        one = torch.tensor([0, 1, 0, 1, 0, 0, 1, 0], dtype=parts.dtype, device=parts.device)
        return parts + one[:, None, None, None]

    def forward(
        self, x: Tensor, condition: Tensor, context: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """``x [B, L, D]``; condition: ``silu(class) [B, D]``, or the modulation made of it. context: ``[B, V, D]`` that has
        passed :func:`normalised`, which all blocks that look at it share. queries: ``[B, Q]``, the tokens to compute."""
        modulation = self.modulation(condition) if condition.ndim == 2 else condition
        shift, scale, context_shift, context_scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(0)
        if context is not None and context.shape[1]:
            context = torch.addcmul(context_shift, context, context_scale)
        mixed = self.attn(torch.addcmul(shift, normalised(x), scale), context, queries)
        x = torch.addcmul(x if queries is None else select(x, queries), gate, mixed)
        return torch.addcmul(x, mlp_gate, self.mlp(torch.addcmul(mlp_shift, normalised(x), mlp_scale)))


def normalised(x: Tensor) -> Tensor:
    """LayerNorm without affine part, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class PreviousProjection(nn.Module):
    """How features of an earlier step are made fit for this one: ``x + mlp(LN(x))``."""

    def __init__(self, dim: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TanhMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class TokenHead(nn.Module):
    """Logits over the code book: Linear, GELU (erf), LayerNorm, product with the word table, bias of each word.

    The table is read without gradient, as the authors do: words learn from the input side alone.
    """

    def __init__(self, dim: int, words: int):
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """``x [..., D]``, ``table [words, D]`` -> ``[..., words - 1]``: the last word, the mask, is never predicted."""
        return F.linear(self.norm(F.gelu(self.fc(x))), table.detach()[:-1], self.bias[:-1])
