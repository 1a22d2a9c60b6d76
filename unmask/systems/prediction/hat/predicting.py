"""Photographs of any size through a HAT: padding, tiles, grey, transparency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from unmask.config import Config, Field
from unmask.data.bicubic import resize_bicubic
from unmask.data.color import luma
from unmask.errors import UserError
from unmask.systems.prediction.inputs import FULL, read_image
from unmask.systems.prediction.results import PictureResult
from unmask.systems.prediction.tiling import check_side, check_tiles, in_tiles, padded_to

if TYPE_CHECKING:
    from unmask.systems.prediction.hat.model import HAT

WHOLE = 512 * 512  # pixels of an input that go through at once where tile is open; more is cut into tiles
TILE = 256  # about the side of those tiles
OVERLAP = 32  # about the pixels around them


class Ask(Config):
    """How to restore."""

    scale: int | None = Field(None, description="a check: the network has one scale, and another is refused")
    tile: int | None = Field(
        None,
        ge=0,
        description="side of a tile in input pixels, a multiple of the window; 0: never; open: for large inputs",
    )
    overlap: int | None = Field(
        None,
        ge=0,
        description="pixels around a tile that are computed with it and fade into the next, a multiple of the window; open: "
        "about 32",
    )
    batch: int = Field(1, ge=1, description="tiles in a batch")
    ensemble: bool = Field(False, description="mean over eight flips and transposes: slower, some hundredths of a dB")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: half the memory; check it on your pictures")


def restored(
    model: HAT,
    low: Tensor,
    *,
    tile: int | None = None,
    overlap: int = 32,
    batch: int = 1,
    fade: bool = False,
    ensemble: bool = False,
    precision: str = "fp32",
    tell: Callable[[int, int], None] | None = None,
) -> Tensor:
    """``[B, C, h s, w s]`` of ``low [B, C, h, w]`` of any size, not clamped, in evaluation mode.

    tile: None for the whole at once, else the side of a tile, with ``overlap`` pixels of its surroundings (both multiples of
    the window). Tiles give slightly other numbers than the whole, since windows and the channel attention's mean see less.
    fade: neighbouring tiles fade into one another over the overlap, instead of meeting at an edge as the authors' do.
    """
    config, window = model.config, model.config.window_size
    height, width = low.shape[2:]
    if config.ape:
        side, padded = config.training_size, padded_to(low, window)
        fits = tuple(padded.shape[2:]) == side
        if side[0] != side[1] and not fits:
            raise UserError(f"hat: with ape the input must have {side[0]}x{side[1]} pixels")
        padded = padded if fits else padded_to(low, side[0])
        tile, overlap = (None if fits else side[0]), 0
    else:
        padded = padded_to(low, window)
    if tile is not None:
        check_tiles(tile, overlap, window)

    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            made = eightfold(model.network, x) if ensemble else model.network(x)
        return made.float()

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if tile is None:
                made = run(padded)
            elif fade and overlap:
                made = faded(run, padded, tile=tile, overlap=overlap, scale=config.scale, batch=batch, tell=tell)
            else:
                made = in_tiles(run, padded, tile=tile, overlap=overlap, scale=config.scale, batch=batch, tell=tell)
    finally:
        model.train(training)
    return made[..., : height * config.scale, : width * config.scale]


def eightfold(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The mean of a network's answers to eight flips and transposes, each turned back."""
    total = None
    for transposed in (False, True):
        for axes in ((), (-1,), (-2,), (-2, -1)):
            turned = x.flip(axes) if axes else x
            made = run(turned.transpose(-1, -2) if transposed else turned)
            made = made.transpose(-1, -2) if transposed else made
            made = made.flip(axes) if axes else made
            total = made if total is None else total + made
    assert total is not None
    return total / 8


