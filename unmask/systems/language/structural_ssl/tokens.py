"""Objectives of tokens: MLM, SLM, RTS and C-RTS as functions of a batch and named draws.

Di Liello et al. 2022, "Effective Pre-Training Objectives", arXiv:2210.13536.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from unmask import config as configs
from unmask.config import Field
from unmask.draw import Draw
from unmask.masks.tokens import Unit, actions, chosen_tokens, corrupt
from unmask.systems.language.heads import IGNORED
from unmask.systems.language.structural_ssl.clusters import substitutes

Objective = Literal["mlm", "slm", "rts", "crts", "electra"]


class MaskingConfig(configs.Config):
    """Which tokens are chosen and what becomes of them."""

    probability: float = Field(0.15, gt=0, lt=1, description="share of tokens chosen")
    unit: Literal["token", "word", "span"] = Field("token", description="tokens, whole words, or spans (SpanBERT)")
    official_tails: bool = Field(
        False, description="whole words as the authors ran them: only the second piece follows the first (none in crts)"
    )
    mean_span: float = Field(3.8, ge=1, le=10, description="mean length of spans")
    split: tuple[float, float, float] | None = Field(
        None, description="shares masked, replaced, kept; open: .8 .1 .1 for mlm and electra, 0 1 0 for slm"
    )
    exclude_special: bool = Field(False, description="no random token is a special one")
    exclude_original: bool = Field(False, description="no random token is the one it replaces")

    @model_validator(mode="after")
    def _a_whole(self) -> MaskingConfig:
        if self.split is not None and (min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6):
            raise ValueError(
                f"split={list(self.split)} sums to {sum(self.split):g}: shares masked, replaced, kept sum to 1"
            )
        return self

    def split_for(self, objective: str) -> tuple[float, float, float]:
        if self.split is not None:
            return self.split
        return (0.0, 1.0, 0.0) if objective == "slm" else (0.8, 0.1, 0.1)

    def units(self) -> Unit:
        return "word_and_next" if self.unit == "word" and self.official_tails else self.unit


def choose(words: Tensor, draw: Draw, config: MaskingConfig, objective: str) -> tuple[Tensor, Tensor]:
    """The chosen places (bool ``[B, T]``) and the place whose draws each of them follows."""
    select = draw.uniform("select", words.shape, device=words.device)
    length = draw.uniform("length", words.shape, device=words.device) if config.unit == "span" else None
    chosen, origin = chosen_tokens(
        select, words, config.probability, config.units(), length=length, mean=config.mean_span
    )
    if objective == "crts" and config.unit == "word" and config.official_tails:
        chosen = chosen & (origin == torch.arange(words.shape[1], device=words.device))
    return chosen, origin


def random_tokens(tokens: Tensor, draw: Draw, vocabulary: int, special: Iterable[int], config: MaskingConfig) -> Tensor:
    """Ids ``[B, T]``, uniform over the whole vocabulary (special ones and the original included, as the authors do it) or over what
    the options leave of it."""
    if not (config.exclude_special or config.exclude_original):
        return draw.integers("token", 0, vocabulary, tokens.shape, device=tokens.device)
    allowed = torch.arange(vocabulary, device=tokens.device)
    if config.exclude_special:
        usable = torch.ones(vocabulary, dtype=torch.bool, device=tokens.device)
        usable[torch.tensor(sorted(set(special)), dtype=torch.long, device=tokens.device)] = False
        allowed = allowed[usable]
    size = len(allowed) - config.exclude_original
    index = draw.integers("token", 0, size, tokens.shape, device=tokens.device)
    if config.exclude_original:
        rank = torch.searchsorted(allowed, tokens)
        known = allowed[rank.clamp(max=len(allowed) - 1)] == tokens
        index = index + (known & (index >= rank))
    return allowed[index]


def predicted_words(
    tokens: Tensor,
    words: Tensor,
    draw: Draw,
    config: MaskingConfig,
    split: Sequence[float],
    *,
    vocabulary: int,
    special: Iterable[int],
    mask_token: int,
) -> tuple[Tensor, Tensor]:
    """MLM and SLM: changed ids, and labels: the original at chosen places, -100 elsewhere."""
    chosen, origin = choose(words, draw, config, "mlm")
    uniform = draw.uniform("action", tokens.shape, device=tokens.device)
    if config.unit == "span":  # a span is masked, replaced or kept as one
        uniform = uniform.gather(1, origin)
    random = random_tokens(tokens, draw, vocabulary, special, config)
    changed = corrupt(tokens, chosen, actions(uniform, split), random, mask_token)
    return changed, torch.where(chosen, tokens, IGNORED)


def swapped_words(
    tokens: Tensor, words: Tensor, draw: Draw, config: MaskingConfig, *, vocabulary: int, special: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """RTS: changed ids, and labels: 1 at chosen places, 0 at all others."""
    chosen, _ = choose(words, draw, config, "rts")
    random = random_tokens(tokens, draw, vocabulary, special, config)
    return torch.where(chosen, random, tokens), chosen.long()


def swapped_by_clusters(
    tokens: Tensor,
    words: Tensor,
    draw: Draw,
    config: MaskingConfig,
    cluster_of: Tensor,
    probabilities: Tensor,
    *,
    special: Iterable[int],
) -> tuple[Tensor, Tensor]:
    """C-RTS: the same, substitutes drawn from clusters."""
    chosen, _ = choose(words, draw, config, "crts")
    cluster, member = (draw.uniform(name, tokens.shape, device=tokens.device) for name in ("cluster", "member"))
    found = substitutes(tokens.flatten(), cluster_of, probabilities, cluster.flatten(), member.flatten(), special)
    return torch.where(chosen, found.view_as(tokens), tokens), chosen.long()
