"""What is counted: top-1, top-5 and the confusion of classes, by torchmetrics. All shares lie in 0 ... 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.errors import UserError


def measured(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """``top1``, ``top5`` (of fewer classes: of all), ``per_class`` (share right of each class) and ``confusion``.

    scores: ``[M, K]``, the larger the likelier; labels: int64 ``[M]``. ``confusion[true][answered]`` counts samples.
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

    if len(scores) == 0:
        raise UserError("there is no test sample to measure on: give a data set with a test split, or more samples")
    scores, labels = scores.detach().float().cpu(), labels.detach().cpu()
    classes = scores.shape[1]
    confusion = multiclass_confusion_matrix(scores, labels, num_classes=max(classes, 2))
    seen = confusion.sum(dim=1)
    return {
        "top1": _top(multiclass_accuracy, scores, labels, 1),
        "top5": _top(multiclass_accuracy, scores, labels, min(5, classes)),
        "per_class": [
            None if not n else round(float(c) / int(n), 4) for c, n in zip(confusion.diagonal(), seen, strict=True)
        ],
        "confusion": confusion.tolist(),
    }


def _top(accuracy: Any, scores: Tensor, labels: Tensor, k: int) -> float:
    classes = scores.shape[1]
    if k >= classes:
        return 1.0
    return round(float(accuracy(scores, labels, num_classes=classes, average="micro", top_k=k)), 6)


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one value) and the values themselves."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return {
        "mean": float(numbers.mean()),
        "std": float(numbers.std()) if len(values) > 1 else 0.0,
        "values": [float(v) for v in values],
    }
