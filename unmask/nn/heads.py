"""Heads on frozen or fine-tuned features."""

from __future__ import annotations

from torch import Tensor, nn


class BatchNormHead(nn.Module):
    """BatchNorm without an affine part, then Linear: MAE's linear probe. ``[B, D]`` -> ``[B, classes]``."""

    def __init__(self, dim: int, classes: int, eps: float = 1e-6, std: float = 0.01):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=eps)
        self.linear = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))
