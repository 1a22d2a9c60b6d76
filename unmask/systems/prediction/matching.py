"""Hungarian matching of predictions with targets, for a whole batch and all layers at once.

One copy from the device to the host, whatever the number of layers and images:

    pairs = assign(torch.stack(costs), counts)      # costs: L x [B, Q, N]
    pairs[layer].image, .query, .target             # [M] each: images in order, queries ascending
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

IMPOSSIBLE = 1e9  # stands for a cost that is not finite, so that a diverged step fails where its loss is looked at


@dataclass(frozen=True)
class Pairs:
    """Who was matched with whom: int64 ``[M]`` each. M = sum over images of min(queries, targets). ``counts``: pairs an
    image."""

    image: Tensor
    query: Tensor
    target: Tensor
    counts: list[int]

    def __len__(self) -> int:
        return len(self.image)


@torch.no_grad()
def assign(costs: Tensor, counts: Sequence[int], *, maximise: bool = False) -> list[Pairs]:
    """The assignment of least total cost, for each layer and image.

    costs: ``[L, B, Q, N]``; of image b the first ``counts[b]`` targets are real. What is beyond the smaller of queries and
    targets stays unmatched. maximise: the costs are similarities. Returns one :class:`Pairs` a layer, on the costs' device.
    """
    device = costs.device
    host = costs.detach().float().cpu().numpy()
    layers, images, queries, _ = host.shape
    host = np.nan_to_num(host, nan=IMPOSSIBLE, posinf=IMPOSSIBLE, neginf=-IMPOSSIBLE)
    each = [min(queries, count) for count in counts]
    total = sum(each)
    found = np.empty((layers, 2, total), dtype=np.int64)
    for layer in range(layers):
        start = 0
        for image in range(images):
            if each[image]:
                rows, columns = linear_sum_assignment(host[layer, image, :, : counts[image]], maximize=maximise)
                found[layer, :, start : start + each[image]] = rows, columns
                start += each[image]
    image_ids = torch.from_numpy(np.repeat(np.arange(images), each)).to(device)
    moved = torch.from_numpy(found).to(device)
    return [Pairs(image_ids, moved[layer, 0], moved[layer, 1], each) for layer in range(layers)]
