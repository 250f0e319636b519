"""A linear map of a few rows: what decoding does at every step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_MOST_ROWS = 4
_MOST_ROWS_TALL = 8  # for heads, whose output is much wider than their input
_TALL = 8


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times weight (N, K) transposed: `F.linear` without a bias.

    With a few rows on a CPU, `weight @ x^T` streams the weight from memory 2 to 4 times as fast as
    `x @ weight^T`, which packs it first; and a product of two equal columns beats the
    matrix-vector product of MKL, which does not keep enough loads in flight
    (benchmarks/decode.py). Sums are ordered differently, so values differ in the last bits.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if not _pays(x, weight, rows):
        return F.linear(x, weight)
    x_MK = x.reshape(rows, x.shape[-1])
    if rows == 1:
        y = torch.mm(weight, x_MK.repeat(2, 1).t())[:, 0].contiguous()
    else:
        y = torch.mm(weight, x_MK.t()).t().contiguous()
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _pays(x: Tensor, weight: Tensor, rows: int) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    tall = weight.shape[0] >= _TALL * weight.shape[1]
    return 1 <= rows <= (_MOST_ROWS_TALL if tall else _MOST_ROWS)
