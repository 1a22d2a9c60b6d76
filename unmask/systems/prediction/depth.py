"""``Depth``: how far each pixel is."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from unmask.systems.prediction.result import Result, png
from unmask.systems.prediction.segmentation import as_array

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class Depth(Result):
    """Depth float ``[H, W]`` in metres; 0 or less means unknown. Saved as a 16-bit PNG in millimetres (0 unknown, 65.535 m
    and more cut), the exact values as ``.npy``."""

    kind: ClassVar[str] = "depth"
    map: Any

    def __post_init__(self) -> None:
        self.map = as_array(self.map).astype(np.float32)

    def words(self) -> str:
        known = self.map[self.map > 0]
        return f"{known.min():.2f} to {known.max():.2f} m" if known.size else "nothing known"

    def plain(self) -> dict[str, Any]:
        known = self.map[self.map > 0]
        numbers = {
            key: round(float(f(known)), 4) if known.size else None
            for key, f in (("nearest", np.min), ("median", np.median), ("farthest", np.max))
        }
        return {
            **super().plain(),
            "height": self.map.shape[0],
            "width": self.map.shape[1],
            "unit": "metre",
            "png_unit": "millimetre",
            **numbers,
        }

    def files(self) -> dict[str, bytes]:
        held = io.BytesIO()
        np.save(held, self.map)
        millimetres = np.rint(np.nan_to_num(self.map, nan=0.0, posinf=65.535) * 1000).clip(0, 65535).astype(np.uint16)
        return {".png": png(millimetres), ".npy": held.getvalue()}

    def overlay(self, *, size: int = 384) -> Image.Image:
        """The picture beside its depth in colours (near is red), with a scale in metres."""
        import matplotlib
        from PIL import Image, ImageDraw

        from unmask.systems.prediction.drawing import INK, PAPER, as_picture, beside, font, scaled

        known = (self.map > 0) & np.isfinite(self.map)
        low, high = (float(v) for v in (np.quantile(self.map[known], (0.01, 0.99)) if known.any() else (0.0, 1.0)))
        high = max(high, low + 1e-6)
        share = 1 - ((np.nan_to_num(self.map) - low) / (high - low)).clip(0, 1)
        colours = matplotlib.colormaps["turbo"]
        painted = (colours(share)[..., :3] * 255).astype(np.uint8)
        painted[~known] = 0
        pictures, captions = [scaled(as_picture(painted), size, sharp=False)], ["depth"]
        if self.image is not None:
            photo = scaled(as_picture(self.image), size, sharp=False)
            pictures, captions = [photo, *pictures], ["input", *captions]
        sheet = beside(pictures, captions)
        head = sheet.height - size
        typeface = font(max(size // 28, 10))
        wide = 60 + typeface.size * 2
        out = Image.new("RGB", (sheet.width + wide, sheet.height), PAPER)
        out.paste(sheet, (0, 0))
        steps = (colours(np.linspace(0, 1, size))[:, None, :3].repeat(16, axis=1) * 255).astype(np.uint8)
        out.paste(Image.fromarray(steps), (sheet.width + 8, head))
        pen = ImageDraw.Draw(out)
        for i in range(5):  # the top is the farthest, as in the picture of a room
            y = head + i * (size - 1) / 4
            anchor = "lt" if i == 0 else "lb" if i == 4 else "lm"
            pen.text(
                (sheet.width + 30, y), f"{high - (high - low) * i / 4:.2f} m", fill=INK, font=typeface, anchor=anchor
            )
        return out
