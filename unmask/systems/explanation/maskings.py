"""Maskings: what a classifier is asked when part of an image is hidden. ``masking(name, model)(images, visible) -> logits``.

Fillings paint the hidden pixels before the network sees them; ``layer_masking`` and its variants hide them in every layer of a
convolutional network; ``token_dropping`` never shows them to a vision transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.contracts import Preprocessing
from unmask.draw import Draw, Seeded
from unmask.errors import UserError, nearest
from unmask.models import UserModel
from unmask.systems.explanation.dropping import TokenDropping, drops

FILLINGS = {
    "grey": "painted with the mean colour of the training data",
    "black": "painted black",
    "white": "painted white",
    "mean": "painted with the image's own mean colour",
    "constant": "painted with one colour (color=[r, g, b])",
    "blur": "replaced by a strong blur of the image",
    "random": "replaced by uniform noise",
}
LAYERED: dict[str, tuple[str, str]] = {
    "layer_masking": ("neighbour", "hidden in every layer, borders filled from visible neighbours"),
    "no_padding": ("none", "hidden in every layer, zeros at the borders"),
    "partial_convolution": ("partial", "hidden in every layer, convolutions scaled by their visible share"),
}
DROPPING = {"token_dropping": "tokens without a visible pixel never enter the transformer"}
SMOOTH = "+smooth"
NAMES = (*LAYERED, *DROPPING, *FILLINGS)


class Masking(Protocol):
    """images: standardised ``[B, C, H, W]``; visible: ``[B or 1, 1, H, W]``, ones and zeros; logits ``[B, K]``."""

    def __call__(self, images: Tensor, visible: Tensor) -> Tensor: ...


def about(name: str) -> str:
    """What a masking does, in words."""
    base = name.removesuffix(SMOOTH)
    words = {**FILLINGS, **DROPPING, **{k: v[1] for k, v in LAYERED.items()}}[base]
    return f"{words}, edges smoothed" if name.endswith(SMOOTH) else words


def masking(
    name: str,
    model: UserModel,
    *,
    color: Sequence[float] | None = None,
    draw: Draw | None = None,
    blur: tuple[int, float] | None = None,
    **rules: Any,
) -> Masking:
    """A masking of a model by name (``NAMES``; a filling with ``+smooth`` has its hidden part blurred afterwards).

    color: of ``constant``, three numbers in 0 ... 1. blur: kernel and sigma of ``blur`` (default: a third and a twelfth of the
    image). draw: noise of ``random``. rules: of layer masking (``variant``, ``strict_pool``, ``global_pool``). Raises ``UserError``
    for an unknown name and for a model that it is not for.
    """
    base = name.removesuffix(SMOOTH)
    if base in LAYERED and base == name:
        from unmask.systems.explanation.layer_masking.propagate import LayerMasked

        return LayerMasked(model, padding=LAYERED[name][0], **rules)
    if base in DROPPING and base == name:
        return TokenDropping(model)
    if base in FILLINGS:
        return Filling(model, base, smooth=name != base, color=color, draw=draw, blur=blur)
    raise UserError(f"no masking {name!r}: {nearest(name, [*NAMES, *(f + SMOOTH for f in FILLINGS)])}")


def best(model: UserModel, image: Tensor | None = None) -> str:
    """The masking that suits a model: dropped tokens, layer masking, or grey where neither is possible."""
    if drops(model):
        return "token_dropping"
    try:
        ask = masking("layer_masking", model)
        if image is not None:
            ask.verify(image)  # type: ignore[attr-defined]
    except UserError:
        return "grey"
    return "layer_masking"


class Filling:
    """Hidden pixels painted over; then the network as it is."""

    def __init__(
        self,
        model: UserModel,
        kind: str,
        *,
        smooth: bool = False,
        color: Sequence[float] | None = None,
        draw: Draw | None = None,
        blur: tuple[int, float] | None = None,
    ):
        self.model, self.kind, self.smooth, self.blur = model, kind, smooth, blur
        self.draw = draw or Seeded(0)
        known = model.preprocessing or Preprocessing()
        if kind == "constant" and color is None:
            raise UserError("masking constant needs a colour: color=[0.5, 0.5, 0.5]")
        if color is not None and len(color) not in (1, known.channels):
            raise UserError(f"color={list(color)} has {len(color)} numbers, the model takes {known.channels} channels")
        self.known, self.color = known, color

    def fill(self, images: Tensor) -> Tensor:
        """What hidden pixels become, broadcastable to the images."""
        if self.kind == "grey":
            return images.new_zeros(())
        if self.kind == "mean":
            return images.mean(dim=(2, 3), keepdim=True)
        if self.kind == "blur":
            side = min(images.shape[-2:])
            kernel, sigma = self.blur or (2 * (side // 6) + 1, side / 12)
            return blurred(images, kernel, sigma)
        if self.kind == "random":
            noise = self.draw.uniform("fill", images.shape[1:], device=images.device, shared=True)
            return self._standardised(noise)[None]
        value = {"black": (0.0,), "white": (1.0,)}.get(self.kind, tuple(self.color or ()))
        color = torch.tensor(value, device=images.device, dtype=images.dtype)
        return self._standardised(color.expand(images.shape[1])[:, None, None])[None]

    def _standardised(self, values: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=values.device)[:, None, None] for v in (self.known.mean, self.known.std))
        return (values - mean) / std

    def paint(self, images: Tensor, visible: Tensor) -> Tensor:
        """The images as the network sees them."""
        out = torch.where(visible > 0, images, self.fill(images))
        if self.smooth:
            out = torch.where(visible > 0, out, blurred(out, 5, 1.0))
        return out

    def __call__(self, images: Tensor, visible: Tensor) -> Tensor:
        visible = visible if visible.ndim == 4 else visible[:, None]
        return self.model.scores(image=self.paint(images, visible))


def blurred(images: Tensor, kernel: int, sigma: float) -> Tensor:
    """Gaussian blur, borders mirrored (torchvision's kernel). kernel: odd, below twice the image's side."""
    at = torch.arange(kernel, device=images.device, dtype=images.dtype) - (kernel - 1) / 2
    weights = (-(at**2) / (2 * sigma**2)).exp()
    weights = weights / weights.sum()
    channels, half = images.shape[1], kernel // 2
    row = weights.expand(channels, 1, 1, kernel)
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    return F.conv2d(F.conv2d(padded, row, groups=channels), row.transpose(2, 3), groups=channels)


def features(ask: Masking) -> Callable[[Tensor, Tensor], Tensor]:
    """What the last linear layer reads, under a masking: ``[B, D]``. Raises ``UserError`` for a model without a linear layer."""
    module = ask.model.module  # type: ignore[attr-defined]
    last = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    if not last:
        raise UserError(f"{ask.model.name} has no linear layer at its end: no features to compare")  # type: ignore[attr-defined]

    def found(images: Tensor, visible: Tensor) -> Tensor:
        kept: list[Tensor] = []
        hook = last[-1].register_forward_pre_hook(lambda _m, inputs: kept.append(inputs[0]))
        try:
            ask(images, visible)
        finally:
            hook.remove()
        return kept[-1].flatten(1)

    return found
