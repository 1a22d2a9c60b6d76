"""A system's own metrics on test data: mean IoU of a segmenter, PSNR of a restorer, perplexity of a language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from unmask.config import validated
from unmask.contracts import Trainable
from unmask.data import DataSettings
from unmask.draw import Scoped, Seeded
from unmask.engine.precision import chosen_device
from unmask.engine.run import write_json
from unmask.errors import UserError
from unmask.evaluation.features import evaluating

NAME = "own"


def own(
    model: Trainable,
    data: Mapping[str, Any],
    *,
    split: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    device: str | None = None,
    out: str | Path | None = None,
    learned_from: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """What ``model.measure`` finds on the test split, in the format of :func:`.measure.evaluate` with ``measures`` (key -> words)
    and ``lower_is_better`` besides.

    data: the plain data settings of its training, or others of the same kind. split: default "test", and where the data has none
    the split it was trained on; the result says so where they are ``learned_from``, the data of its training. out: a folder to
    write ``own.json`` and pictures to. Raises ``UserError`` for a system without metrics of its own, and for data that do not fit.
    """
    if not model.measures:
        raise UserError(f"{model.slug} has no metric of its own: measure its encoder: --probe ridge")
    kind = model.Data or DataSettings
    settings: Any = validated(kind, dict(data), where="data")
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    home = next((p.device for p in model.parameters()), None)
    place = chosen_device(device or "auto")
    how = split or "test"
    same = learned_from is not None and str(settings.uri) == learned_from

    def measured(on: str) -> dict[str, Any]:
        where = settings.model_copy(update={"split": on})
        draw = Scoped(Seeded(seed), "measure")
        return model.measure(where, draw, limit=limit, device=place, tell=tell, folder=folder)

    model.to(place)
    try:
        with torch.no_grad(), evaluating(model):  # a metric that needs gradients enables them
            try:
                numbers = measured(how)
            except UserError as error:
                if split is not None or "no split" not in str(error):
                    raise
                how = settings.split
                numbers = measured(how)
    finally:
        if home is not None:
            model.to(home)
    missing = [key for key in model.measures if key not in numbers]
    if missing and len(missing) == len(model.measures):
        raise RuntimeError(f"{model.slug}.measure gives none of {list(model.measures)}")
    first = next(key for key in model.measures if key in numbers)
    result: dict[str, Any] = {
        "format": 1,
        "probe": NAME,
        "data": settings.uri,
        "main": first,
        "measures": {k: v for k, v in model.measures.items() if k in numbers},
        "lower_is_better": sorted(model.lower_is_better),
        "parameters": sum(p.numel() for p in model.parameters()),
        **numbers,
        "baseline": dict(numbers.get("baseline") or {}),
        "split": f"{how} split" + (", which it learned from" if same and how == settings.split else ""),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 2),
    }
    if "samples" in numbers:
        result["test_samples"] = numbers["samples"]
    if folder is not None:
        write_json(folder / f"{NAME}.json", result)
    return result
