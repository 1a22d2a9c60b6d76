"""From manifold and KL terms to scores; and the first-order Fisher scores that OPTIN is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.models import UserModel
from unmask.systems.compression.optin.terms import combined, index_weights
from unmask.systems.compression.structure import Units


@dataclass(frozen=True)
class Factors:
    """Factors of one kind of unit. index_most: how much more the first unit counts than the last (1: all alike)."""

    factor: float = 1.0
    last_layer: float = 1.0
    index_most: float = 1.0


def scored(md: Tensor, kl: Tensor, loss: str, contribution: float, factors: Factors) -> Tensor:
    """``[L, U]`` float64, at most 0: the terms combined in the order of the visits (layer by layer), then the factors."""
    if loss == "MMD":
        score = md.double().clone()
    elif loss == "KL":
        score = kl.double().clone()
    else:
        score = combined(md.flatten(), kl.flatten(), contribution).reshape(md.shape)
    if not score.numel():
        return score
    score[-1] *= factors.last_layer
    return score * index_weights(score.shape[1], factors.index_most) * factors.factor


def fisher_scores(
    model: UserModel, layers: Sequence[Units], batch: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[Units, Tensor]:
    """Minus the first-order Fisher information (Kwon et al. 2022): squared gradients of the loss with respect to each unit's
    mask at 1, summed over samples, one by one. batch: with labels; without, the model's own answers stand in."""
    gates = {u: torch.ones(u.count, device=model.device, requires_grad=True) for u in layers}
    total = {u: torch.zeros(u.count, dtype=torch.float64) for u in layers}
    hooks = [_gate(model, u, gate) for u, gate in gates.items()]
    label = batch.get("label")
    try:
        for i in range(len(next(iter(inputs.values())))):
            one = {k: v[i : i + 1] for k, v in inputs.items()}
            with torch.enable_grad():
                logits = model.scores(**one)
                target = label[i : i + 1].to(logits.device) if label is not None else logits.argmax(-1)
                loss = F.cross_entropy(logits.flatten(0, -2), target.reshape(-1))
                grads = torch.autograd.grad(loss, list(gates.values()))
            for units, grad in zip(gates, grads, strict=True):
                total[units] += grad.double().square().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return {u: -t for u, t in total.items()}


def _gate(model: UserModel, units: Units, gate: Tensor) -> Any:
    places = units.columns.to(gate.device)
    path, axis = units.sinks[0]

    def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        wide = torch.ones(x.shape[axis], device=x.device)
        wide = wide.index_put((places.flatten(),), gate[:, None].expand(places.shape).flatten())
        shape = [1] * x.ndim
        shape[axis] = -1
        return (x * wide.reshape(shape), *inputs[1:])

    return model.module.get_submodule(path).register_forward_pre_hook(hook)
