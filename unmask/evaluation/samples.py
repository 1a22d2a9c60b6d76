"""What a probe measures on: standardised images in order, with their labels, from a data set or from tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.contracts import DataFacts, Encoder, Preprocessing
from unmask.data.batches import Batches, everything
from unmask.data.color import LUMA
from unmask.data.opening import open_source, train_and_test
from unmask.data.order import some_of
from unmask.data.settings import DataSettings
from unmask.data.source import Source
from unmask.data.transforms import Transform
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.evaluation.subsets import split
from unmask.systems.prediction.inputs import preprocessing_of

Read = Callable[[Preprocessing | None, int, Tensor | None], Iterator[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Samples:
    """Images for probes. ``ids``: which of the data's images, in order; None: all that come.

    ``read(preprocessing, batch_size, ids)`` yields batches ``{"image": float [B, C, H, W], "label"?: int64 [B]}``.
    ``labels``: int64 ``[N]`` where they are known before anything is read. ``images``: the tensor that it all comes
    from, or None; ``source``: the data set, or None.
    """

    read: Read
    count: int | None
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    ids: Tensor | None = None
    uri: str = ""
    facts: DataFacts | None = None
    images: Tensor | None = None
    source: Source | None = None

    def subset(self, ids: Tensor) -> Samples:
        """The samples with these positions (int64) among the present ones. Raises ``UserError`` for a stream."""
        if self.count is None:
            raise UserError(
                f"{self.uri} streams: its images cannot be chosen by number; use all, or a data set on disk"
            )
        chosen = ids if self.ids is None else self.ids[ids]
        labels = None if self.labels is None else self.labels[ids]
        return replace(self, ids=chosen, count=len(ids), labels=labels)

    def first(self, limit: int | None) -> Samples:
        """At most ``limit``, a fixed random choice; of a stream the first ones."""
        if limit is None or (self.count is not None and self.count <= limit):
            return self
        if self.count is None:
            return replace(self, read=_cut(self.read, limit))
        return self.subset(torch.from_numpy(some_of(self.count, limit)))

    def renumbered(self, classes: tuple[str, ...]) -> Samples:
        """The samples with their labels counted in another list of classes, which holds all of theirs by name."""
        place = torch.tensor([*(classes.index(name) for name in self.classes or ()), -1])  # the last: no label

        def read(
            preprocessing: Preprocessing | None, batch_size: int, ids: Tensor | None
        ) -> Iterator[Mapping[str, Tensor]]:
            for batch in self.read(preprocessing, batch_size, ids):
                yield {**batch, "label": place[batch["label"]]}

        return replace(self, read=read, labels=None if self.labels is None else place[self.labels], classes=classes)

    def batches(self, preprocessing: Preprocessing | None, batch_size: int) -> Iterator[Mapping[str, Tensor]]:
        return self.read(preprocessing, batch_size, self.ids)

    def augmented(
        self, settings: DataSettings, preprocessing: Preprocessing | None, batch_size: int, seed: int, view: int
    ) -> Iterator[Mapping[str, Any]]:
        """The images as training would see them, drawn from (seed, view, place); not for streams."""
        order = torch.arange(self.count or 0) if self.ids is None else self.ids
        raw: Callable[[Tensor], Mapping[str, Any]]
        if self.images is not None:
            images = self.images
            apply = transform_of(images, preprocessing, settings)
            raw = lambda ids: {"image": images[ids]}  # noqa: E731
        else:
            assert self.source is not None
            batches = Batches(self.source, settings, batch_size=1, preprocessing=preprocessing)
            apply = batches.apply
            raw = lambda ids: batches.raw(ids.numpy())  # noqa: E731
        for start in range(0, len(order), batch_size):
            yield apply(raw(order[start : start + batch_size]), Seeded(seed, view, start), train=True)


def _cut(read: Read, limit: int) -> Read:
    def cut(preprocessing: Preprocessing | None, batch_size: int, ids: Tensor | None) -> Iterator[Mapping[str, Tensor]]:
        left = limit
        for batch in read(preprocessing, batch_size, ids):
            part = {k: v[:left] for k, v in batch.items()}
            left -= len(part["image"])
            yield part
            if left <= 0:
                return

    return cut


def samples(data: Any) -> Samples:
    """Samples from ``(images, labels)``, images alone, a data source, batches, a URI (its training split) or samples.

    Images: ``[N, C, H, W]``, uint8 to be prepared as the encoder wants it, or float standardised already.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, (str, Path)):
        return from_source(open_source(data))
    if isinstance(data, Source):
        return from_source(data)
    if isinstance(data, Batches):
        return from_source(data.source)
    if isinstance(data, Tensor):
        return from_tensors(data, None)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return from_tensors(torch.as_tensor(data[0]), None if data[1] is None else torch.as_tensor(data[1]))
    raise UserError(f"cannot measure on {type(data).__name__}: give a data URI, a source, images, or (images, labels)")


