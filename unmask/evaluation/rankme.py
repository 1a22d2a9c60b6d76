"""RankMe: how many directions features really use, a measure that needs no labels (Garrido et al., ICML 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.errors import UserError

PAPER_SAMPLES = 25_600  # the paper's number; more change nothing, fewer give an upper bound of their own count


@torch.no_grad()
def rankme(features: Tensor, *, limit: int = PAPER_SAMPLES) -> float:
    """exp of the entropy of the singular values of ``[N, D]`` divided by their sum: from 1 to min(N, D).

    Not centred, as in the paper (equations 1 and 2, epsilon 1e-7); float64. At most the first ``limit`` samples count.
    Comparable only between equal numbers of samples. Raises ``UserError`` for features that are not finite.
    """
    x = features[:limit].detach().double()
    if x.numel() == 0:
        raise UserError("RankMe needs features, got none")
    if not torch.isfinite(x).all():
        raise UserError("RankMe: the features hold NaN or infinity: the encoder is broken or was given such inputs")
    values = torch.linalg.svdvals(x)
    if float(values.max()) == 0.0:
        return 1.0  # all features are zero: one direction at most
    share = values / values.sum() + 1e-7
    return float((-(share * share.log()).sum()).exp())
