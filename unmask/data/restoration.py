"""Pairs for restoration: crops of pictures in their own pixels, and what a degradation left of them, made on the device.

batches = RestorationBatches(source, settings, batch_size=16, seed=0, scale=2, size=(128, 128))
batch = batches.transform(next(batches.iterate()), draw)      # image [B, C, 128, 128], low [B, C, 64, 64], in 0 ... 1
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from unmask.config import Config, Field
from unmask.contracts import Batch, DataFacts
from unmask.data.batches import tensor
from unmask.data.bicubic import resize_bicubic
from unmask.data.color import luma
from unmask.data.degradations import RealWorld, gaussian_noise, jpeg, jpeg_file, real_world, unsharp
from unmask.data.images import FULL_RANGE, Images
from unmask.data.mapped import Mapped
from unmask.data.source import Source
from unmask.draw import Draw, Scoped, Seeded
from unmask.errors import UserError

Kind = Literal["bicubic", "noise", "jpeg", "real"]


class RestorationSettings(Config):
    """Which pictures, which crops of them, and what is done to the crops."""

    uri: str = Field("sample:photos", description="folder of pictures as sharp as the output shall be, parquet, a name")
    split: str = Field("train", description='"train", "test", or a share in a fixed shuffled order: "train[:80%]"')
    columns: dict[str, str] = Field({}, description='name of the column, {"image": ...}, where it differs')
    limit: int | None = Field(None, ge=1, description="use only so many pictures, a fixed random choice")
    image_size: int | tuple[int, int] | None = Field(
        None, description="pixels of a training crop of the sharp picture; open: the network's image_size x scale"
    )
    augment: Literal["none", "flip_transpose"] = Field(
        "flip_transpose", description="mirrored left to right, top to bottom, and transposed, each half of the time"
    )
    degradation: Kind | None = Field(
        None,
        description="bicubic, noise, jpeg, or real (blur, noise, JPEG, twice); open: bicubic, or noise at one size",
    )
    sigma: float | tuple[float, float] = Field(25.0, description="noise on 0 ... 255 (15, 25, 50), or a range")
    quality: int | tuple[int, int] = Field(40, description="JPEG quality (10, 20, 30, 40), or a range")
    real: RealWorld = Field(RealWorld(), description="the numbers of degradation=real")
    eval_crop: int | None = Field(
        None, ge=16, description="measure on the central square of so many pixels; open: whole pictures"
    )
    cache: bool = Field(
        True, description="keep decoded pictures in a memory-mapped file ($UNMASK_CACHE or ~/.cache/unmask)"
    )
    workers: int | None = Field(None, ge=1, description="decoding threads; open: one a core")

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> RestorationSettings:
        low, high = pair(self.sigma)
        if not 0 <= low <= high <= 255:
            raise ValueError(f"sigma={self.sigma} must lie in 0 ... 255 (and rise)")
        low, high = pair(self.quality)
        if not 1 <= low <= high <= 100:
            raise ValueError(f"quality={self.quality} must lie in 1 ... 100 (and rise)")
        if self.size is not None and min(self.size) < 8:
            raise ValueError(f"image_size={self.image_size} must be at least 8 pixels")
        unknown = set(self.columns) - {"image", "label"}
        if unknown:
            raise ValueError(f"columns names {sorted(unknown)[0]!r}: it takes image")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of a crop, or None where the network decides."""
        if self.image_size is None:
            return None
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def kind(self, scale: int) -> Kind:
        """The degradation in force. Raises ``UserError`` where it does not fit the scale."""
        kind = self.degradation or ("bicubic" if scale > 1 else "noise")
        if kind == "bicubic" and scale == 1:
            raise UserError("degradation=bicubic needs scale=2 or more: use noise or jpeg with scale=1")
        if kind in ("noise", "jpeg") and scale > 1:
            raise UserError(f"degradation={kind} keeps the size, scale={scale} does not: use scale=1 upsampler=none")
        return kind