def from_tensors(images: Tensor, labels: Tensor | None, *, classes: tuple[str, ...] | None = None) -> Samples:
    """Raises ``UserError`` when the shapes do not fit."""
    if images.ndim != 4:
        raise UserError(f"images of shape {tuple(images.shape)} do not fit: a probe takes [N, C, H, W]")
    if labels is not None and labels.shape != (len(images),):
        raise UserError(f"{len(images)} images but labels of shape {tuple(labels.shape)}: one label an image")
    if labels is not None and classes is None:
        classes = tuple(str(i) for i in range(int(labels.max()) + 1)) if len(labels) else ()

    def read(
        preprocessing: Preprocessing | None, batch_size: int, ids: Tensor | None
    ) -> Iterator[Mapping[str, Tensor]]:
        transform = transform_of(images, preprocessing)
        order = torch.arange(len(images)) if ids is None else ids
        for part in order.split(batch_size):
            batch = transform({"image": images[part]}, train=False)
            yield batch if labels is None else {**batch, "label": labels[part].long()}

    known = None if labels is None else labels.long()
    return Samples(read, len(images), known, classes, uri="tensors", images=images)


def transform_of(
    images: Tensor, preprocessing: Preprocessing | None, settings: DataSettings | None = None
) -> Transform:
    """uint8 images are resized and standardised as ``preprocessing`` says; floats pass as they are."""
    channels, size = images.shape[1], tuple(images.shape[2:])
    settings = settings or DataSettings(augment="none")
    if images.is_floating_point():
        same = Preprocessing((0.0,) * channels, (1.0,) * channels, size, channels, full_range=1.0)
        return Transform(settings, same, channels=channels, one_size=True, full_range=1.0)
    preprocessing = preprocessing or Preprocessing((0.5,) * channels, (0.5,) * channels, size, channels)
    return Transform(settings, preprocessing, channels=channels, one_size=True, full_range=255.0)


def from_source(source: Source) -> Samples:
    """All readable images of a data set, those without a label left out where others have one."""
    facts = source.facts
    if source.streaming:

        def stream(
            preprocessing: Preprocessing | None, batch_size: int, _: Tensor | None
        ) -> Iterator[Mapping[str, Tensor]]:
            return everything(source, batch_size, preprocessing=preprocessing)

        return Samples(stream, None, None, source.classes, uri=source.uri, facts=facts, source=source)

    def read(
        preprocessing: Preprocessing | None, batch_size: int, ids: Tensor | None
    ) -> Iterator[Mapping[str, Tensor]]:
        if ids is None:
            yield from everything(source, batch_size, preprocessing=preprocessing)
            return
        batches = Batches(source, batch_size=1, preprocessing=preprocessing)
        for part in ids.split(batch_size):
            yield batches.transform(batches.raw(part.numpy()), train=False)

    found = None if source.labels is None else torch.from_numpy(source.labels[source.images().rows])
    if found is None or source.classes is None:
        return Samples(read, facts.count, None, None, uri=source.uri, facts=facts, source=source)
    whole = Samples(read, len(found), found, tuple(source.classes), uri=source.uri, facts=facts, source=source)
    return whole if bool((found >= 0).all()) else whole.subset((found >= 0).nonzero()[:, 0])


