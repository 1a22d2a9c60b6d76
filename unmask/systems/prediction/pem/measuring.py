"""PEM on data with label maps: its metrics, and pictures of what it says beside the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from unmask.contracts import Batch, Picture
from unmask.data.maps import Sample, SegmentationBatches, SegmentationData
from unmask.data.showing import displayable, uint8_images
from unmask.errors import UserError
from unmask.systems.prediction.drawing import as_picture, scaled
from unmask.systems.prediction.mask_inference import Merged, merge
from unmask.systems.prediction.metrics import MeanIoU, PanopticQuality
from unmask.systems.prediction.pem.answers import Ask, segmentation
from unmask.systems.prediction.segmentation import Segment, Segmentation

if TYPE_CHECKING:
    from unmask.systems.prediction.pem.model import PEM

BATCH, SHOWN = 8, 6


def measure(
    model: PEM,
    data: SegmentationData,
    *,
    limit: int | None,
    device: torch.device | None,
    tell: Callable[[str], None] | None,
    folder: Path | None,
) -> dict[str, Any]:
    """``miou`` (and ``pq`` where the data have segments) with their parts, ``samples``, ``images_per_second`` (network and merging
    alone), ``baseline``, ``pictures``. Raises ``UserError`` for data of other classes."""
    batches = SegmentationBatches(data, 1)
    found = batches.facts.classes or ()
    if len(found) != len(model.classes):
        raise UserError(f"{data.uri} has {len(found)} classes, this model knows {len(model.classes)}")
    panoptic = bool(batches.facts.extra.get("segments"))
    device = device or next(model.parameters()).device
    tasks = ("semantic", "panoptic") if panoptic else ("semantic",)
    miou, quality = MeanIoU(len(model.classes)), PanopticQuality(len(model.classes), model.things)
    pixels = torch.zeros(len(model.classes), dtype=torch.int64)
    shown: list[tuple[Sample, Merged]] = []
    count, seconds = 0, 0.0
    for batch, samples in batches.whole(BATCH, limit):
        images = batch["image"].to(device)
        started = time.perf_counter()
        answers = answered(model, images, batch["size"], [s.map.shape for s in samples], tasks)
        for answer, sample in zip(answers, samples, strict=True):
            assert answer.scores is not None
            truth = torch.from_numpy(sample.map).long()
            miou.update(answer.scores.argmax(dim=0).cpu(), truth)
            pixels += torch.bincount(truth[truth >= 0], minlength=len(pixels))
            if panoptic:
                count_segments(quality, answer, sample)
        seconds += time.perf_counter() - started
        count += len(samples)
        shown += list(zip(samples, answers, strict=True))[: max(SHOWN - len(shown), 0)]
        if tell is not None:
            tell(f"measured {count} images")
    numbers = miou.compute()
    numbers["iou"] = dict(zip(model.classes, numbers["iou"], strict=True))
    if panoptic:
        told = quality.compute()
        told["pq_classes"] = dict(zip(model.classes, told["pq_classes"], strict=True))
        numbers = {**told, **numbers}
    total, commonest = int(pixels.sum()), int(pixels.argmax())
    present = int((pixels > 0).sum())
    alike = 100 * float(pixels[commonest]) / max(total, 1) / max(present, 1)
    out: dict[str, Any] = {
        **numbers,
        "samples": count,
        "images_per_second": round(count / max(seconds, 1e-9), 2),
        "baseline": {f"{model.classes[commonest]} everywhere": {"miou": alike}},
    }
    if folder is not None:
        out["pictures"] = drawn(model, shown, folder, panoptic=panoptic)
    return out


def answered(
    model: PEM,
    images: Tensor,
    sizes: Tensor,
    outputs: Sequence[tuple[int, ...]],
    tasks: Sequence[str],
    ask: Ask | None = None,
) -> list[Merged]:
    """The model's answers about a padded batch; sizes ``[B, 2]``: what of each is image; outputs: (height, width) of each."""
    found = model.predictions(images)
    padded = [-(-side // model.divisor) * model.divisor for side in images.shape[2:]]
    return merge(
        found.logits[-1].float(),
        found.masks().float(),
        padded=(padded[0], padded[1]),
        sizes=[(int(h), int(w)) for h, w in sizes.tolist()],
        outputs=[(int(o[0]), int(o[1])) for o in outputs],
        rules=ask or Ask(),
        things=model.things,
        tasks=tasks,
    )


def count_segments(quality: PanopticQuality, answer: Merged, sample: Sample) -> None:
    assert answer.ids is not None
    assert answer.segments is not None
    assert sample.ids is not None
    quality.update(
        answer.ids.cpu(),
        {s.id: s.label for s in answer.segments},
        torch.from_numpy(sample.ids),
        {i + 1: label for i, label in enumerate(sample.labels)},
        [i + 1 for i, crowd in enumerate(sample.crowds) if crowd],
    )


def truth_of(sample: Sample, model: PEM, *, panoptic: bool) -> Segmentation:
    """The true segmentation, to be drawn."""
    facts: dict[str, Any] = {"classes": model.classes, "things": model.things, "image": sample.image}
    if not panoptic or sample.ids is None:
        return Segmentation(sample.map, **facts)
    areas = np.bincount(sample.ids.ravel(), minlength=len(sample.labels) + 1)
    segments = [
        Segment(i + 1, label, int(areas[i + 1]), None, label in model.things)
        for i, label in enumerate(sample.labels)
        if areas[i + 1]
    ]
    return Segmentation(sample.map, task="panoptic", ids=sample.ids, segments=segments, **facts)


def drawn(model: PEM, shown: list[tuple[Sample, Merged]], folder: Path, *, panoptic: bool) -> list[dict[str, str]]:
    """Truth and prediction one above the other, a file an image."""
    from PIL import Image

    pictures = []
    for place, (sample, answer) in enumerate(shown):
        task: Literal["semantic", "panoptic"] = "panoptic" if panoptic else "semantic"
        said = segmentation(answer, model.classes, task, model.things, Ask(), "", sample.image)
        parts = [truth_of(sample, model, panoptic=panoptic).overlay(size=320), said.overlay(size=320)]
        sheet = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts) + 8), "white")
        sheet.paste(parts[0], (0, 0))
        sheet.paste(parts[1], (0, parts[0].height + 8))
        name = f"segmentation-{place + 1}.png"
        sheet.save(folder / name)
        pictures.append({"file": name, "caption": "above the truth, below the prediction"})
    return pictures


