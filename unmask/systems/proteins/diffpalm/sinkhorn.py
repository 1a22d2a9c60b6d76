"""Gumbel-Sinkhorn: soft and hard permutations of all species at once. Mena et al. 2018; Lupo et al. 2024.

Species have ``m_s`` free rows; their matrices stand in one tensor ``[..., S, m, m]``, the smaller ones in its upper left corner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TINY = 1e-20
_NOWHERE = -1e9


def inside(sizes: Sequence[int]) -> Tensor:
    """bool ``[S, m, m]``: entries that belong to a species."""
    size = max([*sizes, 1])
    there = torch.arange(size)[None] < torch.tensor(list(sizes))[:, None]
    return there[:, :, None] & there[:, None, :]


def centred(log_alpha: Tensor, there: Tensor) -> Tensor:
    """Each species' entries minus their mean."""
    count = there.sum(dim=(-1, -2), keepdim=True).clamp_min(1)
    mean = (log_alpha * there).sum(dim=(-1, -2), keepdim=True) / count
    return (log_alpha - mean) * there


def spread(log_alpha: Tensor, there: Tensor) -> Tensor:
    """``[..., S, 1, 1]``: the unbiased standard deviation of each species' entries, with gradient; that of constant entries has
    gradient 0."""
    count = there.sum(dim=(-1, -2), keepdim=True)
    variance = (centred(log_alpha, there) ** 2).sum(dim=(-1, -2), keepdim=True) / (count - 1).clamp_min(1)
    some = variance > 0
    return torch.where(some, torch.where(some, variance, 1.0).sqrt(), 0.0)


def with_noise(log_alpha: Tensor, there: Tensor, uniform: Tensor | None, factor: float, *, by_spread: bool) -> Tensor:
    """``log_alpha + factor x (spread or 1) x Gumbel noise``. uniform: of the shape of ``log_alpha``; None adds nothing."""
    if uniform is None:
        return log_alpha
    gumbel = -torch.log(-torch.log(uniform + TINY) + TINY)
    scale = spread(log_alpha, there) if by_spread else 1.0
    return torch.where(there, log_alpha + factor * scale * gumbel, 0.0)


def sinkhorn(x: Tensor, there: Tensor, *, tau: float = 1.0, iterations: int = 10) -> Tensor:
    """Soft permutations ``[..., S, m, m]``: log space, rows then columns normalised in turn (ends column-normalised); 0 outside."""
    # outside a species stands an identity, which stays one
    identity = torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
    x = torch.where(there, x / tau, torch.where(identity, 0.0, _NOWHERE))
    for _ in range(iterations):
        x = x - x.logsumexp(dim=-1, keepdim=True)
        x = x - x.logsumexp(dim=-2, keepdim=True)
    return torch.where(there, x.exp(), 0.0)


@torch.no_grad()
def matching(x: Tensor, sizes: Sequence[int], relabel: Sequence[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Hard permutations: the assignment of the largest total of each species ``[S, m, m]``.

    relabel: two random orders a species. The solver then sees rows and columns in those orders, which removes its bias to the
    diagonal where entries are equal.
    """
    out = torch.zeros_like(x)
    for number, (table, size) in enumerate(zip(x.detach().cpu(), sizes, strict=True)):
        if not size:
            continue
        table = table[:size, :size]
        rows, columns = (torch.arange(size), torch.arange(size)) if relabel is None else relabel[number]
        i, j = linear_sum_assignment(table[rows][:, columns].numpy(), maximize=True)
        out[number, rows[torch.from_numpy(i)], columns[torch.from_numpy(j)]] = 1.0
    return out


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard - soft.detach() + soft
