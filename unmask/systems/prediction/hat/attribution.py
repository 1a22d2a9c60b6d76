"""Which input pixels a restored patch depends on: local attribution as the paper uses it for its motive (LAM, Gu and Dong,
"Interpreting Super-Resolution Networks with Local Attribution Maps", CVPR 2021, arXiv:2011.11506).

    area = area_of_influence(model, low, patch=16)
    area.heat                # [h, w]: |d (sum of the patch's output) / d input|, summed over channels
    area.far_share           # share of it farther than 1.5 patches from the patch's centre
    area.diffusion_index     # (1 - Gini) x 100: how evenly it is spread
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.errors import UserError
from unmask.systems.prediction.tiling import padded_to

if TYPE_CHECKING:
    from unmask.systems.prediction.hat.model import HAT


@dataclass
class Influence:
    """How much each input pixel matters to a patch (top, left, side in input pixels) of the output. ``heat``: float32
    ``[h, w]``, on the CPU, at least 0."""

    heat: Tensor
    patch: tuple[int, int, int]

    @property
    def far_share(self) -> float:
        """Share of the heat farther than 1.5 patch sides from the patch's centre (Chebyshev distance)."""
        top, left, side = self.patch
        rows, columns = (torch.arange(s, dtype=torch.float32) + 0.5 for s in self.heat.shape)
        distance = torch.maximum(
            (rows - top - side / 2).abs()[:, None].expand(self.heat.shape), (columns - left - side / 2).abs()[None]
        )
        total = self.heat.sum()
        return float(self.heat[distance > 1.5 * side].sum() / total) if total > 0 else 0.0

    @property
    def diffusion_index(self) -> float:
        """(1 - Gini coefficient of the heat) x 100: 100 where every pixel matters alike, towards 0 where one does."""
        values = self.heat.flatten().double().sort().values
        total, count = values.sum(), len(values)
        if total <= 0:
            return 0.0
        rank = torch.arange(1, count + 1, dtype=torch.float64)
        gini = float((2 * rank - count - 1) @ values / (count * total))
        return (1 - gini) * 100


def area_of_influence(
    model: HAT,
    low: Tensor,
    *,
    patch: int | None = None,
    place: tuple[int, int] | None = None,
    method: Literal["gradient", "path"] = "gradient",
    steps: int = 20,
    sigma: float = 4.0,
) -> Influence:
    """The influence of the pixels of ``low [1, C, h, w]`` (0 ... 1) on a square patch of the restored picture.

    patch: its side in input pixels; the window's by default. place: (top, left); the centre by default. method: "gradient" of
    the patch's summed output at the picture itself; "path": LAM, which integrates the gradient of the patch's summed edges on
    the way from a blurred picture (Gaussian of ``sigma``) to the picture, in ``steps``.
    Raises ``UserError`` for a patch outside the picture.
    """
    side = patch or model.config.window_size
    height, width = low.shape[2:]
    top, left = place or ((height - side) // 2, (width - side) // 2)
    if len(low) != 1 or top < 0 or left < 0 or top + side > height or left + side > width:
        raise UserError(f"hat: a patch of {side} at ({top}, {left}) does not lie in one picture of {height}x{width}")
    scale = model.config.scale
    inside = slice(top * scale, (top + side) * scale), slice(left * scale, (left + side) * scale)

    def gradient(x: Tensor, edges: bool) -> Tensor:
        x = x.detach().requires_grad_()
        out = model.network(padded_to(x, model.config.window_size))[..., inside[0], inside[1]]
        target = out.diff(dim=-1).abs().sum() + out.diff(dim=-2).abs().sum() if edges else out.sum()
        return torch.autograd.grad(target, x)[0]

    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            if method == "gradient":
                found = gradient(low, edges=False)
            else:
                soft = blurred(low, sigma)
                found = torch.zeros_like(low)
                for step in range(steps):
                    found += gradient(soft + (step + 0.5) / steps * (low - soft), edges=True)
                found = found * (low - soft) / steps
    finally:
        model.train(training)
    return Influence(found.abs().sum(dim=1)[0].float().cpu(), (top, left, side))


def blurred(images: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur, its border repeated."""
    reach = max(int(3 * sigma), 1)
    place = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    bell = torch.exp(-place.square() / (2 * sigma**2))
    bell = bell / bell.sum()
    flat = F.pad(images, (reach,) * 4, mode="replicate").flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(flat, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1)).view(images.shape)
