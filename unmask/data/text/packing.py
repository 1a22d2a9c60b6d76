"""Several short rows in one of fixed length: what a batch would spend on padding becomes text."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def packed_rows(lengths: np.ndarray, length: int) -> list[list[int]]:
    """Bins of row numbers, each of at most ``length`` tokens together: best-fit decreasing, longest rows first.

    A pure function of the lengths, so that every process packs alike. Rows without a token are left out.
    """
    order = np.argsort(-np.minimum(lengths, length), kind="stable")
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for row in order.tolist():
        size = int(min(lengths[row], length))
        if size == 0:
            continue
        place = bisect_left(room, (size, -1))
        if place == len(room):
            bins.append([row])
            insort(room, (length - size, len(bins) - 1))
        else:
            free, number = room.pop(place)
            bins[number].append(row)
            insort(room, (free - size, number))
    return bins
