"""Which heads and neurons stay under a budget, from their scores (at most 0; the lowest is the most important)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.errors import UserError

SLACK = 1e-9  # relative, against the rounding of sums


@dataclass(frozen=True)
class Costs:
    """Multiply-adds (or numbers) of one sample: of one head and of one neuron, where all L layers are alike."""

    head: float
    neuron: float
    layers: int
    heads: int
    neurons: int

    @property
    def base(self) -> float:
        return self.layers * (self.heads * self.head + self.neurons * self.neuron)


def mac_units(length: float, width: int, head_dim: int, layers: int, heads: int, neurons: int, gates: int = 0) -> Costs:
    """Multiply-adds of a transformer's layers at a sequence length (which may be an average): a head costs
    3 s D d + 2 s^2 d + s d D, a neuron 2 s D (3 s D with a gate)."""
    head = 3 * length * width * head_dim + 2 * length**2 * head_dim + length * head_dim * width
    return Costs(head, (2 + gates) * length * width, layers, heads, neurons)


def order_of(scores: Tensor) -> Tensor:
    """``[L * U, 2]`` (layer, unit), most important first; ties by (layer, unit)."""
    flat = scores.double().flatten().argsort(stable=True)
    return torch.stack((flat // max(scores.shape[1], 1), flat % max(scores.shape[1], 1)), dim=1)


def search(head_scores: Tensor, neuron_scores: Tensor, capacity: float, costs: Costs) -> tuple[Tensor, Tensor]:
    """Masks ``[L, H]`` and ``[L, F]`` (True stays): for each number n of heads the n best are taken and what is left is
    spent on the best neurons; the n whose units' scores sum to most wins, the smallest of equals.

    Prefix sums instead of the loops of the released code. Raises ``UserError`` for a capacity below one head.
    """
    heads, neurons = head_scores.double().abs().flatten(), neuron_scores.double().abs().flatten()
    capacity = capacity * (1 + SLACK)
    if heads.numel() and capacity < costs.head:
        raise UserError(
            f"the budget of {capacity:,.0f} MACs does not pay for one head ({costs.head:,.0f}): allow at least "
            f"{costs.head / costs.base:.3f} of the layers' MACs"
        )
    head_order, neuron_order = _ascending(head_scores), _ascending(neuron_scores)
    head_sums = torch.cat((heads.new_zeros(1), heads[head_order].cumsum(0)))
    neuron_sums = torch.cat((neurons.new_zeros(1), neurons[neuron_order].cumsum(0)))
    numbers = torch.arange(1, heads.numel() + 1) if heads.numel() else torch.zeros(1, dtype=torch.int64)
    numbers = numbers[numbers * costs.head <= capacity]
    left = capacity - numbers * costs.head
    counts = (left / costs.neuron).floor().long().clamp(0, neurons.numel())
    totals = head_sums[numbers] + neuron_sums[counts]
    best = int(totals.argmax())
    return (
        _chosen(head_order, int(numbers[best]), head_scores.shape),
        _chosen(neuron_order, int(counts[best]), neuron_scores.shape),
    )


def search_uniform(head_scores: Tensor, neuron_scores: Tensor, capacity: float, costs: Costs) -> tuple[Tensor, Tensor]:
    """The same number of heads and of neurons in every layer, so that the libraries' own configs can say it: of all pairs
    under the capacity, the one whose units' scores sum to most."""
    layers, heads = head_scores.shape
    capacity = capacity * (1 + SLACK)
    by_head = head_scores.double().abs().sort(dim=1, descending=True)
    by_neuron = neuron_scores.double().abs().sort(dim=1, descending=True)
    head_sums = torch.cat((torch.zeros(1), by_head.values.sum(0).cumsum(0)))
    neuron_sums = torch.cat((torch.zeros(1), by_neuron.values.sum(0).cumsum(0)))
    best: tuple[float, int, int] | None = None
    for n in range(min(1, heads), heads + 1):
        left = capacity - layers * n * costs.head
        count = min(int(left // (layers * costs.neuron)), neuron_scores.shape[1])
        if left < 0 or count < 1:
            continue
        total = float(head_sums[n] + neuron_sums[count])
        if best is None or total > best[0]:
            best = (total, n, count)
    if best is None:
        least = layers * (costs.head + costs.neuron)
        raise UserError(
            f"the budget of {capacity:,.0f} MACs does not pay for one head and one neuron in every layer ({least:,.0f})"
        )
    return _first(by_head.indices, best[1], head_scores.shape), _first(by_neuron.indices, best[2], neuron_scores.shape)


def _ascending(scores: Tensor) -> Tensor:
    return scores.double().flatten().argsort(stable=True)


def _chosen(order: Tensor, count: int, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.reshape(shape)


def _first(indices: Tensor, count: int, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool).scatter(1, indices[:, :count], True)


def spent(head_mask: Tensor, neuron_mask: Tensor, costs: Costs) -> float:
    """Multiply-adds of the layers under masks."""
    return float(head_mask.sum()) * costs.head + float(neuron_mask.sum()) * costs.neuron
