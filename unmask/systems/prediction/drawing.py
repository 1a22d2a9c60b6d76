"""How predictions are drawn: colours that differ, names that can be read on any ground, pictures side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, QUIET = (20, 20, 20), (255, 255, 255), (110, 110, 110)
# Twenty hues far apart (after Kelly, "Twenty-two colors of maximum contrast", 1965), without black, white and grey
_FAR_APART = (
    *((67, 99, 216), (245, 130, 49), (60, 180, 75), (230, 25, 75), (145, 30, 180), (66, 212, 244)),
    *((255, 225, 25), (240, 50, 230), (0, 128, 128), (154, 99, 36), (191, 239, 69), (128, 0, 0)),
    *((250, 190, 212), (0, 0, 117), (170, 255, 195), (128, 128, 0), (220, 190, 255), (255, 216, 177)),
    *((40, 90, 60), (255, 120, 120)),
)


def palette(count: int) -> np.ndarray:
    """uint8 ``[count, 3]``: a colour a class, the same for the same number; neighbours differ."""
    colours = list(_FAR_APART[:count])
    for i in range(len(colours), count):  # golden-ratio hues, in three lightnesses
        red, green, blue = colorsys.hls_to_rgb((i * 0.61803398875) % 1, (0.38, 0.55, 0.72)[i % 3], 0.75)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colours, dtype=np.uint8).reshape(count, 3)


def shade(colour: Sequence[int], number: int) -> tuple[int, int, int]:
    """A shade of a colour for the ``number``-th object of a class (0: the colour itself)."""
    factor = (1.0, 0.72, 1.3, 0.55, 1.15, 0.85)[number % 6]
    red, green, blue = (min(round(float(c) * factor + (20 if factor > 1 else 0)), 255) for c in colour)
    return red, green, blue


def font(size: int) -> Any:
    """Pillow's own font at a size in pixels, 9 at least."""
    return ImageFont.load_default(size=max(size, 9))


def as_picture(array: Any) -> Image.Image:
    """uint8 ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]`` -> an RGB picture."""
    array = np.asarray(array)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array).convert("RGB")


def scaled(picture: Image.Image, height: int, *, sharp: bool | None = None) -> Image.Image:
    """The picture at a height. sharp: keep pixels as squares; open: where it is enlarged."""
    width = max(round(picture.width * height / picture.height), 1)
    nearest = picture.height < height if sharp is None else sharp
    return picture.resize((width, height), Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC)


def readable_on(colour: Sequence[int]) -> tuple[int, int, int]:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = (float(c) for c in colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


def label(
    pen: ImageDraw.ImageDraw, centre: tuple[float, float], text: str, colour: Sequence[int], typeface: Any
) -> None:
    """A name on a plate of its colour, centred and kept within the picture."""
    box = plate(pen, centre, text, typeface)
    pen.rectangle(box, fill=tuple(int(c) for c in colour), outline=readable_on(colour))
    pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, fill=readable_on(colour), font=typeface, anchor="mm")


def plate(
    pen: ImageDraw.ImageDraw, centre: tuple[float, float], text: str, typeface: Any
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the plate that ``label`` draws."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=typeface)
    height = max(bottom - top, typeface.size)
    wide, high = (right - left) / 2 + 3, height / 2 + 2
    limit_x, limit_y = pen.im.size  # type: ignore[attr-defined]
    x = min(max(centre[0], wide), max(limit_x - wide - 1, wide))
    y = min(max(centre[1], high), max(limit_y - high - 1, high))
    return x - wide, y - high, x + wide, y + high


def beside(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, gap: int = 6, letters: int | None = None
) -> Image.Image:
    """Pictures of one height in a row, each with a caption above it. letters: their size; open: by the pictures' height."""
    typeface = font(letters or max(pictures[0].height // 22, 11))
    head = typeface.size + 8
    height = max(p.height for p in pictures)
    sheet = Image.new("RGB", (sum(p.width for p in pictures) + gap * (len(pictures) - 1), head + height), PAPER)
    pen = ImageDraw.Draw(sheet)
    left = 0
    for picture, caption in zip(pictures, captions, strict=True):
        while len(caption) > 4 and pen.textlength(caption, font=typeface) > picture.width:
            caption = caption[:-2].rstrip(" .") + "."
        pen.text((left + 2, head / 2), caption, fill=INK, font=typeface, anchor="lm")
        sheet.paste(picture, (left, head))
        left += picture.width + gap
    return sheet
