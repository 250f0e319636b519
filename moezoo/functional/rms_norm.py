"""Division by the root of the mean square, and its gradient by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.ops.eager import is_eager, is_followed, plain_gradients


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467, eq. 4, with eps), to train with.

    The value is that of `F.rms_norm` bit for bit. On a CPU torch composes it of five operators and
    autograd its gradient of a dozen, each a pass over memory: here it is three passes and two
    products with a vector. Twice differentiable. Elsewhere, and under `torch.compile`, this is
    `F.rms_norm`.
    """
    if not x.is_cpu or not is_eager() or not x.numel():
        return F.rms_norm(x, weight.shape, weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        if is_followed(grad):
            grads = plain_gradients(
                lambda x, weight: F.rms_norm(x, weight.shape, weight, ctx.eps),
                (x, weight),
                grad,
                ctx.needs_input_grad[:2],
            )
            return grads[0], grads[1], None
        width = weight.shape[0]
        both = (grad * x).reshape(-1, width)
        inverse_T = inverse.reshape(-1)
        grad_weight = torch.mv(both.t(), inverse_T) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        # y = x w r with r = (mean(x^2) + eps)^-1/2, so dr = -r^3 / D x dx.
        along = torch.mv(both, weight).mul_(inverse_T.pow(3)).div_(-width).view(inverse.shape)
        grad_x = torch.mul(grad, weight).mul_(inverse).addcmul_(x, along)
        return grad_x, grad_weight, None
