"""Which samples a probe sees: few labels, and a split where the data has none. Every choice is drawn by name."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError


def few_labels(labels: Tensor, share: float, draw: Draw) -> Tensor:
    """Ids (int64, ascending) of a stratified share of the samples: of each class round(share x count), at least one.

    draw: ``few_labels [N]``. A larger share with the same draw contains the smaller one. Raises ``UserError`` unless
    0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise UserError(
            f"labels={share} does not fit: it is a share of the labelled samples, 0 < share <= 1 (0.01 is 1 %)"
        )
    return _stratified(labels, share, draw.uniform("few_labels", (len(labels),)))


def split(labels: Tensor | None, count: int, draw: Draw, *, share: float = 0.8) -> tuple[Tensor, Tensor]:
    """Ids of a train and a test part, by class where labels are known. draw: ``split [N]``.

    Raises ``UserError`` for fewer than two samples.
    """
    if count < 2:
        raise UserError(f"cannot split {count} sample into train and test: give more data")
    groups = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    train = _stratified(groups, share, draw.uniform("split", (count,)))
    held = torch.ones(count, dtype=torch.bool)
    held[train] = False
    if not held.any():  # every class has a single sample
        held[train[-1]] = True
        train = train[:-1]
    return train, held.nonzero()[:, 0]


def _stratified(labels: Tensor, share: float, noise: Tensor) -> Tensor:
    """In each class the samples with the least noise. One sort orders by class, then by noise."""
    labels, noise = labels.cpu(), noise.cpu()
    order = noise.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels)
    wanted = (counts * share).round().long().clamp(min=1).minimum(counts)
    start = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - start[labels[order]]
    return order[rank < wanted[labels[order]]].sort().values
