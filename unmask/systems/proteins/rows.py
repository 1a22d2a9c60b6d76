"""Which rows of a deep alignment a model sees: greedy by diversity, at random, the first, the nearest, or filtered."""

from __future__ import annotations

from typing import Literal

import numpy as np

from unmask.data.alignments import Alignment, identity
from unmask.draw import Draw, permutation
from unmask.errors import UserError

Choice = Literal["diverse", "similar", "random", "first", "nearest", "filter"]


def greedy_rows(letters: np.ndarray, count: int, *, largest: bool = True) -> np.ndarray:
    """Row 0, then again and again the row with the largest (smallest) mean Hamming distance to those chosen; ties go to the
    lowest row. int64, ascending; all rows where there are no more than ``count``. letters: ``[R, L]`` of any integer type.
    ESM's ``greedy_select``, to the last bit of its means."""
    if len(letters) <= count:
        return np.arange(len(letters))
    chosen = [0]
    far = np.zeros((len(letters), count - 1), dtype=np.float64)
    total = np.zeros(len(letters), dtype=np.float64)
    for step in range(count - 1):
        far[:, step] = (letters != letters[chosen[-1]]).mean(axis=1)
        total += far[:, step]
        mean = (total if largest else -total) / len(chosen)
        mean[chosen] = -np.inf
        # distances are shares of L columns, so many rows are equally far but for the order of their sums: as ESM adds them
        near = np.flatnonzero(mean >= mean.max() - 1e-9)
        exact = np.ascontiguousarray(far[near, : step + 1]).mean(axis=1)
        chosen.append(int(near[exact.argmax() if largest else exact.argmin()]))
    return np.sort(np.array(chosen, dtype=np.int64))


def filtered_rows(letters: np.ndarray, count: int) -> np.ndarray:
    """Row 0 and, from the top, every row that is less identical to those kept than a limit, which is lowered until no more than
    ``count`` stay (what hhfilter's -diff is used for)."""
    if len(letters) <= count:
        return np.arange(len(letters))
    kept = list(range(len(letters)))
    for limit in np.arange(0.95, 0.1, -0.05):
        taken: list[int] = []
        for row in kept:
            if not taken or identity(letters[row : row + 1], letters[taken]).max() < limit:
                taken.append(row)
        kept = taken
        if len(kept) <= count:
            break
    return np.array(kept[:count], dtype=np.int64)


def choose_rows(alignment: Alignment, count: int, how: Choice = "diverse", draw: Draw | None = None) -> np.ndarray:
    """int64, ascending, the query (row 0) always among them. draw: for "random". Raises ``UserError`` below one row."""
    letters = alignment.letters
    if count < 1:
        raise UserError(f"rows={count} must be at least 1")
    if len(letters) <= count or how == "first":
        return np.arange(min(count, len(letters)))
    if how in ("diverse", "similar"):
        return greedy_rows(letters, count, largest=how == "diverse")
    if how == "filter":
        return filtered_rows(letters, count)
    if how == "nearest":
        order = np.argsort(-identity(letters[:1], letters)[0], kind="stable")
        return np.sort(np.concatenate(([0], order[order != 0][: count - 1])))
    if draw is None:
        raise ValueError("random rows need a draw")
    order = permutation(draw, "rows", (1, len(letters) - 1))[0].numpy() + 1
    return np.sort(np.concatenate(([0], order[: count - 1])))
