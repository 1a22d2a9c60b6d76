"""The weighted k-nearest-neighbours probe as DINO measures it (Wu et al., CVPR 2018; Caron et al., ICCV 2021)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.errors import UserError


@torch.no_grad()
def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Votes ``[M, K]``, float32, summing to 1: the k most cosine-similar training samples vote with exp(similarity / T).

    Nothing is learned and nothing is tuned. ``k`` is cut to the number of training samples; ``chunk`` test samples are
    compared at once. Raises ``UserError`` when there is no training sample.
    """
    if not len(train_features):
        raise UserError("k-NN needs labelled training samples, got none")
    bank = F.normalize(train_features.float(), dim=1)
    labels = train_labels.to(bank.device)
    k = min(k, len(bank))
    votes = []
    for part in test_features.float().split(chunk):
        similarity, nearest = (F.normalize(part, dim=1) @ bank.T).topk(k, dim=1)
        # the largest is subtracted before exp: votes are relative, and small temperatures do not overflow
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(part), classes, device=bank.device).scatter_add_(1, labels[nearest], weight))
    summed = torch.cat(votes) if votes else torch.zeros(0, classes)
    return summed / summed.sum(dim=1, keepdim=True)
