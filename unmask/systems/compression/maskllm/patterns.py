"""N:M patterns: of every M weights in a row, N stay."""

from __future__ import annotations

import math
import re
from itertools import combinations

import torch
from torch import Tensor

from unmask.errors import UserError

MOST = 128  # candidates a group: the logits of more would outweigh the model


def read_pattern(text: str) -> tuple[int, int]:
    """ "2:4" -> (2, 4): two of four weights are kept. Raises ``UserError``."""
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
    if match is None:
        raise UserError(f"pattern={text} is no pattern: write KEPT:GROUP, for example 2:4")
    keep, group = int(match[1]), int(match[2])
    if not 1 <= keep < group:
        raise UserError(
            f"pattern={text} keeps {keep} of {group}: it takes at least 1 and fewer than the group, for example 2:4"
        )
    count = math.comb(group, keep)
    if count > MOST:
        raise UserError(
            f"pattern={text} has {count} candidates a group ({18 * count / group:.0f} bytes a weight while learning): "
            f"it takes a pattern of at most {MOST}, for example 2:4 or 4:8"
        )
    return keep, group


def candidates(keep: int, group: int) -> Tensor:
    """All masks of a group, ``[K, group]`` float32, kept positions in lexicographic order: 1100, 1010, 1001, 0110, 0101, 0011
    for 2:4 (MaskLLM section 3)."""
    out = torch.zeros(math.comb(group, keep), group)
    for row, kept in zip(out, combinations(range(group), keep), strict=True):
        row[list(kept)] = 1.0
    return out


def check_mask(mask: Tensor, keep: int, group: int, layer: str) -> None:
    """Raises ``UserError`` naming the first group of a ``[out, in]`` mask that does not keep ``keep``."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise UserError(f"the mask of {layer} has values besides 0 and 1: it takes a mask")
    kept = mask.reshape(-1, group).sum(dim=1)
    wrong = (kept != keep).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise UserError(f"group {first} of {layer} keeps {int(kept[first])} of {group}, the pattern keeps {keep}")


def smallest_removed(scores: Tensor, keep: int, group: int) -> Tensor:
    """The N:M mask ``[out, in]`` that removes the group - keep smallest ``scores [out, in]`` of every group; of equal ones the
    lower index goes first. Ranks come from comparing the columns of a group with one another: no sort, no loop over groups."""
    columns = scores.reshape(-1, group).unbind(1)
    kept = []
    for i, own in enumerate(columns):
        below = torch.zeros(own.shape, dtype=torch.int16, device=own.device)
        for j, other in enumerate(columns):
            if j != i:
                below += (other <= own) if j < i else (other < own)
        kept.append(below >= group - keep)
    return torch.stack(kept, dim=1).reshape(scores.shape).to(torch.float32)
