"""From scores and a budget to what stays: one search for every source of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from unmask.contracts import Batch, Budget
from unmask.errors import UserError
from unmask.models import UserModel
from unmask.systems.compression import measure
from unmask.systems.compression.budget import absolute, unreachable
from unmask.systems.compression.search import Costs, search, search_uniform
from unmask.systems.compression.structure import Structure, Units
from unmask.systems.compression.surgery import cut

Scores = Mapping[Units, Tensor]  # each [count], at most 0, the lowest the most important
Counts = Literal["model", "layers"]


@dataclass
class Frame:
    """What a budget means for a model: its costs now, of its units, and of the rest. length: tokens of a sample."""

    model: UserModel
    structure: Structure
    budget: Budget
    batch: Batch | None = None
    length: float | None = None
    counts: Counts = "model"
    uniform: bool = False
    before: float = field(init=False)
    target: float = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.cost(self.model)
        self.target = absolute(self.budget, self.before)

    def cost(self, model: UserModel) -> float:
        """What the budget counts, of a whole model."""
        match self.budget.kind:
            case "macs":
                return measure.macs(model, self.batch)
            case "parameters":
                return float(measure.parameters(model.module))
            case "bytes":
                return float(measure.bytes_on_disk(model.module))
            case _:
                one = self.batch if self.batch is not None else model.example(8)
                return measure.latencies({"model": model}, one, repeats=11)["model"]["median"]

    # --- costs of units ---
    def places(self) -> float:
        """Tokens that a block sees."""
        if self.length is not None:
            return self.length
        if self.model.text and self.batch is not None:
            mask = self.batch.get("attention_mask")
            words = self.batch.get("tokens", self.batch.get("input_ids"))
            return float(mask.sum(1).float().mean()) if mask is not None else float(words.shape[1])
        source = {s for u in self.structure.neurons for s in u.sources}
        found = [x.places for x in self.structure.layers if x.parameter.rpartition(".")[0] in source]
        return float(found[0]) if found else 1.0

    def unit_costs(self, kind: str | None = None, length: float | None = None) -> Costs | None:
        """Of one head and one neuron, where all layers are alike; None where they are not."""
        heads, neurons = self.structure.heads, self.structure.neurons
        shapes = {n: v.shape for n, v in self.model.module.state_dict().items()}
        if not neurons or len({u.count for u in neurons}) > 1 or len({u.count for u in heads}) > 1:
            return None
        if heads and len(heads) != len(neurons):
            return None
        kind = kind or self.budget.kind
        s = length or self.places()

        def one(units: Units) -> float:
            numbers = [
                x.index.shape[1] * shapes[x.parameter].numel() / shapes[x.parameter][x.axis]
                for x in units.slices
                if kind in ("parameters", "bytes") or len(shapes[x.parameter]) > 1
            ]
            total = float(sum(numbers))
            if kind == "bytes":
                return 4 * total
            if kind == "parameters":
                return total
            return s * total + (2 * s**2 * units.size * units.members if units.kind == "head" else 0)

        each = {round(one(u)) for u in neurons}, {round(one(u)) for u in heads}
        if any(len(e) > 1 for e in each):
            return None
        return Costs(
            one(heads[0]) if heads else 0.0,
            one(neurons[0]),
            len(neurons),
            heads[0].count if heads else 0,
            neurons[0].count,
        )

    def exact(self, keep: Mapping[Units, Tensor], kind: str | None = None) -> float:
        """The cost of a kept choice, computed layer by layer (of the layers that were followed)."""
        kind = kind or self.budget.kind
        share: dict[tuple[str, int], float] = {}
        for units, kept in keep.items():
            left = float(kept.sum()) / units.count
            for one in units.slices:
                share[one.parameter, one.axis] = share.get((one.parameter, one.axis), 1.0) * left
        if kind in ("parameters", "bytes"):
            total = 0.0
            for name, value in self.model.module.named_parameters():
                number = float(value.numel())
                for axis in range(value.ndim):
                    number *= share.get((name, axis), 1.0)
                total += number
            return total * (4 if kind == "bytes" else 1)
        total = 0.0
        for layer in self.structure.layers:
            out = layer.out.size * share.get((layer.parameter, 0), 1.0)
            into = layer.fan_in * share.get((layer.parameter, 1), 1.0)
            total += layer.places * layer.kernel * out * into
        return total

    # --- the choice ---
    def keep(self, scores: Scores, extra: float = 0.0) -> dict[Units, Tensor]:
        """What stays. extra: how much of the target is spent elsewhere. Raises ``UserError`` for a budget out of reach."""
        if self.budget.kind == "milliseconds":
            return self._by_latency(scores)
        costs = self.unit_costs() if self.structure.transformer else None
        if costs is None:
            return self._prefix(scores, self.target, self.budget.kind)
        fixed = self.before - costs.base
        if self.counts == "layers":
            fixed, share = 0.0, self.target / self.before
            return self._searched(scores, share * costs.base, costs)
        capacity = self.target - fixed - extra
        least = fixed + costs.head + costs.neuron
        if self.uniform:
            least = fixed + costs.layers * (costs.head + costs.neuron)
        if capacity < least - fixed:
            what = "one head and one neuron" + (" in every layer" if self.uniform else "")
            raise unreachable(self.budget, self.target, least, self.before, f"{what} stay, and the rest is not cut")
        return self._searched(scores, capacity, costs)

    def _searched(self, scores: Scores, capacity: float, costs: Costs) -> dict[Units, Tensor]:
        heads = [u for u in self.structure.heads if u in scores]
        neurons = [u for u in self.structure.neurons if u in scores]
        h = torch.stack([scores[u] for u in heads]) if heads else torch.zeros(len(neurons), 0, dtype=torch.float64)
        n = torch.stack([scores[u] for u in neurons])
        kept_h, kept_n = (search_uniform if self.uniform else search)(h, n, capacity, costs)
        return dict(zip(heads, kept_h, strict=False)) | dict(zip(neurons, kept_n, strict=True))

    def _prefix(self, scores: Scores, target: float, kind: str) -> dict[Units, Tensor]:
        """The largest number of most important units, at least one in every layer, whose exact cost fits."""
        units = [u for u in self.structure.all() if u in scores]
        rank = _ranks([scores[u] for u in units])
        full = {u: torch.ones(u.count, dtype=torch.bool) for u in units}
        rest = self.before - self.exact(full, kind) if kind == self.budget.kind else 0.0

        def kept(n: int) -> dict[Units, Tensor]:
            return {u: _at_least_one(r < n, scores[u]) for u, r in zip(units, rank, strict=True)}

        low, high = 0, sum(u.count for u in units)
        least = rest + self.exact(kept(0), kind)
        if least > target * (1 + 1e-9):
            raise unreachable(self.budget, target, least, self.before, "one channel of every layer stays")
        while low < high:
            middle = (low + high + 1) // 2
            if rest + self.exact(kept(middle), kind) <= target * (1 + 1e-9):
                low = middle
            else:
                high = middle - 1
        return kept(low)

    def _by_latency(self, scores: Scores) -> dict[Units, Tensor]:
        """The largest share of MACs whose cut model is fast enough, by seven halvings, each of them measured."""
        macs = Frame(
            self.model, self.structure, Budget("macs", 1.0), self.batch, self.length, self.counts, self.uniform
        )
        low, high, best, fastest = 0.0, 1.0, None, float("inf")
        for _ in range(7):
            middle = (low + high) / 2
            macs.budget = Budget("macs", middle)
            macs.target = middle * macs.before
            try:
                keep = macs.keep(scores)
            except UserError:
                low = middle
                continue
            smaller = cut(self.model, keep)
            took = self.cost(smaller)
            fastest = min(fastest, took)
            if took <= self.target:
                best, low = keep, middle
            else:
                high = middle
        if best is None:
            raise unreachable(self.budget, self.target, fastest, self.before, "measured on this machine")
        return best


def _ranks(scores: list[Tensor]) -> list[Tensor]:
    """Global ranks, 0 the most important, as one tensor a layer."""
    flat = torch.cat([s.double() for s in scores])
    rank = torch.empty(len(flat), dtype=torch.int64)
    rank[flat.argsort(stable=True)] = torch.arange(len(flat))
    return list(rank.split([len(s) for s in scores]))


def _at_least_one(kept: Tensor, scores: Tensor) -> Tensor:
    if not bool(kept.any()):
        kept = kept.clone()
        kept[int(scores.argmin())] = True
    return kept


Progress = Callable[[str], None]
