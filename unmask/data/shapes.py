"""Drawn scenes with exact panoptic truth: ``sample:shapes``. As many as one likes, the same for the same number.

Two stuff classes, a plain colour and stripes, parted by a random line; on them three to six discs, squares, triangles and rings
in random colours, which cover each other in the order they are drawn; noise of 0.1 of the range. A segment is what can be
seen of a thing; fewer than 25 pixels of it count as nothing.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from unmask.data.map_settings import SegmentationData
from unmask.errors import UserError, nearest

if TYPE_CHECKING:
    from unmask.data.maps import Sample

URI = "sample:shapes"
CLASSES = ("plain", "stripes", "disc", "square", "triangle", "ring")
THINGS = (2, 3, 4, 5)
COUNTS = {"train": 100_000, "test": 200}
SIDE, SMALLEST, NOISE = 128, 25, 0.1


class ShapeSource:
    """Scenes of one split, as :class:`unmask.data.maps.MapSource` gives images with label maps.

    ``image_size`` of the settings is the scenes' size (128 where it is open). Raises ``UserError`` for an unknown split.
    """

    def __init__(self, settings: SegmentationData, split: str = "train", rows: np.ndarray | None = None):
        if split not in COUNTS:
            raise UserError(f"{URI} has no split {split!r}: {nearest(split, COUNTS)}")
        self.settings, self.split, self.uri = settings, split, settings.uri
        self.size = settings.size or (SIDE, SIDE)
        if min(self.size) < 32:
            raise UserError(f"{URI}: image_size={settings.image_size} is too small for shapes: use 32 pixels or more")
        self.rows = np.arange(COUNTS[split]) if rows is None else rows
        self.keeps = True  # they are drawn faster than threads are asked
        self.classes, self.things = CLASSES, THINGS
        self.skipped: list[dict[str, str]] = []
        self.has_segments = settings.segments is not False
        if settings.classes is not None or settings.things is not None:
            raise UserError(f"{URI} knows its classes and things: leave data.classes and data.things out")

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Any, tag: str = "") -> ShapeSource:
        """The scenes at ``indices``, as a source of its own."""
        return ShapeSource(self.settings, self.split, self.rows[np.asarray(indices, dtype=np.int64)])

    def name_of(self, index: int) -> str:
        return f"scene {int(self.rows[index])}"

    def check(self) -> None:
        self.sizes = np.tile(np.array(self.size, dtype=np.int64), (len(self), 1))

    def __getitem__(self, index: int) -> Sample:
        from unmask.data.maps import Sample

        image, ids, labels = scene(int(self.rows[index]), self.size, self.split)
        table = np.array([-1, *labels], dtype=np.int32)
        return Sample(image, table[ids], ids if self.has_segments else None, labels, (False,) * len(labels))


def scene(number: int, size: tuple[int, int] = (SIDE, SIDE), split: str = "train") -> tuple[Any, Any, tuple[int, ...]]:
    """One scene: uint8 ``[H, W, 3]``; int32 ids ``[H, W]`` (1 + number of the segment, 0 = nothing); the segments' classes.

    A pure function of its arguments."""
    key = int.from_bytes(hashlib.blake2b(split.encode(), digest_size=8).digest(), "little")
    random = np.random.Generator(np.random.Philox(key=[key, number]))
    height, width = size
    rows, columns = np.mgrid[:height, :width].astype(np.float32) + 0.5
    picture = np.empty((height, width, 3), dtype=np.float32)
    ids = np.ones((height, width), dtype=np.int32)
    labels = [0, 1]

    plain, light, dark = random.uniform(0.1, 0.9, (3, 3))
    picture[:] = plain
    side = _side(random, rows, columns, size)
    angle, period = random.uniform(0, np.pi), random.uniform(0.06, 0.14) * min(size)
    wave = (rows * np.sin(angle) + columns * np.cos(angle)) / period % 1 < 0.5
    picture[side] = np.where(wave[..., None], light, dark)[side]
    ids[side] = 2

    for _ in range(int(random.integers(3, 7))):
        kind = int(random.integers(2, 6))
        inside = _shape(random, kind, rows, columns, size)
        labels.append(kind)
        picture[inside] = random.uniform(0, 1, 3)
        ids[inside] = len(labels)

    noisy = picture + random.normal(0, NOISE, picture.shape).astype(np.float32)
    image = np.rint(noisy.clip(0, 1) * 255).astype(np.uint8)
    areas = np.bincount(ids.ravel(), minlength=len(labels) + 1)[1:]
    kept = [i for i, area in enumerate(areas) if area >= SMALLEST]
    table = np.zeros(len(labels) + 1, dtype=np.int32)
    for place, i in enumerate(kept):
        table[i + 1] = place + 1
    return image, table[ids], tuple(labels[i] for i in kept)


def _side(random: np.random.Generator, rows: Any, columns: Any, size: tuple[int, int]) -> Any:
    """bool ``[H, W]``: one side of a line through the middle part of the picture."""
    angle = random.uniform(0, 2 * np.pi)
    y, x = random.uniform(0.3, 0.7, 2) * size
    return (rows - y) * np.sin(angle) + (columns - x) * np.cos(angle) > 0


def _shape(random: np.random.Generator, kind: int, rows: Any, columns: Any, size: tuple[int, int]) -> Any:
    """bool ``[H, W]``: a disc, square, triangle or ring, its centre in the picture, its radius 8 to 20 % of the shorter side."""
    y, x = random.uniform(0.1, 0.9, 2) * size
    radius = random.uniform(0.08, 0.2) * min(size)
    turn = random.uniform(0, 2 * np.pi)
    down, right = rows - y, columns - x
    if kind in (2, 5):
        distance = np.hypot(down, right)
        return (distance <= radius) if kind == 2 else (distance <= radius) & (distance >= 0.55 * radius)
    corners = 4 if kind == 3 else 3
    inner = radius * np.cos(np.pi / corners)  # a polygon is where it lies below each of its sides
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    return np.all([down * np.sin(a) + right * np.cos(a) <= inner for a in angles], axis=0)
