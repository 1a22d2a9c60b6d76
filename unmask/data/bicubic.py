"""The bicubic resizing of the super-resolution field: MATLAB's ``imresize``, as two products with cached dense matrices.

Output pixel i lies at ``u = (i + 1/2) / scale - 1/2`` of the input. The kernel is Keys' cubic with a = -1/2, widened by
``1 / scale`` where the image shrinks (antialiasing); weights sum to 1; beyond an edge the image is mirrored with its edge
pixel repeated (... 1 0 | 0 1 ...). Nothing is clamped. ``data/resize.py`` holds torch's bicubic, which only differs at
the edges: there the weights of the pixels that exist are scaled up instead.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from unmask.errors import UserError


def resize_bicubic(images: Tensor, scale: float) -> Tensor:
    """``[..., H, W]`` -> ``[..., ceil(H * scale), ceil(W * scale)]`` in the images' floating type, rows first, not clamped.

    scale: 0.25 makes each side a quarter, 2 doubles it. Raises ``UserError`` for a scale that is not positive.
    """
    if scale <= 0:
        raise UserError(f"scale={scale} must be positive")
    height, width = images.shape[-2:]
    device, dtype = str(images.device), images.dtype
    down = bicubic_matrix(height, math.ceil(height * scale), scale, device).to(dtype)
    across = bicubic_matrix(width, math.ceil(width * scale), scale, device).to(dtype)
    with torch.autocast(images.device.type, enabled=False):  # eight bits of a product are fewer than a picture has
        return torch.matmul(torch.matmul(down, images), across.T)


@functools.lru_cache(maxsize=128)
def bicubic_matrix(size: int, out: int, scale: float, device: str = "cpu") -> Tensor:
    """float32 ``[out, size]``, every row summing to 1. Computed in float64, once for each set of arguments."""
    with torch.inference_mode(False):
        u = (torch.arange(out, dtype=torch.float64, device="cpu") + 0.5) / scale - 0.5
        stretch = min(scale, 1.0)
        taps = math.ceil(4 / stretch) + 2
        first = torch.floor(u - 2 / stretch).long()
        places = first[:, None] + torch.arange(taps, device="cpu")
        weights = stretch * _keys(stretch * (u[:, None] - places))
        weights = weights / weights.sum(dim=1, keepdim=True)
        period = places.remainder(2 * size)
        mirrored = torch.where(period < size, period, 2 * size - 1 - period)
        matrix = torch.zeros(out, size, dtype=torch.float64, device="cpu")
        return matrix.scatter_add_(1, mirrored, weights).float().to(device)


def _keys(x: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, 0.0))
