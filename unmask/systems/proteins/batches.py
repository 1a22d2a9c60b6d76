"""Training batches of alignments: each sample is a table of rows chosen anew at every step.

data = AlignmentSettings(uri="family.fasta", rows=16)
batches = AlignmentBatches(data, batch_size=4, seed=0)         # {"tokens": int64 [B, R, C]}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from unmask.config import Config, Field
from unmask.contracts import Batch, DataFacts
from unmask.data.alignments import (
    Alignment,
    alignment_files,
    hold_out,
    identity,
    joined,
    read_alignment,
    rows_by_species,
)
from unmask.data.mapped import Mapped
from unmask.data.order import some_of
from unmask.draw import Draw, Seeded
from unmask.errors import UserError
from unmask.systems.proteins.alphabet import padded, tokens_of_letters

FEW = 16  # rows: from fewer a network learns little of a family


class AlignmentSettings(Config):
    """Which alignments, which rows of them, and what is kept back for the test."""

    uri: str = Field(
        "", description="an alignment (FASTA, a3m, Stockholm, also .gz), or a folder of them, one a family"
    )
    partner: str = Field("", description="a second alignment whose row i is the partner of row i: rows are joined")
    split: Literal["train", "test", "all"] = Field("train", description="rows to learn from, rows held out, or all")
    limit: int | None = Field(None, ge=1, description="use only so many of the split's rows, a fixed random choice")
    rows: int = Field(64, ge=1, description="most rows of a table")
    tokens: int = Field(2**14, ge=2, description="most tokens of a table: rows x columns")
    depth: Literal["full", "log_uniform"] = Field(
        "full", description="rows of a table: always the most, or drawn log-uniformly"
    )
    first: Literal["each", "query"] = Field(
        "each", description="the first row of a table: every row in its turn, or always the file's first (the query)"
    )
    choice: Literal["random", "nearest", "species"] = Field(
        "random", description="the other rows: at random, those most like the first, or whole species"
    )
    per_species: int = Field(5, ge=1, description="most rows of one species where species are taken whole")
    hold_out: Literal["auto", "species", "rows", "none"] = Field(
        "auto", description="what is kept for the test; auto: species where the headers name them, else rows"
    )
    species_from: str = Field(
        "last_field", description="where a header names the species: last_field, field:N, uniprot, a regex"
    )
    test_species: int | None = Field(
        None, ge=1, description="species kept for the test; open: 60, or a tenth where there are few"
    )
    max_identity: float = Field(0.65, gt=0, le=1, description="rows this like a test row, or more, are not learnt from")
    unknown: Literal["refuse", "ok"] = Field(
        "refuse", description='letters outside the alphabet; "ok" reads them as <unk>'
    )


@dataclass
class Family:
    """One alignment (or two joined), and which of its rows are learnt from and tested on."""

    whole: Alignment
    train: np.ndarray
    test: np.ndarray
    species: list[str] | None
    left: int | None = None  # columns of the left alignment, where two were joined

    def part(self, split: str) -> np.ndarray:
        return {"train": self.train, "test": self.test, "all": np.arange(len(self.whole))}[split]


def families(data: AlignmentSettings) -> list[Family]:
    """Every alignment behind the settings, split. Raises ``UserError`` for whatever does not fit."""
    if not data.uri:
        raise UserError("no alignment is named: give --data family.fasta (FASTA, a3m, Stockholm)")
    return _families(data.model_copy(update={"split": "all", "limit": None, "rows": 1, "tokens": 2}).model_dump_json())


@lru_cache(maxsize=4)  # a training, its measure and its baselines ask for the same files
def _families(settings: str) -> list[Family]:
    data = AlignmentSettings.model_validate_json(settings)
    files = alignment_files(data.uri)
    if data.partner and len(files) > 1:
        raise UserError(f"data.partner={data.partner} belongs to one alignment: {data.uri} holds {len(files)}")
    found = []
    for file in files:
        whole = read_alignment(file, unknown=data.unknown)
        left = None
        if data.partner:
            left, whole = whole.columns, joined(whole, read_alignment(data.partner, unknown=data.unknown))
        found.append(_split(whole, data, left))
    return found


def _split(whole: Alignment, data: AlignmentSettings, left: int | None) -> Family:
    everything = np.arange(len(whole))
    groups = _species(whole, data)
    species = None if groups is None else whole.species(data.species_from)
    if data.hold_out == "none":
        return Family(whole, everything, everything[:0], species, left)
    if groups is None or data.hold_out == "rows":
        groups = {str(row): np.array([row]) for row in everything[1:]} if len(whole) > 1 else {"0": everything}
    several = sum(len(rows) >= 2 for rows in groups.values()) or len(groups)
    test = data.test_species or max(min(60, several // 10), 1)
    if len(whole) < FEW and data.test_species is None:  # too small to give anything away
        return Family(whole, everything, everything, species, left)
    train, tested = hold_out(whole, groups, test=test, max_identity=data.max_identity)
    return Family(whole, train, tested, species, left)


def _species(whole: Alignment, data: AlignmentSettings) -> dict[str, np.ndarray] | None:
    """Rows by species; None where the headers name none and it was not asked for. What stands behind the last "_" is taken for
    species only if rows share it."""
    try:
        groups = rows_by_species(whole, data.species_from)
    except UserError:
        if data.hold_out == "species" or data.choice == "species":
            raise
        return None
    shared = sum(len(rows) > 1 for rows in groups.values())
    return (
        groups if (shared >= 2 and len(groups) >= 4) or data.hold_out == "species" or data.choice == "species" else None
    )


class AlignmentBatches(Mapped):
    """Tables of rows. One family: sample i begins with row i; several: sample i is a family with its query first.

    ``facts.extra``: ``columns`` (of the widest alignment), ``left`` (of the left one), ``rows`` (learnt from), ``tested``.
    """

    what = "rows"

    def __init__(self, data: AlignmentSettings, batch_size: int, seed: int = 0, *, cut: np.ndarray | None = None):
        self.settings, self.families = data, families(data)
        self.parts = [family.part(data.split) for family in self.families]
        if data.limit is not None:
            self.parts = [part[some_of(len(part), data.limit)] for part in self.parts]
        for family, part in zip(self.families, self.parts, strict=True):
            if not len(part):
                raise UserError(
                    f"{family.whole.source} has no rows in the split {data.split}: use data.hold_out=species or rows"
                )
        self.tables = [
            (f.whole if cut is None else f.whole.cut(cut)).select(p)
            for f, p in zip(self.families, self.parts, strict=True)
        ]
        self.single = len(self.families) == 1
        super().__init__(
            len(self.tables[0]) if self.single and data.first == "each" else max(len(self.families), batch_size),
            batch_size,
            seed,
            uri=data.uri,
        )
        first = self.families[0]
        self.facts = DataFacts(
            uri=data.uri,
            count=self.count,
            columns=("tokens",),
            extra={
                "columns": max(t.columns for t in self.tables),
                "left": first.left,
                "whole": first.whole.columns,
                "rows": sum(len(t) for t in self.tables),
                "tested": sum(len(f.test) for f in self.families),
                "families": len(self.families),
            },
        )

    def fetch(self, indices: np.ndarray) -> Batch:
        return {"index": torch.from_numpy(np.asarray(indices, dtype=np.int64).copy())}

    def transform(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> dict[str, Any]:
        """``tokens`` int64 ``[B, R, C]`` on the batch's device, ``left``: columns of the left alignment (0: none). The rows of a
        table are asked of ``draw`` (fixed ones where there is none)."""
        index = batch["index"]
        draw = draw if draw is not None else Seeded(0)
        numbers = index.tolist()
        which = [0 if self.single else i % len(self.tables) for i in numbers]
        noise = draw.uniform("rows", (len(numbers), 2, max(len(self.tables[f]) for f in which))).numpy()
        share = (
            float(draw.uniform("depth", (1,), shared=True)) if self.settings.depth == "log_uniform" and train else 1.0
        )
        tables = []
        for number, family, uniform in zip(numbers, which, noise, strict=True):
            table = self.tables[family]
            start = number if self.single and self.settings.first == "each" else 0
            most = max(min(self.settings.rows, self.settings.tokens // (table.columns + 1), len(table)), 1)
            count = max(round(math.exp(share * math.log(most))), 1)
            tables.append(tokens_of_letters(table.letters[self.chosen(family, start, count, uniform[:, : len(table)])]))
        return {"tokens": padded(tables).to(index.device), "index": index}

    def chosen(self, family: int, first: int, count: int, uniform: np.ndarray) -> np.ndarray:
        """int64: ``first`` and up to ``count - 1`` others of a family's rows. uniform: ``[2, N]``."""
        table = self.tables[family]
        if self.settings.choice == "species":
            return self._whole_species(family, count, uniform)
        if self.settings.choice == "nearest":
            score = -identity(table.letters[first : first + 1], table.letters)[0] + 1e-6 * uniform[0]
        else:
            score = uniform[0].copy()
        score[first] = -np.inf
        return np.argsort(score, kind="stable")[:count]

    def _whole_species(self, family: int, count: int, uniform: np.ndarray) -> np.ndarray:
        """Species in a random order, at most ``per_species`` rows of each, until ``count`` rows are there."""
        groups = self._groups(family)
        order = np.argsort(uniform[0][[rows[0] for rows in groups]], kind="stable")
        taken: list[int] = []
        for number in order:
            rows = groups[number]
            rows = rows[np.argsort(uniform[1][rows], kind="stable")][: self.settings.per_species]
            if taken and len(taken) + len(rows) > count:
                break
            taken += rows.tolist()[:count]
        return np.array(taken, dtype=np.int64)

    @lru_cache(maxsize=4)  # noqa: B019  (a few families of one object)
    def _groups(self, family: int) -> list[np.ndarray]:
        return list(rows_by_species(self.tables[family], self.settings.species_from).values())