def faded(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    tile: int,
    overlap: int,
    scale: int,
    batch: int = 1,
    tell: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Like ``in_tiles``, but neighbours fade into one another, linearly, over a quarter of the overlap to either side of their
    edge: what they disagree about does not show as a line. The outer three quarters of a tile's surroundings are cut off."""
    _, _, height, width = images.shape
    places = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
    boxes = [_box(y, x, tile, overlap, height, width) for y, x in places]
    groups: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for box in boxes:
        groups.setdefault((box[1] - box[0], box[3] - box[2]), []).append(box)
    total: Tensor | None = None
    weights = images.new_zeros(height * scale, width * scale)
    done = 0
    for same in groups.values():
        for start in range(0, len(same), batch):
            some = same[start : start + batch]
            made = run(torch.cat([images[..., a:b, c:d] for a, b, c, d in some]))
            if total is None:
                total = made.new_zeros(len(images), made.shape[1], height * scale, width * scale)
            for part, (a, b, c, d) in zip(made.split(len(images)), some, strict=True):
                down = _fade(a, b, height, overlap, scale, made)
                across = _fade(c, d, width, overlap, scale, made)
                weight = down[:, None] * across[None]
                total[..., a * scale : b * scale, c * scale : d * scale] += part * weight
                weights[a * scale : b * scale, c * scale : d * scale] += weight
            done += len(some)
            if tell is not None:
                tell(done, len(boxes))
    assert total is not None
    return total / weights


def _box(y: int, x: int, tile: int, overlap: int, height: int, width: int) -> tuple[int, int, int, int]:
    return (
        max(y - overlap, 0),
        min(y + tile + overlap, height),
        max(x - overlap, 0),
        min(x + tile + overlap, width),
    )


def _fade(first: int, last: int, size: int, overlap: int, scale: int, like: Tensor) -> Tensor:
    """Weights along one side of a tile, its surroundings included: 0, then rising to 1 over half of the overlap, with 1/2 at
    the tile's edge; 1 up to the picture's own border."""
    place = torch.arange(first * scale, last * scale, device=like.device, dtype=like.dtype) + 0.5
    weight = torch.ones_like(place)
    reach = overlap * scale
    if first > 0:
        weight = torch.minimum(weight, ((place - first * scale - 0.75 * reach) / (reach / 2)).clamp(0, 1))
    if last < size:
        weight = torch.minimum(weight, ((last * scale - 0.75 * reach - place) / (reach / 2)).clamp(0, 1))
    return weight


# --- files --------------------------------------------------------------------------------------------------------------


def predict(
    model: HAT, inputs: Sequence[Any], *, tell: Callable[[str], None] | None = None, **options: Any
) -> list[PictureResult]:
    """One picture an input: files, Pillow images, arrays ``[H, W(, C)]`` or tensors ``[C, H, W]``. options: :class:`Ask`."""
    ask = Ask(**options)
    if ask.scale not in (None, model.config.scale):
        raise UserError(
            f"scale={ask.scale}: this network enlarges {model.config.scale} times: leave scale out, or give other weights"
        )
    return [one(model, item, position, ask, tell) for position, item in enumerate(inputs)]


def one(model: HAT, item: Any, position: int, ask: Ask, tell: Callable[[str], None] | None) -> PictureResult:
    """One input, restored."""
    array, alpha, name = read(item, position)
    low = as_unit(array, name)
    scale, channels = model.config.scale, model.network.channels
    check_side(low, 2, name=name, what="hat")
    notes: dict[str, Any] = {"scale": scale}
    device = model.network.shallow.weight.device
    low = low.to(device)
    tile = tile_for(model, ask, low)
    overlap = overlap_for(model, ask, tile)
    how: dict[str, Any] = {"tile": tile, "overlap": overlap, "batch": ask.batch, "fade": True}
    if tile is not None:
        notes |= {"tile": tile, "overlap": overlap}
    if ask.ensemble:
        notes["ensemble"] = True

    def count(done: int, total: int) -> None:
        if tell is not None:
            tell(f"{name}: {done} of {total} tiles")

    def run(x: Tensor) -> Tensor:
        made = restored(model, x, ensemble=ask.ensemble, precision=ask.precision, tell=count, **how)
        return made.clamp(0, 1)

    have = low.shape[1]
    if have == channels:
        made = run(low)
    elif have == 1 and channels == 3:  # a grey picture stays grey
        made = luma(run(low.expand(-1, 3, -1, -1)))
        notes["channels"] = "grey: repeated for a colour network, and its luma kept"
    elif have == 3 and channels == 1:
        made = with_chroma(run(luma(low)), low, scale)
        notes["channels"] = "colour: the luma through a grey network, the colours by bicubic"
    else:
        raise UserError(f"{name} has {have} channels, the network takes {channels}")
    pixels = as_pixels(made)
    if alpha is not None:
        wide = resize_bicubic(torch.from_numpy(alpha.astype(np.float32) / 255)[None, None], scale)
        edge = as_pixels(wide.clamp(0, 1)) if scale > 1 else alpha[..., None]
        pixels = np.concatenate((np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels, edge), axis=-1)
        notes["alpha"] = "kept, enlarged by bicubic" if scale > 1 else "kept"
    seen = as_pixels(low)
    seen = np.repeat(seen, 3, axis=-1) if seen.shape[-1] == 1 else seen
    done = f"x{scale}, HAT" if scale > 1 else "restored, HAT"
    return PictureResult(pixels, done, notes, source=name, image=seen)


def read(item: Any, position: int) -> tuple[np.ndarray, np.ndarray | None, str]:
    """``[H, W, C]``, alpha uint8 ``[H, W]`` where there is any, and the input's name. The colours under transparency are
    kept as they are, not laid over a ground."""
    if isinstance(item, (str, Path)) and Path(item).suffix.lower() in (".png", ".webp", ".tif", ".tiff", ".gif"):
        from PIL import Image, ImageOps

        try:
            with Image.open(item) as image:
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    return *_split(ImageOps.exif_transpose(image)), str(item)
        except OSError:
            pass  # the reader below says what is wrong
    elif hasattr(item, "getbands") and ("A" in item.getbands() or "transparency" in item.info):
        return *_split(item), f"input {position + 1}"
    array, name = read_image(item, position)
    if array.shape[-1] in (2, 4) and array.dtype == np.uint8:
        return array[..., :-1], array[..., -1], name
    return array, None, name


def _split(image: Any) -> tuple[np.ndarray, np.ndarray | None]:
    grey = image.mode == "LA"
    pixels = np.asarray(image.convert("LA" if grey else "RGBA"))
    alpha = pixels[..., -1]
    return pixels[..., :-1], None if (alpha == 255).all() else alpha


def as_unit(array: np.ndarray, name: str) -> Tensor:
    """float32 ``[1, C, H, W]`` in 0 ... 1. Raises ``UserError`` for floats that are not."""
    full = FULL.get(array.dtype, 1.0)
    if array.dtype.kind == "f" and array.size and (array.max() > 1.5 or array.min() < -0.5):
        raise UserError(
            f"{name} holds floats in {array.min():.3g} ... {array.max():.3g}, they must lie in 0 ... 1: divide them by 255"
        )
    values = torch.from_numpy(np.ascontiguousarray(array).astype(np.float32) / full)
    return values.permute(2, 0, 1)[None].contiguous()


def as_pixels(images: Tensor) -> np.ndarray:
    """uint8 ``[H, W, C]`` of ``[1, C, H, W]``."""
    return (images[0].float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def tile_for(model: HAT, ask: Ask, low: Tensor) -> int | None:
    """The tile in force; open: tiles of about 256 pixels where the input has more than 512 x 512."""
    window = model.config.window_size
    if ask.tile is not None:
        return ask.tile or None
    return max(TILE // window, 1) * window if low.shape[2] * low.shape[3] > WHOLE else None


def overlap_for(model: HAT, ask: Ask, tile: int | None) -> int:
    """The overlap; where nobody chose one, the multiple of the window that is nearest to 32."""
    window = model.config.window_size
    if tile is not None and ask.overlap is not None:
        return ask.overlap
    return max(round(OVERLAP / window), 1) * window


def with_chroma(bright: Tensor, low: Tensor, scale: int) -> Tensor:
    """A luma ``[1, 1, H, W]`` with the colour differences of ``low [1, 3, h, w]``, enlarged by bicubic."""
    difference = low - luma(low)
    return bright + (resize_bicubic(difference, scale) if scale > 1 else difference)
