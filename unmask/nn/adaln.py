"""Adaptive layer norm: a condition sets shift, scale and gate of every block (Perez et al. 2018; Peebles, Xie 2023).

The layers that turn the condition into numbers are alike in every block and read the same input, so they are kept together:
one matrix product gives the modulations of all blocks.

Legend: c ``[B, D]``, the condition; ``parts`` vectors a block, in the order shift, scale, gate of the first branch, then of the
second; M is 1, or N where every token has its own condition.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ModulationKind = Literal["normal", "lora", "swiglu"]


def modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``normed · (1 + scale) + shift`` for ``[B, N, D]`` and ``[B, M, D]``."""
    return torch.addcmul(shift, normed, 1 + scale)


class StackedLinear(nn.Module):
    """``depth`` linear layers of one shape: weight ``[depth, out, in]``, bias ``[depth, out]``."""

    def __init__(self, depth: int, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(depth, out_dim))
        bound = math.sqrt(6 / (in_dim + out_dim))  # Xavier, layer by layer
        nn.init.uniform_(self.weight, -bound, bound)

    def shared(self, x: Tensor) -> Tensor:
        """All layers read the same ``x [B, in]``: ``[depth, B, out]`` from one product."""
        out = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
        return out.unflatten(1, self.bias.shape).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Layer i reads ``x[i]``: ``[depth, B, in]`` -> ``[depth, B, out]``."""
        if x.dtype != self.weight.dtype:
            return x @ self.weight.transpose(1, 2).to(x.dtype) + self.bias[:, None].to(x.dtype)
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))


class Modulations(nn.Module):
    """From a condition ``[B, D]`` to what it does to every block: ``[depth, B, parts, D]``.

    normal: SiLU, then Linear(D, parts · D). lora: SiLU, Linear(D, rank), Linear(rank, parts · D), and beside it one SiLU,
    Linear(D, parts · D) for all blocks together. swiglu: SwiGLU(D → ¾ D → parts · D) of c itself.
    zero: the last layers start at zero, so that a block with gates starts as the identity; else at normal numbers of 0.02.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        parts: int = 6,
        *,
        kind: ModulationKind = "normal",
        rank: int | None = None,
        zero: bool = True,
    ):
        super().__init__()
        self.kind, self.parts = kind, parts
        last: list[StackedLinear | nn.Linear]
        if kind == "normal":
            self.linear = StackedLinear(depth, dim, parts * dim)
            last = [self.linear]
        elif kind == "lora":
            self.down = StackedLinear(depth, dim, rank or max(dim // 4, 1))
            self.up = StackedLinear(depth, rank or max(dim // 4, 1), parts * dim)
            self.everywhere = nn.Linear(dim, parts * dim)
            last = [self.up, self.everywhere]
        else:
            hidden = dim * 3 // 4
            self.fc1_g, self.fc1_x = StackedLinear(depth, dim, hidden), StackedLinear(depth, dim, hidden)
            self.fc2 = StackedLinear(depth, hidden, parts * dim)
            last = [self.fc2]
        for module in last:
            if zero:
                nn.init.zeros_(module.weight)
            else:
                nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, condition: Tensor) -> Tensor:
        if self.kind == "swiglu":
            out = self.fc2(F.silu(self.fc1_g.shared(condition)) * self.fc1_x.shared(condition))
        elif self.kind == "lora":
            active = F.silu(condition)
            out = self.up(self.down.shared(active)) + self.everywhere(active)
        else:
            out = self.linear.shared(F.silu(condition))
        return out.unflatten(2, (self.parts, -1))
