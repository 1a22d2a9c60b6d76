"""How the steps of a sampling come to the features of visible tokens: reused, encoded anew, or not kept apart at all.

Each is a function of one step for :func:`unmask.systems.generation.decoding.decode`. The number of tokens that become visible
in a step is known from the schedule, so nothing here asks the device how many there are: index arrays of known shapes
gather the new tokens, the features of the earlier ones stay where they are, and new ones are put behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.systems.generation.decoding import Step
from unmask.systems.generation.enat.network import TokenNetwork
from unmask.systems.generation.guidance import doubled, scheduled, with_empty


class Guided:
    """Logits of the hidden tokens with guidance ``l_c + w (l_c - l_empty)``, both passes as one batch.

    A step whose weight is 0 does without the empty pass, if nothing later needs what it would have seen: so the first one,
    where no token is visible yet. classes: int64 ``[B]``.
    """

    def __init__(self, network: TokenNetwork, classes: Tensor, *, cfg_scale: float = 0.0, schedule: str = "linear"):
        self.network, self.cfg_scale, self.schedule = network, cfg_scale, schedule
        both = with_empty(classes, network.empty_class) if cfg_scale else classes
        self.conditions = network.modulations(both)
        self.batch = len(classes)

    def __call__(self, ids: Tensor, hidden: Tensor, step: Step) -> Tensor:
        """``ids [B, N]``, positions of the hidden ``[B, M]`` -> ``[B, M, K]``."""
        weight = scheduled(self.schedule, self.cfg_scale, step.previous)
        alone = not self.cfg_scale or (weight == 0 and self.first(step))
        conditions = [c[:, : self.batch] for c in self.conditions] if alone else self.conditions
        repeat = (lambda x: x) if alone else doubled
        logits = self.network.logits(self.features(repeat(ids), repeat(hidden), step, conditions))
        if alone:
            return logits
        conditional, empty = logits.chunk(2)
        return conditional + weight * (conditional - empty)

    def first(self, step: Step) -> bool:
        """Whether nothing has been seen that a later step would need of the empty pass."""
        return step.hidden == self.network.tokens

    def features(self, ids: Tensor, hidden: Tensor, step: Step, conditions: list[Tensor]) -> Tensor:
        """Features of the hidden tokens, ``[2B or B, M, D]``."""
        raise NotImplementedError

    def masks(self, hidden: Tensor) -> Tensor:
        """Embedded mask tokens, ``[B, M, D]``."""
        return self.network.embed(torch.full_like(hidden, self.network.codebook_size), hidden)


class Reused(Guided):
    """ENAT: a step encodes the tokens that have just become visible; the earlier ones come with their features."""

    def __init__(self, network: TokenNetwork, classes: Tensor, **options: object):
        super().__init__(network, classes, **options)  # type: ignore[arg-type]
        self.seen: Tensor | None = None  # features of the visible tokens, in the order in which they became visible
        self.hidden: Tensor | None = None  # positions hidden in the step before

    def features(self, ids: Tensor, hidden: Tensor, step: Step, conditions: list[Tensor]) -> Tensor:
        network = self.network
        if self.hidden is not None and not self.first(step):
            before = self.hidden if len(self.hidden) == len(hidden) else doubled(self.hidden)
            fresh = left(before, hidden, network.tokens)
            self.seen = self.grown(network.embed(ids.gather(1, fresh), fresh), conditions)
        self.hidden = hidden
        masks = self.masks(hidden)
        seen = masks[:, :0] if self.seen is None else self.seen
        return network.decode(masks, conditions, seen)

    def grown(self, fresh: Tensor, conditions: list[Tensor]) -> Tensor:
        """Features of all visible tokens: the earlier ones', projected, then those of ``fresh [B, F, D]``."""
        if self.seen is None:
            return self.network.encode(fresh, conditions)
        context = self.network.projected(self.seen)
        return torch.cat((context, self.network.encode(fresh, conditions, context)), dim=1)


class Anew(Guided):
    """ENAT without reuse: a step encodes all visible tokens together. Not the function that ``Reused`` computes."""

    def features(self, ids: Tensor, hidden: Tensor, step: Step, conditions: list[Tensor]) -> Tensor:
        visible = left(torch.arange(self.network.tokens, device=ids.device).expand(len(ids), -1), hidden, ids.shape[1])
        seen = self.network.encode(self.network.embed(ids.gather(1, visible), visible), conditions)
        return self.network.decode(self.masks(hidden), conditions, seen)


class Together(Guided):
    """NAT: visible and hidden tokens pass all blocks together; the last block computes the hidden ones only."""

    def features(self, ids: Tensor, hidden: Tensor, step: Step, conditions: list[Tensor]) -> Tensor:
        positions = torch.arange(self.network.tokens, device=ids.device).expand(len(ids), -1)
        return self.network.together(self.network.embed(ids, positions), conditions, hidden)


def left(before: Tensor, hidden: Tensor, tokens: int) -> Tensor:
    """The positions ``[B, F]`` of ``before [B, H]`` that are not in ``hidden [B, M]`` (all of them in ``before``), in order."""
    marks = torch.zeros(len(hidden), tokens, dtype=torch.int8, device=hidden.device)
    stays = marks.scatter(1, hidden, 1).gather(1, before)
    return before.gather(1, stays.argsort(dim=1, stable=True)[:, : before.shape[1] - hidden.shape[1]])
