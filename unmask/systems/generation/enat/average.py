"""A running average of a network's weights, kept as buffers: saved with the model, and never trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from unmask.systems.generation.enat.network import TokenNetwork


class AveragedCopy(nn.Module):
    """``average = decay · average + (1 - decay) · weight`` of every parameter; always in evaluation mode.

    The engine's own average is for what is measured and exported; this one takes part in the training: it makes the
    features that a step reuses.
    """

    def __init__(self, network: TokenNetwork):
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        for module in self.network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach().clone())

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """Take the network's present weights in."""
        average = dict(self.network.named_buffers())
        pairs = [(average[name], _whole(p.detach())) for name, p in network.named_parameters()]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)

    def train(self, mode: bool = True) -> AveragedCopy:
        return super().train(False)


def _whole(parameter: Tensor) -> Tensor:
    """The parameter itself, or all of one of which each process holds a part."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
