"""Gates: scores of experts, always computed in float32 or better (selective precision, section
2.4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.ops.products import fast_products, steady_product


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 when the input is float64."""
    return torch.promote_types(dtype, torch.float32)


def gate_logits(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Expert scores (T, E) of tokens (T, D) for a classifier (E, D) [+ (E,)].

    Switch Transformers, eq. 1 before the softmax. Autocast is switched off around the product:
    under it, a float32 gate would silently run in bfloat16.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        with torch.autocast(x_TD.device.type, enabled=False):
            return _gate_logits(x_TD, weight, bias)
    return _gate_logits(x_TD, weight, bias)


def _gate_logits(x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = gate_dtype(x_TD.dtype)
    x_TD, weight = x_TD.to(dtype), weight.to(dtype)
    if not fast_products(x_TD, weight):
        return F.linear(x_TD, weight, None if bias is None else bias.to(dtype))
    # One product with and without a gradient: a recomputation routes as the first run did.
    if torch.is_grad_enabled():
        logits_TE: Tensor = _Product.apply(x_TD, weight)  # type: ignore[no-untyped-call]
    else:
        logits_TE = steady_product(x_TD, weight)
    return logits_TE if bias is None else logits_TE + bias.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T, a token's scores with the same bits alone and in a batch."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        return steady_product(x_TD, weight)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight = ctx.saved_tensors
        grad_x = grad_TE @ weight if ctx.needs_input_grad[0] else None
        return grad_x, grad_TE.t() @ x_TD if ctx.needs_input_grad[1] else None


def jittered(x_TD: Tensor, epsilon: float) -> Tensor:
    """A copy of x in gate precision, each entry times U(1 - epsilon, 1 + epsilon) (section 2.4).

    The multiplication is on the router's input; the experts never see it.
    """
    x_TD = x_TD.to(gate_dtype(x_TD.dtype))
    return x_TD * torch.empty_like(x_TD).uniform_(1.0 - epsilon, 1.0 + epsilon)
