"""E feed-forward networks over rows sorted by expert, on a device that the host runs ahead of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.functional.activations import Activation
from moezoo.functional.composed_mlp import composed_gradients
from moezoo.ops.backends import Backend, choose
from moezoo.ops.eager import is_eager, is_followed


def fits_device_mlp(x: Tensor, counts: Tensor, weights: Sequence[Tensor], p: float) -> bool:
    """Whether `device_mlp` applies: eager code on plain tensors of one GPU."""
    tensors = (x, counts, *weights)
    if not (x.is_cuda and is_eager() and p < 1.0):
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.device == x.device for t in tensors)


def device_mlp(
    x: Tensor,
    counts: Tensor,
    weights: Sequence[Tensor],
    *,
    function: Activation,
    p: float,
) -> Tensor:
    """`grouped_mlp` as one step of autograd on whichever backend suits the device.

    Against the same composed of `grouped_linear`: a third of the launches, the activation in place,
    and of the unused rows only those of the result and of the gradient of x are
    cleared, which are four times narrower than the hidden units.

    Args:
        weights: one or two (E, F, D), then (E, D, F); cast to the dtype of x, or to autocast's,
            where they are used.
    """
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    out: Tensor = _DeviceMLP.apply(function, p, x, counts, *weights)  # type: ignore[no-untyped-call]
    return out


class _DeviceMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Activation, p: float, x: Tensor, counts: Tensor, *weights: Tensor
    ) -> Tensor:
        *inner, outer = weights
        ctx.function, ctx.p = function, p
        ctx.relu = len(inner) == 1 and function is F.relu
        parts = [_linear(x, weight, counts) for weight in inner]
        hidden, mask = _activated(ctx, parts)
        # With relu the hidden units say by themselves what was dropped, or where relu was flat.
        saved = [hidden] if ctx.relu else parts if mask is None else [*parts, mask]
        ctx.save_for_backward(x, counts, *weights, *saved)
        ctx.num_weights = len(weights)
        return _linear(hidden, outer, counts, tail=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, counts, *rest = ctx.saved_tensors
        weights, saved = rest[: ctx.num_weights], rest[ctx.num_weights :]
        if is_followed(grad):
            return _composed_backward(ctx, grad, x, counts, weights, saved)
        *inner, outer = weights
        wants_x, (*wants_inner, wants_outer) = ctx.needs_input_grad[2], ctx.needs_input_grad[4:]
        grad = grad.contiguous()
        hidden, grad_parts = _activation_backward(
            ctx, saved, _linear(grad, outer.transpose(1, 2), counts)
        )
        grad_outer = _outer(grad, hidden, counts, outer) if wants_outer else None
        grads = [
            _outer(part, x, counts, weight) if wanted else None
            for part, weight, wanted in zip(grad_parts, inner, wants_inner, strict=True)
        ]
        grad_x = None
        if wants_x:
            back = [
                _linear(part, weight.transpose(1, 2), counts, tail=True)
                for part, weight in zip(grad_parts, inner, strict=True)
            ]
            grad_x = back[0] if len(back) == 1 else back[0] + back[1]
        return None, None, grad_x, None, *grads, grad_outer


def _backend(x: Tensor, other: Tensor, counts: Tensor) -> Backend:
    return choose("auto", x, other, counts)


def _linear(x: Tensor, weight: Tensor, counts: Tensor, *, tail: bool = False) -> Tensor:
    tail = tail or torch.is_anomaly_enabled()  # which looks at unused rows too
    return _backend(x, weight, counts).linear(x, weight, counts, tail=tail)


def _outer(a: Tensor, b: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    return _backend(a, b, counts).outer(a, b, counts).to(weight.dtype)


def _activated(ctx: Any, parts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The hidden units, and which of them stayed where a unit may be dropped."""
    if ctx.relu:
        hidden = parts[0].relu_()
    else:
        hidden = ctx.function(parts[0])
        hidden = hidden * parts[1] if len(parts) == 2 else hidden
    if not ctx.p:
        return hidden, None
    dropped, mask = torch.native_dropout(hidden, ctx.p, True)
    return dropped, mask


def _activation_backward(
    ctx: Any, saved: list[Tensor], grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The hidden units, and the gradients of the products that they are made of."""
    scale = 1.0 / (1.0 - ctx.p)
    if ctx.relu:
        hidden = saved[0]
        torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=grad)
        return hidden, (grad.mul_(scale) if ctx.p else grad,)
    parts, mask = (saved[:-1], saved[-1]) if ctx.p else (saved, None)
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in parts]
        hidden = ctx.function(leaves[0])
        hidden = hidden * leaves[1] if len(leaves) == 2 else hidden
        hidden = hidden if mask is None else hidden * mask * scale
        found = torch.autograd.grad(hidden, leaves, grad)
    return hidden.detach(), found


def _composed_backward(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    counts: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients as a function that autograd can follow, with the same units dropped."""
    mask = (saved[-1] != 0).to(x.dtype) / (1.0 - ctx.p) if ctx.p else None
    wants = (ctx.needs_input_grad[2], *ctx.needs_input_grad[4:])
    grad_x, *grads = composed_gradients(x, counts, weights, ctx.function, mask, grad, wants)
    return None, None, grad_x, None, *grads
