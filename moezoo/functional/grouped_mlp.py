"""E feed-forward networks over rows sorted by expert, as one step of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.functional.activations import Activation
from moezoo.functional.composed_mlp import composed_gradients, composed_mlp
from moezoo.functional.device_mlp import device_mlp, fits_device_mlp
from moezoo.functional.dropout import LEVELS, dropout_mask
from moezoo.ops.backends import Runs, runs_of
from moezoo.ops.eager import is_eager, is_followed
from moezoo.ops.memory import stacked_gradient
from moezoo.ops.products import outer_product, product


def grouped_mlp(
    x: Tensor,
    counts: Tensor,
    inner: Sequence[Tensor],
    outer: Tensor,
    *,
    function: Activation,
    p: float = 0.0,
    biases: Sequence[Tensor] = (),
) -> Tensor:
    """Row r of expert e becomes dropout(fn(x inner_0[e]^T) [* (x inner_1[e]^T)]) outer[e]^T, with
    biases where there are any.

    On a CPU each expert runs from its rows to its result while they are in the cache; backward
    keeps the hidden units (with relu) or what they are computed from, one gradient per parameter is
    allocated, and experts without rows cost nothing. On a GPU it is `device_mlp`. Under
    `torch.compile`, `torch.export` and autocast on a CPU, and with biases on a GPU or for a
    gradient, the same is composed of `grouped_linear`.

    Args:
        x: (N, D), rows sorted by expert. counts: (E,) int64. inner: one or two (E, F, D). outer:
            (E, D, F).
        p: the probability with which a hidden unit is dropped.
        biases: none, or of each inner (E, F), then of the outer (E, D).

    Returns:
        (N, D), zero in rows past counts.sum(). Twice differentiable.
    """
    weights = (*inner, outer)
    if not biases and fits_device_mlp(x, counts, weights, p):
        return device_mlp(x, counts, weights, function=function, p=p)
    threshold = round(p * LEVELS)
    if not _fuses(x, counts, (*weights, *biases)) or not threshold < LEVELS:
        return composed_mlp(x, counts, weights, function, p, biases=biases)
    wants = any(tensor.requires_grad for tensor in (x, *weights, *biases))
    if threshold or (wants and torch.is_grad_enabled()):
        if biases:
            return composed_mlp(x, counts, weights, function, p, biases=biases)
        out: Tensor = _FusedMLP.apply(function, threshold, x, counts, *weights)  # type: ignore[no-untyped-call]
        return out
    return _inferred(x, runs_of(counts), weights, function, biases)


def lone_mlp(
    x: Tensor,
    expert: int,
    inner: Sequence[Tensor],
    outer: Tensor,
    *,
    function: Activation,
    biases: Sequence[Tensor] = (),
) -> Tensor:
    """`grouped_mlp` for rows (n, D) of one expert, without a gradient and dropout."""
    if biases:
        return _biased(x, expert, (*inner, outer), function, biases)
    hidden = _hidden(_projected(x, inner, expert, function), function)
    return product(hidden, outer[expert])


def _biased(
    x: Tensor,
    expert: int,
    weights: Sequence[Tensor],
    function: Activation,
    biases: Sequence[Tensor],
) -> Tensor:
    """The rows of one expert, without a gradient."""
    *parts, outer = zip(weights, biases, strict=True)
    first, *others = (product(x, weight[expert]).add_(bias[expert]) for weight, bias in parts)
    hidden = function(first)
    for other in others:
        hidden = hidden * other
    return product(hidden, outer[0][expert]).add_(outer[1][expert])


def _fuses(x: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> bool:
    if not is_eager() or torch.is_autocast_enabled("cpu"):
        return False
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (x, counts, *weights))
    return plain and x.is_cpu and all(w.is_cpu and w.dtype == x.dtype for w in weights)


def _inferred(
    x: Tensor,
    runs: Runs,
    weights: Sequence[Tensor],
    function: Activation,
    biases: Sequence[Tensor],
) -> Tensor:
    """Without gradient and dropout: one expert's hidden units at a time."""
    *inner, outer = weights
    out = _empty_result(x, runs, outer)
    for expert, rows in runs:
        y = lone_mlp(x[rows], expert, inner, outer, function=function, biases=biases)
        if rows.stop - rows.start == x.shape[0]:
            return y
        out[rows] = y
    return out


def _empty_result(x: Tensor, runs: Runs, outer: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], outer.shape[1])
    out[runs[-1][1].stop if runs else 0 :].zero_()
    return out


def _projected(
    x: Tensor, inner: Sequence[Tensor], expert: int, function: Activation, training: bool = False
) -> list[Tensor]:
    """What backward needs of the hidden units: themselves with relu, else what fn is applied to."""
    relu = len(inner) == 1 and function is F.relu
    return [product(x, weight[expert], relu=relu, training=training) for weight in inner]


