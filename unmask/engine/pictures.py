"""Previews on disk: one PNG for each table of images, and a JSON file beside it that says what its columns are."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unmask.contracts import Picture
from unmask.engine.run import mended_errors, replace_file, write_json

GAP = 4  # pixels between cells
SMALLEST = 96  # cells of small images are enlarged to at least this many pixels, each pixel a square


def picture_grid(picture: Picture) -> Image.Image:
    """The table as one image; all cells of a column are as wide as its widest, the gaps are white."""
    rows = [[_cell(value) for value in row] for row in picture.rows]
    count = max((len(row) for row in rows), default=0)
    if not count:
        raise ValueError(f"picture {picture.name!r} has no cell")
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(count)]
    heights = [max((cell.height for cell in row), default=0) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + GAP * (count - 1), sum(heights) + GAP * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for cell, width in zip(row, widths, strict=False):
            sheet.paste(cell, (left, top))
            left += width + GAP
        top += height + GAP
    return sheet


def _cell(value: Any) -> Image.Image:
    array = np.asarray(value)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    image = Image.fromarray(np.ascontiguousarray(array[..., :3]).astype(np.uint8))
    times = -(-SMALLEST // max(min(image.size), 1))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST) if times > 1 else image


def save_pictures(pictures: Sequence[Picture], folder: Path, step: int) -> list[Path]:
    """Write ``<step>-<name>.png`` and ``.json`` (``columns``, ``rows``, ``caption``, ``name``, ``step``) for each picture."""
    written = []
    with mended_errors(f"making {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        name = re.sub(r"[^\w.-]+", "_", picture.name) or "picture"
        path = folder / f"{step:08d}-{name}.png"
        content = io.BytesIO()
        picture_grid(picture).save(content, format="PNG", optimize=True)
        replace_file(path, content.getvalue())
        about = {"columns": picture.columns, "rows": len(picture.rows), "caption": picture.caption}
        write_json(path.with_suffix(".json"), {**about, "name": picture.name, "step": step})
        written.append(path)
    return written
