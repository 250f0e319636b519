"""The linear map of the models, without a bias."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.ops.products import fast_products, product


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times weight (N, K) transposed: `F.linear` without a bias.

    Without a gradient to keep, a CPU computes it with the fastest product for its number of rows
    (`moezoo.ops.products`); values differ from those of `F.linear` in the last bits.
    """
    if torch.is_grad_enabled() or not fast_products(x, weight):
        return F.linear(x, weight)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    x_MK = x.view(rows, width) if x.is_contiguous() else x.reshape(rows, width)
    return product(x_MK, weight).view(*x.shape[:-1], weight.shape[0])
