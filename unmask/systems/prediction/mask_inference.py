"""From class logits and mask logits of queries to semantic, panoptic and instance segmentations (Mask2Former's rules).

merged = merge(logits, masks, padded=(64, 96), sizes=[(60, 90)], outputs=[(480, 720)], rules=MergeRules(), things=(0, 2))
merged[0].scores, merged[0].ids, merged[0].segments, merged[0].instances
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.config import Config, Field
from unmask.systems.prediction.segmentation import Segment


class MergeRules(Config):
    """How masks become one picture."""

    object_mask_threshold: float = Field(0.8, ge=0, le=1, description="panoptic: class score a query needs")
    overlap_threshold: float = Field(0.8, ge=0, le=1, description="panoptic: share of its mask a segment must keep")
    top_k: int = Field(100, ge=1, description="instances kept, by class score")
    resize_masks_before_merging: bool = Field(
        False, description="merge at the output's size for semantic maps, too (panoptic and instances always do)"
    )


@dataclass
class Instances:
    """Sorted by score, highest first. scores float32 ``[I]``, classes int64 ``[I]``, masks bool ``[I, H, W]``."""

    scores: Tensor
    classes: Tensor
    masks: Tensor

    def segments(self, things: Sequence[int] | None = None) -> list[Segment]:
        """As segments with ids from 1, without empty ones."""
        areas = self.masks.flatten(1).sum(1).tolist()
        rows = zip(self.scores.tolist(), self.classes.tolist(), areas, self.masks.cpu().numpy(), strict=True)
        return [
            Segment(i + 1, label, area, score, True if things is None else label in things, mask)
            for i, (score, label, area, mask) in enumerate(r for r in rows if r[2])
        ]


@dataclass
class Merged:
    """One image: scores ``[K, H, W]`` (not normalised); ids int32 ``[H, W]`` (0 = nothing) with segments; instances. What was
    not asked for is None."""

    scores: Tensor | None = None
    ids: Tensor | None = None
    segments: list[Segment] | None = None
    instances: Instances | None = None


def merge(
    logits: Tensor,
    masks: Tensor,
    *,
    padded: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    outputs: Sequence[tuple[int, int]],
    rules: MergeRules,
    things: Sequence[int] = (),
    tasks: Sequence[str] = ("semantic",),
) -> list[Merged]:
    """Each image's answers. logits ``[B, Q, K + 1]``, masks ``[B, Q, h, w]`` (logits). padded: the size of the batch's images;
    sizes: of each image in it (upper left); outputs: of each answer. tasks: any of semantic, panoptic, instance."""
    early = rules.resize_masks_before_merging or bool({"panoptic", "instance"} & set(tasks))
    out = []
    for i, (size, output) in enumerate(zip(sizes, outputs, strict=True)):
        with torch.autocast(device_type=masks.device.type, enabled=False):
            maps = _resized(masks[i].float(), padded)
            if early:
                maps = _resized(maps[:, : size[0], : size[1]], output)
            found = Merged()
            classes = logits[i].float()
            if "semantic" in tasks:
                found.scores = semantic(classes, maps)
                if not early:
                    found.scores = _resized(found.scores[:, : size[0], : size[1]], output)
            if "panoptic" in tasks:
                found.ids, found.segments = panoptic(classes, maps, things, rules)
            if "instance" in tasks:
                found.instances = instances(classes, maps, rules.top_k, things if "panoptic" in tasks else None)
        out.append(found)
    return out


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned. ``[N, h, w]`` -> ``[N, *size]``."""
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def semantic(logits: Tensor, masks: Tensor) -> Tensor:
    """``[K, H, W]``: every query's class probabilities (without "no object") spread over its mask. logits ``[Q, K + 1]``."""
    return torch.einsum("qk,qhw->khw", logits.softmax(dim=-1)[:, :-1], masks.sigmoid())


def panoptic(logits: Tensor, masks: Tensor, things: Sequence[int], rules: MergeRules) -> tuple[Tensor, list[Segment]]:
    """ids int32 ``[H, W]`` (0 = nothing) and the segments in order of query. A query's pixels are those where score × mask is
    the largest among the kept and its own mask is 1/2 or more; too small a rest of its mask and it is left out; stuff of a
    class that is there already joins it. One copy to the host."""
    scores, labels = logits.softmax(dim=-1).max(dim=-1)
    kept = (labels != logits.shape[-1] - 1) & (scores > rules.object_mask_threshold)
    ids = torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device)
    scores, labels, share = scores[kept], labels[kept], masks[kept].sigmoid()
    if not len(scores):
        return ids, []
    owner = (scores[:, None, None] * share).argmax(dim=0)
    own = owner[None] == torch.arange(len(scores), device=masks.device)[:, None, None]
    sure = share >= 0.5
    clear = own & sure
    areas = torch.stack([part.flatten(1).sum(1) for part in (own, sure, clear)], dim=1)
    facts = torch.cat((areas.double(), scores[:, None].double(), labels[:, None].double()), dim=1).cpu().tolist()
    segments: list[Segment] = []
    stuff: dict[int, Segment] = {}
    for query, (area, original, left, score, label_) in enumerate(facts):
        label = int(label_)
        if not (area and original and left) or area / original < rules.overlap_threshold:
            continue
        known = stuff.get(label)
        if known is None:
            known = Segment(len(segments) + 1, label, 0, score, label in things)
            segments.append(known)
            if not known.thing:
                stuff[label] = known
        known.area += int(left)
        known.score = max(known.score or 0.0, score)
        ids[clear[query]] = known.id
    return ids, segments


def instances(logits: Tensor, masks: Tensor, top_k: int, things: Sequence[int] | None = None) -> Instances:
    """The ``top_k`` (query, class) pairs by class probability, scored by probability × mean mask inside the mask. things:
    other classes are dropped afterwards, so that fewer may be left."""
    probability = logits.softmax(dim=-1)[:, :-1]
    classes = probability.shape[1]
    scores, place = probability.flatten().topk(min(top_k, probability.numel()))
    query, label = place // classes, place % classes
    if things is not None:
        kept = torch.isin(label, torch.tensor(list(things), dtype=label.dtype, device=label.device))
        scores, query, label = scores[kept], query[kept], label[kept]
    logit = masks[query]
    inside = logit > 0
    mean = (logit.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    scores, order = (scores * mean).sort(descending=True, stable=True)
    return Instances(scores, label[order], inside[order])


def class_map(ids: Tensor, segments: Sequence[Segment]) -> Tensor:
    """int64 ``[H, W]``: the class of each pixel of a panoptic answer, -1 = nothing."""
    table = torch.full((max((s.id for s in segments), default=0) + 1,), -1, dtype=torch.int64)
    for segment in segments:
        table[segment.id] = segment.label
    return table.to(ids.device)[ids.long()]
