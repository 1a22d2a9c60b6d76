"""A classifier's own answers on the images that a probe would test on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unmask.engine.precision import chosen_device
from unmask.engine.run import write_json
from unmask.errors import UserError
from unmask.evaluation.finetune import scores_of
from unmask.evaluation.measure import LARGEST
from unmask.evaluation.metrics import measured
from unmask.evaluation.samples import parts
from unmask.systems.prediction.classifier.model import Classifier

NAME = "accuracy"


def accuracy(
    model: Any,
    data: Any,
    *,
    seed: int = 0,
    limit: int | tuple[int, int] | None = None,
    precision: str = "auto",
    device: str | None = None,
    out: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """How often a classifier is right on the test part of the data, beside always answering the commonest class; in the
    format of :func:`.measure.evaluate`. None for what is no classifier. out: a folder to write ``accuracy.json`` to.

    Raises ``UserError`` for classes of the data that the classifier does not know.
    """
    if not isinstance(model, Classifier):
        return None
    started = time.monotonic()
    train, test, how = parts(data, seed=seed, limit=limit, columns=columns)
    known = model.classes
    if (
        model.config.classes == len(known) == len(train.classes or ())
    ):  # only their number was said: the order is the data's
        known = tuple(train.classes or ())
    for part in (train, test):
        if not set(part.classes or ()) <= set(known):
            raise UserError(f"{part.uri} has other classes than the classifier was trained on")
    train, test = (part if part.classes == known else part.renumbered(known) for part in (train, test))
    home = model.head.weight.device
    model.to(chosen_device(device or "auto"))
    scores, labels = scores_of(model, test, model.encoder.preprocessing, precision)
    model.to(home)
    kept = labels >= 0  # images without a label are no question
    result: dict[str, Any] = {
        "format": 1,
        "probe": NAME,
        "data": train.uri,
        "encoder": model.encoder.name or type(model.encoder).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        **measured(scores[kept], labels[kept]),
        "classes": list(known),
        "baseline": {},
        "train_samples": train.count,
        "test_samples": int(kept.sum()),
        "split": how,
        "seed": seed,
    }
    if train.labels is not None and (train.labels >= 0).any():
        commonest = int(torch.bincount(train.labels[train.labels >= 0]).argmax())
        result["baseline"][LARGEST] = {"top1": round(float((labels[kept] == commonest).float().mean()), 6)}
    result["seconds"] = round(time.monotonic() - started, 2)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / f"{NAME}.json", result)
    return result
