"""Images with label maps: read, checked, in training order, and changed together on the device.

batches = SegmentationBatches(SegmentationData(uri="camvid/", image_size=(128, 160)), batch_size=8)
batch = batches.transform(next(batches.iterate()), Seeded(0))
batch["image"]            # float32 [B, 3, H, W], standardised
batch["map"]              # int64 [B, H, W]: class of each pixel, -1 = ignored
batch["segments"]         # int64 [B, H, W]: 1 + number of the segment, 0 = nothing      (panoptic data)
batch["segment_labels"]   # int64 [B, S]: the class of each segment, -1 = none
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unmask.contracts import Batch, DataFacts, Preprocessing
from unmask.data.batches import IMAGENET, padded
from unmask.data.decode import Encoded, Unreadable, decode, header
from unmask.data.map_files import Found, find
from unmask.data.map_settings import VOID_NAMES, SegmentationData
from unmask.data.map_transform import MapTransform
from unmask.data.mapped import Mapped
from unmask.data.order import some_of
from unmask.data.source import limited, read_split, sliced
from unmask.draw import Draw
from unmask.errors import UserError

__all__ = ["MapSource", "Sample", "SegmentationBatches", "SegmentationData", "open_maps"]

SHAPES = "sample:shapes"  # drawn scenes, see shapes.py
IN_MEMORY = 2 << 30  # bytes of decoded images and maps that are kept
LOOK_AT = 64  # label maps that are read whole at once, to see whether they fit, where there are more than memory holds


@dataclass
class Sample:
    """One image uint8 ``[H, W, 3]``; map int32 ``[H, W]``, -1 = ignored; ids int32 ``[H, W]`` (1 + segment number, 0 =
    nothing), with the segments' classes and which are crowds, where the data have segments."""

    image: np.ndarray
    map: np.ndarray
    ids: np.ndarray | None = None
    labels: tuple[int, ...] = ()
    crowds: tuple[bool, ...] = ()


