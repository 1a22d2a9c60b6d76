"""Losses of masked prediction."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Kind = Literal["l2", "l1", "smooth_l1"]


def standardise_patches(target: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch of ``target [B, N, P]`` to mean 0, variance 1, with the means and deviations ``[B, N, 1]`` used.

    The variance is unbiased (divided by P - 1); the deviation is sqrt(var + eps). MAE's ``norm_pix_loss``.
    """
    mean = target.mean(dim=-1, keepdim=True)
    deviation = (target.var(dim=-1, keepdim=True) + eps).sqrt()
    return (target - mean) / deviation, mean, deviation


def elementwise(predicted: Tensor, target: Tensor, kind: Kind = "l2") -> Tensor:
    """The loss of every value, float32, same shape."""
    predicted, target = predicted.float(), target.float()
    if kind == "l2":
        return (predicted - target).square()
    if kind == "l1":
        return (predicted - target).abs()
    return F.smooth_l1_loss(predicted, target, reduction="none")


def reconstruction_loss(
    predicted: Tensor, target: Tensor, *, standardise: bool = False, kind: Kind = "l2", weight: Tensor | None = None
) -> Tensor:
    """Mean loss over the tokens given, which are the hidden ones: ``[B, M, P]`` both.

    standardise: compare with the patch-wise standardised target. weight: ``[B, M]``, a weighted mean over tokens.
    """
    target = target.float()
    if standardise:
        target = standardise_patches(target)[0]
    each = elementwise(predicted, target, kind).mean(dim=-1)
    return each.mean() if weight is None else (each * weight).sum() / weight.sum()
