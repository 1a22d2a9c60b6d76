"""``HeatMap``: an attribution with the picture it belongs to; overlays, and files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.contracts import Attribution

# Blue (against), white (nothing), red (for): nine steps of a map that is even in lightness on both sides.
_AGAINST = ((33, 80, 150), (78, 130, 189), (136, 177, 216), (198, 217, 236))
_FOR = ((250, 208, 185), (239, 152, 121), (212, 88, 78), (165, 25, 45))
SIGNED = (*_AGAINST, (247, 247, 247), *_FOR)


@dataclass
class HeatMap(Attribution):
    """heat: ``[H, W]``, higher speaks more for the target, below 0 against it. picture: uint8 ``[H, W, 3]``, what the model saw."""

    picture: np.ndarray | None = None
    source: str = ""

    def colours(self) -> np.ndarray:
        """The heat alone, uint8 ``[H, W, 3]``: blue against, white nothing, red for; the strongest hundredth saturates."""
        share = scaled(self.heat).numpy()
        table = np.array(SIGNED, dtype=np.float64)
        at = (share + 1) / 2 * (len(table) - 1)
        low = np.floor(at).astype(int).clip(0, len(table) - 2)
        part = (at - low)[..., None]
        return np.rint(table[low] * (1 - part) + table[low + 1] * part).astype(np.uint8)

    def overlay(self, strength: float = 0.75) -> np.ndarray:
        """The heat over a grey copy of the picture, uint8 ``[H, W, 3]``; without heat the picture shows through."""
        colours = self.colours().astype(np.float64)
        if self.picture is None:
            return self.colours()
        grey = self.picture.astype(np.float64).mean(axis=2, keepdims=True)
        under = 90 + grey * 0.6
        amount = strength * np.abs(scaled(self.heat).numpy())[..., None] ** 0.7
        return np.rint(under * (1 - amount) + colours * amount).clip(0, 255).astype(np.uint8)

    def save(self, path: str | Path, *, side: int = 448) -> Path:
        """The overlay as a PNG, enlarged by whole factors to about ``side`` pixels, and the numbers beside it (``.npy``)."""
        path = Path(path).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, self.overlay(), side=side)
        np.save(path.with_suffix(".npy"), self.heat.float().cpu().numpy())
        return path

    def plain(self) -> dict[str, Any]:
        return {"kind": "attribution", "source": self.source, "target": self.target, **json_able(self.notes)}


def scaled(heat: Tensor) -> Tensor:
    """``[H, W]`` in -1 ... 1: divided by the 99th percentile of its sizes."""
    heat = heat.detach().float().cpu().nan_to_num()
    top = heat.abs().flatten().quantile(0.99)
    top = top if float(top) > 0 else heat.abs().max()
    return (heat / top.clamp_min(1e-12)).clamp(-1, 1) if float(top) > 0 else torch.zeros_like(heat)


def write_png(path: Path, picture: np.ndarray, *, side: int = 448) -> None:
    """A picture, enlarged without smoothing where it is small."""
    from PIL import Image

    factor = max(side // max(picture.shape[:2]), 1)
    image = Image.fromarray(picture)
    if factor > 1:
        image = image.resize((picture.shape[1] * factor, picture.shape[0] * factor), Image.Resampling.NEAREST)
    image.save(path)


def json_able(values: dict[str, Any]) -> dict[str, Any]:
    """What of the notes JSON can hold."""
    out = {}
    for key, value in values.items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        out[key] = value
    return out