def parts(
    data: Any,
    *,
    seed: int = 0,
    limit: int | tuple[int, int] | None = None,
    labelled: bool = True,
    columns: Mapping[str, str] | None = None,
) -> tuple[Samples, Samples, str]:
    """A training part, a test part, and in words where they come from. Without labels to measure, all of the data is both.

    data: a URI, ``{"train": ..., "test": ...}``, or anything :func:`samples` takes, which the seed then splits 80/20.
    limit: at most so many images of each part, or of (train, test). Raises ``UserError`` for a limit below 1.
    """
    most = limit if isinstance(limit, tuple) else (limit, limit)
    for number in most:
        if number is not None and (not isinstance(number, int) or number < 1):
            raise UserError(f"limit={number} must be a whole number of images, at least 1")
    whole, rest, how = _whole_parts(data, seed, labelled, columns)
    train, test = whole.first(most[0]), rest.first(most[1])
    for part, before, name in ((train, whole, "training"), (test, rest, "test")):
        if part.count != before.count and (labelled or name == "training"):
            how += f"; {part.count:,} of the {before.count:,} {name} images, a fixed random choice"
    return train, test, how


def _whole_parts(
    data: Any, seed: int, labelled: bool, columns: Mapping[str, str] | None
) -> tuple[Samples, Samples, str]:
    if isinstance(data, Mapping):
        if set(data) != {"train", "test"}:
            raise UserError(f"data with the parts {sorted(map(str, data))} does not fit: it takes train and test")
        return samples(data["train"]), samples(data["test"]), "train and test as given"
    if not labelled:
        whole = from_source(open_source(data, columns=columns)) if isinstance(data, (str, Path)) else samples(data)
        return whole, whole, "train"
    if isinstance(data, (str, Path)):
        train, test = train_and_test(data, columns=columns)
        how = "train and test splits of the data"
        if "[" in test.split:
            how = "no test split: 80 % of the images to train, 20 % to test, in a fixed shuffled order"
        return from_source(train), from_source(test), how
    whole = samples(data)
    if whole.count is None:
        raise UserError(f"{whole.uri} streams and has no test split: give train and test, or a data set on disk")
    first, second = split(whole.labels, whole.count, Seeded(seed))
    how = f"no test split: 80 % of the images to train, 20 % to test, by class, drawn with seed {seed}"
    return whole.subset(first), whole.subset(second), how


def preprocessing_for(encoder: Encoder, data: Samples) -> Preprocessing | None:
    """What the encoder was trained with; for one that does not say, the data's own statistics at the encoder's size."""
    if encoder.preprocessing is not None:
        return encoder.preprocessing
    if data.facts is None or data.facts.mean is None or data.facts.std is None:
        return None if data.images is not None and data.images.is_floating_point() else preprocessing_of(encoder)
    mean, std = data.facts.mean, data.facts.std
    if len(mean) != encoder.in_channels:
        mean, std = (
            _for_channels(mean, encoder.in_channels, data.uri),
            _for_channels(std, encoder.in_channels, data.uri),
        )
    full = {8: 255.0, 16: 65535.0}.get(data.facts.bit_depth or 8, 1.0)
    return Preprocessing(mean, std, tuple(encoder.image_size), encoder.in_channels, full_range=full)


def _for_channels(values: tuple[float, ...], channels: int, uri: str) -> tuple[float, ...]:
    """Statistics of grey images for a colour encoder, or the reverse. Raises ``UserError`` where nothing is sensible."""
    if len(values) == 1 and channels == 3:
        return values * 3
    if len(values) == 3 and channels == 1:
        return (sum(v * w for v, w in zip(values, LUMA, strict=True)),)
    raise UserError(f"the images of {uri or 'this data'} have {len(values)} channels, the encoder takes {channels}")
