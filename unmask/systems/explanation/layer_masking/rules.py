"""What each function of a network does to a masked map: its values and its mask (sections 3 and 4 of the paper).

A rule gets the function itself and its arguments in torch's order. Products with the mask are put off until something reads
hidden places, so a convolution, a norm and an activation cost one product together: f(x m) m = f(x) m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.errors import UserError
from unmask.systems.explanation.layer_masking.masked_map import (
    BCHW,
    CLEAN,
    LAZY,
    RAW,
    MaskedMap,
    as_it_is,
    clean,
    like,
    no_rule,
    plain,
    wrap,
)
from unmask.systems.explanation.layer_masking.visible import MEAN_EPS, Sides, filled

Rule = Callable[..., Any]
READ = frozenset(
    [
        "size",
        "dim",
        "numel",
        "nelement",
        "stride",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "len",
        "element_size",
        "get_device",
        "type",
        "data_ptr",
        "repr",
        "format",
        "hash",
        "is_same_size",
        "storage_offset",
        "ndimension",
        "backward",
        "bool",
    ]
)
TAKE_BORDERS = frozenset({"conv2d", "max_pool2d", "avg_pool2d"})


def two(value: Any) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


# --- convolutions and pools ---------------------------------------------------------------------------------------


def sides_of(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> Sides:
    """left, right, top, bottom of torch's ``padding``."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        high, wide = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return (wide // 2, wide - wide // 2, high // 2, high - high // 2)
    top, left = two(padding)
    return (left, left, top, top)


