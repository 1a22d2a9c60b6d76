"""What changes of shape, slices and reductions do to a masked map, and the table of all rules by function name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.systems.explanation.layer_masking.masked_map import (
    BCHW,
    LAZY,
    MaskedMap,
    as_it_is,
    clean,
    like,
    no_rule,
    plain,
    wrap,
)
from unmask.systems.explanation.layer_masking.visible import MEAN_EPS

Dims = set[int]


def dims_of(x: MaskedMap, dim: Any) -> Dims:
    if dim is None or (isinstance(dim, (tuple, list)) and not len(dim)):
        return set(range(x.ndim))
    return {int(d) % x.ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,))}


def kinds(x: MaskedMap, dims: Dims) -> str:
    """ "places", "channels" or "" for what is neither."""
    letters = {x.axes[d] for d in dims}
    every = {a for a in x.axes if a in "hwn"}
    return "places" if letters == every else "channels" if letters == {"c"} else ""


def mean(func: Any, x: MaskedMap, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Over all places: of the visible ones, a plain tensor. Over channels: a map."""
    dims = dims_of(x, dim)
    if kinds(x, dims) == "places":
        total = clean(x).mean(tuple(dims), keepdim=keepdim)
        if x.visible.full or x.rules.variant == "older" or x.rules.global_pool == "plain":
            return total
        share = x.visible.along(x.axes).mean(tuple(dims), keepdim=keepdim)
        return total / (share + MEAN_EPS)
    return _over_channels(x, dims, plain(x).mean(tuple(dims), keepdim=keepdim), keepdim)


def total(func: Any, x: MaskedMap, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    dims = dims_of(x, dim)
    if kinds(x, dims) == "places":
        return clean(x).sum(tuple(dims), keepdim=keepdim)
    return _over_channels(x, dims, plain(x).sum(tuple(dims), keepdim=keepdim), keepdim)


def highest(func: Any, x: MaskedMap, dim: Any = None, keepdim: bool = False) -> Any:
    """The maximum of the visible places (0 where none is)."""
    dims = dims_of(x, dim)
    if kinds(x, dims) == "places":
        seen = x.visible.along(x.axes)
        lowest = plain(x).masked_fill(seen == 0, torch.finfo(x.dtype).min)
        some = seen.amax(tuple(dims), keepdim=keepdim) > 0
        return torch.where(some, lowest.amax(tuple(dims), keepdim=keepdim), 0)
    return _over_channels(x, dims, plain(x).amax(tuple(dims), keepdim=keepdim), keepdim)


def max_of(func: Any, x: MaskedMap, dim: Any = None, keepdim: bool = False) -> Any:
    """``max`` over channels (values and indices); other uses have no rule."""
    if dim is None or kinds(x, dims_of(x, dim)) != "channels":
        raise no_rule("max")
    values, indices = plain(x).max(dim, keepdim=keepdim)
    return _over_channels(x, dims_of(x, dim), values, keepdim), indices


def norm(func: Any, x: MaskedMap, *args: Any, **kwargs: Any) -> Any:
    """Over all places: of the visible ones."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None or kinds(x, dims_of(x, dim)) != "places":
        raise no_rule("norm")
    return func(clean(x), *args, **kwargs)


def _over_channels(x: MaskedMap, dims: Dims, data: Tensor, keepdim: bool) -> MaskedMap:
    if kinds(x, dims) != "channels":
        raise no_rule("mean", "over some of the places, or over places and channels together")
    axes = x.axes if keepdim else tuple(a for i, a in enumerate(x.axes) if i not in dims)
    return wrap(data, x.visible, LAZY if x.state == LAZY else x.state, x.rules, axes)


# --- layouts ---


def permute(func: Any, x: MaskedMap, *dims: Any) -> MaskedMap:
    order = [int(d) % x.ndim for d in (dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)]
    return wrap(plain(x).permute(order), x.visible, x.state, x.rules, tuple(x.axes[d] for d in order))


def transpose(func: Any, x: MaskedMap, a: int, b: int) -> MaskedMap:
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return permute(func, x, order)


def flatten(func: Any, x: MaskedMap, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Places in one axis; with channels in it: a plain tensor, as a linear layer reads it."""
    start, end = start_dim % x.ndim, end_dim % x.ndim
    gone = x.axes[start : end + 1]
    if gone == ("h", "w"):
        axes = (*x.axes[:start], "n", *x.axes[end + 1 :])
        return wrap(plain(x).flatten(start, end), x.visible, x.state, x.rules, axes)
    if len(gone) == 1:
        return x
    if "b" in gone or set(gone) != set(x.axes) - {"b"}:
        raise no_rule("flatten")
    return as_it_is(x).flatten(start, end)


def reshape(func: Any, x: MaskedMap, *shape: Any) -> Any:
    """Channels regrouped, or everything behind the batch in one axis."""
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    wanted = plain(x).reshape(shape)
    if tuple(wanted.shape) == tuple(x.shape):
        return x
    if wanted.ndim == 2 and wanted.shape[0] == x.shape[0]:
        return as_it_is(x).reshape(shape)
    if x.axes[-2:] == ("h", "w") and wanted.shape[0] == x.shape[0] and wanted.shape[-2:] == x.shape[-2:]:
        return wrap(wanted, x.visible, x.state, x.rules, ("b", *["c"] * (wanted.ndim - 3), "h", "w"))
    if x.axes == BCHW and wanted.ndim == 3 and wanted.shape[:2] == x.shape[:2]:
        return flatten(func, x, 2, 3)
    raise no_rule("reshape")


def kept(func: Any, x: MaskedMap, *args: Any, **kwargs: Any) -> MaskedMap:
    """The same map: copies, dtypes, devices."""
    return like(x, func(plain(x), *args, **kwargs))


def parts(func: Any, x: MaskedMap, *args: Any, **kwargs: Any) -> list[MaskedMap]:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if x.axes[dim % x.ndim] != "c":
        raise no_rule(func.__name__)
    return [like(x, p) for p in func(plain(x), *args, **kwargs)]


def unbind(func: Any, x: MaskedMap, dim: int = 0) -> list[MaskedMap]:
    if x.axes[dim % x.ndim] != "c" or x.axes.count("c") < 2:
        raise no_rule("unbind")
    axes = tuple(a for i, a in enumerate(x.axes) if i != dim % x.ndim)
    return [wrap(p, x.visible, x.state, x.rules, axes) for p in plain(x).unbind(dim)]


def item(func: Any, x: MaskedMap, index: Any) -> MaskedMap:
    """Slices of channels and of places."""
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (x.ndim - len(index) + 1), *index[at + 1 :])
    if not all(isinstance(i, slice) for i in index):
        raise no_rule("indexing")
    index = (*index, *[slice(None)] * (x.ndim - len(index)))
    data, visible = plain(x)[index], x.visible
    whole = [data.shape[i] == x.shape[i] for i in range(x.ndim)]
    if not whole[0] and visible.map.shape[0] > 1:
        raise no_rule("indexing", "of images")
    if not all(w for w, a in zip(whole, x.axes, strict=True) if a in "hwn"):
        if x.axes != BCHW:
            raise no_rule("indexing", "of tokens")
        visible = visible.changed(("item", str(index[2:])), lambda m: m[:, :, index[2], index[3]])
    return wrap(data, visible, x.state, x.rules, x.axes)


def expand_as(func: Any, x: Any, other: Tensor) -> Any:
    """A gate spread over a map is a plain tensor still."""
    if isinstance(x, MaskedMap):
        if tuple(x.shape) == tuple(other.shape):
            return x
        raise no_rule("expand_as")
    return x.expand(other.shape)
