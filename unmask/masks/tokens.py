"""Which tokens of a text are hidden, and what stands in their place. Everything random comes in as uniforms ``[B, T]``.

words: int64 ``[B, T]``, which word a token is a piece of; below 0 for special tokens and padding, which are never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Unit = Literal["token", "word", "word_and_next", "span"]
MASKED, REPLACED, KEPT = 0, 1, 2


def tails(words: Tensor) -> Tensor:
    """bool: pieces that go on the word of the place before."""
    same = (words[:, 1:] == words[:, :-1]) & (words[:, 1:] >= 0)
    return torch.cat((torch.zeros_like(same[:, :1]), same), dim=1)


def chosen_tokens(
    uniform: Tensor,
    words: Tensor,
    probability: float,
    unit: Unit = "token",
    *,
    length: Tensor | None = None,
    mean: float = 3.8,
) -> tuple[Tensor, Tensor]:
    """Which places are chosen (bool), and for each place the one whose choice it follows (itself, its word's or its span's first).

    token: each by itself iff its uniform is below the probability. word: the first piece decides for the whole word.
    word_and_next: it decides for the second piece only (what the authors of structural objectives ran). span: spans of a geometric
    length of ``mean`` places, at most ten (Joshi et al. 2020, SpanBERT: p = 0.2, mean 3.8), started so often that the share of
    chosen places is ``probability``; ``length``: their uniforms. A span ends before a special token.
    """
    usable = words >= 0
    places = torch.arange(words.shape[1], device=words.device).expand_as(words)
    if unit == "token":
        return (uniform < probability) & usable, places
    if unit == "span":
        assert length is not None
        return _spans(uniform, length, usable, probability, mean, places)
    tail = tails(words)
    first = (uniform < probability) & usable & ~tail
    if unit == "word_and_next":
        origin = torch.where(tail & ~tail.roll(1, 1), places - 1, places)
    else:
        origin = torch.where(tail, -1, places).cummax(dim=1).values
    return first.gather(1, origin), origin


def _spans(
    uniform: Tensor, length: Tensor, usable: Tensor, probability: float, mean: float, places: Tensor, longest: int = 10
) -> tuple[Tensor, Tensor]:
    stop = _stopping(mean, longest)
    sizes = (1 + (torch.log1p(-length.double()) / math.log1p(-stop)).floor()).clamp(1, longest) if stop < 1 else 1.0
    start = usable & (uniform < -math.log1p(-probability) / mean)
    reach = torch.where(start, places + sizes, 0.0).cummax(dim=1).values
    origin = torch.where(start, places, -1).cummax(dim=1).values
    wall = torch.where(usable, -1, places).cummax(dim=1).values  # the last special token so far
    chosen = (places < reach) & (origin > wall) & usable
    return chosen, torch.where(chosen, origin, places)


def _stopping(mean: float, longest: int) -> float:
    """The chance that a geometric length ends after each place, so that lengths cut at ``longest`` have this mean."""
    if mean <= 1:
        return 1.0
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 - (1 - middle) ** longest) / middle > mean:
            low = middle
        else:
            high = middle
    return high


def actions(uniform: Tensor, split: Sequence[float]) -> Tensor:
    """int64: 0 masked, 1 replaced, 2 kept: the first whose cumulative share exceeds the uniform, in float64."""
    edges = torch.tensor(list(split), dtype=torch.float64, device=uniform.device).cumsum(0)
    return (uniform.double()[..., None] >= edges[:-1]).sum(dim=-1)


def corrupt(tokens: Tensor, chosen: Tensor, action: Tensor, random: Tensor, mask_token: int) -> Tensor:
    """The tokens with the chosen ones masked, replaced by ``random`` (ids ``[B, T]``) or kept."""
    instead = torch.where(action == MASKED, mask_token, torch.where(action == REPLACED, random, tokens))
    return torch.where(chosen, instead, tokens)
