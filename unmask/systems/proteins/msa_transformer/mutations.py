"""Scores of mutations: log-odds of the mutant against the wild type in the query's context of relatives. Meier et al. 2021."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.systems.proteins.alphabet import AMINO, IDS, MASK
from unmask.systems.proteins.msa_transformer.network import MSANetwork


@torch.no_grad()
def masked_marginals(
    network: MSANetwork, tokens: Tensor, *, batch_size: int = 4, tell: Callable[[str], None] | None = None
) -> Tensor:
    """``[C, 33]``: log-probabilities of each place of row 0 with that one token hidden. tokens ``[1, R, C]``; ``batch_size``
    tables, each with another place hidden, are computed at once."""
    columns, rows = tokens.shape[2], []
    for start in range(0, columns, batch_size):
        places = torch.arange(start, min(start + batch_size, columns), device=tokens.device)
        tables = tokens.repeat(len(places), 1, 1)
        tables[torch.arange(len(places), device=tokens.device), 0, places] = MASK
        last = network(tables).last[torch.arange(len(places), device=tokens.device), 0, places]
        rows.append(network.letters(last).float().log_softmax(dim=-1))
        if tell is not None:
            tell(f"{int(places[-1]) + 1} of {columns} places")
    return torch.cat(rows)


@torch.no_grad()
def wild_type_marginals(network: MSANetwork, tokens: Tensor) -> Tensor:
    """``[C, 33]``: log-probabilities of row 0 from one pass with nothing hidden (faster, and the query is seen)."""
    return network.letters(network(tokens).last[0, 0]).float().log_softmax(dim=-1)


def mutation_score(table: Tensor, query: Tensor, columns: Tensor, mutants: Tensor) -> Tensor:
    """log p(mutant) - log p(wild type) of each mutation. table ``[C, 33]``, query ``[C]``, columns and mutants ``[M]`` (column 0 is
    ``<cls>``)."""
    wild = query[columns]
    return table[columns, mutants] - table[columns, wild]


def read_mutation(text: str, query: str) -> list[tuple[int, str]]:
    """ "A24G" (or several joined by ":" or ",") as places (from 0) and letters. Raises ``UserError`` where the wild type is another
    one, or the place is outside."""
    found = []
    for part in re.split(r"[:,;/+]", text.strip()):
        match = re.fullmatch(r"\s*([A-Za-z])(\d+)([A-Za-z])\s*", part)
        if not match:
            raise UserError(f"mutation {part!r} does not fit: write A24G (wild type, place from 1, mutant)")
        old, place, new = match[1].upper(), int(match[2]) - 1, match[3].upper()
        if not 0 <= place < len(query):
            raise UserError(f"mutation {part}: the query has the places 1 ... {len(query)}")
        if query[place] != old:
            raise UserError(f"mutation {part}: the query has {query[place]} at {place + 1}, not {old}")
        if new not in AMINO:
            raise UserError(f"mutation {part}: {new} is none of the amino acids {AMINO}")
        found.append((place, new))
    return found


def score_of(mutations: Iterable[tuple[int, str]], table: Tensor, query: Tensor) -> float:
    """The sum over several mutations of one variant."""
    pairs = list(mutations)
    columns = torch.tensor([place + 1 for place, _ in pairs])
    mutants = torch.tensor([IDS[letter] for _, letter in pairs])
    return float(mutation_score(table, query, columns, mutants).sum())


def every_substitution(table: Tensor, query: Tensor) -> Tensor:
    """``[L, 20]``: the score of each amino acid at each place, in the order of ``AMINO``; 0 for the wild type."""
    first = IDS[AMINO[0]]
    logs = table[1:, first : first + len(AMINO)]
    return logs - table[1:].gather(1, query[1:, None])
