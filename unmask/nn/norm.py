"""Norms of feature maps by name."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

NormName = Literal["bn", "gn"]


def norm_of_maps(name: str, channels: int, *, pooled: bool = False) -> nn.Module:
    """``bn``: batch norm. ``gn``: group norm with gcd(8, channels) groups, which works with one image a step.

    pooled: the maps are 1 x 1; group norm then has one group, since a group of one channel would be constant.
    """
    if name == "bn":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(1 if pooled else math.gcd(8, channels), channels)
