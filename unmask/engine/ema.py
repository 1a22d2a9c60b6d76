"""Exponential moving average of a model's weights: ``average = decay x average + (1 - decay) x weight``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unmask.engine.distributed import local_part


class Ema:
    """The averaged copy of a model's floating-point parameters. Buffers are the model's own: what was measured or fixed
    during the training (running statistics, a basis) is not averaged with what stood there before.

    Each process of a sharded model averages its own shards.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.source = {name: p.data for name, p in model.named_parameters() if p.is_floating_point()}
        self.average = {name: tensor.detach().clone() for name, tensor in self.source.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights in."""
        torch._foreach_lerp_(
            [local_part(t) for t in self.average.values()],
            [local_part(t) for t in self.source.values()],
            1 - self.decay,
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the model holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self.source.items():
            here, there = local_part(tensor), local_part(self.average[name])
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(state[name])
