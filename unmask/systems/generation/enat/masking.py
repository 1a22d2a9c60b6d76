"""Which tokens are hidden in training, and which more were hidden in the step before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.draw import Draw


@dataclass(frozen=True)
class Split:
    """Positions of an image's tokens, int64: ``hidden [B, M]`` now; of the visible ``[B, V]`` the first ``fresh`` were hidden in
    the step before as well. ``fresh=None``: there was no step before."""

    hidden: Tensor
    visible: Tensor
    fresh: int | None = None

    def ids(self, tokens: Tensor, mask_id: int) -> Tensor:
        """``tokens [B, N]`` with ``mask_id`` where hidden."""
        return tokens.scatter(1, self.hidden, mask_id)


def beta_quantile(a: float, b: float, uniform: float) -> float:
    """Beta(a, b) by the inverse of its distribution function: one number in [0, 1) makes one mask ratio."""
    from scipy.special import betaincinv

    return float(betaincinv(a, b, uniform))


def split_at(order: Tensor, hidden: int, fresh: int | None = None) -> Split:
    """The first ``hidden`` positions of a random order ``[B, N]`` are hidden, of those behind them ``fresh`` newly visible."""
    return Split(order[:, :hidden], order[:, hidden:], fresh)


def training_split(
    draw: Draw,
    batch: int,
    tokens: int,
    *,
    beta: tuple[float, float] = (12.0, 3.0),
    reuse_probability: float = 0.5,
    device: torch.device | str = "cpu",
) -> Split:
    """One share r ~ Beta for the batch: clamp(round(N·r), 1, N - 1) tokens of every sample are hidden, at random.

    With ``reuse_probability`` a step before is simulated: of the V visible tokens round(V·u), u uniform, were hidden then.
    Counts are drawn on the CPU, for the step as a whole: they are shapes, equal on every process.
    """
    ratio, reuse, share = (
        float(draw.uniform(name, (1,), shared=True)) for name in ("ratio", "reuse", "previous ratio")
    )
    hidden = min(max(round(tokens * beta_quantile(*beta, ratio)), 1), tokens - 1)
    fresh = round((tokens - hidden) * share) if reuse < reuse_probability else None
    order = draw.uniform("order", (batch, tokens), device=device).argsort(dim=1, stable=True)
    return split_at(order, hidden, fresh)
