"""Classifier-free guidance (Ho, Salimans 2022): both passes in one forward, and weights that change with time.

both = network(doubled(x), doubled(time), torch.cat((classes, empty)))      # [cond, empty]
output = combined(both, weight, channels=3)                                 # [B, C, ...]
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from unmask.errors import UserError, nearest

GuidanceSchedule = Literal["constant", "linear", "cosine"]


def doubled(x: Tensor) -> Tensor:
    """``[2B, ...]``: the batch twice, for the conditional and the empty pass."""
    return torch.cat((x, x), dim=0)


def with_empty(classes: Tensor, empty: int) -> Tensor:
    """int64 ``[2B]``: the classes, then the empty class as often."""
    return torch.cat((classes, torch.full_like(classes, empty)))


def combined(both: Tensor, weight: float | Tensor, *, channels: int | None = None, axis: int = 1) -> Tensor:
    """``empty + weight · (conditional - empty)`` of a forward whose batch is [conditional, empty]: ``[B, ...]``.

    channels: only so many first entries along ``axis`` are guided, the others stay the conditional pass's own (official
    codes of DiT guide three of four latent channels); None: all. weight: a number, or ``[B]``.
    """
    conditional, empty = both.chunk(2)
    if isinstance(weight, Tensor) and weight.ndim:
        weight = weight.reshape(-1, *[1] * (both.ndim - 1)).to(both.dtype)
    if channels is None or channels >= both.shape[axis]:
        return empty + weight * (conditional - empty)
    first, rest = conditional.split((channels, both.shape[axis] - channels), dim=axis)
    without = empty.narrow(axis, 0, channels)
    return torch.cat((without + weight * (first - without), rest), dim=axis)


def power_cosine(weight: float, time: Tensor | float, power: float) -> Tensor | float:
    """``1 + (w - 1)(1 - cos((1 - t)^power · π)) / 2``: full weight at the noise (t = 0), none at the data (t = 1)."""
    if isinstance(time, Tensor):
        return 1 + (weight - 1) * (1 - torch.cos((1 - time) ** power * math.pi)) / 2
    return 1 + (weight - 1) * (1 - math.cos((1 - time) ** power * math.pi)) / 2


def scheduled(schedule: str, weight: float, fraction: float) -> float:
    """The weight when ``fraction`` of the sampling is done: constant, linear (weight · fraction) or cosine (from none to full).

    Raises ``UserError`` for a name nobody knows.
    """
    known = {
        "constant": weight,
        "linear": weight * fraction,
        "cosine": weight * (1 - math.cos(fraction * math.pi)) / 2,
    }
    if schedule not in known:
        raise UserError(f"no guidance schedule {schedule!r}: {nearest(schedule, known)}")
    return known[schedule]


def check_guidance(weight: float | None, *, classes: int, default: float) -> float:
    """The weight to use. Raises ``UserError`` for a weight that is no number, or one asked of a model without classes."""
    if weight is None:
        return default if classes else 1.0
    if not math.isfinite(weight) or weight < 0:
        raise UserError(f"guidance={weight} does not fit: it takes a number from 0 (1: none)")
    if not classes and weight not in (0, 1):
        raise UserError(f"guidance={weight:g} needs classes, and this model has learned none: leave --guidance out")
    return float(weight)
