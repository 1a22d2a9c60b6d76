"""From two alignments to tables of whole species that can be paired: checks, packing, shuffling, known pairs, truth."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unmask.data.alignments import Alignment, read_text, rows_by_species
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.proteins.alphabet import tokens_of_letters
from unmask.systems.proteins.couplings import states_of
from unmask.systems.proteins.diffpalm.problem import PairList, Problem

GAP_ROW = -1


@dataclass
class Table:
    """Some whole species of both alignments. left, right: rows of the files (``GAP_ROW``: a row of gaps), grouped by species; the
    left ones shuffled. problem: what is free and fixed. truth ``[D]``: the left place of each right place, -1 unknown; None where
    nothing is known."""

    species: list[str]
    left: np.ndarray
    right: np.ndarray
    problem: Problem
    truth: np.ndarray | None = None

    def letters(self, side: Alignment, rows: np.ndarray) -> np.ndarray:
        out = side.letters[np.maximum(rows, 0)].copy()
        out[rows == GAP_ROW] = ord("-")
        return out

    def tokens(self, left: Alignment, right: Alignment) -> tuple[Tensor, Tensor]:
        """``[D, L1 + 1]`` and ``[D, L2 + 1]``."""
        return tokens_of_letters(self.letters(left, self.left)), tokens_of_letters(self.letters(right, self.right))

    def states(self, left: Alignment, right: Alignment) -> tuple[Tensor, Tensor]:
        return states_of(self.letters(left, self.left)), states_of(self.letters(right, self.right))


def matched_species(
    left: Alignment, right: Alignment, *, rule: str = "last_field", pad: Literal["refuse", "gaps"] = "refuse"
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rows of each species on both sides, in one order and equal in number. pad="gaps" fills the shorter side with rows of gaps.

    Raises ``UserError``: a species in one file only, or different numbers of rows.
    """
    ours, theirs = rows_by_species(left, rule), rows_by_species(right, rule)
    for _name, side, other, source, there in (
        ("only", ours, theirs, left.source, right.source),
        ("only", theirs, ours, right.source, left.source),
    ):
        alone = [s for s in side if s not in other]
        if alone:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            raise UserError(
                f"species {', '.join(alone[:3])}{more} of {source} {'is' if len(alone) == 1 else 'are'} not in {there}: leave "
                "them out, or say where headers name the species with species_from="
            )
    uneven = [s for s in ours if len(ours[s]) != len(theirs[s])]
    if uneven and pad == "refuse":
        first = uneven[0]
        raise UserError(
            f"species {first} has {len(ours[first])} rows in {left.source} and {len(theirs[first])} in {right.source} "
            f"({len(uneven)} such species): pad=gaps fills the shorter side with rows of gaps"
        )

    def filled(rows: np.ndarray, size: int) -> np.ndarray:
        return np.concatenate((rows, np.full(size - len(rows), GAP_ROW, dtype=np.int64)))

    sizes = {s: max(len(ours[s]), len(theirs[s])) for s in ours}
    return {s: filled(ours[s], sizes[s]) for s in ours}, {s: filled(theirs[s], sizes[s]) for s in ours}


def draw_species(
    sizes: Sequence[int], wanted: int, draw: Draw, *, largest: int | None = None, name: str = "species"
) -> list[int]:
    """Species of 2 ... ``largest`` rows in random order until the total is within 10 % of ``wanted`` rows (the authors' data set
    builder); species that would lead beyond are passed over."""
    order = draw.uniform(name, (1, max(len(sizes), 1)))[0].argsort(stable=True).tolist()
    taken: list[int] = []
    total = 0
    for number in order[: len(sizes)]:
        size = sizes[number]
        if size < 2 or (largest is not None and size > largest) or total + size > 1.1 * wanted:
            continue
        taken.append(number)
        total += size
        if total >= 0.9 * wanted:
            break
    return taken


