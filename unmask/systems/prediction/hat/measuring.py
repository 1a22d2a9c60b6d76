"""PSNR and SSIM of a HAT on a folder of sharp pictures, beside bicubic, by the field's protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unmask.data.opening import open_source
from unmask.data.order import some_of
from unmask.data.restoration import RestorationSettings, evaluation_pair
from unmask.draw import Draw, Scoped
from unmask.errors import UserError
from unmask.systems.prediction.hat.predicting import Ask, as_pixels, overlap_for, tile_for
from unmask.systems.prediction.metrics import psnr, ssim
from unmask.systems.prediction.results import PictureResult

if TYPE_CHECKING:
    from unmask.systems.prediction.hat.model import HAT

SHOWN = 3  # pictures drawn into the folder


@torch.no_grad()
def measure(
    model: HAT,
    data: RestorationSettings,
    draw: Draw,
    *,
    limit: int | None = None,
    device: torch.device | None = None,
    tell: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Means over pictures of ``psnr_y`` and ``ssim_y`` (and of all channels), of the network and of the input enlarged by
    bicubic. ``images``: the numbers of each, for paired comparisons.

    Both pictures are rounded to 8 bits, ``scale`` pixels are cut off every border (none at one size).
    """
    scale, channels = model.config.scale, model.network.channels
    source = open_source(data.uri, data.split, columns=data.columns, limit=data.limit, cache=data.cache)
    images = source.images(None)
    chosen = some_of(len(images), limit) if limit else np.arange(len(images))
    if device is not None:
        model.to(device)
    where = model.network.shallow.weight.device
    rows: list[dict[str, Any]] = []
    pictures: list[dict[str, str]] = []
    for number, i in enumerate(chosen):
        pixels = images.read(int(i))[0]
        high, low = evaluation_pair(pixels, data, scale, channels, Scoped(draw, f"picture{int(i)}"))
        if min(high.shape[2:]) < 11 + 2 * border_of(scale):
            raise UserError(
                f"{source.name_of(int(images.rows[i]))} has {pixels.shape[1]} x {pixels.shape[0]} pixels: too few to measure on"
            )
        ask = Ask()
        tile = tile_for(model, ask, low)
        made = model.restored(low.to(where), tile=tile, overlap=overlap_for(model, ask, tile), fade=True).cpu()
        plain = model.enlarged(low)
        row: dict[str, Any] = {"name": source.name_of(int(images.rows[i])), **compared(made, high, scale)}
        row["baseline"] = compared(plain, high, scale)
        rows.append(row)
        if tell is not None and (number + 1) % max(len(chosen) // 10, 1) == 0:
            tell(
                f"{number + 1} of {len(chosen)}: {Path(row['name']).name}: "
                f"{row['psnr_y']:.2f} dB, {'bicubic' if scale > 1 else 'input'} {row['baseline']['psnr_y']:.2f} dB"
            )
        if folder is not None and number < SHOWN:
            pictures.append(drawn(folder, number, row, low, made, scale))
    keys = [k for k in rows[0] if k not in ("name", "baseline")]
    return {
        **{k: float(np.mean([r[k] for r in rows])) for k in keys},
        "samples": len(rows),
        "baseline": {
            "bicubic" if scale > 1 else "the input": {k: float(np.mean([r["baseline"][k] for r in rows])) for k in keys}
        },
        "images": rows,
        "pictures": pictures,
    }


def border_of(scale: int) -> int:
    """Pixels cut off every border before comparing."""
    return scale if scale > 1 else 0


def compared(made: Tensor, high: Tensor, scale: int) -> dict[str, float]:
    """``psnr_y``, ``ssim_y``, ``psnr``, ``ssim`` of one picture. Equal pictures count as 100 dB."""
    border = border_of(scale)
    return {
        "psnr_y": float(psnr(made, high, border=border).clamp(max=100.0)),
        "ssim_y": float(ssim(made, high, border=border)),
        "psnr": float(psnr(made, high, border=border, luma=False).clamp(max=100.0)),
        "ssim": float(ssim(made, high, border=border, luma=False)),
    }


def drawn(folder: Path, number: int, row: dict[str, Any], low: Tensor, made: Tensor, scale: int) -> dict[str, str]:
    """The comparison of one picture, as a file in ``folder``."""
    seen = as_pixels(low)
    seen = np.repeat(seen, 3, axis=-1) if seen.shape[-1] == 1 else seen
    result = PictureResult(as_pixels(made), f"x{scale}, HAT" if scale > 1 else "restored, HAT", image=seen)
    name = f"restored-{number}.png"
    folder.mkdir(parents=True, exist_ok=True)
    result.overlay().save(folder / name)
    gain = row["psnr_y"] - row["baseline"]["psnr_y"]
    return {
        "file": name,
        "caption": f"{Path(row['name']).name}: {row['psnr_y']:.2f} dB, {gain:+.2f} dB against "
        f"{'bicubic' if scale > 1 else 'the input'}",
    }
