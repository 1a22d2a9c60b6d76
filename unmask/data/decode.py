"""From the bytes of an image file to an array ``[H, W, C]`` of uint8, uint16 or float32.

What is read how: EXIF orientation is applied; transparency is laid over white; palettes, CMYK and the like become RGB;
the first frame of an animation counts; the pages of a TIFF, if grey and of one size, are channels; an NPY of three axes
has its channels on the last axis unless the first is the smallest. 16-bit PNG and TIFF stay 16-bit; everything
else deeper than 8 bits becomes float32, as it stands.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "dib", "tif", "tiff", "npy", "gif"),
        *("ppm", "pgm", "pbm", "pnm", "avif", "jp2", "tga"),
    )
)
_GREY = {"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
_ALPHA = {"LA", "La", "RGBA", "RGBa", "PA"}
# A larger image is refused by Pillow as a bomb; a photograph of half a gigapixel is still somebody's data.
Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, 512_000_000)


class Unreadable(Exception):
    """This file holds no image that we can read; the message is the reason a person reads."""


@dataclass(frozen=True)
class Header:
    """What the head of a file says, without decoding it: stored height, width (orientation applied), channels, depth."""

    height: int
    width: int
    channels: int
    depth: int  # 8, 16 or 32 (float)


Encoded = dict[str, Any]  # {"bytes": ..., "path": ...} as in Hugging Face's Image feature; "mode" forces a Pillow mode


def _bytes(item: Encoded, count: int | None = None) -> bytes:
    if item.get("bytes") is not None:
        return item["bytes"][:count] if count else item["bytes"]
    path = item.get("path")
    if not path:
        raise Unreadable("no image in this row")
    with open(path, "rb") as file:
        return file.read(count) if count else file.read()


def _kind(head: bytes) -> str:
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) > 25 and head[24] == 16:
        return "png16"
    return "pillow"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify image file" in text:
        return "not an image"
    return text[:160]


def header(item: Encoded) -> Header:
    """Size, channels and depth of one image. Raises ``Unreadable``."""
    try:
        head = _bytes(item, 32)
        kind = _kind(head)
        if kind == "npy":
            return _header_of_array(*_npy_shape(item))
        if kind == "tiff" and not item.get("mode"):
            found = _tiff_header(item)
            if found is not None:
                return found
        with Image.open(_stream(item)) as image:
            width, height = image.size
            # A PNG keeps its orientation behind the pixels; decoding honours it, and both sizes hold as many pixels.
            orientation = 1 if image.format == "PNG" else image.getexif().get(0x0112, 1)
            if orientation in (5, 6, 7, 8):
                width, height = height, width
            mode = item.get("mode") or image.mode
            grey = mode in _GREY or (mode in ("P", "PA") and _grey_palette(image))
            depth = 16 if kind == "png16" or mode.startswith("I;16") else 32 if mode in ("I", "F") else 8
            if item.get("mode"):
                depth = 8
            return Header(height, width, 1 if grey else 3, depth)
    except Unreadable:
        raise
    except Exception as error:  # decoders raise anything on a broken file
        raise Unreadable(_reason(error)) from None


def decode(item: Encoded, shorter: int | None = None) -> np.ndarray:
    """The image as ``[H, W, C]``, C-contiguous; uint8, uint16 or float32.

    shorter: the side that suffices; a JPEG much larger than this is decoded at a fraction (DCT scaling), which is
    faster; the caller still resizes. Raises ``Unreadable``.
    """
    try:
        kind = _kind(_bytes(item, 32))
        if kind == "npy":
            array = _channels_last(np.load(io.BytesIO(_bytes(item)), allow_pickle=False))
        elif kind == "tiff" and not item.get("mode") and _tiff_header(item) is not None:
            array = _tiff(item)
        elif kind == "png16" and not item.get("mode"):
            array = _png16(item)
        else:
            array = _pillow(item, shorter)
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from None
    array = _plain_dtype(array)
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise Unreadable("holds values that are not finite")
    if 0 in array.shape:
        raise Unreadable(f"an image of shape {array.shape} holds no pixel")
    return np.ascontiguousarray(array)


def _stream(item: Encoded) -> Any:
    return io.BytesIO(item["bytes"]) if item.get("bytes") is not None else _opened(item.get("path"))


def _opened(path: Any) -> str:
    if not path:
        raise Unreadable("no image in this row")
    return os.fspath(path)


def _pillow(item: Encoded, shorter: int | None) -> np.ndarray:
    with Image.open(_stream(item)) as image:
        if shorter is not None and image.format == "JPEG" and min(image.size) >= 2 * shorter:
            ratio = min(image.size) // shorter
            image.draft(None, (image.size[0] // ratio, image.size[1] // ratio))
        image.load()
        upright = ImageOps.exif_transpose(image)
        if item.get("mode"):
            return _axes(np.asarray(upright.convert(item["mode"])))
        return _axes(np.asarray(_plain_mode(upright)))


def _plain_mode(image: Image.Image) -> Image.Image:
    """L, RGB, I;16, I or F; transparency over white."""
    mode = image.mode
    if mode in _ALPHA or (mode in ("P", "L", "RGB") and "transparency" in image.info):
        grey = mode in _GREY or (mode in ("P", "PA") and _grey_palette(image))
        layered = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("L" if grey else "RGB")
    if mode in ("L", "RGB", "F", "I"):
        return image
    if mode.startswith("I;16"):
        return image
    if mode == "1":
        return image.convert("L")
    if mode == "P" and _grey_palette(image):
        return image.convert("L")
    return image.convert("RGB")


def _grey_palette(image: Image.Image) -> bool:
    palette = image.getpalette() or []
    return bool(palette) and palette[0::3] == palette[1::3] == palette[2::3]


def _png16(item: Encoded) -> np.ndarray:
    """A PNG of 16 bits a channel; Pillow would cut colour to 8 bits."""
    import torch
    from torchvision.io import ImageReadMode, decode_image

    raw = torch.frombuffer(bytearray(_bytes(item)), dtype=torch.uint8)
    pixels = decode_image(raw, mode=ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    return _over_white(pixels.permute(1, 2, 0).numpy(), 65535)


def _over_white(array: np.ndarray, full: int) -> np.ndarray:
    """Two and four channels (the last is alpha) become one and three."""
    if array.shape[-1] not in (2, 4):
        return array
    alpha = array[..., -1:].astype(np.float64) / full
    return np.rint(array[..., :-1] * alpha + full * (1 - alpha)).astype(array.dtype)


# --- TIFF ---


def _tiff_series(item: Encoded) -> tuple[Any, str, tuple[int, ...], np.dtype, bool, int]:
    import tifffile

    with tifffile.TiffFile(_stream(item)) as file:
        page = file.pages[0]
        series = file.series[0]
        alpha = any(int(e) in (1, 2) for e in (getattr(page, "extrasamples", ()) or ()))
        tag = page.tags.get("Orientation")
        return series, series.axes, tuple(series.shape), np.dtype(series.dtype), alpha, int(tag.value) if tag else 1


def _tiff_header(item: Encoded) -> Header | None:
    """None where Pillow should read the file (palettes, JPEG compression, YCbCr: what tifffile needs a plug-in for)."""
    import tifffile

    try:
        with tifffile.TiffFile(_stream(item)) as file:
            page = file.pages[0]
            if page.compression not in (1, 8, 32946, 5, 32773) or page.photometric not in (0, 1, 2, 32803, 34892):
                return None
            if page.compression == 5 or page.bitspersample not in (8, 16, 32, 64):
                return None
        _, axes, shape, dtype, alpha, orientation = _tiff_series(item)
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from None
    height, width, channels = _tiff_layout(axes, shape)
    if orientation in (5, 6, 7, 8):
        height, width = width, height
    return _header_of_array((height, width, channels - (1 if alpha and channels in (2, 4) else 0)), dtype)


def _tiff_layout(axes: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    size = dict(zip(axes, shape, strict=True))
    if "Y" not in size or "X" not in size:
        raise Unreadable(f"a TIFF with axes {axes}")
    rest = [n for a, n in zip(axes, shape, strict=True) if a not in "YX"]
    if "S" in size:  # samples of a pixel are the channels; of further pages the first counts
        return size["Y"], size["X"], size["S"]
    return size["Y"], size["X"], int(np.prod(rest)) if rest else 1


def _tiff(item: Encoded) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(_stream(item)) as file:
        page, series = file.pages[0], file.series[0]
        array, axes = series.asarray(), series.axes
        alpha = any(int(e) in (1, 2) for e in (getattr(page, "extrasamples", ()) or ()))
        tag = page.tags.get("Orientation")
        inverted = int(page.photometric) == 0 and array.dtype.kind == "u"
    if inverted:
        array = np.iinfo(array.dtype).max - array
    for axis in reversed(range(array.ndim)):
        if axes[axis] not in "YXS" and "S" in axes:
            array, axes = array.take(0, axis=axis), axes[:axis] + axes[axis + 1 :]
    order = [i for i, a in enumerate(axes) if a not in "YX"]
    array = array.transpose([axes.index("Y"), axes.index("X"), *order])
    array = array.reshape(*array.shape[:2], -1)
    if alpha and array.dtype.kind == "u":
        array = _over_white(array, np.iinfo(array.dtype).max)
    return _oriented(array, int(tag.value) if tag else 1)


def _oriented(array: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF's eight orientations, on ``[H, W, C]``."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


# --- arrays ---


def _npy_shape(item: Encoded) -> tuple[tuple[int, ...], np.dtype]:
    with io.BytesIO(item["bytes"]) if item.get("bytes") is not None else open(_opened(item.get("path")), "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if len(shape) == 2:
        return (*shape, 1), dtype
    if len(shape) != 3:
        raise Unreadable(f"an array of shape {shape} is no image: it takes [H, W], [H, W, C] or [C, H, W]")
    return (shape[1], shape[2], shape[0]) if _channels_first(shape) else shape, dtype


def _channels_first(shape: tuple[int, ...]) -> bool:
    return shape[0] < min(shape[1:])


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3 and _channels_first(array.shape):
        return array.transpose(1, 2, 0)
    return _axes(array)


def _axes(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise Unreadable(f"an array of shape {array.shape} is no image: it takes [H, W], [H, W, C] or [C, H, W]")
    return array


def _header_of_array(shape: tuple[int, ...], dtype: np.dtype) -> Header:
    if dtype.kind not in "buif":
        raise Unreadable(f"values of type {dtype} are no pixels")
    depth = 8 if dtype in (np.uint8, np.bool_) else 16 if dtype == np.uint16 else 32
    return Header(int(shape[0]), int(shape[1]), int(shape[2]), depth)


def _plain_dtype(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return array
    if array.dtype in (np.uint16, np.dtype(">u2")):
        return array.astype(np.uint16)
    if array.dtype.kind not in "uif":
        raise Unreadable(f"values of type {array.dtype} are no pixels")
    return array.astype(np.float32)


def fitted(array: np.ndarray, channels: int, depth: int, shorter: int | None) -> np.ndarray:
    """The array as the data set stores it: ``channels`` (grey repeated to colour), ``depth`` (8 bits raised to 16), and
    no larger than ``shorter`` on its shorter side. Raises ``Unreadable`` where the channels cannot be made to fit."""
    have = array.shape[-1]
    if have != channels:
        if have == 1 and channels == 3:
            array = np.repeat(array, 3, axis=-1)
        else:
            raise Unreadable(f"has {have} channels where the others have {channels}")
    if depth == 16 and array.dtype == np.uint8:
        array = array.astype(np.uint16) * 257
    elif depth == 32 and array.dtype != np.float32:
        array = array.astype(np.float32) / np.iinfo(array.dtype).max
    elif depth == 8 and array.dtype != np.uint8:
        raise Unreadable(f"is deeper than its header says ({array.dtype})")
    if shorter is not None and min(array.shape[:2]) > shorter:
        array = shrunk(array, *stored_size(array.shape[0], array.shape[1], shorter))
    return np.ascontiguousarray(array)


def stored_size(height: int, width: int, shorter: int | None) -> tuple[int, int]:
    """(height, width) after limiting the shorter side."""
    small = min(height, width)
    if shorter is None or small <= shorter:
        return height, width
    return max(round(height * shorter / small), 1), max(round(width * shorter / small), 1)


def shrunk(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic; 8-bit grey and colour by Pillow, the rest by torch."""
    if array.dtype == np.uint8 and array.shape[-1] in (1, 3):
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        return _axes(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)))
    import torch
    import torch.nn.functional as F

    pixels = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None]
    small = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    if array.dtype == np.float32:
        return small
    return np.rint(small.clip(0, np.iinfo(array.dtype).max)).astype(array.dtype)


def is_image(path: Path) -> bool:
    """By suffix, hidden files and macOS resource forks left out."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
