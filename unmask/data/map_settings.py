"""``SegmentationData``: which images with label maps, at which size, changed how."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from unmask.config import Field
from unmask.data.settings import DataSettings

# what a label map has no use for: set to anything but its default it is refused, not overlooked
NOT_HERE = ("augment", "crop_scale", "crop_ratio", "shift", "rand_augment", "color_jitter", "erase", "eval_crop")
VOID_NAMES = ("unlabelled", "unlabeled", "void", "ignore", "ignored", "unknown")


class SegmentationData(DataSettings):
    """Images with label maps. For training an image is resized (a drawn factor), cropped, coloured, flipped, padded; for
    evaluation resized and padded. ``image_size`` is the training crop."""

    uri: str = Field(
        ..., description="folder with images/ and labels/, COCO panoptic folder, parquet or hub id with an annotation"
    )
    image_size: int | tuple[int, int] | None = Field(
        None, description="pixels (height, width) of a training crop; open: from the images, multiples of 32 up to 512"
    )
    scale: tuple[float, float] = Field((0.5, 2.0), description="range of the factor drawn for shortest_edge")
    scale_step: float | None = Field(0.1, gt=0, description="factors lie this far apart; null: any in the range")
    shortest_edge: int | None = Field(
        None, ge=1, description="pixels of the shorter side at factor 1; open: the crop's shorter side"
    )
    longest_edge: int | None = Field(None, ge=1, description="pixels that no resized training image's side exceeds")
    test_shortest_edge: int | None = Field(
        None, ge=1, description="the shorter side in evaluation; open: as in training"
    )
    test_longest_edge: int | None = Field(None, ge=1, description="what no side exceeds in evaluation")
    jitter: bool = Field(True, description="SSD's colour jitter: brightness, contrast, saturation, hue, each by a coin")
    flip: float = Field(0.5, ge=0, le=1, description="chance of a horizontal flip")
    pad_value: float = Field(128.0, ge=0, le=255, description="grey level beyond an image smaller than its crop")
    divisor: int = Field(32, ge=1, description="evaluation pads (with the mean colour) to multiples of this")
    ignore: int | tuple[int, ...] | None = Field(
        None,
        description="values of label maps that count as nothing; open: 255 (65535) and classes called unlabelled, void",
    )
    first_class: int = Field(0, ge=0, description="value of the first class (1 where 0 means nothing)")
    classes: int | tuple[str, ...] | None = Field(
        None, description="their names or number; open: classes.txt, the annotation's own, or the largest value"
    )
    things: tuple[str | int, ...] | None = Field(
        None, description="names or numbers of classes that are countable objects; open: what the annotation says"
    )
    segments: bool | None = Field(
        None, description="also give segments (panoptic); open: where the data tell objects of a class apart"
    )
    normalise: Literal["dataset", "imagenet", "half", "none"] = Field(
        "imagenet", description="standardise by ImageNet's statistics, 0.5 / 0.5, or not at all (dataset: imagenet)"
    )

    @model_validator(mode="after")
    def _fits_label_maps(self) -> SegmentationData:
        for name in NOT_HERE:
            if getattr(self, name) != DataSettings.model_fields[name].get_default():
                raise ValueError(f"{name} is for images alone; label maps take scale, image_size, jitter and flip")
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale={list(self.scale)} must rise above 0, for example [0.5, 2]")
        return self

    def factors(self) -> list[float] | None:
        """The factors that ``scale_step`` leaves; None for any within the range."""
        if self.scale_step is None:
            return None
        low, high = self.scale
        return [low + i * self.scale_step for i in range(int((high - low) / self.scale_step + 1e-9) + 1)]
