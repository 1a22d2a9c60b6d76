"""``DataSettings``: which images, at which size, changed how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from unmask.config import Config, Field

Augment = Literal["none", "flip", "crop", "crop_flip", "shift", "shift_flip", "rand_augment"]


class RandAugmentSettings(Config):
    """RandAugment (Cubuk et al. 2020) with timm's operations and scales (``rand-m9-n2-mstd0.5-inc1``)."""

    magnitude: float = Field(9.0, ge=0, description="strength on a scale of 10 (m)")
    layers: int = Field(2, ge=1, description="operations an image goes through (n)")
    magnitude_std: float = Field(0.5, ge=0, description="standard deviation of the strength (mstd)")
    increasing: bool = Field(True, description="every operation gets stronger with the magnitude (inc1)")
    probability: float = Field(0.5, ge=0, le=1, description="chance that a chosen operation is applied (p)")


class DataSettings(Config):
    """Which images, at which size, changed how."""

    uri: str = Field(
        "sample:fashion", description="folder, parquet, shards/*.tar, a name (cifar10), a hub id, sample:fashion"
    )
    split: str = Field("train", description='"train", "test", or a share in a fixed shuffled order: "train[:80%]"')
    columns: dict[str, str] = Field(
        {}, description='names of the columns, {"image": ..., "label": ...}, where they differ'
    )
    limit: int | None = Field(None, ge=1, description="use only so many images, a fixed random choice")
    image_size: int | tuple[int, int] | None = Field(
        None, description="pixels (height, width) of a batch; open: from the data"
    )
    augment: Augment = Field("crop_flip", description="what happens to a training image before standardisation")
    crop_scale: tuple[float, float] = Field((0.2, 1.0), description="share of the area a random crop takes")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="width / height of a random crop")
    flip: float = Field(0.5, ge=0, le=1, description="chance of a horizontal flip")
    shift: int | None = Field(
        None, ge=0, description="pixels of padding for augment=shift; open: an eighth of the size"
    )
    rand_augment: RandAugmentSettings | None = Field(
        None, description="RandAugment after the crop; augment=rand_augment sets it"
    )
    color_jitter: tuple[float, float, float, float] | None = Field(
        None,
        description="brightness, contrast, saturation, hue (torchvision's ColorJitter); one number sets the first three",
    )
    erase: float = Field(
        0.0, ge=0, le=1, description="chance of erasing a rectangle with noise (timm's reprob, mode pixel)"
    )
    eval_crop: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the shorter side that evaluation sees; open: 1 for images of one size, else 0.875",
    )
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    normalise: Literal["dataset", "imagenet", "half", "none"] = Field(
        "dataset", description="standardise by the data's own statistics, ImageNet's, 0.5 / 0.5, or not at all"
    )
    cache: bool = Field(
        True, description="keep decoded images in a memory-mapped file ($UNMASK_CACHE or ~/.cache/unmask)"
    )
    workers: int | None = Field(None, ge=1, description="decoding threads; open: one a core")

    @model_validator(mode="before")
    @classmethod
    def _one_number_jitters_three(cls, values: Any) -> Any:
        if isinstance(values, dict):
            jitter = values.get("color_jitter")
            if isinstance(jitter, (int, float)) and not isinstance(jitter, bool):
                values = {**values, "color_jitter": (jitter, jitter, jitter, 0.0)}
            if values.get("augment") == "rand_augment" and values.get("rand_augment") is None:
                values = {**values, "rand_augment": {}}
            if values.get("rand_augment") is True:
                values = {**values, "rand_augment": {}}
            if values.get("rand_augment") is False:
                values = {**values, "rand_augment": None}
        return values

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> DataSettings:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale={list(self.crop_scale)} must rise within (0, 1], for example [0.2, 1]")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio={list(self.crop_ratio)} must rise above 0, for example [0.75, 1.333]")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"image_size={self.image_size} must be at least 1 pixel")
        if any(c < 0 for c in self.color_jitter or ()) or (self.color_jitter or (0, 0, 0, 0))[3] > 0.5:
            raise ValueError("color_jitter takes four numbers from 0, the last (hue) at most 0.5")
        unknown = set(self.columns) - {"image", "label"}
        if unknown:
            raise ValueError(f"columns names {sorted(unknown)[0]!r}: it takes image and label")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), or None where the data decides."""
        if self.image_size is None:
            return None
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
