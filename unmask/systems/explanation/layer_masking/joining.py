"""Where branches of a network meet: sums, products, concatenation, and what becomes of their masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unmask.systems.explanation.layer_masking.masked_map import (
    CLEAN,
    LAZY,
    RAW,
    MaskedMap,
    as_it_is,
    like,
    no_rule,
    plain,
    wrap,
)
from unmask.systems.explanation.layer_masking.visible import Visible, majority, union

Rule = Callable[..., Any]


def combined(func: Rule, a: Any, b: Any, *args: Any, **kwargs: Any) -> MaskedMap:
    """Sums and differences of branches: the intersection of both masks; with a plain tensor or a number: hidden again."""
    x = a if isinstance(a, MaskedMap) else b
    if isinstance(a, MaskedMap) and isinstance(b, MaskedMap):
        visible = _joint(a, b)
        return wrap(func(plain(a), plain(b), *args, **kwargs), visible, LAZY, x.rules, x.axes)
    _fits(x, b if x is a else a)
    out = func(_values(a), _values(b), *args, **kwargs)
    return like(x, out, LAZY)


def scaled(func: Rule, a: Any, b: Any, *args: Any, **kwargs: Any) -> MaskedMap:
    """Products: with a plain tensor (squeeze-and-excitation, layer scale) the mask stays; of two maps it is the intersection."""
    x = a if isinstance(a, MaskedMap) else b
    if isinstance(a, MaskedMap) and isinstance(b, MaskedMap):
        return wrap(func(plain(a), plain(b), *args, **kwargs), _joint(a, b), LAZY, x.rules, x.axes)
    _fits(x, b if x is a else a)
    return like(x, func(_values(a), _values(b), *args, **kwargs))


def divided(func: Rule, a: Any, b: Any, *args: Any, **kwargs: Any) -> MaskedMap:
    if isinstance(b, MaskedMap):
        raise no_rule("div", "by a masked map")
    return scaled(func, a, b, *args, **kwargs)


def addcmul(func: Rule, a: Any, b: Any, c: Any, *, value: float = 1.0) -> MaskedMap:
    return combined(torch.add, a, scaled(torch.mul, scaled(torch.mul, b, c), value))


def _values(x: Any) -> Any:
    return plain(x) if isinstance(x, MaskedMap) else x


def _joint(a: MaskedMap, b: MaskedMap) -> Visible:
    spatial = [(i, n) for i, n in enumerate(a.axes) if n in "hwn"]
    if a.axes != b.axes or any(a.shape[i] != b.shape[i] for i, _ in spatial):
        raise no_rule("sum", "of maps of other shapes")
    return a.visible.both(b.visible)


def _fits(x: MaskedMap, other: Any) -> None:
    if isinstance(other, Tensor) and other.ndim > x.ndim:
        raise no_rule("sum", "with a tensor of more dimensions")


def cat(func: Rule, tensors: Any, dim: int = 0, **kwargs: Any) -> MaskedMap:
    """Concatenated channels: visible in more than half of the maps (older: in any). A map keeps what stands outside its own
    mask."""
    first = next(t for t in tensors if isinstance(t, MaskedMap))
    dim = kwargs.get("axis", dim) % first.ndim
    if first.axes[dim] != "c":
        raise no_rule("cat", "of tokens or images: a transformer drops hidden tokens (token_dropping)")
    if any(isinstance(t, MaskedMap) and t.axes != first.axes for t in tensors):
        raise no_rule("cat", "of maps of other layouts")
    data = [as_it_is(t) if isinstance(t, MaskedMap) else t for t in tensors]
    masks = [t.visible for t in tensors if isinstance(t, MaskedMap)]
    visible = union(masks) if first.rules.variant == "older" else majority(masks)
    same = all(m is visible for m in masks) and all(not isinstance(t, MaskedMap) or t.state != RAW for t in tensors)
    return wrap(torch.cat(data, dim), visible, CLEAN if same else RAW, first.rules, first.axes)


def stack(func: Rule, tensors: Any, dim: int = 0) -> MaskedMap:
    """A new axis of channels."""
    first = next(t for t in tensors if isinstance(t, MaskedMap))
    dim = dim % (first.ndim + 1)
    if dim == 0 or not all(isinstance(t, MaskedMap) and t.axes == first.axes for t in tensors):
        raise no_rule("stack")
    masks = [t.visible for t in tensors]
    visible = union(masks) if first.rules.variant == "older" else majority(masks)
    axes = (*first.axes[:dim], "c", *first.axes[dim:])
    return wrap(torch.stack([as_it_is(t) for t in tensors], dim), visible, RAW, first.rules, axes)
