"""``Source``: one split of a data set, its facts, and its pixels."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from unmask.contracts import DataFacts
from unmask.data.decode import Encoded
from unmask.data.order import shuffled, some_of
from unmask.errors import UserError, nearest

if TYPE_CHECKING:
    from unmask.data.images import Images

STORED_SIDE = 512  # shorter side of stored images, unless a larger image_size asks for more

PART_OF = 10  # a choice of at least one row in so many is read from the cache of the whole


def encoded(value: Any, mode: str | None = None) -> Encoded:
    """A row's image, however the table keeps it, as ``{"bytes", "path"}``."""
    if isinstance(value, dict):
        item: Encoded = {"bytes": value.get("bytes"), "path": value.get("path")}
    elif isinstance(value, (bytes, bytearray)):
        item = {"bytes": bytes(value), "path": None}
    elif isinstance(value, str):
        item = {"bytes": None, "path": value}
    elif value is None:
        item = {"bytes": None, "path": None}
    else:
        raise UserError(f"an image column holds files, not {type(value).__name__}")
    if mode:
        item["mode"] = mode
    return item


@dataclass(eq=False, repr=False)
class Source:
    """One split of a data set.

    dataset: the Hugging Face ``Dataset`` (columns ``image``, not decoded, and ``label`` where there are labels) or
    ``IterableDataset``. fingerprint: changes when the data does. skipped: images that could not be read, as
    ``{"path", "reason"}``; complete once ``facts`` or ``images()`` has been asked for.
    """

    uri: str
    split: str
    dataset: Any
    classes: tuple[str, ...] | None = None
    fingerprint: str = ""
    columns: tuple[str, ...] = ()
    mode: str | None = None  # the Pillow mode that the data's metadata asks for
    streaming: bool = False
    skipped: list[dict[str, str]] = field(default_factory=list)
    cached: bool = True  # whether decoded images may be kept on disk
    workers: int | None = None
    surveyed: dict[str, Any] = field(default_factory=dict)  # streaming: what a look into the shards found
    parent: tuple[Source, np.ndarray] | None = None  # the source that this is a large part of, and which rows

    def __repr__(self) -> str:
        size = "a stream" if self.streaming else f"{len(self)} rows"
        return f"Source({self.uri!r}, {self.split!r}: {size})"

    def __len__(self) -> int:
        """Rows, unreadable ones included. A stream's length is not known."""
        return len(self.dataset)

    def encoded(self, index: int) -> Encoded:
        """The file behind row ``index``."""
        return encoded(self.dataset[int(index)]["image"], self.mode)

    def name_of(self, index: int) -> str:
        """What a person calls row ``index``: its path, or its number."""
        value = self.dataset[int(index)]["image"]
        path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        return path or f"row {index}"

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """int64 ``[N]`` over all rows, -1 where a row has none; None for data without labels."""
        if self.streaming or "label" not in self.dataset.column_names:
            return None
        column = self.dataset.select_columns(["label"]).with_format("arrow")[:]["label"]
        return np.array([-1 if v is None else int(v) for v in column.to_pylist()], dtype=np.int64)

    def images(self, shorter: int | None = STORED_SIDE) -> Images:
        """The decoded images, from the cache where there is one; decodes into it where there is none.

        shorter: the shorter side is stored at no more than this many pixels.
        """
        from unmask.data.cache import decoded

        if shorter not in self._images:
            if self.parent is not None and self.cached:  # a large part is stored with the whole, not once more
                whole, rows = self.parent
                self._images[shorter] = whole.images(shorter).part(rows, self.uri)
            else:
                self._images[shorter] = decoded(self, shorter)
            self.skipped[:] = self._images[shorter].skipped
        return self._images[shorter]

    @functools.cached_property
    def _images(self) -> dict[int | None, Images]:
        return {}

    @functools.cached_property
    def facts(self) -> DataFacts:
        """Count, channels, bit depth, sizes, classes, mean and standard deviation. Decodes the data the first time."""
        base = DataFacts(uri=self.uri, classes=self.classes, columns=self.columns)
        if self.streaming:
            from unmask.data.shards import survey

            return replace(base, **survey(self))
        images = self.images()
        mean, std = images.statistics()
        one = images.one_size
        return replace(
            base,
            count=len(images),
            channels=images.channels,
            bit_depth=images.depth,
            sizes=images.original_sizes,
            image_size=one,
            mean=mean,
            std=std,
        )

    def select(self, indices: Sequence[int] | np.ndarray, tag: str) -> Source:
        """The rows at ``indices``, as a source of its own. tag: what tells this choice from others of the same data."""
        return Source(
            uri=self.uri,
            split=self.split,
            dataset=self.dataset.select([int(i) for i in indices]),
            classes=self.classes,
            fingerprint=f"{self.fingerprint}-{tag}",
            columns=self.columns,
            mode=self.mode,
            cached=self.cached,
            workers=self.workers,
            parent=(self, np.asarray(indices, dtype=np.int64)) if len(indices) * PART_OF >= len(self) else None,
        )


