"""Two Triton kernels for a layer of experts: gather, product and activation; product, weight and
scatter.

Between tokens and tokens only the hidden units (N, F) are written; the rows sorted by expert exist
in neither direction. As in `triton_kernels` the host never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moezoo.ops.triton_kernels import Tiling, constants, find_tile, multiply, outer, tiling

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


@triton.jit
def activate(x: tl.tensor, FUNCTION: tl.constexpr):
    if FUNCTION == "relu":
        x = tl.maximum(x, 0.0)
    if FUNCTION == "silu":
        x = x * tl.sigmoid(x)
    if FUNCTION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def hidden_kernel(
    x_ptr: tl.tensor,
    token_ptr: tl.tensor,
    first_weight_ptr: tl.tensor,
    second_weight_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    num_cols: tl.tensor,
    depth: tl.tensor,
    stride_x: tl.tensor,
    stride_xk: tl.tensor,
    stride_e: tl.tensor,
    stride_m: tl.tensor,
    stride_k: tl.tensor,
    stride_e2: tl.tensor,
    stride_m2: tl.tensor,
    stride_k2: tl.tensor,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    KEPT: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    expert, first, end = find_tile(counts_ptr, num_rows, num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    valid = rows < end
    depth = tl.where(expert < num_experts, depth, 0)
    place = tl.load(token_ptr + rows, mask=valid, other=0)
    weight_ptr = first_weight_ptr + expert.to(tl.int64) * stride_e
    total = multiply(
        x_ptr, place, valid, stride_x, stride_xk,
        weight_ptr, cols, num_cols, stride_m, stride_k,
        depth, ROWS, COLS, DEPTH, PRECISION, UPCAST,
    )  # fmt: skip
    inside = valid[:, None] & (cols < num_cols)[None, :]
    target = rows[:, None] * num_cols + cols[None, :]
    if KEPT:
        tl.store(first_ptr + target, total.to(first_ptr.dtype.element_ty), mask=inside)
    hidden = activate(total, FUNCTION)
    if GATED:
        weight_ptr = second_weight_ptr + expert.to(tl.int64) * stride_e2
        total = multiply(
            x_ptr, place, valid, stride_x, stride_xk,
            weight_ptr, cols, num_cols, stride_m2, stride_k2,
            depth, ROWS, COLS, DEPTH, PRECISION, UPCAST,
        )  # fmt: skip
        if KEPT:
            tl.store(second_ptr + target, total.to(second_ptr.dtype.element_ty), mask=inside)
        hidden = hidden * total
    tl.store(hidden_ptr + target, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scatter_kernel(
    x_ptr: tl.tensor,
    token_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    num_cols: tl.tensor,
    depth: tl.tensor,
    stride_x: tl.tensor,
    stride_xk: tl.tensor,
    stride_e: tl.tensor,
    stride_m: tl.tensor,
    stride_k: tl.tensor,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    expert, first, end = find_tile(counts_ptr, num_rows, num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    if ADDED:  # to zeros, which unused rows leave as they are
        if expert == num_experts:
            return
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    valid = rows < end
    depth = tl.where(expert < num_experts, depth, 0)
    weight_ptr += expert.to(tl.int64) * stride_e
    total = multiply(
        x_ptr, rows, valid, stride_x, stride_xk,
        weight_ptr, cols, num_cols, stride_m, stride_k,
        depth, ROWS, COLS, DEPTH, PRECISION, UPCAST,
    )  # fmt: skip
    if GATE:
        total *= tl.load(gate_ptr + rows, mask=valid, other=0.0).to(tl.float32)[:, None]
    place = tl.load(token_ptr + rows, mask=valid, other=0)
    out_ptrs = out_ptr + place[:, None] * num_cols + cols[None, :]
    inside = valid[:, None] & (cols < num_cols)[None, :]
    if ADDED:
        tl.atomic_add(out_ptrs, total, mask=inside, sem="relaxed")
    else:
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


def for_two_products(tile: Tiling) -> Tiling:
    """The tiles of a kernel that holds two results at a time."""
    return replace(tile, cols=min(tile.cols, 128))


def hidden_units(
    x: Tensor,
    token: Tensor,
    weights: Sequence[Tensor],
    counts: Tensor,
    *,
    function: str = "",
    keep: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Row r of expert e: fn(x[token[r]] weights_0[e]^T) [* (x[token[r]] weights_1[e]^T)].

    Args:
        x: (T, D). token: (N,) int64. weights: one or two (E, F, D). counts: (E,).
        function: one of `FUNCTIONS`, or "" for none.

    Returns:
        (N, F), zero in rows past the counts; and, to keep for backward, the one or two products.
    """
    num_rows, (num_experts, num_cols, depth) = token.shape[0], weights[0].shape
    hidden = x.new_empty(num_rows, num_cols)
    products = [torch.empty_like(hidden) for _ in weights] if keep else []
    kept = products or [hidden]
    if hidden.numel():
        tile = tiling(x, *weights)
        tile = for_two_products(tile) if len(weights) == 2 else tile
        grid = (tile.programs(num_rows, num_experts), triton.cdiv(num_cols, tile.cols))
        with torch.cuda.device_of(x):
            hidden_kernel[grid](
                x, token, weights[0], weights[-1], counts, hidden, kept[0], kept[-1],
                num_rows, num_experts, num_cols, depth,
                *x.stride(), *weights[0].stride(), *weights[-1].stride(),
                FUNCTION=function, GATED=len(weights) == 2, KEPT=keep,
                **constants(tile, num_experts),
            )  # fmt: skip
    return hidden, products


