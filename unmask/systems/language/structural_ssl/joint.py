"""MSPP: a premise and k candidates in k + 1 slots of fixed length; which candidates belong to the premise's paragraph.

Di Liello et al. 2022, arXiv:2205.01228.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator

from unmask import config as configs
from unmask.config import Field
from unmask.data.text import Tokenizer
from unmask.systems.language.heads import JointKind
from unmask.systems.language.structural_ssl.structure import Row, Structure, check_structure, framed, padded, uniforms

TRIES = 16  # random starts that are too near a paragraph's end


class JointConfig(configs.Config):
    """The slots, and how candidates are found."""

    head: JointKind = Field("IE_k", description="what the classes are read from")
    k: int = Field(5, ge=1, description="candidates a row")
    slot: int = Field(64, ge=4, description="tokens a slot, special ones included")
    premise: tuple[int, int] = Field((1, 1), description="sentences of the premise: fewest, most")
    candidate: tuple[int, int] = Field((1, 2), description="sentences of a candidate: fewest, most")
    mode: Literal["following", "same"] = Field(
        "following", description="the positive stands behind the premise, or on either side"
    )
    hard: int = Field(2, ge=0, description="negatives from other paragraphs of the document")
    negatives: int = Field(4, ge=1, description="negatives in all, found for each premise")

    @model_validator(mode="after")
    def _ranges(self) -> JointConfig:
        for name in ("premise", "candidate"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name}={low},{high}: it takes fewest, most with 1 <= fewest <= most")
        return self


@dataclass(frozen=True)
class Group:
    """Sentence numbers of a premise and its candidates, label 1 for the same paragraph (and 0 for those standing before it)."""

    premise: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    kinds: tuple[str, ...]


class JointBuilder:
    """``groups(numbers)``; an epoch has ``count``: every paragraph that is long enough, once."""

    def __init__(self, structure: Structure, config: JointConfig, seed: int = 0, uri: str = "the text"):
        check_structure(structure, uri)
        self.structure, self.config, self.seed = structure, config, seed
        wanted = config.premise[0] + config.candidate[0]
        self.anchors = np.flatnonzero(structure.sizes >= wanted)
        self.count = len(self.anchors)
        if not self.count:
            check_structure(structure, uri)
            from unmask.errors import UserError

            raise UserError(f"no paragraph of {uri} has {wanted} sentences: lower joint.premise or joint.candidate")

    def groups(self, numbers: np.ndarray) -> list[Group]:
        wanted = 32 + 4 * self.config.hard + 3 * TRIES * self.config.negatives
        draws = uniforms(self.seed, "group", np.asarray(numbers), wanted)
        return [self._group(int(n), iter(u.tolist())) for n, u in zip(numbers, draws, strict=True)]

    def _group(self, number: int, u: Any) -> Group:
        s, c = self.structure, self.config
        anchor = int(self.anchors[number % self.count])
        inside = s.sentences_of(anchor)
        document = s.document_of(anchor)
        a = min(_between(c.premise, next(u)), len(inside) - c.candidate[0])
        b = min(_between(c.candidate, next(u)), len(inside) - a)
        behind = c.mode == "following" or next(u) < 0.5
        first, second = (a, b) if behind else (b, a)
        low = int(next(u) * (len(inside) - a - b + 1))
        high = low + first + int(next(u) * (len(inside) - low - first - second + 1))
        start, other = (low, high) if behind else (high, low)
        premise, positive = tuple(inside[start : start + a]), tuple(inside[other : other + b])
        negatives: list[tuple[str, tuple[int, ...]]] = []
        if c.mode == "following":
            size = _between(c.candidate, next(u))
            if start >= size:
                at = int(next(u) * (start - size + 1))
                negatives.append(("super-hard", tuple(inside[at : at + size])))
        negatives += [("hard", piece) for piece in self._hard(document, anchor, u)]
        negatives = negatives[: c.negatives]
        while len(negatives) < c.negatives:
            negatives.append(("easy", self._easy(document, u)))
        found = [("positive", positive), *negatives]
        order = np.argsort([next(u) for _ in found], kind="stable")[: c.k]
        chosen = [found[i] for i in order]
        return Group(
            premise,
            tuple(t for _, t in chosen),
            tuple(int(k == "positive") for k, _ in chosen),
            tuple(k for k, _ in chosen),
        )

    def _hard(self, document: int, anchor: int, u: Any) -> list[tuple[int, ...]]:
        c = self.config
        others = [p for p in self.structure.paragraphs_of(document) if p != anchor]
        if not others or not c.hard:
            return []
        picked = [others.pop(int(next(u) * len(others))) for _ in range(min(2 * c.hard, len(others)))]
        size = _between(c.candidate, next(u))
        pieces = []
        for p in picked:
            inside = self.structure.sentences_of(p)
            pieces += [tuple(inside[i : i + size]) for i in range(0, len(inside), size)]
        return [pieces.pop(int(next(u) * len(pieces))) for _ in range(min(c.hard, len(pieces)))]

    def _easy(self, document: int, u: Any) -> tuple[int, ...]:
        s = self.structure
        for _ in range(TRIES):
            other = int(next(u) * (len(s.names) - 1))
            paragraphs = s.paragraphs_of(other + (other >= document))
            inside = s.sentences_of(paragraphs[int(next(u) * len(paragraphs))])
            size = _between(self.config.candidate, x := next(u))
            if len(inside) >= size:
                # which start: the rest of the same uniform
                share = (x * (self.config.candidate[1] - self.config.candidate[0] + 1)) % 1
                at = int(share * (len(inside) - size + 1))
                return tuple(inside[at : at + size])
        return tuple(inside)


def _between(ends: tuple[int, int], uniform: float) -> int:
    return ends[0] + int(uniform * (ends[1] - ends[0] + 1))


def slots(
    texts: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], tokenizer: Tokenizer, k: int, slot: int
) -> dict[str, Any]:
    """A batch of rows of (k + 1) slots, each ``<s> text </s>`` and padding; types are slot numbers. texts: for each row the
    premise and at most k candidates; slots without one are empty."""
    rows = []
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    for row in texts:
        parts = [framed([text], tokenizer, slot) for text in (*row, *[nothing] * (k + 1 - len(row)))]
        last = 0
        for number, part in enumerate(parts):
            part.types[:] = number
            part.words[part.words >= 0] += last
            last = max(int(part.words.max()) + 1, last)
        rows += [Row(p.tokens, p.words, p.types) for p in parts]
    batch = padded(rows, tokenizer.special["pad"], slot)
    batch = {name: value.reshape(len(texts), (k + 1) * slot) for name, value in batch.items()}
    batch["types"] = torch.arange(k + 1).repeat_interleave(slot).expand(len(texts), -1).contiguous()
    return batch


def groups_of_k(
    scores: np.ndarray, k: int, how: Literal["all", "best", "worst", "random"], uniform: np.ndarray
) -> list[np.ndarray]:
    """Which candidates of one question go into a row together. all: shuffled and cut into groups of k, the last one shorter;
    best, worst: the k of highest or lowest first-stage score; random: k of them. uniform: one for each candidate."""
    order = {"best": np.argsort(-scores, kind="stable"), "worst": np.argsort(scores, kind="stable")}.get(
        how, np.argsort(uniform, kind="stable")
    )
    return [order[i : i + k] for i in range(0, len(order), k)] if how == "all" else [order[:k]]
