"""A linear map of a few rows: what decoding does at every step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_ROWS = 4
_MOST_ROWS_TALL = 8  # for heads, whose output is much wider than their input
_TALL = 8


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times weight (N, K) transposed: `F.linear` without a bias.

    With a few rows on a CPU, `weight @ x^T` streams the weight from memory 2 to 4 times as fast as
    `x @ weight^T`, which packs it first; and a product of two equal columns beats the
    matrix-vector product of MKL, which does not keep enough loads in flight
    (benchmarks/decode.py). Sums are ordered differently, so values differ in the last bits.
    """
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    if not _pays(x, weight, rows):
        return F.linear(x, weight)
    x_MK = x.view(rows, width) if x.is_contiguous() else x.reshape(rows, width)
    if rows == 1:
        y = torch.mm(weight, torch.cat((x_MK, x_MK)).t())[:, 0].contiguous()
    else:
        y = torch.mm(weight, x_MK.t()).t().contiguous()
    return y.view(*x.shape[:-1], weight.shape[0])


def _pays(x: Tensor, weight: Tensor, rows: int) -> bool:
    if not 1 <= rows <= _MOST_ROWS_TALL or torch.is_grad_enabled() or x.dtype != torch.float32:
        return False
    if rows > MOST_ROWS and weight.shape[0] < _TALL * weight.shape[1]:
        return False
    if not x.is_cpu or weight.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled("cpu")
