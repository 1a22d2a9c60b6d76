"""``Images``: the readable images of a source, wherever their pixels lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unmask.data.order import some_of
from unmask.errors import UserError

STATISTICS_OF = 2048  # images that mean and standard deviation are taken over, a fixed random choice
FULL_RANGE = {8: 255.0, 16: 65535.0, 32: 1.0}
Sizes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def sizes_of(sizes: Iterable[tuple[int, int]]) -> Sizes:
    """The smallest, median and largest (height, width), by area."""
    ordered = sorted(sizes, key=lambda s: (s[0] * s[1], s))
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


@dataclass
class Rows:
    """Some rows of an array, taken only when they are asked for."""

    array: Any
    rows: np.ndarray

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self.array[self.rows[index]]


@dataclass
class Images:
    """The readable images of a source, in its order.

    rows: int64 ``[n]``, the row of each in the source. sizes: int64 ``[n, 2]``, stored (height, width).
    ``read(i)`` gives image i as ``[H, W, C]``, and the number of the image that it is: another than i only where
    images are decoded as they are read and i turned out unreadable.
    """

    rows: np.ndarray
    sizes: np.ndarray
    channels: int
    depth: int
    originals: np.ndarray  # int64 [n, 2], (height, width) before the shorter side was limited
    skipped: list[dict[str, str]]
    read: Callable[[int], tuple[np.ndarray, int]]
    together: np.ndarray | Rows | None = None  # [n, H, W, C] where all have one size and lie in the cache
    parallel: bool = False  # reading costs decoding: worth several threads
    _statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def full_range(self) -> float:
        """The value of white: 255, 65535, or 1 for floating-point data."""
        return FULL_RANGE[self.depth]

    @property
    def original_sizes(self) -> Sizes:
        """The smallest, median and largest (height, width) of the images as they came."""
        return sizes_of([(int(h), int(w)) for h, w in self.originals])

    @property
    def one_size(self) -> tuple[int, int] | None:
        """(height, width) where all images have one size."""
        first = self.sizes[0]
        return (int(first[0]), int(first[1])) if (self.sizes == first).all() else None

    def part(self, rows: np.ndarray, uri: str) -> Images:
        """The readable ones among these rows of the source, numbered anew by their place in ``rows``."""
        place = {int(row): i for i, row in enumerate(self.rows)}
        pairs = [(number, place[int(row)]) for number, row in enumerate(rows) if int(row) in place]
        if not pairs:
            raise UserError(f"none of the {len(rows)} chosen files of {uri} is a readable image")
        mine = np.array([i for _, i in pairs])

        def read(i: int) -> tuple[np.ndarray, int]:
            return self.read(int(mine[i]))[0], i

        sizes = self.sizes[mine]
        return Images(
            np.array([number for number, _ in pairs]),
            sizes,
            self.channels,
            self.depth,
            self.originals[mine],
            self.skipped,
            read,
            None if self.together is None else Rows(self.together, mine),
            self.parallel,
        )

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, in units of the full range, from at most
        ``STATISTICS_OF`` images."""
        if self._statistics is None:
            n = len(self)
            chosen = some_of(n, STATISTICS_OF)
            total = np.zeros((3, self.channels))
            for i in chosen:
                pixels = self.read(int(i))[0].reshape(-1, self.channels).astype(np.float64) / self.full_range
                total += (np.full(self.channels, len(pixels)), pixels.sum(axis=0), (pixels**2).sum(axis=0))
            mean = total[1] / total[0]
            std = np.sqrt(np.maximum(total[2] / total[0] - mean**2, 0))
            # A constant channel has no scale; 1 leaves it at zero.
            std[std < 1e-6 * np.maximum(np.abs(mean), 1e-6)] = 1.0
            self._statistics = tuple(map(float, mean)), tuple(map(float, std))
        return self._statistics