_SLICE = re.compile(r"^(?P<name>[\w-]+)(?:\[(?P<low>\d*%?):(?P<high>\d*%?)\])?$")


def read_split(split: str) -> tuple[str, str, str]:
    """``"train[:80%]"`` -> ("train", "", "80%"). Raises ``UserError``."""
    match = _SLICE.match(split)
    if match is None:
        raise UserError(f"split {split!r} is not understood: write train, test, train[:80%] or train[80%:]")
    return match["name"], match["low"] or "", match["high"] or ""


def sliced(source: Source, low: str, high: str) -> Source:
    """The share between ``low`` and ``high`` ("", "80%", "500") of a fixed shuffled order, kept in the data's order."""
    if not low and not high:
        return source
    n = len(source)

    def position(text: str, default: int) -> int:
        if not text:
            return default
        return min(round(n * int(text[:-1]) / 100) if text.endswith("%") else int(text), n)

    first, last = position(low, 0), position(high, n)
    if first >= last:
        raise UserError(
            f"split {source.split}[{low}:{high}] of {source.uri} holds no image: it takes a rising range within 0 ... {n}"
        )
    part = source.select(np.sort(shuffled(n)[first:last]), f"{low}:{high}")
    part.split = f"{source.split}[{low}:{high}]"
    return part


def limited(source: Source, limit: int | None) -> Source:
    """At most ``limit`` rows, chosen at random once and for all."""
    n = len(source)
    if limit is None or limit >= n:
        return source
    return source.select(some_of(n, limit), f"limit{limit}")


def no_split(uri: str, split: str, known: Sequence[str]) -> UserError:
    """The error for a split that is not there."""
    share = f'; a share of the training images is split="{known[0]}[80%:]"' if split == "test" and known else ""
    return UserError(f"{uri} has no split {split!r}: {nearest(split, known)}{share}")


ALIASES = {"test": ("test", "val", "validation", "valid", "dev"), "train": ("train", "training")}


def find_split(split: str, known: Sequence[str]) -> str | None:
    """The name under which ``known`` holds a split: "test" is also found as val, validation, valid, dev."""
    for name in (split, *ALIASES.get(split, ())):
        if name in known:
            return name
    return None


def skipped_words(skipped: Sequence[Mapping[str, str]], count: int | None = None) -> str:
    """``skipped 10 of 20 images: image file is truncated (6), ...``: the three commonest reasons."""
    reasons = Counter(str(one.get("reason") or "unreadable") for one in skipped).most_common()
    rest = sum(n for _, n in reasons[3:])
    shown = [f"{reason} ({n})" for reason, n in reasons[:3]] + ([f"others ({rest})"] if rest else [])
    total = "" if count is None else f" of {count}"
    return f"skipped {len(skipped)}{total} images: {', '.join(shown)}"
