"""Many runs as one answer: counts of pairs, the assignment they favour, pairs that all runs share, and rounds that fix them.

Robust pairs as in Lupo et al.'s later work; the aggregation is described in Lupo et al. 2024 and not in their code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.systems.proteins.couplings import assignment
from unmask.systems.proteins.diffpalm.problem import PairList, Problem


def pair_counts(runs: Tensor) -> Tensor:
    """``[D, D]`` left against right: in how many runs a pair stands. runs: int64 ``[runs, D]``, the left row of each right row."""
    return torch.nn.functional.one_hot(runs, runs.shape[1]).sum(dim=0).T


def aggregated(counts: Tensor, sizes: Sequence[int]) -> Tensor:
    """int64 ``[D]``: the left row of each right row in the pairing inside species that maximises the counts."""
    out = torch.zeros(len(counts), dtype=torch.int64)
    start = 0
    for size in sizes:
        block = counts[start : start + size, start : start + size]
        right_of_left = assignment(block)
        out[start + torch.from_numpy(right_of_left)] = start + torch.arange(size)
        start += size
    return out


def robust_pairs(
    runs: Tensor, sizes: Sequence[int], cutoff: float = 1.0, *, collisions: bool = False
) -> list[PairList]:
    """Of each species the pairs (left, right) that at least ``cutoff x runs`` runs share, the most frequent first, ties by (left,
    right). Two pairs with a common row (only below a majority): the rarer is dropped, both where they are equally frequent;
    ``collisions`` keeps them all."""
    counts = pair_counts(runs)
    out, start = [], 0
    for size in sizes:
        block = counts[start : start + size, start : start + size].tolist()
        found = [(p, q) for p in range(size) for q in range(size) if block[p][q] and block[p][q] >= cutoff * len(runs)]
        found.sort(key=lambda pair: (-block[pair[0]][pair[1]], pair))
        if not collisions:
            found = [
                (p, q)
                for p, q in found
                if all(block[p][q] > block[a][b] for a, b in found if (a, b) != (p, q) and (a == p or b == q))
            ]
        out.append(found)
        start += size
    return out


@dataclass
class Answer:
    """left_of_right ``[D]``; shares ``[D, D]`` of runs; fixed: pairs (global), given or robust; rounds: how many."""

    left_of_right: Tensor
    shares: Tensor
    fixed: PairList
    rounds: int = 1


def in_rounds(
    problem: Problem,
    solve: Callable[[Problem, int], Tensor],
    *,
    rounds: int = 1,
    cutoff: float = 1.0,
    add: int | None = None,
) -> Answer:
    """Iterative pairing: solve (``[runs, D]`` for a problem and the number of the round), fix what is robust, solve the rest.

    Stops after ``rounds``, when nothing new is robust, or when everything is fixed. add: fix only so many new pairs a round.
    """
    answer: Answer | None = None
    for number in range(max(rounds, 1)):
        runs = solve(problem, number)
        counts = pair_counts(runs)
        answer = Answer(aggregated(counts, problem.sizes), counts.double() / len(runs), list(problem.known), number + 1)
        if number + 1 == rounds:
            break
        before = set(problem.known)
        starts = problem.starts
        fresh = [
            (int(counts[starts[s] + p, starts[s] + q]), s, (p, q))
            for s, pairs in enumerate(robust_pairs(runs, problem.sizes, cutoff))
            for p, q in pairs
            if (starts[s] + p, starts[s] + q) not in before
        ]
        fresh.sort(key=lambda item: -item[0])
        fresh = fresh[:add]
        if not fresh:
            break
        new: list[PairList] = [[] for _ in problem.sizes]
        for _, species, pair in fresh:
            new[species].append(pair)
        following = Problem(problem.sizes, problem.fixed or [[] for _ in problem.sizes]).with_fixed(new)
        problem = following
        answer.fixed = list(problem.known)
        if max([*problem.free_sizes, 0]) < 2:
            for p, q in problem.known:
                answer.left_of_right[q] = p
            break
    assert answer is not None
    return answer


def correct_share(left_of_right: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> float:
    """The fraction of right rows with their true partner."""
    return float((torch.as_tensor(left_of_right) == torch.as_tensor(truth)).double().mean())
