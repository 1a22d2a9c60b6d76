"""The alphabet of ESM's models: 33 tokens, and how letters become them. Rao et al. 2021; facebookresearch/esm (MIT)."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from unmask.data.alignments import Alignment
from unmask.errors import UserError

VOCABULARY = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
CLS, PAD, EOS, UNK, GAP, MASK = 0, 1, 2, 3, 30, 32
FIRST_AMINO, LAST_AMINO = 4, 23  # the twenty standard amino acids, L ... C
AMINO = "LAGVSERTIDPKQNFYMHWC"  # in the order of their tokens
IDS = {token: number for number, token in enumerate(VOCABULARY)}
_TOKEN = re.compile(r"<[^<>\s]+>|.")

TABLE = np.full(256, UNK, dtype=np.int64)  # ASCII -> token
for _number, _token in enumerate(VOCABULARY):
    if len(_token) == 1:
        TABLE[ord(_token)] = _number


def tokens_of_text(text: str) -> list[int]:
    """A row as tokens, bracketed names counting as one each ("AC<mask>E"); without ``<cls>``."""
    return [IDS.get(token, UNK) for token in _TOKEN.findall(text)]


def tokens_of_letters(letters: np.ndarray) -> Tensor:
    """uint8 ``[..., L]`` (ASCII) -> int64 ``[..., L + 1]``, ``<cls>`` in front."""
    ids = TABLE[letters]
    front = np.full((*ids.shape[:-1], 1), CLS, dtype=np.int64)
    return torch.from_numpy(np.concatenate((front, ids), axis=-1))


def tokens_of(alignment: Alignment) -> Tensor:
    """int64 ``[1, R, L + 1]``."""
    return tokens_of_letters(alignment.letters)[None]


def padded(tables: list[Tensor]) -> Tensor:
    """Tables ``[R_i, C_i]`` as one batch ``[B, R, C]``, ``<pad>`` at the lower right."""
    rows, columns = max(t.shape[0] for t in tables), max(t.shape[1] for t in tables)
    out = torch.full((len(tables), rows, columns), PAD, dtype=torch.int64)
    for place, table in zip(out, tables, strict=True):
        place[: table.shape[0], : table.shape[1]] = table
    return out


def tokens_of_batch(alignments: list[list[str]]) -> Tensor:
    """Several alignments, each a list of rows as text (pre-masked text is fine), as ``[B, R, C]``. Raises ``UserError`` where the
    rows of one are not equally long in tokens."""
    tables = []
    for rows in alignments:
        tokens = [tokens_of_text(row) for row in rows]
        for number, row in enumerate(tokens):
            if len(row) != len(tokens[0]):
                raise UserError(
                    f"row {number + 1} has {len(row)} tokens where row 1 has {len(tokens[0])}: align it first"
                )
        tables.append(torch.tensor([[CLS, *row] for row in tokens], dtype=torch.int64))
    return padded(tables)


def text_of(tokens: Tensor) -> str:
    """One row of tokens as text, without ``<cls>`` and padding; a hidden letter is "_"."""
    return "".join(
        "_" if t == MASK else VOCABULARY[t] if len(VOCABULARY[t]) == 1 else "?"
        for t in tokens.tolist()
        if t not in (CLS, PAD)
    )