def conv2d(
    func: Rule,
    x: MaskedMap,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> MaskedMap:
    if not isinstance(x, MaskedMap) or isinstance(weight, MaskedMap) or x.axes != BCHW:
        raise no_rule("conv2d")
    kernel, stride, dilation = (int(weight.shape[2]), int(weight.shape[3])), two(stride), two(dilation)
    sides = sides_of(padding, kernel, dilation)
    if x.border is not None:
        if x.border[1] != 0:
            raise no_rule("conv2d", "behind padding that is not zero")
        sides = tuple(a + b for a, b in zip(sides, x.border[0], strict=True))  # type: ignore[assignment]
    visible, mode = x.visible, x.rules.padding
    after = visible.windowed(kernel, stride, sides, dilation)
    data = plain(x) if visible.full else clean(x)
    if not visible.full and mode == "neighbour":
        data = filled(data, visible, rounds_of(kernel, dilation, x.rules.variant))
    if sides[0] == sides[1] and sides[2] == sides[3]:
        around: Any = (sides[2], sides[0])
    else:
        data, around = F.pad(data, sides), 0
    partial = mode == "partial" and not visible.full
    out = F.conv2d(data, weight, None if partial else bias, stride, around, dilation, groups)
    if partial:
        out = out / visible.share(kernel, stride, sides, dilation)
        out = out if bias is None else out + bias[:, None, None]
    return wrap(out, after, RAW if x.rules.variant == "older" else LAZY, x.rules)


def rounds_of(kernel: tuple[int, int], dilation: tuple[int, int], variant: str) -> int:
    """Rounds of filling that can matter. The authors take the kernel's width; an output that survives has a visible pixel in its
    window, so none of the window is farther away than the window's extent - 1. In the older variant other outputs survive, too."""
    high, wide = (d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    return wide if variant == "older" else min(wide, max(high, wide) - 1)


def max_pool2d(
    func: Rule,
    x: MaskedMap,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaskedMap:
    if x.axes != BCHW or return_indices:
        raise no_rule("max_pool2d")
    stride = kernel_size if stride is None or stride == [] else stride
    border = x.border[0] if x.border is not None else None
    value = x.border[1] if x.border is not None else 0.0

    def pool(map: Tensor) -> Tensor:
        return F.max_pool2d(map, kernel_size, stride, padding, dilation, ceil_mode)

    older = x.rules.variant == "older"
    data = clean(x) if older else as_it_is(x)
    if x.rules.strict_pool and not x.visible.full:
        data = plain(x).masked_fill(x.visible.map == 0, torch.finfo(x.dtype).min)
    if border is not None:
        data = F.pad(data, border, value=value)
    after = x.visible.pooled(
        ("max", str((kernel_size, stride, padding, dilation, ceil_mode, border))),
        lambda m: pool(m if border is None else F.pad(m, border)),
    )
    return wrap(pool(data), after, RAW if older and not x.rules.strict_pool else LAZY, x.rules)


def avg_pool2d(
    func: Rule,
    x: MaskedMap,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> MaskedMap:
    if x.axes != BCHW:
        raise no_rule("avg_pool2d")
    stride = kernel_size if stride is None or stride == [] else stride
    border = x.border[0] if x.border is not None else None
    value = x.border[1] if x.border is not None else 0.0

    def pool(map: Tensor) -> Tensor:
        return F.avg_pool2d(map, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    data = as_it_is(x)
    if border is not None:
        data = F.pad(data, border, value=value)
    key = ("avg", str((kernel_size, stride, padding, ceil_mode, border)))
    after = x.visible.pooled(key, lambda m: pool(m if border is None else F.pad(m, border)))
    return wrap(pool(data), after, LAZY, x.rules)


def adaptive_avg_pool2d(func: Rule, x: MaskedMap, output_size: Any) -> Tensor:
    """The mean of what is visible: a plain tensor, without a mask."""
    if x.axes != BCHW:
        raise no_rule("adaptive_avg_pool2d")
    total = F.adaptive_avg_pool2d(clean(x), output_size)
    if x.visible.full or x.rules.variant == "older" or x.rules.global_pool == "plain":
        return total
    return total / (F.adaptive_avg_pool2d(x.visible.map, output_size) + MEAN_EPS)


def adaptive_max_pool2d(func: Rule, x: MaskedMap, output_size: Any, return_indices: bool = False) -> Tensor:
    if x.axes != BCHW or return_indices:
        raise no_rule("adaptive_max_pool2d")
    if x.visible.full:
        return F.adaptive_max_pool2d(plain(x), output_size)
    seen = F.adaptive_max_pool2d(x.visible.map, output_size)
    lowest = plain(x).masked_fill(x.visible.map == 0, torch.finfo(x.dtype).min)
    return torch.where(seen > 0, F.adaptive_max_pool2d(lowest, output_size), 0)


def pad(func: Rule, x: MaskedMap, pad: Any, mode: str = "constant", value: float | None = None) -> MaskedMap:
    pad = [int(p) for p in pad]
    if x.axes != BCHW or len(pad) > 6:
        raise no_rule("pad")
    if mode != "constant":
        key = ("pad", mode, tuple(pad))
        visible = x.visible.changed(key, lambda m: F.pad(m, pad, mode=mode))
        return wrap(F.pad(as_it_is(x), pad, mode=mode), visible, RAW if x.state == RAW else CLEAN, x.rules)
    if len(pad) > 4 and any(pad[4:]):  # channels of a shortcut
        x = like(x, F.pad(plain(x), [0, 0, 0, 0, *pad[4:]], value=value or 0.0), x.state if not value else RAW)
    if not any(pad[:4]):
        return x
    sides: Any = tuple(([*pad, 0, 0])[:4])
    return wrap(plain(x), x.visible, x.state, x.rules, x.axes, (sides, float(value or 0.0)))


def interpolate(
    func: Rule,
    x: MaskedMap,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    *args: Any,
    **kwargs: Any,
) -> MaskedMap:
    """Every new place takes the value and the mask of the nearest one; smooth ways would mix hidden with visible."""
    if x.axes != BCHW or mode not in ("nearest", "nearest-exact"):
        raise no_rule("interpolate", f"mode {mode} mixes hidden and visible places")
    visible = x.visible.changed(
        ("interpolate", str((size, scale_factor, mode))), lambda m: F.interpolate(m, size, scale_factor, mode)
    )
    return wrap(F.interpolate(plain(x), size, scale_factor, mode), visible, x.state, x.rules)


# --- norms, activations, linear layers ------------------------------------------------------------------------------


def zero_keeping(func: Rule, x: Any, *args: Any, **kwargs: Any) -> Any:
    """f(0) = 0: what is zero stays so."""
    if not isinstance(x, MaskedMap):
        raise no_rule(func.__name__)
    out = func(plain(x), *args, **_not_in_place(kwargs))
    return like(x, out, LAZY if x.state == RAW and x.rules.variant == "main" else x.state)


def shifting(func: Rule, x: Any, *args: Any, **kwargs: Any) -> MaskedMap:
    """f(0) is not 0: hidden places become zero again."""
    if not isinstance(x, MaskedMap):
        raise no_rule(func.__name__)
    older = x.rules.variant == "older"
    out = func(as_it_is(x) if older else plain(x), *args, **_not_in_place(kwargs))
    return like(x, out, RAW if older else LAZY)


def unmasked(func: Rule, x: MaskedMap, *args: Any, **kwargs: Any) -> MaskedMap:
    """f(x) with f(0) = 0, and no product with the mask."""
    return like(x, func(plain(x), *args, **_not_in_place(kwargs)))


def dropout(func: Rule, x: MaskedMap, p: float = 0.5, training: bool = True, inplace: bool = False) -> MaskedMap:
    if training and p:
        raise _training()
    return x


def batch_norm(
    func: Rule,
    x: MaskedMap,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *rest: Any,
) -> MaskedMap:
    if training or running_mean is None:
        raise _training()
    if x.axes != BCHW:
        raise no_rule("batch_norm")
    return like(x, F.batch_norm(plain(x), running_mean, running_var, weight, bias, False, momentum, eps), LAZY)


def over_channels(func: Rule, x: MaskedMap, shape: Any, *args: Any, **kwargs: Any) -> MaskedMap:
    """Layer norm of each place by itself."""
    if len(tuple(shape)) != 1 or x.axes[-1] != "c":
        raise no_rule(func.__name__, "its statistics would include hidden zeros")
    return like(x, func(plain(x), shape, *args, **kwargs), LAZY)


def linear(func: Rule, x: MaskedMap, weight: Tensor, bias: Tensor | None = None) -> MaskedMap:
    """A 1 x 1 convolution, where channels are the last axis."""
    if x.axes[-1] != "c":
        raise no_rule("linear")
    return like(x, F.linear(clean(x) if x.state == RAW else plain(x), weight, bias), LAZY)


def _not_in_place(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The caller's tensor is never changed."""
    return {k: v for k, v in kwargs.items() if k != "inplace"} if "inplace" in kwargs else kwargs


def _training() -> UserError:
    return UserError("layer masking is for inference, and the model is in training mode: call model.eval() first")


# --- all of them ----------------------------------------------------------------------------------------------------


def _table() -> dict[str, Rule]:
    from unmask.systems.explanation.layer_masking import joining, shapes

    table: dict[str, Rule] = {
        "conv2d": conv2d,
        "max_pool2d": max_pool2d,
        "avg_pool2d": avg_pool2d,
        "adaptive_avg_pool2d": adaptive_avg_pool2d,
        "adaptive_max_pool2d": adaptive_max_pool2d,
        "pad": pad,
        "batch_norm": batch_norm,
        "layer_norm": over_channels,
        "rms_norm": over_channels,
        "linear": linear,
        "addcmul": joining.addcmul,
        "cat": joining.cat,
        "concat": joining.cat,
        "concatenate": joining.cat,
        "stack": joining.stack,
        "interpolate": interpolate,
        "mean": shapes.mean,
        "sum": shapes.total,
        "amax": shapes.highest,
        "max": shapes.max_of,
        "norm": shapes.norm,
        "vector_norm": shapes.norm,
        "linalg_vector_norm": shapes.norm,
        "permute": shapes.permute,
        "transpose": shapes.transpose,
        "flatten": shapes.flatten,
        "view": shapes.reshape,
        "reshape": shapes.reshape,
        "unbind": shapes.unbind,
        "getitem": shapes.item,
        "expand_as": shapes.expand_as,
    }
    kinds: list[tuple[Rule, str]] = [
        (
            zero_keeping,
            "relu relu6 leaky_relu prelu hardswish silu mish elu selu celu tanh hardtanh softsign hardshrink",
        ),
        (shifting, "sigmoid hardsigmoid softplus logsigmoid exp clamp clip pow square"),
        (unmasked, "gelu"),
        (dropout, "dropout dropout2d feature_dropout alpha_dropout dropout1d dropout3d"),
        (joining.combined, "add sub radd rsub iadd isub subtract"),
        (joining.scaled, "mul rmul imul multiply"),
        (joining.divided, "div truediv itruediv divide true_divide"),
        (shapes.kept, "contiguous to float double half bfloat16 clone detach cpu cuda type_as requires_grad neg"),
        (shapes.parts, "chunk split split_with_sizes tensor_split"),
    ]
    for rule, names in kinds:
        table |= dict.fromkeys(names.split(), rule)
    return table


RULES: dict[str, Rule] = _table()