def pair(value: float | tuple[float, float]) -> tuple[float, float]:
    """One number as a range of its own."""
    return (value[0], value[1]) if isinstance(value, tuple) else (value, value)


class RestorationBatches(Mapped):
    """Training batches of pairs. scale: of the network. size: (height, width) of a sharp crop. channels: what the network
    takes; None: what the pictures have."""

    what = "pictures"

    def __init__(
        self,
        source: Source,
        settings: RestorationSettings,
        batch_size: int,
        seed: int,
        *,
        scale: int,
        size: tuple[int, int],
        channels: int | None = None,
    ):
        if source.streaming:
            raise UserError(
                f"{source.uri} is a stream: restoration crops pictures at hand; name a folder or a parquet file"
            )
        source.cached, source.workers = settings.cache, settings.workers or source.workers
        self.source, self.settings, self.scale, self.size = source, settings, scale, size
        self.images: Images = source.images(None)  # in their own pixels, however large
        super().__init__(len(self.images), batch_size, seed, uri=source.uri)
        self.skipped = source.skipped
        self.kind = settings.kind(scale)
        for side in size:
            if side % scale:
                raise UserError(f"data.image_size={side} is no multiple of scale={scale}: use {side // scale * scale}")
        self.channels = channels or self.images.channels
        if self.channels != self.images.channels and (self.images.channels, self.channels) not in ((1, 3), (3, 1)):
            raise UserError(f"{source.uri} has {self.images.channels} channels, the network takes {self.channels}")
        mean, std = self.images.statistics()
        self.facts = DataFacts(
            uri=source.uri,
            count=len(self.images),
            channels=self.channels,
            image_size=size,
            mean=mean,
            std=std,
            bit_depth=self.images.depth,
            sizes=self.images.original_sizes,
            columns=source.columns,
            extra={"degradation": self.kind, "low_size": (size[0] // scale, size[1] // scale)},
        )

    # --- reading ---
    def _in_order(self, step: int, share: int, rank: int, world: int, accumulate: int) -> Iterator[Batch]:
        while True:
            indices = self.indices(step)
            for micro in range(accumulate):
                first = (micro * world + rank) * share
                # the engine's own source of a micro-batch: the crop is drawn where the pixels are read, and only it is
                place = Scoped(Seeded(self.seed, step, first), "data").uniform("crop", (share, 2))
                yield self.fetch(indices[first : first + share], place.numpy())
            step += 1

    def fetch(self, indices: np.ndarray, place: np.ndarray | None = None) -> Batch:
        """``image``: crops ``[B, C, *size]`` as stored; ``index``. place: ``[B, 2]`` in [0, 1), where; None: the centre.

        A picture smaller than the crop is mirrored at its right and lower border.
        """
        crops, actual = [], []
        for row, number in enumerate(indices):
            pixels, read = self.images.read(int(number))
            pixels = at_least(pixels, self.size)
            corner = []
            for axis in (0, 1):
                room = pixels.shape[axis] - self.size[axis]
                at = 0.5 if place is None else float(place[row, axis])
                corner.append(min(int(at * (room + 1)), room))
            top, left = corner
            crops.append(pixels[top : top + self.size[0], left : left + self.size[1]])
            actual.append(read)
        return {"image": tensor(np.stack(crops)), "index": torch.tensor(actual)}

    def transform(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> dict[str, Any]:
        """``image`` and ``low`` float32 in 0 ... 1 (noise may leave it), with ``sharp`` where the target is sharpened."""
        high = batch["image"].to(torch.float32) / FULL_RANGE[self.images.depth]
        high = matched(high, self.channels)
        if train:
            if draw is None:
                raise ValueError("a training transform needs a draw")
            high = turned(high, draw) if self.settings.augment == "flip_transpose" else high
        low, sharp = degraded(high, draw or Seeded(0), self.settings, self.kind, self.scale)
        rest = {k: v for k, v in batch.items() if k != "image"}
        return {**rest, "image": high.contiguous(), "low": low, **({} if sharp is None else {"sharp": sharp})}


def degraded(
    high: Tensor, draw: Draw, settings: RestorationSettings, kind: Kind, scale: int
) -> tuple[Tensor, Tensor | None]:
    """What is left of ``high`` float ``[B, C, H, W]`` in 0 ... 1, and the sharpened target where there is one.

    Bicubic and JPEG are rounded to 8 bits, as files are; noise is neither rounded nor clamped.
    """
    count = len(high)
    if kind == "bicubic":
        return (resize_bicubic(high, 1 / scale).clamp(0, 1) * 255).round() / 255, None
    if kind == "noise":
        low, wide = pair(settings.sigma)
        sigma = low + (wide - low) * draw.uniform("sigma", (count,), device=high.device)
        return gaussian_noise(high, draw, sigma), None
    if kind == "jpeg":
        least, most = (int(v) for v in pair(settings.quality))
        return jpeg(high, draw.integers("quality", least, most + 1, (count,), device=high.device)), None
    sharp = unsharp(high) if settings.real.sharpen else None
    return real_world(high if sharp is None else sharp, draw, settings.real, scale), sharp


def turned(images: Tensor, draw: Draw) -> Tensor:
    """Each image mirrored left to right, top to bottom, and transposed (square ones), each with probability one half."""
    u = draw.uniform("turn", (len(images), 3), device=images.device)[:, :, None, None, None]
    images = torch.where(u[:, 0] < 0.5, images.flip(-1), images)
    images = torch.where(u[:, 1] < 0.5, images.flip(-2), images)
    if images.shape[-1] == images.shape[-2]:
        images = torch.where(u[:, 2] < 0.5, images.transpose(-1, -2), images)
    return images


def matched(images: Tensor, channels: int) -> Tensor:
    """Grey repeated, or colour turned to luma, where a network wants it."""
    if images.shape[1] == channels:
        return images
    return luma(images) if channels == 1 else images.expand(-1, channels, -1, -1)


def at_least(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[H, W, C]``, mirrored with its edge pixel at the right and the bottom until it has ``size``."""
    short = [max(s - p, 0) for s, p in zip(size, pixels.shape[:2], strict=True)]
    return np.pad(pixels, ((0, short[0]), (0, short[1]), (0, 0)), mode="symmetric") if any(short) else pixels


# --- measuring ----------------------------------------------------------------------------------------------------------


def evaluation_pair(
    pixels: np.ndarray, settings: RestorationSettings, scale: int, channels: int, draw: Draw
) -> tuple[Tensor, Tensor]:
    """(high, low) of a whole picture, float ``[1, C, H, W]`` in 0 ... 1; the high one is cut to multiples of ``scale``.

    Bicubic is rounded to 8 bits like the field's files; JPEG goes through a file of Pillow's.
    """
    kind = settings.kind(scale)
    full = 255.0 if pixels.dtype == np.uint8 else 65535.0 if pixels.dtype == np.uint16 else 1.0
    if settings.eval_crop is not None:
        side = settings.eval_crop
        top, left = (max(s - side, 0) // 2 for s in pixels.shape[:2])
        pixels = pixels[top : top + side, left : left + side]
    height, width = (s // scale * scale for s in pixels.shape[:2])
    high = torch.from_numpy(np.ascontiguousarray(pixels[:height, :width]).astype(np.float32) / full)
    high = matched(high.permute(2, 0, 1)[None], channels)
    if kind == "jpeg":
        quality = round(sum(pair(settings.quality)) / 2)
        whole = (high[0].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        return high, torch.from_numpy(jpeg_file(whole, quality).astype(np.float32) / 255).permute(2, 0, 1)[None]
    return high, degraded(high, draw, settings, kind, scale)[0]