class MapSource:
    """One split of images with label maps: ``source[i]`` is a :class:`Sample`."""

    def __init__(self, found: Found, settings: SegmentationData, rows: np.ndarray | None = None):
        self.found, self.settings = found, settings
        self.uri, self.split, self.skipped = found.uri, found.split, found.skipped
        self.rows = np.arange(len(found.images)) if rows is None else rows
        self._kept: dict[int, Sample] = {}
        self.keeps = True

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Any, tag: str = "") -> MapSource:
        """The rows at ``indices``, as a source of its own."""
        return MapSource(self.found, self.settings, self.rows[np.asarray(indices, dtype=np.int64)])

    def name_of(self, index: int) -> str:
        return self.found.names[int(self.rows[index])]

    # --- classes ---
    @functools.cached_property
    def values(self) -> tuple[dict[int, int], tuple[str, ...]]:
        """value in a file -> class number, for every value that means a class; and the names of the classes."""
        s, first = self.settings, self.settings.first_class
        names: tuple[str, ...] | None = self.found.classes
        if s.classes is not None:
            names = tuple(map(str, range(s.classes))) if isinstance(s.classes, int) else s.classes
        given = () if s.ignore is None else (s.ignore,) if isinstance(s.ignore, int) else s.ignore
        if self.found.segments is not None:
            assert names is not None
            return {i: i for i in range(len(names))}, names
        if names is None:
            highest = self._highest({255, 65535, *given})
            names = tuple(str(i) for i in range(highest - first + 1))
        left_out = set(given)
        if s.ignore is None:
            left_out |= {i + first for i, name in enumerate(names) if name.lower() in VOID_NAMES}
        kept = [i for i in range(len(names)) if i + first not in left_out]
        if not kept:
            raise UserError(f"{self.uri}: data.ignore leaves no class of {', '.join(names)}")
        return {i + first: place for place, i in enumerate(kept)}, tuple(names[i] for i in kept)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.values[1]

    @functools.cached_property
    def things(self) -> tuple[int, ...]:
        """Numbers of the classes that are countable objects."""
        if self.settings.things is None:
            return self.found.things or ()
        known = {name: i for i, name in enumerate(self.classes)}
        out = []
        for thing in self.settings.things:
            place = known.get(thing) if isinstance(thing, str) else thing
            if place is None or not 0 <= place < len(known):
                from unmask.errors import nearest

                raise UserError(f"data.things names {thing!r}, no class of {self.uri}: {nearest(str(thing), known)}")
            out.append(place)
        return tuple(sorted(set(out)))

    @property
    def has_segments(self) -> bool:
        """Whether samples come with segments. Raises ``UserError`` where they are wanted and not there."""
        if self.settings.segments and self.found.segments is None:
            raise UserError(f"{self.uri} has no segments (COCO panoptic JSON and PNG): leave data.segments out")
        return self.found.segments is not None and self.settings.segments is not False

    def _highest(self, ignored: set[int]) -> int:
        def of(row: int) -> int:
            values = np.unique(read_map(self.found.maps[row], self.found.names[row]))
            return int(max((v for v in values if int(v) not in ignored), default=-1))

        highest = max(self.each(of, range(len(self.found.images))))
        if highest < self.settings.first_class:
            raise UserError(f"the label maps of {self.uri} hold no class: name them with classes.txt or data.classes=K")
        return highest

    # --- reading ---
    def __getitem__(self, index: int) -> Sample:
        """Raises ``UserError`` for an image or map that cannot be read, of different sizes, or with an unknown value."""
        row = int(self.rows[index])
        kept = self._kept.get(row)
        if kept is None:
            kept = self._read(row)
            if self.keeps:
                self._kept[row] = kept
        return kept

    def _read(self, row: int) -> Sample:
        found, name = self.found, self.found.names[row]
        try:
            image = colour(decode(found.images[row]))
        except Unreadable as error:
            raise UserError(f"the image of {name} cannot be read: {error}") from None
        values = read_map(found.maps[row], name, ids=found.segments is not None)
        if values.shape != image.shape[:2]:
            raise UserError(
                f"{name} has {values.shape[1]} x {values.shape[0]} pixels, its image {image.shape[1]} x {image.shape[0]}"
            )
        if found.segments is not None:
            return self._segmented(image, values, found.segments[row], name)
        return Sample(image, self._as_classes(values, name))

    def _as_classes(self, values: np.ndarray, name: str) -> np.ndarray:
        meaning, names = self.values
        s = self.settings
        nothing = {255, 65535} if s.ignore is None else {s.ignore} if isinstance(s.ignore, int) else set(s.ignore)
        if s.ignore is None and s.first_class:
            nothing |= set(range(s.first_class))
        table = np.full(int(values.max(initial=0)) + 1, -1, dtype=np.int32)
        for value in np.unique(values).tolist():
            if value in meaning:
                table[value] = meaning[value]
            elif value not in nothing and not self._void(value):
                raise UserError(
                    f"{name} holds the value {value}, no class of {len(names)} and not ignored: "
                    f"add it to classes.txt, or data.ignore={value}"
                )
        return table[values]

    def _void(self, value: int) -> bool:
        """Whether a value is that of a class whose name says that it is none."""
        names, place = self.found.classes, value - self.settings.first_class
        return (
            self.settings.ignore is None
            and names is not None
            and 0 <= place < len(names)
            and (names[place].lower() in VOID_NAMES)
        )

    def _segmented(self, image: np.ndarray, values: np.ndarray, segments: list[dict[str, Any]], name: str) -> Sample:
        known = {int(s["id"]): i for i, s in enumerate(segments)}
        present, inverse = np.unique(values, return_inverse=True)
        unknown = [int(v) for v in present if v and int(v) not in known]
        if unknown:
            raise UserError(f"{name} holds the segment {unknown[0]}, which its segments_info does not list")
        ids = np.array([known[int(v)] + 1 if v else 0 for v in present], dtype=np.int32)
        labels = [int(s["category_id"]) for s in segments]
        classes = np.array([labels[known[int(v)]] if v else -1 for v in present], dtype=np.int32)
        crowds = tuple(bool(s.get("iscrowd")) for s in segments)
        place = inverse.reshape(values.shape)
        return Sample(image, classes[place], ids[place], tuple(labels), crowds)

    # --- a look at everything ---
    def check(self) -> None:
        """Read what fits into memory (else some), so that what does not fit is said before a training starts; sizes are
        compared by the files' heads. Raises ``UserError``."""
        heads = self.each(self._head, self.rows.tolist())
        self.sizes = np.array(heads, dtype=np.int64)
        self.keeps = int(self.sizes.prod(axis=1).sum()) * (3 + 8) <= IN_MEMORY
        places = np.arange(len(self)) if self.keeps else some_of(len(self), LOOK_AT)
        self.each(self.__getitem__, places.tolist())

    def _head(self, row: int) -> tuple[int, int]:
        try:
            image, label = header(self.found.images[row]), header(self.found.maps[row])
        except Unreadable as error:
            raise UserError(f"{self.found.names[row]} or its image cannot be read: {error}") from None
        if (image.height, image.width) != (label.height, label.width):
            raise UserError(
                f"{self.found.names[row]} has {label.width} x {label.height} pixels, its image {image.width} x {image.height}"
            )
        return image.height, image.width

    def each(self, function: Any, items: Any) -> list[Any]:
        """``function`` of every item, on threads."""
        with ThreadPoolExecutor(self.settings.workers or min(os.cpu_count() or 1, 16)) as pool:
            return list(pool.map(function, items))


