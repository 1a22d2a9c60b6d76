"""Orders and choices among the rows of a data set, the same on every machine."""

from __future__ import annotations

import numpy as np


def shuffled(n: int, seed: int = 0) -> np.ndarray:
    """A fixed order of 0 ... n - 1: a pure function of (seed, n), the same on every machine."""
    from unmask.draw import Seeded

    return Seeded(seed).integers("order", 0, 2**31 - 1, (n,), shared=True).argsort(stable=True).numpy()


def some_of(n: int, limit: int) -> np.ndarray:
    """int64: ``min(limit, n)`` of the numbers 0 ... n - 1, ascending; a pure function of both.

    At random, not at equal distances: data sets often hold their classes in turn, and every tenth row of such a one is of
    a single class.
    """
    return np.arange(n) if limit >= n else np.sort(shuffled(n)[:limit])
