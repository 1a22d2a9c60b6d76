"""What the processes of one training have to agree on inside a step."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def summed_over_processes(value: Tensor) -> Tensor:
    """The sum of every process's ``value``; the value itself where there is one process. No gradient flows through it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total
