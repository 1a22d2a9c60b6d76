"""Two pictures that a number cannot replace: which classes are taken for which, and what patch tokens see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.contracts import Encoder, Picture, Preprocessing
from unmask.data.showing import displayable, uint8_images
from unmask.engine.pictures import picture_grid


def confusion_picture(
    confusion: Sequence[Sequence[int]], classes: Sequence[str], path: str | Path, *, title: str = ""
) -> Path:
    """A PNG of ``confusion[true][answered]``, each row as shares of its class. Numbers are written up to 20 classes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and may want a display

    counts = np.asarray(confusion, dtype=float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    number = len(counts)
    side = min(max(3.2, 0.42 * number + 1.8), 14)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="answered", ylabel="true", title=title)
    if number <= 60:
        names = [str(c) for c in classes]
        axes.set_xticks(range(number), names, rotation=90, fontsize=8)
        axes.set_yticks(range(number), names, fontsize=8)
    if number <= 20:
        for row in range(number):
            for column in range(number):
                if share[row, column] >= 0.005:
                    tone = "white" if share[row, column] > 0.5 else "black"
                    axes.text(
                        column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", fontsize=7, color=tone
                    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def principal_colours(tokens: Tensor, *, components: int = 3) -> Tensor:
    """``[B, N, D]`` patch tokens -> ``[B, N, 3]`` in 0 ... 1: their first three principal components, fitted to all B x N.

    Each component is stretched from its 1st to its 99th percentile. The sign is fixed: the larger tail points up.
    """
    flat = tokens.detach().float().flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    _, vectors = torch.linalg.eigh((flat.T @ flat).double())
    axes = vectors[:, -components:].flip(1).to(flat.dtype)
    value = flat @ axes
    value = value * torch.where(value.pow(3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = value.quantile(0.01, dim=0), value.quantile(0.99, dim=0)
    value = ((value - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    if value.shape[1] < 3:
        value = torch.cat((value, torch.zeros(len(value), 3 - value.shape[1])), dim=1)
    return value.unflatten(0, tokens.shape[:2])


@torch.no_grad()
def feature_picture(
    encoder: Encoder,
    images: Tensor,
    *,
    preprocessing: Preprocessing | None = None,
    size: int = 128,
    name: str = "feature-pca",
) -> Picture:
    """Images beside the first three principal components of their patch tokens as red, green and blue.

    images: ``[B, C, H, W]`` standardised, on the encoder's device. The components are fitted to the given images alone.
    """
    was_training = encoder.training
    encoder.eval()
    maps = encoder.maps(images)
    encoder.train(was_training)
    # the deepest map that still has a shape to show
    deepest = next((m for m in reversed(maps) if m.shape[-2] * m.shape[-1] >= 16), maps[0])
    h, w = deepest.shape[-2:]
    colours = principal_colours(deepest.flatten(2).transpose(1, 2)).unflatten(1, (h, w))
    colours = colours.mul(255).round().byte().cpu().numpy()
    originals = uint8_images(displayable(images, preprocessing or encoder.preprocessing))
    rows = [[_enlarged(a, size), _enlarged(b, size)] for a, b in zip(originals, colours, strict=True)]
    caption = "Each patch's token, projected on the first three principal components of these images' tokens."
    return Picture(name, ["image", "first three components of the patch tokens"], rows, caption)


def _enlarged(image: Any, size: int) -> Any:
    """Nearest-neighbour enlargement to about ``size`` pixels, so that small images and token grids stay sharp."""
    from PIL import Image

    height, width = image.shape[:2]
    factor = size / max(height, width)
    small = max(height, width) < size
    target = (max(round(width * factor), 1), max(round(height * factor), 1))
    method = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(target, method))


def save_picture(picture: Picture, path: str | Path) -> Path:
    """A :class:`Picture` as one PNG: its rows below one another, its columns side by side."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(picture).save(path)
    return path
