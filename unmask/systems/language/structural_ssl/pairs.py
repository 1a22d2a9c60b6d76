"""Pairs of spans and whether they come from one unit: SSP, SP, PSD, their mixture, and the contextual SDC, DDC, DSLC.

Di Liello et al. 2022 (arXiv:2205.10455) and 2023 (2305.15358). Of each positive, ``negatives`` negatives are made with the
same first span, up to ``hard`` of them from the same document. Everything is a function of (seed, number of the example).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unmask import config as configs
from unmask.config import Field
from unmask.errors import UserError, nearest
from unmask.systems.language.structural_ssl.structure import Structure, check_structure, uniforms

PAIRS = ("ssp", "sp", "psd")
CONTEXTUAL = ("sdc", "ddc", "dslc")
POSITIVE, HARD, EASY = "positive", "hard", "easy"


class PairConfig(configs.Config):
    """How pairs are made."""

    hard: float = Field(2.0, ge=0, description="at most so many hard negatives a positive; a fraction is a chance")
    negatives: int = Field(4, ge=1, description="negatives a positive, hard ones among them")
    span: int = Field(3, ge=1, description="sentences in a span, at most")
    context: int = Field(2, ge=1, description="sentences before and after, for dslc")
    mix: dict[str, float] = Field({"ssp": 1.0, "sp": 1.0, "psd": 1.0}, description="weights of the objectives in all")


@dataclass(frozen=True)
class Example:
    """Sentence numbers of the spans, and how they belong together. context: of b, for contextual objectives."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    label: int
    kind: Literal["positive", "hard", "easy"]
    objective: str
    context: tuple[int, ...] | None = None


class PairBuilder:
    """``example(n)`` for any n >= 0; an epoch has ``count``: each anchor paragraph with one positive and its negatives."""

    def __init__(self, structure: Structure, config: PairConfig, objective: str, seed: int = 0, uri: str = "the text"):
        self.structure, self.config, self.seed = structure, config, seed
        mixed = {k: v for k, v in config.mix.items() if v > 0} if objective == "all" else {objective: 1.0}
        for name in mixed:
            if name not in (*PAIRS, *CONTEXTUAL):
                raise UserError(f"pairs.mix names {name!r}: {nearest(name, (*PAIRS, *CONTEXTUAL))}")
        if not mixed:
            raise UserError("pairs.mix gives no objective a weight: use pairs.mix='{ssp: 1, sp: 1, psd: 1}'")
        check_structure(structure, uri, needs="paragraphs" if set(mixed) == {"psd"} else "sentences")
        self.mixed = mixed
        sizes, held = structure.sizes, np.diff(structure.documents)
        documents = np.repeat(np.arange(len(held)), held)
        several, company = sizes >= 2, held[documents] >= 2
        usable = np.zeros(len(sizes), dtype=bool)
        for name in mixed:
            usable |= company if name == "psd" else several
        self.several, self.company, self.documents = several, company, documents
        self.anchors = np.flatnonzero(usable)
        self.count = len(self.anchors) * (1 + config.negatives)

    def examples(self, numbers: np.ndarray) -> list[Example]:
        group = 1 + self.config.negatives
        shared = uniforms(self.seed, "anchor", np.asarray(numbers) // group, 8)
        own = uniforms(self.seed, "example", np.asarray(numbers), 8)
        return [
            self._example(int(n) // group, int(n) % group, s, o) for n, s, o in zip(numbers, shared, own, strict=True)
        ]

    def _example(self, group: int, member: int, shared: np.ndarray, own: np.ndarray) -> Example:
        """shared: uniforms of the positive and its negatives; own: of this one."""
        s = self.structure
        anchor = int(self.anchors[group % len(self.anchors)])
        objective = self._objective(anchor, shared[0])
        document = int(self.documents[anchor])
        others = [p for p in s.paragraphs_of(document) if p != anchor]
        hard = (
            0
            if objective == "psd"
            else min(math.floor(self.config.hard + shared[1]), self.config.negatives, len(others))
        )
        kind = POSITIVE if member == 0 else HARD if member <= hard else EASY
        a = self._first(anchor, objective, shared[2:])
        if kind == POSITIVE:
            where = others[int(own[0] * len(others))] if objective == "psd" else anchor
        elif kind == HARD:  # another paragraph for each
            where = others[(int(shared[7] * len(others)) + member) % len(others)]
        else:
            other = int(own[1] * (len(s.names) - 1))
            inside = s.paragraphs_of(other + (other >= document))
            where = inside[int(own[2] * len(inside))]
        b = self._second(where, a if where == anchor else (), objective, own[3:])
        context = self._context(a, b, where, objective, own[6]) if objective in CONTEXTUAL else None
        return Example(a, b, int(kind == POSITIVE), kind, objective, context)  # type: ignore[arg-type]

    def _objective(self, anchor: int, uniform: float) -> str:
        fits = {n: w for n, w in self.mixed.items() if (self.company if n == "psd" else self.several)[anchor]}
        edges = np.cumsum(list(fits.values()))
        return list(fits)[min(int(np.searchsorted(edges, uniform * edges[-1], side="right")), len(fits) - 1)]

    def _first(self, paragraph: int, objective: str, u: Any) -> tuple[int, ...]:
        inside = self.structure.sentences_of(paragraph)
        if objective == "psd":
            return tuple(inside)
        size = 1 + int(u[0] * min(self.config.span, len(inside) - 1))  # one sentence at least is left
        start = int(u[1] * (len(inside) - size + 1))
        return tuple(inside[start : start + size])

    def _second(self, paragraph: int, taken: tuple[int, ...], objective: str, u: Any) -> tuple[int, ...]:
        inside = self.structure.sentences_of(paragraph)
        free = [s for s in inside if s not in taken]
        if objective in ("sp", "psd"):
            return tuple(free)
        first = free[int(u[0] * len(free))]
        size = 1 + int(u[1] * self.config.span)
        out: list[int] = []
        for s in range(first, inside.stop):
            if s in taken or len(out) == size:
                break
            out.append(s)
        return tuple(out)

    def _context(
        self, a: Sequence[int], b: Sequence[int], paragraph: int, objective: str, uniform: float
    ) -> tuple[int, ...]:
        """Of b; never with a sentence of a or b, which would give the answer away."""
        s = self.structure
        document = int(self.documents[paragraph])
        inside = s.paragraphs_of(document)
        if objective == "dslc":
            low, high = s.sentences_of(inside[0]).start, s.sentences_of(inside[-1]).stop
            near = [
                *range(max(b[0] - self.config.context, low), b[0]),
                *range(b[-1] + 1, min(b[-1] + 1 + self.config.context, high)),
            ]
        else:
            near = list(s.sentences_of(inside[0] if objective == "sdc" else inside[int(uniform * len(inside))]))
        return tuple(i for i in near if i not in a and i not in b)