def open_maps(settings: SegmentationData) -> MapSource:
    """The images and label maps that the settings name. Raises ``UserError`` in one line."""
    name, low, high = read_split(settings.split)
    if settings.uri == SHAPES:
        from unmask.data.shapes import ShapeSource

        scenes: Any = ShapeSource(settings, name)
        return limited(sliced(scenes, low, high), settings.limit)  # type: ignore[return-value]
    source: Any = MapSource(find(settings.uri, name, settings.columns), settings)
    return limited(sliced(source, low, high), settings.limit)  # type: ignore[return-value]


def read_map(item: Encoded, name: str, *, ids: bool = False) -> np.ndarray:
    """The integers of a label map, int32 ``[H, W]``: a palette's indices, grey levels, or (``ids``) R + 256 G + 65536 B.
    Raises ``UserError`` for a colour picture where numbers are needed."""
    import io

    try:
        with Image.open(io.BytesIO(item["bytes"]) if item.get("bytes") is not None else str(item["path"])) as picture:
            picture.load()
            pixels = np.asarray(
                picture if picture.mode in ("P", "L", "I", "I;16", "I;16B", "1", "RGB") else picture.convert("RGB")
            )
    except Exception as error:  # decoders raise anything on a broken file
        raise UserError(f"{name} cannot be read as a label map: {' '.join(str(error).split())[:120]}") from None
    values = pixels.astype(np.int32)
    if ids:
        return values if values.ndim == 2 else values[..., 0] + 256 * values[..., 1] + 65536 * values[..., 2]
    if values.ndim == 3:
        if not ((values[..., 0] == values[..., 1]) & (values[..., 0] == values[..., 2])).all():
            raise UserError(
                f"{name} is a colour picture: a label map is a grey or palette PNG, one class number a pixel"
            )
        values = values[..., 0]
    return values


