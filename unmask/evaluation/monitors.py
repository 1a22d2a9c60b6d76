"""Probes while training: a k-NN curve where labels exist, RankMe where none do. Cheap, so that the curve costs little.

The engine calls a monitor every so often with the model in evaluation mode and writes its numbers to ``metrics.jsonl``.
"""

from __future__ import annotations

from typing import Any

import torch

from unmask.contracts import Preprocessing, Progress, Trainable
from unmask.data.batches import Batches
from unmask.draw import Seeded
from unmask.evaluation.features import features
from unmask.evaluation.knn import knn
from unmask.evaluation.rankme import rankme
from unmask.evaluation.samples import Samples, from_source, samples
from unmask.evaluation.subsets import few_labels, split

TRAIN, TEST = 1000, 500


class KnnMonitor:
    """``{"knn_top1": share right}``: weighted k-NN (k = 20, T = 0.07) from at most 1000 training to 500 test images."""

    def __init__(self, train: Samples, test: Samples, preprocessing: Preprocessing | None = None):
        self.train, self.test, self.preprocessing = train, test, preprocessing
        self.classes = len(train.classes or ())

    def every(self, settings: Any) -> int:
        """Steps between two measurements; 0: none."""
        return int(settings.probe_every or 0)

    @torch.no_grad()
    def __call__(self, model: Trainable, progress: Progress) -> dict[str, float]:
        if model.encoder is None:
            return {}
        x, y = features(model.encoder, self.train, preprocessing=self.preprocessing)
        x_test, y_test = features(model.encoder, self.test, preprocessing=self.preprocessing)
        if y is None or y_test is None:
            return {}
        answers = knn(x, y, x_test, classes=self.classes).argmax(dim=1)
        return {"knn_top1": float((answers == y_test).float().mean())}


class RankMeMonitor:
    """``{"rankme": directions in use}`` of the features of at most 1000 images."""

    def __init__(self, data: Samples, preprocessing: Preprocessing | None = None):
        self.data, self.preprocessing = data, preprocessing

    def every(self, settings: Any) -> int:
        """Steps between two measurements; 0: none."""
        return int(settings.probe_every or 0)

    @torch.no_grad()
    def __call__(self, model: Trainable, progress: Progress) -> dict[str, float]:
        if model.encoder is None:
            return {}
        return {"rankme": rankme(features(model.encoder, self.data, preprocessing=self.preprocessing)[0])}


Monitor = KnnMonitor | RankMeMonitor


def monitors_for(data: Any, *, preprocessing: Preprocessing | None = None, seed: int = 0) -> list[Monitor]:
    """The monitor that suits the data: :class:`KnnMonitor` with at least two classes, else :class:`RankMeMonitor`.

    data: batches (their preprocessing is used), a source, or anything ``samples`` takes. Test images are training images that
    the k-NN does not get, never the data's test split: ``train.best`` chooses by them. Streams get none.
    """
    if isinstance(data, Batches):
        preprocessing = preprocessing or data.preprocessing
        data = data.source
    whole = from_source(data) if hasattr(data, "facts") and hasattr(data, "dataset") else samples(data)
    if whole.count is None or whole.count < 4:
        return []
    if whole.labels is None or len(whole.classes or ()) < 2:
        return [RankMeMonitor(whole.first(TRAIN), preprocessing)]
    train, test = (whole.subset(ids) for ids in split(whole.labels, whole.count, Seeded(seed)))
    return [KnnMonitor(_few(train, TRAIN, seed), _few(test, TEST, seed), preprocessing)]


def _few(data: Samples, limit: int, seed: int) -> Samples:
    """At most ``limit`` images with every class in its share."""
    if data.labels is None or data.count is None or data.count <= limit:
        return data
    ids = few_labels(data.labels, limit / data.count, Seeded(seed))
    return data.subset(ids).first(limit)
