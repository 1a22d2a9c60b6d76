"""Mutations as a user asks for them: every substitution, a few by name, or a column of a CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.data.alignments import read_text
from unmask.errors import UserError, nearest
from unmask.systems.proteins.msa_transformer.mutations import (
    every_substitution,
    masked_marginals,
    read_mutation,
    score_of,
    wild_type_marginals,
)
from unmask.systems.proteins.msa_transformer.network import MSANetwork
from unmask.systems.proteins.results import MutationScores


def scan(network: MSANetwork, tokens: Tensor, query: str, ask: Any) -> MutationScores:
    """tokens ``[1, R, C]``. ask: ``mutations``, ``column``, ``strategy`` and ``batch_size``. Raises ``UserError``."""
    rows, header = wanted(ask.mutations, ask.column)
    asked = [read_mutation(row[header.index(ask.column)] if header else row[0], query) for row in rows]
    if ask.strategy == "masked":
        table = masked_marginals(network, tokens, batch_size=ask.batch_size)
    else:
        table = wild_type_marginals(network, tokens)
    table, first = table.cpu(), tokens[0, 0].cpu()
    scores = [score_of(mutations, table, first) for mutations in asked]
    return MutationScores(every_substitution(table, first), query, ask.strategy, header or ["mutant"], rows, scores)


def wanted(mutations: str, column: str) -> tuple[list[list[str]], list[str]]:
    """The rows asked for, and the header of the CSV they came from (empty for words)."""
    if not mutations:
        return [], []
    if not Path(mutations).suffix and not Path(mutations).is_file():
        return [[word] for word in mutations.replace(";", ",").split(",") if word.strip()], []
    table = [
        row
        for row in csv.reader(
            io.StringIO(read_text(Path(mutations), "names such as A24G,K31E or a CSV with a column mutant"))
        )
        if row
    ]
    if not table:
        raise UserError(f"{mutations} is empty: it takes a CSV with a column {column}")
    header, rows = table[0], table[1:]
    if column not in header:
        raise UserError(f"{mutations} has no column {column!r}: {nearest(column, header)} (column=NAME names another)")
    place = header.index(column)
    for number, row in enumerate(rows):
        if len(row) <= place:
            raise UserError(f"{mutations}: line {number + 2} has {len(row)} fields, the header {len(header)}")
    return rows, header
