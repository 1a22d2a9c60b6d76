"""Other scores of a pairing: two-body entropy (mutual information), likeness across species (best hits, mirrortree, graph
alignment), by the same soft and hard permutations; and DCA or PMI scores learned in rounds. DiffPaSS, arXiv:2409.16142.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.systems.proteins import couplings as dca
from unmask.systems.proteins.diffpalm.problem import PairList, Problem
from unmask.systems.proteins.diffpalm.sinkhorn import centred, matching, sinkhorn, straight_through

TINY = 1e-20
Likeness = Literal["best_hits", "mirrortree", "graph"]
Loss = Callable[[Tensor], Tensor]


# --- information ------------------------------------------------------------------------------------------------


def one_body_entropy(left: Tensor) -> Tensor:
    """Bits, the mean over columns of ``[D, L, q]`` (rows may be soft)."""
    shares = left.mean(dim=0)
    return -(shares * (shares + TINY).log2()).sum(dim=-1).mean()


def two_body_entropy(left: Tensor, right: Tensor) -> Tensor:
    """Bits, the mean over pairs of a column of ``left [D, L1, q]`` and one of ``right [D, L2, q]``."""
    shares = (left.flatten(1).T @ right.flatten(1)) / len(left)
    whole = -(shares * (shares + TINY).log2()).sum()
    return whole / (left.shape[1] * right.shape[1])


def information_loss(left: Tensor, right: Tensor) -> Loss:
    """Of a permutation ``[D, D]``: two-body entropy less the left columns' own: minus the mutual information, plus a constant."""

    def loss(permutation: Tensor) -> Tensor:
        moved = (permutation.T @ left.flatten(1)).unflatten(1, left.shape[1:])
        return two_body_entropy(moved, right) - one_body_entropy(moved)

    return loss


# --- likeness ---------------------------------------------------------------------------------------------------


def likeness(one_hot: Tensor) -> Tensor:
    """``[D, D]``: share of equal columns between rows ``[D, L, q]``."""
    return one_hot.flatten(1) @ one_hot.flatten(1).T / one_hot.shape[1]


def reciprocal(table: Tensor, sizes: Sequence[int], tau: float = 0.1) -> Tensor:
    """Each block between two species as softmax over its columns times softmax over its rows: soft reciprocal best hits."""
    rows = torch.split(table, list(sizes), dim=0)
    return torch.cat(
        [
            torch.cat(
                [(b / tau).softmax(dim=1) * (b / tau).softmax(dim=0) for b in torch.split(row, list(sizes), dim=1)],
                dim=1,
            )
            for row in rows
        ],
        dim=0,
    )


def likeness_loss(left: Tensor, right: Tensor, sizes: Sequence[int], kind: Likeness = "graph") -> Loss:
    """Of a permutation: minus the product of the likeness of left rows and of right rows, over pairs i < j of different species
    (best_hits, after ``reciprocal``), of one species (mirrortree), or of all (graph)."""
    ours, theirs = likeness(left), likeness(right)
    species = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes)))
    same = species[:, None] == species[None]
    above = torch.ones_like(same).triu(1)
    where = above & (~same if kind == "best_hits" else same if kind == "mirrortree" else torch.ones_like(same))
    if kind == "best_hits":
        theirs = reciprocal(theirs, sizes)

    def loss(permutation: Tensor) -> Tensor:
        moved = permutation.T @ ours @ permutation
        if kind == "best_hits":
            moved = reciprocal(moved, sizes)
        return -(moved * theirs * where).sum()

    return loss


# --- the same descent for any of these losses -------------------------------------------------------------------


def descend(
    loss: Loss,
    problem: Problem,
    draw: Draw,
    *,
    lr: float = 0.1,
    steps: int = 1,
    tau: float = 1.0,
    bootstrap: bool = True,
) -> tuple[Tensor, list[float]]:
    """``[D]`` (the left row of each right row) and the losses. bootstrap: fix 1, 2, ... D random pairs of the last result, and fit
    again from zero each time (DiffPaSS); the pairing with the lowest loss of hard permutations is given."""
    free_from, best = problem, (float("inf"), torch.arange(problem.rows))
    losses: list[float] = []
    rounds = range(problem.rows) if bootstrap else range(1)
    base = problem.fixed or [[] for _ in problem.sizes]
    for number in rounds:
        result, value = _fit(loss, free_from, draw, number, lr=lr, steps=steps, tau=tau)
        losses.append(value)
        if value < best[0]:
            best = (value, result)
        if number + 1 == len(rounds):
            break
        order = draw.uniform(f"bootstrap_{number}", (1, problem.rows))[0].argsort(stable=True)[: number + 1]
        chosen = problem.inner([(int(result[q]), int(q)) for q in order])
        free_from = Problem(problem.sizes, _merged(base, chosen))
        if max([*free_from.free_sizes, 0]) < 2:
            break
    return best[1], losses


def _merged(base: Sequence[PairList], more: Sequence[PairList]) -> list[PairList]:
    out = []
    for known, new in zip(base, more, strict=True):
        lefts, rights = {p for p, _ in known}, {q for _, q in known}
        out.append([*known, *[(p, q) for p, q in new if p not in lefts and q not in rights]])
    return out


