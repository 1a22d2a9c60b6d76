"""Losses of masked prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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


def next_token_loss(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of all tokens that have one before them in the same text, and their number; float32.

    logits: ``[B, T, V]``, position t for token t + 1. batch: ``tokens`` and ``attention_mask [B, T]``, ``segments`` where rows are
    packed.
    """
    tokens, mask = batch["tokens"], batch["attention_mask"]
    known = (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
    segments = batch.get("segments")
    if segments is not None:
        known = known & (segments[:, 1:] == segments[:, :-1])
    target = tokens[:, 1:].masked_fill(~known, -100)
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), ignore_index=-100, reduction="sum")
    return total, known.sum().clamp(min=1)
