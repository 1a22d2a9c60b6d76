"""How queries look at pixels: PEM's prototypes, and Mask2Former's masked attention as the baseline (section 3.1, figure 2).

Legend: Q queries, N places of a memory map ``h x w``, D width, d = D / heads.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.nn.attention import attend
from unmask.nn.norm import norm_of_maps

CHUNK = 2048  # places looked at at once: with 100 queries their similarities fit a core's cache


class PrototypeAttention(nn.Module):
    """Each query and head picks the one most similar place it may look at, and interacts with it element by element.

    normalise_over: "queries" follows the authors' code, which divides by the norm over the queries of a channel;
    "channels" is the usual norm of a vector. lift_mask: "image" follows it, too: a mask is lifted only where no query
    of the image sees anything, and a query that alone sees nothing takes the first place; "query" lifts it for each.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        norm: str = "bn",
        normalise_over: Literal["queries", "channels"] = "queries",
        lift_mask: Literal["image", "query"] = "image",
    ):
        super().__init__()
        self.num_heads, self.normalise_over, self.lift_mask = num_heads, normalise_over, lift_mask
        self.memory_norm = norm_of_maps(norm, dim)
        self.memory_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.memory_out = nn.Linear(dim, dim)
        self.query_norm = nn.LayerNorm(dim)
        self.query_out = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.final = nn.Linear(dim, dim)
        self.alpha = nn.Parameter(torch.ones(1, 1, dim))

    def forward(
        self, queries: Tensor, query_position: Tensor, memory: Memory, mask_logits: Tensor | None = None
    ) -> Tensor:
        """``[B, Q, D]``. mask_logits: ``[B, Q, N]``; a query may look where they are >= 0; None: everywhere."""
        found = F.normalize(self.memory_out(self.mixed(memory.placed, memory.size)), dim=-1)
        asked = F.normalize(self.query_out(self.query_norm(queries + query_position)), dim=-1)
        index = prototypes(asked, found, self.num_heads, self.additive(mask_logits))
        picked = picked_by_head(found, index)
        product = self.proj(picked * asked)
        axis = 1 if self.normalise_over == "queries" else 2
        return queries + self.final(F.normalize(product, dim=axis) * self.alpha + picked)

    def mixed(self, placed: Tensor, size: tuple[int, int]) -> Tensor:
        """Norm and depthwise convolution of ``[B, N, D]``, kept with channels last throughout: a depthwise convolution is
        several times faster so, and no transposition is needed on either side."""
        x = placed.transpose(1, 2).unflatten(2, size)  # [B, D, h, w] as a view, channels last in memory
        x = x.contiguous(memory_format=torch.channels_last)
        return self.memory_conv(self.memory_norm(x)).permute(0, 2, 3, 1).flatten(1, 2)

    @torch.no_grad()
    def additive(self, mask_logits: Tensor | None) -> Tensor | None:
        """0 where a query may look, -inf elsewhere, ``[B, Q, N]``."""
        if mask_logits is None:
            return None
        hidden = mask_logits < 0
        blind = hidden.all(dim=2, keepdim=True)
        lifted = blind if self.lift_mask == "query" else blind.all(dim=1, keepdim=True)
        return torch.zeros_like(mask_logits).masked_fill_(hidden & ~lifted, -math.inf)


class Memory:
    """One level as all layers read it: ``plain [B, N, D]`` and, with positions added, ``placed [B, N, D]``; ``size`` (h, w)."""

    def __init__(self, plain: Tensor, position: Tensor, size: tuple[int, int]):
        self.plain, self.size = plain, size
        self.placed = plain + position


@torch.no_grad()
def prototypes(
    queries: Tensor, places: Tensor, num_heads: int, mask: Tensor | None = None, chunk: int = CHUNK
) -> Tensor:
    """int64 ``[B, Q, heads]``: for each query and head the place with the largest similarity (the first of equal ones; place 0
    where the mask leaves nothing).

    queries ``[B, Q, D]``, places ``[B, N, D]``, mask additive ``[B, Q, N]``. The similarities of all heads and places,
    ``[B, heads, N, Q]``, are never held together: on a CPU one head and ``chunk`` places at a time.
    """
    batch, count, dim = queries.shape
    together = num_heads if queries.is_cuda else 1
    asked = queries.detach().unflatten(2, (num_heads, -1)).transpose(1, 2)  # [B, heads, Q, d]
    keys = places.detach().unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1)  # [B, heads, d, N]
    out = []
    for first in range(0, num_heads, together):
        some, theirs = asked[:, first : first + together], keys[:, first : first + together]
        best = index = None
        for start in range(0, places.shape[1], chunk):
            part = theirs[..., start : start + chunk]
            if mask is None:
                similar = some @ part
            elif together == 1:
                similar = torch.baddbmm(mask[..., start : start + chunk].to(some.dtype), some[:, 0], part[:, 0])[
                    :, None
                ]
            else:
                similar = some @ part + mask[:, None, :, start : start + chunk]
            value, place = similar.max(dim=-1)
            if best is None or index is None:
                best, index = value, place
                continue
            better = value > best
            index = torch.where(better, place + start, index)
            best = torch.where(better, value, best)
        assert index is not None
        out.append(index)
    return torch.cat(out, dim=1).transpose(1, 2)


def picked_by_head(places: Tensor, index: Tensor) -> Tensor:
    """``[B, Q, D]``: of each head's channels those of its place. places ``[B, N, D]``, index ``[B, Q, heads]``."""
    heads = index.shape[2]
    parts = places.unflatten(2, (heads, -1))  # [B, N, heads, d]
    wanted = index[..., None].expand(-1, -1, -1, parts.shape[3])
    return parts.gather(1, wanted).flatten(2)


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values come from different tensors (positions are added to the first two).
    Fused weights, rows q, then k, then v, as in torch's ``MultiheadAttention``."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """``[B, Lq, D]``. bias: bool (True = may look) or additive, broadcastable to ``[B, heads, Lq, Lk]``."""
        weights, offsets = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        if query is key:
            dim = query.shape[2]
            both = F.linear(query, self.qkv.weight[: 2 * dim], self.qkv.bias[: 2 * dim])
            first, second = both.chunk(2, dim=2)
        else:
            first, second = F.linear(query, weights[0], offsets[0]), F.linear(key, weights[1], offsets[1])
        heads = [self.heads(x) for x in (first, second, F.linear(value, weights[2], offsets[2]))]
        return self.proj(attend(*heads, bias=bias).transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class MaskedAttention(nn.Module):
    """Mask2Former's: every query attends to all places inside its mask; where that is empty, to all. (Cheng et al., CVPR 2022,
    section 3.2.1.)"""

    def __init__(self, dim: int, num_heads: int, *, pre_norm: bool = True):
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, query_position: Tensor, memory: Memory, mask_logits: Tensor | None = None
    ) -> Tensor:
        """``[B, Q, D]``. mask_logits: ``[B, Q, N]``; a query may look where they are >= 0; None: everywhere."""
        allowed = None
        if mask_logits is not None:
            allowed = mask_logits.detach() >= 0
            allowed = (allowed | ~allowed.any(dim=2, keepdim=True))[:, None]
        asked = (self.norm(queries) if self.pre_norm else queries) + query_position
        out = queries + self.attention(asked, memory.placed, memory.plain, bias=allowed)
        return out if self.pre_norm else self.norm(out)
