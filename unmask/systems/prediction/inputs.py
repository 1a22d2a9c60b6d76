"""What a person hands to ``predict``: files, Pillow images, arrays, tensors; and how they become what a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.contracts import Encoder, Preprocessing
from unmask.data.color import LUMA
from unmask.data.decode import Unreadable, decode
from unmask.data.resize import centre_crop
from unmask.errors import UserError

FULL = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}


def preprocessing_of(encoder: Encoder) -> Preprocessing:
    """What the encoder was trained with; for one that does not say, ImageNet's statistics, or one half where the channels
    are not three."""
    if encoder.preprocessing is not None:
        return encoder.preprocessing
    size, channels = tuple(encoder.image_size), encoder.in_channels
    if channels == 3:
        return Preprocessing(image_size=size)
    return Preprocessing(mean=(0.5,) * channels, std=(0.5,) * channels, image_size=size, channels=channels)


def read_image(item: Any, position: int = 0) -> tuple[np.ndarray, str]:
    """One input as ``[H, W, C]`` and its name. Takes a path, a Pillow image, an array ``[H, W]`` or ``[H, W, C]``, or a
    tensor ``[H, W]`` or ``[C, H, W]``; integers fill their type's range, floats lie in 0 ... 1.

    Raises ``UserError`` naming the input.
    """
    name = str(item) if isinstance(item, (str, Path)) else f"input {position + 1}"
    if isinstance(item, (str, Path)):
        if not Path(item).is_file():
            raise UserError(f"no file {item}: give image files")
        try:
            return decode({"bytes": None, "path": str(item)}), name
        except Unreadable as error:
            raise UserError(f"{item} cannot be read: {error}") from None
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        array = (item[None] if item.ndim == 2 else item).movedim(0, -1).numpy()
    elif hasattr(item, "getbands"):  # a Pillow image
        kept = (
            item if item.mode in ("L", "RGB", "F", "I;16") else item.convert("L" if item.mode in ("1", "LA") else "RGB")
        )
        array = np.asarray(kept)
    else:
        array = np.asarray(item)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.dtype.kind not in "uif" or 0 in array.shape:
        raise UserError(
            f"{name} of shape {array.shape} and type {array.dtype} is no image: give a file, [H, W, C] or a [C, H, W] tensor"
        )
    if array.dtype.kind == "f" or array.dtype in FULL:
        return array, name
    return array.astype(np.uint16 if array.max(initial=0) > 255 else np.uint8), name


def fit_channels(array: np.ndarray, channels: int, name: str) -> np.ndarray:
    """Grey repeated for a model of three channels, colour to luminance for a model of one. Raises ``UserError`` else."""
    have = array.shape[-1]
    if have == channels:
        return array
    if have == 1 and channels == 3:
        return np.repeat(array, 3, axis=-1)
    if have == 3 and channels == 1:
        grey = array.astype(np.float64) @ np.array(LUMA)
        return (np.rint(grey) if array.dtype.kind == "u" else grey).astype(array.dtype)[..., None]
    if have == 4 and channels in (1, 3):
        return fit_channels(array[..., :3], channels, name)
    raise UserError(f"{name} has {have} channels, the model takes {channels}")


def standardised(images: Sequence[np.ndarray], preprocessing: Preprocessing) -> Tensor:
    """``[H, W, C]`` arrays of any sizes -> float32 ``[B, C, *image_size]``: the centre, resized, ``(x / full - mean) / std``."""
    size = tuple(preprocessing.image_size)
    rows = []
    for array in images:
        full = FULL.get(array.dtype, preprocessing.full_range if preprocessing.full_range not in FULL.values() else 1.0)
        raw = array if array.dtype == np.uint8 else array.astype(np.float32)
        pixels = torch.from_numpy(np.array(raw, order="C")).permute(2, 0, 1)[None]
        sizes = torch.tensor([array.shape[:2]])
        rows.append(centre_crop(pixels, sizes, size, preprocessing.crop, preprocessing.interpolation) / full)  # type: ignore[arg-type]
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(preprocessing.std, dtype=torch.float32)[:, None, None]
    return (torch.cat(rows) - mean) / std