def packed(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Species in order, packed into tables of at most ``most`` rows (a larger species alone)."""
    tables: list[list[int]] = []
    total = 0
    for number, size in enumerate(sizes):
        if not tables or total + size > most:
            tables.append([])
            total = 0
        tables[-1].append(number)
        total += size
    return tables


def make_table(
    species: Sequence[str],
    left: dict[str, np.ndarray],
    right: dict[str, np.ndarray],
    draw: Draw,
    *,
    name: str,
    partner_of: dict[int, int] | None = None,
    fixed: dict[int, int] | None = None,
    keep_singles: bool = False,
) -> Table:
    """Left rows are shuffled inside their species, so that nothing is known by the order of the file. partner_of, fixed: the right
    row of a left row (of the files)."""
    lefts, rights, sizes, inner = [], [], [], []
    for number, one in enumerate(species):
        rows, others = left[one], right[one]
        order = draw.uniform(f"{name}.shuffle_{number}", (1, len(rows)))[0].argsort(stable=True).numpy()
        rows = rows[order]
        pairs: PairList = []
        for place, row in enumerate(rows):
            if fixed and int(row) in fixed:
                found = np.flatnonzero(others == fixed[int(row)])
                if len(found):
                    pairs.append((place, int(found[0])))
        lefts.append(rows)
        rights.append(others)
        sizes.append(len(rows))
        inner.append(pairs)
    all_left, all_right = np.concatenate(lefts), np.concatenate(rights)
    truth = None
    if partner_of is not None:
        place_of_right_row = {int(row): q for q, row in enumerate(all_right) if row != GAP_ROW}
        truth = np.full(len(all_right), -1, dtype=np.int64)
        for p, row in enumerate(all_left):
            q = place_of_right_row.get(partner_of.get(int(row), -2))
            if q is not None:
                truth[q] = p
    return Table(list(species), all_left, all_right, Problem(sizes, None if keep_singles else inner), truth)


# --- what a user knows ------------------------------------------------------------------------------------------


def partners(left: Alignment, right: Alignment, truth: str) -> dict[int, int] | None:
    """The right row of each left row: "rows": the files are in the same order; "headers": equal headers are partners; "auto":
    headers where every one of them is found once on either side; "none". Raises ``UserError``."""
    if truth == "none":
        return None
    if truth == "rows":
        if len(left) != len(right):
            raise UserError(
                f"truth=rows needs equally many rows: {left.source} has {len(left)}, {right.source} {len(right)}"
            )
        return {i: i for i in range(len(left))}
    unique = len(set(left.names)) == len(left) and len(set(right.names)) == len(right)
    if unique and set(left.names) == set(right.names):
        where = {name: row for row, name in enumerate(right.names)}
        return {row: where[name] for row, name in enumerate(left.names)}
    if truth == "headers":
        raise UserError(
            f"truth=headers needs the same headers, each once, in {left.source} and {right.source}: use truth=rows or none"
        )
    return None


_A_CSV = "a CSV of pairs (columns left and right: headers)"


def named_pairs(path: str, left: Alignment, right: Alignment, what: str) -> dict[int, int]:
    """Rows of pairs that a CSV names by header in its columns left and right. Raises ``UserError``."""
    if not path:
        return {}
    table = list(csv.DictReader(io.StringIO(read_text(Path(path), _A_CSV))))
    if not table or not {"left", "right"} <= set(table[0]):
        raise UserError(f"{path}: {what} pairs are a CSV with the columns left and right, headers of the two files")
    ours, theirs = _by_header(left), _by_header(right)
    out: dict[int, int] = {}
    for number, row in enumerate(table):
        ends = []
        for key, known, source in (("left", ours, left.source), ("right", theirs, right.source)):
            name = (row[key] or "").strip()
            if name not in known:
                raise UserError(f"{path}, line {number + 2}: no header {name!r} in {source}")
            ends.append(known[name])
        if ends[0] in out or ends[1] in out.values():
            raise UserError(
                f"{path}, line {number + 2}: {row['left']} or {row['right']} has a partner already: pairs are one to one"
            )
        out[ends[0]] = ends[1]
    return out


def _by_header(side: Alignment) -> dict[str, int]:
    out: dict[str, int] = {}
    for row, name in enumerate(side.names):
        out.setdefault(name, row)
        out.setdefault(name.split()[0] if name.split() else name, row)
    return out


def check_same_species(pairs: dict[int, int], left: Iterable[str], right: Iterable[str], what: str) -> None:
    """Raises ``UserError`` where a pair joins two species."""
    ours, theirs = list(left), list(right)
    for p, q in pairs.items():
        if ours[p] != theirs[q]:
            raise UserError(f"a {what} pair joins species {ours[p]} and {theirs[q]}: pairs are made inside species")


def joined_tokens(left: np.ndarray, right: np.ndarray) -> Tensor:
    """Letters of known pairs as one row each, ``[Dp, L1 + L2 + 1]``."""
    return torch.cat((tokens_of_letters(left), tokens_of_letters(right)[:, 1:]), dim=1)


def block_matrices(tables: Sequence[Any]) -> np.ndarray:
    """Square matrices along the diagonal of one."""
    size = sum(len(t) for t in tables)
    out = np.zeros((size, size), dtype=np.float32)
    start = 0
    for table in tables:
        out[start : start + len(table), start : start + len(table)] = table
        start += len(table)
    return out
