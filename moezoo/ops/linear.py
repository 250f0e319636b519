"""The linear map of the models, without a bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.ops.products import fast_products, limits, product


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times weight (N, K) transposed: `F.linear` without a bias.

    A CPU computes it with the fastest product for its number of rows (`moezoo.ops.products`);
    values differ from those of `F.linear` in the last bits. Twice differentiable.
    """
    if not fast_products(x, weight):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if not limits().in_training:
            return F.linear(x, weight)
        y_MN: Tensor = _Linear.apply(_rows_of(x), weight)  # type: ignore[no-untyped-call]
    else:
        y_MN = product(_rows_of(x), weight)
    return y_MN.view(*x.shape[:-1], weight.shape[0])


def _rows_of(x: Tensor) -> Tensor:
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    return x.view(rows, width) if x.is_contiguous() else x.reshape(rows, width)


class _Linear(torch.autograd.Function):
    """x W^T in training, where oneDNN's products are the faster ones."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight)
        return product(x_MK, weight, training=True)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_MK, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            # A second gradient is of an operator that autograd knows.
            seen = torch.is_grad_enabled() or not fast_products(grad_MN, weight)
            grad_x = grad_MN @ weight if seen else product(grad_MN, weight.t(), training=True)
        return grad_x, grad_MN.t() @ x_MK if ctx.needs_input_grad[1] else None
