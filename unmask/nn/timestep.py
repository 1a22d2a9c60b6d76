"""What diffusion networks are told beside their input: the time, and the class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoid(time: Tensor, dim: int = 256, period: float = 10000.0) -> Tensor:
    """``[B, dim]``: cosines, then sines of ``time · period^(-k / (dim / 2))``, float32 (Vaswani et al. 2017, as in ADM)."""
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=time.device)
    angle = time.float()[..., None] * torch.exp(k * (-math.log(period) / half))
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """A time, or any number, as ``[..., dim]``: its sinusoid through Linear, SiLU, Linear."""

    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        first, last = nn.Linear(frequencies, dim), nn.Linear(dim, dim)
        for linear in (first, last):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(sinusoid(time, self.frequencies).to(next(self.mlp.parameters()).dtype))


class ClassEmbedding(nn.Module):
    """A learned row for each class, and a last one that stands for no class: ``[...]`` ids to ``[..., dim]``."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + 1, dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding_table(ids)
