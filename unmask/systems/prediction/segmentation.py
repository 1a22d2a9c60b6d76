"""``Segmentation``: which class, and which object, each pixel of a picture belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from unmask.systems.prediction.result import Result, png

if TYPE_CHECKING:
    from PIL import Image

NOTHING = -1  # the label of a pixel that belongs to no class
Task = Literal["semantic", "panoptic", "instance"]


@dataclass
class Segment:
    """One region. ``id``: its value in ``Segmentation.ids`` (from 1); ``label``: its class; ``score`` in 0 ... 1 where the
    model gives one; ``area`` in pixels; ``thing``: an object that can be counted, not stuff. ``mask``: bool ``[H, W]``, for
    instances, which may overlap."""

    id: int
    label: int
    area: int
    score: float | None = None
    thing: bool = True
    mask: Any = field(default=None, repr=False)


@dataclass
class Segmentation(Result):
    """Segments of a picture.

    map: int ``[H, W]`` (a tensor or an array), the class of each pixel; ``NOTHING`` (-1) where there is none. classes: their
    names. task: "semantic" (the map alone), "panoptic" (``ids`` int ``[H, W]``, 0 = nothing, and ``segments``) or "instance"
    (``segments`` with masks). things: which classes are objects. colours: uint8 ``[K, 3]``; open: a fixed palette.
    """

    kind: ClassVar[str] = "segmentation"
    map: Any
    classes: Sequence[str]
    task: Task = "semantic"
    segments: list[Segment] | None = None
    ids: Any = None
    things: Sequence[int] = ()
    colours: Any = None

    def __post_init__(self) -> None:
        self.map = as_array(self.map).astype(np.int32)
        self.ids = None if self.ids is None else as_array(self.ids).astype(np.int32)
        if self.task == "panoptic" and (self.ids is None or self.segments is None):
            raise ValueError("a panoptic segmentation needs ids and segments")
        for segment in self.segments or []:
            segment.mask = None if segment.mask is None else as_array(segment.mask).astype(bool)

    # --- what it says ---
    def name(self, label: int) -> str:
        """The class's name; its number where it has none."""
        return str(self.classes[label]) if 0 <= label < len(self.classes) else f"class {label}"

    def mask_of(self, segment: Segment) -> np.ndarray:
        """bool ``[H, W]``: the pixels of a segment."""
        if segment.mask is not None:
            return segment.mask
        return (self.map == segment.label) if self.ids is None else (self.ids == segment.id)

    def regions(self) -> list[Segment]:
        """The segments; for a semantic map one a class that occurs, largest first."""
        if self.segments is not None:
            return self.segments
        found, areas = np.unique(self.map[self.map >= 0], return_counts=True)
        regions = [
            Segment(int(label) + 1, int(label), int(area), None, int(label) in self.things)
            for label, area in zip(found, areas, strict=True)
        ]
        return sorted(regions, key=lambda s: (-s.area, s.id))

    def rows(self) -> list[dict[str, Any]]:
        """A table: class, score, area as a share of the picture; largest first."""
        pixels = self.map.size
        return [
            {
                "class": self.name(s.label),
                "score": None if s.score is None else round(float(s.score), 4),
                "area": round(s.area / pixels, 4),
            }
            for s in sorted(self.regions(), key=lambda s: (-s.area, s.id))
        ]

    def words(self) -> str:
        """``Road 38 %, Car 7 %``: the largest classes."""
        shares: Counter[str] = Counter()
        for row in self.rows():
            shares[row["class"]] += row["area"]
        if self.task == "semantic" or not self.segments:
            return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.most_common(5)) or "nothing"
        counts = Counter(self.name(s.label) for s in self.segments)
        return ", ".join(f"{counts[n]} x {n}" if counts[n] > 1 else n for n, _ in shares.most_common(6))

    def plain(self) -> dict[str, Any]:
        height, width = self.map.shape
        values = {
            **super().plain(),
            "task": self.task,
            "height": height,
            "width": width,
            "classes": [str(c) for c in self.classes],
            "nothing": None if self.task == "panoptic" else self.nothing_value,
            "segments": self.rows(),
        }
        if self.task == "panoptic":
            values["segments_info"] = self.segments_info()
        if self.task == "instance":
            values["annotations"] = self.to_coco()
        return values

    # --- what it is saved as ---
    @property
    def nothing_value(self) -> int:
        """The value of pixels without a class in the saved label map."""
        return 255 if len(self.classes) < 256 else 65535

    def label_png(self) -> bytes:
        """The label map as a grey PNG: 8 bits up to 255 classes (nothing is 255), else 16 (65535)."""
        width = np.uint8 if self.nothing_value == 255 else np.uint16
        return png(np.where(self.map < 0, self.nothing_value, self.map).astype(width))

    def panoptic_png(self) -> bytes:
        """COCO's panoptic PNG: the id of a pixel's segment is R + 256 G + 65536 B; 0 is nothing."""
        ids = self.ids
        return png(np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8))

    def files(self) -> dict[str, bytes]:
        return {".png": self.panoptic_png() if self.task == "panoptic" else self.label_png()}

    def segments_info(self) -> list[dict[str, Any]]:
        """COCO's ``segments_info``: id, category_id (the class's number), area, bbox ``[x, y, width, height]``, iscrowd."""
        return [
            {
                "id": s.id,
                "category_id": s.label,
                "area": s.area,
                "bbox": box_of(self.mask_of(s)),
                "iscrowd": 0,
                "isthing": int(s.thing),
                **({} if s.score is None else {"score": round(float(s.score), 6)}),
            }
            for s in self.segments or []
        ]

    def to_coco(self, image_id: int | str | None = None) -> Any:
        """panoptic: one annotation of COCO's panoptic JSON; else a list of COCO results with run-length masks, as
        ``pycocotools`` reads them. image_id: the input's name if open."""
        image_id = self.source if image_id is None else image_id
        if self.task == "panoptic":
            return {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": self.segments_info()}
        out = []
        for s in self.regions():
            mask = self.mask_of(s)
            entry: dict[str, Any] = {
                "image_id": image_id,
                "category_id": s.label,
                "bbox": box_of(mask),
                "area": int(mask.sum()),
            }
            entry["segmentation"] = {"size": list(mask.shape), "counts": run_lengths(mask)}
            out.append(entry if s.score is None else {**entry, "score": round(float(s.score), 6)})
        return out

    def overlay(self, *, size: int = 512, opacity: float = 0.5) -> Image.Image:
        """The picture with coloured segments, borders and names, and a legend of classes and their shares."""
        from unmask.systems.prediction.segment_drawing import drawn

        return drawn(self, size=size, opacity=opacity)


def as_array(value: Any) -> np.ndarray:
    """A tensor or array as an array on the CPU."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def box_of(mask: np.ndarray) -> list[int]:
    """``[x, y, width, height]`` of the pixels that are set; zeros where none is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def run_lengths(mask: np.ndarray) -> str:
    """COCO's compressed run lengths of a bool ``[H, W]``: columns first, runs of 0 and 1 in turn, each from the third on
    as its difference to the run two before, in groups of five bits (the format of pycocotools)."""
    flat = np.asarray(mask, dtype=bool).T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    out = []
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != -1 if bits & 16 else value != 0
            out.append(chr((bits | 32 if more else bits) + 48))
    return "".join(out)
