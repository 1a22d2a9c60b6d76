"""Masked-token decoding (MaskGIT, Chang et al. 2022): all tokens start hidden, and each step keeps the surest guesses.

    def logits(ids, hidden, step):            # ids [B, N] (K where hidden), hidden positions [B, M] ascending
        return network(ids)[:, hidden ...]    # [B, M, K], guidance included
    ids = decode(logits, n=16, tokens=64, codes=256, draw=Seeded(0), steps=8)

How many tokens are hidden at each step is known from the schedule, so M is one number for the whole batch. Draws:
``token.0``, ``token.1`` … choose ids, ``confidence.0`` … disturb the order in which they are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmask.draw import Draw, gumbel
from unmask.errors import UserError
from unmask.systems.generation.schedules import hidden_counts

TokenDraw = Literal["uniform", "gumbel"]


@dataclass(frozen=True)
class Step:
    """One step of the decoding. ``hidden``: tokens hidden as it begins; ``stay``: hidden when it ends; ``before``: hidden when
    the step before began (all, for the first)."""

    number: int
    steps: int
    hidden: int
    stay: int
    before: int

    @property
    def fraction(self) -> float:
        """The share of the decoding that is done when the step ends, (s + 1) / S."""
        return (self.number + 1) / self.steps

    @property
    def previous(self) -> float:
        """The share that was done before, s / S: 0 in the first step."""
        return self.number / self.steps


Logits = Callable[[Tensor, Tensor, Step], Tensor]


@torch.no_grad()
def decode(
    logits: Logits,
    n: int,
    tokens: int,
    codes: int,
    draw: Draw,
    *,
    steps: int = 8,
    schedule: str = "cosine",
    mask_temperature: float = 1.5,
    sampling_temperature: float = 6.0,
    coldest: float = 1e-3,
    top_k: int | None = None,
    top_p: float | None = None,
    token_draw: TokenDraw = "uniform",
    device: torch.device | str = "cpu",
    trace: list[Tensor] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Tensor:
    """Ids ``[n, tokens]`` in 0 … codes - 1.

    At step s, with ρ = (s + 1) / S: ids are drawn at temperature max(sampling_temperature · (1 - ρ), coldest); the log
    probability of each, plus Gumbel noise times mask_temperature · (1 - ρ), is its confidence; the least confident stay
    hidden, as many as ``schedule`` says (``schedules.hidden_share``). token_draw: one uniform number a token ("uniform"), or
    the largest of Gumbel-disturbed logits ("gumbel", whose draws ``[n, tokens, codes]`` cost more). trace: gets the ids that
    each step begins with. Raises ``UserError`` for steps < 1 or a top_k, top_p that leaves nothing.
    """
    counts = hidden_counts(schedule, steps, tokens)
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must lie in (0, 1]")
    ids = torch.full((n, tokens), codes, dtype=torch.int64, device=device)
    hidden = torch.arange(tokens, device=device).expand(n, tokens)
    for number in range(steps):
        step = Step(number, steps, counts[number], counts[number + 1], counts[max(number - 1, 0)])
        if tell is not None:
            tell(f"step {number + 1} of {steps}")
        if trace is not None:
            trace.append(ids)
        if step.hidden == 0:  # the schedule has ended early
            continue
        rest = 1 - step.fraction
        log_p = logits(ids, hidden, step).float().log_softmax(dim=-1)
        warm = filtered(log_p / max(sampling_temperature * rest, coldest), top_k, top_p)
        chosen = _draw_ids(warm, hidden, tokens, draw, number, token_draw)
        confidence = log_p.gather(2, chosen[..., None])[..., 0]
        ids = ids.scatter(1, hidden, chosen)
        if step.stay:
            noise = gumbel(draw, f"confidence.{number}", (n, tokens), device=device).gather(1, hidden)
            least = (confidence + mask_temperature * rest * noise).argsort(dim=1, stable=True)[:, : step.stay]
            hidden = hidden.gather(1, least).sort(dim=1).values
            ids = ids.scatter(1, hidden, codes)
        else:
            hidden = hidden[:, :0]
    return ids


def _draw_ids(logits: Tensor, hidden: Tensor, tokens: int, draw: Draw, number: int, how: TokenDraw) -> Tensor:
    """int64 ``[B, M]``, each from the distribution that its logits ``[B, M, K]`` describe."""
    batch, _, codes = logits.shape
    if how == "gumbel":
        noise = gumbel(draw, f"token.{number}", (batch, tokens, codes), device=logits.device)
        return (logits + noise.gather(1, hidden[..., None].expand(-1, -1, codes))).argmax(dim=-1)
    point = draw.uniform(f"token.{number}", (batch, tokens), device=logits.device).gather(1, hidden)
    below = logits.softmax(dim=-1).cumsum(dim=-1)
    # scaled by the sum's own last entry, which rounding keeps from being 1; no id without probability is ever chosen
    return (below <= point[..., None] * below[..., -1:]).sum(dim=-1).clamp(max=codes - 1)


def filtered(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits with -∞ where an id is not among the ``top_k`` likeliest, or not in the smallest set that holds ``top_p``."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(dim=-1)
        outside = share.cumsum(dim=-1) - share >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits
