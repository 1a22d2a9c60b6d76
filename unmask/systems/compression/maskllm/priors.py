"""One-shot masks of a linear layer: magnitude, Wanda (arXiv:2306.11695), SparseGPT (arXiv:2301.00774)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.systems.compression.maskllm.patterns import smallest_removed

BLOCK = 128  # columns that SparseGPT works on together


class Statistics:
    """What the inputs of a layer were: ``hessian [in, in]`` = 2 / n * sum x xᵀ and ``norms [in]`` = the mean over samples of the
    squared norm over a sample's tokens. ``add`` takes batches ``[B, ..., in]``; n counts samples (first axis)."""

    def __init__(self, in_features: int, *, hessian: bool = True, device: torch.device | str = "cpu"):
        self.count = 0
        self.hessian = torch.zeros(in_features, in_features, device=device) if hessian else None
        self.norms = torch.zeros(in_features, device=device)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """mask: ``[B, ...]``, 0 where a token is padding, which does not count."""
        new = len(x)
        flat = x.detach().float()
        flat = flat.reshape(-1, x.shape[-1]) if mask is None else flat[mask.bool()]
        total = self.count + new
        self.norms.mul_(self.count / total).add_(flat.square().sum(0) / total)
        if self.hessian is not None:
            self.hessian.mul_(self.count / total).addmm_(flat.T, flat, alpha=2 / total)
        self.count = total


@dataclass(frozen=True)
class Pruned:
    """mask ``[out, in]`` of zeros and ones; weight ``[out, in]``: what remains, compensated where asked for; loss: the sum of
    (w - q)^2 / d^2 / 2 over removed weights."""

    mask: Tensor
    weight: Tensor
    loss: float = 0.0


# --- scores ---


def magnitude(weight: Tensor, keep: int, group: int) -> Tensor:
    """Keep the largest."""
    return smallest_removed(weight.abs(), keep, group)


def magnitude_unstructured(weight: Tensor, sparsity: float) -> Tensor:
    """Remove all weights of at most the size of the int(numel * sparsity)-th smallest (one more than that many)."""
    sizes = weight.abs()
    threshold = sizes.flatten().sort().values[int(sizes.numel() * sparsity)]
    return (sizes > threshold).float()


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W| * sqrt(norms), ``[out, in]``."""
    return weight.abs() * norms.sqrt()


def wanda(weight: Tensor, norms: Tensor, keep: int, group: int) -> Tensor:
    return smallest_removed(wanda_scores(weight, norms), keep, group)


def wanda_unstructured(weight: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    """Every row loses its int(in * sparsity) lowest scores."""
    scores = wanda_scores(weight, norms)
    order = scores.sort(dim=1, stable=True).indices[:, : int(weight.shape[1] * sparsity)]
    return torch.ones_like(scores).scatter_(1, order, 0.0)


def wanda_variant(weight: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    """Rows lose what adds up to a share of their scores; the share is found by bisection until the sparsity is met."""
    scores = wanda_scores(weight, norms)
    values, order = scores.sort(dim=1, stable=True)
    sums = values.cumsum(dim=1)
    low, high, share = 0.0, 0.8, 0.4
    while True:
        fits = sums <= share * sums[:, -1:]
        count = fits.sum(dim=1, keepdim=True)
        threshold = values.gather(1, (count - 1).clamp(min=0))
        removed = (scores <= threshold) & (count > 0)
        found = float(removed.float().mean())
        if abs(found - sparsity) <= 0.001 or high - low < 0.001:
            return (~removed).float()
        if found > sparsity:
            high, share = share, (share + low) / 2
        else:
            low, share = share, (share + high) / 2


# --- SparseGPT ---


def inverse_factor(hessian: Tensor, damping: float, layer: str = "") -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, float32 ``[in, in]``. Raises ``UserError``."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    try:
        if not bool(torch.isfinite(damped).all()):
            raise torch.linalg.LinAlgError("not finite")
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        reason = "its inputs are not finite" if "finite" in str(error) else f"damping {damping} is too small"
        raise UserError(f"SparseGPT cannot solve layer {layer}: {reason}: raise damping, or give other text") from None


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    pattern: tuple[int, int] | None = None,
    sparsity: float = 0.5,
    update: bool = True,
    block: int = BLOCK,
    damping: float = 0.01,
    layer: str = "",
) -> Pruned:
    """Prune a layer column by column, the error of each removal spread over the columns to its right.

    weight: ``[out, in]``. hessian: undamped. pattern: (keep, group); None: ``sparsity`` of the weights, by a threshold a block.
    update: False leaves the weights as they are and takes the scores from them throughout: a mask alone, MaskLLM's prior.
    block: columns worked on together; the group must divide it. Raises ``UserError``.
    """
    if pattern is not None and block % pattern[1]:
        raise UserError(f"groups of {pattern[1]} do not divide blocks of {block} columns: use a multiple")
    work, hessian = weight.detach().float().clone(), hessian.float().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    work[:, dead] = 0.0
    factor = inverse_factor(hessian, damping, layer)
    masks, loss = [], 0.0
    for first in range(0, work.shape[1], block):
        last = min(first + block, work.shape[1])
        part, own = work[:, first:last], factor[first:last, first:last]
        diagonal = own.diagonal()
        mask = torch.ones_like(part)
        if pattern is None:
            scores = (part / diagonal).square()
            mask = (scores > scores.flatten().sort().values[int(scores.numel() * sparsity)]).float()
        errors = torch.zeros_like(part)
        for column in range(last - first):
            if pattern is not None and column % pattern[1] == 0:
                some = slice(column, column + pattern[1])
                mask[:, some] = smallest_removed((part[:, some] / diagonal[some]).square(), *pattern)
            old = part[:, column].clone()
            error = old * (1 - mask[:, column]) / diagonal[column]
            loss += float((error.square() / 2).sum())
            if update:
                part[:, column:] -= torch.outer(error, own[column, column:])
                part[:, column] = old * mask[:, column]
                errors[:, column] = error
        if update:
            work[:, last:] -= errors @ factor[first:last, last:]
        masks.append(mask)
    mask = torch.cat(masks, dim=1)
    kept = work if update else work * mask
    return Pruned(mask, kept.to(weight.dtype), loss if math.isfinite(loss) else 0.0)
