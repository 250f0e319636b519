"""Attention with dropout on its weights, in training, without a fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moezoo.functional.dropout import LEVELS, dropout, kept


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, p: float
) -> Tensor:
    """dropout(softmax(q k^T + bias)) v for (B, H, L, dk) and an additive bias that broadcasts.

    On a CPU torch has no fused kernel for this; its composite keeps the weights, the mask and the
    dropped weights for backward, 9 bytes per pair. Here the sign of a weight says whether it was
    dropped: 4 bytes, and every step but the products works in place. It differentiates once;
    reduced precision takes the composite, whose softmax is in float32.
    """
    wide = query.dtype in (torch.float32, torch.float64)
    threshold = round(p * LEVELS)
    if not wide or torch.is_autocast_enabled("cpu") or not 0 < threshold < LEVELS:
        scores = query @ key.transpose(2, 3)
        scores = scores if bias is None else scores + bias
        return dropout(scores.softmax(-1), p, training=True).to(value.dtype) @ value
    out: Tensor = _DroppedAttention.apply(query, key, value, bias, threshold)  # type: ignore[no-untyped-call]
    return out


class _DroppedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, threshold: int
    ) -> Tensor:
        signed = torch.matmul(query, key.transpose(2, 3))
        if bias is not None:
            signed.add_(bias)
        torch.softmax(signed, -1, out=signed)
        sign = kept(signed.shape, threshold).mul_(2).sub_(1)
        signed.mul_(sign)
        ctx.scale = LEVELS / (LEVELS - threshold)
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(query, key, value, signed)
        return torch.matmul(signed.clamp(min=0), value).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, signed = ctx.saved_tensors
        grad = grad * ctx.scale
        weights = signed.clamp(min=0)
        grad_value = torch.matmul(weights.transpose(2, 3), grad)
        scores = torch.matmul(grad, value.transpose(2, 3))
        # In place from here on: the gradient of the dropped weights, of all, of the scores.
        torch.ops.aten.threshold_backward.grad_input(scores, signed, 0, grad_input=scores)
        torch.abs(signed, out=weights)
        torch.ops.aten._softmax_backward_data.out(
            scores, weights, -1, scores.dtype, grad_input=scores
        )
        grad_query = torch.matmul(scores, key)
        grad_key = torch.matmul(scores.transpose(2, 3), query)
        grad_bias = scores.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        return grad_query, grad_key, grad_value, grad_bias, None
