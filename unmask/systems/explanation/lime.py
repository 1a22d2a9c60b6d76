"""LIME on regions (Ribeiro et al., KDD 2016), all masks of an image in batches, with any masking.

The regression is that of the ``lime`` package: cosine distance, kernel width 0.25, ridge regression with a free intercept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.explanation.regions import count_of, sums, visible_of

Talk = Callable[[str], None]


@dataclass
class Fit:
    """One regression a label, likeliest first. labels: ``[k]``; weights ``[k, F]``; intercept, score (weighted R²), prediction (for
    the whole image) ``[k]``; distance and sample_weight ``[n]``."""

    labels: Tensor
    weights: Tensor
    intercept: Tensor
    score: Tensor
    prediction: Tensor
    distance: Tensor
    sample_weight: Tensor


def presence(draw: Draw, samples: int, regions: int, share: float = 0.5) -> Tensor:
    """float ``[samples, regions]``: which regions stay visible; all of them in the first row."""
    kept = (draw.uniform("presence", (samples, regions)) < share).float()
    kept[0] = 1
    return kept


def fit(
    presence: Tensor,
    probabilities: Tensor,
    labels: int | list[int] = 1,
    *,
    kernel_width: float = 0.25,
    alpha: float = 1.0,
) -> Fit:
    """Weights of the regions for some labels.

    presence: ``[n, F]`` of ones and zeros, the first row all ones; probabilities: ``[n, K]``. labels: how many of the likeliest
    (falling in the first row's probability), or which. Minimises sum_i w_i (y_i - z_i b - a)² + alpha |b|², with a free intercept
    a and w = sqrt(exp(-d² / width²)), d the cosine distance to the first row. A row without any region has distance 1.
    """
    z, y = presence.double().cpu(), probabilities.double().cpu()
    if isinstance(labels, int):
        chosen = y[0].argsort(descending=True, stable=True)[:labels]
    else:
        chosen = torch.tensor(labels)
    norms = z.norm(dim=1)
    cosine = (z @ z[0]) / (norms * norms[0]).clamp_min(1e-12)
    distance = 1 - cosine
    weight = (-(distance**2) / kernel_width**2).exp().sqrt()
    total = weight.sum()
    if float(total) <= 0:
        raise UserError(f"kernel_width={kernel_width} gives no sample any weight")
    targets = y[:, chosen]
    centre_z, centre_y = (weight @ z) / total, (weight @ targets) / total
    zc, yc = z - centre_z, targets - centre_y
    gram = zc.T @ (zc * weight[:, None]) + alpha * torch.eye(z.shape[1], dtype=torch.float64)
    beta = torch.linalg.solve(gram, zc.T @ (yc * weight[:, None]))
    intercept = centre_y - centre_z @ beta
    predicted = z @ beta + intercept
    residual = (weight[:, None] * (targets - predicted) ** 2).sum(dim=0)
    spread = (weight[:, None] * yc**2).sum(dim=0)
    score = torch.where(spread > 0, 1 - residual / spread.clamp_min(1e-300), torch.zeros_like(spread))
    return Fit(chosen, *(t.float() for t in (beta.T, intercept, score, predicted[0], distance, weight)))


def answers(
    ask: Callable[[Tensor, Tensor], Tensor],
    image: Tensor,
    presence: Tensor,
    segments: Tensor,
    *,
    batch_size: int = 64,
    tell: Talk | None = None,
) -> Tensor:
    """Probabilities ``[n, K]`` of one image ``[C, H, W]`` under n choices of visible regions. ask: a masking, (images, visible) ->
    logits. The image is expanded, never copied; each batch is one forward."""
    import time

    from unmask.systems.explanation.talk import rate

    found, started = [], time.monotonic()
    segments = segments.to(image.device)
    with torch.no_grad():
        for start in range(0, len(presence), batch_size):
            some = presence[start : start + batch_size].to(image.device)
            masks = visible_of(some, segments)
            found.append(ask(image.expand(len(some), -1, -1, -1), masks).float().softmax(dim=1).cpu())
            if tell is not None:
                tell(f"{rate(min(start + batch_size, len(presence)), len(presence), started)}")
    return torch.cat(found)


# --- against a known object ---


def evidence(segments: Tensor, thing: Tensor) -> Tensor:
    """``[F]``: how much of the object each region holds, above the average: sum over it of (object - mean(object))."""
    thing = thing.float()
    return sums(thing - thing.mean(), segments)


def coverage(weights: Tensor, segments: Tensor, thing: Tensor) -> Tensor:
    """Cosine of the regions' weights and their evidence; 1 = the explanation is the object. thing: ``[H, W]`` in 0 ... 1."""
    return torch.nn.functional.cosine_similarity(weights.float(), evidence(segments, thing), dim=0)


def jaccard(weights: Tensor, segments: Tensor, thing: Tensor, top: int = 20) -> Tensor:
    """Overlap of the object with the ``top`` highest regions: intersection over union of pixels."""
    chosen = weights.argsort(descending=True, stable=True)[: min(top, count_of(segments))]
    inside = torch.isin(segments.cpu(), chosen.cpu())
    there = thing.cpu() > 0.5
    return (inside & there).sum() / (inside | there).sum().clamp_min(1)


def signed_top(weights: Tensor, segments: Tensor, top: int) -> Tensor:
    """int64 ``[H, W]``: 1 or -1 at the regions of the ``top`` largest weights in size, 0 elsewhere."""
    chosen = weights.abs().argsort(descending=True, stable=True)[:top]
    signs = torch.zeros(len(weights), dtype=torch.int64)
    signs[chosen] = torch.where(weights[chosen] < 0, -1, 1)
    return signs[segments.cpu()]


def win_rates(scores: dict[str, list[float]]) -> dict[str, float]:
    """How often each masking has the highest score of all, over images."""
    names = list(scores)
    table = torch.tensor([scores[n] for n in names])
    best = table.argmax(dim=0)
    return {n: float((best == i).float().mean()) for i, n in enumerate(names)}


def summary(found: Fit) -> dict[str, Any]:
    return {"r2": float(found.score[0]), "intercept": float(found.intercept[0]), "fitted": float(found.prediction[0])}