def colour(array: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, 3]``: grey repeated, 16 bits and floats brought to 8."""
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        top = 255.0 if array.max(initial=0) > 1 else 1.0
        array = np.rint(array / top * 255).clip(0, 255).astype(np.uint8)
    return np.repeat(array[..., :1], 3, axis=-1) if array.shape[-1] < 3 else array[..., :3]


class SegmentationBatches(Mapped):
    """Training batches of images with label maps (see the module).

    source: opened already, or None to open what the settings name. Raises ``UserError`` for data that do not fit."""

    what = "images"
    waiting = 2

    def __init__(
        self, settings: SegmentationData, batch_size: int = 8, seed: int = 0, *, source: MapSource | None = None
    ):
        self.source = source or open_maps(settings)
        super().__init__(len(self.source), batch_size, seed, uri=self.source.uri)
        self.settings = settings
        self.skipped = self.source.skipped
        self.source.check()
        sizes = self.source.sizes
        size = settings.size or _crop_of(sizes)
        mean, std = {"half": ((0.5,) * 3, (0.5,) * 3), "none": ((0.0,) * 3, (1.0,) * 3)}.get(
            settings.normalise, IMAGENET
        )
        self.preprocessing = Preprocessing(mean=mean, std=std, image_size=size, interpolation="bilinear")
        self.apply = MapTransform(settings, self.preprocessing)
        order = sizes[sizes.prod(axis=1).argsort(kind="stable")]
        height_width = [(int(h), int(w)) for h, w in (order[0], order[len(order) // 2], order[-1])]
        self.facts = DataFacts(
            uri=self.source.uri,
            count=self.count,
            channels=3,
            image_size=size,
            classes=self.source.classes,
            mean=mean,
            std=std,
            bit_depth=8,
            sizes=(height_width[0], height_width[1], height_width[2]),
            columns=("image", "map", *(("segments",) if self.source.has_segments else ())),
            extra={"things": self.source.things, "segments": self.source.has_segments},
        )

    def fetch(self, indices: np.ndarray) -> Batch:
        """Raw: ``image`` uint8 ``[B, 3, H, W]`` and ``map`` int32 ``[B, H, W]``, padded at the lower right; ``size`` int64
        ``[B, 2]``; ``index``; ``segments`` and ``segment_labels`` where there are any."""
        many = not self.source.keeps  # then each of them is decoded now
        samples = self.source.each(self.source.__getitem__, indices) if many else [self.source[int(i)] for i in indices]
        return raw_batch(samples, indices, self.source.has_segments)

    def transform(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> Batch:
        """``image`` float32 standardised, ``map`` and ``segments`` int64 of one size; ``size`` int64 ``[B, 2]``: what of it is
        image and not padding."""
        return self.apply(batch, draw, train=train)

    def whole(self, batch_size: int = 1, limit: int | None = None) -> Iterator[tuple[Batch, list[Sample]]]:
        """Every sample once, in order, as evaluation sees it, and the samples themselves at their own size (what a prediction
        is compared with). ``size`` tells the image's part of each padded picture."""
        numbers = np.arange(self.count) if limit is None else some_of(self.count, limit)
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            samples = [self.source[int(i)] for i in some]
            raw = raw_batch(samples, some, self.source.has_segments)
            yield self.transform(raw, train=False), samples


def raw_batch(samples: list[Sample], indices: np.ndarray, segments: bool) -> dict[str, Any]:
    """Samples of any sizes as one batch, see ``SegmentationBatches.fetch``."""
    images, sizes = padded([s.image for s in samples])
    batch: dict[str, Any] = {
        "image": torch.from_numpy(images).permute(0, 3, 1, 2),
        "map": _together([s.map for s in samples], images.shape[1:3], -1),
        "size": torch.from_numpy(sizes),
        "index": torch.from_numpy(np.array(indices, dtype=np.int64)),
    }
    if segments:
        batch["segments"] = _together([s.ids for s in samples if s.ids is not None], images.shape[1:3], 0)
        most = max(max((len(s.labels) for s in samples), default=0), 1)
        labels = torch.full((len(samples), most), -1, dtype=torch.int64)
        for row, sample in zip(labels, samples, strict=True):
            for i, (label, crowd) in enumerate(zip(sample.labels, sample.crowds, strict=True)):
                row[i] = -1 if crowd else label
        batch["segment_labels"] = labels
    return batch


def _together(maps: list[np.ndarray], size: Any, filling: int) -> Tensor:
    out = np.full((len(maps), *size), filling, dtype=np.int32)
    for place, one in zip(out, maps, strict=True):
        place[: one.shape[0], : one.shape[1]] = one
    return torch.from_numpy(out)


def _crop_of(sizes: np.ndarray) -> tuple[int, int]:
    """Where the user leaves it open: the median size, down to multiples of 32, at most 512."""
    height, width = (int(np.median(side)) for side in sizes.T)
    return min(max(height // 32 * 32, 32), 512), min(max(width // 32 * 32, 32), 512)