def scattered(
    x: Tensor,
    token: Tensor,
    weight: Tensor,
    counts: Tensor,
    num_tokens: int,
    *,
    gate: Tensor | None = None,
    once: bool,
) -> Tensor:
    """The sum over the rows of each token of [gate[r] *] x[r] weight[e]^T: (T, D).

    Args:
        x: (N, F), rows sorted by expert. token: (N,) int64. weight: (E, D, F). gate: (N,).
        once: every token has exactly one row, kept or not: rows are stored. Else they are added up
            in float32, in an order that the device chooses.
    """
    num_rows, (num_experts, num_cols, depth) = token.shape[0], weight.shape
    shape = (num_tokens, num_cols)
    out = x.new_empty(shape) if once else x.new_zeros(shape, dtype=torch.float32)
    if out.numel() and num_rows:
        tile = tiling(x, weight)
        grid = (tile.programs(num_rows, num_experts), triton.cdiv(num_cols, tile.cols))
        with torch.cuda.device_of(x):
            scatter_kernel[grid](
                x, token, x if gate is None else gate, weight, counts, out,
                num_rows, num_experts, num_cols, depth, *x.stride(), *weight.stride(),
                GATE=gate is not None, ADDED=not once, **constants(tile, num_experts),
            )  # fmt: skip
    return out.to(x.dtype)


class ExpertsOfTokens(torch.autograd.Function):
    """x (T, D), gate (N,), token (N,), counts (E,), weights -> (T, D); see `experts_of_tokens`."""

    @staticmethod
    def forward(
        ctx: Any,
        function: str,
        once: bool,
        x: Tensor,
        gate: Tensor,
        token: Tensor,
        counts: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        *inner, last = weights
        # The hidden units after a relu say by themselves where its gradient is zero.
        ctx.relu = len(inner) == 1 and function == "relu"
        keep = not ctx.relu and any(ctx.needs_input_grad)
        hidden, products = hidden_units(x, token, inner, counts, function=function, keep=keep)
        ctx.function, ctx.once = function, once
        ctx.save_for_backward(x, gate, token, counts, *weights, *(products or [hidden]))
        ctx.num_weights = len(weights)
        return scattered(hidden, token, last, counts, x.shape[0], gate=gate, once=once)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, token, counts, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.num_weights], rest[ctx.num_weights :]
        *inner, last = weights
        grad_hidden, _ = hidden_units(grad, token, [last.transpose(1, 2)], counts)
        # y = hidden last^T, so <grad, y> = <grad last, hidden>: y itself is not needed.
        weighted = grad_hidden * gate[:, None].to(grad_hidden.dtype)
        hidden, grad_products = _activation_backward(ctx, kept, weighted)
        grad_gate = (grad_hidden.float() * hidden.float()).sum(1).to(gate.dtype)
        weighted_hidden = hidden * gate[:, None].to(hidden.dtype)
        grad_last = outer(grad, weighted_hidden, counts, a_rows=token, dtype=last.dtype)
        grad_inner = [
            outer(part, x, counts, b_rows=token, dtype=weight.dtype)
            for part, weight in zip(grad_products, inner, strict=True)
        ]
        back = [
            scattered(part, token, w.transpose(1, 2), counts, x.shape[0], once=ctx.once)
            for part, w in zip(grad_products, inner, strict=True)
        ]
        grad_x = back[0] if len(back) == 1 else back[0] + back[1]
        return None, None, grad_x, grad_gate, None, None, *grad_inner, grad_last


def _activation_backward(
    ctx: Any, kept: list[Tensor], grad_hidden: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The hidden units, and the gradients of the products that they are made of."""
    if ctx.relu:
        hidden = kept[0]
        return hidden, [torch.where(hidden > 0, grad_hidden, 0.0)]
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in kept]
        hidden = FUNCTIONS[ctx.function](leaves[0])
        hidden = hidden * leaves[1] if len(leaves) == 2 else hidden
        found = torch.autograd.grad(hidden, leaves, grad_hidden)
    return hidden.detach(), list(found)


def experts_of_tokens(
    x: Tensor,
    token: Tensor,
    gate: Tensor,
    counts: Tensor,
    inner: Sequence[Tensor],
    last: Tensor,
    *,
    function: str,
    once: bool,
) -> Tensor:
    """At each token the sum over its rows r, of expert e, of
    gate[r] * (fn(x inner_0[e]^T) [* (x inner_1[e]^T)]) last[e]^T. Differentiable once.

    Args:
        x: (T, D). token, gate: (N,), the token and the weight of each row, sorted by expert.
            counts: (E,) int64. inner: one or two (E, F, D). last: (E, D, F).
        function: one of `FUNCTIONS`.
        once: see `scattered`.

    Returns:
        (T, D), zero for tokens without a row among the first counts.sum().
    """
    counts, token, gate = counts.contiguous(), token.contiguous(), gate.contiguous()
    out: Tensor = ExpertsOfTokens.apply(function, once, x, gate, token, counts, *inner, last)
    return out
