"""Sequence-to-sequence denoising for encoder-decoder models (BART, T5): which spans are noise, and the two texts made of them.

Raffel et al. 2020 (arXiv:1910.10683), Lewis et al. 2020 (1910.13461). Builders only: they give what a model of another library is
trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class Denoising:
    """source: what the encoder reads. target: what is to be said. decoder_input: the target, one to the right."""

    source: list[int]
    target: list[int]
    decoder_input: list[int]


def noise_sizes(length: int, probability: float, mean: float) -> tuple[int, int]:
    """Noise tokens and noise spans of a text: round(length · p) within 1 ... length - 1, and at least one span."""
    if not 0 < probability < 1:
        raise UserError(f"probability={probability} must lie between 0 and 1")
    if length < 2:
        raise UserError(f"a text of {length} token has nothing to hide: it takes 2 or more")
    tokens = min(max(round(length * probability), 1), length - 1)
    spans = max(round(tokens / mean), 1)
    return tokens, min(spans, tokens, length - tokens)


def composition(total: int, parts: int, uniform: np.ndarray) -> np.ndarray:
    """``parts`` positive sizes of this sum, all ways alike: parts - 1 of the total - 1 gaps are cut. uniform: ``[total - 1]``."""
    cuts = np.sort(np.argsort(uniform[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))


def poisson_sizes(total: int, parts: int, uniform: np.ndarray) -> np.ndarray:
    """``parts`` positive sizes of this sum near Poisson draws of mean total / parts: what is too much is taken, one by one,
    from the largest, what is missing is given to the smallest. uniform: ``[parts]``."""
    from scipy.stats import poisson

    sizes = np.maximum(poisson.ppf(uniform[:parts], total / parts), 1).astype(int)
    while sizes.sum() > total:
        sizes[sizes.argmax()] -= 1
    while sizes.sum() < total:
        sizes[sizes.argmin()] += 1
    return sizes


def noise_places(length: int, probability: float, mean: float, draw: Draw, *, poisson: bool = False) -> np.ndarray:
    """bool ``[length]``: clean and noise in turn, clean first."""
    tokens, spans = noise_sizes(length, probability, mean)
    noise, clean = (draw.uniform(n, (1, length), device="cpu")[0].double().numpy() for n in ("noise", "clean"))
    sizes = poisson_sizes if poisson else composition
    pairs = zip(sizes(length - tokens, spans, clean), sizes(tokens, spans, noise), strict=True)
    return np.concatenate([np.repeat([False, True], [c, n]) for c, n in pairs])


def runs(places: np.ndarray) -> list[tuple[int, int, bool]]:
    """(start, stop, noise) of the stretches of equal value."""
    edges = np.flatnonzero(np.diff(places.astype(int))) + 1
    ends = [0, *edges.tolist(), len(places)]
    return [(a, b, bool(places[a])) for a, b in itertools.pairwise(ends) if b > a]


def bart(
    ids: Sequence[int],
    special: Sequence[bool],
    mask_token: int,
    start: int,
    draw: Draw,
    *,
    probability: float = 0.3,
    mean: float = 3.0,
) -> Denoising:
    """Each noise span becomes one mask token; the target is the whole text. special: places that are never hidden."""
    places = noise_places(len(ids), probability, mean, draw, poisson=True) & ~np.asarray(special, bool)
    source: list[int] = []
    for a, b, noise in runs(places):
        source += [mask_token] if noise else list(ids[a:b])
    return Denoising(source, list(ids), [start, *ids[:-1]])


def t5(
    ids: Sequence[int],
    special: Sequence[bool],
    sentinels: Sequence[int],
    start: int,
    draw: Draw,
    *,
    probability: float = 0.15,
    mean: float = 3.0,
) -> Denoising:
    """Noise span i becomes sentinel i; the target is the complement, each span behind its sentinel, a last sentinel at the end.

    Raises ``UserError`` for fewer sentinels than spans.
    """
    places = noise_places(len(ids), probability, mean, draw) & ~np.asarray(special, bool)
    source: list[int] = []
    target: list[int] = []
    number = 0
    for a, b, noise in runs(places):
        if not noise:
            source += ids[a:b]
            continue
        if number + 1 >= len(sentinels):
            raise UserError(
                f"{len(sentinels)} sentinels are too few for a text of {len(ids)} tokens: give more, or shorter texts"
            )
        source.append(sentinels[number])
        target += [sentinels[number], *ids[a:b]]
        number += 1
    target.append(sentinels[number])
    return Denoising(source, target, [start, *target[:-1]])


def collated(examples: Sequence[Denoising], pad: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask``, ``decoder_input_ids``, ``labels`` (padding -100), int64."""

    def filled(rows: list[list[int]], value: int) -> Tensor:
        out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
        for place, row in zip(out, rows, strict=True):
            place[: len(row)] = torch.tensor(row)
        return out

    source = filled([e.source for e in examples], pad)
    mask = filled([[1] * len(e.source) for e in examples], 0)
    return {
        "input_ids": source,
        "attention_mask": mask,
        "decoder_input_ids": filled([e.decoder_input for e in examples], pad),
        "labels": filled([e.target for e in examples], IGNORED),
    }
