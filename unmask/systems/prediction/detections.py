"""``Detections``: objects in boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from unmask.systems.prediction.result import Result
from unmask.systems.prediction.segmentation import as_array

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class Detections(Result):
    """Boxes float ``[N, 4]`` as (left, top, right, bottom) in pixels of the input, labels int ``[N]``, scores ``[N]`` in
    0 ... 1, ``size`` (height, width) of the input. ``texts``: what was read in each box, where that is the task."""

    kind: ClassVar[str] = "detections"
    boxes: Any
    labels: Any
    scores: Any
    classes: Sequence[str]
    size: tuple[int, int]
    texts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.boxes = as_array(self.boxes).astype(np.float32).reshape(-1, 4)
        self.labels, self.scores = as_array(self.labels).astype(np.int64), as_array(self.scores).astype(np.float32)

    def name(self, label: int) -> str:
        return str(self.classes[label]) if 0 <= label < len(self.classes) else f"class {label}"

    def words(self) -> str:
        counts = Counter(self.name(int(i)) for i in self.labels)
        return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.most_common(6)) or "nothing"

    def plain(self) -> dict[str, Any]:
        found = [
            {"class": self.name(int(i)), "score": round(float(s), 4), "box": [round(float(v), 2) for v in b]}
            for b, i, s in zip(self.boxes, self.labels, self.scores, strict=True)
        ]
        for entry, text in zip(found, self.texts or (), strict=False):
            entry["text"] = str(text)
        return {**super().plain(), "height": self.size[0], "width": self.size[1], "objects": found}

    def to_coco(self, image_id: int | str | None = None) -> list[dict[str, Any]]:
        """COCO's results: bbox is ``[x, y, width, height]``, category_id the class's number."""
        name = self.source if image_id is None else image_id
        return [
            {
                "image_id": name,
                "category_id": int(i),
                "bbox": [round(float(v), 3) for v in (b[0], b[1], b[2] - b[0], b[3] - b[1])],
                "score": round(float(s), 6),
            }
            for b, i, s in zip(self.boxes, self.labels, self.scores, strict=True)
        ]

    def overlay(self, *, size: int = 512) -> Image.Image:
        """The picture with boxes and names."""
        from PIL import ImageDraw

        from unmask.systems.prediction.drawing import as_picture, font, label, palette, scaled

        height, width = self.size
        ground = as_picture(np.full((height, width, 3), 235, np.uint8) if self.image is None else self.image)
        picture = scaled(ground, min(max(size, height), 1440), sharp=False)
        pen = ImageDraw.Draw(picture)
        colours = palette(max([len(self.classes), *(int(i) + 1 for i in self.labels)]))
        typeface = font(max(picture.height // 34, 11))
        factor = picture.height / height
        order = np.argsort(self.scores)  # the surest on top
        for i in order:
            colour = tuple(int(c) for c in colours[self.labels[i]])
            left, top, right, bottom = (float(v) * factor for v in self.boxes[i])
            right, bottom = max(right, left), max(bottom, top)
            pen.rectangle((left, top, right, bottom), outline=colour, width=max(picture.height // 200, 2))
            text = (self.texts[i] if self.texts else self.name(int(self.labels[i]))) + f" {100 * self.scores[i]:.0f} %"
            half = pen.textlength(text, font=typeface) / 2 + 3
            label(pen, (left + half, top - typeface.size / 2), text, colour, typeface)
        return picture