def _fit(
    loss: Loss, problem: Problem, draw: Draw, number: int, *, lr: float, steps: int, tau: float
) -> tuple[Tensor, float]:
    there, sizes = problem.there(), problem.free_sizes
    log_alpha = torch.zeros(there.shape, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([log_alpha], lr=lr)
    orders = [
        tuple(draw.uniform(f"order_{kind}_{number}_{s}", (1, m))[0].argsort(stable=True) for kind in ("row", "col"))
        for s, m in enumerate(sizes)
    ]
    for _ in range(steps):
        soft = sinkhorn(log_alpha, there, tau=tau)
        optimiser.zero_grad()
        # the first soft permutation is flat: the gradient there is the mean-field one
        loss(straight_through(problem.assemble(soft), problem.assemble(soft))).backward()
        optimiser.step()
        with torch.no_grad():
            log_alpha.copy_(centred(log_alpha, there))
    hard = problem.assemble(matching(log_alpha, sizes, orders))  # type: ignore[arg-type]
    with torch.no_grad():
        return hard.argmax(dim=0), float(loss(hard))


# --- DCA-IPA, MI-IPA --------------------------------------------------------------------------------------------


def iterative_scores(
    left: Tensor,
    right: Tensor,
    problem: Problem,
    draw: Draw,
    *,
    kind: Literal["dca", "mi"] = "mi",
    increment: int = 6,
    number: int = dca.STATES,
    known: tuple[Tensor, Tensor] | None = None,
    official_gauge: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """Iterative pairing by DCA or PMI (Bitbol et al. 2016, 2018): begin with known pairs, or random ones within species; learn
    scores from the pairs, pair all species by assignment, keep the most confident for the next round, ``increment`` more each.

    left ``[D, L1]``, right ``[D, L2]`` states. Returns the left row of each right row, its confidence ``[D]`` and the rounds.
    """
    first = left.shape[1]
    base = torch.empty(0, first + right.shape[1], dtype=torch.int64) if known is None else torch.cat(known, dim=1)
    partner = random_partners(problem, draw)
    confidence = torch.zeros(problem.rows)
    chosen = torch.arange(problem.rows) if known is None else torch.empty(0, dtype=torch.int64)
    rounds = 0
    for rounds in range(1, 2 + -(-problem.rows // increment)):
        train = torch.cat((base, torch.cat((left[partner[chosen]], right[chosen]), dim=1)))
        weights = dca.sequence_weights(train)
        if kind == "dca":
            single, double = dca.frequencies(train, number, weights=weights)
            score = -dca.pair_scores(dca.couplings(single, double, official_gauge=official_gauge), left, right)
        else:
            score = -dca.pair_scores(
                dca.pointwise_information(train, number, weights=weights)[:first, :, first:], left, right
            )
        partner, confidence = paired_by(score, problem)
        count = rounds * increment
        chosen = confidence.argsort(descending=True, stable=True)[:count]
        if count >= problem.rows:
            break
    return partner, confidence, rounds


def paired_by(cost: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """The assignment of least total cost ``[D, D]`` (left against right) inside species, fixed pairs kept; with confidences."""
    partner, confidence = torch.zeros(problem.rows, dtype=torch.int64), torch.zeros(problem.rows)
    for p, q in problem.known:
        partner[q], confidence[q] = p, float("inf")
    for lefts, rights in zip(problem.free_left, problem.free_right, strict=True):
        if not lefts:
            continue
        columns, gaps = dca.confidences(cost[lefts][:, rights])
        for p, column, gap in zip(lefts, columns, gaps, strict=True):
            partner[rights[column]], confidence[rights[column]] = p, float(gap)
    return partner, confidence


def random_partners(problem: Problem, draw: Draw) -> Tensor:
    partner = torch.zeros(problem.rows, dtype=torch.int64)
    for p, q in problem.known:
        partner[q] = p
    for s, (lefts, rights) in enumerate(zip(problem.free_left, problem.free_right, strict=True)):
        if lefts:
            order = draw.uniform(f"start_{s}", (1, len(lefts)))[0].argsort(stable=True)
            partner[torch.tensor(rights)] = torch.tensor(lefts)[order]
    return partner


# --- what training pairs tell without a model -------------------------------------------------------------------


def nearest_pair_cost(left: np.ndarray, right: np.ndarray, train_left: np.ndarray, train_right: np.ndarray) -> Tensor:
    """``[n, m]``: minus the largest sum of left and right identity over training pairs."""
    from unmask.data.alignments import identity

    a, b = identity(left, train_left), identity(right, train_right)
    return -torch.from_numpy(np.stack([(row[None] + b).max(axis=1) for row in a]))


def profile_correlation_cost(
    left: np.ndarray, right: np.ndarray, train_left: np.ndarray, train_right: np.ndarray
) -> Tensor:
    """``[n, m]``: minus the correlation of two rows' identity profiles to the training rows (mirrortree with known partners)."""
    from unmask.data.alignments import identity

    def standard(table: np.ndarray) -> np.ndarray:
        table = table - table.mean(axis=1, keepdims=True)
        return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)

    return -torch.from_numpy(standard(identity(left, train_left)) @ standard(identity(right, train_right)).T)
