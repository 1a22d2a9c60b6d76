"""Mask files: one bit a weight, as the authors publish them (``np.packbits`` of the flattened mask, big-endian)."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.errors import UserError, nearest

SUFFIX = ".mask"


def packed(mask: Tensor) -> np.ndarray:
    """uint8 ``[ceil(numel / 8)]``."""
    return np.packbits(mask.bool().flatten().cpu().numpy())


def unpacked(bits: np.ndarray, shape: tuple[int, ...], layer: str = "") -> Tensor:
    """The mask, float32. Raises ``UserError`` where the bits do not fit the shape."""
    count = int(np.prod(shape))
    if bits.dtype != np.uint8 or bits.ndim != 1 or len(bits) != (count + 7) // 8:
        raise UserError(
            f"the mask of {layer} has {bits.size} bytes, a weight of {list(shape)} takes {(count + 7) // 8}"
        )
    return torch.from_numpy(np.unpackbits(bits)[:count].reshape(shape).astype(np.float32))


def mask_file(masks: Mapping[str, Tensor]) -> bytes:
    """The content of ``mask_compressed.npz``: ``<layer>.weight.mask`` -> packed bits of the weight's own layout."""
    bits: Any = {f"{layer}.weight{SUFFIX}": packed(mask) for layer, mask in masks.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **bits)
    return buffer.getvalue()


def load_masks(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Masks by layer from an npz of packed bits, or a ``.safetensors`` or ``.pt`` of whole masks. shapes: of the layers' weights.

    Raises ``UserError`` for a file that is none, a layer that is missing or unknown, a size that does not fit. Nothing in the file
    is executed.
    """
    if not path.is_file():
        raise UserError(f"no mask file {path}: it takes an .npz of packed masks")
    found: dict[str, Tensor] = {}
    if path.suffix in (".safetensors", ".pt", ".pth"):
        from unmask.official.load import read_checkpoint

        whole = {k.removesuffix(SUFFIX).removesuffix(".weight"): v for k, v in read_checkpoint(path).items()}
        for layer, mask in whole.items():
            if layer in shapes and tuple(mask.shape) != tuple(shapes[layer]):
                raise UserError(f"the mask of {layer} is {list(mask.shape)}, its weight {list(shapes[layer])}")
        found = {k: v.float() for k, v in whole.items()}
    else:
        try:
            with np.load(path, allow_pickle=False) as archive:
                bits = {k.removesuffix(SUFFIX).removesuffix(".weight"): archive[k] for k in archive.files}
        except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{path} is no mask file: {str(error).splitlines()[0][:120]}") from None
        found = {k: unpacked(v, shapes[k], k) for k, v in bits.items() if k in shapes}
        found |= {k: torch.empty(0) for k in bits if k not in shapes}
    unknown, missing = sorted(set(found) - set(shapes)), sorted(set(shapes) - set(found))
    if unknown:
        raise UserError(f"{path} has a mask of {unknown[0]}, which is no masked layer: {nearest(unknown[0], shapes)}")
    if missing:
        raise UserError(f"{path} has no mask of {missing[0]} ({len(missing)} missing): it takes masks of this model")
    return found
