"""The linear probe: BatchNorm without an affine part, then Linear, trained by LARS or SGD (He et al. 2022, appendix A.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unmask.evaluation.training import HeadSettings, head_scores, train_heads
from unmask.nn.heads import BatchNormHead

# MAE's: LARS without weight decay, 90 epochs, 10 of warm-up. Its base rate 0.1 is meant for batches of 16384, thousands
# of times the batch that a few thousand images allow: the rate is therefore chosen among multiples of it.
SETTINGS = HeadSettings(optimizer="lars", base_lr=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0), epochs=90, warmup_epochs=10)


def linear(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    classes: int,
    views: Sequence[Tensor] | None = None,
    settings: HeadSettings = SETTINGS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tell: Callable[[str], None] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Scores ``[M, K]`` of the test samples and the chosen rate, from features ``[N, D]`` computed once.

    views: features ``[N, D]`` of the same training images under augmentation; epoch e learns from view e mod their number.
    """
    dim = train_features.shape[-1]
    head, chosen = train_heads(
        lambda: BatchNormHead(dim, classes),
        train_features,
        train_labels,
        settings,
        views=views,
        seed=seed,
        device=device,
        tell=tell,
    )
    return head_scores(head, test_features, device), chosen
