from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pixels import noise

from unmask.data.decode import Unreadable, decode, fitted, header, stored_size


def saved(array: np.ndarray, kind: str, **options: object) -> dict:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **options)
    return {"bytes": out.getvalue(), "path": None}


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("shape", [(9, 13), (9, 13, 3)])
def test_lossless_formats_give_back_their_pixels(kind: str, shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    found = decode(saved(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})))
    expected = pixels.reshape(9, 13, -1)
    if kind == "WEBP" and found.shape[-1] == 3:
        expected = np.broadcast_to(expected, (9, 13, 3))  # WebP has no grey
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_a_jpeg_is_what_pillow_decodes() -> None:
    item = saved(noise(20, 30, 3), "JPEG")
    np.testing.assert_array_equal(decode(item), np.asarray(Image.open(io.BytesIO(item["bytes"]))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(noise(8, 24, 3)).resize((48, 16)).save(out, kind, exif=exif)
    item = {"bytes": out.getvalue(), "path": None}
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(out.getvalue()))).convert("RGB"))
    found, head = decode(item), header(item)
    assert found.shape[:2] == ((48, 16) if orientation >= 5 else (16, 48))
    np.testing.assert_array_equal(found, expected)
    assert head.height * head.width == 16 * 48
    if kind != "PNG":  # its orientation may stand behind the pixels, and is read when they are
        assert (head.height, head.width) == found.shape[:2]


def test_sixteen_bit_grey_png_keeps_its_values() -> None:
    pixels = noise(7, 5, dtype=np.uint16)
    item = saved(pixels, "PNG")
    assert header(item).depth == 16
    np.testing.assert_array_equal(decode(item)[..., 0], pixels)


def sixteen_bit_png(pixels: np.ndarray) -> bytes:
    """Colour type 2 or 6, 16 bits, which Pillow does not write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_png_keeps_its_values() -> None:
    pixels = noise(6, 4, 3, dtype=np.uint16)
    item = {"bytes": sixteen_bit_png(pixels), "path": None}
    assert (header(item).channels, header(item).depth) == (3, 16)
    np.testing.assert_array_equal(decode(item), pixels)


def test_sixteen_bit_transparency_lies_over_white() -> None:
    pixels = noise(6, 4, 4, dtype=np.uint16)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 65535
    item = {"bytes": sixteen_bit_png(pixels), "path": None}
    found = decode(item)
    assert found.shape == (6, 4, header(item).channels)
    assert (found[0] == 65535).all()
    np.testing.assert_array_equal(found[1], pixels[1, :, :3])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_over_white(kind: str) -> None:
    pixels = noise(6, 4, 4)
    pixels[0, :, 3], pixels[1:, :, 3] = 0, 255
    found = decode(saved(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert found.shape == (6, 4, 3)
    assert (found[0] == 255).all()
    np.testing.assert_array_equal(found[1:], pixels[1:, :, :3])


def test_palettes_become_colour_and_grey_palettes_grey() -> None:
    colour = Image.fromarray(noise(8, 8, 3)).quantize(16)
    grey = Image.fromarray(noise(8, 8)).convert("P")
    for image, channels in ((colour, 3), (grey, 1)):
        out = io.BytesIO()
        image.save(out, "PNG")
        item = {"bytes": out.getvalue(), "path": None}
        assert decode(item).shape[-1] == header(item).channels == channels


def test_the_first_frame_of_a_gif_counts() -> None:
    frames = [Image.fromarray(np.full((5, 6), v, dtype=np.uint8)) for v in (40, 200)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert (decode({"bytes": out.getvalue(), "path": None}) == 40).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_many_channel_tiff_keeps_channels_and_depth(dtype: type, layout: str) -> None:
    pixels = noise(12, 10, 7, dtype=dtype)
    out = io.BytesIO()
    if layout == "planes":
        tifffile.imwrite(out, np.ascontiguousarray(pixels.transpose(2, 0, 1)), photometric="minisblack")
    else:
        tifffile.imwrite(out, pixels, photometric="minisblack", planarconfig="contig")
    item = {"bytes": out.getvalue(), "path": None}
    head = header(item)
    assert (head.height, head.width, head.channels) == (12, 10, 7)
    assert head.depth == {np.uint8: 8, np.uint16: 16, np.float32: 32}[dtype]
    np.testing.assert_array_equal(decode(item), pixels)


@pytest.mark.parametrize("shape", [(9, 11), (9, 11, 5), (5, 9, 11)])
def test_npy_has_its_channels_on_the_last_axis_unless_the_first_is_smallest(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    pixels = noise(*shape, dtype=np.float32)
    np.save(tmp_path / "a.npy", pixels)
    item = {"bytes": None, "path": str(tmp_path / "a.npy")}
    expected = pixels[..., None] if pixels.ndim == 2 else pixels if shape[2] == 5 else pixels.transpose(1, 2, 0)
    head = header(item)
    assert (head.height, head.width, head.channels) == expected.shape
    np.testing.assert_array_equal(decode(item), expected)


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", b"\x93NUMPY", b"II*\0rubbish", b"\x89PNG\r\n\x1a\n" + bytes(40)],
)
def test_rubbish_is_unreadable_and_says_why(content: bytes) -> None:
    for read in (header, decode):
        with pytest.raises(Unreadable) as error:
            read({"bytes": content, "path": None})
        assert str(error.value)
        assert "\n" not in str(error.value)


@settings(max_examples=30, deadline=None)
@given(cut=st.floats(0, 0.98), kind=st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"]))
def test_a_truncated_file_is_unreadable(cut: float, kind: str) -> None:
    item = saved(noise(40, 40, 3), kind)
    short = {"bytes": item["bytes"][: int(len(item["bytes"]) * cut)], "path": None}
    try:
        found = decode(short)
    except Unreadable:
        return
    assert kind == "GIF"  # a later part of a GIF may be missing without loss
    assert found.shape[:2] == (40, 40)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(Unreadable):
        decode({"bytes": None, "path": str(tmp_path / "a.npy")})


def test_values_that_are_not_finite_are_unreadable(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((4, 4), np.nan, dtype=np.float32))
    with pytest.raises(Unreadable, match="finite"):
        decode({"bytes": None, "path": str(tmp_path / "a.npy")})


def test_grey_is_repeated_and_eight_bits_are_raised() -> None:
    pixels = noise(4, 6, 1)
    assert (fitted(pixels, 3, 8, None) == pixels).all()
    raised = fitted(pixels, 1, 16, None)
    assert raised.dtype == np.uint16
    np.testing.assert_array_equal(raised, pixels.astype(np.uint16) * 257)
    with pytest.raises(Unreadable, match="channels"):
        fitted(noise(4, 6, 5), 3, 8, None)


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), shorter=st.integers(1, 1000))
def test_the_shorter_side_is_limited_and_the_shape_kept(height: int, width: int, shorter: int) -> None:
    h, w = stored_size(height, width, shorter)
    assert min(h, w) == min(shorter, height, width)
    assert abs(h / height - w / width) <= 1 / min(height, width) + 1 / max(height, width)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_shrinking_keeps_the_mean_and_the_type(dtype: type, channels: int) -> None:
    pixels = noise(120, 90, channels, dtype=dtype)
    small = fitted(pixels, channels, {np.uint8: 8, np.uint16: 16, np.float32: 32}[dtype], 30)
    assert small.shape == (40, 30, channels)
    assert small.dtype == dtype
    full = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    assert abs(small.mean() / full - pixels.mean() / full) < 0.01
