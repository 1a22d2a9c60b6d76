"""What predictions are measured by: mean IoU, panoptic quality, PSNR and SSIM as the field reports them.

This is our own code, for a reason each: the confusion counts are one
histogram, for which torchmetrics would take seconds to import; panoptic quality is one histogram an image, where
torchmetrics searches every segment anew and knows no crowds (without those the two agree, as do the confusion counts); and
torchmetrics' SSIM averages over a reflected border, which the published numbers leave out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.errors import UserError

LUMA_Y = (65.481, 128.553, 24.966)  # BT.601 of 8-bit R, G, B -> Y in 16 ... 235


class MeanIoU:
    """Intersection over union of each class over all pixels seen, and its mean over classes that occur.

    count: K; pixels whose true class is outside 0 ... K - 1 are ignored; predictions outside count as wrong.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu"):
        self.count = count
        # rows: the true class; columns: the predicted, one more for predictions of nothing
        self.confusion = torch.zeros(count, count + 1, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """int ``[..., H, W]`` both."""
        predicted, true = predicted.long(), true.long()
        answer = torch.where((predicted >= 0) & (predicted < self.count), predicted, self.count)
        known = (true >= 0) & (true < self.count)
        # ignored pixels are counted behind the table and cut off
        size = self.confusion.numel()
        place = torch.where(known, true * (self.count + 1) + answer, size)
        counts = torch.bincount(place.flatten(), minlength=size + 1)[:size]
        self.confusion += counts.reshape(self.confusion.shape).to(self.confusion.device)

    def compute(self) -> dict[str, Any]:
        """Percent: ``miou``, ``pixel_accuracy``, ``mean_accuracy``, and ``iou``: one number a class, None where it occurs
        neither in truth nor in prediction."""
        counts = self.confusion.cpu().double()
        hit = counts.diagonal()[: self.count]
        true = counts.sum(dim=1)
        union = true + counts[:, : self.count].sum(dim=0) - hit
        iou, recall = 100 * hit / union, 100 * hit / true
        return {
            "miou": float(iou[union > 0].mean()) if (union > 0).any() else 0.0,
            "pixel_accuracy": float(100 * hit.sum() / true.sum().clamp(min=1)),
            "mean_accuracy": float(recall[true > 0].mean()) if (true > 0).any() else 0.0,
            "iou": [float(v) if u > 0 else None for v, u in zip(iou, union, strict=True)],
        }


class PanopticQuality:
    """PQ = SQ x RQ (Kirillov et al., "Panoptic segmentation", CVPR 2019) as COCO's evaluation counts it.

    A predicted and a true segment of one class match where intersection / union > 1/2, void pixels of the truth left out of
    the union; a prediction more than half on void or on a crowd of its class is no error; crowds are never missed.
    """

    def __init__(self, count: int, things: Sequence[int] = ()):
        self.count, self.things = count, tuple(things)
        self.iou = torch.zeros(count, dtype=torch.float64)
        self.tp, self.fp, self.fn = (torch.zeros(count, dtype=torch.int64) for _ in range(3))

    def update(
        self,
        predicted: Tensor,
        predicted_labels: Mapping[int, int],
        true: Tensor,
        true_labels: Mapping[int, int],
        crowds: Sequence[int] = (),
    ) -> None:
        """One image. predicted, true: int ``[H, W]`` segment ids, 0 = nothing (void); the mappings give each id's class.
        crowds: ids of the truth that stand for many objects."""
        guesses, truths = sorted(predicted_labels), sorted(true_labels)
        rows = {g: i + 1 for i, g in enumerate(guesses)}
        columns = {t: i + 1 for i, t in enumerate(truths)}
        size = (len(guesses) + 1, len(truths) + 1)
        place = _places(predicted, rows) * size[1] + _places(true, columns)
        table = torch.bincount(place.flatten(), minlength=size[0] * size[1]).reshape(size).cpu().tolist()
        area = [sum(row) for row in table]
        true_area = [sum(row[j] for row in table) for j in range(size[1])]
        hidden = set(crowds)
        hit_guess: set[int] = set()
        hit_truth: set[int] = set()
        for g, i in rows.items():
            for t, j in columns.items():
                if t in hidden or predicted_labels[g] != true_labels[t] or not table[i][j]:
                    continue
                iou = table[i][j] / (area[i] + true_area[j] - table[i][j] - table[i][0])
                if iou > 0.5:
                    label = true_labels[t]
                    self.tp[label] += 1
                    self.iou[label] += iou
                    hit_guess.add(g)
                    hit_truth.add(t)
        for t, j in columns.items():
            if t not in hidden and t not in hit_truth and true_area[j]:
                self.fn[true_labels[t]] += 1
        for g, i in rows.items():
            if g in hit_guess or not area[i]:
                continue
            own_crowds = sum(table[i][columns[t]] for t in hidden if true_labels.get(t) == predicted_labels[g])
            if (table[i][0] + own_crowds) / area[i] <= 0.5:
                self.fp[predicted_labels[g]] += 1

    def compute(self) -> dict[str, Any]:
        """Percent: ``pq``, ``sq``, ``rq`` over classes with a segment in truth or prediction, the same with ``_things`` and
        ``_stuff`` where both kinds are known, and ``pq_classes`` (None for a class without)."""
        weight = self.tp + 0.5 * self.fp + 0.5 * self.fn
        seen = weight > 0
        sq = torch.where(self.tp > 0, self.iou / self.tp.clamp(min=1), 0.0)
        rq = torch.where(seen, self.tp / weight.clamp(min=0.5), 0.0)
        pq = sq * rq
        thing = torch.zeros(self.count, dtype=torch.bool)
        thing[list(self.things)] = True
        out: dict[str, Any] = {}
        parts = [("", seen)]
        if self.things and len(self.things) < self.count:
            parts += [("_things", seen & thing), ("_stuff", seen & ~thing)]
        for ending, chosen in parts:
            for key, values in (("pq", pq), ("sq", sq), ("rq", rq)):
                out[key + ending] = float(100 * values[chosen].mean()) if chosen.any() else 0.0
        out["pq_classes"] = [float(100 * v) if s else None for v, s in zip(pq, seen, strict=True)]
        return out


def _places(ids: Tensor, known: Mapping[int, int]) -> Tensor:
    """Each pixel's place among the known ids, 0 where its id is not known."""
    ids = ids.long()
    if not known:
        return torch.zeros_like(ids)
    keys = torch.tensor(sorted(known), device=ids.device)
    place = torch.searchsorted(keys, ids).clamp(max=len(keys) - 1)
    values = torch.tensor([known[int(k)] for k in sorted(known)], device=ids.device)
    return torch.where(keys[place] == ids, values[place], 0)


# --- restored pictures ---------------------------------------------------------------------------------------------


def luminance(images: Tensor) -> Tensor:
    """Y of BT.601 (16 ... 235, not rounded) of ``[..., 3, H, W]`` in 0 ... 255 -> ``[..., 1, H, W]``."""
    weight = torch.tensor(LUMA_Y, dtype=images.dtype, device=images.device)[:, None, None] / 255
    return (images * weight).sum(dim=-3, keepdim=True) + 16


def prepared(images: Tensor, *, border: int = 0, luma: bool = True) -> Tensor:
    """What PSNR and SSIM look at: ``[B, C, H, W]`` (or ``[C, H, W]``) in 0 ... 1 clamped, rounded to 8 bits, cut by ``border``
    pixels, and, if ``luma`` and C = 3, turned to luminance. float32, 0 ... 255. Raises ``UserError`` where the border leaves
    nothing."""
    if min(images.shape[-2:]) <= 2 * border:
        raise UserError(f"a border of {border} pixels leaves nothing of {images.shape[-2]} x {images.shape[-1]} pixels")
    whole = (images.detach().float().clamp(0, 1) * 255).round()
    whole = whole[..., border : images.shape[-2] - border, border : images.shape[-1] - border]
    return luminance(whole) if luma and whole.shape[-3] == 3 else whole


def psnr(restored: Tensor, true: Tensor, *, border: int = 0, luma: bool = True) -> Tensor:
    """dB, float64 ``[B]`` (a number for ``[C, H, W]``): 10 log10(255² / MSE) of what ``prepared`` gives; infinite for
    equal pictures. Images in 0 ... 1."""
    first, second = (prepared(i, border=border, luma=luma).double() for i in (restored, true))
    return 10 * torch.log10(255**2 / (first - second).square().flatten(-3).mean(dim=-1))


def ssim(restored: Tensor, true: Tensor, *, border: int = 0, luma: bool = True) -> Tensor:
    """Structural similarity, float64 ``[B]`` (a number for ``[C, H, W]``): 11 x 11 Gaussian of 1.5 where it
    fits, each channel by itself, then the mean. Images in 0 ... 1. Raises ``UserError`` below 11 pixels a side."""
    first, second = (prepared(i, border=border, luma=luma).double() for i in (restored, true))
    if min(first.shape[-2:]) < 11:
        raise UserError(
            f"SSIM needs 11 x 11 pixels after the border of {border}, got {first.shape[-2]} x {first.shape[-1]}"
        )
    single = first.ndim == 3
    if single:
        first, second = first[None], second[None]
    place = torch.arange(11, dtype=torch.float64, device=first.device) - 5
    bell = (-place.square() / (2 * 1.5**2)).exp()
    bell = bell / bell.sum()

    def mean(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)[:, None]
        flat = F.conv2d(F.conv2d(flat, bell[None, None, :, None]), bell[None, None, None])
        return flat.reshape(*values.shape[:2], *flat.shape[-2:])

    one, two = mean(first), mean(second)
    var_one, var_two = mean(first * first) - one * one, mean(second * second) - two * two
    both = mean(first * second) - one * two
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * one * two + c1) * (2 * both + c2) / ((one * one + two * two + c1) * (var_one + var_two + c2))
    return value.mean() if single else value.flatten(1).mean(dim=1)
