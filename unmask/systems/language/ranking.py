"""Ranking: which candidate of a question comes first, by MAP, MRR and P@1; and tf-idf, which every model is held against."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from unmask.errors import UserError

Missing = Literal["skip", "0", "1", "error"]


def ranking_metrics(
    scores: Sequence[Sequence[float]], labels: Sequence[Sequence[int]], *, missing: Missing = "skip"
) -> dict[str, Any]:
    """``map``, ``mrr``, ``p1`` in 0 ... 1 and ``questions``. Equal scores share their places: the mean over all their orders.

    missing: what a question without a right candidate counts: left out, 0, 1, or an error (``UserError``).
    """
    sums, count = np.zeros(3), 0
    for number, (score, label) in enumerate(zip(scores, labels, strict=True)):
        right = np.asarray(label) > 0
        if not right.any():
            if missing == "error":
                raise UserError(f"question {number} has no right candidate: use missing=skip, 0 or 1")
            if missing != "skip":
                sums, count = sums + int(missing), count + 1
            continue
        sums, count = sums + _one(np.asarray(score, dtype=float), right), count + 1
    values = sums / max(count, 1)
    return {"map": float(values[0]), "mrr": float(values[1]), "p1": float(values[2]), "questions": count}


def _one(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Average precision, reciprocal rank and precision at 1 of a question, in expectation over orders of equals."""
    precision, first, top, before, hits = 0.0, 0.0, 0.0, 0, 0
    for value in np.unique(scores)[::-1]:
        tied = scores == value
        n, k = int(tied.sum()), int(right[tied].sum())
        for place in range(n):  # a right one stands at this place of the tie with chance k / n
            if k:
                earlier = hits + place * (k - 1) / max(n - 1, 1)
                precision += k / n * (earlier + 1) / (before + place + 1)
        if k and not hits:
            chance = 1.0  # that no right one stood at an earlier place
            for place in range(n - k + 1):
                here = chance * k / (n - place)
                first += here / (before + place + 1)
                chance -= here
        if before == 0:
            top = k / n
        before, hits = before + n, hits + k
    return np.array([precision / hits, first, top])


def chance_metrics(labels: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a random order gives, in expectation."""
    return ranking_metrics([[0.0] * len(one) for one in labels], labels)


class TfIdf:
    """Words weighted by tf · log(N / df), compared by cosine. texts: what document frequencies are counted in."""

    def __init__(self, texts: Iterable[Sequence[Any]]):
        counts: Counter[Any] = Counter()
        self.total = 0
        for text in texts:
            counts.update(set(text))
            self.total += 1
        self.frequency = counts

    def vector(self, text: Sequence[Any]) -> dict[Any, float]:
        return {w: n * math.log((1 + self.total) / (1 + self.frequency[w])) for w, n in Counter(text).items()}

    def similarity(self, a: Sequence[Any], b: Sequence[Any]) -> float:
        x, y = self.vector(a), self.vector(b)
        norm = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
        return sum(v * y.get(w, 0.0) for w, v in x.items()) / norm if norm else 0.0
