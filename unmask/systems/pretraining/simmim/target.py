"""What SimMIM predicts and how far off it is: pixels, locally standardised pixels, or bins of a channel's value."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.contracts import Preprocessing
from unmask.nn.losses import elementwise


class Target:
    """kind: the loss; bins: of a channel's range, for cross-entropy; local_norm: window of the standardised target.

    Predictions are ``[B, M, C * values_each * P]`` in the order (channel, bin, row, column); targets ``[B, M, C * P]``.
    """

    def __init__(
        self, kind: Literal["l1", "l2", "smooth_l1", "cross_entropy"], bins: int = 8, local_norm: int | None = None
    ):
        self.kind, self.bins, self.local_norm = kind, bins, local_norm
        self.values_each = bins if kind == "cross_entropy" else 1

    def of(self, images: Tensor, preprocessing: Preprocessing) -> Tensor:
        """The target of every pixel, ``[B, C, H, W]``; bins as their number."""
        return self.like(images, images, preprocessing)

    def like(self, guess: Tensor, images: Tensor, preprocessing: Preprocessing) -> Tensor:
        """A picture that somebody guessed, in the target's units; local statistics are those of the true images."""
        if self.kind == "cross_entropy":
            unit = guess.float() * self._row(preprocessing.std, guess) + self._row(preprocessing.mean, guess)
            return (unit * self.bins).floor().clamp(0, self.bins - 1)
        if self.local_norm is None:
            return guess
        mean, deviation = local_statistics(images, self.local_norm)
        return (guess.float() - mean) / deviation

    def back(self, guess: Tensor, images: Tensor) -> Tensor:
        """Locally standardised values as pixels again, with the true images' statistics."""
        if self.local_norm is None:
            return guess
        mean, deviation = local_statistics(images, self.local_norm)
        return guess.float() * deviation + mean

    def loss(self, predicted: Tensor, wanted: Tensor, channels: int, weight: Tensor | None) -> Tensor:
        """Summed over counted pixels and channels / (counted pixels + 1e-5) / channels. weight: ``[B, M, P]``, or None
        where everything given counts."""
        each = self._each(predicted, wanted, channels)
        if weight is None:
            return each.sum() / (each.numel() / channels + 1e-5) / channels
        return (each * weight[:, :, None]).sum() / (weight.sum() + 1e-5) / channels

    def _each(self, predicted: Tensor, wanted: Tensor, channels: int) -> Tensor:
        """``[B, M, C, P]``."""
        wanted = wanted.unflatten(2, (channels, -1))
        if self.kind == "cross_entropy":
            logits = predicted.float().unflatten(2, (channels, self.bins, -1)).movedim(3, 1)
            return F.cross_entropy(logits, wanted.long(), reduction="none")
        return elementwise(predicted.unflatten(2, (channels, -1)), wanted, self.kind)

    def values(self, predicted: Tensor, channels: int, preprocessing: Preprocessing) -> Tensor:
        """Predictions as values ``[B, M, C P]``: for bins, the standardised expected value of the bins' centres."""
        if self.kind != "cross_entropy":
            return predicted
        shares = predicted.unflatten(2, (channels, self.bins, -1)).softmax(dim=3)
        centres = (torch.arange(self.bins, device=predicted.device) + 0.5) / self.bins
        unit = (shares * centres[:, None]).sum(dim=3)
        mean, std = (torch.tensor(v, device=unit.device)[:, None] for v in (preprocessing.mean, preprocessing.std))
        return ((unit - mean) / std).flatten(2)

    def histogram_loss(self, wanted: Tensor, channels: int, seen: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy of each image's and channel's histogram of visible pixels (one added to every bin) on counted ones.

        seen, weight: ``[B, L, P]``, 1 for visible and for counted pixels.
        """
        wanted = wanted.unflatten(2, (channels, -1)).movedim(2, 1).flatten(2).long()  # [B, C, L P]
        counts = torch.ones(*wanted.shape[:2], self.bins, device=wanted.device)
        counts.scatter_add_(2, wanted, seen.flatten(1)[:, None].expand(-1, channels, -1).contiguous())
        surprise = -(counts / counts.sum(dim=2, keepdim=True)).log().gather(2, wanted)
        return (surprise * weight.flatten(1)[:, None]).sum() / (weight.sum() + 1e-5) / channels

    @staticmethod
    def _row(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device).view(-1, *(1,) * (like.ndim - 2))


def local_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[B, C, H, W]`` of the ``window x window`` pixels around each pixel, channel by channel; beyond the
    border nothing is counted. The deviation is sqrt(var + 1e-6), var unbiased. SimMIM of SwinV2 (NORM_TARGET)."""
    images = images.float()
    mean = _box_sum(images, window)
    square = _box_sum(images.square(), window)
    count = _box_sum(torch.ones_like(images[:1, :1]), window)
    mean, square = mean / count, square / count
    var = ((square - mean.square()) * count / (count - 1).clamp(min=1)).clamp(min=0)
    return mean, (var + 1e-6).sqrt()


def _box_sum(x: Tensor, window: int) -> Tensor:
    """Sums over the pixels around each pixel: one axis after the other."""
    half = window // 2
    x = F.avg_pool2d(x, (window, 1), stride=1, padding=(half, 0)) * window
    return F.avg_pool2d(x, (1, window), stride=1, padding=(0, half)) * window
