"""How pictures lose what a restorer is to bring back: noise, JPEG, and the second-order pipeline of Real-ESRGAN (Wang et al.
2021, arXiv:2107.10833, section 3; options in its table of the training code).

Images are float ``[B, C, H, W]`` in 0 ... 1 on any device. Every number comes from a draw by name and belongs to a sample,
so that a picture is degraded the same way whatever is in the batch beside it. The authors choose sizes and kinds of noise
for a whole batch and shuffle pairs through a pool of 180; here each sample has its own, and no pool is needed.
"""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from unmask.config import Config, Field
from unmask.data.color import luma
from unmask.draw import Draw, Scoped

SIDE = 21  # of blur kernels, smaller ones padded with zeros
KINDS = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso")

# ITU-T T.81, annex K, for quality 50
LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32),
)


class Stage(Config):
    """One of the two rounds of blur, resize, noise and JPEG."""

    blur: float = Field(1.0, ge=0, le=1, description="chance of a blur")
    kinds: tuple[float, ...] = Field(
        (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), description=f"weights of the blurs {', '.join(KINDS)}"
    )
    sigma: tuple[float, float] = Field((0.2, 3.0), description="width of a blur in pixels")
    generalised: tuple[float, float] = Field((0.5, 4.0), description="shape of generalised Gaussians")
    plateau: tuple[float, float] = Field((1.0, 2.0), description="shape of plateaus")
    sinc: float = Field(0.1, ge=0, le=1, description="chance of a sinc kernel instead of a blur")
    resize: tuple[float, float, float] = Field((0.2, 0.7, 0.1), description="chances of up, down, keep")
    range: tuple[float, float] = Field((0.15, 1.5), description="smallest and largest factor of the resize")
    gaussian: float = Field(0.5, ge=0, le=1, description="chance of Gaussian noise, else Poisson")
    noise: tuple[float, float] = Field((1.0, 30.0), description="sigma of Gaussian noise, on 0 ... 255")
    poisson: tuple[float, float] = Field((0.05, 3.0), description="factor on Poisson noise")
    grey_noise: float = Field(0.4, ge=0, le=1, description="chance that noise is the same in all channels")
    jpeg: tuple[float, float] = Field((30.0, 95.0), description="JPEG quality")

    @model_validator(mode="after")
    def _ranges_rise(self) -> Stage:
        if len(self.kinds) != len(KINDS) or min(self.kinds) < 0 or not sum(self.kinds):
            raise ValueError(f"kinds={list(self.kinds)} takes {len(KINDS)} weights from 0")
        for name in ("sigma", "range", "generalised", "plateau", "jpeg"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={[low, high]} must rise above 0")
        return self


class RealWorld(Config):
    """The second-order degradation with its published numbers."""

    first: Stage = Stage()
    second: Stage = Stage(
        blur=0.8, sigma=(0.2, 1.5), resize=(0.3, 0.4, 0.3), range=(0.3, 1.2), noise=(1.0, 25.0), poisson=(0.05, 2.5)
    )
    final_sinc: float = Field(0.8, ge=0, le=1, description="chance of a sinc kernel at the end")
    sharpen: bool = Field(True, description="unsharp-mask the target of the pixel and the perceptual loss")


# --- the whole pipeline -----------------------------------------------------------------------------------------------


def real_world(high: Tensor, draw: Draw, settings: RealWorld, scale: int) -> Tensor:
    """``[B, C, H / scale, W / scale]``, rounded to 8 bits: two rounds of blur, resize, noise and JPEG, then the last resize
    and a sinc kernel, before or after the second JPEG."""
    first, second = settings.first, settings.second
    _, _, height, width = high.shape
    count, small = len(high), (height // scale, width // scale)
    one, two = Scoped(draw, "first"), Scoped(draw, "second")
    last = draw.uniform("final", (count, 5))
    rounds, sigma = (7 + 2 * (last[:, 0] * 8).long()), _between(last[:, 1], math.pi / 3, math.pi)
    sinc = sinc_kernels(rounds, sigma)
    final = torch.where((last[:, 2] < settings.final_sinc)[:, None, None], sinc, _delta(count)).to(high)
    jpeg_last, modes = (last[:, 3] < 0.5).tolist(), [_mode(m) for m in last[:, 4].tolist()]
    blurred = filtered(high, blur_kernels(one, first, count).to(high))
    again = blur_kernels(two, second, count).to(high)
    sizes = _sizes(one, first, (height, width), count), _sizes(two, second, small, count)
    noise = _noise_field(one, first, high, (height, width)), _noise_field(two, second, high, small)
    quality = [_between(d.uniform("jpeg", (count,)), *s.jpeg) for d, s in ((one, first), (two, second))]
    out = []
    for i in range(count):  # every sample has its own sizes on the way
        x = _resized(blurred[i : i + 1], *sizes[0][i])
        x = jpeg(noise[0](x, i), quality[0][i : i + 1])
        x = filtered(x, again[i : i + 1])
        x = noise[1](_resized(x, *sizes[1][i]), i)
        if jpeg_last[i]:
            x = jpeg(filtered(_resized(x, small, modes[i]), final[i : i + 1]), quality[1][i : i + 1])
        else:
            x = filtered(_resized(jpeg(x, quality[1][i : i + 1]), small, modes[i]), final[i : i + 1])
        out.append(x)
    return (torch.cat(out).clamp(0, 1) * 255).round() / 255


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


def _sizes(draw: Draw, stage: Stage, size: tuple[int, int], count: int) -> list[tuple[tuple[int, int], str]]:
    """(height, width) and the way to get there, for each sample."""
    kind, by, mode = draw.uniform("resize", (count, 3)).unbind(1)
    low, high = stage.range
    up = _between(by, 1.0, max(high, 1.0))
    down = _between(by, low, min(1.0, high))
    factor = torch.where(
        kind < stage.resize[0], up, torch.where(kind < stage.resize[0] + stage.resize[1], down, torch.ones(()))
    )
    return [
        ((max(int(size[0] * f), 1), max(int(size[1] * f), 1)), _mode(m))
        for f, m in zip(factor.tolist(), mode.tolist(), strict=True)
    ]


def _mode(uniform: float) -> str:
    return ("area", "bilinear", "bicubic")[min(int(uniform * 3), 2)]


def _resized(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode=mode, **({} if mode == "area" else {"align_corners": False}))


# --- blur -------------------------------------------------------------------------------------------------------------


def blur_kernels(draw: Draw, stage: Stage, count: int) -> Tensor:
    """float32 ``[count, 21, 21]``, each summing to 1: one of six Gaussians, a sinc, or none. On the CPU: they are small."""
    u = draw.uniform("kernel", (count, 10))
    side = 7 + 2 * (u[:, 0] * 8).long()
    share = torch.tensor(stage.kinds).cumsum(0) / sum(stage.kinds)
    kind = torch.searchsorted(share, u[:, 1].contiguous()).clamp(max=len(KINDS) - 1)
    sigma_x, sigma_y = _between(u[:, 2], *stage.sigma), _between(u[:, 3], *stage.sigma)
    iso = kind % 2 == 0
    sigma_y = torch.where(iso, sigma_x, sigma_y)
    angle = torch.where(iso, 0.0, _between(u[:, 4], -math.pi, math.pi))
    shape = torch.where(
        kind >= 4, _shape(u[:, 5], u[:, 6], *stage.plateau), _shape(u[:, 5], u[:, 6], *stage.generalised)
    )
    kernel = gaussian_kernels(side, sigma_x, sigma_y, angle, torch.where(kind < 2, 1.0, shape), kind >= 4)
    lowest = torch.where(side < 13, math.pi / 3, math.pi / 5)
    sinc = sinc_kernels(side, lowest + (math.pi - lowest) * u[:, 7])
    kernel = torch.where((u[:, 8] < stage.sinc)[:, None, None], sinc, kernel)
    return torch.where((u[:, 9] < stage.blur)[:, None, None], kernel, _delta(count))


def _shape(side: Tensor, place: Tensor, low: float, high: float) -> Tensor:
    """Below and above 1 alike often; a range that starts at 1 has it half of the time (so in Real-ESRGAN's code)."""
    middle = min(max(1.0, low), high)
    flat = _between(place, low, high)
    both = torch.where(side < 0.5, _between(place, low, middle), _between(place, middle, high))
    return both if low <= 1 <= high else flat


def _grid() -> tuple[Tensor, Tensor]:
    place = torch.arange(SIDE, dtype=torch.float32) - SIDE // 2
    return place[:, None], place[None]


def gaussian_kernels(
    side: Tensor, sigma_x: Tensor, sigma_y: Tensor, angle: Tensor, shape: Tensor, plateau: Tensor
) -> Tensor:
    """``[B, 21, 21]``: exp(-q^shape / 2), or 1 / (1 + q^shape) for plateaus, with q the squared distance in the metric of a
    covariance of these widths and this rotation. All arguments ``[B]``; zero beyond ``side`` pixels."""
    y, x = _grid()
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = (cos * x + sin * y) / sigma_x[:, None, None], (-sin * x + cos * y) / sigma_y[:, None, None]
    q = (along.square() + across.square()) ** shape[:, None, None]
    value = torch.where(plateau[:, None, None], 1 / (1 + q), torch.exp(-0.5 * q))
    return _within(value, side)


def sinc_kernels(side: Tensor, cutoff: Tensor) -> Tensor:
    """``[B, 21, 21]``: circular low-pass filters, ``c J1(c r) / (2 π r)``, whose ringing looks like oversharpening."""
    y, x = _grid()
    r = (x.square() + y.square()).sqrt()
    c = cutoff[:, None, None]
    value = c * torch.special.bessel_j1(c * r) / (2 * math.pi * r.clamp(min=1e-6))
    return _within(torch.where(r == 0, c.square() / (4 * math.pi), value), side)


def _within(value: Tensor, side: Tensor) -> Tensor:
    y, x = _grid()
    inside = torch.maximum(x.abs(), y.abs()) <= (side // 2)[:, None, None]
    value = torch.where(inside, value, 0.0)
    return value / value.sum(dim=(1, 2), keepdim=True)


def _delta(count: int) -> Tensor:
    kernel = torch.zeros(count, SIDE, SIDE)
    kernel[:, SIDE // 2, SIDE // 2] = 1
    return kernel


def filtered(images: Tensor, kernels: Tensor) -> Tensor:
    """Each ``[C, H, W]`` with its own kernel of ``[B, k, k]``, mirrored at the borders."""
    count, channels = images.shape[:2]
    half = kernels.shape[-1] // 2
    mode = "reflect" if min(images.shape[2:]) > half else "replicate"
    padded = F.pad(images, (half,) * 4, mode=mode).transpose(0, 1)  # [C, B, ...]: one group a sample
    return (
        F.conv2d(padded, kernels[:, None].to(images), groups=count)
        .transpose(0, 1)
        .reshape(count, channels, *images.shape[2:])
    )


# --- noise ------------------------------------------------------------------------------------------------------------


def gaussian_noise(images: Tensor, draw: Draw, sigma: Tensor) -> Tensor:
    """Additive white Gaussian noise of ``sigma [B]`` on 0 ... 255; not clamped, as the denoising literature has it."""
    noise = draw.normal("noise", images.shape, device=images.device)
    return images + noise * (sigma.to(images.device) / 255)[:, None, None, None]


class _noise_field:
    """Gaussian or Poisson noise for samples of any size up to the stage's largest, from one draw."""

    def __init__(self, draw: Draw, stage: Stage, like: Tensor, size: tuple[int, int]):
        count, channels = like.shape[:2]
        largest = [max(int(s * max(stage.range[1], 1.0)), 1) for s in size]
        self.field = draw.normal("noise", (count, channels, *largest), device=like.device)
        kind, strength, grey = draw.uniform("noise.kind", (count, 3)).unbind(1)
        self.gaussian = (kind < stage.gaussian).tolist()
        self.grey = (grey < stage.grey_noise).tolist()
        self.sigma = (_between(strength, *stage.noise) / 255).tolist()
        self.factor = _between(strength, *stage.poisson).tolist()

    def __call__(self, x: Tensor, i: int) -> Tensor:
        field = self.field[i : i + 1, :, : x.shape[2], : x.shape[3]]
        field = field[:, :1] if self.grey[i] else field
        if self.gaussian[i]:
            return (x + field * self.sigma[i]).clamp(0, 1)
        seen = (x.clamp(0, 1) * 255).round() / 255
        seen = luma(seen) if self.grey[i] and seen.shape[1] == 3 else seen
        levels = 2.0 ** math.ceil(math.log2(max(int(torch.unique(seen).numel()), 2)))
        shot = poisson(0.5 * (1 + torch.erf(field / math.sqrt(2))), seen * levels) / levels
        return (x + (shot - seen) * self.factor[i]).clamp(0, 1)


def poisson(uniform: Tensor, rate: Tensor) -> Tensor:
    """Poisson counts by inversion: the least k with P(X <= k) >= uniform. Found by bisection, the same on every device."""
    uniform, rate = torch.broadcast_tensors(uniform.clamp(max=1 - 2**-23), rate)
    low = torch.full_like(rate, -1.0)
    high = (rate + 8 * rate.sqrt() + 16).ceil()
    for _ in range(12):
        middle = torch.floor((low + high) / 2)
        enough = torch.special.gammaincc((middle + 1).clamp(min=1e-6), rate.clamp(min=1e-9)) >= uniform
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(rate > 0, high.clamp(min=0), 0.0)


# --- JPEG -------------------------------------------------------------------------------------------------------------


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """What a baseline JPEG of these qualities ``[B]`` (1 ... 100) leaves: 8 x 8 cosine transform, libjpeg's tables, chroma at
    half the size. Rounded to 8 bits. No file is made, so that it runs in batch on any device."""
    count, channels, height, width = images.shape
    pads = (0, -width % 16, 0, -height % 16)
    x = F.pad((images.clamp(0, 1) * 255).round(), pads, mode="replicate")
    quality = quality.to(images.device).float().round().clamp(1, 100)
    factor = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None, None, None, None]
    luminance, chrominance = (
        ((torch.tensor(t, device=images.device).view(1, 1, 1, 8, 8) * factor + 50) / 100).floor().clamp(1, 255)
        for t in (LUMINANCE, CHROMINANCE)
    )
    if channels == 3:
        r, g, b = x.unbind(1)
        y = 0.299 * r + 0.587 * g + 0.114 * b
        chroma = torch.stack((128 + (b - y) / 1.772, 128 + (r - y) / 1.402), dim=1)
        chroma = F.avg_pool2d(chroma, 2).round()
        y = _quantised(y.round()[:, None], luminance)[:, 0]
        # libjpeg's "fancy" upsampling: three quarters of the nearer, one of the farther
        chroma = F.interpolate(_quantised(chroma, chrominance), scale_factor=2, mode="bilinear").round() - 128
        cb, cr = chroma.unbind(1)
        x = torch.stack((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb), dim=1)
    else:
        x = _quantised(x, luminance)
    return x[..., :height, :width].round().clamp(0, 255) / 255


def _quantised(x: Tensor, table: Tensor) -> Tensor:
    """``[B, C, H, W]`` in 0 ... 255 through the rounding of its 8 x 8 cosine coefficients. table: ``[B, 1, 1, 8, 8]``."""
    transform = _cosines(str(x.device))
    blocks = x.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).transpose(3, 4) - 128  # [B, C, h, w, 8, 8]
    table = table[:, :, None]
    coefficients = (transform @ blocks @ transform.T / table).round() * table
    blocks = transform.T @ coefficients @ transform + 128
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3).round().clamp(0, 255)


@functools.lru_cache(maxsize=8)
def _cosines(device: str) -> Tensor:
    """The orthonormal 8-point cosine transform."""
    with torch.inference_mode(False):
        k, n = torch.arange(8.0, device="cpu")[:, None], torch.arange(8.0, device="cpu")[None]
        rows = torch.cos(math.pi * (2 * n + 1) * k / 16) / 2
        rows[0] /= math.sqrt(2)
        return rows.to(device)


def jpeg_file(pixels: np.ndarray, quality: int) -> np.ndarray:
    """uint8 ``[H, W, C]`` written as a JPEG file of this quality and read again: what users have (measured, not trained on)."""
    from PIL import Image

    held = io.BytesIO()
    grey = pixels.shape[2] == 1
    Image.fromarray(pixels[..., 0] if grey else pixels).save(held, format="JPEG", quality=quality)
    read = np.asarray(Image.open(held))
    return read[..., None] if grey else read


# --- sharpening -------------------------------------------------------------------------------------------------------


def unsharp(images: Tensor, *, weight: float = 0.5, radius: int = 51, threshold: float = 10.0) -> Tensor:
    """Unsharp masking where the detail exceeds ``threshold`` of 255, with a soft edge: what real-world training aims at.

    The Gaussian of ``radius`` taps has OpenCV's width, 0.3 ((radius - 1) / 2 - 1) + 0.8; the mask is blurred with it, too.
    """
    sigma = 0.3 * ((radius - 1) / 2 - 1) + 0.8
    place = torch.arange(radius, device=images.device, dtype=torch.float32) - radius // 2
    bell = torch.exp(-place.square() / (2 * sigma**2))
    bell = (bell / bell.sum()).to(images)

    def blurred(x: Tensor) -> Tensor:
        half = radius // 2
        mode = "reflect" if min(x.shape[2:]) > half else "replicate"
        flat = F.pad(x, (half,) * 4, mode=mode).flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1)).view(x.shape)

    detail = images - blurred(images)
    mask = (detail.abs() * 255 > threshold).to(images)
    soft = blurred(mask)
    sharp = (images + weight * detail).clamp(0, 1)
    return soft * sharp + (1 - soft) * images
