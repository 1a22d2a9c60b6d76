"""Exponential moving average of a model's weights: ``average = decay x average + (1 - decay) x weight``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unmask.engine.distributed import local_part


class Ema:
    """The averaged copy of every floating-point tensor in a model's state (parameters and buffers).

    Each process of a sharded model averages its own shards.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.source = floating_state(model)
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


def floating_state(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point tensors that a checkpoint would hold, each once, sharing memory with the model."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor.detach() if not isinstance(tensor, nn.Parameter) else tensor.data
    return out
