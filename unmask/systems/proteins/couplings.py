"""Coevolution: frequencies, mean-field DCA couplings, pointwise mutual information, and pairing by them.

Alignments are states ``[N, L]`` in 0 ... q - 1; the last state is the gauge state (the gap in the usual coding). Weigt et al. 2009,
Morcos et al. 2011, Bitbol et al. 2016 and 2018.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from unmask.data.alignments import identity
from unmask.systems.proteins.alphabet import FIRST_AMINO, LAST_AMINO, TABLE

STATES = 21  # twenty amino acids and everything else, the gap among it


def states_of(letters: np.ndarray) -> Tensor:
    """uint8 ``[..., L]`` (ASCII) -> int64 states 0 ... 20, everything that is no standard amino acid being 20."""
    ids = TABLE[letters]
    return torch.from_numpy(np.where((ids >= FIRST_AMINO) & (ids <= LAST_AMINO), ids - FIRST_AMINO, STATES - 1))


def one_hot(states: Tensor, number: int) -> Tensor:
    """float64 ``[..., L, q]``."""
    return torch.nn.functional.one_hot(states, number).double()


def sequence_weights(states: Tensor, threshold: float = 0.3) -> Tensor:
    """``[N]``: 1 / (1 + number of other rows at a normalised Hamming distance below ``threshold``)."""
    rows = states.numpy()
    columns = rows.shape[1]
    differing = np.rint((1 - identity(rows, rows).astype(np.float64)) * columns) / columns
    return torch.from_numpy(1.0 / np.maximum((differing < threshold).sum(axis=1), 1))


def frequencies(
    states: Tensor, number: int, *, pseudocount: float = 0.5, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One-site ``[L, q]`` and two-site ``[L, q, L, q]`` frequencies with pseudocount; the diagonal blocks are diagonal."""
    length = states.shape[1]
    ones = one_hot(states, number).flatten(1)
    weights = torch.ones(len(states), dtype=torch.float64) if weights is None else weights.double()
    weights = weights / weights.sum()
    single = (weights @ ones).reshape(length, number)
    double = ((ones * weights[:, None]).T @ ones).reshape(length, number, length, number)
    single = pseudocount / number + (1 - pseudocount) * single
    double = pseudocount / number**2 + (1 - pseudocount) * double
    place = torch.arange(length)
    double[place, :, place, :] = torch.diag_embed(single)
    return single, double


def couplings(single: Tensor, double: Tensor, *, official_gauge: bool = False) -> Tensor:
    """Mean-field couplings ``[L, q, L, q]`` in the zero-sum gauge: minus the inverse of the covariance over q - 1 states.

    official_gauge: leave the rows of the gauge state at 0, as a published code does by accident.
    """
    length, number = single.shape
    some = number - 1
    covariance = double[:, :some, :, :some] - single[:, :some, None, None] * single[None, None, :, :some]
    inverse = torch.linalg.inv(covariance.reshape(length * some, length * some)).reshape(length, some, length, some)
    out = single.new_zeros(length, number, length, number)
    out[:, :some, :, :some] = -inverse
    rows, columns = out.mean(dim=1, keepdim=True), out.mean(dim=3, keepdim=True)
    gauged = out - rows - columns + out.mean(dim=(1, 3), keepdim=True)
    if official_gauge:
        gauged[:, some] = 0
        gauged[:, :, :, some] = 0
    return gauged


def coupling_strength(table: Tensor) -> Tensor:
    """``[L, L]``: the Frobenius norm of each pair of sites' couplings; 0 between a site and itself."""
    return table.square().sum(dim=(1, 3)).sqrt().fill_diagonal_(0.0)


def pointwise_information(
    states: Tensor, number: int, *, pseudocount: float = 0.15, weights: Tensor | None = None
) -> Tensor:
    """``[L, q, L, q]``: log f_ij(a, b) / (f_i(a) f_j(b)), natural logarithm."""
    single, double = frequencies(states, number, pseudocount=pseudocount, weights=weights)
    return (double / (single[:, :, None, None] * single[None, None])).log()


def pair_scores(table: Tensor, left: Tensor, right: Tensor, *, length_left: int | None = None) -> Tensor:
    """``[n, m]``: the sum over sites i of the left and j of the right of ``table[i, a_i, j, b_j]``.

    table: ``[L, q, L, q]`` of both sides together, or ``[L1, q, L2, q]``. left ``[n, L1]``, right ``[m, L2]`` states.
    """
    first, number = left.shape[1], table.shape[1]
    if table.shape[0] != first or length_left is not None:
        table = table[:first, :, first:, :]
    width = right.shape[1]
    a, b = one_hot(left, number).flatten(1), one_hot(right, number).flatten(1)
    return a @ table.reshape(first * number, width * number).to(a) @ b.T


def assignment(score: Tensor, *, largest: bool = True) -> np.ndarray:
    """``[n]``: the column of each row in the assignment with the largest (smallest) total."""
    _, columns = linear_sum_assignment(score.detach().cpu().double().numpy(), maximize=largest)
    return columns


def confidences(cost: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The assignment of least total cost, and for each of its pairs by how much the best total without that pair is worse
    (0 for a single row)."""
    values = cost.detach().cpu().double().numpy()
    rows, columns = linear_sum_assignment(values)
    best = values[rows, columns].sum()
    gaps = np.zeros(len(rows))
    if len(rows) > 1:
        far = np.abs(values).sum() + 1.0
        for place, (row, column) in enumerate(zip(rows, columns, strict=True)):
            without = values.copy()
            without[row, column] += far
            other = linear_sum_assignment(without)
            gaps[place] = without[other].sum() - best
    return columns, gaps


def mutual_information(left: Tensor, right: Tensor, number: int = STATES, *, weights: Tensor | None = None) -> Tensor:
    """``[L1, L2]`` in nats, from plain frequencies of paired rows."""
    states = torch.cat((left, right), dim=1)
    single, double = frequencies(states, number, pseudocount=0.0, weights=weights)
    first = left.shape[1]
    joint = double[:first, :, first:, :]
    expected = single[:first, :, None, None] * single[None, None, first:]
    return torch.where(joint > 0, joint * (joint / expected.clamp_min(1e-30)).clamp_min(1e-30).log(), 0.0).sum(
        dim=(1, 3)
    )
