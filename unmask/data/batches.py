"""``Batches``: a source in training order, and what becomes of its images on the device.

    raw = next(batches.iterate(step))               # uint8 on the CPU, read ahead by a thread
    batch = batches.transform(to_device(raw), draw) # augmented, standardised float32 on the device

For data at hand the order is a pure function of (seed, epoch, number of images), so that a position is a step and
nothing else; for streams (``streaming.py``) it is what ``state_dict`` returns.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.config import validated
from unmask.contracts import Batch, DataFacts, Preprocessing
from unmask.data.images import FULL_RANGE, Images
from unmask.data.order import shuffled, some_of
from unmask.data.prefetch import ahead
from unmask.data.settings import DataSettings
from unmask.data.source import STORED_SIDE, Source
from unmask.data.transforms import Transform
from unmask.draw import Draw
from unmask.errors import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Batches:
    """Training batches of a source.

    batch_size: samples of an optimiser step, over all processes and accumulation. preprocessing: what a trained model
    expects; it then decides size, channels and standardisation instead of the settings. Raises ``UserError`` for a batch
    larger than the data.
    """

    def __init__(
        self,
        source: Source,
        settings: DataSettings | None = None,
        batch_size: int = 64,
        seed: int = 0,
        *,
        preprocessing: Preprocessing | None = None,
    ):
        self.source, self.batch_size, self.seed = source, int(batch_size), int(seed)
        self.settings = settings or validated(DataSettings, {"uri": source.uri, "split": source.split}, where="data")
        if self.batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        source.workers = self.settings.workers or source.workers
        if not self.settings.cache:
            source.cached = False
        found = source.facts
        count = found.count
        if count is not None and not source.streaming and self.batch_size > count:
            raise UserError(
                f"batch_size={batch_size} is more than the {count} images of {source.uri}: use --batch-size {count}"
            )
        self.preprocessing = preprocessing or _preprocessing(self.settings, found)
        self.facts: DataFacts = replace(
            found,
            image_size=tuple(self.preprocessing.image_size),
            channels=self.preprocessing.channels,
            mean=tuple(self.preprocessing.mean),
            std=tuple(self.preprocessing.std),
        )
        assert found.channels is not None
        self.apply = Transform(
            self.settings,
            self.preprocessing,
            channels=found.channels,
            one_size=found.image_size is not None,
            full_range=_full_range(found),
        )
        self._state: dict[str, Any] = {}

    @property
    def steps_per_epoch(self) -> int | None:
        """Whole batches in an epoch; None where the length is not known."""
        return None if self.facts.count is None else max(self.facts.count // self.batch_size, 1)

    @functools.cached_property
    def stored_side(self) -> int:
        """Pixels that the shorter side of a stored image is limited to."""
        return stored_side(tuple(self.preprocessing.image_size))

    @functools.cached_property
    def images(self) -> Images:
        """The decoded images, larger ones with a shorter side of twice the training size or more."""
        return self.source.images(self.stored_side)

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """int64 ``[n]``, by number of the readable image; None for data without labels."""
        labels = self.source.labels
        return None if labels is None else labels[self.images.rows]

    # --- order ---
    @functools.lru_cache(maxsize=2)  # noqa: B019  (two epochs of one object)
    def order(self, epoch: int) -> np.ndarray:
        """int64: the numbers of an epoch's images, in order; a pure function of (seed, epoch, count)."""
        return shuffled(len(self.images), seed=(self.seed << 24) ^ epoch)

    def indices(self, step: int) -> np.ndarray:
        """int64 ``[batch_size]``: the images of an optimiser step. What does not fill a batch is left out of an epoch."""
        assert self.steps_per_epoch is not None
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def iterate(
        self,
        start_step: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> Iterator[Batch]:
        """This process's raw micro-batches, in order, without end: ``accumulate`` of them a step.

        A global batch is cut into ``accumulate`` slices, each of them into one slice a process, all contiguous.
        state: what ``state_dict`` returned, for streams. Each batch: ``image`` (uint8, or float32 for deeper data,
        ``[B, C, H, W]``, padded at the lower right where sizes differ), ``size`` int64 ``[B, 2]`` (height, width),
        ``index`` int64 ``[B]``, and ``label`` int64 ``[B]`` (-1: none) where there are labels.
        """
        share = self.batch_size // (world * accumulate)
        if share * world * accumulate != self.batch_size:
            raise UserError(
                f"batch_size={self.batch_size} cannot be shared by {world} processes x {accumulate} accumulated batches: "
                f"use a multiple of {world * accumulate}"
            )
        if self.source.streaming:
            from unmask.data.streaming import stream

            return stream(self, share, rank, world, dict(state or {}))
        # batches of large, unequal images are big: fewer of them wait
        return ahead(
            self._map_style(start_step, share, rank, world, accumulate), depth=2 if self.images.together is None else 4
        )

    def _map_style(self, step: int, share: int, rank: int, world: int, accumulate: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(self.source.workers or min(os.cpu_count() or 1, 16)) as pool:
            while True:
                indices = self.indices(step)
                for micro in range(accumulate):
                    first = (micro * world + rank) * share
                    yield self.raw(indices[first : first + share], pool)
                step += 1

    def raw(self, indices: np.ndarray | list[int], pool: ThreadPoolExecutor | None = None) -> Batch:
        """The images of these numbers, as they are stored."""
        indices = np.asarray(indices, dtype=np.int64)
        if self.images.together is not None:
            pixels, actual = self.images.together[indices], indices
            sizes = self.images.sizes[indices]
        else:
            mapper = pool.map if pool is not None and self.images.parallel else map
            read = list(mapper(self.images.read, [int(i) for i in indices]))
            actual = np.array([i for _, i in read], dtype=np.int64)
            pixels, sizes = padded([p for p, _ in read])
        batch = {"image": tensor(pixels), "size": torch.from_numpy(sizes), "index": torch.from_numpy(actual.copy())}
        if self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels[actual])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position of a stream after the last batch that ``iterate`` gave, JSON-able; empty for data at hand."""
        return dict(self._state)

    # --- transform ---
    def transform(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> dict[str, Any]:
        """Augmented (``train``) and standardised, on the batch's device: ``image`` float32 ``[B, C, H, W]``, ``index``,
        ``label``. draw: needed for training."""
        return self.apply(batch, draw, train=train)

    def samples(self, n: int) -> dict[str, Any]:
        """``n`` samples, a fixed random choice, as evaluation sees them."""
        if self.source.streaming:
            from unmask.data.streaming import first_samples

            return self.transform(first_samples(self, n), train=False)
        count = len(self.images)
        n = min(n, count)
        return self.transform(self.raw(some_of(count, n)), train=False)


def everything(
    data: Source | Batches,
    batch_size: int = 256,
    *,
    preprocessing: Preprocessing | None = None,
    settings: DataSettings | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Every image once, in the source's order, as evaluation sees it. The last batch may be smaller."""
    if isinstance(data, Source):
        data = Batches(data, settings, batch_size=1, preprocessing=preprocessing)
    batches = data
    if batches.source.streaming:
        from unmask.data.streaming import once

        parts: Iterator[Batch] = once(batches, batch_size)
    else:
        count = len(batches.images)
        numbers = [np.arange(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]

        def parts_of() -> Iterator[Batch]:
            with ThreadPoolExecutor(batches.source.workers or min(os.cpu_count() or 1, 16)) as pool:
                for some in numbers:
                    yield batches.raw(some, pool)

        parts = parts_of()
    for raw in ahead(parts, depth=2):
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in raw.items()}
        yield batches.transform(moved, train=False)


def padded(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """``[B, H, W, C]`` of the largest height and width, zeros at the lower right, and int64 ``[B, 2]`` sizes."""
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    height, width = sizes.max(axis=0)
    same = (sizes == sizes[0]).all()
    out = (np.empty if same else np.zeros)((len(images), height, width, images[0].shape[2]), dtype=images[0].dtype)
    for place, image in zip(out, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return out, sizes


def tensor(pixels: np.ndarray) -> Tensor:
    """``[B, C, H, W]``, a view of ``[B, H, W, C]`` (channels last). 16 bits become float32, which every device handles."""
    if pixels.dtype == np.uint16:
        pixels = pixels.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)


def stored_side(size: tuple[int, ...]) -> int:
    """The shorter side of stored images: twice the training size, in powers of two so that trainings share a cache."""
    side = STORED_SIDE
    while side < 2 * max(size):
        side *= 2
    return side


def default_size(facts: DataFacts) -> tuple[int, int]:
    """Where the user leaves the size open: the images' own if all have one of at most 256 pixels, else the largest
    multiple of 32 up to 224 that the median shorter side reaches."""
    one = facts.image_size
    if one is not None and max(one) <= 256:
        return int(one[0]), int(one[1])
    assert facts.sizes is not None
    side = min(max(min(facts.sizes[1]) // 32 * 32, 32), 224)
    return side, side


def _full_range(facts: DataFacts) -> float:
    return FULL_RANGE[facts.bit_depth or 8]


def _preprocessing(settings: DataSettings, facts: DataFacts) -> Preprocessing:
    channels = facts.channels or 3
    mean: tuple[float, ...]
    std: tuple[float, ...]
    if settings.normalise == "imagenet":
        if channels != 3:
            raise UserError(f"normalise=imagenet is for 3 channels, {facts.uri} has {channels}: use normalise=dataset")
        mean, std = IMAGENET
    elif settings.normalise == "half":
        mean, std = (0.5,) * channels, (0.5,) * channels
    elif settings.normalise == "none":
        mean, std = (0.0,) * channels, (1.0,) * channels
    else:
        assert facts.mean is not None
        assert facts.std is not None
        mean, std = facts.mean, facts.std
    return Preprocessing(
        mean=mean,
        std=std,
        image_size=settings.size or default_size(facts),
        channels=channels,
        full_range=_full_range(facts),
        interpolation=settings.interpolation,
        crop=settings.eval_crop or (0.875 if facts.image_size is None else 1.0),
    )
