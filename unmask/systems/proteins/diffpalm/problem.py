"""Who can be paired with whom: species, fixed pairs, and how their small matrices become one large permutation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.systems.proteins.diffpalm.sinkhorn import inside

PairList = list[tuple[int, int]]


@dataclass
class Problem:
    """sizes: rows of each species, the same on both sides, in order. fixed: per species pairs (left, right), counted inside the
    species; None is not the same as none: then a species of one row keeps a free matrix of one entry.

    Raises ``UserError`` for pairs out of range or used twice.
    """

    sizes: list[int]
    fixed: list[PairList] | None = None
    free_left: list[list[int]] = field(init=False)  # global rows
    free_right: list[list[int]] = field(init=False)
    known: PairList = field(init=False)  # global, the implied ones included

    def __post_init__(self) -> None:
        if self.fixed is not None and len(self.fixed) != len(self.sizes):
            raise UserError(f"fixed pairs are given for {len(self.fixed)} species, there are {len(self.sizes)}")
        self.free_left, self.free_right, self.known = [], [], []
        start = 0
        for number, size in enumerate(self.sizes):
            pairs = list(self.fixed[number]) if self.fixed is not None else []
            _check(pairs, size, number)
            left = [i for i in range(size) if i not in {p for p, _ in pairs}]
            right = [i for i in range(size) if i not in {q for _, q in pairs}]
            if self.fixed is not None and len(left) == 1:  # what is left is a pair
                pairs.append((left.pop(), right.pop()))
            self.known += [(start + p, start + q) for p, q in pairs]
            self.free_left.append([start + i for i in left])
            self.free_right.append([start + i for i in right])
            start += size

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def free_sizes(self) -> list[int]:
        return [len(rows) for rows in self.free_left]

    @property
    def starts(self) -> list[int]:
        return [sum(self.sizes[:i]) for i in range(len(self.sizes))]

    def there(self) -> Tensor:
        """bool ``[S, m, m]``."""
        return inside(self.free_sizes)

    def places(self) -> tuple[Tensor, Tensor]:
        """int64 ``[S, m]`` each: the global left and right rows of the small matrices; ``rows`` where there is none."""
        size = max([*self.free_sizes, 1])

        def table(rows: list[list[int]]) -> Tensor:
            return torch.tensor([[*r, *[self.rows] * (size - len(r))] for r in rows], dtype=torch.int64)

        return table(self.free_left), table(self.free_right)

    def assemble(self, blocks: Tensor, *, known: bool = True) -> Tensor:
        """``[..., S, m, m]`` -> ``[..., D, D]``, left against right; fixed pairs are 1 (0 with ``known=False``)."""
        left, right = (t.to(blocks.device) for t in self.places())
        lead = blocks.shape[:-3]
        whole = blocks.new_zeros(*lead, self.rows + 1, self.rows + 1)
        flat = (left[:, :, None] * (self.rows + 1) + right[:, None, :]).flatten()
        whole = whole.flatten(-2).index_add(
            -1, flat, blocks.flatten(-3)
        )  # outside a species blocks are 0 and go beyond the last row
        whole = whole.unflatten(-1, (self.rows + 1, self.rows + 1))[..., : self.rows, : self.rows]
        if known and self.known:
            ones = torch.zeros(self.rows, self.rows, device=blocks.device, dtype=blocks.dtype)
            ones[[p for p, _ in self.known], [q for _, q in self.known]] = 1.0
            whole = whole + ones
        return whole

    def blocks_of(self, whole: Tensor) -> list[Tensor]:
        """The square of each species of ``[..., D, D]``."""
        return [whole[..., s : s + n, s : s + n] for s, n in zip(self.starts, self.sizes, strict=True)]

    def fixed_places(self) -> Tensor:
        """bool ``[D]``: right rows whose partner is fixed."""
        out = torch.zeros(self.rows, dtype=torch.bool)
        out[[q for _, q in self.known]] = True
        return out

    def with_fixed(self, pairs: Sequence[PairList]) -> Problem:
        """The same with more fixed pairs (per species)."""
        before = self.fixed or [[] for _ in self.sizes]
        return Problem(self.sizes, [sorted({*a, *b}) for a, b in zip(before, pairs, strict=True)])

    def inner(self, pairs: Iterable[tuple[int, int]]) -> list[PairList]:
        """Global pairs, counted inside their species."""
        out: list[PairList] = [[] for _ in self.sizes]
        for p, q in pairs:
            for number, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
                if start <= p < start + size:
                    out[number].append((p - start, q - start))
        return out


def _check(pairs: PairList, size: int, species: int) -> None:
    for p, q in pairs:
        if not (0 <= p < size and 0 <= q < size):
            raise UserError(f"fixed pair ({p}, {q}) is out of range: species {species + 1} has {size} rows")
    if len({p for p, _ in pairs}) < len(pairs) or len({q for _, q in pairs}) < len(pairs):
        raise UserError(f"fixed pairs of species {species + 1} use a row twice: each row has one partner")
