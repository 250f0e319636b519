"""E linear maps over rows sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo.ops.few_rows import MOST_ROWS, few_rows_linear


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        return _loop(x, weight, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, counts = ctx.saved_tensors
        grad_x = (
            grouped_linear(grad, weight.transpose(1, 2), counts)
            if ctx.needs_input_grad[0]
            else None
        )
        grad_w = None
        if ctx.needs_input_grad[1]:
            grad_w = _GroupedOuter.apply(grad, x, counts)  # type: ignore[no-untyped-call]
        return grad_x, grad_w, None


class _GroupedOuter(torch.autograd.Function):
    """Per expert a^T b over its rows: (N, M), (N, K) -> (E, M, K)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, counts)
        out = a.new_empty(counts.shape[0], a.shape[1], b.shape[1])
        for expert, count in enumerate(counts.tolist()):
            if not count:
                out[expert].zero_()
        for expert, rows in _runs(counts):
            torch.mm(a[rows].t(), b[rows], out=out[expert])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, counts = ctx.saved_tensors
        return (
            grouped_linear(b, grad, counts),
            grouped_linear(a, grad.transpose(1, 2), counts),
            None,
        )


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Row r of expert e times weight[e]^T.

    Args:
        x: (N, K), rows sorted by expert. weight: (E, M, K). counts: (E,) int64.

    Returns:
        (N, M), zero in rows past counts.sum().
    """
    out: Tensor = _GroupedLinear.apply(x, weight, counts)  # type: ignore[no-untyped-call]
    return out


def _loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    runs = _runs(counts)
    out[runs[-1][1].stop if runs else 0 :].zero_()
    # Under autocast the product would round to bfloat16; `mm` with `out` does not.
    thin = x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    for expert, rows in runs:
        if thin and rows.stop - rows.start <= MOST_ROWS:
            out[rows] = few_rows_linear(x[rows], weight[expert])
        else:
            torch.mm(x[rows], weight[expert].t(), out=out[rows])
    return out


def _runs(counts: Tensor) -> list[tuple[int, slice]]:
    runs, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            runs.append((expert, slice(start, start + count)))
        start += count
    return runs
