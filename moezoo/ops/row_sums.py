"""Sums over some rows of a matrix for each token: what brings experts' results back to tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.ops.eager import is_eager
from moezoo.ops.observed import is_plain_tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of a loop that torch has by hand


def row_sums(y: Tensor, rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """out[t] = sum over k of weight[t, k] * y[rows[t, k]]; for values alone, without a gradient.

    Args:
        y: (N, D). rows: (T, K) int64. weight: (T, K), or None for ones.

    Returns:
        (T, D) in the dtype of y times weight. In halves on a CPU the sums are in float32 and are
        rounded once; in bfloat16 what lies in the middle of two numbers goes away from zero, by
        torch's loop.
    """
    tokens, choices = rows.shape
    dtype = y.dtype if weight is None else torch.promote_types(y.dtype, weight.dtype)
    if choices == 1:
        taken = y.index_select(0, rows[:, 0])
        return taken if weight is None else taken * weight
    if tokens == 1 and weight is not None:
        return weight.to(dtype) @ y.index_select(0, rows[0]).to(dtype)
    plain = y.is_cpu and is_plain_tensor(y) and is_eager()
    if plain and dtype in _DTYPES and y.numel() and rows.numel():
        factor = None if weight is None else weight.to(dtype).contiguous()
        return F.embedding_bag(rows, y.to(dtype), mode="sum", per_sample_weights=factor)
    taken = y.index_select(0, rows.reshape(-1)).view(tokens, choices, y.shape[1])
    taken = taken if weight is None else taken * weight[..., None]
    return taken.sum(1)
