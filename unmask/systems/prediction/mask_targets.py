"""``MaskTargets``: what a mask classifier should predict, one class and one binary mask a segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.contracts import Batch


@dataclass
class MaskTargets:
    """Padded over a batch. labels: int64 ``[B, N]`` (padding: 0); masks: bool ``[B, N, H, W]`` (padding: nothing);
    counts: how many of the N are real, an image. N is the largest count, so it may be 0."""

    labels: Tensor
    masks: Tensor
    counts: list[int]

    def __len__(self) -> int:
        return len(self.counts)

    @staticmethod
    def of_lists(labels: Sequence[Tensor], masks: Sequence[Tensor]) -> MaskTargets:
        """From ``[n_b]`` labels and ``[n_b, H, W]`` masks of each image (the same H and W, or padded at the lower right
        with nothing)."""
        counts = [len(one) for one in labels]
        size = [max(m.shape[axis] for m in masks) for axis in (-2, -1)]
        device = masks[0].device
        all_labels = torch.zeros(len(counts), max(counts), dtype=torch.int64, device=device)
        all_masks = torch.zeros(len(counts), max(counts), *size, dtype=torch.bool, device=device)
        for i, (label, mask) in enumerate(zip(labels, masks, strict=True)):
            all_labels[i, : len(label)] = label
            all_masks[i, : len(label), : mask.shape[-2], : mask.shape[-1]] = mask.bool()
        return MaskTargets(all_labels, all_masks, counts)

    @staticmethod
    def of_map(classes: Tensor, count: int) -> MaskTargets:
        """One mask a class that occurs, in order of class. classes: int64 ``[B, H, W]``; values outside ``0 ... count - 1``
        (ignored pixels) belong to no mask."""
        known = (classes >= 0) & (classes < count)
        flat = torch.where(known, classes, count).flatten(1)
        present = torch.zeros(len(classes), count + 1, dtype=torch.bool, device=classes.device)
        present.scatter_(1, flat, torch.ones_like(flat, dtype=torch.bool))
        return _gathered(
            classes, present[:, :count], torch.arange(count, device=classes.device).expand(len(classes), -1)
        )

    @staticmethod
    def of_segments(ids: Tensor, labels: Tensor) -> MaskTargets:
        """One mask a segment that can be seen. ids: int64 ``[B, H, W]``, s + 1 where segment s is, 0 = nothing;
        labels: int64 ``[B, S]``, the class of segment s, -1 where there is none (padding, crowds)."""
        count = labels.shape[1]
        place = ids - 1
        present = torch.zeros(len(ids), count + 1, dtype=torch.bool, device=ids.device)
        flat = torch.where((place >= 0) & (place < count), place, count).flatten(1)
        present.scatter_(1, flat, torch.ones_like(flat, dtype=torch.bool))
        return _gathered(place, present[:, :count] & (labels >= 0), labels)

    @staticmethod
    def of_batch(batch: Batch, classes: int) -> MaskTargets:
        """From a batch of :class:`unmask.data.maps.SegmentationBatches`: its segments where it has some, else its map."""
        if "segments" in batch and batch.get("segment_labels") is not None:
            return MaskTargets.of_segments(batch["segments"], batch["segment_labels"])
        return MaskTargets.of_map(batch["map"], classes)


def _gathered(place: Tensor, present: Tensor, labels: Tensor) -> MaskTargets:
    """place: ``[B, H, W]``, which of the N columns a pixel belongs to; present: bool ``[B, N]``. Keeps the present ones."""
    counts = present.sum(dim=1).tolist()
    most = max(counts, default=0)
    first = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    real = present.gather(1, first)
    masks = (place[:, None] == first[:, :, None, None]) & real[:, :, None, None]
    return MaskTargets(torch.where(real, labels.gather(1, first), 0), masks, counts)
