"""What a claim measures on a finished arm: a probe of its frozen encoder, a dense probe, or its own answers.

Shares in 0 ... 1 are given in percent, so that differences read as points.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unmask.claims.jobs import Job
from unmask.contracts import Trainable
from unmask.errors import UserError

SHARES = ("top1", "top5", "miou", "per_class")


def measure(model: Trainable, job: Job, name: str, talk: Callable[[str], None]) -> dict[str, Any]:
    """The numbers of one metric, shares in percent. Raises ``UserError`` where the model cannot be measured so."""
    wanted = job.metrics[name]
    probe, data, options = wanted["probe"], wanted["data"], dict(wanted["options"])
    if probe == "own":
        from unmask.evaluation.own import own

        return own(model, job.data_settings(data), seed=wanted["seed"], tell=None, **options)
    if probe == "accuracy":
        return percent(accuracy(model, data))
    if model.encoder is None:
        raise UserError(f"{model.slug} has no encoder to probe: measure accuracy")
    if probe == "dense":
        from unmask.claims.dense import dense

        return percent(dense(model.encoder, Path(data), **options))
    from unmask.evaluation.measure import evaluate

    numbers = evaluate(model.encoder, data, probe, baseline=False, seed=wanted["seed"], tell=None, **options)
    return percent({k: v for k, v in numbers.items() if isinstance(v, (int, float, str)) or k in SHARES})


def percent(numbers: dict[str, Any]) -> dict[str, Any]:
    def scaled(value: Any) -> Any:
        return (
            [scaled(v) for v in value]
            if isinstance(value, list)
            else None
            if value is None
            else round(100.0 * value, 4)
        )

    return {k: scaled(v) if k in SHARES else v for k, v in numbers.items()}


@torch.no_grad()
def accuracy(model: Trainable, uri: str) -> dict[str, Any]:
    """``top1`` of a classifier's own answers on the test split, images prepared as for its training."""
    from unmask.data import open as open_data
    from unmask.evaluation.features import autocast, evaluating
    from unmask.evaluation.samples import from_source

    if not hasattr(model, "logits") or model.encoder is None:
        raise UserError(f"{model.slug} gives no class scores: measure a probe of its encoder")
    device = next(model.parameters()).device
    right = count = 0
    with evaluating(model), autocast(device, "auto"):
        for batch in from_source(open_data(uri, "test")).batches(model.encoder.preprocessing, 256):
            answers = model.logits(batch["image"].to(device)).argmax(dim=1).cpu()
            right += int((answers == batch["label"].cpu()).sum())
            count += len(answers)
    return {"top1": right / max(count, 1), "samples": count}
