"""``Mapped``: training batches of anything that can be fetched by number. A kind of data says how many samples there are, how
some of them are read, and what becomes of them on the device; their order is the one that images have.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unmask.contracts import Batch, DataFacts
from unmask.data.order import shuffled, some_of
from unmask.data.prefetch import ahead
from unmask.draw import Draw
from unmask.errors import UserError


class Mapped:
    """A :class:`unmask.contracts.TrainingBatches` over samples 0 ... count - 1.

    A subclass sets ``facts`` and overrides ``fetch``, and ``transform`` where a batch is not ready as it is fetched. what: the
    samples' name in messages. Raises ``UserError`` for a batch larger than the data.
    """

    facts: DataFacts
    what = "samples"
    waiting = 4  # batches that wait, read ahead

    def __init__(self, count: int, batch_size: int, seed: int = 0, *, uri: str = ""):
        self.count, self.batch_size, self.seed = int(count), int(batch_size), int(seed)
        self.skipped: list[dict[str, str]] = []
        if self.batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        if self.batch_size > self.count:
            where = f" of {uri}" if uri else ""
            raise UserError(
                f"batch_size={batch_size} is more than the {count} {self.what}{where}: use --batch-size {count}"
            )

    # --- what a kind of data says ---
    def fetch(self, indices: np.ndarray) -> Batch:
        """The samples of these numbers (int64 ``[B]``), on the CPU."""
        raise NotImplementedError

    def transform(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> Batch:
        """What a model sees, on the batch's device. draw: needed for training."""
        return batch

    # --- order ---
    @property
    def steps_per_epoch(self) -> int | None:
        """Whole batches in an epoch."""
        return max(self.count // self.batch_size, 1)

    @functools.lru_cache(maxsize=2)  # noqa: B019  (two epochs of one object)
    def order(self, epoch: int) -> np.ndarray:
        """int64: the numbers of an epoch's samples, in order; a pure function of (seed, epoch, count)."""
        return shuffled(self.count, seed=(self.seed << 24) ^ epoch)

    def indices(self, step: int) -> np.ndarray:
        """int64 ``[batch_size]``: the samples of an optimiser step. What does not fill a batch is left out of an epoch."""
        epoch, place = divmod(step, self.steps_per_epoch or 1)
        return self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def iterate(
        self,
        start_step: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> Iterator[Batch]:
        """This process's raw micro-batches, in order, without end: ``accumulate`` of them a step, read ahead by a thread.

        A global batch is cut into ``accumulate`` slices, each of them into one slice a process, all contiguous.
        """
        share = self.batch_size // (world * accumulate)
        if share * world * accumulate != self.batch_size:
            raise UserError(
                f"batch_size={self.batch_size} cannot be shared by {world} processes x {accumulate} accumulated batches: "
                f"use a multiple of {world * accumulate}"
            )
        return ahead(self._in_order(start_step, share, rank, world, accumulate), depth=self.waiting)

    def _in_order(self, step: int, share: int, rank: int, world: int, accumulate: int) -> Iterator[Batch]:
        while True:
            indices = self.indices(step)
            for micro in range(accumulate):
                first = (micro * world + rank) * share
                yield self.fetch(indices[first : first + share])
            step += 1

    def samples(self, n: int) -> Batch:
        """``n`` samples, a fixed random choice, as evaluation sees them."""
        return self.transform(self.fetch(some_of(self.count, min(n, self.count))), train=False)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position of data at hand is the step alone."""
        return {}
