"""From a photograph of any size to a segmentation of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.config import Field
from unmask.errors import UserError
from unmask.nn.pyramid import padded_to
from unmask.systems.prediction.inputs import FULL, fit_channels, preprocessing_of, read_image
from unmask.systems.prediction.mask_inference import Merged, MergeRules, class_map, merge
from unmask.systems.prediction.segmentation import Segmentation
from unmask.systems.prediction.tiling import blended

if TYPE_CHECKING:
    from unmask.contracts import Preprocessing
    from unmask.systems.prediction.pem.model import PEM


class Ask(MergeRules):
    """What a prediction should be."""

    task: Literal["semantic", "panoptic", "instance"] | None = Field(
        None, description="classes, classes and objects, or objects that may overlap; open: panoptic if it knows things"
    )
    things: tuple[str | int, ...] | None = Field(
        None, description="classes that are countable objects; open: those it was trained with"
    )
    threshold: float = Field(0.5, ge=0, le=1, description="instance: score below which an object is left out")
    size: int | None = Field(
        None, ge=0, description="pixels of the shorter side it looks at; open: as in training; 0: as the image is"
    )
    scales: tuple[float, ...] = Field(
        (1.0,), description="semantic: the mean over the image at these sizes (0.5 ... 1.75)"
    )
    mirror: bool = Field(False, description="semantic: the mean over the image and its mirror image")
    tile: int | None = Field(None, ge=32, description="semantic: look at overlapping tiles of so many pixels")
    overlap: float = Field(0.25, ge=0, lt=1, description="share of a tile that the next one sees again")


def answers(model: PEM, inputs: list[Any], ask: Ask) -> list[Segmentation]:
    """One an input. Raises ``UserError`` for options that do not go together."""
    from unmask.systems.prediction.pem.model import thing_numbers

    things = model.things if ask.things is None else thing_numbers(ask.things, model.classes)
    task = ask.task or ("panoptic" if things else "semantic")
    if task == "panoptic" and not things and len(model.classes) > 1:
        raise UserError(
            "task=panoptic needs to know which classes are countable objects, and this model does not: name them, "
            f"things=[{model.classes[-1]}]"
        )
    if task != "semantic" and (ask.tile or ask.mirror or ask.scales != (1.0,)):
        raise UserError(f"tile, mirror and scales average class scores: they go with task=semantic, not {task}")
    if not ask.scales or min(ask.scales) <= 0:
        raise UserError(f"scales={list(ask.scales)} must be factors above 0, for example [0.5, 1, 1.5]")
    preprocessing = preprocessing_of(model.encoder)
    device = next(model.parameters()).device
    out = []
    for place, item in enumerate(inputs):
        array, name = read_image(item, place)
        picture = pixels_of(fit_channels(array, preprocessing.channels, name), preprocessing).to(device)
        found = semantic_scores(model, picture, preprocessing, ask) if task == "semantic" else None
        if found is None:
            seen = standardised(picture, shorter_side(picture, preprocessing, ask.size), preprocessing)
            found = merged(model, seen, (picture.shape[2], picture.shape[3]), ask, things, (task,))
        out.append(segmentation(found, model.classes, task, things, ask, name, displayed(picture)))
    return out


def merged(
    model: PEM,
    image: Tensor,
    output: tuple[int, int],
    rules: MergeRules,
    things: tuple[int, ...],
    tasks: tuple[str, ...],
) -> Merged:
    """The model's answer about one standardised image ``[1, C, h, w]``, at the size ``output``."""
    padded = padded_to(image, model.divisor)
    found = model.predictions(padded)
    size = (image.shape[2], image.shape[3])
    return merge(
        found.logits[-1].float(),
        found.masks().float(),
        padded=(padded.shape[2], padded.shape[3]),
        sizes=[size],
        outputs=[output],
        rules=rules,
        things=things,
        tasks=tasks,
    )[0]


def semantic_scores(model: PEM, picture: Tensor, preprocessing: Preprocessing, ask: Ask) -> Merged:
    """``[K, H, W]`` of a picture ``[1, C, H, W]``: the mean over scales, mirror images and tiles, as asked."""
    output = (picture.shape[2], picture.shape[3])
    side = shorter_side(picture, preprocessing, ask.size)
    total: Tensor | None = None
    views = [(scale, mirrored) for scale in ask.scales for mirrored in ((False, True) if ask.mirror else (False,))]
    for scale, mirrored in views:
        seen = standardised(picture, max(round(side * scale), 1), preprocessing)
        seen = seen.flip(3) if mirrored else seen
        if ask.tile:

            def run(part: Tensor) -> Tensor:
                size = (part.shape[2], part.shape[3])
                rows = [merged(model, one[None], size, ask, (), ("semantic",)).scores for one in part]
                return torch.stack([r for r in rows if r is not None])

            scores = blended(run, seen, tile=ask.tile, overlap=ask.overlap)
            scores = F.interpolate(scores, size=output, mode="bilinear", align_corners=False)[0]
        else:
            found = merged(model, seen, output, ask, (), ("semantic",)).scores
            assert found is not None
            scores = found
        scores = scores.flip(2) if mirrored else scores
        total = scores if total is None else total + scores
    assert total is not None
    return Merged(scores=total / len(views))


def segmentation(
    found: Merged,
    classes: tuple[str, ...],
    task: Literal["semantic", "panoptic", "instance"],
    things: tuple[int, ...],
    ask: Ask,
    name: str,
    image: Any,
) -> Segmentation:
    """A merged answer as a result that can be saved and drawn."""
    facts: dict[str, Any] = {"classes": classes, "task": task, "things": things, "source": name, "image": image}
    if task == "semantic":
        assert found.scores is not None
        return Segmentation(found.scores.argmax(dim=0), **facts)
    if task == "panoptic":
        assert found.ids is not None
        assert found.segments is not None
        return Segmentation(class_map(found.ids, found.segments), ids=found.ids, segments=found.segments, **facts)
    assert found.instances is not None
    segments = found.instances.segments(things or None)
    kept = [s for s in segments if (s.score or 0.0) >= ask.threshold and (not things or s.thing)]
    painted = np.full(found.instances.masks.shape[-2:], -1, dtype=np.int32)
    for segment in reversed(kept):  # the likeliest lies on top
        painted[segment.mask] = segment.label
    return Segmentation(painted, segments=kept, **facts)


# --- pictures ---


def pixels_of(array: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """``[H, W, C]`` as float32 ``[1, C, H, W]`` in 0 ... 1."""
    full = FULL.get(
        array.dtype, 1.0 if array.dtype.kind == "f" and array.max(initial=0) <= 1 else preprocessing.full_range
    )
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None] / full


def shorter_side(picture: Tensor, preprocessing: Preprocessing, asked: int | None) -> int:
    """Pixels of the shorter side that the model looks at."""
    if asked == 0:
        return min(picture.shape[2:])
    return asked or min(preprocessing.image_size)


def standardised(picture: Tensor, side: int, preprocessing: Preprocessing) -> Tensor:
    """``[1, C, h, w]`` whose shorter side is ``side``, standardised."""
    height, width = picture.shape[2:]
    factor = side / min(height, width)
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    if size != (height, width):
        picture = F.interpolate(picture, size=size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v, device=picture.device)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    return (picture - mean) / std


def displayed(picture: Tensor) -> np.ndarray:
    """uint8 ``[H, W, 3]`` of ``[1, C, H, W]`` in 0 ... 1."""
    shown = picture[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return shown if shown.shape[2] == 3 else np.repeat(shown[..., :1], 3, axis=2)
