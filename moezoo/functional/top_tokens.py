"""The other way round: every expert takes its best tokens, in each group by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fair_share(factor: float, num_tokens: int, num_experts: int) -> int:
    """ceil(factor * S / E), at least 1 and at most S: the slots of an expert for S tokens."""
    # 1.1 * 10 is 11.000000000000002 in binary: without the tolerance it would round up to 12.
    exact = factor * num_tokens / num_experts
    return min(max(math.ceil(exact - 1e-9 * max(exact, 1.0)), 1), num_tokens)


def fair_shares(factor: float, count_G: Tensor, num_experts: int) -> Tensor:
    """`fair_share` of every group, for counts (G,) that only the device knows."""
    exact = factor * count_G.double() / num_experts
    share_G = (exact - 1e-9 * exact.clamp(min=1.0)).ceil().long().clamp(min=1)
    return torch.minimum(share_G, count_G)


def best_tokens(score_RS: Tensor, count: int) -> Tensor:
    """Indices (..., count) of the highest scores along the last dimension, highest first.

    Ties go to the lowest index, NaN comes last. `torch.topk` breaks ties arbitrarily, so score and
    index are packed into one integer key, which has no ties.
    """
    size = score_RS.shape[-1]
    score_RS = torch.nan_to_num(score_RS.detach(), nan=float("-inf"))
    if score_RS.dtype != torch.float32:
        return score_RS.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    bits_RS = (score_RS + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    key_RS = torch.where(bits_RS >= 0, bits_RS, bits_RS ^ 0x7FFFFFFF).long()  # ordered as scores
    place_S = torch.arange(size - 1, -1, -1, device=score_RS.device)
    return key_RS.mul_(2**32).add_(place_S).topk(count, dim=-1).indices
