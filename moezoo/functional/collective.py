"""Sums over the ranks of a distributed run; the identity in a run of one process."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """How many processes train together (1 without torch.distributed)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradient. Every rank must call it."""
    if num_ranks() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total
