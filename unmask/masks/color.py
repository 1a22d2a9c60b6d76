"""Masks from coloured noise. Hinojosa, Liu, Ghanem, "ColorMAE", ECCV 2024, arXiv:2407.13036, section 3.

White noise is blurred, and what the blur keeps or takes away decides how large hidden regions are:

    red     G(σ) * W                        low frequencies: large blobs
    blue    W - G(σ) * W                    high frequencies: fine, even grain
    green   G(σ1) * W - G(σ2) * W           a middle band (σ1 < σ2)
    purple  W - (G(σ1) * W - G(σ2) * W)     all but that band
    white   W                               no colour: MAE's uniform masking

The authors published their noise, not its generator; this one is ours. σ is drawn for each image, uniformly from a range,
in units of patches (one pixel of noise is one patch). The blur is periodic, by Fourier transform, so that a crop anywhere
has no border: the transform of G(σ) is ``exp(-2 π² σ² (f_x² + f_y²))``, f in cycles a pixel. Each image is then brought to
mean 0 and variance 1.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from unmask.draw import Draw, Seeded
from unmask.errors import UserError, nearest
from unmask.masks.mask import Mask
from unmask.masks.random import mask_from_scores, visible_count

Color = Literal["white", "red", "blue", "green", "purple"]
COLORS: tuple[str, ...] = get_args(Color)
Range = tuple[float, float]

# σ in patches: one range for red and blue, two (σ1, σ2) for green and purple
SIGMAS: dict[str, tuple[Range, ...]] = {
    "white": (),
    "red": ((0.8, 3.0),),
    "blue": ((0.5, 1.5),),
    "green": ((0.5, 1.0), (1.5, 3.0)),
    "purple": ((0.5, 1.0), (1.5, 3.0)),
}
_CHUNK = 256  # images made at a time, so that the work's memory stays small


def noise_bank(
    color: str,
    count: int,
    size: int,
    *,
    seed: int = 0,
    sigmas: tuple[Range, ...] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """float32 ``[count, size, size]``: noise images of one colour, each of mean 0 and variance 1.

    Image i depends on (seed, i) alone: a larger bank begins with the smaller one. sigmas: the ranges of ``SIGMAS[color]``.
    Raises ``UserError`` for unknown colours and ranges that do not fit.
    """
    ranges = checked_sigmas(color, sigmas)
    square = _squared_frequencies(size, device)
    parts = []
    for start in range(0, count, _CHUNK):
        draw = Seeded(seed, first_sample=start)
        number = min(_CHUNK, count - start)
        white = draw.normal("noise.white", (number, size, size), device=device)
        share = draw.uniform("noise.sigma", (number, 2), device=device)
        sigma = [low + share[:, i] * (high - low) for i, (low, high) in enumerate(ranges)]
        parts.append(colored(white, color, sigma, square))
    return torch.cat(parts) if parts else torch.zeros(0, size, size, device=device)


def colored(white: Tensor, color: str, sigma: list[Tensor], square: Tensor) -> Tensor:
    """White noise ``[L, M, M]`` filtered, then brought to mean 0 and variance 1; sigma: ``[L]`` for each blur."""
    out = torch.fft.irfft2(torch.fft.rfft2(white) * response(color, sigma, square), s=white.shape[1:])
    out = out - out.mean(dim=(1, 2), keepdim=True)
    return out / out.std(dim=(1, 2), unbiased=False, keepdim=True).clamp(min=1e-12)


def response(color: str, sigma: list[Tensor], square: Tensor) -> Tensor:
    """How much of each frequency the colour keeps; ``square``: squared frequencies, any shape ``S`` -> ``[L, *S]``."""
    blur = [torch.exp(-2 * math.pi**2 * s.reshape(-1, *(1,) * square.ndim) ** 2 * square) for s in sigma]
    match color:
        case "red":
            return blur[0]
        case "blue":
            return 1 - blur[0]
        case "green":
            return blur[0] - blur[1]
        case "purple":
            return 1 - (blur[0] - blur[1])
        case _:
            return torch.ones_like(square)[None]


def checked_sigmas(color: str, sigmas: tuple[Range, ...] | None = None) -> tuple[Range, ...]:
    """The σ ranges of a colour, the given ones or the defaults. Raises ``UserError``."""
    if color not in COLORS:
        raise UserError(f"no colour {color!r} for masks: {nearest(color, COLORS)}")
    default = SIGMAS[color]
    ranges = default if sigmas is None else tuple(sigmas)
    if len(ranges) != len(default):
        raise UserError(f"{color} noise takes {len(default)} ranges of sigma, got {len(ranges)}")
    if any(not 0 < low <= high for low, high in ranges):
        raise UserError(f"sigmas {list(ranges)} of {color} noise do not fit: each is 0 < low <= high, in patches")
    if len(ranges) == 2 and ranges[0][1] >= ranges[1][0]:
        raise UserError(f"sigmas {list(ranges)} of {color} noise overlap: all of the first must lie below the second")
    return ranges


def color_mask(bank: Tensor, draw: Draw, batch: int, grid: tuple[int, ...], ratio: float) -> Mask:
    """Hide by a crop of coloured noise, drawn for each sample: image of the bank, place, flips.

    The ``int(N * (1 - ratio))`` largest values stay visible; of equal values the lower index. bank: ``[L, M, M]``.
    Draws integers ``image``, ``top``, ``left``, ``flip_horizontal``, ``flip_vertical``, each ``[batch]``.
    Raises ``UserError`` when the grid is larger than the noise.
    """
    rows, columns = _fitting(bank, grid)
    device, size = bank.device, bank.shape[1]
    image = draw.integers("image", 0, len(bank), (batch,), device=device)
    top = draw.integers("top", 0, size - rows + 1, (batch,), device=device)
    left = draw.integers("left", 0, size - columns + 1, (batch,), device=device)
    across = draw.integers("flip_horizontal", 0, 2, (batch,), device=device)
    down = draw.integers("flip_vertical", 0, 2, (batch,), device=device)
    return _visible_largest(crops(bank, image, top, left, across, down, (rows, columns)), ratio, (rows, columns))


def shared_crop_mask(bank: Tensor, draw: Draw, batch: int, grid: tuple[int, ...], ratio: float) -> Mask:
    """The authors' way: sample i takes image ``i mod L``; one crop and one pair of flips serves each round of L samples.

    Draws integers ``top``, ``left``, ``flip_horizontal``, ``flip_vertical``, one a round. Each crop is divided by its
    maximum, as theirs is (this matters only where all of it is negative). i counts in the global batch.
    """
    rows, columns = _fitting(bank, grid)
    device, size, number = bank.device, bank.shape[1], len(bank)
    first = _first_sample(draw)
    sample = torch.arange(first, first + batch, device=device)
    rounds = (first + batch - 1) // number + 1
    top = draw.integers("top", 0, size - rows + 1, (rounds,), device=device, shared=True)
    left = draw.integers("left", 0, size - columns + 1, (rounds,), device=device, shared=True)
    across, down = (
        draw.integers(f"flip_{way}", 0, 2, (rounds,), device=device, shared=True) for way in ("horizontal", "vertical")
    )
    turn = sample // number
    scores = crops(bank, sample % number, top[turn], left[turn], across[turn], down[turn], (rows, columns))
    return _visible_largest(scores / scores.amax(dim=1, keepdim=True), ratio, (rows, columns))


def crops(
    bank: Tensor, image: Tensor, top: Tensor, left: Tensor, across: Tensor, down: Tensor, grid: tuple[int, int]
) -> Tensor:
    """``[B, rows * columns]``: pieces of noise images, mirrored where ``across`` (columns) or ``down`` (rows) is 1."""
    rows, columns = grid
    row, column = (torch.arange(n, device=bank.device) for n in grid)
    row = torch.where(down[:, None].bool(), rows - 1 - row, row) + top[:, None]
    column = torch.where(across[:, None].bool(), columns - 1 - column, column) + left[:, None]
    return bank[image[:, None, None], row[:, :, None], column[:, None, :]].flatten(1)


def _first_sample(draw: Draw) -> int:
    """Where this process's samples begin in the global batch; 0 for draws that do not know."""
    while not hasattr(draw, "first_sample") and hasattr(draw, "source"):
        draw = draw.source
    return int(getattr(draw, "first_sample", 0))


def _visible_largest(scores: Tensor, ratio: float, grid: tuple[int, int]) -> Mask:
    return mask_from_scores(-scores, scores.shape[1] - visible_count(scores.shape[1], ratio), grid)


def _fitting(bank: Tensor, grid: tuple[int, ...]) -> tuple[int, int]:
    if len(grid) != 2:
        raise UserError(f"colour masks need a grid of rows and columns, not {grid}")
    size = bank.shape[1]
    if max(grid) > size:
        raise UserError(
            f"grid {grid[0]}x{grid[1]} is larger than the noise images of {size}: use noise_size={max(grid)} or more"
        )
    return grid[0], grid[1]


def _squared_frequencies(size: int, device: torch.device | str) -> Tensor:
    """``[M, M // 2 + 1]``: f_x² + f_y² in cycles a pixel, as ``rfft2`` lays them out."""
    return torch.fft.fftfreq(size, device=device)[:, None] ** 2 + torch.fft.rfftfreq(size, device=device)[None] ** 2
