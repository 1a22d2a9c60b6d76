"""Attention inside shifted windows of an n-d map (Liu et al. 2021, section 3.2).

The cyclic shift, the cut into windows and the split into heads are one gather of rows, and the way back is the inverse
gather: nothing is rolled, permuted or scattered. A map that windows do not divide is padded at the end of each axis
with slots that no real token attends to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.nn.attention import attend
from unmask.nn.positions import relative_index

APART = -100.0  # official: added to the logits of pairs that the cyclic shift brought together
ABSENT = -1e4  # added for keys that are padding; finite, because a padding query may see padding only


@dataclass(frozen=True, eq=False)
class Windows:
    """How a map is cut. W windows (row-major) of K slots (row-major); N tokens (row-major).

    index: int64 ``[W, K]``, the token in each slot (0 where ``padding``). inverse: int64 ``[N]``, the slot
    ``w * K + k`` of each token. mask: float32 ``[W, K, K]`` to add to the logits, or None where nothing is apart.
    padding: bool ``[W, K]``, slots without a token, or None where there are none.
    """

    size: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    index: Tensor
    inverse: Tensor
    mask: Tensor | None
    padding: Tensor | None

    @property
    def count(self) -> int:
        """W."""
        return self.index.shape[0]

    @property
    def slots(self) -> int:
        """K."""
        return self.index.shape[1]


def clamp_window(
    size: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The (window, shift) that a map of ``size`` gets.

    Official rule for windows of one side w: where min(size) <= w the window becomes min(size) on every axis and nothing
    shifts. Windows of unequal sides are clamped axis by axis.
    """
    if len(set(window)) == 1:
        if min(size) <= window[0]:
            return (min(size),) * len(size), (0,) * len(size)
        return tuple(window), tuple(shift)
    fits = [s > w for s, w in zip(size, window, strict=True)]
    return (
        tuple(w if f else s for s, w, f in zip(size, window, fits, strict=True)),
        tuple(x if f else 0 for x, f in zip(shift, fits, strict=True)),
    )


def cut(
    size: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device | str = "cpu"
) -> Windows:
    """The windows of a map of ``size`` after a cyclic shift by ``-shift``. Computed once for each set of arguments."""
    return _cut(tuple(size), tuple(window), tuple(shift), str(device))


@functools.lru_cache(maxsize=256)
def _cut(size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: str) -> Windows:
    with torch.inference_mode(False):  # cached: must serve training after inference
        padded = tuple(math.ceil(s / w) * w for s, w in zip(size, window, strict=True))
        ids = torch.full(padded, -1, dtype=torch.int64)
        ids[tuple(slice(s) for s in size)] = torch.arange(math.prod(size)).view(size)
        axes = tuple(range(len(size)))
        index = _split(ids.roll(tuple(-s for s in shift), axes), window)
        padding = index < 0
        inverse = torch.empty(math.prod(size), dtype=torch.int64)
        inverse[index[~padding]] = torch.arange(index.numel()).view_as(index)[~padding]
        region = torch.zeros(padded, dtype=torch.int64)  # which side of the seam a slot comes from, on every axis
        for axis, (length, moved) in enumerate(zip(padded, shift, strict=True)):
            over = torch.arange(length) >= length - moved
            region = region * 2 + over.view([-1 if a == axis else 1 for a in axes])
        regions = _split(region, window)
        mask = APART * (regions[:, :, None] != regions[:, None, :]).float()
        mask = torch.where(padding[:, None, :], ABSENT, mask)
        return Windows(
            size,
            window,
            shift,
            index.clamp(min=0).to(device),
            inverse.to(device),
            mask.to(device) if bool((mask != 0).any()) else None,
            padding.to(device) if bool(padding.any()) else None,
        )


