"""2:4 weights where the hardware is faster with them: ``torch.sparse``'s semi-structured tensors, on NVIDIA GPUs since Ampere."""

from __future__ import annotations

import torch
from torch import nn

from unmask.errors import UserError

ROWS, COLUMNS = 32, 64  # what CUTLASS asks of a weight [out, in] of 16 bits


def fits(weight: torch.Tensor) -> bool:
    """Whether a ``[out, in]`` weight can be stored so: 2 of 4 kept in every group, and sides that the kernels take."""
    rows, columns = weight.shape
    if rows % ROWS or columns % COLUMNS:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(dim=1) <= 2).all())


def accelerate(module: nn.Module) -> tuple[list[str], list[str]]:
    """Store the 2:4 weights of linear layers as semi-structured tensors, in place: (those that are, those left as masked dense
    weights, because their sides do not fit). Only large products get faster.

    Raises ``UserError`` without a GPU that can, or for weights that are not fp16 or bf16.
    """
    place = next(module.parameters()).device
    if place.type != "cuda" or torch.cuda.get_device_capability(place) < (8, 0):
        raise UserError("semi-structured weights need an NVIDIA GPU since Ampere: keep the masked dense model here")
    from torch.sparse import to_sparse_semi_structured

    done, left = [], []
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if layer.weight.dtype not in (torch.float16, torch.bfloat16):
            raise UserError(
                f"{name} has {str(layer.weight.dtype).removeprefix('torch.')} weights: call .half() or .bfloat16() first"
            )
        if fits(layer.weight):
            layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight), requires_grad=False)
            done.append(name)
        else:
            left.append(name)
    return done, left
