"""What hiding a unit changes: the manifold term, the KL term, and how they are combined into one score (all at most 0)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Aggregate = Literal["sum", "mean"]


def rows_of(features: Tensor, rows: Tensor | None) -> Tensor:
    """Unit vectors ``[..., K, D]`` of features ``[..., B, T, D]``: normalised over D, flattened batch-major, some rows taken."""
    flat = features.flatten(-3, -2)
    flat = flat if rows is None else flat[..., rows, :]
    return F.normalize(flat.float(), dim=-1, eps=1e-12)


class Manifold:
    """The manifold term against one teacher: ``-sum (M_t - M_s)^2`` of the Gram matrices ``[K, K]`` of its rows.

    teacher: ``[K, D]`` unit rows. The teacher's Gram matrix is built once; where D < K / 3 only D x D products are made:
    with S = F_t + F_s and E = F_t - F_s the sum is half of ``<S'S, E'E> + <E'S, (E'S)'>``.
    """

    def __init__(self, teacher: Tensor, aggregate: Aggregate = "sum"):
        self.teacher, self.aggregate = teacher, aggregate
        count, width = teacher.shape
        self.closed = width < count / 3
        self.gram = None if self.closed else teacher @ teacher.T

    def __call__(self, student: Tensor) -> Tensor:
        """``[...]`` for students ``[..., K, D]``."""
        if self.closed:
            both, gap = self.teacher + student, self.teacher - student
            turned = gap.transpose(-1, -2)
            across = turned @ both
            squares = (both.transpose(-1, -2) @ both * (turned @ gap)).sum((-1, -2))
            total = (squares + (across * across.transpose(-1, -2)).sum((-1, -2))) / 2
        else:
            total = (self.gram - student @ student.transpose(-1, -2)).square().sum((-1, -2))
        return -total / (student.shape[-2] ** 2 if self.aggregate == "mean" else 1)


def manifold(teacher: Tensor, student: Tensor, rows: Tensor | None = None, aggregate: Aggregate = "sum") -> Tensor:
    """The same for features ``[B, T, D]``, both Gram matrices built anew (the released code's way)."""
    a, b = rows_of(teacher, rows), rows_of(student, rows)
    gap = (a @ a.T - b @ b.T).square()
    return -(gap.mean() if aggregate == "mean" else gap.sum())


def manifold_by_position(teacher: Tensor, student: Tensor, samples: int = 4) -> Tensor:
    """The variant that compares samples: for each position the Gram matrix over the first samples ``[4, 4]``, averaged over
    positions, then minus the sum of squared differences. Features ``[B, T, D]``."""

    def average(features: Tensor) -> Tensor:
        unit = F.normalize(features[:samples].float(), dim=-1, eps=1e-12).transpose(0, 1)  # [T, 4, D]
        return (unit @ unit.transpose(1, 2)).mean(dim=0)

    return -(average(teacher) - average(student)).square().sum()


def divergence(teacher: Tensor, student: Tensor, temperature: float = 4.0, divide: bool = False) -> Tensor:
    """``-KL(teacher || student) T^2``, summed over everything but the candidates: student ``[..., B, K]``, teacher ``[B, K]``.

    In float64; what lies below 1e-6 T^2 counts as 0. divide: logits are divided by T first, which the released code forgets.
    """
    a, b = teacher.double(), student.double()
    if divide:
        a, b = a / temperature, b / temperature
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    total = (p.exp() * (p - q)).flatten(b.ndim - a.ndim).sum(-1)
    total = torch.where(total < 1e-6, torch.zeros_like(total), total)
    return -(total * temperature**2)


def combined(md: Tensor, kl: Tensor, contribution: float = 10.0) -> Tensor:
    """``MD + KL`` after the KL was brought, in decades, to a tenth of the manifold term. ``[N]``, in the order of the visits.

    Where the manifold term is the larger, KL is multiplied by 10^e with ``e = int(log10 |MD| - log10 |KL| - log10 contribution)``;
    elsewhere by the mean of the factors so far (1 before any).
    """
    out, total, count = [], 0.0, 0
    for m, k in zip(md.double().tolist(), kl.double().tolist(), strict=True):
        if m < k and k != 0:
            factor = 10.0 ** int(math.log10(abs(m)) - math.log10(abs(k)) - math.log10(contribution))
            total, count = total + factor, count + 1
        else:
            factor = total / count if count else 1.0
        out.append(m + k * factor)
    return torch.tensor(out, dtype=torch.float64)


def index_weights(count: int, most: float) -> Tensor:
    """geomspace(1, most, count), reversed: the first unit counts most times as much as the last."""
    if count == 1:
        return torch.ones(1, dtype=torch.float64)
    return torch.logspace(math.log10(most), 0, count, dtype=torch.float64)
