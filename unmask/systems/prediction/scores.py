"""``Scores``: probabilities of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from unmask.systems.prediction.result import Result

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


@dataclass
class Scores(Result):
    """Probabilities of classes. ``probabilities[i]`` belongs to ``classes[i]``; they sum to 1."""

    kind: ClassVar[str] = "scores"
    probabilities: Tensor
    classes: Sequence[str]

    @property
    def answer(self) -> str:
        """The likeliest class."""
        return self.top(1)[0][0]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` likeliest classes with their probabilities, likeliest first."""
        values, ids = self.probabilities.float().topk(min(k, len(self.classes)))
        return [(str(self.classes[i]), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]

    def plain(self) -> dict[str, Any]:
        ranked: Mapping[str, float] = {name: round(p, 6) for name, p in self.top(len(self.classes))}
        return {**super().plain(), "answer": self.answer, "probabilities": dict(ranked)}

    def overlay(self, *, size: int = 256, k: int = 5) -> Image.Image:
        """The image, and beside it the ``k`` likeliest classes as bars."""
        return bars(self.top(k), image=self.image, size=size)


def bars(
    ranked: Sequence[tuple[str, float]], *, image: Any = None, size: int = 256, right: str | None = None
) -> Image.Image:
    """Named shares as horizontal bars, right of an image if one is given. ``right``: the name to draw in green."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    row = size / max(len(ranked), 1)
    font = ImageFont.load_default(size=min(max(round(row * 0.42), 8), size // 8))
    left = 0
    picture = None
    if image is not None:
        picture = Image.fromarray(np.asarray(image))
        small = picture.height < size
        width = max(round(picture.width * size / picture.height), 1)
        picture = picture.resize((width, size), Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)
        left = width
    sheet = Image.new("RGB", (left + size, size), "white")
    if picture is not None:
        sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    pad = max(size // 32, 2)
    for i, (name, share) in enumerate(ranked):
        top = i * row
        colour = (64, 145, 92) if name == right else (70, 110, 180)
        pen.text((left + pad, top), f"{name} {100 * share:.0f} %", fill=(20, 20, 20), font=font)
        length = max((size - 2 * pad) * share, 1)
        pen.rectangle((left + pad, top + row * 0.6, left + pad + length, top + row * 0.84), fill=colour)
    return sheet
