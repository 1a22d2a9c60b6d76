"""From a raw batch to what a model sees, on the batch's device: crop, flip, colours, standardisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.contracts import Batch, Preprocessing
from unmask.data.color import luma
from unmask.data.crops import flipped, random_boxes, shifted
from unmask.data.resize import centre_crop, resized_crop
from unmask.data.settings import DataSettings
from unmask.draw import Draw
from unmask.errors import UserError


class Transform:
    """The settings' augmentation for training, a centre crop for evaluation, then ``(pixels / full_range - mean) / std``.

    channels: of the raw images. one_size: whether all of them have one size. full_range: the value of white.
    """

    def __init__(
        self, settings: DataSettings, preprocessing: Preprocessing, *, channels: int, one_size: bool, full_range: float
    ):
        self.settings, self.preprocessing, self.full_range = settings, preprocessing, full_range
        self.size: tuple[int, int] = tuple(preprocessing.image_size)  # type: ignore[assignment]
        self.channels = channels
        self.one_size = one_size
        self.eval_crop = settings.eval_crop or preprocessing.crop
        if channels != preprocessing.channels and (channels, preprocessing.channels) not in ((1, 3), (3, 1)):
            raise UserError(f"the images have {channels} channels, the model takes {preprocessing.channels}")
        if settings.rand_augment is not None and channels not in (1, 3):
            raise UserError(
                f"rand_augment is for grey and colour images, these have {channels} channels: use augment=crop_flip"
            )

    def __call__(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> dict[str, Any]:
        """``image`` float32 ``[B, C, *size]`` and the batch's other entries (``size`` is dropped)."""
        images = batch["image"]
        sizes = batch.get("size")
        if sizes is None:
            sizes = torch.tensor(images.shape[2:], device=images.device).expand(len(images), 2)
        if train:
            if draw is None:
                raise ValueError("a training transform needs a draw")
            pixels = self._training(images, sizes, draw)
        else:
            pixels = self._whole(images, sizes)
        pixels = self.standardised(pixels)
        if train and self.settings.erase:
            from unmask.data.erasing import erased

            assert draw is not None
            pixels = erased(pixels, draw, self.settings.erase)
        return {**{k: v for k, v in batch.items() if k != "size"}, "image": pixels}

    def _training(self, images: Tensor, sizes: Tensor, draw: Draw) -> Tensor:
        s = self.settings
        interpolation = self.preprocessing.interpolation
        if s.augment in ("crop", "crop_flip", "rand_augment"):
            boxes = random_boxes(sizes, draw, s.crop_scale, s.crop_ratio)
            pixels = resized_crop(images, boxes, self.size, interpolation)
        else:
            pixels = self._whole(images, sizes)
        if s.augment in ("shift", "shift_flip"):
            pixels = shifted(pixels, draw, max(self.size) // 8 if s.shift is None else s.shift)
        if s.augment in ("flip", "crop_flip", "shift_flip", "rand_augment"):
            pixels = flipped(pixels, draw, s.flip)
        if s.rand_augment is not None or s.color_jitter is not None:
            pixels = pixels.to(torch.float32) / self.full_range
            if s.rand_augment is not None:
                from unmask.data.rand_augment import rand_augment

                # what moves in from outside is the mean colour, where there is one
                fill = (
                    self.preprocessing.mean
                    if len(self.preprocessing.mean) == self.channels and s.normalise != "none"
                    else None
                )
                pixels = rand_augment(pixels, draw, s.rand_augment, fill)
            if s.color_jitter is not None:
                from unmask.data.color import color_jitter

                pixels = color_jitter(pixels, draw, s.color_jitter)
            pixels = pixels * self.full_range
        return pixels

    def _whole(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Evaluation's view; images that already are of the right size stay as they are."""
        if self.one_size and tuple(images.shape[2:]) == self.size and self.eval_crop == 1:
            return images
        return centre_crop(images, sizes, self.size, self.eval_crop, self.preprocessing.interpolation)

    def standardised(self, pixels: Tensor) -> Tensor:
        """``(pixels / full_range - mean) / std``, with grey repeated or colour made grey where the model wants it."""
        wanted = self.preprocessing.channels
        if self.channels == 3 and wanted == 1:
            pixels = luma(pixels)
        # in place from the one float copy on
        std = torch.tensor(self.preprocessing.std, dtype=torch.float32).reshape(-1, 1, 1)
        mean = torch.tensor(self.preprocessing.mean, dtype=torch.float32).reshape(-1, 1, 1)
        a, b = (1 / (std * self.full_range)).to(pixels.device), (-mean / std).to(pixels.device)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return pixels.mul_(a).add_(b) if pixels.shape[1] == wanted else pixels * a + b  # grey becomes colour
