"""The ridge probe: a linear classifier in closed form, exact on a CPU in seconds.

One eigendecomposition serves every strength of the penalty, and the strength is chosen by the exact leave-one-out
answers on the training samples (Rifkin & Lippert, "Notes on regularized least squares", 2007), so no sample is spared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.errors import UserError

STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-12, 5))  # 1e-6 ... 1e2, in units of the number of samples


@dataclass
class RidgeProbe:
    """A fitted ridge classifier. ``strength`` is the chosen penalty, ``leave_one_out`` its exact top-1 on the samples
    it was fitted to, each predicted from the others."""

    mean: Tensor  # [D]
    scale: Tensor  # [D]
    weight: Tensor  # [D, K]
    bias: Tensor  # [K]
    strength: float
    leave_one_out: float

    def scores(self, features: Tensor) -> Tensor:
        """``[M, D]`` -> ``[M, K]`` float64; the class with the largest score is the answer."""
        return ((features.double() - self.mean) / self.scale) @ self.weight + self.bias


def fit_ridge(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    strengths: Sequence[float] | None = None,
    standardise: bool = True,
) -> RidgeProbe:
    """Least squares on targets -1 and 1 with a squared penalty on the weights and none on the bias, in float64.

    features: ``[N, D]``; labels: int64 ``[N]``. strengths: absolute penalties to choose from; default: 17 between 1e-6 N
    and 1e2 N. Each feature is brought to mean 0 and variance 1 (constant ones to 0). Choice: the best leave-one-out
    top-1, among equals the least leave-one-out squared error. Raises ``UserError`` for fewer than two samples.
    """
    x = features.detach().double()
    count = x.shape[0]
    if count < 2:
        raise UserError(f"a ridge probe needs two labelled samples or more, got {count}")
    mean = x.mean(dim=0)
    scale = x.std(dim=0, correction=0) if standardise else torch.ones_like(mean)
    # a feature that does not vary carries nothing: its scale is set to 1, so that it becomes 0 instead of noise
    scale = torch.where(scale > 1e-12 * (1 + mean.abs()), scale, torch.ones_like(scale))
    x = (x - mean) / scale
    x = x - x.mean(dim=0)
    targets = torch.full((count, classes), -1.0, dtype=torch.float64, device=x.device)
    targets[torch.arange(count, device=x.device), labels.to(x.device)] = 1.0
    offset = targets.mean(dim=0)
    centred = targets - offset

    values, directions = _principal(x)
    projected = x @ directions  # [N, R], orthogonal columns of squared length ``values``
    toward = projected.T @ centred  # [R, K]
    squares = projected.square()

    best: tuple[float, float, float] | None = None
    chosen = 0.0
    for strength in strengths if strengths is not None else [s * count for s in STRENGTHS]:
        shrunk = toward / (values + strength)[:, None]
        # 1 / N is the bias's own share of the hat matrix's diagonal
        leverage = (squares / (values + strength)).sum(dim=1) + 1.0 / count
        error = (centred - projected @ shrunk) / (1 - leverage).clamp_min(1e-12)[:, None]
        alone = targets - error
        right = float((alone.argmax(dim=1) == labels.to(x.device)).double().mean())
        candidate = (right, -float(error.square().mean()), strength)
        if best is None or candidate[:2] > best[:2]:
            best, chosen = candidate, float(strength)
    assert best is not None
    weight = directions @ (toward / (values + chosen)[:, None])
    return RidgeProbe(mean, scale, weight, offset, chosen, best[0])


def _principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[R]`` and directions ``[D, R]`` of xᵀx, from the smaller of xᵀx and xxᵀ; null directions left out."""
    count, width = x.shape
    if width <= count:
        values, vectors = torch.linalg.eigh(x.T @ x)
        kept = values > values.max().clamp_min(1e-300) * 1e-13
        return values[kept], vectors[:, kept]
    values, vectors = torch.linalg.eigh(x @ x.T)
    kept = values > values.max().clamp_min(1e-300) * 1e-13
    values = values[kept]
    return values, x.T @ vectors[:, kept] / values.sqrt()


def ridge(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    classes: int,
    strengths: Sequence[float] | None = None,
) -> Tensor:
    """Scores ``[M, K]`` of the test samples by a ridge probe fitted to the training samples."""
    probe = fit_ridge(train_features, train_labels, classes, strengths=strengths)
    return probe.scores(test_features)
