"""What a person sees of masks while they are learned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from unmask.contracts import Picture
from unmask.systems.compression.maskllm.gates import MaskedLinear

SIDE = 64  # weights shown along each axis


@torch.no_grad()
def certainty_picture(layers: Mapping[str, MaskedLinear], scale: float, temperature: float, most: int = 4) -> Picture:
    """The upper left corner of some layers: the likeliest mask, and how sure each group is of it (white: certain)."""
    names = list(layers)
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)]
    rows = []
    for name in chosen:
        gate = layers[name].diff_mask
        out, inputs = gate.shape
        sure = (gate.gate * (scale / temperature)).softmax(dim=1).amax(dim=1)
        least = 1 / gate.gate.shape[1]
        shares = ((sure - least) / (1 - least)).repeat_interleave(gate.group).reshape(out, inputs)
        weight = layers[name].matrix.abs()
        size = (weight / weight.amax().clamp_min(1e-12)).sqrt()
        rows.append([_shown(size), _shown(gate.final()), _shown(shares)])
    caption = f"Corners of {', '.join(chosen)}. A group is {gate.group} weights in a row, of which {gate.keep} stay."
    return Picture("masks", ["size of the weights", "likeliest mask", "certainty"], rows, caption)


def _shown(values: torch.Tensor) -> np.ndarray:
    """The corner, each weight three pixels wide."""
    corner = (values[:SIDE, :SIDE].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return np.repeat(np.kron(corner, np.ones((3, 3), dtype=np.uint8))[..., None], 3, axis=-1)
