"""Mixup (Zhang et al. 2017, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899), by timm's definitions.

timm draws from numpy; here every number is asked of ``draw``, and a sample's partner is its neighbour (0 with 1, 2 with
3 ...) rather than its mirror image in the batch, so that a batch shared by several processes is mixed as one process
would mix it. Batches come in random order, so the pairs are as random.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from unmask.config import Config, Field
from unmask.draw import Draw
from unmask.errors import UserError


class Mixing(Config):
    """Mixup and CutMix; each is off at 0."""

    mixup: float = Field(0.8, ge=0, description="alpha of mixup's Beta(alpha, alpha)")
    cutmix: float = Field(1.0, ge=0, description="alpha of CutMix's Beta(alpha, alpha)")
    probability: float = Field(1.0, ge=0, le=1, description="chance that a batch (or pair, or sample) is mixed at all")
    switch_probability: float = Field(0.5, ge=0, le=1, description="chance of CutMix where both are on")
    mode: Literal["batch", "pair", "elem"] = Field(
        "batch", description="one share for the batch, each pair, or each sample"
    )
    correct_share: bool = Field(True, description="labels follow the area that a box cut off at the border really has")
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    partner: Literal["neighbour", "reversed"] = Field("neighbour", description="reversed is timm's; see the module")


def mix(images: Tensor, labels: Tensor, classes: int, draw: Draw, settings: Mixing) -> tuple[Tensor, Tensor]:
    """Mixed images and soft labels ``[B, classes]``.

    images: float ``[B, C, H, W]``. labels: int64 ``[B]``. Draws ``mix.apply``, ``.switch``, ``.share`` and ``.box``, on
    the CPU; in mode "batch" they are shared by the whole step. Raises ``UserError`` for an odd batch.
    """
    targets = soft_labels(labels, classes, settings.label_smoothing)
    if settings.mixup == 0 and settings.cutmix == 0:
        return images, targets
    count, _, height, width = images.shape
    if count % 2:
        raise UserError(
            f"mixup and cutmix pair samples, and a batch of {count} is odd: use an even batch on each process"
        )
    share, cut = shares(count, draw, settings)
    boxes = cut_boxes(share, height, width, draw, shared=settings.mode == "batch")
    if settings.mode == "pair":
        first = (
            torch.arange(count) & ~1
            if settings.partner == "neighbour"
            else torch.arange(count).minimum(torch.arange(count).flip(0))
        )
        share, cut, boxes = share[first], cut[first], boxes[first]
    if settings.correct_share:
        area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        share = torch.where(cut, 1 - area / float(height * width), share)
    share, cut, boxes = (t.to(images.device, non_blocking=True) for t in (share, cut, boxes))
    other = _partner(images, settings.partner)
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows = (y >= boxes[:, 0:1]) & (y < boxes[:, 1:2])
    columns = (x >= boxes[:, 2:3]) & (x < boxes[:, 3:4])
    inside = (rows[:, None, :, None] & columns[:, None, None, :]) & cut[:, None, None, None]
    of_pixels = torch.where(cut, 1.0, share)[:, None, None, None].to(images.dtype)
    mixed = torch.where(inside, other, images * of_pixels + other * (1 - of_pixels))
    return mixed, targets * share[:, None] + _partner(targets, settings.partner) * (1 - share[:, None])


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """float32 ``[B, classes]``: ``1 - s + s / K`` at the label, ``s / K`` elsewhere."""
    off = smoothing / classes
    out = torch.full((len(labels), classes), off, device=labels.device)
    return out.scatter_(1, labels[:, None], 1 - smoothing + off)


def shares(count: int, draw: Draw, settings: Mixing) -> tuple[Tensor, Tensor]:
    """The sample's own share (float32 ``[B]``; 1 where it is not mixed) and whether it is cut (bool ``[B]``)."""
    from scipy.special import betaincinv

    shared = settings.mode == "batch"
    shape = (1,) if shared else (count,)

    def uniform(name: str) -> Tensor:
        return draw.uniform(f"mix.{name}", shape, shared=shared)

    if settings.mixup > 0 and settings.cutmix > 0:
        cut = uniform("switch") < settings.switch_probability
    else:
        cut = torch.full(shape, settings.cutmix > 0)
    alpha = torch.where(cut, settings.cutmix or 1.0, settings.mixup or 1.0).double().numpy()
    # the inverse of the distribution function, of a uniform in the middle of its 24-bit cell
    quantile = uniform("share").double().numpy() + 2.0**-25
    share = torch.from_numpy(betaincinv(alpha, alpha, quantile)).to(torch.float32)
    share = torch.where(uniform("apply") < settings.probability, share, 1.0)
    return share.expand(count), cut.expand(count) & (share.expand(count) < 1)


def cut_boxes(share: Tensor, height: int, width: int, draw: Draw, *, shared: bool) -> Tensor:
    """int64 ``[B, 4]`` (top, bottom, left, right): boxes of area ``1 - share``, centred anywhere, cut off at the border."""
    root = (1 - share.double()).clamp(min=0).sqrt()
    h, w = (height * root).to(torch.int64), (width * root).to(torch.int64)
    place = draw.uniform("mix.box", (1, 2) if shared else (len(share), 2), shared=shared)
    y, x = (place[:, 0] * height).to(torch.int64), (place[:, 1] * width).to(torch.int64)
    top, bottom = (y - h // 2).clamp(0, height), (y + (h + 1) // 2).clamp(0, height)
    left, right = (x - w // 2).clamp(0, width), (x + (w + 1) // 2).clamp(0, width)
    return torch.stack((top, bottom, left, right), dim=1)


def _partner(values: Tensor, partner: str) -> Tensor:
    if partner == "reversed":
        return values.flip(0)
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
