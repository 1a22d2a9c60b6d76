"""``MaskedMap``: a tensor that carries its mask through the layers of any convolutional network.

It is a ``torch.Tensor`` whose functions are answered by the rules of :mod:`.rules`; the network's own forward runs unchanged, so
no copy of any model is needed. What has no rule is refused by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.systems.explanation.layer_masking.visible import Sides, Visible

Padding = Literal["neighbour", "none", "partial"]
Variant = Literal["main", "older"]
BCHW = ("b", "c", "h", "w")
# What stands at hidden places: zeros; something that counts as zeros (multiplied later, once); or values that count as they are.
CLEAN, LAZY, RAW = "clean", "lazy", "raw"


@dataclass(frozen=True)
class Rules:
    """How masks go through layers.

    padding: what a convolution finds at hidden places: the mean of visible neighbours (the method), zeros, or partial
    convolution. variant: "older" is what AlexNet and SqueezeNet have in the authors' code: convolutions keep what stands outside
    the mask, activations are not masked, branches join by union. strict_pool: hidden places take no part in a maximum.
    global_pool: the mean of the visible places, or ("plain") of all.
    """

    padding: Padding = "neighbour"
    variant: Variant = "main"
    strict_pool: bool = False
    global_pool: Literal["visible", "plain"] = "visible"


class MaskedMap(Tensor):
    """axes: one letter a dimension: b, c (any number of them), h, w, or n for h and w in one. border: zeros around it that the next
    convolution or pool takes as its own padding, and their value."""

    visible: Visible
    state: str
    axes: tuple[str, ...]
    rules: Rules
    border: tuple[Sides, float] | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from unmask.systems.explanation.layer_masking import rules

        name = getattr(func, "__name__", str(func))
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__get__", "__set__"):
                if getattr(func.__self__, "__name__", "") not in ("data", "T", "mT", "H", "mH"):
                    return func(*args, **(kwargs or {}))
                raise no_rule(f"Tensor.{func.__self__.__name__}")
            in_place = name.startswith("__i") or (name.endswith("_") and not name.startswith("_"))
            name = name.strip("_")
            if name in rules.READ:
                return func(*args, **(kwargs or {}))
            rule = rules.RULES.get(name)
            if rule is None:
                raise no_rule(name)
            if name not in rules.TAKE_BORDERS:
                args = tuple(_settled(a) for a in args)
            out = rule(func, *args, **(kwargs or {}))
            if in_place and isinstance(args[0], MaskedMap) and isinstance(out, MaskedMap):
                # the values of the tensor itself were changed: its mask and what stands outside it follow
                args[0].visible, args[0].state, args[0].axes = out.visible, out.state, out.axes
            return out


def wrap(
    data: Tensor,
    visible: Visible,
    state: str,
    rules: Rules,
    axes: tuple[str, ...] = BCHW,
    border: tuple[Sides, float] | None = None,
) -> MaskedMap:
    """``data`` with its mask."""
    out = data.as_subclass(MaskedMap)
    out.visible, out.axes, out.rules, out.border = visible, axes, rules, border
    out.state = CLEAN if visible.full else state
    return out


def like(x: MaskedMap, data: Tensor, state: str | None = None) -> MaskedMap:
    """``data`` with the mask of ``x``."""
    return wrap(data, x.visible, state or x.state, x.rules, x.axes)


def plain(x: Tensor) -> Tensor:
    """The values alone, whatever stands at hidden places."""
    return x.as_subclass(Tensor)


def clean(x: MaskedMap) -> Tensor:
    """Zero at hidden places."""
    return plain(x) if x.state == CLEAN else plain(x) * x.visible.along(x.axes)


def as_it_is(x: MaskedMap) -> Tensor:
    """The values that count."""
    return clean(x) if x.state == LAZY else plain(x)


def _settled(x: Any) -> Any:
    if isinstance(x, (list, tuple)) and any(isinstance(i, MaskedMap) for i in x):
        return type(x)(_settled(i) for i in x)
    if not isinstance(x, MaskedMap) or x.border is None:
        return x
    sides, value = x.border
    data = F.pad(as_it_is(x), sides, value=value)
    visible = x.visible.changed(("pad", sides), lambda m: F.pad(m, sides))
    return wrap(data, visible, CLEAN if value == 0 and x.state != RAW else RAW, x.rules, x.axes)


def no_rule(name: str, reason: str = "") -> UserError:
    """The refusal, naming the module whose forward called: the nearest ``self`` that is a module."""
    module = None
    frame = sys._getframe(1)
    while frame is not None and module is None:
        held = frame.f_locals.get("self")
        module = held if isinstance(held, nn.Module) else None
        frame = frame.f_back  # type: ignore[assignment]
    where = f"{type(module).__name__} ({name})" if module is not None and type(module).__name__ != name else name
    if name in ("scaled_dot_product_attention", "softmax", "bmm", "baddbmm", "multi_head_attention_forward", "einsum"):
        reason = "attention mixes all places: a transformer hides tokens (token_dropping)"
    elif name in ("group_norm", "instance_norm"):
        reason = "its statistics would include hidden zeros"
    known = "convolution, linear, batch and layer norm, activations, pools, sums, products, concatenation, squeeze-and-excitation"
    return UserError(
        f"layer masking has no rule for {where}{': ' + reason if reason else ''}; it knows {known}; "
        "grey, black, blur work with any model"
    )
