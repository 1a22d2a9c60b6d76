"""``predict``: what a trained model says about inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.catalog import supervised
from unmask.errors import UserError


def predict(model: Any, files: Any, *, out: str | Path | None = None, device: str = "auto") -> list[tuple[Any, Any]]:
    """What a trained model says about inputs: ``[(input, result), ...]`` in order.

    model: a run, an export, or a loaded system. files: one path, many, or folders of images (PIL images and tensors pass, too).
    out: a folder that gets one result file an input. Raises ``UserError`` when the model cannot predict, or a file is missing.
    """
    from unmask.api.loading import load
    from unmask.api.machine import check_device
    from unmask.contracts import Predictor

    inputs = expand(files)
    if not inputs:
        raise UserError("nothing to predict on: give image files, or a folder that holds some")
    where = check_device(device)
    loaded = load(model, whole=True) if isinstance(model, (str, Path)) else model
    if not isinstance(loaded, Predictor):
        slug = getattr(loaded, "slug", "") or type(loaded).__name__
        raise UserError(
            f"{slug} predicts nothing by itself: train one that does on top: "
            f"unmask train {supervised().slug} --data LABELLED init={model}"
        )
    results = loaded.to(where).predict(inputs) if hasattr(loaded, "to") else loaded.predict(inputs)
    if out is not None:
        _save(inputs, results, Path(out))
    return list(zip(inputs, results, strict=True))


def expand(files: Any) -> list[Any]:
    """Paths with folders replaced by the images in them. Raises ``UserError`` for what is not there."""
    if isinstance(files, (str, Path)) or not isinstance(files, Sequence):
        files = [files]
    from unmask.data.decode import SUFFIXES, is_image

    out: list[Any] = []
    for item in files:
        if not isinstance(item, (str, Path)):
            out.append(item)
            continue
        path = Path(item)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if is_image(p))
            if not found:
                raise UserError(f"no image in {path}: it takes {', '.join(sorted(SUFFIXES))}")
            out += found
        elif path.is_file():
            out.append(path)
        else:
            raise UserError(f"no file {path}: check the path")
    return out


def _save(inputs: Sequence[Any], results: Sequence[Any], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}: choose another --out") from None
    taken: set[str] = set()
    for number, (item, result) in enumerate(zip(inputs, results, strict=True)):
        name = Path(item).stem if isinstance(item, (str, Path)) else f"input-{number}"
        if name in taken:  # the same file name from two folders
            name = f"{name}-{number}"
        taken.add(name)
        result.save(out / name)
