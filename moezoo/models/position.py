"""Relative position bias of T5 (arXiv 1910.10683, section 2.1): one learned number per bucket and
head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moezoo.models.embedding import Embedding


def relative_buckets(
    distance: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """The bucket of each relative distance (key position - query position), int64 of the same
    shape.

    Half of the buckets hold exact distances, the other half grow logarithmically up to
    `max_distance`; bidirectional attention spends half of all on each direction.
    """
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = bucket + (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    max_exact = num_buckets // 2
    if max_exact == 0:
        return bucket
    span = math.log(max_distance / max_exact) if max_distance > max_exact else 1.0
    ratio = torch.log(distance.float().clamp(min=1) / max_exact) / span
    far = (max_exact + (ratio * (num_buckets - max_exact)).long()).clamp(max=num_buckets - 1)
    return bucket + torch.where(distance < max_exact, distance, far)


@dataclass(frozen=True)
class Buckets:
    """How distances fall into buckets; see `relative_buckets`."""

    number: int
    max_distance: int
    bidirectional: bool


class PositionBias(Embedding):
    """The table (buckets, H): one learned number per bucket and head."""


def relative_bias(
    table: nn.Module,
    buckets: Buckets,
    query_length: int,
    key_length: int,
    *,
    offset: int = 0,
    device: torch.device,
) -> Tensor:
    """A table's expansion to an additive attention bias (1, H, Lq, Lk), for queries at positions
    offset ... offset + Lq - 1 and keys from 0.

    Only the Lq + Lk - 1 distances are looked up: the bias is constant along its diagonals. The
    table is called, so it may be wrapped.
    """
    distances = max(query_length + key_length - 1, 0)
    first = 1 - query_length - offset
    bucket = relative_buckets(
        torch.arange(first, first + distances, device=device),
        bidirectional=buckets.bidirectional,
        num_buckets=buckets.number,
        max_distance=buckets.max_distance,
    )
    # (H, Lq + Lk - 1); contiguous, and so is the bias, which every layer adds to its scores.
    by_distance: Tensor = table(bucket).t().contiguous()
    if query_length == 0 or key_length == 0:
        return by_distance.new_zeros(1, by_distance.shape[0], query_length, key_length)
    if query_length == 1:
        return by_distance[None, :, None, :]
    return by_distance.unfold(1, key_length, 1).flip(1).unsqueeze(0)