def _hidden(parts: list[Tensor], function: Activation) -> Tensor:
    if len(parts) == 2:
        gate = function(parts[0])
        return gate * parts[1] if gate.requires_grad else gate.mul_(parts[1])
    return parts[0] if function is F.relu else function(parts[0])


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Activation, threshold: int, x: Tensor, counts: Tensor, *weights: Tensor
    ) -> Tensor:
        *inner, outer = weights
        ctx.function, ctx.threshold, ctx.runs = function, threshold, runs_of(counts)
        ctx.scale = LEVELS / (LEVELS - threshold)
        ctx.relu = len(inner) == 1 and function is F.relu
        out = _empty_result(x, ctx.runs, outer)
        saved_parts: list[Tensor] = []
        for expert, rows in ctx.runs:
            parts = _projected(x[rows], inner, expert, function, training=True)
            hidden = _hidden(parts, function)
            if threshold:
                mask = dropout_mask(hidden.shape, threshold)
                hidden = hidden.mul_(mask) if ctx.relu else hidden * mask
                hidden.mul_(ctx.scale)
                if not ctx.relu:  # with relu the result shows by itself what was dropped
                    parts.append(mask)
            out[rows] = product(hidden, outer[expert], training=True)
            saved_parts += parts
        ctx.save_for_backward(x, counts, *weights, *saved_parts)
        ctx.num_weights = len(weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, counts, *rest = ctx.saved_tensors
        weights, saved_parts = rest[: ctx.num_weights], rest[ctx.num_weights :]
        per_run = len(saved_parts) // max(len(ctx.runs), 1)
        by_run = [saved_parts[i : i + per_run] for i in range(0, len(saved_parts), per_run or 1)]
        if is_followed(grad):
            return _composed_backward(ctx, grad, x, counts, weights, by_run)
        wants = ctx.needs_input_grad[4:]
        grad_x = _empty_result(x, ctx.runs, weights[-1]) if ctx.needs_input_grad[2] else None
        hit = [expert for expert, _ in ctx.runs]
        grads = [
            stacked_gradient(weight.shape, weight, hit) if want else None
            for weight, want in zip(weights, wants, strict=True)
        ]
        grad = grad.contiguous()
        for (expert, rows), parts in zip(ctx.runs, by_run, strict=True):
            _backward_of_run(ctx, expert, rows, grad[rows], x[rows], weights, parts, grads, grad_x)
        return None, None, grad_x, None, *grads


def _backward_of_run(
    ctx: Any,
    expert: int,
    rows: slice,
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    parts: list[Tensor],
    grads: Sequence[Tensor | None],
    grad_x: Tensor | None,
) -> None:
    """Fill in what the rows of one expert contribute; see `_FusedMLP`."""
    *inner, outer = weights
    *inner_grads, outer_grad = grads
    grad_hidden = product(grad, outer[expert].t(), training=True)
    if ctx.relu:
        hidden = parts[0]
        torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
        grad_parts: tuple[Tensor, ...] = (
            grad_hidden.mul_(ctx.scale) if ctx.threshold else grad_hidden,
        )
    else:
        hidden, grad_parts = _activation_backward(ctx, parts[: len(inner)], parts, grad_hidden)
    if outer_grad is not None:
        outer_product(grad, hidden, out=outer_grad[expert])
    for index, (weight, part) in enumerate(zip(inner, grad_parts, strict=True)):
        target = inner_grads[index]
        if target is not None:
            outer_product(part, x, out=target[expert])
        if grad_x is not None:
            back = product(part, weight[expert].t(), training=True)
            grad_x[rows] = grad_x[rows] + back if index else back


def _activation_backward(
    ctx: Any, inputs: list[Tensor], parts: list[Tensor], grad_hidden: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The hidden units, computed again, and the gradients of what they are computed from."""
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in inputs]
        hidden = _hidden(leaves, ctx.function)
        if ctx.threshold:
            hidden = hidden * parts[-1] * ctx.scale
        found = torch.autograd.grad(hidden, leaves, grad_hidden)
    return hidden.detach(), found


def _composed_backward(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    counts: Tensor,
    weights: Sequence[Tensor],
    by_run: list[list[Tensor]],
) -> tuple[Tensor | None, ...]:
    """The gradients as a function that autograd can follow, with the same units dropped."""
    mask = None
    if ctx.threshold:
        mask = x.new_zeros(x.shape[0], weights[0].shape[1])
        for (_, rows), parts in zip(ctx.runs, by_run, strict=True):
            mask[rows] = (parts[-1] != 0).to(x.dtype) * ctx.scale
    wants = (ctx.needs_input_grad[2], *ctx.needs_input_grad[4:])
    grad_x, *grads = composed_gradients(x, counts, weights, ctx.function, mask, grad, wants)
    return None, None, grad_x, None, *grads
