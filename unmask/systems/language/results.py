"""What predictions on text are: a score for every sentence, or the class of every text."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from unmask.systems.language.drawing import FAINT, Piece, shade, text_image
from unmask.systems.prediction.result import Result

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 60  # sentences in a picture


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return held.getvalue().encode()


@dataclass
class SentenceScores(Result):
    """A score for each sentence of a text, in order. unit: what it measures. query: what sentences were compared with."""

    kind: ClassVar[str] = "sentence scores"
    sentences: list[str]
    scores: list[float]
    unit: str
    query: str = ""
    paragraphs: list[int] = field(default_factory=list)

    def words(self) -> str:
        best = max(range(len(self.scores)), key=self.scores.__getitem__)
        return f"{len(self.scores)} sentences, highest {self.scores[best]:.3f}: {self.sentences[best][:60]}"

    def plain(self) -> dict[str, Any]:
        rows = [{"sentence": s, "score": round(v, 6)} for s, v in zip(self.sentences, self.scores, strict=True)]
        return {**super().plain(), "unit": self.unit, "query": self.query, "sentences": rows}

    def files(self) -> dict[str, bytes]:
        rows = [[s, f"{v:.6f}"] for s, v in zip(self.sentences, self.scores, strict=True)]
        return {".csv": _table(["sentence", self.unit], rows)}

    def overlay(self, *, size: int = 256) -> Image.Image:
        """The text, each sentence painted by its rank-free score: the lowest white, the highest full."""
        values = np.array(self.scores[:SHOWN])
        span = float(values.max() - values.min()) or 1.0
        pieces = [Piece(f"query: {self.query}", FAINT), Piece("\n")] if self.query else []
        last = None
        for number, (sentence, value) in enumerate(zip(self.sentences[:SHOWN], values, strict=False)):
            paragraph = self.paragraphs[number] if self.paragraphs else 0
            if last is not None and paragraph != last:
                pieces += [Piece("\n")]
            pieces.append(Piece(f"{sentence} ", fill=shade((value - values.min()) / span), under=f"{value:.2f}"))
            last = paragraph
        if len(self.sentences) > SHOWN:
            pieces += [Piece("\n"), Piece(f"and {len(self.sentences) - SHOWN} sentences more", FAINT)]
        return text_image(pieces)


@dataclass
class TextClasses(Result):
    """The classes of the texts of a file, one after another. probabilities ``[N, K]``."""

    kind: ClassVar[str] = "text classes"
    texts: list[str]
    probabilities: np.ndarray
    classes: tuple[str, ...]

    @property
    def answers(self) -> list[str]:
        return [self.classes[i] for i in self.probabilities.argmax(axis=1)]

    def words(self) -> str:
        counts = {c: self.answers.count(c) for c in self.classes}
        shown = sorted(counts.items(), key=lambda item: -item[1])[:3]
        return ", ".join(f"{name} {n}" for name, n in shown if n) + f" of {len(self.texts)} texts"

    def plain(self) -> dict[str, Any]:
        rows = [
            {
                "text": t,
                "answer": a,
                "probabilities": {c: round(float(v), 6) for c, v in zip(self.classes, p, strict=True)},
            }
            for t, a, p in zip(self.texts, self.answers, self.probabilities, strict=True)
        ]
        return {**super().plain(), "classes": list(self.classes), "texts": rows}

    def files(self) -> dict[str, bytes]:
        rows = [
            [t, a, *(f"{v:.6f}" for v in p)]
            for t, a, p in zip(self.texts, self.answers, self.probabilities, strict=True)
        ]
        return {".csv": _table(["text", "answer", *self.classes], rows)}

    def overlay(self, *, size: int = 256) -> Image.Image:
        pieces: list[Piece] = []
        for text, answer, values in list(zip(self.texts, self.answers, self.probabilities, strict=True))[:SHOWN]:
            share = float(values.max())
            pieces += [
                Piece(f"{answer} {100 * share:.0f} %", FAINT, shade(share)),
                Piece(f"  {text[:300]}"),
                Piece("\n"),
            ]
        return text_image(pieces)
