"""``PictureResult``: a picture made from a picture (enlarged, cleaned, completed)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from unmask.systems.prediction.result import Result, png
from unmask.systems.prediction.segmentation import as_array

if TYPE_CHECKING:
    from PIL import Image

ZOOM = 6  # the crop that is shown enlarged is this share of the height


@dataclass
class PictureResult(Result):
    """The picture ``pixels`` uint8 ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]`` (a float tensor ``[C, H, W]`` in 0 ... 1 is
    rounded). ``image``: the input. done: what was done, in two words ("x4, HAT"). notes: numbers to keep (PSNR, tiles)."""

    kind: ClassVar[str] = "picture"
    pixels: Any
    done: str = "restored"
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pixels = rounded(self.pixels)

    def words(self) -> str:
        height, width = self.pixels.shape[:2]
        return f"{width} x {height} pixels, {self.done}"

    def plain(self) -> dict[str, Any]:
        height, width = self.pixels.shape[:2]
        before = None if self.image is None else list(np.asarray(self.image).shape[:2])
        return {**super().plain(), "height": height, "width": width, "input": before, "done": self.done, **self.notes}

    def files(self) -> dict[str, bytes]:
        return {
            ".png": png(self.pixels[..., 0] if self.pixels.ndim == 3 and self.pixels.shape[2] == 1 else self.pixels)
        }

    def overlay(self, *, size: int = 384) -> Image.Image:
        """The input (bicubic, where the size changed) beside the output, and below both the same crop enlarged."""
        from PIL import Image, ImageDraw

        from unmask.systems.prediction.drawing import PAPER, as_picture, beside, scaled

        after = as_picture(self.pixels)
        if self.image is None:
            return scaled(after, size)
        before = as_picture(self.image)
        changed = before.size != after.size
        before = before.resize(after.size, Image.Resampling.BICUBIC) if changed else before
        captions = ["input, bicubic" if changed else "input", self.done]
        left, top, side = most_changed(np.asarray(before), np.asarray(after))
        crops = [p.crop((left, top, left + side, top + side)) for p in (before, after)]
        whole = []
        for picture in (before, after):
            small = scaled(picture, size, sharp=False)
            factor = small.height / picture.height
            marked = tuple(round(v * factor) for v in (left, top, left + side, top + side))
            ImageDraw.Draw(small).rectangle(marked, outline=(230, 25, 75), width=2)
            whole.append(small)
        letters = max(size // 22, 11)
        upper = beside(whole, captions, letters=letters)
        zoomed = [c.resize((whole[0].width, whole[0].width), Image.Resampling.NEAREST) for c in crops]
        factor = max(round(after.width / side), 1)  # against the pictures above
        lower = beside(zoomed, [f"{factor} x closer"] * 2, letters=letters)
        sheet = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height + 4), PAPER)
        sheet.paste(upper, (0, 0))
        sheet.paste(lower, (0, upper.height + 4))
        return sheet


def rounded(pixels: Any) -> np.ndarray:
    """uint8 as it is; floats in 0 ... 1, ``[C, H, W]`` tensors or ``[H, W, C]`` arrays, clamped and rounded to 8 bits."""
    tensor = hasattr(pixels, "detach")
    array = as_array(pixels)
    if tensor and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    if array.dtype == np.uint8:
        return array
    return np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)


def most_changed(before: np.ndarray, after: np.ndarray) -> tuple[int, int, int]:
    """(left, top, side) of the square, a sixth of the shorter side, where two pictures differ most."""
    from scipy import ndimage

    side = max(min(after.shape[:2]) // ZOOM, min(16, *after.shape[:2]))
    change = np.abs(after.astype(np.float32) - before.astype(np.float32)).mean(axis=-1)
    mean = ndimage.uniform_filter(change, side, mode="constant")
    high, wide = after.shape[0] - side, after.shape[1] - side
    inner = mean[side // 2 : side // 2 + high + 1, side // 2 : side // 2 + wide + 1]
    top, left = np.unravel_index(int(np.argmax(inner)), inner.shape)
    return int(left), int(top), int(side)
