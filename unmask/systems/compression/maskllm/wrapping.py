"""Linear layers of a user's model, replaced by masked ones and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.systems.compression.maskllm.gates import MaskedLinear


def wrapped(network: nn.Module, keep: int, group: int, layers: str, std: float) -> dict[str, MaskedLinear]:
    """Replace the linear layers of a network's repeated blocks (or those that ``layers`` matches) by masked ones, in place.

    Embeddings, output heads and norms stay. Raises ``UserError`` for a network without such layers, and names one whose inputs the
    group does not divide.
    """
    found = linear_layers(network, layers)
    out = {}
    for name, module in found.items():
        place, _, last = name.rpartition(".")
        masked = MaskedLinear(module, keep, group, layer=name, std=std)
        setattr(network.get_submodule(place), last, masked)
        out[name] = masked
    return out


def linear_layers(network: nn.Module, layers: str = "") -> dict[str, nn.Module]:
    """Linear layers (and the ``Conv1D`` of transformers) by name. Raises ``UserError``."""
    try:
        wanted = re.compile(layers) if layers else None
    except re.error as error:
        raise UserError(f"layers={layers} is no regular expression: {error}") from None
    every = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    if wanted is not None:
        found = {n: m for n, m in every.items() if wanted.search(n)}
    else:  # inside a numbered block
        found = {n: m for n, m in every.items() if any(part.isdigit() for part in n.split(".")[:-1])}
    if not found:
        what = (
            f"no linear layer matches layers={layers}"
            if layers
            else "the model has no linear layers in repeated blocks"
        )
        raise UserError(f"{what}: its linear layers are {', '.join(list(every)[:6]) or 'none'}")
    return found


@torch.no_grad()
def unwrapped(fresh: nn.Module, network: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A fresh copy of the model with the network's weights, masked ones at zero."""
    state = {k: v for k, v in network.state_dict().items() if ".diff_mask." not in k}
    for name, mask in masks.items():
        weight = state[f"{name}.weight"]
        own = mask if isinstance(fresh.get_submodule(name), nn.Linear) else mask.T
        state[f"{name}.weight"] = weight * own.to(weight.dtype)
    fresh.load_state_dict(state)
    return fresh.eval()
