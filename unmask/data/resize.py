"""Crops of a batch brought to one size: every sample has its own box and its own scale, and there is one answer for all.

Resizing is separable: row and column weights of each sample form matrices, and the batch is resized by two batched
products ``[B, out, H] @ [B, C, H, W] @ [B, W, out]``. The weights are those of torch's antialiased bicubic and bilinear
(a Keys kernel with a = -0.5, or a triangle, widened by the scale where the image shrinks; weights normalised over the
pixels that exist), so the result equals ``torchvision.transforms.v2.functional.resized_crop(antialias=True)``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this many pixels in an input, the mostly-zero matrices cost a CPU more than one call of torch's own kernel for
# each sample (measured, bench/loading.py); an accelerator is faster with the products at every size.
KERNEL_FROM = 96 * 96


@dataclass(frozen=True)
class Window:
    """Where output pixels lie along one axis: pixel i is centred at ``start + (i + 0.5) * scale``, and sees the input
    pixels of [low, high). All ``[B]``, float32, in input pixels."""

    start: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor


def weights(window: Window, size: int, out: int, interpolation: str) -> Tensor:
    """float32 ``[B, out, size]``, every row summing to 1. size: the input's length, padding included."""
    device = window.start.device
    support, kernel = (2.0, _cubic) if interpolation == "bicubic" else (1.0, _triangle)
    scale = window.scale[:, None, None]
    stretch = scale.clamp(min=1.0)  # antialiasing: the kernel grows with the pixels, and never shrinks below one
    centre = window.start[:, None, None] + (torch.arange(out, device=device)[None, :, None] + 0.5) * scale
    pixel = torch.arange(size, device=device)[None, None, :]
    # torch's bounds of the taps, so that pixels at the very edge of the kernel are in or out as they are there
    first = torch.maximum((centre - support * stretch + 0.5).floor(), window.low[:, None, None])
    last = torch.minimum((centre + support * stretch + 0.5).floor(), window.high[:, None, None])
    value = kernel((pixel + 0.5 - centre) / stretch)
    value = value.where((pixel >= first) & (pixel < last), 0.0)
    return value / value.sum(dim=2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    a = -0.5
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def by_matrices(images: Tensor, rows: Window, columns: Window, size: tuple[int, int], interpolation: str) -> Tensor:
    """float32 ``[B, C, *size]`` from ``[B, C, H, W]``; values as they are, not clipped."""
    down = weights(rows, images.shape[2], size[0], interpolation)
    across = weights(columns, images.shape[3], size[1], interpolation)
    pixels = images.to(torch.float32)
    return torch.matmul(torch.matmul(down[:, None], pixels), across.transpose(1, 2)[:, None])


def crop_windows(boxes: Tensor, size: tuple[int, int]) -> tuple[Window, Window]:
    """Windows that bring a box to ``size`` and see nothing outside it. boxes: ``[B, 4]`` (top, left, height, width)."""
    top, left, height, width = boxes.to(torch.float32).unbind(1)
    return (
        Window(top, height / size[0], top, top + height),
        Window(left, width / size[1], left, left + width),
    )


def resized_crop(
    images: Tensor, boxes: Tensor, size: tuple[int, int], interpolation: str = "bicubic", *, method: str = "auto"
) -> Tensor:
    """Each sample's box, resized to ``size``: ``[B, C, *size]``, float32 or the images' own type, within its range.

    images: ``[B, C, H, W]`` uint8 or float32, padded where sizes differ. boxes: int64 ``[B, 4]``, (top, left, height,
    width) in pixels. method: "matrices", "kernel" (a call of torch's kernel for each sample), or "auto": matrices, but
    the kernel for large images on a CPU. The two agree to rounding (the kernel's result is rounded for uint8).
    """
    if tuple(images.shape[2:]) == tuple(size) and _whole(boxes, size):
        return images
    if method == "auto":
        large = images.shape[2] * images.shape[3] > KERNEL_FROM
        method = "kernel" if images.device.type == "cpu" and large else "matrices"
    if method == "kernel":
        return _by_kernel(images, boxes, size, interpolation)
    rows, columns = crop_windows(boxes, size)
    return _clipped(by_matrices(images, rows, columns, size, interpolation), images.dtype)


def _whole(boxes: Tensor, size: tuple[int, int]) -> bool:
    """Whether every box is the whole image; known without asking a device only on a CPU."""
    return boxes.device.type == "cpu" and bool((boxes == boxes.new_tensor([0, 0, *size])).all())


def _by_kernel(images: Tensor, boxes: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    places = boxes.tolist()

    def one(i: int) -> Tensor:
        top, left, height, width = places[i]
        return _kernel(images[i, :, top : top + height, left : left + width], size, interpolation)

    return _each(len(images), one, images, size)


def _kernel(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """One ``[C, H, W]`` image by torch's antialiased kernel, which is vectorised where a pixel's channels lie together."""
    if tuple(image.shape[1:]) == size:
        return image
    layout = torch.channels_last if len(image) > 1 else torch.contiguous_format
    return F.interpolate(image[None].contiguous(memory_format=layout), size=size, mode=interpolation, antialias=True)[0]


def _each(count: int, one: Callable[[int], Tensor], like: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, C, *size]`` of ``one(i)``, in the type of ``like``; samples are dealt to threads.

    The one loop over samples of the library: on a CPU each turn is a call of a vectorised kernel that reads only its
    crop, where the batched product would multiply by matrices that are nine parts zero. Each thread keeps a kernel to
    itself: two threads inside one small kernel mostly wait for one another.
    """
    out = torch.empty((count, like.shape[1], *size), dtype=like.dtype)
    threads = min(torch.get_num_threads(), count)

    def some(first: int) -> None:
        for i in range(first, count, threads):
            out[i] = one(i)

    if threads <= 1:
        some(0)
    else:
        list(_threads(torch.get_num_threads()).map(some, range(threads)))
    return out


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads whose torch kernels do not start threads of their own."""
    ready = threading.Barrier(count + 1)

    def alone() -> None:
        torch.set_num_threads(1)  # of this thread; it also sets what threads started later begin with,
        ready.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="unmask-crop", initializer=alone)
    for _ in range(count):
        pool.submit(ready.parties.bit_length)  # anything: the executor starts a thread for each waiting task
    ready.wait()
    torch.set_num_threads(count)  # which is put back here
    return pool


def centre_crop(
    images: Tensor,
    sizes: Tensor,
    size: tuple[int, int],
    share: float,
    interpolation: str = "bicubic",
    *,
    method: str = "auto",
) -> Tensor:
    """Evaluation's view: the image resized so that ``size / share`` just fits inside, then its centre cut out.

    sizes: int64 ``[B, 2]``, the (height, width) of each sample inside its padding. Equals torchvision's ``Resize`` (with
    the shorter side at ``int(size / share)``) and ``CenterCrop`` for square sizes. ``[B, C, *size]``, float32 or
    the images' own type.
    """
    full = sizes.to(torch.float64)
    target = torch.tensor([int(s / share) for s in size], dtype=torch.float64, device=sizes.device)
    factor = (target / full).amax(dim=1)
    # torchvision truncates the longer side; the shorter is exact
    resized = torch.maximum((full * factor[:, None] + 1e-9).floor(), target).to(torch.int64)
    begin = ((resized - torch.tensor(size, device=sizes.device)) / 2).round().to(torch.int64)
    if method == "auto":
        large = images.shape[2] * images.shape[3] > KERNEL_FROM
        method = "kernel" if images.device.type == "cpu" and large else "matrices"
    if method == "kernel":
        whole, larger, corner = sizes.tolist(), resized.tolist(), begin.tolist()

        def one(i: int) -> Tensor:
            (h, w), (rh, rw), (top, left) = whole[i], larger[i], corner[i]
            image = _kernel(images[i, :, :h, :w], (rh, rw), interpolation)
            return image[:, top : top + size[0], left : left + size[1]]

        return _each(len(images), one, images, size)
    scale = (full / resized).to(torch.float32)
    start = begin.to(torch.float32) * scale
    none = torch.zeros(len(images), device=sizes.device)
    rows, columns = (Window(start[:, a], scale[:, a], none, full[:, a].to(torch.float32)) for a in (0, 1))
    return _clipped(by_matrices(images, rows, columns, size, interpolation), images.dtype)


def _clipped(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Bicubic overshoots; an image file could not."""
    return pixels.clamp(0, 255) if dtype == torch.uint8 else pixels