def _split(values: Tensor, window: tuple[int, ...]) -> Tensor:
    """``[*padded]`` -> ``[W, K]``."""
    pairs = [part for s, w in zip(values.shape, window, strict=True) for part in (s // w, w)]
    order = [*range(0, len(pairs), 2), *range(1, len(pairs), 2)]
    return values.reshape(pairs).permute(order).reshape(-1, math.prod(window))


@functools.lru_cache(maxsize=64)
def window_index(window: tuple[int, ...], table: tuple[int, ...], device: str) -> Tensor:
    """int64 ``[K * K]``: rows of a relative-position table made for windows ``table``, for pairs in a ``window`` that
    is no larger on any axis."""
    with torch.inference_mode(False):
        index = relative_index(table)
        inside = torch.arange(math.prod(table)).view(table)[tuple(slice(w) for w in window)].reshape(-1)
        return index[inside][:, inside].reshape(-1).to(device)


def window_attention(qkv: Tensor, bias: Tensor | None, windows: Windows, *, scale: float) -> Tensor:
    """Attention inside each window: ``qkv [B, N, 3, heads, d]`` in map order -> ``[B, N, heads * d]`` in map order.

    bias: ``[heads, K, K]`` added to the scaled logits, in any floating type; the windows' mask is added once, with it.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return _traceable(qkv, bias, windows, scale)
    if qkv.device.type == "cpu":
        return _InBlocks.apply(qkv.contiguous(), bias, windows, scale)
    return _fused(qkv, bias, windows, scale)


def _fused(qkv: Tensor, bias: Tensor | None, windows: Windows, scale: float) -> Tensor:
    """One gather in, a fused kernel over all windows, one gather out: what an accelerator wants."""
    batch, _, _, heads, dim = qkv.shape
    packed = _TakeRows.apply(qkv.reshape(-1, dim), *rows(windows, batch, heads, 3), None, ())
    q, k, v = packed.view(3, batch, windows.count * heads, windows.slots, dim).unbind(0)
    merged = merge(bias, windows.mask, packed.dtype)
    if merged is not None:
        merged = merged.expand(windows.count, heads, -1, -1).reshape(1, -1, windows.slots, windows.slots)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=merged, scale=scale)
    index, inverse = rows(windows, batch, heads, 1)
    empty = None if windows.padding is None else windows.padding[:, None, :, None]
    shape = (batch, windows.count, heads, windows.slots, dim)
    return _TakeRows.apply(out.reshape(-1, dim), inverse, index, empty, shape).view(batch, -1, heads * dim)


def merge(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``[W or 1, heads or 1, K, K]``: bias and mask in one tensor."""
    parts = [
        p for p in (None if bias is None else bias[None], None if mask is None else mask[:, None]) if p is not None
    ]
    return sum(parts[1:], parts[0]).to(dtype) if parts else None


def _traceable(qkv: Tensor, bias: Tensor | None, windows: Windows, scale: float) -> Tensor:
    """The same numbers from plain operations, for any batch size: what exporters see."""
    batch, tokens, _, heads, dim = qkv.shape
    taken = qkv.reshape(batch, tokens, -1).index_select(1, windows.index.reshape(-1))
    packed = taken.view(batch, windows.count, windows.slots, 3, heads, dim).permute(3, 0, 1, 4, 2, 5)
    q, k, v = packed.unbind(0)
    logits = (q * scale) @ k.transpose(-2, -1)
    merged = merge(bias, windows.mask, logits.dtype)
    weights = (logits if merged is None else logits + merged).softmax(dim=-1)
    out = (weights.to(v.dtype) @ v).permute(0, 1, 3, 2, 4).reshape(batch, -1, heads * dim)
    return out.index_select(1, windows.inverse)


@functools.lru_cache(maxsize=64)
def rows(windows: Windows, batch: int, heads: int, parts: int) -> tuple[Tensor, Tensor]:
    """Row numbers both ways between ``[B, N, parts, heads]`` and ``[parts, B, W, heads, K]`` (int32 where they fit)."""
    with torch.inference_mode(False):
        index, inverse, slots = windows.index, windows.inverse, windows.slots
        kind = torch.int32 if batch * index.numel() * parts * heads < 2**31 else torch.int64
        b, p, h = (torch.arange(n, device=index.device) for n in (batch, parts, heads))
        token = b.view(1, -1, 1, 1, 1) * inverse.shape[0] + index[None, None, :, None, :]
        into = (token * parts + p.view(-1, 1, 1, 1, 1)) * heads + h.view(1, 1, 1, -1, 1)
        place = p.view(1, 1, -1, 1) * batch + b.view(-1, 1, 1, 1)
        window = place * windows.count + (inverse // slots).view(1, -1, 1, 1)
        back = (window * heads + h.view(1, 1, 1, -1)) * slots + (inverse % slots).view(1, -1, 1, 1)
        return into.reshape(-1).to(kind), back.reshape(-1).to(kind)


class _TakeRows(torch.autograd.Function):
    """``x[index]`` whose gradient is ``grad[inverse]``: rows move, none is added to another.

    empty: bool, broadcasts with the gradient's rows viewed as ``shape``; those rows are zero (``inverse`` has stand-ins
    for them).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, empty: Tensor | None, shape: tuple[int, ...]
    ) -> Tensor:
        ctx.inverse, ctx.empty, ctx.shape = inverse, empty, shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        moved = grad.index_select(0, ctx.inverse)
        if ctx.empty is not None:
            moved.view(ctx.shape).masked_fill_(ctx.empty, 0)
        return moved, None, None, None, None


BLOCK = 2**19  # logits in a block: 2 MB in float32, what a core's cache holds


class _InBlocks(torch.autograd.Function):
    """The whole way on a CPU, some samples at a time, so that queries, keys, values and logits stay in the cache.

    Fused kernels want longer sequences and give the bias no gradient.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, windows: Windows, scale: float) -> Tensor:
        batch, tokens, _, heads, dim = qkv.shape
        out = qkv.new_empty(batch, tokens, heads * dim)
        merged, shape = merge(bias, windows.mask, qkv.dtype), (windows.count, heads, windows.slots, windows.slots)
        weights = qkv.new_empty(batch if any(ctx.needs_input_grad) else 0, windows.count * heads, *shape[2:])
        for start, stop in _blocks(batch, heads, windows):
            q, k, v = _packed(qkv[start:stop], windows)
            kept = weights[start:stop].flatten(0, 1) if len(weights) else qkv.new_empty(len(q), *shape[2:])
            mixed = torch.bmm(_weights(q, k, merged, scale, shape, out=kept), v)
            _into_map(mixed, windows, out=out[start:stop].view(-1, dim), heads=heads)
        ctx.save_for_backward(qkv, weights)
        ctx.windows, ctx.scale, ctx.bias = windows, scale, None if bias is None else (bias.shape, bias.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (qkv, kept), windows, scale = ctx.saved_tensors, ctx.windows, ctx.scale
        batch, _, _, heads, dim = qkv.shape
        grad, moved = grad.contiguous(), torch.empty_like(qkv)
        total = None if ctx.bias is None else qkv.new_zeros(ctx.bias[0], dtype=ctx.bias[1])
        for start, stop in _blocks(batch, heads, windows):
            q, k, v = _packed(qkv[start:stop], windows)
            weights = kept[start:stop].flatten(0, 1)
            into, _ = rows(windows, stop - start, heads, 1)
            mixed = grad[start:stop].view(-1, dim).index_select(0, into).view(v.shape)
            if windows.padding is not None:
                spread = mixed.view(-1, windows.count, heads, windows.slots, dim)
                spread.masked_fill_(windows.padding[:, None, :, None], 0)
            packed = mixed.new_empty(3, *v.shape)
            dlogits = torch.bmm(mixed, v.transpose(1, 2))
            torch.bmm(weights.transpose(1, 2), mixed, out=packed[2])
            torch._softmax_backward_data(dlogits, weights, -1, weights.dtype, grad_input=dlogits)
            if total is not None:
                total += dlogits.view(-1, *total.shape).sum(dim=0)
            torch.baddbmm(packed[0], dlogits, k, beta=0, alpha=scale, out=packed[0])
            torch.baddbmm(packed[1], dlogits.transpose(1, 2), q, beta=0, alpha=scale, out=packed[1])
            _, back = rows(windows, stop - start, heads, 3)
            torch.index_select(packed.view(-1, dim), 0, back, out=moved[start:stop].view(-1, dim))
        return moved, total, None, None


def _blocks(batch: int, heads: int, windows: Windows) -> list[tuple[int, int]]:
    """(first, last + 1) sample of each block."""
    each = max(1, BLOCK // (windows.count * heads * windows.slots**2))
    return [(start, min(start + each, batch)) for start in range(0, batch, each)]


def _packed(qkv: Tensor, windows: Windows) -> tuple[Tensor, ...]:
    """``[b, N, 3, heads, d]`` -> queries, keys, values, each ``[b W heads, K, d]``."""
    batch, _, _, heads, dim = qkv.shape
    into, _ = rows(windows, batch, heads, 3)
    return qkv.view(-1, dim).index_select(0, into).view(3, -1, windows.slots, dim).unbind(0)


def _weights(
    q: Tensor, k: Tensor, merged: Tensor | None, scale: float, shape: tuple[int, ...], *, out: Tensor
) -> Tensor:
    """softmax(q kᵀ · scale + merged), ``[b W heads, K, K]``, in ``out``. shape: (W, heads, K, K)."""
    logits = torch.bmm(q, k.transpose(1, 2), out=out)
    if merged is None:
        logits.mul_(scale)
    else:
        spread = logits.view(-1, *shape)
        torch.add(merged, spread, alpha=scale, out=spread)
    weights = torch.softmax(logits, dim=-1, out=logits)
    # exp(-100) is subnormal in float32, and products with subnormal numbers are many times slower: those become zero
    return weights if merged is None else F.threshold_(weights, 1.2e-38, 0.0)


def _into_map(mixed: Tensor, windows: Windows, *, out: Tensor, heads: int) -> None:
    """``[b W heads, K, d]`` -> rows ``[b N heads, d]``."""
    batch = mixed.shape[0] // (windows.count * heads)
    _, back = rows(windows, batch, heads, 1)
    torch.index_select(mixed.view(-1, mixed.shape[-1]), 0, back, out=out)


# --- overlapping windows ----------------------------------------------------------------------------------------


def overlapping_attention(
    qkv: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    window: Sequence[int],
    larger: Sequence[int],
    *,
    scale: float,
) -> Tensor:
    """Queries of plain windows look at larger windows with the same centres (Chen et al. 2023, HAT, section 3.2, OCAB).

    qkv: ``[B, N, 3, heads, d]`` in map order (N = prod(size)) -> ``[B, N, heads * d]`` in map order. bias: ``[heads, K, M]``
    for K slots of a window and M of a larger one. Beyond the map keys and values are zero, and those zeros take part in
    the softmax. ``window`` divides ``size``, and ``larger - window`` is even, on every axis.
    """
    batch, heads, dim, axes = qkv.shape[0], qkv.shape[3], qkv.shape[4], len(size)
    inner = [part for s, w in zip(size, window, strict=True) for part in (s // w, w)]
    places, slots = range(1, 2 * axes + 1, 2), range(2, 2 * axes + 1, 2)
    query = qkv[:, :, 0].reshape(batch, *inner, heads, dim)
    query = query.permute(0, *places, 2 * axes + 1, *slots, 2 * axes + 2).reshape(-1, heads, math.prod(window), dim)
    pad = [p for w, m in zip(reversed(window), reversed(larger), strict=True) for p in ((m - w) // 2,) * 2]
    around = F.pad(qkv[:, :, 1:].reshape(batch, *size, -1), (0, 0, *pad))
    for axis, (w, m) in enumerate(zip(window, larger, strict=True)):  # views: nothing is copied yet
        around = around.unfold(1 + axis, m, w)
    around = around.unflatten(1 + axes, (2, heads, dim))  # [B, *places, 2, heads, d, *slots]
    around = around.permute(1 + axes, 0, *range(1, 1 + axes), 2 + axes, *range(4 + axes, 4 + 2 * axes), 3 + axes)
    key, value = around.reshape(2, -1, heads, math.prod(larger), dim).unbind(0)
    mixed = _of_larger(query, key, value, bias, scale)
    mixed = mixed.view(batch, *(s // w for s, w in zip(size, window, strict=True)), heads, *window, dim)
    back = [i for a in range(axes) for i in (1 + a, 2 + axes + a)]
    return mixed.permute(0, *back, 1 + axes, 2 + 2 * axes).reshape(batch, math.prod(size), heads * dim)


def _of_larger(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of windows ``[B W, heads, K, d]`` to larger ones ``[B W, heads, M, d]``. On a CPU plain products are faster than
    the fused kernel (measured at 256 x 576: 1.2 to 1.6 times), some windows at a time where nothing is kept for gradients."""
    if query.device.type != "cpu" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return attend(query, key, value, bias=None if bias is None else bias[None], scale=scale)
    needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias))
    each = len(query) if needs else max(1, BLOCK // math.prod((query.shape[1], query.shape[2], key.shape[2])))
    added = None if bias is None else bias.to(query.dtype)
    out = []
    for q, k, v in zip(query.split(each), key.split(each), value.split(each), strict=True):
        logits = (q * scale) @ k.transpose(-1, -2)
        logits = logits if added is None else logits.add_(added)
        out.append(logits.softmax(dim=-1) @ v)
    return out[0] if len(out) == 1 else torch.cat(out)


@functools.lru_cache(maxsize=64)
def overlapping_index(window: tuple[int, ...], larger: tuple[int, ...], device: str = "cpu") -> Tensor:
    """int64 ``[K, M]``: the row of a table ``[prod(w + m - 1), heads]`` for each query of a window and key of a larger one.

    The mixed-radix number of ``key - query + w - m + 1`` to the base ``w + m - 1``, where both are counted from 0 in their
    own windows. It starts below zero and is taken modulo the table's length, as the official code's negative indices are.
    """
    with torch.inference_mode(False):
        queries, keys = (
            torch.cartesian_prod(*(torch.arange(s) for s in sides)).reshape(-1, len(sides))
            for sides in (window, larger)
        )
        delta = keys[None] - queries[:, None]
        index = torch.zeros(delta.shape[:2], dtype=torch.int64)
        for axis, (w, m) in enumerate(zip(window, larger, strict=True)):
            index = index * (w + m - 1) + delta[..., axis] + w - m + 1
        return index.remainder(math.prod(w + m - 1 for w, m in zip(window, larger, strict=True))).to(device)
