"""Products with weights of eight bits, for inference on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.private_torch import int8_product

_LEVELS = 127.0


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., N, K) int8 and scales (..., N, 1) float32 with x about codes * scale, row by row.

    A row of zeros has the scale 0; NaN and infinity pass into the scale, so that nothing that is
    computed from them looks finite.
    """
    x = x.float()
    scale = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True) / _LEVELS
    # A row of zeros is 0 / 0 here.
    codes = torch.div(x, scale).round_().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return codes.to(torch.int8), scale


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (n, K) times (codes * scale)^T for codes (M, K) int8 and scale (M,): (n, M) in x's dtype.

    Every row of x is rounded to eight bits by its own scale (LLM.int8(), arXiv 2208.07339, eq. 4),
    so that a row's result depends on that row alone; products add up exactly, in 32 bits.
    """
    if not x.shape[0]:
        return x.new_zeros(0, codes.shape[0])
    rows, row_scale = rounded_rows(x)
    if codes.shape[1] == 1:  # torch 2.13's product of int8 is wrong for one column
        product = rows.float() * codes.float().t()
    else:
        product = int8_product(rows, codes.t())
    return torch.mul(product, row_scale).mul_(scale).to(x.dtype)