def preview(model: PEM, batch: Batch) -> Picture:
    """Image, truth and prediction of up to four samples, without their padding."""
    images = batch["image"][:4]
    panoptic = "segments" in batch and bool(model.things)
    task: Literal["semantic", "panoptic"] = "panoptic" if panoptic else "semantic"
    whole = torch.tensor([images.shape[2:]] * len(images))
    sizes = batch.get("size", whole)[:4].cpu()
    training = model.training
    model.eval()
    rules = Ask(object_mask_threshold=0.5)
    found = answered(model, images, sizes, [tuple(size) for size in sizes.tolist()], (task,), rules)
    model.train(training)
    rows = []
    photos = uint8_images(displayable(images, model.encoder.preprocessing))
    for i, (answer, (high, wide)) in enumerate(zip(found, sizes.tolist(), strict=True)):
        photo = np.ascontiguousarray(photos[i][:high, :wide])
        truth, *ids = (
            batch[key][i, :high, :wide].cpu().numpy().astype(np.int32)
            for key in (("map", "segments") if panoptic else ("map",))
        )
        labels = tuple(batch["segment_labels"][i].tolist()) if panoptic else ()
        true = truth_of(Sample(photo, truth, ids[0] if ids else None, labels), model, panoptic=panoptic)
        said = segmentation(answer, model.classes, task, model.things, rules, "", photo)
        rows.append(
            [np.asarray(scaled(as_picture(photo), 224)), *(np.asarray(x.overlay(size=224)) for x in (true, said))]
        )
    return Picture("segmentation", ["image", "truth", "prediction"], rows)
