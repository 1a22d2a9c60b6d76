"""Text as pictures: words on a page, some of them marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INK, RIGHT, WRONG, HIDDEN, FAINT = (36, 41, 47), (21, 128, 61), (200, 30, 30), (20, 20, 20), (120, 125, 130)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Piece:
    """A stretch of text. fill: what is painted behind it. under: drawn in small letters below. A text of one newline breaks
    the line."""

    text: str
    ink: Colour = INK
    fill: Colour | None = None
    under: str = ""
    under_ink: Colour = FAINT


def shade(share: float, colour: Colour = (250, 190, 60)) -> Colour:
    """White for 0, the colour for 1."""
    share = min(max(share, 0.0), 1.0)
    return tuple(round(255 + (c - 255) * share) for c in colour)  # type: ignore[return-value]


def text_image(pieces: Sequence[Piece], *, width: int = 720, size: int = 15) -> Any:
    """A Pillow image, broken into lines of ``width`` pixels."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(size=size), ImageFont.load_default(size=max(size - 4, 8))
    gap = 8
    below = any(p.under for p in pieces)
    step = round(size * (2.5 if below else 1.6))
    x, y = gap, gap
    placed: list[tuple[int, int, Piece, int, int]] = []
    for piece in pieces:
        if piece.text == "\n":
            x, y = gap, y + step
            continue
        for number, word in enumerate(_words(piece.text)):
            wide = round(font.getlength(word))
            room = max(wide, round(small.getlength(piece.under)) + 4 if piece.under and not number else 0)
            if x + room > width - gap and x > gap:
                x, y = gap, y + step
                word = word.lstrip()
                wide = round(font.getlength(word))
            shown = Piece(word, piece.ink, piece.fill, "" if number else piece.under, piece.under_ink)
            placed.append((x, y, shown, wide, room))
            x += room
    sheet = Image.new("RGB", (width, y + step + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for left, top, piece, wide, _ in placed:
        if piece.fill is not None:
            pen.rectangle((left, top - 1, left + wide, top + size + 4), fill=piece.fill)
    for left, top, piece, _, _ in placed:
        pen.text((left, top), piece.text, fill=piece.ink, font=font)
        if piece.under:
            pen.text((left + 2, top + size + 4), piece.under, fill=piece.under_ink, font=small)
    return sheet


def _words(text: str) -> list[str]:
    """Words with the blanks before them, so that lines can break between."""
    out: list[str] = []
    for part in text.replace("\n", " ").split(" "):
        out.append(part if not out else f" {part}")
    return [w for w in out if w] or [" "]


def text_picture(pieces: Sequence[Piece], *, width: int = 720, size: int = 15) -> Any:
    """uint8 ``[H, W, 3]``."""
    import numpy as np

    return np.asarray(text_image(pieces, width=width, size=size))
